"""Squeeze-and-excitation put behind the convolutions of networks that nobody edited."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import paamops
from paamops import excitation, models, tracing
from paamops.excitation import Excitation, differentiable_twice, excitations, excite, install, remove
from paamops.packing import mask
from paamops.selection import select
from tests.methods.trainers import assert_same_tensors, images, small
from tests.networks import Depthwise, Residual, make
from tests.tolerances import NETWORK_TOLERANCE


def gate(module, a):
    """π of an Excitation for the activation a, in plain PyTorch."""
    hidden = F.relu(F.linear(a.mean((2, 3)), module.reduce.weight, module.reduce.bias))
    return torch.sigmoid(F.linear(hidden, module.expand.weight, module.expand.bias))[..., None, None]


class Block(nn.Module):
    """A residual block with everything written by functions."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.two, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head, self.activation = nn.Linear(6, 4), activation

    def forward(self, x):
        x = self.activation(self.norm1(self.one(x)))
        x = self.activation(x + self.norm2(F.conv2d(x, self.two.weight, padding=1)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("activation", "name"), [(F.relu, "relu"), (F.relu6, "relu6"), (F.silu, "none")])
def test_scales_after_norm_and_activation_and_before_the_sum(activation, name, train):
    model, x = Block(activation).double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    assert excite(model, x) == {"norm1": (4, name), "norm2": (4, "none")}
    model.train(train)
    plain = copy.deepcopy(model)
    remove(plain)
    y = plain.norm1(plain.one(x))
    if name != "none":
        y = activation(y)
    a = y * gate(model.norm1.excitation, y)
    a = a if name != "none" else activation(a)
    y = plain.norm2(F.conv2d(a, plain.two.weight, padding=1))
    expected = plain.head(activation(a + y * gate(model.norm2.excitation, y)).mean((2, 3)))
    torch.testing.assert_close(model(x), expected, **NETWORK_TOLERANCE[torch.float64])
    assert model.norm1.excitation.saliency.shape == (3, 6)
    torch.testing.assert_close(
        model.norm2.excitation.saliency, gate(model.norm2.excitation, y)[..., 0, 0], rtol=1e-9, atol=1e-9
    )


def test_names_and_values_that_were_there_do_not_change():
    model = small()
    before = copy.deepcopy(model.state_dict())
    excite(model, images())
    after = model.state_dict()
    assert before.keys() < after.keys()
    assert all(".excitation." in name for name in after.keys() - before.keys())
    assert all(torch.equal(before[name], after[name]) for name in before)
    remove(model)
    assert list(model.state_dict()) == list(before)
    assert not any(module._forward_hooks for module in model.modules())


NETWORKS = {
    "lenet5": 2, "resnet20": 19, "vgg16": 13, "resnet56": 55, "mobilenetv2": 52, "resnet50": 53, "shufflenet": 40,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_on_every_network(name):
    model = models.build(name, in_channels=1 if name == "lenet5" else 3)
    x = torch.randn(2, 1, 28, 28) if name == "lenet5" else torch.randn(2, 3, 32, 32)
    places = excite(model, x)
    assert len(places) == NETWORKS[name] == len(excitations(model))
    model.eval()
    channels = tracing.trace(model, x)
    scores = torch.rand(len(channels.sets))
    selection = select(channels, scores, params=0.6)
    packed, twin = paamops.pack(model, channels, selection), mask(model, channels, selection)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), twin(x), **NETWORK_TOLERANCE[torch.float32])
        assert all(each.saliency.shape[1] == each.expand.out_features for each in excitations(packed).values())


