"""`pmoe data prepare NAME` and `pmoe data show NAME`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from pmoe_jax.data import MAX_BYTES, NAMES, Dataset, cifar10, describe, gtsrb, load, prepare
from pmoe_jax.errors import PmoeError

USAGE = """pmoe data prepare NAME [--source=PATH] [--data_dir=DIR] [--overwrite]
  Writes cifar10 or gtsrb once as a TensorFlow Datasets folder (cifar10 without a source is
  downloaded). Can be repeated after an interruption; a set that was prepared from another source
  is refused, or replaced with --overwrite.
pmoe data show NAME [--source=PATH] [--json] [--sheet=FILE.png]
  Prints images per class and split, mean and standard deviation, and draws a contact sheet with
  each trigger applied."""


#: Flags that only one of the two commands takes.
SHOW_ONLY = ("json", "sheet", "image_size", "resize_filter", "crop_roi", "heldout")
PREPARE_ONLY = ("overwrite",)


def add_flags(flag_values: flags.FlagValues, argv: Sequence[str] = ()) -> None:
    """Defines the flags of both commands."""
    fv = flag_values
    flags.DEFINE_string(
        "source", None, "File, archive or folder to read the data set from.", flag_values=fv
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Where prepared data sets are kept; $TFDS_DATA_DIR or ~/tensorflow_datasets by default.",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "boxes",
        None,
        "For gtsrb from an .npz of the resized set: the .npz with its sign boxes.",
        flag_values=fv,
    )
    flags.DEFINE_boolean(
        "skip_corrupt",
        False,
        "Leave out images that cannot be decoded, and count them, instead of failing.",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "max_bytes",
        MAX_BYTES,
        "Refuse archives and array files that unpack to more; raise it for files you trust.",
        flag_values=fv,
    )
    flags.DEFINE_boolean(
        "overwrite",
        False,
        "prepare: write anew what is there already, which stays until the new set is whole.",
        flag_values=fv,
    )
    flags.DEFINE_boolean("json", False, "show: print JSON on standard output.", flag_values=fv)
    flags.DEFINE_string(
        "sheet",
        None,
        "show: the contact sheet's file; NAME_sheet.png by default, empty for none.",
        flag_values=fv,
    )
    flags.DEFINE_integer("image_size", 32, "show: side to resize images to.", flag_values=fv)
    flags.DEFINE_string("resize_filter", "bilinear", "show: PIL filter.", flag_values=fv)
    flags.DEFINE_boolean(
        "crop_roi", False, "show: cut GTSRB images to their sign boxes.", flag_values=fv
    )
    flags.DEFINE_float(
        "heldout", 0.0, "show: fraction of the training images to hold out.", flag_values=fv
    )


def run_command(flag_values: flags.FlagValues, argv: list[str]) -> int:
    """Runs `prepare NAME` or `show NAME` and returns the exit code.

    Args:
      flag_values: parsed flags of `add_flags`.
      argv: the positional words after `data`.

    Raises:
      PmoeError: bad words, flags or files.
    """
    fv = flag_values
    if len(argv) != 2 or argv[0] not in ("prepare", "show"):
        words = " ".join(["data", *argv])
        raise PmoeError(
            f"`pmoe {words}` is not a command; use `pmoe data prepare NAME` or `pmoe data show "
            f"NAME` with NAME one of {', '.join(NAMES)}"
        )
    command, name = argv
    other = "show" if command == "prepare" else "prepare"
    for flag in SHOW_ONLY if other == "show" else PREPARE_ONLY:
        if fv[flag].present:
            raise PmoeError(f"--{flag} is a flag of `pmoe data {other}`, not of {command}")
    if command == "prepare":
        folder = prepare(
            name,
            fv.source,
            fv.data_dir,
            boxes=fv.boxes,
            skip_corrupt=fv.skip_corrupt,
            max_bytes=fv.max_bytes,
            overwrite=fv.overwrite,
        )
        print(f"{name} is ready in {folder}")
        return 0
    data = load(
        name,
        fv.source,
        data_dir=fv.data_dir,
        image_size=fv.image_size,
        resize_filter=fv.resize_filter,
        crop_roi=fv.crop_roi,
        heldout=fv.heldout,
        skip_corrupt=fv.skip_corrupt,
        max_bytes=fv.max_bytes,
        boxes=fv.boxes,
    )
    figures = _figures(data)
    print(json.dumps(figures) if fv.json else table(data, figures))
    sheet = f"{name}_sheet.png" if fv.sheet is None else os.path.expanduser(fv.sheet)
    if sheet:
        write_contact_sheet(data, sheet)
        print(f"wrote {sheet}", file=sys.stderr)
    return 0


def _figures(data: Dataset) -> dict[str, Any]:
    """What `describe` returns; for known data sets also the layout that was read ("origin"), and
    the official counts of each split that differs from them ("mismatch")."""
    figures = describe(data)
    if data.origin:
        figures["origin"] = data.origin
    official = {"cifar10": cifar10.OFFICIAL_COUNTS, "gtsrb": gtsrb.OFFICIAL_COUNTS}
    for split, expected in official.get(data.name, {}).items():
        labels = getattr(data, f"{split}_labels")
        if split == "train":
            labels = np.concatenate([labels, data.heldout_labels])
        counts = np.bincount(labels, minlength=data.num_classes)
        if (counts != expected).any():
            figures["splits"][split]["mismatch"] = {
                "official_images": sum(expected),
                "official_per_class": list(expected),
                "classes": np.flatnonzero(counts != expected).tolist(),
            }
    return figures


def table(data: Dataset, figures: dict[str, Any]) -> str:
    """What `describe` returns, as text."""
    splits = figures["splits"]
    height, width, channels = data.image_shape
    lines = [f"{data.name}: {data.num_classes} classes, images {height}x{width}x{channels}"]
    lines += [f"read or prepared from: {data.origin}", ""] if data.origin else [""]
    lines.append(f"{'split':<10}{'images':>8}   {'mean':<26}{'standard deviation'}")
    for split, values in splits.items():
        mean, std = (" ".join(f"{v:.5f}" for v in values[key]) for key in ("mean", "std"))
        lines.append(f"{split:<10}{values['images']:>8}   {mean:<26}{std}")
    longest = max(len(name) for name in data.class_names)
    lines += ["", f"{'class':<{longest + 7}}" + "".join(f"{split:>9}" for split in splits)]
    for label, name in enumerate(data.class_names):
        counts = "".join(f"{values['per_class'][label]:>9}" for values in splits.values())
        lines.append(f"{label:>4}  {name:<{longest + 1}}" + counts)
    return "\n".join(lines)


def write_contact_sheet(data: Dataset, path: str, columns: int = 10) -> None:
    """A picture with the first training image of up to `columns` classes (spread over all of
    them): clean, and with each trigger at its default strength; drawn with seed 0."""
    import jax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from pmoe_jax import triggers

    present = np.unique(data.train_labels)
    chosen = present[np.linspace(0, len(present) - 1, min(columns, len(present))).astype(int)]
    rows = np.array([np.argmax(data.train_labels == label) for label in chosen])
    clean = data.train_images[rows].astype(np.float32) / 255
    made = {name: triggers.make(name, jax.random.key(0), data.image_shape)
            for name in triggers.NAMES}  # fmt: skip
    shown = {name: triggers.apply(clean, trigger) for name, trigger in made.items()}
    shown = {"clean": shown.pop("none"), **shown}
    figure = Figure(figsize=(1.1 * len(chosen) + 0.6, 1.1 * len(shown) + 0.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), len(chosen), squeeze=False)
    for row, (trigger, images) in enumerate(shown.items()):
        for column, label in enumerate(chosen):
            axis = axes[row, column]
            axis.imshow(np.asarray(images[column]), interpolation="nearest", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(trigger)
            if row == 0:
                axis.set_title(data.class_names[label][:14], fontsize=7)
    figure.suptitle(f"{data.name}: triggers", fontsize=9)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=os.path.splitext(path)[1][1:] or "png")
    except ValueError as error:
        raise PmoeError(f"cannot write {path} ({error}); give a .png with --sheet") from error
    # In one move: a sheet that is there stays as it is until the new one is whole.
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(picture.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise PmoeError(
            f"cannot write {path} ({error.strerror}); name another file with --sheet, or none with "
            "--sheet="
        ) from error
