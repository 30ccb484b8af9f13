"""filter_attention: both forms, forward and backward, against the direct sum in float64."""

import itertools
import math

import pytest
import torch
from paamops.triton_kernels import filter_attention as kernels

from paamops.ops import filter_attention as ops
from tests.tolerances import assert_close
from tests.triton import DEVICE

TABLE = ops.widest(1e-7)


@pytest.fixture
def interpolate_small_layers(monkeypatch):
    """So that few filters suffice to reach the linear form, several parts and several blocks of ranges."""
    monkeypatch.setattr(kernels, "SMALL", 8)
    kernels._plan.cache_clear()
    yield
    kernels._plan.cache_clear()


def inputs(heights, d, spread=1.0, dtype=torch.float32):
    """q, k: halves of one (F, 2d) tensor; v, b, offsets."""
    rows = torch.randn(sum(heights), 2 * d, dtype=dtype, device=DEVICE) * spread
    v = torch.randn(len(heights), d, dtype=dtype, device=DEVICE)
    b = torch.randn(len(heights), dtype=dtype, device=DEVICE)
    return rows[:, :d], rows[:, d:], v, b, [0, *itertools.accumulate(heights)]


def check(q, k, v, b, offsets, widest):
    """Forward and backward against float64. Sums are bounded by their terms, so tolerances are relative to these."""
    exact = [t.double().cpu() for t in (q, k, v, b)]
    x = kernels.filter_attention(q, k, v, b, offsets, widest)
    assert (x.shape, x.dtype) == ((q.shape[0],), q.dtype)
    scale = 1 + v.abs().sum(1).max().item()
    wanted = ops.filter_attention_reference(*exact, offsets, ())
    assert_close(x / scale, wanted / scale, q.dtype)

    grad = torch.randn(q.shape[0], device=q.device, dtype=q.dtype)
    actual = kernels.filter_attention_backward(grad, q, k, v, offsets, widest)
    wanted = ops.filter_attention_backward_reference(grad.double().cpu(), *exact[:3], offsets, ())
    highest = max((b - a for a, b in itertools.pairwise(offsets)), default=1)
    weight = max(1, v.abs().max().item()) * max(1, grad.abs().max().item() if len(grad) else 1)
    for mine, right, terms in zip(actual, wanted, (1, 1, max(1, highest) ** 0.5, max(1, highest) ** 0.5), strict=True):
        assert (mine.shape, mine.dtype) == (right.shape, q.dtype)
        assert_close(mine / (weight * terms), right / (weight * terms), q.dtype)


def test_the_ladder_and_the_cost_are_those_of_the_op():
    assert kernels.NODES == ops.NODES
    assert kernels.LINEAR_COST == ops.LINEAR_COST
    assert all(nodes % kernels.TARGETS == 0 for nodes in kernels.NODES)
    assert len(kernels.NODES) <= kernels.ENTRIES


@pytest.mark.parametrize("heights", [[1], [7], [8, 0, 9], [0, 33, 1, 2]], ids=str)
@pytest.mark.parametrize("d", [1, 3, 8, 32, 40])
def test_direct(heights, d):
    check(*inputs(heights, d), [])


@pytest.mark.parametrize("spread", [1e-4, 0.1, 3.0, 100.0])
def test_direct_over_all_magnitudes(spread):
    check(*inputs([20, 5], 8, spread), [])


def test_direct_float64():
    for d in (5, 40):
        check(*inputs([13, 4], d, 1.0, torch.float64), [])
    check(*inputs([13, 4], 5, 0.3, torch.float64), TABLE)  # float64 is always direct


def test_relative_precision_near_zero():
    """tanh of small arguments to a few units in the last place, where 1 - exp(-2s) would cancel."""
    for dtype, bound in ((torch.float32, 4e-7), (torch.float64, 2e-15)):
        q = torch.cat((torch.logspace(-30, -0.2, 50), torch.linspace(0.5, 0.6, 30))).to(dtype).to(DEVICE)[:, None]
        one = torch.ones(len(q), 1, dtype=dtype, device=DEVICE)
        zero = torch.zeros(len(q), dtype=dtype, device=DEVICE)
        x = kernels.filter_attention(q, torch.zeros_like(q), one, zero, list(range(len(q) + 1)), [])
        exact = q.double().flatten().tanh() if dtype == torch.float32 else q.flatten().tanh()
        assert ((x.double() - exact) / exact).abs().max() < bound


