"""tempered_sigmoid: the score, its l1 term and their gradient against float64, in every layout, dtype and size."""

import math

import pytest
import torch

from paamops.ops.registration import build_info, compiled
from paamops.ops.tempered_sigmoid import (
    tempered_sigmoid,
    tempered_sigmoid_backward_op,
    tempered_sigmoid_backward_reference,
    tempered_sigmoid_op,
    tempered_sigmoid_reference,
)
from tests.ops.test_instruction_sets import SETS
from tests.ops.test_leaky_exponential import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    arguments,
    check,
    check_gradients,
    check_same_bits,
    check_second_gradient_is_refused,
    units,
)
from tests.tolerances import accumulator, assert_close

TEMPERATURES = [1.0, 0.05, 7.0]
IMPLEMENTATIONS = {
    "kernel": (tempered_sigmoid_op, tempered_sigmoid_backward_op),
    "reference": (tempered_sigmoid_reference, tempered_sigmoid_backward_reference),
}


def oracle(x, temperature):
    """The score in float64, by another function than the reference."""
    return 0.5 + 0.5 * torch.tanh(x / temperature / 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation):
    for shape in SHAPES:
        print(shape)
        check(*IMPLEMENTATIONS[implementation], oracle, LAYOUTS[layout](torch.randn(shape)), 0.5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, temperature, implementation):
    for scale in (1e-3, 1, 5):
        for layout in ("contiguous", "strided"):
            x = LAYOUTS[layout]((torch.randn(3, 701) * scale).to(dtype))
            check(*IMPLEMENTATIONS[implementation], oracle, x, temperature)


@pytest.mark.skipif(compiled is None, reason="built without C++")
@pytest.mark.parametrize("instruction_set", SETS)
def test_both_tails_keep_their_precision(instruction_set):
    """Within a few units of the last place, the gradient too, where 1 - score would have none left."""
    best = compiled.build_facts()["instruction_set"]
    x = torch.cat([arguments(torch.float32), -arguments(torch.float32)])
    e = -x.double().abs()
    compiled.use_instruction_set(instruction_set)
    try:
        assert units(tempered_sigmoid_op(x, 1.0)[0], x.double().sigmoid()) <= 3
        grad = tempered_sigmoid_backward_op(torch.ones_like(x), torch.zeros(()), x, 1.0)
        assert units(grad, e.exp() / (1 + e.exp()) ** 2) <= 5
    finally:
        compiled.use_instruction_set(best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16], ids=str)
def test_every_half(bits, implementation):
    """Each of the 65,536 numbers there are, infinities and NaN among them."""
    op, backward = IMPLEMENTATIONS[implementation]
    x = torch.arange(65536).to(torch.uint16).view(bits)
    score = op(x, 0.3)[0]
    assert_close(score, oracle(x.double(), 0.3), bits)
    assert torch.equal(score.isnan(), x.isnan())
    wide = x.double() / 0.3
    grad = backward(torch.ones_like(x), torch.zeros(()), x, 0.3)
    assert_close(grad, wide.sigmoid() * (-wide).sigmoid() / 0.3, bits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan], dtype=dtype)
    one = torch.ones((), dtype=accumulator(dtype))
    score, l1 = op(x, 0.5)
    assert score.tolist()[:4] == [0.5, 0.5, 1, 0]
    assert score[4:].isnan().all()
    assert l1.isnan()
    assert op(x[:4], 0.5)[1] == 2
    grad = backward(torch.ones_like(x), one, x, 0.5)
    assert grad.tolist()[:4] == [1, 1, 0, 0]
    assert grad[4:].isnan().all()


def test_a_steep_sigmoid_overflows_to_its_limits():
    x = torch.tensor([3e38, -3e38, 0.0])
    assert tempered_sigmoid(x, 1e-30).tolist() == [1, 0, 0.5]


def test_public_function():
    x = torch.randn(100)
    score, l1 = tempered_sigmoid(x, 0.2, l1=True)
    assert torch.equal(tempered_sigmoid(x, 0.2), score)
    assert_close(score, oracle(x.double(), 0.2), torch.float32)
    assert_close(l1, oracle(x.double(), 0.2).sum(), torch.float32)
    assert_close(tempered_sigmoid(x), torch.sigmoid(x.double()), torch.float32)


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, r"x is a list; it must be a tensor", {"x": [1.0]}),
        (TypeError, r"x has dtype torch\.int64; it must be float16", {"x": torch.ones(3, dtype=torch.int64)}),
        (TypeError, r"temperature is a str; it must be a number", {"temperature": "hot"}),
        (ValueError, r"temperature is 0; it must be finite and > 0", {"temperature": 0}),
        (ValueError, r"temperature is -1\.0; it must be finite and > 0", {"temperature": -1.0}),
        (ValueError, r"temperature is nan; it must be finite and > 0", {"temperature": math.nan}),
        (ValueError, r"temperature is inf; it must be finite and > 0", {"temperature": math.inf}),
        (ValueError, r"temperature is 1e\+60; it must be finite and > 0 as a float32", {"temperature": 1e60}),
    ],
)
def test_bad_arguments(error, words, changed):
    with pytest.raises(error, match=words):
        tempered_sigmoid(**{"x": torch.ones(3), **changed})


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_opcheck(layout):
    x = LAYOUTS[layout](torch.randn(3, 4, 5))
    torch.library.opcheck(tempered_sigmoid_op, (x.clone().requires_grad_(), 0.5))
    torch.library.opcheck(tempered_sigmoid_op, (x, 0.5))
    torch.library.opcheck(tempered_sigmoid_backward_op, (torch.randn(3, 4, 5), torch.randn(()), x, 0.5))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients(temperature):
    check_gradients(tempered_sigmoid, oracle, temperature)


@pytest.mark.skipif(
    build_info()["kernels"]["tempered_sigmoid"]["cpu"] != "C++",
    reason="PyTorch's own kernels cut their work by the number of threads",
)
def test_same_bits_in_every_run_and_for_every_number_of_threads():
    check_same_bits(tempered_sigmoid_op, tempered_sigmoid_backward_op, 0.3)


def test_a_second_gradient_is_refused():
    check_second_gradient_is_refused(tempered_sigmoid)
