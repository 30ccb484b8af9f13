"""vote_ranking: every table exactly that of sorting the images one by one."""

import math

import pytest
import torch
from paamops.triton_kernels import vote_ranking as kernels

from paamops.ops import vote_ranking as ops
from tests.triton import DEVICE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def table(channels):
    return torch.zeros(channels, channels, dtype=torch.int64, device=DEVICE)


def expected(saliency):
    """The votes by the definition; an image with NaN takes SPOILT off the first."""
    votes = table(saliency.shape[1])
    for row in (saliency.double() + 0.0).tolist():
        if any(map(math.isnan, row)):
            votes[0, 0] -= ops.SPOILT
            continue
        for rank, channel in enumerate(sorted(range(len(row)), key=lambda channel: (-row[channel], channel))):
            votes[channel, rank] += 1
    return votes


def check(saliency):
    votes = table(saliency.shape[1])
    kernels.vote_ranking(saliency, votes)
    assert torch.equal(votes, expected(saliency))


@pytest.fixture
def small_blocks(monkeypatch):
    """So that few channels already make several programs an image, and several steps."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(kernels, "STEP", 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 27])
@pytest.mark.usefixtures("small_blocks")
def test_random_saliencies_with_many_ties(channels, dtype):
    saliency = (torch.randn(5, channels, device=DEVICE) * 3).round(decimals=1).to(dtype)
    saliency[:, ::4], saliency[:, 1::5] = -0.0, 0.0
    check(saliency)
    check(torch.full_like(saliency, -2.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_blocks(dtype):
    check(torch.randn(2, 128, device=DEVICE).to(dtype))
    check(torch.randn(2, 70, device=DEVICE).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_saliencies_that_differ_in_every_digit(dtype):
    info = torch.finfo(dtype)
    extremes = [info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal / 2, 1.0, 1 + info.eps, -1.0, 0.0]
    row = torch.tensor([*extremes, math.inf, -math.inf, -math.inf, math.inf, -0.0], dtype=dtype, device=DEVICE)
    check(torch.stack([row[torch.randperm(len(row))] for _ in range(4)]))


@pytest.mark.parametrize("value", [math.nan, -math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_blocks")
def test_an_image_with_nan_casts_no_vote(dtype, value):
    saliency = torch.randn(6, 21, device=DEVICE).to(dtype)
    for image, channel in ((1, 0), (4, 20), (4, 9)):
        saliency[image, channel] = value
    check(saliency)
    votes = table(21)
    kernels.vote_ranking(saliency, votes)
    assert votes[0, 0] <= 4 - 2 * ops.SPOILT
    with pytest.raises(ValueError, match="none must be negative"):
        ops.elect(votes)


def test_strided():
    check(torch.randn(9, 6, device=DEVICE).t())
    check(torch.randn(4, 10, 3, device=DEVICE)[:, :, 1])
    check(torch.randn(1, 12, device=DEVICE).expand(3, 12))
    check(torch.randn(3, 1, device=DEVICE).expand(3, 12))


def test_adds_to_what_is_there():
    saliency = torch.rand(7, 19, device=DEVICE)
    votes = torch.randint(0, 1 << 40, (19, 19), device=DEVICE)
    before = votes.clone()
    kernels.vote_ranking(saliency, votes)
    assert torch.equal(votes - before, expected(saliency))


def test_no_images():
    votes = table(3)
    kernels.vote_ranking(torch.empty(0, 3, device=DEVICE), votes)
    assert not votes.any()


def test_same_as_the_reference():
    assert kernels.SPOILT == ops.SPOILT
    saliency, votes = torch.rand(6, 40, device=DEVICE), table(40)
    kernels.vote_ranking(saliency, votes)
    reference = torch.zeros(40, 40, dtype=torch.int64)
    ops.vote_ranking_reference(saliency.cpu(), reference)
    assert torch.equal(votes.cpu(), reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 512), (5000, 16), (3, 4096), (1000, 77)], ids=str)
def test_the_op_on_a_gpu(shape, dtype):
    """At sizes that fill it, without a host sync, the same bits in every run."""
    saliency = torch.randn(shape, device="cuda").sigmoid().to(dtype)
    votes = ops.vote_ranking(saliency)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = ops.vote_ranking(saliency, torch.zeros_like(votes))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(votes, again)
    assert torch.equal(votes.cpu(), ops.vote_ranking(saliency.cpu()))
    assert torch.equal(ops.elect(votes, "borda").cpu(), ops.elect(votes.cpu(), "borda"))
