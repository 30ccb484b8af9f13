"""filter_distances over all layers of a network against torch.cdist layer by layer: by products, and by differences.

What must be done: n² d / 2 times a difference, a product and an addition for each layer of n filters of d weights; 3 of
them are counted. `cdist` is a matrix product of n² d multiply-adds, whose result is off where filters are near each
other; `differences` is cdist without it, as exact as ours.
"""

import torch

from paamops.ops.filter_distances import filter_distances

from .filter_norms import NETWORKS, make
from .harness import Case


def eager(*weights, mode="use_mm_for_euclid_dist"):
    rows = [weight.flatten(1) for weight in weights]
    return torch.cat([torch.cdist(row, row, compute_mode=mode).sum(1) for row in rows])


def differences(*weights):
    return eager(*weights, mode="donot_use_mm_for_euclid_dist")


def check(*weights):
    """By products in float64, whose rounding is far below that of a float32 for filters as far apart as these."""
    sums = []
    for weight in weights:
        rows = weight.double().flatten(1)
        gram = rows @ rows.t()
        squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
        sums.append(squares.clamp(min=0).fill_diagonal_(0).sqrt().sum(1))
    return torch.cat(sums)


def case(network, baselines, target):
    shapes = NETWORKS[network]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return Case(
        name=f"filter_distances {network} float32",
        op="filter_distances",
        make=make(shapes),
        run=lambda *weights: filter_distances(weights),
        check=check,
        baselines=baselines,
        flops=3 * sum(shape[0] * size for shape, size in zip(shapes, sizes, strict=True)) // 2,
        target=target,
        cold=False,  # arithmetic is what it costs
    )


CASES = [
    case("ResNet-50", {"cdist": eager}, {"cdist": 1}),  # by differences it takes minutes
    case("DenseNet-121", {"cdist": eager, "differences": differences}, {"cdist": 1, "differences": 5}),
]
