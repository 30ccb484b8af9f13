"""AAP: automatic attention pruning (Zhao, Jain and Zhao, AISTATS 2023), from a target to a small network."""

import copy
import math
import numbers
import time
import warnings
from dataclasses import asdict, replace

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from paamops import progress, tracing
from paamops.methods import policy, sharing
from paamops.methods.calls import evaluated, trained
from paamops.methods.networks import masked, packed, tensors_of, unpack
from paamops.methods.objective import Objective
from paamops.methods.result import Result, Round
from paamops.methods.state import State, described, digest
from paamops.methods.thresholds import Thresholds
from paamops.ops.activation_attention import REDUCTIONS, activation_attention
from paamops.packing import PackingError, pack
from paamops.scoring import score
from paamops.selection import select

# Where λ is found from the scores: a round that removes less than this share of the size that is left is not trained,
# until the first roll-back and after it. Twenty rounds of the first kind leave one percent.
STRIDE, LEAST = 0.2, 0.05


class AAP:
    """Prunes a network round by round until an objective is met (AAP, Algorithm 1).

        result = paamops.AAP(
            model, images, train=train, evaluate=evaluate, objective=Objective(max_accuracy_drop=0.01), epochs=182
        ).run()
        small = result.model

    Trains the network, unless it is trained already; then, round after round: scores every filter by its activation
    attention, removes those at or below T·w_l, packs what is left, rewinds, retrains, evaluates, and keeps the round or
    goes back to an earlier one. T adapts by itself (`paamops.methods.policy`).

    Args:
        model: nn.Module; it is left untouched.
        example_inputs: one batch of training images, a tensor or a tuple of inputs, on the model's device. The network
            is traced with it and every round is scored on it (§3.1: one batch of random training images).
        train: train(model, epochs, start_epoch) trains `model` in place for `epochs` epochs of the schedule, from its
            epoch `start_epoch` (counted from 0) on, with a fresh optimizer. It is given a smaller network each round,
            in train mode all through.
        evaluate: evaluate(model) returns the accuracy, a number, the higher the better. Use images that are neither
            trained on nor kept for the final test: every round is accepted or rejected by it.
        objective: Objective.
        epochs: E, the epochs of the whole schedule.
        trained: whether `model` is trained; otherwise train(model, E, 0) comes first.
        rewind: the share of the schedule that each round goes back to: it retrains from epoch k = round(rewind · E) on.
            0.75 by default (A.2.1: 75 to 90 % is best).
        rewind_weights: whether the filters that are left also get the weights of epoch k back (the paper's line 9,
            "optional"). Default: they keep theirs and only the learning rate is rewound, as in the authors' code. The
            first training is then train(model, k, 0) and train(model, E − k, k), so that W_k can be kept.
        p, reduction: of the activation attention (§3.1).
        step: λ[1]. None: the smallest that removes 20 % of the size, since w_l makes the scale of T depend on the
            network; rounds that remove less than 20 % of what is left are then skipped, less than 5 % after the first
            roll-back. The paper has 0.01, its code 1.0: with a λ that is given, only rounds that remove nothing are.
        pinned: layers that stay whole, as for `trace`.
        state: a folder to keep the run in, written after each round. None: memory only.
        resume: go on with what `state` holds, or start afresh where it holds nothing. With the same batch in
            `example_inputs`, and a `train` that draws from the seeded generators only, the end is that of a run that
            was never cut.
        context: a dict for JSON that a resumed run must share, such as the settings of `train`.
        rounds: stop after so many trained rounds; the best network so far is the result. None: until the end.
        seed: the random generators of Python, NumPy and torch are seeded from it before each training and evaluation.
        say: is given one line a round.
        quiet: no progress bar.

    A round that is skipped is not trained and counts as one without change. A round that goes beyond the limits on size
    by more than 0.1 % (Algorithms 3 and 4), or removes what was rolled back before, is known before it is trained and
    rolled back at once. Under several processes of `torch.distributed` all call `run`; scores, accuracies and weights
    are the first one's.

    TypeError, ValueError: an argument is not what it must be; the model has nothing to prune; `state` holds a run and
    `resume` is not set, or one of another model or other settings.
    """

    def __init__(
        self,
        model,
        example_inputs,
        *,
        train,
        evaluate,
        objective,
        epochs,
        trained=False,
        rewind=0.75,
        rewind_weights=False,
        p=1,
        reduction="mean",
        step=None,
        pinned=(),
        state=None,
        resume=False,
        context=None,
        rounds=None,
        seed=0,
        say=None,
        quiet=False,
    ):
        _check(model, train, evaluate, objective, epochs, rewind, p, reduction, step, rounds, seed, say)
        if rewind_weights and trained:
            raise ValueError("rewind_weights needs the weights of an early epoch: trained must be False")
        if resume and state is None:
            raise ValueError("resume is True, but state is None; it must be the folder of the run")
        self.train, self.evaluate, self.objective = train, evaluate, objective
        self.epochs, self.start = int(epochs), round(rewind * epochs)
        if self.start >= epochs:
            raise ValueError(
                f"rewind is {rewind} and epochs is {epochs}: none is left to retrain; one more epoch, or a lower rewind"
            )
        self.trained, self.rewind_weights = trained, rewind_weights
        self.p, self.reduction, self.first = p, reduction, None if step is None else float(step)
        self.rounds, self.seed = rounds, int(seed)
        if isinstance(example_inputs, list):
            raise TypeError("example_inputs is a list; it must be a tensor or a tuple of inputs")
        self.example_inputs = example_inputs
        self.channels = tracing.trace(model, _first_two(model, example_inputs), pinned)
        if self.channels.pinned.all():
            raise ValueError(f"model has nothing to prune: {'; '.join(dict.fromkeys(self.channels.reasons))}")
        self.whole = self.channels.cost()
        # A forward pass with sizes written into it is refused before anything is trained.
        trial = torch.rand(len(self.channels.sets), generator=torch.Generator().manual_seed(0))
        pack(model, self.channels, select(self.channels, trial, threshold=0.5))
        score(model, self.channels, _copied(example_inputs), p, reduction)
        self.model = model
        self.full = copy.deepcopy(model)  # every round's network is unpacked into it and packed from it
        self.say, self.quiet = say or (lambda line: None), quiet
        self.state = State(state, self._settings() | {"context": context or {}})
        self.state.claim(resume)
        self.resume = resume
        self.current = None  # (number, Thresholds) of the network scored last
        self._warn_of_limits(trial)

    def run(self):
        """The Result. What `train` and `evaluate` raise passes through; with `state` and `resume` the run goes on."""
        self.state.take_up(self.resume)
        with _Bar(self.quiet) as self.bar:
            if self.state.history and sharing.leads():
                self.say(f"goes on after round {len(self.state.history) - 1}")
            if not self.state.history:
                self._start()
            reason = None
            while reason is None:
                reason = self._stop() or self._round()
        return self._result(reason)

    def _settings(self):
        return {
            **described(self.model, weights=self.trained),
            "pinned sets": digest({"pinned": self.channels.pinned}),
            "objective": asdict(self.objective),
            "epochs": self.epochs,
            "start_epoch": self.start,
            "trained": self.trained,
            "rewind_weights": self.rewind_weights,
            "p": self.p,
            "reduction": self.reduction,
            "step": self.first,
            "seed": self.seed,
        }

    def _start(self):
        """Lines 3 to 5 of Algorithm 1: the unpruned network, trained, and its weights at the epoch to rewind to."""
        begin = time.perf_counter()
        everything = torch.ones(len(self.channels.pinned), dtype=torch.bool)
        state = self.state
        if "0" in state.networks:
            tensors = state.networks["0"][1]
        elif self.trained:
            tensors = tensors_of(self.model)
        elif not self.rewind_weights:
            tensors = self._train(copy.deepcopy(self.model), 0, 0, self.epochs)
        else:
            if "rewind" not in state.networks:
                tensors = self._train(copy.deepcopy(self.model), 0, 0, self.start)
                state.add("rewind", everything, tensors)
                state.write()
            early = packed(self.full, self.channels, *state.networks["rewind"])
            tensors = self._train(early, 0, self.start, self.epochs - self.start)
        if "0" not in state.networks:
            state.add(0, everything, tensors)
            state.write()  # before anything else can go wrong: it is the longest training of all
        accuracy = self._evaluate(packed(self.full, self.channels, everything, tensors), 0)
        seconds = time.perf_counter() - begin
        whole = self.whole
        entry = Round(0, None, 0.0, 0.0, whole.params, whole.flops, whole.filters, accuracy, "start", 0.0, seconds)
        state.history = (entry,)
        state.write()
        self._tell(entry)

    def _warn_of_limits(self, scores):
        smallest = select(self.channels, scores, threshold=math.inf).achieved
        for name in self.objective.sizes:
            limit, least = self.objective.limit(name, self.whole), getattr(smallest, name)
            if least > limit:
                warnings.warn(
                    f"no network can have {limit:,} {name}: with one channel set left in every layer there are about"
                    f" {least:,}; the run will end with the smallest network it finds",
                    stacklevel=3,
                )

    def _stop(self):
        """Why the run is over, or None."""
        history, objective = self.state.history, self.objective
        last = history[-1]
        met = (
            last.outcome in ("start", "accepted")
            and objective.sizes_met(last, history[0])
            and objective.accuracy_met(last.accuracy, history[0].accuracy)
        )
        if met and objective.sizes and not objective.minimise:
            return "all limits are kept"
        if self.rounds is not None and sum(entry.accuracy is not None for entry in history[1:]) >= self.rounds:
            return f"{self.rounds} {'round was' if self.rounds == 1 else 'rounds were'} trained"
        return None

    def _round(self):
        """Lines 7 to 14 of Algorithm 1. Returns why the run is over, or None."""
        state, history, objective = self.state, self.state.history, self.objective
        if len(history) > 1 and "first" not in state.facts:
            state.facts["first"] = self.first or self._first_step(int(history[1].outcome == "accepted"))
        step = policy.next_step(history, objective, state.facts.get("first"))
        if step is None:
            return "smaller steps change nothing any more"
        begin = time.perf_counter()
        origin = policy.trained(history, step.origin)
        before = history[origin]
        thresholds = self._thresholds(origin)
        smallest = thresholds.smallest
        if smallest.filters == before.filters:
            return "no filter can be removed any more"
        if step.land:
            lowest = thresholds.lowest(lambda cost: objective.sizes_met(cost, self.whole))
            if lowest is None:
                lowest = float(thresholds.steps()[-1])
            step = replace(step, threshold=lowest, step=lowest - step.threshold)
        selection = thresholds.select(step.threshold)
        left = selection.achieved
        threshold = step.threshold
        entry = Round(len(history), step.origin, threshold, step.step, *_sizes(left), None, "skipped", threshold)
        if not step.land and self._too_little(before, left, smallest):
            entry = replace(entry, params=before.params, flops=before.flops, filters=before.filters)
        elif self._failed_before(origin, entry) or (not step.land and self._too_far(thresholds, left)):
            entry = replace(entry, outcome="rolled back")
        else:
            try:
                small = self._pruned(origin, selection.keep)
            except PackingError as error:  # sizes written into the forward pass that hold for all larger networks
                return f"the next network cannot be packed: {error}"
            tensors = self._train(small, entry.number, self.start, self.epochs - self.start)
            accuracy = self._evaluate(packed(self.full, self.channels, selection.keep, tensors), entry.number)
            sound = all(tensor.isfinite().all() for tensor in tensors.values())  # a diverged network leads nowhere
            accepted = sound and objective.accuracy_met(accuracy, history[0].accuracy)
            outcome = "accepted" if accepted else "rolled back"
            entry = replace(entry, accuracy=accuracy, outcome=outcome, seconds=time.perf_counter() - begin)
            if accepted:
                state.add(entry.number, selection.keep, tensors)
                begins = self._thresholds(entry.number).steps()
                entry = replace(entry, base=min([threshold, *begins[:1].tolist()]))
        state.history = (*history, entry)
        state.write()
        self._tell(entry)
        return None

    def _first_step(self, number):
        """The lowest T above 0 that removes the share STRIDE of the network of round `number`, or all that can go."""
        thresholds, size = self._thresholds(number), self.objective.size
        most = (1 - STRIDE) * size(self.state.history[number], self.whole)
        enough = thresholds.lowest(lambda cost: size(cost, self.whole) <= most)
        positive = thresholds.steps()
        positive = positive[positive > 0]
        if enough is None:
            return float(positive[-1]) if len(positive) else 1.0
        return enough or (float(positive[0]) if len(positive) else 1.0)

    def _too_little(self, before, left, smallest):
        """Whether a round removes too little to be trained; never the last filters that can go."""
        if left.filters == before.filters:
            return True
        if self.first is not None or left.filters == smallest.filters:
            return False
        searching = not any(entry.outcome == "rolled back" for entry in self.state.history)
        size, least = self.objective.size, STRIDE if searching else LEAST
        return size(left, self.whole) > (1 - least) * size(before, self.whole)

    def _failed_before(self, origin, entry):
        """Whether the same filters of the same network were removed in a round that was rolled back."""
        history = self.state.history
        rounds = [each for each in history if each.outcome == "rolled back" and each.accuracy is not None]
        tried = [_sizes(each) for each in rounds if policy.trained(history, each.origin) == origin]
        return _sizes(entry) in tried  # one network's thresholds remove more and more: equal sizes are equal filters

    def _too_far(self, thresholds, left):
        """Whether all limits on size, and nothing else, are to be met, and a network is well beyond them."""
        objective, whole = self.objective, self.whole
        if not objective.sizes or objective.minimise or not objective.sizes_met(left, whole):
            return False
        nearest = thresholds.select(thresholds.lowest(lambda cost: objective.sizes_met(cost, whole))).achieved
        return objective.size(nearest, whole) - objective.size(left, whole) > policy.TOLERANCE

    def _thresholds(self, number):
        """The Thresholds of the network of round `number`, scored once for all rounds that start from it."""
        if self.current is None or self.current[0] != number:
            keep, tensors = self.state.networks[str(number)]
            twin = masked(self.full, self.channels, keep, tensors)
            scores = score(twin, self.channels, _copied(self.example_inputs), self.p, self.reduction).cpu()
            scores = sharing.agree(scores)
            self.current = number, Thresholds(self.channels, keep, scores, self.objective.measures)
        return self.current[1]

    def _pruned(self, origin, keep):
        """The packed network of a round before its retraining."""
        unpack(self.full, self.channels, *self.state.networks["rewind" if self.rewind_weights else str(origin)])
        return pack(self.full, self.channels, keep)

    def _train(self, model, number, start_epoch, epochs):
        """Train in place; the tensors afterwards."""

        def train(model):
            if epochs:
                self.train(model, epochs, start_epoch)

        return trained(train, model, self.seed * 1_000_003 + 2 * number + (start_epoch > 0))

    def _evaluate(self, model, number):
        return evaluated(self.evaluate, model, self.seed * 1_000_003 + 2 * number, f"round {number}")

    def _tell(self, entry):
        self.bar.show(entry, self.whole)
        if sharing.leads():
            with self.bar.aside():
                self.say(told(entry, self.whole))

    def _result(self, reason):
        history, objective, state, channels = self.state.history, self.objective, self.state, self.channels
        start = history[0]
        chosen = best(history, objective)
        met = objective.sizes_met(chosen, start) and objective.accuracy_met(chosen.accuracy, start.accuracy)
        keep, tensors = state.networks[str(chosen.number)]
        after = self._thresholds(chosen.number)
        scores = torch.where(keep[channels.sets], after.scores, math.nan).float()
        before = self._thresholds(0)
        used = next((entry.threshold for entry in history if entry.outcome == "accepted"), 0.0)
        small = packed(self.full, channels, keep, tensors)
        everything, tensors = state.networks["0"]
        dense = packed(self.full, channels, everything, tensors)
        return Result(
            model=small.eval(),
            dense=dense.eval(),
            met=met,
            message=message(objective, history, chosen, met, reason),
            objective=objective,
            history=history,
            chosen=chosen.number,
            channels=channels,
            keep=keep,
            attention={"before": before.scores.float(), "after": scores},
            thresholds={"before": used * before.weights, "after": chosen.threshold * after.weights},
        )


