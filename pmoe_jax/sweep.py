"""Sweeps: trains the programs of a grid one after another, and goes on where it was killed.

A sweep's directory holds

    sweep.json        config, grid and packing (`grid.Manifest`), written first; cells may be added
    runs/PROGRAM      run directories, each of which resumes by itself
    jobs/             with --launcher: see `pmoe_jax.cluster`
    paired/PROGRAM.jsonl  false trigger rates; there once the program is finished; by its job,
                      or by the command that waits for the jobs
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
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags
from ml_collections import config_flags
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pmoe_jax import cluster, grid, inputs, launch, memory, mesh, report, results, training
from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import LockedFolder, check_still_there, remove_leftovers, write_with_sum
from pmoe_jax.grid import Manifest, Program
from pmoe_jax.rows import Row
from pmoe_jax.rundir import RunDirectory

#: Most members of a program unless asked otherwise. On two cores, 1, 2, 4 members of width 2 ran at
#: 279, 321 to 370, 382 images/s (docs/performance.md); more were not measured, and cells finish
#: sooner in small programs. On accelerators nobody measured: memory decides, and the bound keeps
#: programs from growing beyond what is worth losing time over.
MEMBERS_ON_CPU, MEMBERS_ELSEWHERE = 4, 32
#: Share of the free memory that automatic packing fills.
MEMORY_SHARE = 0.8


def run(
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    workdir: str | os.PathLike[str],
    *,
    max_members: int = 0,
    append: bool = False,
    progress: bool = True,
    jobs: Callable[[pathlib.Path, Sequence[str]], cluster.Jobs] | None = None,
) -> Manifest:
    """Trains all that is missing of a sweep.

    Args:
      config, cells: see `pmoe_jax.grid`.
      workdir: the sweep's directory; it is created.
      max_members: most members of a program; 0: what memory and device suggest. Only the first
        start packs: later ones keep the packing, so that it never changes figures, and say so.
      append: cells that the sweep in `workdir` does not have yet are added to it, after its own;
        those that it has are kept, and what they trained serves the new ones as baselines.
      progress: show a live table on stderr.
      jobs: submits the named programs of the sweep in a folder as jobs of a cluster, which train
        them in place of this process.

    Raises:
      PmoeError: bad input; nothing is written for what can be seen before training. Or `workdir`
        was removed or replaced meanwhile; nothing more is written there then.
      run.Interrupted: stopped by a signal, after saving.
    """
    folder, datasets = pathlib.Path(workdir), _Datasets()
    planned = None
    if not (folder / "sweep.json").exists():
        _check_free(folder)
        planned = plan(config, cells, max_members, datasets)
        check(planned, datasets, elsewhere=jobs is not None)
    # Signals count between programs, too.
    with LockedFolder(folder) as directory, run_lib.stop_signal() as stop:

        def check_going_on() -> None:
            """Raises if the sweep's directory is gone, or a signal asked to stop."""
            directory.check_still_there()
            if stop.asked:
                jobs_go_on = "" if jobs is None else "; its submitted jobs go on by themselves"
                raise run_lib.Interrupted(
                    f"stopped by {stop.asked}; what is trained is saved in {folder}; run the same "
                    f"command again to go on{jobs_go_on}"
                )

        if append and (folder / "sweep.json").exists():
            begun = Manifest.read(folder / "sweep.json")
            manifest = appended(
                folder, config, cells, max_members, datasets, elsewhere=jobs is not None
            )
            # A finished program is paired again if it has members that had no baseline before.
            gained = manifest.pairs().keys() - begun.pairs().keys()
            anew = {own.program for own in gained if own.program < len(begun.programs)}
            anew = {p for p in anew if _is_finished(folder, begun.programs[p])}
            needed = {c.program for own, c in manifest.pairs().items() if own.program in anew}
            for index in sorted(anew | {p for p in needed if p < len(begun.programs)}):
                program = begun.programs[index]
                if _is_finished(folder, program) and not _is_trained(folder, program, datasets):
                    raise PmoeError(
                        f"{folder / 'runs' / program.name} does not hold its last step any more, "
                        "and pairing it with the new baselines needs it; restore it, or append the "
                        "cell with baseline False"
                    )
            for index in anew:
                _unpair(folder, begun.programs[index])
            write_with_sum(folder / "sweep.json", manifest.to_json())
        else:
            manifest = _begin(folder, planned, config, cells, max_members)
        remove_leftovers(folder)
        if jobs is None:  # Jobs that run now write there.
            remove_leftovers(folder / "paired")
        _check_baselines(manifest, folder)
        submitted = None
        if jobs is not None:
            missing = [p for p in manifest.programs if not _is_trained(folder, p, datasets)]
            submitted = jobs(folder, [program.name for program in missing])
        with _board(manifest, folder, progress) as board:
            for index, program in enumerate(manifest.programs):
                if _is_finished(folder, program):
                    continue
                check_going_on()
                board.start(index)
                if submitted is None:
                    run_lib.train(
                        program.config,
                        folder / "runs" / program.name,
                        members=program.members,
                        dataset=datasets(program.config),
                        progress=False,
                        watch=board.watch,
                        stop=stop,
                    )
                else:  # A job may still pair what it has trained.
                    submitted.wait(program.name, check_going_on)
                    _check_trained(submitted, folder, program, datasets)
                check_going_on()  # In its last step, training itself just finishes.
                _pair(manifest, index, folder, datasets)
                directory.check_still_there()  # Before rows are collected of what is left.
                _keep(manifest, folder)
                board.finish()
        directory.check_still_there()
        # Jobs end in any order, and pair only what was trained by then.
        _pair(manifest, len(manifest.programs) - 1, folder, datasets)
        _keep(manifest, folder)  # A kill may have come between the last two steps above.
    return manifest


