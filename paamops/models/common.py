"""What the networks made for 224x224 images share: fewer strides for small images, and how they are initialised."""

from torch import nn
from torch.nn import functional as F

SMALL = 64  # the largest side of an image, in pixels, that counts as small: CIFAR has 32, Tiny-ImageNet 64


def is_small(images):
    """Whether neither side of `images` (N, C, H, W) is longer than SMALL."""
    return max(images.shape[-2:]) <= SMALL


def convolve(conv, x, stride):
    """`conv(x)` at another stride: the same weights serve small and large images."""
    return F.conv2d(x, conv.weight, conv.bias, stride, conv.padding, groups=conv.groups)


def initialise(model):
    """Normal weights with deviation (2 / fan_in)^(1/2), as in He et al. (2015); biases of linear layers 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
