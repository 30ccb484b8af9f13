"""filter_norms over all layers of a network against torch.linalg.vector_norm layer by layer, eager and compiled.

What must be done: every weight is read once, with an absolute value or a product and an addition each.
"""

import torch

from paamops.ops.filter_norms import filter_norms

from .harness import Case, compiled
from .pack_channels import resnet50_shapes


def densenet121_weights():
    """The shapes of the weights of DenseNet-121's convolutions and of its classifier, in order."""
    shapes, channels = [(64, 3, 7, 7)], 64
    for layers in (6, 12, 24, 16):
        for _ in range(layers):
            shapes += [(128, channels, 1, 1), (32, 128, 3, 3)]
            channels += 32
        if layers != 16:
            shapes.append((channels // 2, channels, 1, 1))
            channels //= 2
    return [*shapes, (1000, channels)]


NETWORKS = {
    "ResNet-50": [shape for shape in resnet50_shapes() if len(shape) > 1],
    "DenseNet-121": densenet121_weights(),
}


def make(shapes):
    return lambda device: tuple(torch.randn(shape, device=device) for shape in shapes)


def eager(*weights, p):
    return torch.cat([torch.linalg.vector_norm(weight.flatten(1), p, dim=1) for weight in weights])


def case(network, p, target):
    shapes = NETWORKS[network]

    def loop(*weights):
        return eager(*weights, p=p)

    return Case(
        name=f"filter_norms {network} l{p} float32",
        op="filter_norms",
        make=make(shapes),
        run=lambda *weights: filter_norms(weights, p=p),
        check=lambda *weights: eager(*[weight.double() for weight in weights], p=p),
        baselines={"eager": loop, "compile": compiled(loop)},
        bytes=4 * sum(torch.Size(shape).numel() + shape[0] for shape in shapes),
        target=target,
    )


CASES = [
    case("ResNet-50", 1, {"eager": 3, "compile": 1}),
    case("ResNet-50", 2, {"eager": 1, "compile": 1}),
    case("DenseNet-121", 1, {"eager": 3, "compile": 1}),
    case("DenseNet-121", 2, {"eager": 1, "compile": 1}),
]
