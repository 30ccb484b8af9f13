"""Two processes with half of the images each elect, learn and keep what one process does with all of them."""

import pytest
import torch

from tests.methods import globalpru_worker
from tests.methods.processes import needs_gloo, on_one_thread, start

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two processes")


@pytest.fixture(scope="module")
def found(folder):
    return start(globalpru_worker, folder)


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
    alone = on_one_thread(globalpru_worker.run, 0, 1)
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
