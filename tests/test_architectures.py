"""Whole architectures: what is packed computes what its masked twin does, costs what the trace says, much is free."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import paamops
from paamops.tracing import leaves
from tests.architectures import ARCHITECTURES, build
from tests.test_packing import random_keep

NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if each.slow else []) for name, each in ARCHITECTURES.items()
]  # fmt: skip
SHARE = 1e-9  # of the largest output, by which float64 outputs may differ


def check(model, inputs, channels, keep):
    """The packed network: the same outputs as the masked one, the parameters and FLOPs that the trace says."""
    small, twin = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
    with torch.no_grad():
        pairs = list(zip(leaves(small(*inputs)), leaves(twin(*inputs)), strict=True))
    assert pairs
    for actual, expected in pairs:
        assert expected.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=0, atol=SHARE * expected.abs().max().item())
    cost = channels.cost(keep)
    assert cost.params == sum(p.numel() for p in small.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
    assert cost[:3] == paamops.trace(small, inputs).cost()[:3]
    return small


@pytest.mark.parametrize("name", NAMES)
def test_pack_equals_mask(name):
    model, inputs = build(name)
    channels = paamops.trace(model, inputs)
    share = float(torch.rand(()))
    keep = random_keep(channels, share)
    small = check(model, inputs, channels, keep)
    free = (~channels.pinned)[channels.sets].double().mean()
    assert free >= ARCHITECTURES[name].free, channels.explain()
    assert bool((~keep).any()) == (channels.cost(keep).params < channels.cost().params)
    with torch.no_grad():  # the network that stays is not the whole one: the comparison above says something
        whole, packed = leaves(model(*inputs))[0], leaves(small(*inputs))[0]
    assert share > 0.9 or (whole - packed).abs().max() > 1e-6 * whole.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_flops_as_torch_counts_them(name):
    model, inputs = build(name, dtype=torch.float32, batch=3)
    channels = paamops.trace(model, inputs)
    keep = random_keep(channels, 0.5)
    small = paamops.pack(model, channels, keep)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(*inputs)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model(*inputs)
    # Products of two activations (attention) are no layer's: their FLOPs are the same before and after.
    extra = whole.get_total_flops() // 3 - channels.cost().flops
    assert counter.get_total_flops() // 3 - channels.cost(keep).flops == extra
    assert extra == 0 or name in ("vit-tiny", "swin")


@pytest.mark.parametrize("name", ["densenet121", "mobilenetv3-small", "yolo"])
def test_packed_to_half_and_again(name):
    """`select` to half of the parameters, pack, trace the packed network, and once more."""
    model, inputs = build(name)
    for _ in range(2):
        channels = paamops.trace(model, inputs)
        whole = channels.cost().params
        selection = paamops.select(channels, torch.rand(len(channels.sets)), params=0.5)
        model = check(model, inputs, channels, selection.keep)
        assert 0.45 * whole < sum(p.numel() for p in model.parameters()) <= 0.5 * whole


TIMM = [
    "resnet26d", "resnext26ts", "densenet121", "mobilenetv3_small_100", "efficientnet_lite0", "regnety_004",
    "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "ghostnet_100", "mnasnet_100", "dla34",
    "hrnet_w18_small", "res2net50_26w_4s", "xception41", "vgg11_bn", "inception_v3", "cspresnet50",
]  # fmt: skip
# Their blocks split the channels into pieces of a size that is written down: what makes them has to be pinned.
WRITTEN = {"res2net50_26w_4s": ".conv1.weight", "cspresnet50": ".conv_exp.conv.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name):
    timm = None
    with contextlib.suppress(Exception):  # without torchvision it raises more than ImportError
        import timm
    if timm is None:
        pytest.skip("timm cannot be imported here: it needs torchvision")
    model = timm.create_model(name, pretrained=False, num_classes=10).double().eval()
    size = model.default_cfg["input_size"]
    inputs = (torch.randn(1, *size, dtype=torch.float64),)
    pinned = [each for each, _ in model.named_parameters() if name in WRITTEN and each.endswith(WRITTEN[name])]
    channels = paamops.trace(model, inputs, pinned=pinned)
    check(model, inputs, channels, random_keep(channels, 0.5))
    assert (~channels.pinned)[channels.sets].double().mean() > 0.4
