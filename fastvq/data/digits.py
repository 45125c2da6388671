"""The 8x8 handwritten digits of scikit-learn.

Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (CC BY 4.0), UCI Machine Learning
Repository. scikit-learn ships the 1,797 images of its test set.
"""

from __future__ import annotations

import torch

from fastvq.errors import DataError

from .examples import Examples
from .registry import DIGITS

TRAIN = 1500
"""Images to learn from; the rest is held out."""
_LARGEST = 16


def load_digits() -> Examples:
    """Return the digits, in the set's order: the first 1,500 to learn from, the other 297 held out.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise DataError("digits needs scikit-learn: pip install scikit-learn") from error
    digits = load()
    # 0 to 16, the number of dark pixels in a 4x4 block of the scan.
    pixels = torch.from_numpy(digits.images).mul(255 / _LARGEST).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    names = tuple(str(name) for name in digits.target_names)
    return Examples(
        name=DIGITS,
        train=pixels[:TRAIN],
        test=pixels[TRAIN:],
        test_names=tuple(names[label] for label in labels[TRAIN:]),
        train_labels=labels[:TRAIN],
        test_labels=labels[TRAIN:],
        class_names=names,
    )
