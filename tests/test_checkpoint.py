"""Training that is cut, anywhere and as often as it likes, ends in the weights of training that is not."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from paamops import checkpoint, data, training
from paamops.data.sets import assemble

lightning_fabric = pytest.importorskip("lightning_fabric")
Fabric = lightning_fabric.Fabric
MixedPrecision = lightning_fabric.plugins.MixedPrecision


class Cut(Exception):
    """What a kill is within one process."""


@pytest.fixture(scope="module")
def noise():
    """120 images of 8x8 noise in two classes: nothing to learn, much to get wrong."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (120, 1, 8, 8), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.arange(120) % 2)
    return assemble("noise", 2, split, split, flip=True)


@pytest.fixture(scope="module")
def fabric():
    return training.make_fabric("cpu")


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def fit(noise, fabric, path=None, model=None, **changes):
    settings = {"epochs": 5, "start_epoch": 2, "batch_size": 32, "seed": 3, "quiet": True} | changes
    schedule = settings.pop("schedule", training.SCHEDULES["resnet"])
    return training.train(model or network(), noise, fabric, schedule, checkpoint=path, **settings)


def fit_in_pieces(noise, fabric, path, monkeypatch, steps, **changes):
    """Every piece is cut in its step number `steps`; the number of pieces, and the model."""
    backward, pieces = fabric.backward, 0
    while True:
        left = iter(range(steps - 1))

        def cut(loss, left=left):
            if next(left, None) is None:
                raise Cut
            backward(loss)

        monkeypatch.setattr(fabric, "backward", cut)
        pieces += 1
        assert pieces <= 15, "it does not get any further"
        try:
            return pieces, fit(noise, fabric, path, **changes)
        except Cut:
            continue
        finally:
            monkeypatch.setattr(fabric, "backward", backward)


