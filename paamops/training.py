"""Training on Lightning Fabric: cross-entropy, SGD with Nesterov momentum, the papers' schedules."""

import sys
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from paamops import data


@dataclass(frozen=True)
class Schedule:
    """A learning rate that falls to a tenth at each epoch of `decays`, out of `epochs`; batch size and weight decay."""

    rate: float
    decays: tuple
    epochs: int
    weight_decay: float
    batch_size: int


# AAP, Table 1. Its LeNet-5 trains on MNIST, the others on CIFAR-10; all CIFAR ResNets take that of its ResNet-56.
SCHEDULES = {
    "resnet": Schedule(rate=0.1, decays=(91, 136), epochs=182, weight_decay=2e-4, batch_size=128),
    "vgg": Schedule(rate=0.05, decays=(150, 180, 210), epochs=240, weight_decay=5e-4, batch_size=128),
    # The paper's 0.1 with its momentum of 0.9 diverges on MNIST from every initialisation tried; 0.02 does not.
    "lenet": Schedule(rate=0.02, decays=(), epochs=100, weight_decay=0.0, batch_size=256),
}


def schedule_for(name):
    """The schedule of the network `name`; a network of the user's own gets the residual networks'."""
    return SCHEDULES.get(name.rstrip("0123456789"), SCHEDULES["resnet"])


def learning_rates(schedule, epochs, rewind=0.0):
    """The learning rate of each of `epochs` epochs: the schedule from its fraction `rewind` on, compressed to fit."""
    start = rewind * schedule.epochs
    places = [start + (schedule.epochs - start) * epoch / epochs for epoch in range(epochs)]
    return [schedule.rate * 0.1 ** sum(place >= decay for decay in schedule.decays) for place in places]


def make_fabric(device="auto", precision="32-true", processes=1):
    """A Lightning Fabric on `device` ("auto", "cpu", "gpu", ...), at `precision`, with that many processes."""
    try:
        from lightning.fabric import Fabric
    except ImportError:
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise ModuleNotFoundError(
                "training needs Lightning Fabric, which is not installed: pip install paamops[train]"
            ) from error
    return Fabric(accelerator=device, precision=precision, devices=processes)


def train(model, dataset, fabric, schedule, *, epochs, batch_size, seed=0, rewind=0.0, label="training", quiet=False):
    """Train `model` in place on the training split of `dataset`, which is moved to the device of `fabric`.

    `batch_size` images a step over all processes together; `rewind` as in `learning_rates`. Two calls with the same
    arguments and the same fresh model give the same weights, on the same machine with the same number of threads.
    ValueError: a batch size that the processes cannot share evenly, an output that is not (n, classes), a loss that is
    not finite.
    """
    if batch_size < 1 or batch_size % fabric.world_size:
        raise ValueError(f"batch_size is {batch_size}; it must be a positive multiple of {fabric.world_size} processes")
    if epochs < 1:
        return model
    dataset = dataset.to(fabric.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=schedule.rate, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay
    )
    model.train()
    wrapped, optimizer = fabric.setup(model, optimizer)
    share = slice(fabric.global_rank, None, fabric.world_size)
    generator = torch.Generator(fabric.device)
    bar = progress(epochs, label, quiet or fabric.global_rank > 0)
    with bar, torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for epoch, rate in enumerate(learning_rates(schedule, epochs, rewind)):
            generator.manual_seed(seed * 1_000_003 + epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = torch.zeros((), device=fabric.device)
            for images, labels in data.batches(dataset.train, batch_size, generator, share):
                images = dataset.normalise(augment(images, dataset.flip, generator))
                optimizer.zero_grad()
                logits = wrapped(images)
                check_logits(logits, len(images), dataset.num_classes)
                loss = F.cross_entropy(logits, labels)
                fabric.backward(loss)
                optimizer.step()
            if not loss.isfinite():  # once an epoch: every look at the loss waits for the device
                raise ValueError(f"the loss is {loss.item()} after epoch {epoch + 1}: training diverged")
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    share_buffers(model, fabric)
    return model


def augment(images, mirror, generator):
    """The papers' augmentation: a random crop, padded by an eighth of the side, and a random flip if `mirror`."""
    images = data.crop(images, images.shape[-1] // 8, generator)
    return data.flip(images, generator) if mirror else images


def check_logits(logits, n, num_classes):
    if not isinstance(logits, torch.Tensor) or logits.shape != (n, num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"the model's output is {found}; for {n} images of {num_classes} classes it must be {(n, num_classes)}"
        )


def share_buffers(model, fabric):
    """Give every process the first one's batch norm statistics, so that all go on with the same model."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


@torch.no_grad()
def accuracy(model, dataset, split, batch_size=256):
    """The fraction of `split` that the model classifies right, in eval mode; the model's own mode is put back."""
    mode, right = model.training, 0
    parameter = next(model.parameters())
    model.eval()
    try:
        for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
            inputs = dataset.normalise(images.to(dataset.mean.device)).to(parameter.device, parameter.dtype)
            right += (model(inputs).argmax(1) == labels.to(parameter.device)).sum().item()
    finally:
        model.train(mode)
    return right / len(split)


def progress(total, label, quiet):
    """A tqdm bar over epochs; none when quiet or when nobody watches."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ModuleNotFoundError("training needs tqdm, which is not installed: pip install paamops[train]") from error
    return tqdm(total=total, desc=label, unit="epoch", leave=False, disable=quiet or not sys.stderr.isatty())
