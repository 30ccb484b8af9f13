"""The comparison of PAAM, AAP and the filters' norms: one network, one budget, stored after each seed, as a table."""

import json

import pytest
import torch
from torch import nn

import paamops
from bench import paam_job, tables
from paamops import cli

pytest.importorskip("lightning_fabric")
pytest.importorskip("sklearn")


@pytest.fixture
def small(monkeypatch):
    """A small network and few epochs."""
    monkeypatch.setattr(paam_job, "MODEL", "lenet5")
    monkeypatch.setattr(cli, "DIGITS_PAAM", {"epochs": 2, "rewind": 0.5, "batch_size": 64})


def run(accuracy, params, flops, epochs, seconds):
    return {"accuracy": accuracy, "params": params, "flops": flops, "epochs": epochs, "seconds": seconds}


def made_up(**changes):
    first = {"dense": run(99.0, 1000, 4000, 20, 30), "paam": run(98.0, 500, 2000, 54, 60)}
    second = {"dense": run(98.0, 1000, 4000, 20, 31), "paam": run(98.5, 490, 2100, 36, 50)}
    machine = {"device": "CPU", "threads": 2, "torch": "2.13", "date": "2026-11-21"}
    stored = {"machine": machine, "command": "do", "params": 0.5, "methods": {"dense": "unpruned", "paam": "PAAM"}}
    return stored | {"seeds": {"0": first, "3": second}} | changes


@pytest.mark.slow
def test_one_seed(small):
    runs = paam_job.one_seed(0, 0.3)
    assert list(runs) == list(paam_job.METHODS)
    assert runs["dense"]["params"] == 431_080
    for name in ("paam", "aap", "l1"):
        assert runs[name]["params"] <= 0.3 * 431_080
        assert runs[name]["flops"] < runs["dense"]["flops"]
        assert 0 <= runs[name]["accuracy"] <= 100
    assert runs["dense"]["epochs"] == 2
    assert runs["l1"]["epochs"] == runs["paam"]["epochs"]  # as many as PAAM's rounds: 1 + 1 each
    assert runs["paam"]["epochs"] in (3, 5, 6)


def test_norms_do_not_depend_on_the_size_of_the_filters():
    model = nn.Sequential(nn.Conv2d(1, 2, 5), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(3, 2))
    channels = paamops.trace(model, torch.zeros(1, 1, 5, 5))
    with torch.no_grad():
        for module in model[::2][:2]:
            module.weight.fill_(-0.5)
        model[0].weight[1] = 2
        model[4].weight.fill_(1)
    assert paam_job.norms(model, channels).tolist() == [0.5, 2, 0.5, 0.5, 0.5, 1, 1]


def test_each_seed_is_stored_as_it_comes(monkeypatch, tmp_path):
    done = []

    def one_seed(seed, params):
        files = list(tmp_path.glob("paam-job-0.25-*.json"))
        done.append(sorted(json.loads(files[0].read_text())["seeds"]) if files else [])
        return {name: run(90.0 + seed, 10, 20, 30, 40) for name in paam_job.METHODS}

    monkeypatch.setattr(paam_job, "one_seed", one_seed)
    assert paam_job.main(["--seeds", "10", "2", "--params", "0.25", "--results", str(tmp_path)]) == 0
    assert paam_job.main(["--seeds", "3", "--params", "0.25", "--results", str(tmp_path)]) == 0
    assert done == [[], ["10"], ["10", "2"]]
    (path,) = tmp_path.iterdir()
    stored = json.loads(path.read_text())
    assert list(stored["seeds"]) == ["2", "3", "10"]
    assert stored["seeds"]["3"]["paam"]["accuracy"] == 93
    assert len(tables.table(stored).splitlines()) == 2 + 4 + 2
    path.write_text(json.dumps(stored | {"machine": stored["machine"] | {"torch": "another"}}))
    assert paam_job.begin(path, 0.25)["seeds"] == {}  # figures of another machine are not mixed in


def test_table_has_mean_and_range():
    assert tables.table(made_up()).splitlines() == [
        "| | test accuracy, % | parameters left, % | FLOPs left, % | epochs after the first training | seconds |",
        "|---|---|---|---|---|---|",
        "| unpruned | 98.50 (98.00 to 99.00) | 100.0 | 100.0 | 0 | 30 (30 to 31) |",
        "| PAAM | 98.25 (98.00 to 98.50) | 49.5 (49.0 to 50.0) | 51.2 (50.0 to 52.5) | 45 (36 to 54) | 55 (50 to 60) |",
        "",
        "`do`, seeds 0, 3: mean (lowest to highest); CPU, 2 CPU threads, torch 2.13, 2026-11-21.",
    ]
    one = made_up(seeds={"3": made_up()["seeds"]["3"]})
    assert "| PAAM | 98.50 | 49.0 | 52.5 | 36 | 50 |" in tables.table(one)
    assert "`do`, seed 3: " in tables.table(one)
