"""Scores folded into norms and weights compute what S ⊙ A computes, in value and in every gradient."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paamops import models, tracing
from paamops.methods import gating
from paamops.methods.gating import Gates
from paamops.packing import mask
from paamops.selection import select
from tests.kinks import Cuts
from tests.networks import NETWORKS, Repeated, make
from tests.tolerances import NETWORK_TOLERANCE

FAST = ("lenet5", "lenet300-100", "resnet20")
SLOW = ("resnet56", "resnet50", "vgg16", "mobilenetv2", "shufflenet")


class Named:
    """A network of the package as `make` takes those of tests/networks.py."""

    def __init__(self, name):
        self.name, self.__name__ = name, name
        self.inputs = (2, 1, 28, 28) if "lenet" in name else (2, 3, 32, 32) if name in SLOW else (2, 3, 12, 12)

    def __call__(self):
        return models.build(self.name, in_channels=self.inputs[1])


ZOO = [*NETWORKS, *map(Named, FAST), *(pytest.param(Named(n), marks=pytest.mark.slow, id=n) for n in SLOW)]


def random_scores(channels, dtype=torch.float64):
    scores = torch.rand(len(channels.pinned), dtype=dtype) + 0.2
    return scores.masked_fill(channels.pinned, 1).requires_grad_()


def products(model, channels, scores, inputs):
    """The outputs with S ⊙ A in every layer that reads A: the oracle, which knows nothing of norms and places.

    x · S read by a weight is x read by the weight, its input slices times S.
    """
    extended = torch.cat([scores.masked_fill(channels.pinned, 1), scores.new_ones(1)])
    tensors = tracing.named_tensors(model)
    scaled = {}
    for name, axes in channels.read_axes.items():
        for axis in axes:
            shape = [-1 if k == axis else 1 for k in range(tensors[name].dim())]
            factor = extended[torch.from_numpy(channels.axes[name][axis])].view(shape)
            tensor = scaled.get(name, tensors[name])
            scaled[name] = tensor * factor.to(tensor.dtype)
    return torch.func.functional_call(model, scaled, inputs)


def results(model, scores, outputs, seed=0):
    """The outputs, and the gradients of parameters and scores of a random combination of them."""
    generator = torch.Generator().manual_seed(seed)
    outputs = tracing.leaves(outputs)
    loss = sum((out.double() * torch.randn(out.shape, generator=generator).double()).sum() for out in outputs)
    wanted = [*model.parameters(), scores]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True))]


def assert_all_close(found, expected, tolerance=NETWORK_TOLERANCE[torch.float64]):
    """Each tensor within the tolerance of the largest of its elements."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        scale = 1 + float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance["rtol"], atol=tolerance["atol"] * scale)


def doubled(network):
    model, inputs = make(network)
    return model.double(), tuple(x.double() for x in inputs)


def in_place(gates, way, model, scores, inputs):
    with getattr(gates, way)(model, scores.masked_fill(gates.channels.pinned, 1)):
        return model(*inputs)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("network", ZOO, ids=lambda n: n.__name__)
def test_equals_the_product(network, train):
    model, inputs = doubled(network)
    channels = tracing.trace(model, inputs)
    gates, scores = Gates(model, channels), random_scores(channels)
    model.train(train)
    statistics = copy.deepcopy(model.state_dict())
    expected = results(model, scores, products(model, channels, scores, inputs))
    assert float(expected[-1].abs().max()) > 0
    model.load_state_dict(statistics)
    found = results(model, scores, in_place(gates, "placed", model, scores, inputs))
    assert_all_close(found, expected)
    if network is not Repeated:
        model.load_state_dict(statistics)
        assert_all_close(results(model, scores, in_place(gates, "explicit", model, scores, inputs)), expected)


