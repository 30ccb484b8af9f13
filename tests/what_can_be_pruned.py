"""The page docs/what_can_be_pruned.md, written from examples that are traced: `python -m tests.what_can_be_pruned`.

Every row is a network that runs; `tests/test_what_can_be_pruned.py` holds each to pack = mask, and the page to it.
"""

import pathlib
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import paamops

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "what_can_be_pruned.md"

INTRODUCTION = """# What can be pruned

`python -m tests.what_can_be_pruned` writes this page: every row is a network that is traced for it, and a test holds
each to the law, that the packed network computes what the masked one does.

In the examples `x` is a batch of images with 3 channels of 8 × 8 places, `conv(m, n)` is
`nn.Conv2d(m, n, 3, padding=1)`, and `h`, the last layer, gives the output of the model: its filters stay. Of the other
layers a row tells

- **free**: how many of their filters can go, each by itself or with those that it is tied to;
- **tied**: which stay or go together. "`a` = `b`": the first filter of `a` with the first of `b`, and so on;
  "`a` in fours": filters of `a` that only four together can go;
- **pinned**: which always stay, and why, in the words of `channels.explain()`.

You can pin more by name: `paamops.trace(model, inputs, pinned=("stem", model.head))`.
"""


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs)


def weight(*shape):
    return nn.Parameter(torch.randn(shape))


