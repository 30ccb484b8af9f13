"""Gather the kept indices of every axis of every tensor, all tensors in one call."""

import itertools

import torch

from paamops.ops.registration import compiled, define


def pack_channels(tensors, indices):
    """packed[t] = tensors[t][numpy.ix_(indices[t][0], indices[t][1], …)]: each tensor gathered along all its axes.

    tensors: a sequence of tensors of any dtype and rank on one device. indices: for every tensor one entry per
    dimension: the kept indices of that axis, int64, strictly increasing, within the axis, possibly empty; or None for
    the whole axis. One vector may serve many axes; pass the same object then, it is looked at once. Index vectors on
    another device than the tensors are moved there.

    Returns a list of dense tensors in memory of their own, whatever was kept. The order of the strides is that of the
    tensor, so channels_last stays channels_last. Differentiable with respect to the tensors.

    Raises TypeError and ValueError that name the tensor and the dimension. Indices are checked before anything is read
    through them, which needs one read back where they are on a GPU: packing happens once, out-of-bounds reads never.

    On the CPU it is one pass over all tensors, in which neighbouring kept indices are copied as one run and threads get
    equal shares of the bytes, not of the tensors. Like every op it runs with the GIL released.
    """
    tensors = list(tensors)
    pool, slots = _pool(tensors, list(indices))
    if not tensors:
        return []
    if compiled is None or not tensors[0].is_cpu:
        _check_indices(tensors, pool, slots)
    try:
        return _op(tensors, [vector.to(tensors[0].device) for vector in pool], slots)
    except RuntimeError:  # the C++ kernel checks them itself, but knows no tensor by its place
        _check_indices(tensors, pool, slots)
        raise


def packed_strides(sizes, strides, packed_sizes):
    """Dense strides for `packed_sizes` in the order of `strides`: the widest outermost, equal ones in logical order.

    Dimensions of size 1 come innermost among equal strides: only there does the order tell channels_last from
    contiguous.
    """
    order = sorted(range(len(sizes)), key=lambda dim: (-strides[dim], sizes[dim] == 1, dim))
    result, stride = [0] * len(sizes), 1
    for dim in reversed(order):
        result[dim] = stride
        stride *= max(packed_sizes[dim], 1)
    return result


def _reference(tensors, indices, slots):
    packed = []
    for tensor, axes in zip(tensors, _per_tensor(slots, [tensor.dim() for tensor in tensors]), strict=True):
        gathered = tensor
        for dim, slot in enumerate(axes):
            if slot >= 0:
                gathered = gathered.index_select(dim, indices[slot])
        packed.append(_empty_packed(tensor, gathered.shape).copy_(gathered))
    return packed


def _fake(tensors, indices, slots):
    per_tensor = _per_tensor(slots, [tensor.dim() for tensor in tensors])
    return [
        _empty_packed(
            tensor, [size if slot < 0 else len(indices[slot]) for size, slot in zip(tensor.shape, axes, strict=True)]
        )
        for tensor, axes in zip(tensors, per_tensor, strict=True)
    ]


def _backward_reference(grads, indices, slots, sizes):
    ranks = [grad.dim() for grad in grads]
    scattered = []
    for grad, axes, shape in zip(grads, _per_tensor(slots, ranks), _per_tensor(sizes, ranks), strict=True):
        for dim, slot in enumerate(axes):
            if slot >= 0:
                wider = grad.new_zeros((*grad.shape[:dim], shape[dim], *grad.shape[dim + 1 :]))
                grad = wider.index_copy_(dim, indices[slot], grad)
        scattered.append(grad.clone(memory_format=torch.contiguous_format))
    return scattered


def _backward_fake(grads, indices, slots, sizes):
    shapes = _per_tensor(sizes, [grad.dim() for grad in grads])
    return [grad.new_empty(shape) for grad, shape in zip(grads, shapes, strict=True)]


def _setup_context(ctx, inputs, output):
    tensors, indices, slots = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*indices)
    ctx.slots, ctx.shapes = slots, [tuple(tensor.shape) for tensor in tensors]


def _backward(ctx, grads):
    there, slots = _given(ctx, grads)
    sizes = [size for t in there for size in ctx.shapes[t]]
    scattered = _backward_op([grads[t] for t in there], list(ctx.saved_tensors), slots, sizes)
    return _in_their_places(scattered, there, len(grads)), [None] * len(ctx.saved_tensors), None


def _backward_setup_context(ctx, inputs, output):
    _, indices, slots, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*indices)
    ctx.slots, ctx.shapes = slots, [tuple(grad.shape) for grad in output]


def _backward_backward(ctx, grads):
    """The scatter is linear: its gradient is the gather."""
    there, slots = _given(ctx, grads)
    gathered = _op([grads[t] for t in there], list(ctx.saved_tensors), slots)
    return _in_their_places(gathered, there, len(grads)), [None] * len(ctx.saved_tensors), None, None


