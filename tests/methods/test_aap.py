"""AAP with toy trainings: what it ends at, what it leaves alone, what it says no to, and how it goes on after a cut."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import paamops
from paamops import AAP, Objective
from paamops.methods.networks import tensors_of
from tests import networks
from tests.methods import trainers
from tests.methods.trainers import (
    Patience,
    Recorder,
    aap,
    assert_same_result,
    assert_same_tensors,
    at_least,
    check_result,
    gentle,
    images,
    nudge,
    params_of,
    plain,
    small,
    untouched,
)
from tests.tolerances import NETWORK_TOLERANCE, TOLERANCE

WIDE = (16, 24)

# What is too little to be trained for, and a filter more: the grain, as a share of the size, of a search.
GRAIN = 0.12

OBJECTIVES = {
    "accuracy": Objective(max_accuracy_drop=0.3),
    "accuracy, flops": Objective(max_accuracy_drop=0.3, minimise="flops"),
    "accuracy, both": Objective(max_accuracy_drop=0.3, minimise="both"),
    "no loss": Objective(max_accuracy_drop=0),
    "a gain": Objective(max_accuracy_drop=-0.1),
    "params": Objective(params=0.4),
    "flops": Objective(flops=0.4),
    "params and flops": Objective(params=0.3, flops=0.5),
    "accuracy and params": Objective(max_accuracy_drop=0.5, params=0.6),
    "accuracy and too few params": Objective(max_accuracy_drop=0.1, params=0.1),
    "params, and then the least flops": Objective(max_accuracy_drop=0.5, params=0.7, minimise="flops"),
    "all there are": Objective(params=1.0),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("trained", [False, True])
def test_every_objective_ends_in_a_sound_result(objective, trained):
    model, inputs = small(WIDE), images()
    result = aap(model, inputs, objective=objective, trained=trained).run()
    check_result(result, objective, inputs)
    assert result.objective == objective


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_smallest_network_that_is_accurate_enough(share):
    """Of a few networks: where a round's smallest step removes several filters at once, one may stop early."""
    gaps = []
    for _ in range(3):
        model, inputs = small(WIDE), images()
        limit = share * params_of(model)
        result = aap(model, inputs, evaluate=at_least(limit)).run()
        check_result(result, result.objective, inputs)
        assert result.met
        gaps.append((params_of(result.model) - limit) / params_of(model))
    assert min(gaps) >= 0
    assert min(gaps) <= GRAIN


@pytest.mark.parametrize(
    "limits", [{"params": 0.5}, {"params": 0.15}, {"flops": 0.4}, {"params": 0.5, "flops": 0.3}, {"params": 1000}]
)
def test_limits_on_size_are_kept_and_not_by_much(limits):
    model, inputs = small(WIDE), images()
    result = aap(model, inputs, objective=Objective(**limits)).run()
    check_result(result, result.objective, inputs)
    assert result.met
    whole, left = result.channels.cost(), result.channels.cost(result.keep)
    shares = []
    for name, limit in limits.items():
        limit = limit if isinstance(limit, int) else int(limit * getattr(whole, name))
        assert getattr(left, name) <= limit
        shares.append((limit - getattr(left, name)) / getattr(whole, name))
    assert min(shares) <= GRAIN
    assert result.message.endswith("The objective is met; all limits are kept.")


def test_a_limit_within_the_accuracy_and_no_further():
    model, inputs = small(WIDE), images()
    whole = params_of(model)
    objective = Objective(max_accuracy_drop=0.5, params=0.6)
    result = aap(model, inputs, evaluate=at_least(0.2 * whole), objective=objective).run()
    assert result.met
    assert 0.6 - GRAIN <= params_of(result.model) / whole <= 0.6
    objective = Objective(max_accuracy_drop=0.5, params=0.6, minimise="params")
    result = aap(model, inputs, evaluate=at_least(0.2 * whole), objective=objective).run()
    assert result.met
    assert params_of(result.model) / whole <= 0.45


