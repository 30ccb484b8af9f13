"""trace: what can be removed from a network, with what, at which cost, read off one real forward pass.

No list of layer types and no second-guessing of the model's code: labels flow through the ATen ops that run
(`rules.py`), parameters meet activations where they are used, and union-find over the labels gives the channel sets.
"""

import contextlib
import weakref

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from paamops import hollow, rules
from paamops import labels as lb
from paamops.channels import ChannelMap, Layer
from paamops.flops import other_flops
from paamops.labels import FIXED, Labels
from paamops.ops.channel_attention import channel_attention_formula, channel_attention_op
from paamops.wrapping import eager, unwrapped

NOTHING = Labels()
# An op of ours that stands for a whole subnetwork is followed, and scored, as the ATen ops of its formula.
IN_ATEN = {channel_attention_op: channel_attention_formula}


class ForwardError(RuntimeError):
    """The model's forward pass failed; `op` is the ATen op that ran last, `labels` what its activations carried."""

    def __init__(self, error, op, labels):
        super().__init__(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        self.op, self.labels = op, labels


class Tracer(TorchDispatchMode):
    """Follows the labels of `tensors` (name -> parameter or buffer) through the ATen ops that run inside the mode.

    `vectors`: name -> for every axis the labels of its indices, int64. What it finds: `edges` (pairs of arrays of
    labels that are one, with the op that said so), `pins` (arrays of labels that stay, with the reason), `layers`
    (weight name -> Layer), `calls` (one for every call of a layer), `scalars` (the numbers that pointwise ops were
    given) and `cuts` (the sizes that views and splits cut tensors into, and which of them must not follow the
    channels). In a dimension of size 1, one channel and one that is broadcast look alike: `weak` and `weak_pins`.
    Where the run is `without_values`, it stops at the first op that needs some: `refused`.
    """

    def __init__(self, tensors, vectors, depthwise=None, without_values=False):
        super().__init__()
        self.without_values, self.refused = without_values, False
        self.made = []  # references to what a run without values has made
        self.vectors = vectors
        self.depthwise = depthwise  # weights of depthwise convolutions where they are known: shapes do not always tell
        self.known = lb.ByTensor()
        for name, tensor in tensors.items():
            self.known[tensor] = lb.OfParameter(name, vectors[name], tensor.shape)
        self.edges, self.weak, self.pins, self.weak_pins = [], [], [], []
        self.has_fixed = False  # whether any label is FIXED
        self.layers, self.calls, self.scalars, self.cuts = {}, [], [], []
        self.used = set()  # names of the parameters that some op took
        self.read_axes = {}  # weight name -> its axes that read channels
        self.scatters = {}  # name of an index that a branch goes into its stream by -> that of its inverse
        self.scales = {}  # names of the scales of norms over each channel apart: a set, in order
        self.closed = set()  # calls whose output something has read
        self.strides = ()  # sizes and strides of a tensor that is about to get others in place
        self.counts = {}  # how often each op ran
        self.other_flops = 0  # of the ops that are no layer
        self.op, self.inputs = None, []  # the op that runs, or ran last, and its tensors

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in IN_ATEN:
            with self:
                return IN_ATEN[op](*args, **kwargs)
        self.op, self.inputs = op, self.tensors(args, kwargs)
        if op is torch.ops.aten.as_strided_.default:
            self.strides = list(zip(args[0].shape, args[0].stride(), strict=True))  # as they were
        if self.without_values and not hollow.same_on_the_cpu(op, self.inputs):
            self.refused = True
            raise RuntimeError(f"{op} may run otherwise on the CPU")
        out = hollow.result(op, self.inputs, args, kwargs)
        outputs = [out] if isinstance(out, torch.Tensor) else self.tensors((out,), {})
        if self.without_values:
            given = set(map(id, self.inputs))  # in place
            self.made += [weakref.ref(t) for t in outputs if id(t) not in given]
        self.counts[op] = self.counts.get(op, 0) + 1
        labelled = [self.known[t] for t in self.inputs if t in self.known]
        self.used.update(each.parameter for each in labelled if each.parameter)
        calls = len(self.calls)
        if labelled:
            rules.find(op)(self, op, args, kwargs, out)
        self.inputs = outputs  # what fails before the next op has run was most likely given these
        if len(self.calls) == calls:
            self.other_flops += other_flops(op, args, kwargs, out)
        return out

    def tensors(self, args, kwargs):
        found = []
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, (tuple, list)):
                found.extend(v for v in value if isinstance(v, torch.Tensor))
        return found

    def labelled(self, args, kwargs):
        return [t for t in self.tensors(args, kwargs) if t in self.known]

    def labels_of(self, tensor):
        return self.known.get(tensor, NOTHING) if isinstance(tensor, torch.Tensor) else NOTHING

    def set(self, tensor, labels):
        if labels.fields or labels.parameter or labels.pending:
            self.known[tensor] = labels
        else:
            self.known.pop(tensor, None)

    def carry(self, out, fields, sources, candidate=False):
        """`out` has these fields; as a `candidate` it is the activation of the filters that nobody has read yet."""
        fields = tuple(fields)
        pending = {}
        for source in sources:
            for call, seen in self.labels_of(source).pending:
                if call not in self.closed:
                    pending.setdefault(call, seen)
        if candidate and pending and out.is_floating_point():
            bearing = [field for field in fields if lb.varying(field)] or list(fields)
            dims = lb.varying(bearing[0]) if len(bearing) == 1 else (0,)
            dim = dims[0] if dims else 1
            if len(dims) <= 1 and 0 < dim < out.dim():
                seen = (self.place(dim), lb.row(bearing[0], dim))
                pending = dict.fromkeys(pending, seen)
        self.set(out, Labels(fields, pending=tuple(pending.items())))

    def place(self, dim):
        """Where the activation of a layer's filters appears: (op, how manieth call of it, channel dimension)."""
        return rules.full_name(self.op), self.counts[self.op] - 1, dim

    def close(self, tensor):
        """A layer reads the tensor, or it leaves the model: what it carries is the activation of its filters."""
        for call, seen in self.labels_of(tensor).pending:
            if call not in self.closed:
                self.closed.add(call)
                self.calls[call]["activations"].append(seen)

    def issue(self, out, dim, name, axes, rows, kind, positions):
        """`out` is the output of the layer with the weight `name`: its channels along `dim` are the layer's filters.

        `axes`: of the weight, (the one that reads or None, the one that issues). `rows`: the labels of the filters.
        """
        reads, issues = axes
        self.read_axes.setdefault(name, set()).update(() if reads is None else (reads,))
        call = len(self.calls)
        seen = (self.place(dim), rows)
        self.calls.append({"weight": name, "axis": issues, "positions": positions, "activations": [seen]})
        if name not in self.layers:
            self.layers[name] = Layer(name.removesuffix(".weight"), name, kind, tuple(out.shape[1:]), rows, issues)
        self.set(out, Labels((lb.on_vector(rows, dim, out.shape),), pending=((call, seen),)))

    def cut(self, op, x, sizes, fixed):
        """`op`, "a view" or "a split", cuts `x` into these sizes; those at the places `fixed` must not change."""
        labels = [lb.core(field).reshape(-1) for field in self.labels_of(x).fields] if fixed else []
        self.cuts.append((op, tuple(sizes), tuple(fixed), torch.cat(labels) if labels else None))

    def along(self, field, dim):
        """The labels along `dim`; those that share an index, since the field changes elsewhere too, are united."""
        if lb.varying(field) == (dim,):
            return lb.row(field, dim)
        rows = lb.core(field, keep=(dim,)).movedim(dim, -1).reshape(-1, field.size(dim))
        if len(rows) > 1:
            self.unite(rows[1:], rows[:1].expand(len(rows) - 1, -1))
        return rows[0]

    def vector(self, tensor, dim):
        """The labels of a tensor's channels along `dim`, or None where it has none there."""
        fields = self.labels_of(tensor).fields
        if len(fields) == 1 and lb.varying(fields[0]) == (dim,):
            return lb.row(fields[0], dim)
        fields = [f for f in fields if lb.varies(f, dim)] or [f for f in fields if not lb.varying(f)]
        vectors = [self.along(field, dim) for field in fields if field.numel()]
        for other in vectors[1:]:
            # Those that do not change here need not be its channels: in a map of one channel, positions look alike.
            self.unite(vectors[0], other, weak=not lb.varies(fields[0], dim))
        return vectors[0] if vectors else None

    def read(self, tensor, dim):
        """As `vector`, by a layer: what it carries has been read. Labels of other axes are pinned."""
        self.close(tensor)
        for field in self.labels_of(tensor).fields:
            if lb.varying(field) and not lb.varies(field, dim):
                self.pin(lb.core(field), f"{self.op} has a place for each of them")
        return self.vector(tensor, dim)

    def unite_with_vector(self, parameter, vector):
        """The one axis of a bias or a norm's parameter belongs to the channels `vector`."""
        known = self.labels_of(parameter)
        if known.parameter is not None and parameter.dim() == 1:
            self.unite(self.vectors[known.parameter][0], vector)
        elif known.fields:
            self.unite(known.fields[0].reshape(-1), vector)
        else:
            self.pin(vector, f"{self.op} meets them with a tensor of a fixed size")

    def unite(self, a, b, weak=False):
        """What stands at the same place of both is one channel; what meets FIXED must stay."""
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        if a.dim() > 1:
            for d in range(a.dim()):
                if a.size(d) > 1 and a.stride(d) == 0 and b.stride(d) == 0:
                    a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
            a, b = a.reshape(-1), b.reshape(-1)
        if self.has_fixed:
            fixed = (a == FIXED) | (b == FIXED)
            if fixed.any():
                self.pin(torch.cat([a[fixed], b[fixed]]), f"{self.op} meets them with constant channels")
                a, b = a[~fixed], b[~fixed]
        (self.weak if weak else self.edges).append((a, b, self.op))

    def pin(self, labels, reason, weak=False):
        labels = labels.reshape(-1)
        (self.weak_pins if weak else self.pins).append((labels[labels != FIXED].numpy(), reason))

    def pin_tensor(self, tensor, reason):
        self.close(tensor)
        for field in self.labels_of(tensor).fields:
            self.pin(lb.core(field), reason)