def _given(ctx, grads):
    """Which gradients there are (results of integer dtype and unused ones have none), and the slots of those."""
    there = [t for t, grad in enumerate(grads) if grad is not None]
    axes = _per_tensor(ctx.slots, [len(shape) for shape in ctx.shapes])
    return there, [slot for t in there for slot in axes[t]]


def _in_their_places(results, there, length):
    placed = [None] * length
    for t, result in zip(there, results, strict=True):
        placed[t] = result
    return placed


_op = define(
    "pack_channels(Tensor[] tensors, Tensor[] indices, int[] slots) -> Tensor[]",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)

_backward_op = define(
    "pack_channels_backward(Tensor[] grads, Tensor[] indices, int[] slots, int[] sizes) -> Tensor[]",
    reference=_backward_reference,
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)


def _empty_packed(tensor, packed_sizes):
    strides = packed_strides(tensor.shape, tensor.stride(), packed_sizes)
    return torch.empty_strided(packed_sizes, strides, dtype=tensor.dtype, device=tensor.device)


def _per_tensor(flat, ranks):
    """Split a list with one entry per tensor and dimension into one list per tensor."""
    starts = [0]
    for rank in ranks:
        starts.append(starts[-1] + rank)
    if starts[-1] != len(flat):
        raise ValueError(
            f"slots and sizes must have one entry per dimension of each tensor, {starts[-1]}, got {len(flat)}"
        )
    return [flat[start:stop] for start, stop in itertools.pairwise(starts)]


def _pool(tensors, indices):
    """The distinct index vectors, and for every tensor and dimension which of them it uses (-1: none)."""
    if len(indices) != len(tensors):
        raise ValueError(f"indices must have one entry per tensor, {len(tensors)}, got {len(indices)}")
    pool, slot_of, slots = [], {None: -1}, []
    for t, (tensor, axes) in enumerate(zip(tensors, indices, strict=True)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"tensors[{t}] must be a tensor, got {type(tensor).__name__}")
        if not isinstance(axes, (tuple, list)) or len(axes) != tensor.dim():
            found = len(axes) if isinstance(axes, (tuple, list)) else type(axes).__name__
            raise ValueError(
                f"indices[{t}] must have one entry per dimension of tensors[{t}], {tensor.dim()}, got {found}"
            )
        for dim, vector in enumerate(axes):
            key = None if vector is None else id(vector)
            if key not in slot_of:
                _check_vector(vector, t, dim)
                slot_of[key] = len(pool)
                pool.append(vector)
            slots.append(slot_of[key])
    if len({tensor.device for tensor in tensors}) > 1:
        t = next(t for t, tensor in enumerate(tensors) if tensor.device != tensors[0].device)
        raise ValueError(
            f"tensors[{t}] is on {tensors[t].device}, but all must be on the device of the first, {tensors[0].device}"
        )
    return pool, slots


def _check_vector(vector, t, dim):
    if not isinstance(vector, torch.Tensor) or vector.dtype != torch.int64:
        found = vector.dtype if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise TypeError(f"indices[{t}][{dim}] must be an int64 tensor or None, got {found}")
    if vector.dim() != 1:
        raise ValueError(f"indices[{t}][{dim}] must have the shape (kept,), got {tuple(vector.shape)}")


def _check_indices(tensors, pool, slots):
    """Refuse indices outside their axis or out of order: a few calls over all vectors at once, one read back."""
    uses = {}  # (position in the pool, size of the axis) -> the first tensor and dimension of that kind
    places = [(t, dim, size) for t, tensor in enumerate(tensors) for dim, size in enumerate(tensor.shape)]
    for slot, (t, dim, size) in zip(slots, places, strict=True):
        if slot >= 0:  # the others are whole axes
            uses.setdefault((slot, size), (t, dim))
    filled = [slot for slot, vector in enumerate(pool) if len(vector)]
    if not filled:
        return
    flat = torch.cat([pool[slot] for slot in filled]).cpu()
    lengths = torch.tensor([len(pool[slot]) for slot in filled])
    ends = lengths.cumsum(0)
    rising = flat.diff() > 0
    rising[ends[:-1] - 1] = True  # from the end of one vector to the beginning of the next
    first = dict(zip(filled, flat[ends - lengths].tolist(), strict=True))
    last = dict(zip(filled, flat[ends - 1].tolist(), strict=True))
    fault, faulty = -1, -1
    if not rising.all():
        fault = int((~rising).nonzero()[0])
        faulty = filled[int(torch.searchsorted(ends, fault, right=True))]
    for (slot, size), (t, dim) in uses.items():
        if slot == faulty:
            raise ValueError(
                f"indices[{t}][{dim}] must be strictly increasing, but has {int(flat[fault])} before "
                f"{int(flat[fault + 1])}"
            )
        if slot in first and (first[slot] < 0 or last[slot] >= size):
            raise ValueError(
                f"indices[{t}][{dim}] must be within 0..{size - 1}, the axis of tensors[{t}], "
                f"but reaches from {first[slot]} to {last[slot]}"
            )
