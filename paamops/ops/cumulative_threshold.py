"""The exact threshold whose kept elements stay within a budget, by radix descent over cumulative histograms."""

import math
import numbers

import torch

from paamops.ops.registration import define

RADIX_BITS = 8
RADIX = 1 << RADIX_BITS


def _reference(scores, costs, budget):
    """The formula, by a sort: the kernels reach the same result without one."""
    scores = scores + 0.0  # -0.0 becomes 0.0, so that a sort by bits orders them alike too
    costs = torch.ones_like(scores, dtype=torch.int64) if costs is None else costs
    order = scores.argsort(descending=True, stable=True)  # stable: among equals the lower index comes first
    kept = costs[order].cumsum(0) <= budget  # non-negative costs: a prefix, and the longest
    keep = torch.empty_like(scores, dtype=torch.bool).scatter_(0, order, kept)
    removed = scores.masked_fill(keep, -math.inf)  # the first one removed has the greatest score of them
    threshold = removed.amax() if scores.numel() else scores.new_full((), -math.inf)
    valid = scores.isfinite().all() & (costs >= 0).all() & (budget >= 0)
    return threshold.where(valid, math.nan), keep | ~valid


def _fake(scores, costs, budget):
    return scores.new_empty(()), torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)


_op = define(
    "cumulative_threshold(Tensor scores, Tensor? costs, Tensor budget) -> (Tensor threshold, Tensor keep)",
    reference=_reference,
    fake=_fake,
)


def cumulative_threshold(scores, costs=None, budget=0.5):
    """keep = the longest prefix of the order (score descending, lower index first among equals) with Σ costs ≤ budget.

    threshold = the score of the first element removed, -inf if none is removed, so that keep ⊇ {scores > threshold};
    the elements kept at the threshold itself are those of lowest index. -0.0 equals 0.0.

    scores: (S,) floating. costs: (S,) int64 ≥ 0 with a sum below 2^63, on the device of scores; None means 1 each.
    budget: a float in (0, 1] is that fraction of the total cost, rounded down; an int ≥ 0 is absolute (1.0 keeps all,
    1 keeps a cost of one). Returns (threshold, keep): 0-d in the dtype of scores, and (S,) bool. An empty S gives
    (-inf, empty). Not differentiable.

    Exact, without a sort and without a host sync: a radix descent over the order-preserving bits of the scores, with a
    cumulative cost-weighted histogram per level. Costs are integers, so the result never depends on the summing order.

    Raises TypeError and ValueError for wrong dtypes, shapes, devices and budgets; on the CPU also ValueError for NaN or
    infinite scores and for negative costs. Elsewhere, and under torch.compile, values cannot be looked at without a
    sync: NaN or infinite scores give threshold NaN and keep everything.

    Source: radix selection (Alabi et al., Fast k-selection algorithms for graphics processing units, 2012), with costs.
    """
    _check_scores(scores)
    if costs is not None:
        _check_like("costs", costs, scores)
    scores = scores.detach()
    threshold, keep = _op(scores, costs, _budget(scores, costs, budget))
    if scores.is_cpu and not torch.compiler.is_compiling() and threshold.isnan():
        _refuse_non_finite(scores)
        raise ValueError(f"costs must be >= 0 with a sum below 2^63; the smallest is {costs.min().item()}")
    return threshold, keep


