"""score: activation attention of every filter, while the network runs."""

import torch
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

from paamops import tracing
from paamops.ops.activation_attention import REDUCTIONS, activation_attention
from paamops.ops.relu_attention import relu_attention
from paamops.wrapping import eager, unwrapped


class ActivationAttention:
    """Accumulates the activation attention of all filters over any number of forward passes.

        with paamops.ActivationAttention(channels) as attention:
            for images, _ in loader:
                model(images)
        scores = attention.scores()

    score[f] = mean over images of R_space |a_f|^p, R the mean, max or sum, a_f the activation that belongs to filter f:
    the output of the last pointwise op that carries it before a layer reads it, whether a module or a function computes
    it (AAP §3.1). Where a layer is used several times, the mean over its uses. Everything stays on the device, in one
    flat float64 buffer; nothing is read back until `scores` is. A ReLU and its attention are one pass.

    Args:
        channels: ChannelMap of the network.
        model: the network to watch, of the traced architecture; default the traced one.
        p: exponent, ≥ 1. reduction: "mean", "max" or "sum".

    Raises:
        RuntimeError: a forward pass took another path than the traced one, so that an activation is not found, or
            `scores` is called before any images were seen.
        ValueError: the model is gone, p or reduction is out of range.
    """

    def __init__(self, channels, model=None, p=1, reduction="mean"):
        self.channels = channels
        self.model = channels.model if model is None else model
        if self.model is None:
            raise ValueError("model is gone: the traced network was deleted; pass model=")
        self.model = unwrapped(self.model)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; it must be one of {REDUCTIONS}")
        activation_attention(torch.zeros(1, 1), p)  # refuses a bad p before the first batch
        self.p, self.reduction = p, reduction
        # Σ over images, of the channels of all places
        device = next(self.model.parameters()).device
        self.total = torch.zeros(int(channels.place_offsets[-1]), dtype=torch.float64, device=device)
        self.images = 0

    def __enter__(self):
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        self._mode = None
        return self

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        if self._mode is not None:  # interrupted inside a forward pass
            self._mode.__exit__(*error)

    def _begin(self, model, args, kwargs):
        self._batch = next((t.size(0) for t in tracing.leaves((args, kwargs)) if t.dim() > 0), 1)
        self._mode = _Listener(self)
        self._mode.__enter__()

    def _end(self, model, args, output):
        mode, self._mode = self._mode, None
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if output is None:  # the forward pass failed: its own error is what counts
            return
        for op, count in mode.counts.items():
            if count != self.channels.op_counts[op]:
                raise RuntimeError(
                    f"the forward pass took another path than the traced one: {op} ran {count} times, in the trace"
                    f" {self.channels.op_counts[op]} times. Where dropout or a norm does that, score in eval mode"
                )
        if not self._batch:
            return
        flat = torch.cat([mode.found[place] for place in range(len(self.channels.places))]) * self._batch
        self.total = self.total.to(flat.device) + flat
        self.images += self._batch

    def merge(self, group=None):
        """Sum what all processes of a group have seen: one all-reduce. Every process then has the same scores."""
        packed = torch.cat([self.total, self.total.new_tensor([self.images])])
        torch.distributed.all_reduce(packed, group=group)
        self.total, self.images = packed[:-1], packed[-1]

    def scores(self):
        """(F,) float32 on the device of the activations."""
        if not self.images:
            raise RuntimeError("no images were seen: run the model inside the `with` block first")
        channels, total = self.channels, self.total.cpu()  # a GPU adds in no fixed order
        found = total[channels.score_source] / float(self.images) * channels.score_weight
        result = found.new_zeros(len(channels.sets)).index_add_(0, channels.score_filter, found)
        return result.float().to(self.total.device)


class _Listener(TorchDispatchMode):
    """Takes the attention of the activations as they appear in the sequence of ATen ops."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.found = attention, {}
        self.places = {}
        for number, (op, k, dim) in enumerate(attention.channels.places):
            self.places.setdefault(op, {})[k] = (number, dim)
        self.counts = dict.fromkeys(self.places, 0)
        self.unfused = []  # attention runs in the ops that were traced; the mode is entered again inside some ops

    def __enter__(self):
        self.unfused.append(tracing.unfused())
        self.unfused[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.unfused.pop().__exit__(None, None, None)
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in tracing.IN_ATEN:
            with self:
                return tracing.IN_ATEN[op](*args, **(kwargs or {}))
        name = str(op)
        if name not in self.places:
            return op(*args, **(kwargs or {}))
        place = self.places[name].get(self.counts[name])
        self.counts[name] += 1
        if place is None:
            return op(*args, **(kwargs or {}))
        number, dim = place
        settings = {"p": self.attention.p, "reduction": self.attention.reduction, "per_image": True}
        fused = op is torch.ops.aten.relu.default and dim == 1
        out = op(*args, **(kwargs or {})) if not fused else args[0]
        activation = out[0] if isinstance(out, (tuple, list)) else out
        offsets = self.attention.channels.place_offsets
        expected = offsets[number + 1] - offsets[number]
        if activation.dim() <= dim or activation.size(dim) != expected:
            raise RuntimeError(
                f"the forward pass took another path than the traced one: {name} gives {tuple(activation.shape)}, but"
                f" {expected} channels are expected along dimension {dim}"
            )
        if fused:
            out, attention = relu_attention(args[0], **settings)
        else:
            attention = activation_attention(activation.detach().movedim(dim, 1), **settings)
        # The mean over what the activation holds of each image: of a sequence that was flattened, over its tokens.
        self.found[number] = attention.double().mean(0)
        return out


@torch.inference_mode(False)
def score(model, channels, inputs, p=1, reduction="mean"):
    """Activation attention of every filter on a batch, or over batches (AAP §3.1).

    The model runs in eval mode without gradients and is left as it was. See `ActivationAttention` for the formula.

    Args:
        model: the traced network, or one of the same architecture.
        channels: ChannelMap of the network.
        inputs: a tensor, a tuple of inputs of one forward pass, or an iterable of batches, each of them one of those.
        p: exponent, ≥ 1. reduction: "mean", "max" or "sum" over space.

    Returns:
        (F,) float32, one score per filter.

    Raises:
        ValueError: no images; p < 1, an unknown reduction.
        RuntimeError: the forward pass takes another path than the traced one.
    """
    if isinstance(inputs, torch.Tensor) and inputs.dim() and not len(inputs):
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}; it must hold at least one image")
    batches = [inputs] if isinstance(inputs, (torch.Tensor, tuple, dict)) else inputs
    model = unwrapped(model)
    with tracing.evaluating(model), torch.no_grad(), ActivationAttention(channels, model, p, reduction) as attention:
        for batch in batches:
            args, kwargs = tracing.arguments(batch)
            with eager():
                model(*args, **kwargs)
    if not attention.images:
        raise ValueError("inputs holds no images; it must hold at least one")
    return attention.scores()