def plan(
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    max_members: int = 0,
    datasets: Callable[[Any], Dataset] | None = None,
    onto: Manifest | None = None,
) -> Manifest:
    """Packs a grid (see `grid.pack`) with at most `max_members` a program, 0: see `run`."""
    load = datasets or _Datasets()
    in_float64(config, cells)

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
            return 1  # What it takes is unknown.
        room = MEMORY_SHARE * memory.device_memory() - needed.fixed_bytes
        a_device = math.floor(room / (needed.bytes - needed.fixed_bytes))
        return max(1, min(most, a_device * devices))

    manifest = grid.pack(config, cells, fitting, onto)
    for number, cell in enumerate(cells, 1):
        for line in config_lib.notes(grid.cell_config(config, cell).to_dict(), cell):
            print(
                f"note: cell {number} ({cell.get('name') or dict(cell)}): {line}", file=sys.stderr
            )
    return manifest


def appended(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    max_members: int,
    datasets: Callable[[Any], Dataset],
    elsewhere: bool = False,
) -> Manifest:
    """The sweep in a folder with the cells that it does not have yet.

    Raises:
      PmoeError: cells that it has otherwise, or that cannot be trained.
    """
    begun = Manifest.read(folder / "sweep.json")
    in_float64(begun.config, [*begun.grid, {"model.dtype": config.model.dtype}, *cells])
    manifest = plan(config, cells, max_members, datasets, begun)
    if len(manifest.cells) > len(begun.cells):
        check(manifest, datasets, elsewhere)
    return manifest


def check(manifest: Manifest, datasets: Callable[[Any], Dataset], elsewhere: bool = False) -> None:
    """Finds out what training would refuse, before anything is trained.

    With `elsewhere` programs train on machines whose devices are not known here.

    Raises:
      PmoeError: with the cells that cannot be trained.
    """
    for index, program in enumerate(manifest.programs):
        dataset = datasets(program.config)
        config, train = program.config, program.config.train
        try:
            if elsewhere:
                mesh.check(train.mesh, len(program.members), train.batch_size)
                config = grid.with_fields(config, {"train.mesh": "1x1"})
            run_lib.check(config, program.members, dataset)
        except PmoeError as error:
            asking = [
                f"{number} ({cell.label})"
                for number, cell in enumerate(manifest.cells, 1)
                if index in cell.programs
            ]
            raise PmoeError(f"cell {', '.join(asking)}: {error}") from None


