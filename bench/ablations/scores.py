"""Scores that filters are ranked by: one float a filter, (F,), whatever they are made of."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import paamops
from paamops import tracing


def attention(workshop, model, channels, seed):
    """Activation attention, the mean with p = 1, on one batch of training images (§3.1)."""
    return paamops.score(model, channels, workshop.batch(seed))


def l1_mean(model, channels):
    """The l1 norm divided by the filter's size, its input channels times its positions: ILP-Mean (§4.4)."""
    parameters = dict(model.named_parameters())
    sizes = [parameters[layer.weight].numel() // len(layer.rows) for layer in channels.layers]
    return paamops.weight_scores(model, channels, "l1") / torch.tensor(sizes)[channels.filters]


def in_shares(channels, found):
    """The place of each filter's score in its layer, 1 / n to 1: a threshold takes an equal share of every layer."""
    layers = found.split(channels.offsets.diff().tolist())
    return torch.cat([(layer.argsort(stable=True).argsort() + 1) / len(layer) for layer in layers])


def batch_first(model, channels, images, p):
    """mean_s |mean_n a|^p: the mean over the images before the power, as the authors' code has it."""
    return gather(channels, [a.mean(0).abs().pow(p).mean(1) for a in maps(model, channels, images)])


def image_first(model, channels, images, p):
    """mean_n mean_s |a|^p: what `paamops.score` computes, here from the maps themselves."""
    return gather(channels, [a.abs().pow(p).mean((0, 2)) for a in maps(model, channels, images)])


def gather(channels, found):
    """(F,) float32 from one vector for each of `channels.places`; where a filter is found at several, their mean."""
    flat = torch.cat(found)[channels.score_source] * channels.score_weight
    return flat.new_zeros(len(channels.sets)).index_add_(0, channels.score_filter, flat).float()


def maps(model, channels, images):
    """The activations that the trace found, (n, C, space) float64, in the order of `channels.places`."""
    catcher = _Catcher(channels.places)
    with tracing.evaluating(model), torch.no_grad(), catcher:
        model(images)
    return [catcher.found[number] for number in range(len(channels.places))]


class _Catcher(TorchDispatchMode):
    """Keeps the outputs of the ATen calls that are named by (op, how manieth call of it, channel dimension)."""

    def __init__(self, places):
        super().__init__()
        self.places = {(op, k): (number, dim) for number, (op, k, dim) in enumerate(places)}
        self.counts, self.found = {}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = str(op)
        k = self.counts.get(name, 0)
        self.counts[name] = k + 1
        if (name, k) in self.places:
            number, dim = self.places[name, k]
            channels = out.movedim(dim, 1)
            self.found[number] = channels.double().reshape(
                *channels.shape[:2], -1
            )  # a copy: what follows may be in place
        return out
