"""score against activations taken by hand."""

import socket

import pytest
import torch
import torch.nn.functional as F

import paamops
from tests import networks
from tests.tolerances import NETWORK_TOLERANCE

CLOSE = NETWORK_TOLERANCE[torch.float32]


def attention(x, p, reduction):
    a = x.double().abs() ** p
    over = tuple(range(2, x.dim()))
    a = {"mean": a.mean, "max": a.amax, "sum": a.sum}[reduction](over) if over else a
    return a.mean(0)


def residual_activations(model, x):
    """The activation that belongs to each layer of the network, in the order of the layers."""
    stem = F.relu(model.norms[0](model.stem(x)))
    a = F.relu(model.norms[1](model.a(stem)))
    b = F.relu(stem + model.norms[2](model.b(a)))
    c = F.relu(model.c(b))
    d = F.relu(model.d(c) + model.project(b))
    return [stem, a, b, c, d, d, model.head(d.mean((2, 3)))]


@pytest.mark.parametrize(("p", "reduction"), [(1, "mean"), (2, "sum"), (1.5, "max")])
def test_the_activation_is_the_one_that_is_read(p, reduction):
    model, _ = networks.make(networks.Residual)
    x = torch.randn(5, 3, 8, 8)
    channels = paamops.trace(model, x[:1])
    scores = paamops.score(model, channels, x, p=p, reduction=reduction)
    with torch.no_grad():
        expected = torch.cat([attention(a, p, reduction) for a in residual_activations(model, x)])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, **CLOSE)


def test_after_a_concatenation_a_layer_finds_its_own_channels():
    model, inputs = networks.make(networks.Dense)
    channels = paamops.trace(model, inputs)
    scores = paamops.score(model, channels, inputs)
    with torch.no_grad():
        x = model.stem(inputs[0])
        first = F.relu(model.norms[0](x))
        x = torch.cat([x, model.layers[0](first)], 1)
        second = F.relu(model.norms[1](x))
        x = torch.cat([x, model.layers[1](second)], 1)
        third = F.relu(model.norms[2](x))
    expected = torch.cat([attention(a, 1, "mean") for a in (first, second[:, 6:], third[:, 10:])])
    torch.testing.assert_close(scores[:14].double(), expected, **CLOSE)


def test_a_layer_used_twice_has_the_mean_of_its_uses():
    model, inputs = networks.make(networks.Repeated)
    channels = paamops.trace(model, inputs)
    scores = paamops.score(model, channels, inputs)
    with torch.no_grad():
        once = F.relu(model.twice(F.relu(model.left(inputs[0]))))
        again = F.relu(model.twice(once))
    expected = (attention(once, 1, "mean") + attention(again, 1, "mean")) / 2
    torch.testing.assert_close(scores[16:24].double(), expected, **CLOSE)


def test_a_sequence_is_averaged_over_its_tokens():
    model, inputs = networks.make(networks.Perceptron)
    channels = paamops.trace(model, inputs)
    scores = paamops.score(model, channels, inputs)
    with torch.no_grad():
        activation = F.gelu(model[0](inputs[0]))
    torch.testing.assert_close(scores[:9], activation.abs().mean((0, 1)), **CLOSE)


def test_batches_add_up_to_the_whole():
    model, _ = networks.make(networks.Residual)
    x = torch.randn(7, 3, 8, 8)
    channels = paamops.trace(model, x[:1])
    whole = paamops.score(model, channels, x)
    parts = paamops.score(model, channels, [x[:2], (x[2:3],), {"x": x[3:]}])
    torch.testing.assert_close(parts, whole, **CLOSE)
    with torch.no_grad(), paamops.ActivationAttention(channels) as watch:  # in anyone's loop
        model(x[:4])
        model(x[4:])
    torch.testing.assert_close(watch.scores(), whole, **CLOSE)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_scoring_while_training_leaves_the_gradients_alone():
    model, _ = networks.make(networks.Residual)
    x = torch.randn(4, 3, 8, 8)
    channels = paamops.trace(model, x)
    model.train()
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with paamops.ActivationAttention(channels) as watch:
        model(x).square().mean().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert watch.scores().isfinite().all()
    assert not watch.scores().requires_grad


