"""activation_attention: the kernel and the reference against float64, in every layout, dtype and size."""

import math
import random
import resource

import pytest
import torch

from paamops.ops.activation_attention import (
    activation_attention,
    activation_attention_backward_op,
    activation_attention_backward_reference,
    activation_attention_op,
    activation_attention_reference,
)
from paamops.ops.registration import build_info
from tests.tolerances import accumulator, assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
POWERS = [1.0, 2.0, 1.5, 3.7]
IMPLEMENTATIONS = {
    "kernel": (activation_attention_op, activation_attention_backward_op),
    "reference": (activation_attention_reference, activation_attention_backward_reference),
}
has_cpp = build_info()["kernels"]["activation_attention"]["cpu"] == "C++"


def channels_last(x):
    """Channels innermost, whatever the number of spatial axes."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x):
    """The same values as every second channel, and all but the first row, of a larger tensor."""
    n, c, *space = x.shape
    larger = x.new_full((n, 2 * c, *(size + 1 for size in space)), math.nan)
    view = larger[(slice(None), slice(None, None, 2), *(slice(1, None) for _ in space))]
    view.copy_(x)
    return view


def sliced_last(x):
    """Channels innermost, inside a larger image of more channels."""
    n, c, *space = x.shape
    larger = x.new_full((n, *(size + 1 for size in space), c + 2), math.nan)
    view = larger[(slice(None), *(slice(1, None) for _ in space), slice(1, -1))].movedim(-1, 1)
    return view.copy_(x)


def strided(x):
    """The same values as every second element along the last axis."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]


def expanded(x):
    """One image, repeated over the batch, and one column, repeated over the last axis of space."""
    x = x[:1].expand_as(x)
    return x[..., :1].expand_as(x) if x.ndim > 2 else x


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "sliced": sliced,
    "channels_last_sliced": sliced_last,
    "strided": strided,
    "expanded": expanded,
    "transposed_space": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "images_innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "space_outermost": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}
SHAPES = [
    (3, 5, 7, 9),
    (2, 64, 8, 8),
    (2, 100, 3, 3),
    (4, 3, 33, 17),
    (5, 6, 70),
    (1, 1, 100_001),
    (1, 2, 150, 400),
    (7, 130),
    (300, 1),
    (2, 2000, 5),
    (2, 3, 4, 5, 6),
    (1, 16, 3, 20, 30),
    (2, 3, 1, 1, 1),
    (1, 1, 1),
    (0, 3, 4, 4),
    (2, 0, 4, 4),
    (2, 3, 0, 4),
    (2, 3, 4, 0),
    (0, 0),
]


def oracle(x, p):
    """Sum and max in float64, written with other operations than the reference: gradients flow through both."""
    magnitude = x.double().abs()
    space = tuple(range(2, x.ndim))
    if not space:
        return magnitude**p, magnitude**p
    flat = magnitude.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    if flat.numel() == 0:
        return magnitude.sum(space), magnitude.sum(space)
    return (magnitude**p).sum(space), flat.gather(-1, flat.argmax(-1, keepdim=True)).squeeze(-1) ** p


def check_forward(op, x, p):
    for actual, expected in zip(op(x, p), oracle(x, p), strict=True):
        assert actual.shape == x.shape[:2]
        assert actual.dtype == accumulator(x.dtype)
        assert_close(actual, expected.to(actual.dtype), actual.dtype)  # beyond the greatest float lies infinity


