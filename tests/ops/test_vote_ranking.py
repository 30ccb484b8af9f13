"""vote_ranking against a sort in Python, elect against all permutations."""

import itertools
import math

import numpy as np
import pytest
import torch

from paamops.ops import vote_ranking as module
from paamops.ops.registration import compiled
from paamops.ops.vote_ranking import elect, vote_ranking

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SETS = range(2, compiled.build_facts()["instruction_set"] + 1) if compiled else ()


def ballots(saliency):
    """(N, C): the rank of every channel in every image, by numpy's sort by (saliency descending, index ascending)."""
    values = saliency.double().numpy()
    ranks = np.empty(values.shape, dtype=np.int64)
    for row, rank in zip(values, ranks, strict=True):
        rank[np.lexsort((np.arange(len(row)), -row))] = np.arange(len(row))
    return ranks


def table(ranks, channels):
    votes = np.zeros((channels, channels), dtype=np.int64)
    for rank in ranks:
        votes[np.arange(channels), rank] += 1
    return torch.from_numpy(votes)


def expected(saliency):
    return table(ballots(saliency), saliency.shape[1])


def few_values(images, channels, values, dtype):
    """Saliencies with many ties, negative ones, both zeros and both infinities."""
    saliency = (torch.randint(0, values, (images, channels)) - values // 2) / 7
    saliency = torch.where(torch.rand(images, channels) < 0.5, saliency, -saliency)
    for special in (math.inf, -math.inf):
        saliency[torch.rand(images, channels) < 0.02] = special
    return saliency.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [1, 4, 60000])
