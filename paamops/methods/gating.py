"""Where the scores of PAAM meet the network: A' = S ⊙ A for every activation that is read, at no cost to activations.

Scaling what a layer reads is what `mask` does with zeros, so S = 0 is removal. It is linear in what is read, so S folds
into the weight that reads it. Where a batch norm writes all of the channels, it folds into the norm's weight and bias,
which are far smaller.
"""

import contextlib
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from paamops import tracing
from paamops.ops.scale_channels import scale_channels

GATES = ("free", "explicit")
# Of the largest output. In float64 places that serve agree to 1e-15, and of those that do not a deep network may leave
# little to see: 1e-5 in train mode, where a later norm takes the factor out but for its eps.
TOLERANCE = 1e-11
TRIALS = ((1.0, True), (100.0, True), (1.0, False))  # what the norms are multiplied by, to show saturation; train mode


@dataclass(frozen=True)
class Place:
    """One tensor that scores fold into, along one axis. `sets`: (n,) the channel set of each index, S for none."""

    name: str
    axis: int
    sets: torch.Tensor


class Gates:
    """The places of all gates of a network.

    Of every batch norm whose channels are written by batch norms only, weight and bias are scaled (between it and what
    reads it there may be anything that lets a factor through: ReLU, pooling, sums with channels of the same factor).
    Everything else is scaled where it is read: the input axis of a weight. Which norms these are is found by trial: the
    network with the factors in the norms must compute what it computes with the factors in the weights that read, with
    random parameters, in train mode (where a later norm would take the factor out again) and in eval mode (where it
    would not, and multiply by it once more).

    Args:
        model: the traced network. channels: its ChannelMap.
    """

    def __init__(self, model, channels):
        self.channels = channels
        self.norms = _norms_that_serve(model, channels)
        self.places = _places(channels, self.norms)
        self.gather = Gather(torch.cat([place.sets for place in self.places]), len(channels.pinned) + 1)
        self.sizes = [len(place.sets) for place in self.places]

    def tensors(self, model, scores):
        """Name -> the tensor with the factors `scores` (S,) folded in, differentiable in both."""
        originals = tracing.named_tensors(model)
        factors = self.gather(torch.cat([scores, scores.new_ones(1)])).split(self.sizes)
        vectors = [k for k, place in enumerate(self.places) if originals[place.name].dim() == 1]
        result = {}
        if vectors:  # all norms in one product: a few launches, however many layers
            flat = torch.cat([originals[self.places[k].name] for k in vectors])
            scaled = flat * torch.cat([factors[k] for k in vectors]).to(flat.dtype)
            parts = scaled.split([self.sizes[k] for k in vectors])
            result = {self.places[k].name: part for k, part in zip(vectors, parts, strict=True)}
        for place, factor in zip(self.places, factors, strict=True):
            tensor = result.get(place.name, originals[place.name])
            if tensor.dim() > 1:
                shape = [-1 if axis == place.axis else 1 for axis in range(tensor.dim())]
                result[place.name] = tensor * factor.to(tensor.dtype).view(shape)
        return result

    @contextlib.contextmanager
    def placed(self, model, scores):
        """Within it the forward passes of `model` compute with the factors `scores` (S,)."""
        with replaced(model, self.tensors(model, scores)):
            yield

    @contextlib.contextmanager
    def explicit(self, model, scores):
        """The same by `scale_channels` on the activations: for comparison, and as the other gate's oracle."""
        extended = torch.cat([scores, scores.new_ones(1)])
        hooks = []
        try:
            for place in self.places:
                factor = extended[place.sets.to(scores.device)]
                for module, leaf in _owners(model, place.name):
                    if place.name in self.norms:
                        hooks.append(module.register_forward_hook(_scale_output(factor)))
                    elif place.name.removesuffix("bias") + "weight" not in self.norms:
                        hooks.append(module.register_forward_pre_hook(_scale_input(factor, module, leaf, place)))
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Gather:
    """values[index], whose gradient is summed in a fixed order (an index's own backward adds in any order on a GPU)."""

    def __init__(self, index, size):
        self.index, self.order = index, index.argsort(stable=True)
        self.lengths = torch.bincount(index, minlength=size)

    def __call__(self, values):
        for name in ("index", "order", "lengths"):
            setattr(self, name, getattr(self, name).to(values.device))
        return _Gather.apply(values, self.index, self.order, self.lengths)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, index, order, lengths):
        ctx.save_for_backward(order, lengths)
        return values[index]

    @staticmethod
    def backward(ctx, grad):
        order, lengths = ctx.saved_tensors
        return torch.segment_reduce(grad[order], "sum", lengths=lengths, initial=0), None, None, None