@pytest.mark.usefixtures("interpolate_small_layers")
@pytest.mark.parametrize("spread", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("d", [1, 5, 33])
def test_by_the_table(d, spread):
    """Layers of both forms in one call."""
    check(*inputs([20, 0, 3, 45, 9], d, spread), list(TABLE))


@pytest.mark.usefixtures("interpolate_small_layers")
def test_several_parts_and_more_blocks_of_nodes_than_programs():
    heights, entry = [kernels.PART + 4], kernels.NODES.index(160)
    assert kernels.NODES[entry] > kernels.SLOTS * kernels.TARGETS
    check(*inputs(heights, 1), [-1.0] * entry + [math.inf])


@pytest.mark.usefixtures("interpolate_small_layers")
@pytest.mark.parametrize("entry", [0, 1, 3])
def test_forced_nodes(entry, monkeypatch):
    """Interpolation at a given number of nodes; the forms differ in their bits, so it can be told which one ran."""
    monkeypatch.setattr(kernels, "RANGE_ROWS", 32)
    q, k, v, b, offsets = inputs([70], 6, 0.05)
    table = [-1.0] * entry + [math.inf]
    check(q, k, v, b, offsets, table)
    linear, direct = (kernels.filter_attention(q, k, v, b, offsets, t) for t in (table, []))
    assert not torch.equal(linear, direct)


@pytest.mark.usefixtures("interpolate_small_layers")
def test_too_few_nodes_show():
    """That the number of nodes decides: 8 over a wide interval are visibly wrong, in the result and in gradients."""
    q, k, v, b, offsets = inputs([60], 4, 8.0)
    coarse, fine = (kernels.filter_attention(q, k, v, b, offsets, t) for t in ([math.inf], []))
    assert (coarse - fine).abs().max() > 1e-2
    grad = torch.randn_like(coarse)
    coarse, fine = (kernels.filter_attention_backward(grad, q, k, v, offsets, t) for t in ([math.inf], []))
    for one, other in zip(coarse[:3], fine[:3], strict=True):
        assert (one - other).abs().max() > 1e-4
    check(q, k, v, b, offsets, list(TABLE))  # which the table knows


@pytest.mark.usefixtures("interpolate_small_layers")
def test_the_choice_is_that_of_the_op():
    """Bits tell the forms apart: with the table the result is that of the forced form that `ops.form` names."""
    for height, spread in ((12, 0.1), (13, 0.1), (30, 0.1), (30, 1.5), (50, 1.0), (50, 4.0)):
        q, k, v, b, offsets = inputs([height], 3, spread)
        width = (q.amax(0) - q.amin(0)).max().item()
        nodes = ops.form(height, width, 1e-7)
        forced = [-1.0] * kernels.NODES.index(nodes) + [math.inf] if nodes else []
        x = kernels.filter_attention(q, k, v, b, offsets, list(TABLE))
        assert torch.equal(x, kernels.filter_attention(q, k, v, b, offsets, forced))


def test_small_layers_are_direct_whatever_the_table():
    assert kernels._Plan((0, kernels.SMALL), True, torch.device("cpu")).node_rows == 0
    assert kernels._Plan((0, kernels.SMALL + 1), True, torch.device("cpu")).node_rows > 0


def test_memory_is_linear():
    """Rows of d numbers that a pass keeps beside its result, over the number of filters."""
    for n in (300, 1000, 4096, 16384, 65536):
        plan = kernels._Plan((0, n), True, torch.device("cpu"))
        assert plan.part_rows <= 5 * n
        assert plan.node_rows <= 2 * n


@pytest.mark.usefixtures("interpolate_small_layers")
def test_equal_queries_have_an_interval_without_width():
    q, k, v, b, offsets = inputs([30, 20], 4)
    q = q[:1].expand(50, 4)
    check(q, k, v, b, offsets, list(TABLE))


@pytest.mark.usefixtures("interpolate_small_layers")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of infinity less infinity
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_where_the_formula_says(value):
    for where in ("q", "k", "v", "grad"):
        q, k, v, b, offsets = inputs([20, 20], 3)
        grad = torch.randn(40, device=DEVICE)
        q, k = q.clone(), k.clone()
        {"q": q[25], "k": k[25], "v": v[1], "grad": grad[25:26]}[where][0] = value
        exact = [t.double().cpu() for t in (q, k, v, b, grad)]
        x = kernels.filter_attention(q, k, v, b, offsets, list(TABLE))
        wanted = ops.filter_attention_reference(*exact[:4], offsets, ())
        scale = 1 + exact[2].nan_to_num(0, 0, 0).abs().sum(1).max()  # of the terms: their sum may cancel
        assert_close(x.double().cpu() / scale, wanted / scale, torch.float32)
        actual = kernels.filter_attention_backward(grad, q, k, v, offsets, list(TABLE))
        wanted = ops.filter_attention_backward_reference(exact[4], *exact[:3], offsets, ())
        for mine, right in zip(actual, wanted, strict=True):
            assert torch.equal(mine.isfinite().cpu(), right.isfinite())
            torch.testing.assert_close(mine.double().cpu(), right, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offsets", [[0, 0], [0, 0, 0]])
def test_empty(offsets):
    q, k = torch.empty(2, 0, 4, device=DEVICE)
    v, b = torch.randn(len(offsets) - 1, 4, device=DEVICE), torch.randn(len(offsets) - 1, device=DEVICE)
    for table in ([], list(TABLE)):
        assert kernels.filter_attention(q, k, v, b, offsets, table).shape == (0,)
        grads = kernels.filter_attention_backward(q.new_empty(0), q, k, v, offsets, table)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, b.shape]
        assert not grads[2].any()
        assert not grads[3].any()


@pytest.mark.usefixtures("interpolate_small_layers")
def test_any_strides():
    q, k, v, b, offsets = inputs([20, 12], 4, 0.2)
    apart = q.t().contiguous().t()
    grad = torch.ones((), device=DEVICE).expand(32)
    for table in ([], list(TABLE)):
        v_apart = v.t().contiguous().t()
        one = kernels.filter_attention(apart, k, v_apart, b, offsets, table)
        assert torch.equal(one, kernels.filter_attention(q, k, v, b, offsets, table))
        one = kernels.filter_attention_backward(grad, apart, k, v_apart, offsets, table)
        other = kernels.filter_attention_backward(grad.clone(), q, k, v, offsets, table)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_table_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="widest must have at most 24 entries, got 25"):
        kernels._ladder((1.0,) * 25, torch.device("cpu"))
