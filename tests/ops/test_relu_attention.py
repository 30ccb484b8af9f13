"""relu_attention: y, its attention and their gradient against float64, in every layout, dtype and size."""

import math
import random

import pytest
import torch

from paamops.ops.activation_attention import activation_attention
from paamops.ops.relu_attention import (
    relu_attention,
    relu_attention_backward_op,
    relu_attention_backward_reference,
    relu_attention_op,
    relu_attention_reference,
)
from tests.ops.test_activation_attention import DTYPES, LAYOUTS, POWERS, SHAPES, has_cpp, oracle
from tests.tolerances import accumulator, assert_close

IMPLEMENTATIONS = {
    "kernel": (relu_attention_op, relu_attention_backward_op),
    "reference": (relu_attention_reference, relu_attention_backward_reference),
}


def check(op, backward, x, p):
    """Forward and backward of the op, whose grad_y comes in y's layout and as one expanded number."""
    y, total, peak = op(x, p)
    assert y.dtype == x.dtype
    assert y.stride() == torch.empty_like(x).stride()
    assert_close(y, x.double().clamp_min(0), torch.float64)
    for actual, expected in zip((total, peak), oracle(x.double().clamp_min(0), p), strict=True):
        assert actual.shape == x.shape[:2]
        assert actual.dtype == accumulator(x.dtype)
        assert_close(actual, expected.to(actual.dtype), actual.dtype)

    grads = [torch.rand(x.shape[:2]).to(actual.dtype) for _ in range(2)]  # all positive: no cancellation
    for grad_y in (torch.rand_like(y), torch.rand(()).to(y.dtype).expand_as(y)):
        exact = x.detach().double().requires_grad_()
        outputs = (exact.relu(), *oracle(exact.relu(), p))
        (expected,) = torch.autograd.grad(outputs, exact, [grad_y.double(), *(g.double() for g in grads)])
        actual = backward(grad_y, *grads, y, peak, p)
        assert actual.dtype == x.dtype
        assert actual.stride() == torch.empty_like(y).stride()
        assert_close(actual, expected, x.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation):
    for shape in SHAPES if implementation == "kernel" else SHAPES[:3] + SHAPES[-8:]:
        print(shape)
        check(*IMPLEMENTATIONS[implementation], LAYOUTS[layout](torch.randn(shape)), 1.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, p, implementation):
    for layout in ("contiguous", "channels_last", "strided"):
        for shape in [(2, 40, 11, 13), (2, 3, 2, 3), (1, 64, 30, 30)]:
            check(*IMPLEMENTATIONS[implementation], LAYOUTS[layout](torch.randn(shape).to(dtype)), p)


@pytest.mark.parametrize("repeat", range(20))
def test_random_shapes(repeat, seed):
    chance = random.Random(f"{seed} {repeat}")
    shape = [chance.choice([1, 2, 3, 5, 8, 16, 17, 31, 33]) for _ in range(chance.randint(2, 5))]
    while math.prod(shape) > 200_000:
        shape[chance.randrange(len(shape))] = 1
    layout, dtype, p = chance.choice(list(LAYOUTS)), chance.choice(DTYPES), chance.choice(POWERS)
    print(shape, layout, dtype, p)
    check(relu_attention_op, relu_attention_backward_op, LAYOUTS[layout](torch.randn(shape).to(dtype)), p)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, layout, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = torch.randn(2, 20, 9, 11).to(dtype)
    x[0, 3, 8, 10] = math.nan
    x[0, 4, 0, 0] = -math.nan
    x[0, 5, 4, 4] = math.inf
    x[1, 6] = -math.inf
    x[1, 7] = -0.0
    x = LAYOUTS[layout](x)
    for p in POWERS:
        y, total, peak = op(x, p)
        assert torch.equal(y.nan_to_num(7), torch.relu(x).nan_to_num(7))
        assert y.isnan().sum() == 2
        for value in (total, peak):
            assert value[0, 3].isnan()
            assert value[0, 4].isnan()
            assert value[0, 5] == math.inf
            assert value[1, 6] == value[1, 7] == 0
    y, _, peak = op(x, 1.0)
    grad = backward(torch.ones_like(y), torch.ones_like(peak), torch.zeros_like(peak), y, peak, 1.0)
    assert torch.equal(grad, torch.where(x > 0, 2.0, x.isnan().double()).to(dtype))  # ReLU's gradient at NaN is 1


