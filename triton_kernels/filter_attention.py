"""PAAM's pooled additive attention on a GPU: all layers in a fixed number of launches, no host sync, no float atomics.

    x_i = b_l + (1/n_l) Σ_j Σ_c v_lc tanh(q_ic + k_jc)

paamops/ops/filter_attention.py gives the formulas of both forms and the bound of the error. Every kernel is a sweep: a
program takes TARGETS filters (or nodes), walks over sources (filters or nodes) SOURCES at a time, and keeps one sum per
target, source lane and dimension, which it combines at the end. So the order of every sum is fixed by the shapes.

What limits it is the special function units: 16 a clock and multiprocessor, beside 128 multiplications. A pair costs
two of them (an exponential and a reciprocal; the backward has tanh and sech² from the same two) and a dozen
multiplications, which hide behind them; an interpolated pair costs one, its reciprocal. Pairs per layer:
    direct    n² d forward; backward 2 n² d (once by rows of q, once by rows of k: no partial sums of the size of ∂k)
    linear    n M d and n M d of one unit forward; backward 2 n M d and 3 n M d of one unit
Interpolation is by the barycentric formula rather than Clenshaw's: the one unit spares a launch that would make
coefficients, and it is transposed by exchanging targets and sources.
Launches: forward 1 and backward 2 where every layer is direct by its size; else 4 and 5, whatever the layers.
Memory: what is returned, plus forward n d / PART · M and backward three times that and n d: M ≤ 1024, so O(Σ n d).

A layer is interpolated if it has more than SMALL filters and M · LINEAR_COST < n. Smaller ones are summed directly, in
a launch or two: below some hundred filters n² d pairs take less time than the launches that interpolation adds.
"""

import functools
import itertools
import math

import torch
import triton
import triton.language as tl

from .device import on, registers

# The same as in paamops.ops.filter_attention; a test compares them.
NODES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
LINEAR_COST = 0.625
SMALL = 256  # filters that are always summed directly; by reasoning, see above
ENTRIES = 32  # of the table of widths, padded
NONE = 2**30  # nodes of an entry that is not there
TARGETS = 8  # divides every number of nodes
PART = 256  # sources whose sums a node's program keeps to itself
SLOTS = 16  # programs that share the nodes of one part of a layer
RANGE_ROWS = 1024
NUM_WARPS = 4


def filter_attention(q, k, v, b, offsets, widest):
    """x: (F,) in the dtype of q, float32 or float64; float64 is always summed directly."""
    count, d = q.shape
    x = q.new_empty(count)
    if count == 0:
        return x
    q, k, v, b = _adjacent(q), _adjacent(k), v.contiguous(), b.contiguous()
    plan = _plan(tuple(offsets), _interpolates(q, widest), q.device)
    rows, blocks = (q, k, q.stride(0), k.stride(0), plan.layers, d), _blocks(d, q.dtype)
    with on(q):
        if not plan.node_rows:
            _sweep[(plan.row_tasks,)](*rows, v, b, x, x, *_nowhere(x), plan.tasks, LINEAR=False, **blocks)
            return x
        geometry = _geometry(q, None, plan, widest, blocks)
        part_means, means = q.new_empty((plan.part_rows, d)), q.new_empty((plan.node_rows, d))
        _sweep[(len(plan.tasks),)](*rows, v, b, x, part_means, *geometry, plan.tasks, LINEAR=True, **blocks)
        _combine_parts[(len(plan.node_tasks),)](
            part_means, means, plan.part_rows, plan.node_rows, *rows[4:], *geometry, plan.node_tasks, Q=1, **blocks
        )
        _interpolate[(plan.row_tasks,)](*rows, v, b, x, means, *geometry, plan.tasks, **blocks)
    return x


