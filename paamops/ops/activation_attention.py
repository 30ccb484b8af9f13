"""Activation attention: how strongly each filter responds, one score per channel of an activation map.

    sum[n, c] = Σ_s |x[n, c, s]|^p        max[n, c] = (max_s |x[n, c, s]|)^p

`activation_attention` is the public function; the op below it yields sum and max in one pass over x.
"""

import math
import numbers

import torch

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("mean", "max", "sum")


def activation_attention(x, p=1, reduction="mean", per_image=False):
    """A[c] = mean_n R_s |x[n, c, s]|^p, where R is the mean, the max or the sum over space.

    x: (N, C, *spatial), float16 to float64, any strides; it is read once and never copied as a whole.
    p: a finite number ≥ 1. reduction: "mean", "max", "sum", or a tuple of them for a tuple of results from one pass.
    Returns (C,), the mean over the images, or with `per_image` (N, C), in float32 (float64 for float64 x).
    NaN propagates. An activation without space (an empty spatial axis) has attention 0. Differentiable once; the max
    has its gradient at the first maximum in row-major order.
    TypeError: x is not a floating tensor, p is not a number. ValueError: x has fewer than two dimensions or, without
    `per_image`, no images; p < 1 or not finite; an unknown reduction.
    Source: AAP (activation attention, adaptive iterative pruning), §3.1.
    """
    check_arguments(x, p, reduction, per_image)
    return reduce(*activation_attention_op(x, float(p)), math.prod(x.shape[2:]), reduction, per_image)


def check_arguments(x, p, reduction, per_image):
    """Raise the error that names the argument, what it was and what it must be."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have at least two dimensions, (N, C, *spatial)")
    if not per_image and x.shape[0] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: no images to take the mean over; pass per_image=True")
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(f"p is a {type(p).__name__}; it must be a number")
    if not 1 <= p < math.inf:  # also refuses NaN
        raise ValueError(f"p is {p}; it must be finite and at least 1")
    names = reduction if isinstance(reduction, tuple) else (reduction,)
    if not names or any(name not in REDUCTIONS for name in names):
        raise ValueError(f"reduction is {reduction!r}; it must be one of {REDUCTIONS} or a tuple of them")


def reduce(total, peak, area, reduction, per_image):
    """From sum and max, (N, C) each, to what `reduction` asks for: (N, C), or (C,) as the mean over the images."""

    def one(name):
        value = {"mean": total / max(area, 1), "max": peak, "sum": total}[name]
        return value if per_image else value.mean(0)

    return tuple(one(name) for name in reduction) if isinstance(reduction, tuple) else one(reduction)


def activation_attention_reference(x, p):
    """sum, max: (N, C), accumulated in float32 (float64 for float64 x)."""
    magnitude = _maps(x).abs()
    peak = magnitude.amax(-1) if magnitude.shape[-1] else magnitude.sum(-1)
    return magnitude.pow(p).sum(-1), peak.pow(p)


def activation_attention_backward_reference(grad_sum, grad_max, x, max, p):
    """∂x = ∂sum · p|x|^(p-1) sign(x), plus ∂max · p|x|^(p-1) sign(x) at the first maximum: like x."""
    del max  # kernels find the maximum by it; here argmax does
    return torch.empty_like(x).copy_(attention_gradient(grad_sum, grad_max, x, p))


def attention_gradient(grad_sum, grad_max, x, p):
    """The gradient of sum and max with respect to x: x's shape, in the accumulator dtype."""
    maps = _maps(x)
    magnitude = maps.abs()
    slope = p * magnitude.pow(p - 1) * maps.sign()
    grad = grad_sum.unsqueeze(-1) * slope
    if grad.numel():
        first = magnitude.argmax(-1, keepdim=True)
        # A map without a gradient of its max takes no part, so that 0 · inf adds no NaN to it.
        at_first = torch.where(grad_max.unsqueeze(-1) == 0, 0, grad_max.unsqueeze(-1) * slope.gather(-1, first))
        grad.scatter_add_(-1, first, at_first)
    return grad.reshape(x.shape)


def _maps(x):
    """x as (N, C, area) in the accumulator dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype).reshape(*x.shape[:2], math.prod(x.shape[2:]))


def fake_attention(x):
    """An (N, C) result in the accumulator dtype."""
    return x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _save(ctx, inputs, output):
    x, ctx.p = inputs
    ctx.save_for_backward(x, output[1])


def _backward(ctx, grad_sum, grad_max):
    return activation_attention_backward_op(grad_sum, grad_max, *ctx.saved_tensors, ctx.p), None


activation_attention_backward_op = define(
    "activation_attention_backward(Tensor grad_sum, Tensor grad_max, Tensor x, Tensor max, float p) -> Tensor",
    reference=activation_attention_backward_reference,
    fake=lambda grad_sum, grad_max, x, max, p: torch.empty_like(x),
)

activation_attention_op = define(
    "activation_attention(Tensor x, float p) -> (Tensor sum, Tensor max)",
    reference=activation_attention_reference,
    fake=lambda x, p: (fake_attention(x), fake_attention(x)),
    setup_context=_save,
    backward=_backward,
)
