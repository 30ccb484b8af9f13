"""CIFAR-10 in its official binary batches."""

from pathlib import Path

import numpy as np
import torch

from paamops.data.sets import Split, assemble

IMAGES = 10_000  # in every batch file
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, green and blue planes


def read(root):
    """CIFAR-10 from `root`/cifar-10-batches-bin: data_batch_1.bin to data_batch_5.bin and test_batch.bin."""
    folder = Path(root) / "cifar-10-batches-bin"
    parts = [batch(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    train = Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    return assemble("cifar10", 10, train, batch(folder / "test_batch.bin"), flip=True)


def batch(path):
    """The images (10000, 3, 32, 32) and labels (10000,) of one file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; download the binary version of CIFAR-10, or name another --data-root"
        )
    data = path.read_bytes()
    if len(data) != IMAGES * RECORD:
        raise ValueError(f"{path}: {len(data)} bytes; a CIFAR-10 batch has {IMAGES * RECORD}")
    records = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(IMAGES, RECORD).copy())
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise ValueError(f"{path}: label {labels.max()}; labels must be 0 to 9")
    return Split(records[:, 1:].reshape(-1, 3, 32, 32), labels)
