"""leaky_exponential and tempered_sigmoid, with their l1 term, against eager PyTorch, torch.compile and a plain copy."""

import torch

from paamops.ops.leaky_exponential import leaky_exponential
from paamops.ops.tempered_sigmoid import tempered_sigmoid

from .harness import Case, compiled

FILTERS = [2032, 30_000]  # of ResNet-56, and of a large network


def leaky(x):
    """The score and its l1 term in eager PyTorch."""
    score = torch.where(x <= 0, x.exp(), 1 + 0.1 * x)
    return score, score.abs().sum()


def sigmoid(x):
    """The same with a sigmoid of temperature 1."""
    score = torch.sigmoid(x)
    return score, score.abs().sum()


def trained(activation):
    """Score, l1 and the gradient of both: one step of training."""

    def step(x):
        x = x.detach().requires_grad_()
        score, l1 = activation(x)
        (grad,) = torch.autograd.grad((score, l1), x, (torch.ones_like(score), torch.ones_like(l1)))
        return score.detach(), l1.detach(), grad

    return step


def case(op, ours, eager, filters, training):
    """Forward: x is read, the score is written. Training, besides: x and ∂score are read, ∂x is written."""
    step = trained if training else lambda activation: activation
    return Case(
        name=f"{op} {filters} float32{' forward and backward' if training else ''}",
        op=op,
        make=lambda device: (torch.randn(filters, device=device),),
        run=step(ours),
        check=lambda x: step(eager)(x.double()),
        baselines={"eager": step(eager), "compile": step(compiled(eager)), "copy": lambda x: x.clone()},
        bytes=(5 if training else 2) * filters * 4,
        cold=False,  # the scores have just been computed
    )


CASES = [
    case(op, ours, eager, filters, training)
    for op, ours, eager in (
        ("leaky_exponential", lambda x: leaky_exponential(x, l1=True), leaky),
        ("tempered_sigmoid", lambda x: tempered_sigmoid(x, l1=True), sigmoid),
    )
    for filters in FILTERS
    for training in (False, True)
]
