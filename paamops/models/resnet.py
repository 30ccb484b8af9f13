"""Residual networks in their CIFAR form: ResNet-20, -32, -44, -56 and -110."""

import torch
from torch import nn
from torch.nn import functional as F


class Shortcut(nn.Module):
    """y = every second pixel of x, zero channels before and after: the paper's shortcut without parameters, "option A".

    Written as a fixed strided 1x1 convolution whose weight, the identity padded with zero rows, is a buffer. A pad by a
    constant number of channels would freeze the width of every stage; this weight says which input channel feeds which
    output channel, so its rows and columns are pruned and packed like those of any other layer. It is never trained.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        weight = torch.zeros(out_channels, in_channels, 1, 1)
        weight[(out_channels - in_channels) // 2 :][:in_channels, :, 0, 0] = torch.eye(in_channels)
        self.register_buffer("weight", weight)

    def forward(self, x):
        return F.conv2d(x, self.weight, stride=2)


class Block(nn.Module):
    """y = relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(in_channels, channels)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """Three stages of (depth − 2) / 6 blocks, 16, 32 and 64 channels wide, the mean over space, and one linear layer.

    x (N, in_channels, H, W), H and W at least 1 (the paper: 32) → logits (N, num_classes).
    Source: He et al., Deep Residual Learning for Image Recognition (2016), §4.2; initialised as in He et al. (2015).
    """

    def __init__(self, depth, in_channels, num_classes):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.stage1 = stage(16, 16, blocks, stride=1)
        self.stage2 = stage(16, 32, blocks, stride=2)
        self.stage3 = stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.linear(x.mean((2, 3)))


def stage(in_channels, channels, blocks, stride):
    """`blocks` blocks in a row, the first of which changes the width and the stride."""
    first = Block(in_channels, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))
