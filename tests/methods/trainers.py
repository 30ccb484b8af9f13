"""Toy networks, and trainings and evaluations that steer a run of AAP exactly and cost nothing."""

from dataclasses import replace

import torch
from torch import nn

import paamops
from paamops.methods import policy


def small(widths=(8, 12), norm=True, classes=5):
    """Two convolutions and a linear layer over 1x8x8 images; parameters away from their trivial start."""
    first, second = widths
    norms = [nn.BatchNorm2d(width) if norm else nn.Identity() for width in widths]
    model = nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(first, second, 3, stride=2), norms[1],
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, classes),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.rand_like(parameter))
    return model


def images(count=8):
    return torch.randn(count, 1, 8, 8)


def params_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def untouched(model, epochs, start_epoch):
    """A training that learns nothing."""


def nudge(model, epochs, start_epoch):
    """A training that draws from torch's generator: another seed, another network."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1 + 0.1 * float(torch.rand(())))
            else:
                buffer.add_(epochs)


class Recorder:
    """A training that notes its calls and passes them on."""

    def __init__(self, train=nudge, fail_in=None):
        self.train, self.calls, self.fail_in = train, [], fail_in

    def __call__(self, model, epochs, start_epoch):
        self.calls.append((params_of(model), epochs, start_epoch, model.training))
        if self.fail_in is not None and len(self.calls) == self.fail_in:
            raise RuntimeError("the cluster is on fire")
        self.train(model, epochs, start_epoch)


def at_least(limit):
    """An evaluation that is right as long as `limit` parameters are left, and wrong below."""
    return lambda model: 1.0 if params_of(model) >= limit else 0.0


def gentle(whole):
    """An evaluation that falls smoothly with the parameters: 1 for all of `whole`, 0 for none."""
    return lambda model: 1 - (1 - params_of(model) / whole) ** 2


class Patience:
    """Takes the lines of a run, and fails where it does not end by itself."""

    def __init__(self, rounds=400):
        self.lines, self.rounds = [], rounds

    def __call__(self, line):
        self.lines.append(line)
        assert len(self.lines) < self.rounds, "the run does not end"


def aap(model, inputs=None, *, train=nudge, evaluate=None, objective=None, epochs=4, **settings):
    """An AAP with toys for what is not given."""
    inputs = images() if inputs is None else inputs
    evaluate = gentle(params_of(model)) if evaluate is None else evaluate
    objective = paamops.Objective(max_accuracy_drop=0.3) if objective is None else objective
    settings = {"quiet": True, "say": Patience(), **settings}
    return paamops.AAP(model, inputs, train=train, evaluate=evaluate, objective=objective, epochs=epochs, **settings)


def plain(history):
    """A history without what differs from run to run: the seconds."""
    return [replace(entry, seconds=0.0) for entry in history]


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_tensors(one, other):
    """Two networks have the same tensors, bit for bit."""
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_same_result(one, other):
    """Two results are the same, but for the seconds."""
    assert plain(one.history) == plain(other.history)
    assert (one.met, one.chosen) == (other.met, other.chosen)
    assert torch.equal(one.keep, other.keep)
    assert_same_tensors(one.model, other.model)
    assert_same_tensors(one.dense, other.dense)
    for name in ("before", "after"):
        torch.testing.assert_close(one.attention[name], other.attention[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one.thresholds[name], other.thresholds[name])


def check_result(result, objective, example):
    """What holds of every run: the history, the choice and the network go together."""
    history = result.history
    start, whole = history[0], result.channels.cost()
    assert (start.number, start.origin, start.outcome) == (0, None, "start")
    assert (start.params, start.flops, start.filters) == (whole.params, whole.flops, whole.filters)
    first = history[2].step if len(history) > 2 else None
    if first and history[1].outcome == "rolled back":
        first *= 2
    for number, entry in enumerate(history[1:], 1):
        step = policy.next_step(history[:number], objective, first)
        before = history[policy.trained(history, step.origin)]
        assert entry.number == number
        assert entry.origin == step.origin
        if not step.land:
            assert (entry.threshold, entry.step) == (step.threshold, step.step)
        assert 0 <= entry.base <= entry.threshold
        assert entry.filters <= before.filters
        if entry.outcome == "skipped":
            assert (entry.params, entry.flops, entry.filters) == (before.params, before.flops, before.filters)
            assert entry.accuracy is None
        elif entry.outcome == "accepted":
            assert entry.filters < before.filters
            assert objective.accuracy_met(entry.accuracy, start.accuracy)
        else:
            assert entry.outcome == "rolled back"
            assert entry.accuracy is None or not objective.accuracy_met(entry.accuracy, start.accuracy)
    chosen = history[result.chosen]
    assert chosen.outcome in ("start", "accepted")
    assert result.met == (
        objective.sizes_met(chosen, start) and objective.accuracy_met(chosen.accuracy, start.accuracy)
    )
    assert ("The objective is met" in result.message) == result.met
    assert ("The objective is not met" in result.message) == (not result.met)
    cost = result.channels.cost(result.keep)
    assert (cost.params, cost.flops, cost.filters) == (chosen.params, chosen.flops, chosen.filters)
    example = example if isinstance(example, tuple) else (example,)
    for model, expected in ((result.model, cost), (result.dense, whole)):
        assert not any(module.training for module in model.modules())
        assert paamops.trace(model, example).cost()[:3] == expected[:3]
    gone = ~result.keep[result.channels.sets]
    assert torch.equal(result.attention["after"].isnan(), gone)
    assert result.attention["before"].isfinite().all()
    for name in ("before", "after"):
        assert result.thresholds[name].shape == (len(result.channels.layers),)
