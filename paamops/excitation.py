"""Squeeze-and-excitation behind the convolutions of a network, put there without editing its code.

Each convolution has a host: the norm that reads it alone, or itself. The host gets a submodule, `excitation`, and a
forward hook that scales what the host returns, so names of parameters that were there before do not change.

A ReLU after the host is taken into the excitation, which squeezes and scales y = relu(x): the model's own ReLU then
finds nothing to cut, since saliencies are positive, relu(π · relu(x)) = π · relu(x). The same holds for ReLU6, since
they are below 1. Other activations follow the excitation.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from paamops import tracing
from paamops.ops import channel_attention as op

LEAST_HIDDEN = 4  # with a single hidden unit the saliencies of all images would lie on one curve
OPEN = 2.0  # the first saliencies are around sigmoid(2) = 0.88: a trained network goes on from about what it was
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_twice = False
RELU = (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)


class Excitation(nn.Module):
    """y = π · a, a = activation(x), π = sigmoid(W₂ relu(W₁ mean_space(a) + b₁) + b₂) (Hu et al. 2018).

    x (N, C, *spatial) → y like x. After each forward pass `saliency` holds its π, (N, C), with its graph.

    Args:
        channels: C. hidden: the rows of W₁. activation: "none", "relu" or "relu6".
        like: a tensor whose device and dtype the parameters get.
    """

    def __init__(self, channels, hidden, activation="none", like=None):
        super().__init__()
        place = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.reduce, self.expand = nn.Linear(channels, hidden, **place), nn.Linear(hidden, channels, **place)
        nn.init.constant_(self.expand.bias, OPEN)
        self.activation, self.saliency = activation, None

    def forward(self, x):
        squeeze_and_excite = op.reference if _twice else op.channel_attention
        y, self.saliency = squeeze_and_excite(
            x, self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias, self.activation
        )
        return y

    def extra_repr(self):
        return f"activation={self.activation!r}"

    def __getstate__(self):
        return {**self.__dict__, "saliency": None}  # a result, with its graph: neither copied nor pickled


def excite(model, example_inputs, layers=None, reduction=16, pinned=()):
    """Put an Excitation behind convolutions of `model`, in place; their hosts' paths and settings.

        paamops.excite(model, images)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made afterwards: there are new parameters

    Where: after the norm and the ReLU or ReLU6 that follow a convolution (another activation comes after it); where a
    residual sum follows the norm, before the sum, so that the identity is added to what is scaled (GlobalPru, Wang et
    al. 2023, §4.2). Convolutions on a shortcut and the first one of the network get one too: the paper does not speak
    of them.

    Args:
        model: nn.Module, traceable; trained or not. example_inputs: what `trace` takes.
        layers: names of convolutions, or None: all whose channels can be pruned and that run once, as modules.
        reduction: hidden units are C // reduction, at least 4.
        pinned: as for `trace`; without `layers`, what is pinned gets none.

    Returns:
        dict: the path of each host -> (hidden units, activation), which `install` takes.

    Raises:
        ValueError: the model has excitations already; no convolution can be pruned; one of `layers` is no convolution,
            has a single channel, does not run exactly once, or is a function's. The model is then as it was.
        TypeError: `model` is not a module, or `layers` a string.

    A convolution whose weight is computed in the forward pass (weight_norm) gets none: the trace keeps it whole.
    """
    if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 1:
        raise ValueError(f"reduction is {reduction!r}; it must be an int of at least 1")
    channels = tracing.trace(model, example_inputs, pinned)
    if isinstance(layers, str):
        raise TypeError(f"layers is {layers!r}; it must be a list of names")
    layers = None if layers is None else list(layers)
    if found := excitations(model):
        raise ValueError(f"model has excitations already, at {', '.join(list(found)[:3])}")
    seen = _follow(model, example_inputs)
    tensors, paths = tracing.named_tensors(model), {module: path for path, module in model.named_modules()}
    chosen, refused = {}, {}
    for number, layer in enumerate(channels.layers):
        sets = channels.sets[channels.offsets[number] : channels.offsets[number + 1]]
        outputs = seen.convolved.get(id(tensors[layer.weight]), [])
        host, activation = _host(outputs, seen)
        if "convolution" not in layer.kind:
            refused[layer.name] = "has no spatial size to squeeze"
        elif len(sets) < 2:
            refused[layer.name] = "has one channel, among which no ranking can choose"
        elif len(outputs) != 1:
            refused[layer.name] = f"runs {len(outputs)} times"
        elif host is None:
            refused[layer.name] = "runs as a function without a norm after it, so no module returns what it computes"
        elif layers is None and channels.pinned[sets].all():
            refused[layer.name] = f"must stay: {channels.reasons[int(sets[0])]}"
        else:
            chosen[layer.name] = paths[host], (max(len(sets) // reduction, LEAST_HIDDEN), activation)
    for name in layers or ():
        if name not in chosen:
            reason = refused.get(name, "is no layer of the model")
            raise ValueError(f"layers names {name!r}, which {reason}; it must be a convolution of several channels")
    places = dict(place for name, place in chosen.items() if layers is None or name in layers)
    if not places:
        told = "; ".join(f"{name} {reason}" for name, reason in list(refused.items())[:3])
        raise ValueError(f"model has no convolution that can get an excitation: {told}")
    install(model, places)
    return places


def install(model, places):
    """Put excitations at `places`, {path of a host: (hidden units, activation)}, without a forward pass.

    ValueError: a path names no convolution or norm. The model is then as it was.
    """
    modules = dict(model.named_modules())
    made = []
    for path, (hidden, activation) in places.items():
        host = modules.get(path)
        size = next(
            (getattr(host, name) for name in ("out_channels", "num_features", "num_channels") if hasattr(host, name)),
            None,
        )
        if hasattr(host, "excitation"):
            raise ValueError(f"places names {path!r}, which has an excitation already")
        if activation not in op.ACTIVATIONS:
            raise ValueError(f"places gives {path!r} the activation {activation!r}; it must be one of {op.ACTIVATIONS}")
        if size is None:
            raise ValueError(f"places names {path!r}; it must be a convolution or a norm of the model")
        tensor = next(iter(host.parameters()), next(iter(model.parameters()), None))
        made.append((host, Excitation(size, hidden, activation, tensor).train(host.training)))
    for host, excitation in made:
        host.excitation = excitation
        # A branch that is added into its stream by index is scaled before its channels go to their places.
        host.register_forward_hook(_scale_output, prepend=hasattr(host, "scatter"))
    recipe = getattr(model, "paamops_recipe", None)
    if recipe is not None:
        model.paamops_recipe = {**recipe, "excitations": {path: list(place) for path, place in places.items()}}


def remove(model):
    """Take all excitations out of the model again; its other parameters are not touched."""
    for module in model.modules():
        if isinstance(getattr(module, "excitation", None), Excitation):
            del module.excitation
            for key in [key for key, hook in module._forward_hooks.items() if hook is _scale_output]:
                del module._forward_hooks[key]
    recipe = getattr(model, "paamops_recipe", None)
    if recipe is not None:
        model.paamops_recipe = {key: value for key, value in recipe.items() if key != "excitations"}


@contextlib.contextmanager
def differentiable_twice():
    """Within it excitations run as ordinary PyTorch ops, whose gradients have gradients: slower, for Hessians."""
    global _twice
    before, _twice = _twice, True
    try:
        yield
    finally:
        _twice = before


def excitations(model):
    """{path of the host: Excitation} of a model, in the order of its modules."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, Excitation)}
    return {path.rpartition(".")[0]: module for path, module in found.items()}


