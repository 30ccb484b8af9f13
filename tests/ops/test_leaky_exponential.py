"""leaky_exponential: the score, its l1 term and their gradient against float64, in every layout, dtype and size."""

import math

import pytest
import torch

from paamops.ops.leaky_exponential import (
    leaky_exponential,
    leaky_exponential_backward_op,
    leaky_exponential_backward_reference,
    leaky_exponential_op,
    leaky_exponential_reference,
)
from paamops.ops.registration import build_info, compiled
from tests.ops.test_instruction_sets import SETS
from tests.tolerances import TOLERANCE, accumulator, assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SLOPES = [0.01, 1.0, 3.7]
IMPLEMENTATIONS = {
    "kernel": (leaky_exponential_op, leaky_exponential_backward_op),
    "reference": (leaky_exponential_reference, leaky_exponential_backward_reference),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim else x,
    "strided": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
    "misaligned": lambda x: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand_as(x) if x.ndim else x,
}
SHAPES = [(), (1,), (15,), (16,), (17,), (4095,), (4097,), (30_011,), (3, 5, 7, 9), (70, 1, 130), (0,), (2, 0, 4)]


def oracle(x, slope):
    """The score in float64, written so that its gradient flows through one branch only."""
    return torch.where(x <= 0, x.clamp_max(0).exp(), 1 + slope * x)


def check(op, backward, formula, x, parameter):
    """Score, l1 and gradient of an op, whose grad_score comes in three layouts."""
    exact = x.detach().double().requires_grad_()
    expected = formula(exact, parameter)
    score, l1 = op(x, parameter)
    assert score.dtype == x.dtype
    assert score.stride() == torch.empty_like(x).stride()
    assert_close(score, expected, x.dtype)
    assert l1.shape == ()
    assert l1.dtype == accumulator(x.dtype)
    assert_close(l1, expected.abs().sum(), l1.dtype)

    grad_l1 = torch.randn((), dtype=l1.dtype)
    grads = torch.randn(x.shape).to(x.dtype)
    for grad in (grads, LAYOUTS["strided"](grads), LAYOUTS["transposed"](grads), grads.new_ones(()).expand_as(grads)):
        upper = grad.double() + grad_l1.double() * expected.sign()
        (wanted,) = torch.autograd.grad(expected, exact, upper.detach(), retain_graph=True)
        actual = backward(grad, grad_l1, x, parameter)
        assert actual.dtype == x.dtype
        assert actual.stride() == torch.empty_like(x).stride()
        assert_close(actual, wanted, x.dtype)


def check_same_bits(op, backward, parameter):
    """Every run and every number of threads gives the same bits: enough elements for several threads."""
    threads = torch.get_num_threads()
    try:
        for x in (torch.randn(300_001), LAYOUTS["transposed"](torch.randn(50, 3000)), torch.randn(30_000).bfloat16()):
            grad, grad_l1 = torch.randn(x.shape).to(x.dtype), torch.randn(())
            results = []
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                results.append((*op(x, parameter), backward(grad, grad_l1, x, parameter)))
            for result in results[1:]:
                for one, other in zip(results[0], result, strict=True):
                    assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def check_gradients(function, formula, parameter):
    """gradcheck of both results; and the gradient where only one of them is used."""
    x = torch.randn(3, 7, dtype=torch.float64)
    x = torch.where(x.abs() < 1e-3, 1.0, x).requires_grad_()  # not at the kink
    torch.autograd.gradcheck(lambda x: function(x, parameter, l1=True), (x,))
    torch.autograd.gradcheck(lambda x: function(x, parameter), (x,))
    (actual,) = torch.autograd.grad(function(x, parameter, l1=True)[1], x)
    (expected,) = torch.autograd.grad(formula(x, parameter).sum(), x)
    assert_close(actual, expected, torch.float64)


def check_second_gradient_is_refused(function):
    x = torch.randn(5, requires_grad=True)
    score, l1 = function(x, 0.5, l1=True)
    (grad,) = torch.autograd.grad(score.square().sum() + l1, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def units(actual, expected):
    """The greatest distance of float32 numbers from float64 ones, in units of the last place of the latter."""
    nearest = expected.float().abs()
    unit = (torch.nextafter(nearest, torch.tensor(math.inf)).double() - nearest.double()).clamp_min(2.0**-149)
    return ((actual.double() - expected).abs() / unit).max().item()


def arguments(dtype):
    """Numbers <= 0 of every magnitude, down to where e^x is 0, with the ends of the exponent's range among them."""
    ends = torch.tensor([0.0, -0.0, -1e-45, -1e-38, -87.3, -88.0, -103.9, -103.98, -104.0, -105.0, -1e30, -3e38])
    return torch.cat([-torch.rand(200_000) * 105, -torch.logspace(-40, 2, 50_000, dtype=torch.float64), ends]).to(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation):
    for shape in SHAPES:
        print(shape)
        check(*IMPLEMENTATIONS[implementation], oracle, LAYOUTS[layout](torch.randn(shape)), 0.01)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, slope, implementation):
    for scale in (1e-3, 1, 5):
        for layout in ("contiguous", "strided"):
            x = LAYOUTS[layout]((torch.randn(3, 701) * scale).to(dtype))
            check(*IMPLEMENTATIONS[implementation], oracle, x, slope)


