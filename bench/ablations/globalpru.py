"""The ablations of GlobalPru: for each seed one warmed-up network and its votes; then learned, cut and fine-tuned."""

import copy
from dataclasses import replace

import torch

import paamops
from bench.ablations import paam, scores
from bench.ablations.pruning import each_seed, run
from paamops import training

BETAS = (0.0, 1e-4, 1e-2, 1e-1, 1.0, 10.0)
RATES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8)
RATE, BETA = 0.5, 1.0  # where they are not what is varied
WITHOUT = "mean saliency, no stage"
LATE = f"β = {BETA:g}, from the rewound epoch on"
SCALES = {
    "digits": replace(paam.SCALES["digits"], rewind=0.5, removed=RATES),
    "fashion-mnist": replace(paam.SCALES["fashion-mnist"], rewind=0.5, removed=RATES),
    "cifar10": replace(paam.SCALES["cifar10"], rewind=0.5, removed=RATES),
}


def betas(shop):
    """β from 0 to 10, a late start, and a cut by the images' mean saliencies without the stage that learns to rank."""
    for dense in each_seed(shop):
        warm = warmed(shop, dense)
        yield cut(shop, dense, warm, WITHOUT, by_mean(shop, warm))
        for beta in BETAS:
            yield taught(shop, dense, warm, f"β = {beta:g}", beta=beta)
        yield taught(shop, dense, warm, LATE, start=shop.start())


def election(shop):
    """How the ranking that is learned comes about, and what Φ ranks by."""
    for dense in each_seed(shop):
        warm = warmed(shop, dense)
        generator = torch.Generator().manual_seed(dense.seed)
        rankings = {
            "assignment": None,
            "Borda count": warm_copy(shop, warm).elect("borda"),
            "mean saliency": by_mean(shop, warm),
            "random": [torch.randperm(len(sets), generator=generator) for sets in warm.sets],
        }
        for name, ranking in rankings.items():
            yield taught(shop, dense, warm, name, rankings=ranking)
        yield taught(shop, dense, warm, "assignment, logits", logits=True)


def rates(shop):
    """Accuracy over pruning rates against train, prune, fine-tune by the filters' l1 norms (the paper's Figure 2)."""
    for dense in each_seed(shop):
        warm = warmed(shop, dense)
        for rate in shop.scale.removed:
            yield taught(shop, dense, warm, "GlobalPru", rate=rate)
            norms = paamops.weight_scores(dense.model, dense.channels, "l1")
            found = scores.in_shares(dense.channels, norms)
            selection = paamops.select(dense.channels, found, threshold=rate)
            model = paamops.pack(dense.model, dense.channels, selection)
            accuracies = {"before": shop.accuracy(model)}
            # As many epochs as warm-up, learning to rank and fine-tuning have together.
            epochs = 3 * shop.scale.epochs - 2 * shop.start()
            train(shop, model, dense.seed, epochs, round(epochs / (1 - shop.scale.rewind)) - epochs)
            accuracies["after"] = shop.accuracy(model.eval())
            yield run(dense, "magnitude", rate, selection, accuracies)


def warmed(shop, dense):
    """A GlobalPru of the dense network whose excitations were trained; all training images have voted."""
    gp = paamops.GlobalPru(copy.deepcopy(dense.model), shop.example, rate=RATE, beta=BETA, seed=dense.seed)
    train(shop, gp.model, dense.seed, shop.scale.epochs - shop.start(), shop.start(), gp.penalty)
    gp.vote(images(shop))
    return gp


def warm_copy(shop, warm, **settings):
    """Another GlobalPru with the same network and votes."""
    gp = paamops.GlobalPru(copy.deepcopy(warm.model), shop.example, **{"rate": RATE, "beta": BETA, **settings})
    gp.take_votes(warm.votes)
    return gp


def by_mean(shop, warm):
    """The channels of each excitation by the mean of the images' saliencies: no votes."""
    sums = ([each.sum(0) for each in batch] for batch in warm.saliencies(images(shop)))
    totals = [sum(parts) for parts in zip(*sums, strict=True)]
    return [total.argsort(descending=True, stable=True) for total in totals]


def taught(shop, dense, warm, variant, rankings=None, start=0, **settings):
    """The run of a ranking, by default the elected one, that is learned from epoch `start` on, cut and fine-tuned."""
    gp = warm_copy(shop, warm, **settings)
    gp.elect() if rankings is None else gp.use(rankings)
    first = means(gp.agreement(images(shop)))
    train(shop, gp.model, dense.seed, shop.scale.epochs - start, start, gp.penalty)
    more = {"whole": shop.accuracy(gp.model.eval()), "kendall before": first[0], "overlap before": first[1]}
    more |= dict(zip(("kendall", "overlap"), means(gp.agreement(images(shop))), strict=True))
    return cut(shop, dense, gp, variant) | more


def cut(shop, dense, gp, variant, rankings=None):
    """The run of what the ranking of `gp` leaves of its network, fine-tuned on the task's loss alone."""
    if rankings is not None:
        gp = warm_copy(shop, gp)
        gp.use(rankings)
    model, selection = gp.prune().eval(), gp.keep()
    accuracies = {"before": shop.accuracy(model)}
    train(shop, model, dense.seed, shop.scale.epochs - shop.start(), shop.start())
    whole = {"whole": shop.accuracy(gp.model.eval())}
    return run(dense, variant, gp.rate, selection, accuracies | {"after": shop.accuracy(model.eval())}) | whole


def train(shop, model, seed, epochs, start_epoch, penalty=None):
    settings = {"batch_size": shop.scale.batch_size, "seed": seed, "start_epoch": start_epoch, "quiet": True}
    training.train(model, shop.dataset, shop.fabric, shop.schedule, epochs=epochs, penalty=penalty, **settings)


def images(shop):
    """The training images, as the network reads them, in batches."""
    return [shop.dataset.normalise(part) for part in shop.dataset.train.images.split(512)]


def means(agreement):
    return [float(each.mean()) for each in agreement]
