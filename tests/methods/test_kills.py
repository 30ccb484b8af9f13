"""A run of PAAM or GlobalPru that is killed at any moment, as often as it likes, ends as one that is not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.methods.paam_job import MODES
from tests.methods.test_kill import outcome

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
JOBS = [("globalpru_job",), *(("paam_job", mode) for mode in MODES)]


def start(folder, out, job):
    name, *words = job
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.methods.{name}", str(folder), str(out), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(folder, out, job):
    process = start(folder, out, job)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()


def killed(folder, out, job, steps, seconds):
    """Let the run do some training steps and then go on for a moment; whether it was killed before its end."""
    process = start(folder, out, job)
    try:
        for _ in range(steps):
            if not process.stdout.readline():
                break
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)  # of a process that has ended, but was not waited for, it is no error
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=" ".join)
def test_killed_at_random_moments(job, tmp_path, seed):
    moments = random.Random(seed)
    undisturbed = tmp_path / "undisturbed.safetensors"
    finish(tmp_path / "whole", undisturbed, job)
    expected = outcome(undisturbed)
    folder, out = tmp_path / "cut into pieces", tmp_path / "cut.safetensors"
    kills = 0
    for _ in range(6):
        # Steps enough for some progress, and then anywhere: between trainings, or while the state is written.
        if not killed(folder, out, job, moments.randint(4, 18), moments.random() * 0.05):
            break
        kills += 1
    assert kills >= 2
    finish(folder, out, job)
    assert outcome(out) == expected
