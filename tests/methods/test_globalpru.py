"""GlobalPru inside the caller's own training: votes, one ranking, rates and budgets, penalties, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import paamops
from paamops import excitation, models
from paamops.methods.agreement import agreement
from paamops.methods.rates import mixed_rates
from paamops.ops.ranking_loss import ranking_loss_reference
from paamops.ops.vote_ranking import elect, vote_ranking
from paamops.packing import mask
from tests.methods.trainers import assert_same_tensors, images, small
from tests.networks import Depthwise, PaddedShortcut, Residual, make
from tests.tolerances import NETWORK_TOLERANCE


def made(model=None, inputs=None, warm=True, **settings):
    model = small() if model is None else model
    settings = settings if {"rate", "params", "flops"} & settings.keys() else {"rate": 0.5, **settings}
    gp = paamops.GlobalPru(model, images() if inputs is None else inputs, **settings)
    if warm:
        with torch.no_grad():
            for each in gp.excitations:
                each.reduce.weight.normal_(std=0.3)
                each.reduce.bias.fill_(1)  # hidden units that are alive
                each.expand.weight.normal_(std=0.5)
                each.expand.bias.normal_(std=0.5)
    return gp


def voted(gp, inputs=None):
    gp.vote(images(20) if inputs is None else inputs)
    gp.elect()
    return gp


def test_embedded():
    gp = made(warm=False, alpha=1e-3, beta=0.1)
    model, x, labels = gp.model, images(24), torch.randint(0, 5, (24,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), labels) + gp.penalty()).backward()
            optimizer.step()

    train(3)
    gp.vote(x)
    rankings = gp.elect()
    assert [sorted(each.tolist()) for each in rankings] == [list(range(8)), list(range(12))]
    train(3)
    assert gp.keep().asked == {"rate": 0.5}
    packed = gp.prune()
    model.eval(), packed.eval()
    twin = mask(model, gp.channels, gp.keep())
    torch.testing.assert_close(packed(x), twin(x), **NETWORK_TOLERANCE[torch.float32])
    assert [each.saliency.shape[1] for each in excitation.excitations(packed).values()] == [4, 6]
    # The best halves of the elected rankings stay, in their layers' own order.
    kept = gp.keep().keep[gp.channels.sets]
    assert torch.equal(kept[gp.channels.filters == 0].nonzero().flatten(), rankings[0][:4].sort().values)
    packed(x).sum().backward()


@pytest.mark.parametrize("logits", [False, True])
def test_the_penalty(logits):
    gp = made(alpha=0.3, beta=0.7, logits=logits)
    gp.model(images(6))
    saliencies = [each.saliency.double() for each in gp.excitations]
    first = 0.3 * sum(each.sum() / 6 for each in saliencies)
    torch.testing.assert_close(gp.penalty().double(), first, rtol=1e-5, atol=1e-6)
    voted(gp)
    gp.model(images(6))
    saliencies = [each.saliency.double() for each in gp.excitations]
    ranked = [torch.logit(each, 1e-6) for each in saliencies] if logits else saliencies
    expected = 0.3 * sum(each.sum() / 6 for each in saliencies)
    expected = expected + 0.7 * ranking_loss_reference(ranked, gp.rankings, [4, 6])
    torch.testing.assert_close(gp.penalty().double(), expected, rtol=1e-5, atol=1e-5)
    gp.penalty().backward()
    assert all(each.expand.weight.grad.abs().max() > 0 for each in gp.excitations)


def test_votes_and_their_streams():
    gp = made()
    x = images(30)
    gp.vote(iter([x[:7], (x[7:20],), x[20:]]))
    (saliencies,) = gp.saliencies(x)
    expected = [vote_ranking(each) for each in saliencies]
    assert all(torch.equal(votes, other) for votes, other in zip(gp.votes, expected, strict=True))
    rankings = gp.elect()
    assert all(torch.equal(one, elect(votes)) for one, votes in zip(rankings, expected, strict=True))
    found = gp.agreement(iter([x[:7], x[7:]]))
    for k, (kendall, overlap) in enumerate(zip(*found, strict=True)):
        tau, share = agreement(saliencies[k], rankings[k], (4, 6)[k])
        assert (float(kendall), float(overlap)) == pytest.approx((tau, share), abs=1e-6)


def test_images_that_agree_elect_what_they_agree_on():
    gp = made()
    with torch.no_grad():
        for each in gp.excitations:
            each.expand.weight.zero_()
            each.expand.bias.copy_(torch.randperm(each.expand.out_features))
    voted(gp)
    for ranking, each in zip(gp.rankings, gp.excitations, strict=True):
        assert torch.equal(ranking, each.expand.bias.argsort(descending=True))
    kendall, overlap = gp.agreement(images(9))
    assert kendall.tolist() == pytest.approx([1, 1])
    assert overlap.tolist() == [1, 1]


@pytest.mark.parametrize("network", [Residual, Depthwise])
@pytest.mark.parametrize("asked", [{"rate": 0.4}, {"params": 0.6}, {"flops": 0.6}])
def test_channels_that_are_one_have_one_ranking(network, asked):
    model, inputs = make(network)
    gp = voted(made(model, inputs, **asked), inputs)
    position = {}
    for ranking, sets in zip(gp.rankings, gp.sets, strict=True):
        assert sorted(ranking.tolist()) == list(range(len(sets)))
        key = sets.numpy().tobytes()
        assert torch.equal(position.setdefault(key, ranking), ranking)
    assert len(position) < len(gp.rankings)
    packed = gp.prune().eval()
    twin = mask(gp.model.eval(), gp.channels, gp.keep())
    for one, other in zip(*map(paamops.tracing.leaves, (packed(*inputs), twin(*inputs))), strict=True):
        torch.testing.assert_close(one, other, **NETWORK_TOLERANCE[torch.float32])


def test_the_votes_of_tied_layers_are_added():
    model = models.build("resnet20", in_channels=1)
    x = torch.randn(6, 1, 12, 12)
    gp = made(model, x)
    gp.vote(x)
    stream = [k for k, sets in enumerate(gp.sets) if torch.equal(sets, gp.sets[0])]
    assert [gp.paths[k] for k in stream] == ["norm", "stage1.0.norm2", "stage1.1.norm2", "stage1.2.norm2"]
    assert all(gp.votes[k] is gp.votes[0] for k in stream)
    assert gp.votes[0].sum(0).tolist() == [24] * 16


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.68, 0.9])
def test_a_rate_is_met_in_every_layer(rate):
    gp = voted(made(small(widths=(10, 31)), rate=rate))
    kept = [int(gp.keep().keep[sets].sum()) for sets in gp.sets]
    for count, width in zip(kept, (10, 31), strict=True):
        assert abs(count - (1 - rate) * width) <= 0.5
        assert count >= 1
    assert gp.rates().tolist() == pytest.approx([1 - kept[0] / 10, 1 - kept[1] / 31])


@pytest.mark.parametrize("name", ["params", "flops"])
def test_a_budget_is_met_by_the_lowest_rate(name):
    """Found one rate after the other."""
    model = small(widths=(10, 24))
    gp = voted(made(model, **{name: 0.5}))
    limit = 0.5 * getattr(gp.channels.cost(), name)
    whole = [10, 24]
    places = sorted((1 - (r + 0.5) / c, k, r) for k, c in enumerate(whole) for r in range(c))
    keep = torch.ones(len(gp.channels.pinned), dtype=torch.bool)
    for _, k, r in places:
        if getattr(gp.channels.cost(keep), name) <= limit:
            break
        keep[gp.sets[k][gp.rankings[k][r]]] = False
    assert torch.equal(gp.keep().keep, keep)
    assert getattr(gp.keep().achieved, name) <= limit


def test_mixed_rates_follow_the_traces():
    gp = made(small(widths=(20, 40)), rate=0.4, mode="mixed", alpha=0)
    x, labels = images(16), torch.randint(0, 5, (16,))
    gp.vote(x)
    with pytest.raises(RuntimeError, match="call measure"):
        gp.elect()
    before = copy.deepcopy(gp.model.state_dict())
    traces = gp.measure(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), [(x, labels)])
    assert all(torch.equal(before[name], tensor) for name, tensor in gp.model.state_dict().items())
    assert traces.shape == (2,)
    gp.elect()
    rates = mixed_rates(0.4, traces)
    assert rates[0] != rates[1]
    for rate, found, width in zip(rates.tolist(), gp.rates().tolist(), (20, 40), strict=True):
        assert abs(found - rate) * width <= 0.5 + 1e-9
    assert (traces[0] > traces[1]) == (gp.rates()[0] < gp.rates()[1])
    budget = made(small(widths=(20, 40)), flops=0.5, mode="mixed")
    budget.traces = traces
    voted(budget)
    assert budget.keep().achieved.flops <= 0.5 * budget.channels.cost().flops
    assert (traces[0] > traces[1]) == (budget.rates()[0] < budget.rates()[1])


def test_what_no_excitation_ranks_stays():
    model = small(widths=(8, 12))
    gp = voted(made(model, layers=["0"]))
    kept = gp.keep().keep[gp.channels.sets]
    first = gp.channels.filters == [layer.name for layer in gp.channels.layers].index("0")
    assert int(kept[first].sum()) == 4
    assert kept[~first].sum() == (~first).sum() - 4  # but for the excitation's own, which go along
    second = gp.channels.filters == [layer.name for layer in gp.channels.layers].index("3")
    assert kept[second].all()
    assert "no excitation ranks it" in gp.channels.reasons


def test_a_network_that_has_its_excitations(tmp_path):
    model = models.build("lenet5", in_channels=1)
    x = torch.randn(5, 1, 28, 28)
    gp = voted(made(model, x), x)
    first = gp.prune()
    paamops.save(first, tmp_path / "first.safetensors")
    loaded = paamops.load(tmp_path / "first.safetensors")
    again = paamops.GlobalPru(loaded, x, rate=0.5)
    again.vote(x)  # no warm-up is asked for: it had one
    again.elect()
    packed = again.prune()
    assert [each.expand.out_features for each in excitation.excitations(packed).values()] == [5, 12]
    with pytest.raises(ValueError, match="layers is given, but model has its excitations"):
        paamops.GlobalPru(loaded, x, rate=0.5, layers=["conv1"])


def test_use_and_reset():
    gp = made()
    rankings = [torch.randperm(8), torch.randperm(12)]
    gp.use(rankings)
    assert all(torch.equal(one, other) for one, other in zip(gp.rankings, rankings, strict=True))
    with pytest.raises(RuntimeError, match="stands for good"):
        gp.vote(images())
    gp.reset()
    voted(gp)
    for wrong, message in (
        (rankings[:1], "holds 1; it must hold one for each of the 2"),
        ([rankings[0], torch.zeros(12, dtype=torch.int64)], r"rankings\[1\] must be an int64 permutation of 0 … 11"),
        ([rankings[0].float(), rankings[1]], r"rankings\[0\] must be an int64 permutation"),
        ([rankings[1], rankings[0]], r"rankings\[0\] must be an int64 permutation"),
    ):
        with pytest.raises(ValueError, match=message):
            gp.use(wrong)


def test_out_of_order():
    gp = made(warm=False)
    with pytest.raises(RuntimeError, match="penalty\\(\\) was called before a forward pass"):
        gp.penalty()
    with pytest.raises(RuntimeError, match="vote\\(\\) was called before warm-up"):
        gp.vote(images())
    assert not any(votes.any() for votes in gp.votes)
    with pytest.raises(RuntimeError, match="elect\\(\\) was called before vote"):
        gp.elect()
    for call in (gp.keep, gp.prune, gp.scores, gp.rates, lambda: gp.agreement(images())):
        with pytest.raises(RuntimeError, match="was called before elect"):
            call()
    gp = made()
    for nothing in (images(0), []):
        with pytest.raises(ValueError, match="inputs holds no images"):
            gp.vote(nothing)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "given are none of rate"),
        ({"rate": 0.5, "flops": 0.5}, ValueError, "given are rate, flops of"),
        ({"rate": 0}, ValueError, r"rate is 0; it must be a number in \(0, 1\)"),
        ({"rate": 1.0}, ValueError, "rate is 1.0"),
        ({"rate": -0.5}, ValueError, "rate is -0.5"),
        ({"rate": float("nan")}, ValueError, "rate is nan"),
        ({"rate": True}, ValueError, "rate is True"),
        ({"rate": 0.01}, ValueError, "rate is 0.01, which removes no channel"),
        ({"params": 1}, ValueError, "no network meets it"),
        ({"flops": 1.5}, ValueError, "flops is 1.5"),
        ({"rate": 0.5, "mode": "both"}, ValueError, "mode is 'both'; it must be one of 'fixed', 'mixed'"),
        ({"rate": 0.5, "alpha": -1}, ValueError, "alpha is -1; it must be a finite number of at least 0"),
        ({"rate": 0.5, "beta": float("inf")}, ValueError, "beta is inf"),
        ({"rate": 0.5, "logits": 1}, TypeError, "logits is 1"),
        ({"rate": 0.5, "seed": -1}, ValueError, "seed is -1"),
        ({"rate": 0.5, "reduction": 0}, ValueError, "reduction is 0"),
        ({"rate": 0.5, "layers": ["8"]}, ValueError, "layers names '8', which has no spatial size"),
        ({"rate": 0.5, "layers": "03"}, TypeError, "layers is '03'; it must be a list of names"),
    ],
)
def test_bad_arguments_leave_the_model_alone(settings, error, message):
    model = small()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        paamops.GlobalPru(model, images(), **settings)
    assert_same_tensors(model, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_other_bad_models():
    with pytest.raises(TypeError, match="model is a str"):
        paamops.GlobalPru("resnet20", images(), rate=0.5)
    with pytest.raises(ValueError, match="one channel"):
        paamops.GlobalPru(small(widths=(1, 1)), images(), rate=0.5)
    with pytest.raises(ValueError, match="no spatial size"):
        paamops.GlobalPru(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4), rate=0.5)


def test_nan_images_are_refused_and_nobody_has_voted():
    gp = made()
    x = images(6)
    x[2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        gp.vote(iter([images(4), x]))
    assert not any(votes.any() for votes in gp.votes)


def test_a_penalty_that_would_teach_nothing_is_refused():
    gp = made()
    with torch.no_grad():
        gp.model(images())
        assert gp.penalty() > 0
    with pytest.raises(RuntimeError, match="recorded no gradients for the excitation at '1'"):
        gp.penalty()
    gp.model(images())
    gp.vote(images())
    with pytest.raises(RuntimeError, match="before a forward pass"):  # those of the voters are not a step's
        gp.penalty()


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_channels_that_must_stay_have_the_first_places(rate):
    """A shortcut padded with constant channels pins a part of the layers on its stream; the rate is of the others."""
    model, inputs = make(PaddedShortcut)
    gp = voted(made(model, inputs, rate=rate), inputs)
    pinned = gp.channels.pinned
    assert any(pinned[sets].any() and not pinned[sets].all() for sets in gp.sets)
    places = {}
    for ranking, sets, top in zip(gp.rankings, gp.sets, gp._tops, strict=True):
        kept = gp.keep().keep[sets]
        assert kept[ranking[:top]].all()
        assert not kept[ranking[top:]].any()
        free = [s for s in sets[ranking].tolist() if not pinned[s]]
        for r, s in enumerate(free):
            places.setdefault(s, []).append(1 - (r + 0.5) / len(free))
    means = {s: sum(found) / len(found) for s, found in places.items()}
    stays = {s for s in means if gp.keep().keep[s]}
    best = {max(sets, key=lambda s: means.get(s, 0)) for sets in (each.tolist() for each in gp.sets)}
    assert stays == {s for s, mean in means.items() if mean > rate or s in best}


@pytest.mark.parametrize(("name", "pinned"), [("resnet20", [0] * 7 + [0, 1] * 6), ("resnet50", [0] * 53)])
def test_streams_that_a_constant_shortcut_writes_into_stay(name, pinned):
    """Else a channel whose saliencies are all 0 would still carry the stage before."""
    model, x = models.build(name, in_channels=1), torch.randn(2, 1, 16, 16)
    gp = voted(made(model, x), x)
    assert [int(gp.channels.pinned[sets].all()) for sets in gp.sets] == pinned
    assert not any(
        gp.channels.pinned[sets].any() for sets, all_of_it in zip(gp.sets, pinned, strict=True) if not all_of_it
    )


def test_channels_that_every_layer_has_closed_are_cut_at_no_cost():
    """π = 0 for all that goes: the cut network computes what the whole one did."""
    model, x = models.build("resnet20", in_channels=1).double().eval(), torch.randn(6, 1, 16, 16, dtype=torch.float64)
    gp = made(model, x, rate=0.6)
    gp.use([torch.randperm(len(sets)) for sets in gp.sets])
    with torch.no_grad():
        for each, sets in zip(gp.excitations, gp.sets, strict=True):
            gone = ~gp.keep().keep[sets]
            each.expand.weight[gone], each.expand.bias[gone] = 0, -80
            each.reduce.weight[:, gone] = 0  # what they are squeezed to is gone as well
    assert gp.keep().achieved.params < 0.7 * gp.channels.cost().params
    torch.testing.assert_close(gp.prune()(x), model(x), **NETWORK_TOLERANCE[torch.float64])


def test_an_election_can_be_repeated():
    gp = made()
    gp.vote(images(12))
    before = [votes.clone() for votes in gp.votes]
    gp.elect()
    gp.elect("borda")
    assert all(torch.equal(one, other) for one, other in zip(gp.votes, before, strict=True))


@pytest.mark.gpu
def test_on_a_gpu():
    gp = made(small(), beta=0.1)
    gp.model.cuda()
    x, labels = images(12).cuda(), torch.randint(0, 5, (12,)).cuda()
    gp.vote(x)
    gp.elect()
    (F.cross_entropy(gp.model(x), labels) + gp.penalty()).backward()
    assert all(each.expand.bias.grad.isfinite().all() for each in gp.excitations)
    packed, twin = gp.prune().eval(), mask(gp.model.eval(), gp.channels, gp.keep())
    torch.testing.assert_close(packed(x), twin(x), rtol=1e-3, atol=1e-4)


def test_the_same_seed_makes_the_same_excitations():
    model = small()
    one = made(copy.deepcopy(model), warm=False, seed=3)
    other, third = made(copy.deepcopy(model), warm=False, seed=3), made(copy.deepcopy(model), warm=False, seed=4)
    assert_same_tensors(one.model, other.model)
    assert not torch.equal(one.excitations[0].reduce.weight, third.excitations[0].reduce.weight)


def test_compiled_under_autocast_and_in_channels_last():
    gp = voted(made(small(), beta=0.1))
    x = images(6).to(memory_format=torch.channels_last)
    gp.model.to(memory_format=torch.channels_last)
    compiled = torch.compile(gp.model, backend="aot_eager")
    compiled(x)
    found = gp.penalty().item()
    gp.model(x)
    assert found == pytest.approx(gp.penalty().item(), rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x)
        (gp.penalty() + compiled(x).float().sum()).backward()
    assert all(each.expand.weight.grad.isfinite().all() for each in gp.excitations)
