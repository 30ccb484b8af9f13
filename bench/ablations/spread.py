"""What several seeds say: mean, spread, and whether a difference can be told from noise."""

import math
import statistics

from scipy.stats import t


def mean(values):
    return statistics.fmean(values)


def deviation(values):
    """The standard deviation over the seeds, or None where there is one seed only."""
    return statistics.stdev(values) if len(values) > 1 else None


def interval(differences):
    """Half the width of the 95 % interval of the mean of paired differences (Student's t), or None for one seed."""
    n = len(differences)
    return t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else None


def told_apart(differences):
    """Whether the mean of the paired differences is further from 0 than noise explains, at 95 %."""
    half = interval(differences)
    return half is not None and abs(mean(differences)) > half
