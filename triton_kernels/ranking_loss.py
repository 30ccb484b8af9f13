"""GlobalPru's ranking loss and its gradient on a GPU: all layers in a fixed number of launches, no host sync.

    Φ = Σ_l (1 / N_l) Σ_n Σ_{j < top_l} [log Σ_{m ≥ j} exp y_m - y_j]        y_m = saliency_l[n, ranking_l[m]]

A program takes ROWS images of one layer and walks over their ranks CHUNK at a time, from the last chunk to the first.
With R_j = max_{m ≥ j} y_m and S_j = Σ_{m ≥ j} exp(y_m - R_j) the terms are (R_j - y_j) + log S_j: only differences are
exponentiated, none above 1. Within a chunk R_j and S_j come from all pairs of its ranks, which takes no scan over
threads and has a fixed order; what lies behind the chunk is two numbers an image. So an element costs CHUNK
exponentials, whatever C is, from the special function units: 8 million of them for ResNet-56 with 128 images, some
microseconds of a large GPU.
The gradient exp(y_m - R_m) P_m - [m < top], P_m = Σ_{j ≤ m, j < top} exp(R_m - R_j) / S_j, is had by a walk from the
first chunk to the last; R does not rise on the way. It needs what lies behind every chunk, which a launch writes down
first, unless every layer is a single chunk.
Launches: forward 2, backward 1 or 2, whatever the layers. Memory: two numbers for each CHUNK elements in the backward.

The launches read where the layers lie from an int64 table, which is made anew at each call: a captured graph would
replay the addresses of tensors that may be gone.
"""

import functools

import torch
import triton
import triton.language as tl

from .device import on, registers

CHUNK = 32  # ranks
ROWS = 2  # images of a program; of float64 one, since registers are few
SLOTS = 1024  # sums of programs that are added up at a time
NUM_WARPS = 4
POINTERS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def ranking_loss(saliencies, rankings, tops):
    """Φ: 0-d, float32 (float64 for float64 saliencies)."""
    anchor = saliencies[0]
    total = anchor.new_zeros((), dtype=_accumulator(anchor))
    tasks = _tasks(tuple(len(s) for s in saliencies), _rows(anchor), anchor.device)
    if not len(tasks):
        return total
    saliencies, rankings = _adjacent(saliencies, rankings)
    table = _table(saliencies, rankings, tops, saliencies)
    sums = total.new_empty(len(tasks))
    with on(anchor):
        _walk_back[(len(tasks),)](table, tasks, sums, sums, LOSS=True, **_constants(anchor))
        _add_tasks[(1,)](sums, total, len(tasks), SLOTS=SLOTS, num_warps=NUM_WARPS)
    return total


def ranking_loss_backward(grad, saliencies, rankings, tops):
    """∂saliencies: contiguous, (N_l, C_l) each in their dtype."""
    grads = [s.new_empty(s.shape) for s in saliencies]
    anchor = saliencies[0]
    tasks = _tasks(tuple(len(s) for s in saliencies), _rows(anchor), anchor.device)
    if not len(tasks):
        return grads
    saliencies, rankings = _adjacent(saliencies, rankings)
    table = _table(saliencies, rankings, tops, grads)
    behind = anchor.new_empty((_places(saliencies), 2), dtype=_accumulator(anchor))
    with on(anchor):
        if max(s.shape[1] for s in saliencies) > CHUNK:
            _walk_back[(len(tasks),)](table, tasks, behind, behind, LOSS=False, **_constants(anchor))
        _ranking_gradients[(len(tasks),)](table, tasks, behind, grad, **_constants(anchor))
    return grads


def _accumulator(saliency):
    return torch.float64 if saliency.dtype == torch.float64 else torch.float32


def _constants(anchor):
    constants = {"ELEMENT": POINTERS[anchor.dtype], "ROWS": _rows(anchor), "CHUNK": CHUNK, "num_warps": NUM_WARPS}
    return constants | registers(_walk_back)


def _rows(anchor):
    return 1 if anchor.dtype == torch.float64 else ROWS


def _adjacent(saliencies, rankings):
    saliencies = [s if s.stride(1) == 1 or s.shape[1] == 1 else s.contiguous() for s in saliencies]
    return saliencies, [r.contiguous() for r in rankings]


@functools.lru_cache(maxsize=64)
def _tasks(heights, rows, device):
    """(·, 2) int32 on the device: the layer and the first image of every program."""
    table = [(layer, image) for layer, images in enumerate(heights) for image in range(0, images, rows)]
    return _to_device(torch.tensor(table, dtype=torch.int32).view(-1, 2), device)


