"""Training on Lightning Fabric: cross-entropy, SGD with Nesterov momentum, the papers' schedules."""

import contextlib
import time
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional as F

from paamops import data, progress
from paamops.checkpoint import find, fingerprint, restore, write


@dataclass(frozen=True)
class Schedule:
    """A learning rate that falls to a tenth at each epoch of `decays`, out of `epochs`; batch size and weight decay."""

    rate: float
    decays: tuple
    epochs: int
    weight_decay: float
    batch_size: int


# AAP, Table 1, by the network's name, or by its name without the digits at its end. LeNets train on MNIST, ResNet-101
# on Tiny-ImageNet, the others on CIFAR-10; all CIFAR ResNets take the row of ResNet-56, which is that of ResNet-50 too.
SCHEDULES = {
    "resnet": Schedule(rate=0.1, decays=(91, 136), epochs=182, weight_decay=2e-4, batch_size=128),
    "resnet101": Schedule(rate=0.1, decays=(150, 225), epochs=300, weight_decay=2e-4, batch_size=256),
    "vgg": Schedule(rate=0.05, decays=(150, 180, 210), epochs=240, weight_decay=5e-4, batch_size=128),
    "mobilenetv2": Schedule(rate=0.1, decays=(150, 225), epochs=300, weight_decay=4e-5, batch_size=128),
    "shufflenet": Schedule(rate=0.1, decays=(60, 120, 160), epochs=200, weight_decay=4e-5, batch_size=128),
    # The paper's 0.1 with its momentum of 0.9 diverges on MNIST from every initialisation tried; 0.02 does not.
    "lenet": Schedule(rate=0.02, decays=(), epochs=100, weight_decay=0.0, batch_size=256),
    "lenet300-100": Schedule(rate=0.0012, decays=(), epochs=100, weight_decay=0.0, batch_size=256),
}

CHECKPOINT_SECONDS = 20  # at least, between two checkpoints: on a fast device an epoch is shorter than that

# How the scaling of gradients in 16-mixed starts (PyTorch's default); what of it changes as the training goes on.
SCALER = {"scale": 2.0**16, "_growth_tracker": 0}

# What compiled training asks of Inductor: CUDA graphs, because at these image sizes launching the kernels takes longer
# than running them, and no kernel chosen by timing it, so that a run that was cut ends in the weights of one that was
# not.
INDUCTOR = {"triton.cudagraphs": True, "deterministic": True}


def schedule_for(name):
    """The schedule of the network `name`; a network of the user's own gets the residual networks'."""
    return SCHEDULES.get(name) or SCHEDULES.get(name.rstrip("0123456789"), SCHEDULES["resnet"])


def learning_rates(schedule, epochs, start_epoch=0, total_epochs=None):
    """The learning rate of each of `epochs` epochs, from number `start_epoch` on.

    The whole schedule is compressed (or stretched) into `total_epochs`, by default start_epoch + epochs: they are its
    last then.
    """
    total = start_epoch + epochs if total_epochs is None else total_epochs
    passed = [sum(schedule.epochs * epoch >= decay * total for decay in schedule.decays) for epoch in range(total)]
    return [schedule.rate * 0.1**decays for decays in passed[start_epoch : start_epoch + epochs]]


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


