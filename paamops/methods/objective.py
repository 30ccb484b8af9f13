"""What a pruned network must be: limits on accuracy and size, and what is made small within them."""

import math
import numbers
from dataclasses import dataclass

import numpy as np

from paamops.selection import absolute

MINIMISE = ("params", "flops", "both")


@dataclass(frozen=True)
class Objective:
    """The target of a run (AAP §3.2, Tables 2 to 5 and 7).

        Objective(max_accuracy_drop=0.01)                    the fewest parameters within the drop (AAP-P)
        Objective(max_accuracy_drop=0.01, minimise="flops")  the fewest FLOPs within it (AAP-F)
        Objective(params=0.3)                                at most 30 % of the parameters, and no smaller
        Objective(params=0.2, flops=0.2)                     the same under two limits
        Objective(max_accuracy_drop=0.01, params=0.3)        the limit met within the drop, then no further
        Objective(max_accuracy_drop=0.01, minimise="both")   the least of both within the drop: of the mean share

    Attributes:
        max_accuracy_drop: the accuracy that may be lost against the unpruned network, in the unit of `evaluate`: 0.01
            is one point where it returns fractions. 0 allows no loss; a negative number asks for a gain.
        params, flops: what may stay: a float in (0, 1] is a fraction of the unpruned network's, an int a number.
        minimise: "params", "flops" or "both": what is made small within all limits. Default: nothing beyond the limits
            where there is one on size, the parameters where there is none.

    ValueError, TypeError: no limit at all, one out of range, `minimise` without `max_accuracy_drop` (there would be no
    reason to stop).
    """

    max_accuracy_drop: float | None = None
    params: float | int | None = None
    flops: float | int | None = None
    minimise: str | None = None

    def __post_init__(self):
        for name in ("max_accuracy_drop", "params", "flops"):  # NumPy's numbers too: a run's state is JSON
            value = getattr(self, name)
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
        drop = self.max_accuracy_drop
        if drop is None and self.params is None and self.flops is None:
            raise ValueError("an Objective needs at least one of max_accuracy_drop, params and flops")
        if drop is not None:
            if isinstance(drop, bool) or not isinstance(drop, numbers.Real):
                raise TypeError(f"max_accuracy_drop is a {type(drop).__name__}; it must be a number")
            if not math.isfinite(drop):
                raise ValueError(f"max_accuracy_drop is {drop}; it must be finite")
        for name in ("params", "flops"):
            if getattr(self, name) is not None:
                absolute(name, getattr(self, name), 1)  # refuses what is out of range
        if self.minimise is not None:
            if self.minimise not in MINIMISE:
                raise ValueError(f"minimise is {self.minimise!r}; it must be one of {', '.join(map(repr, MINIMISE))}")
            if drop is None:
                raise ValueError(
                    f"minimise is {self.minimise!r} without max_accuracy_drop; without a limit on the accuracy the"
                    " smallest network is an empty one"
                )

    @property
    def sizes(self):
        """The names of the sizes that are limited."""
        return tuple(name for name in ("params", "flops") if getattr(self, name) is not None)

    @property
    def measures(self):
        """The names of the sizes that the search goes by; their shares are averaged."""
        if self.minimise in ("params", "flops"):
            return (self.minimise,)
        return ("params", "flops") if self.minimise == "both" else self.sizes or ("params",)

    def limit(self, name, whole):
        """The number of parameters or FLOPs that may stay, of a network that has `whole`."""
        return absolute(name, getattr(self, name), getattr(whole, name))

    def size(self, cost, whole):
        """The size of a network as a share of the whole one: the mean over `measures`."""
        return sum(getattr(cost, name) / getattr(whole, name) for name in self.measures) / len(self.measures)

    def sizes_met(self, cost, whole):
        """Whether all limits on size are kept; true where there are none."""
        return all(getattr(cost, name) <= self.limit(name, whole) for name in self.sizes)

    def accuracy_met(self, accuracy, start):
        """Whether the accuracy is within the drop from `start`; true where no drop is given."""
        return self.max_accuracy_drop is None or start - accuracy <= self.max_accuracy_drop + 1e-9