def best(history, objective):
    """The round whose network is the result.

    Of the trained rounds that were accepted, and of the unpruned network: of those that keep the limits on size, the
    most accurate where only sizes were limited, the smallest otherwise; where none keeps them, the smallest.
    """
    start = history[0]
    rounds = [entry for entry in history if entry.outcome in ("start", "accepted")]
    fitting = [entry for entry in rounds if objective.sizes_met(entry, start)]
    if fitting and objective.sizes and not objective.minimise:
        return max(fitting, key=lambda entry: (entry.accuracy, -objective.size(entry, start), -entry.number))
    return min(fitting or rounds, key=lambda entry: (objective.size(entry, start), entry.number))


def told(entry, whole):
    """One line about a round."""
    left = f"{entry.params / whole.params:.1%} of the parameters, {entry.flops / whole.flops:.1%} of the FLOPs"
    accuracy = "" if entry.accuracy is None else f"; accuracy {entry.accuracy:.4g}"
    outcome = "unpruned" if entry.outcome == "start" else entry.outcome
    origin = "" if entry.origin in (None, entry.number - 1) else f" from round {entry.origin}"
    return f"round {entry.number}{origin}: T {entry.threshold:.4g}, {left}{accuracy}; {outcome} ({entry.seconds:.0f} s)"


