"""trace: what can be removed from a network, with what, at which cost, read off one real forward pass.

No list of layer types and no second-guessing of the model's code: labels flow through the ATen ops that run
(`rules.py`), parameters meet activations where they are used, and union-find over the labels gives the channel sets.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from paamops import labels as lb
from paamops import rules
from paamops.channels import ChannelMap, Layer
from paamops.labels import FIXED, Labels

NOTHING = Labels()


class ForwardError(RuntimeError):
    """The model's forward pass failed; `op` is the ATen op that ran last, `labels` what its activations carried."""

    def __init__(self, error, op, labels):
        super().__init__(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        self.op, self.labels = op, labels


class Tracer(TorchDispatchMode):
    """Follows the labels of `tensors` (name -> parameter or buffer) through the ATen ops that run inside the mode.

    `vectors`: name -> for every axis the labels of its indices, int64. What it finds: `edges` (pairs of arrays of
    labels that are one, with the op that said so; `weak` where both stand in a dimension of size 1), `pins` (arrays of
    labels that stay, with the reason), `layers` (weight name -> Layer) and `calls` (one for every call of a layer).
    """

    def __init__(self, tensors, vectors, depthwise=None):
        super().__init__()
        self.vectors = vectors
        self.depthwise = depthwise  # weights of depthwise convolutions where they are known: shapes do not always tell
        self.known = WeakTensorKeyDictionary()
        for name, tensor in tensors.items():
            self.known[tensor] = lb.of_parameter(name, vectors[name], tensor.shape)
        self.edges, self.weak, self.pins, self.layers, self.calls = [], [], [], {}, []
        self.read_axes = {}  # weight name -> its axes that read channels
        self.closed = set()  # calls whose output something has read
        self.counts = {}  # how often each op ran
        self.op, self.inputs = None, []  # the op that runs, and its tensors

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.op, self.inputs = op, self.tensors(args, kwargs)
        out = op(*args, **kwargs)
        self.counts[op] = self.counts.get(op, 0) + 1
        if any(t in self.known for t in self.inputs):
            rules.find(op)(self, op, args, kwargs, out)
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

    def carry(self, out, fields, sources, candidate=None):
        """`out` has these fields; as a `candidate` it is the activation of the filters that nobody has read yet."""
        pending = frozenset().union(*(self.labels_of(s).pending for s in sources)) - self.closed
        self.set(out, Labels(tuple(fields), pending=pending))
        if candidate is not None and pending and len(fields) == 1 and len(lb.varying(fields[0])) <= 1:
            dim = (*lb.varying(fields[0]), 1)[0]
            if out.dim() >= 2 and 0 < dim < out.dim():
                place = (str(candidate), self.counts[candidate] - 1, dim)
                for call in pending:
                    self.calls[call]["activations"].append((place, lb.core(fields[0], keep=(dim,)).reshape(-1)))

    def issue(self, out, dim, name, axes, rows, kind, positions, kept_fields=()):
        """`out` is the output of the layer with the weight `name`: its channels along `dim` are the layer's filters.

        `axes`: of the weight, (the one that reads or None, the one that issues). `rows`: the labels of the filters.
        """
        reads, issues = axes
        self.read_axes.setdefault(name, set()).update(() if reads is None else (reads,))
        call = len(self.calls)
        place = (str(self.op), self.counts[self.op] - 1, dim)
        self.calls.append({"weight": name, "positions": positions, "activations": [(place, rows)]})
        if name not in self.layers:
            self.layers[name] = Layer(name.removesuffix(".weight"), name, kind, tuple(out.shape[1:]), rows, issues)
        fields = (lb.on_vector(rows, dim, out.shape), *kept_fields)
        self.set(out, Labels(fields, pending=frozenset([call])))

    def along(self, field, dim):
        """The labels along `dim`; those that share an index, since the field changes elsewhere too, are united."""
        rows = lb.core(field, keep=(dim,)).movedim(dim, -1).reshape(-1, field.size(dim))
        if len(rows) > 1:
            self.unite(rows[1:], rows[:1].expand(len(rows) - 1, -1))
        return rows[0]

    def vector(self, tensor, dim):
        """The labels of a tensor's channels along `dim`, or None where it has none there."""
        fields = self.labels_of(tensor).fields
        fields = [f for f in fields if lb.varies(f, dim)] or [f for f in fields if not lb.varying(f)]
        vectors = [self.along(field, dim) for field in fields if field.numel()]
        for other in vectors[1:]:
            self.unite(vectors[0], other)
        return vectors[0] if vectors else None

    def read(self, tensor, dim, others):
        """As `vector`, by a layer: what it carries has been read. Labels of other axes are kept or pinned."""
        known = self.labels_of(tensor)
        self.closed |= known.pending
        if others == "pin":
            for field in known.fields:
                if lb.varying(field) and not lb.varies(field, dim):
                    self.pin(lb.core(field), f"{self.op} mixes them")
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
        a, b = torch.broadcast_tensors(a, b)
        for d in range(a.dim()):
            if a.size(d) > 1 and a.stride(d) == 0 and b.stride(d) == 0:
                a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        a, b = a.reshape(-1), b.reshape(-1)
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self.pin(torch.cat([a[fixed], b[fixed]]), f"{self.op} meets them with constant channels")
            a, b = a[~fixed], b[~fixed]
        (self.weak if weak else self.edges).append((a.numpy(), b.numpy(), str(self.op)))

    def pin(self, labels, reason):
        labels = labels.reshape(-1)
        self.pins.append((labels[labels != FIXED].numpy(), reason))

    def pin_tensor(self, tensor, reason):
        known = self.labels_of(tensor)
        self.closed |= known.pending
        for field in known.fields:
            self.pin(lb.core(field), reason)


def trace(model, example_inputs, pinned=()):
    """Find the channel sets of a network: which filters can be removed, with what, and what each costs.

    The model runs once on `example_inputs` in eval mode, without gradients, and is left as it was. Channels stay or go
    together where a pointwise op, a residual sum or a depthwise convolution makes them meet; they are pinned (never
    removed) where the model's outputs, an op that mixes them or one the trace does not know depends on their number.
    `ChannelMap.explain()` lists all of it.

    Args:
        model: an `nn.Module`; its parameters and buffers may be on any device.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. FLOPs are counted for one
            example: for these inputs, divided by the size of the first tensor's first dimension.
        pinned: names of submodules or parameters, or submodules, whose filters must stay.

    Returns:
        ChannelMap

    Raises:
        ValueError: the forward pass fails on `example_inputs`, no layer with filters runs in it, or `pinned` names
            nothing in the model.
        TypeError: `model` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    tensors = named_tensors(model)
    vectors, total = {}, 0
    for name, tensor in tensors.items():
        vectors[name] = []
        for size in tensor.shape:
            vectors[name].append(torch.arange(total, total + size))
            total += size
    pinned_names = names_of(model, tensors, pinned)
    tracer = Tracer(tensors, vectors)
    try:
        with evaluating(model):
            follow(tracer, model, example_inputs)
    except ForwardError as error:
        raise ValueError(f"the forward pass of model fails on example_inputs, in {error.op}: {error}") from error
    if not tracer.layers:
        raise ValueError("model has nothing to prune: no convolution or linear layer with a parameter of its own ran")
    for name, layer in tracer.layers.items():
        if name in pinned_names:
            tracer.pin(layer.rows, "named in `pinned`")
    batch = next((t.size(0) for t in leaves(example_inputs) if t.dim() > 0), 1)
    return ChannelMap(tracer, model, tensors, example_inputs, total, max(batch, 1))


def follow(tracer, model, inputs):
    """Run the model on the inputs inside the tracer, and pin what its outputs carry."""
    args, kwargs = arguments(inputs)
    try:
        with torch.no_grad(), tracer:
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


def leaves(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def named_tensors(model):
    """Every parameter and buffer once, by its first name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def names_of(model, tensors, pinned):
    """The names of the parameters that `pinned` speaks of."""
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
    """The model in eval mode, every module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