@pytest.mark.skipif(compiled is None, reason="built without C++")
@pytest.mark.parametrize("instruction_set", SETS)
def test_the_exponential_is_within_two_units_of_the_last_place(instruction_set):
    best = compiled.build_facts()["instruction_set"]
    x = arguments(torch.float32)
    compiled.use_instruction_set(instruction_set)
    try:
        assert units(leaky_exponential_op(x, 0.01)[0], x.double().exp()) <= 2
        grad = leaky_exponential_backward_op(torch.ones_like(x), torch.zeros(()), x, 0.01)
        assert units(grad, x.double().exp()) <= 2
    finally:
        compiled.use_instruction_set(best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16], ids=str)
def test_every_half(bits, implementation):
    """Each of the 65,536 numbers there are, infinities and NaN among them."""
    op, backward = IMPLEMENTATIONS[implementation]
    x = torch.arange(65536).to(torch.uint16).view(bits)
    score = op(x, 0.01)[0]
    limit = torch.finfo(bits).max
    assert_close(score.clamp(max=limit), oracle(x.double(), 0.01).clamp(max=limit), bits)
    assert torch.equal(score.isnan(), x.isnan())
    grad = backward(torch.ones_like(x), torch.zeros(()), x, 0.01)
    assert_close(grad, torch.where(x > 0, 0.01, x.double().exp()), bits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan], dtype=dtype)
    one = torch.ones((), dtype=accumulator(dtype))
    score, l1 = op(x, 0.5)
    assert score.tolist()[:4] == [1, 1, math.inf, 0]
    assert score[4:].isnan().all()
    assert l1.isnan()
    assert op(x[:4], 0.5)[1] == math.inf
    assert op(x[[0, 1, 3]], 0.5)[1] == 2
    grad = backward(torch.ones_like(x), one, x, 0.5)
    assert grad.tolist()[:4] == [2, 2, 1, 0]
    assert grad[4:].isnan().all()
    inf = torch.full_like(x, math.inf)
    assert backward(inf, one, x, 0.5)[:3].tolist() == [math.inf] * 3


def test_the_gradient_vanishes_nowhere():
    x = torch.cat([torch.linspace(-80, 80, 10_001), torch.logspace(-30, 38, 1000)]).requires_grad_()
    (grad,) = torch.autograd.grad(leaky_exponential(x).sum(), x)
    assert (grad > 0).all()
    assert leaky_exponential(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_sum_is_that_of_unrounded_scores(implementation):
    x = torch.full((20_000,), -0.2, dtype=torch.bfloat16)
    l1 = IMPLEMENTATIONS[implementation][0](x, 0.01)[1]
    assert_close(l1, 20_000 * x[0].double().exp(), torch.float32)
    rounded = IMPLEMENTATIONS[implementation][0](x, 0.01)[0].double().sum()
    assert abs(rounded / l1.double() - 1) > 10 * TOLERANCE[torch.float32]["rtol"], "the test must tell them apart"


def test_public_function():
    x = torch.randn(100)
    score, l1 = leaky_exponential(x, 0.2, l1=True)
    assert torch.equal(leaky_exponential(x, 0.2), score)
    assert_close(score, oracle(x.double(), 0.2), torch.float32)
    assert_close(l1, oracle(x.double(), 0.2).sum(), torch.float32)
    assert_close(leaky_exponential(x), oracle(x.double(), 0.1), torch.float32)
    assert leaky_exponential(x.double(), 1e-60).max() >= 1  # too small for float32 only


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, r"x is a list; it must be a tensor", {"x": [1.0]}),
        (TypeError, r"x has dtype torch\.int64; it must be float16", {"x": torch.ones(3, dtype=torch.int64)}),
        (TypeError, r"slope is a str; it must be a number", {"slope": "steep"}),
        (TypeError, r"slope is a bool; it must be a number", {"slope": True}),
        (ValueError, r"slope is 0; it must be finite and > 0", {"slope": 0}),
        (ValueError, r"slope is -0\.5; it must be finite and > 0", {"slope": -0.5}),
        (ValueError, r"slope is nan; it must be finite and > 0", {"slope": math.nan}),
        (ValueError, r"slope is inf; it must be finite and > 0", {"slope": math.inf}),
        (ValueError, r"slope is 1e-60; it must be finite and > 0 as a float32", {"slope": 1e-60}),
    ],
)
def test_bad_arguments(error, words, changed):
    with pytest.raises(error, match=words):
        leaky_exponential(**{"x": torch.ones(3), **changed})


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_opcheck(layout):
    x = LAYOUTS[layout](torch.randn(3, 4, 5))
    torch.library.opcheck(leaky_exponential_op, (x.clone().requires_grad_(), 0.01))
    torch.library.opcheck(leaky_exponential_op, (x, 0.01))
    torch.library.opcheck(leaky_exponential_backward_op, (torch.randn(3, 4, 5), torch.randn(()), x, 0.01))


@pytest.mark.parametrize("slope", SLOPES)
def test_gradients(slope):
    check_gradients(leaky_exponential, oracle, slope)


@pytest.mark.skipif(
    build_info()["kernels"]["leaky_exponential"]["cpu"] != "C++",
    reason="PyTorch's own kernels cut their work by the number of threads",
)
def test_same_bits_in_every_run_and_for_every_number_of_threads():
    check_same_bits(leaky_exponential_op, leaky_exponential_backward_op, 0.01)


def test_a_second_gradient_is_refused():
    check_second_gradient_is_refused(leaky_exponential)
