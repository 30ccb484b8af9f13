"""Objective: every bad target is refused by name, and the limits are what a hand would compute."""

import math

import numpy as np
import pytest

from paamops.channels import Cost
from paamops.methods.objective import Objective

WHOLE = Cost(params=1000, flops=80_000, bytes=4000, filters=40)
HALF = Cost(params=500, flops=20_000, bytes=2000, filters=20)

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "needs at least one of max_accuracy_drop, params and flops"),
        ({"minimise": "params"}, ValueError, "needs at least one of max_accuracy_drop, params and flops"),
        ({"max_accuracy_drop": True}, TypeError, "max_accuracy_drop is a bool; it must be a number"),
        ({"max_accuracy_drop": "1%"}, TypeError, "max_accuracy_drop is a str; it must be a number"),
        ({"max_accuracy_drop": NAN}, ValueError, "max_accuracy_drop is nan; it must be finite"),
        ({"max_accuracy_drop": INFINITY}, ValueError, "max_accuracy_drop is inf; it must be finite"),
        ({"params": 0.0}, ValueError, r"params is 0.0; as a fraction to keep it must be in \(0, 1\]"),
        ({"params": 1.5}, ValueError, r"params is 1.5; as a fraction to keep it must be in \(0, 1\]"),
        ({"params": -0.5}, ValueError, r"params is -0.5; as a fraction"),
        ({"params": NAN}, ValueError, "params is nan; as a fraction"),
        ({"params": 0}, ValueError, "params is 0; as an int it must be at least 1"),
        ({"params": True}, TypeError, "params is a bool"),
        ({"params": "30%"}, TypeError, "params is a str"),
        ({"flops": -3}, ValueError, "flops is -3; as an int it must be at least 1"),
        ({"flops": 2.0}, ValueError, "flops is 2.0; as a fraction"),
        ({"flops": [0.5]}, TypeError, "flops is a list"),
        ({"max_accuracy_drop": 0, "minimise": "size"}, ValueError, "minimise is 'size'; it must be one of 'params'"),
        ({"max_accuracy_drop": 0, "minimise": []}, ValueError, r"minimise is \[\]; it must be one of 'params'"),
        ({"params": 0.5, "minimise": "flops"}, ValueError, "minimise is 'flops' without max_accuracy_drop"),
    ],
)
def test_bad_targets(arguments, error, match):
    with pytest.raises(error, match=match):
        Objective(**arguments)


@pytest.mark.parametrize(
    ("arguments", "sizes", "measures"),
    [
        ({"max_accuracy_drop": 0.01}, (), ("params",)),
        ({"max_accuracy_drop": 0.01, "minimise": "flops"}, (), ("flops",)),
        ({"max_accuracy_drop": 0.01, "minimise": "both"}, (), ("params", "flops")),
        ({"params": 0.3}, ("params",), ("params",)),
        ({"flops": 0.3}, ("flops",), ("flops",)),
        ({"flops": 0.3, "params": 100}, ("params", "flops"), ("params", "flops")),
        ({"max_accuracy_drop": 0.01, "flops": 0.3}, ("flops",), ("flops",)),
        ({"max_accuracy_drop": 0.01, "flops": 0.3, "minimise": "params"}, ("flops",), ("params",)),
    ],
)
def test_what_is_limited_and_what_the_search_goes_by(arguments, sizes, measures):
    objective = Objective(**arguments)
    assert objective.sizes == sizes
    assert objective.measures == measures


def test_limits_are_rounded_down():
    assert Objective(params=0.3).limit("params", WHOLE) == 300
    assert Objective(params=0.3).limit("params", Cost(11, 1, 1, 1)) == 3
    assert Objective(flops=1.0).limit("flops", WHOLE) == 80_000
    assert Objective(flops=1234).limit("flops", WHOLE) == 1234
    assert Objective(flops=10**9).limit("flops", WHOLE) == 10**9  # more than the network has: met from the start
    assert Objective(flops=np.int64(7)).limit("flops", WHOLE) == 7


def test_the_size_is_the_mean_share():
    assert Objective(params=0.3).size(HALF, WHOLE) == 0.5
    assert Objective(flops=0.3).size(HALF, WHOLE) == 0.25
    assert Objective(params=0.3, flops=0.2).size(HALF, WHOLE) == 0.375
    assert Objective(max_accuracy_drop=0, minimise="both").size(HALF, WHOLE) == 0.375
    assert Objective(max_accuracy_drop=0).size(WHOLE, WHOLE) == 1


def test_all_limits_on_size_must_be_kept():
    assert Objective(params=0.5).sizes_met(HALF, WHOLE)
    assert not Objective(params=499).sizes_met(HALF, WHOLE)
    assert Objective(params=0.5, flops=0.25).sizes_met(HALF, WHOLE)
    assert not Objective(params=0.5, flops=0.24).sizes_met(HALF, WHOLE)
    assert not Objective(params=0.49, flops=0.25).sizes_met(HALF, WHOLE)
    assert Objective(max_accuracy_drop=0).sizes_met(WHOLE, WHOLE)


def test_the_accuracy_may_fall_by_the_drop_and_not_by_more():
    assert Objective(params=0.5).accuracy_met(-math.inf, 1.0)
    one_point = Objective(max_accuracy_drop=0.01)
    assert one_point.accuracy_met(0.92, 0.93)  # 0.93 - 0.92 is a little more than 0.01 in floating point
    assert not one_point.accuracy_met(0.9199, 0.93)
    assert one_point.accuracy_met(0.99, 0.93)
    none = Objective(max_accuracy_drop=0)
    assert none.accuracy_met(0.9, 0.9)
    assert not none.accuracy_met(0.8999, 0.9)
    gain = Objective(max_accuracy_drop=-0.02)
    assert gain.accuracy_met(0.92, 0.9)
    assert not gain.accuracy_met(0.91, 0.9)
