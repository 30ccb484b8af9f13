"""On a machine with a GPU all of these tests run on it, so there they belong to the GPU lane."""

import pathlib

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        for item in items:
            if pathlib.Path(__file__).parent in item.path.parents:
                item.add_marker("gpu")
