"""A folder of the user's own images: one folder a class, `root`/class/*.png."""

from pathlib import Path

import numpy as np
import torch

from paamops.data.sets import Split, assemble, stratified

SIDE = 32  # of the images the built-in networks read
KINDS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEST = 0.2


def classes(root):
    """The names of the classes: the folders in `root`, sorted."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; --data folder reads the images in --data-root/class/")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"{root}: {len(names)} folders in it; one folder a class, at least two, must be there")
    return names


def read(root):
    """All images of `root`/class/, as 32x32 RGB; 20 % of each class, always the same images, are the test split."""
    names, images, labels = classes(root), [], []
    for label, name in enumerate(names):
        files = sorted(path for path in (Path(root) / name).iterdir() if path.suffix.lower() in KINDS)
        if len(files) < 3:
            raise ValueError(f"{Path(root) / name}: {len(files)} images ({', '.join(KINDS)}); a class needs at least 3")
        images += [pixels(file) for file in files]
        labels += [label] * len(files)
    images, labels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
    rest, test = stratified(labels, TEST)
    train, test = Split(images[rest], labels[rest]), Split(images[test], labels[test])
    return assemble("folder", len(names), train, test, flip=True)


def pixels(file):
    """One image as RGB bytes (32, 32, 3): scaled to 32 on its shorter side, then cropped to its middle."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ModuleNotFoundError(
            "a folder of images needs Pillow, which is not installed: pip install paamops[train]"
        ) from error
    try:
        with Image.open(file) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(f"{file}: not a whole image ({error})") from error
