"""The main job: a trained network, the four verbs, fine-tuning, and what came of it."""

import hashlib
import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from paamops import data, training
from paamops.criteria import weight_scores
from paamops.measuring import file_size, latency
from paamops.methods.aap import AAP
from paamops.methods.globalpru import GlobalPru
from paamops.methods.paam import PAAM
from paamops.methods.paam_run import Scored
from paamops.packing import pack
from paamops.scoring import score
from paamops.selection import select
from paamops.tracing import trace

SCORED = 1024  # training images that decide the scores, where the network is pruned once
ONE_BATCH = 256  # and where it is scored anew each round, by one batch
VOTERS = 512  # images at a time
BATCHES = (1, 64)  # images at a time, for the latency


@dataclass(frozen=True)
class Plan:
    """How to train: the schedule, epochs before and after pruning, images a step, the seed, compiled or not."""

    schedule: training.Schedule
    epochs: int
    finetune_epochs: int
    batch_size: int
    seed: int = 0
    compiled: bool = False


def prune(model, dataset, fabric, plan, budget, say=print, quiet=False, pinned=(), criterion="attention"):
    """Train `model` (if plan.epochs > 0), prune it to `budget` by one criterion, fine-tune what is left.

    `budget` is what `select` takes, such as {"params": 0.5}, `pinned` what `trace` takes, `criterion` activation
    attention or what `weight_scores` takes. Decisions see the training
    split only: the test split is for `report`. Everything that can be refused is refused before the training starts.

    Returns (packed model, Selection); `model` is trained in place, on the device of `fabric`.
    """
    model, dataset = model.to(fabric.device), dataset.to(fabric.device)
    channels = trace(model, dataset.normalise(dataset.train.images[:1]), pinned)
    check_output(model, dataset)
    if criterion != "attention":
        weight_scores(model, channels, criterion, plan.seed)
    # A budget that no network meets, or a forward pass with sizes written into it. Any scores that spread over all
    # layers show it.
    trial = torch.rand(len(channels.filters), generator=torch.Generator().manual_seed(plan.seed))
    pack(model, channels, select(channels, trial, **budget))
    settings = {"batch_size": plan.batch_size, "seed": plan.seed, "quiet": quiet}
    if plan.epochs:
        start = time.perf_counter()
        training.train(model, dataset, fabric, plan.schedule, epochs=plan.epochs, label="training", **settings)
        say(told("trained", plan.epochs, model, dataset, start))

    if criterion == "attention":
        generator = torch.Generator(fabric.device).manual_seed(plan.seed)
        batches = data.batches(dataset.train, plan.batch_size, generator)
        enough = itertools.islice(batches, max(1, SCORED // plan.batch_size))
        scores = score(model, channels, (dataset.normalise(images) for images, _ in enough))
    else:
        scores = weight_scores(model, channels, criterion, plan.seed)
    selection = select(channels, scores, **budget)
    small = pack(model, channels, selection)
    whole, left = channels.cost(), selection.achieved
    say(
        f"pruned: {left.filters} of {whole.filters} filters, {left.params / whole.params:.1%} of the parameters and"
        f" {left.flops / whole.flops:.1%} of the FLOPs stay; validation accuracy"
        f" {training.accuracy(small, dataset, dataset.validation):.2%}"
    )
    if plan.finetune_epochs:
        start = time.perf_counter()
        training.train(
            small,
            dataset,
            fabric,
            plan.schedule,
            epochs=plan.finetune_epochs,
            start_epoch=plan.finetune_epochs,  # of twice as many: the second half of the schedule
            label="fine-tuning",
            **settings,
        )
        say(told("fine-tuned", plan.finetune_epochs, small, dataset, start))
    return small, selection


def prune_to_target(model, dataset, fabric, plan, objective, say=print, quiet=False, state=None, **settings):
    """Prune `model` by AAP until `objective` is met, with this project's training and data; the Result.

    Rounds are accepted or rejected by the accuracy on the validation split, as a fraction; scores come from a batch of
    the training split. `plan.epochs` is the length of the whole schedule. `state` and `settings` go to `paamops.AAP`.
    """
    model, dataset = model.to(fabric.device), dataset.to(fabric.device)
    check_output(model, dataset)
    checkpoint = None if state is None else Path(state) / "training.safetensors"

    def train(network, epochs, start_epoch):
        training.train(
            network,
            dataset,
            fabric,
            plan.schedule,
            epochs=epochs,
            start_epoch=start_epoch,
            total_epochs=plan.epochs,
            batch_size=plan.batch_size,
            seed=int(torch.randint(2**31, ())),  # AAP has seeded the generator for this round
            checkpoint=checkpoint,
            compiled=plan.compiled,
            quiet=quiet,
        )

    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(plan.seed))
    images = dataset.normalise(dataset.train.images[order[:ONE_BATCH].to(fabric.device)])
    method = AAP(
        model,
        images,
        train=train,
        evaluate=lambda network: training.accuracy(network, dataset, dataset.validation),
        objective=objective,
        epochs=plan.epochs,
        state=state,
        context=_context(dataset, fabric, plan),
        seed=plan.seed,
        say=say,
        quiet=quiet,
        **settings,
    )
    return method.run()


def prune_by_scores(
    model, dataset, fabric, plan, budget, penalty=None, say=print, quiet=False, pinned=(), state=None, **settings
):
    """Prune `model` to `budget` by PAAM, with this project's training and data; the PAAMResult.

    The round that is kept is the one with the best accuracy on the validation split. `plan.epochs` is the length of the
    whole schedule. `budget` is what `select` takes, such as {"params": 0.5}; `penalty` is λ, or None to have it
    found; `state` and `settings` go to `PAAM.run`.
    """
    model, dataset = model.to(fabric.device), dataset.to(fabric.device)
    check_output(model, dataset)
    checkpoint = None if state is None else Path(state) / "training.safetensors"

    def train(network, epochs, start_epoch, penalty):
        learning = isinstance(network, Scored)  # whose λ and snapshots no checkpoint holds, nor may it be compiled
        training.train(
            network,
            dataset,
            fabric,
            plan.schedule,
            epochs=epochs,
            start_epoch=start_epoch,
            total_epochs=plan.epochs,
            batch_size=plan.batch_size,
            seed=int(torch.randint(2**31, ())),  # the generator has been seeded for this training
            penalty=penalty if learning else None,
            checkpoint=None if learning else checkpoint,
            compiled=plan.compiled and not learning,
            label="learning scores" if learning else "training",
            quiet=quiet,
        )

    images = dataset.normalise(dataset.train.images[:2])
    paam = PAAM(model, images, penalty=penalty, pinned=pinned, seed=plan.seed, **budget)
    return paam.run(
        train=train,
        evaluate=lambda network: training.accuracy(network, dataset, dataset.validation),
        epochs=plan.epochs,
        state=state,
        context=_context(dataset, fabric, plan),
        say=say,
        **settings,
    )


def prune_by_ranking(
    model,
    dataset,
    fabric,
    plan,
    asked,
    say=print,
    quiet=False,
    state=None,
    trained=False,
    rewind=0.5,
    resume=False,
    **settings,
):
    """Prune `model` by GlobalPru, with this project's training and data; the GlobalPruResult.

    `asked` is {"rate": 0.5}, {"params": 0.5} or {"flops": 0.5}; `plan.epochs` is the length of the whole schedule;
    `settings` go to `GlobalPru`, the others to its `run`. All training images vote; Hessian traces are taken over one
    batch. `model` gets its excitations here.
    """
    model, dataset = model.to(fabric.device), dataset.to(fabric.device)
    check_output(model, dataset)
    checkpoint = None if state is None else Path(state) / "training.safetensors"

    def train(network, epochs, start_epoch, penalty):
        training.train(
            network,
            dataset,
            fabric,
            plan.schedule,
            epochs=epochs,
            start_epoch=start_epoch,
            total_epochs=plan.epochs,
            batch_size=plan.batch_size,
            seed=int(torch.randint(2**31, ())),  # the generator has been seeded for this training
            penalty=penalty,
            checkpoint=checkpoint,
            compiled=plan.compiled,
            quiet=quiet,
        )

    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(plan.seed))
    chosen = order[:ONE_BATCH].to(fabric.device)
    images, labels = dataset.normalise(dataset.train.images[chosen]), dataset.train.labels[chosen]

    def voters():
        return (dataset.normalise(part) for part in dataset.train.images.split(VOTERS))

    method = GlobalPru(model, images[:2], seed=plan.seed, **asked, **settings)
    return method.run(
        train=train,
        evaluate=lambda network: training.accuracy(network, dataset, dataset.validation),
        epochs=plan.epochs,
        images=voters,
        loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
        batches=[(images, labels)],
        trained=trained,
        rewind=rewind,
        state=state,
        resume=resume,
        context=_context(dataset, fabric, plan),
        say=say,
    )


