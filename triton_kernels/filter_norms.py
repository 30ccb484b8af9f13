"""The l1 and l2 norms of the filters of all layers on a GPU: one launch, every weight read once.

A program takes ROWS filters of one layer and walks over their weights COLS at a time. Where the filters are whole
vectors of 16 bytes, as nearly always, full tiles go without a mask; what is left, and all of other layouts, with one.
"""

import functools

import torch
import triton
import triton.language as tl

from .device import on
from .filters import POINTERS, accumulator, filter_bases, filter_table, to_device, weight_offsets

ROWS, COLS = 16, 128  # filters of a program, of float64 half as many, and weights of them at a time
NUM_WARPS = 4


def filter_norms(weights, axes, groups, p):
    """(F,) float32 (float64 for float64 weights)."""
    counts = [weight.shape[axis] * group for weight, axis, group in zip(weights, axes, groups, strict=True)]
    norms = weights[0].new_empty(sum(counts), dtype=accumulator(weights[0]))
    depths = [weight.numel() // max(1, count) for weight, count in zip(weights, counts, strict=True)]
    rows = ROWS if norms.dtype == torch.float32 else ROWS // 2
    tasks = _tasks(tuple(counts), tuple(depths), rows, weights[0].device)
    if not len(tasks):
        return norms
    table, rank = filter_table(weights, axes, groups, rows)
    with on(weights[0]):
        _norms[(len(tasks),)](
            table,
            tasks,
            norms,
            P=p,
            ELEMENT=POINTERS[weights[0].dtype],
            RANK=rank,
            ROWS=rows,
            COLS=COLS,
            num_warps=NUM_WARPS,
        )
    return norms


@functools.lru_cache(maxsize=64)
def _tasks(counts, depths, rows, device):
    """(·, 2) int32 on the device: layer and first filter of every program, those with the most weights first."""
    order = sorted(range(len(counts)), key=lambda layer: -depths[layer])
    table = [(layer, first) for layer in order for first in range(0, counts[layer], rows)]
    return to_device(torch.tensor(table, dtype=torch.int32).view(-1, 2), device)


@triton.jit
def _term(value, P: tl.constexpr, ACC: tl.constexpr):
    value = value.to(ACC)
    if P == 1:
        return tl.abs(value)
    else:
        return value * value


@triton.jit
def _norms(
    table,
    tasks,
    norms,
    P: tl.constexpr,
    ELEMENT: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The norms of ROWS filters of a layer; a filter beyond the last one is that one again, and is not stored."""
    acc: tl.constexpr = norms.dtype.element_ty
    task = tasks + 2 * tl.program_id(0)
    entry = table + tl.load(task).to(tl.int64) * (9 + 2 * RANK)
    count, depth = tl.load(entry + 1), tl.load(entry + 5)
    filter = tl.load(task + 1).to(tl.int64) + tl.arange(0, ROWS)
    weights = tl.load(entry).to(tl.pointer_type(ELEMENT))
    bases = filter_bases(entry, tl.minimum(filter, count - 1))
    column = tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), acc)
    begin = tl.zeros((), tl.int64)
    if tl.load(entry + 7) != 0:
        aligned = tl.multiple_of(weights, 16)
        # The strides are whole vectors of 16 bytes.
        vectors = bases // (128 // ELEMENT.primitive_bitwidth) * (128 // ELEMENT.primitive_bitwidth)
        begin = depth // COLS * COLS
        for first in range(0, depth // COLS):
            value = tl.load(aligned + (vectors[:, None] + (first * COLS + column)[None, :]))
            total += _term(value, P, acc)
    while begin < depth:
        element = begin + column
        offsets = weight_offsets(entry, element, RANK)
        inside = (element < depth)[None, :] & (filter < count)[:, None]
        total += _term(tl.load(weights + (bases[:, None] + offsets[None, :]), mask=inside, other=0), P, acc)
        begin += COLS
    norm = tl.sum(total, 1)
    if P == 2:
        norm = tl.sqrt(norm)
    tl.store(norms + (tl.load(entry + 6) + filter), norm, mask=filter < count)
