"""filter_attention: both forms and their gradients against float64, the bound of the error, the choice of the form."""

import functools
import itertools
import math
import os
import random

import pytest
import torch

from bench.filter_attention import mebibytes
from paamops.ops.filter_attention import (
    NODES,
    error_bound,
    filter_attention,
    filter_attention_backward_op,
    filter_attention_backward_reference,
    filter_attention_op,
    filter_attention_reference,
    form,
    nodes,
    widest,
)
from paamops.ops.registration import build_info, compiled
from tests.tolerances import assert_close

has_cpp = build_info()["kernels"]["filter_attention"]["cpu"] == "C++"
EPSILON = 2.0**-23
DIRECT = []
LINEAR = list(widest(1e-7))
IMPLEMENTATIONS = {
    "kernel": (filter_attention_op, filter_attention_backward_op),
    "reference": (filter_attention_reference, filter_attention_backward_reference),
}


def forced(count):
    """The op's `widest` that makes every layer take so many nodes; 0 for the direct form."""
    return [0.0] * NODES.index(count) + [math.inf] if count else []


def exact(q, k, v, b, offsets, grad):
    """The result and the gradients in float64, autograd's own; one layer at a time."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v, b)]
    q, k, v, b = leaves
    parts = []
    for layer, (begin, end) in enumerate(itertools.pairwise(offsets)):
        for rows in torch.arange(begin, end).split(max(1, 1_000_000 // max(1, (end - begin) * q.shape[1]))):
            terms = torch.tanh(q[rows, None] + k[None, begin:end]) * v[layer]
            parts.append(b[layer] + terms.sum(2).mean(1))
    x = torch.cat(parts) if parts else q.new_empty(0)
    (x * grad.double()).sum().backward()
    return x.detach(), [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def check(op, backward, q, k, v, b, offsets, grad, table, tolerance=0.0, rounding=8):
    """Every result within the tolerance and float32's rounding, in the scale that the sums of magnitudes give."""
    x, grads = exact(q, k, v, b, offsets, grad)
    actual = op(q, k, v, b, offsets, table)
    assert actual.dtype == q.dtype
    assert actual.shape == (q.shape[0],)
    actual_grads = backward(grad, q, k, v, offsets, table)
    for one, like in zip(actual_grads, (q, k, v, b), strict=True):
        assert (one.dtype, one.shape) == (like.dtype, like.shape)
        assert one.is_contiguous()
    for layer, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if begin == end:
            assert not actual_grads[2][layer].any()
            assert not actual_grads[3][layer].any()
            continue
        rows, weight, g = slice(begin, end), v[layer].double().abs(), grad[begin:end].double().abs()
        # q + k is rounded once, and again in the nodes; the rest are the sums' and the functions' own roundings.
        size = q[rows].abs().max().double() + k[rows].abs().max()
        error = tolerance + EPSILON * (rounding + size)
        for value, right, scale in (
            (actual[rows], x[rows], weight.sum() + EPSILON * b[layer].abs().double() / error),
            (actual_grads[0][rows], grads[0][rows], g[:, None] * weight),
            (actual_grads[1][rows], grads[1][rows], g.sum() * weight / (end - begin)),
            (actual_grads[2][layer], grads[2][layer], g.sum()),
            (actual_grads[3][layer], grads[3][layer], g.sum()),
        ):
            worst = ((value.double() - right).abs() / (error * scale + 1e-37)).max().item()
            assert worst <= 1, f"layer {layer}: {worst} times what is allowed"


def inputs(offsets, d, scale=1.0):
    filters, layers = offsets[-1], len(offsets) - 1
    q, k = torch.randn(filters, 2 * d).mul(scale).split(d, 1)  # slices of one tensor
    return q, k, torch.randn(layers, d), torch.randn(layers), offsets, torch.randn(filters)


# ---- the forms against float64 ----


