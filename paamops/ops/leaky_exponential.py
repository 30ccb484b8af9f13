"""Leaky exponential: the activation of PAAM's scores, and their l1 term, in one pass.

    score = exp(x) for x ≤ 0, 1 + slope·x above        l1 = Σ |score|

`tempered_sigmoid` is the same op with another activation: the checks and the gradient are shared.
"""

import numbers

import torch

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def leaky_exponential(x, slope=0.1, l1=False):
    """score = exp(x) for x ≤ 0, 1 + slope·x above; with `l1` the pair (score, Σ |score|).

    x: float16 to float64, any shape and strides. slope: a finite number > 0. score: like x. The l1 term is 0-d, in
    float32 (float64 for float64 x), the sum of the scores before they are rounded to x's dtype, in a fixed order.
    The score is 1 at 0 and its gradient nowhere vanishes: exp(x) for x ≤ 0, which is 1 at 0, and slope above. NaN stays
    NaN, also in the gradient. Differentiable once, in both results by one op.
    TypeError: x is not a floating tensor, slope is not a number. ValueError: slope is not finite and > 0, or not so
    when rounded to the dtype of the sum.
    Source: PAAM (pruning by active attention manipulation, Babaiee et al. 2022, arXiv 2210.11114), which asks for a
    leaky exponential from 0 to 1 with the initial value 1 and a gradient everywhere. It gives no formula: this one is
    our choice.
    """
    check_arguments(x, "slope", slope)
    score, total = leaky_exponential_op(x, float(slope))
    return (score, total) if l1 else score


def check_arguments(x, name, value):
    """Raise the error that names the argument, what it was and what it must be."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a number")
    limits = torch.finfo(accumulator(x))
    if not limits.tiny <= value <= limits.max:  # also refuses NaN, and what would become 0 or infinite in that dtype
        raise ValueError(f"{name} is {value}; it must be finite and > 0 as a {limits.dtype}")


def accumulator(x):
    """The dtype in which is computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def leaky_exponential_reference(x, slope):
    """score: like x; l1: 0-d, accumulated in float32 (float64 for float64 x)."""
    wide = x.to(accumulator(x))
    return rounded_and_sum(torch.where(wide <= 0, wide.exp(), 1 + slope * wide), x)


def leaky_exponential_backward_reference(grad_score, grad_l1, x, slope):
    """∂x = (∂score + ∂l1 · sign(score)) · score'(x): like x. No score is negative, and score' is 0 where score is."""
    wide = x.to(accumulator(x))
    slopes = torch.where(wide > 0, slope, wide.exp())  # NaN stays NaN
    return torch.empty_like(x).copy_((grad_score.to(slopes.dtype) + grad_l1) * slopes)


def rounded_and_sum(score, x):
    """The score in the dtype and layout of x, and its sum: no score is negative."""
    return torch.empty_like(x).copy_(score), score.sum()


def fake(x, parameter):
    """score, l1: shapes and dtypes."""
    return torch.empty_like(x), x.new_empty((), dtype=accumulator(x))


def save(ctx, inputs, output):
    """What the gradient needs: x and the parameter."""
    x, ctx.parameter = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad_score, grad_l1):
    return leaky_exponential_backward_op(grad_score, grad_l1, *ctx.saved_tensors, ctx.parameter), None


leaky_exponential_backward_op = define(
    "leaky_exponential_backward(Tensor grad_score, Tensor grad_l1, Tensor x, float slope) -> Tensor",
    reference=leaky_exponential_backward_reference,
    fake=lambda grad_score, grad_l1, x, slope: torch.empty_like(x),
)

leaky_exponential_op = define(
    "leaky_exponential(Tensor x, float slope) -> (Tensor score, Tensor l1)",
    reference=leaky_exponential_reference,
    fake=fake,
    setup_context=save,
    backward=_backward,
)
