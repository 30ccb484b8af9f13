"""Packing on a GPU: all tensors of one element size are gathered, or scattered, by one launch.

The launch reads where each tensor lies and how it is walked from an int64 table. Packing happens once, so it is not
made for graph capture: a captured graph would replay the addresses of tensors that may be gone.
"""

import functools
import itertools

import torch
import triton
import triton.language as tl

from .device import on

BLOCK = 1024
NUM_WARPS = 4
WORDS = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.int64,
}  # moved as bits, never as values


def pack_channels(tensors, indices, slots):
    """Each tensor gathered along its indexed axes: new dense tensors, strides in the order of the tensor's."""
    packed = []
    for tensor, axes in _with_axes(tensors, slots):
        sizes = [size if slot < 0 else len(indices[slot]) for size, slot in zip(tensor.shape, axes, strict=True)]
        strides = _packed_strides(tuple(tensor.shape), tensor.stride(), tuple(sizes))
        packed.append(torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device))
    _move(packed, tensors, indices, slots, scatter=False)
    return packed


def pack_channels_backward(grads, indices, slots, sizes):
    """Each gradient scattered into contiguous zeros of the original sizes, which come flattened."""
    scattered = [grad.new_empty(shape) for grad, shape in _with_axes(grads, sizes)]
    if scattered:
        torch._foreach_zero_(scattered)
    dense = [grad if _is_dense(grad) else grad.contiguous() for grad in grads]
    _move(dense, scattered, indices, slots, scatter=True)
    return scattered


def _move(small, large, indices, slots, scatter):
    """Copy between the tensors `small`, dense, and what the indices select of `large`."""
    indices = [vector.contiguous() for vector in indices]
    addresses = [vector.data_ptr() for vector in indices]
    groups = {}
    for few, (many, axes) in zip(small, _with_axes(large, slots), strict=True):
        if few.numel():
            walk = _walk(tuple(few.shape), few.stride(), many.stride(), tuple(axes), few.itemsize)
            groups.setdefault(few.itemsize, []).append((few, many, walk))
    for itemsize, members in groups.items():
        table, blocks, rank, wide = launch_table(members, addresses)
        aligned = all(few.data_ptr() % 16 == 0 for few, _, _ in members)
        anchor = members[0][0]
        host = torch.tensor(table + blocks, dtype=torch.int64, pin_memory=anchor.is_cuda)
        device_table = host.to(anchor.device, non_blocking=True)
        with on(anchor):
            _move_blocks[(len(blocks),)](
                device_table,
                device_table[len(table) :],
                ELEMENT=_POINTERS[WORDS[itemsize]],
                RANK=rank,
                SCATTER=scatter,
                WIDE=wide,
                ALIGNED=aligned,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )


def launch_table(members, addresses):
    """table, blocks, rank, wide of one launch over `members`, (small, large, walk) each.

    A row of the table: address of small, of large, elements, first block, then `rank` times size, stride in large and
    address of the index vector (0: the whole axis), innermost first. blocks: the row that each program works on.
    wide: some tensor needs 64-bit element numbers.
    """
    rank = max(1, *(len(walk) for _, _, walk in members))
    table, blocks, wide = [], [], False
    for row, (small, large, walk) in enumerate(members):
        elements = 1
        for size, _, _ in walk:
            elements *= size
        table += (small.data_ptr(), large.data_ptr(), elements, len(blocks))
        for size, stride, slot in reversed(walk):
            table += (size, stride, 0 if slot < 0 else addresses[slot])
        table += (1, 0, 0) * (rank - len(walk))
        blocks += [row] * triton.cdiv(elements, BLOCK)
        wide |= elements > 2**31 - BLOCK
    return table, blocks, rank, wide


