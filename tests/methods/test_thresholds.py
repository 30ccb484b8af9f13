"""Thresholds against the definition, taken set by set and layer by layer."""

import pytest
import torch
from torch import nn

import paamops
from paamops.methods.thresholds import SAFE, Thresholds
from tests import networks
from tests.tolerances import TOLERANCE, assert_close

COUPLED = [networks.Residual, networks.Dense, networks.Split, networks.Depthwise, networks.Upscale, networks.Repeated]
MEASURES = [("params",), ("flops",), ("params", "flops")]


def some_keep(channels, share):
    """A random keep mask, and scores under which it is the better part that stays."""
    scores = torch.rand(len(channels.sets))
    keep = channels.guarded(channels.set_scores(scores)) | (torch.rand(len(channels.pinned)) < share)
    return keep, scores


def shares_of(model, inputs, measures):
    """Weight name -> the layer's share of the parameters and FLOPs, counted in a forward pass of the model itself."""
    params, flops, hooks = {}, {}, []

    def count(module, _, output, name):
        weight = module.weight.numel()
        params[name] = weight
        transposed = isinstance(module, nn.ConvTranspose2d)
        places = _[0][0, 0].numel() if transposed else output[0, 0].numel() if output.dim() > 2 else 1
        flops[name] = flops.get(name, 0) + 2 * weight * places

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            hook = module.register_forward_hook(lambda *args, name=name: count(*args, name))
            hooks.append(hook)
    model(*inputs)
    for hook in hooks:
        hook.remove()
    taken = {"params": params, "flops": flops}
    return {
        name: sum(taken[measure][name] / sum(taken[measure].values()) for measure in measures) / len(measures)
        for name in params
    }


