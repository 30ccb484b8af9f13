"""Every kernel, compiled ahead of time as it is launched: no spills, bounded registers, tiles moved by 16 bytes.

The compilation runs in a process without TRITON_INTERPRET, which turns kernels into Python functions.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench.compile_kernels import LIMITED_BY_ARITHMETIC, MAX_REGISTERS, OPS, TARGETS, problems

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def records():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile_kernels", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_within_limits(records, target, op):
    found = [record for record in records if (record["target"], record["op"]) == (target, op)]
    kernels = {
        "activation_attention": {"_forward", "_combine", "_first_maximum", "_backward"},
        "relu_attention": {"_forward", "_combine", "_first_maximum", "_backward"},
        "cumulative_threshold": {"_histogram", "_sum_equals", "_keep"},
        "pack_channels": {"_move_blocks"},
        "filter_attention": {
            *("_range", "_sweep", "_combine_parts", "_interpolate"),
            *("_sweep_backward", "_weights", "_finish"),
        },
        "project_filters": {"_project"},
        "leaky_exponential": {"_activate", "_add_sums", "_activation_gradient"},
        "tempered_sigmoid": {"_activate", "_add_sums", "_activation_gradient"},
        "scale_channels": {"_scale", "_gradients", "_combine_channels"},
        "scatter_channels": {"_scatter"},
        "vote_ranking": {"_vote"},
        "ranking_loss": {"_walk_back", "_add_tasks", "_ranking_gradients"},
        "channel_attention": {"_squeeze", "_combine_chunks", "_excite"},
        "filter_norms": {"_norms"},
        "filter_distances": {"_pairs", "_add_blocks"},
    }
    assert {record["kernel"] for record in found} == kernels[op]
    assert [(record["kernel"], record["case"], record["problems"]) for record in found if record["problems"]] == []
    assert all(
        record["expected_loads"] + record["expected_stores"] > 0
        for record in found
        if "float32" in record["case"] and record["kernel"] not in LIMITED_BY_ARITHMETIC
    )


def test_limits_are_limits():
    good = {"spilled": 0, "registers": MAX_REGISTERS}
    good |= {"wide_loads": 2, "expected_loads": 2, "wide_stores": 1, "expected_stores": 1}
    assert problems(good) == []
    for bad in ({"spilled": 8}, {"registers": MAX_REGISTERS + 1}, {"wide_loads": 1}, {"wide_stores": 0}):
        assert len(problems(good | bad)) == 1
