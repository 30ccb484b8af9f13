"""PAAM inside the caller's own training: exact budgets, one threshold, and whatever the caller wraps the model in."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import paamops
from paamops.methods import paam as module
from paamops.packing import mask
from tests.methods.trainers import assert_same_tensors, images, small
from tests.networks import Depthwise, Residual, make
from tests.tolerances import NETWORK_TOLERANCE


def made(model=None, inputs=None, **settings):
    model = small() if model is None else model
    settings = settings if {"params", "flops", "filters"} & settings.keys() else {"params": 0.5, **settings}
    return paamops.PAAM(model, images() if inputs is None else inputs, **{"width": 6, **settings})


def batch(count=16, dtype=torch.float32):
    return torch.randn(count, 1, 8, 8, dtype=dtype), torch.randint(0, 5, (count,))


def learn(paam, call, x, labels, steps, rate=0.1):
    """Some steps of the attention network; the losses."""
    optimizer, losses = torch.optim.SGD(paam.attention.parameters(), lr=rate, momentum=0.9), []
    for _ in range(steps):
        optimizer.zero_grad()
        with paam.scoring():
            loss = F.cross_entropy(call(x), labels) + paam.penalty()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def scatter(paam):
    """Scores as some learning may have left them, on both sides of 1."""
    with torch.no_grad():
        paam.attention.value.normal_()
        paam.attention.bias.normal_(std=0.5)
    return paam


def test_embedded():
    model = small().eval().requires_grad_(False)
    before = copy.deepcopy(model)
    paam, (x, labels) = made(model), batch()
    assert torch.equal(F.cross_entropy(model(x), labels), F.cross_entropy(before(x), labels))
    losses = learn(paam, model, x, labels, 40)
    assert losses[-1] < losses[0]
    assert_same_tensors(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    scores = paam.scores()
    assert scores.shape == paam.channels.sets.shape
    assert float(scores.min()) >= 0
    assert float(scores.max()) == 1
    assert scores.unique().numel() > 10
    assert torch.equal(scores, paam.learned().clamp(max=1))
    selection = paam.keep()
    packed = paam.prune()
    assert_same_tensors(model, before)
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in packed.parameters()) == selection.achieved.params <= 0.5 * whole
    twin = mask(model, paam.channels, selection.keep)
    torch.testing.assert_close(packed(x), twin(x), **NETWORK_TOLERANCE[torch.float32])


def test_the_first_loss_is_that_of_the_plain_network():
    paam, (x, _) = made(penalty=0.7), batch()
    paam.model.eval()
    with paam.scoring() as scores:
        assert torch.equal(scores, torch.ones(len(scores)))
        scored = paam.model(x)
        assert paam.penalty().item() == pytest.approx(0.7 * 20 / 25)  # of the 25 filters 5 are pinned, in a layer
    assert torch.equal(scored, paam.model(x))


@pytest.mark.parametrize("gate", ["free", "explicit"])
@pytest.mark.parametrize("network", [Residual, Depthwise])
def test_coupled_filters_are_multiplied_by_the_score_they_share(network, gate):
    model, inputs = make(network)
    paam = scatter(made(model, inputs, filters=0.8, gate=gate))
    with paam.scoring() as scores:
        found = model(*inputs)
    with paam.gates.explicit(model, paam.channels.set_scores(scores).float()):
        expected = model(*inputs)
    torch.testing.assert_close(found, expected, **NETWORK_TOLERANCE[torch.float32])
    assert (expected - model(*inputs)).abs().max() > 1e-3


def test_the_penalty_is_lambda_times_the_mean_score():
    model, inputs = make(Residual)
    paam = scatter(made(model, inputs, penalty=0.3))
    with paam.scoring() as scores:
        pass
    paths = [layer.name for layer in paam.channels.layers]
    head = paam.channels.filters == paths.index("head")  # pinned: no attention, no part in the sum
    expected = 0.3 * scores[~head].sum() / len(scores)
    torch.testing.assert_close(paam.penalty(), expected)
    found = torch.autograd.grad(paam.penalty(), paam.attention.bias, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, paam.attention.bias)[0])


@pytest.mark.parametrize("network", [None, Residual, Depthwise])
@pytest.mark.parametrize("budget", [{"params": 0.6}, {"flops": 0.6}, {"filters": 0.8}, "params", "flops", "filters"])
def test_budgets_are_exact(network, budget):
    """The lowest threshold whose network is within the budget: found one filter after the other."""
    model, inputs = make(network) if network else (small(), images())
    channels = paamops.trace(model, inputs)
    if isinstance(budget, str):
        budget = {budget: int(0.75 * getattr(channels.cost(), budget))}
    ((name, value),) = budget.items()
    paam = scatter(made(model, inputs, **budget))
    found = paam.keep()
    limit = value if isinstance(value, int) else math.floor(value * getattr(channels.cost(), name))
    means = channels.set_scores(paam.learned()).numpy()
    keep, guarded = torch.ones(len(means), dtype=torch.bool), channels.guarded(torch.from_numpy(means))
    removed = -math.inf
    for s in np.argsort(means, kind="stable"):
        if getattr(channels.cost(keep), name) <= limit:
            break
        if not guarded[s]:
            keep[s], removed = False, means[s]
    assert not keep.all()
    assert torch.equal(found.keep, keep)
    assert found.threshold == pytest.approx(removed)
    assert getattr(found.achieved, name) <= limit
    assert channels.cost(found.keep) == found.achieved


def test_scores_above_one_are_told_apart_and_shown_as_one():
    paam = scatter(made(filters=15))
    with torch.no_grad():
        paam.attention.bias.fill_(20)
    learned = paam.learned()[:20]
    assert learned.min() > 1
    assert torch.equal(paam.scores(), torch.ones(25))
    kept = paam.keep().keep[paam.channels.sets][:20]
    assert int(kept.sum()) == 10
    assert learned[kept].min() > learned[~kept].max()


def test_the_best_filter_of_a_layer_stays():
    """However low the scores of a layer are."""
    model = small(widths=(8, 12), norm=False)
    paam = scatter(made(model, filters=12))
    with torch.no_grad():
        paam.attention.bias[0] = -8
    scores = paam.learned()
    assert scores[:8].max() < scores[8:20].min()
    keep = paam.keep().keep[paam.channels.sets]
    assert keep[:8].nonzero().flatten().tolist() == [int(scores[:8].argmax())]
    assert int(keep.sum()) == 12
    assert paam.prune()(images()).shape == (8, 5)


def test_the_gates_take_the_same_steps():
    x, labels = batch(dtype=torch.float64)
    first, found = small().double(), []
    for gate in ("free", "explicit"):
        paam = made(copy.deepcopy(first), images().double(), gate=gate, penalty=0.05)
        optimizer = torch.optim.SGD([*paam.model.parameters(), *paam.attention.parameters()], lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            with paam.scoring():
                loss = F.cross_entropy(paam.model(x), labels) + paam.penalty()
            loss.backward()
            optimizer.step()
        found.append([*paam.model.parameters(), *paam.model.buffers(), *paam.attention.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_backward_after_the_block():
    paam, (x, labels) = made(penalty=0.1), batch()
    scatter(paam)
    paam.model.eval()

    def gradients(inside):
        paam.attention.zero_grad()
        with paam.scoring():
            loss = F.cross_entropy(paam.model(x), labels) + paam.penalty()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [parameter.grad.clone() for parameter in paam.attention.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_an_exception_leaves_the_model_as_it_was():
    paam = scatter(made())
    held = dict(paam.model.named_parameters())
    with pytest.raises(ZeroDivisionError), paam.scoring():
        1 / 0  # noqa: B018
    assert all(tensor is held[name] for name, tensor in paam.model.named_parameters())


def test_gradients_accumulate():
    """Two half batches, their losses halved, are one whole batch."""
    model, (x, labels) = small(norm=False).double(), batch(dtype=torch.float64)
    paam = scatter(made(model, images().double(), penalty=0.1))
    parameters = [*model.parameters(), *paam.attention.parameters()]

    def gradients(parts):
        for parameter in parameters:
            parameter.grad = None
        for part in torch.arange(len(x)).chunk(parts):
            with paam.scoring():
                ((F.cross_entropy(model(x[part]), labels[part]) + paam.penalty()) / parts).backward()
        return [parameter.grad for parameter in parameters]

    for one, other in zip(gradients(2), gradients(1), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def test_channels_last():
    model, (x, labels) = small(), batch()
    paam = scatter(made(model, penalty=0.1))
    model.eval()

    def gradients(x):
        paam.attention.zero_grad()
        with paam.scoring():
            (F.cross_entropy(model(x), labels) + paam.penalty()).backward()
        return [parameter.grad.clone() for parameter in paam.attention.parameters()]

    expected = gradients(x)
    model.to(memory_format=torch.channels_last)
    for one, other in zip(gradients(x.to(memory_format=torch.channels_last)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    assert paam.prune()(x).shape == (16, 5)


@pytest.mark.parametrize("gate", ["free", "explicit"])
def test_under_autocast(gate):
    model, (x, labels) = small(), batch()
    paam = scatter(made(model, penalty=0.1, gate=gate))
    model.eval()

    def step():
        paam.attention.zero_grad()
        with paam.scoring() as scores:
            logits = model(x)
            loss = F.cross_entropy(logits.float(), labels) + paam.penalty()
        loss.backward()
        return logits, scores, [parameter.grad.clone() for parameter in paam.attention.parameters()]

    logits, scores, grads = step()
    with torch.autocast("cpu", torch.bfloat16):
        low, same, found = step()
    assert low.dtype == torch.bfloat16
    assert torch.equal(same, scores)  # scores keep their precision
    torch.testing.assert_close(low.float(), logits, **NETWORK_TOLERANCE[torch.bfloat16])
    for one, other in zip(found, grads, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.2, atol=0.1 * float(other.abs().max()))


@pytest.mark.parametrize("gate", ["free", "explicit"])
@pytest.mark.parametrize("frozen", [True, False])
def test_of_a_compiled_model(gate, frozen):
    """The same steps, and after the first of both kinds nothing is compiled any more."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, (x, labels) = small().train(not frozen).requires_grad_(not frozen), batch()
    twin = copy.deepcopy(model)
    compiled, graphs = torch.compile(model, backend="aot_eager"), []
    paams = [made(each, penalty=0.1, gate=gate) for each in (model, twin)]
    for _ in range(8):
        for paam, call in zip(paams, (compiled, twin), strict=True):
            learn(paam, call, x, labels, 1)
            with torch.no_grad():
                call(x)  # without scores
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] >= 1
    assert graphs[2:] == [graphs[2]] * 6
    for one, other in zip(*(paam.attention.parameters() for paam in paams), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert (paams[0].learned() - 1).abs().max() > 1e-3


def test_lambda_is_found():
    """Every few steps it is multiplied by a power of the share of the budget that the open filters take."""
    paam = made(params=0.5)
    whole, limit = paam.channels.cost(), paam.channels.cost().params // 2
    least = paam.channels.cost(paam.channels.guarded(torch.ones(len(paam.channels.pinned))))
    up = (whole.params / limit / module.AIM) ** module.POWER
    down = (least.params / limit / module.AIM) ** module.POWER
    assert down < 1 < up
    assert paam.automatic
    found = []
    for bias in [0.0] * 10 + [-3.0] * 10:  # all open, and then none
        with torch.no_grad():
            paam.attention.bias.fill_(bias)
        with paam.scoring():
            found.append(paam.lambda_)
    expected = [1.0] * 4 + [up] * 5 + [up**2] * 5 + [up**2 * down] * 5 + [up**2 * down**2]
    assert found == pytest.approx(expected)
    with torch.no_grad(), paam.scoring():
        pass
    assert paam.steps == 20  # an evaluation is no step
    fixed = made(penalty=0.25)
    learn(fixed, fixed.model, *batch(), 12)
    assert fixed.lambda_ == 0.25


def test_lambda_zero_leaves_the_task_alone():
    paam, (x, labels) = scatter(made(penalty=0)), batch()
    with paam.scoring():
        task = F.cross_entropy(paam.model(x), labels)
    assert paam.penalty().item() == 0
    (task + paam.penalty()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in paam.attention.parameters())


def test_same_seed_same_scores():
    x, labels = batch()
    model, found = small().eval(), []
    for seed in (0, 0, 1):
        paam = made(model, seed=seed)
        learn(paam, model, x, labels, 5)
        found.append(paam.learned())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    inputs, state = images(), torch.get_rng_state()
    made(model, inputs, seed=2**70)  # any int
    assert torch.equal(torch.get_rng_state(), state)


def test_another_model_of_the_same_architecture():
    paam, other = scatter(made()), small()
    before = paam.learned()
    paam.use(other)
    assert not torch.equal(paam.learned(), before)
    assert_same_tensors(paam.prune(), paamops.pack(other, paam.channels, paam.keep()))


def test_before_anything_was_learned():
    paam = made()
    with pytest.raises(RuntimeError, match=r"penalty\(\) was called before `with paam.scoring\(\):`"):
        paam.penalty()
    for call in (paam.scores, paam.keep, paam.prune, paam.learned):
        with pytest.raises(RuntimeError, match="no scores were learned yet"):
            call()
    with paam.scoring():  # scores are looked at, but nothing is optimised
        paam.model(images())
    with pytest.raises(RuntimeError, match="no scores were learned yet"):
        paam.scores()


def test_a_learning_that_diverged():
    paam = scatter(made())
    with torch.no_grad():
        paam.attention.value[1, 2] = math.nan
    with pytest.raises(ValueError, match="the attention network has diverged; lower its learning rate"):
        paam.keep()
    paam = scatter(made())
    with torch.no_grad():
        paam.model[3].weight[1, 2] = math.inf
    with pytest.raises(ValueError, match="model has NaN or infinite filters, in 3;"):
        paam.scores()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"penalty": -0.1}, ValueError, "penalty is -0.1; λ must be a finite number of at least 0, or None"),
        ({"penalty": math.nan}, ValueError, "penalty is nan; λ must be"),
        ({"penalty": math.inf}, ValueError, "penalty is inf; λ must be"),
        ({"penalty": "much"}, ValueError, "penalty is 'much'; λ must be"),
        ({"penalty": True}, ValueError, "penalty is True; λ must be"),
        ({"width": 0}, ValueError, "width is 0; it must be an int of at least 1"),
        ({"width": 2.0}, ValueError, "width is 2.0; it must be an int"),
        ({"width": True}, ValueError, "width is True; it must be an int"),
        ({"seed": -1}, ValueError, "seed is -1; it must be an int of at least 0"),
        ({"seed": None}, ValueError, "seed is None; it must be an int"),
        ({"slope": 0}, ValueError, "slope is 0; it must be a finite number above 0"),
        ({"slope": -0.01}, ValueError, "slope is -0.01; it must be"),
        ({"slope": 1e-50}, ValueError, "slope is 1e-50; it must be a finite number above 0, as a float32"),
        ({"slope": math.nan}, ValueError, "slope is nan; it must be"),
        ({"temperature": math.inf}, ValueError, "temperature is inf; it must be"),
        ({"temperature": "hot"}, ValueError, "temperature is 'hot'; it must be"),
        ({"attention": "soft"}, ValueError, "attention is 'soft'; it must be one of 'additive', 'dot'"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'; it must be one of"),
        ({"gate": None}, ValueError, "gate is None; it must be one of 'free', 'explicit'"),
        ({"params": 0.0}, ValueError, "params is 0.0; as a fraction to keep it must be in"),
        ({"params": 1.5}, ValueError, "params is 1.5"),
        ({"flops": -3}, ValueError, "flops is -3; as an int it must be at least 1"),
        ({"filters": "half"}, TypeError, "filters is a str"),
        ({"params": 0.5, "flops": 0.5}, ValueError, "the budget is given as params, flops; it must be exactly one"),
        ({"params": 3}, ValueError, "params is 3, but no network meets it: the smallest that can be reached has"),
        ({"filters": 6}, ValueError, "filters is 6, but no network meets it"),
        ({"pinned": ("nowhere",)}, ValueError, "pinned names 'nowhere'"),
        ({"pinned": ("0", "3")}, ValueError, "model has nothing to prune"),
    ],
)
def test_bad_arguments(settings, error, message):
    model = small()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        made(model, **settings)
    assert_same_tensors(model, before)


