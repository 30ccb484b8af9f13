"""Kernels shared by `activation_attention` and `relu_attention`: power sums and maxima of rows, and their gradient.

A row is one (image, channel). A program takes a tile of ROWS x COLS elements at a time and keeps a sum and a maximum
per element of the tile, so that nothing is combined across threads before the end. Maxima are taken over the bits of
the magnitude: as integers these order like the values, with NaN above infinity, so NaN propagates.
"""

import torch
import triton
import triton.language as tl

from .device import on, processors
from .tiling import tiling

NUM_WARPS = 4
COMBINE_ROWS = 32


def forward(x, y, p):
    """sum, max (N, C) of |x|^p; with `y` (like x, to be filled) of relu(x), which is written to it."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return x.new_zeros(x.shape[:2], dtype=accumulator), x.new_zeros(x.shape[:2], dtype=accumulator)
    written = x if y is None else y
    plan = tiling(x.shape, [x.stride(), written.stride()], x.itemsize, processors(x))
    if plan is None:
        contiguous = None if y is None else y.new_empty(y.shape)
        result = forward(x.contiguous(), contiguous, p)
        if y is not None:
            y.copy_(contiguous)
        return result

    total, peak = x.new_empty(x.shape[:2], dtype=accumulator), x.new_empty(x.shape[:2], dtype=accumulator)
    split = plan.chunks > 1
    count = total.numel()
    part_total = total.new_empty(plan.chunks * count) if split else total
    part_peak = total.new_empty(plan.chunks * count) if split else peak
    with on(x):
        _forward[(plan.programs,)](
            x,
            written,
            part_total,
            part_peak,
            plan.images,
            plan.rows,
            plan.cols,
            plan.chunks,
            plan.span,
            *plan.inner,
            *plan.strides[0],
            *plan.strides[1],
            P=p,
            RELU=y is not None,
            SPLIT=split,
            **plan.constexprs,
            num_warps=NUM_WARPS,
        )
        if split:
            blocks = triton.cdiv(count, COMBINE_ROWS)
            _combine[(blocks,)](
                part_total, part_peak, total, peak, count, plan.chunks, P=p, ROWS=COMBINE_ROWS, num_warps=NUM_WARPS
            )
    return total, peak


def backward(grad_y, grad_sum, grad_max, x, p):
    """Gradient like x: of sum and max of |x|^p; with `grad_y` also of y = relu(x), where x is y."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    relu = grad_y is not None
    grad_y = grad_y if relu else x
    plan = tiling(x.shape, [x.stride(), grad_y.stride(), out.stride()], x.itemsize, processors(x))
    if plan is None:
        out.copy_(backward(grad_y.contiguous() if relu else None, grad_sum, grad_max, x.contiguous(), p))
        return out

    grad_sum, grad_max = grad_sum.contiguous(), grad_max.contiguous()
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    part_peak = torch.empty((plan.chunks, grad_max.numel()), dtype=bits, device=x.device)
    part_first = torch.empty((plan.chunks, grad_max.numel()), dtype=torch.int64, device=x.device)
    sizes = (plan.images, plan.rows, plan.cols, plan.chunks, plan.span, *plan.inner)
    with on(x):
        _first_maximum[(plan.programs,)](
            x, grad_max, part_peak, part_first, *sizes, *plan.strides[0], **plan.constexprs, num_warps=NUM_WARPS
        )
        _backward[(plan.programs,)](
            x,
            grad_y,
            grad_sum,
            grad_max,
            part_peak,
            part_first,
            out,
            *sizes,
            *plan.strides[0],
            *plan.strides[1],
            *plan.strides[2],
            P=p,
            RELU=relu,
            **plan.constexprs,
            num_warps=NUM_WARPS,
        )
    return out


@triton.jit
def _aligned(value, ALIGN: tl.constexpr):
    """`value`, which the launcher knows to be a multiple of ALIGN: said so that the compiler can widen the loads."""
    return value if ALIGN == 1 else value // ALIGN * ALIGN