def train(
    model,
    dataset,
    fabric,
    schedule,
    *,
    epochs,
    batch_size,
    seed=0,
    start_epoch=0,
    total_epochs=None,
    penalty=None,
    checkpoint=None,
    compiled=False,
    label="training",
    quiet=False,
):
    """Train `model` in place on the training split of `dataset`, which is moved to the device of `fabric`.

    Two calls with the same arguments and the same fresh model give the same weights, on the same machine with the same
    number of threads.

    Args:
        epochs, start_epoch, total_epochs: as in `learning_rates`. What follows a rewinding is the last epochs only.
        batch_size: images a step, over all processes together.
        penalty: a function whose value is added to the loss of each step, after the forward pass.
        checkpoint: a file that is written while training, after an epoch. A later call with the same arguments and the
            same fresh model goes on from it and ends in the same weights as a call that was never cut. The file of
            another call is overwritten; so is one that cannot be read, with a warning. It is left when all is done.
        compiled: train through torch.compile. It takes a minute or so before the first step, anew for every shape of
            network, so it pays on a GPU and for many epochs. It ends with `torch.compiler.reset()`.

    On a GPU the model trains in channels_last where its forward pass can, and is contiguous again at the end.
    ValueError: a batch size that the processes cannot share evenly, negative epochs, an output that is not
    (n, classes), a loss that is not finite.
    """
    if batch_size < 1 or batch_size % fabric.world_size:
        raise ValueError(f"batch_size is {batch_size}; it must be a positive multiple of {fabric.world_size} processes")
    if epochs < 0 or start_epoch < 0:
        raise ValueError(f"epochs and start_epoch are {epochs} and {start_epoch}; they must be at least 0")
    if total_epochs is not None and total_epochs < start_epoch + epochs:
        raise ValueError(
            f"total_epochs is {total_epochs}; it must be at least {start_epoch + epochs}, the last trained"
        )
    if epochs == 0:
        return model
    rates = learning_rates(schedule, epochs, start_epoch, total_epochs)
    dataset, model = dataset.to(fabric.device), model.to(fabric.device)
    leads, identity = fabric.global_rank == 0, None
    if checkpoint is not None and leads:
        call = {"schedule": asdict(schedule), "rates": rates, "start_epoch": start_epoch, "seed": seed}
        call |= {"batch_size": batch_size, "dataset": [dataset.name, len(dataset.train), *dataset.shape]}
        call |= {"processes": fabric.world_size, "precision": fabric.strategy.precision.precision}
        identity = fingerprint(model, call | {"compiled": compiled})
    model.train()
    with prepared(model, dataset, fabric, schedule, compiled) as (wrapped, optimizer, layout):
        done = resume(checkpoint, identity, model, optimizer.optimizer, fabric)
        with progress.bar(epochs, label, "epoch", quiet or not leads, done) as bar:
            written = time.monotonic()
            for epoch, rate in list(enumerate(rates))[done:]:
                start = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = train_epoch(
                    wrapped, optimizer, dataset, fabric, batch_size, seed * 1_000_003 + epoch, layout, penalty
                )
                if not loss.isfinite():  # once an epoch: every look at the loss waits for the device
                    raise ValueError(f"the loss is {loss.item()} after epoch {epoch + 1}: training diverged")
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
                due = epoch + 1 == epochs or time.monotonic() - written >= CHECKPOINT_SECONDS
                if checkpoint is not None and leads and due:
                    images = len(dataset.train) - len(dataset.train) % min(batch_size, len(dataset.train))
                    facts = {"fingerprint": identity, "epoch": epoch + 1, "epochs": epochs}
                    facts["images_per_s"] = round(images / (time.perf_counter() - start), 1)  # for who watches the file
                    facts["scaler"] = {key: fabric.strategy.precision.state_dict().get(key) for key in SCALER}
                    write(checkpoint, model, optimizer.optimizer, facts)
                    written = time.monotonic()
    share_buffers(model, fabric)
    return model


@contextlib.contextmanager
def prepared(model, dataset, fabric, schedule, compiled=False):
    """What `train_epoch` takes: the model as Fabric (and the compiler) wrap it, its optimizer, its layout.

    Afterwards `model` is plain again, without gradients.
    """
    with contextlib.ExitStack() as stack:
        layout = stack.enter_context(laid_out(model, dataset))
        stack.enter_context(
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32
            )
        )
        wrapped = stack.enter_context(compilation(model)) if compiled else model
        wrapped, optimizer = fabric.setup(wrapped, make_optimizer(model, schedule, fabric.device))
        yield wrapped, optimizer, layout
        optimizer.zero_grad()