def _table(saliencies, rankings, tops, grads):
    """(L, 8) int64 on the device: the addresses of saliency, ranking and gradient; images, channels, top; the stride of
    the images; and the first place of the layer among those of all, see _places.
    """
    rows, place = [], 0
    for saliency, ranking, top, grad in zip(saliencies, rankings, tops, grads, strict=True):
        images, channels = saliency.shape
        addresses = saliency.data_ptr(), ranking.data_ptr(), grad.data_ptr()
        rows.append((*addresses, images, channels, top, saliency.stride(0), place))
        place += _places([saliency])
    return _to_device(torch.tensor(rows, dtype=torch.int64), saliencies[0].device)


def _places(saliencies):
    """How many chunks all images of these layers have."""
    return sum(s.shape[0] * triton.cdiv(s.shape[1], CHUNK) for s in saliencies)


def _to_device(table, device):
    """A copy that the host does not wait for."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@triton.jit
def _layer(table, tasks, ROWS: tl.constexpr):
    """Where the program's layer stands in the table, its images, channels and top, and the images of the program."""
    task = tasks + 2 * tl.program_id(0)
    entry = table + 8 * tl.load(task).to(tl.int64)
    images, channels, top = tl.load(entry + 3), tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32)
    return entry, images, channels, top, tl.load(task + 1).to(tl.int64) + tl.arange(0, ROWS)


@triton.jit
def _channel(entry, rank, channels):
    """The channels at these ranks: never one that is not there, whatever the ranking says."""
    ranking = tl.load(entry + 1).to(tl.pointer_type(tl.int64))
    channel = tl.load(ranking + rank, mask=rank < channels, other=0)
    return tl.minimum(tl.maximum(channel, 0), channels - 1)


@triton.jit
def _ranked(entry, image, images, rank, channel, channels, ELEMENT: tl.constexpr, ACC: tl.constexpr):
    """y (ROWS, CHUNK); -inf, which adds nothing, beyond the last rank."""
    saliency = tl.load(entry).to(tl.pointer_type(ELEMENT))
    inside = (image < images)[:, None] & (rank < channels)[None, :]
    value = tl.load(saliency + image[:, None] * tl.load(entry + 6) + channel[None, :], mask=inside, other=0).to(ACC)
    return tl.where((rank < channels)[None, :], value, float("-inf"))


@triton.jit
def _suffixes(y, most, sum, CHUNK: tl.constexpr):
    """R_j, S_j - 1 (ROWS, CHUNK) of a chunk behind which lie `most` and `sum` (ROWS,).

    Without the 1 of the greatest, what little the others add is not lost.
    """
    here = tl.arange(0, CHUNK)
    later = (here[None, :] > here[:, None])[None, :, :]  # rank m of the pair (j, m) is later than j
    reference = tl.max(tl.where(later, y[:, None, :], float("-inf")), 2)
    reference = tl.maximum(tl.maximum(reference, y), most[:, None])
    rest = tl.sum(tl.exp(tl.where(later, y[:, None, :] - reference[:, :, None], float("-inf"))), 2)
    return reference, rest + sum[:, None] * tl.exp(most[:, None] - reference) + (tl.exp(y - reference) - 1)


@triton.jit
def _log_above_1(x):
    """log(1 + x) for x >= 0, precise however small x is: near 0 by Cephes' polynomial (float32), else corrected."""
    above = 1 + x
    if x.dtype == tl.float64:
        added = above - 1
        return tl.where(added == 0, x, tl.log(above) * (x / tl.where(added == 0, 1.0, added)))
    else:
        f = tl.minimum(x, 0.4)  # beyond it the polynomial is not wanted, and would overflow
        p = 1.1676998740e-1 + f * (-1.1514610310e-1 + f * 7.0376836292e-2)
        p = -1.6668057665e-1 + f * (1.4249322787e-1 + f * (-1.2420140846e-1 + f * p))
        p = 3.3333331174e-1 + f * (-2.4999993993e-1 + f * (2.0000714765e-1 + f * p))
        return tl.where(x < 0.4, f + f * f * (f * p - 0.5), tl.log(above))


@triton.jit
def _behind(y, most, sum):
    """The pair (R, S) (ROWS,) of the first rank of this chunk: what lies behind the one before it."""
    reference = tl.maximum(tl.max(y, 1), most)
    return reference, tl.sum(tl.exp(y - reference[:, None]), 1) + sum * tl.exp(most - reference)


