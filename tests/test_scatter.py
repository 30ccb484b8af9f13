"""residual="scatter": a packed branch is added into its stream by index, and computes what its masked twin does."""

import copy
import io
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import paamops
from paamops import saving, scattering
from paamops.packing import kept_indices
from tests import networks
from tests.test_packing import random_keep
from tests.tolerances import NETWORK_TOLERANCE


class Basic(nn.Module):
    """A stem, two blocks on its stream and one that widens it, whose shortcut and branch are both fresh."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = (nn.ModuleList(nn.Conv2d(*io, 3, padding=1) for io in pairs) for pairs in (AB, BA))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 8, 12))
        self.project = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for place in range(3):
            y = self.norms[place](self.b[place](F.relu(self.a[place](x))))
            x = F.relu((self.project(x) if place == 2 else x) + y)
        return self.head(x.mean((2, 3)))


AB, BA = ((8, 6), (8, 7), (8, 5)), ((6, 8), (7, 8), (5, 12))


class PreActivation(nn.Module):
    """Norm and ReLU before each convolution; sums in place, and no norm after the branch's last convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.a = nn.ModuleList(nn.Conv2d(8, 6, 3, padding=1) for _ in range(2))
        self.b = nn.ModuleList(nn.Conv2d(6, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for norm, a, b in zip(self.norms, self.a, self.b, strict=False):
            y = b(F.relu(a(F.relu(norm(x)))))
            y += x
            x = y
        return self.head(F.relu(self.norms[2](x)).mean((2, 3)))


class Gate(nn.Module):
    """A squeeze-and-excitation as a module: it returns the product."""

    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Excited(nn.Module):
    """Blocks with a gate before the sum: as a module, in the block's own code, and scaled by a parameter; dropout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.ModuleList(nn.Conv2d(8, 6, 1) for _ in range(3))
        self.b = nn.ModuleList(nn.Conv2d(6, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.gate, self.reduce, self.expand = Gate(8), nn.Linear(8, 3), nn.Linear(3, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.silu(self.stem(x))
        x = self.gate(self.norms[0](self.b[0](F.relu(self.a[0](x))))) + x
        y = self.norms[1](self.b[1](F.relu(self.a[1](x))))
        y = y * torch.sigmoid(self.expand(F.relu(self.reduce(y.mean((2, 3))))))[:, :, None, None]
        x = F.dropout(y, 0.2, self.training) + x
        x = x + self.drop(self.scale * F.relu(self.norms[2](self.b[2](F.relu(self.a[2](x))))))
        return self.head(x.mean((2, 3)))


class Skips(nn.Module):
    """A U-Net that adds its skips, depthwise and grouped convolutions at the end of branches."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=2), nn.BatchNorm2d(12))
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.wide, self.depth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        y = F.relu(self.second(x))
        y = F.relu(y + self.deep(y))
        x = F.relu(torch.add(self.up(y), x))
        return self.last(F.relu(self.depth(F.relu(self.wide(x))) + x))


class Flat(nn.Module):
    """Linear layers, and a stream in one dimension."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv1d(2, 9, 3), nn.Conv1d(9, 4, 1), nn.Conv1d(4, 9, 1)
        self.c, self.d, self.head = nn.Linear(9, 5), nn.Linear(5, 9), nn.Linear(9, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = (x + self.b(F.relu(self.a(x)))).mean(2)
        return self.head(x + self.d(F.relu(self.c(x))))


# The modules that end branches, each with the width of its stream.
OWN = {
    Basic: {"norms.0": 8, "norms.1": 8, "norms.2": 12},
    PreActivation: {"b.0": 8, "b.1": 8},
    Excited: {"gate": 8, "norms.1": 8, "drop": 8},
    Skips: {"deep.1": 12, "up": 8, "depth": 8},
    Flat: {"b": 9, "d": 9},
}
SHAPES = {Flat: (2, 2, 11)}


def make(network):
    network.inputs = SHAPES.get(network, (2, 3, 8, 8))
    model, inputs = networks.make(network)
    return model.double(), tuple(x.double() for x in inputs)


def built(name):
    """A network of the papers with norms away from their trivial start, in float64."""
    model = paamops.models.build(name).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5), module.bias.normal_(), module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model, torch.randn(2, 3, 32, 32, dtype=torch.float64)


def bytes_of(model):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **NETWORK_TOLERANCE[torch.float64])


def check_law(model, x, channels, keep):
    """pack computes what mask does, and costs what the trace says, when traced again too."""
    small, twin = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
    with torch.no_grad():
        close(small(x), twin(x))
    cost, again = channels.cost(keep), paamops.trace(small, x)
    assert (cost.params, cost.bytes) == (sum(p.numel() for p in small.parameters()), bytes_of(small))
    assert cost[:3] == again.cost()[:3]
    return small


@pytest.mark.parametrize("network", OWN, ids=lambda network: network.__name__)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_pack_equals_mask(network, share):
    model, (x,) = make(network)
    channels = paamops.trace(model, x, residual="scatter")
    assert channels.hosts == OWN[network]
    for _ in range(2):
        check_law(model, x, channels, random_keep(channels, share))


@pytest.mark.slow
@pytest.mark.parametrize("network", OWN, ids=lambda network: network.__name__)
def test_pack_equals_mask_often(network):
    for _ in range(8):
        model, (x,) = make(network)
        channels = paamops.trace(model, x, residual="scatter")
        small = check_law(model, x, channels, random_keep(channels, float(torch.rand(()))))
        again = paamops.trace(small, x, residual="scatter")
        check_law(small, x, again, random_keep(again, float(torch.rand(()))))


LARGER = (("resnet56", 25), ("resnet50", 16), ("mobilenetv2", 10))
PAPERS = [("resnet20", 7), *(pytest.param(*each, marks=pytest.mark.slow) for each in LARGER)]


@pytest.mark.parametrize(("name", "count"), PAPERS)
def test_the_papers_networks(name, count):
    model, x = built(name)
    channels = paamops.trace(model, x, residual="scatter")
    assert len(channels.hosts) == count
    small = check_law(model, x, channels, random_keep(channels, 0.5))
    assert scattering.scatters(small)
    again = paamops.trace(small, x, residual="scatter")
    check_law(small, x, again, random_keep(again, 0.5))


def test_what_removal_means():
    """By hooks alone: a removed filter of a branch adds zero, a removed channel of a stream is read as zero."""
    model, (x,) = make(Basic)
    channels = paamops.trace(model, x, residual="scatter")
    keep = random_keep(channels, 0.5)
    kept = {layer.name: keep[channels.sets[channels.filters == k]] for k, layer in enumerate(channels.layers)}
    assert not all(kept["b.1"])
    by_hand = copy.deepcopy(model)
    for place in range(3):
        rows = kept[f"b.{place}"].double().view(-1, 1, 1)
        by_hand.norms[place].register_forward_hook(lambda module, args, output, rows=rows: output * rows)
    streams = {"a.0": "stem", "a.1": "stem", "a.2": "stem", "project": "stem", "head": "project"}
    for name, writer in streams.items():
        by_hand.get_submodule(name).weight.data[:, ~kept[writer]] = 0
    for place in range(3):
        by_hand.b[place].weight.data[:, ~kept[f"a.{place}"]] = 0
    with torch.no_grad():
        close(paamops.mask(model, channels, keep)(x), by_hand(x))
        close(paamops.pack(model, channels, keep)(x), by_hand(x))


def test_a_branch_is_cut_and_its_stream_is_not():
    model, (x,) = make(Basic)
    channels = paamops.trace(model, x, residual="scatter")
    keep = torch.ones_like(channels.pinned)
    own = channels.sets[channels.filters == [layer.name for layer in channels.layers].index("b.1")]
    keep[own[1:]] = False
    small = check_law(model, x, channels, keep)
    assert (small.b[1].out_channels, small.norms[1].num_features, small.stem.out_channels) == (1, 1, 8)
    assert list(scattering.scatters(small)) == ["norms.1"]  # the others have nothing to move
    keep[own] = False
    with pytest.raises(ValueError, match=r"removes every channel of b\.1; at least one must stay"):
        paamops.pack(model, channels, keep)


def test_ties_are_the_default():
    model, (x,) = make(Basic)
    channels, scattered = paamops.trace(model, x), paamops.trace(model, x, residual="scatter")
    assert channels.hosts == channels.scatters == {}
    assert len(scattered.pinned) == len(channels.pinned) + 8 + 8 + 12
    assert "by index: norms.0, norms.1, norms.2" in scattered.explain()
    with pytest.raises(ValueError, match="residual is 'cut'; it must be 'tie' or 'scatter'"):
        paamops.trace(model, x, residual="cut")


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "params", "flops"), [("tie", 0.498, 0.497), ("scatter", 0.613, 0.614)])
def test_what_it_gains_on_resnet56(residual, params, flops):
    """The README's figures: the streams stay, half of every other layer goes."""
    channels = paamops.trace(paamops.models.build("resnet56"), torch.zeros(1, 3, 32, 32), residual=residual)
    keep = channels.pinned.clone()
    for number, layer in enumerate(channels.layers):
        ids = channels.sets[channels.filters == number]
        writes = layer.name in ("conv", "stage2.0.conv2", "stage3.0.conv2")
        keep[ids if writes else ids[: len(ids) // 2]] = True
    whole, left = channels.cost(), channels.cost(keep)
    assert round(1 - left.params / whole.params, 3) == params
    assert round(1 - left.flops / whole.flops, 3) == flops


def test_keeping_all_changes_nothing():
    model, (x,) = make(Excited)
    channels = paamops.trace(model, x, residual="scatter")
    small = paamops.pack(model, channels, torch.ones_like(channels.pinned))
    assert torch.equal(small(x), model(x))
    assert not scattering.scatters(small)
    assert channels.cost() == paamops.trace(model, x).cost()
    assert channels.cost().bytes == bytes_of(model)


def test_the_model_is_left_as_it_was():
    model, (x,) = make(Basic)

    def state():
        hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
        return hooks, list(model.state_dict()), [m.training for m in model.modules()]

    before = state()
    channels = paamops.trace(model, x, residual="scatter")
    paamops.mask(model, channels, random_keep(channels, 0.5))
    paamops.pack(model, channels, random_keep(channels, 0.5))
    assert state() == before
    with pytest.raises(ValueError, match="the forward pass of model fails"):
        paamops.trace(model, x[:, :2], residual="scatter")
    with pytest.raises(ValueError, match="keep removes"):
        paamops.pack(model, channels, ~channels.pinned & False)
    assert state() == before
    other, _ = make(PreActivation)
    with pytest.raises(ValueError, match="model is not the traced network"):
        paamops.pack(other, channels, random_keep(channels, 0.5))
    with pytest.raises(TypeError, match="model is a list; it must be"):
        paamops.pack([], channels, random_keep(channels, 0.5))


class Made(nn.Module):
    """A stream of 6 channels, and a forward pass given as a function that adds something to it."""

    def __init__(self, forward):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.depth, self.last = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 2, 1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.add = forward

    def forward(self, x):
        return self.last(F.relu(self.add(self, F.relu(self.stem(x)))))


TIED = {
    "read by another layer first": lambda s, x: x + (y := s.a(x)) + s.b(y),
    "read by another layer afterwards": lambda s, x: s.b((y := s.a(x)) + x) * y,
    "the stream itself": lambda s, x: x + x,
    "twice the branch": lambda s, x: (y := s.a(x)) + y,
    "scaled by the sum": lambda s, x: torch.add(x, s.a(x), alpha=2),
    "used twice": lambda s, x: (x := x + s.a(x)) + s.a(x),
    "without a module": lambda s, x: x + F.conv2d(x, s.a.weight),
    "depthwise on the stream": lambda s, x: x + s.depth(x),
    "the stream, pooled": lambda s, x: F.conv2d(x, s.a.weight) + s.pool(x),
    "one map for all channels": lambda s, x: x + s.a(x)[:, :1],
}  # fmt: skip


@pytest.mark.parametrize("forward", TIED.values(), ids=TIED)
def test_what_stays_tied(forward):
    model, x = Made(forward).double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    channels = paamops.trace(model, x, residual="scatter")
    assert not {"a", "depth", "pool"} & set(channels.hosts)
    check_law(model, x, channels, random_keep(channels, 0.5))


FREED = {
    "two branches, one sum": (lambda s, x: x + s.a(x) + s.b(x), {"a": 6, "b": 6}),
    "two branches first": (lambda s, x: x + (s.a(x) + s.b(x)), {"a": 6}),
    "what is left over is the stream": (lambda s, x: s.a(x) + s.b(F.relu(s.depth(x))), {"b": 6}),
    "in place, into the stream": (lambda s, x: x.add_(s.a(x)), {"a": 6}),
    "half precision within": (lambda s, x: x + s.a(x).float().double(), {"a": 6}),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "hosts"), FREED.values(), ids=FREED)
def test_what_is_freed(forward, hosts):
    model, x = Made(forward).double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    channels = paamops.trace(model, x, residual="scatter")
    assert channels.hosts == hosts
    small, twin = (make(model, channels, random_keep(channels, 1.0)) for make in (paamops.pack, paamops.mask))
    assert torch.equal(small(x), twin(x))
    if forward is not FREED["half precision within"][0]:
        check_law(model, x, channels, random_keep(channels, 0.5))


def test_pinned_layers_stay_whole_and_their_stream_need_not():
    model, (x,) = make(Basic)
    channels = paamops.trace(model, x, pinned="b.0", residual="scatter")
    layer = [layer.name for layer in channels.layers].index("b.0")
    assert channels.pinned[channels.sets[channels.filters == layer]].all()
    keep = channels.pinned.clone() | channels.guarded(torch.rand(len(channels.pinned)).double())
    small = check_law(model, x, channels, keep)
    assert len(small.b[0].weight) == 8
    assert len(small.stem.weight) == 1
    assert (scattering.scatters(small)["norms.0"].index >= 0).sum() == 1  # the others have lost their place


def test_scores_are_taken_at_the_branch_itself():
    model, (x,) = make(Basic)
    channels = paamops.trace(model, x, residual="scatter")
    scores = paamops.score(model, channels, x)
    seen = {}
    model.norms[1].register_forward_hook(lambda module, args, output: seen.update(y=output))
    model(x)
    layer = [layer.name for layer in channels.layers].index("b.1")
    torch.testing.assert_close(scores[channels.filters == layer].double(), seen["y"].abs().mean((0, 2, 3)))


@pytest.mark.parametrize("budget", [{"params": 0.4}, {"flops": 0.5}, {"filters": 0.3}, {"params": 0.5, "round_to": 2}])
def test_select(budget):
    model, (x,) = make(Basic)
    channels = paamops.trace(model, x, residual="scatter")
    selection = paamops.select(channels, paamops.score(model, channels, x), **budget)
    ((name, asked),) = selection.asked.items()
    assert getattr(selection.achieved, name) <= asked
    small = check_law(model, x, channels, selection.keep)
    assert sum(p.numel() for p in small.parameters()) == selection.achieved.params
    paamops.select(channels, paamops.score(paamops.mask(model, channels, selection), channels, x), filters=0.9)


def test_a_branch_does_not_outlive_its_place_in_the_stream():
    """Whatever the scores, the budget is not spent on filters that write to a channel that is gone."""
    model, (x,) = make(Basic)
    channels = paamops.trace(model, x, residual="scatter")
    for _ in range(5):
        scores = torch.rand(len(channels.filters))
        guarded = channels.guarded(channels.capped(channels.set_scores(scores)))
        for each in (paamops.select(channels, scores, params=0.5), paamops.select(channels, scores, threshold=0.5)):
            small = paamops.pack(model, channels, each)
            lost = sum(int((s.index < 0).sum()) for s in scattering.scatters(small).values())
            names = [layer.name for layer in channels.layers]
            spared = sum(int(guarded[channels.sets[channels.filters == names.index(f"b.{k}")]].sum()) for k in range(3))
            assert lost <= spared


@pytest.mark.parametrize(("writer", "count"), [("stem", 3), ("project", 1)])
def test_a_branch_goes_with_its_place_in_the_stream(writer, count):
    """Within the budget: where a channel of a stream scores low, the filters that are added to it are no better."""
    model, (x,) = make(Basic)
    channels = paamops.trace(model, x, residual="scatter")
    layers = {layer.name: channels.sets[channels.filters == k] for k, layer in enumerate(channels.layers)}
    scores = torch.ones(len(channels.filters))
    scores[layers[writer][5]] = 0.1  # every filter is a set of its own here
    selection = paamops.select(channels, scores, filters=len(scores) - count)
    removed = {name: (~selection.keep[ids]).nonzero().flatten().tolist() for name, ids in layers.items()}
    branches = {"stem": ("b.0", "b.1"), "project": ("b.2",)}[writer]
    assert removed == {name: [5] if name in (writer, *branches) else [] for name in layers}


def random_small(network=Basic, share=0.5):
    """A packed network with at least one branch that is added by index, its masked twin and an input."""
    model, (x,) = make(network)
    channels = paamops.trace(model, x, residual="scatter")
    keep = torch.ones_like(channels.pinned)
    while not scattering.scatters(small := paamops.pack(model, channels, keep)):
        keep = random_keep(channels, share)
    return small, paamops.mask(model, channels, keep), x


def test_saved_and_loaded(tmp_path):
    small, _, x = random_small()
    paamops.save(small, tmp_path / "small.safetensors")
    again = paamops.load(tmp_path / "small.safetensors", model=Basic)
    assert torch.equal(again(x), small(x))
    assert list(scattering.scatters(again)) == list(scattering.scatters(small))
    channels = paamops.trace(again, x, residual="scatter")
    check_law(again, x, channels, random_keep(channels, 0.5))
    with pytest.raises(ValueError, match=r"it is not its file|not a file of this network"):
        paamops.load(tmp_path / "small.safetensors", model=PreActivation)


def test_built_in_networks_are_loaded_by_their_recipe(tmp_path):
    model, x = built("resnet20")
    channels = paamops.trace(model, x, residual="scatter")
    small = paamops.pack(model, channels, random_keep(channels, 0.5))
    paamops.save(small, tmp_path / "small")
    again = paamops.load(tmp_path / "small")
    assert torch.equal(again(x), small(x))
    paamops.save(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "small").read_bytes()


def test_a_tampered_index_is_refused(tmp_path):
    small, _, _ = random_small()
    paamops.save(small, tmp_path / "good")
    with safetensors.safe_open(tmp_path / "good", framework="pt") as file:
        names, header = file.keys(), json.loads(file.metadata()["paamops"])
        tensors = {name: file.get_tensor(name) for name in names}
    path = next(iter(scattering.scatters(small)))
    source, index = f"{path}.scatter.source", f"{path}.scatter.index"

    def write(tensors, header):
        header = {**header, "digest": saving.digest(header, tensors)}  # as whoever means it would
        (tmp_path / "bad").write_bytes(safetensors.torch.save(tensors, metadata={"paamops": json.dumps(header)}))
        return tmp_path / "bad"

    for value in (10**9, -2, len(tensors[index])):
        wrong = tensors[source].clone()
        wrong[0] = value
        with pytest.raises(ValueError, match="are not each other's inverse"):
            paamops.load(write({**tensors, source: wrong}, header), model=Basic)
    with pytest.raises(ValueError, match=r"which paamops\.save never writes"):
        paamops.load(write({**tensors, index: tensors[index].double()}, header), model=Basic)
    for wrong in ([], {path: "much"}, {path: [1, 2]}, {"": header["scatters"][path]}):
        with pytest.raises(ValueError, match=r"never writes|not its file"):
            paamops.load(write(tensors, {**header, "scatters": wrong}), model=Basic)
    with pytest.raises(ValueError, match="has, unlike the network"):
        paamops.load(write(tensors, {k: v for k, v in header.items() if k != "scatters"}), model=Basic)


def test_copies_pickles_and_state_dicts():
    small, _, x = random_small(Excited)
    for again in (copy.deepcopy(small), torch.load(saved(small), weights_only=False)):
        assert torch.equal(again(x), small(x))
        assert again.stem is not small.stem
    fresh = copy.deepcopy(small)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))
    assert not any(p.dtype == torch.int64 for p in small.parameters())
    assert small.half().state_dict()[f"{next(iter(scattering.scatters(small)))}.scatter.index"].dtype == torch.int64


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_gradients_are_those_of_the_masked_twin():
    """Of what is left: the twin's at the kept places."""
    for network in (Basic, PreActivation, Excited):
        model, (x,) = make(network)
        channels = paamops.trace(model, x, residual="scatter")
        keep = random_keep(channels, 0.5)
        small, twin = paamops.pack(model, channels, keep), paamops.mask(model, channels, keep)
        grad, indices = torch.randn_like(small(x)), kept_indices(channels, keep)
        small(x).backward(grad)
        twin(x).backward(grad)
        for name, parameter in twin.named_parameters():
            expected = parameter.grad
            for axis, index in enumerate(indices[name]):
                expected = expected if index is None else expected.index_select(axis, index)
            close(small.get_parameter(name).grad, expected)


def test_it_trains():
    small, _, x = random_small()
    small, x = small.float().train(), x.float()
    optimizer = torch.optim.SGD(small.parameters(), 0.05)
    before = [s.index.clone() for s in scattering.scatters(small).values()]
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(small(x), torch.tensor([0, 1])))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, before, [s.index for s in scattering.scatters(small).values()]))


