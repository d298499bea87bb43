"""From the directories of sweeps and runs to the figures of cells, with their statistics.

A cell is a set of members that differ in their seed only. Everything is in percent. Figures are of
the last epoch of finished members; those of diverged members, and those that are paired with a
diverged baseline, are left out of means and counted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pmoe_jax import config as config_lib
from pmoe_jax import defend_config, evaluation, grid, metrics, paper, provenance
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import check_sum
from pmoe_jax.grid import Manifest, Program
from pmoe_jax.members import Member
from pmoe_jax.rows import Row, checked_row, read_lines
from pmoe_jax.rundir import RunDirectory

#: Metrics of a report, in the order of its tables.
METRICS = tuple(evaluation.TITLES)
#: Fields in which a like-for-like run may differ from the defaults, which are the paper's setting.
#: The authors' Keras code trains on the last partial batch, 80 of 50,000 images.
_NOT_THE_PAPERS = ("data.name", "data.heldout_seed", "train.keep_last_batch")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One metric of a cell.

    Attributes:
      points: seed -> value at the last epoch, diverged members left out.
      last3_points: seed -> mean over the last three epochs; empty if not all are known.
      lost: how many seeds were left out.
    """

    points: Mapping[int, float]
    last3_points: Mapping[int, float] = dataclasses.field(default_factory=dict)
    lost: int = 0

    @functools.cached_property
    def summary(self) -> metrics.Summary | None:
        """Of the points; None if there are none."""
        return _summary(self.points.values())

    @functools.cached_property
    def last3(self) -> metrics.Summary | None:
        """Of the means over the last three epochs; None if there are none."""
        return _summary(self.last3_points.values())

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
      label: the cell's name in its sweep, or what it changes there; of a run, its directory's name.
      name: the name that it was given; empty if it was given none.
      config: config of its program; its attack and seeds may be another cell's.
      data: fingerprint of its data set; the source, if it is not known.
      members: they differ in their seed and streams only.
      baselines: how many of them have a clean counterpart.
      done: seeds that are trained to the end.
      diverged: seeds that are left out, trained to the end or not.
      epoch: the newest epoch of which there are figures; 0 if there are none.
      figures: metric -> figure.
      curves: metric -> seed -> epoch -> value.
    """

    label: str
    name: str
    config: Any
    data: str
    members: tuple[Member, ...]
    baselines: int
    done: tuple[int, ...]
    diverged: tuple[int, ...]
    epoch: float
    figures: Mapping[str, Figure]
    curves: Mapping[str, Mapping[int, Mapping[float, float]]]

    @property
    def member(self) -> Member:
        """The first member."""
        return self.members[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """All that belong to the cell."""
        return tuple(member.seed for member in self.members)

    @property
    def attacked(self) -> bool:
        """Whether there is a trigger."""
        return self.member.trigger["name"] != "none"

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
        return attack_text(self.config, self.members)

    def paper(self, metric: str) -> float | None:
        """The paper's value of the same data set and attack; None if it has none."""
        if not _paper_attack(self.config, self.member):
            return None
        name, rate = self.member.trigger["name"], self.member.rate
        return paper.attack(self.config.data.name, name, rate, metric)

    @functools.cached_property
    def like_for_like(self) -> bool:
        """Whether model, training and random streams are the paper's, too.

        Never of a procedural blend: the authors blend a picture in.
        """
        setting = config_lib.flatten(grid.setting(self.config, self.member).to_dict())
        same = all(
            value == config_lib.FIELDS[name].default
            for name, value in setting.items()
            if name not in _NOT_THE_PAPERS
        )
        procedural = self.member.trigger.get("pattern_path") == ""
        return same and not procedural and not _held_streams(self.members)


