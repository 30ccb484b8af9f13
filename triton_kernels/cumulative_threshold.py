"""The exact budgeted threshold on a GPU: radix descent over the bits of the scores, no sort and no host sync.

A score becomes an integer that orders like it (-0.0 like 0.0). Each level adds up the costs per 8-bit digit, among the
scores whose higher digits are those of the threshold; the next level reads off in which digit, from the highest down,
the sum first exceeds the budget. Every program reads that off for itself, so a level is one launch. Scores equal to
the threshold are then kept by index: their costs are summed per block, then counted up within the block.
Only integers are added by atomics, so the order in which they arrive does not matter.
"""

import math

import torch
import triton
import triton.language as tl

from .device import on, processors

TILE = 1024  # scores a program holds at a time
WAVES = 4  # programs per multiprocessor, at most
INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F80 << 16, torch.float64: 0x7FF0 << 48}
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
COPIES = 16  # histograms that share the additions of costs, as scores crowd into few digits at the first level
NUM_WARPS = 4


def cumulative_threshold(scores, costs, budget):
    """threshold (0-d), keep (S,) bool: the longest prefix of the scores, descending, whose costs fit the budget.

    Values are not looked at on the host: if a score is NaN or infinite, threshold is NaN and everything is kept.
    """
    count = scores.numel()
    threshold = torch.full((), -math.inf, dtype=scores.dtype, device=scores.device)
    keep = torch.empty(count, dtype=torch.bool, device=scores.device)
    if count == 0:
        return threshold, keep

    bits = 8 * scores.itemsize
    levels = bits // 8
    programs, span = launch_size(count, processors(scores))
    budget = budget.to(scores.device, non_blocking=True)
    weighted = costs is not None
    costs = costs if weighted else budget  # not read where not weighted
    zeros = torch.zeros(1 + levels * COPIES * 256, dtype=torch.int64, device=scores.device)
    invalid, histograms = zeros[:1], zeros[1:]
    state = torch.empty((levels + 1, 3), dtype=torch.int64, device=scores.device)
    equals = torch.empty(programs, dtype=torch.int64, device=scores.device)
    # Only the bits of the scores are looked at: that spares every question of rounding and of denormal numbers.
    word = WORDS[scores.itemsize]
    inputs = (scores.view(word), costs, count, span, scores.stride(0), costs.stride(0) if weighted else 0)
    found = (budget, histograms, state, invalid)
    constexprs = {"WEIGHTED": weighted, "BITS": bits, "COPIES": COPIES, "TILE": TILE, "num_warps": NUM_WARPS}
    with on(scores):
        for level in range(levels):
            _histogram[(programs,)](*inputs, *found, LEVEL=level, INFINITY=INFINITY[scores.dtype], **constexprs)
        _sum_equals[(programs,)](*inputs, *found, equals, **constexprs)
        _keep[(programs,)](*inputs, *found, equals, threshold.view(word), keep, **constexprs)
    return threshold, keep


def launch_size(count, processors):
    """programs, span: how many programs share the scores, and how many scores each takes, a multiple of TILE."""
    tiles = triton.cdiv(count, TILE)
    span = triton.cdiv(tiles, WAVES * processors) * TILE
    return triton.cdiv(count, span), span


@triton.jit
def _part(count, span):
    """First score of this program and how many it has: elements are numbered from there, so that 32 bits do."""
    begin = tl.program_id(0).to(tl.int64) * span
    return begin, tl.minimum(count - begin, span).to(tl.int32)


