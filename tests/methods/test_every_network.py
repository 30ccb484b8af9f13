"""Automatic: with nothing but a target, AAP ends by itself on every network that comes with the package.

Training is left out (it does nothing), and an accuracy stands in that falls as a network gets too small: what is shown
is that the search ends, close to its target, in rounds that each remove something.
"""

import pytest
import torch

import paamops
from paamops import models
from paamops.methods.objective import Objective
from paamops.methods.policy import trained
from tests.methods.trainers import params_of

SMALL = ("lenet300-100", "lenet5", "resnet20")
LARGE = tuple(name for name in models.NETWORKS if name not in SMALL)


def network(name):
    torch.manual_seed(torch.initial_seed() % 2**31)
    return models.build(name, in_channels=3, num_classes=10).eval()


def run(name, objective, breaks_at=0.0):
    """AAP on an untrained network whose accuracy is 0.9, and 0.5 below the share `breaks_at` of its parameters."""
    model = network(name)
    whole = params_of(model)
    return paamops.AAP(
        model,
        torch.randn(4, 3, 32, 32),
        train=lambda model, epochs, start_epoch: None,
        evaluate=lambda model: 0.9 if params_of(model) >= breaks_at * whole else 0.5,
        objective=objective,
        epochs=4,
        trained=True,
    ).run()


def check(result):
    rounds = result.history[1:]
    taught = [entry for entry in rounds if entry.accuracy is not None]
    assert len(taught) <= 30, [entry.outcome for entry in rounds]
    for entry in taught:
        origin = result.history[entry.origin]
        assert entry.filters < origin.filters  # none was trained for nothing
    networks = [(trained(result.history, entry.origin), entry.filters) for entry in taught]
    assert len(set(networks)) == len(networks)  # and none twice
    assert result.met, result.message


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_ends_close_to_where_the_accuracy_breaks(name):
    result = run(name, Objective(max_accuracy_drop=0.01), breaks_at=0.3)
    check(result)
    share = params_of(result.model) / params_of(result.dense)
    assert 0.3 <= share < 0.45, result.message


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_lands_on_both_sizes(name):
    result = run(name, Objective(params=0.4, flops=0.4))
    check(result)
    last = result.history[result.chosen]
    shares = (last.params / result.history[0].params, last.flops / result.history[0].flops)
    assert max(shares) <= 0.4
    assert max(shares) > 0.33, result.message  # no more was removed than a channel set or two
