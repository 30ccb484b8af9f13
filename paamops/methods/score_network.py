"""The attention network of PAAM: the filters of all layers in, one score per filter out."""

import itertools
import math

import torch
from torch import nn

from paamops import tracing
from paamops.ops.filter_attention import filter_attention
from paamops.ops.leaky_exponential import leaky_exponential
from paamops.ops.project_filters import project_filters
from paamops.ops.tempered_sigmoid import tempered_sigmoid

ATTENTIONS = ("additive", "dot")
ACTIVATIONS = ("leaky_exponential", "sigmoid")
OPEN = 4.0  # where the sigmoid starts: it has no point at which it is 1


class ScoreNetwork(nn.Module):
    """Scores of all filters from their weights: additive attention within each layer, no softmax (PAAM).

        I_l = the filters of layer l as rows (n_l, d_l), standardised over the layer, detached
        q, k = I_l W_q, I_l W_k                                        (n_l, width)
        x_i = b_l + mean_j Σ_c v_lc · tanh(q_ic + k_jc)
        S_i = leaky_exponential(x_i, slope)

    The filters of a channel set share the mean of their x. v and b start at 0, so every score starts at exactly 1; the
    scores of pinned filters stay 1. Layers all of whose filters are pinned have no attention.

    The paper's excerpt gives the additive form, the absence of a softmax and what the score activation must be; what
    it leaves open is our choice: the widths, the standardised rows, the mean over j, one (v, b) a layer.

    Parameters: `projection` (Σ d_l, 2 · width), the layers' W_q and W_k side by side, stacked, from N(0, 1/d_l);
    `value` (L', width) and `bias` (L',) of the L' layers that have attention.

    Args:
        model: the traced network; it is looked at in each forward pass, and is not a submodule.
        channels: its ChannelMap.
        width: d, the dimensions of the attention.
        attention: "additive", or for comparison "dot": x_i = b_l + Σ_c v_lc · q_ic · mean_j k_jc.
        activation: "leaky_exponential", or for comparison "sigmoid": S = sigmoid(x / temperature), with x starting at
            4 · temperature, S = 0.98.
        slope, temperature: of the score activation. A slope of 0.1 lets what the task has pushed above 1 come down
            again in time; with 0.01 some of it does not (bench/ablations/README.md).
        generator: torch.Generator for the initial projection.
    """

    def __init__(
        self,
        model,
        channels,
        width=32,
        attention="additive",
        activation="leaky_exponential",
        slope=0.1,
        temperature=1.0,
        generator=None,
    ):
        super().__init__()
        self._model = [model]  # in a list, so that it is no submodule
        self.attention, self.activation = attention, activation
        self.slope, self.temperature, self.width = slope, temperature, width
        offsets, pinned = channels.offsets.tolist(), channels.pinned[channels.sets]
        chosen = [k for k, (a, b) in enumerate(itertools.pairwise(offsets)) if not pinned[a:b].all()]
        self.layers = [channels.layers[k] for k in chosen]
        self.heights = [offsets[k + 1] - offsets[k] for k in chosen]
        self.offsets = [0, *itertools.accumulate(self.heights)]
        rows = self.rows()
        self.widths = [row.shape[1] for row in rows]
        device = rows[0].device
        start = torch.cat([torch.randn(d, 2 * width, generator=generator) / math.sqrt(d) for d in self.widths])
        self.projection = nn.Parameter(start.to(device))
        self.value = nn.Parameter(torch.zeros(len(rows), width, device=device))
        self.start = OPEN * temperature if activation == "sigmoid" else 0.0
        self.bias = nn.Parameter(torch.full((len(rows),), self.start, device=device))
        self.share = _Share(channels.sets, torch.cat([torch.arange(offsets[k], offsets[k + 1]) for k in chosen]))
        self.register_buffer("stays", pinned[self.share.filters].to(device), persistent=False)

    def use(self, model):
        """Look at the filters of another network of the same architecture from now on."""
        self._model = [model]

    def has_learned(self):
        """Whether any parameter that decides the scores has left its initial value."""
        return bool(self.value.any() or (self.bias != self.start).any())

    def rows(self):
        """The filters of each layer that has attention: (n_l, d_l), detached."""
        tensors = tracing.named_tensors(self._model[0])
        weights = [_filters(tensors[layer.weight].detach(), layer.axis, len(layer.rows)) for layer in self.layers]
        return [weight.reshape(len(weight), -1).float() for weight in weights]

    def forward(self):
        """(scores (F,), the sum of those of the layers that have attention)."""
        with torch.autocast(self.value.device.type, enabled=False):
            projected = project_filters(self.rows(), self.projection, standardised=True)
            q, k = projected[:, : self.width], projected[:, self.width :]
            if self.attention == "additive":
                x = filter_attention(q, k, self.value, self.bias, offsets=self.offsets)
            else:
                x = self._dot(q, k)
            x = self.share(x).masked_fill(self.stays, math.inf if self.activation == "sigmoid" else 0.0)  # S = 1
            if self.activation == "sigmoid":
                scores, total = tempered_sigmoid(x, self.temperature, l1=True)
            else:
                scores, total = leaky_exponential(x, self.slope, l1=True)
        return self.share.spread(scores), total

    def _dot(self, q, k):
        parts = zip(q.split(self.heights), k.split(self.heights), self.value, self.bias, strict=True)
        return torch.cat([(a * v) @ b.mean(0) + bias for a, b, v, bias in parts])


def _filters(weight, axis, count):
    """`weight` with its filters along the first axis."""
    groups = count // weight.shape[axis]
    if groups > 1:  # of a grouped transposed convolution: (inputs, filters of one group, ...)
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.movedim(axis, 0)


class _Share:
    """The mean over each channel set, given to all of its filters: a projection, and so its own gradient.

    Args:
        sets: (F,) of all filters. filters: (F',) the numbers of those that have attention.
    """

    def __init__(self, sets, filters):
        self.filters, self.size = filters, len(sets)
        _, inverse = sets[filters].unique(return_inverse=True)
        self.order = inverse.argsort(stable=True)
        self.lengths = torch.bincount(inverse)
        self.place = self.order.argsort()
        self.alone = bool((self.lengths == 1).all())

    def __call__(self, x):
        return x if self.alone else _Mean.apply(x, *self._on(x.device))

    def spread(self, scores):
        """(F,) scores from (F',): 1 for the filters without attention."""
        return scores.new_ones(self.size).index_copy(0, self.filters.to(scores.device), scores)

    def _on(self, device):
        for name in ("filters", "order", "lengths", "place"):
            setattr(self, name, getattr(self, name).to(device))
        return self.order, self.lengths, self.place


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, lengths, place):
        ctx.save_for_backward(order, lengths, place)
        return _means(x, order, lengths, place)

    @staticmethod
    def backward(ctx, grad):
        return _means(grad, *ctx.saved_tensors), None, None, None


def _means(x, order, lengths, place):
    means = torch.segment_reduce(x[order], "mean", lengths=lengths)
    return means.repeat_interleave(lengths, output_size=len(x))[place]
