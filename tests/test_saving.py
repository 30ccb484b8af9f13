"""What is saved comes back exactly, or not at all."""

import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

import paamops
from paamops import models, saving
from paamops.saving import load, save
from tests import networks
from tests.test_packing import check_law, random_keep


class Odd(nn.Module):
    """Several dtypes, a tied weight, a buffer outside the state dict, a frozen parameter, a sliced one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight
        self.conv = nn.Conv2d(4, 8, 3, groups=2).to(torch.bfloat16)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2).half()
        self.norm = nn.GroupNorm(2, 4)
        self.slope = nn.PReLU(4)
        self.slope.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.randn(4, 6, dtype=torch.float64)[:, ::2])
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)
        self.register_buffer("scalar", torch.tensor(3))


def pruned():
    """ResNet-20 with random weights and statistics, packed to half."""
    model = models.build("resnet20")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    channels = paamops.trace(model, torch.zeros(1, 3, 32, 32))
    selection = paamops.select(channels, torch.rand(len(channels.filters)), params=0.5)
    return paamops.pack(model, channels, selection)


def assert_same(first, second):
    one, two = saving.named_tensors(first), saving.named_tensors(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name
        assert tensor.requires_grad == two[name].requires_grad, name
    for (name, a), b in zip(first.named_modules(), second.modules(), strict=True):
        assert saving.module_sizes(a) == saving.module_sizes(b), name
        assert a.training == b.training


def test_packed_network_round_trip(tmp_path):
    small = pruned().eval()
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors")
    assert_same(small, again)
    assert again.paamops_recipe == small.paamops_recipe
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(small(x), again(x))
    again.train()(x).sum().backward()  # trainable, and traceable once more
    channels = paamops.trace(again, x)
    assert channels.cost().params == sum(p.numel() for p in small.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["small.safetensors"]


def test_same_model_same_bytes(tmp_path):
    small = pruned()
    save(small, tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_users_own_network(tmp_path):
    model = Odd()
    save(model, tmp_path / "odd")
    with pytest.raises(ValueError, match=r"holds a .*Odd; pass model="):
        load(tmp_path / "odd")
    again = load(tmp_path / "odd", model=Odd)
    assert_same(model, again)
    assert again.out.weight is again.embed.weight
    assert "mask" not in again.state_dict()
    with pytest.raises(TypeError, match="model is a Odd; it must be a function"):
        load(tmp_path / "odd", model=Odd())
    with pytest.raises(TypeError, match="model built a dict"):
        load(tmp_path / "odd", model=dict)


def test_channels_last_values(tmp_path):
    model = models.build("lenet5").to(memory_format=torch.channels_last)
    save(model, tmp_path / "m")
    assert_same(model, load(tmp_path / "m"))


def test_another_network_is_refused(tmp_path):
    save(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), tmp_path / "m")
    with pytest.raises(ValueError, match=r"m: lacks 2.bias, 2.weight; it is not a file of this network"):
        load(tmp_path / "m", lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"has, unlike the network, 1.bias, 1.weight"):
        load(tmp_path / "m", lambda: nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"1.bias is \(2,\), which is no part of the network's \(1,\)"):
        load(tmp_path / "m", lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
    with pytest.raises(ValueError, match="has sizes of 1 that the network does not have"):
        load(tmp_path / "m", lambda: nn.Sequential(nn.Linear(3, 2), nn.Bilinear(2, 2, 2)))


def test_what_was_kept_comes_back_and_can_be_pruned_again(tmp_path):
    original, inputs = networks.make(networks.Depthwise)
    model = original
    for number in range(3):
        channels = paamops.trace(model, inputs)
        model = paamops.pack(model, channels, random_keep(channels, 0.6))
        save(model, tmp_path / str(number))
        again = load(tmp_path / str(number), networks.Depthwise)
        assert torch.equal(again(*inputs), model(*inputs))
        assert str(paamops.kept(again)) == str(paamops.kept(model))
        check_law(again, inputs, random_keep(other := paamops.trace(again, inputs), 0.5), other)
        save(again, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / str(number)).read_bytes()
        model = again
    kept = paamops.kept(model)
    assert any(index is not None for axes in kept.values() for index in axes)
    rows = kept["stem.weight"][0]
    assert torch.equal(model.stem.weight, original.stem.weight if rows is None else original.stem.weight[rows])


def test_each_module_keeps_its_mode(tmp_path):
    model = models.build("resnet20").train()
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][3:5]
    for module in frozen:
        module.eval()
    save(model, tmp_path / "m")
    assert_same(model, load(tmp_path / "m"))


def test_every_changed_byte_is_found(tmp_path):
    """One bit of the file, anywhere: it is refused, and never with anything but a ValueError."""
    path = tmp_path / "m"
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    channels = paamops.trace(model, torch.randn(1, 3, 4, 4))
    save(paamops.pack(model, channels, random_keep(channels, 0.4)), path)
    whole = path.read_bytes()
    tensors = torch.randint(8 + int.from_bytes(whole[:8], "little"), len(whole), (150,)).tolist()
    for place in torch.randint(len(whole), (150,)).tolist() + tensors:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(torch.randint(8, ()))
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"m: "):
            load(path, lambda: model)
    path.write_bytes(whole + b"0")
    with pytest.raises(ValueError, match="m: truncated, or not a safetensors file"):
        load(path, lambda: model)


def test_an_edited_file_is_refused(tmp_path):
    save(models.build("lenet5"), tmp_path / "m")
    with safetensors.safe_open(tmp_path / "m", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["conv1.bias"][3] += 1
    safetensors.torch.save_file(tensors, tmp_path / "m", metadata)
    with pytest.raises(ValueError, match="m: damaged, or changed since it was written: its digest is not that"):
        load(tmp_path / "m")
    header = json.loads(metadata["paamops"])
    tensors["conv1.bias"][3] -= 1
    header["training"] = not header["training"]
    safetensors.torch.save_file(tensors, tmp_path / "m", {"paamops": json.dumps(header)})
    with pytest.raises(ValueError, match="m: damaged, or changed since it was written"):
        load(tmp_path / "m")


class Strided(nn.Module):
    """Layers whose sizes do not tell it from another one: stride, activation, width."""

    def __init__(self, stride=1, activation=nn.ReLU, width=8):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, stride), nn.Conv2d(width, 4, 3)
        self.activation = activation()

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: Strided(stride=2), "first"),
        (lambda: Strided(activation=nn.GELU), "activation"),
        (lambda: Strided(width=10), "first, second"),
        (lambda: Strided(2, nn.ELU, 9), "first, second, activation"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_another_architecture_is_refused_by_the_module(tmp_path, build, names, packed):
    model, x = Strided(), torch.randn(1, 3, 12, 12)
    channels = paamops.trace(model, x)
    small = paamops.pack(model, channels, torch.arange(12) > 2) if packed else model
    save(small, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", Strided)(x), small(x))
    with pytest.raises(ValueError, match=f"not of this network, whose sizes, kinds or settings differ in {names}$"):
        load(tmp_path / "m", build)


def test_what_was_changed_after_packing_is_built_as_changed(tmp_path):
    model, x = Strided(), torch.randn(1, 3, 12, 12)
    channels = paamops.trace(model, x)
    small = paamops.pack(model, channels, torch.arange(12) > 2)
    small.first.stride, small.activation, small.second = (2, 2), nn.GELU(), nn.Conv2d(5, 2, 1)

    def build():
        network = Strided(2, nn.GELU)
        network.second = nn.Conv2d(8, 2, 1)
        return network

    save(small, tmp_path / "m")
    again = load(tmp_path / "m", build)
    assert torch.equal(again(x), small(x))
    assert paamops.kept(again).keys() == {"first.weight", "first.bias"}


def test_it_is_built_without_memory(tmp_path):
    devices = []

    class Big(nn.Linear):
        def __init__(self):
            super().__init__(10**6, 10**6)  # 4 TB
            devices.append(self.weight.device.type)

    def build():
        return nn.Sequential(Big())

    with torch.device("meta"):
        model = build()
    model[0].weight, model[0].bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    model[0].in_features, model[0].out_features = 3, 2
    paamops.plan.install(model, {}, {})  # as one whose indices nobody knows
    save(model, tmp_path / "m")
    devices.clear()
    assert torch.equal(load(tmp_path / "m", build)[0].weight, torch.ones(2, 3))
    assert devices == ["meta"]


class Valued(nn.Module):
    """It looks at values of tensors while it is built, or keeps one that is neither parameter nor buffer."""

    def __init__(self, how):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        if how == "looks":
            self.rate = torch.linspace(0, 1, 3).tolist()
        elif how == "keeps":
            self._scale = {"of": [torch.full((1,), 3.0)]}

    def forward(self, x):
        return self.conv(x) * (self._scale["of"][0] if hasattr(self, "_scale") else 1)


@pytest.mark.parametrize("how", ["looks", "keeps", "neither"])
def test_what_needs_the_values_of_its_tensors_is_built_with_them(tmp_path, how):
    model, x = Valued(how), torch.randn(1, 3, 4, 4)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", lambda: Valued(how))
    assert torch.equal(again(x), model(x))
    assert getattr(again, "rate", [0, 0.5, 1]) == [0, 0.5, 1]
    with pytest.raises(ZeroDivisionError):
        load(tmp_path / "m", lambda: 1 / 0)


def test_a_file_of_format_1_is_read(tmp_path):
    """With what it does not tell left open, also when it is saved again."""
    original, inputs = networks.make(networks.Depthwise)
    channels = paamops.trace(original, inputs)
    model = paamops.pack(original, channels, random_keep(channels, 0.5))
    save(model, tmp_path / "m")
    with safetensors.safe_open(tmp_path / "m", "pt") as file:
        header = json.loads(file.metadata()["paamops"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for key in ("modes", "source", "kept", "digest"):
        del header[key]
    header["version"] = 1
    safetensors.torch.save_file(tensors, tmp_path / "m", {"paamops": json.dumps(header)})
    for _ in range(2):
        again = load(tmp_path / "m", networks.Depthwise)
        assert torch.equal(again(*inputs), model(*inputs))
        assert paamops.kept(again) == {}
        save(again, tmp_path / "m")
    check_law(again, inputs, random_keep(other := paamops.trace(again, inputs), 0.5), other)


def test_kept_indices_of_a_second_name(tmp_path):
    model, inputs = networks.make(networks.Repeated)
    channels = paamops.trace(model, inputs)
    save(paamops.pack(model, channels, random_keep(channels, 0.5)), tmp_path / "m")
    load(tmp_path / "m", networks.Repeated)
    rewrite(tmp_path / "m", lambda t, h: h["kept"]["axes"].update({"other.weight": h["kept"]["axes"]["one.weight"]}))
    with pytest.raises(ValueError, match=r"m: its header's kept indices .*other.weight"):
        load(tmp_path / "m", networks.Repeated)


def kept_of(change):
    """A change of the kept indices of a packed network's file."""
    return lambda tensors, header: change(header["kept"])


