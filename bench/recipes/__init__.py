"""The papers' results on CIFAR-10 as recipes: what is run, and what the paper reports for it.

Schedules, batch sizes and weight decay are those of AAP's Table 1, which `paamops.training.SCHEDULES` holds; PAAM's
paper (the part of it that is public here) gives none, nor does GlobalPru's.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A network, and the words of `python -m paamops prune` that say how it is pruned and to what.

    `accuracy` is that of the paper's unpruned network, in %, or None where it is not given; `paper` its (accuracy drop
    in points, parameters removed in %, FLOPs removed in %), each or all of them None where it reports none.
    """

    model: str
    words: tuple
    accuracy: float | None
    paper: tuple | None


def aap(model, drop, minimise, accuracy, paper):
    """AAP within an accuracy drop, in points, as small as it goes. Source: AAP, Tables 2 and 3."""
    words = ("--method", "aap", "--max-accuracy-drop", str(drop), "--minimise", minimise)
    return Recipe(model, words, accuracy, paper)


def paam(model, gain, removed):
    """PAAM to the share of the parameters that the paper removes, in %. Source: PAAM, abstract."""
    words = ("--method", "paam", "--params", f"{1 - removed / 100:.4g}")
    return Recipe(model, words, None, (-gain, removed, None))


def globalpru(model, drop, flops, *words):
    """GlobalPru to the FLOPs or the rate of the paper, §4.1 and §4.2: accuracy drop, in points; FLOPs removed, in %."""
    return Recipe(model, ("--method", "globalpru", *words), None, (drop, None, flops))


RECIPES = {
    "resnet56-aap-p-0": aap("resnet56", 0.0, "params", 92.84, (-0.33, 79.11, 56.97)),
    "resnet56-aap-p-1": aap("resnet56", 1.0, "params", 92.84, (0.86, 88.23, 70.09)),
    "resnet56-aap-f-0": aap("resnet56", 0.0, "flops", 92.84, (-0.08, 65.78, 70.13)),
    "vgg16-aap-p-0": aap("vgg16", 0.0, "params", 93.64, None),
    "vgg16-aap-f-0": aap("vgg16", 0.0, "flops", 93.64, (-0.16, 72.85, 61.17)),
    "vgg19-aap-p-0": aap("vgg19", 0.0, "params", 93.90, (-0.26, 85.99, 56.22)),
    "vgg19-aap-f-0": aap("vgg19", 0.0, "flops", 93.90, (-0.03, 87.63, 61.31)),
    "resnet56-paam": paam("resnet56", 1.02, 52.3),
    "resnet110-paam": paam("resnet110", 1.19, 54.0),
    "vgg16-globalpru-fixed": globalpru("vgg16", 0.21, 55.2, "--flops", "0.448"),
    "vgg16-globalpru-mixed": globalpru("vgg16", None, 56.7, "--flops", "0.433", "--mode", "mixed"),
    "resnet20-globalpru": globalpru("resnet20", 0.34, None, "--rate", "0.68"),
}
