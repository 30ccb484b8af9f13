"""The exact threshold against a sort, at the filters of DenseNet-40 and at a million scores; half of the cost stays."""

import math

import torch

from paamops.ops.cumulative_threshold import cumulative_threshold, network_threshold

from .harness import Case

GROUPS = 1000


def inputs(size, with_costs):
    def make(device):
        scores = torch.rand(size, device=device)
        if not with_costs:
            return scores, None, size // 2
        costs = torch.randint(1, 5000, (size,), device=device)
        return scores, costs, int(costs.sum()) // 2

    return make


def sort(scores, costs, budget):
    """The same result by a stable sort, a running sum and a search in it. Without costs the order itself is the sum."""
    values, order = scores.sort(descending=True, stable=True)
    rank = torch.arange(len(scores), device=scores.device)
    if costs is None:
        kept = torch.full((), min(budget, len(scores)), device=scores.device)
    else:
        kept = torch.searchsorted(costs[order].cumsum(0), budget, right=True)
    keep = torch.empty_like(scores, dtype=torch.bool).scatter_(0, order, rank < kept)
    return torch.nn.functional.pad(values, (0, 1), value=-math.inf)[kept], keep


def case(size, with_costs, at_least):
    return Case(
        name=f"cumulative_threshold {size} float32 {'int64 costs' if with_costs else 'no costs'}",
        op="cumulative_threshold",
        make=inputs(size, with_costs),
        run=cumulative_threshold,
        check=lambda scores, costs, budget: sort(scores.double(), costs, budget),
        baselines={"sort": sort},
        bytes=size * (4 + 1 + (8 if with_costs else 0)) + 4,
        target={"sort": at_least},
        cold=False,  # scores come out of the kernel that computed them
    )


def network_inputs(device):
    scores, groups = torch.rand(10_000, device=device), torch.randint(0, GROUPS, (10_000,), device=device)
    groups[-1] = GROUPS - 1
    price = torch.randint(1, 5000, (GROUPS,), device=device)
    return scores, groups, price, int(price[groups].sum()) // 2


def network(scores, groups, price, budget):
    return network_threshold(scores, groups, lambda counts: (counts * price).sum(1) <= budget)


CASES = [
    case(26_560, False, 10),
    case(26_560, True, 10),
    case(1_000_000, False, 40),
    case(1_000_000, True, 40),
    Case(
        name=f"network_threshold 10000 float32 {GROUPS} groups",
        op="cumulative_threshold",
        make=network_inputs,
        run=network,
        check=lambda scores, groups, price, budget: sort(scores.double(), price[groups], budget),
        cold=False,
    ),
]