@pytest.mark.parametrize("tolerance", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("width", [0.1, 1.0, 4.0, 10.0, 25.0, 50.0])
def test_widths_and_sizes(width, tolerance, seed):
    chance = random.Random(seed)
    for n in (1, 2, 7, 31, 100, 333, 1000, 2000 if width in (4, 50) else 700):
        d = 3 if n > 500 else 20
        q, k, v, b, offsets, grad = inputs([0, n], d)
        q = (torch.rand(n, d) - 0.5) * width + torch.randn(d)
        k = k * chance.choice([0.1, 1, width])
        print(n, d, width, form(n, width, tolerance))
        check(*IMPLEMENTATIONS["kernel"], q, k, v, b, offsets, grad, list(widest(tolerance)), tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("table", [DIRECT, LINEAR], ids=["direct", "linear"])
@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 32, 33])
def test_unequal_layers(d, table, implementation):
    offsets = [0, 0, 1, 3, 3, 20, 117, 360, 360, 391]  # a layer may be empty
    check(*IMPLEMENTATIONS[implementation], *inputs(offsets, d), table, 1e-7)


@pytest.mark.parametrize("repeat", range(20))
def test_random_layers(repeat, seed):
    chance = random.Random(f"{seed} {repeat}")
    sizes = [chance.choice([0, 1, 5, 16, 32, 64, 127, 128, 129, 300, 513]) for _ in range(chance.randint(1, 6))]
    offsets = list(itertools.accumulate(sizes, initial=0))
    d, scale = chance.choice([1, 4, 16, 31, 32, 48]), chance.choice([1e-20, 0.01, 0.3, 1, 3, 10])
    print(sizes, d, scale)
    check(*IMPLEMENTATIONS["kernel"], *inputs(offsets, d, scale), LINEAR, 1e-7)


@pytest.mark.parametrize("count", NODES)
def test_every_number_of_nodes(count):
    """At the widest interval that it serves, where the error is largest."""
    n = max(9, min(count * 3, 1500))
    q, k, v, b, offsets, grad = inputs([0, n], 2)
    width = LINEAR[NODES.index(count)] * 0.9999
    q = torch.rand(n, 2) * width
    q[0], q[1] = 0.0, width
    k = k - width / 2
    assert form(n, width, 1e-7) == count
    check(*IMPLEMENTATIONS["kernel"], q, k, v, b, offsets, grad, LINEAR, 1e-7)


@pytest.mark.parametrize("table", [DIRECT, LINEAR], ids=["direct", "linear"])
def test_layouts(table):
    """Columns and rows in any order, and numbers that are expanded."""
    q, k, v, b, offsets, grad = inputs([0, 100, 101, 300], 32)
    for tensors in (
        (q.t().contiguous().t(), k, v, b),
        (q[:, ::2], k[:, 1::2], v[:, ::2], b[:1].expand(3)),
        (q[:1].expand(300, 32), k[:, :1].expand(300, 32), v[0].expand(3, 32), b),
        (q.flip(0)[::1], k, v.t().contiguous().t(), torch.stack((b, b), 1)[:, 0]),
    ):
        check(*IMPLEMENTATIONS["kernel"], *tensors, offsets, grad, table, 1e-7)
        check(*IMPLEMENTATIONS["kernel"], *tensors, offsets, torch.tensor(0.7).expand(300), table, 1e-7)


@pytest.mark.parametrize("table", [DIRECT, LINEAR], ids=["direct", "linear"])
def test_far_from_zero(table):
    """Only q + k matters; it may be small though q and k are not, and it may be huge."""
    q, k, v, b, offsets, grad = inputs([0, 400], 5)
    for shift in (100.0, -3000.0):
        check(*IMPLEMENTATIONS["kernel"], q + shift, k - shift, v, b, offsets, grad, table, 1e-7)
        check(*IMPLEMENTATIONS["kernel"], q + shift, k, v, b, offsets, grad, table, 1e-7)
    check(*IMPLEMENTATIONS["kernel"], q * 1e38, k, v, b, offsets, grad, table, 1e-7)
    check(*IMPLEMENTATIONS["kernel"], q, k * 1e38, v, b, offsets, grad, table, 1e-7)


