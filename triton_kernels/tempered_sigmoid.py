"""Sigmoid with a temperature and the sum of its scores on a GPU."""

from . import score_activation


def tempered_sigmoid(x, temperature):
    """score = sigmoid(x / temperature) like x; l1 = Σ |score|, 0-d in the accumulator dtype."""
    return score_activation.forward(x, temperature, "tempered_sigmoid")


def tempered_sigmoid_backward(grad_score, grad_l1, x, temperature):
    """Gradient like x, of the scores and of their sum."""
    return score_activation.backward(grad_score, grad_l1, x, temperature, "tempered_sigmoid")
