"""Labels: which channel every element of a tensor belongs to, carried along by the same ATen ops as the tensor.

A *field* is an int64 tensor of the shape of the tensor it describes, with stride 0 along every dimension along which
the label does not change, so that spatial sizes and the batch cost nothing. A label is the number of one index of one
axis of one parameter or buffer; FIXED marks what is no channel (a constant, the padding of a channel axis). An
activation carries one field, a parameter one for each of its axes.
"""

import functools
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FIXED = -1


@dataclass(frozen=True)
class Labels:
    """What is known of one tensor."""

    fields: tuple = ()
    parameter: str | None = None  # the name of the parameter or buffer that this tensor is, as it is stored
    axes: tuple = ()  # of such a parameter: the axis that each dimension is
    pending: tuple = ()  # pairs: a call of a layer whose filters it carries, and where these appeared last


class ByTensor:
    """A value for each of some tensors, by identity, for as long as the tensor lives."""

    def __init__(self):
        self.held = {}

    def __setitem__(self, tensor, value):
        key, held = id(tensor), self.held
        entry = held.get(key)
        reference = entry[0] if entry else weakref.ref(tensor, lambda _: held.pop(key, None))
        held[key] = reference, value

    def __contains__(self, tensor):
        return id(tensor) in self.held

    def __getitem__(self, tensor):
        return self.held[id(tensor)][1]

    def get(self, tensor, default):
        entry = self.held.get(id(tensor))
        return entry[1] if entry else default

    def pop(self, tensor, default):
        entry = self.held.pop(id(tensor), None)
        return entry[1] if entry else default


class OfParameter(Labels):
    """The labels of a parameter whose axis d has the labels `vectors[d]`.

    An axis of size 1 of several is there to be broadcast, and bears none. Most parameters are read by layers, which
    look at the vectors: the fields are made when they are asked for.
    """

    def __init__(self, name, vectors, shape):
        super().__init__(None, name, tuple(range(len(shape))))
        vars(self).update(vectors=vectors, shape=shape)
        del vars(self)["fields"]

    @functools.cached_property
    def fields(self):
        pairs = enumerate(zip(self.vectors, self.shape, strict=True))
        return tuple(on_vector(v, d, self.shape) for d, (v, size) in pairs if size > 1 or len(self.shape) == 1)


def varies(field, dim):
    return field.size(dim) > 1 and field.stride(dim) != 0


def varying(field):
    """The dimensions along which the label changes."""
    sizes = zip(field.shape, field.stride(), strict=True)
    return tuple([d for d, (size, stride) in enumerate(sizes) if size > 1 and stride != 0])


def row(field, dim):
    """The labels of a field that changes along `dim` alone."""
    return field.as_strided((field.size(dim),), (field.stride(dim),))


def core(field, keep=()):
    """The field with every dimension along which it does not change cut to size 1, but for those in `keep`."""
    shape, strides = field.shape, field.stride()
    cut = [
        1 if stride == 0 and size > 1 and d not in keep else size
        for d, (size, stride) in enumerate(zip(shape, strides, strict=True))
    ]
    return field.as_strided(cut, strides) if cut != list(shape) else field


def settle(field):
    """The same field with stride 0 wherever the label does not change, as every field must have it."""
    shape = field.shape
    for d in range(field.dim()):
        if varies(field, d) and torch.equal(core(field), core(field.narrow(d, 0, 1)).expand_as(core(field))):
            field = field.narrow(d, 0, 1)
    return field.expand(shape)


def on_vector(vector, dim, shape):
    """The field of `shape` whose label changes along `dim` alone, as `vector` says."""
    view = [1] * len(shape)
    view[dim] = -1
    return vector.reshape(view).expand(shape)


def resized(field, shape):
    """The field at another `shape` of as many dimensions; it may not change along those whose size differs."""
    for d, size in enumerate(shape):
        if field.size(d) != size:
            field = field.narrow(d, 0, 1)
    return field.expand(shape)


def ends(edges):
    """All labels on the one side of the edges, and on the other."""
    if not edges:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return torch.cat([edge[0] for edge in edges]).numpy(), torch.cat([edge[1] for edge in edges]).numpy()


def components(edges, total):
    """Union-find over the labels: for every label the number of its component."""
    a, b = ends(edges)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(total, total))
    return connected_components(graph, directed=False)[1].astype(np.int64)
