"""The sums of distances between the filters of each layer on a GPU: two launches, whatever the layers.

A program takes SIDE filters of one layer and SIDE of its others, each pair of blocks once, and walks over their weights
STEP at a time. The differences themselves are squared and added up, STEP sums a pair: no norms and products whose
difference would cancel, and no exchange between threads but every CHUNK steps. So a pair costs a subtraction and a
multiply-add for each weight: n² d of each for a layer of n filters of d weights.
The program writes the sum of its distances for each filter of both blocks; a second launch adds them up in order.
Memory: n / SIDE numbers a filter.
"""

import functools

import torch
import triton
import triton.language as tl

from .device import on, registers
from .filters import POINTERS, accumulator, filter_bases, filter_table, to_device, weight_offsets

SIDE, STEP, CHUNK = 32, 8, 32  # filters of a block; weights at a time; and steps whose sums are kept apart
SUMMED = 128  # filters whose partial sums a program adds up
NUM_WARPS = 8


def filter_distances(weights, axes, groups):
    """(F,) float32 (float64 for float64 weights)."""
    anchor = weights[0]
    counts = [weight.shape[axis] * group for weight, axis, group in zip(weights, axes, groups, strict=True)]
    sums = anchor.new_empty(sum(counts), dtype=accumulator(anchor))
    if not len(sums):
        return sums
    depths = [weight.numel() // max(1, count) for weight, count in zip(weights, counts, strict=True)]
    side = SIDE if anchor.dtype != torch.float64 else SIDE // 2
    pairs, blocks, places = _tasks(tuple(counts), tuple(depths), side, SUMMED, anchor.device)
    table, rank = filter_table(weights, axes, groups, side)
    partial = sums.new_empty(places)
    with on(anchor):
        _pairs[(len(pairs),)](
            table,
            pairs,
            partial,
            ELEMENT=POINTERS[anchor.dtype],
            RANK=rank,
            SIDE=side,
            STEP=STEP,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
            **registers(_pairs),
        )
        _add_blocks[(len(blocks),)](
            table, blocks, partial, sums, RANK=rank, SIDE=side, SUMMED=SUMMED, num_warps=SUMMED // 32
        )
    return sums


@functools.lru_cache(maxsize=64)
def _tasks(counts, depths, side, summed, device):
    """On the device: (layer, one block, another or the same) of every program of the first launch, those with the most
    weights first; (layer, first filter) of the second; and how many partial sums there are.
    """
    order = sorted(range(len(counts)), key=lambda layer: -depths[layer])
    cuts = [range(-(-count // side)) for count in counts]
    pairs = [(layer, one, other) for layer in order for one in cuts[layer] for other in cuts[layer][one:]]
    blocks = [(layer, first) for layer, count in enumerate(counts) for first in range(0, count, summed)]
    places = sum(count * len(cut) for count, cut in zip(counts, cuts, strict=True))
    tables = [torch.tensor(table, dtype=torch.int32) for table in (pairs, blocks)]
    return *(to_device(table, device) for table in tables), places


@triton.jit
def _pairs(
    table,
    tasks,
    partial,
    ELEMENT: tl.constexpr,
    RANK: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """partial[block · filters + f]: the sum of the distances of the filter f to those of the block."""
    acc: tl.constexpr = partial.dtype.element_ty
    task = tasks + 3 * tl.program_id(0)
    entry = table + tl.load(task).to(tl.int64) * (9 + 2 * RANK)
    one, other = tl.load(task + 1), tl.load(task + 2)
    count, depth = tl.load(entry + 1).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    weights = tl.load(entry).to(tl.pointer_type(ELEMENT))
    row, column = one * SIDE + tl.arange(0, SIDE), other * SIDE + tl.arange(0, SIDE)
    # A filter beyond the last one is that one again, and its distances do not count.
    left, right = filter_bases(entry, tl.minimum(row, count - 1)), filter_bases(entry, tl.minimum(column, count - 1))
    step = tl.arange(0, STEP)
    squares = tl.zeros((SIDE, SIDE), acc)
    begin = tl.zeros((), tl.int32)
    while begin < depth:
        total = tl.zeros((SIDE, SIDE, STEP), acc)
        end = tl.minimum(begin + CHUNK * STEP, depth)
        while begin < end:
            element = begin + step
            offsets = weight_offsets(entry, element, RANK)[None, :]
            inside = (element < depth)[None, :]
            a = tl.load(weights + (left[:, None] + offsets), mask=inside, other=0)
            b = tl.load(weights + (right[:, None] + offsets), mask=inside, other=0)
            difference = a.to(acc)[:, None, :] - b.to(acc)[None, :, :]
            total += difference * difference
            begin += STEP
        squares += tl.sum(total, 2)
    two = (row < count)[:, None] & (column < count)[None, :] & (row[:, None] != column[None, :])
    distance = tl.sqrt(tl.where(two, squares, 0.0))
    partial += tl.load(entry + 8)
    tl.store(partial + (other.to(tl.int64) * count + row), tl.sum(distance, 1), mask=row < count)
    if one != other:
        tl.store(partial + (one.to(tl.int64) * count + column), tl.sum(distance, 0), mask=column < count)


@triton.jit
def _add_blocks(table, tasks, partial, sums, RANK: tl.constexpr, SIDE: tl.constexpr, SUMMED: tl.constexpr):
    """The sum of each filter's partial sums, in the order of the blocks."""
    task = tasks + 2 * tl.program_id(0)
    entry = table + tl.load(task).to(tl.int64) * (9 + 2 * RANK)
    count = tl.load(entry + 1)
    filter = tl.load(task + 1).to(tl.int64) + tl.arange(0, SUMMED)
    partial += tl.load(entry + 8)
    total = tl.zeros((SUMMED,), sums.dtype.element_ty)
    for block in range(0, tl.cdiv(count, SIDE)):
        total += tl.load(partial + (block * count + filter), mask=filter < count, other=0)
    tl.store(sums + (tl.load(entry + 6) + filter), total, mask=filter < count)
