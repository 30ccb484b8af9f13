"""The score network against its formula written plainly in float64; what it promises of starts, sharing and state."""

import copy
import math

import pytest
import torch
from torch import nn

from paamops import models, tracing
from paamops.methods.score_network import ScoreNetwork
from tests.networks import NETWORKS, Depthwise, Perceptron, Residual, Upscale, make

VARIANTS = [
    {"attention": attention, "activation": activation}
    for attention in ("additive", "dot")
    for activation in ("leaky_exponential", "sigmoid")
]


class Grouped(nn.Sequential):
    """Grouped convolutions, a transposed one among them."""

    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, groups=2), nn.ReLU(),
            nn.Conv2d(12, 10, 3, groups=2), nn.ReLU(), nn.Conv2d(10, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


def filters(module):
    """The filters of a layer as rows, one at a time: every weight that an output channel is computed with."""
    weight = module.weight.detach().double()
    if not isinstance(module, nn.ConvTranspose2d):
        return torch.stack([row.flatten() for row in weight])
    rows = []
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    for out in range(module.out_channels):
        group = out // outputs
        rows.append(weight[group * inputs : (group + 1) * inputs, out % outputs].flatten())
    return torch.stack(rows)


def oracle(model, channels, network, projection, value, bias):
    """Scores (F,) and the sum, by loops over layers, sets and filters."""
    modules = dict(model.named_modules())
    x, row, begin = {}, 0, 0
    for number, layer in enumerate(channels.layers):
        own = range(channels.offsets[number], channels.offsets[number + 1])
        if all(channels.pinned[channels.sets[f]] for f in own):
            continue
        rows = filters(modules[layer.name]).float().double()
        assert len(rows) == len(own)
        rows = (rows - rows.mean()) / rows.std(correction=0)
        weight = projection[begin : begin + rows.shape[1]]
        q, k = rows @ weight[:, : network.width], rows @ weight[:, network.width :]
        for i, f in enumerate(own):
            if network.attention == "additive":
                x[f] = bias[row] + sum(value[row] @ torch.tanh(q[i] + k[j]) for j in range(len(own))) / len(own)
            else:
                x[f] = bias[row] + (value[row] * q[i] * k.mean(0)).sum()
        begin, row = begin + rows.shape[1], row + 1
    scores = []
    for f, s in enumerate(channels.sets.tolist()):
        shared = [x[g] for g in x if channels.sets[g] == s]
        if channels.pinned[s] or f not in x:
            scores.append(torch.ones((), dtype=torch.float64))
        elif network.activation == "sigmoid":
            scores.append(torch.sigmoid(sum(shared) / len(shared) / network.temperature))
        else:
            mean = sum(shared) / len(shared)
            scores.append(mean.exp() if mean <= 0 else 1 + network.slope * mean)
    return torch.stack(scores), sum(scores[f] for f in x)


def made(network, **settings):
    model, inputs = make(network)
    channels = tracing.trace(model, inputs)
    return model, channels, ScoreNetwork(model, channels, **{"width": 5, **settings})


def scatter(network):
    """Parameters away from their start."""
    with torch.no_grad():
        network.value.normal_()
        network.bias.add_(0.3 * torch.randn_like(network.bias))
    return network


def centre(network, channels):
    """Biases that put the attention of the free filters around 0: leaky exponentials lie on both sides of 1."""
    with torch.no_grad():
        scores, _ = network()
        attention = torch.where(scores > 1, (scores - 1) / network.slope, scores.log())
        network.bias.sub_(attention[~channels.pinned[channels.sets]].mean())


def gradients(network, parameters, scores, total, weights):
    loss = (scores * weights.to(scores.dtype)).sum() + 0.7 * total
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("network", [Residual, Depthwise, Upscale, Perceptron, Grouped])
def test_against_the_formula(network, settings):
    model, channels, attention = made(network, slope=0.2, temperature=1.7, **settings)
    scatter(attention)
    if settings["activation"] == "leaky_exponential":
        centre(attention, channels)
    scores, total = attention()
    parameters = [attention.projection, attention.value, attention.bias]
    exact = [parameter.detach().double().requires_grad_() for parameter in parameters]
    expected, expected_total = oracle(model, channels, attention, *exact)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-4, atol=1e-5)
    if settings["activation"] == "leaky_exponential":
        assert (scores > 1).any()
        assert (scores < 1).any()
    weights = torch.randn(len(scores), dtype=torch.float64)
    found = gradients(attention, parameters, scores, total, weights)
    for one, other in zip(found, gradients(attention, exact, expected, expected_total, weights), strict=True):
        scale = float(other.abs().max())
        assert scale > 0
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("network", NETWORKS)
def test_every_score_starts_at_one(network, settings):
    _, channels, attention = made(network, **settings)
    scores, total = attention()
    assert scores.shape == channels.sets.shape
    if settings["activation"] == "sigmoid":
        start = torch.full((len(scores),), 1 / (1 + math.exp(-4)))
        torch.testing.assert_close(scores, torch.where(channels.pinned[channels.sets], 1.0, start))
    else:
        assert torch.equal(scores, torch.ones(len(scores)))
        assert total.item() == sum(attention.heights)
    assert not attention.has_learned()


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("network", NETWORKS)
def test_coupled_filters_share_and_pinned_ones_stay(network, settings):
    _, channels, attention = made(network, **settings)
    scores, _ = scatter(attention)()
    pinned = channels.pinned[channels.sets]
    assert torch.equal(scores[pinned], torch.ones(int(pinned.sum())))
    with_attention = torch.zeros(len(scores), dtype=torch.bool)
    with_attention[attention.share.filters] = True
    for s in (~channels.pinned).nonzero().flatten().tolist():
        own = scores[(channels.sets == s) & with_attention]
        assert len(own)
        assert (own == own[0]).all()
        assert own[0] != 1
    assert with_attention[~pinned].all()  # and so the first filter of a set speaks for it
    assert scores[~pinned].unique().numel() > 0.9 * int((~channels.pinned).sum())  # not one for all
    assert attention.has_learned()


