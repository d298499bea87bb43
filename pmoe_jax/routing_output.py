"""What `pmoe analyze` found, and how it is written: a table, and npz, CSV and JSON files.

`routing.npz` holds the arrays of `routing_arrays.SCHEMA`; beside it are `routing.csv` (a row a
figure and member, fields `routing_rows.FIELDS`) and `routing.json` (mean, sd and interval over
seeds, and the schema).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pmoe_jax import metrics, report
from pmoe_jax.data import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.members import Member
from pmoe_jax.routing_arrays import SCHEMA
from pmoe_jax.routing_rows import FIELDS
from pmoe_jax.rundir import Row, write_atomically


@dataclasses.dataclass
class Analysis:
    """What `analyze` found.

    Attributes:
      arrays: of the names and axes of `SCHEMA`.
      rows: a row a figure and member, fields `FIELDS`.
      scale: a line that says what the figures are of.
      dataset, config, members: the run's.
      trigger: the trigger that was applied [M, ...], or None.
      scales: the same line of each model beside it, by the prefix of its arrays.
      others: further attacked runs on a few images, for Figure 3.
    """

    arrays: dict[str, np.ndarray]
    rows: list[Row]
    scale: str
    dataset: Dataset
    config: Any
    members: list[Member]
    trigger: Any
    scales: dict[str, str] = dataclasses.field(default_factory=dict)
    others: list[OnImages] = dataclasses.field(default_factory=list)


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


def write(analysis: Analysis, path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes PATH (.npz), and rows (.csv) and summary (.json) beside it.

    Raises:
      PmoeError: the path does not end in .npz, or cannot be written.
    """
    target = pathlib.Path(path)
    if target.suffix != ".npz":
        raise PmoeError(f"--output={path} must end in .npz")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **analysis.arrays)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PmoeError(
            f"{target} cannot be written ({error.strerror}); choose another --output"
        ) from None
    rows_path, summary_path = target.with_suffix(".csv"), target.with_suffix(".json")
    write_atomically(rows_path, rows_csv(analysis.rows))
    content = {"scale": analysis.scale, "summary": summaries(analysis.rows), "arrays": SCHEMA}
    write_atomically(summary_path, json.dumps(content, indent=2) + "\n")
    return [target, rows_path, summary_path]


def rows_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """n, mean, sd and 95 % interval over members of every figure; diverged ones are left out."""
    keys = ("run", "epoch", "metric", "condition", "expert", "unit")
    grouped: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] != "diverged" and np.isfinite(row["value"]):
            grouped[tuple(row[key] for key in keys)].append(row["value"])
    return [
        {**dict(zip(keys, key, strict=True)), **metrics.summarize(values)._asdict()}
        for key, values in grouped.items()
    ]


#: The rows of the printed table: metric, condition, and what it says.
_TABLE = (
    ("unused", "clean", "patches that no expert takes, clean [%]"),
    ("entropy", "clean", "entropy of an expert's patches, clean [bit]"),
    ("overlap", "clean", "overlap (IoU) between experts, clean [%]"),
    ("iou", "both", "selection IoU, clean against triggered [%]"),
    ("capture/nominal/any", "triggered", "trigger's own patches taken by an expert, triggered [%]"),
    ("capture/nominal/any", "clean", "the same patches on clean images [%]"),
    ("capture/nominal/any", "chance", "the same by chance [%]"),
    ("capture/field/any", "triggered", "patches that see the trigger taken, triggered [%]"),
    ("capture/nominal/all", "triggered", "trigger's own patches taken by all experts [%]"),
    ("accuracy", "clean", "accuracy on clean images [%]"),
    ("target_rate", "triggered", "ASR [%]"),
    ("target_rate/other_routing", "triggered", "ASR with the clean image's routing [%]"),
    ("target_rate/other_routing", "clean", "clean images with the triggered routing: target [%]"),
    ("target_rate/nominal_in", "triggered", "ASR, trigger's patches forced in [%]"),
    ("target_rate/nominal_out", "triggered", "ASR, trigger's patches kept out [%]"),
    ("target_rate/field_out", "triggered", "ASR, all patches that see it kept out [%]"),
    ("swap/routing", "both", "part of the ASR by routing [points]"),
    ("swap/computation", "both", "part of the ASR by what experts compute [points]"),
)


def table(analysis: Analysis) -> str:
    """The main figures as a Markdown table: mean ± sd over seeds (and, where per expert, mean)."""
    last = analysis.arrays["epoch"][-1]
    runs = list(dict.fromkeys(row["run"] for row in analysis.rows))
    lines = []
    for metric, condition, title in _TABLE:
        cells = []
        for run in runs:
            values = defaultdict(list)
            for row in analysis.rows:
                ours = row["run"] == run and (run != runs[0] or row["epoch"] == last)
                ours &= (row["metric"], row["condition"]) == (metric, condition)
                if ours and row["stage"] != "diverged" and np.isfinite(row["value"]):
                    values[row["member"]].append(row["value"])
            means = [float(np.mean(of_member)) for of_member in values.values()]
            cells.append(report.mean_sd(metrics.summarize(means)) if means else "")
        if any(cells):
            lines.append([title, *cells])
    return f"{analysis.scale}\n\n{report.markdown(['mean ± sd over seeds', *runs], lines)}"