def test_no_budget_at_all():
    with pytest.raises(ValueError, match=r"the budget is given as none; it must be exactly one"):
        paamops.PAAM(small(), images())


def test_bad_models():
    with pytest.raises(TypeError, match=r"model is a list; it must be a torch.nn.Module"):
        paamops.PAAM([small()], images(), params=0.5)
    for bad in (math.nan, -math.inf):
        model = small()
        with torch.no_grad():
            model[3].weight[2, 1] = bad
        with pytest.raises(ValueError, match="model has NaN or infinite filters, in 3;"):
            made(model)
    with pytest.raises(ValueError, match="model has nothing to prune"):
        made(nn.Sequential(nn.Linear(6, 3)), torch.randn(2, 6))


def test_defaults_are_the_documented_ones():
    paam = paamops.PAAM(small(), images(), params=0.5)
    assert (paam.attention.width, paam.attention.slope, paam.attention.temperature) == (32, 0.1, 1.0)
    assert (paam.attention.attention, paam.attention.activation, paam.gate) == (
        "additive",
        "leaky_exponential",
        "free",
    )
    assert module.EVERY == 5
    assert paam.automatic


def test_scores_that_do_not_decide_are_told():
    paam = made(params=0.5)
    with torch.no_grad():
        paam.attention.bias.fill_(2.0)  # all at 1 + 2 · slope
    for call in (paam.keep, paam.prune):
        with pytest.warns(UserWarning, match=r"the threshold is 1\.2: more filters than the budget holds") as told:
            call()
        assert told[0].filename == __file__
    with torch.no_grad():
        paam.attention.bias.fill_(-200.0)  # all at 0
    with pytest.warns(UserWarning, match=r"channel sets have the same score, 0, and it is the threshold"):
        paam.keep()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paam = scatter(made(params=0.5))
        with torch.no_grad():
            paam.attention.bias.fill_(-8.0)
        paam.keep()