@pytest.mark.parametrize("table", [DIRECT, LINEAR], ids=["direct", "linear"])
@pytest.mark.parametrize("value", [0.0, 1.5, 1e-40])
def test_queries_or_keys_alike(value, table):
    """Equal terms round alike, so their errors do not average out."""
    q, k, v, b, offsets, grad = inputs([0, 200], 17)
    run = functools.partial(check, *IMPLEMENTATIONS["kernel"])
    run(torch.full_like(q, value), k, v, b, offsets, grad, table, 1e-7, rounding=32)
    run(q, torch.full_like(k, value), v, b, offsets, grad, table, 1e-7, rounding=32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64(implementation):
    """Always the direct sum, whatever the table."""
    for d in (1, 8, 11):
        q, k, v, b, offsets, grad = (t.double() if torch.is_tensor(t) else t for t in inputs([0, 150, 150, 260], d))
        op, backward = IMPLEMENTATIONS[implementation]
        x, grads = exact(q, k, v, b, offsets, grad)
        for table in (DIRECT, list(widest(1e-3))):
            assert_close(op(q, k, v, b, offsets, table), x, torch.float64)
            for actual, expected in zip(backward(grad, q, k, v, offsets, table), grads, strict=True):
                assert_close(actual, expected, torch.float64)


# ---- tanh and sech² themselves ----


def every_magnitude():
    """Floats of random bits, normal ones, and those at which something changes."""
    bits = torch.randint(-(2**31), 2**31, (2**17,)).to(torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, math.inf, math.nan, 1e-45, 2**-126, 2**-12, 0.17, 0.18, 9.01, 43.4, 43.5, 44, 3.4e38])
    return torch.cat((bits, torch.randn(2**16), 10 * torch.randn(2**16), edges, -edges))[:, None]


@pytest.mark.parametrize("place", [0, 1])
def test_tanh_and_its_slope_over_all_magnitudes(place):
    """Layers of one filter return tanh itself: relative errors, down to subnormal arguments."""
    s = every_magnitude()
    filters = len(s)
    pair = [torch.zeros_like(s), torch.zeros_like(s)]
    pair[place] = s
    offsets, ones = list(range(filters + 1)), torch.ones(filters, 1)
    x = filter_attention_op(*pair, ones, torch.zeros(filters), offsets, LINEAR)
    slopes = filter_attention_backward_op(torch.ones(filters), *pair, ones, offsets, LINEAR)
    tanh = s.double().tanh()[:, 0]
    torch.testing.assert_close(x.double(), tanh, rtol=2 * EPSILON, atol=0, equal_nan=True)
    torch.testing.assert_close(slopes[2][:, 0].double(), tanh, rtol=2 * EPSILON, atol=0, equal_nan=True)
    sech2 = s[:, 0].double().cosh().pow(-2)
    for slope in slopes[:2]:  # below 4 exp(-87) it is 0
        torch.testing.assert_close(slope[:, 0].double(), sech2, rtol=4 * EPSILON, atol=6.6e-38, equal_nan=True)
    assert torch.equal(slopes[0], slopes[1]) or slopes[0].isnan().any()


# ---- the bound, and the choice ----


def interpolated(values, at, points, least, greatest):
    """By the barycentric formula in float64: values at Chebyshev's nodes `at`, of [least, greatest], to `points`."""
    m = torch.arange(len(at), dtype=torch.float64)
    weights = (-1) ** m * torch.sin(math.pi * (2 * m + 1) / (2 * len(at)))
    ratio = weights / (points[:, None] - at)
    return ratio @ values / ratio.sum(1)


def chebyshev_nodes(count, least, greatest):
    m = torch.arange(count, dtype=torch.float64)
    return (least + greatest) / 2 + (greatest - least) / 2 * torch.cos(math.pi * (2 * m + 1) / (2 * count))