@pytest.mark.parametrize("minimise", ["params", "flops"])
def test_what_is_minimised_decides_what_goes(minimise):
    """The threshold is highest where most can be saved: in the linear layer, or in the second convolution."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8),
        nn.Flatten(), nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 3),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # so that every filter fires, and T = 0 removes none
    inputs = images().abs()
    whole = paamops.trace(model, inputs).cost()

    def share(model):
        return getattr(paamops.trace(model, inputs).cost(), minimise) / getattr(whole, minimise)

    objective = Objective(max_accuracy_drop=0.5, minimise=minimise)
    result = aap(
        model, inputs, train=untouched, evaluate=lambda model: float(share(model) >= 0.5), objective=objective
    ).run()
    check_result(result, objective, inputs)
    assert 0.5 <= share(result.model) < 0.9
    weights = result.thresholds["before"]
    layer = "6" if minimise == "params" else "2"
    names = [each.name for each in result.channels.layers]
    assert int(weights.argmax()) == names.index(layer)


def test_a_size_that_no_network_has():
    model, inputs = small(WIDE), images()
    least = 9 + 1 + 2 + 9 + 1 + 2 + 5 + 5  # one filter in each convolution
    with pytest.warns(UserWarning, match=rf"no network can have 10 params: .* there are about {least}; the run will"):
        result = aap(model, inputs, objective=Objective(params=10)).run()
    check_result(result, result.objective, inputs)
    assert not result.met
    assert params_of(result.model) == least
    assert f"The objective is not met ({least} params in place of 10); no filter can be removed" in result.message
    assert result.message.endswith("This is the best network found.")


def test_an_accuracy_that_no_network_has():
    model, inputs = small(WIDE), images()
    result = aap(model, inputs, objective=Objective(max_accuracy_drop=-0.5)).run()
    check_result(result, result.objective, inputs)
    assert not result.met
    assert result.chosen == 0
    assert "The objective is not met (the accuracy)" in result.message
    assert params_of(result.model) == params_of(model)


def test_two_limits_of_which_one_cannot_be_kept():
    model, inputs = small(WIDE), images()
    objective = Objective(max_accuracy_drop=0.5, params=0.2)
    result = aap(model, inputs, evaluate=at_least(0.6 * params_of(model)), objective=objective).run()
    check_result(result, objective, inputs)
    assert not result.met
    assert "params in place of" in result.message
    assert 0.6 <= params_of(result.model) / params_of(model) <= 0.6 + 2 * GRAIN  # the smallest that is accurate


def test_a_limit_that_is_met_from_the_start():
    model, inputs = small(), images()
    recorder = Recorder()
    result = aap(model, inputs, train=recorder, objective=Objective(params=1.0), trained=True).run()
    assert result.met
    assert result.chosen == 0
    assert len(result.history) == 1
    assert not recorder.calls
    assert_same_tensors(result.model, model)


def test_of_the_networks_within_the_limits_the_most_accurate_is_chosen():
    objective = Objective(params=0.5)
    result = aap(small(WIDE), objective=objective).run()
    fitting = [entry for entry in result.history if entry.outcome == "accepted"]
    fitting = [entry for entry in fitting if objective.sizes_met(entry, result.history[0])]
    assert result.history[result.chosen].accuracy == max(entry.accuracy for entry in fitting)


def test_dead_filters_go_first():
    """T = 0 in the first round removes what never fires, and nothing else."""
    model, inputs = small(norm=False), images()
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3] = 0, -1
        model[3].weight[4:6], model[3].bias[4:6] = 0, -1
    result = aap(model, inputs, train=untouched, trained=True, objective=Objective(params=0.3)).run()
    first = result.history[1]
    assert first.threshold == 0
    assert first.outcome == "accepted"
    assert first.filters == result.channels.cost().filters - 5
    check_result(result, result.objective, inputs)


@pytest.mark.parametrize("objective", [Objective(params=0.15), Objective(max_accuracy_drop=0.9)])
@pytest.mark.parametrize("dead", [4, 6, 7])
def test_a_network_that_is_dead_for_the_most_part(dead, objective):
    """More than the first λ is to remove goes at T = 0 already; the search must go on all the same."""
    model, inputs = small(norm=False), images()
    with torch.no_grad():
        model[0].weight[:dead], model[0].bias[:dead] = 0, -1
    result = aap(model, inputs, train=untouched, trained=True, objective=objective).run()
    check_result(result, objective, inputs)
    assert result.met
    assert result.channels.cost(result.keep).filters < result.channels.cost().filters - dead


def test_a_network_that_is_dead_altogether():
    model, inputs = small(norm=False), images()
    with torch.no_grad():
        model[0].weight[:], model[0].bias[:] = 0, -1
        model[3].weight[:], model[3].bias[:] = 0, -1
    result = aap(model, inputs, train=untouched, trained=True, objective=Objective(max_accuracy_drop=2)).run()
    check_result(result, result.objective, inputs)
    assert result.channels.cost(result.keep).filters == 1 + 1 + 5


@pytest.mark.parametrize("step", [None, 0.4])
def test_skipped_rounds_are_not_trained(step):
    model, inputs = small(WIDE), images()
    recorder, asked = Recorder(), []

    def evaluate(model):
        asked.append(params_of(model))
        return float(params_of(model) >= 900)

    result = aap(model, inputs, train=recorder, evaluate=evaluate, trained=True, step=step).run()
    trained = [entry for entry in result.history[1:] if entry.accuracy is not None]
    assert [call[0] for call in recorder.calls] == [entry.params for entry in trained]
    assert asked == [result.history[0].params, *(entry.params for entry in trained)]
    assert any(entry.outcome == "skipped" for entry in result.history)


@pytest.mark.parametrize("rewind_weights", [False, True])
@pytest.mark.parametrize("rewind", [0, 0.4, 0.75, 0.9])
def test_the_epochs_that_train_is_asked_for(rewind, rewind_weights):
    """The first training is cut at epoch k only where the weights of that epoch are needed."""
    model = small(WIDE)
    recorder = Recorder()
    aap(model, train=recorder, epochs=10, rewind=rewind, rewind_weights=rewind_weights, rounds=3).run()
    k = round(10 * rewind)
    parts = [(10, 0)] if not rewind_weights else [(k, 0), (10 - k, k)] if k else [(10, 0)]
    first, rounds = recorder.calls[: len(parts)], recorder.calls[len(parts) :]
    assert first == [(params_of(model), *part, True) for part in parts]
    assert len(rounds) == 3
    for params, epochs, start, training in rounds:
        assert params < params_of(model)
        assert (epochs, start, training) == (10 - k, k, True)


def test_a_trained_network_is_not_trained_first():
    model, recorder = small(WIDE), Recorder()
    result = aap(model, train=recorder, epochs=10, trained=True, rounds=2).run()
    assert [call[1:3] for call in recorder.calls] == [(2, 8)] * 2
    assert_same_tensors(result.dense, model)


def test_an_untrained_network_is_trained_for_all_epochs_first():
    """Its weights after both parts of the schedule are those of `dense`."""
    model = small(WIDE)
    result = aap(model, train=marking, epochs=10, rewind=0.6, rounds=1).run()
    torch.testing.assert_close(result.dense[0].bias, model[0].bias.detach() + 10, **TOLERANCE[torch.float32])
    assert params_of(result.dense) == params_of(model)


def marking(model, epochs, start_epoch):
    """A training that leaves a trace: every epoch adds one to every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(epochs)


