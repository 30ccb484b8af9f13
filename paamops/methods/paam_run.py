"""The alternation of PAAM: learn scores, remove by one threshold, retrain without scores, until the kept set stays."""

import copy
import numbers
import time
from dataclasses import dataclass

import torch
from torch import nn

from paamops.methods import calls, sharing
from paamops.methods.calls import evaluated
from paamops.methods.networks import load, packed, tensors_of, unpack
from paamops.methods.score_network import ScoreNetwork
from paamops.methods.state import State, described, digest
from paamops.packing import pack

STABLE = 0.01  # the share of the channel sets that may still change
SNAPSHOTS = 40  # of the scores, at most, of one learning


@dataclass(frozen=True)
class PAAMRound:
    """One round: scores learned, filters removed, the rest retrained.

    Attributes:
        number: from 1; 0 is the unpruned network.
        threshold: the highest score that was removed.
        penalty: λ at the end of the learning.
        changed: the share of the channel sets that are kept now and were not before, or the other way round.
        params, flops, filters: what is left.
        accuracy: what `evaluate` gave after the retraining. scored: with all filters, times their scores.
        seconds: what the round took.
    """

    number: int
    threshold: float
    penalty: float
    changed: float
    params: int
    flops: int
    filters: int
    accuracy: float
    scored: float
    seconds: float


@dataclass(frozen=True)
class PAAMResult:
    """What `PAAM.run` returns.

    Attributes:
        model: the packed network. dense: the unpruned one. Both in eval mode.
        stable: whether the kept set had stopped changing. message: what was reached and why the run ended.
        budget: what was asked for: {"params": 0.5}.
        history: tuple of PAAMRound. chosen: the number of the round whose network `model` is.
        channels: ChannelMap of the unpruned network. keep: (S,) bool, the channel sets that are left.
        scores: (F,) float32, of all filters in the chosen round. threshold: the highest score that was removed.
        learning: (T, F) the scores while they were learned in that round, evenly spaced, and `steps` (T,).
    """

    model: nn.Module
    dense: nn.Module
    stable: bool
    message: str
    budget: dict
    history: tuple
    chosen: int
    channels: object
    keep: torch.Tensor
    scores: torch.Tensor
    threshold: float
    learning: torch.Tensor
    steps: torch.Tensor

    def report(self, path, rows=None, command=None):
        """Write one self-contained HTML file: before and after, the scores and their threshold, widths, rounds.

        Args:
            path: the file; it is written whole or not at all.
            rows: lines (what, before, after, change) of the first table; default accuracy, parameters and FLOPs.
            command: the command that made it, to be shown.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from paamops import paam_reporting

        paam_reporting.write(self, path, rows, command)


class Scored(nn.Module):
    """A network whose forward pass is multiplied by its scores; its parameters are the network's and the attention's.

    With `frozen` the network stays in eval mode and its own parameters do not require gradients.
    """

    def __init__(self, paam, frozen):
        super().__init__()
        self.model, self.attention = paam.model, paam.attention
        self._paam, self.frozen = [paam], frozen
        self._learn = [parameter for parameter in self.model.parameters() if parameter.requires_grad and frozen]
        for parameter in self._learn:
            parameter.requires_grad_(False)
        self.snapshots, self.every = [], 1

    def forward(self, *args, **kwargs):
        paam = self._paam[0]
        with paam.scoring() as scores:
            if torch.is_grad_enabled():
                self._remember(paam.steps, scores)
            return self.model(*args, **kwargs)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def thaw(self):
        """Give the network's own parameters their gradients back."""
        for parameter in self._learn:
            parameter.requires_grad_(True)

    def _remember(self, step, scores):
        if step % self.every == 0:
            self.snapshots.append((step, scores.detach()))  # left on the device, which nothing waits for
        if len(self.snapshots) > SNAPSHOTS:
            self.snapshots, self.every = self.snapshots[1::2], 2 * self.every