@triton.jit
def _load(
    scores,
    costs,
    start,
    length,
    s_scores,
    s_costs,
    WEIGHTED: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """mask, key and cost of one tile. The key is the int64 that orders like the score, the same for 0.0 and -0.0.

    Whole tiles go without a mask, which would narrow the loads where the number of scores is odd.
    """
    element = start + tl.arange(0, TILE)
    mask = element < length
    cost = mask.to(tl.int64)
    if start + TILE <= length:
        bits = tl.load(scores + element.to(tl.int64) * s_scores)
        if WEIGHTED:
            cost = tl.load(costs + element.to(tl.int64) * s_costs)
    else:
        bits = tl.load(scores + element.to(tl.int64) * s_scores, mask=mask, other=0)
        if WEIGHTED:
            cost = tl.load(costs + element.to(tl.int64) * s_costs, mask=mask, other=0)
    key = _turned(bits.to(tl.int64), BITS)
    return mask, tl.where(key == -1, 0, key), cost


@triton.jit
def _turned(bits, BITS: tl.constexpr):
    """The key of a score's bits, and the bits of a key: those of the magnitude are turned where the sign is set."""
    return bits ^ ((bits >> 63) & ((1 << (BITS - 1)) - 1))


@triton.jit
def _descend(budget, histograms, state, LEVEL: tl.constexpr, COPIES: tl.constexpr):
    """The first LEVEL digits of the threshold's key. Stored in the state for the next level: these digits, the cost of
    all keys above every key with these digits, and whether the scores exceed the budget at all.
    """
    if LEVEL == 0:
        prefix = tl.zeros((), tl.int64)
        spent = tl.zeros((), tl.int64)
        exceeded = tl.zeros((), tl.int64) + 1
    else:
        previous = state + 3 * (LEVEL - 1)
        prefix = tl.load(previous)
        spent = tl.load(previous + 1)
        exceeded = tl.load(previous + 2)
        rank = tl.arange(0, 256)  # 0 is the highest digit
        cost = tl.zeros((256,), tl.int64)
        for copy in range(COPIES):
            cost += tl.load(histograms + ((LEVEL - 1) * COPIES + copy) * 256 + (255 - rank))
        fitting = tl.sum((spent + tl.cumsum(cost, 0) <= tl.load(budget)).to(tl.int32), 0).to(tl.int64)
        digit = 255 - fitting
        spent += tl.sum(tl.where(rank < fitting, cost, 0), 0)
        exceeded = exceeded & (fitting < 256).to(tl.int64)
        # The sign of the key is part of its first digit.
        prefix = digit - 128 if LEVEL == 1 else prefix * 256 + digit
    if tl.program_id(0) == 0:
        here = state + 3 * LEVEL
        tl.store(here, prefix)
        tl.store(here + 1, spent)
        tl.store(here + 2, exceeded)
    return prefix


@triton.jit
def _histogram(
    scores,
    costs,
    count,
    span,
    s_scores,
    s_costs,
    budget,
    histograms,
    state,
    invalid,
    LEVEL: tl.constexpr,
    INFINITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BITS: tl.constexpr,
    COPIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add up the costs per digit LEVEL of the keys that agree with the threshold's in the digits before it."""
    prefix = _descend(budget, histograms, state, LEVEL, COPIES)
    program = tl.program_id(0)
    out = histograms + (LEVEL * COPIES + program % COPIES) * 256
    shift: tl.constexpr = BITS - 8 * (LEVEL + 1)
    counts = tl.zeros((256,), tl.int64)
    bad = tl.zeros((TILE,), tl.int32)
    begin, length = _part(count, span)
    scores += begin * s_scores
    costs += begin * s_costs
    for start in range(0, length, TILE):
        mask, key, cost = _load(scores, costs, start, length, s_scores, s_costs, WEIGHTED, BITS, TILE)
        digit = (key >> shift) & 255
        if LEVEL == 0:
            digit = digit ^ 128
            bad = bad | ((key >= INFINITY) | (key <= -INFINITY - 1)).to(tl.int32)  # NaN is beyond infinity
        else:
            mask = mask & (key >> (shift + 8) == prefix)
        if WEIGHTED:
            tl.atomic_add(out + digit, cost, mask=mask, sem="relaxed")
        else:
            counts += tl.histogram(digit.to(tl.int32), 256, mask=mask).to(tl.int64)
    if not WEIGHTED:
        rank = tl.arange(0, 256)
        tl.atomic_add(out + rank, counts, mask=counts > 0, sem="relaxed")
    if LEVEL == 0 and tl.max(bad, 0) != 0:
        tl.atomic_max(invalid, 1, sem="relaxed")


@triton.jit
def _sum_equals(
    scores,
    costs,
    count,
    span,
    s_scores,
    s_costs,
    budget,
    histograms,
    state,
    invalid,
    equals,
    WEIGHTED: tl.constexpr,
    BITS: tl.constexpr,
    COPIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """equals[program]: the cost of this program's scores that equal the threshold."""
    prefix = _descend(budget, histograms, state, BITS // 8, COPIES)
    program = tl.program_id(0)
    total = tl.zeros((TILE,), tl.int64)
    begin, length = _part(count, span)
    scores += begin * s_scores
    costs += begin * s_costs
    for start in range(0, length, TILE):
        mask, key, cost = _load(scores, costs, start, length, s_scores, s_costs, WEIGHTED, BITS, TILE)
        total += tl.where(mask & (key == prefix), cost, 0)
    tl.store(equals + program, tl.sum(total, 0))


@triton.jit
def _keep(
    scores,
    costs,
    count,
    span,
    s_scores,
    s_costs,
    budget,
    histograms,
    state,
    invalid,
    equals,
    threshold,
    keep,
    WEIGHTED: tl.constexpr,
    BITS: tl.constexpr,
    COPIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """keep: above the threshold, or equal to it and within the budget counting from index 0."""
    program = tl.program_id(0)
    last = state + 3 * (BITS // 8)
    prefix = tl.load(last)
    all_kept = (tl.load(last + 2) == 0) | (tl.load(invalid) != 0)
    limit = tl.load(budget)

    before = tl.zeros((TILE,), tl.int64)
    for start in range(0, program, TILE):
        other = start + tl.arange(0, TILE)
        before += tl.load(equals + other, mask=other < program, other=0)
    spent = tl.load(last + 1) + tl.sum(before, 0)

    begin, length = _part(count, span)
    scores += begin * s_scores
    costs += begin * s_costs
    for start in range(0, length, TILE):
        mask, key, cost = _load(scores, costs, start, length, s_scores, s_costs, WEIGHTED, BITS, TILE)
        equal = mask & (key == prefix)
        cost = tl.where(equal, cost, 0)
        fits = equal & (spent + tl.cumsum(cost, 0) <= limit)
        element = begin + start + tl.arange(0, TILE)
        tl.store(keep + element, all_kept | (key > prefix) | fits, mask=mask)
        spent += tl.sum(cost, 0)

    if program == 0:
        if tl.load(invalid) != 0:
            tl.store(threshold, (1 << (BITS - 1)) - 1)  # a NaN in every format
        elif tl.load(last + 2) != 0:
            tl.store(threshold, _turned(prefix, BITS).to(threshold.dtype.element_ty))
