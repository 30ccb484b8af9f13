"""The networks are the papers': their parameter counts, their shortcut, their initialisation."""

import pytest
import torch
from torch.nn import functional as F

import paamops
from paamops import models

COUNTS = {  # ResNets: He et al. (2016), Table 6, to the last digit for 3 channels and 10 classes
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "vgg16": 14_728_266,  # 13 convolutions with biases, their norms, 512 x 10
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_papers(name):
    assert sum(p.numel() for p in models.build(name).parameters()) == COUNTS[name]


def test_parameters_of_lenet():
    model = models.build("lenet5", in_channels=1)
    assert sum(p.numel() for p in model.parameters()) == 431_080


@pytest.mark.parametrize("name", models.NETWORKS)
@pytest.mark.parametrize("side", [28, 32])
def test_logits(name, side):
    model = models.build(name, in_channels=2, num_classes=7).eval()
    assert model(torch.randn(3, 2, side, side)).shape == (3, 7)
    assert model.paamops_recipe == {"name": name, "in_channels": 2, "num_classes": 7}


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


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "vgg16"])
def test_all_but_the_logits_can_be_pruned(name):
    model = models.build(name)
    channels = paamops.trace(model, torch.zeros(1, 3, 32, 32))
    assert int(channels.pinned.sum()) == 10
    assert channels.cost().params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "arguments", [{"name": "resnet18"}, {"name": "resnet20", "in_channels": 0}, {"name": "vgg16", "num_classes": 2.5}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"resnet18.*must be one of lenet5|in_channels is 0|num_classes is 2.5"):
        models.build(**arguments)