def message(objective, history, chosen, met, reason):
    """What was reached, and why the run ended."""
    start = history[0]
    reached = (
        f"{1 - chosen.params / start.params:.1%} of the parameters and {1 - chosen.flops / start.flops:.1%} of the"
        f" FLOPs removed, accuracy {start.accuracy:.4g} before and {chosen.accuracy:.4g} after"
    )
    if met:
        return f"{reached}. The objective is met; {reason}."
    missed = [] if objective.accuracy_met(chosen.accuracy, start.accuracy) else ["the accuracy"]
    missed += [
        f"{getattr(chosen, name):,} {name} in place of {objective.limit(name, start):,}"
        for name in objective.sizes
        if getattr(chosen, name) > objective.limit(name, start)
    ]
    return f"{reached}. The objective is not met ({', '.join(missed)}); {reason}. This is the best network found."


def _first_two(model, inputs):
    """The first two examples of a batch, or the whole of it where a forward pass does not run on these.

    A trace keeps all activations and needs few of them; but a batch of one can take another path than a larger one.
    """
    sizes = {tensor.shape[:1] for tensor in tree_leaves(inputs) if isinstance(tensor, torch.Tensor)}
    if len(sizes) != 1 or not next(iter(sizes)):  # not one batch dimension
        return inputs
    cut = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, torch.Tensor) else leaf, inputs)
    args, kwargs = tracing.arguments(_copied(cut))
    try:
        with tracing.evaluating(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception:
        return inputs
    return cut


def _copied(inputs):
    """Inputs that a forward pass may change."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)


def _sizes(cost):
    return cost.params, cost.flops, cost.filters


def _check(model, train, evaluate, objective, epochs, rewind, p, reduction, step, rounds, seed, say):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    for name, function in (("train", train), ("evaluate", evaluate)):
        if not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}; it must be a function")
    if not isinstance(objective, Objective):
        raise TypeError(f"objective is a {type(objective).__name__}; it must be a paamops.Objective")
    for name, value in (("epochs", epochs), ("rounds", rounds)):
        if value is None and name == "rounds":
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an int of at least 1")
    if isinstance(rewind, bool) or not isinstance(rewind, numbers.Real) or not 0 <= rewind < 1:
        raise ValueError(f"rewind is {rewind!r}; it must be a share of the epochs, at least 0 and below 1")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {REDUCTIONS}")
    activation_attention(torch.zeros(1, 1), p)  # refuses a bad p before the training
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be an int of at least 0")
    if say is not None and not callable(say):
        raise TypeError(f"say is a {type(say).__name__}; it must be a function")
    real = isinstance(step, numbers.Real) and not isinstance(step, bool)
    if step is not None and not (real and math.isfinite(step) and step > 0):
        raise ValueError(f"step is {step!r}; it must be a positive number, or None")


class _Bar:
    """A tqdm bar over rounds; silent when asked to be, or when nobody watches."""

    def __init__(self, quiet):
        self.bar = progress.bar(None, "pruning", "round", quiet or not sharing.leads())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def show(self, entry, whole):
        facts = {"T": f"{entry.threshold:.3g}", "size": f"{entry.params / whole.params:.1%}", "round": entry.outcome}
        if entry.accuracy is not None:
            facts["accuracy"] = f"{entry.accuracy:.4g}"
        self.bar.set_postfix(facts, refresh=False)
        self.bar.update(entry.number - self.bar.n)

    def aside(self):
        """Lines that are printed meanwhile do not run into the bar."""
        return type(self.bar).external_write_mode()
