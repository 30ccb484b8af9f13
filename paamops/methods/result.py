"""What a run of AAP leaves: the packed network, its history, and a report."""

from dataclasses import dataclass

import torch
from torch import nn

from paamops.channels import ChannelMap
from paamops.methods.objective import Objective


@dataclass(frozen=True)
class Round:
    """One round of Algorithm 1.

    Attributes:
        number: r; round 0 is the unpruned network.
        origin: the round from whose network this one was pruned; None for round 0.
        threshold, step: T[r] and λ[r].
        base: the T that a step from this round's network is added to: T[r], or the lowest that removes a filter of it
            where that is lower, since retrained filters have other scores and their layers other weights.
        params, flops, filters: what is left in this round's network.
        accuracy: what `evaluate` gave; None where the round was not trained.
        outcome: "start" (round 0), "accepted", "rolled back", or "skipped" (it removes too little to be trained).
        seconds: what its training and evaluation took.
    """

    number: int
    origin: int | None
    threshold: float
    step: float
    params: int
    flops: int
    filters: int
    accuracy: float | None
    outcome: str
    base: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """What `AAP.run` returns.

    Attributes:
        model: the packed network. dense: the unpruned one, trained. Both in eval mode.
        met: whether the objective is met; `message` says in a sentence what was reached and why the run ended.
        objective: Objective.
        history: tuple of Round. chosen: the number of the round whose network `model` is.
        channels: ChannelMap of the unpruned network. keep: (S,) bool, the channel sets that are left.
        attention: {"before", "after"}: (F,) float32 scores of every filter, NaN where it is removed.
        thresholds: {"before", "after"}: (L,) float64, T·w_l of every layer: "before" the first round's that removed
            something, on the unpruned network; "after" the chosen round's T, on the network that is left.
    """

    model: nn.Module
    dense: nn.Module
    met: bool
    message: str
    objective: Objective
    history: tuple
    chosen: int
    channels: ChannelMap
    keep: torch.Tensor
    attention: dict
    thresholds: dict

    def report(self, path, rows=None, command=None):
        """Write one self-contained HTML file: before and after, widths, attention, rounds, layer-wise sparsity.

        Args:
            path: the file; it is written whole or not at all.
            rows: lines (what, before, after, change) of the first table; default accuracy, parameters and FLOPs.
            command: the command that made it, to be shown.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from paamops import reporting

        reporting.write(self, path, rows, command)

    def plot_history(self):
        """A matplotlib Figure: accuracy and size over the rounds, accepted and rolled-back ones told apart."""
        from paamops import reporting

        return reporting.history(self)
