"""scatter_channels against eager zeros and index_copy, torch.compile and a copy of the result; and the way back."""

import math

import torch

from paamops.ops.scatter_channels import inverse, plain, scatter_channels_op

from .harness import Case, compiled

SHAPES = [(64, 256, 56, 56), (128, 16, 32, 32)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def inputs(shape, dtype, layout, device):
    """A branch that kept every second of its channels, where these go, and the inverse."""
    n, width, *space = shape
    index = torch.arange(0, width, 2, device=device)
    x = torch.rand(n, len(index), *space, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    return x, index, inverse(index, width)


def eager(x, index, source):
    """Zeros of the stream's width, and the branch copied into them."""
    return x.new_zeros(x.shape[0], len(source), *x.shape[2:]).index_copy_(1, index, x)


def label(shape, dtype, layout):
    """How the cases are named."""
    return f"{shape[1] // 2} of {'x'.join(map(str, shape))} {str(dtype)[6:]} {layout}"


def forward(shape, dtype, layout):
    """Half of the result's size is read, all of it is written."""

    def wanted(x, index, source):
        y = torch.zeros(shape, dtype=torch.float64, device=x.device)
        y[:, index] = x.double()
        return y

    return Case(
        name=f"scatter_channels {label(shape, dtype, layout)}",
        op="scatter_channels",
        make=lambda device: inputs(shape, dtype, layout, device),
        run=scatter_channels_op,
        check=wanted,
        baselines={
            "eager": eager,
            "compile": compiled(lambda x, index, source: plain(x, source)),
            "copy": lambda x, *others: torch.cat([x, x], 1),
        },
        bytes=3 * math.prod(shape) // 2 * dtype.itemsize,
        target={"eager": 1, "copy": 1 / 1.2},
    )


def backward(shape, dtype, layout):
    """The same op the other way: what the kept channels got is read and written, the rest is not touched."""

    def make(device):
        _, index, source = inputs(shape, dtype, layout, device)
        grad = torch.rand(shape, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        return grad, source, index

    return Case(
        name=f"scatter_channels backward {label(shape, dtype, layout)}",
        op="scatter_channels",
        make=make,
        run=scatter_channels_op,
        check=lambda grad, source, index: grad[:, index].double(),
        baselines={
            "eager": lambda grad, source, index: grad.index_select(1, index),
            "copy": lambda grad, *others: grad[:, : shape[1] // 2].clone(),
        },
        bytes=math.prod(shape) * dtype.itemsize,
        target={"eager": 1, "copy": 1 / 1.2},
    )


CASES = [
    make(shape, dtype, layout)
    for make in (forward, backward)
    for shape in SHAPES
    for dtype, layout in (
        (torch.float32, "contiguous"),
        (torch.float32, "channels_last"),
        (torch.bfloat16, "contiguous"),
    )
]
