"""Random networks from a grammar, for tests that must hold for networks nobody thought of.

`random_network(seed)` is the same network for the same seed. Print it to see its structure: every block names what it
is an example of.
"""

import random
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from tests import grammar_blocks as blocks
from tests.grammar_blocks import Block


class Draw:
    """The choices of one network, from a seed of its own."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def pick(self, *options):
        return self.random.choice(options)

    def chance(self, probability):
        return self.random.random() < probability

    def channels(self, most=7):
        return self.random.randint(2, most)

    def several(self, c, size, depth, at_most, keep_size=False, at_least=1):
        """One production after the other."""
        modules = []
        for _ in range(self.random.randint(at_least, at_most)):
            module, c, size = self.production(c, size, depth, keep_size)(self, c, size, depth)
            modules.append(module)
        return nn.Sequential(*modules), c, size

    def production(self, c, size, depth, keep_size):
        weights = dict(blocks.KEEP_SIZE)
        if depth > 0 and c < 20:
            weights |= blocks.COMPOSITE
        if not keep_size:
            changing = blocks.CHANGE_SIZE | (blocks.MAPS_ONLY if len(size) == 2 else {})
            weights |= {p: w for p, w in changing.items() if fits(p, size)}
        return self.random.choices(list(weights), list(weights.values()))[0]


def fits(production, size):
    """Whether a map of this size neither vanishes in a production nor grows large."""
    if production in (blocks.strided, blocks.pool, blocks.crop):
        return min(size) >= 4
    if production is blocks.pixel_unshuffle:
        return min(size) >= 4 and all(s % 2 == 0 for s in size)
    if production in (blocks.upsample, blocks.pixel_shuffle, blocks.pad):
        return max(size) <= 6 and len(size) < 3
    return True


class Network(nn.Module):
    """Stem, body and heads; `kind` says how inputs come in and outputs go out."""

    def __init__(self, draw, with_written):
        super().__init__()
        dims = draw.pick(1, 2, 2, 2, 2, 2, 3)
        self.size = {1: (8,), 2: draw.pick((6, 6), (4, 6), (5, 5)), 3: (4, 4, 4)}[dims]
        self.given = draw.pick(1, 2, 3)
        self.two_inputs = draw.pick("", "", "", "sum", "concatenation", "condition")
        self.stem, c, size = blocks.plain(draw, self.given, self.size, 0)
        if self.two_inputs in ("sum", "concatenation"):
            out = c if self.two_inputs == "sum" else draw.channels()
            self.side = blocks.branch(draw, 2, out, size, 1)
            c += out * (self.two_inputs == "concatenation")
        elif self.two_inputs:
            self.side = nn.Linear(2, c)
        parts = []
        if with_written:
            module, c, size = blocks.written(draw, c, size, 0)
            parts.append(module)
        body, c, size = draw.several(c, size, depth=2, at_least=2, at_most=3)
        self.body = nn.Sequential(*parts, *body)
        self.skip = draw.chance(0.2)  # the heads see the input again
        c += self.given * self.skip
        self.outputs = draw.pick("one", "one", "tuple", "dict", "nested")
        self.heads = nn.ModuleList(head(draw, c, size) for _ in range(1 if self.outputs == "one" else 2))

    def forward(self, x, y=None):
        given, x = x, self.stem(x)
        if self.two_inputs == "sum":
            x = x + self.side(y)
        elif self.two_inputs == "concatenation":
            x = torch.cat([x, self.side(y)], 1)
        elif self.two_inputs:
            x = x * torch.sigmoid(self.side(y)).unflatten(1, (-1, *[1] * len(self.size)))
        x = self.body(x)
        if self.skip:
            x = torch.cat([x, F.interpolate(given, x.shape[2:])], 1)
        results = [each(x) for each in self.heads]
        if self.outputs == "one":
            return results[0]
        if self.outputs == "tuple":
            return tuple(results)
        return {"a": results[0], "b": results[1] if self.outputs == "dict" else [results[1], {"c": results[0].mean()}]}

    def _get_name(self):
        return f"Network (inputs: {self.two_inputs or 'one'}; outputs: {self.outputs}; skip: {self.skip})"


def head(draw, c, size):
    dims, out = len(size), draw.pick(1, 2, 3)
    pooled = {"n": 1}
    kind = draw.pick("global pooling", "global pooling", "adaptive pooling", "flattened map", "map")
    if kind == "map":
        return Block("map as output", blocks.sequence, last=blocks.conv(draw, c, out, dims))
    if kind == "global pooling":
        reduce = draw.pick(
            lambda x: x.mean(tuple(range(2, x.dim()))),
            lambda x: x.flatten(2).amax(2),
            lambda x: getattr(F, f"adaptive_avg_pool{dims}d")(x, 1).flatten(1),
            lambda x: x.flatten(2).logsumexp(-1),
        )
    elif kind == "adaptive pooling":
        pooled["n"] = 2**dims
        reduce = draw.pick(
            lambda x: getattr(F, f"adaptive_avg_pool{dims}d")(x, 2).flatten(1),
            lambda x: getattr(F, f"adaptive_max_pool{dims}d")(x, 2).reshape(len(x), -1),
        )
    else:
        pooled["n"] = torch.Size(size).numel()
        reduce = draw.pick(lambda x: x.flatten(1), lambda x: torch.flatten(x, 1), lambda x: x.reshape(x.shape[0], -1))
    features = [kind] if kind == "global pooling" else [kind, "flatten into linear"]
    hidden = draw.channels()
    width = c * pooled["n"]
    layers = {"first": nn.Linear(width, hidden), "act": draw.pick(nn.ReLU, nn.Tanh)(), "last": nn.Linear(hidden, out)}
    if draw.chance(0.3):
        layers = {"last": nn.Linear(width, out)}
    norm = {"norm": nn.BatchNorm1d(hidden)} if "act" in layers and draw.chance(0.4) else {}

    def forward(s, x):
        x = reduce(x)
        if hasattr(s, "act"):
            x = s.first(x)
            x = s.act(s.norm(x) if hasattr(s, "norm") else x)
        return s.last(x)

    return Block(features, forward, **layers, **norm)


def random_network(seed, written=False):
    """(module, inputs): a small random network in eval mode, float64, all its values away from trivial ones.

    `written`: with a block whose forward pass has sizes written into it.
    """
    draw = Draw(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network(draw, written).double().eval()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if not tensor.is_floating_point() or name.endswith(("_u", "_v")):  # a spectral norm's are its own
                    continue
                if tensor.dim() == 1:
                    tensor.add_(torch.rand_like(tensor) + 0.1)
                elif name.endswith("weight"):
                    tensor.mul_(2)
        inputs = [torch.randn(2, model.given, *model.size, dtype=torch.float64)]
        if draw.chance(0.2) and len(model.size) == 2:
            model = model.to(memory_format=torch.channels_last)
            inputs = [inputs[0].contiguous(memory_format=torch.channels_last)]
        if model.two_inputs:
            shape = (2, 2) if model.two_inputs == "condition" else (2, 2, *model.size)
            inputs.append(torch.randn(shape, dtype=torch.float64))
    return model, tuple(inputs)


def features(model):
    """How many blocks of the network are an example of each feature."""
    found = Counter(f for module in model.modules() if isinstance(module, Block) for f in module.features)
    found[f"{'two inputs' if model.two_inputs else 'one input'}"] += 1
    found[f"outputs: {model.outputs}"] += 1
    found["input joined again"] += model.skip
    return +found
