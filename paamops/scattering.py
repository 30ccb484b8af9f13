"""residual="scatter": a branch keeps channels of its own and is added into its stream by index.

What a trace does by default at a residual sum, y = x + f(x), is to unite the channels of both operands: channel c of
the branch f goes when channel c of the stream x does, and with it from every block of the stream. Here the branch is
packed to k of C channels, whichever, and the sum adds each to its place in the stream. Removing a filter of the branch
then means that its contribution to the sum is zero; `mask` writes that zero, since a norm's shift would be left.

How, without editing the model's code: the module that returns the branch (its norm, or its convolution; a dropout or a
squeeze-and-excitation where these come last) is the *host*. It gets a submodule `scatter` with two int64 buffers, and a
forward hook that returns its output with the channels at their places and zeros elsewhere. All that reads the host sees
a tensor of the stream's width, so whatever follows (a drop path, a product in the block's own code, autocast, a
compiler) needs to know nothing. That is one pass more than adding in place would take, over the sum's size; a compiler
fuses it away (see `Scatter.forward`). A tensor that waits for its sum could spare it in eager mode too, but every op
that meets such a tensor must be one that knows it.

In the trace the op reads the branch's labels and issues those of the stream's side: the buffer `index` lies along the
one, `source` along the other, so packing gathers them like all other tensors, and then renumbers their values. A traced
model has no hosts of its own yet: they are put in place while it is traced and packed, and taken out again.
"""

import contextlib
import functools

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from paamops import labels as lb
from paamops import tracing
from paamops.ops.scatter_channels import inverse, plain, renumbered, scatter_channels_op

NAME = "scatter"  # of the submodule of a host
# What may follow a host before the sum: a channel that it leaves at zero adds zero.
ZERO_STAYS = {
    "relu", "hardtanh", "hardswish", "silu", "gelu", "leaky_relu", "elu", "tanh", "mul", "div", "neg",
    "native_dropout", "detach", "alias", "clone", "_to_copy", "contiguous", "constant_pad_nd",
}  # fmt: skip


class Scatter(nn.Module):
    """y[n, index[j], …] = x[n, j, …], and zero elsewhere: k channels of a branch at their places among C.

    x (N, k, *spatial) → y (N, C, *spatial).

    Args:
        index: (k,) int64, the place of each channel of x, or -1 for none. source: (C,) int64, its inverse.
    """

    def __init__(self, index, source):
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("source", source)

    def forward(self, x):
        # A compiler fuses the plain form with the sum. Its backward would be a sum by index, so the op where it trains.
        if torch.compiler.is_compiling():
            fused = torch.compiler.is_exporting() or not (torch.is_grad_enabled() and x.requires_grad)
        else:
            fused = torch.jit.is_tracing()
        return plain(x, self.source) if fused else scatter_channels_op(x, self.index, self.source)

    def extra_repr(self):
        return f"{len(self.index)} of {len(self.source)} channels"

    def is_idle(self):
        """Whether every channel stays where it is."""
        return len(self.index) == len(self.source) and bool((self.index.cpu() == torch.arange(len(self.index))).all())


def _scatter_output(module, args, output):
    return module.scatter(output)


def scatters(model):
    """{path of the host: Scatter} of a model, in the order of its modules."""
    found = {path.rpartition("."): module for path, module in model.named_modules() if isinstance(module, Scatter)}
    return {host: module for (host, _, name), module in found.items() if host and name == NAME}


def install(model, hosts):
    """Put scatters that change nothing at `hosts`, {path: (k, C)}.

    ValueError: the model has no module there, or one that has something named "scatter". The model is then as it was.
    """
    modules = dict(model.named_modules())
    for path in hosts:
        if path not in modules or hasattr(modules[path], NAME):
            what = "has a scatter already" if path in modules else "is not there"
            raise ValueError(f"model is not the traced network: its {path!r}, which ends a residual branch, {what}")
    for path, (kept, width) in hosts.items():
        host = modules[path]
        tensor = next((t for each in (host, model) for t in (*each.parameters(), *each.buffers())), None)
        device = None if tensor is None else tensor.device
        index, source = (torch.arange(size, device=device) for size in (kept, width))
        host.scatter = Scatter(index, source).train(host.training)
        host.register_forward_hook(_scatter_output)