@pytest.mark.parametrize("rewind_weights", [False, True])
def test_the_weights_that_train_starts_from(rewind_weights):
    """With `rewind_weights` those of epoch k, packed, in each round; without, those of the round's origin."""
    model = small(norm=False)
    seen = []

    def train(model, epochs, start_epoch):
        seen.append(tensors_of(model))
        marking(model, epochs, start_epoch)

    method = aap(model, train=train, epochs=8, rewind=0.5, rewind_weights=rewind_weights, evaluate=at_least(300))
    result = method.run()
    rounds = [entry for entry in result.history if entry.accuracy is not None][1:]
    assert len(rounds) > 2
    assert {entry.outcome for entry in rounds} >= {"accepted", "rolled back"}
    depth = {0: 8}  # epochs that the network of a round has seen
    bias = model[0].bias.detach()
    for entry in result.history[1:]:
        depth[entry.number] = depth[entry.origin] + (4 if entry.outcome == "accepted" else 0)
    for entry, tensors in zip(rounds, seen[1 + rewind_weights :], strict=True):
        expected = bias + (4 if rewind_weights else depth[entry.origin])
        for value in tensors["0.bias"]:
            assert (value - expected).abs().min() < 1e-5


class Noise(Exception):
    pass


def spoil(model, epochs, start_epoch):
    raise Noise


