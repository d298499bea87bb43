"""From the directories of sweeps and runs to the figures of cells, with their statistics.

A cell is a set of members that differ in their seed only. Everything is in percent. Figures are of
the last epoch of finished members; those of diverged members, and those that are paired with a
diverged baseline, are left out of means and counted.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pmoe_jax import config as config_lib
from pmoe_jax import evaluation, grid, metrics, paper
from pmoe_jax.errors import PmoeError
from pmoe_jax.grid import Manifest, Program
from pmoe_jax.members import Member
from pmoe_jax.rundir import (
    ROW_FIELDS,
    Row,
    RunDirectory,
    check_sum,
    read_lines,
    read_provenance,
)

#: Metrics of a report, in the order of its tables.
METRICS = tuple(evaluation.TITLES)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One metric of a cell.

    Attributes:
      points: seed -> value at the last epoch, diverged members left out.
      summary: of the points; None if there are none.
      last3: the same of each seed's mean over the last three epochs; None if not all are known.
    """

    points: Mapping[int, float]
    summary: metrics.Summary | None
    last3: metrics.Summary | None

    @property
    def resolved(self) -> bool | None:
        """Whether the 95 % interval leaves 0 out; None below three seeds, which have none."""
        if self.summary is None or self.summary.interval is None:
            return None
        low, high = self.summary.interval
        return not low <= 0 <= high


