"""Channels times their scores: y[n, c, …] = s[c] · x[n, c, …], with both gradients in one pass."""

import torch

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def scale_channels(x, s):
    """y[n, c, …] = s[c] · x[n, c, …].

    x: (N, C, *spatial), float16 to float64, any strides. s: (C,), in float32, float64 or the dtype of x, on the device
    of x. y: like x, its dtype and memory format kept; the product is taken in float32 (float64 for float64 x) and
    rounded once. Differentiable once: ∂x = s · ∂y, like x, and ∂s[c] = Σ_{n, …} ∂y · x, accumulated in float32 (float64
    for float64 x) in a fixed order and returned in the dtype of s, come from one pass over ∂y and x.
    TypeError: x is not a floating tensor, s is not a tensor or of another dtype. ValueError: x has fewer than two
    dimensions, s has another shape or is on another device.
    Source: PAAM (pruning by active attention manipulation, Babaiee et al. 2022, arXiv 2210.11114), A' = S ⊙ A. Where
    the scores multiply what a batch norm or a convolution of the same block computes, folding them into its affine
    parameters costs less still.
    """
    _check_arguments(x, s)
    return scale_channels_op(x, s)


def _check_arguments(x, s):
    for name, value in (("x", x), ("s", s)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have at least two dimensions, (N, C, *spatial)")
    if s.dtype not in (x.dtype, torch.float32, torch.float64):
        raise TypeError(f"s has dtype {s.dtype}; it must be float32, float64 or the dtype of x, {x.dtype}")
    if s.shape != (x.shape[1],):
        raise ValueError(f"s has shape {tuple(s.shape)}; it must have one score per channel of x, ({x.shape[1]},)")
    if s.device != x.device:
        raise ValueError(f"s is on {s.device}; it must be on the device of x, {x.device}")


def scale_channels_reference(x, s):
    """y: like x, computed in float32 (float64 for float64 x)."""
    return torch.empty_like(x).copy_(x.to(_accumulator(x)) * _per_channel(s, x))


def scale_channels_backward_reference(grad, x, s):
    """∂x = s · ∂y: like x; ∂s[c] = Σ ∂y · x: (C,) in the dtype of s."""
    grad = grad.to(_accumulator(x))
    grad_x = torch.empty_like(x).copy_(grad * _per_channel(s, x))
    return grad_x, (grad * x).sum((0, *range(2, x.ndim))).to(s.dtype)


def _accumulator(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(s, x):
    """s in the accumulator dtype, shaped to multiply x."""
    return s.to(_accumulator(x)).view(-1, *[1] * (x.ndim - 2))


def _save(ctx, inputs, output):
    x, s = inputs
    ctx.save_for_backward(x, s)


def _backward(ctx, grad):
    x, s = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:  # scores that are not learned: x need not be read
        return scale_channels_op(grad, s), None
    return scale_channels_backward_op(grad, x, s)


scale_channels_backward_op = define(
    "scale_channels_backward(Tensor grad, Tensor x, Tensor s) -> (Tensor grad_x, Tensor grad_s)",
    reference=scale_channels_backward_reference,
    fake=lambda grad, x, s: (torch.empty_like(x), torch.empty_like(s, memory_format=torch.contiguous_format)),
)

scale_channels_op = define(
    "scale_channels(Tensor x, Tensor s) -> Tensor",
    reference=scale_channels_reference,
    fake=lambda x, s: torch.empty_like(x),
    setup_context=_save,
    backward=_backward,
)