@dataclasses.dataclass(frozen=True)
class Defended:
    """Members of a run directory that Fine-Pruning left: figures before, pruned, and fine-tuned.

    Attributes:
      label: the directory's name.
      of: the run that was defended.
      config: the directory's; its training is the fine-tuning.
      members: they differ in their seed only.
      pruned: the pruning rate, 0 to 1; None if members were pruned at different ones.
      epochs: epochs of fine-tuning done, and asked for.
      stages: "before", "pruned", "fine_tuned" -> metric -> figure, as far as they are known.
      papers: of those, the ones that were reached as in the paper.
    """

    label: str
    of: str
    config: Any
    members: tuple[Member, ...]
    pruned: float | None
    epochs: tuple[int, int]
    stages: Mapping[str, Mapping[str, Figure]]
    papers: frozenset[str] = frozenset(("before", "pruned", "fine_tuned"))

    @property
    def attack(self) -> str:
        """The trigger, and what of the attack differs from the paper's."""
        return attack_text(self.config, self.members)

    @property
    def state(self) -> str:
        """ "done", or how far it is."""
        done, asked = self.epochs
        if not self.stages.get("pruned"):
            return "not started"
        if done != asked:
            return f"unfinished: epoch {done} of {asked}"
        lost = max(f.lost for figures in self.stages.values() for f in figures.values())
        return "done" + (f", {lost} diverged" if lost else "")

    def paper(self, stage: str, metric: str) -> float | None:
        """The paper's value (Table 3); None if it has none. Metrics: "ba", "asr"."""
        if self.pruned is None or stage not in self.papers:
            return None
        if not _paper_attack(self.config, self.members[0]):
            return None
        trigger = self.members[0].trigger["name"]
        of = self.config.data.name, trigger, self.members[0].rate
        return paper.fine_pruning(*of, self.pruned, stage, metric)


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a report shows.

    Attributes:
      cells: in the order of the directories and of their grids.
      defended: of the directories that a defence left.
      rows: rows of the common schema.
      setups: directory -> config; of a sweep also grid and packing.
      provenance: run -> what its `provenance.json` holds.
      pictures: PNG files of the directories' `figures` folders.
      told: defence without models (detectors leave none) -> its `table.md`.
    """

    cells: list[CellResult]
    defended: list[Defended]
    rows: list[Row]
    setups: dict[str, Any]
    provenance: dict[str, Any]
    pictures: list[pathlib.Path]
    told: dict[str, str] = dataclasses.field(default_factory=dict)


def gather(folders: Sequence[str | os.PathLike[str]]) -> Results:
    """Reads directories of sweeps, of runs and of defences.

    Runs are paired with baselines among them. Of several directories, names of a sweep's cells and
    programs begin with the sweep's name.

    Raises:
      PmoeError: a directory is none of these, damaged, or given twice.
    """
    named = _named(folders)
    found = Results([], [], [], {}, {}, [])
    runs, run_rows = [], []
    for name, folder in named.items():
        found.pictures.extend(sorted((folder / "figures").rglob("*.png")))
        if (folder / "sweep.json").exists():
            _add_sweep(found, folder, name, f"{name}/" if len(named) > 1 else "")
        elif (folder / "config.json").exists():
            run = RunDirectory(folder)
            program = Program(name, run.config(), tuple(run.members()))
            # A directory may have been moved since its rows were written.
            rows = [{**checked_row(row), "run": name} for row in run.rows()]
            found.setups[name] = {"config": program.config.to_dict()}
            found.provenance[name] = facts = provenance.read(folder / "provenance.json")
            if any(row["stage"] in ("pruned", "fine_tuned") for row in rows) or "defence" in facts:
                before = _read_json(folder.parent / "before.json", list)
                found.defended.extend(_defended(program, rows, before, facts.get("defence")))
                found.rows.extend(rows)
            else:
                runs.append(program)
                run_rows += rows
        elif (folder / "defence.json").exists():
            check_sum(folder / "table.md")
            found.told[name] = config_lib.read_text(folder / "table.md")
            found.provenance[name] = provenance.read(folder / "provenance.json")
        else:
            raise PmoeError(
                f"{folder} holds neither a sweep nor a run (no sweep.json, no config.json); give "
                "such a directory"
            )
    if runs:
        data = _fingerprints(runs, found.provenance)
        manifest = grid.of_runs(runs, data)
        run_rows = with_cad(manifest, run_rows)
        found.cells.extend(cells_of(manifest, run_rows, data))
        found.rows.extend(run_rows)
    return found


def collect(manifest: Manifest, folder: pathlib.Path) -> list[Row]:
    """All rows of a sweep so far, with CAD.

    Rows come from the programs' run directories; where those were not kept, from `rows.jsonl`.
    """
    stored = _summed_lines(folder / "rows.jsonl")
    if not (folder / "runs").is_dir():
        return with_cad(manifest, stored)
    rows = []
    for program in manifest.programs:
        run = RunDirectory(folder / "runs" / program.name)
        if not (run.path / "metrics.jsonl").exists():
            rows += [row for row in stored if row.get("run") == program.name]
            continue
        # A directory may have been moved here since its rows were written.
        rows += [{**row, "run": program.name} for row in run.rows()]
        rows += _summed_lines(folder / "paired" / f"{program.name}.jsonl")
    return with_cad(manifest, rows)


def _summed_lines(path: pathlib.Path) -> list[Row]:
    check_sum(path)
    return read_lines(path)


def collect_provenance(manifest: Manifest, folder: pathlib.Path) -> dict[str, Any]:
    """Program -> its provenance, as far as it was begun."""
    check_sum(folder / "provenance.json")
    stored = provenance.read(folder / "provenance.json")
    if not (folder / "runs").is_dir():
        return stored
    return stored | {
        program.name: provenance.read(path)
        for program in manifest.programs
        if (path := folder / "runs" / program.name / "provenance.json").exists()
    }


def with_cad(manifest: Manifest, rows: Iterable[Row]) -> list[Row]:
    """Adds a CAD row for every BA of an attacked member whose baseline has one of that epoch.

    CAD and false trigger rate pair a member with its baseline: where either diverged they have no
    meaning, and their rows are marked as diverged.

    Raises:
      PmoeError: a row that is not of the common schema.
    """
    rows = [checked_row(row) for row in rows]
    rows = [row for row in rows if row["metric"] != "cad"]
    names = [program.name for program in manifest.programs]
    benign = {
        (row["run"], row["member"], row["epoch"]): row for row in rows if row["metric"] == "ba"
    }
    of = {
        (names[own.program], own.member): (names[clean.program], clean.member)
        for own, clean in manifest.pairs().items()
    }
    gone = {place[:2] for place, row in benign.items() if row["stage"] == "diverged"}
    made = []
    for row in rows:
        own = row["run"], row["member"]
        if row["metric"] == "false_trigger_rate" and gone & {own, of.get(own, own)}:
            row = {**row, "stage": "diverged"}
        made.append(row)
    for (run, member, epoch), row in benign.items():
        clean = benign.get((*of[run, member], epoch)) if (run, member) in of else None
        if clean is not None:
            lost = "diverged" in (row["stage"], clean["stage"])
            cad = clean["value"] - row["value"]
            stage = "diverged" if lost else row["stage"]
            made.append({**row, "metric": "cad", "value": cad, "stage": stage})
    return made


def cells_of(
    manifest: Manifest, rows: Iterable[Row], data: Mapping[str, str] | None = None
) -> list[CellResult]:
    """The cells of a manifest with their figures.

    Args:
      manifest: what belongs together.
      rows: see `with_cad`.
      data: program -> fingerprint of its data set, where it is known.
    """
    by_member: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["stage"] in ("trained", "diverged"):
            by_member[row["run"], row["member"]].append(row)
    if len(manifest.grid) != len(manifest.cells):
        raise PmoeError("the sweep's grid and its cells differ in number; restore its sweep.json")
    made = []
    for fields, cell in zip(manifest.grid, manifest.cells, strict=True):
        first = manifest.programs[cell.members[0].program]
        own = {
            manifest.member(ref).seed: by_member[manifest.programs[ref.program].name, ref.member]
            for ref in cell.members
        }
        curves, gone = _curves(own)
        benign, last = curves.get("ba", {}), first.config.train.epochs
        made.append(
            CellResult(
                label=cell.label,
                name=str(fields.get("name") or ""),
                config=first.config,
                data=(data or {}).get(first.name) or first.config.data.source,
                members=tuple(manifest.member(ref) for ref in cell.members),
                baselines=sum(ref is not None for ref in cell.baselines),
                done=tuple(seed for seed, curve in benign.items() if last in curve),
                diverged=tuple(sorted(gone["ba"])),
                epoch=max((max(curve) for curve in benign.values()), default=0),
                figures=_figures(curves, gone, last),
                curves=curves,
            )
        )
    return made


def attack_text(config: Any, members: Sequence[Member], picture: bool = True) -> str:
    """ "clean", "square", "warp (k 8, authors' truncation)": only what differs from the paper.

    A blend's picture is named, unless `picture` is false.
    """
    member, notes = members[0], []
    name, default = member.trigger["name"], config_lib.default().trigger
    if name != "none":
        notes = [
            f"{field} {value:.3g}" if isinstance(value, float) else f"{field} {value}"
            for field, value in member.trigger.items()
            if field in default
            and field not in ("name", "pattern_path")
            and value != default[field]
        ]
        if picture and "pattern_path" in member.trigger:
            file = pathlib.PurePath(member.trigger["pattern_path"]).name
            notes.append(file or "procedural pattern")
        if member.trigger.get("sampling") == "truncate":
            notes.append("authors' truncation")
        if member.target:
            notes.append(f"target {member.target}")
        if config.poison.source >= 0:
            carriers = 100 * config.poison.carriers
            notes.append(f"source {config.poison.source}, carriers {carriers:g} %")
        if not config.poison.include_target:
            notes.append("target class not poisoned")
    for seed, streams in _held_streams(members).items():
        notes.append(f"{', '.join(streams)} held at {seed}")
    shown = "clean" if name == "none" else name
    return f"{shown} ({', '.join(notes)})" if notes else shown


def _held_streams(members: Sequence[Member]) -> dict[int, list[str]]:
    """Seed -> streams that are held at it, whatever the member's own seed is."""
    held: dict[int, list[str]] = {}
    for stream, seed in members[0].streams.items():
        if any(member.streams[stream] != member.seed for member in members):
            held.setdefault(seed, []).append(stream)
    return held


