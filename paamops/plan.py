"""Where a packed network comes from: which indices of the original it kept, and what the original was.

`pack` leaves it in the attribute `paamops_plan` of each module, which is copied and pickled along, wherever the module
goes: a dict, name of one of the module's own parameters and buffers -> (for every axis the kept indices of the
original's, or None for the whole axis; the original's shape).
"""

import hashlib

from paamops import scattering
from paamops.tracing import named_tensors
from paamops.wrapping import unwrapped

ATTRIBUTE = "paamops_plan"

# The sizes a module keeps beside its tensors, which pruning changes.
SIZES = (
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "in_features",
    "out_features",
    "num_channels",
    "num_groups",
    "normalized_shape",
    "num_parameters",
    "num_embeddings",
    "embedding_dim",
)

# What else decides what a module of PyTorch computes, in plain values that pruning does not change.
SETTINGS = (
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "output_padding",
    "padding_mode",
    "eps",
    "affine",
    "track_running_stats",
    "elementwise_affine",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
    "output_size",
    "size",
    "scale_factor",
    "mode",
    "align_corners",
    "upscale_factor",
    "downscale_factor",
    "start_dim",
    "end_dim",
    "dim",
    "negative_slope",
    "alpha",
    "lambd",
    "beta",
    "threshold",
    "value",
    "min_val",
    "max_val",
    "approximate",
    "num_heads",
    "batch_first",
    "num_layers",
    "bidirectional",
)


def kept(model):
    """Which of the original's indices each tensor of a packed network has kept, over all the times it was pruned.

        original.conv1.weight[paamops.kept(small)["conv1.weight"][0]]  # the filters that small.conv1 began with

    Args:
        model: nn.Module, packed or not, loaded or not. DistributedDataParallel, DataParallel and torch.compile's
            wrapper are looked through.

    Returns:
        dict: the name of every parameter and buffer -> a tuple with, for every axis, the kept indices of the original's
        axis, int64 on the CPU in rising order, or None for the whole axis. The original is the network that was packed
        first. Tensors that came into the network later, or were replaced by some of another size, are left out, and so
        are all of a network from a file that does not tell. Of a network that was never packed all are there, whole.

    Raises:
        TypeError: `model` is not a module.
    """
    model = unwrapped(model)
    return _known(model, named_tensors(model))[0]


def is_packed(model):
    """Whether any part of the model comes from `pack`."""
    return any(ATTRIBUTE in vars(module) for module in model.modules())


def _known(model, tensors):
    """`kept`, and for each of its tensors the shape that it had in the original."""
    own = scattering.buffers(model)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in own}
    if not is_packed(model):
        full = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return {name: (None,) * len(shape) for name, shape in full.items()}, full
    plans = {path: vars(module).get(ATTRIBUTE, {}) for path, module in model.named_modules()}
    axes, full = {}, {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in plans[path] and _fits(tensor, *plans[path][leaf]):
            axes[name], full[name] = plans[path][leaf]
    return axes, full


def _fits(tensor, axes, full):
    """Whether a tensor can be what these indices leave of an original of the shape `full`."""
    left = [size if axis is None else len(axis) for size, axis in zip(full, axes, strict=True)]
    return list(tensor.shape) == left


def remember(small, model, tensors, indices):
    """Write into `small` what it has kept of the original: `model`, with these tensors, was packed along `indices`."""
    before, full = _known(model, tensors)
    joined = {}

    def compose(first, second):
        if first is None or second is None:
            return second if first is None else first
        key = id(first), id(second)  # axes that share indices go on sharing them
        if key not in joined:
            joined[key] = first[second]
        return joined[key]

    install(small, {name: tuple(map(compose, axes, indices[name])) for name, axes in before.items()}, full)


def install(model, indices, full):
    """Write into the model's modules what its tensors, by their names, have kept of originals of the shapes `full`."""
    tensors = named_tensors(model)
    plans = {id(tensors[name]): (axes, full[name]) for name, axes in indices.items()}
    setattr(model, ATTRIBUTE, {})  # though nothing may be known: it is not whole
    for module in model.modules():
        own = {leaf: plans[id(tensor)] for leaf, tensor in _own(module) if id(tensor) in plans}
        if own:
            vars(module)[ATTRIBUTE] = own


def fingerprints(model):
    """{name of a module: 8 hexadecimal digits} that tell architectures apart, equal for a network and what is packed
    from it.

    They cover the names of the module's own tensors and the shapes that these had in the original; of PyTorch's own
    modules the class and SETTINGS too. Values and dtypes do not count, nor do the classes of a user, which may be
    renamed. Modules with tensors of which `kept` does not tell are left out.
    """
    tensors = named_tensors(model)
    full = {id(tensors[name]): shape for name, shape in _known(model, tensors)[1].items()}
    found = {}
    for name, module in model.named_modules():
        own = [(leaf, full.get(id(tensor))) for leaf, tensor in _own(module)]
        about = []
        if type(module).__module__.startswith("torch."):
            values = vars(module)
            about = [(key, values[key]) for key in SETTINGS if _is_plain(values.get(key))] + [type(module).__name__]
        if all(shape is not None for _, shape in own) and (own or (about and not module._modules)):
            found[name] = hashlib.sha256(repr((own, about)).encode()).hexdigest()[:8]
    return found


def _own(module):
    """The module's own parameters and buffers, by their names."""
    return [(n, t) for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]


def _is_plain(value):
    """Whether it is a number, a text, or a tuple or list of such, whose repr is the same everywhere."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return type(value) in (bool, int, float, str)
