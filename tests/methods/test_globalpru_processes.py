"""Two processes with half of the images each elect, learn and keep what one process does with all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.methods import globalpru_worker

ROOT = Path(__file__).parents[2]
LIMIT = 150  # seconds: a process that waits for another would wait for ever
WORLD = 2

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch is built without gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two processes")


@pytest.fixture(scope="module")
def found(folder):
    """What each of the processes found, all in one start of theirs."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.methods.globalpru_worker", str(rank), str(WORLD), str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error.decode()[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_equal(one, other):
    """The same stages, the same network, bit for bit."""
    assert one["history"] == other["history"]
    assert torch.equal(one["keep"], other["keep"])
    for name in ("votes", "rankings"):
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, other["tensors"][name]), name


def test_two_processes_run_as_one_does(found):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = globalpru_worker.run(0, 1)
    torch.set_num_threads(threads)
    first, second = (each["whole"] for each in found)
    assert_equal(first, second)
    assert [int(votes.sum()) for votes in first["votes"]] == [64 * 10, 64 * 14]
    for one, other in zip(first["votes"], alone["votes"], strict=True):
        # Up to rounding the saliencies are one process's: an image may change two channels that are all but equal.
        assert (one - other).abs().sum() <= 0.05 * one.sum()


def test_one_of_them_speaks_and_writes(found, folder):
    first, second = (each["whole"] for each in found)
    assert first["lines"] == len(first["history"]) == 4
    assert second["lines"] == 0
    names = {file.name for file in (folder / "whole").iterdir()}
    assert names == {
        "state.json",
        *(f"{name}.safetensors" for name in ("warm", "elected", "ranked", "taught", "tuned")),
    }


def test_two_processes_go_on_where_they_were_cut(found):
    for each in found:
        assert_equal(each["resumed"], each["whole"])
        assert each["resumed"]["trainings"] == each["whole"]["trainings"] - (globalpru_worker.CUT - 1)
