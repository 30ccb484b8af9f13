"""Channels put to their places in a wider tensor on a GPU: one read of what is kept, one write of the result.

The walk is that of the attention kernels over the result, of which rows are (image, channel) pairs; the row that a
program reads is looked up, and nothing is read for a channel without a source.
"""

import math

import triton
import triton.language as tl

from .attention import NUM_WARPS, _aligned, _offsets, _place
from .device import on, processors, registers
from .tiling import tiling


def scatter_channels(x, index, source):
    """y[n, c, …] = x[n, source[c], …], zero where source[c] is -1; channels_last where the channels of x are adjacent.

    Only where more than three dimensions do not merge is x copied first.
    """
    width, adjacent = source.shape[0], x.shape[1] > 1 and x.stride(1) == 1
    if x.ndim > 2 and adjacent:
        y = x.new_empty((x.shape[0], *x.shape[2:], width)).movedim(-1, 1)
    else:
        y = x.new_empty((x.shape[0], width, *x.shape[2:]))
    if y.numel() == 0 or x.numel() == 0:
        return y.zero_()
    # Where the channels are adjacent as (1, C, N, *space), so that the images, too, are columns of one row per channel.
    read, out = (t.movedim(1, 0)[None] if adjacent else t for t in (x, y))
    plan = tiling(out.shape, [read.stride(), out.stride()], x.itemsize, processors(x))
    if plan is None:
        return y.copy_(scatter_channels(x.contiguous(), index, source))
    constexprs = plan.constexprs | {"ALIGN": _alignment(plan, read.stride(1))}
    sizes = (width, x.shape[1], read.stride(1), plan.rows, plan.cols, plan.chunks, plan.span, *plan.inner)
    strides = [stride for tensor in plan.strides for stride in tensor]
    options = {"num_warps": NUM_WARPS, **registers(_scatter)}
    with on(x):
        _scatter[(plan.programs,)](read, source.contiguous(), out, *sizes, *strides, **constexprs, **options)
    return y


def _alignment(plan, x_channel):
    """What the strides that matter are multiples of: of adjacent channels those of y alone, since x is looked up."""
    if plan.layout == "rows":
        return math.gcd(16, plan.rows, *plan.strides[1][:1], *plan.strides[1][2:])
    return math.gcd(plan.constexprs["ALIGN"], x_channel)


@triton.jit
def _scatter(
    x,
    source,
    y,
    width,
    kept,
    x_channel,
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
    x_align: tl.constexpr = ALIGN if LAYOUT == "columns" else 1
    x += image.to(tl.int64) * _aligned(x_image, x_align)
    y += image.to(tl.int64) * _aligned(y_image, ALIGN)
    row += tl.arange(0, ROWS)
    row_bound = _aligned(rows, ALIGN) if LAYOUT == "rows" else rows
    col_bound = _aligned(cols, ALIGN) if LAYOUT == "columns" else cols
    # Rows count on over the images where these merge.
    channel = tl.load(source + row % width, mask=row < rows, other=-1)
    found = (channel >= 0) & (channel < kept)  # an index from a file reads nothing outside of x
    x += (channel * _aligned(x_channel, x_align))[:, None]
    first = row // width * width  # row of the image in which this one is

    begin = chunk.to(tl.int64) * span
    for start in range(begin, tl.minimum(begin + span, cols), COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < row_bound)[:, None] & (col < col_bound)[None, :]
        at = _offsets(first, col, x_row, x_0, x_1, x_2, d_1, d_2, LAYOUT, x_align)
        value = tl.load(x + at, mask=mask & found[:, None], other=0)
        tl.store(y + _offsets(row, col, y_row, y_0, y_1, y_2, d_1, d_2, LAYOUT, ALIGN), value, mask=mask)
