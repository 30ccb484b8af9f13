"""The readers on files of the official layouts, whole and broken; the splits; the augmentation against loops."""

import gzip

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from paamops import data
from paamops.data import cifar
from paamops.data.sets import stratified


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A small MNIST, its arrays and its folder."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    random, arrays = np.random.default_rng(0), {}
    for prefix, n in (("train", 60), ("t10k", 30)):
        arrays[prefix] = random.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(arrays[prefix][0]))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(arrays[prefix][1]))
    return tmp_path, folder, arrays


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small CIFAR-10 in 30 images a file."""
    monkeypatch.setattr(cifar, "IMAGES", 30)
    folder, random = tmp_path / "cifar-10-batches-bin", np.random.default_rng(0)
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        records = random.integers(0, 256, (30, cifar.RECORD))
        records[:, 0] = np.arange(30) % 10
        (folder / f"{name}.bin").write_bytes(records.astype(np.uint8).tobytes())
    return tmp_path, folder


def test_digits():
    digits = data.load("digits")
    assert digits.shape == (1, 32, 32)
    assert (digits.shape, digits.num_classes) == data.describe("digits")
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    for split, share in ((digits.test, 0.3), (digits.validation, 0.175), (digits.train, 0.525)):
        assert torch.bincount(split.labels).div(179.7).sub(share).abs().max() < 0.02
    images = digits.normalise(digits.train.images)
    assert images.mean().abs() < 1e-4
    assert images.std().sub(1).abs() < 1e-3
    # Enlarged, not invented: the mean of every 4x4 block is near the pixel it was made from.
    small = F.avg_pool2d(digits.train.images.float(), 4)
    assert small.min() >= 0
    assert small.max() > 240


def test_splits_never_mix_and_do_not_depend_on_the_seed():
    labels = torch.randint(0, 10, (500,))
    rest, part = stratified(labels, 0.2)
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(500))
    share = torch.bincount(labels[part], minlength=10) / torch.bincount(labels, minlength=10)
    assert share.sub(0.2).abs().max() < 0.03
    torch.manual_seed(7)
    assert torch.equal(stratified(labels, 0.2)[1], part)
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.test.images, second.test.images)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(mnist, zipped):
    root, folder, arrays = mnist
    if zipped:
        for file in list(folder.iterdir()):
            (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    found = data.load("mnist", root)
    assert found.shape == (1, 28, 28)
    assert (len(found.train), len(found.validation), len(found.test)) == (50, 10, 30)
    assert np.array_equal(found.test.images[:, 0].numpy(), arrays["t10k"][0])
    assert np.array_equal(found.test.labels.numpy(), arrays["t10k"][1])
    seen = torch.cat([found.train.images, found.validation.images]).flatten(1).double().sum(1).sort().values
    assert np.array_equal(seen.numpy(), np.sort(arrays["train"][0].reshape(60, -1).sum(1)))
    assert not found.flip


def test_fashion_mnist_has_its_own_folder(mnist):
    root, folder, _ = mnist
    with pytest.raises(FileNotFoundError, match=r"FashionMNIST.*no such file"):
        data.load("fashion-mnist", root)
    (root / "FashionMNIST").mkdir()
    folder.rename(root / "FashionMNIST" / "raw")
    assert data.load("fashion-mnist", root).flip


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], r"47039 bytes of data; its header \(60, 28, 28\) asks for 47040"),
        ("train-images-idx3-ubyte", lambda b: b[:7], "7 bytes, cut inside its header, which has 16 bytes"),
        ("train-images-idx3-ubyte", lambda b: b[:3], "3 bytes, cut inside its header"),
        ("train-images-idx3-ubyte", lambda b: b"", "0 bytes, cut inside its header"),
        ("train-images-idx3-ubyte", lambda b: b"PK" + b[2:9], "starts with 504b0803; an IDX file of 3-d bytes"),
        ("t10k-labels-idx1-ubyte", lambda b: b"PK" + b[2:], "starts with 504b0801"),
        ("t10k-labels-idx1-ubyte", lambda b: b + b"\0", "31 bytes of data"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "label 10; labels must be 0 to 9"),
        ("t10k-labels-idx1-ubyte", lambda b: idx(np.zeros(29)), "29 labels, but t10k-images-idx3-ubyte holds 30"),
    ],
)
def test_broken_mnist(mnist, file, change, message):
    root, folder, _ = mnist
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        data.load("mnist", root)


@pytest.mark.parametrize("change", [lambda b: b[:-20], lambda b: b"not gzip", lambda b: b[:30] + b"\0" * 9 + b[39:]])
def test_broken_gzip(mnist, change):
    root, folder, _ = mnist
    file = folder / "train-images-idx3-ubyte"
    (folder / f"{file.name}.gz").write_bytes(change(gzip.compress(file.read_bytes())))
    file.unlink()
    with pytest.raises(ValueError, match=r"ubyte.gz: truncated or not a gzip file"):
        data.load("mnist", root)


def test_cifar10(cifar10):
    root, folder = cifar10
    found = data.load("cifar10", root)
    assert (found.shape, found.num_classes) == data.describe("cifar10")
    assert (len(found.train), len(found.validation), len(found.test)) == (130, 20, 30)
    record = np.frombuffer((folder / "test_batch.bin").read_bytes(), np.uint8).reshape(30, -1)[17]
    assert found.test.labels[17] == record[0]
    assert found.test.images[17, 1, 2, 3] == record[1 + 1024 + 2 * 32 + 3]  # green, third row, fourth column


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "92189 bytes; a CIFAR-10 batch has 92190"),
        (lambda b: b[: -cifar.RECORD], "89117 bytes; a CIFAR-10 batch has 92190"),
        (lambda b: b"\xff" + b[1:], "label 255"),
    ],
)
def test_broken_cifar10(cifar10, change, message):
    root, folder = cifar10
    file = folder / "data_batch_3.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"data_batch_3.bin: {message}"):
        data.load("cifar10", root)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.bin: no such file"):
        data.load("cifar10", root)


@pytest.fixture
def photos(tmp_path):
    """Two classes of images of several sizes and modes."""
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(10):
            image.new("RGB", (20 + 9 * i, 50), colour).save(tmp_path / name / f"{i}.png")
        image.new("L", (32, 32), 99).save(tmp_path / name / "grey.png")
        (tmp_path / name / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder(photos):
    found = data.load("folder", photos)
    assert (found.shape, found.num_classes) == data.describe("folder", photos) == ((3, 32, 32), 2)
    assert (len(found.train), len(found.validation), len(found.test)) == (16, 2, 4)
    for split in (found.train, found.validation, found.test):
        for picture, label in zip(split.images, split.labels, strict=True):
            brightest = {99: None, 250: 2 if label == 0 else 0}[int(picture.max())]
            assert brightest is None or (picture[brightest] == 250).all()


def test_broken_folder(photos, tmp_path):
    file = photos / "red" / "3.png"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"text", b""):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"3.png: not a whole image"):
            data.load("folder", photos)
    for other in (photos / "blue").iterdir():
        other.unlink()
    with pytest.raises(ValueError, match=r"blue: 0 images"):
        data.load("folder", photos)
    (photos / "blue").rmdir()
    with pytest.raises(ValueError, match="1 folders"):
        data.load("folder", photos)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        data.load("folder", tmp_path / "elsewhere")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'imagenet'; it must be one of digits"):
        data.load("imagenet")


def test_batches_cover_the_split_once():
    split = data.Split(torch.arange(10).reshape(10, 1, 1, 1), torch.arange(10))

    def epoch(seed, share=slice(None)):
        generator = torch.Generator().manual_seed(seed)
        return [labels for _, labels in data.batches(split, 4, generator, share)]

    first = torch.cat(epoch(0))
    assert len(first) == 8  # what does not fill a batch waits for another epoch
    assert len(first.unique()) == 8
    assert torch.equal(first, torch.cat(epoch(0)))
    assert not torch.equal(first, torch.cat(epoch(1)))
    for whole, even, odd in zip(epoch(0), epoch(0, slice(0, None, 2)), epoch(0, slice(1, None, 2)), strict=True):
        assert torch.equal(torch.stack([even, odd], 1).flatten(), whole)  # two processes share every batch
    assert len(list(data.batches(split, 100, torch.Generator()))) == 1


def test_crop_and_flip_against_loops():
    images = torch.randint(1, 256, (40, 3, 6, 5), dtype=torch.uint8)
    cropped = data.crop(images, 2, torch.Generator().manual_seed(1))
    padded, shifts = F.pad(images, (2, 2, 2, 2)), set()
    for image, result in zip(padded, cropped, strict=True):
        found = [(i, j) for i in range(5) for j in range(5) if torch.equal(image[:, i : i + 6, j : j + 5], result)]
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) > 10
    assert torch.equal(cropped, data.crop(images, 2, torch.Generator().manual_seed(1)))

    flipped = data.flip(images, torch.Generator().manual_seed(1))
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(images, flipped, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 5 < sum(mirrored) < 35


def test_crop_and_flip_keep_images_contiguous():
    """A model that calls view meets the same layout in training as in evaluation."""
    images, generator = torch.zeros(4, 3, 6, 5), torch.Generator().manual_seed(1)
    assert data.crop(images, 2, generator).is_contiguous()
    assert data.flip(images, generator).is_contiguous()
    assert data.flip(data.crop(images, 2, generator), generator).is_contiguous()
