"""The training throughput: what it stores follows from what it timed."""

import json

import pytest
import torch

import paamops
from bench import throughput
from paamops import models, training

pytest.importorskip("lightning_fabric")


def test_what_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    monkeypatch.setattr(throughput, "windows", lambda *_: (9.0, [2.0, 1.0, 4.0]))
    monkeypatch.setattr(throughput, "matmul_rate", lambda device, dtype: 1e9 if dtype == torch.bfloat16 else None)
    words = ["--model", "lenet5", "--batch-size", "8", "--steps", "10", "--precision", "bf16-mixed"]
    assert throughput.main(words) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("throughput-")
    (result,) = json.loads(path.read_text())["cases"].values()
    assert result["images_per_s"] == {"median": 40.0, "least": 20.0, "most": 80.0, "windows": 3}
    forward = paamops.trace(models.build("lenet5"), torch.zeros(1, 3, 32, 32)).cost().flops
    assert result["flops_per_image"] == 3 * forward
    assert result["share_of_matmul"] == pytest.approx(40 * 3 * forward / 1e9, rel=1e-3)
    assert result["epoch_s"] == 45000 / 40
    assert "lenet5 batch 8 bf16-mixed: 40 images/s (20 to 80 in 3 windows)" in capsys.readouterr().out


def test_windows_train():
    torch.manual_seed(0)
    model, noise = models.build("lenet5"), throughput.random_images(16)
    before = next(model.parameters()).detach().clone()
    first, seconds = throughput.windows(model, noise, training.make_fabric("cpu"), 8, 3, "lenet5", False)
    assert len(seconds) == 3
    assert min(first, *seconds) > 0
    assert not torch.equal(before, next(model.parameters()))


def test_matmul_rate():
    assert 1e8 < throughput.matmul_rate(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.parametrize("option", ["--windows", "--steps", "--batch-size"])
def test_nothing_cannot_be_timed(capsys, option):
    with pytest.raises(SystemExit) as stop:
        throughput.main([option, "0"])
    assert stop.value.code == 2
    assert f"{option}: '0' must be at least 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu(capsys):
    assert throughput.main(["--device", "cuda"]) == 2
    assert "nothing was timed" in capsys.readouterr().err