@triton.jit
def _nothing(ROWS: tl.constexpr, ACC: tl.constexpr):
    """The pair behind the last chunk: below every finite number, so that nothing is subtracted from an infinity."""
    lowest: tl.constexpr = -1.7976931348623157e308 if tl.float64 == ACC else -3.4028234663852886e38
    return tl.full((ROWS,), lowest, ACC), tl.zeros((ROWS,), ACC)


@triton.jit
def _walk_back(
    table,
    tasks,
    sums,
    behind,
    LOSS: tl.constexpr,
    ELEMENT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """LOSS: the program's share of Φ into sums. Else: what lies behind each chunk of its images, as pairs."""
    acc: tl.constexpr = sums.dtype.element_ty
    entry, images, channels, top, image = _layer(table, tasks, ROWS)
    chunks = tl.cdiv(channels, CHUNK)
    most, sum = _nothing(ROWS, acc)
    loss = tl.zeros((ROWS, CHUNK), acc)
    for step in range(chunks):
        chunk = chunks - 1 - step
        rank = chunk * CHUNK + tl.arange(0, CHUNK)
        y = _ranked(entry, image, images, rank, _channel(entry, rank, channels), channels, ELEMENT, acc)
        if LOSS:
            if chunk * CHUNK < top:
                reference, rest = _suffixes(y, most, sum, CHUNK)
                wanted = (rank < top)[None, :]
                loss += tl.where(wanted, (reference - y) + _log_above_1(tl.where(wanted, rest, 0.0)), 0.0)
        else:
            place = behind + 2 * (tl.load(entry + 7) + image * chunks + chunk)
            tl.store(place, most, mask=image < images)
            tl.store(place + 1, sum, mask=image < images)
        most, sum = _behind(y, most, sum)
    if LOSS:
        of_image = tl.where(image < images, tl.sum(loss, 1), 0.0)
        tl.store(sums + tl.program_id(0), tl.sum(of_image, 0) / images.to(acc))


@triton.jit
def _add_tasks(sums, total, count, SLOTS: tl.constexpr):
    value = tl.zeros((SLOTS,), sums.dtype.element_ty)
    for start in range(0, count, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        value += tl.load(sums + slot, mask=slot < count, other=0)
    tl.store(total, tl.sum(value, 0))


@triton.jit
def _ranking_gradients(
    table,
    tasks,
    behind,
    grad,
    ELEMENT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """∂saliency of ROWS images of a layer."""
    acc: tl.constexpr = behind.dtype.element_ty
    entry, images, channels, top, image = _layer(table, tasks, ROWS)
    grads = tl.load(entry + 2).to(tl.pointer_type(ELEMENT)) + image[:, None] * channels
    scale = tl.load(grad).to(acc) / images.to(acc)
    chunks = tl.cdiv(channels, CHUNK)
    here = tl.arange(0, CHUNK)
    earlier = (here[None, :] <= here[:, None])[None, :, :]  # rank j of the pair (m, j) is no later than m
    before = tl.full((ROWS,), 0.0, acc)  # R and P of the rank before the chunk
    share = tl.full((ROWS,), 0.0, acc)
    for chunk in range(chunks):
        rank = chunk * CHUNK + here
        channel = _channel(entry, rank, channels)
        y = _ranked(entry, image, images, rank, channel, channels, ELEMENT, acc)
        most, sum = _nothing(ROWS, acc)
        if chunk + 1 < chunks:
            place = behind + 2 * (tl.load(entry + 7) + image * chunks + chunk)
            most = tl.load(place, mask=image < images, other=0)
            sum = tl.load(place + 1, mask=image < images, other=0)
        reference, rest = _suffixes(y, most, sum, CHUNK)
        wanted = (rank < top)[None, :]
        inverse = tl.where(wanted, 1 / (1 + tl.where(wanted, rest, 0.0)), 0.0)
        falls = tl.where(earlier, reference[:, :, None] - reference[:, None, :], float("-inf"))
        shares = tl.sum(tl.exp(falls) * inverse[:, None, :], 2)
        if chunk > 0:
            shares += share[:, None] * tl.exp(reference - before[:, None])
        gradient = tl.exp(y - reference) * shares - wanted.to(acc)
        inside = (image < images)[:, None] & (rank < channels)[None, :]
        tl.store(grads + channel[None, :], (gradient * scale).to(ELEMENT), mask=inside)
        last = (here == CHUNK - 1)[None, :]
        before = tl.sum(tl.where(last, reference, 0.0), 1)
        share = tl.sum(tl.where(last, shares, 0.0), 1)
