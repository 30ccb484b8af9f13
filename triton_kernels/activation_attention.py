"""Activation attention on a GPU: sum and maximum of |x|^p over space, one read of x."""

from . import attention


def activation_attention(x, p):
    """sum, max: (N, C) in the accumulator dtype. x: (N, C, *spatial), any strides.

    Only where more than three spatial dimensions do not merge, which no framework makes, x is copied first.
    """
    return attention.forward(x, None, p)


def activation_attention_backward(grad_sum, grad_max, x, max, p):
    """Gradient like x; that of the maximum goes to its first place in row-major order."""
    del max  # its place is what matters, and a power may have rounded two places to one value
    return attention.backward(None, grad_sum, grad_max, x, p)
