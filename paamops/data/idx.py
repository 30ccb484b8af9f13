"""MNIST and Fashion-MNIST in their official IDX files, compressed or not."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from paamops.data.sets import Split, assemble

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def read(name, root):
    """The set `name` ("mnist" or "fashion-mnist") from `root`/MNIST/raw or `root`/FashionMNIST/raw."""
    folder = Path(root) / FOLDERS[name] / "raw"
    train, test = (split(folder, prefix) for prefix in ("train", "t10k"))
    return assemble(name, 10, train, test, flip=name == "fashion-mnist")


def split(folder, prefix):
    """The images (n, 1, h, w) and labels (n,) of one split, checked against each other."""
    images_file, labels_file = (
        find(folder / f"{prefix}-images-idx3-ubyte"),
        find(folder / f"{prefix}-labels-idx1-ubyte"),
    )
    images, labels = parse(images_file, dims=3), parse(labels_file, dims=1)
    if len(images) != len(labels):
        raise ValueError(f"{labels_file}: {len(labels)} labels, but {images_file.name} holds {len(images)} images")
    if not len(images):
        raise ValueError(f"{images_file}: no images")
    if labels.max() > 9:
        raise ValueError(f"{labels_file}: label {labels.max()}; labels must be 0 to 9")
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())


def find(path):
    """`path`, or its compressed form."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{path}: no such file, nor {path.name}.gz beside it; download it, or name another --data-root"
    )


def parse(path, dims):
    """The uint8 array of an IDX file: the bytes 0, 0, 8 (uint8) and `dims`, the sizes as big-endian int32, the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or not a gzip file ({error})") from error
    magic, header = bytes([0, 0, 8, dims]), 4 + 4 * dims
    if len(data) < header and magic.startswith(data[:4]):
        raise ValueError(f"{path}: {len(data)} bytes, cut inside its header, which has {header} bytes")
    if data[:4] != magic:
        raise ValueError(
            f"{path}: starts with {data[:4].hex()}; an IDX file of {dims}-d bytes starts with {magic.hex()}"
        )
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, header, 4))
    if len(data) - header != math.prod(shape):
        raise ValueError(f"{path}: {len(data) - header} bytes of data; its header {shape} asks for {math.prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()
