"""The comparison with torch-pruning: what must hold holds of paamops, and the experiments see what does not."""

import json

import pytest
import torch

import paamops
from bench import peer_rows, peer_torch_pruning, tables


@pytest.mark.parametrize("title", peer_rows.ROWS)
@pytest.mark.filterwarnings("ignore")
def test_it_holds_of_paamops(title):
    holds, seen = peer_rows.ROWS[title](peer_rows.ours)
    assert holds, seen


def dense(model, x, **_):
    """A pruner that does nothing, and says so to nobody."""
    return model, None


def careless(model, x, **_):
    """A pruner that drops the first half of the filters of every layer, and what reads them, whatever they are."""
    small = paamops.pack(
        model, channels := paamops.trace(model, x), channels.guarded(-torch.arange(len(channels.pinned)))
    )
    return small, None


@pytest.mark.parametrize(
    "title",
    [
        "a network that is all frozen is pruned or refused",
        "a network that cannot be pruned is refused",
        "groups = in, out = 2 · in",
        "PixelShuffle",
        "equal scores do not overprune: half of the filters go",
        "50 % of the parameters, to a filter",
    ],
)
def test_a_pruner_that_does_nothing_is_seen(title):
    assert not peer_rows.ROWS[title](dense)[0]


@pytest.mark.parametrize("title", ["groups = in, out = 2 · in", "PixelShuffle"])
def test_a_pruner_that_cuts_what_is_alive_is_seen(title):
    assert not peer_rows.ROWS[title](careless)[0]


def test_reads_of_the_models_values_are_counted():
    model = torch.nn.Linear(3, 2)
    with peer_rows.Reads(model) as reads:
        norm = model.weight.detach().norm()
        norm.item()
        norm.cpu().item()  # one: what is on the host is read freely
        model.weight.detach().tolist()
        torch.ones(3).sum().item()  # not of the model
    assert reads.count == 3


@pytest.mark.filterwarnings("ignore")
def test_the_rows_run_on_torch_pruning():
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    found = peer_rows.run()
    assert found.keys() == peer_rows.ROWS.keys()
    assert {name: each["holds"] for name, each in found["the dtype stays"].items()} == dict.fromkeys(
        peer_rows.PRUNERS, True
    )
    assert not found["PixelShuffle"]["torch-pruning"]["holds"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_times_are_taken_in_turns():
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    small = ("mobilenetv3-small", 32)
    rows = peer_torch_pruning.fast(1, [(*small, None, 3, None), (*small, 1, None, 2)])
    assert [row["target"] for row in rows] == [None, 3, 1, None, 2]
    assert all(row["ratio"] == pytest.approx(row["theirs"] / row["ours"]) for row in rows)
    assert rows[-1]["left"]["paamops"] <= rows[-1]["left"]["asked"]


def test_the_table(tmp_path):
    held = {"paamops": {"holds": True, "seen": "a|b"}, "torch-pruning": {"holds": False, "seen": "none"}}
    memory = {"peak": 3 << 20, "packed": 2 << 20, "largest": 1 << 20, "holds": True}
    stored = {
        "peer": {"paamops": "0.1.0", "torch-pruning": "1.6.1"},
        "machine": {"device": "a CPU", "threads": 2, "torch": "2.13.0", "date": "2026-01-01"},
        "command": "python -m bench.peer_torch_pruning",
        "rounds": 3,
        "right": {"hooks": held},
        "fast": [peer_torch_pruning.row("net, 8²: trace | construction", 2.0, 5.0, 3)],
        "growth": [{"depth": 100, "ours": 150.0, "theirs": None}],
        "memory": {"paamops": memory, "torch-pruning": memory | {"holds": False}},
    }
    peer_torch_pruning.write(tmp_path / "peer.json", stored)
    lines = tables.table(json.loads((tmp_path / "peer.json").read_text())).splitlines()
    assert "| hooks | holds: a\\|b | **fails**: none |" in lines
    assert "| net, 8² | trace: 2 | construction: 5 | 2.5 | ≥ 3, **not met** |" in lines
    assert "| 100 residual layers, the whole job | 150 (1.50 a layer) | more than a minute |  | |" in lines
    assert "3 MiB above the start; 2 MiB packed, the largest tensor 1 MiB" in "\n".join(lines)