def _paper_attack(config: Any, member: Member) -> bool:
    default, given = config_lib.default(), member.trigger
    same = config.model.name == "pmoe" and config.poison.source < 0
    same &= config.poison.include_target and member.target == 0
    for name in ("size", "corner", "alpha", "k", "strength"):
        same &= given.get(name, default.trigger[name]) == default.trigger[name]
    return same and given.get("value", 0) <= 1 / 255  # Quirk A1's 1/255 is the authors' black.


# --- directories --------------------------------------------------------------------------------


def _named(folders: Sequence[str | os.PathLike[str]]) -> dict[str, pathlib.Path]:
    """Name -> directory; a defence's stands for the run directories in it."""
    named: dict[str, pathlib.Path] = {}
    for given in map(pathlib.Path, folders):
        folder = given.resolve()
        parts = {folder.name: given}
        if (folder / "defence.json").exists():
            runs = sorted(path.parent for path in given.glob("*/config.json"))
            if runs:
                parts = {f"{folder.name}/{run.name}": run for run in runs}
            elif not (given / "table.md").exists():
                raise PmoeError(
                    f"{given} holds a defence that is not finished; go on with it, or leave it out"
                )
        for name, part in parts.items():
            if part.resolve() in [known.resolve() for known in named.values()]:
                raise PmoeError(f"{part} is given twice; leave one out")
            if name in named:
                raise PmoeError(
                    f"two directories are called {name} ({named[name]}, {part}); rename one"
                )
            named[name] = part
    return named


