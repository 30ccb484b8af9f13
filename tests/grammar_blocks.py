"""The productions of the grammar of random networks: each is a small piece of a network as people write it.

A production is `production(draw, c, size, depth)` -> (module, channels, size): the module takes a map (n, c, *size) of
one to three dimensions and gives one of the returned channels and size. Every forward pass takes the numbers that
follow the channels from the tensors it is given, so that it runs at other widths too; the few that have sizes written
into them are marked `written`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize


class Block(nn.Module):
    """A forward pass given as a function of the block and its inputs, its layers, and what it is an example of."""

    def __init__(self, features, forward, **layers):
        super().__init__()
        self.features = (features,) if isinstance(features, str) else tuple(features)
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.run(self, *inputs)

    def _get_name(self):
        return " + ".join(self.features)


def conv(draw, c, out, dims, kernel=None, **options):
    """A convolution that keeps the spatial size, but for its stride."""
    kernel = kernel or draw.pick(1, 3, 3)
    dilation = draw.pick(1, 1, 1, 2) if kernel == 3 and options.get("stride", 1) == 1 else 1
    mode = draw.pick("zeros", "zeros", "zeros", "zeros", "replicate") if kernel == 3 and dilation == 1 else "zeros"
    options = {"bias": draw.chance(0.6), "dilation": dilation, "padding_mode": mode} | options
    return getattr(nn, f"Conv{dims}d")(c, out, kernel, padding=kernel // 2 * options["dilation"], **options)


def divisor(draw, n):
    """A divisor of n other than 1, and other than n where there is one."""
    found = [d for d in range(2, n) if n % d == 0]
    return draw.pick(*found) if found else n


# Norms and activations.


def norm(draw, c, dims):
    kind = draw.pick("batch", "batch", "batch", "instance", "group of one", "group", "layer", "rms")
    if kind == "batch":
        affine, track = draw.chance(0.8), draw.chance(0.9)
        return Block("batch norm", sequence, a=getattr(nn, f"BatchNorm{dims}d")(c, 1e-3, 0.1, affine, track))
    if kind == "instance":
        affine, track = draw.chance(0.5), draw.chance(0.5)
        return Block("instance norm", sequence, a=getattr(nn, f"InstanceNorm{dims}d")(c, 1e-3, 0.1, affine, track))
    if kind == "group of one":
        return Block("group norm of each channel", sequence, a=nn.GroupNorm(c, c, 1e-3, draw.chance(0.6)))
    if kind == "group":
        return Block("group norm", sequence, a=nn.GroupNorm(draw.pick(1, divisor(draw, c)), c, 1e-3))
    normalise = nn.LayerNorm(c, 1e-3) if kind == "layer" else nn.RMSNorm(c, 1e-3)
    return Block(f"{kind} norm", lambda s, x: s.a(x.movedim(1, -1)).movedim(-1, 1), a=normalise)


def sequence(s, x):
    for layer in s.children():
        x = layer(x)
    return x


ACTIVATIONS = [
    nn.ReLU, lambda: nn.ReLU(inplace=True), nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Softplus,
    lambda: nn.ELU(inplace=True), lambda: nn.LeakyReLU(0.1), nn.ReLU6, nn.Mish,
]  # fmt: skip


def activation(draw, c):
    kind = draw.pick("module", "module", "module", "prelu", "prelu of each", "in place", "by hand", "dropout")
    if kind == "prelu":
        return Block("PReLU", sequence, a=nn.PReLU())
    if kind == "prelu of each":
        return Block("PReLU of each channel", sequence, a=nn.PReLU(c))
    if kind == "in place":
        return Block("in place", draw.pick(*IN_PLACE))
    if kind == "by hand":
        return Block("by hand", draw.pick(*BY_HAND))
    if kind == "dropout":
        return Block("dropout", sequence, a=nn.Dropout(0.5), b=nn.ReLU())
    module = draw.pick(*ACTIVATIONS)()
    return Block("in place", sequence, a=module) if getattr(module, "inplace", False) else module


IN_PLACE = [
    lambda s, x: (x + 1).relu_().sub_(0.5),
    lambda s, x: F.relu_(x * 2),
    lambda s, x: x.clone().clamp_(-1, 1),
    lambda s, x: x.contiguous().clone().view(len(x), -1).tanh_().view(x.shape),  # in place on a view
    lambda s, x: (x / 2).mul_(torch.sigmoid(x)),
]
BY_HAND = [
    lambda s, x: x * torch.sigmoid(x),
    lambda s, x: torch.where(x > 0, x, 0.1 * x),
    lambda s, x: x.masked_fill(x < 0, 0.0),
    lambda s, x: torch.maximum(x, -0.2 * x),
    lambda s, x: 0.5 * x * (1 + torch.tanh(x)),
    lambda s, x: x.pow(2).clamp(max=3) - x,
]


# Single layers, each with a norm and an activation now and then.


def finished(draw, features, layer, out, dims, **others):
    """The layer as a block, with what usually follows it."""
    parts = {"layer": layer, **others}
    if draw.chance(0.5):
        parts["norm"] = norm(draw, out, dims)
    if draw.chance(0.8):
        parts["act"] = activation(draw, out)
    features = [features] if isinstance(features, str) else features
    told = [feature for part in parts.values() for feature in getattr(part, "features", ())]
    return Block(dict.fromkeys([*features, *told]), sequence, **parts)


def plain(draw, c, size, depth):
    out, dims = draw.channels(), len(size)
    return finished(draw, f"{dims}-d convolution", conv(draw, c, out, dims), out, dims), out, size


def strided(draw, c, size, depth):
    out, dims = draw.channels(), len(size)
    layer = conv(draw, c, out, dims, stride=2, kernel=3)
    return finished(draw, "strided convolution", layer, out, dims), out, tuple((s + 1) // 2 for s in size)


def grouped(draw, c, size, depth):
    dims = len(size)
    groups, within = draw.pick(2, 3, 4), draw.pick(2, 3)
    out = groups * draw.pick(1, 2, 3, 4)
    before = {"before": conv(draw, c, groups * within, dims), "act": activation(draw, groups * within)}
    layer = conv(draw, groups * within, out, dims, groups=groups)
    block = finished(draw, "grouped convolution", layer, out, dims)
    return Block("grouped convolution", sequence, **before, block=block), out, size


def depthwise(draw, c, size, depth):
    dims, multiple = len(size), draw.pick(1, 1, 2, 3)
    features = [f"depthwise convolution × {multiple}"]
    parts = {}
    if draw.chance(0.7):
        wide = draw.channels()
        parts = {"widen": conv(draw, c, wide, dims, kernel=1), "act": activation(draw, wide)}
        c = wide
    if c == 1:
        return plain(draw, c, size, depth)
    layer = conv(draw, c, c * multiple, dims, groups=c)
    parts["block"] = finished(draw, features, layer, c * multiple, dims)
    return Block(features, sequence, **parts), c * multiple, size


def transposed(draw, c, size, depth):
    dims, kind = len(size), draw.pick("", "grouped ", "depthwise ", "depthwise doubling ")
    groups = {"": 1, "grouped ": draw.pick(2, 3)}.get(kind, 0)
    inputs = draw.channels() if kind == "" else groups * draw.pick(2, 3) if groups else draw.channels()
    groups = groups or inputs
    out = {"": draw.channels(), "grouped ": groups * draw.pick(1, 2, 3), "depthwise ": inputs}.get(kind, 2 * inputs)
    grow = draw.chance(0.5) and max(size) <= 6 and dims < 3
    shape = {"kernel_size": 2, "stride": 2} if grow else {"kernel_size": 3, "padding": 1}
    layer = getattr(nn, f"ConvTranspose{dims}d")(inputs, out, groups=groups, bias=draw.chance(0.5), **shape)
    features = f"{kind}transposed convolution"
    before = {"before": conv(draw, c, inputs, dims), "act0": activation(draw, inputs)}
    block = Block(features, sequence, **before, block=finished(draw, features, layer, out, dims))
    return block, out, tuple(2 * s for s in size) if grow else size


def linear_last(draw, c, size, depth):
    """A linear layer over the channels of a map, which are moved to the last axis for it."""
    hidden, out = draw.channels(), draw.channels()
    act = activation(draw, hidden)

    def forward(s, x):
        x = x.movedim(1, -1)
        x = s.second(s.act(s.first(x).movedim(-1, 1)).movedim(1, -1))
        return x.movedim(-1, 1)

    layers = {"first": nn.Linear(c, hidden), "act": act, "second": nn.Linear(hidden, out)}
    return Block("linear over a map", forward, **layers), out, size


# Several branches.


def branch(draw, c, out, size, depth):
    """A few productions that keep the size, and a convolution to `out` channels."""
    module, c, size = draw.several(c, size, depth - 1, at_most=2, keep_size=True)
    return Block("branch", sequence, inner=module, last=conv(draw, c, out, len(size)))


SUMS = [
    lambda x, y: x + y,
    lambda x, y: torch.add(x, y, alpha=0.5),
    lambda x, y: y.add_(x),
    lambda x, y: y - x,
    lambda x, y: torch.stack([x, y]).sum(0),
    lambda x, y: torch.maximum(x, y),
    lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: torch.addcmul(x, y, torch.sigmoid(y)),
]


def residual(draw, c, size, depth):
    add = draw.pick(*SUMS[:1] * 4, *SUMS)
    project = draw.chance(0.4)
    out = draw.channels() if project else c
    parts = {"branch": branch(draw, c, out, size, depth)}
    if draw.chance(0.4):
        parts["norm"] = norm(draw, out, len(size))
    act = draw.pick(nn.Identity, nn.ReLU)()

    def forward(s, x):
        y = s.branch(x)
        if hasattr(s, "norm"):
            y = s.norm(y)
        return s.act(add(s.shortcut(x) if project else x, y))

    if project:
        parts["shortcut"] = conv(draw, c, out, len(size), kernel=1)
    return Block("residual with projection" if project else "residual", forward, act=act, **parts), out, size


def stream(draw, c, size, depth):
    """Several sums on one stream, some written in place."""

    def forward(s, x):
        for k, each in enumerate(s.branches):
            if k:
                x += each(x)
            else:
                x = x + each(x)
        return x

    branches = nn.ModuleList(branch(draw, c, c, size, depth) for _ in range(draw.pick(2, 3)))
    return Block(("residual", "several sums on one stream"), forward, branches=branches), c, size


def concatenation(draw, c, size, depth):
    outs = [draw.channels() for _ in range(draw.pick(1, 2, 3))]
    branches = nn.ModuleList(branch(draw, c, out, size, depth) for out in outs)
    own, twice, join = draw.chance(0.5), draw.chance(0.2), draw.pick(torch.cat, torch.concat)

    def forward(s, x):
        parts = [each(x) for each in s.branches]
        return join([*parts, *[x] * own, *parts[:1] * twice], dim=1)

    return Block("concatenation", forward, branches=branches), sum(outs) + c * own + outs[0] * twice, size


def dense(draw, c, size, depth):
    """Concatenations of concatenations."""
    growth, dims = draw.channels(most=4), len(size)
    layers = nn.ModuleList(conv(draw, c + k * growth, growth, dims) for k in range(draw.pick(2, 3)))

    def forward(s, x):
        for layer in s.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return x

    return Block("nested concatenation", forward, layers=layers), c + len(layers) * growth, size


def nested(draw, c, size, depth):
    """A concatenation inside a concatenation, in the other order."""
    a, b, d = (draw.channels(most=4) for _ in range(3))
    dims = len(size)
    layers = {"a": conv(draw, c, a, dims), "b": conv(draw, c, b, dims), "d": conv(draw, a + b, d, dims)}

    def forward(s, x):
        inner = torch.cat([s.a(x), s.b(x)], 1)
        return torch.cat([s.d(inner), torch.cat([inner.relu(), x], 1)], 1)

    return Block("nested concatenation", forward, **layers), d + a + b + c, size


# Channels cut and moved.


def chunk(draw, c, size, depth):
    pieces, dims = draw.pick(2, 2, 3, 4), len(size)
    within = draw.channels(most=4)
    first = conv(draw, c, pieces * within, dims)
    cut = draw.pick(
        lambda x: x.chunk(pieces, 1),
        lambda x: x.split(x.shape[1] // pieces, 1),
        lambda x: x.split([x.shape[1] // pieces] * pieces, 1),
        lambda x: torch.tensor_split(x, pieces, 1),
        lambda x: x.unflatten(1, (pieces, -1)).unbind(1),
    )
    kind = draw.pick("sum", "gate", "csp", "max")
    if kind == "csp":  # one piece goes through a branch of its own
        inner = branch(draw, within, within, size, depth)

        def forward(s, x):
            parts = list(cut(s.first(x)))
            parts[0] = s.inner(parts[0])
            return torch.cat(parts, 1)

        return Block("chunk", forward, first=first, inner=inner), pieces * within, size

    def forward(s, x):
        parts = cut(s.first(x))
        y = parts[0]
        for part in parts[1:]:
            y = y + part if kind == "sum" else y * torch.sigmoid(part) if kind == "gate" else torch.max(y, part)
        return y

    return Block("chunk", forward, first=first), within, size


def uneven_chunk(draw, c, size, depth):
    """Pieces that are not equal in size, of a chunk whose number does not divide the channels."""
    pieces, dims = draw.pick(2, 3), len(size)
    wide = pieces * draw.pick(2, 3) - 1
    cut = draw.pick(lambda x: x.chunk(pieces, 1), lambda x: torch.tensor_split(x, pieces, 1))

    def forward(s, x):
        parts = cut(s.first(x))
        return torch.cat([parts[-1], F.relu(parts[0]), *parts[1:-1]], 1)

    return Block("chunk into unequal pieces", forward, first=conv(draw, c, wide, dims)), wide, size


def split_sizes(draw, c, size, depth):
    a, b, dims = draw.channels(), draw.channels(), len(size)
    a += a == b

    def forward(s, x):
        left, right = s.first(x).split([a, b], 1)
        return torch.cat([right, s.last(left)], 1)

    layers = {"first": conv(draw, c, a + b, dims), "last": conv(draw, a, a, dims)}
    return Block("split at fixed places", forward, **layers), a + b, size


def glu(draw, c, size, depth):
    out = draw.channels()
    return Block("gated linear unit", lambda s, x: F.glu(s.a(x), 1), a=conv(draw, c, 2 * out, len(size))), out, size


def shuffle(draw, c, size, depth):
    groups, dims = draw.pick(2, 3), len(size)
    wide = groups * draw.pick(2, 3)

    def views(s, x):
        x = s.first(x)
        n, k = x.shape[:2]
        return x.view(n, groups, k // groups, *x.shape[2:]).transpose(1, 2).reshape(n, k, *x.shape[2:])

    def flat(s, x):
        return s.first(x).unflatten(1, (groups, -1)).transpose(1, 2).contiguous().flatten(1, 2)

    def module(s, x):
        return F.channel_shuffle(s.first(x), groups)

    move = draw.pick(views, flat, *[module] * (dims == 2))
    parts = {"first": conv(draw, c, wide, dims)}
    if draw.chance(0.5) and wide // groups > 1:
        parts["last"] = conv(draw, wide, wide, dims, groups=groups)

    def forward(s, x):
        return s.last(move(s, x)) if hasattr(s, "last") else move(s, x)

    return Block("channel shuffle", forward, **parts), wide, size


def pixel_shuffle(draw, c, size, depth):
    out = draw.channels(most=4)
    layers = {"first": conv(draw, c, 4 * out, 2), "move": nn.PixelShuffle(2)}
    if draw.chance(0.5):
        layers["norm"] = norm(draw, out, 2)
    if draw.chance(0.3):
        layers["last"] = conv(draw, out, out, 2, groups=out)
    return Block("pixel shuffle", sequence, **layers), out, tuple(2 * s for s in size)


def pixel_unshuffle(draw, c, size, depth):
    wide = draw.channels(most=3)
    layers = {"first": conv(draw, c, wide, 2), "move": nn.PixelUnshuffle(2)}
    if draw.chance(0.6):
        layers["act"] = activation(draw, 4 * wide)
    if draw.chance(0.3):
        layers["last"] = conv(draw, 4 * wide, 4 * wide, 2, groups=4 * wide)
    return Block("pixel unshuffle", sequence, **layers), 4 * wide, tuple(s // 2 for s in size)


def mixed_places(draw, c, size, depth):
    """Channels moved in ways that leave every one of them where it can be told."""
    dims, groups = len(size), draw.pick(2, 3)
    wide = groups * draw.channels(most=3)
    kind = draw.pick("groups reduced", "stack", "repeat")
    if kind == "groups reduced":
        pool = draw.pick(lambda y: y.mean(1), lambda y: y.amax(1), lambda y: y.sum(1))
        block = Block(kind, lambda s, x: pool(s.a(x).unflatten(1, (groups, -1))), a=conv(draw, c, wide, dims))
        return block, wide // groups, size
    if kind == "stack":
        layers = {"a": conv(draw, c, wide, dims), "b": conv(draw, c, wide, dims)}
        at = draw.pick(1, 2)
        return Block(kind, lambda s, x: torch.stack([s.a(x), s.b(x)], at).flatten(1, 2), **layers), 2 * wide, size
    block = Block("repeat", lambda s, x: s.a(x).repeat(1, groups, *[1] * dims), a=conv(draw, c, wide // groups, dims))
    return block, wide, size


# Products and gates.


def excitation(draw, c, size, depth):
    squeezed, dims = draw.channels(most=4), len(size)
    pool = draw.pick(
        lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
        lambda x: getattr(F, f"adaptive_avg_pool{dims}d")(x, 1),
        lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True),
    )
    squash = draw.pick(torch.sigmoid, F.hardsigmoid, torch.tanh)
    before = conv(draw, c, c, dims) if draw.chance(0.5) else nn.Identity()
    if draw.chance(0.5):
        layers = {"down": conv(draw, c, squeezed, dims, kernel=1), "up": conv(draw, squeezed, c, dims, kernel=1)}

        def forward(s, x):
            x = s.before(x)
            return x * squash(s.up(F.relu(s.down(pool(x)))))

    else:
        layers = {"down": nn.Linear(c, squeezed), "up": nn.Linear(squeezed, c)}

        def forward(s, x):
            x = s.before(x)
            gate = squash(s.up(F.relu(s.down(pool(x).flatten(1)))))
            return gate.view(*gate.shape, *[1] * dims) * x

    return Block("squeeze and excitation", forward, before=before, **layers), c, size


def channel_convolution(draw, c, size, depth):
    """A 1-d convolution over the channels' means: which channels are neighbours is what it computes with."""

    def forward(s, x):
        x = s.before(x)
        gate = torch.sigmoid(s.mix(x.flatten(2).mean(2)[:, None]))
        return x * gate.transpose(1, 2).reshape(*x.shape[:2], *[1] * len(size))

    layers = {"before": conv(draw, c, c, len(size)), "mix": nn.Conv1d(1, 1, 3, padding=1, bias=False)}
    return Block("convolution over channels", forward, **layers), c, size


