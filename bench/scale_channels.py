"""scale_channels against the eager product, torch.compile and a plain copy; its backward against eager's autograd."""

import math

import torch

from paamops.ops.scale_channels import scale_channels

from .harness import Case, compiled

SHAPES = [(64, 256, 56, 56), (128, 16, 32, 32)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def eager(x, s):
    """The product in the dtype of x."""
    return x * s.to(x.dtype)[:, None, None]


def inputs(shape, dtype, layout, device):
    """x and s; positive, so that no sum of the backward cancels."""
    x = torch.rand(shape, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    return x, torch.rand(shape[1], device=device)


def label(shape, dtype, layout):
    """How the cases are named."""
    return f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {layout}"


def forward(shape, dtype, layout):
    """x is read once, y is written once."""
    return Case(
        name=f"scale_channels {label(shape, dtype, layout)}",
        op="scale_channels",
        make=lambda device: inputs(shape, dtype, layout, device),
        run=scale_channels,
        check=lambda x, s: x.double() * s.double()[:, None, None],
        baselines={"eager": eager, "compile": compiled(eager), "copy": lambda x, s: x.clone()},
        bytes=2 * math.prod(shape) * dtype.itemsize,
        target={"eager": 1, "copy": 1 / 1.2},
    )


def backward(shape, dtype, layout):
    """The gradients of x and s from graphs built before: x and ∂y are read once, ∂x is written once."""

    def make(device):
        x, s = inputs(shape, dtype, layout, device)
        grad = torch.rand_like(x)
        return grad, x.requires_grad_(), s.requires_grad_(), scale_channels(x, s), eager(x, s)

    def of(y, grad, x, s):
        return torch.autograd.grad(y, (x, s), grad, retain_graph=True)

    def formula(grad, x, s):
        """Both gradients, for torch.compile to fuse."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad * s.to(x.dtype)[:, None, None], (grad.to(wide) * x.to(wide)).sum((0, 2, 3)).to(s.dtype)

    fused = compiled(formula)
    return Case(
        name=f"scale_channels backward {label(shape, dtype, layout)}",
        op="scale_channels",
        make=make,
        run=lambda grad, x, s, ours, eagers: of(ours, grad, x, s),
        check=lambda grad, x, s, *graphs: (
            grad.double() * s.detach().double()[:, None, None],
            (grad.double() * x.detach().double()).sum((0, 2, 3)),
        ),
        baselines={
            "eager": lambda grad, x, s, ours, eagers: of(eagers, grad, x, s),
            "compile": lambda grad, x, s, *graphs: fused(grad, x.detach(), s.detach()),
            "copy": lambda grad, *others: grad.clone(),
        },
        bytes=3 * math.prod(shape) * dtype.itemsize,
        target={"eager": 1.5},
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
