"""Schedules as data; training that learns, repeats itself and refuses what it cannot use; latency and file size."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paamops
from paamops import data, measuring, models, saving, training
from paamops.data.sets import assemble
from tests.tolerances import NETWORK_TOLERANCE

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
    assert training.learning_rates(training.SCHEDULES["resnet"], 2, start_epoch=2) == pytest.approx([0.01, 0.001])
    rates = training.learning_rates(training.SCHEDULES["resnet"], 182)
    assert training.learning_rates(training.SCHEDULES["resnet"], 46, start_epoch=136) == rates[136:]
    assert training.learning_rates(training.SCHEDULES["resnet"], 136, total_epochs=182) == rates[:136]
    rates = training.learning_rates(training.SCHEDULES["mobilenetv2"], 300)
    assert rates == pytest.approx([0.1] * 150 + [0.01] * 75 + [0.001] * 75)
    rates = training.learning_rates(training.SCHEDULES["shufflenet"], 200)
    assert rates == pytest.approx([0.1] * 60 + [0.01] * 60 + [0.001] * 40 + [0.0001] * 40)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("resnet110", "resnet"),
        ("resnet50", "resnet"),
        ("resnet101", "resnet101"),
        ("vgg16", "vgg"),
        ("vgg19", "vgg"),
        ("lenet5", "lenet"),
        ("lenet300-100", "lenet300-100"),
        ("mobilenetv2", "mobilenetv2"),
        ("shufflenet", "shufflenet"),
        ("mine", "resnet"),
    ],
)
def test_schedule_of_a_network(name, schedule):
    assert training.schedule_for(name) is training.SCHEDULES[schedule]


def test_every_built_in_network_has_its_own_schedule():
    for name in models.NETWORKS:
        found = training.schedule_for(name)
        assert name.startswith("resnet") or found is not training.SCHEDULES["resnet"], name


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
    with pytest.raises(ValueError, match="start_epoch are 6 and -1; they must be at least 0"):
        fit(network(), stripes, fabric, start_epoch=-1)
    with pytest.raises(ValueError, match="total_epochs is 7; it must be at least 8"):
        fit(network(), stripes, fabric, start_epoch=2, total_epochs=7)
    model = network()
    model[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"loss is nan after epoch 1: training diverged"):
        fit(model, stripes, fabric)


def test_nothing_waits_for_the_device_within_an_epoch(stripes, fabric):
    """No step reads a value or asks how many there are: on a GPU each such op would wait for all work before it."""
    model = network()
    optimizer = training.make_optimizer(model, training.SCHEDULES["resnet"], fabric.device)
    wrapped, optimizer = fabric.setup(model, optimizer)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            waiting.extend([op] if op in WAITING or boolean_index(op, args) else [])
            return op(*args, **(kwargs or {}))

    waiting = []
    with Watch():
        training.train_epoch(wrapped, optimizer, stripes, fabric, 32, seed=0)
    assert not waiting
    with Watch():  # the watch sees them
        stripes.train.labels[stripes.train.labels == 0].sum().item()
    assert len(waiting) == 2


WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


def boolean_index(op, args):
    if op not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_training(stripes, compiled, monkeypatch):
    """Nothing waits within an epoch, the strides come back, twice the same weights, and it learns."""
    epoch = training.train_epoch

    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return epoch(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    if not compiled:  # compilation itself may wait
        monkeypatch.setattr(training, "train_epoch", strict)
    fabric, models = training.make_fabric("cuda", "bf16-mixed"), []
    for _ in range(2):
        models.append(fit(network(), stripes, fabric, compiled=compiled))
        assert [t.stride() for t in models[-1].parameters()] == [t.stride() for t in network().parameters()]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
    assert training.accuracy(models[0], stripes.to(fabric.device), stripes.test) > 0.9


def test_channels_last_where_the_network_runs_in_it():
    """Into the layout and back, to the very strides, the 1x1 convolution's too; a `view` over channels refuses it."""

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.point = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            assert not self.training
            return self.point(self.conv(x)).view(len(x), -1)

    images = torch.randn(2, 3, 8, 8)
    for model, runs in ((Viewing(), False), (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)), True)):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tensors = list(model.parameters())
        before = [(tensor, tensor.stride()) for tensor in tensors]
        assert training.runs_in(torch.channels_last, model, images) is runs
        assert tensors[0].is_contiguous(memory_format=torch.channels_last)
        assert tensors[2].stride() == (4, 1, 4, 4)
        training.put_back(before)
        assert [tensor.stride() for tensor in tensors] == [strides for _, strides in before]
        assert all(a is b for a, b in zip(tensors, model.parameters(), strict=True))
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert model.training


def test_channels_last_trains_the_same(stripes, fabric):
    """The layout that a GPU trains in, on a CPU: the same up to rounding."""
    models = [network(), network()]
    for model, layout in zip(models, (None, torch.channels_last), strict=True):
        optimizer = training.make_optimizer(model, training.SCHEDULES["resnet"], fabric.device)
        wrapped, optimizer = fabric.setup(model.to(memory_format=layout or torch.contiguous_format), optimizer)
        training.train_epoch(wrapped, optimizer, stripes, fabric, 32, 0, layout)
    for name, tensor in models[0].state_dict().items():
        tolerance = NETWORK_TOLERANCE[torch.float32]
        torch.testing.assert_close(models[1].state_dict()[name], tensor, **tolerance, check_stride=False)


@pytest.mark.slow
def test_compiled_training(stripes, fabric, tmp_path, monkeypatch):
    """It learns, repeats itself, goes on after a cut, and hands back the plain module, which can be packed."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    model = network()
    names = list(model.state_dict())
    assert fit(model, stripes, fabric, compiled=True) is model
    assert list(model.state_dict()) == names
    assert type(model) is nn.Sequential
    assert training.accuracy(model, stripes, stripes.test) > 0.9

    write = training.write

    def cut(path, *args):
        write(path, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), stripes, fabric, compiled=True, checkpoint=tmp_path / "c")
    monkeypatch.setattr(training, "write", write)
    again = fit(network(), stripes, fabric, compiled=True, checkpoint=tmp_path / "c")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])

    channels = paamops.trace(model.eval(), stripes.normalise(stripes.train.images[:1]))
    small = paamops.pack(model, channels, paamops.select(channels, torch.rand(len(channels.filters)), filters=0.5))
    fit(small, stripes, fabric, compiled=True)
    assert small[0].out_channels < 8


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