def test_the_gradient_is_shared_by_coupled_filters():
    """A loss of one filter's score moves the attention of all layers that its set lies in."""
    _, channels, attention = made(Residual)
    scores, _ = scatter(attention)()
    names = [layer.name for layer in attention.layers]
    first = int(channels.offsets[[layer.name for layer in channels.layers].index("stem")])
    (grad,) = torch.autograd.grad(scores[first], attention.bias)
    touched = {name for name, g in zip(names, grad.tolist(), strict=True) if g}
    assert touched == {"stem", "b"}
    assert grad[names.index("stem")] == grad[names.index("b")]
    slope = float(scores[first]) if scores[first] <= 1 else attention.slope
    assert float(grad.sum()) == pytest.approx(slope, rel=1e-5)


def test_standardised():
    """The scale of a layer's filters and their common offset do not matter; a constant layer is as good as zeros."""
    model, _, attention = made(Residual)
    before, _ = scatter(attention)()
    with torch.no_grad():
        model.a.weight.mul_(37).add_(3)
        model.d.weight.mul_(0.01)
    after, _ = attention()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.a.weight.fill_(0.1)
    assert attention()[0].isfinite().all()


def test_it_looks_at_the_filters_of_now():
    model, channels, attention = made(Residual)
    before, _ = scatter(attention)()
    with torch.no_grad():
        model.a.weight.normal_()
    after, _ = attention()
    layer = [layer.name for layer in channels.layers].index("a")
    changed = (after != before).nonzero().flatten()
    assert set(channels.filters[changed].tolist()) == {layer}
    assert len(changed) == 6
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.a.weight.normal_()
    attention.use(other)
    assert not torch.equal(attention()[0], after)
    attention.use(model)
    assert torch.equal(attention()[0], after)