@pytest.mark.parametrize("ending", ["well", "train fails", "evaluate fails"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(ending, training):
    model = small(WIDE).train(training)
    model[1].eval()
    model[3].weight.requires_grad_(False)
    before, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    grad = [parameter.requires_grad for parameter in model.parameters()]
    inputs = images()
    kept = inputs.clone()

    def evaluate(network):
        if ending == "evaluate fails" and params_of(network) < params_of(before):
            raise Noise
        return gentle(params_of(before))(network)

    method = aap(model, inputs, evaluate=evaluate, train=spoil if ending == "train fails" else nudge)
    if ending == "well":
        result = method.run()
        with torch.no_grad():
            for tensor in (*result.model.parameters(), *result.dense.parameters()):
                tensor.zero_()
    else:
        with pytest.raises(Noise):
            method.run()
    assert_same_tensors(model, before)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grad
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(inputs, kept)


def test_evaluate_may_spoil_what_it_is_given():
    def evaluate(network):
        value = gentle(5000)(network)
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.fill_(1)
        return value

    model, inputs = small(WIDE), images()
    spoilt = aap(model, inputs, evaluate=evaluate).run()
    assert_same_result(spoilt, aap(model, inputs, evaluate=gentle(5000)).run())


def test_the_network_and_the_mode_that_evaluate_is_given():
    modes = []

    def evaluate(network):
        modes.append((network.training, torch.is_grad_enabled(), params_of(network)))
        return gentle(5000)(network)

    result = aap(small(WIDE), evaluate=evaluate, rounds=3).run()
    assert [mode[:2] for mode in modes] == [(False, False)] * 4
    assert [mode[2] for mode in modes] == [entry.params for entry in result.history if entry.accuracy is not None]


def test_the_result_equals_its_masked_twin():
    model, inputs = small(WIDE), images()
    result = aap(model, inputs, objective=Objective(params=0.3), train=untouched, trained=True).run()
    twin = paamops.mask(model, result.channels, result.keep).eval()  # nothing was learnt: the same weights
    with torch.no_grad():
        torch.testing.assert_close(result.model(inputs), twin(inputs), **NETWORK_TOLERANCE[torch.float32])
        torch.testing.assert_close(result.dense(inputs), copy.deepcopy(model).eval()(inputs), rtol=0, atol=0)


def test_the_result_has_the_weights_that_were_evaluated():
    seen = {}

    def evaluate(network):
        seen[params_of(network)] = tensors_of(network)
        return gentle(5000)(network)

    result = aap(small(WIDE), evaluate=evaluate, objective=Objective(params=0.5)).run()
    for name, tensor in tensors_of(result.model).items():
        assert torch.equal(tensor, seen[params_of(result.model)][name]), name


def test_a_result_can_be_pruned_on():
    model, inputs = small(WIDE), images()
    first = aap(model, inputs, objective=Objective(params=0.5)).run()
    second = aap(first.model, inputs, objective=Objective(params=0.5), trained=True).run()
    check_result(second, second.objective, inputs)
    assert params_of(second.model) <= 0.25 * params_of(model)


def test_rounds():
    for rounds in (1, 2):
        recorder = Recorder()
        result = aap(small(WIDE), train=recorder, trained=True, rounds=rounds).run()
        assert len(recorder.calls) == rounds
        assert result.message.endswith(f"; {rounds} {'round was' if rounds == 1 else 'rounds were'} trained.")


def test_lines_are_said():
    patience = Patience()
    result = aap(small(WIDE), say=patience).run()
    assert len(patience.lines) == len(result.history)
    for entry, line in zip(result.history, patience.lines, strict=True):
        assert line.startswith(f"round {entry.number}")
        assert entry.outcome in line or entry.outcome == "start"


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.__name__)
@pytest.mark.parametrize("objective", [Objective(max_accuracy_drop=0.3), Objective(params=0.5)], ids=["drop", "params"])
def test_all_kinds_of_networks_finish(network, objective):
    model, inputs = networks.make(network)
    before = copy.deepcopy(model)
    channels = paamops.trace(model, inputs)
    smallest = channels.cost(channels.guarded(channels.set_scores(torch.rand(len(channels.sets)))))
    if smallest.params > 0.45 * channels.cost().params:
        objective = Objective(max_accuracy_drop=0.3)  # too much of it is pinned
    method = aap(model, inputs, objective=objective, evaluate=gentle(channels.cost().params))
    result = method.run()
    check_result(result, objective, inputs)
    assert result.met
    # No threshold parts filters of equal scores: where more of them are dead than this accuracy allows, none can go.
    assert params_of(result.model) < params_of(model) or result.history[1].outcome == "rolled back"
    assert_same_tensors(model, before)


def test_pinned_layers_stay_whole():
    model, inputs = small(WIDE), images()
    result = aap(model, inputs, objective=Objective(params=0.6), pinned=("0",)).run()
    assert result.model[0].out_channels == WIDE[0]
    assert result.model[3].out_channels < WIDE[1]


def test_float64_and_channels_last():
    model, inputs = small(WIDE).double().to(memory_format=torch.channels_last), images().double()
    result = aap(model, inputs, objective=Objective(params=0.5)).run()
    check_result(result, result.objective, inputs)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float64}
    assert result.model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_training_that_diverges_once_is_rolled_back():
    """NaN in the weights of a rejected round must not reach another round through what is left of them."""
    model, inputs = small(WIDE, norm=False), images()
    calls = []

    def train(network, epochs, start_epoch):
        calls.append(1)
        nudge(network, epochs, start_epoch)
        if len(calls) % 3 == 0:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.fill_(math.nan)

    def evaluate(network):
        fine = all(parameter.isfinite().all() for parameter in network.parameters())
        return at_least(500)(network) if fine else 0.0

    result = aap(model, inputs, train=train, evaluate=evaluate, trained=True).run()
    check_result(result, result.objective, inputs)
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())


