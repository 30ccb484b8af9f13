"""scale_channels: y and both gradients against float64, in every layout, dtype and size."""

import math
import random

import pytest
import torch

from paamops.ops.registration import build_info, compiled
from paamops.ops.scale_channels import (
    scale_channels,
    scale_channels_backward_op,
    scale_channels_backward_reference,
    scale_channels_op,
    scale_channels_reference,
)
from tests.ops.test_activation_attention import DTYPES, LAYOUTS, SHAPES
from tests.ops.test_instruction_sets import SETS
from tests.tolerances import accumulator, assert_close

IMPLEMENTATIONS = {
    "kernel": (scale_channels_op, scale_channels_backward_op),
    "reference": (scale_channels_reference, scale_channels_backward_reference),
}
# Beside the shapes of the attention: runs shorter and longer than a vector, several images to a task, many channels.
MORE_SHAPES = [
    (40, 16, 6, 5),
    (9, 20, 3, 3),
    (2, 1500, 4, 3),
    (200, 3, 2),
    (3, 1, 9, 9),
    (1, 5, 1),
    (50, 700),
    (33, 600),
]
has_cpp = build_info()["kernels"]["scale_channels"]["cpu"] == "C++"


def per_channel(s, x):
    """s in float64, along the channels of x, by another way than the reference."""
    return s.double().reshape(1, -1, *[1] * (x.ndim - 2)).expand(x.shape)


def kinds_of_scores(dtype):
    """The dtypes that s may have beside x in `dtype`."""
    return sorted({dtype, torch.float32, torch.float64}, key=str)


def check(op, backward, x, s, grads):
    """y, ∂x and ∂s of an op. The numbers are positive: a sum that cancels would magnify its rounding."""
    y = op(x, s)
    assert y.dtype == x.dtype
    assert y.stride() == torch.empty_like(x).stride()
    assert_close(y, x.double() * per_channel(s, x), x.dtype)
    for grad in grads:
        grad_x, grad_s = backward(grad, x, s)
        assert grad_x.dtype == x.dtype
        assert grad_x.stride() == torch.empty_like(x).stride()
        assert_close(grad_x, grad.double() * per_channel(s, x), x.dtype)
        assert grad_s.shape == s.shape
        assert grad_s.dtype == s.dtype
        expected = (grad.double() * x.double()).transpose(0, 1).reshape(x.shape[1], x[:, :1].numel()).sum(1)
        coarser = min(s.dtype, accumulator(x.dtype), key=lambda dtype: dtype.itemsize)
        assert_close(grad_s, expected, coarser)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation):
    for shape in SHAPES + MORE_SHAPES:
        print(shape)
        x, s = LAYOUTS[layout](torch.rand(shape)), torch.randn(shape[1])
        names = LAYOUTS if implementation == "kernel" else [layout]
        check(*IMPLEMENTATIONS[implementation], x, s, [LAYOUTS[name](torch.rand(shape)) for name in names])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_sliced", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, layout, implementation):
    for shape in [(2, 40, 11, 13), (2, 3, 2, 3), (1, 64, 30, 30), (3, 130, 5, 5)]:
        for kind in kinds_of_scores(dtype):
            x, s = LAYOUTS[layout](torch.rand(shape).to(dtype)), torch.rand(2 * shape[1]).to(kind)[::2]
            grad = torch.rand(shape).to(dtype)
            grads = [grad, LAYOUTS[layout](grad), torch.rand(()).to(dtype).expand(shape)]
            check(*IMPLEMENTATIONS[implementation], x, s, grads)


@pytest.mark.parametrize("repeat", range(20))
def test_random_shapes(repeat, seed):
    chance = random.Random(f"{seed} {repeat}")
    shape = [chance.choice([1, 2, 3, 5, 8, 16, 17, 31, 33]) for _ in range(chance.randint(2, 5))]
    while math.prod(shape) > 200_000:
        shape[chance.randrange(len(shape))] = 1
    dtype = chance.choice(DTYPES)
    kind, layouts = chance.choice(kinds_of_scores(dtype)), chance.sample(list(LAYOUTS), 2)
    print(shape, layouts, dtype, kind)
    x, grad = (LAYOUTS[layout](torch.rand(shape).to(dtype)) for layout in layouts)
    check(scale_channels_op, scale_channels_backward_op, x, torch.randn(shape[1]).to(kind), [grad])