def _context(dataset, fabric, plan):
    """What a resumed run must share."""
    return {
        "schedule": asdict(plan.schedule),
        "batch_size": plan.batch_size,
        "compiled": plan.compiled,
        "precision": fabric.strategy.precision.precision,
        "data": [dataset.name, digest(dataset)],
    }


def digest(dataset):
    """A fingerprint of the images that a network is trained and judged by."""
    state = hashlib.sha256()
    for split in (dataset.train, dataset.validation):
        for tensor in (split.images, split.labels):
            state.update(f"{tuple(tensor.shape)}".encode())
            state.update(tensor.cpu().contiguous().numpy())
    return state.hexdigest()[:16]


def told(what, epochs, model, dataset, start):
    seconds = time.perf_counter() - start
    accuracy = training.accuracy(model, dataset, dataset.validation)
    return f"{what}: {epochs} epochs in {seconds:.0f} s; validation accuracy {accuracy:.2%}"


def check_output(model, dataset):
    """The model must give one logit a class; better to know before the training."""
    mode = model.training
    with torch.no_grad():
        images = dataset.normalise(dataset.train.images[:2])
        training.check_logits(model.eval()(images), len(images), dataset.num_classes)
    model.train(mode)


def report(dense, small, dataset):
    """The rows (what, before, after, change) of the table: all of it measured on the two models at hand."""
    models, example = (dense, small), dataset.normalise(dataset.test.images[:1])
    accuracy = [100 * training.accuracy(model, dataset, dataset.test) for model in models]
    costs = [trace(model, example).cost() for model in models]
    rows = [("test accuracy", *(f"{value:.2f} %" for value in accuracy), f"{accuracy[1] - accuracy[0]:+.2f} points")]
    rows.append(row("parameters", [cost.params for cost in costs], "{:,}"))
    rows.append(row("FLOPs an image", [cost.flops / 1e6 for cost in costs], "{:,.2f} M"))
    for size in BATCHES:
        images = dataset.test.images[torch.arange(size, device=example.device) % len(dataset.test)]
        times = [1e3 * seconds for seconds in latency(models, dataset.normalise(images))]
        rows.append(row(f"latency, batch {size}", times, "{:.2f} ms"))
    rows.append(row("file size", [file_size(model) / 1e3 for model in models], "{:,.0f} kB"))
    return rows


def row(what, values, shape):
    before, after = values
    return what, shape.format(before), shape.format(after), f"{100 * (after - before) / before:+.1f} %"


def table(rows):
    """The rows as text, numbers to the right."""
    rows = [("", "before", "after", "change"), *rows]
    widths = [max(len(line[column]) for line in rows) for column in range(4)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in rows]
    return "\n".join(lines)