@pytest.mark.parametrize("objective", [Objective(max_accuracy_drop=0.3), Objective(params=0.3)])
def test_two_runs_are_equal(objective):
    model, inputs = small(WIDE), images()
    one = aap(model, inputs, objective=objective).run()
    torch.manual_seed(12345)  # what happened before must not matter
    torch.rand(7)
    assert_same_result(one, aap(model, inputs, objective=objective).run())
    other = aap(model, inputs, objective=objective, seed=1).run()
    assert plain(one.history) != plain(other.history)


# ---- What a caller may get wrong.


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model": "resnet"}, TypeError, "model is a str; it must be a torch.nn.Module"),
        ({"train": None}, TypeError, "train is a NoneType; it must be a function"),
        ({"evaluate": 0.9}, TypeError, "evaluate is a float; it must be a function"),
        ({"objective": {"params": 0.3}}, TypeError, "objective is a dict; it must be a paamops.Objective"),
        ({"epochs": 0}, ValueError, "epochs is 0; it must be an int of at least 1"),
        ({"epochs": 2.0}, ValueError, "epochs is 2.0; it must be an int of at least 1"),
        ({"epochs": True}, ValueError, "epochs is True; it must be an int of at least 1"),
        ({"rounds": 0}, ValueError, "rounds is 0; it must be an int of at least 1"),
        ({"rewind": 1}, ValueError, "rewind is 1; it must be a share of the epochs, at least 0 and below 1"),
        ({"rewind": -0.1}, ValueError, "rewind is -0.1; it must be a share"),
        ({"rewind": math.nan}, ValueError, "rewind is nan; it must be a share"),
        ({"rewind": 0.9, "epochs": 4}, ValueError, "rewind is 0.9 and epochs is 4: none is left to retrain"),
        ({"reduction": "median"}, ValueError, "reduction is 'median'; it must be one of"),
        ({"step": 0}, ValueError, "step is 0; it must be a positive number, or None"),
        ({"step": math.inf}, ValueError, "step is inf; it must be a positive number"),
        ({"step": "1"}, ValueError, "step is '1'; it must be a positive number"),
        ({"trained": True, "rewind_weights": True}, ValueError, "rewind_weights needs the weights of an early epoch"),
        ({"resume": True}, ValueError, "resume is True, but state is None; it must be the folder of the run"),
        ({"p": 0.5}, ValueError, "p is 0.5"),
        ({"pinned": ("0", "3")}, ValueError, "model has nothing to prune: "),
    ],
)
def test_bad_arguments(changes, error, match):
    model = small()
    recorder = Recorder()
    settings = {"train": recorder, "evaluate": gentle(5000), "objective": Objective(params=0.3), "epochs": 4} | changes
    with pytest.raises(error, match=match):
        AAP(settings.pop("model", model), images(), **settings, quiet=True)
    assert not recorder.calls


