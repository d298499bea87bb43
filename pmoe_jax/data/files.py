"""Array files (`.npz`, the paper authors' `.npy`) and folders with one folder a class."""

from __future__ import annotations

import math
import os
import zipfile
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from pmoe_jax.data.archives import open_member, open_tree, open_zip, printable, readable
from pmoe_jax.data.dataset import Dataset, make, stratified_choice
from pmoe_jax.data.records import Recipe, Record, assemble
from pmoe_jax.errors import PmoeError

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
#: The authors' file names, for each data set that they saved.
NPY_PREFIXES = {"cifar10": "cifar_10", "gtsrb": "gtsrb"}
#: Classes that a file may name, as many as `poison.target` may be.
CLASSES_LIMIT = 1 << 16
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".gif", ".webp")


def load_npz(path: str, max_bytes: int) -> Dataset:
    """An `.npz` with train_images, train_labels, test_images and test_labels.

    Images uint8 in 0..255 or float in [0, 1], [N, H, W] or [N, H, W, C]; labels whole numbers
    [N]. Classes are counted from the labels, or named by an optional string array class_names.
    """
    arrays = read_npz(path, (*NPZ_KEYS, "class_names"), max_bytes, optional=("class_names",))
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise PmoeError(f"{path}: class_names must be a list of strings")
    if names is not None and len(names) > CLASSES_LIMIT:
        raise PmoeError(
            f"{path}: class_names has {len(names)} names; allowed are up to {CLASSES_LIMIT}"
        )
    if names is not None and names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8", "replace")
    return make(
        "npz",
        (arrays["train_images"], arrays["train_labels"]),
        (arrays["test_images"], arrays["test_labels"]),
        None if names is None else [printable(str(name)) for name in names],
    )


def has_npy(name: str, source: str) -> bool:
    """Whether `source` is a folder with the authors' files of that data set."""
    prefix = NPY_PREFIXES[name]
    return os.path.isfile(os.path.join(source, f"{prefix}_train_data_sorted.npy"))