@triton.jit
def _offsets(row, col, s_row, s_0, s_1, s_2, d_1, d_2, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets (ROWS, COLS) of these elements within an image, int64."""
    row = row.to(tl.int64)[:, None]
    col = col.to(tl.int64)[None, :]
    if LAYOUT == "columns":
        return row * _aligned(s_row, ALIGN) + col
    elif LAYOUT == "rows":
        return row + col * _aligned(s_2, ALIGN)
    else:
        outer = col // d_2
        return row * s_row + (outer // d_1) * s_0 + (outer % d_1) * s_1 + (col % d_2) * s_2


@triton.jit
def _place(rows, chunks, ROWS: tl.constexpr):
    """image, first row and chunk of this program; the chunks of a row block are neighbours."""
    program = tl.program_id(0)
    block = program // chunks
    blocks = tl.cdiv(rows, ROWS)
    return block // blocks, block % blocks * ROWS, program % chunks


@triton.jit
def _bits(value):
    """The bits of a magnitude, an integer that orders like it."""
    if value.dtype == tl.float64:
        return tl.abs(value).to(tl.int64, bitcast=True)
    else:
        return tl.abs(value).to(tl.int32, bitcast=True)


@triton.jit
def _power(magnitude, P: tl.constexpr):
    """magnitude ** P."""
    if P == 1:
        return magnitude
    elif P == 2:
        return magnitude * magnitude
    else:
        return tl.where(magnitude == 0, 0, tl.exp2(P * tl.log2(tl.where(magnitude == 0, 1, magnitude))))


@triton.jit
def _slope(value, P: tl.constexpr):
    """Derivative of |value| ** P: P |value| ** (P - 1) with the sign of value."""
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
    if P == 1:
        return sign
    elif P == 2:
        return 2 * value
    else:
        return P * _power(tl.abs(value), P - 1) * sign


@triton.jit
def _forward(
    x,
    y,
    total,
    peak,
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
    P: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sum and maximum of one row block over one chunk; the magnitudes to the power P, but for a SPLIT maximum."""
    image, row, chunk = _place(rows, chunks, ROWS)
    x += image.to(tl.int64) * _aligned(x_image, ALIGN)
    y += image.to(tl.int64) * _aligned(y_image, ALIGN)
    row += tl.arange(0, ROWS)
    row_bound = _aligned(rows, ALIGN) if LAYOUT == "rows" else rows
    col_bound = _aligned(cols, ALIGN) if LAYOUT == "columns" else cols
    acc: tl.constexpr = total.dtype.element_ty
    bits_type: tl.constexpr = tl.int64 if acc == tl.float64 else tl.int32

    sums = tl.zeros((ROWS, COLS), acc)
    maxima = tl.zeros((ROWS, COLS), bits_type)
    begin = chunk.to(tl.int64) * span
    for start in range(begin, tl.minimum(begin + span, cols), COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < row_bound)[:, None] & (col < col_bound)[None, :]
        value = tl.load(x + _offsets(row, col, x_row, x_0, x_1, x_2, d_1, d_2, LAYOUT, ALIGN), mask=mask, other=0)
        if RELU:
            value = tl.where(value < 0, 0, value).to(value.dtype)  # NaN stays
            tl.store(y + _offsets(row, col, y_row, y_0, y_1, y_2, d_1, d_2, LAYOUT, ALIGN), value, mask=mask)
        magnitude = tl.abs(value.to(acc))
        sums += _power(magnitude, P)
        maxima = tl.maximum(maxima, _bits(magnitude))

    row_sum = tl.sum(sums, 1)
    row_max = tl.max(maxima, 1).to(acc, bitcast=True)
    if not SPLIT:
        row_max = _power(row_max, P)
    slot = (chunk.to(tl.int64) * images + image) * rows + row
    tl.store(total + slot, row_sum, mask=row < rows)
    tl.store(peak + slot, row_max, mask=row < rows)


@triton.jit
def _combine(part_total, part_peak, total, peak, count, chunks, P: tl.constexpr, ROWS: tl.constexpr):
    """Sum and maximum over the chunks, in their order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < count
    acc: tl.constexpr = total.dtype.element_ty
    bits_type: tl.constexpr = tl.int64 if acc == tl.float64 else tl.int32
    GROUP: tl.constexpr = 32
    sums = tl.zeros((GROUP, ROWS), acc)
    maxima = tl.zeros((GROUP, ROWS), bits_type)
    for start in range(0, chunks, GROUP):
        chunk = start + tl.arange(0, GROUP)
        part = chunk.to(tl.int64)[:, None] * count + row[None, :]
        inside = (chunk < chunks)[:, None] & mask[None, :]
        sums += tl.load(part_total + part, mask=inside, other=0)
        maxima = tl.maximum(maxima, _bits(tl.load(part_peak + part, mask=inside, other=0)))
    tl.store(total + row, tl.sum(sums, 0), mask=mask)
    tl.store(peak + row, _power(tl.max(maxima, 0).to(acc, bitcast=True), P), mask=mask)


@triton.jit
def _first_maximum(
    x,
    grad_max,
    part_peak,
    part_first,
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
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Bits and column of the first maximum of one row block over one chunk, unless no maximum has a gradient."""
    image, row, chunk = _place(rows, chunks, ROWS)
    x += image.to(tl.int64) * _aligned(x_image, ALIGN)
    row += tl.arange(0, ROWS)
    row_bound = _aligned(rows, ALIGN) if LAYOUT == "rows" else rows
    col_bound = _aligned(cols, ALIGN) if LAYOUT == "columns" else cols
    out = image.to(tl.int64) * rows + row
    gradient = tl.load(grad_max + out, mask=row < rows, other=0)
    bits_type: tl.constexpr = part_peak.dtype.element_ty
    if tl.max(_bits(gradient), 0) != 0:
        maxima = tl.full((ROWS, COLS), -1, bits_type)
        starts = tl.zeros((ROWS, COLS), tl.int64)
        begin = chunk.to(tl.int64) * span
        for start in range(begin, tl.minimum(begin + span, cols), COLS):
            col = start + tl.arange(0, COLS)
            mask = (row < row_bound)[:, None] & (col < col_bound)[None, :]
            value = tl.load(x + _offsets(row, col, x_row, x_0, x_1, x_2, d_1, d_2, LAYOUT, ALIGN), mask=mask, other=0)
            bits = _bits(value.to(gradient.dtype))
            # What lies outside must not win; within a lane later columns do not replace equal earlier ones.
            better = (bits > maxima) & mask
            maxima = tl.where(better, bits, maxima)
            starts = tl.where(better, start, starts)
        row_max = tl.max(maxima, 1)
        last = tl.zeros((ROWS, COLS), tl.int64) + 0x7FFFFFFFFFFFFFFF
        first = tl.where(maxima == row_max[:, None], starts + tl.arange(0, COLS)[None, :], last)
        slot = chunk.to(tl.int64) * images * rows + out
        tl.store(part_peak + slot, row_max, mask=row < rows)
        tl.store(part_first + slot, tl.min(first, 1), mask=row < rows)


@triton.jit
def _backward(
    x,
    grad_y,
    grad_sum,
    grad_max,
    part_peak,
    part_first,
    grad_x,
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
    P: tl.constexpr,
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """grad_x of one row block over one chunk."""
    image, row, chunk = _place(rows, chunks, ROWS)
    x += image.to(tl.int64) * _aligned(x_image, ALIGN)
    grad_y += image.to(tl.int64) * _aligned(y_image, ALIGN)
    grad_x += image.to(tl.int64) * _aligned(g_image, ALIGN)
    row += tl.arange(0, ROWS)
    row_bound = _aligned(rows, ALIGN) if LAYOUT == "rows" else rows
    col_bound = _aligned(cols, ALIGN) if LAYOUT == "columns" else cols

    slot = image.to(tl.int64) * rows + row
    of_sum = tl.load(grad_sum + slot, mask=row < rows, other=0)
    of_max = tl.load(grad_max + slot, mask=row < rows, other=0)
    wanted = of_max != 0  # the first maximum is known for these rows only; NaN is not 0
    best = tl.full((ROWS,), -1, part_peak.dtype.element_ty)
    first = tl.full((ROWS,), -1, tl.int64)
    for part in range(chunks):
        there = slot + tl.cast(part, tl.int64) * images * rows
        bits = tl.load(part_peak + there, mask=wanted, other=-1)
        better = bits > best
        first = tl.where(better, tl.load(part_first + there, mask=better, other=-1), first)
        best = tl.where(better, bits, best)

    begin = chunk.to(tl.int64) * span
    for start in range(begin, tl.minimum(begin + span, cols), COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < row_bound)[:, None] & (col < col_bound)[None, :]
        value = tl.load(x + _offsets(row, col, x_row, x_0, x_1, x_2, d_1, d_2, LAYOUT, ALIGN), mask=mask, other=0)
        value = value.to(of_sum.dtype)
        slope = _slope(value, P)
        gradient = of_sum[:, None] * slope
        at_first = wanted[:, None] & (col[None, :] == first[:, None])
        gradient += tl.where(at_first, of_max[:, None] * slope, 0)
        if RELU:
            offsets = _offsets(row, col, y_row, y_0, y_1, y_2, d_1, d_2, LAYOUT, ALIGN)
            gradient += tl.load(grad_y + offsets, mask=mask, other=0).to(of_sum.dtype)
            gradient = tl.where(value <= 0, 0, gradient)  # NaN passes its gradient on, as in torch
        offsets = _offsets(row, col, g_row, g_0, g_1, g_2, d_1, d_2, LAYOUT, ALIGN)
        tl.store(grad_x + offsets, gradient.to(grad_x.dtype.element_ty), mask=mask)
