"""The law: a packed network computes what its masked twin does, and costs what the trace says."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import paamops
from paamops import plan
from tests import networks
from tests.tolerances import NETWORK_TOLERANCE


def random_keep(channels, share):
    """A random keep mask that removes no pinned set and empties no layer."""
    scores = torch.rand(len(channels.sets))
    return channels.guarded(channels.set_scores(scores)) | (torch.rand(len(channels.pinned)) < share)


def check_law(model, inputs, keep, channels):
    small, twin = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), twin(*inputs), **NETWORK_TOLERANCE[torch.float32])
    cost, again = channels.cost(keep), paamops.trace(small, inputs).cost()
    assert cost.params == sum(p.numel() for p in small.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
    assert cost[:3] == again[:3]
    return small


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.__name__)
def test_flops_as_torch_counts_them(network):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    keep = random_keep(channels, 0.5)
    for each, cost in ((model, channels.cost()), (paamops.pack(model, channels, keep), channels.cost(keep))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(*inputs)
        assert cost.flops == counter.get_total_flops() // len(inputs[0])


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.__name__)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_pack_equals_mask(network, share):
    model, inputs = networks.make(network)
    channels = paamops.trace(model, inputs)
    for _ in range(2):
        check_law(model, inputs, random_keep(channels, share), channels)


@pytest.mark.slow
@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.__name__)
def test_pack_equals_mask_often(network):
    for _ in range(40):
        model, inputs = networks.make(network)
        channels = paamops.trace(model, inputs)
        check_law(model, inputs, random_keep(channels, float(torch.rand(()))), channels)


BUILT_IN = [
    ("lenet5", 1, 28), ("resnet20", 3, 32), ("vgg16", 3, 32),
    *(pytest.param(f"resnet{depth}", 3, 32, marks=pytest.mark.slow) for depth in (32, 44, 56, 110)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "in_channels", "side"), BUILT_IN)
def test_pack_equals_mask_on_the_papers_networks(name, in_channels, side):
    model = paamops.models.build(name, in_channels=in_channels, num_classes=10).eval()
    inputs = (torch.randn(2, in_channels, side, side),)
    channels = paamops.trace(model, inputs)
    small = check_law(model, inputs, random_keep(channels, 0.5), channels)
    # Every convolution can be pruned, those in the residual stream too.
    free = {layer.name for layer in channels.layers} - {channels.layers[-1].name}
    unpinned = {channels.layers[k].name for k in channels.filters[~channels.pinned[channels.sets]].unique().tolist()}
    assert unpinned == free
    assert sum(p.numel() for p in small.parameters()) < 0.6 * channels.cost().params


def test_keeping_all_changes_nothing():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    same = paamops.pack(model, channels, torch.ones_like(channels.pinned))
    assert torch.equal(same(*inputs), model(*inputs))


def test_the_model_is_untouched_and_nothing_is_shared():
    model, inputs = networks.make(networks.Residual)
    before = copy.deepcopy(model.state_dict())
    channels = paamops.trace(model, inputs)
    small = paamops.pack(model, channels, random_keep(channels, 0.5))
    assert model.a.in_channels == 8
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_a_model_carries_is_preserved():
    model, inputs = networks.make(networks.Residual)
    model = model.to(memory_format=torch.channels_last).train()
    model.norms[0].eval()
    model.stem.requires_grad_(False)
    calls = []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    channels = paamops.trace(model, inputs)
    small = paamops.pack(model, channels, random_keep(channels, 0.5))
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert small.b.weight.is_contiguous(memory_format=torch.channels_last)
    calls.clear()
    small(*inputs)
    assert calls == [1]
    assert small.a.out_channels == len(small.a.weight) == small.b.in_channels == small.norms[1].num_features


def test_tied_weights_stay_tied():
    model, inputs = networks.make(networks.Repeated)
    channels = paamops.trace(model, inputs)
    small = paamops.pack(model, channels, random_keep(channels, 0.5))
    assert small.one.weight is small.other.weight


def test_a_packed_network_trains():
    model, inputs = networks.make(networks.Depthwise)
    channels = paamops.trace(model, inputs)
    small = paamops.pack(model, channels, random_keep(channels, 0.5)).train()
    before = small.stem.weight.detach().clone()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(*inputs).square().mean().backward()
    optimizer.step()
    assert not torch.equal(small.stem.weight, before)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model, inputs = networks.make(networks.Residual)
    model, inputs = model.to(dtype), tuple(x.to(dtype) for x in inputs)
    channels = paamops.trace(model, inputs)
    keep = random_keep(channels, 0.5)
    small = paamops.pack(model, channels, keep)
    assert {p.dtype for p in small.parameters()} == {dtype}
    expected = paamops.mask(model, channels, keep)(*inputs)
    torch.testing.assert_close(small(*inputs), expected, **NETWORK_TOLERANCE[dtype])


class WrittenSize(nn.Module):
    """The forward pass says how many channels the first layer has."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8 * 9, 4)

    def forward(self, x):
        return self.second(self.first(x).relu().view(-1, 72))


