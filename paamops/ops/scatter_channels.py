"""Channels put to their places in a wider tensor: y[n, index[j], …] = x[n, j, …], and zero where no channel goes."""

import torch

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def scatter_channels(x, index, width):
    """y[n, index[j], …] = x[n, j, …]; every other channel of y is zero.

    A branch of which k of C channels are left is so added into a residual stream of C channels.

    x: (N, k, *spatial), float16 to float64, any strides. index: (k,) int64 on the device of x, each value a channel of
    y that no other one names, in [0, width), or -1 for a channel that goes nowhere. width: C, an int. y:
    (N, C, *spatial) in the dtype of x, channels_last where the channels of x are adjacent, else contiguous; what is
    kept is read once, y is written once, nothing is rounded. Differentiable any number of times: ∂x[n, j] =
    ∂y[n, index[j]], or zero for -1.
    TypeError: x is not a floating tensor, index is not int64, width is not an int. ValueError: x has fewer than two
    dimensions, index has another shape, is on another device, or (on a CPU, where looking costs little) has a value out
    of range or twice.
    """
    _check_arguments(x, index, width)
    return scatter_channels_op(x, index, inverse(index, width))


def inverse(index, width):
    """source (width,) int64: source[index[j]] = j, and -1 where no channel goes."""
    places = torch.where(index < 0, width, index)  # what goes nowhere is written behind the end
    source = index.new_full((width + 1,), -1)
    return source.index_copy_(0, places, torch.arange(len(index), device=index.device))[:width].contiguous()


def renumbered(source, kept):
    """`source` (C,) as it speaks of the channels `kept` alone: rising int64, or None for all."""
    if kept is None:
        return source
    place = torch.searchsorted(kept, source).clamp(max=len(kept) - 1)
    return torch.where(kept[place] == source, place, -1)


def _check_arguments(x, index, width):
    for name, value in (("x", x), ("index", index)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; it must be float16, bfloat16, float32 or float64")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must have at least two dimensions, (N, k, *spatial)")
    if index.dtype != torch.int64:
        raise TypeError(f"index has dtype {index.dtype}; it must be int64")
    if index.shape != (x.shape[1],):
        raise ValueError(f"index has shape {tuple(index.shape)}; it must be ({x.shape[1]},), a place per channel of x")
    if index.device != x.device:
        raise ValueError(f"index is on {index.device}; it must be on the device of x, {x.device}")
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width is a {type(width).__name__}; it must be an int")
    if width < 0:
        raise ValueError(f"width is {width}; it must be at least 0")
    if index.device.type == "cpu":
        places = index[index >= 0]
        if ((index < -1) | (index >= width)).any():
            found = f"{int(index.min())} to {int(index.max())}"
            raise ValueError(f"index has values from {found}; they must be -1 to {width - 1}")
        if len(places.unique()) < len(places):
            raise ValueError("index names a channel twice; each channel of y has one source")


def wide_empty(x, width):
    """A fresh (N, width, *spatial): channels_last where the channels of x are adjacent, else contiguous."""
    if x.ndim > 2 and x.shape[1] > 1 and x.stride(1) == 1:
        return x.new_empty((x.shape[0], *x.shape[2:], width)).movedim(-1, 1)
    return x.new_empty((x.shape[0], width, *x.shape[2:]))


def plain(x, source):
    """The same in two ops of PyTorch, which a compiler fuses with what follows and every format of export knows."""
    padded = torch.nn.functional.pad(x, [0, 0] * (x.ndim - 2) + [0, 1])  # one channel of zeros, for all that is empty
    return padded.index_select(1, torch.where(source < 0, x.shape[1], source))


def scatter_channels_reference(x, index, source):
    """y: as `wide_empty`."""
    return wide_empty(x, len(source)).copy_(plain(x, source))


def _save(ctx, inputs, output):
    _, index, source = inputs
    ctx.save_for_backward(index, source)


def _backward(ctx, grad):
    index, source = ctx.saved_tensors
    return scatter_channels_op(grad, source, index), None, None  # the way back: the same op, from y to x


scatter_channels_op = define(
    "scatter_channels(Tensor x, Tensor index, Tensor source) -> Tensor",
    reference=scatter_channels_reference,
    fake=lambda x, index, source: wide_empty(x, source.shape[0]),
    setup_context=_save,
    backward=_backward,
)