def run(
    paam,
    *,
    train,
    evaluate,
    epochs,
    trained=False,
    frozen=True,
    learn=None,
    rewind=0.5,
    rounds=3,
    state=None,
    resume=False,
    context=None,
    say=None,
):
    """Learn scores, remove what falls below the threshold, retrain without scores; until the kept set is stable.

        result = paamops.PAAM(model, images, params=0.5).run(train=train, evaluate=evaluate, epochs=182)
        small = result.model

    Round after round: the attention network learns scores on the unpruned network, the cumulative histogram of all
    scores gives the threshold that meets the budget, what is left is packed and retrained without scores, and its
    filters go back to their places among those that were removed, which may return in the next round. The run ends when
    at most 1 % of the channel sets change, or after `rounds`. Of the rounds, which all meet the budget, the one with
    the best accuracy is the result.

    The paper says to repeat until convergence; what is repeated on, and these figures, are our choice.

    Args:
        paam: PAAM; its model is left untouched, its attention network has learned afterwards.
        train: train(model, epochs, start_epoch, penalty) trains `model` in place for `epochs` epochs of the schedule,
            from its epoch `start_epoch` on, with a fresh optimizer over model.parameters() and the loss of the task
            plus penalty() in each step. While scores are learned the model is a `Scored`; else penalty() is 0. Compile
            the `model` of a Scored, not all of it, which would be compiled anew in each step.
        evaluate: evaluate(model) returns the accuracy, the higher the better, on images that are neither trained on nor
            kept for the final test.
        epochs: E, the epochs of the whole schedule.
        trained: whether the model is trained; otherwise train(model, E, 0, penalty) comes first.
        frozen: whether filters and batch norms stay fixed while scores are learned. If not, they train on; with an
            untrained network that is the training of the filters, E epochs: one stage, from scratch.
        learn: the epochs of each learning; default 0.3 · E. With `frozen` they are the schedule's first. Beyond the end
            of the schedule `train` is given epochs from E on.
        rewind: retraining starts at epoch round(rewind · E), and so do learnings that train the filters of a trained
            network.
        rounds: the most rounds.
        state: a folder to keep the run in, written after each training. None: memory only.
        resume: go on with what `state` holds, or start afresh where it holds nothing. With a `train` that draws from
            the seeded generators only, the end is that of a run that was never cut. It takes a PAAM made as the first
            was: one whose `run` has ended has learned, and is told that its attention is another. `rounds` may differ.
        context: a dict for JSON that a resumed run must share, such as the settings of `train`.
        say: is given one line a round.

    Under several processes of `torch.distributed` all call it; kept sets, accuracies and weights are the first one's.

    Returns:
        PAAMResult

    TypeError, ValueError: an argument is not what it must be; `train` changed the network, `evaluate` returned no
    finite number; `state` holds a run and `resume` is not set, or one of another model or other settings.
    """
    _check(train, evaluate, epochs, 1 if learn is None else learn, rewind, rounds, say)
    learn = max(1, round(0.3 * epochs)) if learn is None else learn
    if not isinstance(paam.attention, ScoreNetwork):
        raise TypeError(
            f"paam.attention is a {type(paam.attention).__name__}; run takes it as it was made: wrap the Scored that"
            " train is given"
        )
    if resume and state is None:
        raise ValueError("resume is True, but state is None; it must be the folder of the run")
    settings = {
        **described(paam.model, weights=trained),
        "pinned sets": digest({"pinned": paam.channels.pinned}),
        "budget": paam.budget,
        "width": paam.attention.width,
        "seed": paam.seed,
        "penalty": None if paam.automatic else paam.lambda_,
        "scores": [paam.attention.attention, paam.attention.activation, paam.attention.slope, paam.gate],
        "attention": digest(dict(paam.attention.named_parameters())),
        "epochs": [epochs, learn, rewind],
        "trained": trained,
        "frozen": frozen,
        "context": context or {},
    }
    held = State(state, settings, PAAMRound)
    held.claim(resume)
    held.take_up(resume)
    alternation = _Alternation(paam, held, train, evaluate, epochs, learn, round(rewind * epochs), frozen, say)
    original, attention = paam.model, copy.deepcopy(paam.attention.state_dict())
    before = paam.lambda_, paam.steps
    try:
        paam.use(copy.deepcopy(original))
        return alternation.run(rounds, trained)
    except BaseException:  # as it was, so that the run can be resumed with it
        paam.attention.load_state_dict(attention)
        paam.lambda_, paam.steps = before
        raise
    finally:
        paam.use(original)