@torch.inference_mode(False)  # inside inference mode layers do not come as the ATen ops that the rules know
def trace(model, example_inputs, pinned=(), residual="tie"):
    """Find the channel sets of a network: which filters can be removed, with what, and what each costs.

    The model runs once on `example_inputs` in eval mode, without gradients, and is left as it was; where all its ops
    are usual ones of a convolutional network, it runs on the meta device, without arithmetic. Channels stay or go
    together where a pointwise op, a residual sum or a depthwise convolution makes them meet; they are pinned (never
    removed) where the model's outputs, an op that mixes them or one the trace does not know depends on their number.
    `ChannelMap.explain()` lists all of it.

    Args:
        model: an `nn.Module`; its parameters and buffers may be on any device. DistributedDataParallel, DataParallel
            and torch.compile's wrapper are looked through: names are those of the network inside.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. FLOPs are counted for one
            example: for these inputs, divided by the size of the first tensor's first dimension.
        pinned: names of submodules or parameters, or submodules, whose filters must stay.
        residual: "tie": channel c of a residual branch goes with channel c of the stream it is added to. "scatter": the
            last layer of a branch has filters of its own, and `pack` adds those that are left into the stream by index
            (see `paamops.scattering`). A branch is what layers have just computed and nothing but the sum reads, where
            a module returns it; other sums stay tied, and so does one branch of a stream that no other layer writes to.

    Returns:
        ChannelMap

    Raises:
        ValueError: the forward pass fails on `example_inputs`, no layer with filters runs in it, `pinned` names nothing
            in the model, or residual is neither.
        TypeError: `model` is not a module, or TorchScript.
    """
    model = unwrapped(model)
    if residual not in ("tie", "scatter"):
        raise ValueError(f"residual is {residual!r}; it must be 'tie' or 'scatter'")
    if residual == "scatter":
        from paamops import scattering  # which follows the model with a Tracer of its own

        return scattering.trace(model, example_inputs, pinned)
    return channel_map(model, example_inputs, pinned)