@pytest.mark.parametrize(
    ("images", "channels"), [(1, 1), (5, 1), (7, 2), (3, 24), (4, 25), (5, 48), (4, 49), (6, 129), (3, 1000)]
)
def test_equals_a_sort(images, channels, values, dtype):
    saliency = few_values(images, channels, values, dtype)
    before = saliency.clone()
    votes = vote_ranking(saliency)
    assert votes.dtype == torch.int64
    assert torch.equal(votes, expected(saliency))
    assert torch.equal(saliency, before)
    assert (votes.sum(0) == images).all()
    assert (votes.sum(1) == images).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_the_saliencies_counts(dtype):
    """Random bit patterns: all exponents, denormals, both signs."""
    integer = INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    saliency = torch.randint(info.min, info.max, (9, 300), dtype=integer).view(dtype)
    denormal = torch.randint(0, 50, (9, 300), dtype=integer).view(dtype)
    for values in (saliency.nan_to_num(1.0), denormal, -denormal, torch.cat((denormal, -denormal), 1)):
        assert torch.equal(vote_ranking(values), expected(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_saliencies_that_crowd_together_in_a_wide_range(dtype):
    """Neighbouring floats beside far ones: in the highest bits in which the saliencies differ, most are equal."""
    integer = INTEGERS[dtype.itemsize]
    one = torch.ones((), dtype=dtype).view(integer)
    saliency = (one + torch.randint(0, 250, (6, 400), dtype=integer)).view(dtype)
    for far in ([], [math.inf], [-math.inf, math.inf], [-1.0, torch.finfo(dtype).max]):
        values = torch.cat((saliency, torch.tensor([far] * 6, dtype=dtype).reshape(6, -1)), 1)
        values = values[:, torch.randperm(values.shape[1])]
        assert torch.equal(vote_ranking(values), expected(values))


def test_ties_go_to_the_lower_index():
    order = vote_ranking(torch.tensor([[0.0, -0.0, 1.0, 0.0, -0.0, -1.0]])).argmax(1)
    assert order.tolist() == [1, 2, 0, 3, 4, 5]
    for channels in (3, 100):
        assert torch.equal(vote_ranking(torch.full((2, channels), -0.5)), 2 * torch.eye(channels, dtype=torch.int64))


def test_infinite_saliencies_rank_at_the_ends():
    votes = vote_ranking(torch.tensor([[-math.inf, 3.0, math.inf, -7.0, math.inf]]))
    assert votes.argmax(1).tolist() == [4, 2, 0, 3, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(dtype):
    channels = 130
    base = torch.randn(2 * channels, 40).to(dtype)
    for saliency in (
        base[:channels, :8].t(),
        base[::2, :9].t(),
        base.flatten()[: 6 * channels * 3].view(6, channels, 3)[..., 1],
        base[0, :1].expand(5, channels),
        base[:channels, 0].expand(7, channels),
        base.t()[5:6, :channels],
    ):
        assert torch.equal(vote_ranking(saliency), expected(saliency))


def test_no_images():
    assert torch.equal(vote_ranking(torch.empty(0, 5)), torch.zeros(5, 5, dtype=torch.int64))
    votes = torch.randint(0, 9, (5, 5))
    before = votes.clone()
    assert vote_ranking(torch.empty(0, 5), votes) is votes
    assert torch.equal(votes, before)


def test_batches_and_processes_add_up():
    """One table over several batches, and the sum of several tables, are the table of all images."""
    saliency = torch.randn(57, 70).round(decimals=1)
    votes = None
    for batch in saliency.split(13):
        votes = vote_ranking(batch, votes)
    assert torch.equal(votes, expected(saliency))
    assert torch.equal(vote_ranking(saliency[:20]) + vote_ranking(saliency[20:]), votes)


def test_adds_in_place():
    saliency, votes = torch.randn(9, 33), torch.randint(0, 1 << 40, (33, 33))
    before = votes.clone()
    assert vote_ranking(saliency, votes) is votes
    assert torch.equal(votes - before, expected(saliency))
    layers = torch.zeros(3, 33, 33, dtype=torch.int64)
    vote_ranking(saliency, layers[1])
    assert torch.equal(layers[1], expected(saliency))
    assert not layers[[0, 2]].any()


def test_many_images():
    saliency = torch.randn(5, 70)
    times = torch.randint(800, 4000, (5,))
    right = torch.zeros(70, 70, dtype=torch.int64)
    for image, count in zip(saliency, times, strict=True):
        right += count * expected(image[None])
    assert torch.equal(vote_ranking(saliency.repeat_interleave(times, 0)), right)


@pytest.mark.parametrize("bad", [math.nan, -math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_before_any_vote(dtype, bad):
    for images, channels in ((1, 1), (4, 30), (90, 700)):
        saliency = torch.randn(images, channels).to(dtype)
        image = int(torch.randint(images, ()))
        saliency[image, torch.randint(channels, ())] = bad
        votes = torch.randint(0, 9, (channels, channels))
        before = votes.clone()
        match = f"saliency has NaN in 1 of {images} images, the first is image {image}; it must have none"
        for given in (saliency, saliency.t().contiguous().t()):
            with pytest.raises(ValueError, match=match):
                vote_ranking(given, votes)
            with pytest.raises(ValueError, match=match):
                module.vote_ranking_reference(given, votes)
            assert torch.equal(votes, before)


def test_bad_input():
    saliency, votes = torch.randn(4, 5), torch.zeros(5, 5, dtype=torch.int64)
    for error, match, arguments in (
        (TypeError, "saliency is a list; it must be a tensor", ([[1.0]],)),
        (TypeError, "saliency has dtype torch.int64; it must be float16", (votes,)),
        (TypeError, "saliency has dtype torch.float8_e4m3fn", (saliency.to(torch.float8_e4m3fn),)),
        (ValueError, r"saliency has shape \(20,\); it must be \(N, C\)", (saliency.flatten(),)),
        (ValueError, r"saliency has shape \(4, 0\); it must be \(N, C\), C from 1 to 65536", (saliency[:, :0],)),
        (ValueError, r"saliency has shape \(0, 65537\)", (torch.empty(0, 65537),)),
        (TypeError, "votes is a int; it must be a tensor or None", (saliency, 0)),
        (TypeError, "votes has dtype torch.float32; it must be int64", (saliency, votes.float())),
        (ValueError, r"votes has shape \(5, 4\); .* \(5, 5\)", (saliency, votes[:, :4])),
        (ValueError, "votes is on meta; it must be on the device of saliency, cpu", (saliency, votes.to("meta"))),
        (ValueError, r"votes has strides \(1, 5\); it must be contiguous", (saliency, votes.t())),
        (ValueError, r"votes has strides \(0, 0\); it must be contiguous", (saliency, votes[:1, :1].expand(5, 5))),
    ):
        with pytest.raises(error, match=match):
            vote_ranking(*arguments)
    assert not votes.any()


def test_same_bits_for_any_number_of_threads():
    saliency = few_values(900, 300, 500, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7, 2):
            torch.set_num_threads(count)
            results.append(vote_ranking(saliency))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], expected(saliency))
    for votes in results[1:]:
        assert torch.equal(votes, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_a_sort(dtype):
    for images, channels in ((0, 4), (1, 1), (20, 61)):
        saliency = few_values(images, channels, 30, dtype)
        votes = torch.ones(channels, channels, dtype=torch.int64)
        assert module.vote_ranking_reference(saliency, votes) is None
        assert torch.equal(votes - 1, expected(saliency))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_where_nothing_can_be_raised(dtype):
    """As on a GPU: images with NaN cast no vote, and it shows, whatever is added."""
    saliency, votes = few_values(12, 9, 30, dtype), torch.zeros(9, 9, dtype=torch.int64)
    saliency[[3, 7], [0, 5]] = math.nan
    right = expected(saliency[~saliency.isnan().any(1)])
    right[0, 0] -= 2 * module.SPOILT
    module.add_votes(saliency, votes)
    assert torch.equal(votes, right)
    with pytest.raises(ValueError, match="none must be negative"):
        elect(vote_ranking(torch.randn(1000, 9), votes))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(instruction_set, dtype):
    best = compiled.build_facts()["instruction_set"]
    compiled.use_instruction_set(instruction_set)
    try:
        for channels in (1, 13, 24, 48, 300):
            saliency = few_values(11, channels, 90, dtype)
            assert torch.equal(vote_ranking(saliency), expected(saliency))
            saliency[3, channels // 2] = math.nan
            with pytest.raises(ValueError, match="the first is image 3"):
                vote_ranking(saliency)
    finally:
        compiled.use_instruction_set(best)


def test_opcheck():
    op = torch.ops.paamops.vote_ranking.default
    for images, channels in ((0, 3), (1, 1), (9, 70)):
        for dtype in DTYPES:
            saliency = few_values(images, channels, 30, dtype)
            torch.library.opcheck(op, (saliency, torch.zeros(channels, channels, dtype=torch.int64)))


def test_compiles_as_one_graph():
    saliency, votes = torch.randn(8, 20), torch.ones(20, 20, dtype=torch.int64)
    function = torch.compile(lambda x, v: (vote_ranking(x, v), vote_ranking(-x)), backend="aot_eager", fullgraph=True)
    added, fresh = function(saliency, votes)
    assert torch.equal(votes, 1 + expected(saliency))
    assert torch.equal(added, votes)
    assert torch.equal(fresh, expected(-saliency))


def test_not_differentiable():
    saliency = torch.randn(4, 6, requires_grad=True)
    votes = vote_ranking(saliency)
    assert not votes.requires_grad
    assert torch.equal(votes, expected(saliency.detach()))


# ---- elect ----


def by_brute_force(votes):
    """The permutation that is best in votes, then in Σ (r - m)², then in lexicographic order; in integers."""
    count, rows = int(votes[0].sum()), votes.tolist()
    sums = [sum(rank * number for rank, number in enumerate(row)) for row in rows]

    def key(ranking):
        won = sum(rows[channel][rank] for rank, channel in enumerate(ranking))
        apart = sum((count * rank - sums[channel]) ** 2 for rank, channel in enumerate(ranking))
        return -won, apart, ranking

    return list(min(itertools.permutations(range(len(rows))), key=key))


def random_votes(images, channels):
    """The votes of random permutations: many equally good assignments, where images are few."""
    return table([torch.randperm(channels).numpy() for _ in range(images)], channels)


@pytest.mark.parametrize("images", [1, 2, 3, 4, 6, 50])
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6])
def test_elects_what_brute_force_does(channels, images):
    for _ in range(6):
        votes = random_votes(images, channels)
        ranking = elect(votes)
        assert ranking.dtype == torch.int64
        assert ranking.tolist() == by_brute_force(votes)


def test_elects_the_first_of_equally_good_rankings():
    """Sums of a few permutation matrices that are alike: ties in votes and in mean ranks too."""
    for channels in (4, 6):
        assert elect(torch.ones(channels, channels, dtype=torch.int64)).tolist() == list(range(channels))
        reverse = torch.eye(channels, dtype=torch.int64).flip(0)
        both = reverse + reverse.flip(0)
        assert elect(both).tolist() == by_brute_force(both)
        blocks = torch.block_diag(*[torch.ones(2, 2, dtype=torch.int64)] * (channels // 2))
        for votes in (blocks, blocks[torch.randperm(channels)], blocks[:, torch.randperm(channels)]):
            assert elect(votes).tolist() == by_brute_force(votes)


def test_a_cycle_of_exchanges():
    """Each channel may take one of two ranks, round in a circle: the lowest ranking moves all of them."""
    cycle = torch.eye(6, dtype=torch.int64) + torch.eye(6, dtype=torch.int64).roll(1, 0)
    for votes in (cycle, cycle[torch.randperm(6)], cycle[torch.randperm(6)][:, torch.randperm(6)]):
        assert elect(votes).tolist() == by_brute_force(votes)


def test_a_ranking_that_all_images_share_is_elected():
    ranking = torch.randperm(200)
    votes = torch.zeros(200, 200, dtype=torch.int64)
    votes[ranking, torch.arange(200)] = 17
    for method in ("assignment", "borda"):
        assert torch.equal(elect(votes, method), ranking)


@pytest.mark.parametrize("channels", [40, 150])
def test_no_exchange_of_two_channels_is_better(channels):
    """Of many channels: a permutation, and what it wins cannot be bettered by exchanging any two."""
    saliency = torch.linspace(1, 0, channels)[torch.randperm(channels)] + 0.1 * torch.randn(300, channels)
    votes = vote_ranking(saliency)
    ranking = elect(votes)
    assert torch.equal(ranking.sort().values, torch.arange(channels))
    placed = votes[ranking]
    gain = placed + placed.t() - placed.diagonal()[:, None] - placed.diagonal()
    assert gain.max() == 0
    sums = placed @ torch.arange(channels)
    # Two that are as good in votes: not closer to the mean ranks either; and if as close, the lower index is first.
    closer = (sums[:, None] - sums) * (torch.arange(channels)[:, None] - torch.arange(channels))
    assert (closer[gain == 0] >= 0).all()
    same = (gain == 0) & (closer == 0)
    later = torch.arange(channels)[:, None] < torch.arange(channels)
    assert (ranking[:, None] < ranking)[same & later].all()


def test_more_images_than_floats_can_count():
    """Mean ranks are rounded beyond 2^53, not wrong; the votes are exact."""
    for _ in range(20):
        votes = random_votes(3, 5)
        assert elect(votes << 58).tolist() == by_brute_force(votes)
    most = 1 << 50
    huge = torch.tensor([[most, 1, 0], [1, most - 1, 1], [0, 1, most]])
    assert elect(huge).tolist() == [0, 1, 2]
    assert elect(huge[[2, 0, 1]]).tolist() == [1, 2, 0]


def test_borda_is_by_mean_rank_and_index():
    votes = random_votes(9, 30)
    means = (votes * torch.arange(30)).sum(1).tolist()
    assert elect(votes, "borda").tolist() == sorted(range(30), key=lambda channel: (means[channel], channel))
    assert elect(torch.ones(7, 7, dtype=torch.int64), "borda").tolist() == list(range(7))


def test_elect_leaves_the_votes_and_takes_any_strides():
    votes = random_votes(5, 6)
    before = votes.clone()
    assert torch.equal(elect(votes.t().contiguous().t()), elect(votes))
    assert torch.equal(votes, before)


def test_elect_refuses():
    good = random_votes(4, 5)
    negative, uneven = good.clone(), good.clone()
    negative[0, 0] -= module.SPOILT
    uneven[2, 3] += 1
    columns = torch.zeros(5, 5, dtype=torch.int64)
    columns[:, 1] = 3
    for error, match, arguments in (
        (ValueError, r"method is 'mode'; it must be one of \('assignment', 'borda'\)", (good, "mode")),
        (TypeError, "votes is a list; it must be an int64 tensor", (good.tolist(),)),
        (TypeError, "votes is torch.float32; it must be an int64 tensor", (good.float(),)),
        (ValueError, r"votes has shape \(5, 4\); it must be \(C, C\)", (good[:, :4],)),
        (ValueError, r"votes has shape \(5,\)", (good[0],)),
        (ValueError, r"votes has shape \(0, 0\)", (good[:0, :0],)),
        (ValueError, "votes has -429.* as its smallest; none must be negative .*NaN", (negative,)),
        (ValueError, "votes has rows and columns with sums from 4 to 5", (uneven,)),
        (ValueError, "votes has rows and columns with sums from 0 to 15", (columns,)),
        (ValueError, "votes has no votes.*call vote_ranking first", (good * 0,)),
    ):
        with pytest.raises(error, match=match):
            elect(*arguments)
