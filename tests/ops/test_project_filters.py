"""project_filters: the products of all layers' filters with their projections, standardised or not, against float64."""

import pytest
import torch

from paamops.ops import project_filters as ops
from paamops.ops.project_filters import (
    project_filters,
    project_filters_backward_op,
    project_filters_op,
)
from tests.tolerances import assert_close

SHAPES = {
    "one layer": [(16, 27)],
    "unequal": [(16, 27), (3, 144), (64, 64), (1, 1), (7, 300)],
    "some empty": [(0, 9), (5, 4), (4, 0), (0, 0)],
}


def inputs(shapes, columns=6, dtype=torch.float32):
    """rows: one matrix a layer, of means and spreads of their own; weight."""
    rows = [torch.randn(shape, dtype=torch.float64) * 0.3 + torch.randn(()).double() for shape in shapes]
    weight = torch.randn(sum(d for _, d in shapes), columns, dtype=dtype)
    return [row.to(dtype) for row in rows], weight


def oracle(rows, weight, standardised=False):
    """In float64, layer by layer."""
    result, projections = [], weight.double().split([row.shape[1] for row in rows])
    for row, projection in zip(rows, projections, strict=True):
        row = row.double()
        if standardised and row.numel():
            row = (row - row.mean()) / row.std(correction=0)
        result.append(row @ projection)
    return torch.cat(result)