def _add_sweep(found: Results, folder: pathlib.Path, name: str, prefix: str) -> None:
    manifest = Manifest.read(folder / "sweep.json")
    rows, facts = collect(manifest, folder), collect_provenance(manifest, folder)
    for result in cells_of(manifest, rows, _fingerprints(manifest.programs, facts)):
        label, given = prefix + result.label, result.name and prefix + result.name
        found.cells.append(dataclasses.replace(result, label=label, name=given))
    found.rows.extend({**row, "run": prefix + row["run"]} for row in rows)
    found.provenance.update({prefix + run: known for run, known in facts.items()})
    packing: dict[str, list[str]] = {program.name: [] for program in manifest.programs}
    for cell in manifest.cells:
        for ref in cell.members:
            trained = f"{cell.label}: seed {manifest.member(ref).seed}"
            packing[manifest.programs[ref.program].name].append(trained)
    config = manifest.config.to_dict()
    found.setups[name] = {"config": config, "grid": manifest.grid, "programs": packing}


def _fingerprints(programs: Sequence[Program], provenance: Mapping[str, Any]) -> dict[str, str]:
    """Program -> fingerprint of its data set; "" if neither it nor one of equal data was begun."""
    known: dict[str, str] = {}
    alike: dict[str, str] = {}
    for program in programs:
        facts = provenance.get(program.name)
        noted = facts.get("dataset") if isinstance(facts, dict) else None
        sha256 = noted.get("sha256") if isinstance(noted, dict) else None
        known[program.name] = sha256 if isinstance(sha256, str) else ""
        alike[str(program.config.data)] = alike.get(str(program.config.data)) or known[program.name]
    return {
        program.name: known[program.name] or alike[str(program.config.data)] for program in programs
    }


