"""The same cases for pytest-benchmark: `pytest bench --benchmark-enable [-k pattern]`, to compare and to store runs."""

import pytest
import torch

from .harness import all_cases, verify

CASES = [case for case in all_cases() if "cpu" in case.devices]


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_speed(case, benchmark):
    """Checked against the float64 reference, then timed."""
    torch.use_deterministic_algorithms(False)
    inputs = case.make("cpu")
    verify(case, inputs)
    benchmark.group = case.op
    benchmark(case.run, *inputs)
