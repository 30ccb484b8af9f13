"""What all ablations share: data and network at a size that fits the machine, dense networks trained once a seed."""

import contextlib
import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

import paamops
from paamops import data, training
from paamops.data.sets import stratified

PAPER = (0.0992, 0.5773, 0.6956)  # of the parameters of VGG-16 (§4.4, Figure 2a)


@dataclass(frozen=True)
class Scale:
    """How large the ablations of one data set are."""

    network: str  # a name of paamops.models, or "vgg16/8"
    train: int  # images to train on, equally many of each class (as far as the classes allow)
    test: int  # images that accuracies are taken on
    epochs: int  # E
    batch_size: int
    decays: tuple | None = None  # epochs of the paper's schedule; None: its own
    scored: int = 256  # training images in the batch that scores are taken on
    learn: int = 6  # epochs that PAAM learns scores for
    rewind: float = 0.5  # the part of training that retraining starts from, where that is not what is varied
    seeds: int = 5
    removed: tuple = (PAPER[1], 0.95)  # shares of the parameters that one-shot pruning removes
    rounds: tuple = (*PAPER, 0.95)  # and that iterative pruning has removed after each of its rounds
    rewinds: tuple = (0.1, 0.25, 0.5, 0.75, 0.9)  # parts of training that are rewound to


# The paper gives LeNet-5 one learning rate for all its epochs. In so few epochs that ends far from converged, and there
# would be no learning rate to rewind: it falls where that of the residual networks does.
SCALES = {
    "digits": Scale("lenet5", train=600, test=300, epochs=6, batch_size=32, decays=(50, 75), seeds=2),
    "fashion-mnist": Scale("lenet5", train=3000, test=5000, epochs=16, batch_size=64, decays=(50, 75)),
    "cifar10": Scale(
        "vgg16/8", train=4000, test=5000, epochs=12, batch_size=64, seeds=3, removed=PAPER[1:2], rounds=PAPER
    ),
}


@dataclass(frozen=True)
class Dense:
    """A trained unpruned network: its ChannelMap, its accuracy, and its state at the epochs that are rewound to."""

    seed: int
    model: nn.Module
    channels: paamops.ChannelMap
    accuracy: float
    states: dict


class Workshop:
    """The data and the schedule of a scale; trains and prunes. Dense networks are kept: one training for each seed."""

    def __init__(self, name, root="data", scale=None):
        self.data, self.scale = name, scale or SCALES[name]
        self.dataset = subset(data.load(name, root), self.scale.train, self.scale.test)
        self.fabric = training.make_fabric("cpu")
        schedule = training.schedule_for(self.scale.network.partition("/")[0])
        if self.scale.decays is not None:
            schedule = replace(schedule, decays=self.scale.decays)
        self.schedule = schedule
        self.example = self.dataset.normalise(self.dataset.train.images[:1])
        self._dense, self._retrained = {}, {}
        self.learned = {}  # by seed and settings, filled by bench.ablations.paam

    def dense(self, seed):
        """The Dense of this seed."""
        if seed not in self._dense:
            torch.manual_seed(seed)
            model = build(self.scale.network, self.example, self.dataset.num_classes)
            model = model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
            with checkpoints(model, self.steps(), self.rewound()) as states:
                self.train(model, seed, 0)
            model.eval()
            self._dense[seed] = Dense(seed, model, self.trace(model), self.accuracy(model), states)
        return self._dense[seed]

    def steps(self):
        """Training steps of one epoch."""
        images = len(self.dataset.train)
        return images // min(self.scale.batch_size, images)

    def rewound(self):
        """The epochs that are rewound to, each once: rounded, the first at least 1, the last at most E − 1."""
        last = self.scale.epochs - 1
        return tuple(dict.fromkeys(min(max(round(part * self.scale.epochs), 1), last) for part in self.scale.rewinds))

    def train(self, model, seed, start_epoch):
        """Train in place from `start_epoch` to E; the learning rate is the schedule's at those epochs."""
        return training.train(
            model,
            self.dataset,
            self.fabric,
            self.schedule,
            epochs=self.scale.epochs - start_epoch,
            batch_size=self.scale.batch_size,
            seed=seed,
            start_epoch=start_epoch,
            quiet=True,
        )

    def retrain(self, model, seed, start_epoch):
        """Train a pruned network in place from `start_epoch` on: {"before", "after"}, its accuracies."""
        before = self.accuracy(model)
        self.train(model, seed, start_epoch)
        model.eval()
        return {"before": before, "after": self.accuracy(model)}

    def one_shot(self, dense, selection):
        """As `retrain`, of what `selection` leaves of a dense network. Equal selections share one training."""
        key = dense.seed, selection.keep.numpy().tobytes()
        if key not in self._retrained:
            model = paamops.pack(dense.model, dense.channels, selection)
            self._retrained[key] = self.retrain(model, dense.seed, self.start())
        return self._retrained[key]

    def start(self):
        """The epoch that retraining starts from, where that is not what is varied."""
        return round(self.scale.rewind * self.scale.epochs)

    def trace(self, model):
        return paamops.trace(model, self.example)

    def batch(self, seed):
        """One batch of random training images, as the network reads them."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.dataset.train), generator=generator)[: self.scale.scored]
        return self.dataset.normalise(self.dataset.train.images[chosen])

    def accuracy(self, model):
        return training.accuracy(model, self.dataset, self.dataset.test)


def subset(dataset, train, test):
    """The Dataset with about `train` and `test` images, each class in its share, always the same ones."""

    def part(split, size):
        if size >= len(split):
            return split
        _, chosen = stratified(split.labels, size / len(split))
        return data.Split(split.images[chosen], split.labels[chosen])

    return replace(dataset, train=part(dataset.train, train), test=part(dataset.test, test))


def build(name, example, num_classes):
    """A network of paamops.models for images like `example`, or one with its widths divided: "vgg16/8"."""
    base, _, divisor = name.partition("/")
    model = paamops.models.build(base, in_channels=example.shape[1], num_classes=num_classes)
    return narrow(model, example, int(divisor)) if divisor else model


def narrow(model, example, divisor):
    """The network with one in `divisor` of each layer's filters; initialised anew, as in He et al. (2015)."""
    channels = paamops.trace(model, example)
    place = torch.arange(len(channels.filters)) - channels.offsets[channels.filters]
    first = place * divisor < channels.offsets.diff()[channels.filters]
    keep = channels.pinned.clone()
    keep[channels.sets[first]] = True
    model = paamops.pack(model, channels, keep)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


@contextlib.contextmanager
def checkpoints(model, steps, epochs):
    """While `model` trains, fill a dict: epoch -> a copy of its state after that many epochs of `steps` steps.

    The copy is made as the next epoch's first step begins, so that training is one run and its momentum unbroken.
    """
    states, count = {}, 0

    def look(module, args):
        nonlocal count
        if count % steps == 0 and count // steps in epochs:
            states[count // steps] = copy.deepcopy(module.state_dict())
        count += 1

    hook = model.register_forward_pre_hook(look)
    try:
        yield states
    finally:
        hook.remove()