@pytest.mark.parametrize(
    "change",
    [
        kept_of(lambda k: k.pop("vectors")),
        kept_of(lambda k: k.update(axes=[])),
        kept_of(lambda k: k["axes"].update(nothing=[0])),
        kept_of(lambda k: k["axes"].update({"first.weight": [0]})),
        kept_of(lambda k: k["axes"].update({"first.weight": [7, None, None, None]})),
        kept_of(lambda k: k["axes"].update({"first.weight": [None] * 4})),
        kept_of(lambda k: k["vectors"][0].reverse()),
        kept_of(lambda k: k["vectors"][0].pop()),
        kept_of(lambda k: k["vectors"].__setitem__(0, [4, 5, 6, 7, 8])),
        kept_of(lambda k: k["vectors"].__setitem__(0, [-1, 5, 6, 7])),
        kept_of(lambda k: k["vectors"].__setitem__(0, "abcde")),
        kept_of(lambda k: k["vectors"].__setitem__(0, [[3], [4], [5], [6], [7]])),
        kept_of(lambda k: k["vectors"].__setitem__(0, [3.5, 4, 5, 6, 7])),
        lambda t, h: h.update(kept=[]),
        lambda t, h: h.update(modes=["nowhere"]),
        lambda t, h: h.update(modes=[[]]),
        lambda t, h: h.update(source=[]),
        lambda t, h: h["source"].update(nowhere="12345678"),
        lambda t, h: h.update(digest=3),
    ],
)
def test_an_inconsistent_plan(tmp_path, change):
    model = Strided()
    channels = paamops.trace(model, torch.randn(1, 3, 12, 12))
    save(paamops.pack(model, channels, torch.arange(12) > 2), tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(
        ValueError, match=r"m: .*(kept indices|kept is|modes?|source|digest|settings differ in nowhere)"
    ):
        load(tmp_path / "m", Strided)


def rewrite(path, change):
    """Change the tensors and the header of a file."""
    with safetensors.safe_open(path, "pt") as file:
        header, names = json.loads(file.metadata()["paamops"]), file.keys()
        tensors = {name: file.get_tensor(name).clone() for name in names}
    change(tensors, header)
    if isinstance(header.get("digest"), str):
        header["digest"] = saving.digest(header, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {"paamops": json.dumps(header)}))