def filter_attention_backward(grad, q, k, v, offsets, widest):
    """∂q, ∂k: (F, d), ∂v: (L, d), ∂b: (L,)."""
    count, d = q.shape
    grad_q, grad_k = q.new_empty((count, d)), q.new_empty((count, d))
    grad_v, grad_b = q.new_empty(v.shape), q.new_empty(v.shape[0])
    if v.shape[0] == 0:
        return grad_q, grad_k, grad_v, grad_b
    grad, q, k, v = grad.contiguous(), _adjacent(q), _adjacent(k), v.contiguous()
    plan = _plan(tuple(offsets), _interpolates(q, widest), q.device)
    rows, blocks = (q, k, q.stride(0), k.stride(0), plan.layers, d), _blocks(d, q.dtype)
    part_v = q.new_empty((max(1, plan.row_tasks), d))
    linear = plan.node_rows > 0
    with on(q):
        geometry = _geometry(q, grad, plan, widest, blocks) if linear else _nowhere(q)
        # Sums of the parts, and over the parts: of the weights, of tanh and of sech², in this order.
        parts = q.new_empty((3, plan.part_rows, d)) if linear else grad_q
        nodes = q.new_empty((3, plan.node_rows, d)) if linear else grad_q
        share = q.new_empty((count, d)) if linear else grad_q
        grads = (grad, v, grad_q, grad_k)
        tasks = len(plan.tasks) if linear else plan.row_tasks
        if tasks:
            _sweep_backward[(tasks,)](
                *rows, *grads, part_v, share, parts, plan.part_rows, *geometry, plan.tasks, LINEAR=linear, **blocks
            )
        if linear:
            _weights[(tasks - plan.row_tasks,)](*rows, share, parts, *geometry, plan.tasks[plan.row_tasks :], **blocks)
            _combine_parts[(len(plan.node_tasks),)](
                parts, nodes, plan.part_rows, plan.node_rows, *rows[4:], *geometry, plan.node_tasks, Q=3, **blocks
            )
        layers = v.shape[0]
        _finish[(layers + linear * plan.row_tasks,)](
            *rows,
            *grads,
            grad_v,
            grad_b,
            part_v,
            nodes,
            plan.node_rows,
            layers,
            *geometry,
            plan.tasks,
            LINEAR=linear,
            **blocks,
        )
    return grad_q, grad_k, grad_v, grad_b


def _adjacent(rows):
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _interpolates(q, widest):
    return len(widest) > 0 and q.dtype == torch.float32