def _scale_output(module, args, output):
    return module.excitation(output)


def _host(outputs, seen):
    """The module that returns what a convolution has computed, and the activation that is taken into the excitation."""
    if len(outputs) != 1:
        return None, "none"
    (output,) = outputs
    host = seen.returned_by(output)
    norms = [module for module, tensors in seen.read.items() if any(each is output for each in tensors)]
    if len(norms) == 1 and len(seen.uses(output)) == 1 and len(seen.returned[norms[0]]) == 1:
        host, (output,) = norms[0], seen.returned[norms[0]]
    uses = set(seen.uses(output))
    return host, uses.pop() if uses in ({"relu"}, {"relu6"}) else "none"


class _Uses(TorchFunctionMode):
    """What a forward pass does with the outputs of convolutions and norms.

    convolved: id of a weight -> the outputs of the convolutions with it. returned: convolution or norm -> the tensors
    that it returned. read: norm -> those that it was given.
    """

    def __init__(self, model):
        super().__init__()
        hosts = [module for module in model.modules() if isinstance(module, (nn.modules.conv._ConvNd, *NORMS))]
        self.convolved, self.returned, self.read = {}, {host: [] for host in hosts}, {host: [] for host in hosts}
        self._uses, self._changed, self._kept = {}, set(), []
        self._hooks = [host.register_forward_hook(self._follow, with_kwargs=True) for host in hosts]

    def _follow(self, module, args, kwargs, output):
        self.returned[module].append(output)
        self._uses.setdefault(id(output), [])
        if isinstance(module, NORMS):
            self.read[module].append(args[0] if args else kwargs["input"])

    def leave(self, outputs):
        """The model returns these: whoever gets them reads them."""
        for value in tracing.leaves(outputs):
            if id(value) in self._uses:
                self._uses[id(value)].append("other")

    def returned_by(self, tensor):
        """The module that returned the tensor, or None."""
        return next((m for m, tensors in self.returned.items() if any(each is tensor for each in tensors)), None)

    def uses(self, tensor):
        """What read it: "relu", "relu6" or "other"."""
        return self._uses[id(tensor)]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        self._kept.append(result)  # so that no id is given to a second tensor
        if not isinstance(result, torch.Tensor):  # a size, say
            return result
        for value in tracing.leaves((args, kwargs)):
            if id(value) in self._uses and id(value) not in self._changed:
                self._uses[id(value)].append(_named(func, args, kwargs))
                if result is value:  # in place: what reads it from now on reads the result
                    self._changed.add(id(value))
        if name.startswith("conv"):
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            self.convolved.setdefault(id(weight), []).append(result)
            self._uses[id(result)] = []
        return result

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)


def _named(func, args, kwargs):
    if func in RELU:
        return "relu"
    bounds = (*args[1:3], *(kwargs.get(name) for name in ("min_val", "max_val") if name in kwargs))
    if func is F.relu6 or (func in (F.hardtanh, F.hardtanh_) and bounds == (0.0, 6.0)):
        return "relu6"
    return "other"


def _follow(model, example_inputs):
    args, kwargs = tracing.arguments(example_inputs)
    with tracing.evaluating(model), torch.no_grad(), _Uses(model) as seen:
        outputs = model(*args, **kwargs)
    seen.leave(outputs)
    return seen
