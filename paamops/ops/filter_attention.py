"""PAAM's pooled additive attention between the filters of each layer: one number per filter, all layers in one call.

    x_i = b_l + (1/n_l) Σ_j Σ_c v_lc tanh(q_ic + k_jc)        i, j the n_l filters of layer l, c one of d dimensions

Two forms compute it. *Direct*: the n² d terms, fused; nothing of the size (n, n, d) is ever in memory. *Linear*: for
each dimension c the mean g(t) = (1/n) Σ_j tanh(t + k_jc) is a smooth function of one variable. It is evaluated at M
Chebyshev nodes t_m of the interval that the q_ic span and interpolated from there: n d M terms instead of n² d. The
gradients are had by the same means, with w_m = Σ_i ∂x_i L_m(q_ic), where L_m is the m-th polynomial of interpolation:

    ∂q_ic = ∂x_i v_c g'(q_ic)        ∂k_jc = (v_c / n) Σ_m w_m sech²(t_m + k_jc)        ∂v_c = Σ_m w_m g(t_m)

The error of the linear form. f(t) = tanh(t + k) is analytic in the strip |Im t| < π/2, whatever the real k, and
    |tanh(u + iy)|² = (sinh² u + sin² y) / (sinh² u + cos² y) ≤ max(1, tan² y)
    |sech²(u + iy)| = 1 / (sinh² u + cos² y) ≤ 1 / cos² y.
An interval of half-width h is [-1, 1] stretched by h. The ellipse with foci ±1 and semi-axes (ρ ± 1/ρ) / 2 stays within
|Im t| ≤ y < π/2 when (ρ - 1/ρ) / 2 = y / h, so ρ = y/h + √((y/h)² + 1). A function bounded by B there has Chebyshev
coefficients |a_k| ≤ 2 B ρ^-k. At the M roots of T_M each T_k with k ≥ M takes the values of ± a lower one or of zero:
the interpolant through the roots errs by at most 2 Σ_{k≥M} |a_k|:
    |error| ≤ 4 B ρ^-(M-1) / (ρ - 1)        for every y in (0, π/2), hence the minimum over y.
(Trefethen, Approximation Theory and Approximation Practice, theorems 8.1 and 8.2.) B = 1/cos² y serves tanh too, since
max(1, tan y) ≤ 1/cos² y: one number of nodes serves the result and its gradients. A mean of such functions has the same
bound, so x_i errs by at most tolerance · Σ_c |v_c| beyond rounding, ∂q_ic by tolerance · |∂x_i v_c|, ∂k_jc by
tolerance · |v_c| / n · Σ_i |∂x_i| and ∂v_c by tolerance · Σ_i |∂x_i|.
"""

import bisect
import itertools
import math
import numbers

import torch

from paamops.ops.registration import define

NODES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
LINEAR_COST = 0.625  # measured: the linear form pays off where M · LINEAR_COST < n; kernels hold the same number
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ANGLES = tuple(math.pi / 2 * step / 64 for step in range(1, 64))  # y, at which the bound is taken
CHUNK = 2**18  # elements that the reference handles at a time

_tables = {}  # tolerance -> widest(tolerance)


def filter_attention(queries, keys, v, b, tolerance=1e-7, offsets=None):
    """x_i = b_l + (1/n_l) Σ_j Σ_c v_lc tanh(q_ic + k_jc): (F,), the filters of all layers in a row.

    queries, keys: lists of L tensors (n_l, d), the n_l unequal; or with `offsets`, L + 1 integers that rise from 0 to
    F, tensors (F, d) whose rows offsets[l] to offsets[l + 1] are layer l. The two may be slices of one tensor: they are
    not copied as long as the columns lie next to each other. v: (L, d), b: (L,). A layer may be empty.
    float16 to float64, all of one dtype and on one device; the result is float32 (float64 for float64 inputs).
    tolerance: what interpolation may add to the error of each tanh, see the head of this file; 0 sums directly.
    float64 inputs are always summed directly.
    NaN and infinities propagate as the formula says. Differentiable once, with respect to queries, keys, v and b.
    TypeError: an argument is no tensor, not floating, or of another dtype than the others; tolerance is no number,
    offsets no integers. ValueError: shapes or devices that do not fit together, offsets that do not rise from 0 to F,
    a tolerance outside 0 ≤ tolerance < 1.
    Source: PAAM (Babaiee et al. 2022, arXiv 2210.11114). The paper gives additive attention without softmax and no
    formula: Bahdanau's form with the mean in place of the softmax is our choice, as is its evaluation in linear time.
    """
    table = widest(_checked_tolerance(tolerance))
    if offsets is None:
        queries, keys, offsets = _joined(queries, keys)
    _check(queries, keys, v, b, offsets)
    if queries.dtype == torch.float64:
        table = ()
    if queries.dtype in (torch.float16, torch.bfloat16):
        queries, keys, v, b = (t.float() for t in (queries, keys, v, b))
    return filter_attention_op(queries, keys, v, b, list(offsets), list(table))


