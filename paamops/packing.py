"""pack and mask: the smaller dense network, and the full-size twin that it must equal."""

import collections
import contextlib
import copy
import functools
import types

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from paamops import hollow, optimizers, plan, scattering, tracing
from paamops.labels import components, ends
from paamops.ops.pack_channels import pack_channels
from paamops.wrapping import unwrapped


class PackingError(ValueError):
    """The packed network would not compute what the masked one does; nothing was changed."""


@torch.inference_mode(False)
def mask(model, channels, keep):
    """A full-size copy of the model in which every read of a removed channel is zero. This defines what removal means.

    In every convolution and linear layer the weight's input slices of the removed channels are set to zero; whatever a
    removed filter still computes is read by nobody. Where a residual sum adds a branch by index, what a removed filter
    of the branch adds is zero.

    Args:
        model: the traced network, or one of the same architecture; it is untouched.
        channels: ChannelMap of the network.
        keep: a Selection, or (S,) bool.

    Returns:
        nn.Module
    """
    keep, model = channels.check(keep), unwrapped(model)
    with scattering.installed(model, channels.hosts):
        _check_model(model, channels)
        twin = _copy(model, {})
    tensors = tracing.named_tensors(twin)
    with torch.no_grad():
        for name, axes in channels.read_axes.items():
            for axis in axes:
                removed = (~_kept(channels.axes[name][axis], keep)).nonzero().flatten()
                tensors[name].index_fill_(axis, removed.to(tensors[name].device), 0)
    ids = {name: channels.axes[name][0] for name in channels.scatters}
    scattering.silence(twin, {name: _kept(each, keep) for name, each in ids.items() if each is not None})
    scattering.remove_idle(twin)
    return twin


@torch.inference_mode(False)
def pack(model, channels, keep, optimizer=None):
    """The smaller dense network that `keep` leaves: `pack(m, c, k)(x)` equals `mask(m, c, k)(x)` in eval mode.

    Every parameter and buffer is gathered along the axes that carry removed channels, all in one pass; the modules'
    size attributes (`in_channels`, `out_channels`, `groups`, `num_features`, …) follow. Before it is returned, the
    packed network runs once on the meta device, and the labels that flow through it are held against the trace: every
    channel must meet the same channels as before, and parameters and FLOPs must be what `channels.cost(keep)` says.
    A network that passes computes what its masked twin does.

    An `optimizer` goes on with the packed network, as the same object: its groups hold the new parameters in the order
    of the old ones, with their options, its states (momentum, averages) are gathered along the same indices, so every
    parameter that stays takes the step that it would have taken. A state is cut where each of its sizes is the
    parameter's or 1 (Adafactor's factored averages keep what was removed in their means); numbers, steps and
    parameters that are not the model's stay as they are. Learning-rate schedulers and hooks stay attached. It no longer
    trains `model`.

    Args:
        model: the traced network, or one of the same architecture (a copy that averages its weights, say); it is
            untouched. DistributedDataParallel, DataParallel and torch.compile's wrapper are looked through: the packed
            network comes without them. An AveragedModel of the traced network comes back as one, with its count.
        channels: ChannelMap of the network.
        keep: a Selection, or (S,) bool.
        optimizer: a torch.optim.Optimizer that trains `model`, or a list of them.

    Returns:
        nn.Module, a copy that shares no memory with `model`: same dtype, device, memory format, `requires_grad`,
        train or eval mode, hooks (of parameters too) and attributes; trainable, no masks left, no gradients yet.
        `kept` tells which indices it has kept.

    Raises:
        PackingError (a ValueError): the forward pass has sizes written into it that do not hold any more. The message
            says which op, which layer feeds it and what to pin.
        ValueError: `keep` removes a pinned set or empties a layer; `model` is not of the traced architecture;
            `optimizer` trains none of its parameters, or has a state that cannot be cut: the message names it.
        TypeError: `model` is not a module, or TorchScript; `optimizer` is none.

    Whatever is raised, model and optimizer are as they were.
    """
    keep, model = channels.check(keep), unwrapped(model)
    traced = channels.components.keys() - scattering.names(channels.hosts)
    if isinstance(model, AveragedModel) and tracing.named_tensors(model).keys() != traced:
        small = copy.deepcopy(model, {id(model.module): nn.Identity()})
        small.module = pack(model.module, channels, keep, optimizer)
        return small
    with scattering.installed(model, channels.hosts):
        return _pack(model, channels, keep, optimizer)


