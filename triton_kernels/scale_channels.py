"""Channels times their scores on a GPU: one read and one write; both gradients from one read of the gradient and of x.

The walk is that of the attention kernels: rows are (image, channel) pairs, and a program takes a tile of ROWS x COLS
elements. The gradient of the scores is summed per program and row, then over these sums in their order.
"""

import torch
import triton
import triton.language as tl

from .attention import NUM_WARPS, _aligned, _offsets, _place
from .device import on, processors, registers
from .tiling import tiling

CHANNELS = 32  # of a program that combines
GROUP = 32  # sums of one channel that it loads at a time


def scale_channels(x, s):
    """y[n, c, …] = s[c] · x[n, c, …], like x. Only where more than three dimensions do not merge is x copied first."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    source, out = _walked(x), _walked(y)
    plan = tiling(source.shape, [source.stride(), out.stride()], x.itemsize, processors(x))
    if plan is None:
        return y.copy_(scale_channels(x.contiguous(), s))
    options = {"num_warps": NUM_WARPS, **registers(_scale)}
    with on(x):
        _scale[(plan.programs,)](source, s.contiguous(), out, x.shape[1], *_walk(plan), **options)
    return y


def scale_channels_backward(grad, x, s):
    """grad_x = s · grad, like x; grad_s[c] = Σ grad · x, (C,) in the dtype of s."""
    grad_x, grad_s = torch.empty_like(x), torch.empty_like(s, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return grad_x, grad_s.zero_()
    tensors = [_walked(grad, x), _walked(x), _walked(grad_x, x)]
    plan = tiling(tensors[0].shape, [t.stride() for t in tensors], x.itemsize, processors(x))
    if plan is None:
        dense, grad_s = scale_channels_backward(grad.contiguous(), x.contiguous(), s)
        return grad_x.copy_(dense), grad_s
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty(plan.chunks * plan.images * plan.rows, dtype=accumulator)
    channels = x.shape[1]
    options = {"num_warps": NUM_WARPS, **registers(_gradients)}
    with on(x):
        _gradients[(plan.programs,)](*tensors, s.contiguous(), sums, channels, *_walk(plan), **options)
        _combine_channels[(triton.cdiv(channels, CHANNELS),)](
            sums,
            grad_s,
            channels,
            sums.numel() // channels,
            CHANNELS=CHANNELS,
            GROUP=GROUP,
            num_warps=NUM_WARPS,
        )
    return grad_x, grad_s


def _walked(tensor, like=None):
    """The tensor as it is walked; where the channels of `like` are adjacent as (1, C, N, *space), so that the images,
    too, are columns of one row per channel and few sums are left to combine.
    """
    like = tensor if like is None else like
    return tensor.movedim(1, 0)[None] if like.stride(1) == 1 and like.shape[1] > 1 else tensor


def _walk(plan):
    """The arguments that say how the tensors are walked, in the order of the kernels."""
    strides = [stride for tensor in plan.strides for stride in tensor]
    sizes = (plan.images, plan.rows, plan.cols, plan.chunks, plan.span, *plan.inner)
    return *sizes, *strides, *plan.constexprs.values()


@triton.jit
def _scale(
    x,
    s,
    y,
    channels,
    images,
    rows,
    cols,
    chunks,
    span,
    d_1,
    d_2,
    x_image,
    x_row,
    x_0,
    x_1,
    x_2,
    y_image,
    y_row,
    y_0,
    y_1,
    y_2,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y of one row block over one chunk."""
    image, row, chunk = _place(rows, chunks, ROWS)
    x += image.to(tl.int64) * _aligned(x_image, ALIGN)
    y += image.to(tl.int64) * _aligned(y_image, ALIGN)
    row += tl.arange(0, ROWS)
    row_bound = _aligned(rows, ALIGN) if LAYOUT == "rows" else rows
    col_bound = _aligned(cols, ALIGN) if LAYOUT == "columns" else cols
    acc: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    scale = tl.load(s + row % channels).to(acc)  # rows count on over the images where these merge

    begin = chunk.to(tl.int64) * span
    for start in range(begin, tl.minimum(begin + span, cols), COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < row_bound)[:, None] & (col < col_bound)[None, :]
        value = tl.load(x + _offsets(row, col, x_row, x_0, x_1, x_2, d_1, d_2, LAYOUT, ALIGN), mask=mask, other=0)
        value = (value.to(acc) * scale[:, None]).to(y.dtype.element_ty)
        tl.store(y + _offsets(row, col, y_row, y_0, y_1, y_2, d_1, d_2, LAYOUT, ALIGN), value, mask=mask)


@triton.jit
def _gradients(
    grad,
    x,
    grad_x,
    s,
    sums,
    channels,
    images,
    rows,
    cols,
    chunks,
    span,
    d_1,
    d_2,
    y_image,
    y_row,
    y_0,
    y_1,
    y_2,
    x_image,
    x_row,
    x_0,
    x_1,
    x_2,
    g_image,
    g_row,
    g_0,
    g_1,
    g_2,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """grad_x of one row block over one chunk, and the sum of grad · x of each of its rows."""
    image, row, chunk = _place(rows, chunks, ROWS)
    grad += image.to(tl.int64) * _aligned(y_image, ALIGN)
    x += image.to(tl.int64) * _aligned(x_image, ALIGN)
    grad_x += image.to(tl.int64) * _aligned(g_image, ALIGN)
    row += tl.arange(0, ROWS)
    row_bound = _aligned(rows, ALIGN) if LAYOUT == "rows" else rows
    col_bound = _aligned(cols, ALIGN) if LAYOUT == "columns" else cols
    acc: tl.constexpr = sums.dtype.element_ty
    scale = tl.load(s + row % channels).to(acc)

    products = tl.zeros((ROWS, COLS), acc)
    begin = chunk.to(tl.int64) * span
    for start in range(begin, tl.minimum(begin + span, cols), COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < row_bound)[:, None] & (col < col_bound)[None, :]
        offsets = _offsets(row, col, y_row, y_0, y_1, y_2, d_1, d_2, LAYOUT, ALIGN)
        gradient = tl.load(grad + offsets, mask=mask, other=0).to(acc)
        value = tl.load(x + _offsets(row, col, x_row, x_0, x_1, x_2, d_1, d_2, LAYOUT, ALIGN), mask=mask, other=0)
        products += gradient * value.to(acc)
        gradient = (gradient * scale[:, None]).to(grad_x.dtype.element_ty)
        tl.store(grad_x + _offsets(row, col, g_row, g_0, g_1, g_2, d_1, d_2, LAYOUT, ALIGN), gradient, mask=mask)
    slot = (chunk.to(tl.int64) * images + image) * rows + row
    tl.store(sums + slot, tl.sum(products, 1), mask=row < rows)


@triton.jit
def _combine_channels(sums, grad_s, channels, count, CHANNELS: tl.constexpr, GROUP: tl.constexpr):
    """grad_s of CHANNELS channels: `count` sums of each, which lie `channels` apart."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((GROUP, CHANNELS), sums.dtype.element_ty)
    for start in range(0, count, GROUP):
        slot = start + tl.arange(0, GROUP)
        mask = (slot < count)[:, None] & (channel < channels)[None, :]
        total += tl.load(sums + slot.to(tl.int64)[:, None] * channels + channel[None, :], mask=mask, other=0)
    tl.store(grad_s + channel, tl.sum(total, 0).to(grad_s.dtype.element_ty), mask=channel < channels)
