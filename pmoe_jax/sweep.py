"""Sweeps: trains the programs of a grid one after another, and goes on where it was killed.

A sweep's directory holds

    sweep.json        config, grid and packing (`grid.Manifest`), written first and never changed
    runs/PROGRAM      run directories, each of which resumes by itself
    jobs/             with --launcher: see `pmoe_jax.cluster`
    paired/PROGRAM.jsonl  false trigger rates; there once the program is finished
    rows.jsonl        all rows so far, CAD included; rebuilt whenever a program finishes
    provenance.json   that of every program

`rows.jsonl`, `provenance.json` and `sweep.json` are all that a report needs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from ml_collections import config_flags

from pmoe_jax import cluster, grid, launch, report, results
from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax.data import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.grid import Manifest, Program
from pmoe_jax.rundir import Row, RunDirectory, write_atomically

#: Most members of a program unless asked otherwise. CPUs train unrolled members hardly faster than
#: one after another, and cells then finish sooner one by one.
MEMBERS_ON_CPU, MEMBERS_ELSEWHERE = 4, 32
#: Share of the free memory that automatic packing fills.
MEMORY_SHARE = 0.8


def run(
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    workdir: str | os.PathLike[str],
    *,
    max_members: int = 0,
    progress: bool = True,
    jobs: Callable[[pathlib.Path, Sequence[str]], cluster.Jobs] | None = None,
) -> Manifest:
    """Trains all that is missing of a sweep.

    Args:
      config, cells: see `pmoe_jax.grid`.
      workdir: the sweep's directory; it is created.
      max_members: most members of a program; 0: what memory and device suggest. Only the first
        start packs: later ones keep the packing, so that it never changes figures.
      progress: show a live table on stderr.
      jobs: submits the named programs of the sweep in a folder as jobs of a cluster, which train
        them in place of this process.

    Raises:
      PmoeError: bad input; nothing is written for what can be seen before training.
      run.Interrupted: stopped by a signal, after saving.
    """
    folder, datasets = pathlib.Path(workdir), _Datasets()
    planned = None
    if not (folder / "sweep.json").exists():
        planned = plan(config, cells, max_members, datasets)
        check(planned, datasets)
    with RunDirectory(folder):  # Its lock serves a sweep as well.
        manifest = _begin(folder, planned, config, cells)
        submitted = None
        if jobs is not None:
            missing = [p for p in manifest.programs if not _is_trained(folder, p, datasets)]
            submitted = jobs(folder, [program.name for program in missing])
        with _board(manifest, folder, progress) as board:
            for index, program in enumerate(manifest.programs):
                if _is_finished(folder, program):
                    continue
                board.start(index)
                if submitted is None:
                    run_lib.train(
                        program.config,
                        folder / "runs" / program.name,
                        members=program.members,
                        dataset=datasets(program.config),
                        progress=False,
                        watch=board.watch,
                    )
                else:
                    _wait(submitted, folder, program, datasets)
                _pair(manifest, index, folder, datasets)
                _keep(manifest, folder)
                board.finish()
        _keep(manifest, folder)  # A kill may have come between the last two steps above.
    return manifest


def plan(
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    max_members: int = 0,
    datasets: Callable[[Any], Dataset] | None = None,
) -> Manifest:
    """Packs a grid (see `grid.pack`) with at most `max_members` a program, 0: see `run`."""
    load = datasets or _Datasets()

    def fitting(shared: ml_collections.ConfigDict) -> int:
        """How many members memory allows, judged by the step of a single one."""
        if max_members:
            return max_members
        devices = jax.device_count()
        on_cpu = jax.default_backend() == "cpu"
        most = MEMBERS_ON_CPU if on_cpu else MEMBERS_ELSEWHERE * devices
        member = members_lib.from_config(shared)[:1]
        alone = grid.with_fields(shared, {"train.mesh": "1x1"})
        needed = run_lib.calibrate(alone, member, load(shared), steps=0)
        if needed.bytes is None:
            return most
        room = MEMORY_SHARE * run_lib.device_memory() - needed.fixed_bytes
        a_device = math.floor(room / (needed.bytes - needed.fixed_bytes))
        return max(1, min(most, a_device * devices))

    return grid.pack(config, cells, fitting)


def check(manifest: Manifest, datasets: Callable[[Any], Dataset]) -> None:
    """Finds out what training would refuse, before anything is trained.

    Raises:
      PmoeError: with the program's members that cannot be trained.
    """
    if len({program.config.model.dtype == "float64" for program in manifest.programs}) > 1:
        raise PmoeError(
            "model.dtype=float64 sets all of JAX to it; make a sweep of its own of those cells"
        )
    for program in manifest.programs:
        dataset = datasets(program.config)
        run_lib.check_against_data(program.config, program.members, dataset)
        source = program.config.poison.source
        members_lib.attacks(
            program.members,
            dataset.train_labels,
            dataset.image_shape,
            run_lib.load_patterns(program.members, dataset.image_shape),
            include_target=program.config.poison.include_target,
            source=source if source >= 0 else None,
            carriers=program.config.poison.carriers,
        )


class Estimate(NamedTuple):
    """What a program will need: bytes (None where unknown) and seconds, compiling left out."""

    bytes: int | None
    seconds: float


def estimate(manifest: Manifest, datasets: Callable[[Any], Dataset]) -> list[Estimate]:
    """Estimates every program from a few steps of each distinct kind of program."""
    measured: dict[str, run_lib.Calibration] = {}
    made = []
    for program in manifest.programs:
        dataset = datasets(program.config)
        triggered = any(member.trigger["name"] != "none" for member in program.members)
        shared = grid.canonical(program.config, program.members[0])[0]
        kind = f"{len(program.members)} {triggered} {config_lib.to_json(shared)}"
        if kind not in measured:
            measured[kind] = run_lib.calibrate(program.config, program.members, dataset)
        step, evaluation_ = measured[kind].step_seconds, measured[kind].evaluation_seconds
        steps = run_lib.plan_of(program.config, len(dataset.train_images)).total_steps
        # One evaluation more for the false trigger rates.
        evaluations = len(_evaluated_epochs(program.config)) + triggered
        made.append(Estimate(measured[kind].bytes, steps * step + evaluations * evaluation_))
    return made


def estimate_table(manifest: Manifest, estimates: Sequence[Estimate]) -> str:
    """What `--dry_run` prints: programs with members, memory and time, then the cells."""
    lines = [
        [
            program.name,
            str(len(program.members)),
            "unknown" if needs.bytes is None else f"{needs.bytes / 2**30:.2f} GiB",
            duration(needs.seconds),
        ]
        for program, needs in zip(manifest.programs, estimates, strict=True)
    ]
    lines.append(["all", str(sum(len(p.members) for p in manifest.programs)), "",
                  duration(sum(needs.seconds for needs in estimates))])  # fmt: skip
    cells = [
        [cell.label, str(len(cell.members)), ", ".join(_names(manifest, cell.members)),
         ", ".join(_names(manifest, [ref for ref in cell.baselines if ref])) or "none"]
        for cell in manifest.cells
    ]  # fmt: skip
    return "\n\n".join([
        report.markdown(["program", "members", "memory", "time (estimated)"], lines),
        report.markdown(["cell", "seeds", "trained in", "baselines in"], cells),
        "Times are extrapolated from a few steps and leave compiling out.",
    ])  # fmt: skip


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


# --- command ------------------------------------------------------------------------------------


def add_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of `pmoe sweep`."""

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, None, meaning, flag_values=values)

    text("workdir", "The sweep's directory, to create or go on with.")
    config_flags.DEFINE_config_file(
        "config", None, "Config file with get_config() and get_grid().", flag_values=values
    )
    flags.DEFINE_integer(
        "max_members", 0, "Most members of a program; 0: by memory and device.",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "dry_run", False, "Print programs, memory and estimated time; train nothing.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean("progress", True, "Show a live table.", flag_values=values)
    flags.DEFINE_enum(
        "launcher", None, cluster.LAUNCHERS, "Train each program as a job: of Slurm, of this "
        "machine (local), or of Slurm where there is one (submitit).", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "launcher_options", [], "Parameters of submitit's executor: "
        "timeout_min=600,gpus_per_node=1,slurm_partition=gpu.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "max_jobs", 0, "Most jobs at a time; 0: with --launcher=local one, else all.",
        lower_bound=0, flag_values=values,
    )  # fmt: skip


def run_command(values: flags.FlagValues, words: list[str]) -> int:
    """`pmoe sweep`."""
    if words:
        raise PmoeError(f"unexpected word {words[0]!r}; flags are written --name=value")
    config = values.config
    if config is None:
        raise PmoeError("--config is missing; give a file with get_config() and get_grid()")
    if not isinstance(config, ml_collections.ConfigDict):
        raise PmoeError("--config gives no ConfigDict; begin with pmoe_jax.config.default()")
    path, _, argument = config_flags.get_config_filename(values["config"]).partition(":")
    cells = grid.load(path, argument)
    config_lib.validate(config.to_dict())
    launch.use_compilation_cache()
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if values.dry_run:
        datasets = _Datasets()
        stored = pathlib.Path(values.workdir or "") / "sweep.json"
        if values.workdir and stored.exists():
            manifest = _same(Manifest.read(stored), config, cells, stored)
        else:
            manifest = plan(config, cells, values.max_members, datasets)
            check(manifest, datasets)
        print(estimate_table(manifest, estimate(manifest, datasets)))
        return 0
    if not values.workdir:
        raise PmoeError("--workdir is missing; give the sweep's directory to create")
    options = cluster.parse_options(values.launcher_options)

    def jobs(folder: pathlib.Path, names: Sequence[str]) -> cluster.Jobs:
        most = values.max_jobs or int(values.launcher == "local")
        return cluster.Jobs(folder, values.launcher, options, names, most)

    try:
        manifest = run(
            config, cells, values.workdir,
            max_members=values.max_members, progress=values.progress,
            jobs=jobs if values.launcher else None,
        )  # fmt: skip
    except run_lib.Interrupted as stopped:
        print(f"pmoe: {stopped}", file=sys.stderr)
        return stopped.exit_code
    rows = results.collect(manifest, pathlib.Path(values.workdir))
    print(report.overview(results.cells_of(manifest, rows)))
    return 0


# --- one sweep on disk --------------------------------------------------------------------------


def _begin(
    folder: pathlib.Path,
    planned: Manifest | None,
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
) -> Manifest:
    path = folder / "sweep.json"
    if planned is None or path.exists():
        return _same(Manifest.read(path), config, cells, path)
    for leftover in folder.glob(".*.tmp"):  # of `write_atomically`, if it was killed
        leftover.unlink()
    strange = sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")
    if strange:
        raise PmoeError(
            f"{folder} is not empty and holds no sweep ({strange[0]}); choose a new or empty "
            "workdir"
        )
    write_atomically(path, planned.to_json())
    return planned


def _same(
    manifest: Manifest,
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    path: pathlib.Path,
) -> Manifest:
    """The stored manifest, if it is of this config and grid.

    Raises:
      PmoeError: with the differences.
    """
    changed = config_lib.differences(manifest.config.to_dict(), config.to_dict())
    asked = json.loads(json.dumps([dict(cell) for cell in cells]))
    for number in range(max(len(asked), len(manifest.grid))):
        old, new = (part[number : number + 1] for part in (manifest.grid, asked))
        if old != new:
            shown = [str(part[0]) if part else "absent" for part in (old, new)]
            changed.append(f"cell {number + 1}: {shown[0]} -> {shown[1]}")
    if changed:
        raise PmoeError(
            f"{path.parent} holds another sweep ({'; '.join(changed)}); resume it with its own "
            "config or choose another workdir"
        )
    return manifest


def _is_finished(folder: pathlib.Path, program: Program) -> bool:
    return (folder / "paired" / f"{program.name}.jsonl").exists()


def _is_trained(folder: pathlib.Path, program: Program, datasets: Callable[[Any], Dataset]) -> bool:
    images = datasets(program.config).train_images
    last = run_lib.plan_of(program.config, len(images)).total_steps
    return last in RunDirectory(folder / "runs" / program.name).whole_steps()


def _wait(
    jobs: cluster.Jobs,
    folder: pathlib.Path,
    program: Program,
    datasets: Callable[[Any], Dataset],
) -> None:
    if not _is_trained(folder, program, datasets):
        jobs.wait(program.name)
    if not _is_trained(folder, program, datasets):
        raise PmoeError(
            f"the job of {program.name} ended before its training; see {jobs.logs(program.name)}, "
            "and run the same command again to go on (other jobs go on by themselves)"
        )


def _pair(
    manifest: Manifest, upto: int, folder: pathlib.Path, datasets: Callable[[Any], Dataset]
) -> None:
    """Finishes the programs up to this one whose baselines are trained."""
    for index, program in enumerate(manifest.programs[: upto + 1]):
        needed = [c.program for own, c in manifest.pairs().items() if own.program == index]
        if _is_finished(folder, program) or max(needed, default=0) > upto:
            continue
        rows = false_trigger_rows(manifest, index, folder, datasets(program.config))
        (folder / "paired").mkdir(exist_ok=True)
        write_atomically(
            folder / "paired" / f"{program.name}.jsonl",
            "".join(json.dumps(row) + "\n" for row in rows),
        )


def _keep(manifest: Manifest, folder: pathlib.Path) -> None:
    rows = results.collect(manifest, folder)
    write_atomically(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    known = results.collect_provenance(manifest, folder)
    write_atomically(folder / "provenance.json", json.dumps(known, indent=1) + "\n")


def false_trigger_rows(
    manifest: Manifest, index: int, folder: pathlib.Path, dataset: Dataset
) -> list[Row]:
    """How often each attacked member's trained baseline takes its triggered images for the target.

    Args:
      manifest: the sweep's.
      index: of the attacked members' program.
      folder: the sweep's directory, where this program and its baselines are trained.
      dataset: the program's.
    """
    pairs = {own.member: c for own, c in manifest.pairs().items() if own.program == index}
    if not pairs:
        return []
    states: dict[int, Any] = {}

    def restored(which: int) -> Any:
        program = manifest.programs[which]
        directory = RunDirectory(folder / "runs" / program.name)
        return run_lib.restore(directory, program.config, program.members, dataset)

    program = manifest.programs[index]
    programs, step, states[index], tree = restored(index)
    for clean in pairs.values():
        if clean.program not in states:
            states[clean.program] = restored(clean.program)[2]
    # Members without a baseline stand in for it; their rows are dropped.
    sources = [pairs.get(m, grid.Ref(index, m)) for m in range(len(program.members))]
    paired = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *[jax.tree.map(lambda leaf, m=s.member: leaf[m], states[s.program]) for s in sources],
    )
    rows = run_lib.rows_of(
        program.config, program.members, programs, paired,
        members_lib.attack_from_tree(tree, program.members),
        dataset.test_images, dataset.test_labels,
        run=program.name, dataset=dataset.name, epoch=step // programs.plan.steps_per_epoch,
    )  # fmt: skip
    return [
        {**row, "metric": "false_trigger_rate"}
        for row in rows
        if row["metric"] == "asr" and row["member"] in pairs
    ]


class _Datasets:
    """The configured data set; the last one is kept."""

    def __init__(self) -> None:
        self._last: tuple[Any, Dataset] | None = None

    def __call__(self, config: Any) -> Dataset:
        wanted = config.data.to_dict()
        if self._last is None or self._last[0] != wanted:
            self._last = wanted, run_lib.load_data(config)
        return self._last[1]


def _evaluated_epochs(config: Any) -> list[int]:
    every, last = config.evaluation.every_epochs, config.train.epochs
    return [epoch for epoch in range(1, last + 1) if epoch % every == 0 or epoch > last - 3]


def _names(manifest: Manifest, refs: Sequence[Any]) -> list[str]:
    return sorted({manifest.programs[ref.program].name for ref in refs})


# --- progress -----------------------------------------------------------------------------------


class _Board:
    """The live table: cells with their figures so far, progress of the program, time left.

    Time is judged by what this session measured: seconds per member and epoch, evaluation and
    compiling included, of programs of the same config, or else of all.
    """

    def __init__(self, manifest: Manifest, folder: pathlib.Path, show: Callable[[str], None]):
        self._manifest, self._folder, self._show = manifest, folder, show
        self._index = 0
        self._share = self._first_share = 0.0
        self._begun = self._shown = time.monotonic()
        self._spent: dict[str, list[float]] = {}
        self._table = ""

    def start(self, index: int) -> None:
        """A program begins or goes on."""
        self._index, self._share, self._first_share = index, 0.0, -1.0
        self._begun = time.monotonic()
        self._update(fresh=True)

    def watch(self, step: int, total: int) -> None:
        """A step of the program is done."""
        if self._first_share < 0:
            self._first_share = (step - 1) / total
        self._share = step / total
        epochs = self._manifest.programs[self._index].config.train.epochs
        begins_epoch = (step - 1) % (total // epochs) == 0
        if begins_epoch or time.monotonic() > self._shown + 1:
            self._update(fresh=begins_epoch)

    def finish(self) -> None:
        """The program is done."""
        program = self._manifest.programs[self._index]
        trained = (1 - max(self._first_share, 0)) * self._size(program)
        if self._first_share >= 0:
            known = self._spent.setdefault(_kind(program), [0.0, 0.0])
            known[0] += time.monotonic() - self._begun
            known[1] += trained
        self._share = 1.0
        self._update(fresh=True)

    def _update(self, fresh: bool) -> None:
        if fresh:
            rows = results.collect(self._manifest, self._folder)
            self._table = report.overview(results.cells_of(self._manifest, rows))
        self._shown = time.monotonic()
        programs = self._manifest.programs
        left = self._left()
        eta = "unknown yet" if left is None else f"about {duration(left)}"
        self._show(
            f"program {self._index + 1} of {len(programs)} ({programs[self._index].name}, "
            f"{len(programs[self._index].members)} members): {100 * self._share:.0f} %; "
            f"time left: {eta}\n\n{self._table}"
        )

    def _left(self) -> float | None:
        spent = {kind: list(known) for kind, known in self._spent.items()}
        current = self._manifest.programs[self._index]
        done_here = max(self._share - max(self._first_share, 0), 0) * self._size(current)
        if 0 < self._share < 1 and done_here:
            known = spent.setdefault(_kind(current), [0.0, 0.0])
            known[0] += time.monotonic() - self._begun
            known[1] += done_here
        if not spent:
            return None
        overall = sum(s for s, _ in spent.values()) / sum(w for _, w in spent.values())
        seconds = 0.0
        for index, program in enumerate(self._manifest.programs):
            if _is_finished(self._folder, program):
                continue
            share = self._share if index == self._index else 0.0
            known = spent.get(_kind(program), [overall, 1.0])
            seconds += (1 - share) * self._size(program) * known[0] / known[1]
        return seconds

    @staticmethod
    def _size(program: Program) -> float:
        return len(program.members) * program.config.train.epochs


def _kind(program: Program) -> str:
    return config_lib.to_json(grid.canonical(program.config, program.members[0])[0])


@contextlib.contextmanager
def _board(manifest: Manifest, folder: pathlib.Path, progress: bool) -> Iterator[_Board]:
    """A board that redraws itself on a terminal, and prints each finished program elsewhere."""
    if not progress:
        yield _Board(manifest, folder, lambda text: None)
    elif sys.stderr.isatty():
        from rich import console, live, text

        terminal = console.Console(stderr=True)
        with live.Live(console=terminal, refresh_per_second=2) as shown:
            yield _Board(manifest, folder, lambda drawn: shown.update(text.Text(drawn)))
    else:
        last = [""]

        def show(drawn: str) -> None:
            table = drawn.partition("\n\n")[2]
            if table != last[0]:  # Only when a figure is new: this goes to a log.
                print(drawn, file=sys.stderr, flush=True)
            last[0] = table

        yield _Board(manifest, folder, show)