@functools.lru_cache(maxsize=4096)  # networks repeat their shapes, and packing is bound by the host
def _walk(sizes, small_strides, large_strides, slots, itemsize):
    """(size, stride in large, slot) of each dimension in the order of small's memory, outermost first.

    Axes without an index merge where large, too, walks them at one stride. Elements of 16 bytes count as two words.
    """
    walk = []
    for dim in sorted(range(len(sizes)), key=lambda dim: (-small_strides[dim], dim)):
        size, stride, slot = sizes[dim], large_strides[dim], slots[dim]
        if slot < 0 and size == 1:
            continue
        if walk and slot < 0 and walk[-1][2] < 0 and walk[-1][1] == stride * size:
            size *= walk.pop()[0]
        walk.append((size, stride, slot))
    if itemsize == 16:
        walk = [(size, 2 * stride, slot) for size, stride, slot in walk] + [(2, 1, -1)]
    return tuple(walk)


@functools.lru_cache(maxsize=4096)
def _packed_strides(sizes, strides, packed_sizes):
    """Dense strides for `packed_sizes`, in the order of `strides`; among equal ones axes of size 1 come innermost."""
    order = sorted(range(len(sizes)), key=lambda dim: (-strides[dim], sizes[dim] == 1, dim))
    result, stride = [0] * len(sizes), 1
    for dim in reversed(order):
        result[dim] = stride
        stride *= max(packed_sizes[dim], 1)
    return tuple(result)


def _is_dense(tensor):
    """Whether the elements fill their memory without gaps and overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _with_axes(tensors, flat):
    """Pairs of a tensor and its part of a list with one entry per tensor and dimension."""
    entries = iter(flat)
    return [(tensor, list(itertools.islice(entries, tensor.dim()))) for tensor in tensors]


_POINTERS = {torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64}


@triton.jit
def _move_tile(
    entry,
    small,
    large,
    element,
    elements,
    RANK: tl.constexpr,
    SCATTER: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Copy the elements `element`, numbered as they lie in small; all of them exist unless MASKED."""
    mask = element < elements if MASKED else element >= 0
    rest = element
    offset = tl.zeros(element.shape, tl.int64)
    for dim in tl.static_range(RANK):  # from the innermost one
        if dim == RANK - 1:
            place = rest.to(tl.int64)
        else:
            size = tl.load(entry + (4 + 3 * dim)).to(element.dtype)
            outer = rest // size
            place = (rest - outer * size).to(tl.int64)
            rest = outer
        index = tl.load(entry + (6 + 3 * dim))
        if index != 0:
            place = tl.load(index.to(tl.pointer_type(tl.int64)) + place, mask=mask, other=0)
        offset += place * tl.load(entry + (5 + 3 * dim))
    if MASKED:
        if SCATTER:
            tl.store(large + offset, tl.load(small + element, mask=mask, other=0), mask=mask)
        else:
            tl.store(small + element, tl.load(large + offset, mask=mask, other=0), mask=mask)
    else:
        if SCATTER:
            tl.store(large + offset, tl.load(small + element))
        else:
            tl.store(small + element, tl.load(large + offset))


@triton.jit
def _move_blocks(
    table,
    blocks,
    ELEMENT: tl.constexpr,
    RANK: tl.constexpr,
    SCATTER: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one block of one tensor. Whole blocks go without a mask, whose bound from memory would narrow the access."""
    program = tl.program_id(0)
    entry = table + tl.load(blocks + program) * (4 + 3 * RANK)
    small = tl.load(entry).to(tl.pointer_type(ELEMENT))
    large = tl.load(entry + 1).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        small = tl.multiple_of(small, 16)
    elements = tl.load(entry + 2)
    begin = (program - tl.load(entry + 3)) * BLOCK
    element = (begin if WIDE else begin.to(tl.int32)) + tl.arange(0, BLOCK)
    if begin + BLOCK <= elements:
        _move_tile(entry, small, large, element, elements, RANK, SCATTER, False)
    else:
        _move_tile(entry, small, large, element, elements, RANK, SCATTER, True)
