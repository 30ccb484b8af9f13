"""trace against what can be worked out by hand for each structure."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paamops
from tests import networks
from tests.tolerances import NETWORK_TOLERANCE


def sets_of(channels, name):
    k = [layer.name for layer in channels.layers].index(name)
    return channels.sets[channels.offsets[k] : channels.offsets[k + 1]].tolist()


def traced(network):
    model, inputs = networks.make(network)
    return paamops.trace(model, inputs)


def test_plain_cost_by_hand():
    channels = traced(networks.Plain)
    conv1, conv2, norm, fc1, fc2 = 3 * 9 * 8 + 8, 8 * 9 * 12, 24, 48 * 10 + 10, 10 * 5 + 5
    flops = 2 * (3 * 9 * 8 * 64 + 8 * 9 * 12 * 4 + 48 * 10 + 10 * 5)
    buffers = 4 * (12 + 12) + 8  # running mean and variance, and how many batches they saw
    params = conv1 + conv2 + norm + fc1 + fc2
    assert channels.cost() == (params, flops, 4 * params + buffers, 8 + 12 + 10 + 5)
    keep = torch.ones(35, dtype=torch.bool)
    keep[0] = keep[10] = False  # one filter of the first convolution, one of the second, that four columns read
    params -= (3 * 9 + 1) + 9 * 12 + (8 * 9 - 9) + 2 + 4 * 10
    flops -= 2 * (3 * 9 * 64 + (9 * 12 + 8 * 9 - 9) * 4 + 4 * 10)
    assert channels.cost(keep) == (params, flops, 4 * params + buffers - 8, 33)


def test_residual_sums_unite():
    channels = traced(networks.Residual)
    assert sets_of(channels, "stem") == sets_of(channels, "b")
    assert sets_of(channels, "d") == sets_of(channels, "project")
    free = [len(set(sets_of(channels, name))) for name in ("stem", "a", "c", "d")]
    assert free == [8, 6, 10, 12]
    assert len({s for name in ("stem", "a", "c", "d") for s in sets_of(channels, name)}) == 36
    assert channels.pinned.sum() == 4  # the logits
    assert {channels.reasons[s] for s in sets_of(channels, "head")} == {"an output of the model"}


def test_concatenation_keeps_layers_apart():
    channels = traced(networks.Dense)
    assert len(set(channels.sets.tolist())) == 24
    assert channels.pinned.sum() == 3


def test_chunks_and_shuffles_go_place_by_place():
    channels = traced(networks.Split)
    stem, three = sets_of(channels, "stem"), sets_of(channels, "three")
    assert stem[:8] == stem[8:]
    assert three[:6] == three[6:12] == three[12:]


def test_depthwise_and_groups():
    channels = traced(networks.Depthwise)
    assert sets_of(channels, "expand") == sets_of(channels, "depthwise")
    assert sets_of(channels, "twofold") == [s for s in sets_of(channels, "expand") for _ in range(2)]
    stem, grouped = sets_of(channels, "stem"), sets_of(channels, "grouped")
    assert stem == sets_of(channels, "project")
    assert stem[:4] == stem[4:]  # the groups stay equal
    assert grouped[:6] == grouped[6:]
    kinds = {layer.name: layer.kind for layer in channels.layers}
    assert kinds["depthwise"] == kinds["twofold"] == "depthwise convolution"
    assert kinds["grouped"] == "grouped convolution"


def test_pixel_shuffle_unites_what_one_channel_is_made_of():
    channels = traced(networks.Upscale)
    wide = sets_of(channels, "wide")
    assert wide == [wide[4 * c] for c in range(4) for _ in range(4)]
    assert sets_of(channels, "merge") == sets_of(channels, "depthwise")
    assert not channels.pinned[wide].any()


def test_pixel_shuffle_takes_whole_channels_where_each_place_is_read_apart():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(2 * 4 * 4, 3))
    first = sets_of(paamops.trace(model, torch.randn(2, 3, 2, 2)), "0")
    assert first == [first[0]] * 4 + [first[4]] * 4 != [first[0]] * 8


def test_excitation_gates_and_norms():
    channels = traced(networks.Excited)
    assert sets_of(channels, "stem") == sets_of(channels, "excite")
    assert not channels.pinned[sets_of(channels, "next")].any()
    assert channels.pinned[sets_of(channels, "gate")].all()
    assert channels.pinned[sets_of(channels, "normed")].all()
    assert "native_group_norm" in channels.explain()


def test_repeated_and_shared_weights_are_one():
    channels = traced(networks.Repeated)
    assert sets_of(channels, "twice") == sets_of(channels, "left") == sets_of(channels, "right")
    assert [layer.name for layer in channels.layers] == ["left", "right", "twice", "weight", "one", "head"]


def test_padded_channels_stay():
    channels = traced(networks.PaddedShortcut)
    widen = sets_of(channels, "widen")
    assert widen[2:8] == sets_of(channels, "stem")
    assert channels.pinned[widen].tolist() == [True] * 2 + [False] * 6 + [True] * 2


def test_one_channel_of_places_is_padded_as_others_are():
    class OneChannel(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.wide, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 5, 1), nn.Conv2d(5, 2, 1)

        def forward(self, x):
            x = F.pixel_shuffle(self.first(x), 2)  # every place of the one channel is a filter
            return self.last(self.wide(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))

    channels = paamops.trace(OneChannel(), torch.randn(2, 3, 4, 4))
    assert channels.pinned[sets_of(channels, "wide")].tolist() == [True] * 5  # the third is the only one of `first`
    assert "constant channels" in channels.explain()


def test_axes_are_the_whole_instruction():
    model, inputs = networks.make(networks.Plain)
    channels = paamops.trace(model, inputs)
    assert channels.axes["0.weight"][1:] == (None, None, None)
    assert channels.axes["3.weight"][1].tolist() == sets_of(channels, "0")
    assert channels.axes["7.weight"][1].tolist() == [s for s in sets_of(channels, "3") for _ in range(4)]
    assert channels.axes["4.running_var"][0].tolist() == sets_of(channels, "3")
    assert channels.axes["4.num_batches_tracked"] == ()


def test_the_model_is_left_as_it_was():
    model, inputs = networks.make(networks.Residual)
    model.train()
    model.norms[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    paamops.trace(model, inputs)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Counting(nn.Module):
    """It counts its calls in a buffer, writes into its input, and has a layer that only training uses."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.training_only = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x.mul_(2)
        return self.second(F.relu(self.first(x)))


