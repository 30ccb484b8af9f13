"""select: which channel sets stay, under one exact budget."""

import math
import numbers
from dataclasses import dataclass

import numpy as np
import torch

from paamops.ops.cumulative_threshold import network_threshold

BUDGETS = ("filters", "params", "flops")


@dataclass(frozen=True)
class Selection:
    """What `select` chose.

    Attributes:
        keep: (S,) bool on the CPU, the channel sets that stay.
        threshold: the score of the first set removed, -inf if none is: of the sets that are free to go, those with a
            higher score stay. A list of one number per layer where those were given.
        asked: what was asked for, absolute: {"params": 136237}, {"threshold": 0.1}.
        achieved: `Cost` of the network that stays.
    """

    keep: torch.Tensor
    threshold: float | list
    asked: dict
    achieved: tuple


def select(channels, scores, *, filters=None, params=None, flops=None, threshold=None, round_to=1):
    """Keep the best channel sets that fit a budget: the lowest threshold whose network is within it.

    The score of a set is the mean of its filters' scores. Sets go in the order of rising score (among equal scores the
    higher index first) until the cost of the *network* that is left, producers and consumers counted, is within the
    budget; it is found by radix descent, exactly. Pinned sets stay, and so does the best set of every layer. A filter
    that only a residual sum reads, by index, goes at the latest when its place in the stream does.

    Args:
        channels: ChannelMap of the network.
        scores: (F,) floating, one per filter, finite.
        filters, params, flops: the budget, one of them: a float in (0, 1] is the fraction to keep, an int the number.
        threshold: in place of a budget, a number: a set goes when its score is ≤ it (AAP §3.3). Or one number per
            layer, in the order of `channels.layers`; a set is then held against the mean of its filters' thresholds.
        round_to: every layer keeps a multiple of it, or all its filters. Counts are rounded up, within the budget:
            the threshold rises to pay for it. What is left of the budget then, up to the cost of a whole step, goes to
            the best steps that fit. Filters that other layers share unevenly are rounded by groups of sets that lie on
            the same layers.

    Returns:
        Selection

    Raises:
        ValueError: not exactly one of the four; a budget out of range, or one that no network meets (the message says
            the smallest that can be reached); scores of a wrong shape, NaN or infinite; nothing is free to go.
        TypeError: a budget or threshold that is no number.
    """
    asked = {"filters": filters, "params": params, "flops": flops, "threshold": threshold}
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) != 1:
        raise ValueError(
            f"select takes exactly one of filters, params, flops and threshold; it got {', '.join(asked) or 'none'}"
        )
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to is {round_to!r}; it must be an int of at least 1")
    _check_scores(scores, channels)
    if channels.pinned.all():
        reasons = list(dict.fromkeys(channels.reasons))
        raise ValueError(f"nothing to prune: every channel set is pinned ({'; '.join(reasons[:3])})")
    means = channels.capped(channels.set_scores(scores))
    guarded = channels.guarded(means)
    ((name, value),) = asked.items()
    if name == "threshold":
        limits = _limits(channels, value)
        keep = guarded | (means > limits)
        asked = {name: value}
        reached = float(value) if isinstance(value, numbers.Real) else [float(v) for v in value]
    else:
        budget = absolute(name, value, getattr(channels.cost(), name))
        asked = {name: budget}
        keep, reached = _within(channels, means, guarded, name, budget, round_to)
    if round_to == 1:
        keep = channels.without_lost(keep, guarded)
    else:
        keep = _rounded(channels, means, keep, round_to)
        if name != "threshold":
            keep = _filled(channels, means, keep, name, budget, round_to)
    return Selection(keep, reached, asked, channels.cost(keep))


def _check_scores(scores, channels):
    shape = (len(channels.sets),)
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise TypeError(f"scores is {found}; it must be a floating-point tensor")
    if scores.shape != shape:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be {shape}, one score per filter")
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(
            f"scores must be finite; filter {bad}, of {channels.layers[int(channels.filters[bad])].name}, has"
            f" {float(scores[bad])}"
        )


