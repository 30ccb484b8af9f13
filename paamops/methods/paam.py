"""PAAM: pruning by active attention manipulation (Babaiee et al., 2022, arXiv 2210.11114)."""

import contextlib
import math
import numbers
import warnings

import numpy as np
import torch
from torch import nn

from paamops import tracing
from paamops.methods.gating import GATES, Gates
from paamops.methods.score_network import ACTIVATIONS, ATTENTIONS, ScoreNetwork
from paamops.packing import pack
from paamops.selection import absolute, select

# An automatic λ starts at 1; every few steps it is multiplied by (share of the budget that is open / AIM)^POWER. Below
# the budget, since the lowest of the high scores say little, and the highest of the low ones much.
EVERY, AIM, POWER = 5, 0.9, 0.1
TIED = 0.05  # the share of the channel sets that may have the very score of the threshold
FLOAT = torch.finfo(torch.float32)
OPEN = 0.5  # a filter with a higher score counts as kept when λ is adapted


class PAAM:
    """Learns a score for every filter while the network runs, and removes those below one global threshold.

        paam = paamops.PAAM(model, images, params=0.5)
        optimizer = torch.optim.SGD(paam.attention.parameters(), lr=0.1, momentum=0.9)
        for images, labels in loader:
            optimizer.zero_grad()
            with paam.scoring():
                loss = cross_entropy(model(images), labels) + paam.penalty()
            loss.backward()
            optimizer.step()
        small = paam.prune()  # then train it, without scores

    An attention network maps the filters' weights to scores (`ScoreNetwork`); within `scoring` they multiply the
    activations, A' = S ⊙ A; the loss is that of the task + λ · Σ S / F. The threshold is where the cumulative histogram
    of all scores meets one budget for the whole network. `run` does all of it, and the training.

    Learn scores on a trained network, in eval mode and with its filters fixed, unless you measure that another way is
    better for it: after a batch norm in train mode only the proportions of a layer's scores matter, so that λ pulls
    whole layers down that the task cannot hold up. (bench/ablations has both.)

    Args:
        model: nn.Module, trained or not.
        example_inputs: what `trace` takes.
        params, flops, filters: the budget, one of them: a float in (0, 1] is the share that stays, an int the number.
        penalty: λ ≥ 0, or None: found while the scores are learned. Every five steps it is multiplied by (c / 0.9)^0.1,
            c what the filters with scores above ½ cost as a share of the budget, so that the threshold comes to lie
            between high scores and low ones. (The paper does not give λ. Too low a λ leaves more filters at 1 than the
            budget holds, too high a one drives all scores to 0; in between lies a factor of a few, elsewhere for
            each network and budget: bench/ablations has the sweep.)
        width, attention, activation, slope, temperature: of the ScoreNetwork.
        gate: "free": the scores fold into batch norms and into the weights that read the activations. "explicit": they
            multiply the activations, for comparison.
        pinned: layers that stay whole, as for `trace`.
        seed: of the attention network's initial weights.

    Attributes:
        attention: the ScoreNetwork, an nn.Module. Its parameters are the caller's to optimise. Under several processes
            wrap it as the model is wrapped: paam.attention = DistributedDataParallel(paam.attention).
        channels: ChannelMap of the network.
        lambda_: the current λ.
        steps: the `scoring` blocks so far in which gradients were recorded. To checkpoint a loop of your own keep
            attention.state_dict(), lambda_ and steps, and set them again.

    Backward fills the gradients of the model's own parameters too. model.requires_grad_(False) saves that, but `prune`
    hands the flags on: small.requires_grad_(True) before it is trained. (`run` does both itself, and takes a model
    whose parameters require gradients.) The model's passes must lie within `scoring`: from a pass outside it nothing is
    learned, and the penalty alone drives the scores.

    Move the model to its device and dtype first: the attention network is made where the model's filters are.

    Within `scoring`, backward may also run after the block. The model may be compiled, under autocast, in channels_last
    or wrapped in DistributedDataParallel: give PAAM the bare module, and call what you like.

    TypeError, ValueError: an argument is not what it must be; the model has nothing to prune, or NaN or infinite
    filters; no network meets the budget.
    """

    def __init__(
        self,
        model,
        example_inputs,
        *,
        params=None,
        flops=None,
        filters=None,
        penalty=None,
        width=32,
        attention="additive",
        activation="leaky_exponential",
        slope=0.1,
        temperature=1.0,
        gate="free",
        pinned=(),
        seed=0,
    ):
        _check(model, penalty, width, attention, activation, slope, temperature, gate, seed)
        self.model, self.gate, self.seed = model, gate, int(seed)
        self.automatic, self.lambda_ = penalty is None, 1.0 if penalty is None else float(penalty)
        self.budget = {"params": params, "flops": flops, "filters": filters}
        self.budget = {name: value for name, value in self.budget.items() if value is not None}
        if len(self.budget) != 1:
            given = ", ".join(self.budget) or "none"
            raise ValueError(f"the budget is given as {given}; it must be exactly one of params, flops and filters")
        self.channels = tracing.trace(model, example_inputs, pinned)
        if self.channels.pinned.all():
            raise ValueError(f"model has nothing to prune: {'; '.join(dict.fromkeys(self.channels.reasons))}")
        _check_finite(model, self.channels)
        trial = torch.rand(len(self.channels.filters), generator=torch.Generator().manual_seed(0))
        pack(model, self.channels, select(self.channels, trial, **self.budget))  # refused before anything is learned
        whole = self.channels.cost()
        self._limits = {name: absolute(name, value, getattr(whole, name)) for name, value in self.budget.items()}
        self.attention = ScoreNetwork(
            model,
            self.channels,
            width,
            attention,
            activation,
            slope,
            temperature,
            torch.Generator().manual_seed(self.seed % 2**63),
        )
        self.gates = Gates(model, self.channels)
        # (S,) one filter of each channel set: all of a set have its score
        self.first = torch.from_numpy(np.unique(self.channels.sets.numpy(), return_index=True)[1])
        self._total, self.steps = None, 0

    @contextlib.contextmanager
    def scoring(self):
        """Within it the model's forward passes are multiplied by the scores, which are computed once, here.

        Yields the (F,) scores with their graph. With an automatic λ they are read back every few steps.
        """
        scores, self._total = self.attention()
        if torch.is_grad_enabled():
            self.steps += 1
            if self.automatic and self.steps % EVERY == 0:
                self.lambda_ *= (self._open_share(scores.detach()) / AIM) ** POWER
        on = self.gates.placed if self.gate == "free" else self.gates.explicit
        with on(self.model, scores[self.first.to(scores.device)]):
            yield scores

    def penalty(self):
        """λ · Σ S / F of the scores of the last `scoring`: add it to the loss. RuntimeError: there was none."""
        if self._total is None:
            raise RuntimeError("penalty() was called before `with paam.scoring():`; there are no scores yet")
        return self.lambda_ * self._total / len(self.channels.filters)

    def scores(self):
        """(F,) the scores of all filters now, in 0…1; those of pinned filters are 1.

        What is above 1 (the leaky part) is shown as 1; `keep` goes by the scores as they are.

        RuntimeError: none were learned yet. ValueError: they are not finite.
        """
        return self.learned().clamp(max=1)

    def keep(self):
        """The Selection of what stays: the highest scores within the budget, pinned filters, and each layer's best.

        Warns where the scores do not decide: the threshold is 1 or more, or many sets share the score at it.
        """
        return self._kept(stacklevel=3)

    def prune(self):
        """The packed network, without scores; the model is untouched."""
        return pack(self.model, self.channels, self._kept(stacklevel=3))

    def use(self, model):
        """Score another network of the same architecture from now on."""
        self.model = model
        getattr(self.attention, "module", self.attention).use(model)

    def run(self, **settings):
        """The whole alternation, from a network to a smaller one: see `paamops.methods.paam_run.run`."""
        from paamops.methods.paam_run import run  # which knows PAAM

        return run(self, **settings)

    def _kept(self, stacklevel):
        scores = self.learned()
        selection = select(self.channels, scores, **self.budget)
        tied = int((self.channels.set_scores(scores) == selection.threshold).sum())
        if selection.threshold >= 1:
            warnings.warn(
                f"the threshold is {selection.threshold:.3g}: more filters than the budget holds have scores of 1 or"
                " more, which say little about each other; learn longer, or with a higher λ",
                stacklevel=stacklevel,
            )
        elif tied > max(1, TIED * len(self.channels.pinned)):
            warnings.warn(
                f"{tied} of {len(self.channels.pinned)} channel sets have the same score, {selection.threshold:.3g},"
                " and it is the threshold: which of them stay is their order; learn with a lower λ or learning rate",
                stacklevel=stacklevel,
            )
        return selection

    @torch.no_grad()
    def learned(self):
        """(F,) the scores as they are, above 1 too: what `keep` goes by."""
        network = getattr(self.attention, "module", self.attention)  # of a DistributedDataParallel
        if not network.has_learned():
            raise RuntimeError(
                "no scores were learned yet: every filter's is its initial one. Optimise paam.attention.parameters() on"
                " losses computed within `with paam.scoring():` first"
            )
        scores, _ = network()
        if not scores.isfinite().all():
            _check_finite(self.model, self.channels)
            raise ValueError("the scores are not finite: the attention network has diverged; lower its learning rate")
        return scores

    def _open_share(self, scores):
        """What the filters with scores above OPEN cost, as a share of the budget."""
        means = self.channels.set_scores(scores.nan_to_num())
        cost = self.channels.cost(self.channels.guarded(means) | (means > OPEN))
        return max(getattr(cost, name) / limit for name, limit in self._limits.items())


def _check_finite(model, channels):
    tensors = tracing.named_tensors(model)
    for layer in channels.layers:
        if not tensors[layer.weight].isfinite().all():
            raise ValueError(
                f"model has NaN or infinite filters, in {layer.name}; scores are computed from the filters"
            )


def _check(model, penalty, width, attention, activation, slope, temperature, gate, seed):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if penalty is not None and not (_is_finite(penalty) and penalty >= 0):
        raise ValueError(f"penalty is {penalty!r}; λ must be a finite number of at least 0, or None")
    for name, value, least in (("width", width, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be an int of at least {least}")
    for name, value in (("slope", slope), ("temperature", temperature)):
        if not (_is_finite(value) and FLOAT.tiny <= value <= FLOAT.max):
            raise ValueError(f"{name} is {value!r}; it must be a finite number above 0, as a float32")
    for name, value, allowed in (
        ("attention", attention, ATTENTIONS),
        ("activation", activation, ACTIVATIONS),
        ("gate", gate, GATES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def _is_finite(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
