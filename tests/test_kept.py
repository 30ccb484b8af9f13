"""What packing keeps: everything that hangs on a model, and the way back to the original's indices."""

import copy
import io

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import paamops
from paamops.tracing import named_tensors
from tests import networks
from tests.test_packing import check_law, random_keep


def packed(model, inputs, share=0.3):
    channels = paamops.trace(model, inputs)
    keep = random_keep(channels, share)
    return paamops.pack(model, channels, keep), channels, keep


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("network", [networks.Residual, networks.Dense, networks.Depthwise], ids=lambda n: n.__name__)
def test_each_module_and_parameter_stays_what_it_was(network, memory_format, dtype):
    model, inputs = networks.make(network)
    model = model.to(dtype, memory_format=memory_format)
    for module in model.modules():
        module.training = bool(torch.rand(()) < 0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(bool(torch.rand(()) < 0.5))
    model.register_buffer("persistent", torch.arange(3), persistent=True)
    model.register_buffer("passing", torch.arange(3), persistent=False)
    small, _, _ = packed(model, tuple(x.to(dtype) for x in inputs))
    for (name, old), new in zip(model.named_modules(), small.modules(), strict=True):
        assert type(new) is type(old), name
        assert new.training == old.training, name
    assert small.state_dict().keys() == model.state_dict().keys()
    assert "passing" in dict(small.named_buffers())
    for name, old in named_tensors(model).items():
        new = named_tensors(small)[name]
        assert type(new) is type(old), name
        assert (new.dtype, new.requires_grad) == (old.dtype, old.requires_grad), name
        if new.dim() == 4:
            assert new.is_contiguous(memory_format=memory_format), name
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_hooks_on_modules_are_called():
    model, inputs = networks.make(networks.Residual)
    calls = []
    model.a.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.a.register_forward_hook(lambda *_: calls.append("after"))
    model.a.register_full_backward_pre_hook(lambda *_: calls.append("backward before"))
    model.a.register_full_backward_hook(lambda *_: calls.append("backward after"))
    small, _, _ = packed(model, inputs)
    calls.clear()
    small(*inputs).sum().backward()
    assert calls == ["before", "after", "backward before", "backward after"]


class Watched(nn.Module):
    """A module whose parameter has hooks: a function of nobody's, and methods of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.seen = []
        self.first.weight.register_hook(lambda grad: grad * 2)
        self.first.weight.register_hook(self.note)
        self.first.weight.register_post_accumulate_grad_hook(self.note)
        self.first.bias.register_hook(self.note)
        self.first.bias.requires_grad_(False)

    def note(self, tensor):
        self.seen.append(tuple(tensor.shape))

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def test_hooks_on_parameters_are_called():
    model, x = Watched().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small, channels, keep = packed(model, x)
    shape = tuple(small.first.weight.shape)
    small(x).sum().backward()
    assert small.seen == [shape, shape]
    assert not model.seen
    twin = paamops.mask(model, channels, keep)
    twin(x).sum().backward()
    rows = channels.check(keep)[channels.sets[:8]]
    torch.testing.assert_close(small.first.weight.grad, 2 * twin.first.weight.grad[rows])
    assert not small.first.bias.requires_grad
    small.first.bias.requires_grad_(True)
    small(x).sum().backward()
    assert sorted(small.seen[2:]) == sorted([shape, shape, shape[:1]])
    assert not model.seen


class Own(nn.Parameter):
    """A parameter of a class of its own."""


def test_attributes_of_parameters_and_modules_come_along():
    model, inputs = networks.make(networks.Residual)
    model.stem.weight.no_decay = True
    model.stem.weight.owner = model.stem
    model.norms[0].running_mean.about = {"set": [1]}
    model.head.weight = Own(model.head.weight.detach())
    model.first_layers, model.note = [model.stem.weight, model.a], {"a": [1]}
    small, _, _ = packed(model, inputs)
    assert small.stem.weight.no_decay is True
    assert small.stem.weight.owner is small.stem
    assert small.norms[0].running_mean.about == {"set": [1]}
    assert small.norms[0].running_mean.about is not model.norms[0].running_mean.about
    assert type(small.head.weight) is Own
    assert small.first_layers[0] is small.stem.weight
    assert small.first_layers[1] is small.a
    assert small.note == {"a": [1]}
    assert small.note is not model.note
    assert all(p.grad is None for p in small.parameters())


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrized_weights_stay_parametrized():
    model, inputs = networks.make(networks.Residual)
    nn.utils.parametrizations.weight_norm(model.a)
    nn.utils.parametrize.register_parametrization(model.c, "weight", Double())
    channels = paamops.trace(model, inputs)
    for share in (0.0, 0.4):
        small = check_law(model, inputs, random_keep(channels, share), channels)
        assert nn.utils.parametrize.is_parametrized(small.a, "weight")
        assert nn.utils.parametrize.is_parametrized(small.c, "weight")
        torch.testing.assert_close(small.c.weight, 2 * small.c.parametrizations.weight.original)
    assert small.head.in_features < 12


def test_a_frozen_model_is_pruned_all_the_same():
    model, inputs = networks.make(networks.Residual)
    model.requires_grad_(False)
    channels = paamops.trace(model, inputs)
    selection = paamops.select(channels, paamops.score(model, channels, inputs), params=0.5)
    small = paamops.pack(model, channels, selection)
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in small.parameters())


def test_nothing_to_prune_is_an_error():
    with pytest.raises(ValueError, match="nothing to prune: no convolution or linear layer"):
        paamops.trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), torch.randn(1, 3, 4, 4))
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    channels = paamops.trace(model, x)
    with pytest.raises(ValueError, match=r"nothing to prune: every channel set is pinned \(an output of the model"):
        paamops.select(channels, torch.rand(3), params=0.5)


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager", fullgraph=not isinstance(model, DistributedDataParallel))


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "torch.compile": compiled,
    "both": lambda model: compiled(DistributedDataParallel(model)),
}
SLOW = {name: [pytest.mark.slow] if name in ("torch.compile", "both") else [] for name in WRAPPERS}


@pytest.mark.parametrize("wrapper", [pytest.param(name, marks=SLOW[name]) for name in WRAPPERS])
def test_a_wrapped_model_is_looked_through(wrapper, group, tmp_path):
    model, inputs = networks.make(networks.Residual)
    wrapped = WRAPPERS[wrapper](model)
    channels = paamops.trace(wrapped, inputs, pinned=("c", model.d))
    plain = paamops.trace(model, inputs, pinned=("c", "d"))
    assert channels.explain() == plain.explain()
    scores = paamops.score(wrapped, channels, inputs)
    assert torch.equal(scores, paamops.score(model, plain, inputs))
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    selection = paamops.select(channels, scores, params=0.6)
    small, twin = paamops.pack(wrapped, channels, selection, optimizer), paamops.mask(wrapped, channels, selection)
    assert type(small) is type(twin) is networks.Residual
    assert torch.equal(small(*inputs), paamops.pack(model, plain, selection)(*inputs))
    again = WRAPPERS[wrapper](small)
    again(*inputs).sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in small.parameters())
    paamops.save(again, tmp_path / "small")
    loaded = paamops.load(tmp_path / "small", networks.Residual)
    assert torch.equal(loaded.eval()(*inputs), small.eval()(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["method", "within"])
def test_what_is_compiled_within_a_model_runs_as_written(place):
    model, inputs = networks.make(networks.Residual)
    plain = paamops.trace(model, inputs)
    if place == "method":
        model.compile(backend="eager", fullgraph=True)
    else:
        model.relu = torch.compile(model.relu, backend="eager", fullgraph=True)
    model(*inputs)
    channels = paamops.trace(model, inputs)
    assert channels.cost() == plain.cost()
    scores = paamops.score(model, channels, inputs)
    small = check_law(model, inputs, paamops.select(channels, scores, params=0.5).keep, channels)
    small.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(small(*inputs), small.forward(*inputs))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_refused():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    scripted = torch.jit.trace(model, inputs)
    keep = torch.ones_like(channels.pinned)
    for call in (
        lambda: paamops.trace(scripted, inputs),
        lambda: paamops.pack(scripted, channels, keep),
        lambda: paamops.mask(scripted, channels, keep),
        lambda: paamops.score(scripted, channels, inputs),
        lambda: paamops.trace(nn.Sequential(scripted), inputs),
    ):
        with pytest.raises(TypeError, match="TorchScript module; it must be ordinary PyTorch code"):
            call()
    with pytest.raises(TypeError, match="model is a function; it must be"):
        paamops.trace(model.forward.__func__, inputs)


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.__name__)
def test_kept_leads_back_to_the_original_over_several_prunings(network):
    original, inputs = networks.make(network)
    model = original
    for share in (0.6, 0.5, 0.3):
        model, _, _ = packed(model, inputs, share)
        full = named_tensors(original)
        assert paamops.kept(model).keys() == full.keys()
        for name, axes in paamops.kept(model).items():
            value = full[name]
            for axis, index in enumerate(axes):
                value = value if index is None else value.index_select(axis, index)
            assert torch.equal(value, named_tensors(model)[name]), name
        model = copy.deepcopy(model)
    assert all(axis is None for axes in paamops.kept(original).values() for axis in axes)
    assert not any(hasattr(module, "paamops_plan") for module in original.modules())


def test_kept_leaves_out_what_came_later():
    model, inputs = networks.make(networks.Residual)
    small, channels, keep = packed(model, inputs)
    rows = channels.check(keep)[channels.sets[:8]].nonzero().flatten()
    small.head = nn.Linear(small.head.in_features, 7)
    small.extra = nn.Linear(2, 2)
    kept = paamops.kept(small)
    assert named_tensors(small).keys() - kept.keys() == {"head.weight", "head.bias", "extra.weight", "extra.bias"}
    assert torch.equal(kept["stem.bias"][0], rows)
    again, _, _ = packed(small, inputs)
    assert paamops.kept(again).keys() == kept.keys()
    with pytest.raises(TypeError, match="model is a dict"):
        paamops.kept({})


def test_a_packed_network_within_another_and_a_part_of_one(tmp_path):
    model, inputs = networks.make(networks.Residual)
    small, _, _ = packed(model, inputs)
    kept = paamops.kept(small)
    around = nn.Sequential(nn.BatchNorm2d(3), small)
    found = paamops.kept(around)
    assert found.keys() == {f"1.{name}" for name in kept}
    assert all(found[f"1.{name}"] is axes for name, axes in kept.items())
    again, _, _ = packed(around, inputs, 0.5)
    rows = paamops.kept(again)["1.stem.weight"][0]
    assert torch.equal(again[1].stem.weight, model.stem.weight[rows])
    for whole, build in (
        (again, lambda: nn.Sequential(nn.BatchNorm2d(3), networks.Residual())),
        (small.norms, lambda: networks.Residual().norms),
        (AveragedModel(small), lambda: AveragedModel(networks.Residual())),
        (nn.Sequential(nn.ReLU(), small.stem), lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3, padding=1))),
    ):
        paamops.save(whole, tmp_path / "m")
        loaded = paamops.load(tmp_path / "m", build)
        assert str(paamops.kept(loaded)) == str(paamops.kept(whole))
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))


def test_torch_saves_and_loads_a_packed_model():
    model, inputs = networks.make(networks.Depthwise)
    small, _, _ = packed(model, inputs)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(*inputs), small(*inputs))
    assert str(paamops.kept(again)) == str(paamops.kept(small))
    check_law(again, inputs, random_keep(channels := paamops.trace(again, inputs), 0.5), channels)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(small)
    nn.init.zeros_(again.stem.weight)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(*inputs), small(*inputs))