@pytest.mark.parametrize("function", [torch.tanh, lambda t: torch.cosh(t) ** -2], ids=["tanh", "sech2"])
def test_the_bound_holds_and_is_no_wild_guess(function):
    """Over widths, numbers of nodes and shifts: the error is below the bound, and not by orders of magnitude."""
    tightest = 0
    for width in (0.3, 1.0, 3.0, 8.0, 20.0):
        for count in (4, 8, 16, 24, 48):
            worst = 0
            for shift in [*torch.linspace(0, width, 9).tolist(), 0.13 * width]:
                least, greatest = -width / 2 + shift, width / 2 + shift
                at = chebyshev_nodes(count, least, greatest)
                points = torch.rand(500, dtype=torch.float64) * width + least
                errors = interpolated(function(at), at, points, least, greatest) - function(points)
                worst = max(worst, errors.abs().max().item())
            bound = error_bound(count, width)
            assert worst <= bound + 1e-13
            if bound > 1e-10:
                tightest = max(tightest, worst / bound)
    assert tightest > 0.02


def test_tables():
    for tolerance in (1e-12, 1e-7, 1e-3, 0.5):
        table = widest(tolerance)
        assert len(table) == len(NODES)
        assert list(table) == sorted(table)
        for count, width in zip(NODES, table, strict=True):
            assert error_bound(count, width) <= tolerance
            assert error_bound(count, width * 1.001) > tolerance
            assert nodes(width, tolerance) == count
        assert nodes(table[-1] * 1.001, tolerance) is None
        assert nodes(0.0, tolerance) == NODES[0]
    assert widest(0) == ()
    for width in (math.inf, math.nan, -1.0):
        assert nodes(width, 1e-7) is None
        assert form(10**6, width, 1e-7) == 0
    assert form(16, 8.0, 1e-7) == 0
    assert form(1000, 8.0, 1e-7) == nodes(8.0, 1e-7) > 0
    assert form(1000, 8.0, 0.0) == 0
    assert error_bound(8, 0.0) == 0
    assert error_bound(8, math.inf) == math.inf


@pytest.mark.skipif(not has_cpp, reason="the reference always sums directly")
@pytest.mark.parametrize("tolerance", [1e-7, 1e-2])
def test_the_kernel_makes_the_choice_of_form(tolerance, seed):
    """Its bits are those of the form that `form` names, and not those of its neighbours."""
    chance, table = random.Random(seed), list(widest(tolerance))
    told_apart = 0
    for _ in range(60):
        n = chance.choice([10, 20, 40, 41, 63, 64, 65, 100, 150, 300])
        q, k, v, b, offsets, grad = inputs([0, n], 3, chance.choice([0.1, 0.5, 1, 2, 5]))
        if chance.random() < 0.5:  # a width that is exactly in the table, or just not
            width = torch.tensor(chance.choice(table)).item()
            q = torch.rand(n, 3)
            q[0], q[1] = 0.0, width
            q.clamp_(0, width)
        count = form(n, (q.amax(0) - q.amin(0)).max().item(), tolerance)
        mine = filter_attention_op(q, k, v, b, offsets, table)
        mine_backward = filter_attention_backward_op(grad, q, k, v, offsets, table)
        assert torch.equal(mine, filter_attention_op(q, k, v, b, offsets, forced(count)))
        for one, other in zip(
            mine_backward, filter_attention_backward_op(grad, q, k, v, offsets, forced(count)), strict=True
        ):
            assert torch.equal(one, other)
        neighbour = NODES[max(0, NODES.index(count) - 1)] if count > 8 else 16 if count else 8
        told_apart += not torch.equal(mine, filter_attention_op(q, k, v, b, offsets, forced(neighbour)))
    assert told_apart > 40


@pytest.mark.skipif(not has_cpp, reason="the reference always sums directly")
@pytest.mark.parametrize("count", NODES)
def test_the_kernel_has_the_same_numbers_of_nodes(count):
    """Forced upon an interval that is too wide for it, interpolation errs, and just as the same one in float64 does."""
    n, width = count * 2, widest(0.3)[NODES.index(count)] * 1.5
    q = torch.rand(n, 1) * width
    k = (torch.randn(1, 1) * 0.01 - width / 2).expand(n, 1)
    x = filter_attention_op(q, k, torch.ones(1, 1), torch.zeros(1), [0, n], forced(count))
    least, greatest = q.min().item(), q.max().item()
    at = chebyshev_nodes(count, least, greatest)
    same = interpolated(torch.tanh(at + k[0].double()), at, q[:, 0].double() + 1e-12, least, greatest)
    allowed = EPSILON * (8 + width)
    assert (same - torch.tanh(q + k).double()[:, 0]).abs().max() > 8 * allowed
    assert (x - same).abs().max() < allowed


