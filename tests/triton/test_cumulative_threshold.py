"""cumulative_threshold: every result exactly that of adding up the costs one by one in order."""

import math

import pytest
import torch
from paamops.triton_kernels import cumulative_threshold as kernels

from paamops.ops import cumulative_threshold as ops
from tests.triton import DEVICE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expected(scores, costs, budget):
    """threshold, keep by the definition."""
    values = (scores.double() + 0.0).tolist()
    keep, spent = [False] * len(values), 0
    for index in sorted(range(len(values)), key=lambda index: (-values[index], index)):
        spent += 1 if costs is None else int(costs[index])
        if spent > budget:
            return values[index], keep
        keep[index] = True
    return -math.inf, keep


def check(scores, costs, budget):
    threshold, keep = kernels.cumulative_threshold(scores, costs, torch.tensor(budget, device=DEVICE))
    assert (threshold.shape, threshold.dtype, keep.dtype) == ((), scores.dtype, torch.bool)
    assert (threshold.item(), keep.tolist()) == expected(scores, costs, budget)


def budgets(count, costs):
    total = count if costs is None else int(costs.sum())
    return sorted({0, total // 3, max(total - 1, 0), total})


@pytest.fixture(params=["one program", "many programs"])
def programs(request, monkeypatch):
    """Small tiles, so that few scores already make several tiles and several programs."""
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "processors", lambda x: 1)
    monkeypatch.setattr(kernels, "WAVES", 1 if request.param == "one program" else 100)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("programs")
def test_random_scores_with_many_ties(dtype, weighted):
    scores = (torch.randn(200, device=DEVICE) * 3).round(decimals=1).to(dtype)
    scores[::7], scores[::11] = -0.0, 0.0
    costs = torch.randint(0, 9, (200,), device=DEVICE) if weighted else None
    for budget in budgets(200, costs):
        check(scores, costs, budget)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_differ_in_every_digit(dtype, weighted):
    info = torch.finfo(dtype)
    extremes = [info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal / 2, 1.0, 1 + info.eps, -1.0, 0.0]
    scores = torch.tensor(extremes, dtype=dtype, device=DEVICE)
    costs = torch.arange(1, 1 + len(extremes), device=DEVICE) if weighted else None
    for budget in range(0, len(extremes) + 1, 2) if costs is None else budgets(len(extremes), costs):
        check(scores, costs, budget)


@pytest.mark.usefixtures("programs")
def test_all_scores_equal_are_kept_by_index():
    scores = torch.full((300,), -2.5, device=DEVICE)
    for budget in (0, 64, 65, 299, 300):
        threshold, keep = kernels.cumulative_threshold(scores, None, torch.tensor(budget, device=DEVICE))
        assert keep.tolist() == [True] * budget + [False] * (300 - budget)
        assert threshold == (-2.5 if budget < 300 else -math.inf)


def test_large_costs_do_not_overflow():
    scores = torch.randn(50, device=DEVICE)
    costs = torch.randint(2**40, 2**50, (50,), device=DEVICE)
    for budget in budgets(50, costs):
        check(scores, costs, budget)


def test_costs_of_zero_are_free():
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0], device=DEVICE)
    check(scores, torch.zeros(4, dtype=torch.int64, device=DEVICE), 0)
    check(scores, torch.tensor([1, 0, 1, 0], device=DEVICE), 1)


def test_strided_inputs():
    scores, costs = torch.randn(90, 2, device=DEVICE)[:, 1], torch.randint(0, 9, (90, 3), device=DEVICE)[:, 2]
    check(scores, costs, int(costs.sum()) // 2)
    check(torch.randn(1, device=DEVICE).expand(90), costs, int(costs.sum()) // 2)


@pytest.mark.parametrize("count", [1, 2, 255, 256])
def test_small_counts(count):
    scores = torch.rand(count, device=DEVICE)
    for budget in (0, count // 2, count):
        check(scores, None, budget)


def test_empty():
    threshold, keep = kernels.cumulative_threshold(torch.empty(0, device=DEVICE), None, torch.tensor(3, device=DEVICE))
    assert threshold == -math.inf
    assert keep.shape == (0,)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_that_is_not_finite_keeps_everything(dtype, value):
    scores = torch.randn(200, device=DEVICE).to(dtype)
    scores[170] = value
    for costs in (None, torch.ones(200, dtype=torch.int64, device=DEVICE)):
        threshold, keep = kernels.cumulative_threshold(scores, costs, torch.tensor(20, device=DEVICE))
        assert threshold.isnan()
        assert keep.all()


def test_same_as_the_reference_op():
    scores = torch.randn(500, device=DEVICE).round(decimals=1)
    costs = torch.randint(0, 99, (500,), device=DEVICE)
    budget = costs.sum() // 2
    mine = kernels.cumulative_threshold(scores, costs, budget)
    reference = ops.cumulative_threshold(scores.cpu(), costs.cpu(), int(budget))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, reference, strict=True))
