"""Filters of layers, for the tests of filter_norms and filter_distances: every kind, layout and size."""

import math
import random

import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Shape, axis of the filters, groups: convolutions, linear layers, transposed ones; fewer and more than a vector, a row
# of vectors and a block of filters; one filter, one weight, none.
KINDS = [
    ((64, 3, 7, 7), 0, 1),
    ((20, 16, 3, 3), 0, 1),
    ((70, 33, 1, 1), 0, 1),
    ((40, 1, 3, 3), 0, 1),
    ((10, 130), 0, 1),
    ((3, 1000), 0, 1),
    ((5, 4, 3), 0, 1),
    ((6, 2, 3, 3, 3), 0, 1),
    ((17,), 0, 1),
    ((1, 9), 0, 1),
    ((12, 7, 4, 4), 1, 1),
    ((12, 7, 4, 4), 1, 3),
    ((6, 1, 3, 3), 1, 6),
    ((30, 66), 1, 1),
    ((8, 5, 3), 1, 2),
    ((0, 9), 0, 1),
    ((4, 0, 3), 0, 1),
    ((4, 0, 3), 1, 2),
    ((0, 4, 3), 1, 2),
]
LAYOUTS = {
    "contiguous": lambda w: w.clone(),
    "channels_last": lambda w: w.movedim(1, -1).contiguous().movedim(-1, 1) if w.ndim > 2 else w.clone(),
    "transposed": lambda w: w.transpose(0, -1).contiguous().transpose(0, -1),
    "every second weight": lambda w: torch.stack([w, torch.full_like(w, math.nan)], -1).flatten(-2)[..., ::2],
    "inside a larger one": lambda w: torch.nn.functional.pad(w, (1, 2) * w.ndim, value=math.nan)[
        tuple(slice(1, size + 1) for size in w.shape)
    ],
    "expanded": lambda w: w[..., :1].expand_as(w),
    "one filter expanded": lambda w: w[:1].expand_as(w),
}


def draw(shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def random_layers(chance, most=8):
    """Weights of one dtype with any layouts, and their axes and groups."""
    dtype = chance.choice(DTYPES)
    weights, axes, groups = [], [], []
    for _ in range(chance.randint(1, most)):
        axis = chance.randint(0, 1)
        group = chance.choice([1, 1, 2, 3]) if axis else 1
        sizes = [group * chance.randint(0, 12), chance.randint(0, 40), *[chance.randint(1, 5) for _ in range(2)]]
        if not axis:
            sizes[0] = chance.choice([chance.randint(0, 20), chance.randint(60, 140)])
        shape = sizes[: chance.randint(axis + 1, 4)]
        layout = chance.choice(list(LAYOUTS)) if math.prod(shape) else "contiguous"
        weights.append(LAYOUTS[layout](draw(shape, dtype, 10 ** chance.uniform(-2, 1))))
        axes.append(axis)
        groups.append(group)
    return weights, axes, groups


def rows_of(weight, axis, groups):
    """The filters one by one, (n, d) float64, on the CPU."""
    wide = weight.double().cpu()
    if axis == 0:
        filters = list(wide)
    else:
        inside = wide.shape[0] // groups
        filters = [wide[g * inside : (g + 1) * inside, j] for g in range(groups) for j in range(wide.shape[1])]
    return torch.stack([each.reshape(-1) for each in filters]) if filters else torch.empty(0, 1, dtype=torch.float64)


def chance_of(seed, repeat):
    return random.Random(f"{seed} {repeat}")
