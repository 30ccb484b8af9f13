"""PAAM.run: a network within its budget, the best of the rounds, resumed bit for bit, and what it refuses."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import paamops
from paamops.methods import paam_run
from paamops.methods.paam_run import PAAMResult, Scored
from paamops.packing import mask
from tests.methods.trainers import assert_same_tensors, images, params_of, plain, small
from tests.tolerances import NETWORK_TOLERANCE

WAYS = {
    "frozen": {"frozen": True},
    "frozen, trained": {"frozen": True, "trained": True},
    "both": {"frozen": False, "trained": True},
    "one stage": {"frozen": False},
}


def task(count=48, classes=5):
    """Images with a bar in the row of their class."""
    labels = torch.randint(0, classes, (count,))
    x = 0.3 * torch.randn(count, 1, 8, 8)
    x[torch.arange(count), 0, labels + 1] += 2
    return x, labels


class Trainer:
    """A training with SGD that notes its calls; the `cut`-th of them does not come to its end."""

    def __init__(self, x, labels, rate=0.1, cut=None):
        self.x, self.labels, self.rate, self.cut, self.calls = x, labels, rate, cut, []

    def __call__(self, model, epochs, start_epoch, penalty):
        self.calls.append((isinstance(model, Scored), epochs, start_epoch, model.training))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.rate, momentum=0.9)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.x)).split(12):
                optimizer.zero_grad()
                (F.cross_entropy(model(self.x[batch]), self.labels[batch]) + penalty()).backward()
                optimizer.step()
            if len(self.calls) == self.cut:
                raise RuntimeError("the cluster is on fire")


def accuracy(x, labels):
    return lambda model: (model(x).argmax(1) == labels).double().mean()


@pytest.fixture
def toy():
    """A model, a training and an evaluation."""
    x, labels = task()
    return small(), Trainer(x, labels), accuracy(x, labels)


def paam_of(model, **settings):
    settings = settings if {"flops", "filters"} & settings.keys() else {"params": 0.6, **settings}
    return paamops.PAAM(model, torch.linspace(-1, 1, 128).view(2, 1, 8, 8), **{"width": 6, **settings})


def run(paam, train, evaluate, **settings):
    return paam.run(train=train, evaluate=evaluate, **{"epochs": 4, "learn": 3, "rounds": 2, **settings})


def assert_same_result(one, other):
    """Bit for bit, but for the seconds."""
    assert plain(one.history) == plain(other.history)
    assert (one.stable, one.message, one.chosen, one.threshold) == (
        other.stable,
        other.message,
        other.chosen,
        other.threshold,
    )
    for name in ("keep", "scores", "learning", "steps"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert_same_tensors(one.model, other.model)
    assert_same_tensors(one.dense, other.dense)


def check(result, paam, evaluate):
    """What holds of every run."""
    assert isinstance(result, PAAMResult)
    channels, (start, *rounds) = result.channels, result.history
    whole = channels.cost()
    assert (start.number, start.params, start.flops, start.filters) == (0, *whole[:2], whole.filters)
    assert [entry.number for entry in rounds] == list(range(1, len(rounds) + 1))
    ((name, limit),) = result.budget.items()
    for entry in rounds:
        assert getattr(entry, name) <= limit * getattr(whole, name)
        assert 0 <= entry.changed <= 1
        assert entry.seconds > 0
        assert math.isfinite(entry.threshold)
    chosen = result.history[result.chosen]
    assert chosen.accuracy == max(entry.accuracy for entry in rounds)
    cost = channels.cost(result.keep)
    assert (cost.params, cost.flops, cost.filters) == (chosen.params, chosen.flops, chosen.filters)
    assert params_of(result.model) == chosen.params
    assert params_of(result.dense) == whole.params
    assert not result.model.training
    assert not result.dense.training
    assert evaluate(result.model).item() == chosen.accuracy
    assert evaluate(result.dense).item() == start.accuracy
    kept = result.keep[channels.sets]
    assert result.scores.shape == kept.shape
    assert result.threshold == chosen.threshold
    means, guarded = channels.set_scores(result.scores), channels.guarded(channels.set_scores(result.scores))
    free = ~guarded
    assert means[free & ~result.keep].max() <= means[free & result.keep].min()
    assert result.threshold == pytest.approx(float(means[free & ~result.keep].max()))
    assert result.learning.shape == (len(result.steps), len(kept))
    assert 1 <= len(result.steps) <= paam_run.SNAPSHOTS
    assert (result.steps.diff() > 0).all()
    for amount in (f"{1 - chosen.params / whole.params:.1%} of the parameters", f"{chosen.accuracy:.4g} after"):
        assert amount in result.message


@pytest.mark.parametrize("budget", [{"params": 0.6}, {"flops": 0.5}, {"filters": 0.6}], ids=lambda b: next(iter(b)))
@pytest.mark.parametrize("way", WAYS)
def test_a_whole_run(way, budget, toy):
    model, train, evaluate = toy
    before, lines = copy.deepcopy(model), []
    paam = paam_of(model, **budget)
    result = run(paam, train, evaluate, say=lines.append, **WAYS[way])
    check(result, paam, evaluate)
    assert_same_tensors(model, before)
    assert model.training is before.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in (*result.model.parameters(), *result.dense.parameters()))
    assert paam.model is model
    assert paam.learned().isfinite().all()
    assert len(lines) == len(result.history)
    assert lines[0].startswith("round 0: unpruned; accuracy")
    assert lines[1].startswith("round 1: threshold")


def test_the_trainings_of_a_run(toy):
    """What `train` is called with: the whole schedule, the learnings, the retrainings from the rewound epoch."""
    model, train, evaluate = toy
    calls = {}
    for way, settings in WAYS.items():
        train.calls = []
        result = run(paam_of(model), train, evaluate, epochs=5, learn=2, rewind=0.4, rounds=2, **settings)
        calls[way] = train.calls
        assert all(training for *_, training in train.calls)
        learnings = [call for call in train.calls if call[0]]
        assert len(learnings) == len(result.history) - (not result.stable)
    small_ones = [(False, 3, 2)]
    assert [call[:3] for call in calls["frozen"]][:3] == [(False, 5, 0), (True, 2, 0), *small_ones]
    assert [call[:3] for call in calls["frozen, trained"]][:2] == [(True, 2, 0), *small_ones]
    assert [call[:3] for call in calls["both"]][:3] == [(True, 2, 2), *small_ones, (True, 2, 2)]
    assert [call[:3] for call in calls["one stage"]][:3] == [(True, 5, 0), *small_ones, (True, 2, 2)]


def test_the_default_length_of_a_learning(toy):
    model, train, evaluate = toy
    run(paam_of(model), train, evaluate, epochs=10, learn=None, rounds=1, trained=True)
    assert train.calls[0][:2] == (True, 3)


def test_a_frozen_network_is_not_touched_while_scores_are_learned(toy):
    model, _, evaluate = toy
    model.eval()
    x, labels = task()
    seen = []

    def train(scored, epochs, start_epoch, penalty):
        if not isinstance(scored, Scored):
            return
        assert not any(module.training for module in scored.model.modules())
        assert {n for n, p in scored.named_parameters() if p.requires_grad} == {
            "attention.projection",
            "attention.value",
            "attention.bias",
        }
        Trainer(x, labels)(scored, epochs, start_epoch, penalty)
        assert_same_tensors(scored.model, model)
        seen.append(1)

    run(paam_of(model), train, evaluate, rounds=1, trained=True)
    assert seen


def test_parameters_that_were_fixed_stay_so(toy):
    model, train, evaluate = toy
    model[0].weight.requires_grad_(False)
    for way in (WAYS["frozen, trained"], WAYS["both"]):
        result = run(paam_of(model), train, evaluate, rounds=1, **way)
        for net in (result.model, result.dense):
            assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["0.weight"]
        kept = result.keep[result.channels.sets[:8]]
        assert torch.equal(result.model[0].weight, model[0].weight[kept])


def test_ends_when_the_kept_set_is_stable(toy):
    """A learning that finds the same scores again ends the run, and the round before is the last."""
    model, train, evaluate = toy
    value = torch.randn(6)

    def learn(scored, epochs, start_epoch, penalty):
        if not isinstance(scored, Scored):
            return train(scored, epochs, start_epoch, penalty)
        scored(images())  # one step, so that there is something to remember
        with torch.no_grad():
            scored.attention.value.copy_(value.expand_as(scored.attention.value))
            scored.attention.bias.fill_(-0.5)

    result = run(paam_of(model), learn, evaluate, rounds=5, trained=True, epochs=1, rewind=1.0)
    check(result, None, evaluate)
    assert result.stable
    assert len(result.history) == 2
    assert "the kept set is stable after 1 round." in result.message
    free = run(paam_of(model), train, evaluate, rounds=1)
    assert not free.stable
    assert "1 of 1 rounds" in free.message


def test_filters_may_return(toy):
    """What a round removes keeps its values in the unpruned network, and is kept by another round."""
    model, _, _ = toy
    calls = []

    def train(scored, epochs, start_epoch, penalty):
        if not isinstance(scored, Scored):
            return
        calls.append({name: p.detach().clone() for name, p in scored.model.named_parameters()})
        scored(images())
        with torch.no_grad():
            scored.attention.value.copy_((-1) ** len(calls) * torch.ones_like(scored.attention.value))
            scored.attention.bias.fill_(-1)

    result = run(paam_of(model), train, lambda m: 1.0, rounds=3, trained=True)
    assert len(calls) == 3
    assert result.history[2].changed > 0
    for later in calls[1:]:
        for name, tensor in calls[0].items():
            assert torch.equal(later[name], tensor), name  # no training touched them


def test_retrained_filters_go_back_to_their_places(toy):
    model, seen, kept = toy[0], [], []

    def train(net, epochs, start_epoch, penalty):
        if not isinstance(net, Scored):
            kept.append(net[0].out_channels)
            with torch.no_grad():
                net[0].bias.add_(10)
            return
        seen.append(net.model[0].bias.detach().clone())
        net(images())
        with torch.no_grad():
            net.attention.value.copy_((-1) ** len(seen) * torch.ones_like(net.attention.value))
            net.attention.bias.fill_(-1)

    run(paam_of(model, params=0.3), train, lambda m: 1.0, rounds=2, trained=True)  # of 8 filters some go
    moved = seen[1] - seen[0] > 5
    assert 0 < int(moved.sum()) == kept[0]
    assert torch.equal(seen[1][~moved], seen[0][~moved])


def test_the_best_round_is_the_result(toy):
    model, train, _ = toy
    numbers = iter([0.9, 0.5, 0.8, 0.5, 0.7, 0.5, 0.6])  # unpruned, then scored and pruned
    result = run(
        paam_of(model), train, lambda m: next(numbers), rounds=3, trained=True, frozen=False, learn=1, epochs=2
    )
    assert result.chosen == 1
    assert [entry.accuracy for entry in result.history] == [0.9, 0.8, 0.7, 0.6][: len(result.history)]
    assert [entry.scored for entry in result.history[1:]] == [0.5] * (len(result.history) - 1)


def test_the_packed_result_equals_its_masked_twin(toy):
    model, _, _ = toy
    x, labels = task()

    def train(scored, epochs, start_epoch, penalty):
        if isinstance(scored, Scored):
            Trainer(x, labels)(scored, epochs, start_epoch, penalty)

    model.eval()
    result = run(paam_of(model), train, lambda m: 0.5, rounds=1, trained=True)
    twin = mask(model, result.channels, result.keep)
    torch.testing.assert_close(result.model(x), twin(x), **NETWORK_TOLERANCE[torch.float32])
    assert (twin(x) - model(x)).abs().max() > 1e-3


def test_one_stage_starts_from_what_the_scored_network_computed(toy):
    """Its unpruned network is the trained one with the scores folded in."""
    model, train, evaluate = toy
    result = run(paam_of(model), train, evaluate, rounds=1, frozen=False)
    assert result.history[0].accuracy == result.history[1].scored
    assert evaluate(result.dense).item() == result.history[0].accuracy
    assert len(train.calls) == 2


def planted(classes=3, total=12):
    """A trained network in which some filters find the patterns of the classes; the others are louder and unread."""
    patterns = torch.randn(classes, 3, 3)
    patterns /= patterns.flatten(1).norm(dim=1).view(-1, 1, 1)
    model = nn.Sequential(
        nn.Conv2d(1, total, 3), nn.BatchNorm2d(total), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Linear(total, classes),
    )  # fmt: skip
    useful = torch.randperm(total)[:classes]
    with torch.no_grad():
        for tensor in (model[0].bias, model[5].weight, model[5].bias):
            tensor.zero_()
        model[0].weight.mul_(6)
        model[0].weight[useful, 0] = patterns
        model[5].weight[torch.arange(classes), useful] = 2
    labels, rows, columns = torch.randint(0, classes, (128,)), torch.randint(0, 6, (128,)), torch.randint(0, 6, (128,))
    x = 0.2 * torch.randn(128, 1, 8, 8)
    for k, label in enumerate(labels):
        x[k, 0, rows[k] : rows[k] + 3, columns[k] : columns[k] + 3] += 3 * patterns[label]
    return model.eval(), x, labels, useful


def test_planted_filters_are_found():
    """Of 12 filters in four networks the three that are read; random would find a quarter of them, l1 none."""
    found = 0
    for _ in range(4):
        model, x, labels, useful = planted()
        train = Trainer(x, labels)

        def learn(scored, epochs, start_epoch, penalty, train=train):
            if isinstance(scored, Scored):
                train(scored, epochs, start_epoch, penalty)

        paam = paam_of(model, filters=6, width=8)
        evaluate = accuracy(x, labels)
        result = run(paam, learn, evaluate, trained=True, rounds=1, learn=14)
        kept = result.keep[result.channels.sets][:12].nonzero().flatten()
        right = len(set(kept.tolist()) & set(useful.tolist()))
        assert len(kept) == 3
        if right == 3:
            assert result.history[1].accuracy == pytest.approx(result.history[0].accuracy, abs=0.03)
        found += right
    assert found >= 9


@pytest.mark.parametrize("way", WAYS)
def test_resumed_where_it_was_cut(way, toy, tmp_path):
    """By an error of each training in turn; with the same PAAM, and once more when it has ended."""
    model, train, evaluate = toy
    settings = {**WAYS[way], "rounds": 2, "learn": 2, "epochs": 3}
    whole = run(paam_of(model), train, evaluate, **settings)
    assert len(train.calls) >= 3
    for cut in range(1, len(train.calls) + 1):
        state = tmp_path / f"cut in training {cut}"
        paam = paam_of(model)
        attention = copy.deepcopy(paam.attention.state_dict())
        with pytest.raises(RuntimeError, match="on fire"):
            run(paam, Trainer(train.x, train.labels, cut=cut), evaluate, state=state, resume=True, **settings)
        assert paam.model is model
        assert all(torch.equal(tensor, attention[name]) for name, tensor in paam.attention.state_dict().items())
        again = Trainer(train.x, train.labels)
        assert_same_result(run(paam, again, evaluate, state=state, resume=True, **settings), whole)
        assert len(again.calls) == len(train.calls) - (cut - 1)
    nothing = Trainer(train.x, train.labels)
    assert_same_result(run(paam_of(model), nothing, evaluate, state=state, resume=True, **settings), whole)
    assert not nothing.calls


def test_more_rounds_can_be_added(toy, tmp_path):
    model, train, evaluate = toy
    settings = {"frozen": False, "trained": True, "learn": 2}
    three = run(paam_of(model), train, evaluate, rounds=3, **settings)
    run(paam_of(model), train, evaluate, rounds=1, state=tmp_path, **settings)
    again = run(paam_of(model), train, evaluate, rounds=3, state=tmp_path, resume=True, **settings)
    assert_same_result(again, three)


def test_same_seed_same_result(toy):
    model, train, evaluate = toy
    one, same, other = (run(paam_of(model, seed=seed), train, evaluate) for seed in (1, 1, 2))
    assert_same_result(one, same)
    assert not torch.equal(one.scores, other.scores)
    assert run(paam_of(model, seed=2**64), train, evaluate).scores.isfinite().all()  # any int


OTHERS = [
    ({"budget": {"flops": 0.6}}, "its budget"),
    ({"budget": {"params": 0.7}}, "its budget params is 0.6, here it is 0.7"),
    ({"paam": {"seed": 5}}, "its (attention|seed|width)"),
    ({"paam": {"width": 7}}, "its (attention|seed|width)"),
    ({"paam": {"penalty": 1.0}}, "its penalty is null, here it is 1.0"),
    ({"paam": {"gate": "explicit"}}, "its scores"),
    ({"paam": {"slope": 0.5}}, "its scores"),
    ({"paam": {"activation": "sigmoid"}}, "its (scores|attention)"),
    ({"paam": {"pinned": ("0",)}}, "its (pinned|attention)"),
    ({"run": {"epochs": 5}}, "its epochs"),
    ({"run": {"learn": 2}}, "its epochs"),
    ({"run": {"rewind": 0.25}}, "its epochs"),
    ({"run": {"frozen": False}}, "its frozen is true, here it is false"),
    ({"run": {"trained": False}}, "its (trained|weights)"),
    ({"run": {"context": {"lr": 0.2}}}, "its context"),
    ({"model": "other weights"}, "its weights"),
    ({"model": "wider"}, "its (tensors|attention)"),
]


def test_the_state_of_another_run_is_refused(toy, tmp_path):
    model, train, evaluate = toy
    settings = {"rounds": 1, "trained": True, "state": tmp_path}
    run(paam_of(model), train, evaluate, **settings)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = len(train.calls)
    models = {"other weights": small, "wider": lambda: small(widths=(8, 13))}
    for change, message in OTHERS:
        other = models.get(change.get("model"), lambda: model)()
        paam = paam_of(other, **change.get("budget", {"params": 0.6}), **change.get("paam", {}))
        with pytest.raises(ValueError, match=f"is of another run: {message}"):
            run(paam, train, evaluate, **settings | {"resume": True} | change.get("run", {}))
    assert len(train.calls) == calls
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_that_holds_a_run(toy, tmp_path):
    model, train, evaluate = toy
    run(paam_of(model), train, evaluate, rounds=1, trained=True, state=tmp_path)
    with pytest.raises(ValueError, match="holds a run; resume it, or name another folder"):
        run(paam_of(model), train, evaluate, rounds=1, trained=True, state=tmp_path)
    with pytest.raises(ValueError, match="resume is True, but state is None"):
        run(paam_of(model), train, evaluate, resume=True)
    file = tmp_path / "learned-1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"learned-1.safetensors: is missing or damaged"):
        run(paam_of(model), train, evaluate, rounds=1, trained=True, state=tmp_path, resume=True)
    stored = json.loads((tmp_path / "state.json").read_text())
    assert stored["networks"] == ["0", "learned-1", "1"]
    assert not list(tmp_path.glob(".*.partial"))


def test_a_training_in_eval_mode(toy):
    """Scores may be learned with the whole Scored in eval mode, which its batch norms are in anyway."""
    model, train, evaluate = toy

    def in_eval_mode(scored, epochs, start_epoch, penalty):
        train(scored.eval(), epochs, start_epoch, penalty)

    result = run(paam_of(model), in_eval_mode, evaluate, rounds=1, trained=True)
    check(result, None, evaluate)


def test_bad_trainings(toy):
    model, train, evaluate = toy
    before = copy.deepcopy(model)

    def widens(model, epochs, start_epoch, penalty):
        model[0] = nn.Conv2d(1, 9, 3)

    def adds(scored, epochs, start_epoch, penalty):
        train(scored, epochs, start_epoch, penalty)
        scored.extra = nn.Parameter(torch.ones(2))

    def diverges(scored, epochs, start_epoch, penalty):
        train(scored, epochs, start_epoch, penalty)
        with torch.no_grad():
            scored.attention.value.fill_(math.nan)

    def idle(scored, epochs, start_epoch, penalty):
        pass

    for bad, trained, error, message in (
        (
            widens,
            False,
            ValueError,
            "train changed the network: 0.bias, 0.weight; it must keep names, shapes and dtypes",
        ),
        (adds, True, ValueError, "train changed the network: extra; it must keep"),
        (diverges, True, ValueError, "the attention network has diverged"),
        (idle, True, RuntimeError, "no scores were learned yet"),
        (lambda model: None, True, TypeError, "positional argument"),
    ):
        paam = paam_of(model)
        attention = copy.deepcopy(paam.attention.state_dict())
        with pytest.raises(error, match=message):
            run(paam, bad, evaluate, trained=trained)
        assert paam.model is model
        assert_same_tensors(model, before)
        assert all(torch.equal(tensor, attention[name]) for name, tensor in paam.attention.state_dict().items())
        assert (paam.lambda_, paam.steps) == (1.0, 0)
        assert all(parameter.requires_grad for parameter in model.parameters())
        check(run(paam, train, evaluate, trained=True), paam, evaluate)  # it can be used again


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (math.nan, ValueError, r"evaluate returned nan in round \d; it must return a finite number"),
        (math.inf, ValueError, "evaluate returned inf"),
        (None, TypeError, "evaluate returned a NoneType; it must return a number"),
        (torch.ones(2), TypeError, "evaluate returned a Tensor"),
        (True, TypeError, "evaluate returned a bool"),
    ],
)
@pytest.mark.parametrize("call", [1, 2, 3], ids=["unpruned", "scored", "pruned"])
def test_bad_evaluations(number, error, message, call, toy):
    model, train, _ = toy
    calls = []

    def evaluate(model):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        calls.append(1)
        return number if len(calls) == call else 0.5

    with pytest.raises(error, match=message):
        run(paam_of(model), train, evaluate, trained=True)
    assert len(calls) == call


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train": None}, TypeError, "train is a NoneType; it must be a function"),
        ({"evaluate": 0.9}, TypeError, "evaluate is a float; it must be a function"),
        ({"epochs": 0}, ValueError, "epochs is 0; it must be an int of at least 1"),
        ({"epochs": 2.0}, ValueError, "epochs is 2.0; it must be an int"),
        ({"epochs": "many", "learn": None}, ValueError, "epochs is 'many'; it must be an int"),
        ({"learn": 0}, ValueError, "learn is 0; it must be an int of at least 1"),
        ({"rounds": True}, ValueError, "rounds is True; it must be an int"),
        ({"rewind": 1.5}, ValueError, "rewind is 1.5; it must be a share"),
        ({"rewind": math.nan}, ValueError, "rewind is nan; it must be a share"),
        ({"say": "hello"}, TypeError, "say is a str; it must be a function"),
    ],
)
def test_bad_arguments(settings, error, message, toy):
    model, train, evaluate = toy
    with pytest.raises(error, match=message):
        run(paam_of(model), **{"train": train, "evaluate": evaluate, **settings})
    assert not train.calls


def test_a_wrapped_attention_network(toy):
    model, train, evaluate = toy
    paam = paam_of(model)
    paam.attention = nn.Sequential(paam.attention)
    with pytest.raises(TypeError, match=r"paam.attention is a Sequential; run takes it as it was made"):
        run(paam, train, evaluate)


def test_snapshots_of_the_scores_are_few_and_evenly_spaced(toy):
    model, _, _ = toy
    paam = paam_of(model)
    scored = Scored(paam, True)
    for _ in range(333):
        scored(images(2))
    with torch.no_grad():
        scored(images(2))
    steps = [step for step, _ in scored.snapshots]
    assert 20 <= len(steps) <= paam_run.SNAPSHOTS
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1
    assert steps[-1] > 333 - 2 * (steps[1] - steps[0])
