"""ReLU and the activation attention of its result on a GPU: one read of x, one write of y."""

import torch

from . import attention


def relu_attention(x, p):
    """y = relu(x) like x; sum, max: (N, C) of y^p in the accumulator dtype."""
    y = torch.empty_like(x)
    return y, *attention.forward(x, y, p)


def relu_attention_backward(grad_y, grad_sum, grad_max, y, max, p):
    """Gradient like y: that of y, of the sum and of the first maximum, where y is not 0."""
    del max  # its place is what matters, and a power may have rounded two places to one value
    return attention.backward(grad_y, grad_sum, grad_max, y, p)
