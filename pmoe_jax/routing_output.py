"""What `pmoe analyze` found, and how it is written: a table, and npz, CSV and JSON files.

`routing.npz` holds the arrays of `routing_arrays.SCHEMA`; beside it are `routing.csv` (a row a
figure and member, fields `routing_rows.FIELDS`) and `routing.json` (mean, sd and interval over
seeds, the schema, and what all of it was made from), each of these two with its sum in
NAME.sha256: tables are made of them later. Arrays have the checksums of zip.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pmoe_jax import config as config_lib
from pmoe_jax import metrics, provenance, report
from pmoe_jax.data import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import write_with_sum
from pmoe_jax.members import Member
from pmoe_jax.routing_arrays import SCHEMA
from pmoe_jax.routing_rows import FIELDS
from pmoe_jax.rows import Row
from pmoe_jax.rundir import RunDirectory


@dataclasses.dataclass
class Analysis:
    """What `analyze` found.

    Attributes:
      arrays: of the names and axes of `SCHEMA`.
      rows: a row a figure and member, fields `FIELDS`.
      scale: a line that says what the figures are of.
      dataset, config, members: the run's, the members as they were trained.
      trigger: the trigger that was applied [M, ...], or None.
      applied: its {"name": ..., parameters}.
      shown: positions of the test images to draw.
      scales: the same line of each model beside it, by the prefix of its arrays.
      others: further attacked runs on a few images, for Figure 3.
      made_from: which checkpoints and options, see `made_from`.
    """

    arrays: dict[str, np.ndarray]
    rows: list[Row]
    scale: str
    dataset: Dataset
    config: Any
    members: list[Member]
    trigger: Any
    applied: Mapping[str, Any]
    shown: list[int]
    scales: dict[str, str] = dataclasses.field(default_factory=dict)
    others: list[OnImages] = dataclasses.field(default_factory=list)
    made_from: dict[str, Any] = dataclasses.field(default_factory=dict)


class OnImages(NamedTuple):
    """A run's routing of some test images.

    Attributes:
      name: the run's.
      scale: a line that says what it is.
      trigger: its own trigger [M, ...], or None.
      arrays: as in `SCHEMA`, of these images alone.
      positions: the images.
    """

    name: str
    scale: str
    trigger: Any
    arrays: dict[str, np.ndarray]
    positions: list[int]


def made_from(
    runs: Mapping[str, RunDirectory],
    *,
    members: Sequence[int] = (),
    trigger: Mapping[str, Any] | None = None,
    every_epoch: bool = False,
    causes: bool = True,
    single_image: int | None = None,
) -> dict[str, Any]:
    """What an analysis depends on; two of the same find the same.

    Args:
      runs: the analysed run and those beside it, by the prefix of their arrays.
      members, trigger, every_epoch, causes: see `analyze.analyze`.
      single_image: the test image that patch values are of, if of one alone.

    Returns:
      "runs": prefix -> name and SHA-256 sum of the manifest, which lists the sums of all files of
      the checkpoints; "options": the others.
    """
    return {
        "runs": {
            prefix: {
                "name": run.name,
                "manifest": hashlib.sha256((run.path / "manifest.json").read_bytes()).hexdigest(),
            }
            for prefix, run in runs.items()
        },
        "options": {
            "members": list(members),
            "trigger": None if trigger is None else dict(trigger),
            "every_epoch": every_epoch,
            "causes": causes,
            "single_image": single_image,
        },
    }


def place(path: str | os.PathLike[str]) -> pathlib.Path:
    """Where arrays are to be written; its folder is created.

    Raises:
      PmoeError: the path does not end in .npz, or cannot be written.
    """
    target = pathlib.Path(path)
    if target.suffix != ".npz":
        raise PmoeError(f"--output={path} must end in .npz")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error.strerror) from None
    rows, summary = target.with_suffix(".csv"), target.with_suffix(".json")
    # A kill leaves arrays, or arrays and rows, without their summary.
    foreign = [rows] if rows.exists() and not (target.exists() or summary.exists()) else []
    foreign += [summary] if summary.exists() and not _is_summary(summary) else []
    if foreign:
        raise _unwritable(target, f"it would replace {foreign[0]}, which is something else")
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise _unwritable(target, "a folder" if target.is_dir() else "its folder is protected")
    return target


def _is_summary(path: pathlib.Path) -> bool:
    """Whether a file is what `write` puts beside arrays."""
    try:
        return "made_from" in json.loads(config_lib.read_text(path))
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def _unwritable(target: pathlib.Path, why: object) -> PmoeError:
    return PmoeError(f"{target} cannot be written ({why}); choose another --output")


def write(analysis: Analysis, path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes PATH (.npz), and rows (.csv) and summary (.json) beside it.

    Raises:
      PmoeError: the path does not end in .npz, or cannot be written.
    """
    target = place(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    # Last of the three comes what says that they belong together.
    rows_path, summary_path = target.with_suffix(".csv"), target.with_suffix(".json")
    try:
        summary_path.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **analysis.arrays)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(target, error.strerror) from None
    write_with_sum(rows_path, rows_csv(analysis.rows))
    content = {
        "scale": analysis.scale,
        "scales": analysis.scales,
        "summary": summaries(analysis.rows),
        "arrays": SCHEMA,
        "made_from": {**analysis.made_from, "data": analysis.dataset.fingerprint()},
        "made_by": provenance.facts(),
    }
    write_with_sum(summary_path, json.dumps(content, indent=2) + "\n")
    return [target, rows_path, summary_path]


def rows_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