def in_float64(config: ml_collections.ConfigDict, cells: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the cells ask for float64, which is a setting of all of JAX.

    Raises:
      PmoeError: some do, some do not.
    """
    asked = {cell.get("model.dtype", config.model.dtype) == "float64" for cell in cells}
    if len(asked) > 1:
        raise PmoeError(
            "model.dtype=float64 sets all of JAX to it; make a sweep of its own of those cells"
        )
    return True in asked


class Estimate(NamedTuple):
    """What a program will need: bytes (None where unknown) and seconds, compiling left out."""

    bytes: int | None
    seconds: float


def estimate(
    manifest: Manifest,
    datasets: Callable[[Any], Dataset],
    folder: pathlib.Path | None = None,
    elsewhere: bool = False,
) -> list[Estimate | None]:
    """Estimates every program from a few steps of each distinct kind of program.

    None stands for those that the sweep in `folder` has finished. With `elsewhere` (see `check`)
    the steps are those of one device of this machine.
    """
    measured: dict[str, run_lib.Calibration] = {}
    made: list[Estimate | None] = []
    for program in manifest.programs:
        if folder and _is_finished(folder, program):
            made.append(None)
            continue
        dataset = datasets(program.config)
        triggered = any(member.trigger["name"] != "none" for member in program.members)
        shared = grid.canonical(program.config, program.members[0])[0]
        kind = f"{len(program.members)} {triggered} {config_lib.to_json(shared)}"
        if kind not in measured:
            config = grid.with_fields(program.config, {"train.mesh": "1x1"} if elsewhere else {})
            measured[kind] = run_lib.calibrate(config, program.members, dataset)
        step, evaluation_ = measured[kind].step_seconds, measured[kind].evaluation_seconds
        steps = training.plan_of(program.config, len(dataset.train_images)).total_steps
        # One evaluation more for the false trigger rates.
        evaluations = len(_evaluated_epochs(program.config)) + triggered
        made.append(Estimate(measured[kind].bytes, steps * step + evaluations * evaluation_))
    return made


def estimate_table(manifest: Manifest, estimates: Sequence[Estimate | None]) -> str:
    """What `--dry_run` prints: programs with members, memory and time, then the cells."""
    lines, seconds = [], 0.0
    for program, needs in zip(manifest.programs, estimates, strict=True):
        room, span = "", "finished"
        if needs is not None:
            seconds += needs.seconds
            span = duration(needs.seconds)
            room = "unknown" if needs.bytes is None else f"{needs.bytes / 2**30:.2f} GiB"
        lines.append([program.name, str(len(program.members)), room, span])
    members = sum(len(program.members) for program in manifest.programs)
    lines.append(["all", str(members), "", duration(seconds)])
    cells = [
        [cell.label, str(len(cell.members)), ", ".join(_names(manifest, cell.members)),
         ", ".join(_names(manifest, [ref for ref in cell.baselines if ref])) or "none"]
        for cell in manifest.cells
    ]  # fmt: skip
    return "\n\n".join([
        report.markdown(["program", "members", "memory", "time (estimated)"], lines),
        report.markdown(["cell", "seeds", "trained in", "baselines in"], cells),
        "Times are extrapolated from a few steps and leave compiling out; of a program that is "
        "begun they are those of the whole.",
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
    from pmoe_jax import cli

    path = (cli.peek(argv, "config") or "").partition(":")[0]
    if path and not os.path.isfile(path):
        raise PmoeError(f"--config={path} is no file; give one with get_config() and get_grid()")

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
    flags.DEFINE_boolean(
        "append", False, "Add the cells that the sweep in --workdir does not have yet.",
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
        "max_jobs", 0, "Most jobs at a time; 0: all on a cluster, one on this machine.",
        lower_bound=0, flag_values=values,
    )  # fmt: skip


def run_command(values: flags.FlagValues, words: list[str]) -> int:
    """`pmoe sweep`."""
    config = values.config
    if config is None:
        raise PmoeError("--config is missing; give a file with get_config() and get_grid()")
    if not isinstance(config, ml_collections.ConfigDict):
        raise PmoeError("--config gives no ConfigDict; begin with pmoe_jax.config.default()")
    path, _, argument = config_flags.get_config_filename(values["config"]).partition(":")
    cells = grid.load(path, argument)
    config_lib.validate(config.to_dict())
    launch.prepare("float64" if in_float64(config, cells) else "float32")
    if values.dry_run:
        datasets = _Datasets()
        begun = pathlib.Path(values.workdir) if values.workdir else None
        if begun and values.append and (begun / "sweep.json").exists():
            manifest = appended(
                begun, config, cells, values.max_members, datasets, elsewhere=bool(values.launcher)
            )
        elif begun and (begun / "sweep.json").exists():
            manifest = _stored(begun, config, cells, values.max_members)
        else:
            manifest = plan(config, cells, values.max_members, datasets)
            check(manifest, datasets, elsewhere=bool(values.launcher))
        needs = estimate(manifest, datasets, begun, elsewhere=bool(values.launcher))
        print(estimate_table(manifest, needs))
        return 0
    if not values.workdir:
        raise PmoeError("--workdir is missing; give the sweep's directory to create")
    options = cluster.parse_options(values.launcher_options)
    if not values.launcher and (options or values.max_jobs):
        raise PmoeError(
            "--launcher_options and --max_jobs are of jobs; give --launcher=slurm or "
            "--launcher=local as well"
        )

    def jobs(folder: pathlib.Path, names: Sequence[str]) -> cluster.Jobs:
        most = values.max_jobs or int(values.launcher == "local")
        return cluster.Jobs(folder, values.launcher, options, names, most)

    try:
        manifest = run(
            config, cells, values.workdir,
            max_members=values.max_members, append=values.append, progress=values.progress,
            jobs=jobs if values.launcher else None,
        )  # fmt: skip
    except run_lib.Interrupted as stopped:
        print(f"pmoe: {stopped}", file=sys.stderr)
        return stopped.exit_code
    rows = results.collect(manifest, pathlib.Path(values.workdir))
    print(_text(report.overview(results.cells_of(manifest, rows))))
    return 0


# --- one sweep on disk --------------------------------------------------------------------------


def _check_free(folder: pathlib.Path) -> None:
    """Refuses a folder that holds anything else, before it is touched."""
    try:
        found = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise PmoeError(
            f"{folder} cannot be read ({error.strerror}); choose another workdir"
        ) from None
    # A kill leaves temporary files of `write_atomically`.
    leftover = re.compile(r"\.lock|\.sweep\.json(\.sha256)?\.[0-9]+\.tmp|sweep\.json\.sha256")
    strange = [name for name in found if not leftover.fullmatch(name)]
    if strange:
        raise PmoeError(
            f"{folder} is not empty and holds no sweep (no sweep.json, but {strange[0]}); choose a "
            "new or empty workdir"
        )


def _begin(
    folder: pathlib.Path,
    planned: Manifest | None,
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    max_members: int,
) -> Manifest:
    if planned is None or (folder / "sweep.json").exists():
        return _stored(folder, config, cells, max_members)
    write_with_sum(folder / "sweep.json", planned.to_json())
    return planned


def _stored(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    max_members: int,
) -> Manifest:
    """The stored manifest, if it is of this config and grid.

    Raises:
      PmoeError: with the differences.
    """
    manifest, asked = Manifest.read(folder / "sweep.json"), grid.plain(config, cells)
    changed = config_lib.differences(manifest.config.to_dict(), config.to_dict())
    for number in range(max(len(asked), len(manifest.grid))):
        old, new = (part[number : number + 1] for part in (manifest.grid, asked))
        if old != new:
            shown = [str(part[0]) if part else "absent" for part in (old, new)]
            changed.append(f"cell {number + 1}: {shown[0]} -> {shown[1]}")
    if changed:
        raise PmoeError(
            f"{folder} holds another sweep ({'; '.join(changed)}); resume it with its own "
            "config or choose another workdir"
        )
    if max_members:
        wanted = grid.pack(config, cells, lambda shared: max_members)
        if wanted.programs != manifest.programs:
            print(
                f"note: {max_members} members a program would pack this sweep otherwise; it keeps "
                "the packing that it began with",
                file=sys.stderr,
            )
    return manifest


def _check_baselines(manifest: Manifest, folder: pathlib.Path) -> None:
    """Refuses to train what could not be paired: finished baselines whose models are gone."""
    needed = {(own.program, clean.program) for own, clean in manifest.pairs().items()}
    for own, clean in sorted(needed):
        program, baseline = manifest.programs[own], manifest.programs[clean]
        if _is_finished(folder, program) or not _is_finished(folder, baseline):
            continue
        run = RunDirectory(folder / "runs" / baseline.name)
        steps = run.whole_steps()
        damage = run.damage(steps[-1]) if steps else f"{run.path} has no checkpoint any more"
        if damage:
            raise PmoeError(
                f"{damage}, and {program.name} is paired with its clean models; restore it, or "
                f"remove {_paired(folder, baseline)} to train them again"
            )


def _paired(folder: pathlib.Path, program: Program) -> pathlib.Path:
    return folder / "paired" / f"{program.name}.jsonl"


def _unpair(folder: pathlib.Path, program: Program) -> None:
    path = _paired(folder, program)
    for each in (path, path.with_name(f"{path.name}.sha256")):
        each.unlink(missing_ok=True)


def _is_finished(folder: pathlib.Path, program: Program) -> bool:
    return _paired(folder, program).exists()


def _is_trained(folder: pathlib.Path, program: Program, datasets: Callable[[Any], Dataset]) -> bool:
    images = datasets(program.config).train_images
    last = training.plan_of(program.config, len(images)).total_steps
    return last in RunDirectory(folder / "runs" / program.name).whole_steps()


def _check_trained(
    jobs: cluster.Jobs,
    folder: pathlib.Path,
    program: Program,
    datasets: Callable[[Any], Dataset],
) -> None:
    if not _is_trained(folder, program, datasets):
        jobs.raise_reason(program.name)
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
        _write_pairs(manifest, index, folder, datasets(program.config))


def pair_if_ready(manifest: Manifest, index: int, folder: pathlib.Path, dataset: Dataset) -> None:
    """Finishes a program if it and its baselines are trained.

    That is for jobs, which know nothing of each other; what they leave is finished by `run`.

    Args: as of `false_trigger_rows`.
    """
    baselines = {c.program for own, c in manifest.pairs().items() if own.program == index}
    programs = [manifest.programs[needed] for needed in {index, *baselines}]
    if all(_is_trained(folder, program, lambda config: dataset) for program in programs):
        _write_pairs(manifest, index, folder, dataset)


def _write_pairs(manifest: Manifest, index: int, folder: pathlib.Path, dataset: Dataset) -> None:
    """Finishes a program.

    Raises:
      PmoeError: it, or a baseline, is not trained any more; or the disk refuses.
    """
    program = manifest.programs[index]
    if not _is_trained(folder, program, lambda config: dataset):
        # A program without pairs has nothing to read there, and would count as finished.
        raise PmoeError(
            f"{folder / 'runs' / program.name} does not hold its last step any more; restore it, "
            "or run the same command again to train it"
        )
    rows = false_trigger_rows(manifest, index, folder, dataset)
    path = _paired(folder, program)
    check_still_there(path)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise PmoeError(
            f"{path.parent} cannot be created ({error.strerror}); make room and run the same "
            "command again"
        ) from None
    write_with_sum(path, "".join(json.dumps(row) + "\n" for row in rows))


def _keep(manifest: Manifest, folder: pathlib.Path) -> None:
    rows = results.collect(manifest, folder)
    write_with_sum(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    known = results.collect_provenance(manifest, folder)
    write_with_sum(folder / "provenance.json", json.dumps(known, indent=1) + "\n")


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
        # The end of training, not an older checkpoint in place of a damaged one.
        last = training.plan_of(program.config, len(dataset.train_images)).total_steps
        return trained_lib.restore(directory, program.config, program.members, dataset, last)

    program = manifest.programs[index]
    programs, step, states[index], attack, _ = restored(index)
    for clean in pairs.values():
        if clean.program not in states:
            states[clean.program] = restored(clean.program)[2]
    # Members without a baseline stand in for it; their rows are dropped.
    sources = [pairs.get(m, grid.Ref(index, m)) for m in range(len(program.members))]
    paired = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *[jax.tree.map(lambda leaf, m=s.member: leaf[m], states[s.program]) for s in sources],
    )
    rows = trained_lib.rows_of(
        program.config, program.members, programs, paired, attack,
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
            self._last = wanted, inputs.load_data(config)
        return self._last[1]


def _evaluated_epochs(config: Any) -> list[int]:
    epochs = range(1, config.train.epochs + 1)
    return [epoch for epoch in epochs if run_lib.is_evaluated(epoch, config)]


def _names(manifest: Manifest, refs: Sequence[Any]) -> list[str]:
    return sorted({manifest.programs[ref.program].name for ref in refs})


# --- progress -----------------------------------------------------------------------------------


class _Board:
    """The live table: cells with their figures so far, progress of the program, time left.

    Time is judged by what this session measured: seconds per member and epoch, evaluation and
    compiling included, of programs of the same config, or else of all.

    `show` gets the line of progress, the table, and the first of its lines that belongs to the
    program at work.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: pathlib.Path,
        show: Callable[[str, report.Table, int], None],
    ):
        self._manifest, self._folder, self._show = manifest, folder, show
        self._index = 0
        self._share = self._first_share = 0.0
        self._begun = self._shown = time.monotonic()
        self._spent: dict[str, list[float]] = {}
        self._table = report.overview([])

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
        cells = enumerate(self._manifest.cells)
        at_work = next((line for line, cell in cells if self._index in cell.programs), 0)
        self._show(
            f"program {self._index + 1} of {len(programs)} ({programs[self._index].name}, "
            f"{len(programs[self._index].members)} members): {100 * self._share:.0f} %; "
            f"time left: {self._time_left()}",
            self._table,
            at_work,
        )

    def _time_left(self) -> str:
        unfinished = [p for p in self._manifest.programs if not _is_finished(self._folder, p)]
        if not unfinished:
            return "none"
        spent = {kind: list(known) for kind, known in self._spent.items()}
        current = self._manifest.programs[self._index]
        done_here = max(self._share - max(self._first_share, 0), 0) * self._size(current)
        if 0 < self._share < 1 and done_here:
            known = spent.setdefault(_kind(current), [0.0, 0.0])
            known[0] += time.monotonic() - self._begun
            known[1] += done_here
        if not spent:
            return "unknown yet"
        overall = sum(s for s, _ in spent.values()) / sum(w for _, w in spent.values())
        seconds = 0.0
        for program in unfinished:
            share = self._share if program is current else 0.0
            known = spent.get(_kind(program), [overall, 1.0])
            seconds += (1 - share) * self._size(program) * known[0] / known[1]
        return f"about {duration(seconds)}"

    @staticmethod
    def _size(program: Program) -> float:
        return len(program.members) * program.config.train.epochs