def test_the_network_is_not_part_of_it_and_gets_no_gradient():
    model, _, attention = made(Residual)
    assert set(dict(attention.named_parameters())) == {"projection", "value", "bias"}
    assert set(attention.state_dict()) == {"projection", "value", "bias"}
    scores, total = scatter(attention)()
    (scores.square().sum() + total).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in attention.parameters())


@pytest.mark.parametrize("name", ["value", "bias"])
def test_has_learned(name):
    _, _, attention = made(Residual)
    with torch.no_grad():
        attention.projection.normal_()  # which decides nothing as long as the other two are as they were
        assert not attention.has_learned()
        getattr(attention, name)[-1] += 0.1
    assert attention.has_learned()


def test_layers_that_are_pinned_as_a_whole_have_no_attention():
    model, inputs = make(Residual)
    channels = tracing.trace(model, inputs, pinned=("a",))
    attention = ScoreNetwork(model, channels)
    assert [layer.name for layer in attention.layers] == ["stem", "b", "c", "d", "project"]
    scores, total = scatter(attention)()
    a = channels.filters == [layer.name for layer in channels.layers].index("a")
    assert torch.equal(scores[a], torch.ones(6))
    torch.testing.assert_close(total, scores[attention.share.filters].sum())


def test_deep_copy_and_state():
    model, channels, attention = made(Residual)
    before, _ = scatter(attention)()
    twin = copy.deepcopy(attention)
    with torch.no_grad():
        attention.bias.add_(1)
    assert torch.equal(twin()[0], before)
    assert not torch.equal(attention()[0], before)
    fresh = ScoreNetwork(model, channels, width=5)
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(fresh()[0], before)


def test_deep_copy_beside_its_network_looks_at_the_copy():
    model, _, attention = made(Residual)
    scatter(attention)
    pair = copy.deepcopy(nn.ModuleList([model, attention]))
    before = attention()[0]
    with torch.no_grad():
        pair[0].a.weight.normal_()
    assert not torch.equal(pair[1]()[0], before)
    assert torch.equal(attention()[0], before)


def test_to_float64():
    model, channels, attention = made(Residual)
    attention = scatter(attention).to(torch.float64)
    scores, total = attention()
    assert scores.dtype == total.dtype == torch.float64
    exact, exact_total = oracle(model, channels, attention, attention.projection, attention.value, attention.bias)
    torch.testing.assert_close(scores, exact, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(total, exact_total, rtol=1e-9, atol=1e-11)


def test_to_a_device():
    """Parameters and the mask of pinned filters move; what is held beside them follows when it is needed."""
    _, _, attention = made(Residual)
    moved = attention.to("meta")
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}


def test_in_low_precision_filters_and_under_autocast():
    model, _, attention = made(Residual)
    scatter(attention)
    model.bfloat16()
    assert attention()[0].dtype == torch.float32
    plain = attention()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention()[0], plain)


def test_the_initial_projection_follows_the_generator():
    model = models.build("lenet5")
    channels = tracing.trace(model, torch.randn(2, 3, 28, 28))
    one, same, other = (
        ScoreNetwork(model, channels, generator=torch.Generator().manual_seed(seed)).projection for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    begin = 0
    network = ScoreNetwork(model, channels)
    for width in network.widths:
        part = network.projection[begin : begin + width]
        begin += width
        assert part.std().item() == pytest.approx(1 / math.sqrt(width), rel=0.2)
    assert begin == len(network.projection)


def test_same_bits_again_and_for_other_threads():
    model = models.build("resnet20")
    channels = tracing.trace(model, torch.randn(2, 3, 12, 12))
    attention = scatter(ScoreNetwork(model, channels))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            scores, total = attention()
            grads = torch.autograd.grad(scores.square().sum() + total, list(attention.parameters()))
            found.append([scores, total, *grads])
    finally:
        torch.set_num_threads(threads)
    for one, other in ((found[0], found[2]), (found[0], found[1])):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