def remove(model, paths):
    """Take these scatters out again."""
    for path in paths:
        host = model.get_submodule(path)
        del host.scatter
        for key in [key for key, hook in host._forward_hooks.items() if hook is _scatter_output]:
            del host._forward_hooks[key]


@contextlib.contextmanager
def installed(model, hosts):
    """Within it the model has scatters at `hosts`, {path: C}; afterwards it is as it was."""
    install(model, {path: (width, width) for path, width in hosts.items()}) if hosts else None
    try:
        yield
    finally:
        remove(model, hosts)


def renumber(small, indices):
    """The buffers of the scatters of a packed network, gathered as `indices` says, speak of its own channels again."""
    for path, scatter in scatters(small).items():
        kept = indices[f"{path}.{NAME}.index"][0]
        source = renumbered(scatter.source.cpu(), kept)
        scatter.source.copy_(source)
        scatter.index.copy_(inverse(source, len(scatter.index)))


def silence(twin, kept):
    """The scatters of a full-size twin put no channel that is not `kept`, {name of an index: bool}, anywhere."""
    for path, scatter in scatters(twin).items():
        if f"{path}.{NAME}.index" in kept:
            scatter.index[~kept[f"{path}.{NAME}.index"].to(scatter.index.device)] = -1
            scatter.source.copy_(inverse(scatter.index, len(scatter.source)))


def remove_idle(model):
    """Take out the scatters that change nothing."""
    remove(model, [path for path, scatter in scatters(model).items() if scatter.is_idle()])


def buffers(model):
    """The names of the buffers of the scatters of a model, which the network that it was made from does not have."""
    return names(scatters(model))


def names(hosts):
    """The names of the buffers that scatters at these paths have."""
    return {f"{path}.{NAME}.{each}" for path in hosts for each in ("index", "source")}


def sizes(model):
    """{path: [k, C]} of the scatters of a model, for a file."""
    return {path: [len(scatter.index), len(scatter.source)] for path, scatter in scatters(model).items()}


def install_saved(path, model, hosts, tensors):
    """Put the scatters of the file `path` into a network that was built anew; `hosts` and `tensors` are what it holds.

    ValueError: the file does not say where they are, how long, or which channel goes where, as `save` would write it.
    """
    if not isinstance(hosts, dict):
        raise ValueError(f"{path}: its header's scatters is {hosts!r}, which paamops.save never writes")
    modules = dict(model.named_modules())
    for host, lengths in hosts.items():
        names = [f"{host}.{NAME}.{each}" for each in ("index", "source")]
        index, source = (tensors.get(name, torch.empty(0)) for name in names)
        if not host or host not in modules or hasattr(modules[host], NAME):
            raise ValueError(f"{path}: adds the branch {host!r} by index, which the network cannot; it is not its file")
        if lengths != [len(index), len(source)] or any(t.dtype != torch.int64 or t.dim() != 1 for t in (index, source)):
            raise ValueError(f"{path}: the index of {host} is {lengths}, which paamops.save never writes")
        if not (_is_inverse(index, source) and _is_inverse(source, index)):
            raise ValueError(f"{path}: {names[0]} and {names[1]} are not each other's inverse")
    install(model, {host: tuple(lengths) for host, lengths in hosts.items()})


def _is_inverse(index, source):
    in_range = not len(index) or (index.min() >= -1 and index.max() < len(source))
    return bool(in_range) and torch.equal(inverse(index, len(source)), source)


def trace(model, example_inputs, pinned):
    """The ChannelMap of a model whose residual branches are scattered, where that frees channels."""
    finder = _find(model, example_inputs, pinned)
    hosts = finder.hosts(model)
    while True:
        with installed(model, hosts):
            channels = tracing.channel_map(model, example_inputs, pinned)
        idle = _idle(channels, hosts)
        if not idle:
            channels.hosts = hosts
            return channels
        hosts = {path: width for path, width in hosts.items() if path not in idle}


