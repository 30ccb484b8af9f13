"""weight_scores: what the weights alone say of each filter, without a single image."""

import torch

from paamops import scattering
from paamops.ops.filter_distances import filter_distances
from paamops.ops.filter_norms import filter_norms
from paamops.tracing import named_tensors
from paamops.wrapping import unwrapped

CRITERIA = ("l1", "l2", "geometric_median", "batch_norm", "random")


def weight_scores(model, channels, criterion="l2", seed=0):
    """One score for every filter, from the weights: the lower, the sooner `select` lets the filter go.

    - "l1", "l2": the norm of the filter's weights, Σ |w| or √(Σ w²) (`filter_norms`).
    - "geometric_median": the sum of the filter's distances to the others of its layer, FPGM (`filter_distances`).
    - "batch_norm": |γ|, the scale of the batch norm that the filter's channel passes through, as the trace has found
      it; where it passes through several (a concatenation that many layers read, a residual stream), their mean. Any
      norm over each channel apart counts. Pinned filters without one, which stay anyway, get 0.
    - "random": uniform in [0, 1), the same for a seed on every device.

    Scores are as they come: a norm is larger in a layer with larger filters. `select` takes the mean over the filters
    that stay or go together.

    Args:
        model: the traced network, or one of the same architecture.
        channels: ChannelMap of the network.
        criterion: one of the five. seed: of "random".

    Returns:
        (F,) float32 (float64 where a weight is float64), in the order of `channels.filters`, on the device of the first
        layer's weight. No gradient flows.

    Raises:
        ValueError: an unknown criterion; model lacks a parameter of `channels`, or has it in another shape; with
            "batch_norm" filters that could go pass through no such norm (the message names their layers).
        TypeError: with a norm or a distance, a weight that is not floating-point.

    Source: Li et al. 2017 (l1); He et al. 2018 (l2); FPGM, He et al. 2019; Network Slimming, Liu et al. 2017.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; it must be one of {', '.join(CRITERIA)}")
    tensors = _tensors(model, channels)
    weights = [tensors[layer.weight].detach() for layer in channels.layers]
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(channels.filters), generator=generator).to(weights[0].device)
    if criterion == "batch_norm":
        return _scales(tensors, channels).to(weights[0].device)
    op, extra = (filter_distances, {}) if criterion == "geometric_median" else (filter_norms, {"p": int(criterion[1])})
    # The filters of a transposed convolution are those of one group, as often as it has groups; where it is depthwise,
    # they lie along axis 1 all the same, though its channels go along axis 0.
    axes = [layer.axis if len(layer.rows) <= len(tensors[layer.weight]) else 1 for layer in channels.layers]
    groups = [
        len(layer.rows) // tensors[layer.weight].size(axis) for layer, axis in zip(channels.layers, axes, strict=True)
    ]
    kinds = {}
    for layer, weight in enumerate(weights):
        kinds.setdefault((weight.dtype, weight.device), []).append(layer)
    parts = [None] * len(weights)
    for layers in kinds.values():  # one call, unless the network is of several dtypes or on several devices
        found = op([weights[k] for k in layers], [axes[k] for k in layers], [groups[k] for k in layers], **extra)
        if len(kinds) == 1:
            return found
        for k, part in zip(layers, found.split([len(channels.layers[k].rows) for k in layers]), strict=True):
            parts[k] = part.to(weights[0].device)
    return torch.cat(parts)


def _tensors(model, channels):
    """The model's parameters and buffers by name, which are those of the traced network."""
    tensors, scatters = named_tensors(unwrapped(model)), scattering.names(channels.hosts)
    for name, vectors in channels.components.items():
        if name in scatters:  # of the packed network
            continue
        shape = tuple(map(len, vectors))
        if name not in tensors:
            raise ValueError(f"model has no {name}; it must be the traced network, or one of the same architecture")
        if tensors[name].shape != shape:
            raise ValueError(f"{name} of model has shape {tuple(tensors[name].shape)}; it must be {shape}, as traced")
    return tensors


def _scales(tensors, channels):
    """(F,) the mean |γ| over the norms of each filter's channel set."""
    names = [name for name in channels.scales if channels.axes[name][0] is not None]
    total = torch.zeros(len(channels.pinned), dtype=torch.float64)
    count = torch.zeros_like(total)
    if names:
        sets = torch.cat([torch.from_numpy(channels.axes[name][0]) for name in names])
        scales = torch.cat([tensors[name].detach().abs().double().cpu() for name in names])
        inside = sets >= 0
        total.index_add_(0, sets[inside], scales[inside])
        count.index_add_(0, sets[inside], torch.ones_like(scales[inside]))
    without = ((count == 0) & ~channels.pinned)[channels.sets]
    if without.any():
        layers = [channels.layers[k].name for k in channels.filters[without].unique().tolist()]
        raise ValueError(
            f"no batch norm with a scale follows the filters of {', '.join(layers)}: pin these layers"
            " (`trace(…, pinned=…)`), or take another criterion"
        )
    wide = any(tensors[name].dtype == torch.float64 for name in names)
    return (total / count.clamp(min=1))[channels.sets].to(torch.float64 if wide else torch.float32)
