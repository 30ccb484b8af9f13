"""The command line, in this process on a small network, and the main job as a user runs it."""

import functools
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch

import paamops
from paamops import cli, data, pruning, saving, training
from paamops.methods import globalpru_run, paam_run

pytest.importorskip("lightning_fabric")
pytest.importorskip("sklearn")

TINY = ["prune", "--model", "lenet5", "--device", "cpu", "--epochs", "1", "--finetune-epochs", "1", "--params", "0.1"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pruning, "latency", functools.partial(pruning.latency, seconds=0.1, least=2))


def columns(text, what):
    """The numbers of a row of the table: before, after, change in percent."""
    line = next(line for line in text.splitlines() if line.startswith(what))
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?[\d,.]+\d", line.removeprefix(what))]


def test_prune_twice_with_one_seed(capsys, tmp_path):
    printed, files = [], []
    for name in ("one", "two"):
        assert cli.main([*TINY, "--out", f"deep/er/{name}"]) == 0
        printed.append(capsys.readouterr())
        files.append((tmp_path / "deep" / "er" / name).read_bytes())
    assert files[0] == files[1]
    assert printed[0].err == ""  # nobody watches: no progress bars
    out = printed[0].out
    before, after, change = columns(out, "parameters")
    small = saving.load(tmp_path / "deep" / "er" / "one")
    assert before == 431_080
    assert after == sum(p.numel() for p in small.parameters()) <= 43_108
    assert change == pytest.approx(100 * (after / before - 1), abs=0.1)
    digits = data.load("digits")
    accuracy = 100 * training.accuracy(small, digits, digits.test)
    assert columns(out, "test accuracy")[1] == pytest.approx(accuracy, abs=0.01)
    for what in ("FLOPs an image", "file size"):
        assert columns(out, what)[1] < columns(out, what)[0]
    assert "latency, batch 1 " in out
    assert "latency, batch 64 " in out
    for line in ("lenet5 on digits (943 train, 315 validation, 539 test images), cpu, seed 0", "saved to deep/er/one"):
        assert line in out