class Tanh(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def parametrised(module, name):
    parametrize.register_parametrization(module, name, Tanh())
    return module


NAMES = {
    "torch": torch, "nn": nn, "F": F, "conv": conv, "linear": linear, "weight": weight, "parametrised": parametrised,
    "weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal, "relu": F.relu, "sigmoid": torch.sigmoid, "cat": torch.cat,
}  # fmt: skip

# Section -> rows (what it is an example of, its layers, its forward pass).
EXAMPLES = {
    "One layer after the other": [
        ("convolution, batch norm, activation", "a=conv(3, 8), n=nn.BatchNorm2d(8), h=conv(8, 2)", "h(relu(n(a(x))))"),
        (
            "instance norm; group norm of each channel",
            "a=conv(3, 8), n=nn.InstanceNorm2d(8), b=conv(8, 6), m=nn.GroupNorm(6, 6), h=conv(6, 2)",
            "h(m(b(n(a(x)))))",
        ),
        (
            "PReLU, one slope or one a channel",
            "a=conv(3, 8), p=nn.PReLU(), b=conv(8, 6), q=nn.PReLU(6), h=conv(6, 2)",
            "h(q(b(p(a(x)))))",
        ),
        ("flatten into a linear layer", "a=conv(3, 4), h=linear(4 * 64, 2)", "h(relu(a(x)).flatten(1))"),
        (
            "global pooling; pooling to 2 × 2",
            "a=conv(3, 4), b=conv(4, 6), h=linear(6 * 4, 2)",
            "h(F.adaptive_avg_pool2d(b(a(x) * a(x).mean((2, 3), True)), 2).flatten(1))",
        ),
        (
            "transposed convolution, upsampling",
            "a=nn.ConvTranspose2d(3, 8, 2, stride=2), h=conv(8, 2)",
            "h(F.interpolate(relu(a(x)), scale_factor=2))",
        ),
        (
            "1-d and 3-d convolution",
            "a=nn.Conv1d(3, 8, 3), b=nn.Conv3d(8, 6, 1), h=nn.Conv3d(6, 2, 1)",
            "h(b(relu(a(x.flatten(2))).unflatten(2, (2, 31, 1))))",
        ),
        (
            "linear layer over the channels of a map",
            "a=conv(3, 8), l=linear(8, 6), h=linear(6, 2)",
            "h(F.gelu(l(a(x).permute(0, 2, 3, 1))))",
        ),
        ("a parameter used by a function", "w=weight(8, 3, 3, 3), h=conv(8, 2)", "h(relu(F.conv2d(x, w)))"),
    ],
    "Groups": [
        ("depthwise convolution", "a=conv(3, 8), d=conv(8, 8, groups=8), h=conv(8, 2)", "h(d(relu(a(x))))"),
        ("depthwise, two filters a channel", "a=conv(3, 4), d=conv(4, 8, groups=4), h=conv(8, 2)", "h(d(relu(a(x))))"),
        (
            "depthwise transposed convolution",
            "a=conv(3, 4), d=nn.ConvTranspose2d(4, 8, 2, groups=4), h=conv(8, 2)",
            "h(d(relu(a(x))))",
        ),
        (
            "grouped convolution: all groups keep as many",
            "a=conv(3, 8), g=conv(8, 12, groups=4), h=conv(12, 2)",
            "h(g(relu(a(x))))",
        ),
        (
            "grouped transposed convolution",
            "a=conv(3, 8), g=nn.ConvTranspose2d(8, 6, 2, groups=2), h=conv(6, 2)",
            "h(g(relu(a(x))))",
        ),
    ],
    "Sums": [
        (
            "residual sum",
            "a=conv(3, 8), b=conv(8, 6), c=conv(6, 8), h=conv(8, 2)",
            "y = relu(a(x)); h(y + c(relu(b(y))))",
        ),
        ("residual sum with a projection", "a=conv(3, 8), p=conv(3, 8, 1), h=conv(8, 2)", "h(relu(a(x)) + p(x))"),
        (
            "in place, several on one stream",
            "a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), h=conv(8, 2)",
            "y = relu(a(x)); y += b(y); y += c(y); h(y)",
        ),
        (
            "a shortcut widened by zeros",
            "a=conv(3, 4), b=conv(4, 6), h=conv(6, 2)",
            "y = relu(a(x)); h(b(y) + F.pad(y, (0, 0, 0, 0, 1, 1)))",
        ),
        ("a sum with the model's input", "a=conv(3, 3), h=conv(3, 2)", "h(a(x) + x)"),
        ("a learned map added", "a=conv(3, 8), w=weight(1, 8, 8, 8), h=conv(8, 2)", "h(relu(a(x) + w))"),
    ],
    "Concatenations": [
        ("dense connections", "a=conv(3, 4), b=conv(4, 4), h=conv(8, 2)", "y = relu(a(x)); h(cat([y, b(y)], 1))"),
        (
            "nested, norm after it",
            "a=conv(3, 4), b=conv(3, 4), c=conv(8, 4), n=nn.BatchNorm2d(12), h=conv(12, 2)",
            "y = cat([a(x), b(x)], 1); h(n(cat([y, c(y)], 1)))",
        ),
        ("with the model's input", "a=conv(3, 8), h=conv(11, 2)", "h(cat([relu(a(x)), x], 1))"),
        ("stacked", "a=conv(3, 8), b=conv(3, 8), h=conv(16, 2)", "h(torch.stack([a(x), b(x)], 1).flatten(1, 2))"),
    ],
    "Channels cut and moved": [
        ("chunk; equal parts", "a=conv(3, 8), h=conv(4, 2)", "y, z = a(x).chunk(2, 1); h(y * z)"),
        ("chunk into unequal parts", "a=conv(3, 7), h=conv(7, 2)", "y, z = a(x).chunk(2, 1); h(cat([z, y], 1))"),
        ("gated linear unit", "a=conv(3, 8), h=conv(4, 2)", "h(F.glu(a(x), 1))"),
        ("split into sizes given by number", "a=conv(3, 8), h=conv(3, 2)", "y, z = a(x).split([3, 5], 1); h(y)"),
        ("channels picked by number", "a=conv(3, 8), h=conv(4, 2)", "h(relu(a(x))[:, :4])"),
        ("channel shuffle", "a=conv(3, 8), h=conv(8, 2)", "h(F.channel_shuffle(relu(a(x)), 2))"),
        (
            "channel shuffle written with views",
            "a=conv(3, 8), h=conv(8, 2)",
            "h(a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))",
        ),
        ("pixel shuffle", "a=conv(3, 16), h=conv(4, 2)", "h(F.pixel_shuffle(a(x), 2))"),
        ("pixel unshuffle", "a=conv(3, 4), h=conv(16, 2)", "h(F.pixel_unshuffle(a(x), 2))"),
        ("mean of groups", "a=conv(3, 8), h=conv(4, 2)", "h(a(x).unflatten(1, (2, -1)).mean(1))"),
    ],
    "Products and gates": [
        (
            "squeeze and excitation",
            "a=conv(3, 8), s=linear(8, 4), e=linear(4, 8), h=conv(8, 2)",
            "y = relu(a(x)); z = sigmoid(e(relu(s(y.mean((2, 3)))))); h(y * z[:, :, None, None])",
        ),
        ("a learned scale for each channel", "a=conv(3, 8), w=weight(8, 1, 1), h=conv(8, 2)", "h(a(x) * w)"),
        (
            "scale and shift from a vector",
            "a=conv(3, 8), l=linear(3, 16), h=conv(8, 2)",
            "y, z = l(x.mean((2, 3)))[:, :, None, None].chunk(2, 1); h(a(x) * y + z)",
        ),
        (
            "spatial gate of one channel",
            "a=conv(3, 8), g=conv(8, 1), h=conv(8, 2)",
            "y = relu(a(x)); h(y * sigmoid(g(y)))",
        ),
        (
            "gate from the mean over the channels",
            "a=conv(3, 8), g=conv(1, 1), h=conv(8, 2)",
            "y = relu(a(x)); h(y * sigmoid(g(y.mean(1, True))))",
        ),
        (
            "convolution over the channels",
            "a=conv(3, 8), g=nn.Conv1d(1, 1, 3, padding=1), h=conv(8, 2)",
            "y = relu(a(x)); z = sigmoid(g(y.mean((2, 3))[:, None])); h(y * z[:, 0, :, None, None])",
        ),
    ],
    "Norms over several channels": [
        (
            "layer norm over the channels",
            "a=conv(3, 8), n=nn.LayerNorm(8), h=linear(8, 2)",
            "h(n(a(x).movedim(1, -1)))",
        ),
        ("layer norm over the places", "a=conv(3, 8), n=nn.LayerNorm((8, 8)), h=conv(8, 2)", "h(n(a(x)))"),
        ("root mean square norm", "a=conv(3, 8), n=nn.RMSNorm(8), h=linear(8, 2)", "h(n(a(x).movedim(1, -1)))"),
        ("group norm", "a=conv(3, 8), n=nn.GroupNorm(2, 8), h=conv(8, 2)", "h(relu(n(a(x))))"),
        ("softmax over the channels", "a=conv(3, 8), h=conv(8, 2)", "h(torch.softmax(a(x), 1))"),
    ],
    "Weights that are shared or computed": [
        ("a module used twice", "a=conv(3, 8), b=conv(8, 8), h=conv(8, 2)", "h(b(relu(b(relu(a(x))))))"),
        (
            "one weight, two ways round",
            "a=conv(3, 8), w=weight(5, 8), h=linear(8, 2)",
            "h(F.linear(relu(F.linear(a(x).movedim(1, -1), w)), w.t()))",
        ),
        (
            "weight norm",
            "a=conv(3, 8), b=weight_norm(conv(8, 8)), c=conv(8, 6), h=conv(6, 2)",
            "h(c(relu(b(relu(a(x))))))",
        ),
        (
            "spectral norm",
            "a=conv(3, 8), b=spectral_norm(conv(8, 8)), c=conv(8, 6), h=conv(6, 2)",
            "h(c(relu(b(relu(a(x))))))",
        ),
        (
            "orthogonal weight",
            "a=conv(3, 8), b=orthogonal(conv(8, 8)), c=conv(8, 6), h=conv(6, 2)",
            "h(c(relu(b(relu(a(x))))))",
        ),
        (
            "a parametrisation of your own",
            "a=conv(3, 8), b=parametrised(conv(8, 8), 'weight'), h=conv(8, 2)",
            "h(relu(b(relu(a(x)))))",
        ),
        (
            "a parametrised bias",
            "a=conv(3, 8), b=parametrised(conv(8, 8), 'bias'), h=conv(8, 2)",
            "h(relu(b(relu(a(x)))))",
        ),
    ],
    "Attention": [
        (
            "`nn.MultiheadAttention`, a perceptron, layer norms",
            "a=conv(3, 8), n=nn.LayerNorm(8), t=nn.MultiheadAttention(8, 2, batch_first=True), m=nn.LayerNorm(8),"
            " p=linear(8, 12), q=linear(12, 8), h=linear(8, 2)",
            "y = a(x).flatten(2).mT; z = n(y); y = y + t(z, z, z)[0]; h(y + q(F.gelu(p(m(y)))))",
        ),
        (
            "`nn.TransformerEncoderLayer`",
            "a=conv(3, 8), t=nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), h=linear(8, 2)",
            "h(t(a(x).flatten(2).mT))",
        ),
        (
            "attention by hand",
            "a=conv(3, 8), q=linear(8, 6), k=linear(8, 6), v=linear(8, 6), o=linear(6, 8), h=linear(8, 2)",
            "y = a(x).flatten(2).mT; z = torch.softmax(q(y) @ k(y).mT / 6**0.5, -1); h(o(z @ v(y)))",
        ),
    ],
    "Outputs": [
        (
            "two outputs",
            "a=conv(3, 8), b=conv(8, 4), h=conv(4, 2)",
            "y = b(relu(a(x))); {'features': y, 'classes': h(y)}",
        ),
        ("what nothing reads", "a=conv(3, 8), b=conv(8, 4), h=conv(8, 2)", "y = relu(a(x)); z = b(y); h(y)"),
    ],
    "Sizes written into the forward pass": [
        ("the number of channels in a view", "a=conv(3, 4), h=linear(4 * 64, 2)", "h(relu(a(x)).view(-1, 256))"),
        ("sizes of a split that are equal", "a=conv(3, 8), h=conv(4, 2)", "y, z = a(x).split((4, 4), 1); h(y * z)"),
    ],
}


class Example(nn.Module):
    """Layers and a forward pass, both as text."""

    def __init__(self, layers, forward):
        super().__init__()
        self.text = forward
        for name, layer in eval(f"dict({layers})", dict(NAMES)).items():
            setattr(self, name, layer)

    def forward(self, x):
        own = {**dict(self.named_children()), **dict(self.named_parameters(recurse=False))}
        *statements, result = self.text.split("; ")
        names = {**NAMES, **own, "x": x}
        exec("\n".join(statements), names)
        return eval(result, names)


def make(layers, forward):
    """The network of a row, and its input."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are not for layers with a norm first, and the like
        torch.manual_seed(0)
        return Example(layers, forward).eval(), torch.randn(2, 3, 8, 8)


def page():
    """The text of the page."""
    lines = [INTRODUCTION]
    for section, rows in EXAMPLES.items():
        lines += [f"## {section}", "", "| | example | free | tied | pinned, and why |", "|---|---|---|---|---|"]
        lines += [row(*each) for each in rows]
        lines.append("")
    return "\n".join(lines)


def row(feature, layers, forward):
    model, x = make(layers, forward)
    channels = paamops.trace(model, x)
    where = [slice(a, b) for a, b in zip(channels.offsets.tolist(), channels.offsets.tolist()[1:], strict=False)]
    sets = {each.name: channels.sets[part] for each, part in zip(channels.layers, where, strict=True)}
    sets = {name: ids for name, ids in sets.items() if name != "h"}
    free = [f"`{name}` {int((~channels.pinned[ids]).sum())} of {len(ids)}" for name, ids in sets.items()]
    stay = {}
    for name, ids in sets.items():
        for s in ids.unique().tolist():
            if channels.pinned[s]:
                stay.setdefault(channels.reasons[s], {}).setdefault(name, 0)
                stay[channels.reasons[s]][name] += int((ids == s).sum())
    pinned = [
        ", ".join(f"{'' if n == len(sets[name]) else f'{n} of '}`{name}`" for name, n in names.items()) + f": {reason}"
        for reason, names in stay.items()
    ]
    refusal = refused(model, channels)
    if refusal:
        pinned.append(f"not seen by the trace, but `pack` refuses: {refusal}")
    example = f"`{layers}`<br>`{forward}`".replace("|", "\\|")
    return f"| {feature} | {example} | {cell(free)} | {cell(tied(sets, channels.pinned))} | {cell(pinned)} |"


def cell(parts):
    return "<br>".join(parts) or "–"


NUMBERS = {2: "twos", 3: "threes", 4: "fours"}


def tied(sets, pinned):
    """Which layers' filters go together, and which of one layer do; of those that are free."""
    found, names = [], list(sets)
    for name, ids in sets.items():
        counts = ids[~pinned[ids]].unique(return_counts=True)[1].unique().tolist()
        if counts and counts != [1]:
            found.append(f"`{name}` in {' and '.join(NUMBERS.get(n, 'ones' if n == 1 else f'{n}s') for n in counts)}")
        earlier = [other for other in names[: names.index(name)] if not pinned[ids].all()]
        for other in earlier:
            common = set(ids.tolist()) & set(sets[other].tolist())
            if any(not pinned[s] for s in common):
                together = set(ids.tolist()) == set(sets[other].tolist())
                found.append(f"`{other}` = `{name}`" if together else f"`{name}` with some of `{other}`")
                break
    return found


def refused(model, channels):
    """What `pack` says where half of the free sets go, or nothing."""
    if channels.pinned.all():
        return ""
    free = (~channels.pinned).nonzero().flatten()
    keep = torch.ones_like(channels.pinned)
    keep[free[: len(free) // 2]] = False
    keep |= channels.guarded(torch.zeros(len(keep), dtype=torch.float64))
    try:
        paamops.pack(model, channels, keep)
    except paamops.PackingError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
