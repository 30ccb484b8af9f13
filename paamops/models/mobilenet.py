"""MobileNetV2, at width 1."""

from torch import nn
from torch.nn import functional as F

from paamops.models.common import convolve, initialise, is_small

# Of each stage: how many times wider its blocks are inside, its channels, its blocks, the stride of the first of them.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
SECOND = 1  # the first block of the second stage, among all blocks


class Block(nn.Module):
    """An inverted residual: 1x1 up, 3x3 depthwise, each with norm and ReLU6; 1x1 down with norm, and no activation.

    x is added where the shape is the same. At ratio 1 there is nothing to widen, and the first convolution is left out.
    """

    def __init__(self, in_channels, channels, ratio, stride):
        super().__init__()
        width = ratio * in_channels
        self.stride = stride
        self.residual = stride == 1 and in_channels == channels
        self.conv1 = None if ratio == 1 else nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = None if ratio == 1 else nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x, stride):
        y = x if self.conv1 is None else F.relu6(self.norm1(self.conv1(x)))
        y = F.relu6(self.norm2(convolve(self.conv2, y, stride)))
        y = self.norm3(self.conv3(y))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """A 3x3 convolution, 17 inverted residuals, a 1x1 convolution of 1280, the mean over space, and one linear layer.

    x (N, in_channels, H, W), H and W at least 1 → logits (N, num_classes). The input's shape decides how it is read:
    where neither side is longer than 64 pixels, the first convolution and the second stage have stride 1 with the same
    weights, so that 32x32 pixels end as 4x4; larger images take the paper's strides, 224x224 end as 7x7.
    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks (2018), Table 2; 3,504,872 parameters
    for 3 channels and 1000 classes (the paper: 3.4 M), 2,236,682 for 10. Our choices: no dropout before the linear
    layer, as is usual on CIFAR; the form for small images, on which the AAP paper is silent. Its authors' code has
    stride 1 in the third stage too, an expansion of ratio 1 in the first block and ReLU for ReLU6. Initialised as in
    He et al. (2015).
    """

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.blocks = nn.ModuleList()
        width = 32
        for ratio, channels, blocks, stride in STAGES:
            for block in range(blocks):
                self.blocks.append(Block(width, channels, ratio, stride if block == 0 else 1))
                width = channels
        self.conv2 = nn.Conv2d(width, 1280, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)
        initialise(self)

    def forward(self, x):
        small = is_small(x)
        x = F.relu6(self.norm1(convolve(self.conv1, x, stride=1 if small else 2)))
        for place, block in enumerate(self.blocks):
            x = block(x, stride=1 if small and place == SECOND else block.stride)
        x = F.relu6(self.norm2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))