@dataclasses.dataclass(frozen=True)
class CellResult:
    """What is known of a cell.

    Attributes:
      label: the cell's name in its sweep, or the run directory's.
      config: config of its program; its attack and seeds may be another cell's.
      member: the first member; the others differ in their seed.
      seeds: all that belong to the cell.
      done: those that are trained to the end.
      diverged: those of `done` that are left out.
      epoch: the newest epoch of which there are figures; 0 if there are none.
      figures: metric -> figure.
      curves: metric -> seed -> epoch -> value.
    """

    label: str
    config: Any
    member: Member
    seeds: tuple[int, ...]
    done: tuple[int, ...]
    diverged: tuple[int, ...]
    epoch: float
    figures: Mapping[str, Figure]
    curves: Mapping[str, Mapping[int, Mapping[float, float]]]

    @property
    def state(self) -> str:
        """ "done", or what is missing."""
        if len(self.done) == len(self.seeds):
            return "done" + (f", {len(self.diverged)} diverged" if self.diverged else "")
        if self.done:
            return f"unfinished: {len(self.done)} of {len(self.seeds)} seeds"
        if self.epoch:
            return f"unfinished: epoch {self.epoch:g} of {self.config.train.epochs}"
        return "not started"

    @property
    def attack(self) -> str:
        """The trigger, and what of the attack differs from the paper's."""
        return attack_text(self.config, self.member)

    def paper(self, metric: str) -> float | None:
        """The paper's value of the same data set, trigger and rate; None if it has none."""
        config, default = self.config, config_lib.default()
        same = config.model.name == "pmoe" and config.poison.source < 0
        for name in ("size", "corner", "alpha", "k", "strength"):
            same &= self.member.trigger.get(name, default.trigger[name]) == default.trigger[name]
        # Quirk A1's 1/255 is the authors' black.
        same &= self.member.trigger.get("value", 0) <= 1 / 255
        if not same:
            return None
        return paper.attack(config.data.name, self.member.trigger["name"], self.member.rate, metric)


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a report shows.

    Attributes:
      cells: in the order of the directories and of their grids.
      rows: rows of the common schema.
      provenance: run -> what its `provenance.json` holds.
      pictures: PNG files of the directories' `figures` folders.
    """

    cells: list[CellResult]
    rows: list[Row]
    provenance: dict[str, Any]
    pictures: list[pathlib.Path]


def gather(folders: Sequence[str | os.PathLike[str]]) -> Results:
    """Reads directories of sweeps and of runs; runs are paired with baselines among them.

    Raises:
      PmoeError: a directory is neither, or damaged.
    """
    cells, rows, pictures = [], [], []
    provenance: dict[str, Any] = {}
    runs, run_rows = [], []
    for folder in map(pathlib.Path, folders):
        pictures += sorted((folder / "figures").glob("*.png"))
        if (folder / "sweep.json").exists():
            manifest = Manifest.read(folder / "sweep.json")
            own = collect(manifest, folder)
            cells += cells_of(manifest, own)
            rows += own
            provenance |= collect_provenance(manifest, folder)
        elif (folder / "config.json").exists():
            run = RunDirectory(folder)
            runs.append(Program(run.name, run.config(), tuple(run.members())))
            run_rows += run.rows()
            provenance[run.name] = read_provenance(folder / "provenance.json")
        else:
            raise PmoeError(
                f"{folder} holds neither a sweep nor a run (no sweep.json, no config.json); give "
                "such a directory"
            )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise PmoeError(f"two runs are called {max(names, key=names.count)}; rename one directory")
    if runs:
        manifest = grid.of_runs(runs)
        run_rows = with_cad(manifest, run_rows)
        cells += cells_of(manifest, run_rows)
        rows += run_rows
    return Results(cells, rows, provenance, pictures)


def collect(manifest: Manifest, folder: pathlib.Path) -> list[Row]:
    """All rows of a sweep so far, with CAD.

    Rows come from the programs' run directories; of a sweep of which only the results were kept,
    from `rows.jsonl`.
    """
    if not (folder / "runs").is_dir():
        return with_cad(manifest, _summed_lines(folder / "rows.jsonl"))
    rows = []
    for program in manifest.programs:
        rows += RunDirectory(folder / "runs" / program.name).rows()
        rows += _summed_lines(folder / "paired" / f"{program.name}.jsonl")
    return with_cad(manifest, rows)


def _summed_lines(path: pathlib.Path) -> list[Row]:
    check_sum(path)
    return read_lines(path)


def collect_provenance(manifest: Manifest, folder: pathlib.Path) -> dict[str, Any]:
    """Program -> its provenance, as far as it was begun."""
    if not (folder / "runs").is_dir():
        return read_provenance(folder / "provenance.json")
    return {
        program.name: read_provenance(path)
        for program in manifest.programs
        if (path := folder / "runs" / program.name / "provenance.json").exists()
    }


def with_cad(manifest: Manifest, rows: Iterable[Row]) -> list[Row]:
    """Adds a CAD row for every BA of an attacked member whose baseline has one of that epoch.

    CAD of a member whose baseline diverged has no meaning: its row is marked as diverged.

    Raises:
      PmoeError: a row without all fields of the common schema.
    """
    rows = list(rows)
    for row in rows:
        if not row.keys() >= set(ROW_FIELDS):
            raise PmoeError(f"a row of {row.get('run', 'a run')} lacks fields of the common schema")
    rows = [row for row in rows if row["metric"] != "cad"]
    names = [program.name for program in manifest.programs]
    benign = {
        (row["run"], row["member"], row["epoch"]): row for row in rows if row["metric"] == "ba"
    }
    of = {
        (names[own.program], own.member): (names[clean.program], clean.member)
        for own, clean in manifest.pairs().items()
    }
    for (run, member, epoch), row in benign.items():
        clean = benign.get((*of[run, member], epoch)) if (run, member) in of else None
        if clean is not None:
            gone = "diverged" in (row["stage"], clean["stage"])
            cad = clean["value"] - row["value"]
            stage = "diverged" if gone else row["stage"]
            rows.append({**row, "metric": "cad", "value": cad, "stage": stage})
    return rows


def cells_of(manifest: Manifest, rows: Iterable[Row]) -> list[CellResult]:
    """The cells of a manifest with their figures."""
    by_member: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["stage"] in ("trained", "diverged"):  # Defences have tables of their own.
            by_member[row["run"], row["member"]].append(row)
    made = []
    for cell in manifest.cells:
        first = manifest.programs[cell.members[0].program]
        own = {
            manifest.member(ref).seed: by_member[manifest.programs[ref.program].name, ref.member]
            for ref in cell.members
        }
        made.append(_cell(cell.label, first.config, manifest.member(cell.members[0]), own))
    return made


def attack_text(config: Any, member: Member) -> str:
    """ "clean", "square", "warp (k 8, authors' truncation)": only what differs from the paper."""
    name, default = member.trigger["name"], config_lib.default().trigger
    if name == "none":
        return "clean"
    notes = [
        f"{field} {value:.3g}" if isinstance(value, float) else f"{field} {value}"
        for field, value in member.trigger.items()
        if field in default and field not in ("name", "pattern_path") and value != default[field]
    ]
    if "pattern_path" in member.trigger:
        picture = pathlib.PurePath(member.trigger["pattern_path"]).name
        notes.append(picture or "procedural pattern")
    if member.trigger.get("sampling") == "truncate":
        notes.append("authors' truncation")
    if member.target:
        notes.append(f"target {member.target}")
    if config.poison.source >= 0:
        notes.append(f"source {config.poison.source}")
    if not config.poison.include_target:
        notes.append("target class not poisoned")
    fixed = [stream for stream, seed in member.streams.items() if seed != member.seed]
    if fixed:
        notes.append(f"fixed {', '.join(fixed)}")
    return f"{name} ({', '.join(notes)})" if notes else name


def _cell(
    label: str, config: Any, member: Member, rows_by_seed: Mapping[int, list[Row]]
) -> CellResult:
    last = config.train.epochs
    curves: dict[str, dict[int, dict[float, float]]] = {}
    gone: dict[str, set[int]] = defaultdict(set)
    for seed, rows in rows_by_seed.items():
        for row in sorted(rows, key=lambda row: row["epoch"]):
            curves.setdefault(row["metric"], {}).setdefault(seed, {})[row["epoch"]] = row["value"]
            if row["stage"] == "diverged":
                gone[row["metric"]].add(seed)
    benign = curves.get("ba", {})
    figures = {}
    for metric in METRICS:
        kept = {seed: c for seed, c in curves.get(metric, {}).items() if seed not in gone[metric]}
        points = {seed: curve[last] for seed, curve in kept.items() if last in curve}
        if metric in curves:
            figures[metric] = Figure(points, _summary(points.values()), _last3(kept, points, last))
    return CellResult(
        label=label,
        config=config,
        member=member,
        seeds=tuple(rows_by_seed),
        done=tuple(seed for seed, curve in benign.items() if last in curve),
        diverged=tuple(sorted(gone["ba"])),
        epoch=max((max(curve) for curve in benign.values()), default=0),
        figures=figures,
        curves=curves,
    )


def _summary(values: Iterable[float]) -> metrics.Summary | None:
    values = list(values)
    return metrics.summarize(values) if values else None


def _last3(
    curves: Mapping[int, Mapping[float, float]], points: Mapping[int, float], last: int
) -> metrics.Summary | None:
    wanted = [last - 2, last - 1, last]
    if not all(epoch in curves[seed] for seed in points for epoch in wanted):
        return None
    return _summary(float(np.mean([curves[seed][e] for e in wanted])) for seed in points)
