"""project_filters on the layers of ResNet-56 and VGG-16 against a product per layer, as one would write it in torch."""

import torch

from paamops.ops.project_filters import project_filters

from .harness import Case, compiled

WIDTH = 64  # queries and keys of 32 dimensions each
NETWORKS = {  # (filters, entries of a filter) of every convolution
    "ResNet-56": [(16, 27), *[(16, 144)] * 18, (32, 144), *[(32, 288)] * 17, (64, 288), *[(64, 576)] * 17],
    "VGG-16": [(64, 27), (64, 576), (128, 576), (128, 1152), (256, 1152), *[(256, 2304)] * 2, (512, 2304)]
    + [(512, 4608)] * 5,
}


def standard(row):
    """The rows of a layer, standardised over all their entries."""
    std, mean = torch.std_mean(row, correction=0)
    return (row - mean) / std


def case(network, standardised, gradient):
    """Of all layers of a network: the forward pass, or that and the gradient of weight."""
    shapes = NETWORKS[network]

    def make(device):
        rows = [torch.randn(shape, device=device) for shape in shapes]
        # Sums of up to 4608 terms cancel; so scaled, the tolerance is some 1e-7 of what they are made of.
        weight = torch.randn(sum(d for _, d in shapes), WIDTH, device=device) / 256
        return (*rows, weight, torch.randn(sum(n for n, _ in shapes), WIDTH, device=device) / 256)

    def by_layer(rows, weight):
        parts = weight.split([d for _, d in shapes])
        rows = [standard(row) for row in rows] if standardised else rows
        return torch.cat([row @ part for row, part in zip(rows, parts, strict=True)])

    def together(rows, weight):
        return project_filters(rows, weight, standardised)

    def passes(function):
        def call(*inputs):
            *rows, weight, grad = inputs
            if not gradient:
                return function(rows, weight)
            weight = weight.detach().requires_grad_()
            result = function(rows, weight)
            return result.detach(), *torch.autograd.grad(result, weight, grad)

        return call

    def check(*inputs):
        results = passes(by_layer)(*[t.double() for t in inputs])
        return tuple(r.float() for r in results) if gradient else results.float()

    entries, products = sum(n * d for n, d in shapes), sum(2 * n * d * WIDTH for n, d in shapes)
    around = sum((n + d) * WIDTH for n, d in shapes)
    return Case(
        name=f"project_filters {network}{' standardised' * standardised}{' forward and backward' * gradient}",
        op="project_filters",
        make=make,
        run=passes(together),
        check=check,
        baselines={"eager": passes(by_layer), "compile": compiled(passes(by_layer))}
        if network != "VGG-16"
        else {"eager": passes(by_layer)},
        bytes=4 * (entries + around) * (1 + gradient),  # rows, weight and result, each pass
        flops=products * (1 + gradient),
    )


CASES = [
    case("ResNet-56", False, False),
    case("ResNet-56", True, True),
    case("VGG-16", False, False),
    case("VGG-16", True, True),
]
