"""The recipes: commands that the command line takes, a runner that stops and goes on, a comparison that adds up."""

import dataclasses
import importlib
import json
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from bench.recipes import RECIPES
from paamops import cli, pruning, training
from paamops.data import cifar

runner = importlib.import_module("bench.recipes.__main__")

TABLE = """\
                      before      after        change
test accuracy        93.00 %    92.50 %  -0.50 points
parameters           850,000    212,500       -75.0 %
FLOPs an image      251.00 M   100.40 M       -60.0 %
latency, batch 1     1.27 ms    0.96 ms       -24.7 %
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    return tmp_path


def options(folder, *more):
    return ["resnet56-aap-p-0", "--data-root", "d", "--device", "cpu", "--runs", str(folder / "runs"), *more]


def pretend(monkeypatch, code, text=""):
    """The command ends with `code` after saying `text`; the list of what was called."""
    calls = []

    def run(words, log, seconds):
        calls.append((words, seconds))
        return code, text.splitlines(keepends=True)

    monkeypatch.setattr(runner, "run", run)
    return calls


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_line_takes_each_recipe(name, folder):
    recipe = RECIPES[name]
    parsed = runner._parser().parse_args([name, "--data-root", "d"])
    args = cli.parser().parse_args(runner.command(name, recipe, parsed, ["--compiled"]))
    cli.check_method(args)
    model, method, *target = name.split("-")
    assert (args.method, args.model, args.data) == (method, model, "cifar10")
    if method == "aap":
        assert args.minimise == {"p": "params", "f": "flops"}[target[0]]
        assert args.max_accuracy_drop == pytest.approx(int(target[1]) / 100)
        assert args.params is None
    elif method == "globalpru":
        assert args.mode == ("mixed" if target == ["mixed"] else None)
        if args.rate is None:
            assert args.flops == pytest.approx(1 - recipe.paper[2] / 100)
    else:
        assert args.params == pytest.approx(1 - recipe.paper[1] / 100)
        assert (args.flops, args.filters, args.train_filters) == (None, None, False)
    assert args.resume
    assert args.compiled
    assert args.device == "cuda"
    plan = cli.make_plan(args, recipe.model)
    assert plan.schedule is training.schedule_for(recipe.model)
    assert (plan.epochs, plan.batch_size) == (plan.schedule.epochs, plan.schedule.batch_size)


def test_a_finished_recipe_is_compared_with_the_paper(folder, monkeypatch, capsys):
    calls = pretend(monkeypatch, 0, f"resnet56 on cifar10\nround 1:  a  b  c\n{TABLE}")
    assert runner.main(options(folder, "--minutes", "2", "--compiled")) == 0
    assert calls[0][1] == 120
    assert calls[0][0][-1] == "--compiled"
    stored = json.loads((folder / "results" / "recipe-resnet56-aap-p-0.json").read_text())
    assert stored["before"] == {"accuracy": 93.0, "params": 850000, "mflops": 251.0}
    assert stored["reached"] == {"accuracy_drop": 0.5, "params_removed": 75.0, "flops_removed": 60.0}
    assert stored["paper"]["reached"] == {"accuracy_drop": -0.33, "params_removed": 79.11, "flops_removed": 56.97}
    assert stored["met"] is True
    assert stored["difference"] == {
        "accuracy": 0.16,
        "accuracy_drop": 0.83,
        "params_removed": -4.11,
        "flops_removed": 3.03,
    }
    assert "accuracy drop, points         0.50     -0.33       +0.83" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--rounds=1"], ["--precision", "bf16-mixed"]])
def test_a_changed_recipe_does_not_pass_for_the_recipe(folder, monkeypatch, words):
    pretend(monkeypatch, 0, TABLE)
    assert runner.main(options(folder, *words)) == 0
    assert not (folder / "results").exists()
    assert (folder / "runs" / "resnet56-aap-p-0" / "recipe-resnet56-aap-p-0.json").exists()


def test_a_target_that_was_not_met_is_a_result(folder, monkeypatch):
    pretend(monkeypatch, cli.NOT_MET, TABLE)
    assert runner.main(options(folder)) == 0
    stored = json.loads((folder / "results" / "recipe-resnet56-aap-p-0.json").read_text())
    assert stored["met"] is False


@pytest.mark.parametrize("held", [b"", b"12,5", b"nan", b"-3", b"inf", b"\xff\xfe"])
def test_bad_seconds_count_as_none(folder, held):
    (folder / "seconds.txt").write_bytes(held)
    assert runner.spend(folder, 2.5) == 2.5
    assert runner.spend(folder, 1) == 3.5
    assert [path.name for path in folder.iterdir()] == ["seconds.txt"]


def test_seconds_are_written_whole_or_not_at_all(folder, monkeypatch):
    runner.spend(folder, 2.5)
    monkeypatch.setattr(type(folder), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        runner.spend(folder, 1)
    monkeypatch.undo()
    assert runner.spend(folder, 0) == 2.5


def test_a_recipe_without_figures_in_the_paper(folder, monkeypatch, capsys):
    pretend(monkeypatch, 0, TABLE)
    assert runner.main(["vgg16-aap-p-0", *options(folder)[1:]]) == 0
    stored = json.loads((folder / "results" / "recipe-vgg16-aap-p-0.json").read_text())
    assert stored["paper"] == {"accuracy": 93.64, "reached": None}
    assert stored["difference"] == {"accuracy": -0.64}


def test_a_recipe_of_paam_without_flops_in_the_paper(folder, monkeypatch, capsys):
    pretend(monkeypatch, 0, TABLE)
    assert runner.main(["resnet56-paam", *options(folder)[1:]]) == 0
    stored = json.loads((folder / "results" / "recipe-resnet56-paam.json").read_text())
    reached = {"accuracy_drop": -1.02, "params_removed": 52.3, "flops_removed": None}
    assert stored["paper"] == {"accuracy": None, "reached": reached}
    assert stored["difference"] == {"accuracy_drop": 1.52, "params_removed": 22.7}
    out = capsys.readouterr().out
    assert "accuracy unpruned, %         93.00         -           -" in out
    assert "accuracy drop, points         0.50     -1.02       +1.52" in out
    assert "FLOPs removed, %             60.00         -           -" in out


@pytest.mark.parametrize(
    ("name", "words", "trainings", "told"),
    [
        ("resnet110-paam", ["--rounds", "1"], ["training", "learning scores", "training", "training"], "0 rounds; "),
        ("vgg16-globalpru-fixed", [], ["training"] * 4, "stage ranked: "),
        ("vgg16-globalpru-mixed", [], ["training"] * 4, "stage ranked: "),
    ],
)
def test_a_recipe_runs_and_goes_on(folder, monkeypatch, capsys, name, words, trainings, told):
    """The real command on a few made-up images and a smaller network: cut in the third training, then to the end."""
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cifar, "IMAGES", 30)
    monkeypatch.setattr(pruning, "latency", lambda models, images: [1.0, 1.0])
    images, random = folder / "cifar-10-batches-bin", np.random.default_rng(0)
    images.mkdir()
    for number in (*range(1, 6), "test"):
        records = random.integers(0, 256, (30, cifar.RECORD))
        records[:, 0] = random.integers(0, 10, 30)
        file = f"data_batch_{number}.bin" if number != "test" else "test_batch.bin"
        records.astype(np.uint8).tofile(images / file)
    recipe = dataclasses.replace(RECIPES[name], model="lenet5")
    places = ["--data-root", str(folder), "--device", "cpu", "--runs", str(folder / "runs")]
    parsed = runner._parser().parse_args([name, *places])
    call = runner.command(name, recipe, parsed, ["--epochs", "2", "--batch-size", "15", *words])
    train, labels = training.train, []

    def cut(*arguments, **settings):
        labels.append(settings.get("label", "training"))
        if len(labels) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **settings)

    monkeypatch.setattr(training, "train", cut)
    assert cli.main(call) == 130
    run = folder / "runs" / name
    assert f"{told}validation accuracy" in runner.progress(run)
    assert cli.main(call) == 0
    assert labels == trainings  # what was done is not done again
    assert re.search("(1 rounds|stage tuned:);? validation accuracy", runner.progress(run))
    rows = runner.table(capsys.readouterr().out.splitlines())
    reached = runner.compare(recipe, rows)["reached"]
    if recipe.paper[1] is not None:
        assert recipe.paper[1] <= reached["params_removed"] < recipe.paper[1] + 6
    else:
        assert recipe.paper[2] - 0.1 <= reached["flops_removed"] < recipe.paper[2] + 9
    assert {"state", "model.safetensors", "report.html"} <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize(("code", "text"), [(1, TABLE), (0, "no table")])
def test_a_failure_is_told(folder, monkeypatch, capsys, code, text):
    pretend(monkeypatch, code, text)
    assert runner.main(options(folder)) == 1
    assert f"failed with exit code {code}" in capsys.readouterr().err


@pytest.mark.parametrize("code", [None, 130])
def test_an_unfinished_recipe_says_how_far_it_is(folder, monkeypatch, capsys, code):
    pretend(monkeypatch, code)
    assert runner.main(options(folder)) == runner.UNFINISHED
    assert "not finished; 0 minutes in all." in capsys.readouterr().out
    state = folder / "runs" / "resnet56-aap-p-0" / "state"
    state.mkdir()
    entry = {"outcome": "start", "params": 100, "flops": 1000, "accuracy": 0.93}
    smaller = {"outcome": "accepted", "params": 50, "flops": 600, "accuracy": 0.94}
    skipped = {"outcome": "skipped", "params": 50, "flops": 600, "accuracy": None}
    (state / "state.json").write_text(json.dumps({"history": [entry, smaller, skipped]}))
    (state / "training.safetensors").write_bytes(b"cut")
    assert runner.main(options(folder)) == runner.UNFINISHED
    assert "2 rounds; the smallest network that was accepted has 50.0% of the parameters" in capsys.readouterr().out


def test_the_images_a_second_come_from_the_checkpoint(folder, monkeypatch, capsys):
    import torch
    from torch import nn

    from paamops import checkpoint

    pretend(monkeypatch, None)
    state = folder / "runs" / "resnet56-aap-p-0" / "state"
    state.mkdir(parents=True)
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters())
    facts = {"epoch": 3, "epochs": 46, "images_per_s": 12345.6}
    checkpoint.write(state / "training.safetensors", model, sgd, facts)
    runner.main(options(folder))
    assert "epoch 3 of 46 of a training, 12,345.6 images/s" in capsys.readouterr().out


def test_a_run_ends_by_itself(folder):
    code, lines = runner.run([sys.executable, "-c", "print('a'); raise SystemExit(4)"], folder / "log", 60)
    assert (code, lines) == (4, ["a\n"])
    assert (folder / "log").read_text() == "a\n"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_run_is_stopped(folder, monkeypatch, deaf):
    """With SIGINT, also where the runner itself ignores it; with SIGKILL if that does not help; its children too."""

    class Popen(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout != 3600:
                return super().wait(timeout)
            while not (folder / "ready").exists():  # the time is over as soon as there is something to stop
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(runner, "PATIENCE", 0.5 if deaf else 30)
    script = folder / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import signal, subprocess, sys, time
            if {deaf}:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            up = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
            try:
                child = subprocess.Popen([sys.executable, "-c", up, {str(folder / "ready")!r}])
                time.sleep(60)
            except KeyboardInterrupt:
                print("stopped", flush=True)
                child.wait()  # or it outlives its parent, and is killed
            """
        )
    )
    before, threads = signal.signal(signal.SIGINT, signal.SIG_IGN), threading.active_count()
    try:
        code, lines = runner.run([sys.executable, script], folder / "log", 3600)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code is None
    assert ("stopped" in "".join(lines)) is not deaf
    assert threading.active_count() == threads  # its output has ended: nothing that could write to it is left
