"""Schedules as data; training that learns, repeats itself and refuses what it cannot use; latency and file size."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from paamops import data, measuring, saving, training
from paamops.data.sets import assemble

pytest.importorskip("lightning_fabric")


@pytest.fixture(scope="module")
def stripes():
    """400 images of 8x8 noise with a bright row or a bright column: learnt in seconds, never by chance."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (400, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(400) % 2
    images[labels == 0, :, 4, :] += 150
    images[labels == 1, :, :, 4] += 150
    splits = data.Split(images[:300], labels[:300]), data.Split(images[300:], labels[300:])
    return assemble("stripes", 2, *splits, flip=True)


@pytest.fixture(scope="module")
def fabric():
    return training.make_fabric("cpu")


def network(seed=0, outputs=2):
    torch.manual_seed(seed)
    conv = nn.Conv2d(1, 8, 3, padding=1)
    return nn.Sequential(
        conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, outputs)
    )


def fit(model, stripes, fabric, **changes):
    settings = {"epochs": 6, "batch_size": 32, "seed": 3, "quiet": True} | changes
    return training.train(model, stripes, fabric, training.SCHEDULES["resnet"], **settings)


def test_learning_rates_of_the_papers():
    rates = training.learning_rates(training.SCHEDULES["resnet"], 182)
    assert rates == pytest.approx([0.1] * 91 + [0.01] * 45 + [0.001] * 46)
    rates = training.learning_rates(training.SCHEDULES["vgg"], 240)
    assert rates == pytest.approx([0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30)
    assert training.learning_rates(training.SCHEDULES["lenet"], 3) == [0.02] * 3
    assert training.learning_rates(training.SCHEDULES["resnet"], 4) == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert training.learning_rates(training.SCHEDULES["resnet"], 2, rewind=0.5) == pytest.approx([0.01, 0.001])


@pytest.mark.parametrize(
    ("name", "schedule"), [("resnet110", "resnet"), ("vgg16", "vgg"), ("lenet5", "lenet"), ("mine", "resnet")]
)
def test_schedule_of_a_network(name, schedule):
    assert training.schedule_for(name) is training.SCHEDULES[schedule]


def test_learns_in_place(stripes, fabric):
    model = network()
    assert training.accuracy(model, stripes, stripes.test) < 0.8
    assert fit(model, stripes, fabric) is model
    assert training.accuracy(model, stripes, stripes.test) > 0.95
    assert model.training


def test_same_seed_same_weights(stripes, fabric):
    first, second, other = (fit(network(), stripes, fabric, seed=seed, epochs=2) for seed in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first[0].weight, other[0].weight)


def test_only_the_training_split_is_seen(stripes, fabric):
    emptied = stripes.__class__(**{**vars(stripes), "test": None, "validation": None})
    emptied.__class__.to, to = lambda self, device: self, emptied.__class__.to
    try:
        model = fit(network(), emptied, fabric, epochs=1)
    finally:
        emptied.__class__.to = to
    assert torch.equal(model[0].weight, fit(network(), stripes, fabric, epochs=1)[0].weight)


def test_mixed_precision(stripes):
    model = fit(network(), stripes, training.make_fabric("cpu", "bf16-mixed"))
    assert model[0].weight.dtype == torch.float32
    assert training.accuracy(model, stripes, stripes.test) > 0.9


def test_refuses_what_it_cannot_use(stripes, fabric):
    with pytest.raises(ValueError, match=r"output is \(32, 3\); for 32 images of 2 classes it must be \(32, 2\)"):
        fit(network(outputs=3), stripes, fabric)
    with pytest.raises(ValueError, match="batch_size is 0"):
        fit(network(), stripes, fabric, batch_size=0)
    model = network()
    model[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"loss is nan after epoch 1: training diverged"):
        fit(model, stripes, fabric)


def test_accuracy_counts_and_keeps_the_mode(stripes):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 0.0]))

        def forward(self, x):
            assert not self.training
            return self.bias.expand(len(x), 2)

    model = Constant()
    assert training.accuracy(model, stripes, stripes.test, batch_size=7) == 0.5
    assert model.training


def test_missing_package_names_the_extra(monkeypatch):
    for module in ("lightning.fabric", "lightning_fabric"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install paamops\[train\]"):
        training.make_fabric("cpu")


def test_latency_and_file_size(tmp_path):
    models = [nn.Conv2d(8, 64, 3), nn.Conv2d(8, 64, 3)]
    models[0].eval()
    times = measuring.latency(models, torch.randn(2, 8, 32, 32), seconds=0.1, least=3)
    assert all(0 < seconds < 10 for seconds in times)
    assert [model.training for model in models] == [False, True]
    saving.save(models[0], tmp_path / "m.safetensors")
    assert measuring.file_size(models[0]) == (tmp_path / "m.safetensors").stat().st_size


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    """Each takes half of every batch; they end with the same weights and the same statistics."""
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from paamops import data, models, training
            torch.set_num_threads(1)
            fabric = training.make_fabric("cpu", processes=2)
            fabric.launch()
            torch.manual_seed(0)
            model = models.build("lenet5", in_channels=1)
            digits = data.load("digits")
            training.train(model, digits, fabric, training.SCHEDULES["lenet"], epochs=1, batch_size=64, quiet=True)
            own = torch.cat([t.double().flatten() for t in model.state_dict().values()])
            both = fabric.all_gather(own)
            assert both.shape[0] == 2 and torch.equal(both[0], both[1])
            if fabric.is_global_zero:
                print("accuracy", training.accuracy(model, digits, digits.test))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, cwd=os.getcwd(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.5