def test_channels_last_and_autocast():
    small, twin, x = random_small()
    last = copy.deepcopy(small).to(memory_format=torch.channels_last)
    scatter = next(iter(scattering.scatters(last).values()))
    scatter.register_forward_hook(lambda module, args, output: layouts.append(output.stride(1)))
    layouts = []
    close(last(x.contiguous(memory_format=torch.channels_last)), small(x))
    assert layouts == [1] or len(scatter.index) == 1
    small, twin, x = small.float(), twin.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, expected = small(x), twin(x)
    torch.testing.assert_close(actual, expected, **NETWORK_TOLERANCE[torch.bfloat16])
    assert actual.dtype == torch.bfloat16


def test_exported_networks_hold_ops_of_pytorch_alone():
    small, _, x = random_small(Excited)
    program = torch.export.export(small, (x,))
    close(program.module()(x), small(x))
    assert not [node for node in program.graph.nodes if "paamops" in str(node.target)]
    traced = torch.jit.trace(small, x)
    close(traced(x), small(x))
    assert "paamops::" not in str(traced.inlined_graph)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_as_one_graph(backend):
    small, _, x = random_small(PreActivation)
    compiled = torch.compile(small, fullgraph=True, backend=backend)
    with torch.no_grad():
        close(compiled(x), small(x))
    grad = torch.randn_like(small(x))
    small(x).backward(grad)
    expected = [p.grad.clone() for p in small.parameters()]
    small.zero_grad()
    compiled(x).backward(grad)
    for parameter, right in zip(small.parameters(), expected, strict=True):
        close(parameter.grad, right)
    torch.compiler.reset()


