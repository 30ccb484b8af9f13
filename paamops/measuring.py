"""What pruning is for, measured: latency and file size."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from paamops.saving import save


def latency(models, inputs, seconds=5, least=20, most=500):
    """The median seconds of one forward pass of each of `models` on `inputs`, in eval mode.

    The models take turns, so that whatever else the machine does falls on all of them alike: `least` to `most` turns,
    as many as fit in `seconds`. Modes are put back.
    """
    modes = [model.training for model in models]
    times = [[] for _ in models]
    try:
        with torch.inference_mode():
            for model in models:
                model.eval()
                for _ in range(3):  # first calls choose algorithms and allocate
                    model(inputs)
            end = time.perf_counter() + seconds
            for turn in range(most):
                if turn >= least and time.perf_counter() > end:
                    break
                for model, taken in zip(models, times, strict=True):
                    wait(inputs.device)
                    start = time.perf_counter()
                    model(inputs)
                    wait(inputs.device)
                    taken.append(time.perf_counter() - start)
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    return [statistics.median(taken) for taken in times]


def wait(device):
    """Until the device has done what was asked of it; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def file_size(model):
    """The bytes of the file that `paamops.save` writes for `model`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        return path.stat().st_size