def check(actual, wanted, rows, weight):
    """Sums may cancel: relative to their terms."""
    scale = max(1, *(row.shape[1] for row in rows)) * weight.abs().max()
    assert actual.dtype == weight.dtype
    assert actual.shape == wanted.shape
    assert_close(actual / scale, wanted / scale, weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_result(name, standardised, dtype):
    rows, weight = inputs(SHAPES[name], dtype=dtype)
    if standardised:
        rows = [row for row in rows if row.numel() != 1]  # a single entry is constant
        weight = torch.randn(sum(row.shape[1] for row in rows), 6, dtype=dtype)
    check(project_filters(rows, weight, standardised), oracle(rows, weight, standardised), rows, weight)


@pytest.mark.parametrize("of_rows", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("standardised", [False, True])
def test_rows_of_another_dtype(of_rows, standardised):
    rows, weight = inputs(SHAPES["one layer"])
    rows = [row.to(of_rows) for row in rows]
    check(project_filters(rows, weight, standardised), oracle(rows, weight, standardised), rows, weight)


@pytest.mark.parametrize("standardised", [False, True])
def test_strided_rows_and_weight(standardised):
    kernel = torch.randn(27, 3, 5, 5).to(memory_format=torch.channels_last)
    rows = [torch.randn(27, 16).t(), torch.randn(8, 60)[:, ::2], torch.randn(1, 9).expand(4, 9), kernel.flatten(1)]
    weight = torch.randn(5, sum(row.shape[1] for row in rows)).t()
    before = [row.clone() for row in rows]
    check(project_filters(rows, weight, standardised), oracle(rows, weight, standardised), rows, weight)
    assert all(torch.equal(row, copy) for row, copy in zip(rows, before, strict=True))


def test_the_gradient_of_weight():
    for name in SHAPES:
        rows, weight = inputs(SHAPES[name])
        rows = [row.requires_grad_() for row in rows]
        result = project_filters(rows, weight.requires_grad_())
        grad = torch.randn_like(result)
        exact = weight.detach().double().requires_grad_()
        (wanted,) = torch.autograd.grad(oracle(rows, exact), exact, grad.double())
        result.backward(grad)
        scale = max(1, *(len(row) for row in rows)) * max(row.abs().max() if row.numel() else 0 for row in rows)
        assert_close(weight.grad / scale, wanted / scale, torch.float32)
        assert all(row.grad is None for row in rows)


@pytest.mark.parametrize("standardised", [False, True])
def test_gradcheck(standardised):
    rows, weight = inputs([(4, 3), (0, 2), (2, 5)], 3, torch.float64)
    function = lambda weight: project_filters(rows, weight, standardised)  # noqa: E731
    assert torch.autograd.gradcheck(function, (weight.requires_grad_(),))


@pytest.mark.parametrize("name", SHAPES)
def test_opcheck(name):
    rows, weight = inputs(SHAPES[name])
    heights, widths = [len(row) for row in rows], [row.shape[1] for row in rows]
    flat = torch.cat([row.flatten() for row in rows])
    torch.library.opcheck(project_filters_op, (flat, weight.clone().requires_grad_(), heights, widths))
    torch.library.opcheck(project_filters_backward_op, (torch.randn(sum(heights), 6), flat, heights, widths))


def test_a_second_gradient_is_refused():
    rows, weight = inputs([(4, 3)])
    (grad,) = torch.autograd.grad(
        project_filters(rows, weight.requires_grad_()).square().sum(), weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_layers_become_zeros_and_nearly_constant_ones_do_not(dtype):
    """The mean of equal numbers may differ from them by rounding: that is no deviation."""
    values = [0.0, 0.1, -1e-20, 1e20, 3.0]
    rows = [torch.full((33, 77), value, dtype=dtype) for value in values]
    rows.append(1 + 1e-4 * torch.randn(5, 77, dtype=dtype))
    for standardise in (by_layer, at_once):
        *constant, spread = standardise(rows)
        assert not any(part.any() for part in constant)
        assert spread.std(correction=0) == pytest.approx(1, rel=1e-3)


def by_layer(rows):
    parts = [row.flatten() for row in rows]
    for part in parts:
        ops._standardise(part)
    return parts


def at_once(rows):
    sizes = [row.numel() for row in rows]
    flat = torch.cat([row.flatten() for row in rows])
    heights, widths = [len(row) for row in rows], [row.shape[1] for row in rows]
    return ops._standardise_at_once(flat, heights, widths).split(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_standardising_all_layers_at_once(dtype, monkeypatch):
    """What a GPU does, in torch's own ops: the same numbers, whatever the chunks."""
    rows, _ = inputs([(16, 27), (0, 3), (70, 90), (3, 0), (64, 65)], dtype=dtype)
    for chunk in (7, 4096):
        ops._segments.cache_clear()
        monkeypatch.setattr(ops, "CHUNK", chunk)
        for part, row in zip(at_once(rows), rows, strict=True):
            exact = row.double().flatten()
            wanted = (exact - exact.mean()) / exact.std(correction=0) if len(exact) else exact
            assert_close(part / 10, wanted / 10, dtype)
    ops._segments.cache_clear()
    assert ops._standardise_at_once(torch.empty(0), [0, 2], [3, 0]).shape == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spreads_over_its_layer(value):
    rows, weight = inputs([(4, 5), (3, 2)])
    rows[0][1, 2] = value
    result = project_filters(rows, weight, standardised=True)
    assert result[:4].isnan().all()
    assert result[4:].isfinite().all()
    first, second = at_once(rows)
    assert first.isnan().all()
    assert second.isfinite().all()
    result = project_filters(rows, weight)
    assert not result[1].isfinite().any()
    assert result[[0, 2, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, r"rows is a Tensor; it must be a list", {"rows": torch.ones(2, 3)}),
        (ValueError, r"rows is empty; it must have at least one", {"rows": []}),
        (TypeError, r"rows\[1\] is a int; it must be a tensor", {"rows": [torch.ones(2, 3), 3]}),
        (TypeError, r"rows\[0\] has dtype torch\.int64; it must be", {"rows": [torch.ones(2, 3).long()]}),
        (ValueError, r"rows\[0\] has shape \(3,\); it must have two dim", {"rows": [torch.ones(3)]}),
        (ValueError, r"rows\[0\] is on meta; .* device of weight, cpu", {"rows": [torch.ones(2, 3, device="meta")]}),
        (TypeError, r"weight is a list; it must be a tensor", {"weight": [1.0]}),
        (TypeError, r"weight has dtype torch\.float16; it must be float32", {"weight": torch.ones(3, 4).half()}),
        (ValueError, r"weight has shape \(3,\); .* columns, 3", {"weight": torch.ones(3)}),
        (ValueError, r"weight has shape \(4, 2\); .* columns, 3", {"weight": torch.ones(4, 2)}),
    ],
)
def test_bad_arguments(error, words, arguments):
    with pytest.raises(error, match=words):
        project_filters(**{"rows": [torch.ones(2, 3)], "weight": torch.ones(3, 4), **arguments})


def test_same_bits_in_every_run():
    rows, weight = inputs([(64, 576)] * 3)
    one, other = (project_filters(rows, weight, standardised=True) for _ in range(2))
    assert torch.equal(one, other)
