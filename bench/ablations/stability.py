"""The ablation that compares scores: over batches of images and of noise, and in the two orders of the power p."""

import itertools

import torch
from scipy.stats import spearmanr

import paamops
from bench.ablations import scores
from bench.ablations.pruning import budget, each_seed

BATCHES = 8  # of each kind of input (paper, Figure 3)
LOWEST = 0.3  # of a layer's filters
KINDS = (
    ("images", "images"),
    ("normal", "normal"),
    ("uniform", "uniform"),
    ("images", "normal"),
    ("images", "uniform"),
)


def stability(shop):
    """Scores of eight batches of images and of noise held against each other, and of the two orders of p (Figure 3)."""
    for dense in each_seed(shop):
        batches = inputs(shop, dense.seed)
        found = {
            kind: [paamops.score(dense.model, dense.channels, batch) for batch in several]
            for kind, several in batches.items()
        }
        for a, b in KINDS:
            pairs = itertools.combinations(found[a], 2) if a == b else itertools.product(found[a], found[b])
            yield from agreement(shop, dense, f"{a} and {b}", list(pairs))
        for p in (2, 4):
            pairs = [
                (scores.image_first(*args, p), scores.batch_first(*args, p))
                for args in ((dense.model, dense.channels, batch) for batch in batches["images"])
            ]
            yield from agreement(shop, dense, f"orders of p = {p}", pairs)


def inputs(shop, seed):
    """Eight batches of each kind: training images, and noise in place of them.

    "uniform" is an image whose every pixel is drawn from 0 to 255, "normal" a standard normal vector in place of the
    normalised image.
    """
    images = [shop.batch(1000 * seed + number) for number in range(BATCHES)]
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": images,
        "normal": [torch.randn(images[0].shape, generator=generator) for _ in images],
        "uniform": [shop.dataset.normalise(torch.randint(256, images[0].shape, generator=generator)) for _ in images],
    }


def agreement(shop, dense, variant, pairs):
    """For every layer that can be pruned, how far the scores of the pairs agree; and for the network, at equal size."""
    channels, offsets = dense.channels, dense.channels.offsets.tolist()
    for number, layer in enumerate(channels.layers):
        rows = slice(offsets[number], offsets[number + 1])
        if channels.pinned[channels.sets[rows]].all():
            continue
        found = [correlation(a[rows], b[rows]) for a, b in pairs]
        found = [value for value in found if value is not None]
        yield {
            "seed": dense.seed,
            "variant": variant,
            "layer": layer.name,
            "filters": rows.stop - rows.start,
            "correlation": sum(found) / len(found) if found else None,
            "least": min(found, default=None),
            "lowest": sum(overlap(a[rows], b[rows]) for a, b in pairs) / len(pairs),
        }
    whole = channels.cost()
    size = budget(channels, shop.scale.removed[0])
    shares = []
    for a, b in pairs:
        first, second = (~paamops.select(channels, each, params=size).keep[channels.sets] for each in (a, b))
        shares.append(2 * (first & second).sum().item() / (first.sum() + second.sum()).item())
    yield {
        "seed": dense.seed,
        "variant": variant,
        "layer": None,
        "filters": whole.filters,
        "removed": shop.scale.removed[0],
        "same": sum(shares) / len(shares),
    }


def correlation(a, b):
    """Spearman's rank correlation, or None where one side has one value only."""
    if (a == a[0]).all() or (b == b[0]).all():
        return None
    return float(spearmanr(a.double().numpy(), b.double().numpy()).statistic)


def overlap(a, b):
    """The share of the lowest 30 % of the filters by `a` that are among those by `b`; ties go by index."""
    count = max(1, round(LOWEST * len(a)))
    lowest = [set(x.argsort(stable=True)[:count].tolist()) for x in (a, b)]
    return len(lowest[0] & lowest[1]) / count
