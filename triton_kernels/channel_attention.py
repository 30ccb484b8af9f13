"""Squeeze-and-excitation on a GPU: a squeeze, the small linear layers by PyTorch's own products, and a scale.

The walk is that of the attention kernels: rows are (image, channel) pairs, and a program takes a tile of ROWS x COLS
elements. Sums are taken per program and row, then over the programs in their order. The forward reads x twice, the
second time from the second-level cache where a batch fits it, and writes y; the backward reads x and the gradient so.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .attention import NUM_WARPS, _aligned, _offsets, _place
from .device import on, processors, registers
from .tiling import tiling

COMBINE_ROWS = 32


def channel_attention(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation):
    """y like x; saliency, mean (N, C) and hidden (N, H) in the accumulator dtype. The activation is a number."""
    mean = _squeezed(x, x, activation, gradient=False) / x.shape[2:].numel()
    wide = mean.dtype
    with _full_precision(x):
        hidden = torch.addmm(reduce_bias.to(wide), mean, reduce_weight.to(wide).t()).relu_()
        saliency = torch.addmm(expand_bias.to(wide), hidden, expand_weight.to(wide).t()).sigmoid_()
    return _scaled(x, x, saliency, saliency, activation, gradient=False), saliency, mean, hidden


def channel_attention_backward(
    grad_y, grad_saliency, x, reduce_weight, expand_weight, saliency, mean, hidden, activation
):
    """grad_x like x, and the gradients of reduce_weight, reduce_bias, expand_weight, expand_bias in the accumulator's
    dtype.
    """
    of_saliency = _squeezed(x, grad_y, activation, gradient=True) + grad_saliency
    wide = saliency.dtype
    with _full_precision(x):
        of_logits = of_saliency * (saliency * (1 - saliency))
        of_hidden = torch.mm(of_logits, expand_weight.to(wide)).masked_fill_(hidden <= 0, 0)
        of_mean = torch.mm(of_hidden, reduce_weight.to(wide))
        of_weights = torch.mm(of_hidden.t(), mean), torch.mm(of_logits.t(), hidden)
    grad_x = _scaled(x, grad_y, saliency, of_mean / x.shape[2:].numel(), activation, gradient=True)
    return grad_x, of_weights[0], of_hidden.sum(0), of_weights[1], of_logits.sum(0)


def _squeezed(x, grad, activation, gradient):
    """(N, C): Σ over space of activation(x), with `gradient` of grad · activation(x)."""
    total = x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.numel() == 0:
        return total.zero_()
    plan = tiling(x.shape, [x.stride(), grad.stride()], x.itemsize, processors(x))
    if plan is None:
        return _squeezed(x.contiguous(), grad.contiguous(), activation, gradient)
    count = total.numel()
    sums = total if plan.chunks == 1 else total.new_empty(plan.chunks * count)
    with on(x):
        _squeeze[(plan.programs,)](x, grad, sums, *_walk(plan), **_options(_squeeze, plan, activation, gradient))
        if plan.chunks > 1:
            blocks = triton.cdiv(count, COMBINE_ROWS)
            _combine_chunks[(blocks,)](sums, total, count, plan.chunks, ROWS=COMBINE_ROWS, num_warps=NUM_WARPS)
    return total


def _scaled(x, grad, saliency, shift, activation, gradient):
    """Like x: activation(x) · saliency, with `gradient` grad · saliency + shift where the activation passes it."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    plan = tiling(x.shape, [x.stride(), grad.stride(), out.stride()], x.itemsize, processors(x))
    if plan is None:
        return out.copy_(_scaled(x.contiguous(), grad.contiguous(), saliency, shift, activation, gradient))
    with on(x):
        _excite[(plan.programs,)](
            *(x, grad, saliency.contiguous(), shift.contiguous(), out),
            *_walk(plan),
            **_options(_excite, plan, activation, gradient),
        )
    return out


def _full_precision(x):
    """Context in which autocast leaves the dtypes of products as they are."""
    kind = x.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def _walk(plan):
    """The arguments that say how the tensors are walked, in the order of the kernels."""
    strides = [stride for tensor in plan.strides for stride in tensor]
    return *(plan.images, plan.rows, plan.cols, plan.chunks, plan.span, *plan.inner), *strides


