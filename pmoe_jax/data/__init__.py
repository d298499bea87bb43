"""Data sets as uint8 arrays in host memory.

`load` reads every source, `prepare` writes CIFAR-10 or GTSRB once as a TensorFlow Datasets
folder, `Dataset` is what comes out. Importing this package loads neither TensorFlow nor
scikit-learn nor any reader; reading never needs TensorFlow.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from typing import TYPE_CHECKING

import psutil

from pmoe_jax.data.dataset import Dataset, count_notes, describe, make, split_heldout
from pmoe_jax.errors import PmoeError

if TYPE_CHECKING:
    from pmoe_jax.data.records import Recipe, Record

__all__ = ["MAX_BYTES", "NAMES", "Dataset", "describe", "load", "prepare"]

NAMES = ("digits", "cifar10", "gtsrb", "npz", "folder")

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
    boxes: str | os.PathLike[str] | None = None,
    decode_up_to: int | None = None,
) -> Dataset:
    """Reads a data set.

    What differs from the published data set, or was left out, is said on stderr and kept in
    `Dataset.notes`.

    Args:
      name: one of `NAMES`.
      source: file or folder to read. `digits` needs none. `cifar10`: the official python or
        binary batches, folder or `.tar.gz`. `gtsrb`: the official release, the Kaggle layout, or
        an `.npz` of the resized set (`gtsrb.read`). Both: a prepared TFDS folder, or a folder
        with the paper authors' `.npy` files. `npz`: an `.npz` (`files.load_npz`). `folder`:
        train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE alone (`files.load_folder`).
      data_dir: where data sets were prepared, used if there is no `source`; $TFDS_DATA_DIR or
        ~/tensorflow_datasets by default.
      image_size: height and width that images are resized to. Array files keep their own.
      resize_filter: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos" (PIL).
      crop_roi: cut GTSRB images to their sign box before resizing (the paper does not).
      heldout: fraction of the training images moved to the held-out split before any poisoning,
        stratified, by whole tracks for GTSRB.
      heldout_seed: which ones.
      skip_corrupt: leave out images that cannot be decoded (and say how many) instead of failing.
      max_bytes: limit on what an archive or array file may unpack to. The limit is the memory that
        is free where that is less: a stranger's config brings its own `max_bytes`.
      boxes: for `gtsrb` from an `.npz`: the `.npz` with train_rois and test_rois.
      decode_up_to: for pictures in files (GTSRB, prepared data sets, folders): if the pixels of
        all images would take more bytes than this, they are decoded when they are indexed
        (`records.LazyImages`, by a few threads); see `stream`. 0 does so in any case.

    Raises:
      PmoeError: anything wrong with the request or with the files.
    """
    if image_size < 1:
        raise PmoeError(f"image_size is {image_size}; allowed are sizes from 1 pixel")
    if max_bytes < 1:
        raise PmoeError(f"max_bytes is {max_bytes}; allowed are limits from 1 byte")
    max_bytes = min(max_bytes, psutil.virtual_memory().available)
    _check_name(name)
    if name == "digits" and source is not None:
        raise PmoeError("digits is embedded and takes no source; leave the source out")
    box_file = _box_file(name, boxes)
    if crop_roi and name != "gtsrb":
        raise PmoeError(f"crop_roi needs sign boxes; {name} has none, only gtsrb does")
    source = None if source is None else os.path.expanduser(os.fspath(source))
    if name == "digits":
        from pmoe_jax.data import digits

        data = digits.load(image_size, resize_filter)
    elif name == "npz":
        from pmoe_jax.data import files

        data = files.load_npz(_needed(name, source), max_bytes)
    else:
        from pmoe_jax.data import records

        recipe = records.Recipe(image_size, resize_filter, crop_roi, max_bytes)
        if name == "folder":
            from pmoe_jax.data import files

            source = _needed(name, source)
            data = files.load_folder(
                source, recipe, skip_corrupt=skip_corrupt, decode_up_to=decode_up_to
            )
        else:
            data = _load_known(name, source, data_dir, recipe, skip_corrupt, decode_up_to, box_file)
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    return split_heldout(data, heldout, heldout_seed)


def prepare(
    name: str,
    source: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    boxes: str | os.PathLike[str] | None = None,
    skip_corrupt: bool = False,
    max_bytes: int = MAX_BYTES,
    overwrite: bool = False,
) -> str:
    """Writes CIFAR-10 or GTSRB as a TFDS data set into `data_dir` and returns its folder.

    Afterwards `load(name, data_dir=...)` and `tfds.data_source(name, data_dir=...)` find it. A
    data set that is there already is left alone. An interrupted run can be repeated: it goes on
    after the last complete shard, and the data set appears only when it is whole.

    Args:
      name: "cifar10" or "gtsrb".
      source: as for `load`. Without one CIFAR-10 is downloaded (and its checksum verified).
      data_dir, boxes, skip_corrupt, max_bytes: as for `load`.
      overwrite: write anew what is there already; the old one stays until the new one is whole.

    Raises:
      PmoeError: anything wrong with source or target, or a data set that is there already and was
        prepared from another source or with other options (unless `overwrite`); what was in
        `data_dir` stays as it was.
    """
    from pmoe_jax.data import cifar10, gtsrb, prepared

    _check_name(name)
    if name not in prepared.VERSIONS:
        allowed = ", ".join(prepared.VERSIONS)
        raise PmoeError(
            f"{name!r} cannot be prepared; allowed are {allowed} (others are read as they are)"
        )
    box_file = _box_file(name, boxes)
    target = os.path.expanduser(os.fspath(data_dir or prepared.default_data_dir()))
    path = None if source is None else os.path.expanduser(os.fspath(source))
    found = prepared.find(name, target)
    if found is not None and path is None and not overwrite:
        prepared.check_options(found, skip_corrupt)
        return found
    if found is not None and overwrite:
        prepared.check_replaceable(name, found, target)
    if name == "cifar10":
        path = path or cifar10.download(os.path.join(target, "downloads"))
        train, test, origin = cifar10.read(path, max_bytes)
        splits = {"train": cifar10.records("train", *train), "test": cifar10.records("test", *test)}
        labels = train[1], test[1]
        notes = count_notes(name, cifar10.OFFICIAL_COUNTS, *labels)
    else:
        path = _needed(name, path)
        train_records, test_records, origin = gtsrb.read(path, max_bytes, box_file)
        splits = {"train": train_records, "test": test_records}
        labels = gtsrb.labels(train_records), gtsrb.labels(test_records)
        notes = count_notes(name, gtsrb.OFFICIAL_COUNTS, *labels)
    job = prepared.Job(name, splits, origin, path, skip_corrupt, max_bytes)
    if found is not None and not overwrite:
        prepared.check_same(job, found)
        return found
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return prepared.write(job, target, overwrite=overwrite)


def _load_known(
    name: str,
    source: str | None,
    data_dir: str | os.PathLike[str] | None,
    recipe: Recipe,
    skip_corrupt: bool,
    decode_up_to: int | None,
    boxes: str | None,
) -> Dataset:
    from pmoe_jax.data import cifar10, files, gtsrb, prepared, records

    place = source or os.path.expanduser(os.fspath(data_dir or prepared.default_data_dir()))
    folder = prepared.find(name, place)
    if boxes is not None and (folder is not None or files.has_npy(name, place)):
        raise PmoeError(
            f"boxes belong to an .npz source, and {folder or place} is none; leave boxes out"
        )
    if folder is None and source is None:
        raise PmoeError(
            f"{name} is not prepared in {place}; give its source (data.source) or the folder of "
            f"prepared data sets (data.data_dir), or first run `pmoe data prepare {name}`"
        )
    module = {"cifar10": cifar10, "gtsrb": gtsrb}[name]
    arrays = None
    splits: dict[str, list[Record]] = {}
    kind = "the authors' .npy files"
    if folder is not None:
        kind = prepared.origin_of(folder)
        splits = prepared.read(
            name, folder, lambda count: records.is_lazy(count, recipe, decode_up_to)
        )
    elif files.has_npy(name, place):
        arrays = files.read_npy(name, place, recipe.max_bytes)
    elif name == "cifar10":
        train, test, (kind, _) = cifar10.read(place, recipe.max_bytes)
        arrays = (train, test)
        if recipe.size != 32:
            arrays = None
            splits = {
                "train": cifar10.records("train", *train),
                "test": cifar10.records("test", *test),
            }
    else:
        splits["train"], splits["test"], (kind, _) = gtsrb.read(place, recipe.max_bytes, boxes)
    if arrays is not None:
        if recipe.crop_roi:
            raise PmoeError(f"{place} has no sign boxes; crop_roi needs them")
        data = make(name, arrays[0], arrays[1], module.CLASS_NAMES)
    else:
        data = records.assemble(
            name,
            splits["train"],
            splits["test"],
            module.CLASS_NAMES,
            recipe,
            skip_corrupt=skip_corrupt,
            decode_up_to=decode_up_to,
        )
    notes = count_notes(name, module.OFFICIAL_COUNTS, data.train_labels, data.test_labels)
    return dataclasses.replace(data, origin=kind, notes=(*data.notes, *notes))


def _check_name(name: str) -> None:
    if name in NAMES:
        return
    near = difflib.get_close_matches(name.lower(), NAMES, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise PmoeError(f"unknown data set {name!r}{hint} (allowed are {', '.join(NAMES)})")


def _box_file(name: str, boxes: str | os.PathLike[str] | None) -> str | None:
    if boxes is not None and name != "gtsrb":
        raise PmoeError(f"boxes belong to gtsrb from an .npz; {name} takes none")
    return None if boxes is None else os.path.expanduser(os.fspath(boxes))


def _needed(name: str, source: str | None) -> str:
    if source is None:
        raise PmoeError(f"{name} needs a source; give the file or folder to read")
    return source
