"""What the tests of several processes share: how they are started, and what each of them is."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

ROOT = Path(__file__).parents[2]
LIMIT = 150  # seconds: a process that waits for another would wait for ever
TIMEOUT = timedelta(seconds=60)
WORLD = 2

needs_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch is built without gloo"
)


def start(module, folder):
    """What each of the processes `python -m module RANK WORLD FOLDER` found, all in one start of theirs."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module.__name__, str(rank), str(WORLD), str(folder)],
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


def be_one(find):
    """Such a process: stores what find(rank, world, folder) finds in their process group."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    torch.save(find(rank, world, folder), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def on_one_thread(function, *args):
    """function(*args) as those processes compute it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(threads)