def _blocks(d, dtype):
    """The tile: (TARGETS, SOURCES, DIMS), 8 elements a thread, fewer of float64: more would spill registers."""
    dims = min(32, triton.next_power_of_2(d))
    sources = (4 if dtype == torch.float32 else 1) * min(2, 32 // dims)
    return {"TARGETS": TARGETS, "SOURCES": sources, "DIMS": dims, "num_warps": NUM_WARPS} | registers(_sweep)


class _Plan:
    """What follows from the shapes alone, as tables on the device, and how many programs and rows it takes.

    layers (L, 8) int64: first filter; filters; most nodes (0: always direct); first row of its nodes; of the sums of
    its parts; first row task; first part of its ranges; and how many.
    tasks (·, 3) int32: layer, first filter, and -1 (row_tasks of these: TARGETS filters) or the first block of nodes.
    """

    def __init__(self, offsets, linear, device):
        layers, tasks, node_tasks, range_tasks, of_nodes = [], [], [], [], []
        self.node_rows = self.part_rows = 0
        for layer, (begin, end) in enumerate(itertools.pairwise(offsets)):
            n = end - begin
            most = max((m for m in NODES if m * LINEAR_COST < n), default=0) if linear and n > SMALL else 0
            parts = triton.cdiv(n, RANGE_ROWS) if most else 0
            layers.append((begin, n, most, self.node_rows, self.part_rows, len(tasks), len(range_tasks), parts))
            tasks += [(layer, row, -1) for row in range(0, n, TARGETS)]
            if most:
                slots = range(min(SLOTS, most // TARGETS))
                of_nodes += [(layer, row, slot) for row in range(0, n, PART) for slot in slots]
                node_tasks += [(layer, 0, slot) for slot in slots]
                range_tasks += [(layer, row, 0) for row in range(0, n, RANGE_ROWS)]
                self.node_rows += most
                self.part_rows += most * triton.cdiv(n, PART)
        self.row_tasks = len(tasks)
        self.layers = _to_device(torch.tensor(layers, dtype=torch.int64), device)
        self.tasks, self.node_tasks, self.range_tasks = (
            _to_device(torch.tensor(table, dtype=torch.int32).view(-1, 3), device)
            for table in (tasks + of_nodes, node_tasks, range_tasks)
        )


_plan = functools.lru_cache(maxsize=64)(_Plan)


def _to_device(table, device):
    """A copy that the host does not wait for."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@functools.lru_cache(maxsize=64)
def _ladder(widest, device):
    """widths (ENTRIES,), no wider than asked; per entry nodes and where they begin; all nodes of [-1, 1]; weights."""
    if len(widest) > len(NODES):
        raise ValueError(f"widest must have at most {len(NODES)} entries, got {len(widest)}")
    exact = torch.tensor(widest, dtype=torch.float64)
    widths = exact.float()
    lower = torch.nextafter(widths, torch.tensor(-math.inf))
    widths = torch.where(widths.double() > exact, lower, widths)
    widths = torch.cat((widths, torch.full((ENTRIES - len(widest),), math.inf)))
    nodes = [*NODES[: len(widest)], *[NONE] * (ENTRIES - len(widest))]
    starts = [*itertools.accumulate(NODES, initial=0)]
    entries = torch.tensor([nodes, starts + [0] * (ENTRIES - len(starts))], dtype=torch.int32)
    angles = [(2 * torch.arange(m, dtype=torch.float64) + 1) * (math.pi / (2 * m)) for m in NODES]
    signs = [1.0 - 2.0 * (torch.arange(m) % 2) for m in NODES]
    points = torch.cat([angle.cos() for angle in angles]).float()
    weights = torch.cat([angle.sin() * sign for angle, sign in zip(angles, signs, strict=True)]).float()
    return tuple(_to_device(table, device) for table in (widths, entries, torch.stack((points, weights))))


def _geometry(q, grad, plan, widest, blocks):
    """What the kernels choose the number of nodes by and place them by: ranges, and the tables of the ladder.

    A layer with NaN or infinity in q, or in the gradient, gets an infinite range: it is summed directly, since
    interpolation would spread it.
    """
    ranges = q.new_empty((2, len(plan.range_tasks), q.shape[1]))
    _range[(len(plan.range_tasks),)](
        q,
        q if grad is None else grad,
        ranges,
        q.stride(0),
        plan.layers,
        q.shape[1],
        plan.range_tasks,
        len(plan.range_tasks),
        GRAD=grad is not None,
        ROWS=RANGE_ROWS,
        STEP=64,
        DIMS=blocks["DIMS"],
        num_warps=NUM_WARPS,
    )
    return ranges, len(plan.range_tasks), *_ladder(tuple(widest), q.device)


def _nowhere(x):
    """In place of the geometry where nothing is interpolated: not read."""
    return x, 0, x, x, x


@triton.jit
def _halves(s):
    """exp(-2|s|) and 1 / (1 + exp(-2|s|))."""
    e = tl.exp(-2 * tl.abs(s))
    return e, 1 / (1 + e)


@triton.jit
def _signed(s, e, r):
    """tanh(s) = ±(1 - e) r; near 0, where 1 - e cancels, by a polynomial (float32) or a fraction (float64)."""
    square = s * s
    if s.dtype == tl.float64:
        top = 135135 + square * (17325 + square * (378 + square))
        bottom = 135135 + square * (62370 + square * (3150 + square * 28))
        near = s * top / bottom
    else:
        p = 0.02127643732607888 + square * -0.006548401389746062
        p = 0.13333086850520284 + square * (-0.05390407465567011 + square * p)
        near = s + s * square * (-0.3333333180829725 + square * p)
    far = (1 - e) * r
    return tl.where(tl.abs(s) < 0.55, near, tl.where(s < 0, -far, far))


@triton.jit
def _tanh(s):
    e, r = _halves(s)
    return _signed(s, e, r)


@triton.jit
def _sech2(s):
    e, r = _halves(s)
    return 4 * e * r * r


@triton.jit
def _task(tasks, program):
    """layer, first filter, slot."""
    entry = tasks + 3 * program
    return tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def _layer(layers, layer):
    """First filter, filters, most nodes, first row of the nodes and of the sums of the parts."""
    entry = layers + 8 * layer
    n, most = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    return tl.load(entry), n, most, tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def _tile(rows, stride, row, count, col, cols):
    """rows (·,) x col (·,) of a matrix, 0 outside of `count` rows and `cols` columns."""
    mask = (row < count)[:, None] & (col < cols)[None, :]
    return tl.load(rows + row.to(tl.int64)[:, None] * stride + col[None, :], mask=mask, other=0)


@triton.jit
def _range(
    q,
    grad,
    ranges,
    s_q,
    layers,
    d,
    tasks,
    count,
    GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The least and the greatest q of every dimension over ROWS filters; infinite if one of them is not finite."""
    program = tl.program_id(0).to(tl.int64)
    layer, first, _ = _task(tasks, program)
    begin, n, _, _, _ = _layer(layers, layer)
    end = tl.minimum(n, first + ROWS)
    fault = tl.zeros((STEP,), tl.int32)
    if GRAD:
        for start in range(first, end, STEP):
            row = start + tl.arange(0, STEP)
            g = tl.load(grad + begin + row, mask=row < end, other=0)
            fault = fault | (g - g != 0).to(tl.int32)
    faults = tl.max(fault, 0)
    for start_col in range(0, d, DIMS):
        col = start_col + tl.arange(0, DIMS)
        low = tl.full((STEP, DIMS), float("inf"), tl.float32)
        high = tl.full((STEP, DIMS), float("-inf"), tl.float32)
        bad = tl.zeros((STEP, DIMS), tl.int32)
        for start in range(first, end, STEP):
            row = start + tl.arange(0, STEP)
            value = _tile(q + begin * s_q, s_q, row, end, col, d)
            inside = (row < end)[:, None]
            low = tl.where(inside, tl.minimum(low, value), low)
            high = tl.where(inside, tl.maximum(high, value), high)
            bad = bad | (value - value != 0).to(tl.int32)
        finite = (tl.max(bad, 0) | faults) == 0
        out = ranges + program * d + col
        tl.store(out, tl.where(finite, tl.min(low, 0), float("-inf")), mask=col < d)
        tl.store(out + count.to(tl.int64) * d, tl.where(finite, tl.max(high, 0), float("inf")), mask=col < d)


@triton.jit
def _interval(ranges, count, layers, layer, col, d, DIMS: tl.constexpr):
    """The least and the greatest q of the layer in these dimensions."""
    entry = layers + 8 * layer
    first, parts = tl.load(entry + 6), tl.load(entry + 7).to(tl.int32)
    low = tl.full((DIMS,), float("inf"), tl.float32)
    high = tl.full((DIMS,), float("-inf"), tl.float32)
    for part in range(parts):
        place = ranges + (first + part) * d + col
        low = tl.minimum(low, tl.load(place, mask=col < d, other=0))
        high = tl.maximum(high, tl.load(place + count.to(tl.int64) * d, mask=col < d, other=0))
    return low, high


@triton.jit
def _form(ranges, count, widths, entries, layers, layer, most, d, DIMS: tl.constexpr, LINEAR: tl.constexpr):
    """The number of nodes of the layer, 0 where it is summed directly, and where they begin among all nodes."""
    nodes = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    if LINEAR and most > 0:
        width = tl.zeros((DIMS,), tl.float32)
        for start_col in range(0, d, DIMS):
            low, high = _interval(ranges, count, layers, layer, start_col + tl.arange(0, DIMS), d, DIMS)
            width = tl.maximum(width, high - low)
        widest = tl.max(width, 0)
        table = tl.load(widths + tl.arange(0, 32))
        entry = tl.sum((table < widest).to(tl.int32), 0)
        if (entry < 32) & (widest < float("inf")):
            found = tl.load(entries + entry)
            if found <= most:
                nodes = found
                start = tl.load(entries + 32 + entry)
    return nodes, start


@triton.jit
def _middle_and_half(low, high):
    """Of an interval, such that neither overflows."""
    return high * 0.5 + low * 0.5, high * 0.5 - low * 0.5


@triton.jit
def _scaled(q, middle, half):
    """q on [-1, 1]; where all q are alike any point serves."""
    inverse = tl.where(half > 1e-30, 1 / tl.where(half > 1e-30, half, 1), 0)
    x = (q - middle[None, :]) * inverse[None, :]
    return tl.minimum(tl.maximum(x, -1.0), 1.0)


@triton.jit
def _pole(x, point, weight):
    """weight / (x - point), the barycentric term; on the point so large that it decides alone."""
    distance = x - point
    return weight / tl.where(distance == 0, 1e-30, distance)


@triton.jit
def _sweep(
    q,
    k,
    s_q,
    s_k,
    layers,
    d,
    v,
    b,
    x,
    part_means,
    ranges,
    count,
    widths,
    entries,
    points,
    tasks,
    LINEAR: tl.constexpr,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    DIMS: tl.constexpr,
):
    """x of TARGETS filters of a direct layer; of an interpolated one Σ_j tanh(t_m + k_j) over a part of its filters."""
    layer, row, slot = _task(tasks, tl.program_id(0))
    begin, n, most, _, part_row = _layer(layers, layer)
    nodes, start = _form(ranges, count, widths, entries, layers, layer, most, d, DIMS, LINEAR)
    k += begin * s_k
    if slot < 0:
        if nodes == 0:
            target = row + tl.arange(0, TARGETS)
            total = tl.zeros((TARGETS,), q.dtype.element_ty)
            for start_col in range(0, d, DIMS):
                col = start_col + tl.arange(0, DIMS)
                mine = _tile(q + begin * s_q, s_q, target, n, col, d)
                sums = _tanh_sums(mine, k, s_k, 0, n, col, d, TARGETS, SOURCES, DIMS)
                weight = tl.load(v + layer * d + col, mask=col < d, other=0)
                total += tl.sum(sums / n * weight[None, :], 1)
            tl.store(x + begin + target, total + tl.load(b + layer), mask=target < n)
    elif LINEAR:
        part_row += row // PART_ROWS * most
        end = tl.minimum(n, row + PART_ROWS)
        for block in range(slot, nodes // TARGETS, NODE_SLOTS):
            node = block * TARGETS + tl.arange(0, TARGETS)
            for start_col in range(0, d, DIMS):
                col = start_col + tl.arange(0, DIMS)
                low, high = _interval(ranges, count, layers, layer, col, d, DIMS)
                middle, half = _middle_and_half(low, high)
                at = middle[None, :] + half[None, :] * tl.load(points + start + node)[:, None]
                sums = _tanh_sums(at, k, s_k, row, end, col, d, TARGETS, SOURCES, DIMS)
                out = part_means + (part_row + node)[:, None] * d + col[None, :]
                tl.store(out, sums, mask=(col < d)[None, :])


PART_ROWS: tl.constexpr = tl.constexpr(PART)
NODE_SLOTS: tl.constexpr = tl.constexpr(SLOTS)
SUM_ROWS: tl.constexpr = tl.constexpr(512)  # sources that are added up before they meet the others
ALL_NODES: tl.constexpr = tl.constexpr(sum(NODES))


@triton.jit
def _tanh_sums(at, k, s_k, first, end, col, d, TARGETS: tl.constexpr, SOURCES: tl.constexpr, DIMS: tl.constexpr):
    """Σ_j tanh(at + k_j) over first ≤ j < end: (TARGETS, DIMS)."""
    total = tl.zeros((TARGETS, DIMS), at.dtype)
    for begin in range(first, end, SUM_ROWS):
        sums = tl.zeros((TARGETS, SOURCES, DIMS), at.dtype)
        stop = tl.minimum(end, begin + SUM_ROWS)
        for start in range(begin, stop, SOURCES):
            source = start + tl.arange(0, SOURCES)
            other = _tile(k, s_k, source, stop, col, d)
            value = _tanh(at[:, None, :] + other[None, :, :])
            sums += tl.where((source < stop)[None, :, None], value, 0)
        total += tl.sum(sums, 1)
    return total


@triton.jit
def _both_sums(at, k, s_k, first, end, col, d, TARGETS: tl.constexpr, SOURCES: tl.constexpr, DIMS: tl.constexpr):
    """Σ_j tanh(at + k_j) and Σ_j sech²(at + k_j) over first ≤ j < end: (TARGETS, DIMS) each."""
    total = tl.zeros((TARGETS, DIMS), at.dtype)
    total_slope = tl.zeros((TARGETS, DIMS), at.dtype)
    for begin in range(first, end, SUM_ROWS):
        sums = tl.zeros((TARGETS, SOURCES, DIMS), at.dtype)
        slopes = tl.zeros((TARGETS, SOURCES, DIMS), at.dtype)
        stop = tl.minimum(end, begin + SUM_ROWS)
        for start in range(begin, stop, SOURCES):
            source = start + tl.arange(0, SOURCES)
            other = _tile(k, s_k, source, stop, col, d)
            s = at[:, None, :] + other[None, :, :]
            e, r = _halves(s)
            inside = (source < stop)[None, :, None]
            sums += tl.where(inside, _signed(s, e, r), 0)
            slopes += tl.where(inside, 4 * e * r * r, 0)
        total += tl.sum(sums, 1)
        total_slope += tl.sum(slopes, 1)
    return total, total_slope


@triton.jit
def _combine_parts(
    parts,
    to,
    part_rows,
    node_rows,
    layers,
    d,
    ranges,
    count,
    widths,
    entries,
    points,
    tasks,
    Q: tl.constexpr,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Sums over the parts, in their order: of the weights as they are, of tanh and of sech² divided by n."""
    layer, _, slot = _task(tasks, tl.program_id(0))
    _, n, most, node_row, part_row = _layer(layers, layer)
    nodes, _ = _form(ranges, count, widths, entries, layers, layer, most, d, DIMS, True)
    for block in range(slot, nodes // TARGETS, NODE_SLOTS):
        node = block * TARGETS + tl.arange(0, TARGETS)
        for start_col in range(0, d, DIMS):
            col = start_col + tl.arange(0, DIMS)
            mask = (node < nodes)[:, None] & (col < d)[None, :]
            for quantity in tl.static_range(Q):
                place = parts + (quantity * part_rows.to(tl.int64) + part_row + node)[:, None] * d + col[None, :]
                total = tl.zeros((TARGETS, DIMS), tl.float32)
                for part in range(tl.cdiv(n, PART_ROWS)):
                    total += tl.load(place + tl.cast(part, tl.int64) * most * d, mask=mask, other=0)
                if Q == 1 or quantity > 0:
                    total = total / n
                out = to + (quantity * node_rows.to(tl.int64) + node_row + node)[:, None] * d + col[None, :]
                tl.store(out, total, mask=mask)


@triton.jit
def _interpolated(
    at, values, start, points, nodes, col, d, TARGETS: tl.constexpr, SOURCES: tl.constexpr, DIMS: tl.constexpr
):
    """Of the values (nodes, d) at the nodes: the interpolant at `at` (TARGETS, DIMS)."""
    top = tl.zeros((TARGETS, SOURCES, DIMS), tl.float32)
    bottom = tl.zeros((TARGETS, SOURCES, DIMS), tl.float32)
    for first in range(0, nodes, SOURCES):
        node = first + tl.arange(0, SOURCES)
        point = tl.load(points + start + node, mask=node < nodes, other=2)
        weight = tl.load(points + ALL_NODES + start + node, mask=node < nodes, other=0)
        term = _pole(at[:, None, :], point[None, :, None], weight[None, :, None])
        top += term * _tile(values, d, node, nodes, col, d)[None, :, :]
        bottom += term
    return tl.sum(top, 1) / tl.sum(bottom, 1)


@triton.jit
def _interpolate(
    q,
    k,
    s_q,
    s_k,
    layers,
    d,
    v,
    b,
    x,
    means,
    ranges,
    count,
    widths,
    entries,
    points,
    tasks,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    DIMS: tl.constexpr,
):
    """x of TARGETS filters of an interpolated layer."""
    layer, row, _ = _task(tasks, tl.program_id(0))
    begin, n, most, node_row, _ = _layer(layers, layer)
    nodes, start = _form(ranges, count, widths, entries, layers, layer, most, d, DIMS, True)
    if nodes > 0:
        target = row + tl.arange(0, TARGETS)
        total = tl.zeros((TARGETS,), tl.float32)
        for start_col in range(0, d, DIMS):
            col = start_col + tl.arange(0, DIMS)
            low, high = _interval(ranges, count, layers, layer, col, d, DIMS)
            middle, half = _middle_and_half(low, high)
            at = _scaled(_tile(q + begin * s_q, s_q, target, n, col, d), middle, half)
            value = _interpolated(at, means + node_row * d, start, points, nodes, col, d, TARGETS, SOURCES, DIMS)
            weight = tl.load(v + layer * d + col, mask=col < d, other=0)
            total += tl.sum(tl.where((col < d)[None, :], value * weight[None, :], 0), 1)
        tl.store(x + begin + target, total + tl.load(b + layer), mask=target < n)


@triton.jit
def _sweep_backward(
    q,
    k,
    s_q,
    s_k,
    layers,
    d,
    grad,
    v,
    grad_q,
    grad_k,
    part_v,
    share,
    parts,
    part_rows,
    ranges,
    count,
    widths,
    entries,
    points,
    tasks,
    LINEAR: tl.constexpr,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Of TARGETS filters of a direct layer ∂q, ∂k and their part of ∂v; of an interpolated one `share`, the gradient
    over the barycentric denominator; and over a part of its filters the sums of tanh and of sech² at the nodes.
    """
    layer, row, slot = _task(tasks, tl.program_id(0))
    begin, n, most, _, part_row = _layer(layers, layer)
    nodes, start = _form(ranges, count, widths, entries, layers, layer, most, d, DIMS, LINEAR)
    q += begin * s_q
    k += begin * s_k
    grad += begin
    if slot < 0:
        target = row + tl.arange(0, TARGETS)
        of_x = tl.load(grad + target, mask=target < n, other=0)
        for start_col in range(0, d, DIMS):
            col = start_col + tl.arange(0, DIMS)
            mask = (target < n)[:, None] & (col < d)[None, :]
            out = (begin + target)[:, None] * d + col[None, :]
            mine = _tile(q, s_q, target, n, col, d)
            if nodes == 0:
                weight = tl.load(v + layer * d + col, mask=col < d, other=0) / n
                sums, slopes = _both_sums(mine, k, s_k, 0, n, col, d, TARGETS, SOURCES, DIMS)
                tl.store(grad_q + out, slopes * weight[None, :] * of_x[:, None], mask=mask)
                of_v = tl.sum(tl.where(mask, sums / n * of_x[:, None], 0), 0)
                tl.store(part_v + tl.program_id(0).to(tl.int64) * d + col, of_v, mask=col < d)
                mine = _tile(k, s_k, target, n, col, d)
                sums = _weighted_slopes(mine, q, s_q, grad, n, col, d, TARGETS, SOURCES, DIMS)
                tl.store(grad_k + out, sums * weight[None, :], mask=mask)
            elif LINEAR:
                low, high = _interval(ranges, count, layers, layer, col, d, DIMS)
                middle, half = _middle_and_half(low, high)
                at = _scaled(mine, middle, half)
                bottom = tl.zeros((TARGETS, SOURCES, DIMS), tl.float32)
                for first in range(0, nodes, SOURCES):
                    node = first + tl.arange(0, SOURCES)
                    point = tl.load(points + start + node, mask=node < nodes, other=2)
                    pole = tl.load(points + ALL_NODES + start + node, mask=node < nodes, other=0)
                    bottom += _pole(at[:, None, :], point[None, :, None], pole[None, :, None])
                tl.store(share + out, of_x[:, None] / tl.sum(bottom, 1), mask=mask)
    elif LINEAR:
        part_row += row // PART_ROWS * most
        end = tl.minimum(n, row + PART_ROWS)
        for block in range(slot, nodes // TARGETS, NODE_SLOTS):
            node = block * TARGETS + tl.arange(0, TARGETS)
            for start_col in range(0, d, DIMS):
                col = start_col + tl.arange(0, DIMS)
                low, high = _interval(ranges, count, layers, layer, col, d, DIMS)
                middle, half = _middle_and_half(low, high)
                at = middle[None, :] + half[None, :] * tl.load(points + start + node)[:, None]
                sums, slopes = _both_sums(at, k, s_k, row, end, col, d, TARGETS, SOURCES, DIMS)
                out = parts + (part_rows.to(tl.int64) + part_row + node)[:, None] * d + col[None, :]
                tl.store(out, sums, mask=(col < d)[None, :])
                tl.store(out + part_rows.to(tl.int64) * d, slopes, mask=(col < d)[None, :])


@triton.jit
def _weighted_slopes(
    at, rows, stride, weights, n, col, d, TARGETS: tl.constexpr, SOURCES: tl.constexpr, DIMS: tl.constexpr
):
    """Σ_i weights_i sech²(at + rows_i): (TARGETS, DIMS)."""
    total = tl.zeros((TARGETS, DIMS), at.dtype)
    for begin in range(0, n, SUM_ROWS):
        sums = tl.zeros((TARGETS, SOURCES, DIMS), at.dtype)
        stop = tl.minimum(n, begin + SUM_ROWS)
        for start in range(begin, stop, SOURCES):
            source = start + tl.arange(0, SOURCES)
            other = _tile(rows, stride, source, stop, col, d)
            weight = tl.load(weights + source, mask=source < stop, other=0)[None, :, None]
            value = weight * _sech2(at[:, None, :] + other[None, :, :])
            sums += tl.where((source < stop)[None, :, None], value, 0)
        total += tl.sum(sums, 1)
    return total


@triton.jit
def _weights(
    q,
    k,
    s_q,
    s_k,
    layers,
    d,
    share,
    parts,
    ranges,
    count,
    widths,
    entries,
    points,
    tasks,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    DIMS: tl.constexpr,
):
    """w_m = Σ_i ∂x_i L_m(q_i) over a part of the filters."""
    layer, row, slot = _task(tasks, tl.program_id(0))
    begin, n, most, _, part_row = _layer(layers, layer)
    nodes, start = _form(ranges, count, widths, entries, layers, layer, most, d, DIMS, True)
    part_row += row // PART_ROWS * most
    end = tl.minimum(n, row + PART_ROWS)
    for block in range(slot, nodes // TARGETS, NODE_SLOTS):
        node = block * TARGETS + tl.arange(0, TARGETS)
        point = tl.load(points + start + node)
        weight = tl.load(points + ALL_NODES + start + node)
        for start_col in range(0, d, DIMS):
            col = start_col + tl.arange(0, DIMS)
            low, high = _interval(ranges, count, layers, layer, col, d, DIMS)
            middle, half = _middle_and_half(low, high)
            sums = tl.zeros((TARGETS, SOURCES, DIMS), tl.float32)
            for first in range(row, end, SOURCES):
                source = first + tl.arange(0, SOURCES)
                at = _scaled(_tile(q + begin * s_q, s_q, source, end, col, d), middle, half)
                own = _tile(share + begin * d, d, source, end, col, d)  # 0 outside, which the pole leaves 0
                sums += own[None, :, :] * _pole(at[None, :, :], point[:, None, None], weight[:, None, None])
            out = parts + (part_row + node)[:, None] * d + col[None, :]
            tl.store(out, tl.sum(sums, 1), mask=(col < d)[None, :])


@triton.jit
def _finish(
    q,
    k,
    s_q,
    s_k,
    layers,
    d,
    grad,
    v,
    grad_q,
    grad_k,
    grad_v,
    grad_b,
    part_v,
    of_nodes,
    node_rows,
    layer_count,
    ranges,
    count,
    widths,
    entries,
    points,
    tasks,
    LINEAR: tl.constexpr,
    TARGETS: tl.constexpr,
    SOURCES: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The first programs: ∂v, ∂b of a layer each. The others: ∂q, ∂k of TARGETS filters of interpolated layers."""
    program = tl.program_id(0)
    weights, means, slopes = of_nodes, of_nodes, of_nodes
    if LINEAR:
        means += node_rows.to(tl.int64) * d
        slopes += 2 * node_rows.to(tl.int64) * d
    layer = program.to(tl.int64)
    row = tl.zeros((), tl.int32)
    if program >= layer_count:
        layer, row, _ = _task(tasks, program - layer_count)
    begin, n, most, node_row, _ = _layer(layers, layer)
    nodes, start = _form(ranges, count, widths, entries, layers, layer, most, d, DIMS, LINEAR)
    grad += begin
    weights += node_row * d
    if program < layer_count:
        _finish_layer(
            layers,
            layer,
            n,
            d,
            nodes,
            grad,
            weights,
            means + node_row * d,
            part_v,
            grad_v,
            grad_b,
            LINEAR,
            TARGETS,
            DIMS,
        )
    elif LINEAR and nodes > 0:
        target = row + tl.arange(0, TARGETS)
        of_x = tl.load(grad + target, mask=target < n, other=0)
        for start_col in range(0, d, DIMS):
            col = start_col + tl.arange(0, DIMS)
            mask = (target < n)[:, None] & (col < d)[None, :]
            out = (begin + target)[:, None] * d + col[None, :]
            weight = tl.load(v + layer * d + col, mask=col < d, other=0)
            low, high = _interval(ranges, count, layers, layer, col, d, DIMS)
            middle, half = _middle_and_half(low, high)
            at = _scaled(_tile(q + begin * s_q, s_q, target, n, col, d), middle, half)
            slope = _interpolated(at, slopes + node_row * d, start, points, nodes, col, d, TARGETS, SOURCES, DIMS)
            tl.store(grad_q + out, slope * weight[None, :] * of_x[:, None], mask=mask)
            mine = _tile(k + begin * s_k, s_k, target, n, col, d)
            sums = tl.zeros((TARGETS, SOURCES, DIMS), tl.float32)
            for first in range(0, nodes, SOURCES):
                node = first + tl.arange(0, SOURCES)
                point = tl.load(points + start + node, mask=node < nodes, other=0)
                there = middle[None, :] + half[None, :] * point[:, None]
                own = _tile(weights, d, node, nodes, col, d)
                sums += own[None, :, :] * _sech2(mine[:, None, :] + there[None, :, :])
            tl.store(grad_k + out, tl.sum(sums, 1) * (weight / n)[None, :], mask=mask)


@triton.jit
def _finish_layer(
    layers,
    layer,
    n,
    d,
    nodes,
    grad,
    weights,
    means,
    part_v,
    grad_v,
    grad_b,
    LINEAR: tl.constexpr,
    TARGETS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """∂v and ∂b of a layer: from the parts of its row tasks where it is direct, else Σ_m w_m g(t_m)."""
    acc: tl.constexpr = grad_v.dtype.element_ty
    total = tl.zeros((SUM_ROWS,), acc)
    for first in range(0, n, SUM_ROWS):
        row = first + tl.arange(0, SUM_ROWS)
        total += tl.load(grad + row, mask=row < n, other=0)
    tl.store(grad_b + layer, tl.sum(total, 0))
    part_v += tl.load(layers + 8 * layer + 5) * d
    parts = tl.cdiv(n, TARGETS)
    for start_col in range(0, d, DIMS):
        col = start_col + tl.arange(0, DIMS)
        of_v = tl.zeros((32, DIMS), acc)
        if nodes == 0:
            for first in range(0, parts, 32):
                of_v += _tile(part_v, d, first + tl.arange(0, 32), parts, col, d)
        elif LINEAR:
            for first in range(0, nodes, 32):
                node = first + tl.arange(0, 32)
                of_v += _tile(means, d, node, nodes, col, d) * _tile(weights, d, node, nodes, col, d)
        tl.store(grad_v + layer * d + col, tl.sum(of_v, 0), mask=col < d)