def _pack(model, channels, keep, optimizer):
    _check_model(model, channels)
    tensors = tracing.named_tensors(model)
    indices = kept_indices(channels, keep)
    trainers = optimizers.check(optimizer, tensors, indices)
    packed = pack_channels([tensor.detach() for tensor in tensors.values()], [indices[name] for name in tensors])
    small = _rebuilt(model, tensors, packed)
    for module in small.modules():
        fit_sizes(module)
    scattering.renumber(small, indices)
    with _fitting_bare_norms(small):
        verify(model, small, channels, keep, indices)
    plan.remember(small, model, tensors, indices)
    trainers = optimizers.cut(trainers, tensors, tracing.named_tensors(small), indices)
    scattering.remove_idle(small)
    optimizers.install(trainers)
    return small


def _rebuilt(model, tensors, packed):
    """A deep copy with the packed values in the places of the old tensors, which are never copied."""
    plans = [vars(module)[plan.ATTRIBUTE] for module in model.modules() if plan.ATTRIBUTE in vars(module)]
    memo, new = {id(each): {} for each in plans}, []  # it gets plans of its own
    for tensor, values in zip(tensors.values(), packed, strict=True):
        if isinstance(tensor, nn.Parameter):
            values = torch.Tensor._make_subclass(type(tensor), values, tensor.requires_grad)
        memo[id(tensor)] = values
        new.append(values)
    small = _copy(model, memo)
    for tensor, values in zip(tensors.values(), new, strict=True):
        if vars(tensor):
            vars(values).update(copy.deepcopy(vars(tensor), memo))
        _copy_hooks(tensor, values, memo)
    return small


def _copy_hooks(tensor, values, memo):
    """The hooks on a tensor's gradient. A method of something that was copied along becomes one of the copy."""
    for hooks, register in (
        (tensor._backward_hooks, values.register_hook),
        (tensor._post_accumulate_grad_hooks, values.register_post_accumulate_grad_hook),
    ):
        for hook in (hooks or {}).values():
            owner = getattr(hook, "__self__", None)
            if isinstance(hook, types.MethodType) and id(owner) in memo:
                hook = types.MethodType(hook.__func__, memo[id(owner)])
            with tracing.requiring_grad([values]):  # nothing can be hooked to one that is frozen by now
                register(memo.get(id(hook), hook))


def kept_indices(channels, keep):
    """Name -> for every axis the kept indices, int64, or None for the whole axis. Equal axes share one tensor."""
    shared, result = {}, {}
    for name, axes in channels.axes.items():
        result[name] = []
        for ids in axes:
            if ids is None:
                result[name].append(None)
                continue
            key = id(ids)
            if key not in shared:
                shared[key] = _kept(ids, keep).nonzero().flatten()
            result[name].append(shared[key] if len(shared[key]) < len(ids) else None)
    return result


def _kept(ids, keep):
    """bool for every index of an axis; an index that no set covers stays."""
    return torch.cat([keep, keep.new_ones(1)])[torch.from_numpy(ids)]


def fit_sizes(module):
    """Set the sizes that a module holds in attributes to those of its parameters."""
    if isinstance(module, nn.RNNBase):
        module.input_size, module.hidden_size = module.weight_ih_l0.shape[1], module.weight_hh_l0.shape[1]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        weight = getattr(module, "running_mean", None)
        if not isinstance(weight, torch.Tensor):
            return
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = weight.shape[:2]
        if module.transposed:
            if 1 < module.groups == module.in_channels:
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


