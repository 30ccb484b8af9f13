"""channel_attention: y, saliency and all gradients against float64, in every layout, dtype and size.

The ReLUs jump in their gradients: inputs keep away from 0 and 6, and biases put what the hidden units are given away
from 0, so that no rounding moves a number to the other side.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from paamops.ops.channel_attention import (
    ACTIVATIONS,
    channel_attention,
    channel_attention_backward_op,
    channel_attention_backward_reference,
    channel_attention_op,
    channel_attention_reference,
    reference,
)
from paamops.ops.registration import build_info, compiled
from tests.ops.test_activation_attention import DTYPES, LAYOUTS
from tests.ops.test_instruction_sets import SETS
from tests.tolerances import TOLERANCE, accumulator, assert_close

IMPLEMENTATIONS = {
    "kernel": (channel_attention_op, channel_attention_backward_op),
    "reference": (channel_attention_reference, channel_attention_backward_reference),
}
# Maps shorter than a vector and longer, one pixel, channels that fill vectors and do not, groups of images that are
# whole and are not, images that threads share, and images of several parts.
SHAPES = [
    (5, 6, 7, 9),
    (9, 16, 8, 8),
    (4, 40, 3, 3),
    (3, 17, 5),
    (2, 3, 4, 5, 6),
    (6, 20, 2, 2),
    (1, 70, 1, 1),
    (7, 1, 6, 5),
    (3, 50, 30, 31),
    (1, 24, 70, 61),
    (2, 1500, 5),
]
WIDE_SHAPES = [(17, 8, 100, 90), (20, 2, 33, 1)]
has_cpp = build_info()["kernels"]["channel_attention"]["cpu"] == "C++"


def away(x):
    """x, moved to at least 0.05 from 0 and from 6."""
    x = torch.where(x.abs() < 0.05, x + torch.where(x < 0, -0.1, 0.1), x)
    return torch.where((x - 6).abs() < 0.05, x + 0.2, x)


def maps(shape, dtype=torch.float32):
    """Random maps on both sides of 0 and 6."""
    return away(torch.randn(shape, dtype=torch.float64) * 3 + 1).to(dtype)


def activated(x, activation):
    """In float64, by other functions than the reference."""
    x = x.double()
    return (x, F.relu(x), F.relu6(x))[activation]


def parameters(x, activation, dtype=torch.float32, hidden=None):
    """Weights, and biases with which no hidden unit is given a number near 0; some of the units cut some images."""
    channels = x.shape[1]
    hidden = max(2, channels // 8) if hidden is None else hidden
    reduce_weight = (torch.randn(hidden, channels) / math.sqrt(max(channels, 1))).to(dtype)
    expand_weight = (torch.randn(channels, hidden) / math.sqrt(max(hidden, 1))).to(dtype)
    given = activated(x, activation).flatten(2).mean(2) @ reduce_weight.double().t()
    biases = []
    for column in given.t().sort(1).values:
        gap, at = column.diff().max(0) if len(column) > 1 else (torch.zeros(()), 0)
        if gap < 1e-3 or dtype.itemsize == 2:  # a half would round the bias: above all of them, or below
            beyond = torch.rand(()) < 0.7
            biases.append(0.5 - column[0] if beyond else -0.5 - column[-1])
        else:
            biases.append(-(column[at] + column[at + 1]) / 2)
    reduce_bias = torch.stack(biases) if biases else given.new_zeros(0)
    return reduce_weight, reduce_bias.to(dtype), expand_weight, torch.randn(channels).to(dtype)


def plain(x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation):
    """y and saliency in float64, through which gradients flow."""
    a = activated(x, activation)
    h = F.relu(F.linear(a.flatten(2).mean(2), reduce_weight.double(), reduce_bias.double()))
    saliency = torch.sigmoid(F.linear(h, expand_weight.double(), expand_bias.double()))
    return a * saliency.view(*saliency.shape, *[1] * (x.ndim - 2)), saliency


def magnitudes(x, weights, activation, grad_y, grad_saliency):
    """What the terms of each gradient add up to without their signs: sums that cancel are compared against it."""
    reduce_weight, reduce_bias, expand_weight, _ = (w.double() for w in weights)
    a = activated(x, activation)
    _, saliency = plain(x, *weights, activation)
    mean = a.abs().flatten(2).mean(2)
    hidden = mean @ reduce_weight.abs().t() + reduce_bias.abs()
    of_saliency = (grad_y.double() * a).abs().flatten(2).sum(2) + grad_saliency.double().abs()
    of_logits = of_saliency * (saliency * (1 - saliency) + 0.05)  # 1 - saliency is rounded as 1 is
    of_hidden = of_logits @ expand_weight.abs()
    of_mean = of_hidden @ reduce_weight.abs() / x.shape[2:].numel()
    shape = *saliency.shape, *[1] * (x.ndim - 2)
    of_x = grad_y.double().abs() * saliency.view(shape) + of_mean.view(shape)
    return of_x, of_hidden.t() @ mean, of_hidden.sum(0), of_logits.t() @ hidden, of_logits.sum(0)


def check(implementation, x, weights, activation, grads=()):
    op, backward = IMPLEMENTATIONS[implementation]
    y, saliency, mean, hidden = op(x, *weights, activation)
    wide = accumulator(x.dtype)
    assert (y.dtype, y.stride()) == (x.dtype, torch.empty_like(x).stride())
    assert saliency.dtype == mean.dtype == hidden.dtype == wide
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights)]
    right = plain(*leaves, activation)
    assert_close(y / 8, right[0] / 8, x.dtype)
    assert_close(saliency, right[1], wide)
    grad_saliency = torch.randn(saliency.shape, dtype=wide)
    for grad_y in grads:
        actual = backward(grad_y, grad_saliency, x, weights[0], weights[2], saliency, mean, hidden, activation)
        wanted = torch.autograd.grad(right, leaves, (grad_y.double(), grad_saliency.double()), retain_graph=True)
        assert (actual[0].dtype, actual[0].stride()) == (x.dtype, y.stride())
        assert all(grad.dtype == wide for grad in actual[1:])
        sizes = magnitudes(x, weights, activation, grad_y, grad_saliency)
        for mine, exact, size in zip(actual, wanted, sizes, strict=True):
            assert mine.shape == exact.shape
            error = ((mine.double() - exact).abs() / size.clamp_min(1e-30)).max()
            assert error <= 2 * TOLERANCE[mine.dtype]["rtol"], error


@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation, activation, seed):
    chance = random.Random(f"{seed} {layout} {activation}")
    for shape in SHAPES:
        print(shape)
        x = LAYOUTS[layout](maps(shape))
        others = [layout, chance.choice(list(LAYOUTS))] if implementation == "kernel" else [layout]
        grads = [LAYOUTS[name](torch.randn(shape)) for name in others]
        check(implementation, x, parameters(x, activation), activation, grads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
def test_many_large_images(shape, layout):
    x = LAYOUTS[layout](maps(shape))
    check("kernel", x, parameters(x, 1), 1, [LAYOUTS[layout](torch.randn(shape))])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, layout, implementation):
    for shape in [(5, 24, 6, 7), (9, 10, 2, 3), (2, 33, 35, 36)]:
        for kind in sorted({dtype, torch.float32, torch.float64}, key=str):
            for activation in range(3):
                x = LAYOUTS[layout](maps(shape, dtype))
                grads = [LAYOUTS[layout](torch.randn(shape).to(dtype)), torch.randn(()).to(dtype).expand(shape)]
                check(implementation, x, parameters(x, activation, kind), activation, grads)


@pytest.mark.parametrize("repeat", range(20))
def test_random_shapes(repeat, seed):
    chance = random.Random(f"{seed} {repeat}")
    shape = [chance.choice([1, 2, 3, 5, 8, 16, 17, 31, 33]) for _ in range(chance.randint(3, 5))]
    while math.prod(shape) > 100_000:
        shape[chance.randrange(len(shape))] = 1
    dtype, activation, hidden = chance.choice(DTYPES), chance.randrange(3), chance.choice([1, 3, 4, 9])
    layouts = chance.sample(list(LAYOUTS), 2)
    print(shape, layouts, dtype, activation, hidden)
    x, grad = LAYOUTS[layouts[0]](maps(shape, dtype)), LAYOUTS[layouts[1]](torch.randn(shape).to(dtype))
    check("kernel", x, parameters(x, activation, accumulator(dtype), hidden), activation, [grad])


@pytest.mark.skipif(not has_cpp, reason="built without C++")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
def test_instruction_sets(instruction_set, dtype):
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(instruction_set)
    try:
        for layout in ("contiguous", "channels_last"):
            for shape in ((5, 37, 9, 11), (3, 20, 3, 1)):
                for activation in range(3):
                    x, grad = LAYOUTS[layout](maps(shape, dtype)), LAYOUTS[layout](torch.randn(shape).to(dtype))
                    check("kernel", x, parameters(x, activation), activation, [grad])
    finally:
        compiled.use_instruction_set(best)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("activation", range(3))
def test_special_values(activation, layout, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = maps((5, 20, 5, 7))
    weights = [torch.rand(t.shape) + 0.1 for t in parameters(x, activation)]
    x[0, 3, 4, 6], x[1, 5, 2, 2] = math.nan, -math.nan
    x[2, 6, 0, 0] = -math.inf
    x[3, 7, 1, 1] = math.inf
    x = LAYOUTS[layout](x)
    y, saliency, mean, hidden = op(x, *weights, activation)
    right = plain(x, *weights, activation)
    for mine, exact in ((y, right[0]), (saliency, right[1])):
        assert torch.equal(mine.isnan(), exact.isnan())
        assert torch.equal(mine.isinf(), exact.isinf())
    assert saliency[:2].isnan().all()
    assert saliency[4].isfinite().all()
    assert saliency[2].isfinite().all()  # a bounded activation knows no -inf, and of others it is sigmoid's limit
    grads = torch.ones_like(x), torch.ones_like(saliency)
    grad_x, *of_weights = backward(*grads, x, weights[0], weights[2], saliency, mean, hidden, activation)
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights)]
    wanted = torch.autograd.grad(plain(*leaves, activation), leaves, [grad.double() for grad in grads])
    known = ~x.isnan()  # PyTorch's own relu6 passes the gradient of NaN on in some places and stops it in others
    assert torch.equal(grad_x.isnan()[known], wanted[0].isnan()[known])
    assert grad_x[~known].isnan().all()
    assert all(mine.isnan().any() == exact.isnan().any() for mine, exact in zip(of_weights, wanted[1:], strict=True))
    assert grad_x[4].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_is_0_at_the_kinks(implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, 6.0, 7.0]).expand(3, 4, 6).contiguous()
    weights = parameters(x, 1)
    for activation, passes in ((0, [True] * 6), (1, [False] * 3 + [True] * 3), (2, [False] * 3 + [True] + [False] * 2)):
        y, *small = op(x, *weights, activation)
        grad = backward(y + 1, small[0], x, weights[0], weights[2], *small, activation)[0]
        assert (grad != 0).tolist() == [[passes] * 4] * 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("hidden", [0, 2])
def test_empty(hidden, shape, implementation):
    op, backward = IMPLEMENTATIONS[implementation]
    x = maps(shape)
    weights = torch.rand(hidden, shape[1]), torch.rand(hidden), torch.rand(shape[1], hidden), torch.rand(shape[1])
    y, *small = op(x, *weights, 1)
    assert y.shape == shape
    assert [tuple(t.shape) for t in small] == [shape[:2], shape[:2], (shape[0], hidden)]
    assert_close(small[0], plain(x, *weights, 1)[1], torch.float32)
    grad_x, *of_weights = backward(torch.ones_like(x), small[0], x, weights[0], weights[2], *small, 1)
    assert grad_x.shape == shape
    for mine, weight in zip(of_weights, weights, strict=True):
        assert mine.shape == weight.shape
        assert mine.isfinite().all()
        assert shape[0] or torch.equal(mine, torch.zeros_like(weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_left_as_they_are(layout):
    x = LAYOUTS[layout](maps((3, 20, 5, 7)))
    tensors = [x, *parameters(x, 2), torch.randn(()).expand(3, 20, 5, 7)]
    copies = [t.clone() for t in tensors]
    small = channel_attention_op(*tensors[:5], 2)[1:]
    channel_attention_backward_op(tensors[5], small[0], x, tensors[1], tensors[3], *small, 2)
    assert all(torch.equal(now, before) for now, before in zip(tensors, copies, strict=True))


def test_public_function():
    for number, activation in enumerate(ACTIVATIONS):
        x = maps((4, 6, 5, 7), torch.bfloat16)
        weights = parameters(x, number)
        y, saliency = channel_attention(x, *weights, activation)
        for mine, exact in zip((y, saliency), plain(x, *weights, number), strict=True):
            assert_close(mine / 8, exact / 8, mine.dtype)
        assert (y.dtype, saliency.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(channel_attention(x, *weights)[1], channel_attention_op(x, *weights, 0)[1])


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("function", [channel_attention, reference])
def test_autocast_changes_nothing(function, backward_inside):
    x = maps((4, 12, 5, 7))
    weights = [w.requires_grad_() for w in parameters(x, 1)]
    backward_inside &= function is channel_attention  # the reference leaves its backward to PyTorch
    for dtype in (torch.float32, torch.bfloat16):
        outside = function(x.to(dtype), *weights, "relu")
        wanted = torch.autograd.grad(sum(each.float().sum() for each in outside), weights)
        with torch.autocast("cpu", torch.bfloat16):
            inside = function(x.to(dtype), *weights, "relu")
            loss = sum(each.float().sum() for each in inside)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            found = torch.autograd.grad(loss, weights)
        for mine, other in zip((*inside, *found), (*outside, *wanted), strict=True):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)


ONES = {
    "x": torch.ones(2, 3, 4, 4),
    "reduce_weight": torch.ones(5, 3),
    "reduce_bias": torch.ones(5),
    "expand_weight": torch.ones(3, 5),
    "expand_bias": torch.ones(3),
}


@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, r"x is a list; it must be a tensor", {"x": [1.0]}),
        (TypeError, r"x has dtype torch\.int64; it must be float16", {"x": ONES["x"].long()}),
        (ValueError, r"x has shape \(2, 3\); it must have at least three dimensions", {"x": torch.ones(2, 3)}),
        (ValueError, r"x has shape \(2, 3, 0, 4\); it must have a pixel", {"x": torch.ones(2, 3, 0, 4)}),
        (TypeError, r"reduce_bias is a NoneType; it must be a tensor", {"reduce_bias": None}),
        (TypeError, r"expand_weight has dtype torch\.float16; .* dtype of x, torch\.float32",
         {"expand_weight": torch.ones(3, 5).half()}),
        (ValueError, r"reduce_weight has shape \(5, 4\); it must be \(H, C\), with C = 3 .* H = 5 .*: \(5, 3\)",
         {"reduce_weight": torch.ones(5, 4)}),
        (ValueError, r"reduce_bias has shape \(5, 1\); it must be \(H,\)", {"reduce_bias": torch.ones(5, 1)}),
        (ValueError, r"expand_weight has shape \(5, 3\); it must be \(C, H\)", {"expand_weight": torch.ones(5, 3)}),
        (ValueError, r"expand_bias has shape \(4,\); it must be \(C,\)", {"expand_bias": torch.ones(4)}),
        (ValueError, r"expand_bias is on meta; it must be on the device of x, cpu",
         {"expand_bias": torch.ones(3, device="meta")}),
        (ValueError, r"activation is 'gelu'; it must be one of \('none', 'relu', 'relu6'\)", {"activation": "gelu"}),
    ],
)  # fmt: skip
def test_bad_arguments(error, words, changed):
    with pytest.raises(error, match=words):
        channel_attention(**{**ONES, **changed})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("activation", range(3))
def test_opcheck(activation, layout):
    x = LAYOUTS[layout](maps((3, 6, 4, 5)))
    weights = parameters(x, activation)
    inputs = (x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights), activation)
    torch.library.opcheck(channel_attention_op, inputs)
    torch.library.opcheck(channel_attention_op, (x, *weights, activation))
    small = channel_attention_op(x, *weights, activation)[1:]
    inputs = (torch.randn(x.shape), torch.randn(3, 6), x, weights[0], weights[2], *small, activation)
    torch.library.opcheck(channel_attention_backward_op, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, layout):
    x = LAYOUTS[layout](maps((3, 4, 3, 2), torch.float64))
    inputs = [t.requires_grad_() for t in (x, *parameters(x, ACTIVATIONS.index(activation), torch.float64))]
    torch.autograd.gradcheck(lambda *tensors: channel_attention(*tensors, activation), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_differentiable_twice(activation):
    x = maps((3, 4, 3), torch.float64)
    inputs = [t.requires_grad_() for t in (x, *parameters(x, ACTIVATIONS.index(activation), torch.float64))]
    torch.autograd.gradgradcheck(lambda *tensors: reference(*tensors, activation), inputs)


def test_a_second_gradient_is_refused():
    x = maps((3, 4, 3, 3)).requires_grad_()
    y, _ = channel_attention(x, *parameters(x.detach(), 0))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_result_by_itself_has_gradients_in_the_dtypes_of_the_inputs(dtype):
    x = maps((4, 8, 3, 3), dtype)
    weights = parameters(x, 1)
    leaves = [t.clone().requires_grad_() for t in (x, *weights)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for part in range(2):
        result, right = channel_attention(*leaves, "relu")[part], plain(*exact, 1)[part]
        found = torch.autograd.grad(result.double().sum(), leaves)
        wanted = torch.autograd.grad(right.sum(), exact)
        ones = torch.ones(x.shape) if part == 0 else torch.zeros(x.shape)
        sizes = magnitudes(x, weights, 1, ones, torch.ones(4, 8) * part)
        for mine, other, leaf, size in zip(found, wanted, leaves, sizes, strict=True):
            assert mine.dtype == leaf.dtype
            error = ((mine.double() - other).abs() / size.clamp_min(1e-30)).max()
            assert error <= 2 * TOLERANCE[mine.dtype if mine.dtype == dtype else torch.float32]["rtol"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_as_one_graph(layout):
    x = LAYOUTS[layout](maps((3, 8, 5, 5)))
    leaves = [t.requires_grad_() for t in (x, *parameters(x, 2))]

    def loss(*tensors):
        y, saliency = channel_attention(*tensors, "relu6")
        return (y * 2).square().mean() + saliency.sum()

    wanted = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.stride() == other.stride()
        assert_close(mine, other, torch.float32)


@pytest.mark.skipif(not has_cpp, reason="PyTorch's own kernels cut their work by the number of threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_run_and_for_every_number_of_threads(layout):
    threads = torch.get_num_threads()
    try:
        for shape in [(3, 70, 21, 37), (40, 16, 16, 16), (300, 20, 2, 2)]:
            x, grad = LAYOUTS[layout](maps(shape)), torch.randn(shape)
            weights = parameters(x, 1)
            results = []
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                y, *small = channel_attention_op(x, *weights, 1)
                grads = channel_attention_backward_op(grad, small[0], x, weights[0], weights[2], *small, 1)
                results.append((y, *small, *grads))
            for result in results[1:]:
                assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))
    finally:
        torch.set_num_threads(threads)