def check_backward(op, backward, x, p):
    sign = torch.randn(x.shape[:2]).sign()  # one for both: a sum that cancels would magnify its rounding
    grads = [(torch.rand(x.shape[:2]) * sign).to(accumulator(x.dtype)) for _ in range(2)]
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(oracle(exact, p), exact, [g.double() for g in grads])
    actual = backward(*grads, x, op(x, p)[1], p)
    assert actual.dtype == x.dtype
    assert actual.stride() == torch.empty_like(x).stride()
    assert_close(actual, expected, x.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    for shape in SHAPES:
        print(shape)
        x = LAYOUTS[layout](torch.randn(shape))
        for p in (1.0, 2.5) if implementation == "kernel" else (2.5,):
            check_forward(op, x, p)
            check_backward(op, backward, x, p)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, p, layout, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    for shape in [(2, 40, 11, 13), (2, 3, 2, 3), (1, 64, 40, 40)]:
        x = LAYOUTS[layout](torch.randn(shape).to(dtype))
        check_forward(op, x, p)
        check_backward(op, backward, x, p)


@pytest.mark.parametrize("repeat", range(40))
def test_random_shapes(repeat, seed):
    chance = random.Random(f"{seed} {repeat}")
    shape = [chance.choice([1, 2, 3, 5, 8, 16, 17, 31, 33]) for _ in range(chance.randint(2, 5))]
    while math.prod(shape) > 500_000:
        shape[chance.randrange(len(shape))] = 1
    layout = chance.choice(list(LAYOUTS))
    dtype, p = chance.choice(DTYPES), chance.choice(POWERS)
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    print(shape, layout, dtype, p)
    check_forward(activation_attention_op, x, p)
    check_backward(activation_attention_op, activation_attention_backward_op, x, p)


@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16], ids=str)
def test_every_half(bits):
    """Each of the 65,536 values, subnormals, infinities and NaNs among them, is a channel of its own."""
    x = torch.arange(65536).to(torch.uint16).view(bits).reshape(1, -1, 1)
    for layout in (x, x.expand(1, -1, 40).contiguous()):
        expected = layout.abs().double().amax(-1)
        total, peak = activation_attention_op(layout, 1.0)
        assert_close(peak, expected, torch.float64)
        assert_close(total, (expected * layout.shape[-1]).float(), torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("p", [1.5, 3.7])
def test_power_over_its_range(p, layout):
    """Every magnitude from the least subnormal to the greatest float, where the power over- and underflows too."""
    x = (torch.rand(1, 20_000, 1) * 2**32).to(torch.int64).to(torch.uint32).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-45, 1.0, math.inf, -math.inf, math.nan]).view(1, -1, 1)], 1)
    check_forward(activation_attention_op, LAYOUTS[layout](x), p)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "images_innermost"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, layout, implementation):
    op, _ = IMPLEMENTATIONS[implementation]
    x = torch.randn(2, 20, 9, 11).to(dtype)
    x[0, 3, 8, 10] = math.nan
    x[0, 4, 0, 0] = -math.nan
    x[0, 5, 4, 4] = math.inf
    x[1, 6, 8, 3] = -math.inf
    x[1, 7] = -0.0
    x = LAYOUTS[layout](x)
    for p in POWERS:
        check_forward(op, x, p)
        total, peak = op(x, p)
        assert total[0, 3].isnan()
        assert peak[0, 4].isnan()
        assert peak[1, 6] == math.inf
        assert total[1, 7] == peak[1, 7] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed_space", "strided", "space_outermost"])
@pytest.mark.parametrize("p", POWERS)
def test_the_first_maximum_has_the_gradient(p, layout, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = torch.rand(2, 20, 30, 40)
    first = torch.randint(0, 600, (2, 20, 1))
    maps = x.view(2, 20, -1)
    maps.scatter_(2, first, -2.0)
    maps.scatter_(2, first + torch.randint(1, 600, (2, 20, 1)), 2.0)
    maps[0, 0] = 0
    x = LAYOUTS[layout](x)
    grad = backward(torch.zeros(2, 20), torch.ones(2, 20), x, op(x, p)[1], p).reshape(2, 20, -1)
    expected = torch.zeros_like(grad).scatter_(2, first, -p * 2.0 ** (p - 1))
    expected[0, 0] = 0
    assert_close(grad, expected, torch.float32)


def test_maxima_whose_powers_are_equal():
    """1e-30 and 2e-30 both have the square 0 in float32; the gradient still belongs to the greater."""
    x = torch.tensor([1e-30, 2e-30, 2e-30, 0.0] * 10).view(1, 1, 40)
    grad = activation_attention_backward_op(
        torch.zeros(1, 1), torch.full((1, 1), 1e30), x, activation_attention_op(x, 2.0)[1], 2.0
    )
    assert grad.flatten().nonzero().tolist() == [[1]]


def test_without_a_gradient_of_the_maximum_infinity_stays_what_it_is():
    x = torch.tensor([[[math.inf, 1.0]]])
    grad = activation_attention_backward_op(torch.ones(1, 1), torch.zeros(1, 1), x, torch.full((1, 1), math.inf), 2.0)
    assert grad.flatten().tolist() == [math.inf, 2.0]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_reductions(p, per_image):
    x = torch.randn(4, 6, 5, 7)
    powers = x.double().abs() ** p
    expected = {"mean": powers.mean((2, 3)), "max": powers.amax((2, 3)), "sum": powers.sum((2, 3))}
    if not per_image:
        expected = {name: value.mean(0) for name, value in expected.items()}
    for name, value in expected.items():
        assert_close(activation_attention(x, p, name, per_image), value, torch.float32)
    names = ("sum", "mean", "max", "sum")
    results = activation_attention(x, p, names, per_image)
    assert isinstance(results, tuple)
    for name, result in zip(names, results, strict=True):
        assert_close(result, expected[name], torch.float32)
    assert len(activation_attention(x, p, ("max",))) == 1


def test_defaults():
    x = torch.randn(4, 6, 5, 7)
    assert_close(activation_attention(x), x.double().abs().mean((0, 2, 3)), torch.float32)


def test_empty():
    assert activation_attention(torch.empty(0, 3, 4, 4), per_image=True).shape == (0, 3)
    assert activation_attention(torch.empty(2, 0, 4, 4)).shape == (0,)
    for reduction in ("mean", "max", "sum"):
        assert activation_attention(torch.empty(2, 3, 0, 4), reduction=reduction).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, r"x is a list; it must be a tensor", {"x": [1.0]}),
        (TypeError, r"x has dtype torch\.int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
        (TypeError, r"x has dtype torch\.complex64", {"x": torch.ones(2, 3, dtype=torch.complex64)}),
        (ValueError, r"x has shape \(3,\); it must have at least two dimensions", {"x": torch.ones(3)}),
        (ValueError, r"x has shape \(0, 3, 2, 2\): no images", {"x": torch.ones(0, 3, 2, 2)}),
        (ValueError, r"p is 0\.5; it must be finite and at least 1", {"p": 0.5}),
        (ValueError, r"p is nan; it must be", {"p": math.nan}),
        (ValueError, r"p is inf; it must be", {"p": math.inf}),
        (TypeError, r"p is a str; it must be a number", {"p": "1"}),
        (ValueError, r"reduction is 'median'; it must be one of", {"reduction": "median"}),
        (ValueError, r"reduction is \('max', 'min'\); it must", {"reduction": ("max", "min")}),
        (ValueError, r"reduction is \(\); it must", {"reduction": ()}),
        (ValueError, r"reduction is None; it must", {"reduction": None}),
    ],
)
def test_bad_arguments(error, words, arguments):
    with pytest.raises(error, match=words):
        activation_attention(**{"x": torch.ones(2, 3, 4, 4), **arguments})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout):
    p = 2.5
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5))
    torch.library.opcheck(activation_attention_op, (x.clone().requires_grad_(), p))
    torch.library.opcheck(activation_attention_op, (x, p))
    total, peak = activation_attention_op(x, p)
    torch.library.opcheck(activation_attention_backward_op, (total, peak, x, peak, p))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("p", POWERS)
