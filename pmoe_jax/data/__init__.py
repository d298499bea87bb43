"""Data sets as uint8 arrays in host memory: `load` reads every source, `Dataset` holds the result.

Importing this package loads neither TensorFlow nor scikit-learn nor any reader.
"""

from __future__ import annotations

import os
import sys

from pmoe_jax.data.dataset import Dataset, split_heldout
from pmoe_jax.errors import PmoeError

__all__ = ["MAX_BYTES", "NAMES", "Dataset", "load"]

NAMES = ("digits", "cifar10", "npz")

#: Default limit on what one archive may unpack to (CIFAR-10 and GTSRB need well under 1 GiB).
MAX_BYTES = 4 * 2**30


def load(
    name: str,
    source: str | os.PathLike[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int = 32,
    resize_filter: str = "bilinear",
    crop_roi: bool = False,
    heldout: float = 0.0,
    heldout_seed: int = 0,
    skip_corrupt: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Dataset:
    """Reads a data set into memory.

    Args:
      name: one of `NAMES`.
      source: file or folder to read. `digits` needs none.
      data_dir: where prepared data sets are kept; used when `source` is not given.
      image_size: height and width that images of other sizes are resized to. CIFAR-10 and
        array files keep their own size.
      resize_filter: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos" (PIL).
      crop_roi: cut GTSRB images to their sign box before resizing.
      heldout: fraction of the training images moved to the held-out split before any poisoning.
      heldout_seed: which ones.
      skip_corrupt: leave out images that cannot be decoded (and say how many) instead of failing.
      max_bytes: limit on what an archive or array file may unpack to.

    Raises:
      PmoeError: anything wrong with the request or with the files.
    """
    if image_size < 1:
        raise PmoeError(f"image_size is {image_size}; allowed are sizes from 1 pixel")
    if name == "digits":
        from pmoe_jax.data import digits

        data = digits.load(image_size, resize_filter)
    elif name == "cifar10":
        from pmoe_jax.data import cifar10

        data = cifar10.load(_needed(name, source), max_bytes)
    elif name == "npz":
        from pmoe_jax.data import files

        data = files.load_npz(_needed(name, source), max_bytes)
    else:
        raise PmoeError(f"unknown data set {name!r}; allowed are {', '.join(NAMES)}")
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    return split_heldout(data, heldout, heldout_seed)


def _needed(name: str, source: str | os.PathLike[str] | None) -> str:
    if source is None:
        raise PmoeError(f"{name} needs a source; give the file or folder to read")
    return os.fspath(source)
