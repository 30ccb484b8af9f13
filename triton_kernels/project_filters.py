"""The products of all layers' filters with their projections on a GPU: one launch forward, one backward.

A program computes one tile of one layer's product, and reads which from a table that follows from the shapes. float32
is multiplied as it is (no TF32): the scores that come of it are compared with each other.
Forward 2 n d m operations a layer over 4 (n d + d m + n m) bytes; the rows are read once for every COLS columns.
"""

import functools

import torch
import triton
import triton.language as tl

from .device import on, registers

ROWS, COLS, STEP = 32, 64, 16  # of a tile of the result, and terms of a product taken at a time; tl.dot wants 16 each
NUM_WARPS = 8


def project_filters(rows, weight, heights, widths):
    """I_l @ weight_l for the matrices I_l (heights[l], widths[l]) in `rows`, flat: (Σ heights, m)."""
    result = weight.new_empty((sum(heights), weight.shape[1]))
    _launch(_project, rows, weight, result, tuple(heights), tuple(widths), transposed=False)
    return result


def project_filters_backward(grad, rows, heights, widths):
    """I_lᵀ @ grad_l: (Σ widths, m)."""
    result = grad.new_empty((sum(widths), grad.shape[1]))
    _launch(_project, rows, grad, result, tuple(heights), tuple(widths), transposed=True)
    return result


def _launch(kernel, rows, other, result, heights, widths, transposed):
    if result.numel() == 0:
        return
    tiles = _tiles(heights, widths, transposed, ROWS, rows.device)
    columns = result.shape[1]
    most = COLS if result.dtype == torch.float32 else COLS // 2
    cols = max(16, min(most, triton.next_power_of_2(columns)))
    with on(rows):
        kernel[(len(tiles), triton.cdiv(columns, cols))](
            rows.contiguous(),
            other.contiguous(),
            result,
            tiles,
            columns,
            TRANSPOSED=transposed,
            ROWS=ROWS,
            COLS=cols,
            STEP=STEP,
            num_warps=NUM_WARPS,
            **registers(kernel),
        )


@functools.lru_cache(maxsize=64)
def _tiles(heights, widths, transposed, rows, device):
    """(·, 6) int64 on the device, the longest products first: where the layer's matrix begins, its rows and columns,
    the first row of the other factor, of the result, and of the tile within the result's rows of this layer.
    """
    table, begin, height, width = [], 0, 0, 0
    for n, d in zip(heights, widths, strict=True):
        of_other, of_result = (height, width) if transposed else (width, height)
        table += [(begin, n, d, of_other, of_result, row) for row in range(0, d if transposed else n, rows)]
        begin, height, width = begin + n * d, height + n, width + d
    table.sort(key=lambda tile: -tile[1 if transposed else 2])
    host = torch.tensor(table, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@triton.jit
def _project(
    rows,
    other,
    result,
    tiles,
    columns,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of the product of one layer's matrix, or of its transpose, with its part of the other factor."""
    tile = tiles + tl.program_id(0) * 6
    rows += tl.load(tile)
    n, d = tl.load(tile + 1), tl.load(tile + 2)
    other += tl.load(tile + 3) * columns
    result += tl.load(tile + 4) * columns
    row = tl.load(tile + 5) + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    height, depth = (d, n) if TRANSPOSED else (n, d)
    acc: tl.constexpr = result.dtype.element_ty
    total = tl.zeros((ROWS, COLS), acc)
    for start in range(0, depth, STEP):
        term = start + tl.arange(0, STEP)
        inside = (row < height)[:, None] & (term < depth)[None, :]
        if TRANSPOSED:
            left = tl.load(rows + term[None, :] * d + row[:, None], mask=inside, other=0)
        else:
            left = tl.load(rows + row[:, None] * d + term[None, :], mask=inside, other=0)
        right = tl.load(
            other + term[:, None] * columns + col[None, :],
            mask=(term < depth)[:, None] & (col < columns)[None, :],
            other=0,
        )
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=acc)
    mask = (row < height)[:, None] & (col < columns)[None, :]
    tl.store(result + row[:, None] * columns + col[None, :], total, mask=mask)