def absolute(name, value, whole):
    """The budget as a number: a fraction of `whole` rounded down, or the int itself."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a fraction (float) or a number (int)")
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise ValueError(f"{name} is {value}; as an int it must be at least 1")
        return int(value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; as a fraction to keep it must be in (0, 1]")
    return math.floor(whole * value)


def _limits(channels, value):
    """(S,) float64: what the score of each set has to exceed."""
    count = len(channels.layers)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = [float(value)] * count
    try:
        per_layer = torch.as_tensor(value, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        per_layer = None
    if isinstance(value, bool) or per_layer is None or per_layer.shape != (count,) or per_layer.isnan().any():
        raise ValueError(
            f"threshold is {value!r}; it must be one number, or one for each of the {count} layers, no NaN"
        )
    return channels.set_scores(per_layer[channels.filters])


def _within(channels, means, guarded, name, budget, round_to):
    """The keep mask and the threshold of the largest network within the budget, before rounding."""
    blocks = channels.blocks
    sizes = torch.bincount(blocks)
    always = torch.bincount(blocks[guarded], minlength=len(sizes))
    members = np.bincount(channels.sets.numpy(), minlength=len(blocks))  # filters of each set
    weight = np.zeros(len(sizes), np.int64)
    weight[blocks.numpy()] = members  # a property of the block: equal on every axis, so equal in filters

    def cost(counts):
        counts = _round_up(counts + always, sizes, round_to).numpy()
        if name == "filters":
            return counts @ weight
        params, flops, _ = channels.costs(channels.axis_sizes(counts))
        return params if name == "params" else flops

    smallest = int(cost(torch.zeros(1, len(sizes), dtype=torch.int64))[0])
    if smallest > budget:
        raise ValueError(
            f"{name} is {budget:,}, but no network meets it: the smallest that can be reached has {smallest:,}"
        )
    free = (~guarded).nonzero().flatten()
    width = len(sizes)

    def fits(counts):
        wide = torch.zeros(len(counts), width, dtype=torch.int64)
        wide[:, : counts.shape[1]] = counts
        return torch.from_numpy(cost(wide) <= budget)

    threshold, kept = network_threshold(means[free], blocks[free], fits)
    keep = guarded.clone()
    keep[free] = kept
    return keep, float(threshold)


def _round_up(counts, sizes, round_to):
    return torch.minimum((counts + round_to - 1) // round_to * round_to, sizes)


def _rounded(channels, means, keep, round_to):
    """Add the best of the removed sets of each block until its count is rounded up."""
    blocks = channels.blocks
    sizes = torch.bincount(blocks)
    target = _round_up(torch.bincount(blocks[keep], minlength=len(sizes)), sizes, round_to)
    # Kept sets first, then by score, then by index; within its block a set stays while its place is below the target.
    order = np.lexsort((np.arange(len(means)), -means.numpy(), ~keep.numpy(), blocks.numpy()))
    start = torch.cumsum(sizes, 0) - sizes
    place = torch.empty_like(blocks)
    place[torch.from_numpy(order)] = torch.arange(len(order)) - start[blocks[torch.from_numpy(order)]]
    return place < target[blocks]


def _filled(channels, means, keep, name, budget, round_to):
    """Add steps of `round_to` removed sets of one block, the best first (by the best set of each), while they fit.

    One pass is enough: a step that does not fit will not fit in a larger network, nor will a later one of its block.
    """
    blocks, full = channels.blocks.numpy(), set()
    removed = np.flatnonzero(~keep.numpy())
    order = removed[np.lexsort((removed, -means.numpy()[removed], blocks[removed]))]
    starts = np.flatnonzero(np.diff(blocks[order], prepend=-1))
    steps = [
        of_block[k : k + round_to]
        for of_block in np.split(order, starts[1:])
        for k in range(0, len(of_block), round_to)
    ]
    steps.sort(key=lambda step: -float(means[step[0]]))
    for step in steps:
        block = blocks[step[0]]
        if block in full:
            continue
        larger = keep.clone()
        larger[step] = True
        if getattr(channels.cost(larger), name) <= budget:
            keep = larger
        else:
            full.add(block)
    return keep
