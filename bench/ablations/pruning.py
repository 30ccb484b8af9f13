"""The ablations that prune and retrain. Each takes a Workshop and yields its runs, one a seed and variant: dicts."""

import copy
import itertools

import torch

import paamops
from bench.ablations import scores, thresholds

MAPPINGS = {
    "mean, p = 1": ("mean", 1),
    "max, p = 1": ("max", 1),
    "sum, p = 1": ("sum", 1),
    "mean, p = 2": ("mean", 2),
    "mean, p = 4": ("mean", 4),
}
CRITERIA = ("attention", "attention, layer-aware", "l1", "l1 / size", "l1 in shares", "random")


def mapping(shop):
    """One-shot pruning by attention under each mapping function, retrained (§4.4, A.2.2)."""
    for dense in each_seed(shop):
        for removed, (name, (reduction, p)) in itertools.product(shop.scale.removed, MAPPINGS.items()):
            found = paamops.score(dense.model, dense.channels, shop.batch(dense.seed), p=p, reduction=reduction)
            selection = paamops.select(dense.channels, found, params=budget(dense.channels, removed))
            yield run(dense, name, removed, selection, shop.one_shot(dense, selection))


def order(shop):
    """One-shot pruning by the mean over the images after the power p, and before it as in the authors' code.

    Every layer loses an equal share of its filters: the two orders are to differ in the ranks only.
    """
    orders = {"image first": scores.image_first, "batch first": scores.batch_first}
    for dense in each_seed(shop):
        batch = shop.batch(dense.seed)
        for removed, p, (name, score) in itertools.product(shop.scale.removed, (2, 4), orders.items()):
            found = scores.in_shares(dense.channels, score(dense.model, dense.channels, batch, p))
            selection = paamops.select(dense.channels, found, params=budget(dense.channels, removed))
            yield run(dense, f"{name}, p = {p}", removed, selection, shop.one_shot(dense, selection))


def criterion(shop):
    """Iterative pruning by attention, by l1 norms and at random: equal sizes after each round (§4.4, Figure 2a)."""
    for dense in each_seed(shop):
        for name in CRITERIA:
            model = dense.model
            for number, removed in enumerate(shop.scale.rounds):
                channels = shop.trace(model)
                found = rank(shop, name, model, channels, dense.seed + 1000 * number)
                size = budget(dense.channels, removed)
                if name == "attention, layer-aware":  # its weights are those of what this round begins with
                    selection = thresholds.layer_aware(channels, found, size)
                else:
                    selection = paamops.select(channels, found, params=size)
                model = paamops.pack(model, channels, selection)
                accuracies = shop.retrain(model, dense.seed, shop.start())
                yield run(dense, name, removed, selection, accuracies) | {"round": number + 1}


def layer_aware(shop):
    """One-shot pruning by thresholds T · w_l against one threshold for all layers (§3.3)."""
    for dense in each_seed(shop):
        channels = dense.channels
        found = scores.attention(shop, dense.model, channels, dense.seed)
        for removed in shop.scale.removed:
            size = budget(channels, removed)
            selections = {
                "one threshold": paamops.select(channels, found, params=size),
                "layer-aware": thresholds.layer_aware(channels, found, size),
            }
            for name, selection in selections.items():
                yield run(dense, name, removed, selection, shop.one_shot(dense, selection)) | {
                    "widths": kept_filters(channels, selection)
                }


def rewinding(shop):
    """Retraining from the learning rate of several epochs, the weights kept or rewound to that epoch too (A.2.1)."""
    removed = shop.scale.removed[0]
    for dense in each_seed(shop):
        channels = dense.channels
        found = scores.attention(shop, dense.model, channels, dense.seed)
        selection = paamops.select(channels, found, params=budget(channels, removed))
        original = paamops.pack(dense.model, channels, selection)
        for epoch, weights in itertools.product(shop.rewound(), ("kept", "rewound")):
            model = paamops.pack(dense.model, channels, selection)
            if weights == "rewound":
                whole = copy.deepcopy(dense.model)
                whole.load_state_dict(dense.states[epoch])
                model = paamops.pack(whole, channels, selection).eval()
            accuracies = shop.retrain(model, dense.seed, epoch)
            result = run(dense, f"epoch {epoch}, weights {weights}", removed, selection, accuracies)
            yield result | {"epoch": epoch, "weights": weights, "distance": distance(model, original)}


def each_seed(shop):
    return (shop.dense(seed) for seed in range(shop.scale.seeds))


def budget(channels, removed):
    """The number of parameters that may stay, where a share `removed` goes."""
    return int((1 - removed) * channels.cost().params)


def run(dense, variant, removed, selection, accuracies):
    """One run as plain values. `removed` was asked for; `params_removed` and `flops_removed` were reached."""
    whole, left = dense.channels.cost(), selection.achieved
    return {
        "seed": dense.seed,
        "variant": variant,
        "removed": removed,
        "params_removed": 1 - left.params / whole.params,
        "flops_removed": 1 - left.flops / whole.flops,
        "filters": left.filters,
        "dense": dense.accuracy,
        **accuracies,
    }


def kept_filters(channels, selection):
    """The filters that stay in each layer, by its name."""
    kept = selection.keep[channels.sets]
    counts = torch.bincount(channels.filters[kept], minlength=len(channels.layers)).tolist()
    return dict(zip((layer.name for layer in channels.layers), counts, strict=True))


def rank(shop, criterion, model, channels, seed):
    """(F,) scores under a criterion of CRITERIA."""
    if criterion.startswith("attention"):
        return scores.attention(shop, model, channels, seed)
    if criterion == "random":
        return paamops.weight_scores(model, channels, "random", seed)
    if criterion == "l1 / size":
        return scores.l1_mean(model, channels)
    norms = paamops.weight_scores(model, channels, "l1")
    return scores.in_shares(channels, norms) if criterion == "l1 in shares" else norms


def distance(model, other):
    """The L2 distance between the parameters of two networks of one shape: the paper's stability to pruning."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return sum((a.detach().double() - b.detach().double()).square().sum().item() for a, b in pairs) ** 0.5
