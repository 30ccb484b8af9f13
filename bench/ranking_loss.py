"""ranking_loss over all layers of a network against the formula in eager PyTorch and compiled, layer by layer.

What must be done for each of N · C elements of a layer: forward an exponential, a quarter of a logarithm and a dozen
operations; backward an exponential, for the top channels a division, and a dozen operations. Moved: the saliencies are
read; the backward reads them and writes their gradients.
"""

import torch

from paamops.ops.ranking_loss import ranking_loss

from .harness import Case, compiled

IMAGES = 128
NETWORKS = {  # channels of every convolution
    "ResNet-56": [16] * 19 + [32] * 18 + [64] * 18,
    "VGG-16": [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6,
}


def inputs(channels, gradients):
    """Saliencies as a sigmoid yields them, and a ranking for each layer."""

    def make(device):
        saliencies = [torch.rand(IMAGES, c, device=device).requires_grad_(gradients) for c in channels]
        return (*saliencies, *[torch.randperm(c).to(device) for c in channels])

    return make


def case(network, gradients, with_compile, target):
    """Half of the channels are kept."""
    channels = NETWORKS[network]
    tops = [c // 2 for c in channels]

    def split(tensors):
        return tensors[: len(channels)], tensors[len(channels) :]

    def ours(*tensors):
        return ranking_loss(*split(tensors), tops)

    def eager(*tensors):
        total = 0
        for saliency, ranking, top in zip(*split(tensors), tops, strict=True):
            ranked = saliency[:, ranking]
            sums = ranked.flip(1).logcumsumexp(1).flip(1)
            total = total + (sums - ranked)[:, :top].sum(1).mean()
        return total

    def step(function):
        def run(*tensors):
            phi = function(*tensors)
            return (phi, *torch.autograd.grad(phi, split(tensors)[0])) if gradients else phi

        return run

    def check(*tensors):
        saliencies, rankings = split(tensors)
        return step(eager)(*[s.detach().double().requires_grad_(gradients) for s in saliencies], *rankings)

    elements = IMAGES * sum(channels)
    return Case(
        name=f"ranking_loss {network} {IMAGES} images float32{' forward and backward' * gradients}",
        op="ranking_loss",
        make=inputs(channels, gradients),
        run=step(ours),
        check=check,
        baselines={"eager": step(eager), **({"compile": step(compiled(eager))} if with_compile else {})},
        bytes=4 * elements * (3 if gradients else 1) + 8 * sum(channels) * (2 if gradients else 1),
        target=target,
        cold=False,  # the saliencies have just been computed
    )


CASES = [
    case("ResNet-56", False, False, {}),
    case("ResNet-56", True, False, {"eager": 5}),  # compiling the loop over its 55 layers takes minutes
    case("VGG-16", True, True, {"eager": 5}),
]
