"""ShuffleNet V2, at width 1."""

import torch
from torch import nn
from torch.nn import functional as F

from paamops.models.common import convolve, initialise, is_small

STAGES = ((116, 4), (232, 8), (464, 4))  # channels and units; the first unit of each stage has stride 2


class Branch(nn.Module):
    """1x1, 3x3 depthwise and 1x1 convolution, each with norm, the 1x1 ones with ReLU; all `channels` wide."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm3(self.conv3(self.norm2(self.conv2(y)))))


class Shrink(nn.Module):
    """y = relu(norm(conv(norm(conv(x))))), a 3x3 depthwise convolution of stride 2 and a 1x1 convolution."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(self.norm1(self.conv1(x)))))


class Unit(nn.Module):
    """y = shuffle(a | branch(b)) where a and b are the halves of x's channels."""

    def __init__(self, channels):
        super().__init__()
        self.branch = Branch(channels // 2, channels // 2, stride=1)

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        return shuffle(torch.cat([a, self.branch(b)], dim=1))


class FirstUnit(nn.Module):
    """y = shuffle(shortcut(x) | branch(x)), at half the resolution; both sides read all channels of x."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.shortcut = Shrink(in_channels, channels // 2)
        self.branch = Branch(in_channels, channels // 2, stride=2)

    def forward(self, x):
        return shuffle(torch.cat([self.shortcut(x), self.branch(x)], dim=1))


class ShuffleNetV2(nn.Module):
    """A 3x3 convolution of 24, max pooling, three stages of units, a 1x1 convolution of 1024, the mean, a linear layer.

    x (N, in_channels, H, W), H and W at least 1 → logits (N, num_classes). The input's shape decides how it is read:
    where neither side is longer than 64 pixels, the first convolution has stride 1 with the same weights and there is
    no max pooling, so that 32x32 pixels end as 4x4; larger images take the paper's strides, 224x224 end as 7x7.
    Source: Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design (2018), Table 5;
    2,278,604 parameters for 3 channels and 1000 classes (the paper: 2.3 M), 1,263,854 for 10. The AAP paper leaves open
    which ShuffleNet it means and at which width; its authors' code prunes this one, V2 at width 1, with a 1x1
    convolution where ours is 3x3 (1,263,278 parameters). Initialised as in He et al. (2015).
    Halves and shuffles are cut by position, so the channels that cross a stage are tied to one another: in the first
    two stages all of them are one set, which stays, in the third they are 29 sets of 16. Free one by one are those
    inside the branches and those of the first and the last convolution.
    """

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(24)
        width, stages = 24, []
        for channels, units in STAGES:
            stages.append(nn.Sequential(FirstUnit(width, channels), *(Unit(channels) for _ in range(units - 1))))
            width = channels
        self.stage1, self.stage2, self.stage3 = stages
        self.conv2 = nn.Conv2d(width, 1024, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)
        initialise(self)

    def forward(self, x):
        if is_small(x):
            x = F.relu(self.norm1(convolve(self.conv1, x, stride=1)))
        else:
            x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.stage3(self.stage2(self.stage1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def shuffle(x):
    """The channels of the two halves of x (N, C, H, W) by turns: 0, C/2, 1, C/2 + 1, …"""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