def test_gradcheck(p, layout):
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 3, dtype=torch.float64)).requires_grad_()
    torch.autograd.gradcheck(lambda x: activation_attention(x, p, ("mean", "max", "sum")), (x,))
    torch.autograd.gradcheck(lambda x: activation_attention(x, p, "max", per_image=True), (x,))


@pytest.mark.skipif(not has_cpp, reason="PyTorch's own kernels cut their work by the number of threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_run_and_for_every_number_of_threads(layout):
    threads = torch.get_num_threads()
    try:
        for shape in [(3, 70, 21, 37), (1, 2, 150, 500), (1, 1, 150_001)]:
            x = LAYOUTS[layout](torch.randn(shape))
            grads = torch.randn(2, *shape[:2])
            for p in (1.0, 2.5):
                results = []
                for count in (1, 2, 2, 3):
                    torch.set_num_threads(count)
                    total, peak = activation_attention_op(x, p)
                    results.append((total, peak, activation_attention_backward_op(*grads, x, peak, p)))
                for result in results[1:]:
                    for one, other in zip(results[0], result, strict=True):
                        assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not has_cpp, reason="the reference makes temporaries as large as its input")
def test_no_copy_of_the_whole():
    """Hundreds of megabytes and more that exist only as strides: a copy would show in the peak of resident memory."""
    x = torch.ones(1, 1, 1, 1).expand(64, 256, 512, 512)
    image = torch.randn(1, 16, 96, 96)
    views = [x, x[:, ::2, 1:, :]]
    for one in (image, channels_last(image)):
        repeated = one.expand(1024, -1, -1, -1)
        views += [repeated[:, ::2, 1:, :], repeated[:, 1:, :, 1:].transpose(2, 3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = [activation_attention_op(view, 1.0) for view in views]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 100 * 1024, f"{kilobytes / 1024:.0f} MiB more at the peak"
    for view, result in zip(views, results, strict=True):
        assert result[0].eq(result[0][:1]).all()
        assert_close(result[0][:1], oracle(view[:1], 1.0)[0], torch.float32)


def test_compiles_without_a_graph_break():
    compiled = torch.compile(activation_attention, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for one, function in ((x, activation_attention), (y, compiled)):
        mean, peak = function(one, 2, ("mean", "max"))
        (mean.sum() + peak.sum()).backward()
    assert torch.equal(x.grad, y.grad)


def test_a_second_gradient_is_refused():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(activation_attention(x, 3).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()
