"""cumulative_threshold and network_threshold against a sort in numpy."""

import math

import numpy as np
import pytest
import torch

from paamops.ops import cumulative_threshold as module
from paamops.ops.cumulative_threshold import cumulative_threshold, network_threshold

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HUGE = 1 << 44  # of such costs 2^18 make 2^62


def brute_force(scores, costs, budget):
    """Sort by (score descending, index ascending), add up the costs, stop before the budget is exceeded."""
    values = scores.double().numpy()
    order = np.lexsort((np.arange(len(values)), -values))
    spent = np.cumsum(np.ones(len(values), dtype=np.int64) if costs is None else costs.numpy()[order])
    kept = int(np.searchsorted(spent, budget, side="right"))
    keep = np.zeros(len(values), dtype=bool)
    keep[order[:kept]] = True
    return values[order[kept]] if kept < len(values) else -math.inf, torch.from_numpy(keep)


def check(scores, costs, budget):
    before = scores.clone()
    threshold, keep = cumulative_threshold(scores, costs, budget)
    expected_threshold, expected_keep = brute_force(scores, costs, budget)
    assert threshold.dtype == scores.dtype
    assert threshold.shape == ()
    assert keep.dtype == torch.bool
    assert threshold.item() == expected_threshold
    assert torch.equal(keep, expected_keep)
    assert keep[scores > threshold].all()
    assert torch.equal(scores, before)


