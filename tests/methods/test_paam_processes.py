"""Two processes learn the scores that one does, keep the same filters, and follow the first where they do not agree."""

import pytest
import torch

from tests.methods import paam_worker
from tests.methods.processes import needs_gloo, on_one_thread, start

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two processes")


@pytest.fixture(scope="module")
def found(folder):
    return start(paam_worker, folder)


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_equal(one, other):
    """The same rounds, the same network, bit for bit."""
    assert one["history"] == other["history"]
    assert one["chosen"] == other["chosen"]
    assert torch.equal(one["keep"], other["keep"])
    assert torch.equal(one["scores"], other["scores"])
    assert_same_tensors(one["tensors"], other["tensors"])


def test_wrapped_as_the_model_is(found):
    """Both under DistributedDataParallel: the same bits in both processes, and the steps of the whole batch."""
    first, second = (each["embedded"] for each in found)
    for name in ("attention", "model", "packed"):
        assert_same_tensors(first[name], second[name])
    assert torch.equal(first["scores"], second["scores"])
    assert torch.equal(first["keep"], second["keep"])
    assert first["lambda"] == second["lambda"]
    alone = paam_worker.embedded(0, 1)
    assert (alone["scores"] - 1).abs().max() > 0.5
    torch.testing.assert_close(first["scores"], alone["scores"], rtol=1e-3, atol=1e-4)
    for name, tensor in alone["model"].items():
        torch.testing.assert_close(first["model"][name], tensor, rtol=1e-3, atol=1e-5)


def test_two_processes_run_as_one_does(found):
    alone = on_one_thread(paam_worker.run, 0, 1)
    first, second = (each["whole"] for each in found)
    assert_equal(first, second)
    assert len(first["history"]) == len(alone["history"]) >= 2
    for entry, expected in zip(first["history"], alone["history"], strict=True):
        assert entry["params"] == expected["params"]
        assert entry["threshold"] == pytest.approx(expected["threshold"], rel=1e-3)
    torch.testing.assert_close(first["scores"], alone["scores"], rtol=1e-3, atol=1e-4)


def test_one_of_them_speaks_and_writes(found, folder):
    first, second = (each["whole"] for each in found)
    assert first["lines"] == len(first["history"])
    assert second["lines"] == 0
    assert first["trainings"] == second["trainings"] == paam_worker.CUT
    names = {file.name for file in (folder / "whole").iterdir()}
    rounds = {f"round-{entry['number']:04d}.safetensors" for entry in first["history"]}
    assert names == {"state.json", "learned-1.safetensors", "learned-2.safetensors", *rounds}


def test_two_processes_go_on_where_they_were_cut(found):
    for each in found:
        assert_equal(each["resumed"], each["whole"])
        assert each["resumed"]["trainings"] == each["whole"]["trainings"] - (paam_worker.CUT - 1)


def test_where_they_do_not_agree_the_first_is_right(found):
    """The second evaluates and trains something else."""
    first, second = (each["torn"] for each in found)
    assert_equal(first, second)
    assert_equal(first, found[0]["whole"])
