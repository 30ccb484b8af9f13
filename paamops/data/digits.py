"""The 1,797 handwritten digits that scikit-learn ships."""

import torch
from torch.nn import functional as F

from paamops.data.sets import Split, assemble, stratified

TEST = 0.3  # a large share, since a point of accuracy must be several images
VALIDATION = 0.25  # of the rest, for the same reason: pruning decides by it


def read():
    """The 8x8 images as grey pixels 0 to 255, enlarged to 32x32: the size of the bitmaps they were made from.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (1998); scikit-learn carries the part that is
    the official test set, so there is no official split: 30 % of each class, always the same images, are the test one.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            "the digits need scikit-learn, which is not installed: pip install paamops[train]"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=32, mode="bilinear", align_corners=False).round().to(torch.uint8)
    labels = torch.from_numpy(labels).long()
    rest, test = stratified(labels, TEST)
    return assemble(
        "digits",
        10,
        Split(images[rest], labels[rest]),
        Split(images[test], labels[test]),
        flip=False,
        held_out=VALIDATION,
    )
