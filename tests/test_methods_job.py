"""The comparison of the methods: one network, one budget, stored as it comes, as a table."""

import json

import pytest
from torch import nn

import paamops
from bench import methods_job, tables
from paamops import cli

pytest.importorskip("lightning_fabric")
pytest.importorskip("sklearn")


@pytest.fixture
def small(monkeypatch):
    """A small network and few epochs."""
    monkeypatch.setattr(methods_job, "MODEL", "lenet5")
    monkeypatch.setattr(cli, "DIGITS_PAAM", {"epochs": 2, "rewind": 0.5, "batch_size": 64})


def run(accuracy, params, flops, epochs, seconds):
    return {"accuracy": accuracy, "params": params, "flops": flops, "epochs": epochs, "seconds": seconds}


def made_up(**changes):
    first = {"dense": run(99.0, 1000, 4000, 20, 30), "paam": run(98.0, 500, 2000, 54, 60)}
    second = {"dense": run(98.0, 1000, 4000, 20, 31), "paam": run(98.5, 490, 2100, 36, 50)}
    machine = {"device": "CPU", "threads": 2, "torch": "2.13", "date": "2026-11-21"}
    stored = {"machine": machine, "command": "do", "flops": 0.5, "methods": {"dense": "unpruned", "paam": "PAAM"}}
    return stored | {"seeds": {"0": first, "3": second}} | changes


@pytest.mark.slow
def test_one_seed(small):
    found = {name: run for name, run, _ in methods_job.runs(0, 0.3, list(methods_job.PRUNED_BY))}
    assert found.keys() == methods_job.METHODS.keys()
    assert found["dense"]["params"] == 431_080
    assert found["dense"]["epochs"] == 2
    for name in methods_job.PRUNED_BY:
        assert found[name]["flops"] <= 0.3 * found["dense"]["flops"]
        assert found[name]["params"] < found["dense"]["params"]
        assert 0 <= found[name]["accuracy"] <= 100
        assert found[name]["epochs"] >= 1


def test_each_run_is_stored_as_it_comes(monkeypatch, tmp_path):
    done = []

    def runs(seed, share, methods):
        for name in ("dense", *methods):
            files = list(tmp_path.glob("methods-job-0.25-*.json"))
            stored = json.loads(files[0].read_text())["seeds"] if files else {}
            done.append({number: list(each) for number, each in stored.items()})
            yield name, run(90.0 + seed, 10, 20, 30, 40), nn.Linear(1, 1 + seed)

    monkeypatch.setattr(methods_job, "runs", runs)
    folder = ["--flops", "0.25", "--results", str(tmp_path), "--networks", str(tmp_path / "kept" / "here")]
    assert methods_job.main(["--seeds", "10", "2", "--methods", "aap", *folder]) == 0
    assert done == [{}, {"10": ["dense"]}, {"10": ["dense", "aap"]}, {"2": ["dense"], "10": ["dense", "aap"]}]
    assert methods_job.main(["--seeds", "2", "3", "--methods", "paam", *folder]) == 0
    (path,) = tmp_path.glob("*.json")
    kept = paamops.load(tmp_path / "kept" / "here" / "paam-3.safetensors", lambda: nn.Linear(1, 4))
    assert kept.out_features == 4
    stored = json.loads(path.read_text())
    assert {number: list(each) for number, each in stored["seeds"].items()} == {
        "2": ["dense", "aap", "paam"],
        "3": ["dense", "paam"],
        "10": ["dense", "aap"],
    }
    assert stored["seeds"]["3"]["paam"]["accuracy"] == 93
    assert len(tables.table(stored).splitlines()) == 2 + 3 + 2  # a method that nobody ran has no line
    path.write_text(json.dumps(stored | {"machine": stored["machine"] | {"torch": "another"}}))
    assert methods_job.begin(path, 0.25)["seeds"] == {}  # figures of another machine are not mixed in


def test_table_has_mean_and_range():
    assert tables.table(made_up()).splitlines() == [
        "| | test accuracy, % | parameters left, % | FLOPs left, % | epochs after the first training |",
        "|---|---|---|---|---|",
        "| unpruned | 98.50 (98.00 to 99.00) | 100.0 | 100.0 | 0 |",
        "| PAAM | 98.25 (98.00 to 98.50) | 49.5 (49.0 to 50.0) | 51.2 (50.0 to 52.5) | 45 (36 to 54) |",
        "",
        "`do`, seeds 0, 3: mean (lowest to highest); CPU, 2 CPU threads, torch 2.13, 2026-11-21.",
    ]
    one = made_up(seeds={"3": made_up()["seeds"]["3"]})
    assert "| PAAM | 98.50 | 49.0 | 52.5 | 36 |" in tables.table(one)
    assert "`do`, seed 3: " in tables.table(one)
