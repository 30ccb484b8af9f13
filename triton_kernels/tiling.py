"""Launch sizes of the attention kernels: one pure function of shapes, strides and device, testable without a GPU."""

import math
from typing import NamedTuple

import triton

TILE = 2048  # elements a program of 4 warps holds at a time: 16 per thread, so a few 16-byte loads are in flight
WAVES = 4  # programs wanted per multiprocessor before rows are split further


class Tiling(NamedTuple):
    """How (N, C, *spatial) is cut into programs; one program takes ROWS x COLS elements at a time.

    A row is one (image, channel), its columns are the pixels in row-major order. Images whose rows follow each other
    at one stride count as one image.
    """

    images: int
    rows: int
    cols: int
    inner: tuple  # sizes of the last two spatial dimensions, which split a column index where the layout is "strided"
    strides: tuple  # of every tensor: image, row and three spatial strides, in elements
    layout: str  # "columns": pixels are adjacent; "rows": channels are adjacent; "strided": neither
    constexprs: dict  # LAYOUT, ALIGN, ROWS, COLS
    chunks: int  # programs that share a row block
    span: int  # columns of one chunk, a multiple of COLS

    @property
    def programs(self):
        return self.images * triton.cdiv(self.rows, self.constexprs["ROWS"]) * self.chunks


def tiling(shape, strides, itemsize, processors):
    """Tiling of tensors of one `shape` (N, C, *spatial), not empty, with these `strides`; None: too many dimensions.

    `strides` holds one tuple per tensor (input, output, ...), all walked together.
    """
    rows, row_strides = _merge(shape[:2], [s[:2] for s in strides])
    cols, col_strides = _merge(shape[2:], [s[2:] for s in strides])
    if len(cols) > 3:
        return None
    rows, row_strides = _pad(rows, row_strides, 2)
    cols, col_strides = _pad(cols, col_strides, 3)
    (images, rows), (d0, d1, d2) = rows, cols
    cols = d0 * d1 * d2

    flat = cols == d2
    rows_adjacent = flat and (rows == 1 or all(s[1] == 1 for s in row_strides))
    cols_adjacent = flat and (cols == 1 or all(s[2] == 1 for s in col_strides))
    if rows_adjacent and (cols == 1 or not cols_adjacent):
        layout, outer, adjacent = "rows", [s[2] for s in col_strides], rows
    elif cols_adjacent:
        layout, outer, adjacent = "columns", [s[1] for s in row_strides], cols
    else:
        layout, outer, adjacent = "strided", [1], 1
    align = math.gcd(16, adjacent, *outer, *(s[0] for s in row_strides)) if layout != "strided" else 1

    tile = TILE // 2 if itemsize == 8 else TILE
    most_rows, most_cols = triton.next_power_of_2(rows), triton.next_power_of_2(cols)
    if layout == "rows":
        block_rows = min(most_rows, 128)
        block_cols = min(most_cols, tile // block_rows)
        block_rows = min(most_rows, tile // block_cols)
    else:
        block_cols = min(most_cols, 512)
        block_rows = min(most_rows, tile // block_cols)
        block_cols = min(most_cols, tile // block_rows)
    blocks = images * triton.cdiv(rows, block_rows)
    tiles = triton.cdiv(cols, block_cols)
    chunks = max(1, min(tiles, triton.cdiv(WAVES * processors, blocks)))
    span = triton.cdiv(tiles, chunks) * block_cols
    return Tiling(
        images=images,
        rows=rows,
        cols=cols,
        inner=(d1, d2),
        strides=tuple((*r, *c) for r, c in zip(row_strides, col_strides, strict=True)),
        layout=layout,
        constexprs={"LAYOUT": layout, "ALIGN": align, "ROWS": block_rows, "COLS": block_cols},
        chunks=triton.cdiv(cols, span),
        span=span,
    )


def _merge(sizes, strides):
    """Drop dimensions of size 1 and merge neighbours that every tensor walks at one stride; order is kept."""
    merged, merged_strides = [], [[] for _ in strides]
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        if merged and all(m[-1] == s[i] * size for m, s in zip(merged_strides, strides, strict=True)):
            merged[-1] *= size
            for m, s in zip(merged_strides, strides, strict=True):
                m[-1] = s[i]
        else:
            merged.append(size)
            for m, s in zip(merged_strides, strides, strict=True):
                m.append(s[i])
    return merged, merged_strides


def _pad(sizes, strides, rank):
    """Leading dimensions of size 1 up to `rank`; their stride is 0, which spoils no alignment."""
    missing = rank - len(sizes)
    return [1] * missing + sizes, [[0] * missing + s for s in strides]