class _Alternation:
    def __init__(self, paam, state, train, evaluate, epochs, learn, start, frozen, say):
        self.paam, self.state, self.train, self.evaluate = paam, state, train, evaluate
        self.epochs, self.learn, self.start, self.frozen = epochs, learn, start, frozen
        self.say = say if say and sharing.leads() else lambda line: None
        self.everything = torch.ones(len(paam.channels.pinned), dtype=torch.bool)
        self.seconds = 0.0  # what training the unpruned network took

    def run(self, rounds, is_trained):
        state, paam = self.state, self.paam
        one_stage = not is_trained and not self.frozen
        if not one_stage:
            self._train_whole(is_trained)
            load(paam.model, state.networks["0"][1])
        for number in range(1, rounds + 1):
            begin = time.perf_counter()
            self._learn(number, from_scratch=one_stage and number == 1)
            if one_stage and number == 1:
                self._fold()
            keep = state.networks[f"learned-{number}"][0]
            changed = self._changed(number)
            if number > 1 and changed <= STABLE:
                return self._result(number - 1, stable=True)
            if number >= len(state.history):
                self._retrain(number, changed, begin)
            unpack(paam.model, paam.channels, keep, state.networks[str(number)][1], clear=False)
        return self._result(rounds, stable=False)

    def _train_whole(self, is_trained):
        state, paam = self.state, self.paam
        if "0" not in state.networks:
            begin = time.perf_counter()
            whole = copy.deepcopy(paam.model)
            tensors = tensors_of(whole) if is_trained else self._trained(whole, 0, self.epochs, 0)
            state.add(0, self.everything, tensors)
            state.write()
            self.seconds = time.perf_counter() - begin
        if not state.history:
            load(paam.model, state.networks["0"][1])
            self._add_start(evaluated(self.evaluate, paam.model, self._seed(0, 0), "round 0"))

    def _fold(self):
        """The unpruned network of one-stage training: with its scores folded in, what it computed with them."""
        state, paam = self.state, self.paam
        if not state.history:
            whole = copy.deepcopy(paam.model)
            with torch.no_grad():
                scores, _ = paam.attention()
                load(whole, paam.gates.tensors(whole, scores[paam.first.to(scores.device)]))
            state.add(0, self.everything, tensors_of(whole))
            self._add_start(state.facts["learned-1"]["scored"])

    def _add_start(self, accuracy):
        cost = self.paam.channels.cost()
        sizes = cost.params, cost.flops, cost.filters
        self.state.history = (PAAMRound(0, 0.0, 0.0, 0.0, *sizes, accuracy, accuracy, self.seconds),)
        self.state.write()
        self.say(f"round 0: unpruned; accuracy {accuracy:.4g} ({self.seconds:.0f} s)")

    def _learn(self, number, from_scratch):
        """Scores of all filters of the unpruned network, and what they keep."""
        state, paam = self.state, self.paam
        key = f"learned-{number}"
        scored = Scored(paam, self.frozen)
        if key in state.networks:
            load(scored, state.networks[key][1])
            paam.lambda_, paam.steps = state.facts[key]["penalty"], state.facts[key]["steps"]
        else:
            epochs = self.epochs if from_scratch else self.learn
            start = 0 if self.frozen or from_scratch else self.start
            tensors = self._trained(scored, number, epochs, start, paam.penalty, learning=True)
            if self.frozen:
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}
            accuracy = evaluated(self.evaluate, scored, self._seed(number, 1), f"round {number}")
            selection = sharing.agree(paam.keep())
            tensors["scores"] = sharing.agree(paam.learned().cpu())
            snapshots = [scores for _, scores in scored.snapshots]
            tensors["learning"] = torch.stack(snapshots).cpu() if snapshots else torch.empty(0, len(tensors["scores"]))
            tensors["steps"] = torch.tensor([step for step, _ in scored.snapshots], dtype=torch.int64)
            state.facts[key] = {
                "threshold": min(max(selection.threshold, -1e30), 1e30),  # JSON has no infinity
                "penalty": paam.lambda_,
                "steps": paam.steps,
                "scored": accuracy,
            }
            state.add(key, selection.keep, tensors)
            state.write()
        scored.thaw()

    def _changed(self, number):
        networks = self.state.networks
        before = networks[f"learned-{number - 1}"][0] if number > 1 else self.everything
        return float((networks[f"learned-{number}"][0] != before).float().mean())

    def _retrain(self, number, changed, begin):
        state, paam = self.state, self.paam
        keep, facts = state.networks[f"learned-{number}"][0], state.facts[f"learned-{number}"]
        small = pack(paam.model, paam.channels, keep)
        tensors = self._trained(small, number, self.epochs - self.start, self.start)
        accuracy = evaluated(self.evaluate, small, self._seed(number, 2), f"round {number}")
        cost, whole = paam.channels.cost(keep), paam.channels.cost()
        seconds = time.perf_counter() - begin
        sizes = cost.params, cost.flops, cost.filters
        entry = PAAMRound(
            number, facts["threshold"], facts["penalty"], changed, *sizes, accuracy, facts["scored"], seconds
        )
        state.add(number, keep, tensors)
        state.history = (*state.history, entry)
        state.write()
        self.say(
            f"round {number}: threshold {entry.threshold:.3g}, λ {entry.penalty:.3g}, {changed:.1%} of the channel sets"
            f" changed; {cost.params / whole.params:.1%} of the parameters, {cost.flops / whole.flops:.1%} of the"
            f" FLOPs; accuracy {accuracy:.4g} ({seconds:.0f} s)"
        )

    def _trained(self, model, number, epochs, start, penalty=None, learning=False):
        penalty = penalty or (lambda: 0.0)

        def train(model):
            if epochs:
                self.train(model, epochs, start, penalty)

        return calls.trained(train, model, self._seed(number, 3 + learning))

    def _seed(self, number, purpose):
        return self.paam.seed * 1_000_003 + 8 * number + purpose

    def _result(self, last, stable):
        state, paam = self.state, self.paam
        history = state.history[: last + 1]  # a resumed run may be told to stop earlier
        start, *rounds = history
        chosen = max(rounds, key=lambda entry: (entry.accuracy, entry.number))
        keep, tensors = state.networks[str(chosen.number)]
        learned = state.networks[f"learned-{chosen.number}"][1]
        model = packed(paam.model, paam.channels, keep, tensors)
        dense = packed(paam.model, paam.channels, *state.networks["0"])
        end = f"the kept set is stable after {last} round{'s' * (last != 1)}"
        if not stable:
            end = f"{last} of {last} rounds, the last of which changed {rounds[-1].changed:.1%} of the channel sets"
        return PAAMResult(
            model=model.eval(),
            dense=dense.eval(),
            stable=stable,
            message=(
                f"{1 - chosen.params / start.params:.1%} of the parameters and {1 - chosen.flops / start.flops:.1%} of"
                f" the FLOPs removed, accuracy {start.accuracy:.4g} before and {chosen.accuracy:.4g} after; {end}."
            ),
            budget=paam.budget,
            history=history,
            chosen=chosen.number,
            channels=paam.channels,
            keep=keep,
            scores=learned["scores"].float(),
            threshold=chosen.threshold,
            learning=learned["learning"].float(),
            steps=learned["steps"],
        )


def _check(train, evaluate, epochs, learn, rewind, rounds, say):
    for name, function in (("train", train), ("evaluate", evaluate)):
        if not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}; it must be a function")
    for name, value in (("epochs", epochs), ("learn", learn), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an int of at least 1")
    if isinstance(rewind, bool) or not isinstance(rewind, numbers.Real) or not 0 <= rewind <= 1:
        raise ValueError(f"rewind is {rewind!r}; it must be a share of the epochs, in [0, 1]")
    if say is not None and not callable(say):
        raise TypeError(f"say is a {type(say).__name__}; it must be a function")