def test_test_split_decides_nothing(monkeypatch, tmp_path):
    """The same network comes out whatever the test split holds."""
    whole = data.load("digits")
    other = data.Split(whole.test.images.flip(0), whole.test.labels.roll(1))
    assert cli.main([*TINY, "--quiet", "--out", "one"]) == 0
    monkeypatch.setattr(data, "load", lambda *_: data.Dataset(**{**vars(whole), "test": other}))
    assert cli.main([*TINY, "--quiet", "--out", "two"]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_criterion_decides_what_stays(monkeypatch, tmp_path):
    """Attention unless another one is given, which needs no images."""
    chosen = []

    def select(channels, scores, **budget):
        chosen.append([scores, *(paamops.weight_scores(channels.model, channels, each) for each in ("l1", "random"))])
        return paamops.select(channels, scores, **budget)

    monkeypatch.setattr(pruning, "select", select)
    assert cli.main([*TINY, "--quiet", "--out", "one"]) == 0
    assert cli.main([*TINY, "--quiet", "--out", "two", "--criterion", "attention"]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    monkeypatch.setattr(pruning, "score", lambda *_: pytest.fail("looked at images"))
    for number, criterion in enumerate(("l1", "random"), 1):
        assert cli.main([*TINY, "--quiet", "--out", criterion, "--criterion", criterion]) == 0
        assert torch.equal(chosen[-1][0], chosen[-1][number])
        assert not torch.equal(chosen[-1][0], chosen[-1][3 - number])
    assert (tmp_path / "one").read_bytes() != (tmp_path / "l1").read_bytes()


def test_prune_again_from_a_file(capsys, tmp_path):
    assert cli.main([*TINY, "--quiet"]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 7  # quiet: the table and nothing else
    first = tmp_path / "runs" / "lenet5-digits.safetensors"
    again = ["prune", "--weights", str(first), "--device", "cpu", "--finetune-epochs", "0", "--filters", "0.5"]
    assert cli.main([*again, "--out", "second"]) == 0
    out = capsys.readouterr().out
    assert "trained" not in out
    assert columns(out, "test accuracy")[0] == columns(table, "test accuracy")[1]
    assert columns(out, "parameters")[0] == columns(table, "parameters")[1]
    assert columns(out, "parameters")[1] < columns(out, "parameters")[0]
    assert cli.main([*again, "--model", "vgg16"]) == 1
    assert "holds a lenet5, not a vgg16" in capsys.readouterr().err


def test_a_network_of_your_own(capsys, tmp_path):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10))\n"
        "def wrong():\n"
        "    return nn.Linear(32, 10)\n"
        "def nothing():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))\n"
        "number = 3\n"
        "def broken():\n"
        "    return {}['layers']\n"
        "def listed():\n"
        "    return [nn.Linear(32, 10)]\n"
    )
    (tmp_path / "mistyped.py").write_text("def build(:\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    own = ["--epochs", "1", "--finetune-epochs", "0", "--device", "cpu"]
    saved = "runs/mynet-build-digits.safetensors"
    try:
        assert cli.main(["prune", "--model", "mynet:build", *own]) == 0
        assert (tmp_path / saved).is_file()
        assert columns(capsys.readouterr().out, "parameters")[0] == 8 * 26 + 3930
        for name, message in (
            ("mynet:wrong", "output for 2 images is|output is"),
            ("mynet:nothing", "every channel set is pinned"),
            ("mynet:number", "mynet has no function 'number'"),
            ("mynet:broken", r"--model mynet:broken: broken\(\) raised KeyError: 'layers'"),
            ("mynet:listed", r"--model mynet:listed: listed\(\) returned a list; it must be a torch.nn.Module"),
            ("nonet:build", "--model nonet:build: cannot import 'nonet'"),
            ("mistyped:build", r"--model mistyped:build: cannot import 'mistyped' \(SyntaxError: .*line 1"),
            ("leaving:build", "--model leaving:build: cannot import 'leaving'"),
        ):
            assert cli.main(["prune", "--model", name, *own]) == 1
            error = capsys.readouterr().err
            assert re.search(message, error), error
            assert error.count("\n") == 1
        assert cli.main(["prune", "--weights", saved, *own]) == 1
        message = "holds a torch.nn.modules.container.Sequential; say which function builds it: --model package.module"
        assert message in capsys.readouterr().err
        assert cli.main(["prune", "--weights", saved, "--model", "mynet:build", *own, "--epochs", "0"]) == 0
    finally:
        sys.modules.pop("mynet", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--params", "1"], "params is 1, but no network meets it"),
        (["prune", "--device", "cuda"], "--device cuda: PyTorch finds no GPU"),
        (["prune", "--method", "paam", "--params", "1"], "params is 1, but no network meets it"),
        (["prune", "--method", "paam", "--learn", "21"], "--learn: 21 epochs go beyond the 20 of --epochs"),
        (
            ["prune", "--method", "paam", "--train-filters", "--learn", "13"],
            "--learn: 13 epochs from epoch 8 on, where --rewind starts, go beyond the 20 of --epochs",
        ),
        (["prune", "--method", "globalpru", "--flops", "1"], "flops is 1, but no network meets it"),
        (["prune", "--method", "globalpru", "--model", "lenet300-100"], "no convolution that can get an excitation"),
        (["prune", "--model", "lenet5", "--criterion", "batch_norm"], "no batch norm with a scale follows"),
        (["prune", "--pinned", "nowhere"], "pinned names 'nowhere'"),
        (["explain", "--pinned", "nowhere"], "pinned names 'nowhere'"),
        (["prune", "--data", "mnist", "--data-root", "nowhere"], "nowhere/MNIST/raw/train-images-idx3-ubyte: no such"),
        (["prune", "--weights", "nowhere"], "nowhere: no such file"),
        (["prune", "--out", "."], "--out .: is a folder"),
        (["prune", "--out", "file/inside"], "cannot write to file"),
        (["prune", "--out", "/dev/null"], "--out /dev/null: is not a regular file"),
        (["prune", "--out", "link"], "--out link: is not a regular file"),
        (["prune", "--out", "/proc/x"], "--out /proc/x: cannot write to /proc"),
        (["explain", "--data", "folder", "--data-root", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_an_error_is_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained before it refused"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to("/dev/null")
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("paamops: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises((ValueError, FileNotFoundError)):
        cli.main([*arguments, "--debug"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["unprune"], "invalid choice: 'unprune'"),
        (["prune", "--params", "0.5", "--flops", "0.5"], "--flops: not allowed with --params"),
        (["prune", "--max-accuracy-drop", "1"], "--max-accuracy-drop: not for --method once"),
        (["prune", "--rounds", "3"], "--rounds: not for --method once"),
        (["prune", "--resume"], "--resume: not for --method once"),
        (["prune", "--method", "aap", "--filters", "10"], "--filters: not for --method aap"),
        (["prune", "--method", "aap", "--finetune-epochs", "1"], "--finetune-epochs: not for --method aap"),
        (["prune", "--method", "aap", "--epochs", "0"], "--epochs: '0' must be at least 1"),
        (["prune", "--method", "aap", "--params", "0.5", "--minimise", "flops"], "--minimise: needs --max-acc"),
        (["prune", "--method", "aap", "--resume"], "--resume: needs --state"),
        (["prune", "--method", "aap", "--report", "a", "--no-report"], "not allowed with --no-report"),
        (["prune", "--method", "aap", "--max-accuracy-drop", "nan"], "--max-accuracy-drop: 'nan' must be -100 to 100"),
        (["prune", "--method", "aap", "--max-accuracy-drop", "few"], "--max-accuracy-drop: 'few' is not a number"),
        (["prune", "--method", "aap", "--rewind", "1.0"], "--rewind: '1.0' must be at least 0 and below 1"),
        (["prune", "--method", "aap", "--rewind", "-0.1"], "--rewind: '-0.1' must be at least 0 and below 1"),
        (["prune", "--method", "aap", "--trained"], "--trained: needs --model package.module:function"),
        (["prune", "--method", "aap", "--trained", "--model", "vgg16"], "--trained: needs --model package.module:f"),
        (["prune", "--method", "best"], "--method: invalid choice: 'best'"),
        (["prune", "--learn", "2"], "--learn: not for --method once"),
        (["prune", "--criterion", "l3"], "--criterion: invalid choice: 'l3'"),
        (["prune", "--method", "aap", "--criterion", "l1"], "--criterion: not for --method aap"),
        (["prune", "--method", "paam", "--criterion", "l1"], "--criterion: not for --method paam"),
        (["prune", "--method", "globalpru", "--criterion", "attention"], "--criterion: not for --method globalpru"),
        (["prune", "--method", "aap", "--lambda", "0"], "--lambda: not for --method aap"),
        (["prune", "--method", "aap", "--train-filters"], "--train-filters: not for --method aap"),
        (["prune", "--method", "aap", "--finetune-epochs", "0"], "--finetune-epochs: not for --method aap"),
        (["prune", "--method", "paam", "--finetune-epochs", "0"], "--finetune-epochs: not for --method paam"),
        (["prune", "--method", "paam", "--max-accuracy-drop", "0"], "--max-accuracy-drop: not for --method paam"),
        (["prune", "--method", "paam", "--minimise", "flops"], "--minimise: not for --method paam"),
        (["prune", "--method", "paam", "--rewind-weights"], "--rewind-weights: not for --method paam"),
        (["prune", "--method", "paam", "--params", "1", "--flops", "1"], "--flops: not allowed with --params; only"),
        (["prune", "--method", "paam", "--epochs", "0"], "--epochs: '0' must be at least 1 for --method paam"),
        (["prune", "--method", "paam", "--learn", "0"], "--learn: '0' must be at least 1"),
        (["prune", "--method", "paam", "--lambda", "-1"], "--lambda: '-1' must be a finite number of at least 0"),
        (["prune", "--method", "paam", "--lambda", "inf"], "--lambda: 'inf' must be a finite number of at least 0"),
        (["prune", "--method", "paam", "--lambda", "nan"], "--lambda: 'nan' must be a finite number of at least 0"),
        (["prune", "--method", "paam", "--resume"], "--resume: needs --state"),
        (["prune", "--method", "paam", "--trained"], "--trained: needs --model package.module:function"),
        (["prune", "--method", "paam", "--report", "a", "--no-report"], "not allowed with --no-report"),
        (["prune", "--rate", "0.5"], "--rate: not for --method once"),
        (["prune", "--method", "paam", "--mode", "mixed"], "--mode: not for --method paam"),
        (["prune", "--method", "aap", "--beta", "1"], "--beta: not for --method aap"),
        (["prune", "--method", "globalpru", "--rate", "1"], "--rate: '1' must be above 0 and below 1"),
        (["prune", "--method", "globalpru", "--rate", "nan"], "--rate: 'nan' must be above 0 and below 1"),
        (
            ["prune", "--method", "globalpru", "--rate", "0.5", "--flops", "0.5"],
            "--rate: not allowed with --flops; only",
        ),
        (["prune", "--method", "globalpru", "--filters", "5"], "--filters: not for --method globalpru"),
        (["prune", "--method", "globalpru", "--rounds", "5"], "--rounds: not for --method globalpru"),
        (["prune", "--method", "globalpru", "--curve", "a", "--no-report"], "--curve: not allowed with --no-report"),
        (["prune", "--method", "paam", "--curve", "a"], "--curve: not for --method paam"),
        (["prune", "--method", "globalpru", "--mode", "both"], "--mode: invalid choice: 'both'"),
        (
            ["prune", "--method", "globalpru", "--epochs", "0"],
            "--epochs: '0' must be at least 1 for --method globalpru",
        ),
        (["prune", "--params", "half"], "--params: 'half' is neither a fraction"),
        (["prune", "--params", "1.5"], "--params: '1.5' is neither a fraction"),
        (["prune", "--flops", "0"], "--flops: '0' is neither a fraction"),
        (["prune", "--filters", "-3"], "--filters: '-3' is neither a fraction"),
        (["prune", "--filters", "nan"], "--filters: 'nan' is neither a fraction"),
        (["prune", "--epochs", "-1"], "--epochs: '-1' must be at least 0"),
        (["prune", "--epochs", "many"], "--epochs: 'many' is not a whole number"),
        (["prune", "--batch-size", "0"], "--batch-size: '0' must be at least 1"),
        (["prune", "--seed", "4294967296"], "--seed: '4294967296' must be 0 to 4294967295"),
        (["prune", "--data", "imagenet"], "--data: invalid choice: 'imagenet'"),
        (["prune", "--model", "resnet18"], "--model: 'resnet18'; it must be one of lenet5"),
        (["explain", "--model", ":f"], "--model: ':f'; it must be one of lenet5"),
        (["explain", "--model", "mynet:"], "--model: 'mynet:'; it must be one of lenet5"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("paamops: ")
    assert message in error
    prune = " prune" if arguments[:1] == ["prune"] else " explain" if arguments[:1] == ["explain"] else ""
    assert error.endswith(f"; see python -m paamops{prune} --help\n")
    assert error.count("\n") == 1


AAP = ["prune", "--method", "aap", "--model", "lenet5", "--device", "cpu"]


@pytest.fixture
def rounds(monkeypatch):
    """AAP without its rounds: what it was given, and what it says and returns."""
    seen = types.SimpleNamespace(met=True, message="Half is gone. The objective\nis met.", warning=None)

    def prune_to_target(model, dataset, fabric, plan, objective, say, quiet, **settings):
        seen.plan, seen.objective, seen.settings = plan, objective, settings
        if seen.warning:
            warnings.warn(seen.warning, stacklevel=1)
        say("round 1")
        return types.SimpleNamespace(
            dense=model,
            model=model,
            met=seen.met,
            message=seen.message,
            report=lambda path, rows, command: Path(path).write_text(command),
        )

    monkeypatch.setattr(pruning, "prune_to_target", prune_to_target)
    monkeypatch.setattr(pruning, "report", lambda *_: [("test accuracy", "99.00 %", "98.00 %", "-1.00 points")])
    return seen


@pytest.mark.parametrize("more", [[], ["--quiet"]])
@pytest.mark.parametrize("met", [True, False])
def test_a_target_that_is_not_met(capsys, tmp_path, rounds, met, more):
    rounds.met = met
    assert cli.main([*AAP, *more]) == (0 if met else 3)
    said = capsys.readouterr()
    assert said.err == ("" if met else "paamops: Half is gone. The objective is met.\n")
    assert said.out.count("Half is gone.") == (met and not more)
    saving.load(tmp_path / "runs" / "lenet5-digits.safetensors")
    assert (tmp_path / "runs" / "lenet5-digits.html").is_file()
    assert "test accuracy" in said.out


def test_all_processes_end_with_the_same_code_and_one_says_why(capsys, monkeypatch, rounds):
    rounds.met = False
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(AAP) == 3
    assert capsys.readouterr().err == ""


def test_what_is_kept_back_on_the_digits(capsys, rounds):
    told = "rounds may lose {} of the {} points on the 315 validation images; the other half is kept back"
    for words, lose, asked in (([], 0.5, 1.0), (["--max-accuracy-drop", "3", "--params", "0.5"], 1.5, 3.0)):
        assert cli.main([*AAP, *words]) == 0
        out = capsys.readouterr().out
        assert out.index(told.format(lose, asked)) < out.index("round 1")
        assert rounds.objective.max_accuracy_drop == pytest.approx(lose / 100)
    without = ((["--max-accuracy-drop", "0"], 0), (["--max-accuracy-drop", "-2"], -0.02), (["--flops", "9"], None))
    for words, drop in without:
        assert cli.main([*AAP, *words]) == 0
        assert "rounds may lose" not in capsys.readouterr().out
        assert rounds.objective.max_accuracy_drop == drop


def test_defaults_of_aap_on_the_digits(rounds):
    assert cli.main(AAP) == 0
    assert (rounds.plan.epochs, rounds.plan.batch_size, rounds.settings["rewind"]) == (20, 32, 0.4)
    assert cli.main([*AAP, "--batch-size", "50", "--epochs", "5", "--rewind", "0.2"]) == 0
    assert (rounds.plan.epochs, rounds.plan.batch_size, rounds.settings["rewind"]) == (5, 50, 0.2)


PAAM = ["prune", "--method", "paam", "--model", "lenet5", "--device", "cpu"]


@pytest.fixture
def learned(monkeypatch):
    """PAAM without its work: what it was given."""
    seen = types.SimpleNamespace()

    def prune_by_scores(model, dataset, fabric, plan, budget, say, quiet, **settings):
        seen.plan, seen.budget, seen.settings, seen.quiet = plan, budget, settings, quiet
        report = lambda path, rows, command: Path(path).write_text(command)  # noqa: E731
        return types.SimpleNamespace(dense=model, model=model, message="Half is gone.", report=report)

    monkeypatch.setattr(pruning, "prune_by_scores", prune_by_scores)
    monkeypatch.setattr(pruning, "report", lambda *_: [("test accuracy", "99.00 %", "98.00 %", "-1.00 points")])
    return seen


def test_defaults_of_paam(capsys, tmp_path, learned, monkeypatch):
    assert cli.main(PAAM) == 0
    assert (learned.plan.epochs, learned.plan.batch_size, learned.plan.schedule.rate) == (20, 32, 0.01)
    assert learned.budget == {"params": 0.5}
    expected = {"rewind": 0.4, "rounds": 3, "learn": 6, "frozen": True, "trained": False, "pinned": []}
    assert learned.settings == expected | {"penalty": None, "state": None, "resume": False}
    assert "Half is gone." in capsys.readouterr().out
    assert (tmp_path / "runs" / "lenet5-digits.html").read_text() == f"python -m paamops {' '.join(PAAM)}"
    elsewhere = data.load("digits")
    monkeypatch.setattr(data, "load", lambda *_: elsewhere)
    assert cli.main([*PAAM, "--data", "mnist"]) == 0  # the papers' schedule
    assert (learned.plan.epochs, learned.plan.batch_size, learned.plan.schedule.rate) == (100, 256, 0.02)
    assert (learned.settings["rewind"], learned.settings["learn"]) == (0.5, 30)


def test_options_of_paam(capsys, tmp_path, learned):
    words = "--filters 0.25 --epochs 9 --batch-size 50 --learn 4 --lambda 0.5 --rewind 0.2 --rounds 2 --train-filters"
    more = "--pinned conv1 --state kept --resume --compiled --quiet --no-report"
    assert cli.main([*PAAM, *words.split(), *more.split()]) == 0
    assert (learned.plan.epochs, learned.plan.batch_size, learned.plan.compiled) == (9, 50, True)
    assert learned.budget == {"filters": 0.25}
    expected = {"rewind": 0.2, "rounds": 2, "learn": 4, "frozen": False, "trained": False, "pinned": ["conv1"]}
    assert learned.settings == expected | {"penalty": 0.5, "state": "kept", "resume": True}
    assert learned.quiet
    assert len(capsys.readouterr().out.splitlines()) == 2  # the table
    assert not (tmp_path / "runs" / "lenet5-digits.html").exists()
    assert cli.main([*PAAM, "--weights", "runs/lenet5-digits.safetensors", "--flops", "0.3"]) == 0
    assert learned.settings["trained"]
    assert learned.plan.epochs == 20


def test_defaults_are_those_of_the_library():
    given = inspect.signature(paam_run.run).parameters
    assert (given["rewind"].default, given["rounds"].default) == (cli.PAAM_REWIND, cli.PAAM_ROUNDS)


def test_paam_of_the_real_thing(capsys, tmp_path):
    """Scores, a packed network, its report; the same run twice is the same, and one that is done is not done again."""
    words = [*PAAM, "--epochs", "2", "--learn", "1", "--rounds", "2", "--params", "0.3"]
    texts = []
    for name in ("one", "two"):
        assert cli.main([*words, "--out", name, "--state", f"state-{name}"]) == 0
        texts.append(capsys.readouterr())
    assert texts[0].err == ""
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert columns(texts[0].out, "parameters")[2] <= -70
    assert "round 2: threshold" in texts[0].out
    small = saving.load(tmp_path / "one")
    digits = data.load("digits")
    accuracy = 100 * training.accuracy(small, digits, digits.test)
    assert columns(texts[0].out, "test accuracy")[1] == pytest.approx(accuracy, abs=0.01)
    assert "Scores and the threshold" in (tmp_path / "one.html").read_text()
    assert cli.main([*words, "--out", "three", "--state", "state-one"]) == 1
    assert "holds a run; resume it" in capsys.readouterr().err
    assert cli.main([*words, "--out", "three", "--state", "state-one", "--resume"]) == 0
    assert "round 2" not in capsys.readouterr().out
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()


def test_a_network_scored_with_its_filters_training(capsys):
    assert cli.main([*PAAM, "--epochs", "2", "--rounds", "1", "--rewind", "0", "--train-filters", "--no-report"]) == 0
    assert columns(capsys.readouterr().out, "parameters")[2] <= -50


GLOBALPRU = ["prune", "--method", "globalpru", "--model", "lenet5", "--device", "cpu"]


def test_settings_of_globalpru(monkeypatch, capsys, tmp_path):
    """Its defaults and its options, as `prune_by_ranking` is given them."""
    seen = types.SimpleNamespace()

    def prune_by_ranking(model, dataset, fabric, plan, asked, say, quiet, **settings):
        seen.plan, seen.asked, seen.settings, seen.quiet = plan, asked, settings, quiet
        report = lambda path, rows, command: Path(path).write_text(command)  # noqa: E731
        return types.SimpleNamespace(whole=model, model=model, message="Half is gone.", report=report)

    monkeypatch.setattr(pruning, "prune_by_ranking", prune_by_ranking)
    monkeypatch.setattr(pruning, "report", lambda *_: [("test accuracy", "99.00 %", "98.00 %", "-1.00 points")])
    assert cli.main(GLOBALPRU) == 0
    assert (seen.plan.epochs, seen.plan.batch_size, seen.plan.schedule.rate) == (20, 32, 0.01)
    assert seen.asked == {"rate": 0.5}
    assert seen.settings == {"rewind": 0.4, "trained": False, "pinned": [], "state": None, "resume": False}
    assert "Half is gone." in capsys.readouterr().out
    assert (tmp_path / "runs" / "lenet5-digits.html").read_text() == f"python -m paamops {' '.join(GLOBALPRU)}"
    words = "--flops 0.25 --epochs 9 --mode mixed --alpha 0 --beta 0.5 --rewind 0.2 --pinned conv1 --quiet --no-report"
    weights = ["--weights", "runs/lenet5-digits.safetensors", "--state", "kept", "--resume"]
    assert cli.main([*GLOBALPRU, *words.split(), *weights]) == 0
    assert (seen.asked, seen.plan.epochs) == ({"flops": 0.25}, 9)
    expected = {"mode": "mixed", "alpha": 0, "beta": 0.5, "rewind": 0.2, "trained": True, "pinned": ["conv1"]}
    assert seen.settings == expected | {"state": "kept", "resume": True}
    elsewhere = data.load("digits")
    monkeypatch.setattr(data, "load", lambda *_: elsewhere)
    assert cli.main([*GLOBALPRU, "--data", "mnist", "--rate", "0.25"]) == 0  # the papers' schedule
    assert (seen.plan.epochs, seen.settings["rewind"], seen.asked) == (100, 0.5, {"rate": 0.25})
    assert inspect.signature(globalpru_run.run).parameters["rewind"].default == cli.GLOBALPRU_REWIND


def test_curve_of_globalpru(capsys, tmp_path):
    runs = [{"variant": name, "removed": rate, "after": 1 - rate / 9} for name in "AB" for rate in (0.25, 0.5)]
    (tmp_path / "rates.json").write_text(json.dumps({"runs": runs}))
    assert cli.read_curve("rates.json")["B"] == [(0.25, 1 - 0.25 / 9), (0.5, 1 - 0.5 / 9)]
    assert cli.main([*GLOBALPRU, "--epochs", "1", "--rewind", "0", "--curve", "rates.json"]) == 0
    assert "94.44" in (tmp_path / "runs" / "lenet5-digits.html").read_text()
    for text, message in (("[]", "is not what"), ('{"runs": []}', "holds no runs"), ('{"runs": [{}]}', "is not what")):
        (tmp_path / "bad.json").write_text(text)
        assert cli.main([*GLOBALPRU, "--curve", "bad.json"]) == 1
        assert f"--curve bad.json: {message}" in capsys.readouterr().err
    assert cli.main([*GLOBALPRU, "--curve", "nowhere"]) == 1
    assert "--curve nowhere: cannot be read" in capsys.readouterr().err


def test_globalpru_of_the_real_thing(capsys, tmp_path):
    """One ranking, a packed network, its report; resumed it is the same; what was saved can be pruned again."""
    words = [*GLOBALPRU, "--epochs", "2", "--flops", "0.4"]
    for name in ("one", "two"):
        assert cli.main([*words, "--out", name, "--state", f"state-{name}"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert columns(said.out, "FLOPs an image")[2] <= -60
    for stage in ("warm: accuracy", "ranked: accuracy", "pruned: accuracy", "tuned: accuracy"):
        assert said.out.count(stage) == 2
    small = saving.load(tmp_path / "one")
    digits = data.load("digits")
    accuracy = 100 * training.accuracy(small, digits, digits.test)
    assert columns(said.out, "test accuracy")[1] == pytest.approx(accuracy, abs=0.01)
    assert (tmp_path / "one.html").stat().st_size > 20_000
    assert cli.main([*words, "--out", "three", "--state", "state-one"]) == 1
    assert "holds a run; resume it" in capsys.readouterr().err
    assert cli.main([*words, "--out", "three", "--state", "state-one", "--resume"]) == 0
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()
    again = ["prune", "--method", "globalpru", "--weights", "one", "--epochs", "2", "--mode", "mixed", "--rate", "0.3"]
    assert cli.main([*again, "--device", "cpu", "--out", "four", "--no-report"]) == 0
    assert columns(capsys.readouterr().out, "parameters")[2] < 0


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "q.html"],
        ["--out", "a", "--report", "./b/../a"],
        ["--out", "link", "--report", "model"],
        ["--report", "runs/lenet5-digits.safetensors"],
    ],
)
def test_the_report_does_not_overwrite_the_model(capsys, tmp_path, monkeypatch, words):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("worked before it refused"))
    (tmp_path / "link").symlink_to("model")
    assert cli.main([*AAP, *words]) == 1
    error = capsys.readouterr().err
    assert "is the report's file too" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_model_named_html_without_a_report(tmp_path, rounds):
    assert cli.main([*AAP, "--out", "q.html", "--no-report"]) == 0
    saving.load(tmp_path / "q.html")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(capsys, monkeypatch, rounds):
    usual = warnings.showwarning
    rounds.warning = "no network can\nhave so few params"
    monkeypatch.setattr(cli, "__file__", __file__)  # so that this file is one of paamops'
    assert cli.main([*AAP, "--no-report"]) == 0
    assert capsys.readouterr().err == "paamops: no network can have so few params\n"
    assert warnings.showwarning is usual


@pytest.mark.filterwarnings("default")
def test_warnings_of_others_are_left_alone(capsys):
    with pytest.warns(UserWarning, match="mine"), cli.warnings_in_one_line():
        warnings.warn("mine", stacklevel=1)
    assert capsys.readouterr().err == ""


def test_stdout_that_nobody_reads(capsys, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main([*TINY, "--epochs", "0", "--finetune-epochs", "0"]) == 0
        closed.flush()  # as at the end of the process
    assert capsys.readouterr().err == ""
    saving.load(tmp_path / "runs" / "lenet5-digits.safetensors")


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["explain", "--help"], ["info", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "usage: python -m paamops" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"paamops {paamops.__version__}\n"


def test_one_error_line_whatever_the_processes(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["explain", "--data", "folder", "--data-root", "nowhere"]) == 1
    assert capsys.readouterr().err == ""


VIEW = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=4)
        self.linear = nn.Linear(8 * 49, 10)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.linear(x.view(FIRST, LAST))
"""


@pytest.fixture
def coloured(monkeypatch):
    """The digits in three channels, as photos have them."""
    grey = data.load("digits")
    three = {
        name: data.Split(getattr(grey, name).images.repeat(1, 3, 1, 1), getattr(grey, name).labels)
        for name in ("train", "validation", "test")
    }
    three |= {name: getattr(grey, name).repeat(3) for name in ("mean", "std")}
    monkeypatch.setattr(data, "load", lambda *_: data.Dataset(**{**vars(grey), **three}))


def test_a_network_that_calls_view(tmp_path, coloured):
    (tmp_path / "viewing.py").write_text(VIEW.replace("FIRST", "x.size(0)").replace("LAST", "-1"))
    own = ["prune", "--model", "viewing:Net", "--epochs", "1", "--finetune-epochs", "1", "--device", "cpu"]
    try:
        assert cli.main([*own, "--debug"]) == 0
    finally:
        sys.modules.pop("viewing", None)


def test_written_sizes_are_refused_before_training(capsys, tmp_path, monkeypatch, coloured):
    (tmp_path / "rigid.py").write_text(VIEW.replace("FIRST", "-1").replace("LAST", "392"))
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained before it refused"))
    try:
        assert cli.main(["prune", "--model", "rigid:Net", "--device", "cpu"]) == 1
        assert "pin" in capsys.readouterr().err
        assert cli.main(["prune", "--model", "rigid:Net", "--device", "cpu", "--pinned", "conv"]) == 1
        assert "every channel set is pinned" in capsys.readouterr().err
    finally:
        sys.modules.pop("rigid", None)


def test_saved_before_it_is_measured(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no time")

    monkeypatch.setattr(pruning, "report", fail)
    assert cli.main([*TINY, "--epochs", "0", "--finetune-epochs", "0"]) == 1
    saving.load(tmp_path / "runs" / "lenet5-digits.safetensors")


def test_explain_says_what_is_pinned(capsys):
    assert cli.main(["explain", "--model", "lenet5", "--pinned", "conv1", "--pinned", "conv2"]) == 0
    assert capsys.readouterr().out.count("named in `pinned`") == 2


def test_explain(capsys):
    assert cli.main(["explain", "--model", "vgg16", "--data", "cifar10"]) == 0  # without its files
    out = capsys.readouterr().out
    assert "features.40" in out
    assert "an output of the model" in out


def test_info(capsys):
    assert cli.main(["info", "--debug"]) == 0
    out = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in out
    assert "activation_attention: cpu " in out


def test_ctrl_c(capsys, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    assert cli.main(TINY) == 130
    assert capsys.readouterr().err == "paamops: interrupted\n"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_ctrl_c_of_a_run_that_is_kept(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "prune_to_target", interrupt)
    assert cli.main([*AAP, "--state", "kept"]) == 130
    assert capsys.readouterr().err == "paamops: interrupted; the same command with --resume goes on\n"
    assert cli.main(AAP) == 130
    assert capsys.readouterr().err == "paamops: interrupted\n"
    monkeypatch.setattr(pruning, "prune_by_scores", interrupt)
    assert cli.main([*PAAM, "--state", "kept"]) == 130
    assert capsys.readouterr().err == "paamops: interrupted; the same command with --resume goes on\n"


def test_ctrl_c_while_the_arguments_are_read(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parser", interrupt)
    assert cli.main(TINY) == 130
    assert capsys.readouterr().err == "paamops: interrupted\n"


def command(*arguments):
    return [sys.executable, "-m", "paamops", *arguments]


@pytest.mark.slow
def test_ctrl_c_of_the_real_thing(tmp_path):
    # A shell may have started the tests with the signal ignored, and a child inherits that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command("prune", "--epochs", "1000"), preexec_fn=heed, **pipes) as job:
        try:
            assert "resnet20 on digits" in job.stdout.readline()  # it is past its imports
            time.sleep(2)
            job.send_signal(signal.SIGINT)
            _, errors = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode == 130
    assert errors.strip() == "paamops: interrupted"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_main_job(tmp_path):
    """`python -m paamops prune`: half of the parameters gone, within a point of the dense network (times: bench/)."""
    start = time.perf_counter()
    done = subprocess.run(
        command("prune"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # so that a busy machine does not stall the two threads
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout, f"{time.perf_counter() - start:.0f} s")
    before, after, drop = columns(done.stdout, "test accuracy")
    assert before > 97
    assert drop == pytest.approx(after - before, abs=0.011)
    assert drop >= -1
    assert columns(done.stdout, "parameters")[2] <= -50
    assert (tmp_path / "runs" / "resnet20-digits.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        TINY,
        [*PAAM, "--params", "0.3", "--epochs", "3", "--rounds", "1", "--no-report"],
        [*GLOBALPRU, "--epochs", "3", "--no-report"],
    ],
)
def test_two_processes(tmp_path, words):
    done = subprocess.run(
        command(*words, "--processes", "2", "--quiet"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7  # one table, not two
    assert columns(done.stdout, "test accuracy")[0] > 50
    saving.load(tmp_path / "runs" / "lenet5-digits.safetensors")