@contextlib.contextmanager
def _fitting_bare_norms(model):
    """A norm without a tensor holds a number of channels too: while the model runs, it becomes that of its input."""

    found = {}

    def fit(module, args):
        x = args[0]
        if isinstance(module, nn.GroupNorm):
            own = module.num_groups == module.num_channels
            found[module] = {"num_groups": x.size(1), "num_channels": x.size(1)} if own else {}
        else:
            found[module] = {"num_features": x.size(x.dim() - module._get_no_batch_dim())}
        vars(module).update(found[module])

    kinds = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    bare = [norm for norm in norms if not [*norm.parameters(recurse=False), *norm.buffers(recurse=False)]]
    hooks = [norm.register_forward_pre_hook(fit) for norm in bare]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, sizes in found.items():  # a run without values may have put the modules' attributes back
            vars(module).update(sizes)


def verify(original, small, channels, keep, indices):
    """Run the packed model on labels that name the traced channels, and hold what meets against the trace."""
    try:
        tracer = _meta_run(small, channels, indices)
    except tracing.ForwardError:
        # Some models cannot run without values (`.item()`, constants on a device): run this one for real.
        try:
            tracer = _real_run(small, channels, indices)
        except tracing.ForwardError as error:
            layers = _feeding(channels, error.labels)
            raise PackingError(
                f"the packed network does not run, in {error.op}: {error}. The forward pass has a size written into it"
                + _advice(layers)
            ) from error
    if [cut[0] for cut in channels.cuts] != [cut[0] for cut in tracer.cuts]:
        with contextlib.suppress(tracing.ForwardError):  # another path on the meta device: hold the real one against it
            tracer = _real_run(small, channels, indices)
    faults = violations(tracer, channels)
    if faults:
        # On the meta device an op may take another path than the traced one: what shows with all channels too is that.
        whole = {name: [None] * len(axes) for name, axes in channels.axes.items()}
        with contextlib.suppress(tracing.ForwardError):
            faults -= violations(_meta_run(original, channels, whole), channels)
    for found, what in sorted(faults):
        layers = dict.fromkeys(name for component in found for name in channels.layer_of_component(component))
        raise PackingError(
            f"the packed network does not compute what the masked one does: {what}. The forward pass has positions"
            f" written into it{_advice(layers)}"
        )
    if [cut[0] for cut in channels.cuts] == [cut[0] for cut in tracer.cuts]:
        for (op, sizes, fixed, found), (_, now, *_) in zip(channels.cuts, tracer.cuts, strict=True):
            if any(sizes[d] != now[d] for d in fixed):
                raise PackingError(
                    f"the packed network does not compute what the masked one does: {op} cuts its channels into"
                    f" {now}, not into {sizes}: a part of them follows their number that the trace takes to stay"
                    + _advice(_feeding(channels, found.tolist()))
                )
    before, after = channels.scalars, tracer.scalars
    if [op for op, _ in before] == [op for op, _ in after] and before != after:
        op, number, now = next((a[0], a[1], b[1]) for a, b in zip(before, after, strict=True) if a != b)
        raise PackingError(
            f"in the packed network {op} is given {now}, not {number}: it follows the number of channels"
        )
    cost, tensors = channels.cost(keep), tracing.named_tensors(small)
    params = sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter))
    flops = 2 * sum(call["positions"] * tensors[call["weight"]].numel() for call in tracer.calls)
    flops = (flops + channels.other_flops) // channels.batch
    if (params, flops) != (cost.params, cost.flops) and len(tracer.calls) == channels.calls:
        raise PackingError(
            f"the packed network has {params} parameters and {flops} FLOPs, but the trace says {cost.params} and"
            f" {cost.flops}: its forward pass takes another path than the traced one did"
        )


def violations(tracer, channels):
    """What a run shows that the trace does not: {(components, what)}; empty for a network that computes the same."""
    # Where one channel is left, it looks like one that is broadcast: what met there is taken to be right.
    same = components(tracer.weak, channels.label_count) if tracer.weak else np.arange(channels.label_count)
    faults = set()
    a, b = ends(tracer.edges)
    wrong = (same[a] != same[b]).nonzero()[0]
    if len(wrong):
        ops = [op for labels, _, op in tracer.edges for _ in range(len(labels))]
        faults = {
            ((int(a[k]), int(b[k])), f"{ops[k]} brings together what the trace keeps apart") for k in wrong.tolist()
        }
    for pinned, reason in tracer.pins:
        wrong = channels.removable(pinned).nonzero()[0]
        faults |= {((int(pinned[k]),), f"channels that may go should stay, since {reason}") for k in wrong.tolist()}
    return faults


