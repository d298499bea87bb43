"""The embedded default: scikit-learn's 1,797 real handwritten digits (8x8, UCI), enlarged."""

from __future__ import annotations

import numpy as np

from pmoe_jax.data.dataset import Dataset, make, stratified_choice
from pmoe_jax.data.records import resize


def load(image_size: int = 32, resize_filter: str = "bilinear") -> Dataset:
    """1,437 training and 360 test images uint8 [N, image_size, image_size, 3].

    Dark digits on a light background, so that a black square is visible. The split is fixed
    and stratified (20 % of every class for testing).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(255 - bunch.images * (255 / 16)).astype(np.uint8)  # ink is 0..16
    images = np.stack([resize(image, image_size, resize_filter) for image in grey])
    test = stratified_choice(bunch.target, 360 / len(bunch.target), seed=0)
    return make(
        "digits",
        (images[~test], bunch.target[~test]),
        (images[test], bunch.target[test]),
        [str(digit) for digit in range(10)],
    )
