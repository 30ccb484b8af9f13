"""Runs of a network without its arithmetic: on the meta device, where a tensor is a shape.

The meta kernels of many usual ops are Python and take a millisecond each; `RESULTS` says what those return, at the cost
of an allocation of nothing. `SAME_PATH` are the ops that a network runs on the meta device exactly as it does on the
CPU: one that stays among them can be traced without values. Others (attention, recurrent layers, what reads values)
choose their kernels by device, and run for real.
"""

import contextlib
import copy
import functools

import torch
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

SAME_PATH = {
    # layers and norms
    "convolution", "addmm", "mm", "native_batch_norm", "_native_batch_norm_legit_no_training", "native_group_norm",
    "native_layer_norm",
    # pointwise
    "relu", "relu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "silu", "silu_",
    "gelu", "leaky_relu", "leaky_relu_", "elu", "elu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "_prelu_kernel",
    "softplus", "exp", "abs", "neg", "sqrt", "rsqrt", "pow", "clamp", "clamp_", "clamp_min", "clamp_min_", "add",
    "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum",
    # windows and reductions
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_max_pool2d", "mean", "sum", "amax", "amin", "max", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "reflection_pad2d", "replication_pad2d",
    # movement
    "view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "repeat",
    "pixel_shuffle", "pixel_unshuffle", "slice", "select", "split", "split_with_sizes", "unbind", "cat", "stack",
    "constant_pad_nd", "detach", "alias", "clone",
    # memory for running statistics that are not there
    "empty",
}  # fmt: skip


BY_FORMAT = {
    "convolution", "native_batch_norm", "_native_batch_norm_legit_no_training", "native_group_norm",
    "native_layer_norm", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "reflection_pad2d", "replication_pad2d",
    "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "cat", "stack",
}  # fmt: skip


def empty(shape, x):
    return torch.empty(shape, dtype=x.dtype, device="meta")  # empty_like and new_empty are Python there


def like(x, *rest, **options):
    return empty(x.shape, x) if x.is_contiguous() else torch.empty_like(x)


def like_both(x, y, **options):
    """Of two tensors of one layout and dtype; others promote and broadcast."""
    if isinstance(y, torch.Tensor) and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride()):
        return like(x)
    return None


def batch_norm(x, weight=None, bias=None, mean=None, var=None, training=False, *rest):
    if training or mean is None or mean.shape != x.shape[1:2]:
        return None
    return like(x), empty((0,), x), empty((0,), x)


def batch_norm_without_training(x, weight, bias, mean, var, momentum, eps):
    return batch_norm(x, weight, bias, mean, var)


def convolution(x, weight, bias, stride, padding, dilation, transposed, extra, groups):
    first, second, *kernel = weight.shape
    inputs = first if transposed else second * groups
    if x.dim() != weight.dim() or x.size(1) != inputs or not (x.is_contiguous() and weight.is_contiguous()):
        return None  # an error, or another memory format
    sizes = []
    for d, k in enumerate(kernel):
        s, p, reach = stride[d % len(stride)], padding[d % len(padding)], dilation[d % len(dilation)] * (k - 1)
        if transposed:
            size = (x.size(2 + d) - 1) * s - 2 * p + reach + extra[d % len(extra)] + 1
        else:
            size = (x.size(2 + d) + 2 * p - reach - 1) // s + 1
        sizes.append(size)
    if min(sizes) < 1 or x.dtype != weight.dtype:
        return None
    return empty((x.size(0), second * groups if transposed else first, *sizes), x)


def addmm(bias, x, weight, **options):
    if options or x.dim() != 2 or x.size(1) != weight.size(0) or bias.shape != weight.shape[1:]:
        return None
    return empty((x.size(0), weight.size(1)), x)


def cat(tensors, dim=0):
    first = tensors[0]
    dim %= max(first.dim(), 1)
    shape, size = list(first.shape), 0
    for each in tensors:
        if each.dim() != len(shape) or each.dtype != first.dtype or not each.is_contiguous():
            return None
        if each.shape[:dim] != first.shape[:dim] or each.shape[dim + 1 :] != first.shape[dim + 1 :]:
            return None
        size += each.size(dim)
    return empty((*shape[:dim], size, *shape[dim + 1 :]), first) if shape else None