@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_comes_through_unchanged(bits):
    x = torch.arange(65536).to(torch.uint16).view(bits).reshape(4, 4, 64, 64)
    y = relu_attention_op(x, 1.0)[0]
    assert torch.equal(y.nan_to_num(7, 8, 9), torch.relu(x).nan_to_num(7, 8, 9))


@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_rounded_to_nearest_even(bits):
    """Sums of two halves, with ties, subnormals and overflow among them, rounded as PyTorch rounds."""
    upper = (torch.arange(65536).to(torch.uint16).view(bits)).reshape(1, 1, -1)
    for weight in (1.0, 2**-12, 2**-9, 2**-25, 1 + 2**-11, 40000.0):
        y = torch.ones_like(upper)
        grad = relu_attention_backward_op(
            upper, torch.full((1, 1), weight), torch.zeros(1, 1), y, torch.ones(1, 1), 1.0
        )
        assert torch.equal(grad.nan_to_num(7, 8, 9), (upper.float() + weight).to(bits).nan_to_num(7, 8, 9))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed_space", "strided"])
@pytest.mark.parametrize("p", POWERS)
def test_the_first_maximum_has_the_gradient(p, layout, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = -torch.rand(2, 20, 30, 40)
    first = torch.randint(0, 600, (2, 20, 1))
    maps = x.view(2, 20, -1)
    maps.scatter_(2, first, 2.0)
    maps.scatter_(2, first + torch.randint(1, 600, (2, 20, 1)), 2.0)
    maps[0, 0] = -1
    x = LAYOUTS[layout](x)
    y, _, peak = op(x, p)
    grad = backward(torch.zeros_like(y), torch.zeros(2, 20), torch.ones(2, 20), y, peak, p).reshape(2, 20, -1)
    expected = torch.zeros_like(grad).scatter_(2, first, p * 2.0 ** (p - 1))
    expected[0, 0] = 0
    assert_close(grad, expected, torch.float32)


@pytest.mark.parametrize("per_image", [False, True])
def test_public_function(per_image):
    x = torch.randn(4, 6, 5, 7)
    y, attention = relu_attention(x, 2, ("max", "mean"), per_image)
    assert torch.equal(y, torch.relu(x))
    exact = activation_attention(y.double(), 2, ("max", "mean"), per_image)
    for actual, expected in zip(attention, exact, strict=True):
        assert_close(actual, expected, torch.float32)
    assert relu_attention(x)[1].shape == (6,)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, r"x has dtype torch\.int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
        (ValueError, r"x has shape \(3,\); it must have at least two dimensions", {"x": torch.ones(3)}),
        (ValueError, r"x has shape \(0, 3, 2, 2\): no images", {"x": torch.ones(0, 3, 2, 2)}),
        (ValueError, r"p is 0\.5; it must be finite and at least 1", {"p": 0.5}),
        (ValueError, r"p is nan; it must be", {"p": math.nan}),
        (ValueError, r"reduction is 'median'; it must be one of", {"reduction": "median"}),
    ],
)
def test_bad_arguments(error, words, arguments):
    with pytest.raises(error, match=words):
        relu_attention(**{"x": torch.ones(2, 3, 4, 4), **arguments})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout):
    p = 2.5
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5))
    torch.library.opcheck(relu_attention_op, (x.clone().requires_grad_(), p))
    torch.library.opcheck(relu_attention_op, (x, p))
    y, total, peak = relu_attention_op(x, p)
    torch.library.opcheck(relu_attention_backward_op, (torch.randn_like(y), total, peak, y, peak, p))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("p", POWERS)
def test_gradcheck(p, layout):
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    x = LAYOUTS[layout](torch.where(x.abs() < 1e-3, 1.0, x)).requires_grad_()  # not at the kink

    def outputs(x):
        y, attention = relu_attention(x, p, ("mean", "max", "sum"))
        return y, *attention

    torch.autograd.gradcheck(outputs, (x,))


@pytest.mark.skipif(not has_cpp, reason="PyTorch's own kernels cut their work by the number of threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_run_and_for_every_number_of_threads(layout):
    threads = torch.get_num_threads()
    try:
        for shape in [(3, 70, 21, 37), (1, 2, 150, 500)]:
            x = LAYOUTS[layout](torch.randn(shape))
            grads = torch.randn(2, *shape[:2])
            results = []
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                y, total, peak = relu_attention_op(x, 2.5)
                results.append((y, total, peak, relu_attention_backward_op(y, *grads, y, peak, 2.5)))
            for result in results[1:]:
                for one, other in zip(results[0], result, strict=True):
                    assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def test_a_second_gradient_is_refused():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(relu_attention(x, 3)[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()
