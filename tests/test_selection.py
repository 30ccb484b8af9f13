"""select against brute force: every prefix of the sorted sets, its network's cost taken exactly."""

import pytest
import torch

import paamops
from tests import networks


def brute_force(channels, scores, name, budget):
    """The largest prefix of the free sets, best first, whose network fits."""
    means = channels.set_scores(scores)
    guarded = channels.guarded(means)
    free = [s for s in range(len(means)) if not guarded[s]]
    order = sorted(free, key=lambda s: (-means[s].item(), s))
    for stay in range(len(order), -1, -1):
        keep = guarded.clone()
        keep[order[:stay]] = True
        if getattr(channels.cost(keep), name) <= budget:
            return keep, (means[order[stay]].item() if stay < len(order) else float("-inf"))
    raise AssertionError("nothing fits")


@pytest.mark.parametrize("network", [networks.Residual, networks.Depthwise, networks.Split, networks.Upscale])
@pytest.mark.parametrize("name", ["params", "flops", "filters"])
@pytest.mark.parametrize("ties", [False, True])
def test_the_lowest_threshold_within_the_budget(network, name, ties):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    scores = torch.randn(len(channels.sets))
    scores = scores.sign() if ties else scores
    whole = getattr(channels.cost(), name)
    smallest = getattr(channels.cost(channels.guarded(channels.set_scores(scores))), name)
    for budget in torch.linspace(smallest, whole, 9).long().tolist():
        chosen = paamops.select(channels, scores, **{name: budget})
        keep, threshold = brute_force(channels, scores, name, budget)
        assert torch.equal(chosen.keep, keep)
        assert chosen.threshold == threshold
        assert chosen.asked == {name: budget}
        assert chosen.achieved == channels.cost(keep)
        assert getattr(chosen.achieved, name) <= budget