@contextlib.contextmanager
def replaced(model, tensors):
    """Within it the modules of `model` hold `tensors` in place of their own parameters and buffers of these names."""
    originals = tracing.named_tensors(model)
    place = {id(originals[name]): tensor for name, tensor in tensors.items()}
    holders = [held for module in model.modules() for held in (module._parameters, module._buffers)]
    before = [(held, leaf, t) for held in holders for leaf, t in held.items() if id(t) in place]  # tied ones too
    try:
        for held, leaf, tensor in before:
            held[leaf] = place[id(tensor)]
        yield
    finally:
        for held, leaf, tensor in reversed(before):
            held[leaf] = tensor


def _owners(model, name):
    """The modules that hold the tensor of this name, and what they call it: several where it is tied."""
    tensor = tracing.named_tensors(model)[name]
    held = [(module, {**module._parameters, **module._buffers}) for module in model.modules()]
    return [(module, leaf) for module, tensors in held for leaf, t in tensors.items() if t is tensor]


def _places(channels, norms):
    """The Places, where the norms of these names (of their weights) serve the sets on them."""
    none = len(channels.pinned)
    served = np.zeros(none + 1, bool)
    places = []
    for name in norms:
        ids = channels.axes[name][0]
        served[ids] = True
        sets = torch.from_numpy(np.where(ids < 0, none, ids))
        places += [Place(name, 0, sets), Place(name.removesuffix("weight") + "bias", 0, sets)]
    served[none] = True
    pinned = np.append(channels.pinned.numpy(), True)
    for name, axes in channels.read_axes.items():
        for axis in axes:
            ids = channels.axes[name][axis]
            ids = np.where((ids < 0) | served[ids] | pinned[ids], none, ids)
            if (ids != none).any():
                places.append(Place(name, axis, torch.from_numpy(ids)))
    return places


def _groups(model, channels):
    """Batch norms with weight and bias, those of a channel set together: lists of their weights' names."""
    groups = []  # (sets, names)
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.weight is None or module.bias is None:
            continue
        ids = channels.axes.get(name, (None,))[0]
        if ids is None or name.removesuffix("weight") + "bias" not in channels.axes:  # one that is tied to another's
            continue
        sets, names = set(ids[ids >= 0].tolist()), [name]
        for other in [group for group in groups if group[0] & sets]:
            groups.remove(other)
            sets, names = sets | other[0], other[1] + names
        groups.append((sets, names))
    return [names for sets, names in groups if not all(channels.pinned[list(sets)])]


@torch.no_grad()
def _norms_that_serve(model, channels):
    groups = _groups(model, channels)
    if not groups:
        return []
    trial = _Trial(model, channels)

    def serving(some):
        """Those of `some` groups that serve, by halving what does not."""
        if trial.agrees([name for names in some for name in names]):
            return some
        half = len(some) // 2
        return serving(some[:half]) + serving(some[half:]) if half else []

    return [name for names in serving(groups) for name in names]


