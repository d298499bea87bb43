"""Array files: `.npz` with the four usual keys."""

from __future__ import annotations

import lzma
import math
import os
import zipfile
import zlib

import numpy as np

from pmoe_jax.data.dataset import Dataset, make
from pmoe_jax.errors import PmoeError

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def load_npz(path: str, max_bytes: int) -> Dataset:
    """An `.npz` with train_images, train_labels, test_images and test_labels.

    Images uint8 in 0..255 or float in [0, 1], [N, H, W] or [N, H, W, C]; labels whole numbers
    [N]. Classes are counted from the labels, or named by an optional string array class_names.
    """
    arrays = read_npz(path, (*NPZ_KEYS, "class_names"), max_bytes, optional=("class_names",))
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise PmoeError(f"{path}: class_names must be a list of strings")
    if names is not None and names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8", "replace")
    return make(
        os.path.splitext(os.path.basename(path))[0],
        (arrays["train_images"], arrays["train_labels"]),
        (arrays["test_images"], arrays["test_labels"]),
        None if names is None else [str(name) for name in names],
    )


def read_npz(
    path: str, keys: tuple[str, ...], max_bytes: int, optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The named arrays of an `.npz`; never unpickles, never unpacks more than `max_bytes`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            missing = [k for k in keys if f"{k}.npy" not in members and k not in optional]
            if missing:
                raise PmoeError(
                    f"{path} lacks {', '.join(missing)}; an .npz data set needs "
                    f"{', '.join(k for k in keys if k not in optional)}"
                )
            wanted = [k for k in keys if f"{k}.npy" in members]
            total = sum(members[f"{k}.npy"].file_size for k in wanted)
            if total > max_bytes:
                raise PmoeError(
                    f"{path} unpacks to {total} bytes, more than the limit of {max_bytes}; raise "
                    "max_bytes if you trust it"
                )
            return {k: _read_member(archive, members[f"{k}.npy"], path) for k in wanted}
    except PmoeError:
        raise
    except FileNotFoundError:
        raise PmoeError(f"{path} does not exist; give the .npz file to read") from None
    except (
        *(OSError, EOFError, ValueError, KeyError, TypeError, SyntaxError, MemoryError),
        *(RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    ) as error:
        raise PmoeError(f"{path} is not a readable .npz file: {one_line(error)}") from error


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> np.ndarray:
    # The header's shape decides how much numpy allocates, so it is compared with the member's
    # size first.
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise PmoeError(f"{path}: {info.filename} has the unknown format version {version}")
        shape, _, dtype = read_header(member)
    if dtype.hasobject:
        raise PmoeError(f"{path}: {info.filename} holds Python objects; allowed are plain numbers")
    if math.prod(shape) * dtype.itemsize > info.file_size:
        raise PmoeError(f"{path}: {info.filename} is shorter than its header says")
    with archive.open(info) as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def one_line(error: BaseException) -> str:
    """An exception's message as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
