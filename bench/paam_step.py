"""A training step of ResNet-56 that learns PAAM's scores, against the plain step.

A step is forward, loss, backward and SGD; filters and attention both train, in train mode, so that all that differs is
what PAAM adds. Per step that is, with P parameters and F filters: the filters are copied and standardised (read twice,
written twice), projected (2 · 64 · P FLOPs forward and as many backward), scored, and the scores folded into the
weights that read and into the norms (forward: read and write P; backward: read 2 P, write P). All of it is of the order
of the 0.9 million parameters, where the step moves 128 · 2.5 million activations several times.
"""

import torch
from torch.nn import functional as F

import paamops
from paamops import models

from .harness import Case

BATCH = 128


def make(device, layout=torch.contiguous_format):
    """Model, PAAM, an optimizer for each, one batch. The learning rate is 0: every step is the same."""
    torch.manual_seed(0)
    model = models.build("resnet56").to(device, memory_format=layout).train()
    images = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=layout)
    labels = torch.randint(10, (BATCH,), device=device)
    paam = paamops.PAAM(model, images[:2], params=0.5)
    torch.nn.init.normal_(paam.attention.value, std=0.1)  # scores that differ
    plain = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    both = torch.optim.SGD([*model.parameters(), *paam.attention.parameters()], lr=0.0, momentum=0.9)
    return model, paam, plain, both, images, labels


def scored_step(model, paam, plain, both, images, labels):
    """The loss of a step with scores."""
    both.zero_grad()
    with paam.scoring():
        task = F.cross_entropy(model(images), labels)
    loss = task + paam.penalty()
    loss.backward()
    both.step()
    return task.detach()


def plain_step(model, paam, plain, both, images, labels):
    """The loss of a step without."""
    plain.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    plain.step()
    return loss.detach()


@torch.no_grad()
def explicit_loss(model, paam, plain, both, images, labels):
    """The same by the explicit product."""
    scores, _ = paam.attention()
    with paam.gates.explicit(model, scores[paam.first.to(scores.device)]):
        return F.cross_entropy(model(images), labels)


CASES = [
    Case(
        name=f"PAAM step of ResNet-56, batch {BATCH}, float32, {name}",
        op="PAAM step",
        make=lambda device, layout=layout: make(device, layout),
        run=scored_step,
        check=explicit_loss,
        baselines={"plain step": plain_step},
        target={"plain step": 1 / 1.10},
        cold=False,
    )
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last))
]