def error_bound(nodes, width):
    """What interpolation at so many nodes of an interval of this width adds at most to tanh and to sech²."""
    if not 0 < width < math.inf:
        return 0.0 if width == 0 else math.inf
    half = width / 2

    def logarithm(y):
        rho_minus_1 = y / half + (math.hypot(y, half) - half) / half
        return math.log(4 / rho_minus_1) - 2 * math.log(math.cos(y)) - (nodes - 1) * math.log1p(rho_minus_1)

    return math.exp(min(700.0, *map(logarithm, ANGLES)))


def widest(tolerance):
    """The widest interval that each entry of NODES serves within the tolerance: a tuple that rises; () for 0.

    It is the op's `widest`: kernels look the number of nodes up in it. An empty one makes them sum directly; infinities
    in front of it force the first, which is for tests.
    """
    if tolerance not in _tables:  # not an lru_cache, which torch.compile traces anew at each call
        _tables[tolerance] = tuple(_widest(nodes, tolerance) for nodes in NODES) if tolerance > 0 else ()
    return _tables[tolerance]


def _widest(nodes, tolerance):
    """The widest interval whose `error_bound` is the tolerance, up to 1e-9 on the safe side.

    For every y the bound is the tolerance where u = log ρ solves (M - 1) u + log(exp(u) - 1) = log(4 B / tolerance).
    The left side is concave and rises, so Newton's steps from the left never pass the solution. Then h = y / sinh(u).
    """

    def half(y):
        right = math.log(4 / tolerance) - 2 * math.log(math.cos(y))
        u = 1e-4
        for _ in range(12):
            rho_minus_1 = math.expm1(u)
            u += (right - (nodes - 1) * u - math.log(rho_minus_1)) / (nodes + 1 / rho_minus_1)
        return y / math.sinh(u)

    return 2 * max(map(half, ANGLES)) * (1 - 1e-9)


def nodes(width, tolerance):
    """The smallest entry of NODES whose `error_bound` at this width is within the tolerance; None where none is."""
    table = widest(tolerance)
    entry = bisect.bisect_left(table, width) if 0 <= width < math.inf else len(table)
    return NODES[entry] if entry < len(table) else None


def form(n, width, tolerance):
    """The number of nodes with which a layer of n filters is interpolated, or 0 where it is summed directly.

    width: the widest span of q over the layer's dimensions. Both forms cost in proportion to d, so d does not matter.
    """
    count = nodes(width, tolerance)
    return count if count is not None and count * LINEAR_COST < n else 0


def filter_attention_reference(q, k, v, b, offsets, widest):
    """(F,) in the dtype of q: the direct form, a few rows at a time."""
    del widest  # a mean over all filters needs no table
    x = q.new_empty(q.shape[0])
    for layer, rows in _chunks(offsets, q.shape[1]):
        others = slice(offsets[layer], offsets[layer + 1])
        x[rows] = (q[rows, None] + k[None, others]).tanh_().mean(1) @ v[layer] + b[layer]
    return x


def filter_attention_backward_reference(grad, q, k, v, offsets, widest):
    """∂q, ∂k (F, d), ∂v (L, d), ∂b (L,): the direct form, a few rows at a time.

    sech² s = 4e / (1 + e)² with e = exp(-2|s|) keeps its precision where 1 - tanh² s cancels.
    """
    del widest
    grad_q, grad_k = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    grad_v = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    grad_b = grad_v.new_zeros(v.shape[0])
    for layer, rows in _chunks(offsets, q.shape[1]):
        others = slice(offsets[layer], offsets[layer + 1])
        count = offsets[layer + 1] - offsets[layer]
        s = q[rows, None] + k[None, others]
        grad_v[layer] += grad[rows] @ s.tanh().mean(1)
        grad_b[layer] += grad[rows].sum()
        e = s.abs_().mul_(-2).exp_()
        slope = (4 * e).div_(e.add_(1).square_())
        grad_q[rows] = slope.mean(1) * grad[rows, None] * v[layer]
        grad_k[others] += torch.einsum("i,ijc->jc", grad[rows], slope) * (v[layer] / count)
    return grad_q, grad_k, grad_v, grad_b


