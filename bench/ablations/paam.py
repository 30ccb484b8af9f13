"""The ablations of PAAM: scores learned on a trained network, one threshold, one retraining. Each yields its runs."""

import copy
import itertools
import statistics
import time
from dataclasses import replace

import torch
from torch.nn import functional as F

import paamops
from bench.ablations import workshop
from bench.ablations.pruning import budget, each_seed, kept_filters, rank, run
from paamops import data, training

RATE, MOMENTUM = 0.1, 0.9  # of the attention network, plain SGD
CRITERIA = ("l1", "l1 / size", "attention", "random")  # names of `pruning.rank`
NAMES = {"attention": "activation attention"}
LAMBDAS = (0.3, 1.0, 3.0, 6.0, 12.0)
SCORINGS = {
    "additive, leaky exponential, slope 0.1": {},
    "dot, leaky exponential, slope 0.1": {"attention": "dot"},
    "additive, leaky exponential, slope 0.01": {"slope": 0.01},
    "additive, leaky exponential, slope 0.001": {"slope": 0.001},
    "additive, sigmoid, temperature 0.25": {"activation": "sigmoid", "temperature": 0.25},
    "additive, sigmoid, temperature 1": {"activation": "sigmoid", "temperature": 1.0},
    "additive, sigmoid, temperature 4": {"activation": "sigmoid", "temperature": 4.0},
}
# What the network does while scores are learned: (its filters train, its batch norms are in train mode).
FROZEN = {
    "frozen": (False, False),
    "frozen, batch norm in train mode": (False, True),
    "filters train": (True, True),
}

SIZES = (0.5, 0.7)
# ResNet-20 learns the digits in ten epochs. Its learning rate falls at 50 % and 80 %, so that the two epochs of
# retraining have one at each of the last two rates.
SCALES = {
    "digits": workshop.Scale(
        "resnet20",
        train=943,
        test=600,
        epochs=10,
        batch_size=32,
        decays=(91, 146),
        rewind=0.8,
        seeds=3,
        removed=SIZES,
    ),
    "fashion-mnist": replace(workshop.SCALES["fashion-mnist"], removed=SIZES, rewind=0.75),
    "cifar10": replace(workshop.SCALES["cifar10"], removed=SIZES),
}


def criterion(shop):
    """One-shot pruning by learned scores, by two forms of l1, by activation attention and at random."""
    for dense in each_seed(shop):
        for removed in shop.scale.removed:
            yield pruned(shop, dense, "learned", removed, *learned(shop, dense, removed))
            for name in CRITERIA:
                found = rank(shop, name, dense.model, dense.channels, dense.seed)
                selection = paamops.select(dense.channels, found, params=budget(dense.channels, removed))
                yield pruned(shop, dense, NAMES.get(name, name), removed, selection)


def penalties(shop):
    """Fixed λ, from low to high, against the one that is found while the scores are learned."""
    removed = shop.scale.removed[-1]
    for dense in each_seed(shop):
        yield pruned(shop, dense, "automatic", removed, *learned(shop, dense, removed))
        for value in LAMBDAS:
            yield pruned(shop, dense, f"{value:g}", removed, *learned(shop, dense, removed, penalty=value))


def scoring(shop):
    """The form of the attention and the activation of the scores: slopes and temperatures."""
    removed = shop.scale.removed[-1]
    for dense in each_seed(shop):
        for name, settings in SCORINGS.items():
            try:
                found = learned(shop, dense, removed, **settings)
            except ValueError as error:  # what `keep` says of scores that are not finite
                if "diverged" not in str(error):
                    raise
                yield {"seed": dense.seed, "variant": name, "removed": removed, "diverged": True}
            else:
                yield pruned(shop, dense, name, removed, *found)


def frozen(shop):
    """Filters and batch norms fixed while scores are learned, or not; what trained, from its own weights too."""
    removed = shop.scale.removed[-1]
    for dense in each_seed(shop):
        for name, (filters, norms) in FROZEN.items():
            selection, facts = learned(shop, dense, removed, filters=filters, norms=norms)
            facts = {key: value for key, value in facts.items() if key != "model"}
            yield pruned(shop, dense, name, removed, selection, facts)
        network = learned(shop, dense, removed, filters=True, norms=True)[1]["model"]
        model = paamops.pack(network, dense.channels, selection).eval()
        accuracies = shop.retrain(model, dense.seed, shop.start())
        yield run(dense, "filters train, and are kept", removed, selection, accuracies) | extras(
            dense, selection, facts
        )


