"""channel_attention against eager PyTorch and torch.compile, with a plain copy beside them; forward and backward.

What must be moved: the forward reads x and writes y, the backward reads x and ∂y and writes ∂x; all else is small. The
two linear layers are 4 H C operations an image, for each of its C · HW elements 4 H / HW: only where maps are small do
they show.
"""

import functools
import math

import torch
import torch.nn.functional as F

from paamops.ops.channel_attention import channel_attention

from .harness import Case, compiled
from .scale_channels import LAYOUTS, label

REDUCTION = 16
SHAPES = [((128, 16, 32, 32), 4), ((128, 64, 8, 8), 4), ((64, 256, 8, 8), 256 // REDUCTION)]  # and hidden units


def eager(x, *parameters):
    """As a module would compute it, after a ReLU."""
    reduce_weight, reduce_bias, expand_weight, expand_bias = (p.to(x.dtype) for p in parameters)
    a = F.relu(x)
    hidden = F.relu(F.linear(a.mean((2, 3)), reduce_weight, reduce_bias))
    saliency = torch.sigmoid(F.linear(hidden, expand_weight, expand_bias))
    return a * saliency[:, :, None, None], saliency


def inputs(shape, hidden, dtype, layout, device):
    """x and the parameters. x keeps away from 0, where the gradient of the ReLU jumps."""
    x = torch.randn(shape, device=device)
    x = (x + 0.1 * x.sign()).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    channels = shape[1]
    draw = functools.partial(torch.rand, device=device)
    weights = draw(hidden, channels) / channels, draw(hidden) + 0.1, draw(channels, hidden) / hidden, draw(channels)
    return x, *weights  # positive: so are the hidden units


def in_float64(x, *parameters):
    return eager(x.double(), *(p.double() for p in parameters))


def forward(shape, hidden, dtype, layout):
    """x is read once, y is written once."""
    return Case(
        name=f"channel_attention {label(shape, dtype, layout)}",
        op="channel_attention",
        make=lambda device: inputs(shape, hidden, dtype, layout, device),
        run=lambda *tensors: channel_attention(*tensors, "relu"),
        check=in_float64,
        baselines={"eager": eager, "compile": compiled(eager), "copy": lambda x, *parameters: x.clone()},
        bytes=2 * math.prod(shape) * dtype.itemsize,
        target={"eager": 1.5, "compile": 1},
    )


def gradients(grad, grad_saliency, x, reduce_weight, expand_weight, saliency, mean, hidden):
    """What autograd makes of `eager`, for torch.compile to fuse."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, given = F.relu(x).to(wide), grad.to(wide)
    of_logits = ((given * a).sum((2, 3)) + grad_saliency) * saliency * (1 - saliency)
    of_hidden = (of_logits @ expand_weight) * (hidden > 0)
    of_mean = of_hidden @ reduce_weight / math.prod(x.shape[2:])
    grad_x = torch.where(x > 0, given * saliency[:, :, None, None] + of_mean[:, :, None, None], 0)
    return grad_x.to(x.dtype), of_hidden.t() @ mean, of_hidden.sum(0), of_logits.t() @ hidden, of_logits.sum(0)


def backward(shape, hidden, dtype, layout):
    """The gradients of x and of the parameters from graphs built before: x and ∂y are read, ∂x is written."""

    def make(device):
        x, *parameters = inputs(shape, hidden, dtype, layout, device)
        grad = (torch.rand(shape, device=device) / math.prod(shape[2:])).to(dtype)
        grads = grad.contiguous(memory_format=LAYOUTS[layout]), torch.rand(shape[:2], device=device)
        mean = F.relu(x).float().mean((2, 3))
        units = F.relu(F.linear(mean, *parameters[:2]))
        small = parameters[0], parameters[2], torch.sigmoid(F.linear(units, *parameters[2:])), mean, units
        tensors = [t.detach().requires_grad_() for t in (x, *parameters)]
        return channel_attention(*tensors, "relu"), eager(*tensors), grads, tensors, small

    def of(outputs, grads, tensors):
        grads = [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True)]
        return torch.autograd.grad(outputs, tensors, grads, retain_graph=True)

    def check(ours, eagers, grads, tensors, small):
        wide = [t.detach().double().requires_grad_() for t in tensors]
        return torch.autograd.grad(eager(*wide), wide, [grad.double() for grad in grads])

    fused = compiled(gradients)
    return Case(
        name=f"channel_attention backward {label(shape, dtype, layout)}",
        op="channel_attention",
        make=make,
        run=lambda ours, eagers, grads, tensors, small: of(ours, grads, tensors),
        check=check,
        baselines={
            "eager": lambda ours, eagers, grads, tensors, small: of(eagers, grads, tensors),
            "compile": lambda ours, eagers, grads, tensors, small: fused(*grads, tensors[0].detach(), *small),
            "copy": lambda ours, eagers, grads, tensors, small: grads[0].clone(),
        },
        bytes=3 * math.prod(shape) * dtype.itemsize,
        target={"eager": 1.5, "compile": 1},
    )


CASES = [
    make(shape, hidden, dtype, layout)
    for make in (forward, backward)
    for shape, hidden in SHAPES
    for dtype, layout in (
        (torch.float32, "contiguous"),
        (torch.float32, "channels_last"),
        (torch.bfloat16, "contiguous"),
    )
]
