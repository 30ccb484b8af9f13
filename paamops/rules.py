"""How labels pass through ATen ops: one rule for each family of ops. What no rule knows is pinned, never guessed.

A rule is `rule(tracer, op, args, kwargs, out)`; it is called after the op ran and says what labels `out` carries, which
labels are one (`tracer.unite`), and which channels must stay (`tracer.pin`).
"""

import functools

import torch

from paamops import labels as lb
from paamops.labels import FIXED, Labels

RULES = {}  # name of the op, without its overload -> rule


def rule(*names):
    def register(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


full_name = functools.cache(str)  # of an op


@functools.cache
def find(op):
    """The rule for an ATen overload, or the one that pins."""
    name = op._schema.name.removeprefix("aten::")
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in op.tags or name in POINTWISE_WITHOUT_TAG:
        return pointwise
    return unknown


POINTWISE_WITHOUT_TAG = {
    "_prelu_kernel", "hardswish", "hardswish_", "masked_fill", "masked_fill_", "where", "log_sigmoid_forward",
}  # fmt: skip


def unknown(tracer, op, args, kwargs, out):
    for tensor in tracer.labelled(args, kwargs):
        tracer.pin_tensor(tensor, f"{op} is not known to the trace")


@rule("size", "stride", "sym_size", "sym_numel", "sym_stride", "is_same_size", "_local_scalar_dense", "dim", "numel")
@rule("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "is_pinned", "_assert_async")
def nothing(tracer, op, args, kwargs, out):
    """The result carries no channel: its size was given in numbers."""


# Layers: they read the labels of their input and issue those of their weight.


@rule("convolution", "_convolution")
def convolution(tracer, op, args, kwargs, out):
    x, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    known = tracer.labels_of(weight)
    if known.parameter is None or known.axes != tuple(range(weight.dim())):
        for tensor in tracer.labelled(args, kwargs):
            tracer.pin_tensor(tensor, f"{op} takes a weight that is computed in the forward pass")
        return
    vectors = tracer.vectors[known.parameter]
    first, second = vectors[0], vectors[1]
    read = tracer.read(x, 1)
    axes = (0, 1) if transposed else (1, 0)
    depthwise = groups > 1 and weight.shape[0] == groups if transposed else groups > 1 and weight.shape[1] == 1
    if tracer.depthwise is not None:
        depthwise = known.parameter in tracer.depthwise
    if depthwise:
        # A group has one input channel, and its output channels come and go with it.
        issued, axes = (first.repeat_interleave(len(second)) if transposed else first), (None, 0)
        if read is not None:
            tracer.unite(read.repeat_interleave(len(issued) // groups), issued)
        else:
            tracer.pin(first, f"{op} over groups of the model's input")
    elif groups == 1:
        issued = second if transposed else first
        if read is not None:
            tracer.unite(read, first if transposed else second)
    elif transposed:
        issued = second.repeat(groups)
        rows = first.view(groups, -1)
        tracer.unite(rows, rows[:1])
        if read is not None:
            tracer.unite(read, first)
    else:
        # Every group keeps the channels at the same places: all stay equal in size, and the weight stays one block.
        issued = first
        rows = first.view(groups, -1)
        tracer.unite(rows, rows[:1])
        if read is not None:
            tracer.unite(read.view(groups, -1), second)
    if bias is not None:
        tracer.unite_with_vector(bias, issued)
    kind = "transposed convolution" if transposed else "convolution"
    positions = (x if transposed else out).numel() // max((x if transposed else out).size(1), 1)
    kind = "depthwise " * depthwise + "grouped " * (groups > 1 and not depthwise) + kind
    tracer.issue(out, 1, known.parameter, axes, issued, kind, positions)


@rule("addmm", "mm")
def matrix_product(tracer, op, args, kwargs, out):
    bias, x, weight = args[:3] if len(args) > 2 else (None, *args[:2])
    known = tracer.labels_of(weight)
    if known.parameter is None or len(known.axes) != 2 or (bias is not None and bias.dim() != 1):
        for tensor in tracer.labelled(args, kwargs):
            tracer.pin_tensor(tensor, f"{op} is no linear layer whose weight is a parameter")
        return
    vectors = tracer.vectors[known.parameter]
    read = tracer.read(x, 1)
    if read is not None:
        tracer.unite(read, vectors[known.axes[0]])
    issued = vectors[known.axes[1]]
    if bias is not None:
        tracer.unite_with_vector(bias, issued)
    tracer.issue(out, 1, known.parameter, known.axes, issued, "linear", x.size(0))


@rule("paamops::scatter_channels")
def scatter_channels(tracer, op, args, kwargs, out):
    """It reads a branch, along the buffer `index`, and issues channels of a stream, along `source` (scattering.py)."""
    index, source = (tracer.labels_of(each) for each in args[1:])
    if not (index.parameter or "").endswith(".scatter.index") or source.parameter is None:
        for tensor in tracer.labelled(args, kwargs):
            tracer.pin_tensor(tensor, f"{op} takes places that no packing put there")
        return
    read, places = tracer.read(args[0], 1), tracer.vectors[index.parameter][0]
    if read is not None:
        tracer.unite(read, places)
    else:
        tracer.pin(places, f"{op} takes the model's input")
    tracer.scatters[index.parameter] = source.parameter
    tracer.set(out, Labels((lb.on_vector(tracer.vectors[source.parameter][0], 1, out.shape),)))


@rule("bmm", "baddbmm")
def product_of_activations(tracer, op, args, kwargs, out):
    for tensor in tracer.labelled(args, kwargs):
        tracer.pin_tensor(tensor, f"{op} multiplies activations with each other")


# Normalisation over each channel apart keeps the channels; over several at once it ties them to each other.


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
@rule("_batch_norm_no_update", "_batch_norm_with_update", "miopen_batch_norm", "batch_norm")
def batch_norm(tracer, op, args, kwargs, out):
    x = args[0]
    vector, fields = tracer.vector(x, 1), tracer.labels_of(x).fields
    for field in fields:
        if not lb.varies(field, 1) and lb.varying(field):
            tracer.pin(lb.core(field), f"{op} normalises over several of them at once")
    if vector is None:
        tracer.carry(out[0], fields, (x,))
        return
    scale = tracer.labels_of(args[1])
    if scale.parameter is not None and args[1].dim() == 1:
        tracer.scales[scale.parameter] = True
    for tensor in args[1:5]:
        if isinstance(tensor, torch.Tensor):
            tracer.unite_with_vector(tensor, vector)
    tracer.carry(out[0], [lb.on_vector(vector, 1, out[0].shape)], (x,), candidate=True)


@rule("native_group_norm")
def group_norm(tracer, op, args, kwargs, out):
    x, weight, bias = args[:3]
    if args[6] == x.size(1):
        batch_norm(tracer, op, (x, weight, bias), kwargs, out)
    else:
        pin_and_carry(tracer, x, out[0], f"{op} normalises over several of them at once")


@rule("native_layer_norm")
def layer_norm(tracer, op, args, kwargs, out):
    x, shape = args[:2]
    over = range(x.dim() - len(shape), x.dim())
    if any(lb.varies(field, d) for field in tracer.labels_of(x).fields for d in over):
        pin_and_carry(tracer, x, out[0], f"{op} normalises over several of them at once")
    else:
        tracer.carry(out[0], tracer.labels_of(x).fields, (x,), candidate=True)


def pin_and_carry(tracer, x, out, reason):
    tracer.pin_tensor(x, reason)
    tracer.carry(out, tracer.labels_of(x).fields, (x,))


# Pointwise ops: what meets in one element is one.


def pointwise(tracer, op, args, kwargs, out):
    tensors = [t for t in tracer.tensors(args, kwargs) if t.dim() <= out_of(out).dim()]
    out = out_of(out)
    known = tracer.labels_of(tensors[0]).fields if len(tensors) == 1 else ()
    if len(known) == 1 and known[0].shape == out.shape:
        finish_pointwise(tracer, op, args, kwargs, out, known, tensors)
        return
    rank, fields = out.dim(), []
    for tensor in tensors:
        for field in tracer.labels_of(tensor).fields:
            fields.append(field[(None,) * (rank - field.dim())])
    for tensor in tensors:
        if tracer.labels_of(tensor).fields:
            continue
        # A constant has the size it has: where it spans channels, those must stay.
        shape = (1,) * (rank - tensor.dim()) + tuple(tensor.shape)
        for field in fields:
            if any(shape[d] > 1 for d in lb.varying(field)):
                tracer.pin(lb.core(field), f"{op} meets them with a tensor of a fixed size")
    merged = []
    for field in fields:
        mine = set(lb.varying(field))
        for k, other in enumerate(merged):
            if other is None:
                continue
            theirs = set(lb.varying(other))
            if bool(mine) != bool(theirs):
                # One channel and several, or a channel and the positions of a map: it serves them all, and stays.
                one = field if theirs else other
                tracer.pin(lb.core(one), f"{op} spreads it over other channels", weak=True)
                if any(one.size(d) > 1 for d in mine | theirs):
                    tracer.unite(field, other, weak=True)  # several channels that are one, a concatenation of it, say
                elif theirs:
                    break
                else:
                    merged[k] = None  # it stays; what is told of the result are the channels that it meets
            elif mine and not mine & theirs:
                continue  # labels of different axes, the channels of one and the positions of the other
            elif any(field.size(d) == 1 for d in theirs):
                tracer.pin(lb.core(field), f"{op} spreads it over other channels")
                break
            elif any(other.size(d) == 1 for d in mine):
                tracer.pin(lb.core(other), f"{op} spreads it over other channels")
                merged[k] = field
                break
            else:
                tracer.unite(field, other, weak=not mine)
                merged[k] = other if theirs >= mine else field
                break
        else:
            merged.append(field)
    fields = [lb.resized(field, out.shape) for field in merged if field is not None]
    finish_pointwise(tracer, op, args, kwargs, out, fields, tensors)


def finish_pointwise(tracer, op, args, kwargs, out, fields, tensors):
    numbers = [a for a in (*args, *kwargs.values()) if isinstance(a, (int, float)) and not isinstance(a, bool)]
    tracer.scalars.append((full_name(op), numbers))
    tracer.carry(out, fields, tensors, candidate=True)


def out_of(out):
    return out[0] if isinstance(out, (tuple, list)) else out


@rule("copy_")
def copy_into(tracer, op, args, kwargs, out):
    target, source = args[:2]
    if tracer.labels_of(target).fields:
        pointwise(tracer, op, (target, source), {}, out)
    else:
        unknown(tracer, op, (source,), {}, out)


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "zero_", "fill_", "bernoulli_")
def sized_like(tracer, op, args, kwargs, out):
    tracer.carry(out, tracer.labels_of(args[0]).fields, ())


@rule("native_dropout")
def dropout(tracer, op, args, kwargs, out):
    for each in out:
        tracer.carry(each, tracer.labels_of(args[0]).fields, args[:1])


@rule(
    "detach", "alias", "clone", "_to_copy", "lift_fresh", "contiguous", "detach_", "lift", "resolve_conj", "resolve_neg"
)
def same(tracer, op, args, kwargs, out):
    if out is not args[0]:
        tracer.set(out, tracer.labels_of(args[0]))


@rule("_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "topk", "softmax", "log_softmax")
def along_a_dimension(tracer, op, args, kwargs, out):
    x = args[0]
    position = 2 if op._schema.name == "aten::topk" else 1
    dim = args[position] if len(args) > position else kwargs.get("dim", -1)
    if not isinstance(dim, int) or any(lb.varies(field, dim % x.dim()) for field in tracer.labels_of(x).fields):
        tracer.pin_tensor(x, f"{op} mixes them")
        return
    for each in out if isinstance(out, (tuple, list)) else (out,):
        fields = [lb.resized(field, each.shape) for field in tracer.labels_of(x).fields]
        tracer.carry(each, fields, (x,))


# Reductions and windows over space keep the channels; over channels they mix them.


@rule("mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "norm")
@rule("linalg_vector_norm", "argmax", "argmin", "all", "any", "median", "nansum", "nanmean")
def reduction(tracer, op, args, kwargs, out):
    x = args[0]
    if any(isinstance(t, torch.Tensor) for t in args[1:]):
        pointwise(tracer, op, args, kwargs, out)  # max(x, y)
        return
    named = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    dims = named.get("dim")
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = sorted({d % x.dim() for d in dims}) if x.dim() else []
    fields = []
    for field in tracer.labels_of(x).fields:
        if any(lb.varies(field, d) for d in dims):
            tracer.pin(lb.core(field), f"{op} mixes them")
            continue
        for d in reversed(dims):
            field = field.narrow(d, 0, 1) if named.get("keepdim") else field.select(d, 0)
        fields.append(field)
    for each in out if isinstance(out, (tuple, list)) else (out,):
        tracer.carry(each, fields, (x,))


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d")
@rule("adaptive_max_pool3d", "fractional_max_pool2d", "fractional_max_pool3d", "upsample_nearest1d")
@rule("upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d")
@rule("_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa")
@rule("upsample_bicubic2d", "_upsample_bicubic2d_aa", "upsample_trilinear3d", "reflection_pad1d")
@rule("reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d")
def window(tracer, op, args, kwargs, out):
    x, out = args[0], out_of(out)
    spatial = next(int(c) for c in op._schema.name if c.isdigit())
    fields = []
    for field in tracer.labels_of(x).fields:
        for d in range(x.dim() - spatial, x.dim()):
            if lb.varies(field, d):  # the channels that meet in a window are one
                first = field.narrow(d, 0, 1)
                tracer.unite(field, first)
                field = first.expand(field.shape)
        fields.append(lb.resized(field, out.shape))
    tracer.carry(out, fields, (x,))


# Data movement: the same op, executed on the labels.


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "_reshape_copy")
def view(tracer, op, args, kwargs, out):
    x = args[0]
    if isinstance(args[1], torch.dtype):
        unknown(tracer, op, args, kwargs, out)
        return
    fields, fixed = [], []
    for field in tracer.labels_of(x).fields:
        moved = lb.settle(field.reshape(out.shape))
        dims = lb.varying(moved)
        if len(dims) > len(lb.varying(field)):
            # An axis of channels was split. One part shrinks with the channels, the one given as -1 or else the last;
            # the other parts keep their size, so the channels at the same place of each go together.
            shrinks = next((d for d in dims if d < len(args[1]) and args[1][d] == -1), dims[-1])
            fixed += (d for d in dims if d != shrinks)
            for d in dims:
                if d != shrinks:
                    first = moved.narrow(d, 0, 1)
                    tracer.unite(moved, first)
                    moved = first.expand(moved.shape)
        fields.append(moved)
    tracer.cut("a view", x, out.shape, fixed)
    tracer.carry(out, fields, (x,))


@rule("permute", "transpose", "t", "movedim")
def permutation(tracer, op, args, kwargs, out):
    known = tracer.labels_of(args[0])
    fields = [op(field, *args[1:], **kwargs) for field in known.fields]
    axes = ()
    if known.parameter is not None:
        places = torch.empty([2 + axis for axis in known.axes], device="meta")  # sizes that name the axes
        axes = tuple(size - 2 for size in op(places, *args[1:], **kwargs).shape)
    tracer.set(out, Labels(tuple(fields), known.parameter, axes, known.pending))


@rule("unsqueeze", "squeeze", "expand", "flip", "repeat", "unsqueeze_", "squeeze_", "pixel_unshuffle")
@rule("pixel_shuffle", "diagonal", "unfold", "broadcast_to", "repeat_interleave", "transpose_", "t_", "swapaxes")
def movement(tracer, op, args, kwargs, out):
    if any(isinstance(a, torch.Tensor) for a in args[1:]):
        unknown(tracer, op, args, kwargs, out)
        return
    if op._schema.name in ("aten::unfold", "aten::diagonal"):
        dims = {"aten::unfold": args[1:2], "aten::diagonal": (*args[2:4], 0, 1)[:2]}[op._schema.name]
        if any(lb.varies(field, d % args[0].dim()) for field in tracer.labels_of(args[0]).fields for d in dims):
            tracer.pin_tensor(args[0], f"{op} picks among them by position")
            return
    if op._schema.name == "aten::pixel_shuffle":
        for field in tracer.labels_of(args[0]).fields:
            if lb.varies(field, field.dim() - 3):  # the filters of one channel: their number stays a multiple of r²
                rows = tracer.along(field, field.dim() - 3).view(-1, args[1] ** 2)
                tracer.unite(rows, rows[:, :1])
    functional = getattr(torch.ops.aten, op._schema.name.removeprefix("aten::").removesuffix("_"))
    overload = getattr(functional, op._overloadname)
    fields = [lb.settle(overload(field, *args[1:], **kwargs)) for field in tracer.labels_of(args[0]).fields]
    tracer.carry(out, fields, args[:1])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(tracer, op, args, kwargs, out):
    x, groups = args[:2]
    fields = []
    for field in tracer.labels_of(x).fields:
        if lb.varies(field, 1):
            vector = tracer.along(field, 1).view(groups, -1)
            tracer.unite(vector, vector[:1])  # the groups stay equal, and the order is that of the places
            field = lb.on_vector(vector.t().reshape(-1), 1, x.shape)
        fields.append(field)
    tracer.carry(out, fields, (x,))


@rule("as_strided_")
def restrided(tracer, op, args, kwargs, out):
    """Strides of dimensions of size 1 alone are set, as pooling to one place does in channels_last."""
    x, before = args[0], tracer.strides
    if [d for d in zip(x.shape, x.stride(), strict=True) if d[0] > 1] != [d for d in before if d[0] > 1]:
        unknown(tracer, op, args, kwargs, out)


@rule("slice", "select", "narrow", "index_select", "roll", "index", "gather", "as_strided")
def written_sizes(tracer, op, args, kwargs, out):
    """A piece of the channels is cut out by numbers that a smaller network would not know: they stay."""
    x, name = args[0], op._schema.name.removeprefix("aten::")
    fields = []
    for field in tracer.labels_of(x).fields:
        if name in ("slice", "narrow") and out.shape == x.shape:
            fields.append(field)
            continue
        dims = moved_dimensions(name, args, x)
        if dims is None or any(lb.varies(field, d) for d in dims):
            tracer.pin(lb.core(field), f"{op} picks among them by position")
        if name in ("slice", "select", "narrow") or (name == "roll" and dims is not None):
            fields.append(lb.settle(op(field, *args[1:], **kwargs)))
        elif dims is not None and out.dim() == x.dim() and not any(lb.varies(field, d) for d in dims):
            fields.append(lb.resized(field, out.shape))
    for tensor in tracer.labelled(args[1:], kwargs):
        tracer.pin_tensor(tensor, f"{op} uses it as an index")
    tracer.carry(out, fields, (x,))


def moved_dimensions(name, args, x):
    """The dimensions along which an op picks, or None where that is not known."""
    if name in ("slice", "select", "narrow", "index_select"):
        return [(args[1] if len(args) > 1 else 0) % x.dim()]
    if name == "roll":
        return [d % x.dim() for d in args[2]] if len(args) > 2 and args[2] else None
    if name == "index":
        indexed = [d for d, index in enumerate(args[1]) if index is not None]
        return indexed if all(args[1][d].dim() == 1 for d in indexed) and len(indexed) == 1 else None
    return None


@rule("split", "split_with_sizes", "unbind", "chunk", "tensor_split")
def split(tracer, op, args, kwargs, out):
    x, name = args[0], op._schema.name.removeprefix("aten::")
    position = 1 if name == "unbind" else 2
    dim = (args[position] if len(args) > position else kwargs.get("dim", 0)) % max(x.dim(), 1)
    pieces = [[] for _ in out]
    for field in tracer.labels_of(x).fields:
        parts = list(op(field, *args[1:], **kwargs))
        if lb.varies(field, dim) and len(parts) > 1:
            if name == "unbind" or (name == "split_with_sizes" and len({p.size(dim) for p in parts}) > 1):
                tracer.pin(lb.core(field), f"{op} cuts them at fixed places")
            else:
                # chunk(2) halves whatever is left, so the channels at the same place of each piece go together.
                for part in parts[1:]:
                    size = min(part.size(dim), parts[0].size(dim))
                    tracer.unite(part.narrow(dim, 0, size), parts[0].narrow(dim, 0, size))
                if parts[-1].size(dim) < parts[0].size(dim):
                    tracer.pin(parts[-1].narrow(dim, 0, 1), f"{op} gives fewer pieces where the last one is empty")
        for piece, part in zip(pieces, parts, strict=True):
            piece.append(lb.settle(part))
    among_channels = any(lb.varies(field, dim) for field in tracer.labels_of(x).fields)
    tracer.cut("a split", x, (len(out),), (0,) if among_channels else ())
    for tensor, fields in zip(out, pieces, strict=True):
        tracer.carry(tensor, fields, (x,))


@rule("glu")
def gated_linear_unit(tracer, op, args, kwargs, out):
    """The halves of a chunk meet."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.dim()
    fields = []
    for field in tracer.labels_of(x).fields:
        half, other = field.chunk(2, dim)
        if lb.varies(field, dim):
            tracer.unite(half, other)
        fields.append(lb.settle(half))
    tracer.carry(out, fields, (x,), candidate=True)


@rule("cat", "concat", "stack")
def concatenation(tracer, op, args, kwargs, out):
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim %= out.dim()
    known = [tracer.labels_of(t).fields for t in tensors]
    if all(len(fields) == 1 and lb.varying(fields[0]) == (dim,) for fields in known) and op._schema.name == "aten::cat":
        row = torch.cat([lb.row(fields[0], dim) for fields in known])  # channels beside channels, as nearly always
        tracer.carry(out, [lb.on_vector(row, dim, out.shape)], tensors)
        return
    if op._schema.name == "aten::stack":
        shapes = [[*t.shape[:dim], 1, *t.shape[dim:]] for t in tensors]
        parts = [[field.unsqueeze(dim) for field in tracer.labels_of(t).fields] for t in tensors]
    else:
        kept = [t for t in tensors if t.dim() == out.dim()]  # cat passes over tensors of shape (0,)
        shapes = [list(t.shape) for t in kept]
        parts = [tracer.labels_of(t).fields for t in kept]
    kinds = {tuple(d for d in lb.varying(field) if d != dim) for fields in parts for field in fields}
    merged = []
    for kind in sorted(kinds):
        row = []
        for shape, fields in zip(shapes, parts, strict=True):
            same_kind = [f for f in fields if tuple(d for d in lb.varying(f) if d != dim) == kind]
            tracer.has_fixed |= not same_kind
            row.append(same_kind[0] if same_kind else torch.full((1,) * out.dim(), FIXED).expand(shape))
        level = [field.narrow(dim, 0, 1) for field in row if kind and field.size(dim) and not lb.varies(field, dim)]
        for field in level[1:]:  # what lies side by side keeps the same channels
            tracer.unite(field, level[0])
        wide = {dim}.union(*(lb.varying(field) for field in row))
        merged.append(lb.settle(torch.cat([lb.core(field, keep=wide) for field in row], dim).expand(out.shape)))
    tracer.carry(out, merged, tensors)


@rule("constant_pad_nd")
def constant_pad(tracer, op, args, kwargs, out):
    x, pad = args[:2]
    amounts = [(0, 0)] * x.dim()
    for k in range(len(pad) // 2):
        amounts[-1 - k] = (pad[2 * k], pad[2 * k + 1])
    fields = []
    for field in tracer.labels_of(x).fields:
        # One channel does not change along its axis, and has channels of padding beside it all the same.
        channels = {*lb.varying(field), *([1] if x.dim() > 1 and x.size(1) == 1 else [])}
        across = [d for d in sorted(channels) if amounts[d] != (0, 0)]
        if any(n < 0 for d in across for n in amounts[d]):
            tracer.pin(lb.core(field), f"{op} crops them")
        tracer.has_fixed |= bool(across)
        for d in across:  # channels of padding: there whatever is left of the others
            rows = lb.core(field, keep=(d,))
            shape = list(rows.shape)
            sides = [torch.full([*shape[:d], max(n, 0), *shape[d + 1 :]], FIXED) for n in amounts[d]]
            low, high = (max(-n, 0) for n in amounts[d])
            rows = rows.narrow(d, low, rows.size(d) - low - high)
            target = list(field.shape)
            target[d] = out.size(d)
            field = torch.cat([sides[0], rows, sides[1]], d).expand(target)
        fields.append(lb.resized(field, out.shape))
    tracer.carry(out, fields, (x,))
