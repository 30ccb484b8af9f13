"""Layer-aware thresholds (AAP §3.3): what T removes from one network, and which T removes so much."""

import itertools
from dataclasses import replace

import numpy as np
import torch

from paamops.selection import select

REMOVED = -1.0  # the score of a filter that is gone: below any attention, so that every threshold removes it again
SAFE = 1 + 1e-9  # T·w must reach a score in spite of rounding


class Thresholds:
    """The network that `keep` leaves, seen by T: a filter of layer l goes when its score ≤ T·w_l.

    w_l is the layer's share of the parameters or FLOPs that are left in all layers' weights (§3.3), the mean of both
    shares where both count. A channel set goes when the mean score of its filters is at most the mean of their
    thresholds. Pinned sets stay, the best set of every layer stays, and so does the better half of every layer's
    filters, rounded up, but for dead ones: a layer of many parameters has a high threshold, at which all of its filters
    but one can go at once, before the layer has become smaller, its threshold lower and the filters that are left are
    trained again. (The paper has no such limit; the authors' code can empty a layer.) What more has to go goes in the
    next round.

    Args:
        channels: ChannelMap of the unpruned network.
        keep: (S,) bool, what is left.
        scores: (F,) attention of its filters; that of removed ones is not looked at.
        measures: "params", "flops" or both, as in `Objective.measures`.
    """

    def __init__(self, channels, keep, scores, measures):
        self.channels, self.keep = channels, keep
        self.scores = torch.where(keep[channels.sets], scores.detach().cpu().double(), REMOVED)
        params, flops = channels.layer_costs(keep)
        shares = {"params": params / params.sum(), "flops": flops / flops.sum()}
        self.weights = torch.stack([shares[name] for name in measures]).mean(0)  # (L,)
        self.stays = self._stays()

    def select(self, threshold):
        """The Selection that T = `threshold` leaves."""
        selection = select(self.channels, self.scores, threshold=threshold * self.weights)
        keep = selection.keep | self.stays
        return replace(selection, keep=keep, achieved=self.channels.cost(keep))

    def _stays(self):
        """(S,) bool: what no T removes in this round."""
        channels, scores = self.channels, self.channels.set_scores(self.scores)
        stays = channels.pinned | channels.guarded(scores)
        order = torch.where(stays, torch.inf, scores)  # those that stay anyway count first in their layer's half
        for start, stop in itertools.pairwise(channels.offsets.tolist()):
            sets = channels.sets[start:stop]
            present = sets[self.keep[sets]]
            best = present[order[present].argsort(descending=True, stable=True)[: (len(present) + 1) // 2]]
            stays[best[scores[best] > 0]] = True
        return stays

    def lowest(self, enough):
        """The lowest T at which `enough(cost)` holds, or None: by bisection over the T at which each set goes."""
        steps = self.steps()
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            if enough(self.select(steps[middle]).achieved):
                high = middle
            else:
                low = middle + 1
        return float(steps[low]) if low < len(steps) else None

    def steps(self):
        """The T, rising, at which the sets that are free to go go: (their scores) / (their weights)."""
        channels = self.channels
        free = self.keep & ~self.stays
        ratio = channels.set_scores(self.scores) / channels.set_scores(self.weights[channels.filters])
        return np.unique(ratio[free].clamp(min=0).numpy()) * SAFE

    @property
    def smallest(self):
        """The Cost of what no T can go below in this round."""
        steps = self.steps()
        return self.select(steps[-1]).achieved if len(steps) else self.channels.cost(self.keep)