@pytest.mark.parametrize("way", ["placed", "explicit"])
@pytest.mark.parametrize("network", [n for n in NETWORKS if n is not Repeated] + [Named("resnet20")])
def test_in_float32(network, way):
    model, inputs = make(network)
    channels = tracing.trace(model, inputs)
    scores = random_scores(channels, torch.float32)
    exact, exact_scores = copy.deepcopy(model).double(), scores.detach().double().requires_grad_()
    gates, cuts = Gates(model, channels), Cuts()
    with cuts:
        expected = products(exact, channels, exact_scores, tuple(x.double() for x in inputs))
    with cuts:
        outputs = in_place(gates, way, model, scores, inputs)
    assert cuts.noted
    assert cuts.calls == len(cuts.noted)
    expected, found = results(exact, exact_scores, expected), results(model, scores, outputs)
    assert all(t.dtype == torch.float32 for t in found)
    assert_all_close(found, expected, NETWORK_TOLERANCE[torch.float32])


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_of_a_network_written_by_hand(train):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.other = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 3)
            self.score = None

        def forward(self, x):
            x = F.relu(self.norm(self.one(x)))
            return self.other(x if self.score is None else x * self.score.view(1, -1, 1, 1))

    model, x = Block().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    channels = tracing.trace(model, x)
    gates, scores = Gates(model, channels), random_scores(channels)
    assert gates.norms == ["norm.weight"]
    model.train(train)
    model.score = scores[channels.sets[:5]]
    expected = results(model, scores, model(x))
    model.score = None
    for way in ("placed", "explicit"):
        assert_all_close(results(model, scores, in_place(gates, way, model, scores, (x,))), expected)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("network", [*NETWORKS, Named("resnet20")], ids=lambda n: n.__name__)
def test_a_score_of_zero_is_removal(network, train):
    model, inputs = doubled(network)
    channels = tracing.trace(model, inputs)
    keep = select(channels, torch.rand(len(channels.sets)), params=0.9).keep
    assert not keep.all()
    twin = mask(model, channels, keep).train(train)
    gates = Gates(model, channels)
    model.train(train)
    found = tracing.leaves(in_place(gates, "placed", model, keep.double(), inputs))
    assert_all_close(found, tracing.leaves(twin(*inputs)))
    ones = torch.ones(len(keep), dtype=torch.float64)
    found = tracing.leaves(in_place(gates, "placed", model, ones, inputs))
    expected = tracing.leaves(model(*inputs))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)  # times 1


def chain(act, *between):
    """Two convolutions with norms; `between` stands behind the first activation."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), act, *between, nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), act,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Blocks(nn.Module):
    """A stream that two branches read through a norm, and the head through a third; `raw`: a layer reads it bare."""

    def __init__(self, raw=False, concatenate=False):
        super().__init__()
        grown = 12 if concatenate else 6
        self.stem, self.raw = nn.Conv2d(1, 6, 3, padding=1), raw
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (6, 6, grown))
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.side = nn.Conv2d(6, 3, 1)
        self.head, self.concatenate = nn.Linear(grown, 3), concatenate

    def forward(self, x):
        x = self.stem(x)
        side = self.side(x).mean((2, 3)) if self.raw else 0
        inner = self.layers[0](F.relu(self.norms[0](x)))
        branch = self.layers[1](F.relu(self.norms[1](inner)))
        x = torch.cat([x, branch], 1) if self.concatenate else x + branch
        return self.head(F.relu(self.norms[2](x)).mean((2, 3))) + side


class Padded(nn.Module):
    """Option A: the shortcut pads the channels, so those of the wider stage are of two kinds."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 10, 3, padding=1, stride=2), nn.BatchNorm2d(10)
        self.outer, self.outer_norm = nn.Conv2d(10, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x)))))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3)))