def tie_biases(tensors, header):
    del tensors["conv1.bias"]
    header["ties"]["conv1.bias"] = "conv2.bias"


def enlarge(tensors, header):
    """What no memory holds: the shapes must be compared before any is asked for."""
    header["recipe"]["num_classes"] = header["sizes"]["linear2"]["out_features"] = 10**12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.pop("conv1.weight"), "lacks conv1.weight"),
        (lambda t, h: t.update(more=torch.zeros(1)), "has, unlike the network, more"),
        (lambda t, h: t.update({"conv1.bias": torch.zeros(19)}), r"conv1.bias is \(19,\); .* ask for \(20,\)"),
        (lambda t, h: h["sizes"]["linear1"].update(in_features=9), r"linear1.weight is \(500, 800\); .* \(500, 9\)"),
        (lambda t, h: h["sizes"]["linear1"].update(forward=1), "sizes of linear1"),
        (lambda t, h: h["sizes"].update(nowhere={"groups": 1}), "sizes of nowhere"),
        (lambda t, h: h["ties"].update({"conv1.bias": "x"}), "header names x, which it does not hold"),
        (lambda t, h: h["frozen"].append("y"), "header names y, which it does not hold"),
        (lambda t, h: h["recipe"].update(name="lenet6"), r"its recipe .*lenet6.* is not one of paamops.models"),
        (lambda t, h: h.update(version=3), "written in format 3; this version of paamops reads formats 1 and 2"),
        (lambda t, h: h.pop("ties"), "its header lacks ties"),
        (lambda t, h: h.update(ties=[]), r"its header's ties is \[\], which"),
        (lambda t, h: h.update(ties={"more": []}), r"names \[\], which it does not hold"),
        (lambda t, h: h.update(ties={"conv1.bias": "conv2.bias"}), "conv1.bias is both stored and tied to conv2.bias"),
        (tie_biases, r"conv1.bias is \(50,\); its module's sizes ask for \(20,\)"),
        (lambda t, h: h.update(frozen="conv1.bias"), "its header's frozen is 'conv1.bias', which"),
        (lambda t, h: h.update(frozen=[["conv1.bias"]]), r"names \['conv1.bias'\], which it does not hold"),
        (lambda t, h: h.update(training="yes"), "its header's training is 'yes', which"),
        (lambda t, h: h.update(recipe="lenet5"), "its header's recipe is 'lenet5', which"),
        (lambda t, h: h["recipe"].update(name=["lenet5"]), "its recipe .* is not one of"),
        (lambda t, h: h["recipe"].update(in_channels=10**30), "its recipe .* is not one of"),
        (lambda t, h: h["recipe"].update(excitations=3), "its recipe .* is not one of"),
        (lambda t, h: h["recipe"].update(excitations={"conv1": 3}), "its recipe .* is not one of"),
        (lambda t, h: h["recipe"].update(excitations={"conv1": ["a", "none"]}), "its recipe .* is not one of"),
        (lambda t, h: h["recipe"].update(excitations={"conv9": [4, "none"]}), "its recipe .* is not one of"),
        (enlarge, r"linear2.bias is \(10,\); its module's sizes ask for \(1000000000000,\)"),
        (lambda t, h: h.update(sizes=[]), r"its header's sizes is \[\], which"),
        (lambda t, h: h["sizes"].update(conv1=3), "sizes of conv1 are 3; sizes are whole numbers"),
        (lambda t, h: h["sizes"]["conv1"].update(groups="1"), "sizes of conv1 are .*; sizes are whole numbers"),
        (lambda t, h: h["sizes"]["conv1"].update(groups=-1), "sizes of conv1 are .*; sizes are whole numbers"),
        (lambda t, h: h["sizes"]["conv1"].update(groups=0), "groups of conv1 is 0, in place of 1"),
        (lambda t, h: h["sizes"]["conv1"].update(groups=[1]), r"groups of conv1 is \(1,\), in place of 1"),
        (lambda t, h: t.update({"conv1.bias": torch.arange(20)}), "conv1.bias is torch.int64, which cannot be trained"),
    ],
)
def test_inconsistent_file(tmp_path, change, message):
    save(models.build("lenet5"), tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(ValueError, match=f"m: .*{message}"):
        load(tmp_path / "m")


def test_truncated_or_another_kind_of_file(tmp_path):
    path = tmp_path / "m"
    save(models.build("lenet5"), path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="m: truncated, or not a safetensors file"):
            load(path)
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"not one that paamops.save wrote"):
        load(path)
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        save(models.build("lenet5"), tmp_path / "nowhere" / "m")