def test_with_excitations():
    """A squeeze-and-excitation that hangs on the norm is part of the branch."""
    model, (x,) = make(Basic)
    paamops.excite(model, x)
    channels = paamops.trace(model, x, residual="scatter")
    assert list(channels.hosts) == [f"norms.{place}.excitation" for place in range(3)]
    small = check_law(model, x, channels, random_keep(channels, 0.5))
    again = paamops.trace(small, x, residual="scatter")
    check_law(small, x, again, random_keep(again, 0.5))


def test_excitations_on_a_packed_branch(tmp_path):
    """They scale its channels before these go to their places."""
    model, x = built("resnet20")
    channels = paamops.trace(model, x, residual="scatter")
    small = paamops.pack(model, channels, random_keep(channels, 0.5))
    paamops.excite(small, x)
    again = paamops.trace(small, x, residual="scatter")
    smaller = check_law(small, x, again, random_keep(again, 0.5))
    paamops.save(smaller, tmp_path / "small")
    assert torch.equal(paamops.load(tmp_path / "small")(x), smaller(x))


def test_a_scatter_that_no_pack_put_there():
    """Its channels stay; what reads and what feeds it is pruned as ever."""
    index = torch.tensor([4, 0, 2])
    scatter = scattering.Scatter(index, scattering.inverse(index, 6))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), scatter, nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    channels = paamops.trace(model, x)
    assert channels.pinned[:3].all()
    check_law(model.eval(), x, channels, random_keep(channels, 0.3))
    assert repr(scatter) == "Scatter(3 of 6 channels)"
