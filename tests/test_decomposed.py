"""A network that calls channel_attention is traced, packed, masked and scored as its twin in plain torch is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paamops
from paamops import tracing
from paamops.ops.channel_attention import channel_attention
from tests.tolerances import NETWORK_TOLERANCE

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}


class Excitation(nn.Module):
    """Squeeze-and-excitation by the op, or in plain torch."""

    def __init__(self, channels, activation, fused):
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, 4), nn.Linear(4, channels)
        self.activation, self.fused = activation, fused

    def forward(self, x):
        if self.fused:
            parameters = self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias
            return channel_attention(x, *parameters, self.activation)[0]
        a = ACTIVATIONS[self.activation](x)
        s = torch.sigmoid(self.expand(F.relu(self.reduce(a.mean((2, 3))))))
        return a * s[:, :, None, None]


class Network(nn.Module):
    """A stem, and a residual block with an excitation after each of its norms: on its last before the sum."""

    def __init__(self, activation, fused):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.norm, self.last_norm = nn.BatchNorm2d(12), nn.BatchNorm2d(8)
        self.excitation = Excitation(12, activation, fused)
        self.last_excitation = Excitation(8, "none", fused)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.excitation(self.norm(self.first(x)))
        y = self.last_excitation(self.last_norm(self.second(y)))
        return self.head(F.relu(x + y).mean((2, 3)))


def twins(activation, dtype=torch.float64):
    """A network that calls the op, and the same in plain torch."""
    fused, plain = Network(activation, True).to(dtype).eval(), Network(activation, False).to(dtype).eval()
    plain.load_state_dict(fused.state_dict())
    return fused, plain, torch.randn(5, 3, 8, 8, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_traces_as_its_twin(activation):
    fused, plain, x = twins(activation)
    ours, right = paamops.trace(fused, x), paamops.trace(plain, x)
    assert torch.equal(ours.sets, right.sets)
    assert torch.equal(ours.pinned, right.pinned)
    assert ours.cost() == right.cost()
    assert ours.explain() == right.explain()
    assert [layer.name for layer in ours.layers] == [layer.name for layer in right.layers]
    names = {"excitation.reduce", "excitation.expand"}
    assert names < {layer.name for layer in ours.layers}
    assert "not known" not in ours.explain()
    assert ours.places == right.places


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packs_as_its_mask_and_its_twin(activation):
    fused, plain, x = twins(activation)
    channels, of_plain = paamops.trace(fused, x), paamops.trace(plain, x)
    keep = channels.pinned | (torch.rand(len(channels.pinned)) < 0.6)
    keep = keep | channels.guarded(torch.rand(len(keep), dtype=torch.float64))  # no layer is emptied
    small, twin = paamops.pack(fused, channels, keep), paamops.mask(fused, channels, keep)
    other = paamops.pack(plain, of_plain, keep)
    torch.testing.assert_close(small(x), twin(x), **NETWORK_TOLERANCE[torch.float64])
    torch.testing.assert_close(small(x), other(x), **NETWORK_TOLERANCE[torch.float64])
    assert channels.cost(keep) == of_plain.cost(keep)
    shapes = [tuple(tensor.shape) for tensor in small.parameters()]
    assert shapes == [tuple(tensor.shape) for tensor in other.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scores_as_its_twin(activation, dtype):
    fused, plain, x = twins(activation, dtype)
    ours = paamops.score(fused, paamops.trace(fused, x), x)
    right = paamops.score(plain, paamops.trace(plain, x), x)
    torch.testing.assert_close(ours, right, **NETWORK_TOLERANCE[torch.float32])


def test_scores_are_taken_beside_training():
    """The gradients of a step that is scored on the way are those of a step that is not."""
    fused, _, x = twins("relu")
    channels = paamops.trace(fused, x)
    wanted = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
    with paamops.ActivationAttention(channels) as attention:
        found = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, **NETWORK_TOLERANCE[torch.float64])
    torch.testing.assert_close(attention.scores(), paamops.score(fused, channels, x))


def test_what_the_formula_returns_is_what_the_op_returns():
    x = torch.randn(2, 6, 5, 5)
    parameters = torch.randn(4, 6), torch.randn(4), torch.randn(6, 4), torch.randn(6)
    for op, formula in tracing.IN_ATEN.items():
        ours, stands = op(x, *parameters, 1), formula(x, *parameters, 1)
        for mine, other in zip(ours, stands, strict=True):
            assert (mine.dtype, mine.stride()) == (other.dtype, other.stride())
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
