"""The l1 or l2 norm of every filter of every layer, in one call: what magnitude pruning ranks filters by."""

import numbers

import torch

from paamops.ops.registration import define

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def filter_norms(weights, axes=None, groups=None, p=2):
    """norm[f] = Σ |w| for p = 1, √(Σ w²) for p = 2, over the weights w of filter f: of all layers, one after the other.

    weights: list of L tensors, float16 to float64, one dtype on one device, any strides. axes: list of L axes, 0 or 1,
    along which the filters lie: 0 for convolutions (out, in / groups, *kernel) and linear layers (out, in), 1 for
    transposed convolutions (in, out / groups, *kernel); None is 0 for all. groups: list of L numbers of groups, of
    transposed convolutions only (the filters of the others are all along the axis): filter g · out / groups + j is
    weight[g · in / groups : (g + 1) · in / groups, j]; None is 1 for all.
    Returns (F,) float32 (float64 for float64 weights), accumulated in that dtype. F = Σ_l size of the axis · groups; a
    layer may be without filters, and a filter without weights has norm 0. Weights are detached: there is no gradient.
    NaN and infinities pass into the norm of their filter. Squares are taken in the accumulator's dtype: beyond 1e19 a
    float32 weight makes an infinite l2 norm, below 1e-23 it counts as 0.
    TypeError: an argument is no list, tensor or whole number of the kind above. ValueError: no layer, mismatched
    lengths, dtypes or devices, an axis that a weight has not, groups that do not divide its first dimension, p that is
    neither 1 nor 2.
    Source: l1, Li et al., Pruning filters for efficient ConvNets, 2017, §3.1; l2, He et al., Soft filter pruning, 2018.
    """
    weights, axes, groups = check_filters(weights, axes, groups)
    if isinstance(p, bool) or p not in (1, 2):
        raise ValueError(f"p is {p!r}; it must be 1 or 2")
    return filter_norms_op(weights, axes, groups, int(p))


def check_filters(weights, axes, groups):
    """The three lists, weights detached; or the error that names the argument, what it was and what it must be."""
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights is a {type(weights).__name__}; it must be a list of tensors, one for each layer")
    if not weights:
        raise ValueError("weights is empty; it must have at least one layer")
    lists = []
    for name, value, default in (("axes", axes, 0), ("groups", groups, 1)):
        value = [default] * len(weights) if value is None else value
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a list of whole numbers, or None")
        if len(value) != len(weights):
            raise ValueError(f"{name} has {len(value)} entries; it must have one for each layer, {len(weights)}")
        for layer, entry in enumerate(value):
            if isinstance(entry, bool) or not isinstance(entry, numbers.Integral):
                raise TypeError(f"{name}[{layer}] is a {type(entry).__name__}; it must be a whole number")
        lists.append([int(entry) for entry in value])
    for layer, (weight, axis, group) in enumerate(zip(weights, *lists, strict=True)):
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"weights[{layer}] is a {type(weight).__name__}; it must be a tensor")
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"weights[{layer}] has dtype {weight.dtype}; it must be float16, bfloat16, float32 or float64"
            )
        if weight.dtype != weights[0].dtype:
            raise TypeError(
                f"weights[{layer}] has dtype {weight.dtype}; it must be that of the first, {weights[0].dtype}"
            )
        if weight.device != weights[0].device:
            raise ValueError(
                f"weights[{layer}] is on {weight.device}; it must be on {weights[0].device}, as the first is"
            )
        if axis not in (0, 1):
            raise ValueError(f"axes[{layer}] is {axis}; it must be 0 or 1")
        if weight.ndim <= axis:
            raise ValueError(
                f"weights[{layer}] has shape {tuple(weight.shape)}; it must have the axis of its filters, axis {axis}"
            )
        if axis == 0 and group != 1:
            raise ValueError(f"groups[{layer}] is {group}; it must be 1 where the filters lie along axis 0")
        if group < 1 or (axis == 1 and weight.shape[0] % group):
            raise ValueError(f"groups[{layer}] is {group}; it must divide the first dimension, {weight.shape[0]}")
    return [weight.detach() for weight in weights], *lists


def filter_rows(weight, axis, groups):
    """The filters of one layer as rows (n, d), a view where there is one."""
    if axis == 1:
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).movedim(2, 1)
        return split.reshape(groups * weight.shape[1], _size(split.shape[2:]))
    return weight.reshape(weight.shape[0], _size(weight.shape[1:]))


def filter_count(weight, axis, groups):
    return weight.shape[axis] * groups


def _size(shape):
    """Written out, since -1 cannot be told where there are no filters."""
    return torch.Size(shape).numel()


def accumulator(weight):
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def filter_norms_reference(weights, axes, groups, p):
    """(F,) float32 (float64 for float64 weights)."""
    dtype = accumulator(weights[0])
    norms = []
    for layer in zip(weights, axes, groups, strict=True):
        rows = filter_rows(*layer).to(dtype)
        norms.append(rows.abs().sum(1) if p == 1 else rows.square().sum(1).sqrt())
    return torch.cat(norms)


def fake(weights, axes, groups, *p):
    filters = sum(map(filter_count, weights, axes, groups))
    return weights[0].new_empty(filters, dtype=accumulator(weights[0]))


filter_norms_op = define(
    "filter_norms(Tensor[] weights, int[] axes, int[] groups, int p) -> Tensor",
    reference=filter_norms_reference,
    fake=fake,
)
