"""filter_norms: l1 and l2 norms against float64, of every kind, layout and dtype."""

import math

import pytest
import torch
from paamops.triton_kernels import filter_norms as kernels
from paamops.triton_kernels.filter_norms import filter_norms

from tests.filters import DTYPES, KINDS, LAYOUTS, chance_of, draw, random_layers
from tests.ops.test_filter_norms import check
from tests.triton import DEVICE


def check_layers(weights, axes, groups):
    check(filter_norms, [weight.to(DEVICE) for weight in weights], axes, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_kinds_in_one_call(dtype):
    """With layers without filters, and filters without weights."""
    weights = [draw(shape, dtype) for shape, _, _ in KINDS]
    check_layers(weights, [axis for _, axis, _ in KINDS], [group for _, _, group in KINDS])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    layers = [(draw(shape).to(DEVICE), axis, group) for shape, axis, group in KINDS[6:14]]
    weights, axes, groups = map(list, zip(*layers, strict=True))
    check(filter_norms, [LAYOUTS[layout](weight) for weight in weights], axes, groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [1, 127, 128, 136, 260])
def test_depths(depth, dtype):
    """Whole tiles, what is left behind them, and filters that begin at no multiple of 16 bytes."""
    check_layers([draw((17, depth), dtype), draw((3, depth + 8), dtype)], [0, 0], [1, 1])
    check(filter_norms, [draw((3 * depth + 1,), dtype).to(DEVICE)[1:].view(3, depth)], [0], [1])  # so does the tensor


@pytest.mark.parametrize(("rows", "cols"), [(2, 16), (4, 32)])
def test_cuts(rows, cols, monkeypatch):
    """Other tiles than those that are launched."""
    monkeypatch.setattr(kernels, "ROWS", rows)
    monkeypatch.setattr(kernels, "COLS", cols)
    check_layers([draw((9, 70)), draw((5, 64)), draw((6, 4, 5))], [0, 0, 1], [1, 1, 2])


@pytest.mark.parametrize("repeat", range(4))
def test_random_lists(repeat, seed):
    check_layers(*random_layers(chance_of(seed, repeat), most=4))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of infinities
def test_special_values():
    """NaN and infinities stay in their filter, in whole tiles and behind them."""
    for place in (0, 130):
        weight = draw((18, 136)).to(DEVICE)
        weight[2, place], weight[17, place] = math.nan, -math.inf
        for p in (1, 2):
            norms = filter_norms([weight], [0], [1], p)
            assert norms.isnan().nonzero().tolist() == [[2]]
            assert norms.isinf().nonzero().tolist() == [[17]]


def test_nothing_outside_is_read_or_written():
    """Guards around the weights are NaN, and no norm is."""
    guarded = torch.full((400,), math.nan, device=DEVICE)
    guarded[8:392] = torch.randn(384)
    weight = guarded[8:392].view(3, 128)
    assert filter_norms([weight, weight[:, :40], weight[:2, 5:]], [0, 0, 0], [1, 1, 1], 2).isfinite().all()


def test_without_filters():
    assert filter_norms([torch.empty(0, 4, device=DEVICE)], [0], [1], 2).shape == (0,)
