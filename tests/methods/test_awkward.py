"""AAP with networks, inputs and trainings that are not as plain as one would like."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import paamops
from paamops.methods.objective import Objective
from tests.methods.trainers import gentle, images, nudge, params_of, small, untouched
from tests.tolerances import assert_close


def run(model, inputs, objective=None, train=untouched, **settings):
    settings = {"evaluate": gentle(params_of(model)), "epochs": 4, "quiet": True, "trained": True} | settings
    return paamops.AAP(model, inputs, train=train, objective=objective or Objective(params=0.5), **settings).run()


class Squeezed(nn.Module):
    """`squeeze` drops the batch dimension too where the batch is of one."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(1, 8, 3), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x)).amax((2, 3), keepdim=True).squeeze()
        return self.two(torch.relu(self.one(x)))


def test_a_batch_of_one_that_takes_another_path():
    model, inputs = Squeezed(), images(8)
    result = run(model, inputs)
    expected = paamops.score(model, paamops.trace(model, inputs), inputs)
    assert_close(result.attention["before"], expected.cpu(), torch.float32)


class Looped(nn.Module):
    """Runs its images one by one: the ops that run depend on the size of the batch."""

    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x):
        return torch.cat([self.net(image[None]) for image in x])


def test_a_forward_pass_that_depends_on_the_batch_size_is_refused_before_the_training():
    trained = []
    with pytest.raises(RuntimeError, match="another path than the traced one"):
        run(Looped(), images(8), train=lambda *call: trained.append(call), trained=False)
    assert not trained
    assert run(Looped(), images(2)).met


class Table(nn.Module):
    """A second input that is no batch but has as many rows."""

    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x, table):
        return self.net(x + table)


def test_inputs_that_share_a_first_size_by_chance():
    assert run(Table(), (images(8), torch.randn(8, 8))).met


def test_a_forward_pass_that_changes_its_input_leaves_the_users_tensor_alone():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            x -= 0.5
            return self.net(x)

    inputs = images(8)
    before = inputs.clone()
    run(Shifts(), inputs)
    assert torch.equal(inputs, before)


def test_a_list_of_inputs_is_refused():
    with pytest.raises(TypeError, match="example_inputs is a list; it must be a tensor or a tuple"):
        run(small(), [images(8)])


def freeze_and_mark(model, epochs, start_epoch):
    """A training that leaves more than weights on the network it is given."""
    nudge(model, epochs, start_epoch)
    if start_epoch == 0:
        model[0].weight.requires_grad_(False)
        model.left_behind = True
        model.register_forward_hook(lambda *call: None)


def test_what_the_first_training_leaves_on_its_network_does_not_reach_the_others():
    model = small()
    result = run(model, images(8), train=freeze_and_mark, trained=False)
    for network in (result.model, result.dense, model):
        assert network[0].weight.requires_grad
        assert not hasattr(network, "left_behind")
        assert not network._forward_hooks


def dead_network():
    """Half of the second layer's filters are dead; the others differ."""
    model = small(widths=(8, 40), norm=False)
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.abs_()
            layer.bias.copy_(torch.linspace(0.1, 2, len(layer.bias)))
        model[3].weight[:20].mul_(-1)
        model[3].bias[:20] = -100
    return model


def test_the_first_step_is_the_lowest_that_removes_something_even_among_dead_filters():
    model, inputs = dead_network(), images(8).abs()
    whole, calls = params_of(model), []

    def evaluate(network):  # the unpruned one, then the first pruned one, which has lost its dead filters
        calls.append(params_of(network))
        return 0.0 if len(calls) == 2 else 1.0

    result = run(model, inputs, Objective(max_accuracy_drop=0.1), evaluate=evaluate, rounds=3)
    history = result.history
    assert (history[1].threshold, history[1].outcome) == (0.0, "rolled back")
    assert history[2].step > 0
    assert history[2].params <= 0.81 * whole
    assert history[2].params > 0.4 * whole


def test_a_training_that_diverges_is_rolled_back():
    calls = []

    def train(model, epochs, start_epoch):
        calls.append(epochs)
        if len(calls) == 2:
            with torch.no_grad():
                model[0].weight.fill_(float("nan"))

    result = run(small((16, 16)), images(8), Objective(params=0.3), train=train, evaluate=lambda model: 0.5)
    assert result.met
    assert "rolled back" in [entry.outcome for entry in result.history]
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())


class BreaksAtOne(nn.Module):
    """Runs at all widths but one: `squeeze` then drops the channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).amax((2, 3), keepdim=True).squeeze())


def test_a_network_that_cannot_be_packed_any_smaller_ends_the_run():
    result = run(BreaksAtOne(), images(8), Objective(max_accuracy_drop=9.0), evaluate=lambda model: 1.0)
    assert result.met
    assert "cannot be packed" in result.message
    assert result.model.conv.out_channels == 2


def test_a_gain_that_is_asked_for_is_not_met_by_the_unpruned_network():
    model = small((16, 16))
    whole = params_of(model)
    objective = Objective(max_accuracy_drop=-0.1, params=1.0)
    result = run(model, images(8), objective, evaluate=lambda network: 1.0 if params_of(network) == whole else 1.2)
    assert result.met
    assert params_of(result.model) < whole


def test_numpys_numbers_are_as_good_as_pythons(tmp_path):
    objective = Objective(max_accuracy_drop=np.float32(0.5), params=np.int64(400))
    settings = {"epochs": np.int64(4), "seed": np.int64(1), "step": np.float32(0.5), "state": tmp_path}
    model = small()
    run(model, images(8), objective, **settings, evaluate=lambda network: np.float32(0.5))
    assert json.loads((tmp_path / "state.json").read_text())["settings"]["seed"] == 1


def test_a_resumed_run_shares_its_context(tmp_path):
    model, inputs = small(), images(8)
    run(model, inputs, state=tmp_path, context={"rate": 0.1})
    with pytest.raises(ValueError, match=r"its context rate is 0.1, here it is 0.2"):
        run(model, inputs, state=tmp_path, resume=True, context={"rate": 0.2})


def test_the_first_training_is_kept_when_the_evaluation_fails(tmp_path):
    model, inputs, calls = small(), images(8), []

    def train(network, epochs, start_epoch):
        calls.append((epochs, start_epoch))

    settings = {"train": train, "state": tmp_path, "trained": False, "rounds": 1}
    with pytest.raises(TypeError, match="evaluate returned a NoneType"):
        run(model, inputs, **settings, evaluate=lambda network: None)
    assert calls == [(4, 0)]
    run(model, inputs, **settings, resume=True)
    assert calls == [(4, 0), (1, 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "7"}, "seed is '7'"),
        ({"seed": -1}, "seed is -1"),
        ({"step": True}, "step is True"),
        ({"say": 3}, "say"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(small(), images(8), **settings)
