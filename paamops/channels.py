"""ChannelMap: the result of a trace. Arrays, never an object per channel."""

import itertools
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array

from paamops.labels import components
from paamops.ops.scatter_channels import renumbered


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, as it ran."""

    name: str  # of the module, or of the parameter where a function used it
    weight: str  # the name of its weight
    kind: str
    output_size: tuple  # of one example
    rows: torch.Tensor  # the labels of its filters, one per output channel
    axis: int  # of the weight, along which its filters lie


class Cost(NamedTuple):
    """Learned parameters, FLOPs of one example (2 · multiply-adds), bytes of all tensors, filters."""

    params: int
    flops: int
    bytes: int
    filters: int


class ChannelMap:
    """What can be removed from a network, with what, at which cost; made by `paamops.trace`.

    Attributes:
        layers: list of Layer, in the order in which they first ran. Layer l owns the filters offsets[l]:offsets[l + 1].
        offsets: (L + 1,) int64.
        filters: (F,) int64, the layer of every filter.
        sets: (F,) int64, the channel set of every filter: the filters of a set stay or go together.
        pinned: (S,) bool, the sets that must stay.
        reasons: list of S strings, why a pinned set is; empty for the others.
        constants: name of a convolution's or linear layer's weight that is a buffer -> its axis that issues channels.
        scales: names of the scales γ of batch norms, and of other norms over each channel apart, that the channels of
            layers pass through.
        unused: names of weights that the forward pass did not use; `pack` leaves them as they are.
        whole: names of weights that it used, but of which nothing can go: a weight that another is computed from, say.
        axes: name of a parameter or buffer -> for every axis None, or an int64 array with the set of each index (-1 for
            an index that no set covers): the whole instruction for packing.
        read_axes: name of a layer's weight -> its axes that read channels: where `mask` writes zeros.
        hosts: path of a module whose output `pack` adds into its residual stream by index -> the stream's width.
        scatters: name of the index of such a module, or of one that the model has already -> the name of its inverse,
            and this inverse as it is (C,) int64.
        blocks: (S,) int64. Sets of a block lie on the same axes equally often, so what a network costs depends on how
            many sets of each block it keeps, not on which.
    """

    def __init__(self, tracer, model, tensors, example_inputs, total, batch):
        self._model = weakref.ref(model)
        self.example_inputs = example_inputs
        parameters = {name for name, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter)}
        component, self.label_count = components(tracer.edges + tracer.weak, total), total
        # The axes' labels are counted through, in order: those of an axis are a stretch.
        ends = np.cumsum([0, *(v.size(0) for vs in tracer.vectors.values() for v in vs)]).tolist()
        stretches = iter([slice(a, b) for a, b in itertools.pairwise(ends)])
        stretches = {name: [next(stretches) for _ in vs] for name, vs in tracer.vectors.items()}
        self.components = {name: tuple(component[s] for s in axes) for name, axes in stretches.items()}

        self.layers = [layer for layer in tracer.layers.values() if layer.weight in parameters]
        self.constants = {each.weight: each.axis for each in tracer.layers.values() if each.weight not in parameters}
        if not self.layers:
            raise ValueError("model has nothing to prune: none of its layers has a weight that is a parameter")
        rows = [component[layer.rows.numpy()] for layer in self.layers]
        sizes = [len(row) for row in rows]
        self.offsets = torch.tensor(np.cumsum([0, *sizes]))
        self.filters = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        flat = np.concatenate(rows)
        found, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))  # sets are numbered as they first appear
        sets = order[inverse]
        self.sets = torch.from_numpy(sets)
        count = len(found)
        set_of = np.full(component.max() + 1 if len(component) else 1, -1)
        set_of[found] = order

        self._set_of = set_of
        self.scalars, self.calls = tracer.scalars, len(tracer.calls)
        self.scales = list(tracer.scales)
        self.cuts = [
            (*cut, None if labels is None else component[labels[labels >= 0].numpy()]) for *cut, labels in tracer.cuts
        ]
        self.unused = [name for name in parameters if name not in tracer.used and tensors[name].dim() > 1]
        self._pin(tracer.pins + tracer.weak_pins, component, set_of, count)
        self._lay_out(tensors, parameters, tracer.calls, stretches, set_of[component], count)
        self.batch, self.other_flops = batch, tracer.other_flops
        self._find_activations(tracer.calls, component, {str(op): n for op, n in tracer.counts.items()})
        self.depthwise = {layer.weight for layer in tracer.layers.values() if layer.kind.startswith("depthwise")}
        others = parameters - {layer.weight for layer in self.layers} - set(self.unused)
        matrices = [name for name in tensors if name in others and tensors[name].dim() > 1]
        self.whole = [name for name in matrices if all(ids is None for ids in self.axes[name])]
        self.read_axes = {
            name: [axis for axis in sorted(axes) if self.axes[name][axis] is not None]
            for name, axes in tracer.read_axes.items()
        }
        self.hosts = {}
        self.scatters = {
            name: (source, tensors[source].detach().cpu().clone()) for name, source in tracer.scatters.items()
        }

    def _pin(self, pins, component, set_of, count):
        reasons, pinned = np.full(count, "", object), np.zeros(count, bool)
        for labels, reason in reversed(pins):  # the first reason is the one that is told
            ids = set_of[component[labels]]
            ids = ids[ids >= 0]
            reasons[ids], pinned[ids] = reason, True
        sets, offsets = self.sets.numpy(), self.offsets.numpy()
        for layer, start, stop in zip(self.layers, offsets, offsets[1:], strict=False):
            only = sets[start:stop]
            if (only == only[:1]).all() and not pinned[only[:1]].any():
                reasons[only[:1]], pinned[only[:1]] = f"the only channel set of {layer.name}", True
        self.reasons, self.pinned = reasons.tolist(), torch.from_numpy(pinned)

    def _lay_out(self, tensors, parameters, calls, stretches, sets, count):
        """Axes, the incidence of sets on them, and the terms of the cost; `sets` of all labels, `stretches` of them."""
        self.axes, numbers, members = {}, {}, []
        slots, fixed = [], []
        names = list(tensors)
        covered = np.concatenate([[0], np.cumsum(sets >= 0)])
        for name in names:
            arrays, slot, size = [], [], 1
            for stretch in stretches[name]:
                ids = sets[stretch]
                if covered[stretch.start] == covered[stretch.stop]:
                    arrays.append(None)
                    size *= len(ids)
                    continue
                key = ids.tobytes()
                if key not in numbers:
                    numbers[key] = len(members)
                    members.append(ids)
                arrays.append(members[numbers[key]])  # axes with the same sets share one array
                slot.append(numbers[key])
            self.axes[name] = tuple(arrays)
            slots.append(slot)
            fixed.append(size)
        # Incidence (A, S + 1): how often a set lies on an axis; the last column counts the indices no set covers.
        axis = np.repeat(np.arange(len(members)), [len(ids) for ids in members])
        column = np.concatenate(members) if members else np.empty(0, np.int64)
        column = np.where(column < 0, count, column)
        incidence = csr_array((np.ones(len(axis), np.int64), (axis, column)), shape=(len(members), count + 1))
        incidence.sum_duplicates()
        self._incidence = incidence[:, :count].tocsr()
        self._uncovered = incidence[:, [count]].toarray().ravel()
        self.blocks = torch.from_numpy(_equal_columns(self._incidence))
        representative = np.unique(self.blocks.numpy(), return_index=True)[1]
        self._per_block = self._incidence[:, representative].tocsr()

        width = max((len(slot) for slot in slots), default=0)
        ones = len(members)  # an axis of constant size 1, to fill the table up
        self._slots = np.array([slot + [ones] * (width - len(slot)) for slot in slots], np.int64).reshape(-1, width)
        self._fixed = np.array(fixed, np.int64)
        self._is_parameter = np.array([name in parameters for name in names])
        self._itemsize = np.array([tensors[name].element_size() for name in names], np.int64)
        positions = dict.fromkeys(names, 0)
        for call in calls:
            positions[call["weight"]] += call["positions"]
        self._positions = np.array([positions[name] for name in names], np.int64)
        place = {name: number for number, name in enumerate(names)}
        self._weights = np.array([place[layer.weight] for layer in self.layers], np.int64)

    def _find_activations(self, calls, component, counts):
        """Where in the sequence of ATen ops the activation of each filter appears.

        `places`: (op, how manieth call of it, channel dimension) of every tensor to score; their channels lie one after
        the other in a flat buffer. Score of filter `score_filter[i]` += `score_weight[i]` · buffer[`score_source[i]`].
        """
        number = {layer.weight: k for k, layer in enumerate(self.layers)}
        uses = {}
        # A weight that is also used transposed has other filters there; its scores are those of its first use.
        axis = {layer.weight: layer.axis for layer in self.layers}
        calls = [call for call in calls if axis.get(call["weight"]) == call["axis"]]
        for call in calls:
            uses[call["weight"]] = uses.get(call["weight"], 0) + 1
        self.places, starts, sizes, size = [], {}, [], 0
        filters, sources, weights = [], [], []
        for call in calls:
            k = number[call["weight"]]
            rows = component[self.layers[k].rows.numpy()]
            place, channels, (row, source) = _activation(call["activations"], rows, component)
            if place not in starts:
                starts[place] = size
                self.places.append(place)
                sizes.append(len(channels))
                size += len(channels)
            share = 1.0 / (np.bincount(row, minlength=len(rows))[row] * uses[call["weight"]])
            filters.append(row + int(self.offsets[k]))
            sources.append(source + starts[place])
            weights.append(share)
        self.place_offsets = np.cumsum([0, *sizes])
        self.op_counts = {op: counts[op] for op, _, _ in self.places}
        self.score_filter = torch.from_numpy(np.concatenate(filters))
        self.score_source = torch.from_numpy(np.concatenate(sources))
        self.score_weight = torch.from_numpy(np.concatenate(weights))

    def pin(self, sets, reason):
        """These sets, (S,) bool, stay from now on; `reason` is told of those that were not pinned before."""
        for s in (sets & ~self.pinned).nonzero().flatten().tolist():
            self.reasons[s] = reason
        self.pinned |= sets

    @property
    def model(self):
        """The traced model, or None when it is gone."""
        return self._model()

    def cost(self, keep=None):
        """The exact cost of the network that `keep` leaves: parameters, FLOPs, bytes, filters.

        Args:
            keep: (S,) bool, or a Selection, or None for the whole network.
        """
        kept = self._kept(keep)
        sizes = (self._incidence @ kept + self._uncovered)[None]
        filters = int(kept[self.sets.numpy()].sum())
        params, flops, bytes = (int(column[0]) for column in self.costs(sizes))
        return Cost(params, flops, bytes - self._idle_bytes(kept.astype(bool)), filters)

    def _idle_bytes(self, kept):
        """Bytes of the indices that are left out, since every channel of the branch goes where it is."""
        idle, kept = 0, np.append(kept, True)
        for index, (source, places) in self.scatters.items():
            branch, stream = (
                np.flatnonzero(kept[self.axes[name][0]])
                if self.axes[name][0] is not None
                else np.arange(len(self.components[name][0]))
                for name in (index, source)
            )
            now = renumbered(places[torch.from_numpy(stream)], torch.from_numpy(branch))
            if len(now) == len(branch) and (now == torch.arange(len(now))).all():
                idle += 2 * 8 * len(now)
        return idle

    def layer_costs(self, keep=None):
        """What each layer's weight costs in the network that `keep` leaves: parameters (L,) and FLOPs (L,), float64."""
        sizes = (self._incidence @ self._kept(keep) + self._uncovered)[None]
        params = torch.from_numpy(self._numel(sizes)[0, self._weights].astype(np.float64))
        return params, 2 * params * torch.from_numpy(self._positions[self._weights] / self.batch)

    def _kept(self, keep):
        return np.ones(len(self.pinned), np.int64) if keep is None else self.check(keep).numpy().astype(np.int64)

    def _numel(self, sizes):
        """The elements of every tensor, (K, T)."""
        sizes = np.concatenate([sizes, np.ones((len(sizes), 1), np.int64)], axis=1)
        return self._fixed * sizes[:, self._slots].prod(axis=2)

    def costs(self, sizes):
        """Parameters, FLOPs and bytes, (K,) each, of K networks whose axes have these `sizes`, (K, A)."""
        numel = self._numel(sizes)
        params = numel[:, self._is_parameter].sum(axis=1)
        flops = (2 * (numel @ self._positions) + self.other_flops) // self.batch
        return params, flops, numel @ self._itemsize

    def axis_sizes(self, counts):
        """(K, A) sizes of the axes of K networks that keep `counts` (K, B) sets of each block."""
        return (self._per_block @ counts.T).T + self._uncovered

    def set_scores(self, scores):
        """(S,) float64: the mean score of the filters of each set."""
        sets = self.sets.numpy()
        total = np.bincount(sets, weights=scores.detach().cpu().double().numpy(), minlength=len(self.pinned))
        return torch.from_numpy(total / np.bincount(sets, minlength=len(self.pinned)))

    def _targets(self):
        """(P, 2) int64: a set of a branch that only residual sums read, and the set of its place in a stream, or -1."""
        if not self.scatters:
            return np.empty((0, 2), np.int64)
        read = [self.axes[name][axis] for name, axes in self.read_axes.items() for axis in axes]
        read = np.unique(np.concatenate(read)) if read else np.empty(0, np.int64)
        pairs = [np.empty((0, 2), np.int64)]
        for index, (source, places) in self.scatters.items():
            branch, stream, places = self.axes[index][0], self.axes[source][0], places.numpy()
            if branch is not None:
                used = np.flatnonzero(places >= 0)
                to = np.full(len(used), -1) if stream is None else stream[used]
                pairs.append(np.stack([branch[places[used]], to], axis=1))
        pairs = np.concatenate(pairs)
        return pairs[(pairs[:, 0] >= 0) & ~np.isin(pairs[:, 0], read)]

    def capped(self, set_scores):
        """(S,) float64: what only a residual sum reads counts at most as much as its place in the stream, if free."""
        pairs = self._targets()
        limit = np.full(len(set_scores), -np.inf)
        free = np.append(~self.pinned.numpy(), False)
        of_place = np.where(free, np.append(set_scores.numpy(), np.inf), np.inf)[pairs[:, 1]]
        np.maximum.at(limit, pairs[:, 0], of_place)
        limit[np.isneginf(limit)] = np.inf
        return torch.from_numpy(np.minimum(set_scores.numpy(), limit))

    def without_lost(self, keep, guarded):
        """`keep` less the sets, not `guarded`, of which every filter has lost its place in the stream."""
        pairs, kept = self._targets(), np.append(keep.numpy(), True)
        lost = np.zeros(len(keep), bool)
        lost[pairs[:, 0]] = True
        lost[pairs[kept[pairs[:, 1]], 0]] = False
        return keep & ~(torch.from_numpy(lost) & ~guarded)

    def guarded(self, set_scores):
        """(S,) bool: the pinned sets, and of every axis that could be emptied the set with the best score."""
        scores = set_scores.numpy()
        rank = np.empty(len(scores), np.int64)
        rank[np.lexsort((np.arange(len(scores)), -scores))] = np.arange(len(scores))
        at_rank = np.argsort(rank)
        guarded = self.pinned.numpy().copy()
        incidence = self._incidence
        lengths = np.diff(incidence.indptr)
        open_axes = (self._uncovered == 0) & (lengths > 0)
        starts = incidence.indptr[:-1][lengths > 0]
        best = np.minimum.reduceat(rank[incidence.indices], starts) if len(starts) else np.empty(0, np.int64)
        guarded[at_rank[best[open_axes[lengths > 0]]]] = True
        return torch.from_numpy(guarded)

    def check(self, keep):
        """`keep` as a bool tensor (S,) on the CPU that removes no pinned set and empties no layer, or a ValueError."""
        keep = getattr(keep, "keep", keep)
        if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool or keep.shape != self.pinned.shape:
            what = (
                f"{keep.dtype} of shape {tuple(keep.shape)}" if isinstance(keep, torch.Tensor) else type(keep).__name__
            )
            raise ValueError(f"keep is {what}; it must be a bool tensor of shape ({len(self.pinned)},) or a Selection")
        keep = keep.detach().cpu()
        removed = self.pinned & ~keep
        if removed.any():
            s = int(removed.nonzero()[0])
            raise ValueError(f"keep removes channel set {s}, which is pinned: {self.describe(s)}: {self.reasons[s]}")
        sizes = self._incidence @ keep.numpy().astype(np.int64) + self._uncovered
        if (sizes == 0).any():
            s = int(self._incidence[[int((sizes == 0).argmax())]].indices[0])
            raise ValueError(f"keep removes every channel of {self.describe(s)}; at least one must stay")
        return keep

    def describe(self, s):
        """The layers whose filters are in the set `s`."""
        names = [self.layers[k].name for k in self.filters[self.sets == s].unique().tolist()]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    def issued(self, components):
        """bool for every component: whether a layer with filters of its own writes it."""
        return self._set_of[components] >= 0

    def removable(self, components):
        """bool for every component: whether it is a channel set that is free to go."""
        free = np.append(~self.pinned.numpy(), False)  # the last for what is in no set
        return free[self._set_of[components]]

    def layer_of_component(self, component):
        """The names of the layers that issue a channel of this union-find component."""
        ids = [np.isin(component, self.components[layer.weight][layer.axis]) for layer in self.layers]
        return [layer.name for layer, inside in zip(self.layers, ids, strict=True) if inside]

    def explain(self):
        """A table of the layers, their filters and sets, and of everything that is pinned, with the reason."""
        whole = self.cost()
        free = int((~self.pinned).sum())
        lines = [
            f"{len(self.layers)} layers, {whole.filters:,} filters in {len(self.pinned):,} channel sets, {free:,} of"
            f" them free to go; {whole.params:,} parameters, {whole.flops:,} FLOPs an example",
            "",
        ]
        table = [("layer", "kind", "filters", "output", "sets", "free", "shares its sets with")]
        sets, pinned, offsets = self.sets, self.pinned, self.offsets.tolist()
        owners = [sets[a:b].unique() for a, b in itertools.pairwise(offsets)]
        member = torch.zeros(len(owners), len(pinned), dtype=torch.bool)
        for k, own in enumerate(owners):
            member[k, own] = True
        shared = (member.float() @ member.float().T) > 0
        for k, (layer, own) in enumerate(zip(self.layers, owners, strict=True)):
            others = [self.layers[j].name for j in shared[k].nonzero().flatten().tolist() if j != k]
            table.append(
                (
                    layer.name,
                    layer.kind,
                    str(offsets[k + 1] - offsets[k]),
                    "×".join(map(str, layer.output_size)),
                    str(len(own)),
                    str(int((~pinned[own]).sum())),
                    ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else ""),
                )
            )
        widths = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        refused = {}
        for s in self.pinned.nonzero().flatten().tolist():
            refused.setdefault((self.describe(s), self.reasons[s]), []).append(s)
        if self.scatters:
            hosts = ", ".join(name.removesuffix(".scatter.index") for name in self.scatters)
            lines += ["", f"residual branches with channels of their own, added into the stream by index: {hosts}"]
        if self.unused:
            lines += ["", "not used in this forward pass, so left as they are: " + ", ".join(self.unused)]
        if self.whole:
            lines += ["", "used, but nothing of them can go: " + ", ".join(self.whole)]
        if refused:
            lines += ["", "pinned:"]
            lines += [f"  {len(ids)} of {where}: {reason}" for (where, reason), ids in refused.items()]
        return "\n".join(lines)

    def __repr__(self):
        free = int((~self.pinned).sum())
        return f"ChannelMap({len(self.layers)} layers, {len(self.sets)} filters, {len(self.pinned)} sets, {free} free)"


