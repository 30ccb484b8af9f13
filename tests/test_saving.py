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


def rewrite(path, change):
    """Change the tensors and the header of a file."""
    with safetensors.safe_open(path, "pt") as file:
        header, names = json.loads(file.metadata()["paamops"]), file.keys()
        tensors = {name: file.get_tensor(name).clone() for name in names}
    change(tensors, header)
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