# ---- NaN, infinities, bits ----


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("table", [DIRECT, LINEAR], ids=["direct", "linear"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "b", "grad", "q and k"])
def test_special_values_propagate_as_the_formula_says(place, value, table, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    names = ("q", "k", "v", "b", "offsets", "grad")
    given = dict(zip(names, inputs([0, 20, 220, 240], 19), strict=True))
    for name in place.split(" and "):
        given[name] = given[name].clone()
        given[name][1 if name in "vb" else 77] = value if name == "q" or place != "q and k" else -value
    q, k, v, b, offsets, grad = given.values()
    x, grads = exact(q, k, v, b, offsets, grad)
    results = [op(q, k, v, b, offsets, table), *backward(grad, q, k, v, offsets, table)]
    for name, actual, expected in zip(("x", *names[:4]), results, (x, *grads), strict=True):
        print(name)
        if place in ("v", "grad") and math.isinf(value):  # which infinity or NaN depends on where it is multiplied
            expected = torch.where(expected.isfinite(), expected, math.nan)
            actual = torch.where(actual.isfinite(), actual, math.nan)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.skipif(not has_cpp, reason="PyTorch's own kernels cut their work by the number of threads")
@pytest.mark.parametrize("sizes", [[3000], [16, 700, 64, 0, 1200, 33]])
@pytest.mark.parametrize("table", [DIRECT, LINEAR], ids=["direct", "linear"])
def test_same_bits_in_every_run_and_for_every_number_of_threads(sizes, table):
    q, k, v, b, offsets, grad = inputs(list(itertools.accumulate(sizes, initial=0)), 16 if table else 3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2, 3, 5):
            torch.set_num_threads(count)
            x = filter_attention_op(q, k, v, b, offsets, table)
            results.append((x, *filter_attention_backward_op(grad, q, k, v, offsets, table)))
        for result in results[1:]:
            for one, other in zip(results[0], result, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("set_", range(2, compiled.build_facts()["instruction_set"] + 1) if compiled else ())
def test_instruction_sets(set_):
    """What lesser machines run."""
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(set_)
    try:
        for table, d in itertools.product((DIRECT, LINEAR), (5, 32)):
            check(*IMPLEMENTATIONS["kernel"], *inputs([0, 16, 17, 400], d), table, 1e-7)
        test_tanh_and_its_slope_over_all_magnitudes(0)
        test_float64("kernel")
    finally:
        compiled.use_instruction_set(best)


@pytest.mark.skipif(not has_cpp, reason="the reference takes minutes")
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to forget the peak so far")
def test_memory_grows_with_the_filters_only():
    """16,384 filters, whose terms would take 32 GiB, in less than 64 MiB, of which the results are 4."""
    assert 4 <= mebibytes(16384) < 64


# ---- the public function ----


def test_lists_and_offsets_are_the_same():
    q, k, v, b, offsets, _ = inputs([0, 16, 16, 300], 32)
    lists = ([t[one:other] for one, other in itertools.pairwise(offsets)] for t in (q, k))
    assert torch.equal(filter_attention(*lists, v, b), filter_attention(q, k, v, b, offsets=offsets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    """Halves are computed as floats, and their gradients come back as halves."""
    q, k, v, b, offsets, grad = inputs([0, 100, 200], 8)
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v, b)]
    x = filter_attention(*leaves, offsets=offsets)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert x.dtype == wide
    expected, grads = exact(*leaves, offsets, grad)
    scale = 1 + v.abs().sum(1).max()  # of the terms: their sum may cancel
    assert_close(x.detach() / scale, expected / scale, wide)
    for actual, right in zip(torch.autograd.grad(x, leaves, grad.to(wide)), grads, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), right, rtol=0.02, atol=1e-3)


def test_tolerance_is_kept_and_spares_time():
    q, k, v, b, offsets, grad = inputs([0, 600], 8)
    k = torch.zeros_like(k)  # the mean over keys that lie apart would be too smooth to tell
    x, _ = exact(q, k, v, b, offsets, grad)
    errors = [
        (filter_attention(q, k, v, b, tolerance, offsets) - x).abs().max().item() / v.abs().sum().item()
        for tolerance in (0, 1e-7, 0.5)
    ]
    assert errors[0] < 32 * EPSILON
    assert errors[1] < 32 * EPSILON  # equal terms round alike, as above
    assert errors[2] < 0.5
    if has_cpp:
        q, k, v, b, offsets, grad = inputs([0, 600], 1)  # in one dimension no term hides the error of another
        x, _ = exact(q, torch.zeros_like(k), v, b, offsets, grad)
        error = (filter_attention(q, torch.zeros_like(k), v, b, 0.5, offsets) - x).abs().max().item()
        assert 1e-5 * v.abs().item() < error < 0.5 * v.abs().item()  # fewer nodes: it has taken the liberty


def test_no_filters_and_no_layers():
    x = filter_attention(torch.empty(0, 4), torch.empty(0, 4), torch.ones(1, 4), torch.ones(1), offsets=[0, 0])
    assert x.shape == (0,)
    q = torch.empty(0, 4, requires_grad=True)
    v = torch.ones(2, 4, requires_grad=True)
    filter_attention([q, q], [q, q], v, torch.ones(2)).sum().backward()
    assert not v.grad.any()


def one(**changes):
    q, k, v, b, offsets, _ = inputs([0, 2, 5], 4)
    return {"queries": q, "keys": k, "v": v, "b": b, "offsets": offsets, **changes}


def lists(**changes):
    q, k, v, b, _, _ = inputs([0, 2, 5], 4)
    return {"queries": [q[:2], q[2:]], "keys": [k[:2], k[2:]], "v": v, "b": b, **changes}


E = torch.empty


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (TypeError, r"queries is a Tensor; it must be a list of tensors, or pass offsets", lambda: one(offsets=None)),
        (TypeError, r"keys\[1\] is a float; it must be a tensor", lambda: lists(keys=[E(2, 4), 1.0])),
        (ValueError, r"queries has 2 layers and keys 1; they must", lambda: lists(keys=[E(2, 4)])),
        (ValueError, r"queries\[0\] has shape \(4,\); it must have two", lambda: lists(queries=[E(4), E(3, 4)])),
        (ValueError, r"queries\[1\] has shape \(3, 4\) and keys\[1\] \(2, 4\)", lambda: lists(keys=[E(2, 4), E(2, 4)])),
        (
            ValueError,
            r"queries\[1\] has width 5; it must be that of queries\[0\], 4",
            lambda: lists(queries=[E(2, 4), E(3, 5)], keys=[E(2, 4), E(3, 5)]),
        ),
        (ValueError, r"queries is empty; it must have at least one layer", lambda: lists(queries=[], keys=[])),
        (TypeError, r"keys\[0\] has dtype torch\.float64; it must be", lambda: lists(keys=[E(2, 4).double(), E(3, 4)])),
        (TypeError, r"queries has dtype torch\.int64; it must be float16", lambda: one(queries=E(5, 4).long())),
        (TypeError, r"v has dtype torch\.float64; it must be that of queries", lambda: one(v=E(2, 4).double())),
        (TypeError, r"b is a list; it must be a tensor", lambda: one(b=[1.0, 2.0])),
        (ValueError, r"keys is on meta; it must be on the device of queries", lambda: one(keys=E(5, 4, device="meta"))),
        (ValueError, r"queries has shape \(5, 0\); it must be \(F, d\)", lambda: one(queries=E(5, 0))),
        (ValueError, r"keys has shape \(4, 4\); it must be that of queries, \(5, 4\)", lambda: one(keys=E(4, 4))),
        (ValueError, r"v has shape \(4,\); it must be \(2, 4\)", lambda: one(v=E(4))),
        (ValueError, r"b has shape \(3,\); it must be \(2,\)", lambda: one(b=E(3))),
        (TypeError, r"offsets is \[0, 2\.0, 5\]; it must be a list of integers", lambda: one(offsets=[0, 2.0, 5])),
        (ValueError, r"offsets is \[0, 3, 2, 5\]; it must rise from 0 to the 5", lambda: one(offsets=[0, 3, 2, 5])),
        (ValueError, r"offsets is \[0, 2, 4\]; it must rise from 0 to the 5", lambda: one(offsets=[0, 2, 4])),
        (ValueError, r"offsets is \[1, 2, 5\]; it must rise from 0", lambda: one(offsets=[1, 2, 5])),
        (ValueError, r"offsets is \[5\]; it must rise from 0", lambda: one(offsets=[5])),
        (TypeError, r"tolerance is a str; it must be a number", lambda: one(tolerance="1e-7")),
        (TypeError, r"tolerance is a bool; it must be a number", lambda: one(tolerance=True)),
        (ValueError, r"tolerance is -1; it must be at least 0 and below 1", lambda: one(tolerance=-1)),
        (ValueError, r"tolerance is 1\.0; it must be at least 0 and below 1", lambda: one(tolerance=1.0)),
        (ValueError, r"tolerance is nan; it must be at least 0", lambda: one(tolerance=math.nan)),
    ],
)
def test_bad_arguments(error, words, make):
    with pytest.raises(error, match=words):
        filter_attention(**make())


