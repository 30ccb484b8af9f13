"""activation_attention and relu_attention: forward and backward against float64, in every layout a tensor may have."""

import math

import pytest
import torch
import torch.nn.functional as F
from paamops.triton_kernels import attention, tiling
from paamops.triton_kernels.activation_attention import activation_attention, activation_attention_backward
from paamops.triton_kernels.relu_attention import relu_attention, relu_attention_backward

from tests.tolerances import accumulator, assert_close
from tests.triton import DEVICE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expected(x, p):
    """sum, max of |x|^p in float64."""
    power = x.double().flatten(2).abs() ** p
    return power.sum(-1), power.amax(-1)


def expected_gradient(grad_sum, grad_max, x, p):
    """In float64, one row at a time."""
    rows = x.double().flatten(2).flatten(0, 1)
    slope = p * rows.abs() ** (p - 1) * rows.sign()
    gradient = grad_sum.double().flatten()[:, None] * slope
    for row, values in enumerate(rows.abs()):
        first = (values == values.max()).nonzero()[0]
        gradient[row, first] += grad_max.double().flatten()[row] * slope[row, first]
    return gradient.view(x.shape)


def last(x):
    """The same values with the channels adjacent."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def surrounded(x, channels):
    """The same values inside a larger tensor of NaN, with `channels` or pixels adjacent."""
    larger = torch.full([size + 2 for size in x.shape], math.nan, dtype=x.dtype, device=x.device)
    larger = last(larger) if channels else larger
    return larger[tuple(slice(1, -1) for _ in x.shape)].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": last,
    "surrounded": lambda x: surrounded(x, channels=False),
    "surrounded channels_last": lambda x: surrounded(x, channels=True),
    "expanded": lambda x: x[:1, :, :1].expand_as(x),
    "images apart": lambda x: torch.stack([F.pad(image.flatten(), (0, 3)) for image in x])[:, :-3].view(x.shape),
    "every second channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "reversed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
}
SHAPES = [(2, 3, 5, 7), (3, 24, 4, 4), (2, 5, 3, 2, 4), (1, 1, 1, 1), (9, 3, 1)]
SPLIT = [(1, 3, 37, 50), (2, 6, 24, 30)]  # long enough to be shared by several programs


def check_forward(x, p):
    values = activation_attention(x, p)
    for actual, wanted in zip(values, expected(x, p), strict=True):
        assert actual.dtype == accumulator(x.dtype)
        assert_close(actual, wanted, accumulator(x.dtype))
    y, *values = relu_attention(x, p)
    assert torch.equal(y, torch.relu(x))
    assert y.stride() == torch.empty_like(x).stride()
    for actual, wanted in zip(values, expected(torch.relu(x), p), strict=True):
        assert_close(actual, wanted, accumulator(x.dtype))


def check_backward(x, p):
    _, peak = activation_attention(x, p)
    grad_sum, grad_max = torch.randn_like(peak), torch.randn_like(peak)
    grad_max[0, 0] = 0
    actual = activation_attention_backward(grad_sum, grad_max, x, peak, p)
    assert actual.dtype == x.dtype
    assert actual.stride() == torch.empty_like(x).stride()
    assert_close(actual, expected_gradient(grad_sum, grad_max, x, p), x.dtype)

    y, _, peak = relu_attention(x, p)
    grad_y = torch.randn_like(y)
    actual = relu_attention_backward(grad_y, grad_sum, grad_max, y, peak, p)
    wanted = (expected_gradient(grad_sum, grad_max, y, p) + grad_y.double()) * (y > 0)
    assert actual.stride() == torch.empty_like(y).stride()
    assert_close(actual, wanted, x.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape, layout):
    if len(shape) < 4 and layout == "expanded":
        layout = "contiguous"
    x = LAYOUTS[layout](torch.randn(shape, device=DEVICE))
    check_forward(x, 1.0)
    check_backward(x, 2.0)


@pytest.mark.parametrize("p", [1.0, 2.0, 1.5, 3.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_powers(dtype, p):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, device=DEVICE).to(dtype)
    check_forward(x, p)
    check_backward(x, p)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("shape", SPLIT, ids=str)
def test_rows_split_over_programs(shape, processors, layout, monkeypatch):
    monkeypatch.setattr(attention, "processors", lambda x: processors)
    x = LAYOUTS[layout](torch.randn(shape, device=DEVICE))
    check_forward(x, 1.5)
    check_backward(x, 1.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 3, 5), *SPLIT], ids=str)
def test_gradient_of_max_goes_to_the_first_of_equal_maxima(shape, layout):
    x = torch.randn(shape, device=DEVICE).clamp(-0.9, 0.9)
    rows = x.flatten(2)
    first, second = sorted(torch.randperm(rows.shape[-1])[:2].tolist())
    rows[..., first], rows[..., second] = -3.0, 3.0  # magnitudes are equal
    x = LAYOUTS[layout](x)
    _, peak = activation_attention(x, 1.0)
    gradient = activation_attention_backward(torch.zeros_like(peak), torch.ones_like(peak), x, peak, 1.0)
    wanted = torch.zeros_like(rows)
    wanted[..., first] = -1
    assert torch.equal(gradient.flatten(2), wanted)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 40, 40)], ids=str)
def test_nan_and_infinity_propagate(shape, p):
    x = torch.randn(shape, device=DEVICE)
    x[0, 0, 2, 3] = math.nan
    x[0, 1, 1, 1] = -math.inf
    x[0, 0, 1, 1] = math.inf
    total, peak = activation_attention(x, p)
    assert total[0, 0].isnan()
    assert peak[0, 0].isnan()
    assert total[0, 1] == peak[0, 1] == math.inf
    assert total.isnan().sum() == peak.isnan().sum() == 1
    y, total, peak = relu_attention(x, p)
    torch.testing.assert_close(y, torch.relu(x), equal_nan=True, rtol=0, atol=0)
    assert total[0, 0].isnan()
    assert peak[0, 0].isnan()
    assert peak[0, 1] < math.inf


@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_gradient_of_max_goes_to_the_very_first_of_all_equal(layout, processors, monkeypatch):
    monkeypatch.setattr(attention, "processors", lambda x: processors)
    monkeypatch.setattr(tiling, "WAVES", 1)
    x = LAYOUTS[layout](torch.full((1, 3, 40, 50), -2.0, device=DEVICE))
    _, peak = activation_attention(x, 1.0)
    gradient = activation_attention_backward(torch.zeros_like(peak), torch.ones_like(peak), x, peak, 1.0)
    wanted = torch.zeros_like(gradient)
    wanted[..., 0, 0] = -1
    assert torch.equal(gradient, wanted)


def test_more_parts_of_a_row_than_are_combined_at_once(monkeypatch):
    monkeypatch.setattr(attention, "processors", lambda x: 1000)
    monkeypatch.setattr(tiling, "TILE", 512)
    x = torch.randn(1, 1, 32 * 512 + 7, device=DEVICE)
    x[..., -1] = 100
    check_forward(x, 2.0)
    gradient = activation_attention_backward(*torch.ones(2, 1, 1, device=DEVICE), x, x.new_empty(1, 1), 1.0)
    wanted = x.sign()
    wanted[..., -1] = 2
    assert torch.equal(gradient, wanted)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, in the interpreter, of 0 times infinity
def test_a_maximum_without_gradient_adds_no_nan():
    x = torch.tensor([[[math.inf, 1.0], [math.inf, 1.0]]], device=DEVICE)
    _, peak = activation_attention(x, 2.0)
    grad_max = torch.tensor([[0.0, 1.0]], device=DEVICE)
    for of_max in (grad_max, torch.zeros_like(grad_max)):
        gradient = activation_attention_backward(torch.ones_like(peak), of_max, x, peak, 2.0)
        assert gradient.tolist() == [[[math.inf, 2.0], [math.inf, 2.0]]]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_empty(shape):
    x = torch.randn(shape, device=DEVICE)
    zeros = torch.zeros(shape[:2], device=DEVICE)
    y, *values = relu_attention(x, 1.0)
    assert y.shape == x.shape
    for actual in (*activation_attention(x, 1.0), *values):
        assert torch.equal(actual, zeros)
    assert activation_attention_backward(zeros, zeros, x, zeros, 1.0).shape == x.shape
    assert relu_attention_backward(y, zeros, zeros, y, zeros, 1.0).shape == x.shape


def test_no_space_at_all():
    x = torch.randn(70, 90, device=DEVICE)
    total, peak = activation_attention(x, 1.0)
    assert torch.equal(total, x.abs())
    assert torch.equal(peak, x.abs())


def test_more_spatial_dimensions_than_the_kernel_walks():
    x = torch.randn(2, 2, 2, 2, 3, 2, 3, device=DEVICE).permute(1, 0, 6, 2, 5, 3, 4)
    check_forward(x, 1.0)
    check_backward(x, 1.0)


def test_gradients_of_any_strides():
    y, _, peak = relu_attention(torch.randn(2, 3, 4, 5, device=DEVICE), 2.0)
    grad_y, grad_sum = last(torch.randn_like(y)), torch.randn(3, 2, device=DEVICE).t()
    grad_max = torch.ones((), device=DEVICE).expand(2, 3)
    gradient = relu_attention_backward(grad_y, grad_sum, grad_max, y, peak, 2.0)
    wanted = (expected_gradient(grad_sum, grad_max, y, 2.0) + grad_y.double()) * (y > 0)
    assert_close(gradient, wanted, y.dtype)


def test_same_bits_every_run():
    x = torch.randn(1, 3, 60, 60, device=DEVICE)
    first, second = activation_attention(x, 1.5), activation_attention(x, 1.5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