def _kind(program: Program) -> str:
    return config_lib.to_json(grid.canonical(program.config, program.members[0])[0])


def _text(table: report.Table) -> str:
    """A table of cells as Markdown, their scale above it."""
    return "\n\n".join(filter(None, [table.title, report.markdown(table.header, table.lines)]))


def _picture(head: str, table: report.Table, at_work: int, terminal: Console) -> Any:
    """A table of cells for the terminal: if it is too tall, the cells around those at work."""
    count = shown = len(table.lines)
    while True:
        first = max(0, min(at_work - shown // 3, count - shown))
        drawn = Table(title=Text(table.title), box=box.SIMPLE_HEAD)
        longest = max((len(line[0]) for line in table.lines), default=0)
        drawn.add_column(Text(table.header[0]), min_width=min(24, longest), overflow="fold")
        for name in table.header[1:]:
            drawn.add_column(Text(name), justify="right", overflow="fold")
        for line in table.lines[first : first + shown]:
            drawn.add_row(*map(Text, line))
        around = f"{first} cells above, {count - first - shown} below"
        picture = Group(Text(head), drawn, Text(around if shown < count else "", end=""))
        height = len(terminal.render_lines(picture, pad=False))
        if height < terminal.height or shown <= 1:
            return picture
        shown = max(1, min(shown - 1, shown * terminal.height // height))


@contextlib.contextmanager
def _board(manifest: Manifest, folder: pathlib.Path, progress: bool) -> Iterator[_Board]:
    """A board that redraws itself on a terminal, and prints new figures elsewhere."""
    if not progress:
        yield _Board(manifest, folder, lambda *drawn: None)
    elif sys.stderr.isatty():
        terminal = Console(stderr=True)
        # It goes away at the end, when the command prints the table for good.
        with Live(console=terminal, refresh_per_second=2, transient=True) as screen:

            def draw(head: str, table: report.Table, at_work: int) -> None:
                screen.update(_picture(head, table, at_work, terminal))

            yield _Board(manifest, folder, draw)
    else:
        last: list[report.Table] = []

        def show(head: str, table: report.Table, at_work: int) -> None:
            if last != [table]:  # Only when a figure is new: this goes to a log.
                print(f"{head}\n\n{_text(table)}", file=sys.stderr, flush=True)
            last[:] = [table]

        yield _Board(manifest, folder, show)
