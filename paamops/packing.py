"""pack and mask: the smaller dense network, and the full-size twin that it must equal."""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_map

from paamops import tracing
from paamops.labels import components
from paamops.ops.pack_channels import pack_channels


class PackingError(ValueError):
    """The packed network would not compute what the masked one does; nothing was changed."""


def mask(model, channels, keep):
    """A full-size copy of the model in which every read of a removed channel is zero. This defines what removal means.

    In every convolution and linear layer the weight's input slices of the removed channels are set to zero; whatever a
    removed filter still computes is read by nobody.

    Args:
        model: the traced network, or one of the same architecture; it is untouched.
        channels: ChannelMap of the network.
        keep: a Selection, or (S,) bool.

    Returns:
        nn.Module
    """
    keep = channels.check(keep)
    _check_model(model, channels)
    twin = copy.deepcopy(model)
    tensors = tracing.named_tensors(twin)
    with torch.no_grad():
        for name, axes in channels.read_axes.items():
            for axis in axes:
                removed = (~_kept(channels.axes[name][axis], keep)).nonzero().flatten()
                tensors[name].index_fill_(axis, removed.to(tensors[name].device), 0)
    return twin


def pack(model, channels, keep):
    """The smaller dense network that `keep` leaves: `pack(m, c, k)(x)` equals `mask(m, c, k)(x)` in eval mode.

    Every parameter and buffer is gathered along the axes that carry removed channels, all in one pass; the modules'
    size attributes (`in_channels`, `out_channels`, `groups`, `num_features`, …) follow. Before it is returned, the
    packed network runs once on the meta device, and the labels that flow through it are held against the trace: every
    channel must meet the same channels as before, and parameters and FLOPs must be what `channels.cost(keep)` says.
    A network that passes computes what its masked twin does.

    Args:
        model: the traced network, or one of the same architecture; it is untouched.
        channels: ChannelMap of the network.
        keep: a Selection, or (S,) bool.

    Returns:
        nn.Module, a copy that shares no memory with `model`: same dtype, device, memory format, `requires_grad`,
        train or eval mode and hooks; trainable, no masks left.

    Raises:
        PackingError (a ValueError): the forward pass has sizes written into it that do not hold any more. The message
            says which op, which layer feeds it and what to pin.
        ValueError: `keep` removes a pinned set or empties a layer; `model` is not of the traced architecture.
    """
    keep = channels.check(keep)
    _check_model(model, channels)
    tensors = tracing.named_tensors(model)
    indices = kept_indices(channels, keep)
    packed = pack_channels([tensor.detach() for tensor in tensors.values()], [indices[name] for name in tensors])
    # Deep copy, with the packed tensors in the places of the old ones, which are never copied.
    memo = {}
    for tensor, small in zip(tensors.values(), packed, strict=True):
        if isinstance(tensor, nn.Parameter):
            small = nn.Parameter(small, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = small
    small_model = copy.deepcopy(model, memo)
    for module in small_model.modules():
        fit_sizes(module)
    verify(small_model, channels, keep, indices)
    return small_model


def kept_indices(channels, keep):
    """Name -> for every axis the kept indices, int64, or None for the whole axis. Equal axes share one tensor."""
    shared, result = {}, {}
    for name, axes in channels.axes.items():
        result[name] = []
        for ids in axes:
            if ids is None:
                result[name].append(None)
                continue
            key = ids.tobytes()
            if key not in shared:
                shared[key] = _kept(ids, keep).nonzero().flatten()
            result[name].append(shared[key] if len(shared[key]) < len(ids) else None)
    return result


def _kept(ids, keep):
    """bool for every index of an axis; an index that no set covers stays."""
    return torch.cat([keep, keep.new_ones(1)])[torch.from_numpy(ids)]


def fit_sizes(module):
    """Set the sizes that a module holds in attributes to those of its parameters."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        weight = getattr(module, "running_mean", None)
        if not isinstance(weight, torch.Tensor):
            return
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = weight.shape[:2]
        if module.transposed:
            if 1 < module.groups == module.in_channels == module.out_channels:
                module.groups = first
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            if 1 < module.groups == module.in_channels:  # depthwise: a group for every channel that is left
                module.groups = first // (module.out_channels // module.in_channels)
            module.in_channels, module.out_channels = second * module.groups, first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
        module.num_groups = module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def verify(model, channels, keep, indices):
    """Run the packed model on labels that name the traced channels, and hold what meets against the trace."""
    tensors = tracing.named_tensors(model)
    vectors = {}
    for name, axes in channels.components.items():
        vectors[name] = []
        for component, index in zip(axes, indices[name], strict=True):
            component = torch.from_numpy(component)
            vectors[name].append(component if index is None else component[index])
    try:
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        inputs = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, channels.example_inputs)
        tracer = _run(
            channels, lambda *a, **k: torch.func.functional_call(model, meta, a, k), model, meta, vectors, inputs
        )
    except tracing.ForwardError:
        # Some models cannot run without values (`.item()`, constants on a device): run this one for real.
        try:
            tracer = _run(channels, model, model, tensors, vectors, channels.example_inputs)
        except tracing.ForwardError as error:
            layers = dict.fromkeys(name for label in error.labels for name in channels.layer_of_component(label))
            names = ", ".join(repr(name) for name in layers)
            advice = f": it is fed by {names}; pin what feeds it, as in trace(model, inputs, pinned=({names},))"
            raise PackingError(
                f"the packed network does not run, in {error.op}: {error}. The forward pass has a size written into it"
                + (advice if names else "")
            ) from error
    # Where one channel is left, it looks like one that is broadcast: what met there is taken to be right.
    same = components(tracer.weak, max(int(c.max()) for axes in channels.components.values() for c in axes) + 1)
    for a, b, op in tracer.edges:
        wrong = (same[a] != same[b]).nonzero()[0]
        if len(wrong):
            _refuse(channels, (int(a[wrong[0]]), int(b[wrong[0]])), f"{op} brings together what the trace keeps apart")
    for pinned, reason in tracer.pins:
        wrong = channels.removable(pinned).nonzero()[0]
        if len(wrong):
            _refuse(channels, (int(pinned[wrong[0]]),), reason)
    cost = channels.cost(keep)
    params = sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter))
    flops = 2 * sum(call["positions"] * tensors[call["weight"]].numel() for call in tracer.calls) // channels.batch
    if (params, flops) != (cost.params, cost.flops):
        raise PackingError(
            f"the packed network has {params} parameters and {flops} FLOPs, but the trace says {cost.params} and"
            f" {cost.flops}: its forward pass takes another path than the traced one did"
        )


def _run(channels, call, model, tensors, vectors, inputs):
    tracer = tracing.Tracer(tensors, vectors, channels.depthwise)
    with tracing.evaluating(model):
        tracing.follow(tracer, call, inputs)
    return tracer


def _refuse(channels, components, reason):
    names = dict.fromkeys(name for component in components for name in channels.layer_of_component(component))
    names = ", ".join(repr(name) for name in names)
    raise PackingError(
        f"the packed network does not compute what the masked one does: at channels of {names}, {reason}. The forward"
        f" pass has positions written into it; pin those layers, as in trace(model, inputs, pinned=({names},))"
    )


def _check_model(model, channels):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    tensors = tracing.named_tensors(model)
    expected = {name: tuple(len(component) for component in axes) for name, axes in channels.components.items()}
    for name in expected.keys() | tensors.keys():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != expected.get(name, "missing"):
            raise ValueError(
                f"model is not the traced network: its {name!r} is {found}, in the trace it is"
                f" {expected.get(name, 'missing')}"
            )
