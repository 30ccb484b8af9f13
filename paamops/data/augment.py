"""Batches of a split and their augmentation, on the device the data is on."""

import torch
from torch.nn import functional as F


def batches(split, size, generator, share=slice(None)):
    """The training batches (images, labels) of one epoch, in an order drawn from `generator`.

    What does not fill a last batch is left out of this epoch: a batch norm cannot learn from a batch of one image. A
    split smaller than `size` is one batch. `share` is the part of every batch that this process takes.
    """
    size = min(size, len(split))
    order = torch.randperm(len(split), generator=generator, device=generator.device).to(split.labels.device)
    for start in range(0, len(split) - size + 1, size):
        chosen = order[start : start + size][share]
        yield split.images[chosen], split.labels[chosen]


def crop(images, padding, generator):
    """Every image of (n, c, h, w) shifted by its own random offset of up to `padding` pixels a way, zeros coming in."""
    n, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    draw = torch.randint(2 * padding + 1, (2, n), generator=generator, device=generator.device).to(images.device)
    rows = draw[0, :, None] + torch.arange(h, device=images.device)  # (n, h)
    columns = draw[1, :, None] + torch.arange(w, device=images.device)  # (n, w)
    image = torch.arange(n, device=images.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return cropped.contiguous()  # training sees the same layout as evaluation: a model may call view


def flip(images, generator):
    """Every image of (n, c, h, w) mirrored left to right with probability a half."""
    mirrored = torch.rand(len(images), generator=generator, device=generator.device).to(images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