@pytest.mark.parametrize("header", ["3", "[1]", "null", '"version"', "[" * 100_000])
def test_a_header_of_another_form(tmp_path, header):
    (tmp_path / "m").write_bytes(safetensors.torch.save({"x": torch.zeros(1)}, {"paamops": header}))
    with pytest.raises(ValueError, match=r"m: .*not one that paamops.save wrote"):
        load(tmp_path / "m")


def test_a_tie_between_a_parameter_and_a_buffer(tmp_path):
    save(nn.BatchNorm1d(3), tmp_path / "m")

    def change(tensors, header):
        del tensors["running_mean"]
        header["ties"]["running_mean"] = "bias"

    rewrite(tmp_path / "m", change)
    with pytest.raises(ValueError, match="m: running_mean is tied to bias; one is a parameter, the other a buffer"):
        load(tmp_path / "m", lambda: nn.BatchNorm1d(3))


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(models.build("lenet5"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    load(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    save(models.build("lenet5"), tmp_path / "dangling")
    load(tmp_path / "later")


def test_what_is_no_file_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "link", "loop"):
        with pytest.raises(ValueError, match=f"{name}: is not a regular file"):
            save(models.build("lenet5"), tmp_path / name)
    with pytest.raises(ValueError, match="is a folder; it must be a file"):
        save(models.build("lenet5"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "loop", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


class Bomb:
    went_off = False

    def __reduce__(self):
        return setattr, (Bomb, "went_off", True)


def test_nothing_is_unpickled(tmp_path):
    (tmp_path / "m").write_bytes(pickle.dumps(Bomb()))
    torch.save({"bomb": Bomb()}, tmp_path / "n")
    for name in ("m", "n"):
        with pytest.raises(ValueError, match="not a safetensors file"):
            load(tmp_path / name)
    assert not Bomb.went_off


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_interrupted_saving_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "m"
    save(models.build("lenet5"), path)
    before = path.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(models.build("lenet5"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert path.read_bytes() == before


def test_what_cannot_be_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return object()

    with pytest.raises(ValueError, match="0 keeps extra state"):
        save(nn.Sequential(Extra(2, 2)), tmp_path / "m")
    with pytest.raises(TypeError, match="model is a dict"):
        save({}, tmp_path / "m")
    assert not list(tmp_path.iterdir())