@pytest.mark.skipif(not has_cpp, reason="the checks are the kernel's own")
def test_the_kernel_checks_what_would_make_it_read_elsewhere():
    q, k, v, b, offsets, grad = inputs([0, 2, 5], 4)
    for arguments in (
        (q, k, v, b, [0, 2, 6], []),
        (q, k, v, b, [0, 7, 5], []),
        (q, k, v, b, [], []),
        (q, k[:4], v, b, offsets, []),
        (q, k, v[:1], b, offsets, []),
        (q, k, v, b[:1], offsets, []),
        (q, k.double(), v, b, offsets, []),
        (q, k, v, b, offsets, [1.0] * 25),
    ):
        with pytest.raises(RuntimeError, match="must"):
            filter_attention_op(*arguments)
    with pytest.raises(RuntimeError, match="grad must have 5 elements"):
        filter_attention_backward_op(grad[:4], q, k, v, offsets, [])


# ---- PyTorch's own checks ----


@pytest.mark.parametrize("table", [DIRECT, LINEAR], ids=["direct", "linear"])
@pytest.mark.parametrize("d", [3, 16])
def test_opcheck(d, table):
    q, k, v, b, offsets, grad = inputs([0, 4, 4, 120], d)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, b)]
    torch.library.opcheck(filter_attention_op, (*leaves, offsets, table))
    torch.library.opcheck(filter_attention_op, (q, k, v, b, offsets, table))
    torch.library.opcheck(filter_attention_backward_op, (grad, q, k, v, offsets, table))


def test_gradcheck():
    q, k, v, b, offsets, _ = inputs([0, 1, 6, 6, 40], 3)
    leaves = [t.double().requires_grad_() for t in (q, k, v, b)]
    torch.autograd.gradcheck(lambda *tensors: filter_attention(*tensors, offsets=offsets), leaves)


def test_a_second_gradient_is_refused():
    q, k, v, b, offsets, _ = inputs([0, 5], 3)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(filter_attention(q, k, v, b, offsets=offsets).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_under_torch_compile():
    """One graph, with the default's table a constant in it."""
    q, k, v, b, offsets, _ = inputs([0, 30, 200], 5)
    q.requires_grad_()
    function = torch.compile(
        lambda q: filter_attention(q, k, v, b, offsets=offsets), fullgraph=True, backend="aot_eager"
    )
    x = function(q)
    assert torch.equal(x, filter_attention(q, k, v, b, offsets=offsets))
    (grad,) = torch.autograd.grad(x.sum(), q)
    assert torch.equal(grad, torch.autograd.grad(filter_attention(q, k, v, b, offsets=offsets).sum(), q)[0])
