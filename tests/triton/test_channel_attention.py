"""channel_attention: forward and backward against float64, in every layout a tensor may have."""

import math

import pytest
import torch
from paamops.triton_kernels import channel_attention as excitation
from paamops.triton_kernels import tiling
from paamops.triton_kernels.channel_attention import channel_attention, channel_attention_backward

from tests.ops.test_channel_attention import magnitudes, maps, parameters, plain
from tests.tolerances import TOLERANCE, accumulator, assert_close
from tests.triton import DEVICE
from tests.triton.test_attention import LAYOUTS, SHAPES, SPLIT, last

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def check(x, activation, kind=torch.float32):
    """`x`, on the CPU, is moved to the device with its strides where it is dense."""
    weights = [weight.to(DEVICE) for weight in parameters(x, activation, kind)]
    x = x.to(DEVICE)
    y, saliency, mean, hidden = channel_attention(x, *weights, activation)
    wide = accumulator(x.dtype)
    assert (y.dtype, y.stride()) == (x.dtype, torch.empty_like(x).stride())
    assert saliency.dtype == mean.dtype == hidden.dtype == wide
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights)]
    right = plain(*leaves, activation)
    assert_close(y / 8, right[0] / 8, x.dtype)
    assert_close(saliency, right[1], wide)
    grad_saliency = torch.randn(saliency.shape, dtype=wide, device=DEVICE)
    for grad_y in (torch.randn_like(x), torch.randn((), device=DEVICE).to(x.dtype).expand_as(x)):
        given = grad_y, grad_saliency, x, weights[0], weights[2], saliency, mean, hidden, activation
        actual = channel_attention_backward(*given)
        wanted = torch.autograd.grad(right, leaves, (grad_y.double(), grad_saliency.double()), retain_graph=True)
        assert (actual[0].dtype, actual[0].stride()) == (x.dtype, y.stride())
        assert all(grad.dtype == wide for grad in actual[1:])
        sizes = magnitudes(x, weights, activation, grad_y, grad_saliency)
        for mine, exact, size in zip(actual, wanted, sizes, strict=True):
            error = ((mine.double() - exact).abs() / size.clamp_min(1e-30)).max()
            assert error <= 2 * TOLERANCE[mine.dtype]["rtol"], error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape, activation, layout):
    if len(shape) < 4 and layout == "expanded":
        layout = "contiguous"
    check(LAYOUTS[layout](maps(shape)), activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, layout):
    for kind in {dtype, torch.float32, torch.float64}:
        check(LAYOUTS[layout](maps((3, 5, 4, 6), dtype)), 1, kind)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("shape", [*SPLIT, (30, 20, 1, 2)], ids=str)
def test_split_over_programs(shape, processors, layout, monkeypatch):
    monkeypatch.setattr(excitation, "processors", lambda x: processors)
    monkeypatch.setattr(tiling, "TILE", 512)
    check(LAYOUTS[layout](maps(shape)), 2)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4)], ids=str)
def test_empty(shape):
    x, channels = torch.randn(shape, device=DEVICE), shape[1]
    weights = [torch.rand(size, device=DEVICE) for size in ((2, channels), (2,), (channels, 2), (channels,))]
    y, *small = channel_attention(x, *weights, 1)
    assert y.shape == shape
    assert [tuple(each.shape) for each in small] == [shape[:2], shape[:2], (shape[0], 2)]
    grad_x, *grads = channel_attention_backward(x, small[0], x, weights[0], weights[2], *small, 1)
    assert grad_x.shape == shape
    for grad, weight in zip(grads, weights, strict=True):
        assert torch.equal(grad, torch.zeros_like(weight))


def test_more_spatial_dimensions_than_the_kernel_walks():
    check(maps((2, 2, 2, 2, 3, 2, 3)).permute(1, 0, 6, 2, 5, 3, 4), 1)


@pytest.mark.parametrize("activation", range(3))
def test_special_values(activation):
    x = maps((3, 4, 2, 2))
    weights = [weight.to(DEVICE) for weight in parameters(x, activation)]
    x[0, 1, 0, 0], x[1, 2, 1, 1] = math.nan, -math.inf
    for laid in (x.to(DEVICE), last(x.to(DEVICE))):
        y, *small = channel_attention(laid, *weights, activation)
        right = plain(laid, *weights, activation)
        assert torch.equal(y.isnan(), right[0].isnan())
        assert torch.equal(small[0].isnan(), right[1].isnan())
        assert small[0][0].isnan().all()
        assert small[0][2].isfinite().all()
        grad = channel_attention_backward(
            torch.ones_like(laid), small[0], laid, weights[0], weights[2], *small, activation
        )[0]
        assert grad[0, 1, 0, 0].isnan()  # where x is NaN the gradient passes, and it is NaN itself
        assert grad[2].isfinite().all()


def test_the_gradient_is_0_at_the_kinks():
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, 6.0, 7.0]).expand(3, 4, 6).contiguous()
    weights = [weight.to(DEVICE) for weight in parameters(x, 1)]
    x = x.to(DEVICE)
    for activation, passes in ((0, [True] * 6), (1, [False] * 3 + [True] * 3), (2, [False] * 3 + [True] + [False] * 2)):
        y, *small = channel_attention(x, *weights, activation)
        grad = channel_attention_backward(y + 1, small[0], x, weights[0], weights[2], *small, activation)[0]
        assert (grad != 0).tolist() == [[passes] * 4] * 3


def test_autocast_changes_nothing():
    x = maps((3, 8, 4, 4)).to(DEVICE)
    weights = [weight.to(DEVICE) for weight in parameters(x.cpu(), 1)]
    wanted = channel_attention(x, *weights, 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = channel_attention(x, *weights, 1)
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine, other)