def channel_map(model, example_inputs, pinned):
    """The ChannelMap of the model as it stands."""
    tracer, tensors, total = traced(model, example_inputs, pinned, Tracer)
    batch = next((t.size(0) for t in leaves(example_inputs) if t.dim() > 0), 1)
    return ChannelMap(tracer, model, tensors, example_inputs, total, max(batch, 1))


def traced(model, example_inputs, pinned, make):
    """The tracer that `make` made and the model ran in, the tensors it followed, and how many labels these have."""
    tensors = named_tensors(model)
    sizes = [size for tensor in tensors.values() for size in tensor.shape]
    total = sum(sizes)
    parts = iter(torch.arange(total).split(sizes))
    vectors = {name: [next(parts) for _ in tensor.shape] for name, tensor in tensors.items()}
    pinned_names = names_of(model, tensors, pinned)
    try:
        run = (model, tensors, vectors, example_inputs, make)
        tracer = run_without_values(*run) or run_with_values(*run)
    except ForwardError as error:
        raise ValueError(f"the forward pass of model fails on example_inputs, in {error.op}: {error}") from error
    for number, call in enumerate(tracer.calls):
        if number not in tracer.closed:
            tracer.pin(call["activations"][0][1], "nothing that the trace saw reads it")
    if not tracer.layers:
        raise ValueError("model has nothing to prune: no convolution or linear layer with a parameter of its own ran")
    for name, layer in tracer.layers.items():
        if name in pinned_names:
            tracer.pin(layer.rows, "named in `pinned`")
    return tracer, tensors, total