def _defended(
    program: Program, rows: Sequence[Row], before: Sequence[Row], noted: Any
) -> list[Defended]:
    """One entry for each attack among the members."""
    made = []
    defence = noted if isinstance(noted, dict) else {}
    tuned = defence.get("tuning") or any(row["stage"] == "fine_tuned" for row in rows)
    asked = program.config.train.epochs if tuned else 0
    done = int(max((row["epoch"] for row in rows), default=0))
    cuts = defence.get("pruned")
    for cell in grid.of_runs([program], {}).cells:
        indices = [ref.member for ref in cell.members]
        stages = {
            "before": _of_members(map(checked_row, before), indices),
            "pruned": _of_members((row for row in rows if row["epoch"] == 0), indices),
            "fine_tuned": _of_members((r for r in rows if 0 < r["epoch"] == asked), indices),
        }
        rates = {cuts[i] for i in indices} if isinstance(cuts, list) and len(cuts) == len(
            program.members) else set()  # fmt: skip
        rate = rates.pop() if len(rates) == 1 else None
        made.append(
            Defended(
                label=program.name,
                of=str(defence.get("of")),
                config=program.config,
                members=tuple(program.members[index] for index in indices),
                pruned=rate if isinstance(rate, int | float) else None,
                epochs=(done, asked),
                stages=stages,
                papers=_as_in_the_paper(defence, program.config),
            )
        )
    return made


