"""GlobalPru: one channel ranking for all images, elected by them and learned (Wang et al., 2023)."""

import dataclasses
import math
import numbers

import torch
from torch import distributed, nn

from paamops import excitation, tracing
from paamops.methods import sharing
from paamops.methods.agreement import agreement
from paamops.methods.hessian import hessian_trace
from paamops.methods.rates import mixed_rates
from paamops.ops.ranking_loss import ranking_loss
from paamops.ops.vote_ranking import elect, vote_ranking
from paamops.packing import pack
from paamops.selection import select

MODES = ("fixed", "mixed")
MIDDLE = 0.5  # the rate around which mixed rates spread where a budget takes the place of a rate
EPSILON = 1e-6  # a logit of a saliency this close to 0 or 1 is that of the bound


class GlobalPru:
    """Lets all images elect one ranking of each layer's channels, teaches it to the network, removes the lowest.

        gp = paamops.GlobalPru(model, images, rate=0.5)       # the model has excitations from now on
        train(model, penalty=gp.penalty)                      # warm-up: your loop, loss + gp.penalty() in each step
        gp.vote(batches)                                      # training images
        gp.elect()
        train(model, penalty=gp.penalty)                      # learn to rank: penalty() now holds the ranking loss
        small = gp.prune()                                    # then fine-tune it

    A squeeze-and-excitation behind each convolution gives every image i its saliencies π_l(x_i) ∈ (0, 1)^c. After a
    warm-up each image ranks the channels of each layer by them, and the elected ranking T_l is the one with the most
    votes. From then on the loss is (§3.1, eq. 8)

        task + α Σ_l ‖π_l‖₁ + β Σ_l Φ_l,   Φ_l = −Σ_{j ≤ (1−p)c} [π_T(j) − log Σ_{m ≥ j} exp π_T(m)],

    mean over the batch. What ranks lowest in T is removed for all images. The excitations stay in the network and are
    cut with it. `run` does all of it.

    The paper does not say how images agree (a plurality of whole rankings means nothing: there are c! of them). Here
    V[j, r] counts the images that place channel j at rank r, and T is the assignment of channels to ranks with the most
    votes; ties go to the mean rank. Layers whose channels stay or go together (a residual stream, a depthwise
    convolution) hold one election: their votes are added.

    Args:
        model: nn.Module, trained or not. It gets its excitations here, in place, unless it has them already (from
            `paamops.excite`, or loaded with them). Make optimizers afterwards.
        example_inputs: what `trace` takes.
        rate: p ∈ (0, 1), the share of each layer's channels that goes, of those that may. Or, in its place, a budget:
        params, flops: a float in (0, 1] is the share that stays, an int the number. The rate is then the lowest that
            meets it, found exactly.
        mode: "fixed": one rate for all layers. "mixed": a layer's rate follows its mean Hessian trace (`measure`).
        alpha, beta: α, β ≥ 0. The paper's are 1e-4 both. With that β the images do not come to agree in trainings of
            tens of epochs, with 1 they do (bench/ablations has the sweep).
        logits: rank by π's logits in Φ in place of π itself. The sigmoid bounds how far apart π can be, and with it how
            low Φ can be.
        layers: names of the convolutions that get an excitation; default all that can be pruned. Only those with one
            are pruned, and what goes with them.
        reduction: of the excitations: C // reduction hidden units, at least 4.
        pinned: layers that stay whole, as for `trace`. So do channels that something without an excitation writes to,
            such as a shortcut with constant weights: with a saliency of 0 in every layer they still carry that (the
            paper prunes "without changing the transfer of residual information", §4.2).
        seed: of the excitations' first weights.

    Attributes:
        channels: ChannelMap of the network with its excitations.
        excitations: list of Excitation, in the order of `layers`, the numbers of their convolutions in channels.layers.
        votes: for each excitation (C, C) int64, V of its election.
        rankings: after `elect`, for each (C,) int64: rankings[k][r] is the channel at rank r, 0 the most important.
        traces: after `measure`, (L,) float64, the mean Hessian trace of each convolution.

    TypeError, ValueError: an argument is not what it must be; the model has no convolution to prune; no network meets
    the budget.
    """

    def __init__(
        self,
        model,
        example_inputs,
        *,
        rate=None,
        params=None,
        flops=None,
        mode="fixed",
        alpha=1e-4,
        beta=1.0,
        logits=False,
        layers=None,
        reduction=16,
        pinned=(),
        seed=0,
    ):
        _check(model, rate, params, flops, mode, alpha, beta, logits, seed)
        self.model, self.mode = model, mode
        self.rate = None if rate is None else float(rate)
        self.alpha, self.beta, self.logits, self.seed = float(alpha), float(beta), logits, int(seed)
        self.budget = {name: value for name, value in {"params": params, "flops": flops}.items() if value is not None}
        self.budget = {n: int(v) if isinstance(v, numbers.Integral) else float(v) for n, v in self.budget.items()}
        made = not excitation.excitations(model)
        if made:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed % 2**63)
                excitation.excite(model, example_inputs, layers, reduction, pinned)
        elif layers is not None:
            raise ValueError("layers is given, but model has its excitations already; name them where you make them")
        try:
            self._trace(model, example_inputs, pinned)
            self.reset()
            trial = [torch.arange(each.expand.out_features) for each in self.excitations]
            selection = self._select(trial)
            if selection.keep.all():
                raise ValueError(f"rate is {self.rate}, which removes no channel: the widest layer has too few")
            pack(model, self.channels, selection)  # refused before anything is trained
        except BaseException:
            if made:
                excitation.remove(model)
            raise
        self._first = [_values(each) for each in self.excitations] if made else None

    def reset(self):
        """Forget votes, rankings and traces."""
        self.rankings, self.traces, self._tops, self._selection = None, None, None, None
        sizes = {key: len(sets) for key, sets in zip(self._districts, self.sets, strict=True)}
        self._votes = {key: torch.zeros(size, size, dtype=torch.int64) for key, size in sizes.items()}
        self._merged = False  # whether they are those of all processes
        self._forget()

    @property
    def votes(self):
        """For each excitation the (C, C) votes of its election; those of channels that are one are one tensor."""
        return [self._votes[key] for key in self._districts]

    def take_votes(self, votes):
        """These in place of the votes so far, one (C, C) for each excitation: of a run that goes on."""
        self._votes, self._merged = dict(zip(self._districts, votes, strict=True)), True

    def penalty(self):
        """α Σ_l ‖π_l‖₁ + β Σ_l Φ_l of the last forward pass, means over its images; without Φ before `elect`.

        RuntimeError: there was no forward pass yet, or none that recorded gradients: under no_grad, within reentrant
        checkpointing, in the replicas of a DataParallel.
        """
        saliencies = [each.saliency for each in self.excitations]
        if any(each is None for each in saliencies):
            raise RuntimeError("penalty() was called before a forward pass of the model; there are no saliencies yet")
        if torch.is_grad_enabled():
            for each, path in zip(self.excitations, self.paths, strict=True):
                if not each.saliency.requires_grad and any(p.requires_grad for p in each.parameters()):
                    raise RuntimeError(
                        f"penalty(): the last forward pass recorded no gradients for the excitation at {path!r}, so"
                        " nothing would be learned from it"
                    )
        total = self.alpha * sum(each.sum() / max(len(each), 1) for each in saliencies)
        if self.rankings is None or not self.beta:
            return total
        if self.logits:
            saliencies = [torch.logit(each, EPSILON) for each in saliencies]
        rankings = [each.to(s.device) for each, s in zip(self.rankings, saliencies, strict=True)]
        return total + self.beta * ranking_loss(saliencies, rankings, self._tops)

    def vote(self, inputs):
        """Every image ranks the channels of every layer; its votes are added to those before.

        The model runs in eval mode, without gradients. inputs: a tensor, a tuple of inputs, or an iterable of batches,
        as `paamops.score` takes them. (The paper lets all training images vote.)

        RuntimeError: the excitations have not been trained, so there is nothing to vote by; or the ranking stands.
        ValueError: no images; a saliency is NaN (on a GPU, where nothing waits for the votes, `elect` says so). No vote
        is then counted.
        """
        if self.rankings is not None:
            raise RuntimeError("vote() was called after elect(); a ranking stands for good, unless reset() forgets it")
        if self._first and any(map(_same, self._first, self.excitations)):
            raise RuntimeError(
                "vote() was called before warm-up: excitations still have their first, random weights. Train the model"
                " first"
            )
        added = {key: votes.clone() for key, votes in self._votes.items()}
        for saliencies in self.saliencies(inputs):
            for key, each in zip(self._districts, saliencies, strict=True):
                added[key] = vote_ranking(each, added[key].to(each.device))
        self._votes = added

    def saliencies(self, inputs):
        """For each batch the (N, C) saliencies of all excitations, in eval mode and without gradients; a generator."""
        batches, images = [inputs] if isinstance(inputs, (torch.Tensor, tuple, dict)) else inputs, 0
        for batch in batches:
            args, kwargs = tracing.arguments(batch)
            with tracing.evaluating(self.model), torch.no_grad():
                self.model(*args, **kwargs)
            found = [each.saliency for each in self.excitations]
            self._forget()  # they are no training step's
            images += len(found[0])
            yield found
        if not images:
            raise ValueError("inputs holds no images; it must hold at least one")

    def measure(self, loss, batches, samples=8, seed=0):
        """Mean Hessian trace of each convolution, by Hutchinson; what mixed rates go by. The (L,) traces.

        loss(model, batch) -> scalar, the task's. See `paamops.methods.hessian.hessian_trace`.
        """
        names = [self.channels.layers[number].weight for number in self.layers]
        with excitation.differentiable_twice():
            found = hessian_trace(self.model, loss, batches, names, samples=samples, seed=seed)
        self.traces = sharing.agree(found.trace)
        return self.traces

    def elect(self, method="assignment"):
        """Elect the rankings: `rankings`, one for each excitation. They stand from now on.

        method: "assignment", or "borda" (by mean rank, for comparison). Under several processes of `torch.distributed`
        the votes of all count.

        RuntimeError: nobody has voted; mode is "mixed" and nothing was measured.
        """
        self._check_measured()
        if sharing.several() and not self._merged:
            for votes in self._votes.values():
                distributed.all_reduce(votes)
            self._merged = True
        if any(not votes.any() for votes in self._votes.values()):
            raise RuntimeError("elect() was called before vote(): no image has voted")
        found = {key: elect(votes, method) for key, votes in self._votes.items()}
        return self.use([found[key] for key in self._districts])

    def use(self, rankings):
        """Take these rankings, one for each excitation, in place of an election. The ones that stand afterwards.

        Where channels of several layers are one, all of them go by the mean of their relative ranks. Channels that stay
        in any case come first.

        ValueError: not one permutation for each excitation. RuntimeError: "mixed", and nothing was measured.
        """
        self._check_measured()
        rankings = [torch.as_tensor(each).cpu() for each in rankings]
        sizes = [each.expand.out_features for each in self.excitations]
        if len(rankings) != len(sizes):
            raise ValueError(
                f"rankings holds {len(rankings)}; it must hold one for each of the {len(sizes)} excitations"
            )
        for number, (ranking, size) in enumerate(zip(rankings, sizes, strict=True)):
            if ranking.dtype != torch.int64 or not torch.equal(ranking.sort().values, torch.arange(size)):
                raise ValueError(f"rankings[{number}] must be an int64 permutation of 0 … {size - 1}")
        rankings = self._shared(rankings)
        selection = self._select(rankings)
        stays = [selection.keep[sets] for sets in self.sets]
        # Φ is of the first places: what stays whatever its rank must be among them.
        rankings = [r[(~stay[r]).sort(stable=True).indices] for r, stay in zip(rankings, stays, strict=True)]
        self.rankings, self._selection, self._tops = rankings, selection, [int(stay.sum()) for stay in stays]
        return self.rankings

    def scores(self):
        """(F,) of every filter 1 − (rank + ½) / c, its rank among the c channels of its layer that may go; else 1.

        Less, with mixed rates, what its layer's rate is above the mean. RuntimeError: nothing was elected.
        """
        self._check_elected("scores")
        return self._scores(self.rankings)

    def keep(self):
        """The Selection of what stays: the highest ranks, pinned channels, and each layer's best.

        Of the c channels of a layer that may go those with 1 − (rank + ½) / c > p stay: (1 − p) · c, rounded to the
        nearest. RuntimeError: nothing was elected.
        """
        self._check_elected("keep")
        return self._selection

    def prune(self):
        """The packed network, its excitations cut along; the model is untouched. RuntimeError: nothing was elected."""
        return pack(self.model, self.channels, self.keep())

    def rates(self):
        """(L,) the pruning rate of each convolution in `layers`: what share of it goes."""
        self._check_elected("rates")
        kept = torch.tensor(self._tops, dtype=torch.float64)
        return 1 - kept / torch.tensor([len(sets) for sets in self.sets], dtype=torch.float64)

    def agreement(self, inputs):
        """How far the images agree with the elected rankings: Kendall's τ (L,) and overlap (L,), means over images.

        See `paamops.methods.agreement.agreement`. RuntimeError: nothing was elected.
        """
        self._check_elected("agreement")
        total, images = 0, 0
        for saliencies in self.saliencies(inputs):
            found = [agreement(s, r, t) for s, r, t in zip(saliencies, self.rankings, self._tops, strict=True)]
            count = len(saliencies[0])
            total, images = total + count * torch.tensor(found, dtype=torch.float64), images + count
        return tuple((total / images).T)

    def run(self, **settings):
        """Warm-up, election, learning to rank, removal, fine-tuning: see `paamops.methods.globalpru_run.run`."""
        from paamops.methods.globalpru_run import run  # which knows GlobalPru

        return run(self, **settings)

    def attach(self, model):
        """Go on with another network of the same architecture, its excitations at the same places."""
        places = excitation.excitations(model)
        self.model, self.excitations = model, [places[path] for path in self.paths]

    def _trace(self, model, example_inputs, pinned):
        """The ChannelMap, and which channel set each channel of each excitation belongs to."""
        self.channels = channels = tracing.trace(model, example_inputs, pinned)
        numbers = {layer.name: number for number, layer in enumerate(channels.layers)}
        places = excitation.excitations(model)
        last = {path: numbers.get(f"{path}.excitation.expand" if path else "excitation.expand") for path in places}
        missing = [path for path, number in last.items() if number is None]
        if missing:
            raise ValueError(f"model has an excitation at {missing[0]!r} that does not run on example_inputs")
        order = sorted(last, key=last.get)
        self.paths, self.excitations = order, [places[path] for path in order]
        self.sets = [self._rows(last[path]) for path in order]
        self.layers = []
        for path, sets in zip(order, self.sets, strict=True):
            self.layers.append(self._convolution(last[path], sets, path))
        ranked = torch.zeros(len(channels.pinned), dtype=torch.bool)
        ranked[torch.cat(self.sets)] = True
        channels.pin(~ranked, "no excitation ranks it")
        channels.pin(self._unscaled(last.values()), "something that no excitation scales writes to it")
        self._districts = [sets.numpy().tobytes() for sets in self.sets]

    def _unscaled(self, expands):
        """(S,) bool: the sets that a layer without an excitation writes to, or a convolution with constant weights.

        A saliency of 0 in every layer that has one would leave that contribution.
        """
        channels = self.channels
        scaled = {channels.layers[number].weight for number in (*self.layers, *expands)}
        found = torch.zeros(len(channels.pinned), dtype=torch.bool)
        for number, layer in enumerate(channels.layers):
            if layer.weight not in scaled:
                found[self._rows(number)] = True
        for name, axis in channels.constants.items():
            if channels.axes[name][axis] is not None:
                ids = torch.from_numpy(channels.axes[name][axis])
                found[ids[ids >= 0]] = True
        return found

    def _rows(self, number):
        return self.channels.sets[self.channels.offsets[number] : self.channels.offsets[number + 1]]

    def _convolution(self, expand, sets, path):
        """The number of the layer that the excitation scales: the last one before it with its channels."""
        for number in range(expand - 1, -1, -1):
            layer = self.channels.layers[number]
            if "convolution" in layer.kind and number not in self.layers and torch.equal(self._rows(number), sets):
                return number
        raise ValueError(f"model has an excitation at {path!r}, but no convolution of that many channels before it")

    def _shared(self, rankings):
        """Rankings in which channels that are one stand in the same order in every layer."""
        positions = self._positions(rankings)
        shared = []
        for ranking, sets in zip(rankings, self.sets, strict=True):
            order = (-positions[sets][ranking]).sort(stable=True).indices
            shared.append(ranking[order])
        return shared

    def _positions(self, rankings):
        """(S,) float64: 1 − (rank + ½) / c among the sets that may go, the mean over the layers; 1 for the others."""
        total, count = torch.zeros(2, len(self.channels.pinned), dtype=torch.float64)
        for ranking, sets in zip(rankings, self.sets, strict=True):
            free = sets[ranking][~self.channels.pinned[sets[ranking]]]
            total.index_add_(0, free, 1 - (torch.arange(len(free), dtype=torch.float64) + 0.5) / max(len(free), 1))
            count.index_add_(0, free, torch.ones(len(free), dtype=torch.float64))
        return torch.where(count > 0, total / count.clamp(min=1), 1)

    def _deviations(self):
        """(S,) float64: by how much the rate of a set's layers differs from the rate of all."""
        total, count = torch.zeros(2, len(self.channels.pinned), dtype=torch.float64)
        if self.mode == "mixed" and self.traces is not None:
            rate = MIDDLE if self.rate is None else self.rate
            for sets, deviation in zip(self.sets, mixed_rates(rate, self.traces) - rate, strict=True):
                total.index_add_(0, sets, deviation.expand(len(sets)))
                count.index_add_(0, sets, torch.ones(len(sets), dtype=torch.float64))
        return total / count.clamp(min=1)

    def _scores(self, rankings):
        return (self._positions(rankings) - self._deviations())[self.channels.sets]

    def _select(self, rankings):
        asked = self.budget or {"threshold": self.rate}
        selection = select(self.channels, self._scores(rankings), **asked)
        if self.budget:
            return selection
        return dataclasses.replace(selection, asked={"rate": self.rate})

    def _forget(self):
        for each in self.excitations:
            each.saliency = None

    def _check_measured(self):
        if self.mode == "mixed" and self.traces is None:
            raise RuntimeError("mixed rates follow Hessian traces: call measure(loss, batches) before the election")

    def _check_elected(self, what):
        if self.rankings is None:
            raise RuntimeError(f"{what}() was called before elect(); there is no ranking yet")


def _values(module):
    return [parameter.detach().cpu().clone() for parameter in module.parameters()]


def _same(before, module):
    return all(torch.equal(a, b.detach().cpu()) for a, b in zip(before, module.parameters(), strict=True))


def _check(model, rate, params, flops, mode, alpha, beta, logits, seed):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    given = [name for name, value in (("rate", rate), ("params", params), ("flops", flops)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"given are {', '.join(given) or 'none'} of rate, params and flops; it must be exactly one")
    if rate is not None and not (_is_number(rate) and 0 < rate < 1):
        raise ValueError(f"rate is {rate!r}; it must be a number in (0, 1), the share of the channels that goes")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(map(repr, MODES))}")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (_is_number(value) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be an int of at least 0")
    if not isinstance(logits, bool):
        raise TypeError(f"logits is {logits!r}; it must be True or False")


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
