"""Real images, small and plain: `paamops.data.load("digits")`, whole sets as tensors on one device."""

from paamops.data import cifar, digits, folder, idx
from paamops.data.augment import batches, crop, flip
from paamops.data.sets import Dataset, Split

__all__ = ["NAMES", "Dataset", "Split", "batches", "crop", "describe", "flip", "load"]

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "folder")
SHAPES = {"digits": (1, 32, 32), "mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def load(name, root="data"):
    """The Dataset `name`, read from the folder `root` in its official layout ("digits" needs no files).

    mnist: root/MNIST/raw/train-images-idx3-ubyte, ... (or .gz); fashion-mnist: root/FashionMNIST/raw/, the same names;
    cifar10: root/cifar-10-batches-bin/*.bin; folder: root/class/*.png.
    ValueError: an unknown name, or a truncated or wrong file, which it names. FileNotFoundError: a file is not there.
    """
    check(name)
    if name == "digits":
        return digits.read()
    if name == "cifar10":
        return cifar.read(root)
    return folder.read(root) if name == "folder" else idx.read(name, root)


def describe(name, root="data"):
    """((c, h, w), number of classes) of the set `name`, without reading its images."""
    check(name)
    if name == "folder":
        return (3, folder.SIDE, folder.SIDE), len(folder.classes(root))
    return SHAPES[name], 10


def check(name):
    if name not in NAMES:
        raise ValueError(f"data is {name!r}; it must be one of {', '.join(NAMES)}")