class WrittenPositions(nn.Module):
    """It splits channels into groups of a fixed size: a smaller network still runs, but on other channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.first(x)
        n, _, h, w = y.shape
        return self.second(y.view(n, -1, 2, h, w).transpose(1, 2).reshape(n, -1, h, w))


def test_sizes_written_into_the_forward_pass_are_refused():
    model, x = WrittenSize().eval(), torch.randn(2, 3, 5, 5)
    before = copy.deepcopy(model.state_dict())
    channels = paamops.trace(model, x)
    keep = torch.ones_like(channels.pinned)
    keep[0] = False
    with pytest.raises(paamops.PackingError, match=r"does not run, in aten.*fed by 'first'; pin .*pinned=\('first',\)"):
        paamops.pack(model, channels, keep)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert paamops.trace(model, x, pinned="first").pinned[:8].all()


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.view(len(h), h.shape[1] // 2, 2, 6, 6).transpose(1, 2).flatten(1, 2),
        lambda h: torch.cat(h.split(2, 1)[::-1], 1),
    ],
)
def test_parts_that_follow_the_number_of_channels_are_refused(between):
    """Every shape fits, and every channel meets one of its set, but not the right one."""
    model, x = Made(lambda s, x: s.b(between(s.a(x))), a=conv(3, 8), b=conv(8, 4)).eval(), torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    keep = torch.ones_like(channels.pinned)
    keep[1] = False
    with pytest.raises(paamops.PackingError, match=r"a (view|split) cuts its channels into .*pinned=\('a',\)"):
        paamops.pack(model, channels, keep)


def test_a_last_piece_that_could_vanish_stays():
    model = Made(lambda s, x: s.b(torch.cat(s.a(x).chunk(3, 1)[::-1], 1)), a=conv(3, 8), b=conv(8, 4)).eval()
    x = torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    assert channels.pinned.tolist() == [True, False, False] + [True] * 4
    assert channels.sets[:8].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    for _ in range(3):
        check_law(model, (x,), random_keep(channels, 0.5), channels)


def test_norms_without_tensors_follow():
    layers = {"a": conv(3, 8), "n": nn.InstanceNorm2d(8), "b": conv(8, 6), "m": nn.GroupNorm(6, 6, affine=False)}
    model = Made(lambda s, x: s.c(s.m(s.b(s.n(s.a(x))))), c=conv(6, 4), **layers).eval()
    x = torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    small = check_law(model, (x,), random_keep(channels, 0.0), channels)
    assert (small.n.num_features, small.m.num_groups, small.m.num_channels) == (1, 1, 1)
    assert not small.n._forward_pre_hooks
    assert (model.n.num_features, model.m.num_groups) == (8, 6)


def test_a_split_is_followed_along_its_free_part():
    model, x = WrittenPositions().eval(), torch.randn(2, 3, 5, 5)
    channels = paamops.trace(model, x)
    check_law(model, (x,), random_keep(channels, 0.5), channels)
    assert channels.sets[:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


class Made(nn.Module):
    """A forward pass given as a function of the module and its input, and the layers that it uses."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def test_the_check_sees_channels_that_meet_the_wrong_ones():
    """Every shape fits, but a smaller network takes its channels in another order."""
    model = Made(lambda s, x: s.b(h if (h := s.a(x)).shape[1] == 8 else h.flip(1)), a=conv(3, 8), b=conv(8, 4)).eval()
    x = torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    paamops.pack(model, channels, torch.ones_like(channels.pinned))
    keep = torch.ones_like(channels.pinned)
    keep[3] = False
    with pytest.raises(paamops.PackingError, match=r"brings together what the trace keeps apart.*pinned=\('a',\)"):
        paamops.pack(model, channels, keep)


def test_the_check_sees_numbers_that_follow_the_channels():
    model = Made(lambda s, x: s.b(F.relu(h := s.a(x)) / math.sqrt(h.shape[1])), a=conv(3, 8), b=conv(8, 4)).eval()
    x = torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    with pytest.raises(paamops.PackingError, match=r"div.Tensor is given \[2.6.*\], not \[2.8"):
        paamops.pack(model, channels, channels.pinned | (torch.arange(len(channels.pinned)) > 0))


@dataclasses.dataclass
class Out:
    a: torch.Tensor
    b: torch.Tensor


