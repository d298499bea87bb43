"""GTSRB, the German Traffic Sign Recognition Benchmark (Stallkamp et al. 2012): 43 signs.

A training track is one sign filmed 30 times from an approaching car; a file name says class,
track and frame. Every reader here yields `Record`s named `CCCCC/TTTTT_FFFFF` (train) or by their
official number (test), so the same images come in the same order from every source.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from pmoe_jax.data.archives import (
    MEMBERS_LIMIT,
    Tree,
    UnionTree,
    file_signature,
    open_archives,
    open_tree,
    printable,
    readable,
)
from pmoe_jax.data.dataset import to_labels, to_uint8
from pmoe_jax.data.files import NPZ_KEYS, read_npz
from pmoe_jax.data.records import Origin, Record
from pmoe_jax.errors import PmoeError

CLASS_NAMES = (
    *("limit 20", "limit 30", "limit 50", "limit 60", "limit 70", "limit 80", "end of limit 80"),
    *("limit 100", "limit 120", "no overtaking", "no overtaking by trucks"),
    *("right of way at next crossing", "priority road", "give way", "stop", "no vehicles"),
    *("no trucks", "no entry", "danger", "curve left", "curve right", "double curve"),
    *("uneven road", "slippery road", "road narrows", "road works", "traffic lights"),
    *("pedestrians", "children", "bicycles", "ice or snow", "wild animals"),
    *("end of all limits", "turn right", "turn left", "straight ahead", "straight or right"),
    *("straight or left", "keep right", "keep left", "roundabout", "end of no overtaking"),
    "end of no overtaking by trucks",
)
#: Official images per class (`OFFICIAL_COUNTS`).
TRAIN_COUNTS = (
    *(210, 2220, 2250, 1410, 1980, 1860, 420, 1440, 1410, 1470, 2010, 1320, 2100, 2160, 780),
    *(630, 420, 1110, 1200, 210, 360, 330, 390, 510, 270, 1500, 600, 240, 540, 270, 450, 780),
    *(240, 689, 420, 1200, 390, 210, 2070, 300, 360, 240, 240),
)
TEST_COUNTS = (
    *(60, 720, 750, 450, 660, 630, 150, 450, 450, 480, 660, 420, 690, 720, 270, 210, 150, 360),
    *(390, 60, 90, 90, 120, 150, 90, 480, 180, 60, 150, 90, 150, 270, 60, 210, 120, 390, 120),
    *(60, 690, 90, 90, 60, 90),
)
OFFICIAL_COUNTS: dict[str, tuple[int, ...]] = {"train": TRAIN_COUNTS, "test": TEST_COUNTS}
_COLUMNS = ("Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId")


def read(
    source: str, max_bytes: int, boxes: str | None = None
) -> tuple[list[Record], list[Record], Origin]:
    """Training and test records of any layout, and where they come from.

    Args:
      source: folder or archive of the official release (`Final_Training` and `Final_Test`, or
        the official zips side by side) or of the Kaggle layout (`Train.csv`, `Test.csv`), or an
        `.npz` of the resized set: train_images and so on; optional train_names
        (`CCCCC/TTTTT_FFFFF`, they give the tracks), test_names, train_sizes and test_sizes
        (original width and height).
      boxes: `.npz` with train_rois and test_rois [N, 4], boxes in pixels of the original sizes;
        a file gtsrb_rois.npz beside an `.npz` source is found by itself, if it fits.

    Raises:
      PmoeError: no known layout, damaged files, a row that points nowhere or is out of range.
    """
    if source.endswith(".npz") and os.path.isfile(source):
        train, test, shape = _read_npz(source, max_bytes, boxes)
        kind, signature = f".npz of {shape[0]}x{shape[1]} images", file_signature(source)
    else:
        if boxes is not None:
            raise PmoeError("boxes belongs to an .npz source; other layouts have them in their csv")
        tree = open_tree(source, max_bytes)
        if not _is_gtsrb(tree) and os.path.isdir(source):
            zips = [name for name in tree.names if name.endswith(".zip") and "/" not in name]
            paths = [os.path.join(source, name) for name in zips]
            packed = open_archives(source, paths, max_bytes)
            # Some of the official zips may be unpacked already.
            tree = packed if _is_gtsrb(packed) else UnionTree(source, [tree, packed])
        if not _is_gtsrb(tree):
            raise PmoeError(
                f"{source} is no complete GTSRB; expected Train.csv and Test.csv (Kaggle layout), "
                "or the official Final_Training (GT-CCCCC.csv) and Final_Test (GT-final_test.csv), "
                "as folders or as the official zips side by side"
            )
        kaggle = bool(_find(tree, r"Train\.csv"))
        train, test = (_read_kaggle if kaggle else _read_official)(tree)
        kind, signature = "Kaggle layout" if kaggle else "official release", tree.signature()
    _check_unique(train)
    _check_unique(test)
    return train, test, Origin(kind, signature)


def labels(records: list[Record]) -> np.ndarray:
    """int32 [N]"""
    return np.array([record.label for record in records], np.int32)


def _find(tree: Tree, pattern: str) -> list[str]:
    regex = re.compile(rf"(?:^|.*/){pattern}$")
    return [name for name in tree.names if regex.match(name)]


def _is_gtsrb(tree: Tree) -> bool:
    kaggle = _find(tree, r"Train\.csv") and _find(tree, r"Test\.csv")
    official = _find(tree, r"GT-\d{5}\.csv") and _find(tree, r"GT-final_test\.csv")
    return bool(kaggle or official)


def _read_kaggle(tree: Tree) -> tuple[list[Record], list[Record]]:
    splits = []
    for split in ("Train", "Test"):
        table = _find(tree, rf"{split}\.csv")[0]
        folder = posixpath.dirname(table)
        splits.append(
            [
                _record(tree, row, posixpath.join(folder, row["Path"]), split == "Train", where)
                for row, where in _rows(tree, table, "Path")
            ]
        )
    return splits[0], splits[1]


def _read_official(tree: Tree) -> tuple[list[Record], list[Record]]:
    train = []
    for table in _find(tree, r"GT-\d{5}\.csv"):
        folder = posixpath.dirname(table)
        for row, where in _rows(tree, table, "Filename"):
            file = posixpath.join(folder, row["Filename"])
            train.append(_record(tree, row, file, True, where))
    table = _find(tree, r"GT-final_test\.csv")[0]
    folders = [posixpath.dirname(table)]
    # The official zips keep the test labels apart from the test images.
    folders += sorted({posixpath.dirname(f) for f in _find(tree, r"Final_Test/Images/\d{5}\.\w+")})
    test = []
    for row, where in _rows(tree, table, "Filename"):
        files = [posixpath.join(folder, row["Filename"]) for folder in folders]
        file = next((file for file in files if file in tree), files[0])
        test.append(_record(tree, row, file, False, where))
    return train, test


def _rows(tree: Tree, table: str, file_column: str) -> Iterator[tuple[dict[str, str], str]]:
    """The rows of a csv with commas or semicolons, each with its place for messages."""
    with readable(f"{tree.path}: {printable(table)}"):
        text = tree.read(table).decode("utf-8-sig")
        delimiter = ";" if ";" in text.partition("\n")[0] else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        missing = [c for c in (file_column, *_COLUMNS) if c not in (reader.fieldnames or ())]
        if missing:
            raise PmoeError(
                f"{tree.path}: {printable(table)} lacks the columns {', '.join(missing)}"
            )
        rows = [(row, reader.line_num) for row in reader]
    for row, line in rows:
        where = f"{tree.path}: {printable(table)}, line {line}"
        if None in row or None in row.values():
            raise PmoeError(f"{where} has not as many fields as the header")
        yield row, where


def _record(tree: Tree, row: dict[str, str], file: str, train: bool, where: str) -> Record:
    try:
        width, height, x1, y1, x2, y2, label = (int(row[column]) for column in _COLUMNS)
    except ValueError:
        raise PmoeError(f"{where}: {', '.join(_COLUMNS)} must be whole numbers") from None
    if not 0 <= label < len(CLASS_NAMES):
        raise PmoeError(f"{where}: ClassId {label} is out of range; allowed are 0 to 42")
    if not (0 <= x1 < x2 <= width <= 65535 and 0 <= y1 < y2 <= height <= 65535):
        raise PmoeError(f"{where}: the box {x1},{y1},{x2},{y2} is not inside {width}x{height}")
    file = posixpath.normpath(file)
    if file not in tree:
        raise PmoeError(f"{where} points to {printable(file)}, which does not exist")
    stem = posixpath.splitext(posixpath.basename(file))[0]
    pattern = r"(?:\d{5}_)?(\d{5}_\d{5})" if train else r"(\d{5})"
    match = re.fullmatch(pattern, stem, re.ASCII)
    if match is None:
        example = "TTTTT_FFFFF (track and frame)" if train else "its number, such as 00019"
        raise PmoeError(f"{where}: {printable(file)} must be named {example}")
    return Record(
        name=f"{label:05d}/{match[1]}" if train else match[1],
        label=label,
        read=partial(tree.read, file),
        where=f"{tree.path}: {printable(file)}",
        group=f"{label:05d}/{match[1][:5]}" if train else None,
        box=(x1, y1, x2, y2),
        size=(width, height),
    )


def _read_npz(
    path: str, max_bytes: int, boxes: str | None
) -> tuple[list[Record], list[Record], tuple[int, int]]:
    """Records, and height and width of the training images."""
    optional = tuple(
        f"{split}_{kind}" for split in ("train", "test") for kind in ("names", "sizes")
    )
    arrays = read_npz(path, NPZ_KEYS + optional, max_bytes, optional)
    for split in ("train", "test"):
        if arrays[f"{split}_images"].shape[:1] > (MEMBERS_LIMIT,):
            raise PmoeError(f"{path}: {split}_images has more than {MEMBERS_LIMIT} images")
    asked = boxes is not None
    beside = os.path.join(os.path.dirname(path), "gtsrb_rois.npz")
    if boxes is None and os.path.exists(beside):
        boxes = beside
    rois = read_npz(boxes, ("train_rois", "test_rois"), max_bytes) if boxes else {}
    sized = {"train_sizes", "test_sizes"} <= arrays.keys()
    if rois and asked and not sized:
        raise PmoeError(f"{path} lacks train_sizes and test_sizes, which the boxes refer to")
    if rois and not asked:
        fitting = (
            rois[f"{split}_rois"].shape[:1] == arrays[f"{split}_images"].shape[:1]
            for split in ("train", "test")
        )
        if not sized:
            why = f"{path} lacks train_sizes and test_sizes, which they refer to"
        else:
            why = "" if all(fitting) else f"they are of other images than {path}"
        if why:
            print(f"note: the boxes in {beside} are not used: {why}", file=sys.stderr)
            rois = {}
    splits = []
    for split in ("train", "test"):
        images = to_uint8(arrays[f"{split}_images"], f"{path}: {split}_images")
        numbers = to_labels(arrays[f"{split}_labels"], f"{path}: {split}_labels")
        count = len(images)
        names = _texts(arrays.get(f"{split}_names"), count, f"{path}: {split}_names")
        sizes = _integers(arrays.get(f"{split}_sizes"), count, 2, f"{path}: {split}_sizes")
        corners = _integers(rois.get(f"{split}_rois"), count, 4, f"{boxes}: {split}_rois")
        if len(numbers) != count:
            raise PmoeError(f"{path}: {count} {split}_images but {len(numbers)} {split}_labels")
        records = []
        for i in range(count):
            where = f"{path}: {split} image {i}"
            if numbers[i] >= len(CLASS_NAMES):
                raise PmoeError(f"{where} has the label {numbers[i]}; allowed are 0 to 42")
            name = names[i] if names else f"{i:05d}"
            is_track = re.fullmatch(r"\d{5}/\d{5}_\d{5}", name, re.ASCII)
            box = corners[i] if corners else None
            if box and not (
                0 <= box[0] < box[2] <= sizes[i][0] and 0 <= box[1] < box[3] <= sizes[i][1]
            ):
                raise PmoeError(f"{where}: the box {box} is not inside {sizes[i]}")
            records.append(
                Record(
                    name=name,
                    label=int(numbers[i]),
                    read=partial(images.__getitem__, i),
                    where=where,
                    group=name[:11] if split == "train" and is_track else None,
                    box=box,
                    size=sizes[i] if sizes else None,
                )
            )
        splits.append(records)
    height, width = arrays["train_images"].shape[1:3]
    return splits[0], splits[1], (height, width)


def _texts(array: np.ndarray | None, count: int, what: str) -> list[str]:
    if array is None:
        return []
    if array.dtype.kind not in "SU" or array.shape != (count,):
        raise PmoeError(f"{what} must be {count} names")
    return [n.decode("ascii", "replace") if isinstance(n, bytes) else n for n in array.tolist()]


def _integers(array: np.ndarray | None, count: int, width: int, what: str) -> list[Any]:
    if array is None:
        return []
    if array.dtype.kind not in "iu" or array.shape != (count, width):
        raise PmoeError(f"{what} must be whole numbers [{count}, {width}]")
    return [tuple(row) for row in array.tolist()]


def _check_unique(records: list[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.name in seen:
            raise PmoeError(f"{record.where}: the image {printable(record.name)} is listed twice")
        seen.add(record.name)
