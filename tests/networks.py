"""Small networks, each with one structure that a trace must understand, and their inputs."""

import torch
import torch.nn.functional as F
from torch import nn


class Plain(nn.Sequential):
    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, bias=False),
            nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 5),
        )  # fmt: skip


class Residual(nn.Module):
    """Two blocks on one stream, the second with a projection; ReLU as a function and as a reused module."""

    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 6, 8))
        self.c, self.d = nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.Conv2d(10, 12, 3, padding=1)
        self.project = nn.Conv2d(8, 12, 1, stride=2)
        self.relu = nn.ReLU()
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.relu(self.norms[0](self.stem(x)))
        x = F.relu(x + self.norms[2](self.b(self.relu(self.norms[1](self.a(x))))))
        y = self.d(self.relu(self.c(x)))
        y += self.project(x)
        return self.head(F.adaptive_avg_pool2d(F.relu_(y), 1).flatten(1))


class Dense(nn.Module):
    """Concatenations of concatenations, norm and ReLU after them, as in DenseNet."""

    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (6, 10, 14, 7))
        self.layers = nn.ModuleList(nn.Conv2d(n, 4, 3, padding=1) for n in (6, 10))
        self.transition = nn.Conv2d(14, 7, 1)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        x = self.transition(F.relu(self.norms[2](x)))
        return self.head(F.relu(self.norms[3](x)).mean((2, 3)))


class Split(nn.Module):
    """chunk, a branch on one half, concatenation, channel shuffle written with views, split of three."""

    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.three = nn.Conv2d(16, 18, 1)
        self.last = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        a, b = F.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat([a, F.relu(self.branch(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b, c = F.relu(self.three(x)).chunk(3, 1)
        return self.head(F.relu(self.last(a * torch.sigmoid(b) + c)).amax((2, 3)))


class Depthwise(nn.Module):
    """Inverted residuals: depthwise convolution with multipliers 1 and 2, a grouped one, shuffle as a module."""

    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 12, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.twofold = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.project = nn.Conv2d(24, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.shuffle = nn.ChannelShuffle(2)
        self.prelu = nn.PReLU(12)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        y = F.relu6(self.depthwise(F.relu6(self.norm(self.expand(x)))))
        x = x + self.project(F.hardswish(self.twofold(y)))
        x = self.prelu(self.shuffle(self.grouped(x)))
        return self.head(x).mean((2, 3))


class Upscale(nn.Module):
    """PixelShuffle read by a convolution, transposed convolutions, upsampling, a skip concatenation, padding."""

    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.wide = nn.Conv2d(8, 16, 1)
        self.shuffle = nn.PixelShuffle(2)
        self.narrow = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.merge = nn.Conv2d(12, 5, 1)
        self.depthwise = nn.ConvTranspose2d(5, 5, 2, stride=2, groups=5)
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = F.relu(self.stem(F.pad(x, (1, 1, 1, 1))))
        y = F.relu(self.narrow(self.shuffle(self.wide(x))))
        z = F.relu(self.up(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)))
        z = F.relu(self.merge(torch.cat([y, z], 1)))
        return self.last(F.relu(self.depthwise(z)))


class Excited(nn.Module):
    """Squeeze-and-excitation, swish by hand, instance norm, a 1-channel spatial gate, group norm (pinned)."""

    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.next = nn.Conv2d(8, 9, 3, padding=1)
        self.norm = nn.InstanceNorm2d(9, affine=True, track_running_stats=True)
        self.gate = nn.Conv2d(9, 1, 1)
        self.normed = nn.Conv2d(9, 8, 1)
        self.group = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x * torch.sigmoid(x)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3)))))).unsqueeze(-1).unsqueeze(-1)
        x = F.relu(self.norm(self.next(x)))
        x = x * torch.sigmoid(self.gate(x))
        x = F.relu(self.group(self.normed(x)))
        return self.head(F.relu(self.last(x)).flatten(2).max(-1).values)


class Repeated(nn.Module):
    """One module used twice, a weight shared by two modules, a functional convolution, two inputs, a dict output."""

    inputs = ((2, 3, 8, 8), (2, 4, 8, 8))

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(6, 8, 1, 1) / 3)
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 5)
        self.other.weight = self.one.weight
        self.head = nn.Linear(5, 2)

    def forward(self, x, y):
        x, y = F.relu(self.left(x)), F.relu(self.right(y))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        x = F.gelu(F.conv2d(x, self.weight)).mean((2, 3)), F.conv2d(y, self.weight).relu().mean((2, 3))
        return {"a": self.head(F.relu(self.one(x[0]))), "b": [self.head(F.relu(self.other(x[1])))]}


class Volume(nn.Sequential):
    """Three dimensions, and one."""

    inputs = (2, 2, 6, 6, 6)

    def __init__(self):
        super().__init__(
            nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(2), nn.Conv1d(6, 5, 3),
            nn.ReLU(), nn.Conv1d(5, 4, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip


class Perceptron(nn.Sequential):
    """Linear layers over a sequence of tokens, with a norm over the channels that pins them."""

    inputs = (2, 7, 6)

    def __init__(self):
        super().__init__(
            nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 8), nn.LayerNorm(8), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3)
        )


class PaddedShortcut(nn.Module):
    """A residual sum whose shortcut pads the channels by a fixed number: the padded places must stay."""

    inputs = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.widen = nn.Conv2d(6, 10, 3, padding=1, stride=2)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.widen(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(x.mean((2, 3)))


NETWORKS = [
    Plain, Residual, Dense, Split, Depthwise, Upscale, Excited, Repeated, Volume, Perceptron, PaddedShortcut
]  # fmt: skip


def make(network):
    """An instance with every parameter and buffer away from its trivial start, and inputs for it."""
    model = network().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(torch.rand_like(tensor) + 0.1)
    shapes = network.inputs if isinstance(network.inputs[0], tuple) else (network.inputs,)
    return model, tuple(torch.randn(shape) for shape in shapes)
