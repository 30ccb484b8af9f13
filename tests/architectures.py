"""Whole architectures that nobody tuned the trace for, in plain PyTorch: the published layers, random weights.

`build(name)` returns a network of `ARCHITECTURES` in eval mode, calibrated so that no channel is trivial, and inputs
for it. Blocks and widths are those of the papers; where an implementation has choices, torchvision's or timm's.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from paamops import models

CLASSES = 10


def unit(inputs, outputs, kernel=1, stride=1, groups=1, act=nn.ReLU):
    """Convolution without bias, norm, activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act() if act else nn.Identity())


class Excitation(nn.Module):
    """x · gate(up(act(down(mean over space of x)))), with 1x1 convolutions."""

    def __init__(self, channels, hidden, act=nn.ReLU, gate=nn.Sigmoid):
        super().__init__()
        self.down, self.act = nn.Conv2d(channels, hidden, 1), act()
        self.up, self.gate = nn.Conv2d(hidden, channels, 1), gate()

    def forward(self, x):
        return x * self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


def head(channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


# ResNeXt (Xie et al. 2017) and RegNet (Radosavovic et al. 2020): bottlenecks with grouped 3x3 convolutions.


class GroupedBottleneck(nn.Module):
    def __init__(self, inputs, width, outputs, stride, groups, excitation=None):
        super().__init__()
        self.body = nn.Sequential(
            unit(inputs, width),
            unit(width, width, 3, stride, groups),
            nn.Identity() if excitation is None else Excitation(width, excitation),
            unit(width, outputs, act=None),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else unit(inputs, outputs, 1, stride, act=None)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.shortcut(x) + self.body(x))


def resnext50():
    layers, inputs = [unit(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            layers.append(GroupedBottleneck(inputs, 128 << stage, 256 << stage, stride, 32))
            inputs = 256 << stage
    return nn.Sequential(*layers, head(inputs))


def regnety400():
    layers, inputs = [unit(3, 32, 3, 2)], 32
    for width, depth in ((48, 1), (104, 3), (208, 6), (440, 6)):
        for block in range(depth):
            stride = 1 if block else 2
            layers.append(GroupedBottleneck(inputs, width, width, stride, width // 8, excitation=inputs // 4))
            inputs = width
    return nn.Sequential(*layers, head(inputs))


# DenseNet (Huang et al. 2017): every layer reads the concatenation of all before it.


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth=32):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.Module):
    def __init__(self, inputs, depth, growth=32):
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + k * growth, growth) for k in range(depth))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet(depths):
    layers, channels = [unit(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for number, depth in enumerate(depths):
        if number:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)]
            layers.append(nn.AvgPool2d(2, 2, ceil_mode=True))
            channels //= 2
        layers.append(DenseBlock(channels, depth))
        channels += 32 * depth
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), head(channels))


# MobileNetV3 (Howard et al. 2019) and EfficientNet (Tan and Le 2019): inverted residuals with excitations.


class Inverted(nn.Module):
    def __init__(self, inputs, width, outputs, kernel, stride, act, excitation):
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Identity() if width == inputs else unit(inputs, width, act=act),
            unit(width, width, kernel, stride, width, act),
            nn.Identity() if excitation is None else excitation(width),
            unit(width, outputs, act=None),
        )

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