def test_nothing_to_prune():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match="model has nothing to prune: "):
        aap(model)


class Fixed(nn.Module):
    """A forward pass with a size written into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(512, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).view(-1, 512))


def test_a_network_that_cannot_be_packed_is_refused_before_it_is_trained():
    recorder = Recorder()
    with pytest.raises(paamops.PackingError, match="size"):
        aap(Fixed(), train=recorder).run()
    assert not recorder.calls


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (math.nan, ValueError, "evaluate returned nan in round 0; it must return a finite number"),
        (math.inf, ValueError, "evaluate returned inf in round 0"),
        (torch.tensor(math.nan), ValueError, "evaluate returned nan in round 0"),
        ("93%", TypeError, "evaluate returned a str; it must return a number"),
        (None, TypeError, "evaluate returned a NoneType"),
        (True, TypeError, "evaluate returned a bool"),
        (torch.tensor([0.1, 0.2]), TypeError, "evaluate returned a Tensor"),
        ((0.9, 0.1), TypeError, "evaluate returned a tuple"),
    ],
)
def test_what_evaluate_may_not_return(value, error, match):
    with pytest.raises(error, match=match):
        aap(small(), evaluate=lambda network: value).run()


@pytest.mark.parametrize("kind", [int, torch.tensor, lambda value: torch.tensor([value]), torch.float64])
def test_what_evaluate_may_return(kind):
    convert = (lambda value: torch.tensor(value, dtype=kind)) if isinstance(kind, torch.dtype) else kind
    scale = 100 if kind is int else 1
    evaluate = gentle(5000)
    model, inputs = small(WIDE), images()
    result = aap(model, inputs, evaluate=lambda m: convert(scale * evaluate(m)), objective=Objective(params=0.5)).run()
    assert all(entry.accuracy is None or type(entry.accuracy) is float for entry in result.history)
    assert (
        plain(result.history)[-1].params
        == plain(aap(model, inputs, evaluate=evaluate, objective=Objective(params=0.5)).run().history)[-1].params
    )


def widen(model, epochs, start_epoch):
    model[3] = nn.Conv2d(model[3].in_channels, 20, 3, stride=2)


def add_a_layer(model, epochs, start_epoch):
    model.append(nn.Linear(5, 5))


def parametrise(model, epochs, start_epoch):
    del model[0].bias
    model[0].bias = None


@pytest.mark.parametrize(
    ("train", "names"),
    [(widen, r"3\.bias, 3\.weight"), (add_a_layer, r"9\.bias, 9\.weight"), (parametrise, r"0\.bias")],
)
def test_a_training_that_changes_the_network(train, names):
    with pytest.raises(ValueError, match=f"train changed the network: {names}; it must keep names, shapes and dtypes"):
        aap(small(), train=train).run()


# ---- The state, and how a run goes on.


def cut_in(round_number, model, inputs, folder, **settings):
    """A run whose training fails in its call number `round_number`."""
    recorder = Recorder(fail_in=round_number)
    with pytest.raises(RuntimeError, match="the cluster is on fire"):
        aap(model, inputs, train=recorder, state=folder, **settings).run()
    return recorder


@pytest.mark.parametrize("objective", [Objective(max_accuracy_drop=0.3), Objective(params=0.2)], ids=["drop", "params"])
@pytest.mark.parametrize(("call", "rewind_weights"), [(1, False), (2, True), (3, False), (4, True), (6, False)])
def test_a_run_that_is_cut_goes_on_as_if_it_were_not(tmp_path, call, objective, rewind_weights):
    model, inputs = small(), images()
    settings = {"objective": objective, "rewind_weights": rewind_weights}
    whole = Recorder()
    expected = aap(model, inputs, train=whole, **settings).run()
    if len(whole.calls) < call:
        call = len(whole.calls)
    folder = tmp_path / "a run"
    cut_in(call, model, inputs, folder, **settings)
    rest = Recorder()
    result = aap(model, inputs, train=rest, state=folder, resume=True, **settings).run()
    assert_same_result(result, expected)
    assert rest.calls == whole.calls[call - 1 :]  # what was done is not done again
    finished = Recorder()
    assert_same_result(aap(model, inputs, train=finished, state=folder, resume=True, **settings).run(), expected)
    assert not finished.calls


def test_a_run_that_is_cut_in_every_training(tmp_path):
    model, inputs = small(), images()
    expected = aap(model, inputs).run()
    for _ in range(300):
        first = Recorder(fail_in=2)  # one training of each piece is done
        try:
            result = aap(model, inputs, train=first, state=tmp_path, resume=True).run()
            break
        except RuntimeError:
            assert (tmp_path / "state.json").exists()
    assert_same_result(result, expected)


def test_a_run_that_is_cut_in_evaluate(tmp_path):
    model, inputs = small(WIDE), images()
    expected = aap(model, inputs, trained=True).run()
    asked = []

    def evaluate(network):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return gentle(params_of(model))(network)

    with pytest.raises(KeyboardInterrupt):
        aap(model, inputs, evaluate=evaluate, state=tmp_path, trained=True).run()
    stored = json.loads((tmp_path / "state.json").read_text())
    assert sum(entry["accuracy"] is not None for entry in stored["history"]) == 2
    assert_same_result(aap(model, inputs, state=tmp_path, resume=True, trained=True).run(), expected)


def test_after_a_stop_by_rounds_a_run_goes_on(tmp_path):
    model, inputs = small(), images()
    expected = aap(model, inputs).run()
    aap(model, inputs, state=tmp_path, rounds=2).run()
    result = aap(model, inputs, state=tmp_path, resume=True).run()
    assert_same_result(result, expected)


def test_the_state_is_read_with_its_history_after_each_round(tmp_path):
    """After each line that is said, the folder holds what was said."""
    model, folder, seen = small(), tmp_path / "folder", []

    def say(line):
        stored = json.loads((folder / "state.json").read_text())
        seen.append(len(stored["history"]))
        for key in stored["networks"]:
            name = f"round-{int(key):04d}" if key.isdigit() else key
            assert (folder / f"{name}.safetensors").exists()

    result = aap(model, say=say, state=folder).run()
    assert seen == list(range(1, len(result.history) + 1))


def test_a_state_is_not_overwritten(tmp_path):
    model, inputs = small(), images()
    aap(model, inputs, state=tmp_path, rounds=1).run()
    before = (tmp_path / "state.json").read_bytes()
    recorder = Recorder()
    with pytest.raises(ValueError, match="holds a run; resume it, or name another folder"):
        aap(model, inputs, train=recorder, state=tmp_path)
    assert not recorder.calls
    assert (tmp_path / "state.json").read_bytes() == before


def test_resume_where_there_is_nothing_starts_afresh(tmp_path):
    model, inputs = small(), images()
    expected = aap(model, inputs).run()
    assert_same_result(aap(model, inputs, state=tmp_path / "new", resume=True).run(), expected)
    (tmp_path / "empty").mkdir()
    assert_same_result(aap(model, inputs, state=tmp_path / "empty", resume=True).run(), expected)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"epochs": 8}, "its epochs is 4, here it is 8"),
        ({"objective": Objective(params=0.2)}, "its objective max_accuracy_drop is 0.3, here it is null"),
        ({"rewind": 0.5}, "its start_epoch is 3, here it is 2"),
        ({"rewind_weights": True}, "its rewind_weights is false, here it is true"),
        ({"trained": True}, "its trained is false, here it is true"),
        ({"p": 2}, "its p is 1, here it is 2"),
        ({"reduction": "max"}, 'its reduction is "mean", here it is "max"'),
        ({"step": 0.5}, "its step is null, here it is 0.5"),
        ({"pinned": ("0",)}, "its pinned"),
        ({"model": (9, 12)}, "its tensors 0.weight is"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, changes, told):
    torch.manual_seed(0)
    model, inputs = small(), images()
    aap(model, inputs, state=tmp_path, rounds=1).run()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    settings = {"model": small(changes["model"]) if "model" in changes else model}
    settings |= {key: value for key, value in changes.items() if key != "model"}
    recorder = Recorder()
    with pytest.raises(ValueError, match=rf"is of another run: {told}"):
        aap(settings.pop("model"), inputs, train=recorder, state=tmp_path, resume=True, **settings).run()
    assert not recorder.calls
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_state_of_another_trained_network_is_refused(tmp_path):
    model, inputs = small(), images()
    aap(model, inputs, state=tmp_path, trained=True, rounds=1).run()
    with pytest.raises(ValueError, match="is of another run: its weights is"):
        aap(small(), inputs, state=tmp_path, trained=True, resume=True).run()


def test_a_damaged_state_is_refused(tmp_path):
    model, inputs = small(), images()
    aap(model, inputs, state=tmp_path, rounds=1).run()
    for name in ("round-0000.safetensors", "state.json"):
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(ValueError, match=rf"{name}: is (missing or )?damaged"):
            aap(model, inputs, state=tmp_path, resume=True).run()


def test_a_state_is_portable_between_objects_of_the_same_kind(tmp_path):
    """An untrained network's own weights do not matter once the run has begun: they are in the folder."""
    model, inputs = small(), images()
    expected = aap(model, inputs).run()
    cut_in(4, model, inputs, tmp_path)
    assert_same_result(aap(small(), inputs, state=tmp_path, resume=True).run(), expected)


def test_modes_and_frozen_parameters_are_kept():
    model = small(WIDE)
    model[0].weight.requires_grad_(False)
    result = aap(model, objective=Objective(params=0.5)).run()
    assert not result.model[0].weight.requires_grad
    assert result.model[3].weight.requires_grad
    assert trainers.params_of(result.model) < params_of(model)
