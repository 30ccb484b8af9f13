"""The networks of the rounds: what is left of a full-size model, as packed tensors, and back."""

import torch

from paamops.packing import kept_indices, mask, pack
from paamops.tracing import named_tensors


def tensors_of(model):
    """Name -> a copy of every parameter and buffer on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in named_tensors(model).items()}


def unpack(template, channels, keep, tensors, clear=True):
    """Write packed `tensors` into the full-size `template` where they came from; the rest of it becomes zero.

    What an earlier network left there would be read by nobody, but a NaN is not silenced by a zero.
    pack(template, channels, keep) then has exactly these tensors, and mask(template, channels, keep) computes what that
    computes. Without `clear` the rest stays as it is.
    """
    indices = kept_indices(channels, keep)
    with torch.no_grad():
        for name, full in named_tensors(template).items():
            values = tensors[name].to(full.device)
            if all(index is None for index in indices[name]):
                full.copy_(values)
                continue
            if clear:
                full.zero_()
            full[_grid(full, indices[name])] = values


def load(model, tensors):
    """Write `tensors` into the parameters and buffers of these names."""
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            if name in tensors:
                tensor.copy_(tensors[name])


def _grid(full, indices):
    """Index tensors, one per axis, that broadcast to the kept part of `full`."""
    grid = []
    for axis, index in enumerate(indices):
        index = torch.arange(full.shape[axis]) if index is None else index
        grid.append(index.to(full.device).reshape([-1 if at == axis else 1 for at in range(full.dim())]))
    return tuple(grid)


def packed(template, channels, keep, tensors):
    """The packed network that `keep` leaves, with the values of `tensors`."""
    unpack(template, channels, keep, tensors)
    return pack(template, channels, keep)


def masked(template, channels, keep, tensors):
    """Its full-size twin."""
    unpack(template, channels, keep, tensors)
    return mask(template, channels, keep)
