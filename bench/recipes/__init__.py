"""AAP's results on CIFAR-10 as recipes: what is run, and what the paper reports for it.

Schedules, batch sizes and weight decay are those of AAP's Table 1, which `paamops.training.SCHEDULES` holds.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """AAP on CIFAR-10 with the accuracy drop allowed, in points, and what is made small: "params" or "flops".

    `accuracy` is that of the paper's unpruned network, in %; `paper` its (accuracy drop in points, parameters removed
    in %, FLOPs removed in %), or None where it reports none. Source: AAP, Tables 2 and 3.
    """

    model: str
    drop: float
    minimise: str
    accuracy: float
    paper: tuple | None


RECIPES = {
    "resnet56-aap-p-0": Recipe("resnet56", 0.0, "params", 92.84, (-0.33, 79.11, 56.97)),
    "resnet56-aap-p-1": Recipe("resnet56", 1.0, "params", 92.84, (0.86, 88.23, 70.09)),
    "resnet56-aap-f-0": Recipe("resnet56", 0.0, "flops", 92.84, (-0.08, 65.78, 70.13)),
    "vgg16-aap-p-0": Recipe("vgg16", 0.0, "params", 93.64, None),
    "vgg16-aap-f-0": Recipe("vgg16", 0.0, "flops", 93.64, (-0.16, 72.85, 61.17)),
    "vgg19-aap-p-0": Recipe("vgg19", 0.0, "params", 93.90, (-0.26, 85.99, 56.22)),
    "vgg19-aap-f-0": Recipe("vgg19", 0.0, "flops", 93.90, (-0.03, 87.63, 61.31)),
}
