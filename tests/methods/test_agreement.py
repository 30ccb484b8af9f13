"""The agreement of the images with a ranking: against SciPy's τ-b image by image, by hand, and at its edges."""

import math
import warnings

import pytest
import torch
from scipy.stats import kendalltau

from paamops.methods import agreement as module
from paamops.methods.agreement import agreement

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAKERS = {
    "random": lambda n, c: torch.randn(n, c),
    "ties": lambda n, c: torch.randint(3, (n, c)).float(),
    "many ties": lambda n, c: (torch.rand(n, c) < 0.2).float(),
    "one value an image": lambda n, c: torch.randn(n, 1).expand(n, c),
    "infinite": lambda n, c: torch.tensor([-math.inf, 0.0, 1.0, math.inf])[torch.randint(4, (n, c))],
    "zeros of both signs": lambda n, c: torch.tensor([-0.0, 0.0, 1.0])[torch.randint(3, (n, c))],
}


def oracle(saliency, ranking, top):
    """Image by image, with Python's sort and SciPy's τ."""
    place = [0] * len(ranking)
    for rank, channel in enumerate(ranking.tolist()):
        place[channel] = rank
    kendall, overlap = 0.0, 0.0
    for row in saliency.double().tolist():
        if len(row) == 1:
            kendall += 1
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ranked = [sorted(set(row)).index(value) for value in row]  # SciPy takes inf for no number
                found = kendalltau(ranked, [-p for p in place]).statistic
            kendall += 0 if math.isnan(found) else found
        own = sorted(range(len(row)), key=lambda channel, row=row: (-row[channel], channel))[:top]
        overlap += len(set(own) & set(ranking[:top].tolist())) / top
    return kendall / len(saliency), overlap / len(saliency)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (5, 2), (7, 5), (4, 33)], ids=str)
def test_against_scipy(make, dtype, shape):
    saliency, ranking = make(*shape).to(dtype), torch.randperm(shape[1])
    for top in {1, (shape[1] + 1) // 2, shape[1]}:
        assert agreement(saliency, ranking, top) == pytest.approx(oracle(saliency, ranking, top), abs=1e-12)


def test_by_hand():
    saliency = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9], [0.5, 0.5, 0.1], [0.2, 0.2, 0.2]])
    # The pairs (0, 1), (0, 2), (1, 2) of the ranking 0, 1, 2: all as it has them; all the other way round; one without
    # an order and two as it has them, (2 − 0) / √(2 · 3); none with an order.
    found = agreement(saliency, torch.tensor([0, 1, 2]), 1)
    assert found.kendall == pytest.approx((1 - 1 + 2 / math.sqrt(6) + 0) / 4, abs=1e-15)
    assert found.overlap == 3 / 4  # the second image's first channel is 2, the others' is 0, two of them by index
    assert agreement(saliency, torch.tensor([0, 1, 2]), 2).overlap == pytest.approx((1 + 1 / 2 + 1 + 1) / 4)
    assert agreement(saliency, torch.tensor([2, 1, 0]), 3).overlap == 1  # all of them are always the same


def test_extremes():
    ranking = torch.randperm(40)
    place = ranking.argsort().double()
    assert agreement(-place.expand(6, -1), ranking, 7) == (1, 1)
    assert agreement(place.expand(6, -1), ranking, 20) == (-1, 0)
    assert agreement(torch.zeros(2, 40), ranking, 40) == (0, 1)
    assert agreement(torch.zeros(2, 1), torch.tensor([0]), 1) == (1, 1)


def test_nothing_but_the_order_counts():
    saliency, ranking = torch.randn(9, 17).double(), torch.randperm(17)
    expected = agreement(saliency, ranking, 6)
    assert agreement(saliency.exp(), ranking, 6) == expected
    assert agreement(saliency * 1e-300, ranking, 6) == expected
    shuffle = torch.randperm(17)  # new names for the channels
    kendall, overlap = agreement(saliency[:, shuffle], shuffle.argsort()[ranking], 6)
    assert (kendall, overlap) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 23, 1 << 20])
def test_chunks_do_not_matter(monkeypatch, chunk):
    saliency, ranking = torch.randint(6, (19, 11)).float(), torch.randperm(11)
    expected = oracle(saliency, ranking, 4)
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert agreement(saliency, ranking, 4) == pytest.approx(expected, abs=1e-12)


def test_strides_and_gradients():
    wide = torch.randn(12, 10, requires_grad=True)
    saliency, ranking = wide[::2, 1::3].T, torch.randperm(6)
    assert agreement(saliency, ranking, 2) == agreement(saliency.detach().clone(), ranking, 2)


def test_no_tensor_of_all_pairs():
    n, c = 3, 400
    saliency, ranking = torch.rand(n, c), torch.randperm(c)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        agreement(saliency, ranking, 3)
    assert max(event.cpu_memory_usage for event in profile.events()) <= 16 * n * c


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"saliency": torch.zeros(2, 3, 1)}, ValueError, r"saliency is of shape \(2, 3, 1\)"),
        ({"saliency": torch.zeros(0, 3)}, ValueError, r"saliency is of shape \(0, 3\).*N, C ≥ 1"),
        ({"saliency": torch.zeros(2, 0)}, ValueError, r"saliency is of shape \(2, 0\)"),
        ({"saliency": torch.tensor([[0.0, math.nan, 1.0]])}, ValueError, "saliency holds NaN"),
        ({"saliency": torch.zeros(2, 3).int()}, TypeError, r"saliency is torch.int32"),
        ({"saliency": [[1.0]]}, TypeError, "saliency is a list"),
        ({"ranking": torch.arange(3).int()}, TypeError, "ranking is torch.int32"),
        ({"ranking": [0, 1, 2]}, TypeError, "ranking is a list"),
        ({"ranking": torch.arange(4)}, ValueError, r"ranking is of shape \(4,\).*must be \(3,\)"),
        ({"ranking": torch.tensor([0, 1, 1])}, ValueError, "ranking is no permutation of 0 to 2"),
        ({"ranking": torch.tensor([1, 2, 3])}, ValueError, "ranking is no permutation"),
        ({"top": 0}, ValueError, "top is 0; it must be from 1 to 3"),
        ({"top": 4}, ValueError, "top is 4"),
        ({"top": 1.0}, TypeError, "top is a float"),
        ({"top": True}, TypeError, "top is a bool"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        agreement(**{"saliency": torch.rand(2, 3), "ranking": torch.arange(3), "top": 2} | change)