def _activation(candidates, rows, component):
    """The last candidate that carries all filters `rows`: its place, its channels, and who is who."""
    for place, labels in reversed(candidates):  # the first of them is the layer's own output, which carries them all
        labels = labels.numpy()
        channels = np.where(labels < 0, -1, component[labels])
        pairs = _positions(rows, channels)
        if pairs is not None:
            return place, channels, pairs
    raise AssertionError("a layer's output does not carry its filters")


def _positions(rows, channels):
    """(row, position) pairs of the channels of a tensor that are the filters `rows`; None where one is not there."""
    if len(rows) == len(channels) and (rows == channels).all():
        return np.arange(len(rows)), np.arange(len(rows))
    order = np.argsort(channels, kind="stable")
    low = np.searchsorted(channels, rows, "left", order)
    high = np.searchsorted(channels, rows, "right", order)
    if (low == high).any():
        return None
    row = np.repeat(np.arange(len(rows)), high - low)
    within = np.arange(len(row)) - np.repeat(np.cumsum(high - low) - (high - low), high - low)
    return row, order[low[row] + within]


def _equal_columns(matrix):
    """A number for every column of a sparse matrix, equal for equal columns, in the order of first appearance."""
    if matrix.shape[0] == 0:
        return np.zeros(matrix.shape[1], np.int64)
    random = np.random.default_rng(0)  # two 62-bit linear hashes: equal columns collide, others do not
    hashes = [matrix.T @ random.integers(1, 2**62, matrix.shape[0]) for _ in range(2)]
    _, first, inverse = np.unique(hashes[0], return_index=True, return_inverse=True)
    if (hashes[1] != hashes[1][first][inverse]).any():  # the first alone has let others collide
        _, first, inverse = np.unique(np.stack(hashes, axis=1), axis=0, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse.ravel()]