def product(draw, c, size, depth):
    """Products that are broadcast: with a learned scale, a learned map, or a vector."""
    dims, kind = len(size), draw.pick("scale", "map", "vector", "outer", "number")
    before = conv(draw, c, c, dims)
    if kind == "scale":
        shape = draw.pick((1, c, *[1] * dims), (c, *[1] * dims))
        return Block("broadcast product", lambda s, x: s.before(x) * s.w, before=before, w=parameter(*shape)), c, size
    if kind == "map":
        shape = draw.pick((1, 1, *size), tuple(size), (1, c, *size))
        return Block("broadcast product", lambda s, x: s.before(x) * s.w, before=before, w=parameter(*shape)), c, size
    if kind == "number":
        layers = {"before": before, "w": parameter(1), "b": parameter()}
        return Block("broadcast product", lambda s, x: s.before(x) * s.w + s.b, **layers), c, size
    if kind == "vector":

        def forward(s, x):
            scale, shift = s.other(x.flatten(2).mean(2)).chunk(2, 1)
            tail = (...,) + (None,) * dims
            return s.before(x) * (1 + scale[tail]) + shift[tail]

        return Block("broadcast product", forward, before=before, other=nn.Linear(c, 2 * c)), c, size

    def forward(s, x):  # two maps, each pooled along another axis
        y = s.before(x)
        return y.mean(2, keepdim=True) * y.amax(-1, keepdim=True) + y

    return Block("broadcast product", forward, before=before), c, size