def test_the_model_is_left_in_its_mode():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    model.train()
    before = model.norms[0].running_mean.clone()
    paamops.score(model, channels, inputs)
    assert model.training
    assert torch.equal(model.norms[0].running_mean, before)


def test_errors():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    for nothing in ([], inputs[0][:0], [inputs[0][:0]]):
        with pytest.raises(ValueError, match=r"inputs .* it must hold at least one"):
            paamops.score(model, channels, nothing)
    some = paamops.score(model, channels, [inputs[0], inputs[0][:0]])
    torch.testing.assert_close(some, paamops.score(model, channels, inputs))
    with paamops.ActivationAttention(channels) as watch, pytest.raises(RuntimeError, match="no images were seen"):
        watch.scores()
    with pytest.raises(ValueError, match="p"):
        paamops.score(model, channels, inputs, p=0.5)
    with pytest.raises(ValueError, match="reduction is 'median'"):
        paamops.score(model, channels, inputs, reduction="median")
    other, _ = networks.make(networks.Plain)
    with pytest.raises(RuntimeError, match="another path than the traced one"):
        paamops.score(other, channels, torch.randn(2, 3, 8, 8))
    assert not other._forward_hooks
    with pytest.raises(RuntimeError, match=r"channels"):
        paamops.score(model, channels, torch.randn(2, 4, 8, 8))  # the model's own error, and no mode left behind
    torch.testing.assert_close(paamops.score(model, channels, inputs), paamops.score(model, channels, inputs))


class Branching(torch.nn.Module):
    """Side branches, checks, dropout, and another path when asked."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 3))
        self.drop, self.more = torch.nn.Dropout(), False

    def forward(self, x):
        if self.more:
            F.relu(self.c(x))
        h = F.relu(self.a(x))
        assert not torch.isnan(h.sum((1, 2, 3))).any()
        (h * 100).mean((1, 2, 3))
        h.pow(2)
        k = self.drop(self.b(h))
        return k * torch.sigmoid(k)


def test_side_branches_are_not_the_activation():
    model, x = Branching().eval(), torch.randn(2, 3, 6, 6)
    scores = paamops.score(model, paamops.trace(model, x), x)
    with torch.no_grad():
        expected = attention(F.relu(model.a(x)), 1, "mean")
    torch.testing.assert_close(scores[:8].double(), expected, **CLOSE)


class ReadTwice(torch.nn.Module):
    """A layer whose output is read as it is, and only then behind an activation that was computed before."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))

    def forward(self, x):
        h = self.a(x)
        q = F.relu(h)
        return self.b(h) + self.c(q)


def test_the_first_read_decides():
    model, x = ReadTwice().eval(), torch.randn(2, 3, 6, 6)
    scores = paamops.score(model, paamops.trace(model, x), x)
    with torch.no_grad():
        expected = attention(model.a(x), 1, "mean")
    torch.testing.assert_close(scores[:8].double(), expected, **CLOSE)


def test_another_path_is_refused_not_scored():
    model, x = Branching().eval(), torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    model.more = True
    with pytest.raises(RuntimeError, match="another path than the traced one"):
        paamops.score(model, channels, x)
    model.more = False
    with paamops.ActivationAttention(channels) as watch, pytest.raises(RuntimeError, match="eval mode"):
        model.train()(x)  # dropout multiplies, too
    with pytest.raises(RuntimeError, match="no images were seen"):
        watch.scores()


def test_a_process_without_images_can_merge():
    model, x = Branching().eval(), torch.randn(2, 3, 6, 6)
    watch = paamops.ActivationAttention(paamops.trace(model, x))
    assert watch.total.shape == watch.channels.place_offsets[-1:]


def _process(rank, port, result):
    torch.manual_seed(0)
    model, _ = networks.make(networks.Residual)
    x = torch.randn(6, 3, 8, 8)
    channels = paamops.trace(model, x[:1])
    whole = paamops.score(model, channels, x)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with torch.no_grad(), paamops.ActivationAttention(channels) as watch:
        model(x[:2] if rank == 0 else x[2:])
    watch.merge()
    torch.distributed.destroy_process_group()
    result[rank] = float((watch.scores() - whole).abs().max())


@pytest.mark.slow
def test_two_processes_merge_into_the_scores_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        result = manager.dict()
        torch.multiprocessing.spawn(_process, (port, result), nprocs=2)
        assert max(result.values()) < 1e-6