def test_what_the_forward_pass_writes_is_put_back():
    model, x = Counting(), torch.ones(2, 3, 4, 4)
    channels = paamops.trace(model, x)
    assert model.calls == 0
    assert (x == 1).all()
    assert "not used in this forward pass, so left as they are: training_only.weight" in channels.explain()


def test_products_of_activations_cost_what_they_do():
    tokens, width = 5, 6
    model = nn.TransformerEncoderLayer(width, 2, 7, batch_first=True)
    flops = 2 * tokens * (width * 3 * width + width * width + 2 * width * 7 + 2 * tokens * width)
    for count in (1, 3):
        assert paamops.trace(model, torch.randn(count, tokens, width)).cost().flops == flops


def test_a_computed_weight_stays_whole_and_is_told():
    convolutions = nn.Conv2d(3, 8, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 1)), nn.Conv2d(6, 4, 1)
    model, x = nn.Sequential(*convolutions), torch.randn(2, 3, 4, 4)
    channels = paamops.trace(model, x)
    assert channels.whole == [f"1.parametrizations.weight.original{k}" for k in (0, 1)]
    assert "nothing of them can go: 1.parametrizations.weight.original0" in channels.explain()
    assert channels.pinned[sets_of(channels, "0")].all()
    assert channels.cost().flops == 2 * 16 * (3 * 8 + 8 * 6 + 6 * 4)


