"""leaky_exponential, tempered_sigmoid and scale_channels: forward and backward against float64, in every layout."""

import math

import pytest
import torch
from paamops.triton_kernels import scale_channels as scaling
from paamops.triton_kernels import score_activation, tiling
from paamops.triton_kernels.leaky_exponential import leaky_exponential, leaky_exponential_backward
from paamops.triton_kernels.scale_channels import scale_channels, scale_channels_backward
from paamops.triton_kernels.tempered_sigmoid import tempered_sigmoid, tempered_sigmoid_backward

from tests.tolerances import accumulator, assert_close
from tests.triton import DEVICE
from tests.triton.test_attention import LAYOUTS, SHAPES, SPLIT, last

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ACTIVATIONS = {
    "leaky_exponential": (
        leaky_exponential,
        leaky_exponential_backward,
        lambda x, slope: torch.where(x <= 0, x.clamp(max=0).exp(), 1 + slope * x),
        lambda x, slope: torch.where(x <= 0, x.clamp(max=0).exp(), slope),
    ),
    "tempered_sigmoid": (
        tempered_sigmoid,
        tempered_sigmoid_backward,
        lambda x, t: torch.sigmoid(x / t),
        lambda x, t: torch.sigmoid(x / t) * torch.sigmoid(-x / t) / t,
    ),
}


def check_activation(name, x, parameter):
    forward, backward, formula, derivative = ACTIVATIONS[name]
    score, total = forward(x, parameter)
    wanted = formula(x.double(), parameter)
    assert (score.dtype, score.stride()) == (x.dtype, torch.empty_like(x).stride())
    assert (total.dtype, total.shape) == (accumulator(x.dtype), ())
    assert_close(score, wanted, x.dtype)
    assert_close(total, wanted.sum(), accumulator(x.dtype))

    grad_l1 = torch.randn((), device=DEVICE, dtype=total.dtype)
    for grad_score in (torch.randn_like(x), torch.randn((), device=DEVICE).to(x.dtype).expand_as(x)):
        right = (grad_score.double() + grad_l1.double()) * derivative(x.double(), parameter)
        actual = backward(grad_score, grad_l1, x, parameter)
        assert (actual.dtype, actual.stride()) == (x.dtype, score.stride())
        assert_close(actual, right, x.dtype)


OVERFLOW = pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy, in the interpreter, of exp(1000)


@OVERFLOW
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter", [0.01, 0.3, 2.0])
def test_activation_dtypes(name, dtype, parameter):
    check_activation(name, (torch.randn(3, 700, device=DEVICE) * 2).to(dtype), parameter)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000])
def test_activation_counts(name, count, monkeypatch):
    monkeypatch.setattr(score_activation, "SLOTS", 2)  # the sums of the blocks take several steps
    check_activation(name, torch.randn(count, device=DEVICE), 0.5)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_layouts(name, layout):
    check_activation(name, LAYOUTS[layout](torch.randn(2, 3, 5, 7, device=DEVICE)), 0.5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, of exp(1e6)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_special_values(name):
    forward, backward, formula, _ = ACTIVATIONS[name]
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e6, -1e6, 1e-30, -1e-30], device=DEVICE)
    score, total = forward(x, 0.5)
    assert_close(score, formula(x.double(), 0.5), torch.float32)
    assert total == math.inf if name == "leaky_exponential" else total.isfinite()
    grad = backward(torch.ones_like(x), torch.zeros((), device=DEVICE), x, 0.5)
    limits = [0.5, 0.0, 0.5, 0.0] if name == "leaky_exponential" else [0.0] * 4
    assert grad.tolist() == [*[1.0 if name == "leaky_exponential" else 0.5] * 2, *limits, *grad.tolist()[6:]]
    x[3] = math.nan
    score, total = forward(x, 0.5)
    assert total.isnan()
    assert score.isnan().tolist() == [False] * 3 + [True] + [False] * 4
    assert backward(torch.ones_like(x), total.new_zeros(()), x, 0.5).isnan().tolist() == score.isnan().tolist()