def assert_same(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("steps", [4, 5, 7, 9])  # an epoch has 3
def test_cut_training_ends_in_the_same_weights(noise, fabric, tmp_path, monkeypatch, steps):
    pieces, model = fit_in_pieces(noise, fabric, tmp_path / "c", monkeypatch, steps)
    assert pieces == -(-15 // (steps - 1 - (steps - 1) % 3))
    assert_same(model, fit(noise, fabric))
    assert os.listdir(tmp_path) == ["c"]


def test_what_was_done_is_not_done_again(noise, fabric, tmp_path, monkeypatch):
    model = fit(noise, fabric, tmp_path / "c")
    monkeypatch.setattr(training, "train_epoch", None)
    assert_same(fit(noise, fabric, tmp_path / "c"), model)
    facts = checkpoint.facts(tmp_path / "c")
    assert (facts["epoch"], facts["epochs"]) == (5, 5)
    assert facts["images_per_s"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 4},
        {"start_epoch": 1},
        {"total_epochs": 9},
        {"batch_size": 16},
        {"seed": 4},
        {"schedule": training.SCHEDULES["vgg"]},
        {"model": network(1)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_file_of_another_call_is_overwritten(noise, fabric, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(training, "write", cut_after(2, training.write))
    with pytest.raises(Cut):
        fit(noise, fabric, tmp_path / "c")
    monkeypatch.undo()
    other = checkpoint.facts(tmp_path / "c")["fingerprint"]
    start = changes.get("model", network()).state_dict()

    def again(path=None):
        model = network()
        model.load_state_dict(start)
        return fit(noise, fabric, path, **changes | {"model": model})

    start = {name: tensor.clone() for name, tensor in start.items()}
    assert_same(again(tmp_path / "c"), again())
    assert checkpoint.facts(tmp_path / "c")["fingerprint"] != other


def cut_after(count, function):
    calls = []

    def cut(*args):
        function(*args)
        calls.append(1)
        if len(calls) == count:
            raise Cut

    return cut


def test_a_smaller_set_or_another_precision_is_another_call(noise, fabric, tmp_path):
    fit(noise, fabric, tmp_path / "c")
    first = checkpoint.facts(tmp_path / "c")["fingerprint"]
    fewer = assemble("noise", 2, data.Split(noise.train.images[:90], noise.train.labels[:90]), noise.test, flip=True)
    fit(fewer, fabric, tmp_path / "c")
    second = checkpoint.facts(tmp_path / "c")["fingerprint"]
    fit(noise, training.make_fabric("cpu", "bf16-mixed"), tmp_path / "c")
    assert len({first, second, checkpoint.facts(tmp_path / "c")["fingerprint"]}) == 3


def test_unreadable_files_are_overwritten_with_a_warning(noise, fabric, tmp_path):
    path = tmp_path / "c"
    uncut = fit(noise, fabric, path)
    whole = path.read_bytes()
    wrong = json.dumps({"version": 99, "fingerprint": checkpoint.facts(path)["fingerprint"], "epoch": 5})
    tensors = {"a": torch.zeros(1)}
    for content in (
        b"",
        b"no file of ours",
        whole[:7],
        whole[: random.randrange(8, len(whole))],
        whole[:-1],
        safetensors.torch.save(tensors),
        safetensors.torch.save(tensors, {checkpoint.KEY: "["}),
        safetensors.torch.save(tensors, {checkpoint.KEY: wrong}),
    ):
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="is no checkpoint that can be read.*starts from its beginning") as seen:
            model = fit(noise, fabric, path)
        assert len(seen) == 1
        assert "\n" not in str(seen[0].message)
        assert_same(model, uncut)
        assert checkpoint.facts(path)["epoch"] == 5


def test_a_file_is_written_whole_or_not_at_all(noise, fabric, tmp_path, monkeypatch):
    path = tmp_path / "c"
    monkeypatch.setattr(training, "write", cut_after(2, training.write))
    with pytest.raises(Cut):
        fit(noise, fabric, path)
    monkeypatch.undo()
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    before = path.read_bytes()

    def cut(descriptor):
        raise Cut

    monkeypatch.setattr(os, "fsync", cut)  # what is to be renamed is there, the renaming does not come
    with pytest.raises(Cut):
        fit(noise, fabric, path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert_same(fit(noise, fabric, path), fit(noise, fabric))
    assert os.listdir(tmp_path) == ["c"]


def test_written_after_the_last_epoch_and_seldom_before(noise, fabric, tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(training, "write", lambda path, model, optimizer, facts: epochs.append(facts["epoch"]))
    fit(noise, fabric, tmp_path / "c")
    assert epochs == [1, 2, 3, 4, 5]
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 3600)
    fit(noise, fabric, tmp_path / "c")
    assert epochs == [1, 2, 3, 4, 5, 5]


def test_a_parameter_without_gradient_has_no_momentum(noise, fabric, tmp_path, monkeypatch):
    def make():
        model = network()
        model[0].weight.requires_grad_(False)
        return model

    monkeypatch.setattr(training, "write", cut_after(2, training.write))
    with pytest.raises(Cut):
        fit(noise, fabric, tmp_path / "c", make())
    monkeypatch.undo()
    assert "momentum 0.weight" not in safetensors.torch.load_file(tmp_path / "c")
    assert_same(fit(noise, fabric, tmp_path / "c", make()), fit(noise, fabric, model=make()))


def test_mixed_precision(noise, tmp_path, monkeypatch):
    fabric = training.make_fabric("cpu", "bf16-mixed")
    _, model = fit_in_pieces(noise, fabric, tmp_path / "c", monkeypatch, 8)
    assert_same(model, fit(noise, fabric))


def test_scaled_gradients(noise, tmp_path, monkeypatch):
    """In 16-mixed, which `make_fabric` gives on a GPU only: the scale goes on in a new process, and starts anew after
    another training."""

    def scaled():
        scaler = torch.amp.GradScaler("cpu", growth_interval=4)
        fabric = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))
        return fabric, fabric.strategy.precision.state_dict

    fabric, scale = scaled()
    uncut = fit(noise, fabric)
    grown = scale()
    assert grown["scale"] > training.SCALER["scale"]
    _, model = fit_in_pieces(noise, fabric, tmp_path / "c", monkeypatch, 8)
    assert_same(model, uncut)
    assert scale() == grown
    fabric, scale = scaled()
    assert_same(fit(noise, fabric, tmp_path / "c"), uncut)
    assert scale() == grown
    fit(noise, fabric, epochs=1)
    assert scale()["scale"] == training.SCALER["scale"]


def test_tied_weights_are_stored_once():
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2))
    tied[3].weight = tied[1].weight
    names = checkpoint.model_tensors(tied)
    assert "parameter 1.weight" in names
    assert "parameter 3.weight" not in names


SCRIPT = """
import hashlib, sys, torch
from paamops import data, models, training
torch.set_num_threads(1)
training.CHECKPOINT_SECONDS = 0
fabric = training.make_fabric("cpu", processes={processes})
fabric.launch()
torch.manual_seed(0)
model, digits = models.build("lenet5", in_channels=1), data.load("digits")
if fabric.is_global_zero:
    print("ready", flush=True)
training.train(
    model, digits, fabric, training.SCHEDULES["lenet"], epochs=6, batch_size=64, quiet=True,
    checkpoint=sys.argv[1] if len(sys.argv) > 1 else None,
)
state = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
if fabric.is_global_zero:
    print(hashlib.sha256(state).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(tmp_path, processes):
    script, path = tmp_path / "script.py", tmp_path / "c"
    script.write_text(textwrap.dedent(SCRIPT.format(processes=processes)))

    def start(*arguments):
        command = [sys.executable, script, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd(), start_new_session=True)

    began = time.monotonic()
    uncut = start().communicate(timeout=300)[0].split()[-1]
    most = (time.monotonic() - began) / 3
    kills = []
    while len(kills) < 5:
        process = start(path)
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, most))
        os.killpg(process.pid, signal.SIGKILL)  # its own group: the second process, too
        process.wait()
        kills.append(checkpoint.facts(path)["epoch"] if path.exists() else 0)
    print("epochs after each kill:", kills)
    assert kills == sorted(kills)
    assert start(path).communicate(timeout=300)[0].split()[-1] == uncut