def few_values(size, values, dtype):
    """Scores with many ties, negative ones, and both zeros."""
    scores = ((torch.randint(0, values, (size,)) - values // 2) / 7).to(dtype)
    return torch.where(torch.rand(size) < 0.5, scores, -scores)


def random_budgets(total):
    inside = torch.randint(0, max(total, 1), (3,)).tolist()
    return sorted({0, 1, *inside, max(total - 1, 0), total, total + 7})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [1, 4, 60000])
@pytest.mark.parametrize("size", [1, 2, 63, 700])
def test_equals_a_sort(dtype, values, size):
    scores = few_values(size, values, dtype)
    for costs in (None, torch.randint(0, 5, (size,)), torch.zeros(size, dtype=torch.int64)):
        total = size if costs is None else int(costs.sum())
        for budget in random_budgets(total):
            check(scores, costs, budget)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_the_scores_counts(dtype):
    """Random bit patterns: all exponents, denormals, both signs."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integer)
    scores = torch.randint(info.min, info.max, (3000,), dtype=integer).view(dtype)
    scores = scores[scores.isfinite()]
    denormal = torch.randint(0, 50, (300,), dtype=integer).view(dtype)
    for values in (scores, torch.cat((denormal, -denormal))):
        for budget in random_budgets(len(values)):
            check(values, None, budget)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_enough_for_several_threads(dtype):
    """With ties that cross from one thread's share into the next one's, on both sides of the threshold."""
    size = 300_001
    for scores in (torch.randn(size).to(dtype), few_values(size, 5, dtype)):
        costs = torch.randint(0, HUGE // 2, (size,))
        total = int(costs.sum())
        assert total < 1 << 63
        check(scores, costs, int(torch.rand(()).item() * total))
        check(scores, None, size // 3)


def test_costs_near_the_limit_of_int64():
    scores, costs = few_values(512, 9, torch.float32), torch.randint((1 << 53) - 9, 1 << 53, (512,))
    total = int(costs.sum())
    assert (1 << 62) - 512 * 9 <= total < 1 << 62
    for budget in (total - 1, total, total // 2, (1 << 63) - 1):
        check(scores, costs, budget)


def test_zeros_are_equal():
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0, -1.0])
    for budget in range(6):
        check(scores, None, budget)
    threshold, keep = cumulative_threshold(torch.tensor([-0.0, 0.0]), budget=1)
    assert keep.tolist() == [True, False]
    assert math.copysign(1, threshold.item()) == 1


def test_free_elements_after_a_spent_budget_are_kept():
    scores, costs = torch.tensor([5.0, 4, 3, 2, 1]), torch.tensor([2, 1, 0, 0, 1])
    threshold, keep = cumulative_threshold(scores, costs, 3)
    assert keep.tolist() == [True, True, True, True, False]
    assert threshold == 1


def test_fractions_are_of_the_total_and_rounded_down():
    scores, costs = torch.randn(1000), torch.randint(0, 100, (1000,))
    for fraction in torch.rand(5).tolist():
        for given, total in ((None, 1000), (costs, int(costs.sum()))):
            threshold, keep = cumulative_threshold(scores, given, fraction)
            expected = brute_force(scores, given, math.floor(total * fraction))
            assert threshold.item() == expected[0]
            assert torch.equal(keep, expected[1])
    huge = torch.randint(HUGE << 8, (HUGE << 8) + 99, (100,))
    assert cumulative_threshold(scores[:100], huge, 1.0)[1].all()
    assert cumulative_threshold(scores, None, 1.0)[0] == -math.inf


def test_empty():
    empty = torch.empty(0)
    for result in (
        cumulative_threshold(empty),
        cumulative_threshold(empty, torch.empty(0, dtype=torch.int64), 0),
        network_threshold(empty, torch.empty(0, dtype=torch.int64), lambda counts: None),
    ):
        assert result[0] == -math.inf
        assert result[1].shape == (0,)
        assert result[1].dtype == torch.bool


def test_strided():
    wide, costs = torch.randn(500, 6), torch.randint(0, 9, (500, 2))
    check(wide[:, 3], costs[:, 1], 700)
    check(torch.randn(()).expand(50), torch.ones((), dtype=torch.int64).expand(50), 20)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(bad, dtype):
    for size in (1, 10, 150_000):
        scores = torch.randn(size).to(dtype)
        scores[torch.randint(size, ())] = bad
        with pytest.raises(ValueError, match="scores must be finite, got 1 of"):
            cumulative_threshold(scores)
        threshold, keep = torch.ops.paamops.cumulative_threshold(scores, None, torch.tensor(1))
        assert threshold.isnan()
        assert keep.all()
        with pytest.raises(ValueError, match="scores must be finite"):
            network_threshold(scores, torch.zeros(size, dtype=torch.int64), lambda counts: counts[:, 0] < 5)


def test_bad_input():
    scores, costs = torch.randn(10), torch.ones(10, dtype=torch.int64)
    for error, match, arguments in (
        (TypeError, "scores must be a floating-point tensor, got torch.int64", (costs,)),
        (TypeError, "scores must be a floating-point tensor, got list", ([1.0],)),
        (TypeError, "scores must be float16", (scores.to(torch.float8_e4m3fn),)),
        (ValueError, r"scores must have the shape \(S,\), got \(2, 5\)", (scores.view(2, 5),)),
        (TypeError, "costs must be an int64 tensor, got torch.float32", (scores, scores)),
        (ValueError, r"costs must have the shape of scores \(10,\), got \(9,\)", (scores, costs[:9])),
        (ValueError, "costs must be on the device of scores, cpu, got meta", (scores, costs.to("meta"))),
        (ValueError, "costs must be >= 0 .*smallest is -1", (scores, costs - 2)),
        (TypeError, "budget must be a float", (scores, costs, "half")),
        (TypeError, "budget must be a float", (scores, costs, True)),
        (ValueError, r"budget must be in \(0, 1\]", (scores, costs, 0.0)),
        (ValueError, r"budget must be in \(0, 1\]", (scores, costs, 1.5)),
        (ValueError, r"budget must be in \(0, 1\]", (scores, costs, math.nan)),
        (ValueError, "budget must be >= 0", (scores, costs, -1)),
    ):
        with pytest.raises(error, match=match):
            cumulative_threshold(*arguments)


def test_same_bits_for_any_number_of_threads():
    scores, costs = few_values(400_000, 300, torch.float32), torch.randint(0, 1000, (400_000,))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(cumulative_threshold(scores, costs, 0.3))
    finally:
        torch.set_num_threads(threads)
    for threshold, keep in results[1:]:
        assert threshold == results[0][0]
        assert torch.equal(keep, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(dtype):
    scores, costs, budget = few_values(5000, 900, dtype), torch.randint(0, 50, (5000,)), torch.tensor(60_000)
    for given in (None, costs):
        for limit in (budget, budget // 30, torch.tensor(0)):
            kernel = torch.ops.paamops.cumulative_threshold(scores, given, limit)
            reference = module._reference(scores, given, limit)
            assert torch.equal(kernel[0], reference[0])
            assert torch.equal(kernel[1], reference[1])


def test_opcheck():
    op = torch.ops.paamops.cumulative_threshold.default
    for size in (0, 1, 33):
        for costs in (None, torch.randint(0, 5, (size,))):
            torch.library.opcheck(op, (torch.randn(size), costs, torch.tensor(20)))


def test_not_differentiable():
    threshold, keep = cumulative_threshold(torch.randn(9, requires_grad=True))
    assert not threshold.requires_grad
    assert not keep.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [1, 4, 600, 60000])
@pytest.mark.parametrize("size", [1, 2, 70, 3000])
def test_network_threshold_with_additive_costs(dtype, values, size):
    """Where the cost does add up, both thresholds are one; `fits` sees ascending candidates, few times."""
    groups = torch.randint(0, min(size, 13), (size,))
    groups[0] = min(size, 13) - 1
    price = torch.randint(0, 5, (min(size, 13),))
    scores, costs = few_values(size, values, dtype), price[groups]
    for budget in random_budgets(int(costs.sum())):
        calls = []

        def fits(counts, calls=calls, budget=budget):
            assert counts.dtype == torch.int64
            assert counts.shape[1] == len(price)
            assert len(counts) <= 257
            assert (counts.diff(dim=0) >= 0).all()
            calls.append(len(counts))
            return counts @ price <= budget

        threshold, keep = network_threshold(scores, groups, fits)
        expected = cumulative_threshold(scores, costs, budget)
        assert threshold.dtype == dtype
        assert threshold == expected[0]
        assert torch.equal(keep, expected[1])
        assert len(calls) <= dtype.itemsize + 2  # 3000 equal scores are two digits


def test_network_threshold_with_a_cost_that_does_not_add_up():
    """Layers in a row: the cost is Σ in·out, as of linear layers. Every prefix is tried."""
    scores, groups = few_values(90, 30, torch.float32), torch.arange(90) % 3

    def cost(counts):
        return counts[:, 0] * 3 + counts[:, 0] * counts[:, 1] + counts[:, 1] * counts[:, 2] + counts[:, 2] * 10

    order = np.lexsort((np.arange(90), -scores.numpy()))
    prefixes = torch.zeros(91, 3, dtype=torch.int64)
    for k, element in enumerate(order):
        prefixes[k + 1] = prefixes[k]
        prefixes[k + 1, groups[element]] += 1
    costs = cost(prefixes)
    for budget in [0, *torch.randint(0, int(costs[-1]), (10,)).tolist(), int(costs[-1])]:
        threshold, keep = network_threshold(scores, groups, lambda counts, budget=budget: cost(counts) <= budget)
        kept = int((costs <= budget).sum()) - 1
        expected = torch.zeros(90, dtype=torch.bool)
        expected[torch.from_numpy(order[:kept].copy())] = True
        assert torch.equal(keep, expected)
        assert threshold == (scores[order[kept]] if kept < 90 else -math.inf)


def test_network_threshold_bad_input():
    scores, groups = torch.randn(10), torch.arange(10)

    def nothing_fits(counts):
        return torch.zeros(len(counts), dtype=torch.bool)

    for error, match, arguments in (
        (ValueError, "refuses even the one that keeps nothing", (scores, groups, nothing_fits)),
        (TypeError, "scores must be a floating-point tensor", (groups, groups, nothing_fits)),
        (TypeError, "groups must be an int64 tensor", (scores, groups.int(), nothing_fits)),
        (ValueError, "groups must have the shape of scores", (scores, groups[1:], nothing_fits)),
        (ValueError, "groups must be >= 0, got -3", (scores, groups - 3, nothing_fits)),
        (TypeError, "fits must return a bool tensor", (scores, groups, lambda counts: counts)),
        (TypeError, "fits must return a bool tensor", (scores, groups, lambda counts: True)),
    ):
        with pytest.raises(error, match=match):
            network_threshold(*arguments)
