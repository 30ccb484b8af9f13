"""What filter_norms and filter_distances share: a table of where the filters of all layers lie, read by one launch.

A captured graph would replay the addresses of tensors that may be gone: the table is made anew at each call.
"""

import functools

import torch
import triton
import triton.language as tl

POINTERS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def accumulator(weight):
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def filter_table(weights, axes, groups, side):
    """(L, 9 + 2 · rank) int64 on the device, and rank, the axes that a filter's weights are walked along.

    A row: the address, filters, filters of a group, strides of the groups and of the filters within one, weights of a
    filter, its first filter among those of all layers, whether its filters are whole vectors of 16 bytes, and where the
    layer's partial sums begin if each filter has one for every `side` filters. Then size and stride of the axes,
    innermost first.
    """
    rows, walks, filters, places = [], [], 0, 0
    for weight, axis, group in zip(weights, axes, groups, strict=True):
        inside, strides = weight.shape[0] // group, weight.stride()
        count, depth = weight.shape[axis] * group, weight.numel() // max(1, weight.shape[axis] * group)
        walk = _walk(tuple(weight.shape[axis + 1 :]), strides[axis + 1 :], inside if axis else 1, strides[0])
        apart = strides[0] * inside if axis else 0
        vector = 16 // weight.itemsize
        whole = walk in ((), ((depth, 1),)) and not any(
            (weight.data_ptr() % 16, strides[axis] % vector, apart % vector)
        )
        each = weight.shape[axis]
        rows.append((weight.data_ptr(), count, each, apart, strides[axis], depth, filters, int(whole), places))
        walks.append(walk)
        filters, places = filters + count, places + count * -(-count // side)
    rank = max(1, *map(len, walks))
    table = [(*row, *sum(walk, ()), *(1, 0) * (rank - len(walk))) for row, walk in zip(rows, walks, strict=True)]
    return to_device(torch.tensor(table, dtype=torch.int64), weights[0].device), rank


@functools.lru_cache(maxsize=4096)  # networks repeat their shapes
def _walk(sizes, strides, inside, stride):
    """(size, stride) of the axes of a filter's weights, innermost first, joined where one goes on where another ends.

    The order of the weights does not matter, only that it is the same for all filters of the layer.
    """
    axes = [(size, step) for size, step in ((inside, stride), *zip(sizes, strides, strict=True)) if size != 1]
    walk = []
    for size, step in sorted(axes, key=lambda axis: axis[1]):
        if walk and walk[-1][0] * walk[-1][1] == step:
            walk[-1] = (walk[-1][0] * size, walk[-1][1])
        else:
            walk.append((size, step))
    return tuple(walk)


def to_device(table, device):
    """A copy that the host does not wait for."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@triton.jit
def filter_bases(entry, filter):
    """Where these filters begin, in elements from the address."""
    each = tl.load(entry + 2).to(filter.dtype)
    return (filter // each).to(tl.int64) * tl.load(entry + 3) + (filter % each).to(tl.int64) * tl.load(entry + 4)


@triton.jit
def weight_offsets(entry, element, RANK: tl.constexpr):
    """Where these weights of a filter lie, in elements from its beginning."""
    offset = tl.zeros(element.shape, tl.int64)
    rest = element
    for dim in tl.static_range(RANK):  # from the innermost one
        if dim == RANK - 1:
            place = rest
        else:
            size = tl.load(entry + (9 + 2 * dim)).to(element.dtype)
            outer = rest // size
            place = rest - outer * size
            rest = outer
        offset += place.to(tl.int64) * tl.load(entry + (10 + 2 * dim))
    return offset
