"""How many images rank each channel where, and the ranking that they elect."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
METHODS = ("assignment", "borda")
MOST_CHANNELS = 65536  # a table of their votes takes 32 GiB
SPOILT = 1 << 32  # taken off votes[0, 0] for an image with NaN, where nothing can be raised


def vote_ranking(saliency, votes=None):
    """votes[j, r] += how many images place channel j at rank r; returns votes.

    The rank of channel j of image n is the number of channels k before it: saliency[n, k] > saliency[n, j], or equal
    and k < j. So rank 0 is the greatest saliency, and ties go to the lower index; -0.0 equals 0.0, infinite ones rank
    like all others.

    saliency: (N, C), float16 to float64, any strides, N ≥ 0, C from 1 to 65536. votes: (C, C) int64, contiguous, on the
    device of saliency; None is a new table of zeros. Batches are counted one after the other into one table, which is
    changed in place; tables of several processes are merged by their sum. Of every call, each row and each column
    receives N votes. Not differentiable.

    One pass over saliency, and integer additions, whose order does not matter. Memory beside the table: on the CPU two
    bytes for each saliency, on a GPU none.

    TypeError: saliency or votes is no tensor, or of another dtype. ValueError: another shape, device or layout; on the
    CPU also NaN in saliency, before any vote is added (under torch.compile a RuntimeError). On a GPU values cannot be
    looked at without a sync: an image with NaN casts no vote, and 2^32 is taken off votes[0, 0] for it, which later
    votes and sums of tables do not hide: `elect` refuses a table with negative votes.

    Source: GlobalPru (Wang et al. 2023), section 3.2: the channel rankings of all images are collected, and the global
    ranking is voted for. The paper does not say how; see `elect` for what is made of the votes.
    """
    _check_saliency(saliency)
    channels = saliency.shape[1]
    if votes is None:
        votes = torch.zeros(channels, channels, dtype=torch.int64, device=saliency.device)
    else:
        _check_votes(votes, saliency)
    saliency = saliency.detach()
    try:
        vote_ranking_op(saliency, votes)
    except RuntimeError:  # the C++ kernel knows ValueError no more than other kernels do
        if saliency.is_cpu:
            _refuse_nan(saliency)
        raise
    return votes


def elect(votes, method="assignment"):
    """ranking (C,) int64: ranking[r] is the channel that the votes place at rank r.

    "assignment": of all permutations the one with the most votes, max Σ_r votes[ranking[r], r]. Among those with as
    many: the one closest to the mean ranks m_j = Σ_r r · votes[j, r] / n, min Σ_r (r - m_ranking[r])², where n is the
    number of images. Among those as close: the first in lexicographic order.
    "borda", for ablations: by the mean rank alone, ties by index.

    votes: (C, C) int64 as `vote_ranking` counts them, on any device; every row and every column has the sum n > 0.
    Computed on the CPU (it waits for a GPU), returned on the device of votes.

    TypeError: votes is no int64 tensor. ValueError: votes is not square; has a negative number, as of images whose
    saliency was NaN; has rows or columns of different sums; or has no votes at all; an unknown method.

    Source: GlobalPru (Wang et al. 2023), section 3.2, takes the channel ranking that most images support and gives no
    formula. A plurality of whole rankings means nothing, since of C! rankings hardly two images share one. So every
    image votes for each channel's place instead, and the places are filled as a whole: the assignment problem (Kuhn
    1955), solved by scipy.optimize.linear_sum_assignment. The order of the three aims is exact, not a weighted sum:
    the best assignments are all those over the edges without slack, which are found in integers, and the next aim looks
    for an assignment over these edges only. Σ_r (r - m_ranking[r])² is least where Σ_r r · n m_ranking[r], a sum of
    integers, is greatest. It is exact while n C³ < 2^53 (at C = 512: 67 million images); beyond, the mean ranks are
    rounded down, by less than 2^-52 C³.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {METHODS}")
    table, images = _checked_table(votes)
    channels = len(table)
    sums = table @ np.arange(channels)  # n m_j
    if method == "borda":
        ranking = sums.argsort(kind="stable")
    else:
        spare = (images * channels**3).bit_length() - 53
        closeness = np.arange(channels) * (sums >> max(spare, 0))[:, None]
        edges = np.ones_like(table, dtype=bool)
        for weights in (table, closeness):
            ranking, edges = _best_assignments(weights, edges)
        ranking = _first_assignment(ranking, edges)
    return torch.from_numpy(ranking).to(votes.device)


def _best_assignments(weights, edges):
    """Over the given edges (channel, rank): an assignment with the greatest sum of weights, as ranking, and edges over
    which all assignments have this sum and outside of which none has.

    By duality: with potentials u_j + v_r ≥ weights[j, r], equal where j is assigned to r, an assignment is optimal if
    and only if all of its edges are equalities. u follows from v, and v are shortest distances over the ranks, where a
    step from r to s costs what the channel at s would lose by a move to r (Bellman and Ford; optimality of the
    assignment is what rules out negative cycles).
    """
    channels = np.arange(len(weights))
    chosen, rank = linear_sum_assignment(np.where(edges, -weights.astype(float), np.inf))
    ranking = np.empty_like(rank)
    ranking[rank] = chosen
    kept = weights[ranking, channels]
    loss = np.where(edges[ranking], kept[:, None] - weights[ranking], 1 << 62).T  # loss[r, s]
    v = np.zeros_like(kept)
    for _ in channels:
        shorter = np.minimum(v, (v[:, None] + loss).min(0))
        if np.array_equal(v, shorter):
            break
        v = shorter
    u = np.empty_like(kept)
    u[ranking] = kept - v
    return ranking, edges & (weights == u[:, None] + v)


