"""project_filters: the products of all layers, and their gradient, against float64."""

import pytest
import torch
from paamops.triton_kernels.project_filters import _tiles, project_filters, project_filters_backward

from paamops.ops import project_filters as ops
from tests.tolerances import assert_close
from tests.triton import DEVICE

SHAPES = {
    "one layer": [(5, 27)],
    "larger than a tile": [(70, 90), (33, 65)],
    "unequal, some empty": [(16, 27), (0, 9), (3, 1), (1, 144), (64, 64), (4, 0), (0, 0)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 6, 64, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_both_products(name, columns, dtype):
    heights, widths = zip(*SHAPES[name], strict=True)
    rows = torch.randn(sum(n * d for n, d in SHAPES[name]), device=DEVICE, dtype=dtype)
    weight = torch.randn(sum(widths), columns, device=DEVICE, dtype=dtype)
    grad = torch.randn(sum(heights), columns, device=DEVICE, dtype=dtype)
    exact = [t.double().cpu() for t in (rows, weight, grad)]
    result = project_filters(rows, weight, heights, widths)
    assert (result.shape, result.dtype) == ((sum(heights), columns), dtype)
    scale = max(*heights, *widths)
    assert_close(result / scale, ops.project_filters_reference(*exact[:2], heights, widths) / scale, dtype)
    result = project_filters_backward(grad, rows, heights, widths)
    assert (result.shape, result.dtype) == ((sum(widths), columns), dtype)
    wanted = ops.project_filters_backward_reference(exact[2], exact[0], heights, widths)
    assert_close(result / scale, wanted / scale, dtype)


def test_nothing_at_all():
    empty = torch.empty(0, device=DEVICE)
    assert project_filters(empty, torch.empty(0, 4, device=DEVICE), (0, 3), (0, 0)).tolist() == [[0] * 4] * 3
    assert project_filters_backward(torch.empty(0, 4, device=DEVICE), empty, (0,), (3,)).tolist() == [[0] * 4] * 3
    assert project_filters(empty, torch.empty(0, 0, device=DEVICE), (0,), (0,)).shape == (0, 0)


def test_any_strides():
    rows, weight = torch.randn(2 * 5 * 27, device=DEVICE)[::2], torch.randn(6, 27, device=DEVICE).t()
    result = project_filters(rows, weight, (5,), (27,))
    assert_close(result, rows.double().view(5, 27) @ weight.double(), torch.float32)
    grad = torch.ones((), device=DEVICE).expand(5, 6)
    result = project_filters_backward(grad, rows, (5,), (27,))
    assert_close(result, rows.double().view(5, 27).t() @ grad.double(), torch.float32)


def test_nan_stays_in_its_layer_and_row():
    rows, weight = torch.randn(40 * 10 + 40 * 7, device=DEVICE), torch.randn(17, 4, device=DEVICE)
    rows[5 * 10 + 3] = torch.nan
    result = project_filters(rows, weight, (40, 40), (10, 7))
    assert result.isnan().any(1).nonzero().tolist() == [[5]]
    grad = project_filters_backward(torch.ones(80, 4, device=DEVICE), rows, (40, 40), (10, 7))
    assert grad.isnan().any(1).nonzero().tolist() == [[3]]


def test_every_row_of_every_layer_has_one_tile():
    shapes = [(70, 27), (0, 5), (32, 300), (33, 1)]
    heights, widths = zip(*shapes, strict=True)
    for transposed in (False, True):
        tiles = _tiles(heights, widths, transposed, 32, torch.device("cpu")).tolist()
        sizes = widths if transposed else heights
        starts = [of_result + row for *_, of_result, row in tiles]
        begins = [sum(sizes[:layer]) for layer in range(len(sizes))]
        assert sorted(starts) == [b + row for b, size in zip(begins, sizes, strict=True) for row in range(0, size, 32)]
        terms = [n if transposed else d for _, n, d, *_ in tiles]
        assert terms == sorted(terms, reverse=True)


def test_same_bits_every_run():
    rows, weight = torch.randn(70 * 90, device=DEVICE), torch.randn(90, 64, device=DEVICE)
    one, other = (project_filters(rows, weight, (70,), (90,)) for _ in range(2))
    assert torch.equal(one, other)