class Scaled(nn.Module):
    """A branch that starts at zero, and behind it what does not let a factor through."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.branch, self.factor = nn.Conv2d(6, 4, 3), nn.Parameter(torch.zeros(()))
        self.skip, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        branch = self.branch(F.silu(self.norm(self.stem(x))))
        return self.head((self.skip(x) + self.factor * branch).mean((2, 3)))


def zero_head():
    model = chain(nn.SiLU())
    nn.init.zeros_(model[-1].weight)
    return model


def tied(*names):
    model = chain(nn.ReLU())
    for name in names:
        setattr(model[4], name, getattr(model[1], name))
    return model


def depthwise():
    return chain(nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6))


def deep(depth=16):
    """A norm after a norm, of which little is left to see behind many layers."""
    first = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU()]
    rest = [m for _ in range(depth) for m in (nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())]
    return nn.Sequential(*first, *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


ALL, NONE = ["1.weight", "4.weight"], []
AWKWARD = {
    "relu": (lambda: chain(nn.ReLU()), ALL),
    "leaky relu": (lambda: chain(nn.LeakyReLU(0.1)), ALL),
    "prelu": (lambda: chain(nn.PReLU()), ALL),
    "max pool": (lambda: chain(nn.ReLU(), nn.MaxPool2d(2)), ["1.weight", "5.weight"]),
    "relu6": (lambda: chain(nn.ReLU6()), NONE),
    "silu": (lambda: chain(nn.SiLU()), NONE),
    "gelu": (lambda: chain(nn.GELU()), NONE),
    "sigmoid": (lambda: chain(nn.Sigmoid()), NONE),
    "saturates late": (lambda: chain(Function(lambda x: x.clamp(0, 50))), NONE),
    "saturates once": (lambda: chain(nn.ReLU(), nn.Hardtanh(0, 30)), ["5.weight"]),
    "zero head": (zero_head, NONE),
    "zero branch": (Scaled, NONE),
    "a norm after a norm": (lambda: chain(nn.ReLU(), nn.BatchNorm2d(6)), ["5.weight"]),
    "a norm after a norm, bare": (lambda: chain(nn.ReLU(), nn.BatchNorm2d(6, affine=False)), ["5.weight"]),
    "a norm of another kind": (lambda: chain(nn.ReLU(), nn.InstanceNorm2d(6)), ["5.weight"]),
    "a norm after a depthwise": (depthwise, ["6.weight"]),
    "a norm after a norm, deep": (deep, sorted(f"{6 + 3 * k}.weight" for k in range(16))),
    "norms of tied weight": (lambda: tied("weight"), None),
    "norms of tied bias": (lambda: tied("bias"), None),
    "norms tied": (lambda: tied("weight", "bias"), None),
    "pre-activation": (Blocks, None),
    "pre-activation, read bare": (lambda: Blocks(raw=True), ["norms.1.weight"]),
    "dense": (lambda: Blocks(concatenate=True), None),
    "dense, read bare": (lambda: Blocks(raw=True, concatenate=True), ["norms.1.weight"]),
    "option A": (Padded, None),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_norms_serve_only_where_they_may(name):
    build, norms = AWKWARD[name]
    fresh, x = build(), torch.randn(6, 1, 10, 10)
    channels = tracing.trace(fresh, x)
    gates = Gates(fresh, channels)
    if norms is not None:
        assert sorted(gates.norms) == norms
    model, x = copy.deepcopy(fresh).double(), 3 * x.double()
    with torch.no_grad():  # as after a training
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.5 * torch.rand_like(tensor) * (1 if tensor.dim() < 2 else torch.randn(())))
    scores = random_scores(channels)
    for train in (True, False):
        model.train(train)
        expected = results(model, scores, products(model, channels, scores, (x,)))
        for way in ("placed", "explicit"):
            found = results(model, scores, in_place(gates, way, model, scores, (x,)))
            assert_all_close(
                found, expected, {"rtol": 1e-4, "atol": 1e-4} if train else NETWORK_TOLERANCE[torch.float64]
            )


def test_a_tied_layer_is_scaled_wherever_it_reads():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.other.weight, self.head = self.one.weight, nn.Linear(6, 2)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.head(F.relu(self.other(F.relu(self.one(x)))))

    model, x = Twice().double(), torch.randn(5, 4, dtype=torch.float64)
    channels = tracing.trace(model, x)
    scores = random_scores(channels)
    gates = Gates(model, channels)
    expected = results(model, scores, products(model, channels, scores, (x,)))
    for way in ("placed", "explicit"):
        assert_all_close(results(model, scores, in_place(gates, way, model, scores, (x,))), expected)


def test_a_weight_that_reads_along_both_of_its_axes():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.weight = nn.Parameter(torch.randn(5, 6) / 2)

        def forward(self, x):
            x = F.relu(F.linear(F.relu(self.first(x)), self.weight))
            return self.last(F.relu(F.linear(x, self.weight.t())))

    model, x = Autoencoder().double(), torch.randn(7, 4, dtype=torch.float64)
    channels = tracing.trace(model, x)
    assert channels.read_axes["weight"] == [0, 1]
    gates, scores = Gates(model, channels), random_scores(channels)
    expected = results(model, scores, products(model, channels, scores, (x,)))
    assert_all_close(results(model, scores, in_place(gates, "placed", model, scores, (x,))), expected)


class Fussy(nn.Module):
    """Runs in eval mode only, or in float32 only."""

    def __init__(self, train, double):
        super().__init__()
        self.inner, self.train_too, self.double_too = chain(nn.ReLU()), train, double

    def forward(self, x):
        if self.training and not self.train_too:
            raise RuntimeError("only for inference")
        if x.dtype == torch.float64 and not self.double_too:
            raise RuntimeError("no kernel for float64")
        return self.inner(x)


@pytest.mark.parametrize(("train", "double"), [(False, True), (True, False)])
def test_where_the_trial_does_not_run_nothing_is_assumed(train, double):
    model, x = Fussy(train, double).eval(), torch.randn(3, 1, 10, 10)
    channels = tracing.trace(model, x)
    gates, scores = Gates(model, channels), random_scores(channels, torch.float32)
    assert gates.norms == []
    expected = products(model, channels, scores, (x,))
    torch.testing.assert_close(
        in_place(gates, "placed", model, scores, (x,)), expected, **NETWORK_TOLERANCE[torch.float32]
    )


class Noisy(nn.Module):
    """Draws from every generator, writes into a buffer and into its input, and replaces a buffer."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = chain(nn.ReLU()), nn.Dropout(0.3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.count += 1
        if self.training and random.random() < 0.5:
            x = x + float(np.random.rand())  # noqa: NPY002
        self.last = self.last * 0.9 + x.detach().mean()
        x += 0.5
        return self.inner(self.drop(x))


