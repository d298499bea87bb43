"""Data sets that come as one picture a file: decoding, cropping, resizing, in memory or lazily."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image

from pmoe_jax.data.archives import printable
from pmoe_jax.data.dataset import Dataset, make
from pmoe_jax.errors import PmoeError

_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
# Others, such as EPS, start external programs.
FORMATS = ("PNG", "PPM", "JPEG", "BMP", "GIF", "WEBP")


@dataclasses.dataclass(frozen=True)
class Record:
    """One image that has not been decoded yet."""

    name: str  #: unique in its split; splits are sorted by it
    label: int
    read: Callable[[], bytes | np.ndarray]  #: the encoded file, or pixels uint8 [H, W, 3]
    where: str  #: the file, for messages
    group: str | None = None  #: its track, if there are tracks
    box: tuple[int, int, int, int] | None = None  #: x1, y1, x2, y2 in an image of `size`
    size: tuple[int, int] | None = None  #: width and height that the box refers to


class Origin(NamedTuple):
    """Where records come from."""

    kind: str  #: the layout, such as "Kaggle layout"
    signature: str  #: changes when the files change


class CorruptImage(PmoeError):
    """An image that cannot be decoded."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a record becomes pixels: uint8 [size, size, 3]."""

    size: int
    resize_filter: str = "bilinear"
    crop_roi: bool = False
    max_bytes: int = 4 * 2**30

    def __call__(self, record: Record) -> np.ndarray:
        pixels = decode(record, self.max_bytes)
        if pixels.shape[:2] == (self.size, self.size) and not self.crop_roi:
            return pixels
        image = Image.fromarray(pixels)
        if self.crop_roi:
            box = np.asarray(scaled_box(record, image.width, image.height))
            left, top, right, bottom = np.rint(box).astype(int).tolist()
            image = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        return np.asarray(image.resize((self.size, self.size), resampling(self.resize_filter)))


class LazyImages:
    """Looks like an array uint8 [N, H, W, 3], but decodes the images that are indexed."""

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, records: Sequence[Record], recipe: Recipe):
        self._records, self._recipe = records, recipe
        self.shape = (len(records), recipe.size, recipe.size, 3)
        self.size = int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Pixels of what indexing the first axis of an array would give."""
        chosen = np.arange(len(self))[index]
        records = [self._records[number] for number in np.ravel(chosen).tolist()]
        images = np.empty((len(records), *self.shape[1:]), np.uint8)
        if len(records) > 1:
            for position, pixels in enumerate(_decoders().map(self._recipe, records)):
                images[position] = pixels
        elif records:
            images[0] = self._recipe(records[0])
        return images.reshape(*chosen.shape, *self.shape[1:])

    def subset(self, mask: np.ndarray) -> LazyImages:
        """The images where `mask` [N] is true, still undecoded."""
        return LazyImages([self._records[int(i)] for i in np.flatnonzero(mask)], self._recipe)


def assemble(
    name: str,
    train: Sequence[Record],
    test: Sequence[Record],
    class_names: Sequence[str],
    recipe: Recipe,
    *,
    skip_corrupt: bool = False,
    decode_up_to: int | None = None,
    notes: Sequence[str] = (),
) -> Dataset:
    """Decodes both splits, sorted by record name.

    Args:
      skip_corrupt: leave out images that cannot be decoded, with a note that counts them.
      decode_up_to: keep both splits as `LazyImages`, which decode when indexed, if their pixels
        would take more bytes; skip_corrupt then decodes all once, to find the corrupt ones.

    Raises:
      CorruptImage: an image that cannot be decoded (unless skipped).
    """
    resampling(recipe.resize_filter)
    lazy = is_lazy(len(train) + len(test), recipe, decode_up_to)
    notes = list(notes)
    images, kept = [], []
    for split, unsorted in (("train", train), ("test", test)):
        records = sorted(unsorted, key=lambda record: record.name)
        skipped: list[str] = []
        if lazy:
            if skip_corrupt:
                records, skipped = _readable(records, recipe, split)
            images.append(cast(np.ndarray, LazyImages(records, recipe)))
        else:
            pixels, records, skipped = _decode_all(records, recipe, skip_corrupt, split)
            images.append(pixels)
        if skipped:
            notes.append(
                f"{name}: skipped {len(skipped)} corrupt {split} images, the first being "
                f"{skipped[0]}"
            )
        kept.append(records)
    labels = [np.array([record.label for record in records], np.int32) for records in kept]
    groups = [record.group for record in kept[0]]
    tracks = None
    if None not in groups:
        tracks = np.unique(np.array(groups, str), return_inverse=True)[1].astype(np.int32)
    boxes = [_boxes(records, recipe) for records in kept]
    return make(
        name,
        (images[0], labels[0]),
        (images[1], labels[1]),
        class_names,
        tracks=tracks,
        train_boxes=boxes[0],
        test_boxes=boxes[1],
        notes=notes,
    )


def is_lazy(count: int, recipe: Recipe, decode_up_to: int | None) -> bool:
    """Whether the pixels of so many images are too large to be decoded all at once."""
    return decode_up_to is not None and count * recipe.size**2 * 3 > decode_up_to


def decode(record: Record, max_bytes: int) -> np.ndarray:
    """Pixels uint8 [H, W, 3]; greyscale, palette and alpha images are converted to RGB.

    Raises:
      CorruptImage: not a picture, cut short, or of a kind that has no 8-bit RGB form.
      PmoeError: larger than a sixteenth of `max_bytes`.
    """
    content = record.read()
    if isinstance(content, np.ndarray):
        return content
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            if file.width * file.height * 4 > max_bytes // 16:
                raise PmoeError(
                    f"{record.where} unpacks to {file.width}x{file.height} pixels, more than a "
                    f"sixteenth of the limit of {max_bytes} bytes; raise max_bytes or free memory "
                    "if you trust it"
                )
            if file.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                raise ValueError(f"pixels of mode {file.mode}; 8 bits a channel are needed")
            # A palette by way of RGBA, so that transparent entries keep their colour.
            image = file.convert("RGBA") if file.mode in ("P", "PA") else file
            return np.array(image.convert("RGB"))
    except PmoeError:
        raise
    except Exception as error:  # every exception of the decoder means a damaged picture
        # Without the name that Python gives to bytes in memory.
        text = re.sub(r" ?<_io\.BytesIO[^>]*>", "", " ".join(str(error).split()))
        text = printable(text) or type(error).__name__
        raise CorruptImage(
            f"{record.where} is not a readable image ({text}); replace it, or leave such images "
            "out with skip_corrupt"
        ) from error


def scaled_box(record: Record, width: int, height: int) -> tuple[float, float, float, float]:
    """The record's box in an image of another size."""
    if record.box is None or record.size is None:
        raise PmoeError(f"{record.where} has no sign box; crop_roi needs one for every image")
    x, y = width / record.size[0], height / record.size[1]
    return record.box[0] * x, record.box[1] * y, record.box[2] * x, record.box[3] * y


