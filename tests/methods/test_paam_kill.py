"""A run of PAAM that is killed at any moment, as often as it likes, ends in the result of a run that is not."""

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


def start(folder, out, mode):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.methods.paam_job", str(folder), str(out), mode],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(folder, out, mode):
    process = start(folder, out, mode)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()


def killed(folder, out, mode, steps, seconds):
    """Let the run do some training steps and then go on for a moment; whether it was killed before its end."""
    process = start(folder, out, mode)
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
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments(mode, tmp_path, seed):
    moments = random.Random(seed)
    undisturbed = tmp_path / "undisturbed.safetensors"
    finish(tmp_path / "whole", undisturbed, mode)
    expected = outcome(undisturbed)
    folder, out = tmp_path / "cut into pieces", tmp_path / "cut.safetensors"
    kills = 0
    for _ in range(6):
        # Steps enough for some progress, and then anywhere: between trainings, or while the state is written.
        if not killed(folder, out, mode, moments.randint(4, 18), moments.random() * 0.05):
            break
        kills += 1
    assert kills >= 2
    finish(folder, out, mode)
    assert outcome(out) == expected
