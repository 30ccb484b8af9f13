"""Squeeze-and-excitation in one op: per image and channel a saliency between 0 and 1, and the channels times it.

a = activation(x)                                  (N, C, *spatial)
z = mean over space of a                           (N, C)
h = relu(z reduce_weightᵀ + reduce_bias)           (N, H)
saliency = sigmoid(h expand_weightᵀ + expand_bias) (N, C)
y = a · saliency                                   like x
"""

import contextlib

import torch
import torch.nn.functional as F

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = ("none", "relu", "relu6")  # the op takes the index: strings of the stable C++ interface leak memory


def channel_attention(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation="none"):
    """y = a · π and π = sigmoid(relu(mean_space(a) W₁ᵀ + b₁) W₂ᵀ + b₂), a = activation(x): the pair (y, π).

    x: (N, C, *spatial), float16 to float64, any strides. reduce_weight W₁: (H, C), reduce_bias b₁: (H,), expand_weight
    W₂: (C, H), expand_bias b₂: (C,), each in float32, float64 or the dtype of x, on the device of x. activation:
    "none", "relu" or "relu6" (clamped to 0…6), which is fused.
    y: like x, its dtype and memory format kept, rounded once. saliency π: (N, C), in float32 also for x in half
    precision (float64 for float64 x), since saliencies are ranked, and near 1 a half is too coarse to tell them apart.
    All is computed in that dtype, also under autocast. N = 0 gives empty results and gradients of 0 for the
    parameters; C = 0 and H = 0 are defined. NaN in a map makes its image's saliencies NaN.
    Differentiable once, in both results, with respect to x and the parameters by one op, in the dtypes of each; the
    activations have the gradient 0 at 0 and at 6. `reference` is the same formula in plain torch, differentiable twice.
    TypeError: x is not a floating tensor, a parameter is not a tensor or of another dtype. ValueError: x has no
    dimension of space or no pixels, a parameter has another shape or is on another device, activation is another one.
    Source: squeeze-and-excitation (Hu et al. 2018); GlobalPru (Wang et al. 2023), §4.2, places it after convolutions
    and prunes by the ranking of π. The fused activation is ours: the ReLU before it costs no pass of its own.
    """
    names = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
    _check_arguments(x, dict(zip(names, (reduce_weight, reduce_bias, expand_weight, expand_bias), strict=True)))
    y, saliency, _, _ = channel_attention_op(
        x, reduce_weight, reduce_bias, expand_weight, expand_bias, _number(activation)
    )
    return y, saliency


def reference(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation="none"):
    """The pair (y, saliency) of `channel_attention` in plain torch: differentiable as often as wanted, unchecked."""
    y, saliency, _, _ = channel_attention_formula(
        x, reduce_weight, reduce_bias, expand_weight, expand_bias, _number(activation)
    )
    return y, saliency


def _number(activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {ACTIVATIONS}")
    return ACTIVATIONS.index(activation)


def _check_arguments(x, parameters):
    for name, value in {"x": x, **parameters}.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")
    if x.ndim < 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have at least three dimensions, (N, C, *spatial)")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have a pixel, since the mean over none is undefined")
    channels, rows = x.shape[1], parameters["reduce_bias"].numel()
    shapes = ((rows, channels), (rows,), (channels, rows), (channels,))
    told = ("(H, C)", "(H,)", "(C, H)", "(C,)")
    for (name, value), shape, letters in zip(parameters.items(), shapes, told, strict=True):
        if value.dtype not in (x.dtype, torch.float32, torch.float64):
            raise TypeError(f"{name} has dtype {value.dtype}; it must be float32, float64 or the dtype of x, {x.dtype}")
        if value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must be {letters}, with C = {channels} channels of x and"
                f" H = {rows} numbers of reduce_bias: {shape}"
            )
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}; it must be on the device of x, {x.device}")


def channel_attention_formula(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation):
    """y: of the dtype of x; saliency, mean z (N, C), hidden h (N, H): float32 (float64 for float64 x).

    Written in ops that dispatch as themselves, so that the trace, in which this stands for the op, sees what it knows.
    """
    with _full_precision(x):
        wide = _accumulator(x)
        parameters = [_converted(each, wide) for each in (reduce_weight, reduce_bias, expand_weight, expand_bias)]
        reduce_weight, reduce_bias, expand_weight, expand_bias = parameters
        a = _converted(_activated(x, activation), wide)
        mean = a.mean(tuple(range(2, x.ndim)))
        hidden = torch.addmm(reduce_bias, mean, reduce_weight.t()).relu()
        saliency = torch.addmm(expand_bias, hidden, expand_weight.t()).sigmoid()
        return _converted(a * _per_image(saliency, x), x.dtype), saliency, mean, hidden