def test_fractions_are_of_the_whole():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    scores = torch.rand(len(channels.sets))
    half = paamops.select(channels, scores, params=0.5)
    assert half.asked == {"params": channels.cost().params // 2}
    everything = paamops.select(channels, scores, flops=1.0)
    assert everything.keep.all()
    assert everything.threshold == float("-inf")


def test_equal_scores_do_not_overprune():
    model, inputs = networks.make(networks.Plain)
    channels = paamops.trace(model, inputs)
    chosen = paamops.select(channels, torch.ones(len(channels.sets)), filters=30)
    assert chosen.achieved.filters == 30
    assert not chosen.keep[25:30].any()  # among equals the lower index stays
    assert chosen.keep[:25].sum() == 25


@pytest.mark.parametrize("network", [networks.Residual, networks.Depthwise])
@pytest.mark.parametrize("name", ["params", "flops"])
def test_round_to_keeps_multiples_within_the_budget(network, name):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    scores = torch.randn(len(channels.sets))
    whole = getattr(channels.cost(), name)
    fine = getattr(paamops.select(channels, scores, **{name: 0.8}).achieved, name)
    chosen = paamops.select(channels, scores, **{name: 0.8}, round_to=4)
    small = paamops.pack(model, channels, chosen)
    assert getattr(chosen.achieved, name) <= 0.8 * whole
    assert getattr(chosen.achieved, name) > 0.3 * fine
    for layer in channels.layers[:-1]:
        width, dense = len(small.get_parameter(layer.weight)), len(model.get_parameter(layer.weight))
        assert width % 4 == 0 or width == dense, layer.name
    assert paamops.select(channels, scores, **{name: 1.0}, round_to=4).keep.all()


@pytest.mark.parametrize("name", ["params", "flops", "filters"])
@pytest.mark.parametrize("network", [networks.Residual, networks.Depthwise, networks.Dense])
def test_round_to_leaves_no_room_for_another_step(network, name):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    scores = torch.randn(len(channels.sets))
    means, budget = channels.set_scores(scores), 0.7 * getattr(channels.cost(), name)
    keep = paamops.select(channels, scores, **{name: 0.7}, round_to=3).keep
    for block in channels.blocks.unique():
        removed = ((channels.blocks == block) & ~keep).nonzero().flatten()
        if not len(removed):
            continue
        best = removed[means[removed].sort(descending=True, stable=True).indices]
        larger = keep.clone()
        larger[best[:3]] = True
        assert getattr(channels.cost(larger), name) > budget


@pytest.mark.parametrize("_", range(5))
def test_rounding_up_takes_the_best_of_what_was_removed(_):
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    scores = torch.randn(len(channels.sets))
    means = channels.set_scores(scores)
    exact = paamops.select(channels, scores, threshold=0.3).keep
    keep = paamops.select(channels, scores, threshold=0.3, round_to=4).keep
    assert (keep | ~exact).all()
    for block in channels.blocks.unique():
        removed = (channels.blocks == block) & ~exact
        added, left = means[removed & keep], means[removed & ~keep]
        if len(added) and len(left):
            assert added.min() > left.max()


def test_thresholds():
    model, inputs = networks.make(networks.Plain)
    channels = paamops.trace(model, inputs)
    scores = torch.arange(35.0)
    chosen = paamops.select(channels, scores, threshold=4)
    assert chosen.keep.tolist() == [False] * 5 + [True] * 30
    assert chosen.threshold == 4.0
    per_layer = paamops.select(channels, scores, threshold=[2.0, 8.0, 100.0, 100.0])
    removed = (~per_layer.keep).nonzero().flatten().tolist()
    assert removed == [0, 1, 2, 8, *range(20, 29)]  # of the third layer the best stays, the fourth is pinned
    with pytest.raises(ValueError, match="one for each of the 4 layers"):
        paamops.select(channels, scores, threshold=[1.0, 2.0])
    for bad in ("abc", True, float("nan"), {}):
        with pytest.raises(ValueError, match=r"threshold is .*; it must be one number"):
            paamops.select(channels, scores, threshold=bad)


def test_a_sets_score_is_the_mean_of_its_filters():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    scores = torch.rand(len(channels.sets))
    means = channels.set_scores(scores)
    for s in range(len(means)):
        torch.testing.assert_close(means[s], scores[channels.sets == s].double().mean())


def test_bad_input_is_a_clear_error():
    model, inputs = networks.make(networks.Plain)
    channels = paamops.trace(model, inputs)
    scores = torch.rand(35)
    for arguments, error, match in [
        ({}, ValueError, "exactly one of filters, params, flops and threshold; it got none"),
        ({"params": 0.5, "flops": 0.5}, ValueError, "it got params, flops"),
        ({"params": 0.0}, ValueError, r"params is 0.0; as a fraction to keep it must be in \(0, 1\]"),
        ({"flops": 1.5}, ValueError, r"flops is 1.5; as a fraction"),
        ({"filters": 0}, ValueError, "filters is 0; as an int it must be at least 1"),
        ({"params": True}, TypeError, "params is a bool"),
        ({"params": 10}, ValueError, "params is 10, but no network meets it: the smallest that can be reached has"),
        ({"params": 0.5, "round_to": 0}, ValueError, "round_to is 0"),
    ]:
        with pytest.raises(error, match=match):
            paamops.select(channels, scores, **arguments)
    with pytest.raises(ValueError, match=r"scores has shape \(34,\); it must be \(35,\)"):
        paamops.select(channels, scores[1:], params=0.5)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scores must be finite; filter 9, of 3, has"):
            paamops.select(channels, scores.index_fill(0, torch.tensor([9]), bad), params=0.5)
    with pytest.raises(TypeError, match="floating-point"):
        paamops.select(channels, torch.arange(35), params=0.5)


def test_a_model_with_nothing_free_is_refused():
    model, inputs = networks.make(networks.Plain)
    channels = paamops.trace(model, inputs, pinned=("0", "3", "7"))
    with pytest.raises(ValueError, match="nothing to prune: every channel set is pinned"):
        paamops.select(channels, torch.rand(35), params=0.5)