# Kernel, width inside, channels, excitation, hard swish, stride.
SMALL = (
    (3, 16, 16, 1, 0, 2), (3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1), (5, 96, 40, 1, 1, 2), (5, 240, 40, 1, 1, 1),
    (5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2), (5, 576, 96, 1, 1, 1),
    (5, 576, 96, 1, 1, 1),
)  # fmt: skip
LARGE = (
    (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
    (5, 960, 160, 1, 1, 1),
)  # fmt: skip


def mobilenetv3(table, last):
    layers, inputs = [unit(3, 16, 3, 2, act=nn.Hardswish)], 16
    for kernel, width, outputs, excited, swish, stride in table:
        excitation = partial(Excitation, hidden=width // 4, gate=nn.Hardsigmoid) if excited else None
        act = nn.Hardswish if swish else nn.ReLU
        layers.append(Inverted(inputs, width, outputs, kernel, stride, act, excitation))
        inputs = outputs
    layers += [unit(inputs, 6 * inputs, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Linear(6 * inputs, last), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(last, CLASSES)]
    return nn.Sequential(*layers)


def efficientnet_b0():
    stages = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )  # fmt: skip
    layers, inputs = [unit(3, 32, 3, 2, act=nn.SiLU)], 32
    for ratio, outputs, depth, stride, kernel in stages:
        for block in range(depth):
            excitation = partial(Excitation, hidden=max(1, inputs // 4), act=nn.SiLU)
            step = 1 if block else stride
            layers.append(Inverted(inputs, ratio * inputs, outputs, kernel, step, nn.SiLU, excitation))
            inputs = outputs
    return nn.Sequential(*layers, unit(inputs, 1280, act=nn.SiLU), head(1280))


# ConvNeXt (Liu et al. 2022): norms over the channels hold the residual stream; what is inside a block is free.


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of (N, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.act, self.down = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(self.act(self.up(y)))).permute(0, 3, 1, 2)


def convnext_tiny():
    layers, inputs = [], 3
    for channels, depth, stride in ((96, 3, 4), (192, 3, 2), (384, 9, 2), (768, 3, 2)):
        conv, norm = nn.Conv2d(inputs, channels, stride, stride), ChannelNorm
        layers += [conv, norm(channels)] if inputs == 3 else [norm(inputs), conv]
        layers += [ConvNeXtBlock(channels) for _ in range(depth)]
        inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(768), nn.Linear(768, CLASSES))


# U-Net (Ronneberger et al. 2015): the way down is concatenated to the way up.


class UNet(nn.Module):
    def __init__(self, widths=(32, 64, 128, 256)):
        super().__init__()
        self.down = nn.ModuleList(self.double(a, b) for a, b in zip((3, *widths), widths, strict=False))
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.merge = nn.ModuleList(self.double(2 * b, b) for _, b in pairs)
        self.last = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def double(inputs, outputs):
        return nn.Sequential(unit(inputs, outputs, 3), unit(outputs, outputs, 3))

    def forward(self, x):
        skips = []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.last(x)


# FPN (Lin et al. 2017) on a residual network of basic blocks, with one detection head for all levels.


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(unit(inputs, outputs, 3, stride), unit(outputs, outputs, 3, act=None))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else unit(inputs, outputs, 1, stride, act=None)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.body(x))


class FPN(nn.Module):
    def __init__(self, widths=(64, 128, 256, 512), channels=128):
        super().__init__()
        self.stem = nn.Sequential(unit(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        pairs = zip((64, *widths), widths, strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(Basic(a, b, 2 if number else 1), Basic(b, b, 1)) for number, (a, b) in enumerate(pairs)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths)
        self.shared = nn.Conv2d(channels, channels, 3, padding=1)
        self.boxes, self.scores = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, CLASSES, 1)

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        for level in range(len(maps) - 2, -1, -1):
            maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[-2:], mode="nearest")
        levels = [F.relu(self.shared(smooth(y))) for smooth, y in zip(self.smooth, maps, strict=True)]
        return {"boxes": [self.boxes(y) for y in levels], "scores": [self.scores(y) for y in levels]}


# The neck of YOLOv8: C2f halves the channels and concatenates all halves, SPPF pools again and again.


class C2f(nn.Module):
    def __init__(self, inputs, outputs, depth, residual):
        super().__init__()
        half = outputs // 2
        self.first, self.last = unit(inputs, outputs, act=nn.SiLU), unit((2 + depth) * half, outputs, act=nn.SiLU)
        self.blocks = nn.ModuleList(
            nn.Sequential(unit(half, half, 3, act=nn.SiLU), unit(half, half, 3, act=nn.SiLU)) for _ in range(depth)
        )
        self.residual = residual

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]) if self.residual else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class SPPF(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.last = unit(channels, channels // 2, act=nn.SiLU), unit(2 * channels, channels, act=nn.SiLU)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = [self.first(x)]
        for _ in range(3):
            x.append(self.pool(x[-1]))
        return self.last(torch.cat(x, 1))


class YOLO(nn.Module):
    def __init__(self, widths=(16, 32, 64, 128, 256)):
        super().__init__()
        w1, w2, w3, w4, w5 = widths
        down = partial(unit, kernel=3, stride=2, act=nn.SiLU)
        self.stem = nn.Sequential(down(3, w1), down(w1, w2), C2f(w2, w2, 1, True))
        self.level3 = nn.Sequential(down(w2, w3), C2f(w3, w3, 2, True))
        self.level4 = nn.Sequential(down(w3, w4), C2f(w4, w4, 2, True))
        self.level5 = nn.Sequential(down(w4, w5), C2f(w5, w5, 1, True), SPPF(w5))
        self.up = nn.Upsample(scale_factor=2)
        self.top4, self.top3 = C2f(w5 + w4, w4, 1, False), C2f(w4 + w3, w3, 1, False)
        self.down3, self.down4 = down(w3, w3), down(w4, w4)
        self.out4, self.out5 = C2f(w3 + w4, w4, 1, False), C2f(w4 + w5, w5, 1, False)
        self.heads = nn.ModuleList(nn.Sequential(unit(w, w, 3), nn.Conv2d(w, 4 + CLASSES, 1)) for w in (w3, w4, w5))

    def forward(self, x):
        x3 = self.level3(self.stem(x))
        x4 = self.level4(x3)
        x5 = self.level5(x4)
        y4 = self.top4(torch.cat([self.up(x5), x4], 1))
        y3 = self.top3(torch.cat([self.up(y4), x3], 1))
        y4 = self.out4(torch.cat([self.down3(y3), y4], 1))
        y5 = self.out5(torch.cat([self.down4(y4), x5], 1))
        maps = [each(y) for each, y in zip(self.heads, (y3, y4, y5), strict=True)]
        boxes, scores = torch.cat([y.flatten(2) for y in maps], 2).split((4, CLASSES), 1)
        return boxes, scores.sigmoid()


# ViT (Dosovitskiy et al. 2021) and Swin (Liu et al. 2021): attention and norms hold the stream; their MLPs are free.


def attend(q, k, v, bias=0):
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


def mlp(channels):
    return nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


class ViTBlock(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.project, self.mlp = (
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
            mlp(channels),
        )

    def forward(self, x):
        n, tokens, channels = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.project(attend(q, k, v).transpose(1, 2).reshape(n, tokens, channels))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, side=32, patch=8, channels=192, depth=12, heads=3):
        super().__init__()
        self.patches = nn.Conv2d(3, channels, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.places = nn.Parameter(torch.randn(1, 1 + (side // patch) ** 2, channels))
        self.blocks = nn.Sequential(*(ViTBlock(channels, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class SwinBlock(nn.Module):
    """Attention within windows of the map, moved by `shift`; a learned bias for every distance within a window."""

    def __init__(self, side, channels, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.project, self.mlp = (
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
            mlp(channels),
        )
        self.bias = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = (v.flatten()[:, None] - v.flatten()[None] + window - 1 for v in (y, x))
        self.register_buffer("distance", y * (2 * window - 1) + x)
        region = torch.zeros(1, side, side, 1)
        if shift:  # what a shift brings together from opposite sides does not attend to each other
            for number, part in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                region[:, part] += 3 * number
                region[:, :, part] += number
        region = self.windows(region).squeeze(-1)
        self.register_buffer("apart", torch.where(region[:, :, None] == region[:, None], 0.0, -100.0))

    def windows(self, x):
        n, h, w, channels = x.shape
        x = x.view(n, h // self.window, self.window, w // self.window, self.window, channels)
        return x.transpose(2, 3).reshape(-1, self.window**2, channels)

    def forward(self, x):
        n, h, w, channels = x.shape
        y = self.windows(torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)))
        q, k, v = self.qkv(y).reshape(len(y), -1, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.distance.view(-1)].view(self.window**2, self.window**2, -1).permute(2, 0, 1)
        bias = bias + self.apart.repeat(n, 1, 1)[:, None]
        y = self.project(attend(q, k, v, bias).transpose(1, 2).reshape(len(y), -1, channels))
        y = y.view(n, h // self.window, w // self.window, self.window, self.window, channels).transpose(2, 3)
        x = x + torch.roll(y.reshape(x.shape), (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Four neighbours become one place with twice the channels."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x):
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduce(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    def __init__(self, side=32, patch=2, channels=96, depths=(2, 2, 6), window=4):
        super().__init__()
        self.patches, layers, side = nn.Conv2d(3, channels, patch, patch), [nn.LayerNorm(channels)], side // patch
        for stage, depth in enumerate(depths):
            if stage:
                layers.append(Merge(channels))
                channels, side = 2 * channels, side // 2
            for block in range(depth):
                shift = window // 2 if block % 2 and side > window else 0
                layers.append(SwinBlock(side, channels, channels // 32, window, shift))
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.patches(x).permute(0, 2, 3, 1))).mean((1, 2)))


@dataclass(frozen=True)
class Architecture:
    make: object  # a function that returns the network
    side: int  # of the images
    free: float  # at least this share of the filters is free to go
    slow: bool = False


ARCHITECTURES = {
    "resnet50": Architecture(partial(models.build, "resnet50"), 32, 0.99, slow=True),
    "resnext50": Architecture(resnext50, 32, 0.99, slow=True),
    "densenet121": Architecture(partial(densenet, (6, 12, 24, 16)), 32, 0.99, slow=True),
    "densenet264": Architecture(partial(densenet, (6, 12, 64, 48)), 32, 0.99, slow=True),
    "mobilenetv2": Architecture(partial(models.build, "mobilenetv2"), 32, 0.99),
    "mobilenetv3-small": Architecture(partial(mobilenetv3, SMALL, 1024), 32, 0.99),
    "mobilenetv3-large": Architecture(partial(mobilenetv3, LARGE, 1280), 32, 0.99, slow=True),
    "efficientnet-b0": Architecture(efficientnet_b0, 32, 0.99, slow=True),
    "regnety-400mf": Architecture(regnety400, 32, 0.99),
    # Shuffled again and again, all channels of a stage come to sit at the same place as one another: 79 % are free.
    "shufflenetv2": Architecture(partial(models.build, "shufflenet"), 32, 0.75),
    "convnext-tiny": Architecture(convnext_tiny, 32, 0.6, slow=True),
    "unet": Architecture(UNet, 16, 0.99),
    "fpn": Architecture(FPN, 64, 0.99),
    "yolo": Architecture(YOLO, 64, 0.98),
    "vit-tiny": Architecture(ViT, 32, 0.4),
    "swin": Architecture(Swin, 32, 0.4),
}


def build(name, side=None, dtype=torch.float64, batch=2):
    """(network, inputs) of `ARCHITECTURES[name]`, every parameter and buffer away from its trivial start.

    The norms take the statistics of one batch, so that no channel vanishes or grows on its way through the layers.
    """
    architecture = ARCHITECTURES[name]
    model = architecture.make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    side = side or architecture.side
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.rand_like(tensor) - 0.3)
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()(torch.randn(batch, 3, side, side, dtype=dtype))
        for norm in norms:
            norm.momentum = 0.1
            norm.running_var.add_(torch.rand_like(norm.running_var) + 0.1)
    return model.eval(), (torch.randn(batch, 3, side, side, dtype=dtype),)