def channel_attention_reference(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation):
    """The formula, with y laid out like x."""
    y, *others = channel_attention_formula(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation)
    return torch.empty_like(x).copy_(y), *others


def channel_attention_backward_reference(
    grad_y, grad_saliency, x, reduce_weight, expand_weight, saliency, mean, hidden, activation
):
    """∂x like x, and in float32 (float64 for float64 x) ∂reduce_weight, ∂reduce_bias, ∂expand_weight, ∂expand_bias.

    ∂π = ∂saliency + Σ_space ∂y · a and ∂z give ∂x = (∂y · π + ∂z / HW) · activation'(x).
    """
    with _full_precision(x):
        wide, space = _accumulator(x), tuple(range(2, x.ndim))
        a, grad = _activated(x, activation).to(wide), grad_y.to(wide)
        of_logits = ((grad * a).sum(space) + grad_saliency) * (saliency * (1 - saliency))
        of_hidden = (of_logits @ expand_weight.to(wide)).masked_fill_(hidden <= 0, 0)
        of_mean = of_hidden @ reduce_weight.to(wide)
        of_weights = of_hidden.t() @ mean, of_logits.t() @ hidden
        grad = grad * _per_image(saliency, x) + _per_image(of_mean, x) / x.shape[2:].numel()
    if activation:
        grad.masked_fill_(x <= 0 if activation == 1 else (x <= 0) | (x >= 6), 0)  # where x is NaN the gradient passes
    return torch.empty_like(x).copy_(grad), of_weights[0], of_hidden.sum(0), of_weights[1], of_logits.sum(0)


def _accumulator(x):
    """The dtype in which is computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _full_precision(x):
    """Context in which autocast, where it is on, leaves the dtypes of products as they are."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _per_image(values, x):
    """(N, C) values, shaped to multiply x."""
    return values.view(*values.shape, *[1] * (x.ndim - 2))


def _activated(x, activation):
    return x if activation == 0 else x.relu() if activation == 1 else F.hardtanh(x, 0.0, 6.0)


def _converted(tensor, dtype):
    return tensor if tensor.dtype == dtype else torch.ops.aten._to_copy(tensor, dtype=dtype)


def _fake(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation):
    (images, channels), rows, wide = x.shape[:2], reduce_weight.shape[0], _accumulator(x)
    of_channels = [x.new_empty((images, channels), dtype=wide) for _ in range(2)]
    return torch.empty_like(x), *of_channels, x.new_empty((images, rows), dtype=wide)


def _fake_backward(grad_y, grad_saliency, x, reduce_weight, expand_weight, saliency, mean, hidden, activation):
    rows, channels = reduce_weight.shape
    shapes = ((rows, channels), (rows,), (channels, rows), (channels,))
    return torch.empty_like(x), *(saliency.new_empty(shape) for shape in shapes)


def _save(ctx, inputs, output):
    x, reduce_weight, _, expand_weight, _, ctx.activation = inputs
    ctx.dtypes = [parameter.dtype for parameter in inputs[1:5]]
    ctx.mark_non_differentiable(*output[2:])  # they are there for the backward
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, reduce_weight, expand_weight, *output[1:])


def _backward(ctx, grad_y, grad_saliency, *_):
    x, reduce_weight, expand_weight, saliency, mean, hidden = ctx.saved_tensors
    if grad_y is None:
        grad_y = x.new_zeros(()).expand(x.shape)
    if grad_saliency is None:
        grad_saliency = torch.zeros_like(saliency)
    grad_x, *grads = channel_attention_backward_op(
        grad_y, grad_saliency, x, reduce_weight, expand_weight, saliency, mean, hidden, ctx.activation
    )
    return grad_x, *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), None


channel_attention_backward_op = define(
    "channel_attention_backward(Tensor grad_y, Tensor grad_saliency, Tensor x, Tensor reduce_weight,"
    " Tensor expand_weight, Tensor saliency, Tensor mean, Tensor hidden, int activation)"
    " -> (Tensor grad_x, Tensor grad_reduce_weight, Tensor grad_reduce_bias, Tensor grad_expand_weight,"
    " Tensor grad_expand_bias)",
    reference=channel_attention_backward_reference,
    fake=_fake_backward,
)

channel_attention_op = define(
    "channel_attention(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias,"
    " int activation) -> (Tensor y, Tensor saliency, Tensor mean, Tensor hidden)",
    reference=channel_attention_reference,
    fake=_fake,
    setup_context=_save,
    backward=_backward,
)