def gate(shop):
    """The free gate and the explicit one, step by step in turns: what they compute and what a step takes."""
    removed = shop.scale.removed[-1]
    for dense in each_seed(shop):
        paams = {name: embedded(shop, dense, removed, gate=name) for name in ("free", "explicit")}
        loops = {name: steps(shop, dense.seed, paam) for name, paam in paams.items()}
        seconds, first = {name: [] for name in paams}, {}
        for number in range(shop.scale.learn * shop.steps()):
            for name, loop in loops.items():
                start = time.perf_counter()
                next(loop)
                seconds[name].append(time.perf_counter() - start)
                if number == 0:
                    first[name] = paams[name].attention.value.grad.clone()
        free = paams["free"]
        for name, paam in paams.items():
            selection = paam.keep()
            yield pruned(shop, dense, name, removed, selection, outcome(shop, paam, selection)) | {
                "milliseconds": 1e3 * statistics.median(seconds[name][1:] or seconds[name]),
                "gradient": ((first[name] - first["free"]).abs().max() / first["free"].abs().max()).item(),
                "difference": (paam.scores() - free.scores()).abs().max().item(),
                "same": (selection.keep == free.keep().keep).double().mean().item(),
            }


def learned(shop, dense, removed, filters=False, norms=False, **settings):
    """(Selection, facts) of scores that were learned with these settings; the same settings are learned with once."""
    key = dense.seed, removed, filters, norms, *sorted(settings.items())
    if key not in shop.learned:
        paam = embedded(shop, dense, removed, **settings)
        for _ in steps(shop, dense.seed, paam, filters, norms):
            pass
        selection = paam.keep()
        shop.learned[key] = selection, outcome(shop, paam, selection) | ({"model": paam.model} if filters else {})
    return shop.learned[key]


def embedded(shop, dense, removed, **settings):
    """A PAAM around a copy of the network."""
    model = copy.deepcopy(dense.model)
    example = shop.dataset.normalise(shop.dataset.train.images[:2])
    return paamops.PAAM(model, example, params=budget(dense.channels, removed), seed=dense.seed, **settings)


def steps(shop, seed, paam, filters=False, norms=False):
    """Learn scores, a step at each `next`; the images come as in training: in random order, cropped and flipped."""
    dataset, model = shop.dataset, paam.model
    model.requires_grad_(filters).train(norms)
    optimizers = [torch.optim.SGD(paam.attention.parameters(), lr=RATE, momentum=MOMENTUM)]
    if filters:  # at the learning rate that retraining starts with
        rates = training.learning_rates(shop.schedule, shop.scale.epochs - shop.start(), shop.start())
        schedule = replace(shop.schedule, rate=rates[0])
        optimizers.append(training.make_optimizer(model, schedule, torch.device("cpu")))
    for epoch in range(shop.scale.learn):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for images, labels in data.batches(dataset.train, shop.scale.batch_size, generator):
            images = dataset.normalise(training.augment(images, dataset.flip, generator))
            for optimizer in optimizers:
                optimizer.zero_grad()
            with paam.scoring():
                loss = F.cross_entropy(model(images), labels) + paam.penalty()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            yield
    model.requires_grad_(True).eval()


@torch.no_grad()
def outcome(shop, paam, selection):
    """What was learned: the accuracy of the whole network times its scores, the threshold, λ at the end."""
    with paam.scoring():
        scored = shop.accuracy(paam.model)
    return {"scored": scored, "threshold": float(selection.threshold), "lambda": paam.lambda_}


def pruned(shop, dense, variant, removed, selection, facts=None):
    """The run of what `selection` leaves of the dense network, retrained."""
    result = run(dense, variant, removed, selection, shop.one_shot(dense, selection))
    return result | extras(dense, selection, facts or {})


def extras(dense, selection, facts):
    """Beside `facts` the share of its filters that the thinnest layer keeps, of those that can lose some."""
    channels, offsets = dense.channels, dense.channels.offsets.tolist()
    kept = kept_filters(channels, selection).values()
    free = [not channels.pinned[channels.sets[a:b]].all() for a, b in itertools.pairwise(offsets)]
    sizes = [b - a for a, b in itertools.pairwise(offsets)]
    shares = [count / size for count, size, can in zip(kept, sizes, free, strict=True) if can]
    return facts | {"thinnest": min(shares)}
