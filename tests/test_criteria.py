"""weight_scores: every criterion by hand on every kind of network, filter by filter, and what it makes of sets."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import paamops
from paamops.criteria import CRITERIA
from tests.filters import rows_of
from tests.networks import NETWORKS, make
from tests.tolerances import assert_close


def by_hand(model, channels, criterion):
    """(F,) float64: the filters one by one, from the modules' own weights."""
    found = []
    for layer in channels.layers:
        weight = model.get_parameter(layer.weight).detach()
        rows = rows_of(weight, layer.axis, len(layer.rows) // weight.shape[layer.axis])
        for f, row in enumerate(rows):
            if criterion == "geometric_median":
                found.append(sum((row - other).square().sum().sqrt() for g, other in enumerate(rows) if g != f))
            else:
                found.append(row.abs().sum() if criterion == "l1" else row.square().sum().sqrt())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric_median"])
@pytest.mark.parametrize("network", NETWORKS)
def test_norms_and_distances_by_hand(network, criterion):
    model, inputs = make(network)
    channels = paamops.trace(model, inputs)
    scores = paamops.weight_scores(model, channels, criterion)
    assert (scores.shape, scores.dtype, scores.requires_grad) == (channels.filters.shape, torch.float32, False)
    assert_close(scores, by_hand(model, channels, criterion), torch.float32)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_pruned_by_them(network):
    """The lowest sets go, and the packed network computes what the masked one does."""
    model, inputs = make(network)
    model = model.double()
    inputs = tuple(x.double() for x in inputs)
    channels = paamops.trace(model, inputs)
    for criterion in ("l1", "l2", "geometric_median", "random"):
        scores = paamops.weight_scores(model, channels, criterion)
        means = channels.set_scores(scores)
        free = ~channels.guarded(means)
        if not free.any():
            continue
        keep = paamops.select(channels, scores, filters=0.7).keep
        if (free & keep).any() and (free & ~keep).any():
            assert means[free & keep].min() >= means[free & ~keep].max()
        small, same = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
        with torch.no_grad():
            torch.testing.assert_close(small(*inputs), same(*inputs), rtol=1e-9, atol=1e-9)


def test_transposed_and_grouped_layers():
    """A filter of a grouped transposed convolution reads the inputs of its own group."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ReLU(),
        nn.Conv2d(6, 12, 3, groups=3), nn.ReLU(),
        nn.ConvTranspose2d(12, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1),
    )  # fmt: skip
    channels = paamops.trace(model, torch.randn(1, 3, 9, 9))
    weight = model[2].weight.detach().double()
    first, second = weight[:4].square().sum((0, 2, 3)).sqrt(), weight[4:].square().sum((0, 2, 3)).sqrt()
    scores = paamops.weight_scores(model, channels)
    assert_close(scores[8:14], torch.cat([first, second]), torch.float32)
    for criterion in ("l1", "l2", "geometric_median"):
        assert_close(
            paamops.weight_scores(model, channels, criterion), by_hand(model, channels, criterion), torch.float32
        )


class Normed(nn.Module):
    """Norms in an order of their own: defined backwards, one read by two layers, one a function, one in a branch."""

    def __init__(self):
        super().__init__()
        self.last = nn.BatchNorm2d(6)
        self.stem_norm = nn.BatchNorm2d(8)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.branch_norm = nn.BatchNorm2d(8)
        self.gamma, self.beta = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))
        self.side = nn.Conv2d(8, 5, 1)
        self.whole = nn.BatchNorm2d(13)
        self.merge = nn.Conv2d(13, 6, 1)
        self.group = nn.GroupNorm(4, 4)
        self.narrow = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        x = x + self.branch_norm(self.branch(x))
        y = F.relu(F.batch_norm(self.side(x), None, None, self.gamma, self.beta, training=True))
        x = F.relu(self.whole(torch.cat([y, x], 1)))
        x = F.relu(self.last(self.merge(x)))
        return self.head(F.relu(self.group(self.narrow(x))).mean((2, 3)))


def test_scales_are_those_of_the_norms_that_the_channels_pass_through():
    model = Normed().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in name or name.split(".")[0] in ("last", "whole", "gamma", "group")):
                parameter.normal_()
    channels = paamops.trace(model, torch.randn(2, 3, 8, 8))
    scale = {name: p.detach().double().abs() for name, p in model.named_parameters()}
    stream = (scale["stem_norm.weight"] + scale["branch_norm.weight"] + scale["whole.weight"][5:]) / 3
    side = (scale["gamma"] + scale["whole.weight"][:5]) / 2
    expected = [stream, stream, side, scale["last.weight"], scale["group.weight"], torch.zeros(3)]
    names = ["stem", "branch", "side", "merge", "narrow", "head"]
    assert [layer.name for layer in channels.layers] == names
    scores = paamops.weight_scores(model, channels, "batch_norm")
    assert scores.dtype == torch.float32
    assert_close(scores, torch.cat(expected), torch.float32)
    assert paamops.weight_scores(model.double(), channels, "batch_norm").dtype == torch.float64
    selection = paamops.select(channels, scores, filters=0.5)
    assert selection.achieved.filters <= len(scores) / 2


def test_layers_without_a_norm_are_named():
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(1, 3, 12, 12)
    with pytest.raises(ValueError, match=r"no batch norm with a scale follows the filters of 3, 5: pin these layers"):
        paamops.weight_scores(model, paamops.trace(model, x), "batch_norm")
    scores = paamops.weight_scores(model, paamops.trace(model, x, pinned=("3", "5")), "batch_norm")
    assert scores.tolist() == [1] * 6 + [0] * 11  # those that are pinned stay
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with pytest.raises(ValueError, match=r"the filters of 0: pin"):
        paamops.weight_scores(plain, paamops.trace(plain, x), "batch_norm")


def test_random_scores_are_uniform_and_repeat(seed):
    model = nn.Sequential(nn.Conv2d(3, 4000, 1), nn.ReLU(), nn.Conv2d(4000, 2, 1))
    channels = paamops.trace(model, torch.randn(1, 3, 2, 2))
    state = torch.get_rng_state()
    scores = paamops.weight_scores(model, channels, "random", seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(scores, torch.rand(4002, generator=torch.Generator().manual_seed(seed)))
    assert not torch.equal(scores, paamops.weight_scores(model, channels, "random", seed=seed + 1))
    assert 0 <= scores.min() < scores.max() < 1
    assert torch.equal(paamops.weight_scores(model, channels, "random"), torch.rand(4002, generator=generator(0)))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_sets_get_the_mean_of_their_filters():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.head(F.relu(x + self.b(x)))

    model = Residual()
    channels = paamops.trace(model, torch.randn(1, 3, 4, 4))
    norms = [layer.weight.detach().double().abs().sum((1, 2, 3)) for layer in (model.a, model.b)]
    keep = paamops.select(channels, paamops.weight_scores(model, channels, "l1"), filters=8).keep
    best = ((norms[0] + norms[1]) / 2).topk(3).indices.sort().values
    assert torch.equal(keep[channels.sets[:6]].nonzero().flatten(), best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_dtypes(criterion, dtype):
    """Of one dtype, and of two: then each layer's scores are those of its own."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 70, 3)).eval()
    model = model.append(nn.BatchNorm2d(70)).append(nn.ReLU()).append(nn.Conv2d(70, 2, 1))
    channels = paamops.trace(model, torch.randn(1, 3, 8, 8))
    wanted = torch.float64 if dtype == torch.float64 and criterion != "random" else torch.float32
    whole, mixed = copy.deepcopy(model).to(dtype), copy.deepcopy(model)
    mixed[3].to(dtype), mixed[4].to(dtype)
    for changed in (whole, mixed):
        scores = paamops.weight_scores(changed, channels, criterion)
        assert (scores.dtype, scores.shape) == (wanted, (78,))
        if criterion in ("l1", "l2", "geometric_median"):
            assert_close(scores, by_hand(changed, channels, criterion), torch.float32)
        assert scores.isfinite().all()


def test_of_another_network_of_the_same_architecture():
    model, inputs = make(NETWORKS[0])
    channels = paamops.trace(model, inputs)
    other, _ = make(NETWORKS[0])
    assert_close(paamops.weight_scores(other, channels), by_hand(other, channels, "l2"), torch.float32)


def test_nan_weights_are_left_for_select_to_refuse():
    model, inputs = make(NETWORKS[0])
    channels = paamops.trace(model, inputs)
    with torch.no_grad():
        model[0].weight[2, 0] = math.nan
    scores = paamops.weight_scores(model, channels)
    assert scores.isnan().nonzero().tolist() == [[2]]
    with pytest.raises(ValueError, match="scores must be finite; filter 2, of 0"):
        paamops.select(channels, scores, params=0.5)


def test_of_branches_that_are_added_by_index_and_of_a_wrapped_model():
    model, x = paamops.models.build("resnet20", in_channels=3, num_classes=10).eval(), torch.randn(1, 3, 16, 16)
    for channels in (paamops.trace(model, x), paamops.trace(model, x, residual="scatter")):
        for criterion in CRITERIA:
            found = paamops.weight_scores(model, channels, criterion)
            assert found.shape == channels.filters.shape
            assert torch.equal(paamops.weight_scores(nn.DataParallel(model), channels, criterion), found)


def test_depthwise_transposed_layers_with_several_filters_of_a_channel():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1)).double()
    channels = paamops.trace(model, torch.randn(1, 3, 8, 8).double())
    found = paamops.weight_scores(model, channels, "l2")[8:24]
    torch.testing.assert_close(found, model[1].weight.detach().flatten(2).norm(dim=2).flatten())


def test_bad_arguments():
    model, inputs = make(NETWORKS[0])
    channels = paamops.trace(model, inputs)
    with pytest.raises(ValueError, match="criterion is 'l3'; it must be one of l1, l2, geometric_median, batch"):
        paamops.weight_scores(model, channels, "l3")
    with pytest.raises(ValueError, match=r"model has no .*; it must be the traced network"):
        paamops.weight_scores(nn.Linear(2, 2), channels)
    narrow = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    wide = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with pytest.raises(ValueError, match=r"0.weight of model has shape \(6, 3, 3, 3\); it must be \(5, 3, 3, 3\)"):
        paamops.weight_scores(wide, paamops.trace(narrow, torch.randn(1, 3, 5, 5)))