def _first_assignment(ranking, edges):
    """The lexicographically first ranking over the edges (channel, rank), given any one.

    Rank by rank, the lowest channel is chosen that can come here: the channel at this rank moves to another rank, the
    channel there to the next, and so on round a cycle of ranks that are not yet settled.
    """
    ranking = ranking.copy()
    place = np.empty_like(ranking)
    place[ranking] = np.arange(len(ranking))
    for r in range(len(ranking)):
        lower = np.flatnonzero(edges[: ranking[r], r])
        lower = lower[place[lower] > r]
        if not len(lower):
            continue
        before = _reachable(r, ranking, edges)
        lower = lower[before[place[lower]] >= 0]
        if not len(lower):
            continue
        s, channel = place[lower[0]], lower[0]
        while s != r:  # back along the path: every channel moves to the rank that was reached from its own
            ranking[s] = ranking[before[s]]
            s = before[s]
        ranking[r] = channel
        place[ranking] = np.arange(len(ranking))
    return ranking


def _reachable(start, ranking, edges):
    """before[s]: from which rank the path reaches s, -1 if none does; over unsettled ranks, those from start on."""
    before = np.full(len(ranking), -1)
    before[start] = start
    unseen = np.arange(start + 1, len(ranking))
    front = [start]
    while front and len(unseen):
        rank = front.pop()
        found = edges[ranking[rank], unseen]
        before[unseen[found]] = rank
        front.extend(unseen[found].tolist())
        unseen = unseen[~found]
    return before


def _checked_table(votes):
    """votes as an array, and the number of images."""
    if not isinstance(votes, torch.Tensor) or votes.dtype != torch.int64:
        found = votes.dtype if isinstance(votes, torch.Tensor) else f"a {type(votes).__name__}"
        raise TypeError(f"votes is {found}; it must be an int64 tensor")
    if votes.ndim != 2 or votes.shape[0] != votes.shape[1] or not len(votes):
        raise ValueError(f"votes has shape {tuple(votes.shape)}; it must be (C, C), C at least 1")
    table = votes.detach().cpu().numpy()
    if table.min() < 0:
        raise ValueError(
            f"votes has {table.min()} as its smallest; none must be negative (NaN in a saliency makes the first one so)"
        )
    sums = np.concatenate((table.sum(0), table.sum(1)))
    if sums.min() != sums.max():
        raise ValueError(
            f"votes has rows and columns with sums from {sums.min()} to {sums.max()}; all must be the number of images"
        )
    if sums[0] == 0:
        raise ValueError("votes has no votes; it must have those of one image at least: call vote_ranking first")
    return table, int(sums[0])


def vote_ranking_reference(saliency, votes):
    """The formula, by a stable sort; NaN as in `vote_ranking`."""
    if saliency.is_cpu:
        _refuse_nan(saliency)
    add_votes(saliency, votes)


def add_votes(saliency, votes):
    """The votes of images without NaN, and what is taken off for the others."""
    channels = saliency.shape[1]
    order = (saliency + 0.0).argsort(dim=1, descending=True, stable=True)  # -0.0 becomes 0.0 for sorts by bits
    spoilt = saliency.isnan().any(1)
    cells = order * channels + torch.arange(channels, device=saliency.device)
    cast = (~spoilt).long()[:, None].expand_as(cells)
    votes.view(-1).scatter_add_(0, cells.flatten(), cast.flatten())
    votes[0, 0] -= SPOILT * spoilt.sum()


vote_ranking_op = define(
    "vote_ranking(Tensor saliency, Tensor(a!) votes) -> ()",
    reference=vote_ranking_reference,
    fake=lambda saliency, votes: None,
)


def _check_saliency(saliency):
    if not isinstance(saliency, torch.Tensor):
        raise TypeError(f"saliency is a {type(saliency).__name__}; it must be a tensor")
    if saliency.dtype not in DTYPES:
        raise TypeError(f"saliency has dtype {saliency.dtype}; it must be float16, bfloat16, float32 or float64")
    if saliency.ndim != 2 or not 1 <= saliency.shape[1] <= MOST_CHANNELS:
        shape = tuple(saliency.shape)
        raise ValueError(f"saliency has shape {shape}; it must be (N, C), C from 1 to {MOST_CHANNELS}")


def _check_votes(votes, saliency):
    if not isinstance(votes, torch.Tensor):
        raise TypeError(f"votes is a {type(votes).__name__}; it must be a tensor or None")
    if votes.dtype != torch.int64:
        raise TypeError(f"votes has dtype {votes.dtype}; it must be int64")
    channels = saliency.shape[1]
    if votes.shape != (channels, channels):
        raise ValueError(
            f"votes has shape {tuple(votes.shape)}; it must be (C, C) of the C of saliency, ({channels}, {channels})"
        )
    if votes.device != saliency.device:
        raise ValueError(f"votes is on {votes.device}; it must be on the device of saliency, {saliency.device}")
    if not votes.is_contiguous():
        raise ValueError(f"votes has strides {votes.stride()}; it must be contiguous, ({channels}, 1)")


def _refuse_nan(saliency):
    images = saliency.isnan().any(1)
    if images.any():
        count, first = int(images.sum()), int(images.nonzero()[0])
        raise ValueError(
            f"saliency has NaN in {count} of {len(images)} images, the first is image {first}; it must have none"
        )
