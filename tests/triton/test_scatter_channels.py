"""scatter_channels and its way back against indexing, in every layout; a move of bits, so the results are equal."""

import math

import pytest
import torch
from paamops.triton_kernels import scatter_channels as scattering
from paamops.triton_kernels import tiling
from paamops.triton_kernels.scatter_channels import scatter_channels

from paamops.ops.scatter_channels import inverse, wide_empty
from tests.triton import DEVICE
from tests.triton.test_attention import LAYOUTS, SHAPES, SPLIT

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def check(x, width, nowhere=0):
    index = torch.randperm(width, device=DEVICE)[: x.shape[1]]
    index[:nowhere] = -1
    source = inverse(index, width)
    expected = torch.zeros(x.shape[0], width, *x.shape[2:], dtype=x.dtype, device=DEVICE)
    expected[:, index[nowhere:]] = x[:, nowhere:]
    y = scatter_channels(x, index, source)
    assert y.stride() == wide_empty(x, width).stride()
    assert torch.equal(y, expected)
    back = torch.where((index >= 0).view(-1, *[1] * (x.ndim - 2)), x, 0)
    assert torch.equal(scatter_channels(y, source, index), back)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape, layout):
    if len(shape) < 4 and layout == "expanded":
        layout = "contiguous"
    check(LAYOUTS[layout](torch.randn(shape, device=DEVICE)), shape[1] + int(torch.randint(9, ())))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, layout):
    check(LAYOUTS[layout](torch.randn(3, 5, 4, 6, device=DEVICE).to(dtype)), 9, nowhere=2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", [*SPLIT, (70, 10, 1, 2)], ids=str)
def test_split_over_programs(shape, layout, monkeypatch):
    monkeypatch.setattr(scattering, "processors", lambda x: 1000)
    monkeypatch.setattr(tiling, "TILE", 512)
    check(LAYOUTS[layout](torch.randn(shape, device=DEVICE)), shape[1] + 4, nowhere=1)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(shape):
    check(torch.randn(shape, device=DEVICE), 5)


def test_flat_features_and_one_channel():
    check(torch.randn(70, 90, device=DEVICE), 100, nowhere=3)
    check(torch.randn(5, 1, 6, device=DEVICE), 4)
    check(torch.randn(2, 3, 2, 2, 3, 2, 3, device=DEVICE).permute(0, 1, 6, 2, 5, 3, 4), 4)  # more than the kernel walks


def test_nothing_is_computed():
    x = torch.tensor([math.nan, math.inf, -0.0], device=DEVICE).view(1, 3, 1).expand(2, 3, 5)
    index = torch.tensor([3, 0, 2], device=DEVICE)
    y = scatter_channels(x, index, inverse(index, 5))
    assert y[:, 3].isnan().all()
    assert (y[:, 0] == math.inf).all()
    assert y[:, 2].signbit().all()
    assert torch.equal(y[:, [1, 4]], torch.zeros(2, 2, 5, device=DEVICE))


def test_places_out_of_range_read_nothing():
    x = torch.ones(2, 3, 4, device=DEVICE)
    source = torch.tensor([0, 3, 10**12, -(10**12), 2], device=DEVICE)
    y = scatter_channels(x, source[:3], source)
    assert y[0, :, 0].tolist() == [1, 0, 0, 0, 1]
