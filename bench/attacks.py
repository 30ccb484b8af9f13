"""Attacks on a classifier: images changed by at most eps a pixel so that it errs. Images are in [0, 1].

`classify` maps images (n, c, h, w) in [0, 1] to logits (n, classes), each image's by itself: a network is in eval mode,
and what it does before, such as normalising, is a part of `classify`. Only the images' gradient is taken, the
parameters' are not touched.
"""

import torch
from torch.nn import functional as F

OVERSHOOT = 2.5  # of eps, that all steps of PGD go together: it can cross the ball from where it starts


def fgsm(classify, images, labels, eps):
    """clip(x + eps · sign(∂L/∂x), 0, 1), L the cross-entropy (Goodfellow et al. 2015, fast gradient sign method)."""
    return (images + eps * gradient(classify, images, labels).sign()).clamp(0, 1)


def pgd(classify, images, labels, eps, steps=10, seed=0):
    """x ← project(x + a · sign(∂L/∂x)), `steps` times, from a random point of the ball (Madry et al. 2018).

    The projection is on the pixels within eps of the image and within [0, 1]; a = 2.5 eps / steps, as theirs. The start
    is drawn on the CPU from `seed`: the same for every network and on every device.
    """
    low, high = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    draw = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    found = torch.clamp(images + eps * (2 * draw.to(images.device) - 1), low, high)
    for _ in range(steps):
        found = found + OVERSHOOT * eps / steps * gradient(classify, found, labels).sign()
        found = torch.clamp(found, low, high)
    return found


def gradient(classify, images, labels):
    """∂L/∂x. L is summed over the images, so that none's gradient becomes smaller with their number."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(classify(images), labels, reduction="sum"), images)[0]
