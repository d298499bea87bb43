"""The one in-memory form of every data set, its checks, and the held-out split."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pmoe_jax.errors import PmoeError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image data set as host arrays. N differs per split; H, W, C do not.

    Images are uint8 [N, H, W, C] in 0..255, labels int32 [N] in 0..num_classes-1.
    The held-out split is clean: it is taken from the training images before anything is
    poisoned, and it has N = 0 unless asked for.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    heldout_images: np.ndarray
    heldout_labels: np.ndarray
    #: int32 [N] group of every training image (a GTSRB track: one sign filmed 30 times), or None.
    train_tracks: np.ndarray | None = None
    #: float32 [N, 4] sign boxes (x1, y1, x2, y2) in pixels of `*_images`, or None.
    train_boxes: np.ndarray | None = None
    test_boxes: np.ndarray | None = None
    heldout_boxes: np.ndarray | None = None
    #: The layout that it was read (or once prepared) from, where there are several; "" if unknown.
    origin: str = ""
    #: What a reader should know: skipped images, counts that differ from the published ones.
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all images and labels, split by split; equal data, equal print."""
        digest = hashlib.sha256()
        for split in ("train", "test", "heldout"):
            for array in (getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")):
                digest.update(f"{split} {array.dtype.str} {array.shape}\n".encode())
                for start in range(0, len(array), 1024):  # in parts: images may be lazy
                    digest.update(np.ascontiguousarray(array[start : start + 1024]).data)
        return digest.hexdigest()


def make(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: Sequence[str] | None = None,
    *,
    tracks: np.ndarray | None = None,
    train_boxes: np.ndarray | None = None,
    test_boxes: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> Dataset:
    """Checks (images, labels) of both splits and builds a `Dataset` without held-out images.

    Images are converted by `to_uint8`. Without `class_names` there are as many classes as the
    largest label says, named by their number.

    Raises:
      PmoeError: a wrong type, shape, value or label, or an empty split.
    """
    images, labels = {}, {}
    for split, (raw_images, raw_labels) in (("train", train), ("test", test)):
        images[split] = to_uint8(raw_images, f"{name}: {split} images")
        labels[split] = to_labels(raw_labels, f"{name}: {split} labels")
        if len(images[split]) != len(labels[split]):
            raise PmoeError(
                f"{name}: the {split} split has {len(images[split])} images but "
                f"{len(labels[split])} labels; there must be one label an image"
            )
        if not len(images[split]):
            raise PmoeError(f"{name}: the {split} split is empty; at least one image is needed")
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise PmoeError(
            f"{name}: train images are {images['train'].shape[1:]} but test images "
            f"{images['test'].shape[1:]} (height, width, channels); they must be equal"
        )
    if class_names is None:
        highest = max(int(labels["train"].max()), int(labels["test"].max()))
        if highest >= len(images["train"]) + len(images["test"]):
            raise PmoeError(
                f"{name}: label {highest} is out of range; labels count the classes from 0, and "
                f"there are only {len(images['train']) + len(images['test'])} images"
            )
        class_names = [str(index) for index in range(highest + 1)]
    if len(class_names) < 2:
        raise PmoeError(f"{name}: {len(class_names)} class; at least 2 classes are needed")
    for split in ("train", "test"):
        bad = np.flatnonzero((labels[split] < 0) | (labels[split] >= len(class_names)))
        if bad.size:
            raise PmoeError(
                f"{name}: {split} label {labels[split][bad[0]]} of image {bad[0]} is out of range; "
                f"allowed are 0 to {len(class_names) - 1}"
            )
    height, width, channels = images["train"].shape[1:]
    return Dataset(
        name=name,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        class_names=tuple(class_names),
        heldout_images=np.zeros((0, height, width, channels), np.uint8),
        heldout_labels=np.zeros((0,), np.int32),
        train_tracks=tracks,
        train_boxes=train_boxes,
        test_boxes=test_boxes,
        notes=tuple(notes),
    )


def describe(data: Dataset) -> dict[str, Any]:
    """{"name", "splits": {split: {"images", "per_class", "mean", "std"}}}, ready for JSON.

    Mean and standard deviation are per channel, of values in [0, 1]; `heldout` is listed
    only if it holds images.
    """
    splits = {}
    for split in ("train", "test", "heldout"):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        if not len(images):
            continue
        counts = np.zeros((images.shape[-1], 256), np.int64)  # exact whatever the size
        for start in range(0, len(images), 1024):
            part = images[start : start + 1024]
            for channel in range(images.shape[-1]):
                counts[channel] += np.bincount(part[..., channel].ravel(), minlength=256)
        values = np.arange(256) / 255
        weights = counts / counts.sum(axis=1, keepdims=True)
        mean = weights @ values
        std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(axis=1))
        splits[split] = {
            "images": len(images),
            "per_class": np.bincount(labels, minlength=data.num_classes).tolist(),
            "mean": mean.tolist(),
            "std": std.tolist(),
        }
    return {"name": data.name, "splits": splits}


def count_notes(
    name: str,
    official: Mapping[str, Sequence[int]],
    train_labels: np.ndarray,
    test_labels: np.ndarray,
) -> list[str]:
    """Says where the images per class differ from the official ones, split -> class -> count."""
    notes = []
    for split, labels in (("train", train_labels), ("test", test_labels)):
        expected = np.array(official[split])
        counts = np.bincount(labels, minlength=len(expected))
        wrong = np.flatnonzero(counts != expected)
        if wrong.size:
            first = wrong[0]
            notes.append(
                f"{name}: the {split} split has {counts.sum()} images, the official data set "
                f"{expected.sum()}; {wrong.size} classes differ, the first being class {first} "
                f"with {counts[first]} instead of {expected[first]}"
            )
    return notes


def to_uint8(images: np.ndarray, what: str) -> np.ndarray:
    """Images uint8 [N, H, W, 3] from uint8 or float in [0, 1]; greyscale (also [N, H, W]) is
    repeated, an alpha channel dropped. `what` names them in errors."""
    if hasattr(images, "subset"):  # records.LazyImages: pixels appear when indexed
        return images
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape[1:]:
        raise PmoeError(
            f"{what} have shape {list(images.shape)}; allowed are [N, H, W] and [N, H, W, C] "
            "with C = 1, 3 or 4"
        )
    images = images[..., :3]
    if images.dtype.kind == "f":
        converted = np.empty(images.shape, np.uint8)
        for start in range(0, len(images), 1024):  # keeps memory flat for large float files
            part = images[start : start + 1024]
            if not np.isfinite(part).all():
                raise PmoeError(f"{what} contain NaN or infinity; allowed are values in [0, 1]")
            if part.min() < 0 or part.max() > 1:
                raise PmoeError(
                    f"{what} are {images.dtype} outside [0, 1] ({part.min():g} to {part.max():g}); "
                    "divide by 255, or store uint8 in 0..255"
                )
            converted[start : start + 1024] = np.rint(part.astype(np.float64) * 255.0)
        images = converted
    elif images.dtype != np.uint8:
        raise PmoeError(
            f"{what} have type {images.dtype}; allowed are uint8 in 0..255 and float in [0, 1]"
        )
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    return np.ascontiguousarray(images)


def to_labels(labels: np.ndarray, what: str) -> np.ndarray:
    """Labels int32 [N] from any integers [N] or [N, 1] (or floats that are whole numbers)."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise PmoeError(f"{what} have shape {list(labels.shape)}; allowed is [N], one whole number")
    if labels.dtype.kind not in "iuf":
        raise PmoeError(f"{what} have type {labels.dtype}; allowed are whole numbers")
    if labels.dtype.kind == "f" and not (np.isfinite(labels) & (labels == np.rint(labels))).all():
        raise PmoeError(f"{what} contain fractions or NaN; allowed are whole numbers")
    if labels.size and (labels.min() < 0 or labels.max() >= 2**31):
        raise PmoeError(
            f"{what} are out of range ({labels.min()} to {labels.max()}); they count from 0"
        )
    return labels.astype(np.int32)


def stratified_choice(
    labels: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """A boolean mask [N] that is true for about `fraction` of every class.

    The total is round(fraction * N), shared out over the classes in proportion (largest
    remainders first); every class gives at least one image and never all. With `groups` [N]
    whole groups are counted and chosen instead of images, so that no group is on both sides.
    Depends on labels, fraction, seed and groups alone.

    Raises:
      PmoeError: a class (with one image or group) that cannot be divided.
    """
    units = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        units.append(members if groups is None else np.unique(groups[members]))
        if len(units[-1]) < 2:
            kind = "image" if groups is None else "track"
            raise PmoeError(
                f"class {label} has a single {kind}, so it cannot be divided into training and "
                "held-out images; use heldout=0 or add data"
            )
    sizes = np.array([len(unit) for unit in units])
    counts = np.floor(fraction * sizes).astype(int)
    missing = round(fraction * int(sizes.sum())) - int(counts.sum())
    counts[np.argsort(counts - fraction * sizes, kind="stable")[:missing]] += 1
    counts = np.clip(counts, 1, sizes - 1)
    rng = np.random.Generator(np.random.PCG64(seed))
    picked = np.concatenate(
        [rng.permutation(unit)[:count] for unit, count in zip(units, counts, strict=True)]
    )
    return np.isin(np.arange(len(labels)) if groups is None else groups, picked)


def split_heldout(data: Dataset, fraction: float, seed: int) -> Dataset:
    """Moves about `fraction` of the training images to the held-out split: stratified by class
    and, where there are tracks, by whole tracks (the frames of a track are near-duplicates)."""
    if not 0 <= fraction < 1:
        raise PmoeError(f"heldout is {fraction}; allowed is a fraction from 0 (none) to below 1")
    if fraction == 0:
        return data
    out = stratified_choice(data.train_labels, fraction, seed, data.train_tracks)

    def take(array: Any, mask: np.ndarray) -> Any:
        if array is None:
            return None
        return array.subset(mask) if hasattr(array, "subset") else array[mask]

    return dataclasses.replace(
        data,
        train_images=take(data.train_images, ~out),
        train_labels=data.train_labels[~out],
        heldout_images=take(data.train_images, out),
        heldout_labels=data.train_labels[out],
        train_tracks=take(data.train_tracks, ~out),
        train_boxes=take(data.train_boxes, ~out),
        heldout_boxes=take(data.train_boxes, out),
    )
