"""Sigmoid with a temperature: the ablation of PAAM's score activation, and its l1 term, in one pass.

score = sigmoid(x / temperature)        l1 = Σ |score|
"""

import torch

from paamops.ops.leaky_exponential import accumulator, check_arguments, fake, rounded_and_sum, save
from paamops.ops.registration import define


def tempered_sigmoid(x, temperature=1.0, l1=False):
    """score = sigmoid(x / temperature); with `l1` the pair (score, Σ |score|).

    x: float16 to float64, any shape and strides. temperature: a finite number > 0. score: like x. The l1 term is 0-d,
    in float32 (float64 for float64 x), the sum of the scores before they are rounded to x's dtype, in a fixed order.
    NaN stays NaN, also in the gradient, score · (1 − score) / temperature. Differentiable once, in both results by one
    op.
    TypeError: x is not a floating tensor, temperature is not a number. ValueError: temperature is not finite and > 0,
    or not so when rounded to the dtype of the sum.
    Source: PAAM (pruning by active attention manipulation, Babaiee et al. 2022, arXiv 2210.11114) as the activation it
    turns down: a sigmoid locks in early when steep and does not converge when shallow. The temperature is our choice
    of how steepness is stated.
    """
    check_arguments(x, "temperature", temperature)
    score, total = tempered_sigmoid_op(x, float(temperature))
    return (score, total) if l1 else score


def tempered_sigmoid_reference(x, temperature):
    """score: like x; l1: 0-d, accumulated in float32 (float64 for float64 x)."""
    return rounded_and_sum(torch.sigmoid(x.to(accumulator(x)) / temperature), x)


def tempered_sigmoid_backward_reference(grad_score, grad_l1, x, temperature):
    """∂x = (∂score + ∂l1 · sign(score)) · score'(x): like x. No score is negative, and score' is 0 where score is."""
    wide = x.to(accumulator(x)) / temperature
    slopes = torch.sigmoid(wide) * torch.sigmoid(-wide) / temperature  # 1 - score would cancel near 1
    return torch.empty_like(x).copy_((grad_score.to(slopes.dtype) + grad_l1) * slopes)


def _backward(ctx, grad_score, grad_l1):
    return tempered_sigmoid_backward_op(grad_score, grad_l1, *ctx.saved_tensors, ctx.parameter), None


tempered_sigmoid_backward_op = define(
    "tempered_sigmoid_backward(Tensor grad_score, Tensor grad_l1, Tensor x, float temperature) -> Tensor",
    reference=tempered_sigmoid_backward_reference,
    fake=lambda grad_score, grad_l1, x, temperature: torch.empty_like(x),
)

tempered_sigmoid_op = define(
    "tempered_sigmoid(Tensor x, float temperature) -> (Tensor score, Tensor l1)",
    reference=tempered_sigmoid_reference,
    fake=fake,
    setup_context=save,
    backward=_backward,
)
