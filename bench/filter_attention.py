"""filter_attention against the formula in eager PyTorch and compiled: one layer, and the layers of ResNet-56.

`python -m bench.filter_attention` measures how time and memory grow with the filters of one layer.

What must be done, with M nodes (56 to 80 at a tolerance of 1e-7, for the 7 to 8 that unit normal queries span):
- forward, for each of n · d · M terms: a multiplication and an addition under the fraction, its reciprocal, an addition
  to the node's sum; and three operations for each of the n · d · M steps of the interpolation. About 7 n d M.
- backward: three for the moments, three for the fraction, two for sech², one for each of a node's two sums, two for ∂k;
  three for the interpolation. About 15 n d M.
- moved: q and k are read and x written, 4 (2 n d + n) bytes; the backward reads q, k and ∂x and writes ∂q and ∂k.
  At n = 1024 and d = 32 that is 0.26 MB in 30 M operations: the arithmetic decides, above all the division.
"""

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import time

import torch

from paamops.ops.filter_attention import filter_attention

from .harness import Case, compiled

D = 32
RESNET_56 = [16] * 19 + [32] * 18 + [64] * 18
NODES = 64  # of the layers of one width below, most of the time
TOLERANCE = 1e-7


def inputs(sizes, gradients):
    """Queries and keys as slices of one tensor, as a projection yields them; v, b, and ∂x where it is wanted."""

    def make(device):
        filters, layers = sum(sizes), len(sizes)
        q, k = torch.randn(filters, 2 * D, device=device).split(D, 1)
        v, b = torch.randn(layers, D, device=device) / D, torch.randn(layers, device=device)
        if not gradients:
            return q, k, v, b
        grad = torch.randn(filters, device=device) / math.sqrt(filters)
        return (*(t.requires_grad_() for t in (q.detach(), k.detach(), v, b)), grad)

    return make


def formula(q, k, v, b):
    """One layer: (n, n, d) terms in memory."""
    return b + (torch.tanh(q[:, None] + k[None]) @ v[0]).mean(1)


def layer_by_layer(offsets):
    def eager(q, k, v, b):
        return torch.cat(
            [
                formula(q[begin:end], k[begin:end], v[layer : layer + 1], b[layer])
                for layer, (begin, end) in enumerate(itertools.pairwise(offsets))
            ]
        )

    return eager


def with_gradients(function):
    def run(q, k, v, b, grad):
        x = function(q, k, v, b)
        return x, *torch.autograd.grad(x, (q, k, v, b), grad)

    return run


def in_float64(function):
    """The check: the same in float64, and the gradients by autograd where ∂x is given."""

    def check(q, k, v, b, *grad):
        wide = [t.detach().double().requires_grad_(bool(grad)) for t in (q, k, v, b)]
        return with_gradients(function)(*wide, grad[0].double()) if grad else function(*wide)

    return check


def case(name, sizes, gradients, with_compile, target):
    offsets = list(itertools.accumulate(sizes, initial=0))
    eager = formula if len(sizes) == 1 else layer_by_layer(offsets)
    both = with_gradients if gradients else lambda function: function
    filters = offsets[-1]
    passes = 3 if gradients else 1  # over two of n · d numbers: the forward's, the backward's reading and writing
    return Case(
        name=f"filter_attention {name} d={D} float32{' with gradients' if gradients else ''}",
        op="filter_attention",
        make=inputs(sizes, gradients),
        run=both(lambda q, k, v, b: filter_attention(q, k, v, b, TOLERANCE, offsets)),
        check=in_float64(eager),
        baselines={"eager": both(eager), **({"compile": both(compiled(eager))} if with_compile else {})},
        bytes=passes * 2 * filters * D * 4 + (3 if gradients else 1) * filters * 4,
        flops=(22 if gradients else 7) * sum(n * min(n, NODES) for n in sizes) * D,
        target=target,
        cold=False,  # the projection has just written q and k
    )


CASES = [
    case("n=1024", [1024], False, True, {}),
    case("n=1024", [1024], True, True, {"eager": 15}),
    case("n=512", [512], True, True, {"compile": 5}),
    case("ResNet-56", RESNET_56, True, False, {"eager": 5}),
]


def milliseconds(n, seconds=1.0):
    """The median of forward and backward of one layer of n filters."""
    arguments = inputs([n], True)("cpu")
    run = with_gradients(lambda q, k, v, b: filter_attention(q, k, v, b, TOLERANCE, [0, n]))
    run(*arguments)
    samples, deadline = [], time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < deadline:
        start = time.perf_counter()
        run(*arguments)
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples)


def slope(points):
    """The exponent that fits {n: milliseconds} best in a log-log plot."""
    logs = [(math.log(n), math.log(ms)) for n, ms in points.items()]
    centre_x, centre_y = (statistics.fmean(values) for values in zip(*logs, strict=True))
    return sum((x - centre_x) * (y - centre_y) for x, y in logs) / sum((x - centre_x) ** 2 for x, _ in logs)


MEMORY = """
import sys
import torch
from bench.filter_attention import TOLERANCE, filter_attention, inputs, with_gradients
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
def run(n):
    arguments = inputs([n], True)("cpu")
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = peak()
    with_gradients(lambda q, k, v, b: filter_attention(q, k, v, b, TOLERANCE, [0, n]))(*arguments)
    return peak() - before
torch.set_num_threads(int(sys.argv[2]))
run(100)
print(run(int(sys.argv[1])))
"""


def mebibytes(n):
    """What both passes over n filters add to the resident memory, results included, in a new process on Linux."""
    command = [sys.executable, "-c", MEMORY, str(n), str(torch.get_num_threads())]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def main():
    """Time and peak memory of one layer with its gradients, from 512 to 16,384 filters."""
    parser = argparse.ArgumentParser(prog="python -m bench.filter_attention", description=main.__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    points = {}
    for n in (512, 1024, 2048, 4096, 8192, 16384):
        points[n] = milliseconds(n)
        print(f"n = {n:>6}   {points[n]:>8.3f} ms   {mebibytes(n):>6.1f} MiB")
    print(f"time grows as n^{slope(points):.2f}")


if __name__ == "__main__":
    main()
