"""Fresh random inputs for every test, from a seed that is printed when a test fails; NaN in what `empty` returns."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run in its interpreter


@pytest.fixture(autouse=True)
def seed(request):
    """Seed torch afresh (PAAMOPS_SEED repeats a run) and print the seed: pytest shows it with a failure."""
    value = int(os.environ.get("PAAMOPS_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"PAAMOPS_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`empty` returns NaN, so that an element no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
