"""The stages of GlobalPru: warm-up, election, learning to rank, removal, fine-tuning."""

import copy
import numbers
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from paamops.methods import calls, sharing
from paamops.methods.calls import evaluated
from paamops.methods.networks import load, packed
from paamops.methods.state import State, described, digest

WARM, RANKED, PRUNED, TUNED = STAGES = "warm", "ranked", "pruned", "tuned"


@dataclass(frozen=True)
class Stage:
    """What came of one stage.

    Attributes:
        name: "warm": trained with its excitations, which have elected the rankings. "ranked": taught them. "pruned":
            without its lowest channels. "tuned": trained once more.
        params, flops: of the network, its excitations counted.
        accuracy: what `evaluate` gave.
        kendall, overlap: how far images agree with the elected rankings, means over layers and the images that have
            voted (in the first process): Kendall's τ, and the share of the channels to be kept that are among an
            image's own best. None once they are cut.
        seconds: what the stage took.
    """

    name: str
    params: int
    flops: int
    accuracy: float
    kendall: float | None
    overlap: float | None
    seconds: float


@dataclass(frozen=True)
class GlobalPruResult:
    """What `GlobalPru.run` returns.

    Attributes:
        model: the packed network with its excitations, fine-tuned. whole: the network of the last stage before the
            removal. Both in eval mode.
        message: what was removed, and the accuracy of each stage.
        asked: {"rate": 0.5}, {"params": 0.5} or {"flops": 0.5}. mode: "fixed" or "mixed".
        history: tuple of Stage.
        channels: ChannelMap of the unpruned network. keep: (S,) bool, the channel sets that are left.
        layers: the names of the convolutions with an excitation; of each, in this order:
        votes: (C, C) int64, how many images place channel j at rank r. rankings: (C,) int64, the channel at each rank.
        rates: (L,) the share of its channels that went. traces: (L,) mean Hessian traces, or None.
        kendall, overlap: (2, L) the agreement of the images with the ranking, when elected and when taught.
    """

    model: nn.Module
    whole: nn.Module
    message: str
    asked: dict
    mode: str
    history: tuple
    channels: object
    keep: torch.Tensor
    layers: tuple
    votes: list
    rankings: list
    rates: torch.Tensor
    traces: torch.Tensor | None
    kendall: torch.Tensor
    overlap: torch.Tensor

    def report(self, path, rows=None, command=None, curve=None):
        """Write one self-contained HTML file: before and after, votes, agreement, rates and widths.

        Args:
            path: the file; it is written whole or not at all.
            rows: lines (what, before, after, change) of the first table; default accuracy, parameters and FLOPs.
            command: the command that made it, to be shown.
            curve: accuracy over pruning rates to draw, name -> list of (rate, accuracy); default none.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from paamops import globalpru_reporting

        globalpru_reporting.write(self, path, rows, command, curve)


def run(
    gp,
    *,
    train,
    evaluate,
    epochs,
    images,
    loss=None,
    batches=None,
    trained=False,
    rewind=0.5,
    state=None,
    resume=False,
    context=None,
    say=None,
):
    """Warm the excitations up, elect the rankings, teach them, remove the lowest channels, fine-tune.

        gp = paamops.GlobalPru(model, images[:1], rate=0.5)
        result = gp.run(train=train, evaluate=evaluate, epochs=160, images=lambda: (x for x, _ in loader))
        small = result.model

    1. Warm-up: the task's loss + α Σ ‖π‖₁. 2. Election: all `images` vote. 3. Learning to rank: + β Σ Φ. 4. Removal of
    the lowest ranks. 5. Fine-tuning, on the task's loss alone. The paper does not give the length of its stages: here
    learning to rank is the whole schedule, and so is the warm-up of an untrained network; the warm-up of a trained one
    and fine-tuning run from epoch rewind · E of the schedule to its end. (At the low rates of a schedule's end alone
    the channels that are to go are not closed, and the cut costs all accuracy: bench/ablations, "One ranking".)

    Args:
        gp: GlobalPru; its model is left untouched, it has the run's votes and rankings afterwards.
        train: train(model, epochs, start_epoch, penalty) trains `model` in place for `epochs` epochs of the schedule,
            from its epoch `start_epoch` on, with a fresh optimizer over model.parameters() and the loss of the task
            plus penalty() in each step, after the forward pass.
        evaluate: evaluate(model) returns the accuracy, the higher the better, on images that are neither trained on nor
            kept for the final test.
        epochs: E, the epochs of the whole schedule.
        images: the training images that vote: what `vote` takes, or a function that returns it, called anew each time.
            They are gone through three times, so an iterator of its own will not do.
        loss, batches: for mixed rates, what `measure` takes: loss(model, batch), and an iterable of training batches or
            a function that returns one.
        trained: whether the model, but for its new excitations, is trained.
        rewind: the share of the schedule that fine-tuning, and the warm-up of a trained network, skip; at least an
            epoch is left.
        state: a folder to keep the run in, written after each stage. None: memory only.
        resume: go on with what `state` holds, or start afresh where it holds nothing. With a `train` that draws from
            the seeded generators only, the end is that of a run that was never cut.
        context: a dict for JSON that a resumed run must share, such as the settings of `train`.
        say: is given one line a stage.

    Under several processes of `torch.distributed` all call it, each with images of its own: all their votes count.
    Accuracies and weights are the first one's.

    Returns:
        GlobalPruResult

    TypeError, ValueError: an argument is not what it must be; `train` changed the network, `evaluate` returned no
    finite number; `state` holds a run and `resume` is not set, or one of another model or other settings.
    """
    _check(gp, train, evaluate, epochs, images, loss, batches, rewind, say)
    epochs, rewind = int(epochs), float(rewind)
    if resume and state is None:
        raise ValueError("resume is True, but state is None; it must be the folder of the run")
    settings = {
        **described(gp.model, weights=True),
        "pinned sets": digest({"pinned": gp.channels.pinned}),
        "asked": gp.budget or {"rate": gp.rate},
        "mode": gp.mode,
        "penalty": [gp.alpha, gp.beta, gp.logits],
        "seed": gp.seed,
        "epochs": [epochs, rewind],
        "trained": trained,
        "context": context or {},
    }
    held = State(state, settings, Stage)
    held.claim(resume)
    held.take_up(resume)
    held.write()  # so that whose checkpoint lies in the folder is known from the first epoch on
    original = gp.model
    try:
        gp.attach(copy.deepcopy(original))
        gp.reset()
        return _Run(gp, held, train, evaluate, epochs, round(rewind * epochs), say).run(images, loss, batches, trained)
    finally:
        gp.attach(original)


class _Run:
    def __init__(self, gp, state, train, evaluate, epochs, start, say):
        self.gp, self.state, self.train, self.evaluate = gp, state, train, evaluate
        self.epochs, self.start = epochs, start
        self.say = say if say and sharing.leads() else lambda line: None
        self.everything = torch.ones(len(gp.channels.pinned), dtype=torch.bool)

    def run(self, images, loss, batches, trained):
        gp, networks = self.gp, self.state.networks
        begin = time.perf_counter()
        self._train_whole(WARM, self.start if trained else 0)
        self._elect(images, loss, batches)
        self._note(WARM, gp.model, None, networks["elected"][1], begin)
        begin = time.perf_counter()
        self._train_whole(RANKED, 0)
        if "taught" not in networks:
            self._add("taught", self._agreement(RANKED, images))
        self._note(RANKED, gp.model, None, networks["taught"][1], begin)
        begin = time.perf_counter()
        keep = gp.keep().keep
        small = gp.prune()
        self._note(PRUNED, small, keep, None, begin)
        begin = time.perf_counter()
        if TUNED not in networks:
            self.state.add(TUNED, keep, self._trained(small, TUNED, self.start, lambda: 0.0))
            self.state.write()
        load(small, networks[TUNED][1])
        self._note(TUNED, small, keep, None, begin)
        return self._result(keep)

    def _train_whole(self, name, start):
        if name not in self.state.networks:
            self._add(name, self._trained(self.gp.model, name, start, self.gp.penalty))
        load(self.gp.model, self.state.networks[name][1])

    def _trained(self, model, name, start, penalty):
        def train(model):
            if self.epochs > start:
                self.train(model, self.epochs - start, start, penalty)

        return calls.trained(train, model, self._seed(name, 0))

    def _elect(self, images, loss, batches):
        """Votes, rankings and, where rates are mixed, Hessian traces: of this run, or as they were stored."""
        gp = self.gp
        if "elected" not in self.state.networks:
            calls.seed_all(self._seed(WARM, 2))  # images may be drawn or augmented
            if gp.mode == "mixed":
                gp.measure(loss, _fresh(batches), seed=gp.seed)
            gp.vote(_fresh(images))
            tensors = {f"ranking-{k}": ranking for k, ranking in enumerate(gp.elect())}
            tensors |= {f"votes-{k}": votes.cpu() for k, votes in enumerate(gp.votes)}
            tensors |= {} if gp.traces is None else {"traces": gp.traces}
            self._add("elected", sharing.agree(tensors | self._agreement(WARM, images)))
        tensors = self.state.networks["elected"][1]
        count = range(len(gp.excitations))
        gp.take_votes([tensors[f"votes-{k}"] for k in count])
        gp.traces = tensors.get("traces")
        gp.use([tensors[f"ranking-{k}"] for k in count])

    def _agreement(self, name, images):
        calls.seed_all(self._seed(name, 3))
        kendall, overlap = self.gp.agreement(_fresh(images))
        return sharing.agree({"kendall": kendall, "overlap": overlap})

    def _add(self, name, tensors):
        self.state.add(name, self.everything, tensors)
        self.state.write()

    def _note(self, name, model, keep, agreement, begin):
        """The Stage, unless it stands in the history already."""
        if any(stage.name == name for stage in self.state.history):
            return
        accuracy = evaluated(self.evaluate, model, self._seed(name, 1), f"stage {name}")
        cost = self.gp.channels.cost(keep)
        found = [None if agreement is None else float(agreement[key].mean()) for key in ("kendall", "overlap")]
        seconds = time.perf_counter() - begin
        self.state.history = (*self.state.history, Stage(name, cost.params, cost.flops, accuracy, *found, seconds))
        self.state.write()
        whole = self.gp.channels.cost()
        agreed = (
            "" if agreement is None else f"; images agree with the ranking: τ {found[0]:.3f}, overlap {found[1]:.1%}"
        )
        left = f"; {cost.params / whole.params:.1%} of the parameters, {cost.flops / whole.flops:.1%} of the FLOPs"
        self.say(f"{name}: accuracy {accuracy:.4g}{agreed or left} ({seconds:.0f} s)")

    def _seed(self, name, purpose):
        return self.gp.seed * 1_000_003 + 8 * STAGES.index(name) + purpose

    def _result(self, keep):
        gp, state = self.gp, self.state
        elected, taught = (state.networks[name][1] for name in ("elected", "taught"))
        first, ranked, pruned, tuned = state.history
        model = packed(gp.model, gp.channels, keep, state.networks[TUNED][1])
        whole = copy.deepcopy(gp.model)
        load(whole, state.networks[RANKED][1])
        return GlobalPruResult(
            model=model.eval(),
            whole=whole.eval(),
            message=(
                f"{1 - tuned.params / first.params:.1%} of the parameters and {1 - tuned.flops / first.flops:.1%} of"
                f" the FLOPs removed; accuracy {first.accuracy:.4g} after the warm-up, {ranked.accuracy:.4g} with the"
                f" ranking learned, {pruned.accuracy:.4g} pruned, {tuned.accuracy:.4g} fine-tuned."
            ),
            asked=gp.budget or {"rate": gp.rate},
            mode=gp.mode,
            history=state.history,
            channels=gp.channels,
            keep=keep,
            layers=tuple(gp.channels.layers[number].name for number in gp.layers),
            votes=gp.votes,
            rankings=gp.rankings,
            rates=gp.rates(),
            traces=gp.traces,
            kendall=torch.stack([elected["kendall"], taught["kendall"]]),
            overlap=torch.stack([elected["overlap"], taught["overlap"]]),
        )


def _fresh(given):
    return given() if callable(given) else given


def _check(gp, train, evaluate, epochs, images, loss, batches, rewind, say):
    for name, function in (("train", train), ("evaluate", evaluate)):
        if not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}; it must be a function")
    if isinstance(epochs, bool) or not isinstance(epochs, numbers.Integral) or epochs < 1:
        raise ValueError(f"epochs is {epochs!r}; it must be an int of at least 1")
    if gp.mode == "mixed" and not (callable(loss) and batches is not None):
        raise ValueError("mixed rates are measured: loss must be a function, loss(model, batch), and batches be given")
    if isinstance(rewind, bool) or not isinstance(rewind, numbers.Real) or not 0 <= rewind <= 1:
        raise ValueError(f"rewind is {rewind!r}; it must be a share of the epochs, in [0, 1]")
    if round(rewind * epochs) >= epochs:
        raise ValueError(f"rewind is {rewind!r}, which leaves none of the {epochs} epochs to train")
    if isinstance(images, Iterator):
        raise TypeError(f"images is a {type(images).__name__}, which ends; it must be a function that returns one")
    if say is not None and not callable(say):
        raise TypeError(f"say is a {type(say).__name__}; it must be a function")