OUTSIDE = {
    "in a dataclass": lambda s, x: Out(s.b(h := F.relu(s.a(x))), h),
    "as NumPy": lambda s, x: torch.from_numpy(s.a(x).numpy()).mean(1),
    "normalised by place": lambda s, x: s.norm(s.a(x).flatten(2)[..., :5].mT).mean(2),
    "as a weight": lambda s, x: s.b(F.relu(s.a(x))) + F.conv2d(x, s.a.weight / 2, padding=1).mean(1, keepdim=True),
    "as a bias": lambda s, x: F.conv2d(x, s.b.weight[:, :3], s.a.bias[:4], padding=1) + s.a(x).mean(1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("forward", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_what_leaves_in_other_ways_stays(forward):
    model, x = Made(forward, a=conv(3, 8), b=conv(8, 4), norm=nn.BatchNorm1d(5)).eval(), torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    assert channels.pinned[channels.sets[:8]].all()


FOLLOWED = {
    "linear over the channels of a map": (
        lambda s, x: s.h(F.gelu(s.l(s.p(x).permute(0, 2, 3, 1))).mean((1, 2))),
        {"p": conv(3, 8), "l": nn.Linear(8, 9), "h": nn.Linear(9, 3)},
    ),
    "groups averaged": (
        lambda s, x: s.b(F.relu(s.a(x).view(2, 4, -1, 6, 6).mean(1))), {"a": conv(3, 16), "b": conv(4, 5)}
    ),
    "stacked": (
        lambda s, x: s.h(torch.stack([s.a(x), s.b(x)], 1).flatten(1, 2)),
        {"a": conv(3, 6), "b": conv(3, 6), "h": conv(12, 4)},
    ),
    "a learned map of positions": (
        lambda s, x: s.b(F.relu(s.a(x) + s.p)),
        {"a": conv(3, 8), "b": conv(8, 4), "p": nn.Parameter(torch.ones(1, 8, 6, 6))},
    ),
    "tied, both ways round": (
        lambda s, x: F.linear(F.relu(F.linear(F.relu(s.a(x)).mean((2, 3)), s.w)), s.w.t()).mean(1),
        {"a": conv(3, 8), "w": nn.Parameter(torch.randn(5, 8))},
    ),
    "one channel attention of many": (
        lambda s, x: s.b((h := F.relu(s.a(x))) * torch.sigmoid(s.e(h.mean((2, 3))[:, None]))[:, 0, :, None, None]),
        {"a": conv(3, 8), "b": conv(8, 4), "e": nn.Conv1d(1, 1, 3, padding=1)},
    ),
    "rows that are channels": (
        lambda s, x: s.h(F.relu(s.t(F.relu(s.a(x)).flatten(2))).mean(2)),
        {"a": conv(3, 4), "t": nn.Linear(36, 5), "h": nn.Linear(4, 3)},
    ),
    "a recurrent layer": (
        lambda s, x: s.h(s.g(F.relu(s.a(x)).flatten(2).mT.contiguous())[0][:, -1]),
        {"a": conv(3, 8), "g": nn.GRU(8, 6, batch_first=True), "h": nn.Linear(6, 3)},
    ),
    "long short-term memory": (
        lambda s, x: s.h(s.g(F.relu(s.a(x)).flatten(2).mT.contiguous())[0][:, -1]),
        {"a": conv(3, 8), "g": nn.LSTM(8, 6, batch_first=True), "h": nn.Linear(6, 3)},
    ),
    "multi-head attention": (
        lambda s, x: s.h(s.g(*[F.relu(s.a(x)).flatten(2).mT] * 3)[0].mean(1)),
        {"a": conv(3, 8), "g": nn.MultiheadAttention(8, 2, batch_first=True), "h": nn.Linear(8, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "layers"), FOLLOWED.values(), ids=FOLLOWED.keys())
@pytest.mark.parametrize("frozen", [False, True])
def test_followed_or_pinned_but_never_wrong(forward, layers, frozen):
    model, x = Made(forward, **copy.deepcopy(layers)).eval().requires_grad_(not frozen), torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    assert all(p.requires_grad != frozen for p in model.parameters())
    paamops.score(model, channels, x)
    for share in (0.0, 0.5, 1.0):
        check_law(model, (x,), random_keep(channels, share), channels)


def test_linear_layers_over_maps_can_be_pruned():
    forward, layers = FOLLOWED["linear over the channels of a map"]
    channels = paamops.trace(Made(forward, **layers), torch.randn(2, 3, 6, 6))
    assert (~channels.pinned).sum() == 17


def test_inside_inference_mode():
    model, inputs = networks.make(networks.Residual)
    with torch.inference_mode():
        channels = paamops.trace(model, inputs)
        scores = paamops.score(model, channels, inputs)
        small = paamops.pack(model, channels, paamops.select(channels, scores, params=0.5))
    assert not any(p.is_inference() for p in small.parameters())


def test_results_that_a_module_keeps_are_copied():
    def forward(s, x):
        s.kept = s.a(x)
        return s.b(F.relu(s.kept)).mean((2, 3))

    model, x = Made(forward, a=conv(3, 8), b=conv(8, 4)).eval(), torch.randn(2, 3, 6, 6)
    channels = paamops.trace(model, x)
    model(x).sum().backward()
    check_law(model, (x,), random_keep(channels, 0.5), channels)


def test_bad_keep_is_a_clear_error():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    keep = torch.ones_like(channels.pinned)
    with pytest.raises(ValueError, match=r"keep is torch.float32 of shape \(40,\); it must be a bool tensor"):
        paamops.pack(model, channels, keep.float())
    with pytest.raises(ValueError, match=r"keep removes channel set \d+, which is pinned: head"):
        paamops.pack(model, channels, ~channels.pinned)
    emptied = keep.clone()
    emptied[channels.sets[channels.offsets[1] : channels.offsets[2]]] = False
    with pytest.raises(ValueError, match="removes every channel of a; at least one must stay"):
        paamops.pack(model, channels, emptied)
    other, _ = networks.make(networks.Plain)
    with pytest.raises(ValueError, match="model is not the traced network"):
        paamops.pack(other, channels, keep)


def test_mask_zeroes_reads_alone():
    model, inputs = networks.make(networks.Residual)
    channels = paamops.trace(model, inputs)
    keep = torch.ones_like(channels.pinned)
    keep[channels.sets[0]] = False  # a channel of the stream
    twin = paamops.mask(model, channels, keep)
    assert (twin.a.weight[:, 0] == 0).all()
    assert (twin.project.weight[:, 0] == 0).all()
    assert torch.equal(twin.stem.weight, model.stem.weight)
    assert torch.equal(twin.a.weight[:, 1:], model.a.weight[:, 1:])


@pytest.mark.gpu
@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.__name__)
def test_the_verbs_on_a_gpu(network):
    """In float64, where no tensor core rounds."""
    model, inputs = networks.make(network)
    model, inputs = model.double(), tuple(x.double() for x in inputs)
    scores = paamops.score(model, paamops.trace(model, inputs), inputs)
    model, inputs = model.cuda(), tuple(x.cuda() for x in inputs)
    channels = paamops.trace(model, inputs)
    on_gpu = paamops.score(model, channels, inputs)
    torch.testing.assert_close(on_gpu.cpu(), scores, **NETWORK_TOLERANCE[torch.float32])
    keep = random_keep(channels, 0.5)
    small, twin = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), twin(*inputs), **NETWORK_TOLERANCE[torch.float64])
    paamops.select(channels, on_gpu, params=0.9)


class Odd(nn.Module):
    """It holds what a copy has to get right: shared containers, itself, a module twice, constants, other classes."""

    class Held:
        def __init__(self, value):
            self.value = value

    class Fresh(nn.ReLU):
        def __deepcopy__(self, memo):
            new = type(self)()
            new.copied = True
            return new

    class Stated(nn.ReLU):
        def __setstate__(self, state):
            super().__setstate__(state)
            self.restored = True

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.again = [self.a, self]
        self.empty = self.same = {}
        self.held, self.pair = self.Held([1, self.a]), (1, [2])
        self.fresh, self.stated, self.nothing = self.Fresh(), self.Stated(), None
        self.cell = nn.LSTM(4, 2)
        self.register_module("none", None)
        self.a.register_forward_hook(self.seen)
        self.count = 0

    def seen(self, *_):
        self.count += 1

    def forward(self, x):
        return self.b(self.fresh(self.stated(self.a(x))))


def test_a_packed_network_is_a_deep_copy():
    model, x = Odd().eval(), torch.randn(2, 3, 8, 8)
    channels = paamops.trace(model, x)
    model.count = 0
    small = paamops.pack(model, channels, random_keep(channels, 0.5))
    assert small.again[0] is small.a is small.held.value[1]
    assert small.again[1] is small
    assert small.empty is small.same
    assert small.empty is not model.empty
    assert (small.pair, small.nothing, small.none) == ((1, [2]), None, None)
    assert small.pair[1] is not model.pair[1]
    assert small.fresh.copied
    assert small.stated.restored
    assert small.cell(torch.zeros(1, 1, 4))[0].shape == (1, 1, 2)
    before = small.count
    small(x)
    assert (model.count, small.count) == (0, before + 1)  # the hook is the copy's own
    assert vars(small).keys() == {*vars(copy.deepcopy(model)), plan.ATTRIBUTE}
