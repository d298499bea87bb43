"""What a config names outside itself: its data set, and the pictures that triggers blend in."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
from PIL import Image

from pmoe_jax import data, processes
from pmoe_jax.data import Dataset, files, records
from pmoe_jax.errors import PmoeError
from pmoe_jax.members import Member

#: Pictures in files are all decoded at once up to this share of the host's free memory, which its
#: processes share.
HOST_SHARE = 0.5

#: Most pixels of a picture to blend, which is decoded as it is before it is resized.
PATTERN_PIXELS = 2**25


def load_data(config: Any, source: str = "") -> Dataset:
    """The configured data set; `source` replaces the configured one.

    Raises:
      PmoeError: it cannot be read, or has not as many patches as the model takes.
    """
    chosen = config.data
    _check_patches(config, source or chosen.source)
    return data.load(
        chosen.name,
        source or chosen.source or None,
        data_dir=chosen.data_dir or None,
        image_size=chosen.image_size,
        resize_filter=chosen.resize_filter,
        crop_roi=chosen.crop_roi,
        heldout=chosen.heldout,
        heldout_seed=chosen.heldout_seed,
        skip_corrupt=chosen.skip_corrupt,
        max_bytes=chosen.max_bytes,
        boxes=chosen.boxes or None,
        decode_up_to=_decode_up_to(chosen.residence),
    )


def _check_patches(config: Any, source: str) -> None:
    """Refuses more patches an expert than there are, before images are read; those of array files
    are not of the configured size, and the model counts their patches."""
    chosen, model = config.data, config.model
    place = os.path.expanduser(source or chosen.data_dir)
    if chosen.name == "npz" or (
        chosen.name in files.NPY_PREFIXES and files.has_npy(chosen.name, place)
    ):
        return
    size = chosen.image_size
    patches = math.ceil(size / 4) ** 2
    if model.name == "pmoe" and model.patches_per_expert > patches:
        raise PmoeError(
            f"model.patches_per_expert={model.patches_per_expert} exceeds the {patches} patches of "
            f"{size}x{size} images; choose at most {patches}"
        )


def _decode_up_to(residence: str) -> int | None:
    """Bytes of pixels that are decoded at once; larger sets are decoded batch by batch, as those
    are that are to stay on the host."""
    if residence == "auto":
        return int(HOST_SHARE * psutil.virtual_memory().available) // processes.on_this_host()
    return 0 if residence == "host" else None


def load_patterns(
    members: Sequence[Member], image_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """The images that blend triggers name, resized: path -> float32 [H, W, C] in [0, 1].

    Raises:
      PmoeError: a file is missing, no image, or one of more than `PATTERN_PIXELS`.
    """
    height, width, _ = image_shape
    patterns = {}
    for path in {member.trigger.get("pattern_path", "") for member in members} - {""}:
        file = os.path.expanduser(path)
        try:
            if os.path.exists(file) and not os.path.isfile(file):
                raise OSError("it is no regular file")
            with warnings.catch_warnings():
                # PIL warns of sizes that are refused below.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(file, formats=records.FORMATS)
            with image:
                if image.width * image.height > PATTERN_PIXELS:
                    raise OSError(
                        f"{image.width}x{image.height} pixels are more than {PATTERN_PIXELS}"
                    )
                picture = image.convert("RGB").resize((width, height))
        except FileNotFoundError:
            raise PmoeError(f"trigger.pattern_path={path} does not exist; give an image") from None
        except Exception as error:  # PIL raises anything for a damaged picture.
            raise PmoeError(f"trigger.pattern_path={path} is no readable image: {error}") from None
        patterns[path] = np.asarray(picture, np.float32).reshape(image_shape) / 255
    return patterns
