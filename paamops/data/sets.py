"""What a data set is: three splits that share no image, as tensors, and the statistics of the training split."""

from dataclasses import dataclass, replace

import torch

VALIDATION = 0.1  # of what is left without the test split


@dataclass(frozen=True)
class Split:
    """images (n, c, h, w) uint8 and labels (n,) int64, on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three splits; mean and std (c,) of the training split's pixels; whether a mirrored image keeps its class."""

    name: str
    num_classes: int
    train: Split
    validation: Split
    test: Split
    mean: torch.Tensor
    std: torch.Tensor
    flip: bool

    @property
    def shape(self):
        """(c, h, w) of one image."""
        return tuple(self.train.images.shape[1:])

    def to(self, device):
        """The whole set on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("train", "validation", "test", "mean", "std")}
        return replace(self, **moved)

    def normalise(self, images):
        """(images − mean) / std, as float32."""
        return (images.float() - self.mean[:, None, None]) / self.std[:, None, None]


def assemble(name, num_classes, train, test, flip, held_out=VALIDATION):
    """A Dataset: the share `held_out` of each class of `train` becomes the validation split; statistics of the rest."""
    rest, validation = stratified(train.labels, held_out)
    validation = Split(train.images[validation], train.labels[validation])
    train = Split(train.images[rest], train.labels[rest])
    mean, std = statistics(train.images)
    return Dataset(name, num_classes, train, validation, test, mean, std, flip)


def statistics(images):
    """Mean and standard deviation (c,) of uint8 pixels, from their histogram; a constant channel's deviation is 1."""
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean)
        deviations.append((share * (values - mean) ** 2).sum().sqrt())
    std = torch.stack(deviations)
    return torch.stack(means).float(), torch.where(std > 0, std, 1).float()


def stratified(labels, fraction, seed=0):
    """Indices (rest, part): `part` holds `fraction` of each class, rounded, at least one; both ascending.

    The seed is fixed so that every run, whatever its own seed, holds out the same images: a saved model is never
    tested on what it was trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(len(members) * fraction))
        taken[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~taken).nonzero().flatten(), taken.nonzero().flatten()
