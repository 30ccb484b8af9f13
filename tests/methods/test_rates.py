"""Mixed rates: by hand, their mean and their order for any traces, their bounds."""

import math

import pytest
import torch

from paamops.methods.rates import mixed_rates


def test_two_layers_by_hand():
    # Mean 3, deviation 1: z is −1 and 1, whatever the two traces are.
    torch.testing.assert_close(mixed_rates(0.5, [2.0, 4.0]), torch.tensor([0.6, 0.4], dtype=torch.float64))
    torch.testing.assert_close(mixed_rates(0.5, [40.0, 2.0]), torch.tensor([0.4, 0.6], dtype=torch.float64))
    torch.testing.assert_close(mixed_rates(0.5, [-2, 4], spread=0.3), torch.tensor([0.8, 0.2], dtype=torch.float64))


def test_four_layers_by_hand():
    # Mean 3, variance (4 + 4 + 4 + 36) / 4 = 12, z = −1/√3 three times and √3.
    low = 0.1 / math.sqrt(3)
    expected = torch.tensor([0.6 + low, 0.6 + low, 0.6 + low, 0.6 - 3 * low], dtype=torch.float64)
    torch.testing.assert_close(mixed_rates(0.6, [1, 1, 1, 9]), expected)


def test_what_a_bound_cuts_the_others_share():
    # z = −1/√3 three times and √3: the last would be 0.2 − 0.4 = −0.2 and stays at 0.1; the three others share what is
    # left of the mean, (4 · 0.2 − 0.1) / 3.
    found = mixed_rates(0.2, [1, 1, 1, 9], spread=0.4 / math.sqrt(3))
    torch.testing.assert_close(found, torch.tensor([0.7 / 3] * 3 + [0.1], dtype=torch.float64))
    # The other way round: 0.8 + 0.4 is cut to 0.9, the others are (4 · 0.8 − 0.9) / 3.
    found = mixed_rates(0.8, [9, 9, 9, 1], spread=0.4 / math.sqrt(3))
    torch.testing.assert_close(found, torch.tensor([2.3 / 3] * 3 + [0.9], dtype=torch.float64))
    # Cut on both sides.
    found = mixed_rates(0.4, [0, 5, 10], spread=1, low=0.3, high=0.6)
    torch.testing.assert_close(found, torch.tensor([0.6, 0.3, 0.3], dtype=torch.float64))


def random_traces(size):
    """Traces of any scale and sign, some of them equal."""
    traces = torch.randn(size, dtype=torch.float64) * 10 ** torch.empty(size, dtype=torch.float64).uniform_(-6, 6)
    return traces[torch.randint(size, (size,))] * 10 ** float(torch.empty(()).uniform_(-150, 150))


@pytest.mark.parametrize("size", [1, 2, 3, 20, 500])
def test_mean_order_and_bounds(size):
    for _ in range(20):
        traces = random_traces(size)
        rate, spread = torch.rand(2).tolist()
        low, high = sorted((torch.rand(2) * 0.99).tolist())
        found = mixed_rates(rate, traces, spread, low, high)
        assert found.dtype == torch.float64
        assert found.shape == (size,)
        assert abs(found.mean().item() - rate) <= 1e-12
        assert min(low, rate) <= found.min()
        assert found.max() <= max(high, rate)
        order = traces.argsort()
        assert (found[order].diff() <= 0).all()
        assert (found[order].diff()[traces[order].diff() == 0] == 0).all()


def test_only_the_standardised_trace_counts():
    traces = torch.rand(30, dtype=torch.float64) + 1
    expected = mixed_rates(0.3, traces)
    torch.testing.assert_close(mixed_rates(0.3, traces * 1e250), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mixed_rates(0.3, traces * 1e-250), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mixed_rates(0.3, 7 * traces - 2), expected, rtol=1e-10, atol=0)
    shuffle = torch.randperm(30)
    torch.testing.assert_close(mixed_rates(0.3, traces[shuffle]), expected[shuffle], rtol=1e-12, atol=0)


@pytest.mark.parametrize("traces", [[3.0], [0.1] * 3, [-2.0] * 7, [0.0, -0.0], [1e308] * 5], ids=str)
def test_equal_traces_or_one_layer(traces):
    assert mixed_rates(0.37, traces).tolist() == [0.37] * len(traces)


def test_bounds_widen_to_hold_the_rate():
    for rate in (0.0, 0.05, 0.1, 0.9, 0.95):
        assert mixed_rates(rate, [1.0, 2.0, 30.0]).tolist() == [rate] * 3
    assert mixed_rates(0.5, [1.0, 2.0], low=0.5, high=0.5).tolist() == [0.5, 0.5]
    assert mixed_rates(0.5, [1.0, 2.0], spread=0).tolist() == [0.5, 0.5]


def test_takes_tensors_of_any_kind():
    expected = mixed_rates(0.5, [1.0, 2.0, 4.0])
    for traces in (torch.tensor([1, 2, 4]), torch.tensor([1.0, 2, 4], requires_grad=True), (1, 2.0, 4)):
        assert torch.equal(mixed_rates(0.5, traces), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rate": 1.0}, ValueError, "rate is 1.0; it must be at least 0 and below 1"),
        ({"rate": -0.1}, ValueError, "rate is -0.1"),
        ({"rate": math.nan}, ValueError, "rate is nan"),
        ({"rate": "half"}, TypeError, "rate is a str"),
        ({"rate": True}, TypeError, "rate is a bool"),
        ({"spread": -0.1}, ValueError, "spread is -0.1; it must be from 0 to 1"),
        ({"spread": math.inf}, ValueError, "spread is inf"),
        ({"low": 0.6, "high": 0.5}, ValueError, "low and high are 0.6 and 0.5"),
        ({"high": 1}, ValueError, "low and high are 0.1 and 1.0"),
        ({"low": -1}, ValueError, "low and high are -1.0"),
        ({"low": None}, TypeError, "low is a NoneType"),
        ({"traces": []}, ValueError, r"traces is of shape \(0,\)"),
        ({"traces": [[1.0, 2.0]]}, ValueError, r"traces is of shape \(1, 2\)"),
        ({"traces": [1.0, math.nan]}, ValueError, r"traces\[1\] is nan"),
        ({"traces": [math.inf, 1.0]}, ValueError, r"traces\[0\] is inf"),
        ({"traces": ["one"]}, TypeError, "traces is a list"),
        ({"traces": (torch.ones(2), torch.ones(2))}, TypeError, "traces is a tuple"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        mixed_rates(**{"rate": 0.5, "traces": [1.0, 2.0]} | change)