@pytest.mark.skipif(not has_cpp, reason="built without C++")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
def test_instruction_sets(instruction_set, dtype):
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(instruction_set)
    try:
        for layout in ("contiguous", "channels_last"):
            x, grad = (LAYOUTS[layout](torch.rand(3, 37, 19, 21).to(dtype)) for _ in range(2))
            check(scale_channels_op, scale_channels_backward_op, x, torch.randn(37), [grad])
    finally:
        compiled.use_instruction_set(best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, layout, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = torch.randn(2, 20, 9, 11).to(dtype)
    x[0, 3, 8, 10] = math.nan
    x[0, 5, 4, 4] = math.inf
    x[1, 6, 0, 0] = -math.inf
    x = LAYOUTS[layout](x)
    s = torch.randn(20).abs() + 0.5
    s[6], s[7], s[8], s[9] = 0, math.nan, math.inf, -0.0
    y = op(x, s)
    assert torch.equal(y.isnan(), (x.double() * per_channel(s, x)).isnan())
    assert torch.equal(y.isinf(), (x.double() * per_channel(s, x)).isinf())
    assert y[1, 6, 0, 0].isnan()  # 0 · inf
    assert torch.equal(y[1, 9].signbit(), ~x[1, 9].signbit())
    grad_x, grad_s = backward(torch.ones_like(x), x, s)
    assert torch.equal(grad_x.isnan(), per_channel(s, x).isnan())
    assert torch.equal(grad_x.isinf(), per_channel(s, x).isinf())
    assert grad_s.isnan().nonzero().tolist() == [[3]]
    assert grad_s[5] == math.inf
    assert grad_s[6] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_product_is_rounded_once(dtype):
    """As PyTorch rounds it to nearest, ties to even: every half times a few scores that no half can represent."""
    x = torch.arange(65536).to(torch.uint16).view(dtype).reshape(4, 16, 32, 32)
    s = torch.randn(16)
    expected = (x.float() * s.view(-1, 1, 1)).to(dtype)
    for layout in ("contiguous", "channels_last"):
        y = scale_channels_op(LAYOUTS[layout](x), s)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_sliced", "sliced"])
def test_the_sum_over_many_elements_keeps_its_precision(layout):
    """A million numbers of one sign, where one running sum in float32 would be off by 1e-3, and of both signs."""
    x = LAYOUTS[layout](torch.rand(16, 3, 250, 250) + 0.5)
    s = torch.rand(3)
    ones = torch.ones(()).expand_as(x)
    grad_s = scale_channels_backward_op(ones, x, s)[1]
    torch.testing.assert_close(grad_s.double(), x.double().sum((0, 2, 3)), rtol=1e-6, atol=0)
    signs = torch.randn(x.shape).sign()
    grad_s = scale_channels_backward_op(signs, x, s)[1]
    expected = (signs.double() * x.double()).sum((0, 2, 3))
    torch.testing.assert_close(grad_s.double(), expected, rtol=0, atol=1e-7 * x[:, 0].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_left_as_they_are(layout):
    x, grad, s = LAYOUTS[layout](torch.randn(3, 20, 5, 7)), torch.randn(()).expand(3, 20, 5, 7), torch.randn(20)
    copies = x.clone(), grad.clone(), s.clone()
    scale_channels_op(x, s)
    scale_channels_backward_op(grad, x, s)
    for now, before in zip((x, grad, s), copies, strict=True):
        assert torch.equal(now, before)


def test_public_function():
    x, s = torch.randn(4, 6, 5, 7), torch.randn(6)
    assert torch.equal(scale_channels(x, s), x * s[:, None, None])
    assert scale_channels(x.bfloat16(), s).dtype == torch.bfloat16
    assert torch.equal(scale_channels(x[:, :, 0, 0], s), x[:, :, 0, 0] * s)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, r"x is a list; it must be a tensor", {"x": [1.0]}),
        (TypeError, r"x has dtype torch\.int64; it must be float16", {"x": torch.ones(2, 3, dtype=torch.int64)}),
        (ValueError, r"x has shape \(3,\); it must have at least two dimensions", {"x": torch.ones(3)}),
        (TypeError, r"s is a float; it must be a tensor", {"s": 0.5}),
        (TypeError, r"s has dtype torch\.int64; it must be float32, float64 or", {"s": torch.ones(3).long()}),
        (TypeError, r"s has dtype torch\.float16; .* the dtype of x, torch\.float32", {"s": torch.ones(3).half()}),
        (ValueError, r"s has shape \(4,\); .* one score per channel of x, \(3,\)", {"s": torch.ones(4)}),
        (ValueError, r"s has shape \(3, 1\); .* \(3,\)", {"s": torch.ones(3, 1)}),
        (ValueError, r"s is on meta; it must be on the device of x, cpu", {"s": torch.ones(3, device="meta")}),
    ],
)
def test_bad_arguments(error, words, changed):
    with pytest.raises(error, match=words):
        scale_channels(**{"x": torch.ones(2, 3, 4, 4), "s": torch.ones(3), **changed})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("learned", [(True, True), (True, False), (False, True)])
def test_opcheck(layout, learned):
    x, s = LAYOUTS[layout](torch.randn(2, 3, 4, 5)), torch.randn(3)
    inputs = (x.clone().requires_grad_(learned[0]), s.clone().requires_grad_(learned[1]))
    torch.library.opcheck(scale_channels_op, inputs)
    torch.library.opcheck(scale_channels_op, (x, s))
    torch.library.opcheck(scale_channels_backward_op, (torch.randn(2, 3, 4, 5), x, torch.randn(6)[::2]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("learned", [(True, True), (True, False), (False, True)])
def test_gradcheck(layout, learned):
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 3, dtype=torch.float64)).requires_grad_(learned[0])
    s = torch.randn(3, dtype=torch.float64, requires_grad=learned[1])
    torch.autograd.gradcheck(scale_channels, (x, s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_dtypes_of_their_inputs(dtype):
    x = torch.rand(2, 3, 4, 4).to(dtype).requires_grad_()
    s = torch.rand(3, requires_grad=True)
    scale_channels(x, s).sum().backward()
    assert x.grad.dtype == dtype
    assert_close(s.grad, x.double().sum((0, 2, 3)), torch.float32)


@pytest.mark.skipif(not has_cpp, reason="PyTorch's own kernels cut their work by the number of threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_run_and_for_every_number_of_threads(layout):
    threads = torch.get_num_threads()
    try:
        for shape in [(3, 70, 21, 37), (1, 2, 150, 500), (40, 16, 16, 16)]:
            x, s = LAYOUTS[layout](torch.randn(shape)), torch.randn(shape[1])
            grad = torch.randn(shape)
            results = []
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                results.append((scale_channels_op(x, s), *scale_channels_backward_op(grad, x, s)))
            for result in results[1:]:
                for one, other in zip(results[0], result, strict=True):
                    assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def test_a_second_gradient_is_refused():
    x, s = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scale_channels(x, s).square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
