"""Residual networks of bottleneck blocks: ResNet-50 and ResNet-101."""

from torch import nn
from torch.nn import functional as F

from paamops.models.common import convolve, initialise, is_small

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # of each stage
WIDTHS = (64, 128, 256, 512)  # of the 3x3 convolutions of each stage
EXPANSION = 4  # a block puts out so many times the width of its 3x3 convolution


class Bottleneck(nn.Module):
    """y = relu(shortcut(x) + f(x)), f: 1x1, 3x3 and 1x1 convolution, each with norm, the first two with ReLU.

    The stride is that of the 3x3 convolution. The shortcut is the identity, or a 1x1 convolution with norm where the
    shape changes (the paper's option B).
    """

    def __init__(self, in_channels, width, stride):
        super().__init__()
        channels = EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if in_channels != channels or stride != 1:
            conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.shortcut(x) + self.norm3(self.conv3(y)))


class BottleneckResNet(nn.Module):
    """A 7x7 convolution, max pooling, four stages of bottleneck blocks, the mean over space, and one linear layer.

    x (N, in_channels, H, W), H and W at least 1 → logits (N, num_classes). The input's shape decides how it is read:
    where neither side is longer than 64 pixels (CIFAR, Tiny-ImageNet), the same 7x7 convolution has stride 1 and there
    is no max pooling, so that 32x32 pixels end as 4x4; larger images take the paper's strides, 224x224 end as 7x7.
    Source: He et al., Deep Residual Learning for Image Recognition (2016), Table 1; 25,557,032 (depth 50) and
    44,549,160 (depth 101) parameters for 3 channels and 1000 classes, 23,528,522 and 42,520,650 for 10. Our choices:
    the stride of a block is in its 3x3 convolution, as torchvision has it, where the paper's is in the first 1x1; the
    form for small images, on which the AAP paper is silent. Initialised as in He et al. (2015).
    """

    def __init__(self, depth, in_channels, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        blocks, wide = BLOCKS[depth], [EXPANSION * width for width in WIDTHS]
        self.stage1 = stage(64, WIDTHS[0], blocks[0], stride=1)
        self.stage2 = stage(wide[0], WIDTHS[1], blocks[1], stride=2)
        self.stage3 = stage(wide[1], WIDTHS[2], blocks[2], stride=2)
        self.stage4 = stage(wide[2], WIDTHS[3], blocks[3], stride=2)
        self.linear = nn.Linear(wide[3], num_classes)
        initialise(self)

    def forward(self, x):
        if is_small(x):
            x = F.relu(self.norm(convolve(self.conv, x, stride=1)))
        else:
            x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, stride=2, padding=1)
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.linear(x.mean((2, 3)))


def stage(in_channels, width, blocks, stride):
    """`blocks` blocks in a row, the first of which changes the width and the stride."""
    first = Bottleneck(in_channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(EXPANSION * width, width, 1) for _ in range(blocks - 1)))
