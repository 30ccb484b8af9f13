"""filter_distances: against all differences in float64, over blocks, chunks and layers."""

import math

import pytest
import torch
from paamops.triton_kernels import filter_distances as kernels
from paamops.triton_kernels.filter_distances import filter_distances

from tests.filters import DTYPES, KINDS, LAYOUTS, chance_of, draw, random_layers
from tests.ops.test_filter_distances import check
from tests.triton import DEVICE


def check_layers(weights, axes, groups):
    check(filter_distances, [weight.to(DEVICE) for weight in weights], axes, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_kinds_in_one_call(dtype):
    """With layers without filters, and filters without weights."""
    kinds = [kind for kind in KINDS if math.prod(kind[0]) < 1000]
    weights = [draw(shape, dtype) for shape, _, _ in kinds]
    check_layers(weights, [axis for _, axis, _ in kinds], [group for _, _, group in kinds])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    layers = [(draw(shape).to(DEVICE), axis, group) for shape, axis, group in KINDS[6:10] + KINDS[11:13]]
    weights, axes, groups = map(list, zip(*layers, strict=True))
    check(filter_distances, [LAYOUTS[layout](weight) for weight in weights], axes, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 31, 33, 65])
def test_blocks(count, dtype):
    check_layers([draw((count, 9), dtype), draw((5, 3), dtype)], [0, 0], [1, 1])


@pytest.mark.parametrize("depth", [1, 8, 256, 261])
def test_depths(depth):
    check_layers([draw((5, depth))], [0], [1])


@pytest.mark.parametrize(("side", "step", "chunk"), [(2, 4, 1), (16, 16, 2)])
def test_cuts(side, step, chunk, monkeypatch):
    """Other blocks than those that are launched; sums of many of them, in several programs."""
    monkeypatch.setattr(kernels, "SIDE", side)
    monkeypatch.setattr(kernels, "STEP", step)
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    monkeypatch.setattr(kernels, "SUMMED", 4)
    check_layers([draw((5, 19)), draw((4, 2, 3))], [0, 1], [1, 2])


@pytest.mark.parametrize("repeat", range(3))
def test_random_lists(repeat, seed):
    check_layers(*random_layers(chance_of(seed, repeat), most=2))


def test_near_filters_far_from_zero():
    weight = draw((1, 40), scale=10) + draw((35, 40), scale=1e-5)
    weight[3] = weight[2]
    check_layers([weight], [0], [1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of infinity less infinity
def test_special_values():
    """What is infinitely far is so for all of its layer, NaN likewise; a lone filter has no others."""
    for value in (math.inf, math.nan):
        spoilt = draw((34, 9)).to(DEVICE)
        spoilt[33, 8] = value
        whole, lone = draw((5, 9)).to(DEVICE), torch.full((1, 9), value, device=DEVICE)
        sums = filter_distances([spoilt, whole, lone], [0, 0, 0], [1, 1, 1])
        assert (sums[:34].isnan() if math.isnan(value) else sums[:34] == math.inf).all()
        assert sums[34:39].isfinite().all()
        assert sums[39] == 0


def test_nothing_outside_is_read_or_written():
    """Guards around the weights are NaN, and no distance is."""
    guarded = torch.full((50,), math.nan, device=DEVICE)
    guarded[8:44] = torch.randn(36)
    weight = guarded[8:44].view(3, 12)
    assert filter_distances([weight, weight[:2, 5:]], [0, 0], [1, 1]).isfinite().all()


def test_without_filters():
    assert filter_distances([torch.empty(0, 4, device=DEVICE)], [0], [1]).shape == (0,)
