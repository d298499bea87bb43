"""Decoding and resizing single images with PIL."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pmoe_jax.errors import PmoeError

_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def resampling(name: str) -> Image.Resampling:
    """PIL's filter of that name; raises PmoeError for any other word."""
    if name not in _FILTERS:
        raise PmoeError(f"unknown resize filter {name!r}; allowed are {', '.join(_FILTERS)}")
    return Image.Resampling[name.upper()]


def resize(image: np.ndarray, size: int, resize_filter: str) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] to [size, size(, 3)], antialiased as PIL does when shrinking."""
    return np.asarray(Image.fromarray(image).resize((size, size), resampling(resize_filter)))
