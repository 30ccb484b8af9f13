"""Packed tensors go back where they came from, and the masked twin computes what the packed network does."""

import copy

import pytest
import torch

import paamops
from paamops.methods.networks import masked, packed, tensors_of, unpack
from tests import networks
from tests.methods.trainers import assert_same_tensors
from tests.tolerances import NETWORK_TOLERANCE


def random_keep(channels, share):
    scores = torch.rand(len(channels.sets))
    return channels.guarded(channels.set_scores(scores)) | (torch.rand(len(channels.pinned)) < share)


def other_values(model):
    """A copy of the network with other values in every parameter and buffer."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(torch.rand(tensor.shape) + 0.1 if tensor.is_floating_point() else tensor + 3)
    return other


def variants(model, inputs):
    yield torch.float32, model, inputs
    if inputs[0].dim() == 4:
        yield torch.float32, copy.deepcopy(model).to(memory_format=torch.channels_last), inputs
    yield torch.float64, copy.deepcopy(model).double(), tuple(each.double() for each in inputs)


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.__name__)
def test_pack_unpack_pack(network):
    for dtype, model, inputs in variants(*networks.make(network)):
        channels = paamops.trace(model, inputs)
        keep = random_keep(channels, 0.5)
        small = paamops.pack(model, channels, keep)
        template = other_values(model)
        unpack(template, channels, keep, tensors_of(small))
        assert_same_tensors(paamops.pack(template, channels, keep), small)
        for name, tensor in template.named_parameters():
            assert tensor.stride() == dict(model.named_parameters())[name].stride(), name
        again = packed(other_values(model), channels, keep, tensors_of(small))
        assert_same_tensors(again, small)
        twin = masked(other_values(model), channels, keep, tensors_of(small))
        with torch.no_grad():
            torch.testing.assert_close(twin(*inputs), small(*inputs), **NETWORK_TOLERANCE[dtype])
            torch.testing.assert_close(again(*inputs), small(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("network", [networks.Residual, networks.Depthwise, networks.Dense])
def test_what_was_removed_stays_as_it_was(network):
    """Marks in every tensor tell which elements were written: those that are left, and no other."""
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    keep = random_keep(channels, 0.5)
    marks = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*marks.parameters(), *marks.buffers()):
            tensor.fill_(1)
    small = paamops.pack(marks, channels, keep)
    with torch.no_grad():
        for tensor in (*marks.parameters(), *marks.buffers()):
            tensor.fill_(0)
    unpack(marks, channels, keep, tensors_of(small))
    left = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for name, tensor in (*marks.named_parameters(), *marks.named_buffers()):
        assert int(tensor.sum()) == left[name].numel(), name


def test_tensors_of_is_a_copy():
    model, _ = networks.make(networks.Residual)
    stored = tensors_of(model)
    before = {name: tensor.clone() for name, tensor in stored.items()}
    assert stored.keys() == model.state_dict().keys()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    for name, tensor in stored.items():
        assert torch.equal(tensor, before[name]), name
        assert not tensor.requires_grad


def test_shared_weights_stay_shared():
    model, inputs = networks.make(networks.Repeated)
    channels = paamops.trace(model, inputs)
    keep = random_keep(channels, 0.5)
    small = paamops.pack(model, channels, keep)
    again = packed(other_values(model), channels, keep, tensors_of(small))
    assert again.one.weight is again.other.weight
    assert torch.equal(again.one.weight, small.one.weight)
