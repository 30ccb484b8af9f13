"""Two processes prune as one does, and follow the first where they do not agree."""

import pytest
import torch

from tests.methods import worker
from tests.methods.processes import needs_gloo, on_one_thread, start
from tests.tolerances import NETWORK_TOLERANCE

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two processes")


@pytest.fixture(scope="module")
def found(folder):
    return start(worker, folder)


def assert_equal(one, other):
    """The same rounds, the same network, bit for bit."""
    assert one["history"] == other["history"]
    assert one["chosen"] == other["chosen"]
    assert torch.equal(one["keep"], other["keep"])
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, other["tensors"][name]), name


def test_two_processes_prune_as_one_does(found):
    """Up to the rounding of gradients that are summed in another order."""
    alone = on_one_thread(worker.run, 0, 1)
    assert {"accepted", "rolled back"} <= {entry["outcome"] for entry in alone["history"]}
    first, second = (each["whole"] for each in found)
    assert_equal(first, second)
    assert first["chosen"] == alone["chosen"]
    assert len(first["history"]) == len(alone["history"])
    for entry, expected in zip(first["history"], alone["history"], strict=True):
        assert entry.keys() == expected.keys()
        for name, value in entry.items():
            assert value == expected[name] or value == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    assert torch.equal(first["keep"], alone["keep"])
    for name, tensor in first["tensors"].items():
        torch.testing.assert_close(tensor, alone["tensors"][name], **NETWORK_TOLERANCE[torch.float64])


def test_one_of_them_speaks_and_writes(found, folder):
    first, second = (each["whole"] for each in found)
    assert first["lines"] == len(first["history"])
    assert second["lines"] == 0
    assert first["trainings"] == second["trainings"]
    names = {file.name for file in (folder / "whole").iterdir()}
    accepted = [entry["number"] for entry in first["history"] if entry["outcome"] in ("start", "accepted")]
    assert names == {"state.json", *(f"round-{number:04d}.safetensors" for number in accepted)}


def test_two_processes_go_on_where_they_were_cut(found):
    for each in found:
        assert_equal(each["resumed"], each["whole"])
        assert each["resumed"]["trainings"] == each["whole"]["trainings"] - (worker.CUT - 1)


def test_where_they_do_not_agree_the_first_is_right(found):
    """The second evaluates, scores and trains something else."""
    first, second = (each["torn"] for each in found)
    assert_equal(first, second)
    assert_equal(first, found[0]["whole"])
