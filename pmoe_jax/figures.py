"""Figures of a run: what its triggers look like, and its curves.

Every figure is written as PNG and PDF, with its numbers beside it as CSV where it shows numbers.
Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import csv
import io
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pmoe_jax import evaluation, inputs, report, triggers
from pmoe_jax import members as members_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import write_atomically
from pmoe_jax.rows import Row
from pmoe_jax.rundir import RunDirectory

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
#: Okabe and Ito's colours, one an expert or a curve.
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
#: Widths of a two-column paper's column and page, in inches.
COLUMN, PAGE = 3.5, 7.2
#: Sizes that can be read there in print; TrueType fonts, which publishers ask for.
PAPER_STYLE: Any = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7, "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "pdf.fonttype": 42,
}  # fmt: skip
_COLOURS = {"ba": BLUE, "asr": ORANGE}


def make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """A folder to write figures to; created.

    Raises:
      PmoeError: it cannot be made or written to.
    """
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PmoeError(
            f"{folder} cannot be a folder for figures ({error.strerror}); choose another one"
        ) from None
    if not os.access(folder, os.W_OK):
        raise PmoeError(f"{folder} cannot be written to; choose another folder for figures")
    return folder


def write_run(
    evaluated: trained_lib.Evaluated,
    workdir: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    source: str = "",
) -> list[pathlib.Path]:
    """Writes the figures of one run: its trigger (the first member's), and its curves by epoch.

    Args:
      evaluated: the run's evaluation, whose trigger is drawn.
      workdir: the run directory.
      folder: where to write; created.
      source: where the data set lies, if not where the run's config says.

    Returns:
      The PNG files.

    Raises:
      PmoeError: the folder cannot be written, or the run or its data cannot be read.
    """
    run, out = RunDirectory(workdir), make_folder(folder)
    config = run.config()
    written = []
    rows = run.rows()
    if rows:
        alike = members_lib.same_attack(evaluated.members)
        path, title = out / f"{run.name}_curves", report.scale(evaluated)
        written.append(write_curves(rows, path, title, alike))
    if evaluated.attack is not None:
        dataset = inputs.load_data(config, source)
        trigger = jax.tree.map(lambda leaf: leaf[0], evaluated.attack.trigger)
        name = (evaluated.shown or evaluated.members[0].trigger)["name"]
        path = out / f"{run.name}_trigger"
        written.append(write_triggered_images(dataset.test_images, {name: trigger}, path))
    return written


def write_curves(
    rows: Sequence[Row], path: pathlib.Path, title: str, alike: bool = True
) -> pathlib.Path:
    """BA and ASR by epoch: a thin line a seed, a thick one for their mean.

    The mean is of members that never diverged, from three on, if they are `alike` in their attack.
    """
    figure, axes = plt.subplots(figsize=(4.5, 3.0), layout="constrained")
    for metric, colour in _COLOURS.items():
        chosen = [row for row in rows if row["metric"] == metric and row["stage"] != "diverged"]
        for member in sorted({row["member"] for row in chosen}):
            own = {row["epoch"]: row["value"] for row in chosen if row["member"] == member}
            axes.plot(list(own), list(own.values()), color=colour, alpha=0.35, linewidth=0.8)
        mean = mean_curve([row for row in rows if row["metric"] == metric], "epoch")
        if mean is not None and alike:
            label = f"{evaluation.TITLES[metric]} (mean of {mean.members}, and each seed)"
            axes.plot(mean.places, mean.values, color=colour, linewidth=2, label=label)
        elif chosen:
            each = "seed" if alike else "member"
            axes.plot([], [], color=colour, label=f"{evaluation.TITLES[metric]} (each {each})")
    axes.set(xlabel="epoch", ylabel="percent of test images", ylim=(-2, 102))
    set_title(figure, title)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(named(path, "csv"), report.rows_csv(rows) + "\n")
    return save(figure, path)


class MeanCurve(NamedTuple):
    """A mean [percent] at places along an axis, and of how many members it is."""

    places: list[float]
    values: list[float]
    members: int


def mean_curve(rows: Sequence[Mapping[str, Any]], by: str) -> MeanCurve | None:
    """The mean of members that diverged nowhere, as it must be of the same ones all along.

    Args:
      rows: of one metric.
      by: the field that the curve goes along.

    Returns:
      None for fewer than three such members: they are shown as they are.
    """
    gone = {row["member"] for row in rows if row["stage"] == "diverged"}
    kept = [row for row in rows if row["member"] not in gone]
    members = len({row["member"] for row in kept})
    if members < 3:
        return None
    places = sorted({row[by] for row in kept})
    values = [float(np.mean([r["value"] for r in kept if r[by] == place])) for place in places]
    return MeanCurve(places, values, members)


def write_triggered_images(
    images: np.ndarray, made: dict[str, triggers.Trigger], path: pathlib.Path, count: int = 6
) -> pathlib.Path:
    """Clean images, the same with each trigger, and what the trigger changes (amplified)."""
    shown = jnp.asarray(images[:: max(1, len(images) // count)][:count], jnp.float32) / 255
    count = len(shown)
    strips = [("clean", shown)]
    for name, trigger in made.items():
        triggered = jax.jit(triggers.apply)(shown, trigger)
        change = jnp.abs(triggered - shown)
        factor = amplified(name)
        strips.append((name, triggered))
        strips.append((f"change x{factor}", jnp.clip(1 - factor * change, 0, 1)))
    figure, grid = plt.subplots(
        len(strips), count, figsize=(count * 0.9, len(strips) * 0.95), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for row, (label, strip) in zip(grid, strips, strict=True):
        for axes, image in zip(row, np.asarray(strip), strict=True):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, fontsize=8)
    return save(figure, path)


def amplified(name: str) -> int:
    """By how much figures show what a trigger changes."""
    return 4 if name == "warp" else 1


def named(path: pathlib.Path, kind: str) -> pathlib.Path:
    """PATH.kind, whatever dots the path's name has."""
    return path.with_name(f"{path.name}.{kind}")


def write_csv(path: pathlib.Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """Writes PATH.csv, the numbers of a figure."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    write_atomically(named(path, "csv"), content.getvalue())


def write_npz(path: pathlib.Path, **arrays: Any) -> None:
    """Writes PATH.npz, the arrays of a figure."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(named(path, "npz"), content.getvalue())


def set_title(figure: Any, *lines: str) -> None:
    """A title of lines that are broken, into parts about as long, where the width ends."""
    letters = int(figure.get_figwidth() * 18)  # of 7 points
    parts = []
    for line in filter(None, lines):
        pieces = len(textwrap.wrap(line, letters))
        parts += textwrap.wrap(line, min(letters, len(line) // pieces + 12))
    figure.suptitle("\n".join(parts), fontsize=7)


def save_as(figure: Any, path: pathlib.Path, dpi: int = 170) -> None:
    """Writes a single file, of the kind that its name says, and closes the figure.

    Raises:
      PmoeError: a kind that matplotlib does not know.
      DiskError: the disk refuses.
    """
    content = io.BytesIO()
    try:
        figure.savefig(content, format=path.suffix[1:] or "png", dpi=dpi)
    except ValueError as error:
        raise PmoeError(f"{path} cannot be drawn ({error}); name a .png or .pdf file") from None
    write_atomically(path, content.getvalue())
    plt.close(figure)


def save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    """Writes PATH.pdf and PATH.png, closes the figure, and returns the PNG file's path.

    Raises:
      DiskError: the disk refuses.
    """
    for kind in ("pdf", "png"):
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=160 if kind == "png" else None)
        write_atomically(named(path, kind), content.getvalue())
    plt.close(figure)
    return named(path, "png")