#: What a seed's experts are summed up by: experts have no identity across seeds.
_OF_EXPERTS: dict[str, Any] = {"mean": np.mean, "max": np.max, "min": np.min}


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """n, mean, sd, 95 % interval and values over members of every figure, without diverged ones.

    A figure of experts is three: the mean, the largest and the smallest of each member's experts
    ("of_experts"), and then over members. "of" is how many members there are; of n of them the
    figure is known.
    """
    keys = ("run", "epoch", "metric", "condition", "class", "unit")
    grouped: dict[tuple[Any, ...], dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    everybody: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        everybody[row["run"]].add(row["member"])
        if row["stage"] != "diverged" and np.isfinite(row["value"]):
            key = (*(row[key] for key in keys), row["expert"] != "")
            grouped[key][row["member"]].append(row["value"])
    made = []
    for (*fields, of_experts), by_member in grouped.items():
        for kind, reduced in _OF_EXPERTS.items() if of_experts else [("", np.mean)]:
            values = [float(reduced(each)) for each in by_member.values()]
            found = dict(zip(keys, fields, strict=True))
            summary = metrics.summarize(values)._asdict()
            of = len(everybody[found["run"]])
            made.append({**found, "of_experts": kind, **summary, "of": of, "values": values})
    return made


#: The rows of the printed table: metric, condition, what of a seed's experts, and what it says.
_TABLE = (
    ("unused", "clean", "", "patches that no expert takes, clean [%]"),
    ("entropy", "clean", "mean", "entropy of an expert's patches, clean [bit]"),
    ("overlap", "clean", "mean", "overlap (IoU) between experts, clean [%]"),
    ("wasserstein/luminance", "clean", "mean", "taken against all patches: luminance [sd]"),
    ("wasserstein_position/luminance", "clean", "mean", "the same at equal positions [sd]"),
    ("wasserstein/contrast", "clean", "mean", "taken against all patches: contrast [sd]"),
    ("wasserstein_position/contrast", "clean", "mean", "the same at equal positions [sd]"),
    ("wasserstein/edges", "clean", "mean", "taken against all patches: edges [sd]"),
    ("wasserstein_position/edges", "clean", "mean", "the same at equal positions [sd]"),
    ("object_share", "clean", "mean", "taken area inside the object's box [%]"),
    ("object_share/position", "clean", "mean", "the same by the positions taken alone [%]"),
    ("object_share/all", "clean", "", "the same of all patches [%]"),
    ("iou", "both", "mean", "selection IoU, clean against triggered [%]"),
    ("capture/nominal/any", "triggered", "", "trigger's own patches taken by an expert [%]"),
    ("capture/nominal/any", "clean", "", "the same patches on clean images [%]"),
    ("capture/nominal/any", "chance", "", "the same by chance [%]"),
    ("capture/nominal/all", "triggered", "", "trigger's own patches taken by all experts [%]"),
    ("capture/field/share", "triggered", "mean", "share taken of patches that see the trigger [%]"),
    ("capture/field/share", "clean", "mean", "the same patches on clean images [%]"),
    ("capture/field/share", "chance", "mean", "the same by chance [%]"),
    ("captured_change", "triggered", "mean", "share of the trigger's change taken [%]"),
    ("captured_change", "clean", "mean", "the same by the patches of clean images [%]"),
    ("captured_change", "chance", "mean", "the same by chance [%]"),
    ("accuracy", "clean", "", "accuracy on clean images [%]"),
    ("target_rate", "triggered", "", "ASR [%]"),
    ("target_rate/other_routing", "triggered", "", "ASR with the clean image's routing [%]"),
    (
        "target_rate/other_routing", "clean", "",
        "clean images with the triggered routing: target [%]",
    ),
    ("target_rate/nominal_in", "triggered", "", "ASR, trigger's patches forced in [%]"),
    ("target_rate/nominal_out", "triggered", "", "ASR, trigger's patches kept out [%]"),
    ("target_rate/field_out", "triggered", "", "ASR, all patches that see it kept out [%]"),
    ("swap/routing", "both", "", "part of the ASR by routing [points]"),
    ("swap/computation", "both", "", "part of the ASR by what experts compute [points]"),
    ("shapley/asr/zero", "both", "max", "largest Shapley share of the ASR [points]"),
    ("shapley/asr/zero", "both", "min", "smallest Shapley share of the ASR [points]"),
)  # fmt: skip


def table(analysis: Analysis) -> str:
    """The main figures as a Markdown table; experts are summed up within a seed first."""
    last = analysis.arrays["epoch"][-1]
    runs = list(dict.fromkeys(row["run"] for row in analysis.rows))
    rows = [row for row in analysis.rows if row["run"] != runs[0] or row["epoch"] == last]
    keys = ("run", "metric", "condition", "of_experts")
    cells = {}
    for found in summaries(rows):
        if found["class"] == "":
            cells[tuple(found[key] for key in keys)] = points_or_mean(found)
    lines = []
    for *figure, title in _TABLE:
        line = [cells.get((run, *figure), "") for run in runs]
        if any(line):
            lines.append([title, *line])
    return f"{analysis.scale}\n\n{report.markdown([OVER_SEEDS, *runs], lines)}"


#: Head of the first column of tables.
OVER_SEEDS = "each seed; from three on mean ± sd"


def points_or_mean(found: dict[str, Any]) -> str:
    """An entry of `summaries` as text; bits and standard deviations with two digits.

    "(2 of 3)" behind it where members are left out.
    """
    digits = 2 if found["unit"] in ("bit", "sd") else 1
    counted = f" ({found['n']} of {found['of']})" * (found["n"] < found["of"])
    if found["n"] < 3:
        return ", ".join(f"{value:.{digits}f}" for value in found["values"]) + counted
    return f"{found['mean']:.{digits}f} ± {found['sd']:.{digits}f}{counted}"