def _feeding(channels, found):
    """The layers whose filters are free to go among these components; where none is, of those that feed them."""
    found = np.array([component for component in found if component >= 0], np.int64)
    seen = found[:0]
    while len(found):
        free = found[channels.removable(found)]
        mine = free if len(free) else found
        layers = [each for each in channels.layers if np.isin(channels.components[each.weight][each.axis], mine).any()]
        if len(free):
            return dict.fromkeys(layer.name for layer in layers)
        seen = np.union1d(seen, found)
        read = [channels.components[each.weight][axis] for each in layers for axis in channels.read_axes[each.weight]]
        found = np.setdiff1d(np.concatenate(read), seen) if read else found[:0]
    return {}


def _advice(layers):
    names = ", ".join(repr(name) for name in layers)
    return f": it is fed by {names}; pin what feeds it, as in trace(model, inputs, pinned=({names},))" if names else ""


def _meta_run(model, channels, indices):
    tensors = tracing.named_tensors(model)
    meta = hollow.emptied(tensors)
    with hollow.calling(model, tensors, meta, channels.example_inputs) as (call, inputs):
        return _run(call, model, meta, channels, indices, inputs)


def _real_run(model, channels, indices):
    with tracing.requiring_grad(tracing.named_tensors(model).values()):
        return _run(model, model, tracing.named_tensors(model), channels, indices, channels.example_inputs)


def _run(call, model, tensors, channels, indices, inputs):
    """Follow the components that the trace gave each axis, at the kept indices, through a forward pass."""
    vectors = {}
    for name, axes in channels.components.items():
        whole = [torch.from_numpy(component) for component in axes]
        vectors[name] = [v if index is None else v[index] for v, index in zip(whole, indices[name], strict=True)]
    tracer = tracing.Tracer(tensors, vectors, channels.depthwise)
    with tracing.evaluating(model), tracing.unfused_attention(model, tracer):
        tracing.follow(tracer, call, inputs)
    return tracer


def _copy(model, memo):
    """A deep copy; a result that a module has kept, with its graph, is copied as a value."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return _deep_copy(model, memo)


PLAIN = (int, float, bool, str, type(None))


def _deep_copy(module, memo):
    """copy.deepcopy(module, memo), which spends most of its time on the constants and empty dicts of modules."""
    if id(module) in memo or not _is_plain(type(module)):
        return copy.deepcopy(module, memo)
    new = memo[id(module)] = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if name == "_compiled_call_impl":  # of torch.compile: it is made again when it is wanted
            continue
        if type(value) in PLAIN or (type(value) is tuple and all(type(each) in PLAIN for each in value)):
            vars(new)[name] = value
        elif type(value) in (dict, collections.OrderedDict) and not value:
            vars(new)[name] = memo.setdefault(id(value), type(value)())
        elif name == "_modules":
            vars(new)[name] = type(value)(
                (key, child if child is None else _deep_copy(child, memo)) for key, child in value.items()
            )
        else:
            vars(new)[name] = copy.deepcopy(value, memo)
    return new


@functools.cache
def _is_plain(kind):
    """Whether copy.deepcopy copies a module of this class attribute by attribute, as it does PyTorch's own."""
    reading = getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
    writing = kind.__setstate__.__module__.startswith("torch.nn.modules.")  # they add attributes of later versions
    reducing = (kind.__reduce_ex__, kind.__reduce__) == (object.__reduce_ex__, object.__reduce__)
    slots = any("__slots__" in vars(each) for each in kind.__mro__[:-1])
    return reading and writing and reducing and not slots and not hasattr(kind, "__deepcopy__")


def _check_model(model, channels):
    tensors = tracing.named_tensors(model)
    expected = {name: tuple(len(component) for component in axes) for name, axes in channels.components.items()}
    for name in expected.keys() | tensors.keys():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != expected.get(name, "missing"):
            raise ValueError(
                f"model is not the traced network: its {name!r} is {found}, in the trace it is"
                f" {expected.get(name, 'missing')}"
            )