@pytest.mark.parametrize("network", [Residual, Depthwise])
def test_trained_through_the_op_and_through_plain_pytorch(network):
    model, inputs = make(network)
    excite(model, inputs)
    model.double().train()
    inputs = tuple(x.double() for x in inputs)

    def gradients():
        model.zero_grad()
        out = model(*inputs)
        sum(each.sin().sum() for each in tracing.leaves(out)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    found = gradients()
    with differentiable_twice():
        expected = gradients()
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_saved_loaded_copied_and_pickled(tmp_path):
    model = models.build("resnet20", in_channels=1)
    x = torch.randn(2, 1, 16, 16)
    excite(model, x)
    model(x)  # leaves saliencies with their graphs
    model.eval()
    channels = tracing.trace(model, x)
    packed = paamops.pack(model, channels, select(channels, torch.rand(len(channels.sets)), params=0.5))
    paamops.save(packed, tmp_path / "small.safetensors")
    loaded = paamops.load(tmp_path / "small.safetensors")
    assert_same_tensors(loaded, packed)
    assert torch.equal(loaded(x), packed(x))
    packed(x).sum().backward()
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for twin in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
        assert all(each.saliency is None for each in excitations(twin).values())
        assert torch.equal(twin(x), packed(x))


def test_compiled():
    model, x = small(), images()
    excite(model, x)
    model.eval()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), **NETWORK_TOLERANCE[torch.float32]
    )


def test_chosen_layers_and_hidden_units():
    model = small(widths=(8, 96))
    assert excite(model, images(), layers=["3"]) == {"4": (6, "relu")}
    assert list(excitations(model)) == ["4"]
    model = small(norm=False)
    assert excite(model, images()) == {"0": (4, "relu"), "3": (4, "relu")}  # nothing but the ReLU reads it
    model = small(widths=(8, 96))
    assert excite(model, images(), pinned=("0",), reduction=8) == {"4": (12, "relu")}


class Peculiar(nn.Module):
    """Its norm is called by keyword; what the ReLU reads is read by somebody else too."""

    def __init__(self, other):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)
        self.other = other

    def forward(self, x):
        y = self.norm(input=self.one(x))
        z = self.two(F.relu(y)).mean((2, 3))
        if self.other == "data":
            return z + y.data.mean()
        return (z, y) if self.other == "returned" else z


@pytest.mark.parametrize(("other", "name"), [("nobody", "relu"), ("data", "none"), ("returned", "none")])
def test_a_relu_that_is_not_the_only_reader_is_left_where_it_is(other, name):
    assert excite(Peculiar(other).eval(), images(), layers=["one"]) == {"norm": (4, name)}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.one = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)
        self.free, self.head = nn.Parameter(torch.randn(4, 1, 1, 1)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.again(F.relu(self.again(F.relu(self.first(x)))))
        return self.head(F.conv2d(F.relu(self.one(x)), self.free).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("head", "has no spatial size"),
        ("again", "runs 2 times"),
        ("one", "has one channel"),
        ("free", "runs as a function"),
        ("nobody", "is no layer"),
    ],
)
def test_layers_that_cannot(name, reason):
    model = Twice()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=f"layers names '{name}', which {reason}"):
        excite(model, images(), layers=["first", name])
    assert list(model.state_dict()) == before
    assert list(excite(model, images())) == ["first"]


def test_refused():
    model = small()
    with pytest.raises(TypeError, match="model is a list"):
        excite([], images())
    for reduction in (0, 2.0, True):
        with pytest.raises(ValueError, match="reduction is"):
            excite(model, images(), reduction=reduction)
    with pytest.raises(ValueError, match="no convolution that can get an excitation"):
        excite(models.build("lenet300-100", in_channels=1), torch.randn(2, 1, 28, 28))
    with pytest.raises(ValueError, match="places names '8'"):
        install(model, {"0": (4, "none"), "8": (4, "none")})
    with pytest.raises(ValueError, match="places gives '0' the activation 'gelu'"):
        install(model, {"0": (4, "gelu")})
    assert not excitations(model)
    excite(model, images())
    with pytest.raises(ValueError, match="places names '1', which has an excitation already"):
        install(model, {"1": (4, "none")})
    with pytest.raises(ValueError, match="has excitations already, at 1, 4"):
        excite(model, images())


def test_first_saliencies_leave_the_network_about_as_it_was():
    model = Excitation(32, 4)
    model(torch.randn(16, 32, 4, 4))
    assert 0.8 < float(model.saliency.detach().mean()) < 0.95
    assert excitation.OPEN == 2