def spatial_gate(draw, c, size, depth):
    dims = len(size)
    if draw.chance(0.5):
        layers = {"before": conv(draw, c, c, dims), "gate": conv(draw, c, 1, dims)}

        def forward(s, x):
            x = s.before(x)
            return x * torch.sigmoid(s.gate(x))

    else:
        layers = {"before": conv(draw, c, c, dims), "gate": conv(draw, 2, 1, dims), "after": conv(draw, c, c, dims)}

        def forward(s, x):  # the mean and the maximum over the channels
            x = s.before(x)
            gate = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
            return s.after(x * torch.sigmoid(s.gate(gate)))

    return Block("spatial gate", forward, **layers), c, size


# Space.


def pool(draw, c, size, depth):
    dims, out = len(size), draw.channels()
    small = tuple(s // 2 for s in size)
    kind = draw.pick("max", "avg", "adaptive", "adaptive max")
    to = tuple(draw.pick(2, 3) for _ in size)
    module, after, feature = {
        "max": (getattr(nn, f"MaxPool{dims}d")(2), small, "pooling"),
        "avg": (getattr(nn, f"AvgPool{dims}d")(2), small, "pooling"),
        "adaptive": (getattr(nn, f"AdaptiveAvgPool{dims}d")(to), to, "adaptive pooling"),
        "adaptive max": (getattr(nn, f"AdaptiveMaxPool{dims}d")(to), to, "adaptive pooling"),
    }[kind]
    return Block(feature, sequence, first=conv(draw, c, out, dims), pool=module), out, after


def upsample(draw, c, size, depth):
    dims, out = len(size), draw.channels()
    mode = draw.pick("nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[dims])
    block = Block("upsampling", sequence, first=conv(draw, c, out, dims), up=nn.Upsample(scale_factor=2, mode=mode))
    return block, out, tuple(2 * s for s in size)


def pad(draw, c, size, depth):
    dims, out = len(size), draw.channels()
    mode = draw.pick("constant", "reflect", "replicate", "circular") if dims < 3 else "constant"
    amounts = [1, 0] * dims
    block = Block("padding", lambda s, x: F.pad(s.a(x), amounts, mode=mode), a=conv(draw, c, out, dims))
    return block, out, tuple(s + 1 for s in size)


def padded_shortcut(draw, c, size, depth):
    """A sum whose shortcut is widened by a fixed number of channels of zeros."""
    more, dims = draw.pick(2, 4), len(size)
    amounts = [0] * (2 * dims) + [more // 2, more // 2]
    add = Block("padded shortcut", lambda s, x: F.relu(s.a(x) + F.pad(x, amounts)), a=conv(draw, c, c + more, dims))
    return add, c + more, size


def crop(draw, c, size, depth):
    """Places of the map by number, never channels."""
    dims, out = len(size), draw.channels()
    kind = draw.pick(
        lambda x: x[..., 1:].flip(-1),
        lambda x: x.narrow(-1, 0, x.shape[-1] - 1),
        lambda x: x.roll(1, -1)[..., :-1],
        lambda x: x.index_select(-1, torch.arange(x.shape[-1] - 1)),
    )
    return Block("crop", lambda s, x: kind(s.a(x)), a=conv(draw, c, out, dims)), out, (*size[:-1], size[-1] - 1)


# Weights used more than once.


def repeated(draw, c, size, depth):
    def forward(s, x):
        x = s.first(x)
        for _ in range(2):
            x = F.relu(s.twice(x))
        return x

    out, dims = draw.channels(), len(size)
    layers = {"first": conv(draw, c, out, dims), "twice": conv(draw, out, out, dims)}
    return Block("repeated module", forward, **layers), out, size


def repeated_block(draw, c, size, depth):
    """One branch applied twice, to two tensors, and the results concatenated."""
    out, dims = draw.channels(), len(size)
    layers = {"a": conv(draw, c, out, dims), "b": conv(draw, c, out, dims)}
    layers["twice"] = branch(draw, out, out, size, depth)

    def forward(s, x):
        return torch.cat([s.twice(s.a(x)), s.twice(F.relu(s.b(x)))], 1)

    return Block("repeated module", forward, **layers), 2 * out, size


def shared(draw, c, size, depth):
    """Two layers with one weight, or one weight used by functions."""
    dims, out, kind = len(size), draw.channels(), draw.pick("modules", "functions", "both ways")
    function = getattr(F, f"conv{dims}d")
    if kind == "modules":
        one = conv(draw, c, out, dims)
        other = conv(draw, c, out, dims, kernel=one.kernel_size[0], dilation=one.dilation[0])
        other.weight = one.weight

        def forward(s, x):
            return torch.cat([s.one(x), F.relu(s.other(torch.tanh(x)))], 1)

        return Block("shared weight", forward, one=one, other=other), 2 * out, size
    if kind == "functions":

        def forward(s, x):
            return function(x, s.w, s.b) * torch.sigmoid(function(x.tanh(), s.w))

        return Block("shared weight", forward, w=parameter(out, c, *[1] * dims), b=parameter(out)), out, size

    def forward(s, x):  # as in a tied autoencoder
        return F.linear(F.relu(F.linear(x.movedim(1, -1), s.w)), s.w.t()).movedim(-1, 1)

    return Block("shared weight", forward, w=parameter(out, c)), c, size


class Tanh(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


class Shifted(nn.Module):
    """Nothing that is zero before stays zero."""

    def forward(self, x):
        return F.softplus(x) - 0.3


PARAMETRISATIONS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral norm by hook": nn.utils.spectral_norm,
    "tanh of a weight": lambda m: parametrize.register_parametrization(m, "weight", Tanh()),
    "softplus of a weight": lambda m: parametrize.register_parametrization(m, "weight", Shifted()),
    "tanh of a bias": lambda m: parametrize.register_parametrization(m, "bias", Tanh()),
}


def parametrised(draw, c, size, depth):
    dims, out, inner = len(size), draw.channels(), draw.channels()
    kind = draw.pick(*PARAMETRISATIONS)
    middle = conv(draw, inner, inner, dims, bias=True, padding_mode="zeros")
    PARAMETRISATIONS[kind](middle)
    layers = {"before": conv(draw, c, inner, dims), "middle": middle, "act": nn.GELU()}
    layers["last"] = conv(draw, inner, out, dims)
    return Block(("parametrised weight", kind), sequence, **layers), out, size


def standardised(draw, c, size, depth):
    """A convolution whose weight is normalised in the forward pass."""
    dims, out = len(size), draw.channels()
    function = getattr(F, f"conv{dims}d")

    def forward(s, x):
        w = s.layer.weight
        axes = tuple(range(1, w.dim()))
        w = (w - w.mean(axes, keepdim=True)) / (w.var(axes, keepdim=True, unbiased=False) + 1e-3).sqrt()
        return s.after(F.relu(function(s.before(x), w, s.layer.bias)))

    layer = getattr(nn, f"Conv{dims}d")(c, out, 1)
    layers = {"before": conv(draw, c, c, dims), "layer": layer, "after": conv(draw, out, out, dims)}
    return Block("weight computed in the forward pass", forward, **layers), out, size


# Attention.


def attention(draw, c, size, depth):
    """A transformer's block over the places of the map: attention and a perceptron, each added to the stream."""
    heads, width = draw.pick(1, 2, 3), draw.pick(2, 3)
    width *= heads
    normed, hidden = draw.chance(0.6), draw.channels()
    kind = draw.pick("module", "module", "by hand", "fused", "encoder layer")
    layers = {"embed": conv(draw, c, width, len(size), kernel=1)}
    feature = f"attention: {kind}"
    if kind == "encoder layer":
        options = {"batch_first": True, "norm_first": draw.chance(0.5), "activation": draw.pick("relu", "gelu")}
        layers["attend"] = nn.TransformerEncoderLayer(width, heads, hidden, 0.0, **options)

        def forward(s, x):
            x = s.embed(x)
            return s.attend(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])

        return Block(("attention", feature), forward, **layers), width, size
    if kind == "module":
        first, weights = draw.chance(0.6), draw.chance(0.5)
        layers["attend"] = nn.MultiheadAttention(width, heads, bias=draw.chance(0.7), batch_first=first)

        def attend(s, x):
            x = x if first else x.transpose(0, 1)
            y = s.attend(x, x, x, need_weights=weights)[0]
            return y if first else y.transpose(0, 1)

    else:
        layers |= {"qkv": nn.Linear(width, 3 * width, bias=draw.chance(0.7)), "out": nn.Linear(width, width)}

        def attend(s, x):
            n, t, k = x.shape
            q, key, v = s.qkv(x).reshape(n, t, 3, heads, k // heads).permute(2, 0, 3, 1, 4)
            if kind == "fused":
                y = F.scaled_dot_product_attention(q, key, v)
            else:
                y = torch.softmax(q @ key.mT / q.shape[-1] ** 0.5, -1) @ v
            return s.out(y.transpose(1, 2).reshape(n, t, k))

    layers["mlp"] = nn.Sequential(nn.Linear(width, hidden), activation_of_tokens(draw), nn.Linear(hidden, width))
    if normed:
        layers |= {"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)}

    def forward(s, x):
        x = s.embed(x)
        tokens = x.flatten(2).mT
        tokens = tokens + attend(s, s.norm1(tokens) if normed else tokens)
        tokens = tokens + s.mlp(s.norm2(tokens) if normed else tokens)
        return tokens.mT.unflatten(2, x.shape[2:])

    # By hand, the sizes that heads are cut into come from the stream: without a norm, which pins it, they are written.
    own = ["written"] if kind != "module" and not normed else []
    return Block(["attention", feature, *own], forward, **layers), width, size


def activation_of_tokens(draw):
    return draw.pick(nn.ReLU, nn.GELU, nn.SiLU)()


# Sizes written into the forward pass: to be pinned by name, as the refusal says.


def written(draw, c, size, depth):
    dims, within = len(size), draw.channels(most=4)
    wide = 2 * within
    layers = {"first": conv(draw, c, wide, dims), "last": conv(draw, wide, wide, dims)}
    kind = draw.pick("view", "split", "pairs", "interleave", "pieces")

    def forward(s, x):
        x = s.first(x)
        if kind == "interleave":  # no size is written, but the part that is given by the width is not the last one
            return s.last(x.reshape(len(x), x.shape[1] // 2, 2, *size).transpose(1, 2).flatten(1, 2))
        if kind == "pieces":  # however many they are
            return s.last(torch.cat(x.split(max(within // 2, 1), 1)[::-1], 1))
        if kind == "view":
            return s.last(x.reshape(-1, 2, within, *size).flip(1).reshape(-1, wide, *size))
        if kind == "split":
            a, b = x.split(within, 1)
            return s.last(torch.cat([b, a.relu()], 1))
        return s.last(x.reshape(len(x), within, 2, *size).transpose(1, 2).reshape(len(x), wide, *size))

    return Block("written", forward, **layers), wide, size


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


KEEP_SIZE = {
    plain: 3, grouped: 2, depthwise: 2, linear_last: 1, chunk: 2, uneven_chunk: 1, split_sizes: 1, glu: 1, shuffle: 2,
    mixed_places: 1, excitation: 2, channel_convolution: 0.5, product: 1.5, spatial_gate: 1, repeated: 1, shared: 1.5,
    parametrised: 3, standardised: 0.5, attention: 2, padded_shortcut: 0.5,
}  # fmt: skip
COMPOSITE = {residual: 4, stream: 1.5, concatenation: 2, dense: 1, nested: 1, repeated_block: 1}
CHANGE_SIZE = {strided: 1, transposed: 4, pool: 2, upsample: 1.5, pad: 1, crop: 1}
MAPS_ONLY = {pixel_shuffle: 3, pixel_unshuffle: 2}