# Op -> what it returns for tensors on the meta device, or None where its own meta kernel has to say.
RESULTS = {
    aten.convolution.default: convolution,
    aten.native_batch_norm.default: batch_norm,
    aten._native_batch_norm_legit_no_training.default: batch_norm_without_training,
    aten.addmm.default: addmm,
    aten.cat.default: cat,
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), like_both),
    **dict.fromkeys(
        (
            aten.relu.default, aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default,
            aten.silu.default, aten.gelu.default, aten.leaky_relu.default, aten.elu.default, aten.sigmoid.default,
        ),
        like,
    ),
}  # fmt: skip


def result(op, inputs, args, kwargs):
    """What `op` returns: from `RESULTS` where its tensors are on the meta device, else by running it."""
    if op in RESULTS and all(tensor.is_meta for tensor in inputs):
        out = RESULTS[op](*args, **kwargs)
        if out is not None:
            return out
    return op(*args, **kwargs)


def same_on_the_cpu(op, inputs):
    """Whether a run on the meta device that has come to this op is still the one that the CPU would do.

    Layers and windows choose the memory format of their results otherwise there, and what a linear layer runs as
    depends on it: of tensors that are not contiguous they run for real.
    """
    same, by_format = path(op)
    return same and all(tensor.is_meta and (tensor.is_contiguous() or not by_format) for tensor in inputs)


@functools.cache
def path(op):
    """(whether it is one of SAME_PATH, whether of BY_FORMAT)."""
    name = op._schema.name.removeprefix("aten::")
    return name in SAME_PATH, name in BY_FORMAT


def can_stand_for(model, tensors, inputs):
    """Whether a run on the meta device may stand for one of this model with its own tensors: plain ones on the CPU.

    Recurrent layers choose their kernels before any op shows, and hooks may keep what they are given.
    """
    inputs = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    plain = all(t.is_cpu and type(t) in (torch.Tensor, torch.nn.Parameter) for t in (*tensors, *inputs))
    return plain and not any(
        isinstance(module, torch.nn.RNNBase) or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )


def emptied(tensors):
    """Name -> the tensor on the meta device; parameters require gradients, as `tracing.requiring_grad` has them."""
    return {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta").requires_grad_(
            isinstance(t, torch.nn.Parameter) and t.is_floating_point()
        )
        for name, t in tensors.items()
    }


# What every module has for its hooks: no forward pass puts anything there.
HOOKS = {name for name, value in vars(torch.nn.Module()).items() if isinstance(value, (dict, set))} - {
    "_parameters", "_buffers", "_modules",
}  # fmt: skip


@contextlib.contextmanager
def calling(model, tensors, meta, inputs):
    """(model, inputs) without values: the model holds those of `meta` in the place of its `tensors`, both by name.

    Whatever the forward pass keeps in its modules' attributes, or in lists, dicts and sets there, is put back: it holds
    no values.
    """
    inputs = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, inputs)
    spaces = [vars(module) for module in model.modules()]
    before = [dict(space) for space in spaces]
    held = [
        value
        for space in spaces
        for name, value in space.items()
        if isinstance(value, (dict, list, set)) and name not in HOOKS
    ]
    inside = [copy.copy(value) if value else () for value in held]
    instead = {id(tensor): meta[name] for name, tensor in tensors.items()}
    try:
        for space in spaces:
            for place in (space["_parameters"], space["_buffers"]):
                place.update((name, instead[id(tensor)]) for name, tensor in place.items() if tensor is not None)
        yield model, inputs
    finally:
        for space, old in zip(spaces, before, strict=True):
            if space.keys() != old.keys() or any(space[name] is not value for name, value in old.items()):
                space.clear()
                space.update(old)
        for value, old in zip(held, inside, strict=True):
            restore(value, old)


def restore(value, old):
    """The container `value` holds again what its copy `old` does, or nothing."""
    if not old:
        same = not value
    elif isinstance(value, dict):
        same = value.keys() == old.keys() and all(value[key] is each for key, each in old.items())
    elif isinstance(value, list):
        same = len(value) == len(old) and all(a is b for a, b in zip(value, old, strict=True))
    else:
        same = value == old
    if same:
        return
    value.clear()
    if old:
        value.extend(old) if isinstance(value, list) else value.update(old)
