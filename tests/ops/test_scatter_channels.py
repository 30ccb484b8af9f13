"""scatter_channels and its gradient against indexing, in every layout and dtype: it moves bits, so they are equal."""

import math
import random

import pytest
import torch

from paamops.ops.registration import build_info, compiled
from paamops.ops.scatter_channels import (
    inverse,
    plain,
    renumbered,
    scatter_channels,
    scatter_channels_op,
    scatter_channels_reference,
    wide_empty,
)
from tests.ops.test_activation_attention import DTYPES, LAYOUTS, SHAPES
from tests.ops.test_instruction_sets import SETS

IMPLEMENTATIONS = {"kernel": scatter_channels_op, "reference": scatter_channels_reference}
has_cpp = build_info()["kernels"]["scatter_channels"]["cpu"] == "C++"


def places(kept, width, ordered, nowhere):
    """A place among `width` for each of the `kept` channels, and `nowhere` of them without one."""
    index = torch.randperm(width)[:kept]
    index = index.sort().values if ordered else index
    index[torch.randperm(kept)[:nowhere]] = -1
    return index


def expected(x, index, width):
    y = torch.zeros(x.shape[0], width, *x.shape[2:], dtype=x.dtype)
    for j, c in enumerate(index.tolist()):
        if c >= 0:
            y[:, c] = x[:, j]
    return y


def same_bits(a, b):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check(op, x, index, width):
    source = inverse(index, width)
    y = op(x, index, source)
    assert y.dtype == x.dtype
    assert y.stride() == wide_empty(x, width).stride()
    assert same_bits(y, expected(x, index, width))
    assert same_bits(op(y, source, index), expected(y, source, x.shape[1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation):
    for shape in [*SHAPES, (40, 16, 6, 5), (9, 20, 3, 3), (2, 150, 4, 3), (3, 1, 9, 9), (50, 70), (2, 5, 3, 2, 4)]:
        print(shape)
        x = LAYOUTS[layout](torch.randn(shape))
        for width, ordered, nowhere in ((shape[1], True, 0), (shape[1] + 3, True, 0), (2 * shape[1], False, 1)):
            check(IMPLEMENTATIONS[implementation], x, places(shape[1], width, ordered, min(nowhere, shape[1])), width)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_sliced", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, layout):
    for shape, width in [((2, 40, 11, 13), 64), ((2, 3, 2, 3), 17), ((1, 33, 30, 30), 40), ((3, 70, 5, 5), 131)]:
        for ordered in (True, False):
            x = LAYOUTS[layout](torch.randn(shape).to(dtype))
            check(scatter_channels_op, x, places(shape[1], width, ordered, 0), width)


@pytest.mark.parametrize("repeat", range(20))
def test_random_shapes(repeat, seed):
    chance = random.Random(f"{seed} {repeat}")
    shape = [chance.choice([1, 2, 3, 5, 8, 16, 17, 31, 33]) for _ in range(chance.randint(2, 5))]
    while math.prod(shape) > 100_000:
        shape[chance.randrange(len(shape))] = 1
    dtype, layout = chance.choice(DTYPES), chance.choice(list(LAYOUTS))
    width, nowhere = shape[1] + chance.randrange(40), chance.randrange(shape[1] + 1)
    print(shape, layout, dtype, width, nowhere)
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    check(scatter_channels_op, x, places(shape[1], width, chance.random() < 0.5, nowhere), width)


@pytest.mark.skipif(not has_cpp, reason="built without C++")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
def test_instruction_sets(instruction_set, dtype):
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(instruction_set)
    try:
        for layout in ("contiguous", "channels_last"):
            x = LAYOUTS[layout](torch.randn(3, 37, 9, 11).to(dtype))
            check(scatter_channels_op, x, places(37, 61, True, 0), 61)
    finally:
        compiled.use_instruction_set(best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4), (2, 3, 0), (2, 0), (0, 2)], ids=str)
