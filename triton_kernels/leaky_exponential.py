"""Leaky exponential and the sum of its scores on a GPU."""

from . import score_activation


def leaky_exponential(x, slope):
    """score = exp(x) for x ≤ 0, 1 + slope·x above, like x; l1 = Σ |score|, 0-d in the accumulator dtype."""
    return score_activation.forward(x, slope, "leaky_exponential")


def leaky_exponential_backward(grad_score, grad_l1, x, slope):
    """Gradient like x, of the scores and of their sum."""
    return score_activation.backward(grad_score, grad_l1, x, slope, "leaky_exponential")