class _Trial:
    """The network with random parameters and factors: what it computes with gates at some norms, or at none."""

    def __init__(self, model, channels):
        self.model, self.channels = model, channels
        generator = torch.Generator().manual_seed(0)  # the caller's is not disturbed
        self.norms = {name for names in _groups(model, channels) for name in names}
        self.tensors = {
            name: _anew(tensor, generator) if isinstance(tensor, nn.Parameter) else _exact(tensor.detach().clone())
            for name, tensor in tracing.named_tensors(model).items()
        }
        self.scores = (torch.rand(len(channels.pinned), generator=generator) + 0.5).masked_fill(channels.pinned, 1)
        self.scores = self.scores.to(next(iter(self.tensors.values())).device)
        self.inputs = tree_map(_exact, channels.example_inputs)
        for name in _statistics(model):
            self.tensors[name].copy_(torch.rand(self.tensors[name].shape, generator=generator) + 0.5)
        self.expected = [self.output([], *trial) for trial in TRIALS]

    def agrees(self, norms):
        for expected, trial in zip(self.expected, TRIALS, strict=True):
            found = None if expected is None else self.output(norms, *trial)
            if found is None or len(found) != len(expected):
                return False
            for one, other in zip(found, expected, strict=True):
                if one.shape != other.shape:
                    return False
                if not (one - other).abs().max() <= TOLERANCE * other.abs().max():  # NaN disagrees
                    return False
        return True

    def output(self, norms, amplitude, train):
        """The floating outputs in train or eval mode; None where the network does not run in it."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        for name in self.norms:
            tensors[name] *= amplitude
            tensors[name.removesuffix("weight") + "bias"] *= amplitude
        extended = torch.cat([self.scores, self.scores.new_ones(1)])
        for place in _places(self.channels, norms):
            tensor = tensors[place.name]
            shape = [-1 if axis == place.axis else 1 for axis in range(tensor.dim())]
            tensor *= extended[place.sets.to(tensor.device)].to(tensor.dtype).view(shape)
        args, kwargs = tracing.arguments(tree_map(_copied, self.inputs))
        modes = {module: module.training for module in self.model.modules()}
        try:
            with _seeded(tensors.values()), replaced(self.model, tensors):
                output = self.model.train(train)(*args, **kwargs)
        except Exception:
            return None
        finally:
            for module, mode in modes.items():
                module.training = mode
        return [t for t in tracing.leaves(output) if t.is_floating_point() and t.numel()]


def _statistics(model):
    """The names of the norms' running statistics: those of random weights would be others than the network's own."""
    kept = ("running_mean", "running_var")
    held = [
        m._buffers.get(leaf) for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for leaf in kept
    ]
    return [name for name, tensor in tracing.named_tensors(model).items() if any(tensor is t for t in held)]


def _anew(parameter, generator):
    """Random values, whatever the parameter holds: behind a layer that starts at zero every network is the same."""
    value = _exact(parameter.detach().clone())
    if not value.is_floating_point():
        return value
    if value.dim() > 1:
        return value.copy_(torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5)
    negative = torch.rand(value.shape, generator=generator) < 0.3
    return value.copy_((torch.rand(value.shape, generator=generator) + 0.5).where(~negative, -0.7))


@contextlib.contextmanager
def _seeded(tensors):
    """Within it the generators of torch, NumPy and Python start anew; afterwards they go on where they were."""
    devices = [tensor.device for tensor in tensors if tensor.is_cuda][:1]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - networks may draw from it
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def _exact(value):
    """In float64, which tells a difference from rounding that a deep network has amplified."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _scale_output(factor):
    return lambda module, args, output: scale_channels(output, factor.to(output.dtype))


def _scale_input(factor, module, leaf, place):
    if leaf != "weight" or next(module.children(), None) is not None:
        raise ValueError(
            f"gate is 'explicit', but {place.name!r} belongs to a {type(module).__name__}: only the inputs of modules"
            " with one weight can be scaled; use gate='free'"
        )
    # The weight of a grouped convolution has an index for the inputs of one group, read by the others alike.
    factor = factor.repeat(getattr(module, "groups", 1) if place.axis == 1 else 1)
    linear = isinstance(module, nn.Linear)

    def scale(module, args):
        x, *rest = args
        scaled = x * factor.to(x.dtype) if linear else scale_channels(x, factor.to(x.dtype))
        return scaled, *rest

    return scale