class Mixing(nn.Module):
    """Two convolutions with an arbitrary function between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: F.softmax(x, 1), "_softmax"),
        (lambda x: x - x.mean(1, keepdim=True), "mean"),
        (lambda x: torch.linalg.qr(x).Q, "qr"),
        (lambda x: (x.flatten(2) @ x.flatten(2).mT @ x.flatten(2)).view_as(x), "bmm"),
        (lambda x: torch.cat([x[:, 4:], x[:, :4]], 1), "slice"),
        (lambda x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]], "index"),
        (lambda x: x.sort(1).values, "sort"),
        (lambda x: x + torch.arange(8.0).view(1, 8, 1, 1), "fixed size"),
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x.roll(1, 1), "roll"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "native_layer_norm"),
        (lambda x: F.local_response_norm(x, 3), "local_response_norm|slice|avg_pool|view|constant"),
        (lambda x: torch.stack(x.unbind(1), 1), "unbind"),
        (lambda x: x.new_zeros(x.shape).copy_(x), "copy_"),
        (lambda x: torch.fft.fft2(x).real, "fft"),
        (lambda x: x.unfold(1, 1, 1).amax(-1), "unfold"),
    ],
)
def test_what_mixes_channels_or_is_not_known_is_pinned_with_the_reason(between, reason):
    channels = paamops.trace(Mixing(between), torch.randn(2, 3, 6, 6))
    first = sets_of(channels, "first")
    assert channels.pinned[first].all()
    assert re.search(reason, channels.reasons[first[0]])


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.softmax(x.flatten(2), -1).view_as(x),
        lambda x: x * x.new_ones(1, 1, 6, 6),
        lambda x: torch.zeros_like(x) + x.transpose(2, 3).contiguous(),
        lambda x: x.permute(0, 2, 3, 1).reshape(-1, 6, 6, x.shape[1]).permute(0, 3, 1, 2),
        lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
        lambda x: F.instance_norm(x),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: torch.where(x > 0, x, 0.1 * x).clamp(max=3),
        lambda x: x.masked_fill(x < 0, 0).type(torch.float64).float(),
        lambda x: x[..., 1:, :].flip(2),
        lambda x: x / x.amax((2, 3), keepdim=True).abs().clamp(min=1e-3),
        lambda x: F.avg_pool2d(F.group_norm(x, x.shape[1]), 2),
        lambda x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1),
    ],
)
def test_what_keeps_channels_apart_leaves_them_free(between):
    model, x = Mixing(between), torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    first = sets_of(channels, "first")
    assert not channels.pinned[first].any()
    assert len(set(first)) == 8
    keep = channels.pinned | (torch.arange(len(channels.pinned)) % 2 == 0)
    small, twin = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
    torch.testing.assert_close(small(x), twin(x), **NETWORK_TOLERANCE[torch.float32])


def test_pinned_by_name_and_by_module():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs, pinned=("a", model.c))
    assert channels.pinned[sets_of(channels, "a") + sets_of(channels, "c")].all()
    assert not channels.pinned[sets_of(channels, "stem")].any()
    with pytest.raises(ValueError, match=r"pinned names 'nowhere'"):
        paamops.trace(model, inputs, pinned="nowhere")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_bad_input_is_a_clear_error():
    model, _ = networks.make(networks.Plain)
    with pytest.raises(ValueError, match=r"forward pass of model fails on example_inputs, in aten.convolution"):
        paamops.trace(model, torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match="nothing to prune"):
        paamops.trace(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 3))
    with pytest.raises(TypeError, match="TorchScript"):
        paamops.trace(torch.jit.trace(model, torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 8, 8))
    with pytest.raises(TypeError, match=r"model is a function; it must be a torch.nn.Module"):
        paamops.trace(F.relu, torch.randn(2, 3))


def test_batch_size_does_not_change_the_map():
    model, _ = networks.make(networks.Residual)
    one, three = paamops.trace(model, torch.randn(1, 3, 8, 8)), paamops.trace(model, torch.randn(3, 3, 8, 8))
    assert one.cost() == three.cost()
    assert torch.equal(one.sets, three.sets)


def test_explain_lists_layers_and_refusals():
    text = traced(networks.Residual).explain()
    assert "7 layers, 60 filters in 40 channel sets, 36 of them free to go" in text
    assert "4 of head: an output of the model" in text
    assert "project" in text