def _chunks(offsets, d):
    """Layer and rows, so few that the terms of the rows with all filters of the layer fit in CHUNK or in n · d."""
    for layer in range(len(offsets) - 1):
        begin, end = offsets[layer], offsets[layer + 1]
        step = max(1, CHUNK // max(1, (end - begin) * d))
        for row in range(begin, end, step):
            yield layer, slice(row, min(row + step, end))


def _checked_tolerance(tolerance):
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
        raise TypeError(f"tolerance is a {type(tolerance).__name__}; it must be a number")
    if not 0 <= tolerance < 1:  # also refuses NaN
        raise ValueError(f"tolerance is {tolerance}; it must be at least 0 and below 1")
    return float(tolerance)


def _joined(queries, keys):
    """Two flat tensors and the offsets from two lists."""
    for name, tensors in (("queries", queries), ("keys", keys)):
        if isinstance(tensors, torch.Tensor) or not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} is a {type(tensors).__name__}; it must be a list of tensors, or pass offsets")
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name}[{index}] is a {type(tensor).__name__}; it must be a tensor")
            if tensor.ndim != 2:
                raise ValueError(f"{name}[{index}] has shape {tuple(tensor.shape)}; it must have two, (n, d)")
    if len(queries) != len(keys):
        raise ValueError(f"queries has {len(queries)} layers and keys {len(keys)}; they must have as many")
    if not queries:
        raise ValueError("queries is empty; it must have at least one layer")
    first = queries[0]
    offsets = [0]
    for index, (q, k) in enumerate(zip(queries, keys, strict=True)):
        if q.shape != k.shape:
            raise ValueError(
                f"queries[{index}] has shape {tuple(q.shape)} and keys[{index}] {tuple(k.shape)}; they must be equal"
            )
        if q.shape[1] != first.shape[1]:
            raise ValueError(
                f"queries[{index}] has width {q.shape[1]}; it must be that of queries[0], {first.shape[1]}"
            )
        for name, tensor in (("queries", q), ("keys", k)):
            _check_kind(f"{name}[{index}]", tensor, "queries[0]", first)
        offsets.append(offsets[-1] + q.shape[0])
    return torch.cat(tuple(queries)), torch.cat(tuple(keys)), offsets


def _check_kind(name, tensor, other_name, other):
    """A floating tensor of the dtype and on the device of the other."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be float16, bfloat16, float32 or float64")
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be that of {other_name}, {other.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on the device of {other_name}, {other.device}")


def _check(q, k, v, b, offsets):
    """Raise the error that names the argument, what it was and what it must be."""
    for name, tensor in (("queries", q), ("keys", k), ("v", v), ("b", b)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        _check_kind(name, tensor, "queries", q)
    if q.ndim != 2 or q.shape[1] == 0:
        raise ValueError(f"queries has shape {tuple(q.shape)}; it must be (F, d) with d at least 1")
    if k.shape != q.shape:
        raise ValueError(f"keys has shape {tuple(k.shape)}; it must be that of queries, {tuple(q.shape)}")
    if not isinstance(offsets, (list, tuple)) or any(not isinstance(o, int) or isinstance(o, bool) for o in offsets):
        raise TypeError(f"offsets is {offsets!r}; it must be a list of integers")
    rising = all(one <= other for one, other in itertools.pairwise(offsets))
    if len(offsets) < 2 or not rising or offsets[0] != 0 or offsets[-1] != q.shape[0]:
        raise ValueError(f"offsets is {offsets!r}; it must rise from 0 to the {q.shape[0]} rows of queries")
    layers = len(offsets) - 1
    if v.shape != (layers, q.shape[1]):
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be {(layers, q.shape[1])}, layers and dimensions")
    if b.shape != (layers,):
        raise ValueError(f"b has shape {tuple(b.shape)}; it must be {(layers,)}, one for each layer")


def _fake_backward(grad, q, k, v, offsets, widest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), v.new_empty(v.shape[0])


def _save(ctx, inputs, output):
    q, k, v, _, ctx.offsets, ctx.widest = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx, grad):
    return *filter_attention_backward_op(grad, *ctx.saved_tensors, ctx.offsets, ctx.widest), None, None


filter_attention_backward_op = define(
    "filter_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int[] offsets, float[] widest)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_b)",
    reference=filter_attention_backward_reference,
    fake=_fake_backward,
)

filter_attention_op = define(
    "filter_attention(Tensor q, Tensor k, Tensor v, Tensor b, int[] offsets, float[] widest) -> Tensor",
    reference=filter_attention_reference,
    fake=lambda q, k, v, b, offsets, widest: q.new_empty(q.shape[0]),
    setup_context=_save,
    backward=_backward,
)

widest(1e-7)  # the default's table is made here, so that torch.compile finds it
