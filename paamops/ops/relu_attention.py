"""ReLU and the activation attention of its result in one pass: scoring a network costs no extra read.

y = relu(x)        sum[n, c] = Σ_s y[n, c, s]^p        max[n, c] = (max_s y[n, c, s])^p
"""

import math

import torch

from paamops.ops.activation_attention import (
    activation_attention_reference,
    attention_gradient,
    check_arguments,
    fake_attention,
    reduce,
)
from paamops.ops.registration import define


def relu_attention(x, p=1, reduction="mean", per_image=False):
    """y = relu(x) and A[c] = mean_n R_s y[n, c, s]^p: the pair (y, A), where R is the mean, max or sum over space.

    x: (N, C, *spatial), float16 to float64, any strides. y: like x, its memory format kept; the attention is that of
    `activation_attention(y, p, reduction, per_image)`, with its shapes, dtypes and errors. Differentiable once, in both
    results.
    Source: AAP (activation attention, adaptive iterative pruning), §3.1, on the output of a ReLU.
    """
    check_arguments(x, p, reduction, per_image)
    y, total, peak = relu_attention_op(x, float(p))
    return y, reduce(total, peak, math.prod(x.shape[2:]), reduction, per_image)


def relu_attention_reference(x, p):
    """y like x; sum, max: (N, C), accumulated in float32 (float64 for float64 x)."""
    y = torch.empty_like(x).copy_(x).relu_()
    return y, *activation_attention_reference(y, p)


def relu_attention_backward_reference(grad_y, grad_sum, grad_max, y, max, p):
    """∂x = ∂y plus the gradient of the attention of y, where y is not 0: like y."""
    del max  # kernels find the maximum by it; here argmax does
    grad = attention_gradient(grad_sum, grad_max, y, p) + grad_y
    return torch.empty_like(y).copy_(grad.masked_fill_(y <= 0, 0))


def _save(ctx, inputs, output):
    _, ctx.p = inputs
    ctx.save_for_backward(output[0], output[2])


def _backward(ctx, grad_y, grad_sum, grad_max):
    return relu_attention_backward_op(grad_y, grad_sum, grad_max, *ctx.saved_tensors, ctx.p), None


relu_attention_backward_op = define(
    "relu_attention_backward(Tensor grad_y, Tensor grad_sum, Tensor grad_max, Tensor y, Tensor max, float p) -> Tensor",
    reference=relu_attention_backward_reference,
    fake=lambda grad_y, grad_sum, grad_max, y, max, p: torch.empty_like(y),
)

relu_attention_op = define(
    "relu_attention(Tensor x, float p) -> (Tensor y, Tensor sum, Tensor max)",
    reference=relu_attention_reference,
    fake=lambda x, p: (torch.empty_like(x), fake_attention(x), fake_attention(x)),
    setup_context=_save,
    backward=_backward,
)