def _find(model, example_inputs, pinned):
    finder, hooks = None, []

    def make(*args, **settings):
        nonlocal finder
        finder = _Sums(*args, **settings)
        for path, module in model.named_modules():
            if path:
                hooks.append(module.register_forward_hook(functools.partial(finder.returned, path)))
        return finder

    try:
        tracing.traced(model, example_inputs, pinned, make)
    finally:
        for hook in hooks:
            hook.remove()
    return finder


def _idle(channels, hosts):
    """The hosts that had better not be: both sides are one anyway; or no layer is left that writes into the stream."""
    idle, streams = [], set()
    for path in hosts:
        (branch,), (stream,) = (channels.components[f"{path}.{NAME}.{side}"] for side in ("index", "source"))
        if (branch == stream).all():
            idle.append(path)
        elif not channels.issued(stream).any() and not streams & set(stream.tolist()):
            streams |= set(stream.tolist())  # the first of these branches will write into it, and the others are added
            idle.append(path)
    return idle


class _Seen:
    """What is known of one tensor: the module that returned it, how often it is read, what it was made from."""

    def __init__(self, depth=0, source=None):
        self.host, self.reads, self.depth, self.source = None, 0, depth, source


class _Sums(tracing.Tracer):
    """A tracer that also finds the residual sums, and the modules that return their branches."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.seen, self.sums, self.times = WeakTensorKeyDictionary(), [], {}

    def look(self, tensor):
        if tensor not in self.seen:
            self.seen[tensor] = _Seen()
        return self.seen[tensor]

    def returned(self, path, module, args, output):
        self.times[path] = self.times.get(path, 0) + 1
        if isinstance(output, torch.Tensor) and self.look(output).host is None:  # the innermost comes first
            self.look(output).host = path

    def close(self, tensor):
        self.look(tensor).reads += 1  # the outputs of the model too
        super().close(tensor)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in tracing.IN_ATEN:
            return super().__torch_dispatch__(op, types, args, kwargs)
        tensors, calls = self.tensors(args, kwargs or {}), len(self.calls)
        seen = [self.look(tensor) for tensor in tensors]
        for each in seen:
            each.reads += 1
        if _is_sum(op, args, kwargs or {}):
            self.sums.append([(self.look(t), self.is_branch(t), t.size(1)) for t in args[:2] if self.has_channels(t)])
        out = super().__torch_dispatch__(op, types, args, kwargs)
        depth = max((each.depth for each in seen), default=0) + (len(self.calls) > calls)
        follows = op._schema.name.removeprefix("aten::").removesuffix("_") in ZERO_STAYS
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                wide = [s for t, s in zip(tensors, seen, strict=True) if t.shape == each.shape]
                self.seen[each] = _Seen(depth, wide[0] if follows and len(wide) == 1 else None)
        return out

    def has_channels(self, tensor):
        fields = self.labels_of(tensor).fields
        return len(fields) == 1 and lb.varying(fields[0]) == (1,)

    def is_branch(self, tensor):
        """No layer has read it yet: it carries what some layer has just computed."""
        return any(call not in self.closed for call, _ in self.labels_of(tensor).pending)

    def hosts(self, model):
        """{path: C} of the modules that return branches, in the order of their sums."""
        modules, found = dict(model.named_modules()), {}
        for operands in self.sums:
            if len(operands) != 2:
                continue
            ends = []
            for seen, is_branch, width in operands:
                end = self._end(seen) if is_branch and seen.reads == 1 else None
                if end is not None and self.times[end.host] == 1 and not hasattr(modules[end.host], NAME):
                    ends.append((seen.depth, end.host, width))
            if ends:
                _, host, width = max(ends, key=lambda end: end[0])  # a shortcut has fewer layers than the branch
                found.setdefault(host, width)
        return found

    def _end(self, seen):
        """The last that a module returned before the sum; what was done to it since was read by nothing else."""
        while seen.host is None:
            if seen.source is None or seen.reads > 1:
                return None
            seen = seen.source
        return seen


def _is_sum(op, args, kwargs):
    if op not in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) or kwargs.get("alpha", 1) != 1:
        return False
    return all(isinstance(t, torch.Tensor) for t in args[:2]) and args[0].shape == args[1].shape
