"""`pmoe defend`: applies a defence to a trained run, and writes what it finds to a folder.

    pmoe defend --checkpoint=RUN --config=configs/defences/fine_pruning.py --workdir=OUT

    OUT/defence.json      the defence's config and which run it was applied to
    OUT/provenance.json   git revision, package versions, hardware, commands
    OUT/table.md          the printed table
    OUT/...               rows as CSV, figures, and for Fine-Pruning a run directory a cell, which
                          `pmoe evaluate` reads

The same command goes on with a killed defence.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from pmoe_jax import config as config_lib
from pmoe_jax import defend_config
from pmoe_jax.errors import PmoeError

FORMAT = 1


def add_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines the command's flags; `argv` says which config the field flags start from."""
    from pmoe_jax import cli

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, "", meaning, flag_values=values)

    text("checkpoint", "Run directory to defend.")
    text("workdir", "Folder to create or go on with.")
    text("data", "Where the data set lies, if not where the run's config says.")
    text("members", "Which members, such as 0,2, by their position in the run; all by default.")
    flags.DEFINE_boolean("progress", True, "Show progress bars.", flag_values=values)
    for word in argv:
        name = word.lstrip("-").partition("=")[0]
        if name.startswith("config.") and name.removeprefix("config.") not in defend_config.FIELDS:
            raise defend_config.unknown_field(name.removeprefix("config."))
    path = cli.peek(argv, "config")
    if not path:
        config_flags.DEFINE_config_dict("config", defend_config.default(), flag_values=values)
    elif not os.path.isfile(path.partition(":")[0]):
        raise PmoeError(
            f"--config={path} is no file; give one like configs/defences/fine_pruning.py"
        )
    else:
        config_flags.DEFINE_config_file("config", None, "Config file.", flag_values=values)


def run_command(values: flags.FlagValues, words: list[str]) -> int:
    """Runs the command and prints its table."""
    from pmoe_jax import launch
    from pmoe_jax.rundir import RunDirectory

    if not values.checkpoint:
        raise PmoeError("--checkpoint is missing; give the directory of a trained run")
    if not values.workdir:
        raise PmoeError("--workdir is missing; give the folder to write to")
    config = values.config
    if not isinstance(config, ml_collections.ConfigDict):
        raise PmoeError("--config gives no ConfigDict; begin with defend_config.default()")
    defend_config.validate(config.to_dict())
    launch.prepare(RunDirectory(values.checkpoint).config().model.dtype)
    chosen = config_lib.whole_numbers("members", values.members)
    table = defend(
        values.checkpoint, config, values.workdir,
        source=values.data, progress=values.progress, members=chosen,
    )  # fmt: skip
    print(table)
    return 0


def defend(
    checkpoint: str | os.PathLike[str],
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    source: str = "",
    dataset: Any = None,
    progress: bool = False,
    members: Sequence[int] = (),
) -> str:
    """Applies a defence to the newest checkpoint of a run, or goes on with it.

    Args:
      checkpoint: the run directory; it is only read.
      config: see `pmoe_jax.defend_config`.
      workdir: the folder to write.
      source: where the data set lies, if not where the run's config says.
      dataset: an already loaded data set.
      progress: show progress bars on stderr.
      members: which members of the run, by their position in it; all by default.

    Returns:
      The table, as Markdown.

    Raises:
      PmoeError: bad input, or a folder that holds another defence.
    """
    defend_config.validate(config.to_dict())
    from pmoe_jax import defend_base, detectors, fine_pruning
    from pmoe_jax.files import write_with_sum
    from pmoe_jax.rundir import RunDirectory

    out = pathlib.Path(workdir)
    if out.resolve() == pathlib.Path(checkpoint).resolve():
        raise PmoeError(f"--workdir={out} is the run itself; choose a folder of its own")
    base = defend_base.load(
        checkpoint, out, source=source, dataset=dataset, progress=progress, members=members
    )
    modules: tuple[Any, ...] = (fine_pruning, detectors)
    method = next(module for module in modules if config.method in module.METHODS)
    method.check(base, defend_config.effective(config))
    description = {
        "format": FORMAT,
        "of": base.run.name,
        "step": base.step,
        "checkpoint": base.run.sum_of_checkpoint(base.step),
        "members": [member.to_json() for member in base.members],
        "dataset": base.fingerprint,
        "config": defend_config.to_json(config),
    }
    with RunDirectory(out) as folder:  # For its lock.
        _begin(out, description)
        folder.begin_session()
        if left_out := defend_base.covered(base):
            print(
                f"warning: tables have means of {left_out} when {base.run.path} was trained, and "
                "is defended, too, but marked",
                file=sys.stderr,
            )
        if base.epoch < base.config.train.epochs:
            print(
                f"warning: {base.run.path} is not trained to its end: "
                f"{defend_base.trained_for(base)}, which is what is defended here",
                file=sys.stderr,
            )
        effective = defend_config.effective(config)
        for note in (*defend_config.notes(config), *method.notes(base, effective)):
            print(f"note: {note}", file=sys.stderr)
        table = method.METHODS[config.method](base, config)
        write_with_sum(out / "table.md", table + "\n")
    return table


def _begin(out: pathlib.Path, description: dict[str, Any]) -> None:
    """Writes what is done here, or checks that it is the same.

    Raises:
      PmoeError: another defence, or other files.
    """
    from pmoe_jax.defend_base import read_json
    from pmoe_jax.files import remove_leftovers, write_with_sum

    path = out / "defence.json"
    if path.exists():
        known = read_json(path)
        if not isinstance(known, dict) or not isinstance(known.get("config"), dict):
            raise PmoeError(f"{path} describes no defence; restore it or choose another workdir")
        # Defences of older versions do not say which checkpoint they are of.
        if {"checkpoint": description["checkpoint"], **known} != description:
            old, new = known.get("config", {}), description["config"]
            if known.get("format") != FORMAT:
                raise PmoeError(
                    f"{path} has format {known.get('format')}; this version reads format {FORMAT}"
                )
            changed = config_lib.differences(old, new)
            changed = changed or ["another run, checkpoint or data set, or other members"]
            raise PmoeError(
                f"{out} holds another defence ({'; '.join(changed)}); go on with the same command "
                "or choose another workdir"
            )
        for folder in {out, *(path.parent for path in out.rglob(".*.tmp"))}:
            remove_leftovers(folder)
        return
    remove_leftovers(out, ("defence.json", "defence.json.sha256"))
    ours = (".lock", "defence.json.sha256")
    strange = sorted(entry.name for entry in out.iterdir() if entry.name not in ours)
    if strange:
        raise PmoeError(
            f"{out} is not empty and holds no defence (no defence.json, but {strange[0]}); choose "
            "a new or empty workdir"
        )
    write_with_sum(path, json.dumps(description, indent=2) + "\n")