def _options(kernel, plan, activation, gradient):
    kinds = {"ACTIVATION": activation, "GRADIENT": gradient}
    return {**kinds, **plan.constexprs, "num_warps": NUM_WARPS, **registers(kernel)}


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    """activation(value); NaN stays."""
    if ACTIVATION != 0:
        value = tl.where(value <= 0, 0, value)
    if ACTIVATION == 2:
        value = tl.where(value >= 6, 6, value)
    return value


@triton.jit
def _squeeze(
    x,
    grad,
    sums,
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
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The sum of one row block over one chunk."""
    image, row, chunk = _place(rows, chunks, ROWS)
    x += image.to(tl.int64) * _aligned(x_image, ALIGN)
    grad += image.to(tl.int64) * _aligned(y_image, ALIGN)
    row += tl.arange(0, ROWS)
    row_bound = _aligned(rows, ALIGN) if LAYOUT == "rows" else rows
    col_bound = _aligned(cols, ALIGN) if LAYOUT == "columns" else cols
    acc: tl.constexpr = sums.dtype.element_ty

    total = tl.zeros((ROWS, COLS), acc)
    begin = chunk.to(tl.int64) * span
    for start in range(begin, tl.minimum(begin + span, cols), COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < row_bound)[:, None] & (col < col_bound)[None, :]
        value = tl.load(x + _offsets(row, col, x_row, x_0, x_1, x_2, d_1, d_2, LAYOUT, ALIGN), mask=mask, other=0)
        value = _activated(value.to(acc), ACTIVATION)
        if GRADIENT:
            offsets = _offsets(row, col, y_row, y_0, y_1, y_2, d_1, d_2, LAYOUT, ALIGN)
            value *= tl.load(grad + offsets, mask=mask, other=0).to(acc)
        total += value
    slot = (chunk.to(tl.int64) * images + image) * rows + row
    tl.store(sums + slot, tl.sum(total, 1), mask=row < rows)


@triton.jit
def _combine_chunks(sums, total, count, chunks, ROWS: tl.constexpr):
    """The sums of the chunks of ROWS rows, in their order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    value = tl.zeros((ROWS,), total.dtype.element_ty)
    for chunk in range(chunks):
        value += tl.load(sums + tl.cast(chunk, tl.int64) * count + row, mask=row < count, other=0)
    tl.store(total + row, value, mask=row < count)


@triton.jit
def _excite(
    x,
    grad,
    saliency,
    shift,
    out,
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
    g_image,
    g_row,
    g_0,
    g_1,
    g_2,
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y, or grad_x, of one row block over one chunk."""
    image, row, chunk = _place(rows, chunks, ROWS)
    x += image.to(tl.int64) * _aligned(x_image, ALIGN)
    grad += image.to(tl.int64) * _aligned(y_image, ALIGN)
    out += image.to(tl.int64) * _aligned(g_image, ALIGN)
    row += tl.arange(0, ROWS)
    row_bound = _aligned(rows, ALIGN) if LAYOUT == "rows" else rows
    col_bound = _aligned(cols, ALIGN) if LAYOUT == "columns" else cols
    acc: tl.constexpr = saliency.dtype.element_ty
    slot = image.to(tl.int64) * rows + row
    scale = tl.load(saliency + slot, mask=row < rows, other=0)[:, None]
    if GRADIENT:
        added = tl.load(shift + slot, mask=row < rows, other=0)[:, None]

    begin = chunk.to(tl.int64) * span
    for start in range(begin, tl.minimum(begin + span, cols), COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < row_bound)[:, None] & (col < col_bound)[None, :]
        value = tl.zeros((ROWS, COLS), acc)
        if ACTIVATION != 0 or not GRADIENT:
            offsets = _offsets(row, col, x_row, x_0, x_1, x_2, d_1, d_2, LAYOUT, ALIGN)
            value = tl.load(x + offsets, mask=mask, other=0).to(acc)
        if GRADIENT:
            offsets = _offsets(row, col, y_row, y_0, y_1, y_2, d_1, d_2, LAYOUT, ALIGN)
            result = tl.load(grad + offsets, mask=mask, other=0).to(acc) * scale + added
            if ACTIVATION != 0:
                result = tl.where(value <= 0, 0, result)  # where x is NaN the gradient passes, as in torch
            if ACTIVATION == 2:
                result = tl.where(value >= 6, 0, result)
        else:
            result = _activated(value, ACTIVATION) * scale
        offsets = _offsets(row, col, g_row, g_0, g_1, g_2, d_1, d_2, LAYOUT, ALIGN)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)
