"""How far each filter is from the others of its layer, all layers in one call: pruning by the geometric median.

The filter with the least sum of distances to the others is the one that they can best replace: it lies nearest to their
geometric median.
"""

import torch

from paamops.ops.filter_norms import accumulator, check_filters, fake, filter_rows
from paamops.ops.registration import define


def filter_distances(weights, axes=None, groups=None):
    """distance[f] = Σ_{g ≠ f} √(Σ_k (w_f[k] - w_g[k])²) over the filters g of the layer of f, all layers in one call.

    weights, axes and groups are those of `filter_norms`. Returns (F,) float32 (float64 for float64 weights). A layer of
    one filter, or of filters without weights, has distance 0. Weights are detached: there is no gradient.
    Every distance is computed from the differences themselves, accumulated in the result's dtype, and not as
    |w_f|² + |w_g|² - 2 w_f·w_g, whose error grows as the filters come closer to each other. So nothing cancels: the
    relative error is that of a sum of positive terms, however close the filters are and however far from 0.
    A layer of n filters of d weights takes n² d / 2 differences. Memory beside the result: n / 64 numbers a filter.
    NaN and infinities reach all filters of their layer, as they are at that distance from it. Squares are taken in the
    dtype of the result: beyond 1e19 a difference of float32 weights makes infinite distances, below 1e-23 it counts as
    0.
    TypeError, ValueError: as `filter_norms`.
    Source: FPGM (He et al., Filter pruning via geometric median, CVPR 2019), eq. 5 and §3.3.
    """
    return filter_distances_op(*check_filters(weights, axes, groups))


def filter_distances_reference(weights, axes, groups):
    """(F,) float32 (float64 for float64 weights), computed in float64."""
    sums = []
    for layer in zip(weights, axes, groups, strict=True):
        rows = filter_rows(*layer).double()
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(0)
        sums.append(distances.sum(1))
    return torch.cat(sums).to(accumulator(weights[0]))


filter_distances_op = define(
    "filter_distances(Tensor[] weights, int[] axes, int[] groups) -> Tensor",
    reference=filter_distances_reference,
    fake=fake,
)