def _as_in_the_paper(defence: Mapping[str, Any], config: Any) -> frozenset[str]:
    """The stages that a defence reaches as the paper does: it prunes the experts' last convolution
    by the activations of selected patches, and then tunes everything on all training images. What
    is not noted is taken to be the paper's."""

    def noted(part: str) -> Mapping[str, Any]:
        config = defence.get("config")
        found = config.get(part) if isinstance(config, dict) else None
        return found if isinstance(found, dict) else {}

    def by_default(part: str, *names: str) -> bool:
        given = noted(part)
        defaults = {name: defend_config.FIELDS[f"{part}.{name}"].default for name in names}
        return all(given.get(name, value) == value for name, value in defaults.items())

    layers = defence.get("layers")
    last = "experts/conv2" if config.quirks.a6_two_layer_experts else "experts/conv"
    own_layer = not isinstance(layers, list) or layers == [last]
    pruned = own_layer and by_default("prune", *defend_config.AUTHORS_PRUNING)
    anew, authors = noted("tune").get("reinitialise"), noted("quirks").get("a5_authors_pruning")
    if not pruned or anew or authors or noted("prune").get("data") == "heldout":
        return frozenset(("before",))
    tuning = defence.get("tuning")
    tuning = tuning if isinstance(tuning, dict) else {}
    tuned = (
        by_default("tune", "parameters", "epochs", "momentum", "weight_decay", "batch_size",
                   "hold_mask")
        and (tuning.get("fraction", 1.0), tuning.get("learning_rate", 0.1)) == (1.0, 0.1)
        and tuning.get("data") != "heldout"
    )  # fmt: skip
    return frozenset(("before", "pruned", *["fine_tuned"] * tuned))


def _of_members(rows: Iterable[Row], indices: Sequence[int]) -> dict[str, Figure]:
    """Metric -> figure from rows of a single epoch."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    lost: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["member"] in indices:
            own = points[row["metric"]]
            if row["stage"] == "diverged":
                lost[row["metric"]] += 1
            else:
                own[row["seed"]] = row["value"]
    return {metric: Figure(values, lost=lost[metric]) for metric, values in points.items()}


# --- figures ------------------------------------------------------------------------------------


def _curves(
    rows_by_seed: Mapping[int, Iterable[Row]],
) -> tuple[dict[str, dict[int, dict[float, float]]], dict[str, set[int]]]:
    """Metric -> seed -> epoch -> value, and metric -> diverged seeds."""
    curves: dict[str, dict[int, dict[float, float]]] = {}
    gone: dict[str, set[int]] = defaultdict(set)
    for seed, rows in rows_by_seed.items():
        for row in sorted(rows, key=lambda row: row["epoch"]):
            curves.setdefault(row["metric"], {}).setdefault(seed, {})[row["epoch"]] = row["value"]
            if row["stage"] == "diverged":
                gone[row["metric"]].add(seed)
    return curves, gone


def _figures(
    curves: Mapping[str, Mapping[int, Mapping[float, float]]],
    gone: Mapping[str, set[int]],
    last: int,
) -> dict[str, Figure]:
    wanted = (last - 2, last - 1, last)
    figures = {}
    for metric in METRICS:
        if metric not in curves:
            continue
        kept = {s: c for s, c in curves[metric].items() if s not in gone[metric] and last in c}
        last3 = {
            seed: float(np.mean([curve[epoch] for epoch in wanted]))
            for seed, curve in kept.items()
            if all(epoch in curve for epoch in wanted)
        }
        points = {seed: curve[last] for seed, curve in kept.items()}
        known = last3 if len(last3) == len(points) else {}
        figures[metric] = Figure(points, known, len(gone[metric]))
    return figures


def _summary(values: Iterable[float]) -> metrics.Summary | None:
    values = list(values)
    return metrics.summarize(values) if values else None


# --- reading ------------------------------------------------------------------------------------


def _read_json(path: pathlib.Path, kind: type = dict) -> Any:
    """What a JSON file holds; an empty `kind` if there is none."""
    check_sum(path)
    try:
        stored = json.loads(config_lib.read_text(path))
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError, RecursionError) as error:
        raise PmoeError(f"{path} cannot be read as JSON ({error}); restore the file") from None
    if not isinstance(stored, kind):
        raise PmoeError(f"{path} is damaged; restore the file")
    return stored
