"""The networks are the papers': their parameter counts, their shortcut, their initialisation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import paamops
from paamops import models
from tests.tolerances import NETWORK_TOLERANCE

COUNTS = {  # for 3 channels and 10 classes; the ResNets of He et al. (2016), Table 6, to the last digit
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet50": 23_528_522,
    "resnet101": 42_520_650,
    "vgg16": 14_728_266,  # 13 convolutions with biases, their norms, 512 x 10
    "vgg19": 20_040_522,
    "mobilenetv2": 2_236_682,
    "shufflenet": 1_263_854,
}
IMAGENET = {  # torchvision's models: parameters for 1000 classes, and 1e9 multiply-adds of a 224x224 image
    "resnet50": (25_557_032, 4.09),
    "resnet101": (44_549_160, 7.80),
    "mobilenetv2": (3_504_872, 0.30),
    "shufflenet": (2_278_604, 0.14),
}
FREE = {  # channel sets that can go, for 3 channels and 10 classes: all but the logits, except in the ShuffleNet
    "lenet5": 20 + 50 + 500,
    "lenet300-100": 300 + 100,
    "resnet20": 16 * 4 + 32 * 4 + 64 * 4,
    "resnet50": 64 + 256 + 512 + 1024 + 2048 + 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512),
    "resnet101": 64 + 256 + 512 + 1024 + 2048 + 2 * (3 * 64 + 4 * 128 + 23 * 256 + 3 * 512),
    "vgg16": 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512,
    "vgg19": 2 * 64 + 2 * 128 + 4 * 256 + 8 * 512,
    # The first convolution, the seven stages, inside the blocks of each, the last convolution.
    "mobilenetv2": 32 + (16 + 24 + 32 + 64 + 96 + 160 + 320) + (240 + 528 + 1344 + 1536 + 2496 + 960) + 1280,
    # The first convolution, inside the branches, the third stage by sixteens, the last convolution.
    "shufflenet": 24 + (4 * 58 + 8 * 116 + 4 * 232) + 464 // 16 + 1024,
}


def on_meta(name, **arguments):
    """The network without memory or values: shapes cost nothing."""
    with torch.device("meta"):
        return models.build(name, **arguments).eval()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_papers(name):
    assert parameters(on_meta(name)) == COUNTS[name]


@pytest.mark.parametrize(("name", "count"), [("lenet5", 431_080), ("lenet300-100", 266_610)])
def test_parameters_of_lenet(name, count):
    assert parameters(on_meta(name, in_channels=1)) == count


@pytest.mark.parametrize("name", IMAGENET)
def test_parameters_and_flops_on_imagenet(name):
    model, (count, billions) = on_meta(name, num_classes=1000), IMAGENET[name]
    assert parameters(model) == count
    with FlopCounterMode(display=False) as counter:
        assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert round(counter.get_total_flops() / 2e9, 2) == billions


@pytest.mark.parametrize("name", IMAGENET)
@pytest.mark.parametrize(
    ("sides", "last"), [((32, 32), (4, 4)), ((48, 64), (6, 8)), ((64, 65), (2, 3)), ((224, 224), (7, 7))]
)
def test_small_images_are_read_with_fewer_strides(name, sides, last):
    shapes = []
    model = on_meta(name)
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, out: shapes.append(out.shape))
    model(torch.empty(1, 3, *sides, device="meta"))
    assert next(shape[2:] for shape in reversed(shapes) if len(shape) == 4) == last


@pytest.mark.parametrize("name", models.NETWORKS)
@pytest.mark.parametrize("side", [28, 32, 64, 224])
def test_shape_of_the_logits(name, side):
    model = on_meta(name, in_channels=2, num_classes=7)
    assert model(torch.empty(3, 2, side, side, device="meta")).shape == (3, 7)
    assert model.paamops_recipe == {"name": name, "in_channels": 2, "num_classes": 7}


@pytest.mark.parametrize("name", models.NETWORKS)
def test_first_logits_are_finite(name):
    logits = models.build(name).eval()(torch.randn(2, 3, 32, 32))
    assert logits.isfinite().all()
    assert logits[0].std() > 0


def test_shortcut_is_subsampling_and_zero_padding():
    block = models.build("resnet20").stage2[0]
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block.shortcut(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
    assert not list(block.shortcut.parameters())


def test_kaiming_initialisation():
    model = models.build("vgg16")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 100_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
            assert not module.bias.any()


def test_lenet_300_100_reads_pixels():
    model, x = models.build("lenet300-100", in_channels=1), torch.randn(2, 1, 28, 28)
    hidden = F.relu(model.linear2(F.relu(model.linear1(x.flatten(1)))))
    assert torch.equal(model(x), model.linear3(hidden))
    half, double = F.avg_pool2d(x, 2), x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(model(double), model(x), **NETWORK_TOLERANCE[torch.float32])
    assert model(half).shape == (2, 10)


def test_bottleneck_strides_and_shortcuts():
    model = on_meta("resnet50")
    for first in (model.stage2[0], model.stage3[0], model.stage4[0]):
        assert [conv.stride for conv in (first.conv1, first.conv2, first.conv3)] == [(1, 1), (2, 2), (1, 1)]
    projections = [block for block in model.modules() if isinstance(getattr(block, "shortcut", None), nn.Sequential)]
    assert projections == [model.stage1[0], model.stage2[0], model.stage3[0], model.stage4[0]]


def test_bottleneck_block():
    block, x = models.build("resnet50").eval().stage2[0], torch.randn(2, 256, 4, 4)
    y = block.norm1(block.conv1(x)).clamp(min=0)
    y = block.norm3(block.conv3(block.norm2(block.conv2(y)).clamp(min=0)))
    conv, norm = block.shortcut
    expected = (y + norm(conv(x))).clamp(min=0)
    torch.testing.assert_close(block(x), expected, **NETWORK_TOLERANCE[torch.float32])


def test_mobilenet_block():
    model = models.build("mobilenetv2").eval()
    assert sum(block.residual for block in model.blocks) == 10
    block, x = model.blocks[2], 20 * torch.randn(2, 24, 4, 4)  # large enough for ReLU6 to cut
    y = block.norm1(block.conv1(x)).clamp(0, 6)
    y = block.norm2(block.conv2(y)).clamp(0, 6)
    assert (y == 6).any()
    torch.testing.assert_close(block(x, stride=1), x + block.norm3(block.conv3(y)), **NETWORK_TOLERANCE[torch.float32])


def test_shufflenet_unit_passes_one_half_through_and_shuffles():
    unit, x = models.build("shufflenet").stage1[1].eval(), torch.randn(2, 116, 4, 4)
    y = unit(x)
    assert torch.equal(y[:, ::2], x[:, :58])
    assert torch.equal(y[:, 1::2], unit.branch(x[:, 58:]))


def test_shufflenet_first_unit_reads_all_channels_twice():
    unit, x = models.build("shufflenet").stage2[0].eval(), torch.randn(2, 116, 4, 4)
    y, (a, b) = unit(x), (unit.shortcut, unit.branch)
    assert y.shape == (2, 232, 2, 2)
    left = a.norm2(a.conv2(a.norm1(a.conv1(x)))).clamp(min=0)
    right = b.norm2(b.conv2(b.norm1(b.conv1(x)).clamp(min=0)))  # no ReLU behind a depthwise convolution
    right = b.norm3(b.conv3(right)).clamp(min=0)
    torch.testing.assert_close(y[:, ::2], left, **NETWORK_TOLERANCE[torch.float32])
    torch.testing.assert_close(y[:, 1::2], right, **NETWORK_TOLERANCE[torch.float32])


def test_names_in_saved_files_of_vgg16():
    convolutions = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
    names = {f"features.{k}.{each}" for k in convolutions for each in ("weight", "bias")} | {
        "linear.weight",
        "linear.bias",
    }
    names |= {f"features.{k + 1}.{each}" for k in convolutions for each in ("weight", "bias")}
    assert {name for name, _ in on_meta("vgg16").named_parameters()} == names


@pytest.mark.parametrize("name", FREE)
def test_what_can_be_pruned(name):
    model = models.build(name)
    channels = paamops.trace(model, torch.zeros(1, 3, 32, 32))
    assert int((~channels.pinned).sum()) == FREE[name]
    assert channels.cost().params == parameters(model)
    kept = {reason: channels.describe(s) for s, reason in enumerate(channels.reasons) if reason}
    if name != "shufflenet":
        assert kept == {"an output of the model": channels.layers[-1].name}
        assert int(channels.pinned.sum()) == 10


def test_what_the_shuffle_ties_together():
    channels = paamops.trace(models.build("shufflenet"), torch.zeros(1, 3, 32, 32))
    assert sorted(set(channels.reasons)) == [
        "",
        "an output of the model",
        "the only channel set of stage1.0.shortcut.conv2",
        "the only channel set of stage2.0.shortcut.conv2",
    ]
    pinned = {channels.layers[k].name for k in channels.filters[channels.pinned[channels.sets]].unique().tolist()}
    crossing = {f"stage{k}.{unit}.branch.conv3" for k, units in ((1, 4), (2, 8)) for unit in range(units)}
    crossing |= {
        "stage1.0.shortcut.conv2",
        "stage2.0.shortcut.conv1",
        "stage2.0.shortcut.conv2",
        "stage3.0.shortcut.conv1",
    }
    assert pinned == {*crossing, "linear"}


def with_statistics(model, x):
    """The model in eval mode, its norms with random weights and with the statistics of what they are given for x."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = None  # the average over all batches, here one
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [
        "lenet300-100",
        "resnet50",
        pytest.param("resnet101", marks=pytest.mark.slow),
        "vgg19",
        "mobilenetv2",
        "shufflenet",
    ],
)
@torch.no_grad()
def test_packed_equals_masked_and_comes_back_from_its_file(name, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    model = with_statistics(models.build(name), x)
    channels = paamops.trace(model, x)
    selection = paamops.select(channels, torch.rand(len(channels.filters)), params=0.5)
    small, twin = paamops.pack(model, channels, selection), paamops.mask(model, channels, selection)
    assert parameters(small) == selection.achieved.params <= parameters(model) // 2
    logits = small(x)
    torch.testing.assert_close(logits, twin(x), **NETWORK_TOLERANCE[torch.float32])
    assert (logits - model(x)).abs().max() > 0.01  # what was removed mattered
    large = torch.randn(1, 3, 72, 80)  # read with other strides than those that were traced
    torch.testing.assert_close(small(large), twin(large), **NETWORK_TOLERANCE[torch.float32])
    paamops.save(small, tmp_path / "small")
    again = paamops.load(tmp_path / "small")
    assert torch.equal(again(x), logits)
    assert torch.equal(again(large), small(large))


SCORED = {  # a layer, the module behind whose output its filters are scored, and what comes in between
    "lenet300-100": ("linear2", "linear2", F.relu),
    "resnet50": ("stage3.1.conv3", "stage3.1", lambda y: y),  # after the residual sum and its ReLU
    "vgg19": ("features.43", "features.44", F.relu),
    "mobilenetv2": ("blocks.5.conv2", "blocks.5.norm2", F.relu6),
    "shufflenet": ("stage2.3.branch.conv2", "stage2.3.branch.norm2", lambda y: y),  # no ReLU between two convolutions
}


@pytest.mark.parametrize("name", SCORED)
def test_activations_that_are_scored(name):
    layer, module, function = SCORED[name]
    x, seen = torch.randn(2, 3, 32, 32), []
    model = with_statistics(models.build(name), x)
    channels = paamops.trace(model, x[:1])
    model.get_submodule(module).register_forward_hook(lambda module, inputs, out: seen.append(out))
    scores = paamops.score(model, channels, x)
    own = scores[channels.filters == [each.name for each in channels.layers].index(layer)]
    expected = function(seen[0]).abs().transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(own, expected, **NETWORK_TOLERANCE[torch.float32])
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    "arguments", [{"name": "resnet18"}, {"name": "resnet20", "in_channels": 0}, {"name": "vgg16", "num_classes": 2.5}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"resnet18.*must be one of lenet5|in_channels is 0|num_classes is 2.5"):
        models.build(**arguments)