def read_npy(
    name: str, source: str, max_bytes: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(images, labels) of train and test from the four files the paper's authors train from.

    They are sorted by class. The authors divide the values by 255 after loading, so any type
    with whole numbers in 0..255 is accepted.
    """
    splits = []
    for split in ("train", "test"):
        pair = []
        for kind in ("data", "label"):
            path = os.path.join(source, f"{NPY_PREFIXES[name]}_{split}_{kind}_sorted.npy")
            with readable(path):
                if os.path.exists(path) and not os.path.isfile(path):
                    raise PmoeError(f"{path} is no regular file")
                if os.path.getsize(path) > max_bytes:
                    raise PmoeError(
                        f"{path} is larger than the limit of {max_bytes} bytes; raise max_bytes or "
                        "free memory if you trust it"
                    )
                with open(path, "rb") as file:
                    pair.append(_read_array(file, os.path.getsize(path), path))
        pair[0] = _whole_numbers_to_uint8(pair[0], f"{source}: {split} data")
        splits.append((pair[0], pair[1]))
    return splits[0], splits[1]


def load_folder(
    source: str, recipe: Recipe, *, skip_corrupt: bool, decode_up_to: int | None
) -> Dataset:
    """A folder or archive of images: `train/CLASS/...` and `test/CLASS/...`.

    Without `train` and `test` it is `CLASS/...`, and a fixed stratified fifth becomes the test
    split. Classes are in alphabetical order, or in numerical order if all names are numbers.

    Raises:
      PmoeError: images beside `train` and `test`, which belong to neither; classes that lack
        images; anything unreadable.
    """
    tree = open_tree(source, recipe.max_bytes)
    found: list[tuple[list[str], str]] = []
    for name in tree.names:
        parts = name.split("/")
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if len(parts) > 1 and not hidden and name.lower().endswith(_IMAGE_SUFFIXES):
            found.append((parts, name))
    samples = []  # (split or "", class, file)
    for parts, name in found:
        folders = [part.lower() for part in parts[:-2]]
        at = next((i for i, part in enumerate(folders) if part in ("train", "test")), None)
        split, label = ("", parts[-2]) if at is None else (folders[at], parts[at + 1])
        samples.append((split, label, name))
    outside = [name for split, _, name in samples if not split]
    divided = len(outside) < len(samples)
    if divided and outside:
        raise PmoeError(
            f"{source}: {printable(outside[0])} is neither in train/CLASS nor in test/CLASS, as "
            f"other images are ({len(outside)} such images); move it there, or away"
        )
    classes = {label for split, label, _ in samples if split != "test"}
    strangers = sorted({label for _, label, _ in samples} - classes)
    if strangers:
        raise PmoeError(
            f"{source}: the class {printable(strangers[0])!r} is in test but not in train"
        )
    if len(classes) < 2:
        raise PmoeError(
            f"{source} holds images of {len(classes)} classes; expected train/CLASS/IMAGE and "
            f"test/CLASS/IMAGE (or CLASS/IMAGE) with {', '.join(_IMAGE_SUFFIXES)} files"
        )
    numeric = all(label.isdecimal() and len(label) < 20 for label in classes)
    names = sorted(classes, key=lambda label: (int(label) if numeric else 0, label))
    number = {label: index for index, label in enumerate(names)}
    records = [
        Record(file, number[label], partial(tree.read, file), f"{source}: {printable(file)}")
        for _, label, file in samples
    ]
    notes = []
    if divided:
        is_test = np.array([split == "test" for split, _, _ in samples])
    else:
        labels = np.array([record.label for record in records])
        lone = np.flatnonzero(np.bincount(labels) < 2)
        if lone.size:
            raise PmoeError(
                f"{source}: the class {printable(names[lone[0]])!r} has a single image; it needs "
                "two, one of which is the test split's, or folders train and test"
            )
        is_test = stratified_choice(labels, 0.2, seed=0)
        notes.append(
            f"{source} has no train and test folders; a fixed stratified fifth of its "
            f"{len(records)} images is the test split"
        )
    return assemble(
        "folder",
        [record for record, test in zip(records, is_test, strict=True) if not test],
        [record for record, test in zip(records, is_test, strict=True) if test],
        [printable(name) for name in names],
        recipe,
        skip_corrupt=skip_corrupt,
        decode_up_to=decode_up_to,
        notes=notes,
    )


def read_npz(
    path: str, keys: tuple[str, ...], max_bytes: int, optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The named arrays of an `.npz`; never unpickles, never unpacks more than `max_bytes`."""
    with readable(path), _opened(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        missing = [k for k in keys if f"{k}.npy" not in members and k not in optional]
        if missing:
            raise PmoeError(
                f"{path} lacks {', '.join(missing)}; expected are "
                f"{', '.join(k for k in keys if k not in optional)}"
            )
        wanted = {k: members[f"{k}.npy"] for k in keys if f"{k}.npy" in members}
        total = sum(info.file_size for info in wanted.values())
        if total > max_bytes:
            raise PmoeError(
                f"{path} unpacks to {total} bytes, more than the limit of {max_bytes}; raise "
                "max_bytes or free memory if you trust it"
            )
        arrays = {}
        for key, info in wanted.items():
            with open_member(archive, info, path) as member:
                arrays[key] = _read_array(member, info.file_size, f"{path}: {key}")
        return arrays


def _opened(path: str) -> zipfile.ZipFile:
    if os.path.exists(path) and not os.path.isfile(path):  # A pipe would be waited for.
        raise PmoeError(f"{path} is no regular file; give an .npz file")
    return open_zip(path)


def _read_array(file: BinaryIO | Any, file_size: int, what: str) -> np.ndarray:
    # The header's shape decides how much numpy allocates, so it is compared with the size first.
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise PmoeError(f"{what} has the unknown format version {version}")
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise PmoeError(f"{what} holds Python objects; allowed are plain numbers")
    # Items without bytes would cost the file nothing, however many.
    if math.prod(shape) * max(dtype.itemsize, 1) > file_size or min(shape, default=0) < 0:
        raise PmoeError(f"{what} is shorter than its header says; it is damaged")
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _whole_numbers_to_uint8(values: np.ndarray, what: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "iuf":
        raise PmoeError(f"{what} have type {values.dtype}; allowed are whole numbers in 0..255")
    out = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 1024):
        part = values[start : start + 1024]
        if not ((part >= 0) & (part <= 255) & (part == np.rint(part))).all():
            raise PmoeError(f"{what} are not whole numbers in 0..255, as the authors' files are")
        out[start : start + 1024] = part
    return out
