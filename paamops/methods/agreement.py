"""How far the images agree with an elected ranking of the channels."""

import numbers
from typing import NamedTuple

import torch

CHUNK = 1 << 18  # saliencies that are compared at a time: they stay in a cache


class Agreement(NamedTuple):
    """Means over the images: Kendall's τ-b in [-1, 1], and the share of the first `top` channels in common."""

    kendall: float
    overlap: float


def agreement(saliency, ranking, top):
    """(mean over images of Kendall's τ-b, mean share of the ranking's first `top` that are the image's own); Agreement.

    τ = (P − Q) / √((P + Q)(P + Q + T)), over all pairs of channels: P pairs that the image orders as the ranking does,
    Q the other way round, T to which it gives the same saliency. GlobalPru (Wang et al. 2023, §3.2) wants all images to
    share one ranking; the paper measures it nowhere, and these two measures are our choice: τ for the whole order, the
    overlap for what decides, the channels that stay.

    An image's own first `top` channels are those of its largest saliencies; ties go to the lower index. An image whose
    saliencies are all equal has no order: its τ is 0. One channel can be ordered in one way only: with C = 1 τ is 1.

    Args:
        saliency: (N, C) floats of any dtype, N ≥ 1; the larger, the more important. Infinity is a number like others.
        ranking: (C,) int64, a permutation: ranking[r] is the channel at rank r, 0 the most important.
        top: how many channels stay, 1 to C.

    It takes O(N C²) comparisons and O(C) memory for each of a chunk of images at a time.

    ValueError: wrong shapes, no images, NaN, no permutation, top out of range. TypeError: wrong types or dtypes.
    """
    _check(saliency, ranking, top)
    ranking = ranking.to(saliency.device)
    kendall = overlap = 0
    for part in saliency.detach().split(max(1, CHUNK // len(ranking))):
        order = part.argsort(dim=1, descending=True, stable=True)
        kendall = kendall + _kendall(_levels(part, order)[:, ranking]).sum()
        overlap = overlap + (_ranks(order)[:, ranking[:top]] < top).sum()
    return Agreement(float(kendall) / len(saliency), int(overlap) / top / len(saliency))


def _ranks(order):
    """(N, C): the rank of every channel, from the channels in the order of their ranks."""
    ranks = torch.empty_like(order)
    return ranks.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def _levels(saliency, order):
    """(N, C) int32, ordered as the saliencies of each image: the larger, the lower; equal ones are equal."""
    found = saliency.gather(1, order)
    steps = torch.zeros_like(order)
    steps[:, 1:] = (found[:, 1:] != found[:, :-1]).cumsum(1)
    return torch.empty_like(order).scatter_(1, order, steps).int()


def _kendall(levels):
    """(N,) float64, τ-b of the columns' order with the levels of each image, where the lowest is to come first."""
    n, c = levels.shape
    if c == 1:
        return torch.ones(n, dtype=torch.float64, device=levels.device)
    # For every pair of columns 1, 0 or -1: the first has the lower level, both have the same, the second has the lower.
    balance, apart = torch.zeros_like(levels), torch.zeros_like(levels)
    for distance in range(1, c):
        signs = (levels[:, distance:] - levels[:, :-distance]).clamp_(-1, 1)
        balance[:, distance:] += signs
        apart[:, distance:] += signs.abs_()
    balance, apart = balance.sum(1).double(), apart.sum(1).double()
    return torch.where(apart > 0, balance / (apart * (c * (c - 1) // 2)).clamp(min=1).sqrt(), 0)


def _check(saliency, ranking, top):
    if not isinstance(saliency, torch.Tensor) or not saliency.is_floating_point():
        found = saliency.dtype if isinstance(saliency, torch.Tensor) else f"a {type(saliency).__name__}"
        raise TypeError(f"saliency is {found}; it must be a tensor of floats")
    if saliency.dim() != 2 or not saliency.numel():
        raise ValueError(f"saliency is of shape {tuple(saliency.shape)}; it must be (N, C) with N, C ≥ 1")
    if saliency.isnan().any():
        raise ValueError("saliency holds NaN, which has no rank; it must hold numbers only")
    channels = saliency.shape[1]
    if not isinstance(ranking, torch.Tensor) or ranking.dtype != torch.int64:
        found = ranking.dtype if isinstance(ranking, torch.Tensor) else f"a {type(ranking).__name__}"
        raise TypeError(f"ranking is {found}; it must be an int64 tensor")
    if ranking.shape != (channels,):
        raise ValueError(
            f"ranking is of shape {tuple(ranking.shape)}; for {channels} channels it must be {(channels,)}"
        )
    if not torch.equal(ranking.sort().values.cpu(), torch.arange(channels)):
        raise ValueError(f"ranking is no permutation of 0 to {channels - 1}; it must hold every channel once")
    if isinstance(top, bool) or not isinstance(top, numbers.Integral):
        raise TypeError(f"top is a {type(top).__name__}; it must be an int")
    if not 1 <= top <= channels:
        raise ValueError(f"top is {top}; it must be from 1 to {channels}, the number of channels")