def test_empty(shape, implementation):
    check(IMPLEMENTATIONS[implementation], torch.randn(shape), places(shape[1], 5, True, 0), 5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_computed(dtype, layout):
    """NaN with its payload, infinities, -0 and subnormal numbers pass as they are."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x = torch.randint(torch.iinfo(bits).min, torch.iinfo(bits).max, (2, 20, 5, 7), dtype=bits).view(dtype)
    check(scatter_channels_op, LAYOUTS[layout](x), places(20, 33, True, 0), 33)


@pytest.mark.skipif(not has_cpp, reason="only the kernel looks")
def test_a_source_out_of_range_is_refused():
    x, index = torch.randn(2, 3, 4), torch.arange(3)
    for wrong in (3, -2, 10**12):
        with pytest.raises(RuntimeError, match=rf"source\[1\] is {wrong}"):
            scatter_channels_op(x, index, torch.tensor([0, wrong, 2]))


def test_the_inverse():
    assert inverse(torch.tensor([4, -1, 0]), 5).tolist() == [2, -1, -1, -1, 0]
    assert inverse(torch.tensor([], dtype=torch.int64), 2).tolist() == [-1, -1]
    assert inverse(torch.tensor([-1]), 0).tolist() == []


def test_renumbering():
    source = torch.tensor([-1, 0, 2, 5, 4])
    assert renumbered(source, torch.tensor([0, 3, 5])).tolist() == [-1, 0, -1, 2, -1]
    assert renumbered(source, None) is source


def test_public_function():
    x, index = torch.randn(4, 3, 5, 7), torch.tensor([5, 0, -1])
    y = scatter_channels(x, index, 6)
    assert torch.equal(y[:, [5, 0]], x[:, :2])
    assert y[:, 1:5].abs().sum() == 0
    assert torch.equal(plain(x, inverse(index, 6)), y)
    last = scatter_channels(x.contiguous(memory_format=torch.channels_last), index, 6)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, r"x is a list; it must be a tensor", {"x": [1.0]}),
        (TypeError, r"x has dtype torch\.int64; it must be float16", {"x": torch.ones(2, 3, dtype=torch.int64)}),
        (ValueError, r"x has shape \(3,\); it must have at least two dimensions", {"x": torch.ones(3)}),
        (TypeError, r"index is a list; it must be a tensor", {"index": [0, 1, 2]}),
        (TypeError, r"index has dtype torch\.int32; it must be int64", {"index": torch.arange(3).int()}),
        (ValueError, r"index has shape \(4,\); it must be \(3,\), a place per", {"index": torch.arange(4)}),
        (ValueError, r"index is on meta; .* device of x, cpu", {"index": torch.arange(3, device="meta")}),
        (ValueError, r"index has values from 0 to 5; they must be -1 to 4", {"index": torch.tensor([0, 1, 5])}),
        (ValueError, r"index has values from -2 to 1; they must be", {"index": torch.tensor([0, 1, -2])}),
        (ValueError, r"index names a channel twice", {"index": torch.tensor([0, 1, 1])}),
        (TypeError, r"width is a float; it must be an int", {"width": 5.0}),
        (ValueError, r"width is -1; it must be at least 0", {"width": -1}),
    ],
)
def test_bad_arguments(error, words, changed):
    with pytest.raises(error, match=words):
        scatter_channels(**{"x": torch.ones(2, 3, 4, 4), "index": torch.arange(3), "width": 5, **changed})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout):
    x, index = LAYOUTS[layout](torch.randn(2, 3, 4, 5)), torch.tensor([4, 0, -1])
    source = inverse(index, 6)
    torch.library.opcheck(scatter_channels_op, (x, index, source))
    torch.library.opcheck(scatter_channels_op, (x.clone().requires_grad_(), index, source))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_gradcheck(layout):
    x = LAYOUTS[layout](torch.randn(2, 3, 2, 3, dtype=torch.float64)).requires_grad_()
    index = torch.tensor([4, 0, -1])
    torch.autograd.gradcheck(lambda x: scatter_channels(x, index, 5), x)
    torch.autograd.gradgradcheck(lambda x: scatter_channels(x, index, 5).square(), x)


def test_the_gradient_of_the_sum():
    """y = stream + branch by index: ∂stream = ∂y, ∂branch = ∂y at the index."""
    stream, branch = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(2, 3, 3, 3, requires_grad=True)
    index, grad = torch.tensor([1, 4, 6]), torch.randn(2, 8, 3, 3)
    of_stream, of_branch = torch.autograd.grad(stream + scatter_channels(branch, index, 8), (stream, branch), grad)
    assert torch.equal(of_stream, grad)
    assert torch.equal(of_branch, grad.index_select(1, index))