def test_the_trial_leaves_no_trace():
    model, x = Noisy().double(), torch.randn(3, 1, 10, 10, dtype=torch.float64)
    model.train()
    model.inner[1].eval()
    model.inner[0].weight.requires_grad_(False)
    channels = tracing.trace(model, x)
    before = [module.training for module in model.modules()]
    held = {name: (tensor, tensor._version, tensor.clone()) for name, tensor in tracing.named_tensors(model).items()}
    given = x.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    gates = Gates(model, channels)
    assert sorted(gates.norms) == [
        "inner.1.weight",
        "inner.4.weight",
    ]  # the draws are the same in each run of the trial
    assert [module.training for module in model.modules()] == before
    for name, tensor in tracing.named_tensors(model).items():
        same, version, value = held[name]
        assert tensor is same, name
        assert tensor._version == version, name
        assert torch.equal(tensor, value), name
    assert torch.equal(x, given)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.inner[0].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_the_choice_of_norms_is_the_same_every_time():
    model = models.build("resnet20")
    channels = tracing.trace(model, torch.randn(2, 3, 12, 12))
    first = Gates(model, channels)
    torch.rand(3)
    second = Gates(model, channels)
    assert first.norms == second.norms
    assert len(first.norms) == 13
    assert [place.name for place in first.places] == [place.name for place in second.places]


@pytest.mark.parametrize("way", ["placed", "explicit"])
def test_an_exception_leaves_the_model_as_it_was(way):
    model, inputs = make(Named("resnet20"))
    channels = tracing.trace(model, inputs)
    gates = Gates(model, channels)
    held = tracing.named_tensors(model)
    with pytest.raises(KeyboardInterrupt), getattr(gates, way)(model, random_scores(channels, torch.float32)):
        raise KeyboardInterrupt
    now = tracing.named_tensors(model)
    assert all(now[name] is tensor for name, tensor in held.items())
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tied_parameters_are_replaced_in_all_places():
    model, inputs = doubled(Repeated)
    channels = tracing.trace(model, inputs)
    gates = Gates(model, channels)
    with gates.placed(model, random_scores(channels)):
        assert model.one.weight is model.other.weight
        assert not isinstance(model.one.weight, nn.Parameter)
    assert model.one.weight is model.other.weight
    assert isinstance(model.one.weight, nn.Parameter)


def test_the_explicit_gate_says_what_it_cannot_scale():
    model, inputs = doubled(Repeated)
    channels = tracing.trace(model, inputs)
    gates = Gates(model, channels)
    with (
        pytest.raises(ValueError, match="'weight' belongs to a Repeated"),
        gates.explicit(model, random_scores(channels)),
    ):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gather():
    index = torch.randint(0, 7, (40,))
    index[index == 3] = 2  # one that is not asked for
    gather, values = gating.Gather(index, 8), torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gather(values), values[index])
    weights = torch.randn(40, dtype=torch.float64)
    (found,) = torch.autograd.grad((gather(values) * weights).sum(), values)
    (expected,) = torch.autograd.grad((values[index] * weights).sum(), values)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(gather, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay(dtype):
    model, x = chain(nn.ReLU()).to(dtype), torch.randn(4, 1, 10, 10, dtype=dtype)
    channels = tracing.trace(model, x)
    gates, scores = Gates(model, channels), random_scores(channels, torch.float32)
    assert sorted(gates.norms) == ALL
    tensors = gates.tensors(model, scores)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    out = in_place(gates, "placed", model, scores, (x,))
    assert out.dtype == dtype
    (grad,) = torch.autograd.grad(out.sum(), scores)
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()