def network_threshold(scores, groups, fits):
    """keep = the longest prefix of the order of `cumulative_threshold` whose kept counts per group satisfy `fits`.

    For costs that do not add up over the elements: removing a channel shrinks its producers and its consumers, so the
    cost of a network follows from how many channels each group keeps.

    scores: (S,) floating, finite. groups: (S,) int64, the group of each score, in 0..G-1 where G is their maximum + 1.
    fits: called with counts (K, G) int64, the numbers kept per group at K ≤ 257 candidates, ascending; returns (K,)
    bool, monotone: what fits, fits with fewer kept. It is called at most once per level of the descent (8 bits of the
    score, then 8 bits of the rank among equals). Returns (threshold, keep) as `cumulative_threshold` does, with the
    same ties: (-inf, all) if everything fits. An empty S gives (-inf, empty).

    Raises ValueError if not even nothing kept fits. Reads back from the device once per level, as `fits` decides.
    """
    _check_scores(scores)
    _check_like("groups", groups, scores)
    scores = scores.detach() + 0.0  # -0.0 becomes 0.0
    _refuse_non_finite(scores)
    if scores.numel() == 0:
        return scores.new_full((), -math.inf), torch.empty_like(scores, dtype=torch.bool)
    lowest = groups.min().item()
    if lowest < 0:
        raise ValueError(f"groups must be >= 0, got {lowest}")
    key, bits = _descending_key(scores)
    kept = torch.zeros(1, int(groups.max()) + 1, dtype=torch.int64, device=scores.device)
    first = None  # the element the descent closes in on: the first of the order that does not fit any more
    members = None  # the elements of the bin chosen so far, in the order of their index; None is all of them
    digits = key
    while first is None:
        for shift in range(bits - RADIX_BITS, -1, -RADIX_BITS):
            digit = ((digits >> shift) & (RADIX - 1)).long()
            inside = groups if members is None else groups[members]
            bins, counts = _cumulative_counts(digit, inside, kept)  # row k: all bins before the k-th kept
            # Once inside a bin that did not fit whole, its beginning is known to fit and its end is known not to.
            candidates = counts if members is None else counts[1:-1]
            fitting = _leading(fits, candidates) if len(candidates) else 0
            if members is None:
                if fitting == 0:
                    raise ValueError("fits must accept a candidate, but it refuses even the one that keeps nothing")
                if fitting == len(counts):
                    return scores.new_full((), -math.inf), torch.ones_like(scores, dtype=torch.bool)
                fitting -= 1
            kept = counts[fitting : fitting + 1]
            chosen = (digit == bins[fitting]).nonzero().flatten()
            members = chosen if members is None else members[chosen]
            digits = digits[chosen]
            if len(members) == 1:
                first = members[0]
                break
        # The scores that are left are equal. Their rank by index continues the key: the same descent over its digits.
        digits = torch.arange(len(members), device=scores.device)
        bits = RADIX_BITS * math.ceil(max(len(members) - 1, 1).bit_length() / RADIX_BITS)
    threshold = scores[first]
    lower_index = torch.arange(len(scores), device=scores.device) < first
    return threshold, (scores > threshold) | ((scores == threshold) & lower_index)


def _descending_key(scores):
    """Integers whose order as unsigned numbers is the descending order of the scores, and how many bits they have."""
    bits = 8 * scores.dtype.itemsize
    pattern = scores.view({16: torch.int16, 32: torch.int32, 64: torch.int64}[bits])
    # The bits of a float are sign and magnitude: positive ones descend once all bits but the sign are flipped,
    # negative ones, whose sign makes them come last, descend as they are.
    return torch.where(pattern < 0, pattern, pattern ^ ((1 << (bits - 1)) - 1)), bits


def _cumulative_counts(digit, groups, before):
    """The K digits that occur, ascending, and `before` (1, G) plus all elements of the first k of them (K + 1, G)."""
    occurs = torch.bincount(digit, minlength=RADIX) > 0
    rank = occurs.cumsum(0) - 1
    bins, width = occurs.nonzero().flatten(), before.shape[1]
    histogram = torch.bincount(rank[digit] * width + groups, minlength=len(bins) * width).view(len(bins), width)
    return bins, torch.cat((before, histogram)).cumsum(0)


def _leading(fits, counts):
    """How many of the candidates fit, up to the first that does not."""
    answer = fits(counts)
    if not isinstance(answer, torch.Tensor) or answer.dtype != torch.bool or answer.shape != counts.shape[:1]:
        found = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise TypeError(f"fits must return a bool tensor of shape ({len(counts)},), one per candidate, got {found}")
    return int(answer.cummin(0).values.sum()) if len(answer) else 0


def _check_scores(scores):
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a floating-point tensor, got {found}")
    if scores.dtype.itemsize < 2:
        raise TypeError(f"scores must be float16, bfloat16, float32 or float64, got {scores.dtype}")
    if scores.dim() != 1:
        raise ValueError(f"scores must have the shape (S,), got {tuple(scores.shape)}")


def _check_like(name, values, scores):
    if not isinstance(values, torch.Tensor) or values.dtype != torch.int64:
        found = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {found}")
    if values.shape != scores.shape:
        raise ValueError(f"{name} must have the shape of scores {tuple(scores.shape)}, got {tuple(values.shape)}")
    if values.device != scores.device:
        raise ValueError(f"{name} must be on the device of scores, {scores.device}, got {values.device}")


def _refuse_non_finite(scores):
    bad = scores[~scores.isfinite()]
    if len(bad):
        raise ValueError(f"scores must be finite, got {len(bad)} of {len(scores)} NaN or infinite (first: {bad[0]})")


def _budget(scores, costs, budget):
    """The absolute budget as a 0-d int64 tensor on the device of scores, without reading anything back."""
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget must be a float (a fraction) or an int (absolute), got {type(budget).__name__}")
    if isinstance(budget, numbers.Integral):
        if not 0 <= budget < 1 << 63:
            raise ValueError(f"budget must be >= 0 and below 2^63 if it is an int, got {budget}")
        return torch.full((), int(budget), dtype=torch.int64, device=scores.device)
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1] if it is a float, got {budget}")
    if costs is None:
        return torch.full((), math.floor(len(scores) * budget), dtype=torch.int64, device=scores.device)
    total = costs.sum()
    return total if budget == 1 else (total.double() * budget).floor().long()