@OVERFLOW
def test_a_float64_parameter_keeps_its_digits():
    x = torch.rand(9, device=DEVICE, dtype=torch.float64)
    for name in ACTIVATIONS:
        check_activation(name, x, 1 / 3)
        check_activation(name, x * 1e200, 1e200)


def check_scaling(x, s):
    y = scale_channels(x, s)
    assert (y.dtype, y.stride()) == (x.dtype, torch.empty_like(x).stride())
    wide = s.double().view(-1, *[1] * (x.ndim - 2))
    assert_close(y, x.double() * wide, x.dtype)
    for grad in (torch.rand_like(x), torch.rand(x.shape, device=DEVICE).to(x.dtype).movedim(0, -1).movedim(-1, 0)):
        grad_x, grad_s = scale_channels_backward(grad, x, s)
        assert (grad_x.dtype, grad_x.stride()) == (x.dtype, y.stride())
        assert (grad_s.dtype, grad_s.shape) == (s.dtype, s.shape)
        assert_close(grad_x, grad.double() * wide, x.dtype)
        terms = grad.double() * x.double()
        scale = terms.abs().sum((0, *range(2, x.ndim))).clamp_min(1e-30)  # the sum may cancel
        wanted = terms.sum((0, *range(2, x.ndim)))
        exact = torch.float64 if s.dtype == x.dtype == torch.float64 else torch.float32
        assert_close(grad_s.double() / scale, wanted / scale, s.dtype if s.dtype.itemsize == 2 else exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaling_layouts(shape, layout):
    if len(shape) < 4 and layout == "expanded":
        layout = "contiguous"
    check_scaling(LAYOUTS[layout](torch.randn(shape, device=DEVICE)), torch.rand(shape[1], device=DEVICE))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_dtypes(dtype, layout):
    x = LAYOUTS[layout](torch.randn(3, 5, 4, 6, device=DEVICE).to(dtype))
    for of_s in {dtype, torch.float32, torch.float64}:
        check_scaling(x, torch.randn(5, device=DEVICE, dtype=of_s))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("shape", [*SPLIT, (70, 40, 1, 2)], ids=str)
def test_scaling_split_over_programs(shape, processors, layout, monkeypatch):
    monkeypatch.setattr(scaling, "processors", lambda x: processors)
    monkeypatch.setattr(tiling, "TILE", 512)
    check_scaling(LAYOUTS[layout](torch.randn(shape, device=DEVICE)), torch.rand(shape[1], device=DEVICE))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_scaling_empty(shape):
    x, s = torch.randn(shape, device=DEVICE), torch.randn(shape[1], device=DEVICE)
    assert scale_channels(x, s).shape == x.shape
    grad_x, grad_s = scale_channels_backward(x, x, s)
    assert grad_x.shape == x.shape
    assert torch.equal(grad_s, torch.zeros_like(s))


def test_scaling_of_flat_features_and_of_one_channel():
    check_scaling(torch.randn(70, 90, device=DEVICE), torch.rand(90, device=DEVICE))
    check_scaling(torch.randn(5, 1, 6, device=DEVICE), torch.rand(1, device=DEVICE))
    check_scaling(torch.randn(1, 6, device=DEVICE), torch.rand(12, device=DEVICE)[::2])


def test_scaling_of_more_spatial_dimensions_than_the_kernel_walks():
    x = torch.randn(2, 2, 2, 2, 3, 2, 3, device=DEVICE).permute(1, 0, 6, 2, 5, 3, 4)
    check_scaling(x, torch.rand(2, device=DEVICE))


def test_scaling_of_special_values():
    x = torch.ones(2, 3, 2, 2, device=DEVICE)
    x[0, 1, 0, 0], x[1, 2, 1, 1] = math.nan, math.inf
    for x_laid in (x, last(x)):
        y = scale_channels(x_laid, torch.tensor([1.0, 2.0, 0.5], device=DEVICE))
        assert y.isnan().sum() == y.isinf().sum() == 1
        _, grad_s = scale_channels_backward(torch.ones_like(x_laid), x_laid, y.new_ones(3))
        assert grad_s[0] == 8
        assert grad_s[1].isnan()
        assert grad_s[2] == math.inf