def train_epoch(model, optimizer, dataset, fabric, batch_size, seed, layout=None, penalty=None):
    """Train one epoch, its order and augmentation drawn from `seed`; the last step's loss, on the device.

    Nothing in it waits for the device: what decides anything on the host (the shapes) is known there.
    """
    generator = torch.Generator(fabric.device).manual_seed(seed)
    torch.manual_seed(seed + 7919 * fabric.global_rank)  # what the network draws itself: dropout
    share = slice(fabric.global_rank, None, fabric.world_size)
    loss = torch.zeros((), device=fabric.device)
    for images, labels in data.batches(dataset.train, batch_size, generator, share):
        images = dataset.normalise(augment(images, dataset.flip, generator))
        if layout is not None:
            images = images.to(memory_format=layout)
        optimizer.zero_grad()
        logits = model(images)
        check_logits(logits, len(images), dataset.num_classes)
        loss = F.cross_entropy(logits, labels)
        fabric.backward(loss if penalty is None else loss + penalty())
        optimizer.step()
    return loss.detach()


def make_optimizer(model, schedule, device):
    """SGD with Nesterov momentum; on a GPU in one kernel for all parameters."""
    return torch.optim.SGD(
        model.parameters(),
        lr=schedule.rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=schedule.weight_decay,
        fused=True if device.type == "cuda" else None,
    )


@contextlib.contextmanager
def laid_out(model, dataset):
    """The layout to train `model` in, and None to leave it: on a GPU channels_last, what its convolutions are made for.

    A forward pass that calls `view` may not run in it; such a model stays as it is. So does everything on a CPU, where
    the layout would change the rounding. Afterwards every tensor has the strides it had: what is computed with the
    model later must not depend on whether it was trained just now or comes from a file.
    """
    first = dataset.train.images[:2]
    if first.device.type != "cuda":
        yield None
        return
    before = [(tensor, tensor.stride()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        if runs_in(torch.channels_last, model, dataset.normalise(first)):
            yield torch.channels_last
        else:
            put_back(before)
            yield None
    finally:
        put_back(before)


def runs_in(layout, model, images):
    """Put `model` into the memory format `layout`; whether its forward pass runs in it."""
    mode = model.training
    model.to(memory_format=layout).eval()
    try:
        with torch.no_grad():
            model(images.to(memory_format=layout))
    except RuntimeError:
        return False
    finally:
        model.train(mode)
    return True


def put_back(before):
    """Give each tensor of the pairs (tensor, strides) these strides again, in place, to the very stride.

    `Module.to` would not: the weight of a 1x1 convolution is contiguous in both layouts, and its strides alone decide
    which kernel is used.
    """
    for tensor, strides in before:
        if tensor.stride() != strides:
            dense = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
            tensor.data = dense.copy_(tensor.data)


@contextlib.contextmanager
def compilation(model):
    """`model` under torch.compile, which it shares its tensors with; afterwards all that was compiled is forgotten.

    Otherwise the CUDA graphs would keep their memory, and the eighth network of a run would count as a recompilation
    too many of the same forward function and run uncompiled.
    """
    try:
        yield torch.compile(model, dynamic=False, options=INDUCTOR)
    finally:
        torch.compiler.reset()


def resume(checkpoint, identity, model, optimizer, fabric):
    """How many epochs the file `checkpoint` is past the start; its tensors are then in `model` and `optimizer`."""
    found = find(checkpoint, identity) if identity else None
    found = fabric.broadcast(found) if checkpoint is not None else None
    if found:
        restore(checkpoint, model, optimizer)
    # 16-mixed: from one training to the next the scale would go on, and a run in pieces would end elsewhere.
    precision = fabric.strategy.precision
    if scaler := precision.state_dict():
        precision.load_state_dict(scaler | (found["scaler"] if found else SCALER))
    return found["epoch"] if found else 0


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
            right = right + (model(inputs).argmax(1) == labels.to(parameter.device)).sum()
    finally:
        model.train(mode)
    return int(right) / len(split)  # looked at once: every look waits for the device