def resampling(name: str) -> Image.Resampling:
    """PIL's filter of that name; raises PmoeError for any other word."""
    if name not in _FILTERS:
        raise PmoeError(f"unknown resize filter {name!r}; allowed are {', '.join(_FILTERS)}")
    return Image.Resampling[name.upper()]


def resize(image: np.ndarray, size: int, resize_filter: str) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] to [size, size(, 3)], antialiased as PIL does when shrinking."""
    return np.asarray(Image.fromarray(image).resize((size, size), resampling(resize_filter)))


@functools.cache
def _decoders() -> ThreadPoolExecutor:
    # PIL lets go of the interpreter lock while it decodes and resizes.
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")


def _progress(items: Iterable[Any], split: str, total: int) -> Iterator[Any]:
    from tqdm import tqdm

    text = f"reading {split}"
    yield from tqdm(items, desc=text, unit=" images", total=total, disable=None, leave=False)


def _readable(records: list[Record], recipe: Recipe, split: str) -> tuple[list[Record], list[str]]:
    """The records that can be decoded, and where the others lie."""

    def fails(record: Record) -> bool:
        try:
            recipe(record)
        except CorruptImage:
            return True
        return False

    kept, skipped = [], []
    found = zip(records, _decoders().map(fails, records), strict=True)
    for record, failed in _progress(found, split, len(records)):
        if failed:
            skipped.append(record.where)
        else:
            kept.append(record)
    return kept, skipped


def _decode_all(
    records: list[Record], recipe: Recipe, skip_corrupt: bool, split: str
) -> tuple[np.ndarray, list[Record], list[str]]:
    try:
        images = np.empty((len(records), recipe.size, recipe.size, 3), np.uint8)
    except (MemoryError, ValueError):
        raise PmoeError(
            f"{len(records)} images of {recipe.size}x{recipe.size} do not fit in memory; decode "
            "them on the way (data.residence=host)"
        ) from None
    kept: list[Record] = []
    skipped: list[str] = []
    for record in _progress(records, split, len(records)):
        try:
            images[len(kept)] = recipe(record)
        except CorruptImage:
            if not skip_corrupt:
                raise
            skipped.append(record.where)
        else:
            kept.append(record)
    return images[: len(kept)], kept, skipped


def _boxes(records: list[Record], recipe: Recipe) -> np.ndarray | None:
    if not records or any(record.box is None for record in records):
        return None
    size = recipe.size
    if recipe.crop_roi:
        return np.tile(np.array([0, 0, size, size], np.float32), (len(records), 1))
    return np.array([scaled_box(record, size, size) for record in records], np.float32)