def brute_force(channels, keep, scores, weights, threshold):
    """Which sets stay: one set after the other, by the definition."""
    members = [(channels.sets == s).nonzero().flatten() for s in range(len(channels.pinned))]
    means = [scores[rows].double().mean().item() if keep[s] else -1.0 for s, rows in enumerate(members)]
    limits = [(threshold * weights[channels.filters[rows]]).mean().item() for rows in members]
    stay = [channels.pinned[s].item() or means[s] > limits[s] for s in range(len(members))]
    fixed = channels.pinned.tolist()
    for axes in channels.axes.values():
        for ids in axes:
            if ids is not None and (ids >= 0).all():  # nothing else lies on this axis: its best set keeps it alive
                fixed[max(set(ids.tolist()), key=lambda s: (means[s], -s))] = True
    for number in range(len(channels.layers)):  # the better half of each layer, what stays anyway first
        present = [s for s in channels.sets[channels.filters == number].tolist() if keep[s]]
        better = sorted(present, key=lambda s: (not fixed[s], -means[s]))[: (len(present) + 1) // 2]
        for s in better:
            stay[s] = stay[s] or means[s] > 0
    return torch.tensor(stay) | torch.tensor(fixed)


@pytest.mark.parametrize("measures", MEASURES, ids="+".join)
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("network", [networks.Residual, networks.Dense, networks.Depthwise, networks.Upscale])
def test_weights_are_the_layers_shares_of_what_is_left(network, share, measures):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    keep, scores = some_keep(channels, share)
    found = Thresholds(channels, keep, scores, measures).weights
    expected = shares_of(paamops.pack(model, channels, keep), inputs, measures)
    expected = torch.tensor([expected[layer.name] for layer in channels.layers], dtype=torch.float64)
    assert_close(found, expected, torch.float64)


def test_weights_in_numbers():
    """A strided convolution: its FLOPs are those of its own 4x4 output, not of its 8x8 input."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    channels = paamops.trace(model, torch.randn(1, 3, 8, 8))
    whole = torch.ones_like(channels.pinned)
    scores = torch.rand(len(channels.sets))
    params = torch.tensor([8 * 3 * 9, 4 * 8, 5 * 64], dtype=torch.float64)
    flops = params * torch.tensor([16, 16, 1])
    assert_close(Thresholds(channels, whole, scores, ("params",)).weights, params / params.sum(), torch.float64)
    assert_close(Thresholds(channels, whole, scores, ("flops",)).weights, flops / flops.sum(), torch.float64)
    both = (params / params.sum() + flops / flops.sum()) / 2
    assert_close(Thresholds(channels, whole, scores, ("params", "flops")).weights, both, torch.float64)
    pruned = whole.clone()
    pruned[channels.sets[:6]] = False  # 6 of the 8 filters of the first convolution
    params = torch.tensor([2 * 3 * 9, 4 * 2, 5 * 64], dtype=torch.float64)
    assert_close(Thresholds(channels, pruned, scores, ("params",)).weights, params / params.sum(), torch.float64)


@pytest.mark.parametrize("measures", MEASURES, ids="+".join)
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("network", COUPLED, ids=lambda network: network.__name__)
def test_select_against_brute_force(network, share, measures):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    keep, scores = some_keep(channels, share)
    thresholds = Thresholds(channels, keep, scores, measures)
    last = -1
    for threshold in [0.0, *(torch.rand(12).sort().values * 2 / thresholds.weights.mean()).tolist(), 1e6]:
        chosen = thresholds.select(threshold)
        expected = brute_force(channels, keep, scores, thresholds.weights, threshold)
        assert torch.equal(chosen.keep, expected)
        assert chosen.achieved == channels.cost(expected)
        assert not (chosen.keep & ~keep).any()  # what was removed never comes back
        assert chosen.achieved.filters <= last or last < 0
        last = chosen.achieved.filters
        channels.check(chosen.keep)  # no layer is empty, no pinned set gone
    assert chosen.achieved == thresholds.smallest


@pytest.mark.parametrize("network", COUPLED, ids=lambda network: network.__name__)
def test_lowest_against_a_linear_scan(network):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    keep, scores = some_keep(channels, 0.8)
    thresholds = Thresholds(channels, keep, scores, ("params",))
    steps = thresholds.steps()
    assert (steps[1:] > steps[:-1]).all()
    costs = [thresholds.select(step).achieved for step in steps]
    whole = channels.cost(keep)
    for limit in torch.linspace(thresholds.smallest.params, whole.params, 15).long().tolist():
        expected = next(step for step, cost in zip(steps, costs, strict=True) if cost.params <= limit)
        assert thresholds.lowest(lambda cost, limit=limit: cost.params <= limit) == expected
    assert thresholds.lowest(lambda cost: cost.params < thresholds.smallest.params) is None
    assert thresholds.lowest(lambda cost: True) == steps[0]


@pytest.mark.parametrize("network", COUPLED, ids=lambda network: network.__name__)
def test_every_step_removes_its_set_and_what_is_below_it_does_not(network):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    keep, scores = some_keep(channels, 0.8)
    thresholds = Thresholds(channels, keep, scores, ("flops",))
    before = int(keep.sum())
    for step in thresholds.steps():
        assert int(thresholds.select(step * (1 - 2 * (SAFE - 1))).keep.sum()) == before
        after = int(thresholds.select(step).keep.sum())
        assert after < before
        before = after
    assert thresholds.select(before * step).achieved == thresholds.smallest


def test_no_round_takes_more_than_half_of_a_layer_and_none_the_last_filter():
    model, inputs = networks.make(networks.Plain)
    channels = paamops.trace(model, inputs)
    scores, keep = torch.rand(len(channels.sets)) + 0.01, torch.ones_like(channels.pinned)
    widths = (channels.offsets[1:4] - channels.offsets[:3]).tolist()
    for _ in range(10):
        thresholds = Thresholds(channels, keep, scores, ("params",))
        keep = thresholds.select(1e9).keep
        assert thresholds.smallest == channels.cost(keep)
        widths = [(width + 1) // 2 for width in widths]
        for start, stop, width in zip(channels.offsets[:3], channels.offsets[1:], widths, strict=False):
            kept = keep[channels.sets][start:stop].nonzero().flatten()
            assert sorted(kept.tolist()) == sorted(scores[start:stop].topk(width).indices.tolist())
    assert widths == [1, 1, 1]
    alone = Thresholds(channels, keep, scores, ("params",))
    assert len(alone.steps()) == 0
    assert alone.lowest(lambda cost: True) is None
    assert alone.smallest == channels.cost(keep)


@pytest.mark.parametrize("network", [networks.Residual, networks.Depthwise], ids=lambda network: network.__name__)
def test_zero_removes_exactly_the_dead(network):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    dead = torch.rand(len(channels.pinned)) < 0.3
    scores = torch.where(dead[channels.sets], 0.0, torch.rand(len(channels.sets)) + 1e-30)
    keep = torch.ones_like(channels.pinned)
    chosen = Thresholds(channels, keep, scores, ("params",)).select(0.0)
    assert torch.equal(chosen.keep, ~dead | channels.guarded(channels.set_scores(scores)))


def test_scores_of_removed_filters_are_not_looked_at():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    keep, scores = some_keep(channels, 0.5)
    poisoned = torch.where(keep[channels.sets], scores, float("nan"))
    one, other = (Thresholds(channels, keep, each, ("params",)) for each in (scores, poisoned))
    assert torch.equal(one.select(1.0).keep, other.select(1.0).keep)
    assert (one.steps() == other.steps()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad):
    model, inputs = networks.make(networks.Plain)
    channels = paamops.trace(model, inputs)
    scores = torch.rand(35)
    scores[9] = bad
    thresholds = Thresholds(channels, torch.ones_like(channels.pinned), scores, ("params",))
    for ask in (lambda: thresholds.select(1.0), lambda: thresholds.smallest, lambda: thresholds.lowest(lambda cost: 0)):
        with pytest.raises(ValueError, match="scores must be finite; filter 9, of 3, has"):
            ask()


def test_scores_may_be_of_any_precision():
    model, inputs = networks.make(networks.Plain)
    channels = paamops.trace(model, inputs)
    scores = torch.rand(35).bfloat16().requires_grad_()
    thresholds = Thresholds(channels, torch.ones_like(channels.pinned), scores, ("params",))
    assert thresholds.scores.dtype == torch.float64
    torch.testing.assert_close(thresholds.scores, scores.detach().double(), **TOLERANCE[torch.float64])