def run_with_values(model, tensors, vectors, inputs, make):
    """The tracer that has followed the model's own forward pass."""
    tracer = make(tensors, vectors)
    with evaluating(model), requiring_grad(tensors.values()), unfused_attention(model, tracer):
        follow(tracer, model, tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs))
    return tracer


def run_without_values(model, tensors, vectors, inputs, make):
    """As `run_with_values`, on the meta device: no arithmetic is done. None where that might not show the same ops."""
    if not hollow.can_stand_for(model, tensors.values(), inputs):
        return None
    meta = hollow.emptied(tensors)
    tracer = make(meta, vectors, without_values=True)
    try:
        with (
            hollow.calling(model, tensors, meta, inputs) as (call, shapes),
            evaluating(model),
            unfused_attention(model, tracer),
        ):
            follow(tracer, call, shapes)
    except ForwardError:  # what it is, the run with values says
        return None
    kept = any(made() is not None for made in tracer.made)  # by something that cannot be put back: it wants values
    return None if tracer.refused or kept else tracer


def follow(tracer, model, inputs):
    """Run the model on the inputs inside the tracer, and pin what its outputs carry."""
    args, kwargs = arguments(inputs)
    try:
        with torch.no_grad(), eager(), tracer:
            outputs = model(*args, **kwargs)
    except Exception as error:
        known = [tracer.labels_of(tensor) for tensor in tracer.inputs]
        fields = [lb.core(f).flatten() for each in known if each.parameter is None for f in each.fields]
        labels = torch.cat(fields).unique().tolist() if fields else []
        raise ForwardError(error, tracer.op or "its own code", labels) from error
    finally:
        tracer.inputs = []
    for output in leaves(outputs):
        tracer.pin_tensor(output, "an output of the model")


def arguments(inputs):
    """Positional and keyword arguments of a forward pass, from a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def leaves(tree, seen=None):
    """All tensors in nested containers, in the attributes of objects too (a dataclass as output, say)."""
    seen = set() if seen is None else seen
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, torch.nn.Module)) and id(leaf) not in seen:
            seen.add(id(leaf))
            found.extend(leaves(list(vars(leaf).values()), seen))
    return found


def named_tensors(model):
    """Every parameter and buffer once, by its first name: as `named_parameters` and `named_buffers`, in one walk."""
    found, modules = {}, list(model.named_modules())
    for kind in ("_parameters", "_buffers"):
        seen = set()
        for path, module in modules:
            for name, tensor in getattr(module, kind).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{name}" if path else name] = tensor
    return found


def names_of(model, tensors, pinned):
    """The names of the parameters that `pinned` speaks of."""
    if isinstance(pinned, (tuple, list)) and not pinned:
        return set()
    if isinstance(pinned, (str, torch.nn.Module)):
        pinned = (pinned,)
    modules = dict(model.named_modules())
    names = set()
    for item in pinned:
        if isinstance(item, torch.nn.Module):
            inside = [tensor for tensor in item.parameters() if any(tensor is t for t in tensors.values())]
            found = {name for name, tensor in tensors.items() if any(tensor is t for t in inside)}
        elif item in modules:
            found = {name for name in tensors if name.startswith(f"{item}.") or not item}
        else:
            found = {item} & set(tensors)
        if not found:
            raise ValueError(f"pinned names {item!r}; it must be a submodule or a parameter of model")
        names |= found
    return names


@contextlib.contextmanager
def evaluating(model):
    """The model in eval mode; every module's own mode, and what the forward pass wrote into buffers, is put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (buffer, buffer._version, buffer.clone())
        for buffer in model.buffers()
        if not (buffer.is_meta or buffer.is_inference())
    ]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


@contextlib.contextmanager
def unfused():
    """Attention runs as the ops that it is made of, the same on every device, and not as one op."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextlib.contextmanager
def unfused_attention(model, tracer):
    """As `unfused`, where the model is traced.

    What `nn.MultiheadAttention` is given is pinned: it holds its number of channels against one that it was made with.
    """

    def pin(module, args, kwargs):
        for tensor in leaves((args, kwargs)):
            tracer.pin_tensor(tensor, "nn.MultiheadAttention is made for their number")

    modules = [module for module in model.modules() if isinstance(module, torch.nn.MultiheadAttention)]
    hooks = [module.register_forward_pre_hook(pin, with_kwargs=True) for module in modules]
    try:
        with unfused():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def requiring_grad(tensors):
    """All parameters require gradients: only then does PyTorch run a linear layer as one product whatever its input."""
    frozen = [t for t in tensors if isinstance(t, torch.nn.Parameter) and t.is_floating_point() and not t.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
