"""The command line `pmoe`: `train` and `evaluate`; the other commands are in modules of theirs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import absl.logging
import ml_collections
from absl import flags
from ml_collections import config_flags

from pmoe_jax import config as config_lib
from pmoe_jax import defend_config, launch, signals
from pmoe_jax.errors import PmoeError

if TYPE_CHECKING:
    from pmoe_jax.members import Member

USAGE = """Backdoor attacks against patch-based mixtures of experts.

usage: pmoe COMMAND [FLAGS]      (pmoe COMMAND --help lists the flags)

  train      train the members of a config in a run directory, or go on with a killed run
               pmoe train --config=configs/cifar10.py --workdir=DIR --config.trigger.name=warp \\
                 --config.poison.rate=0.1 --config.num_seeds=5
  evaluate   all metrics of a trained run, per seed and summarised
               pmoe evaluate --checkpoint=DIR --clean=CLEAN_DIR
  sweep      train a grid of experiments, or go on with a killed sweep
               pmoe sweep --config=configs/digits_grid.py --workdir=DIR --dry_run
  report     tables, curves and a page of sweeps and runs, beside the paper's figures
               pmoe report DIR... --output=DIR
  defend     a defence on a trained run: Fine-Pruning, subsets of experts, Neural Cleanse, STRIP
               pmoe defend --checkpoint=DIR --config=configs/defences/strip.py --workdir=OUT
  analyze    which patches the experts take, whether the trigger's, and what that causes
               pmoe analyze --checkpoint=DIR --clean=CLEAN_DIR --output=routing.npz --figures=OUT
  data       show or prepare a data set
               pmoe data show cifar10 --source=cifar-10-python.tar.gz
"""


AddFlags = Callable[[flags.FlagValues, Sequence[str]], None]
Run = Callable[[flags.FlagValues, list[str]], int]


class Command(NamedTuple):
    """A sub-command: defines its flags, then runs with them and the positional words."""

    add_flags: AddFlags
    run: Run
    help: str
    #: The module of the fields that `--config.FIELD` sets.
    fields: ModuleType = config_lib
    takes_words: bool = False


#: Stopped from outside; the same command goes on.
STOPPED = 75


class _Terminated(SystemExit):
    """SIGTERM. What is on disk is whole at any moment, so that work may stop where it is.

    A SystemExit, as that is not taken for a failure on its way up.
    """


def main(argv: Sequence[str]) -> int:
    """Runs one command line (without the program's name) and returns its exit code."""
    absl.logging.set_verbosity(absl.logging.ERROR)

    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if not signals.sent_again(number, frame):
            came.append(number)
            raise KeyboardInterrupt if number == signal.SIGINT else _Terminated(STOPPED)

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell lets what it starts in the background ignore SIGINT.
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, stop)
    except ValueError:  # Only the main thread may set handlers.
        pass
    sent = {KeyboardInterrupt: signal.SIGINT, _Terminated: signal.SIGTERM}
    try:
        with signals.heard(lambda kind: sent.get(kind) if came else None, came):
            return _main(argv, came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _main(argv: Sequence[str], came: Sequence[int]) -> int:
    """`came`: the signals that were raised as exceptions so far."""
    # ml_collections looks for overrides of config fields here, not in what it is given.
    sys.argv = [sys.argv[0], *argv]
    try:
        if not argv or argv[0] in ("--help", "-h", "help"):
            print(USAGE)
            code = 0 if argv else 2
        else:
            code = _run(argv)
        sys.stdout.flush()  # Here, where a reader that is gone is expected.
        return code
    except BaseException as error:
        # First: Python itself (in `__set_name__`) and libraries wrap what a handler raises.
        if signal.SIGTERM in came:
            return _fail("stopped by SIGTERM; run the same command again to go on", STOPPED)
        if came or isinstance(error, KeyboardInterrupt):
            return _fail("interrupted", 130)
        if isinstance(error, PmoeError):
            return _fail(error, error.exit_code)
        if isinstance(error, BrokenPipeError):
            # The reader of our output (such as `head`) is gone: no error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if isinstance(error, OSError) and error.filename is not None:
            return _fail(
                f"{error.filename} cannot be used ({error.strerror}); give another path", 2
            )
        raise


def entry_point() -> None:
    """The console script `pmoe`."""
    if (
        len(sys.argv) > 1
        and sys.argv[1] in ("train", "evaluate", "sweep", "defend", "analyze")
        and "--help" not in sys.argv
    ):
        launch.restart_with_allocator()
    code = STOPPED

    def at_once(number: int, frame: Any) -> None:
        os._exit(code)

    for number in (signal.SIGTERM, signal.SIGINT):  # `main` leaves what it finds.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, at_once)
    code = main(sys.argv[1:])
    # What was asked for is done: the interpreter's own end shall not make another code of it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if code in (STOPPED, 130):
        # At once: what still waits in threads (images to decode, batches to predict) is not wanted.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(argv: Sequence[str]) -> int:
    name, *rest = argv
    commands = _commands()
    if name not in commands:
        raise PmoeError(f"unknown command {name!r}; choose one of {', '.join(commands)}")
    command = commands[name]
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Show this help.", flag_values=values, short_name="h")
    if any(word in ("--help", "-h", "-help") for word in rest):
        command.add_flags(values, [])
        for flag in (values[name] for name in values):
            if isinstance(flag.value, ml_collections.ConfigDict):
                # Not absl's dump of all fields: their table is above, or in the help of `train`.
                flag.default_as_str = None
                table = "above" if name in ("train", "defend") else "`pmoe train --help`"
                flag.help = f"--{flag.name}.FIELD=VALUE sets a field; see {table}."
        own_flags = values.get_help().partition("\nabsl.flags:")[0]
        print(f"{command.help}\n\nflags:\n{own_flags}")
        return 0
    try:
        command.add_flags(values, rest)
        words = values([name, *rest])[1:]
    except PmoeError:
        raise
    except Exception as error:
        # absl and ml_collections raise half a dozen types, and a config file may raise anything.
        raise _flag_error(error, rest, command.fields) from None
    if words and not command.takes_words:
        raise PmoeError(f"unexpected word {words[0]!r}; flags are written --name=value")
    return command.run(values, words)


def _flag_error(error: Exception, argv: Sequence[str], fields: ModuleType) -> PmoeError:
    """One line for whatever absl and ml_collections raise on a bad flag."""
    for word in argv:
        name = word.lstrip("-").partition("=")[0]
        if name.startswith(("config.", "trigger.", "quirks.")):
            field = name.removeprefix("config.")
            if field not in fields.FIELDS:
                return fields.unknown_field(field)
            if field in str(error) or name in str(error):
                wanted = fields.FIELDS[field]
                kind = type(wanted.default).__name__
                return PmoeError(f"{word} is no valid {kind}; allowed: {wanted.allowed}")
    path = peek(argv, "config")
    _, parsing, trace = str(error).partition("Error whilst parsing config file:")
    if path and parsing:  # ml_collections hands on the whole traceback.
        return PmoeError(f"--config={path} failed: {trace.strip().splitlines()[-1]}")
    if path and not isinstance(error, flags.Error):
        return PmoeError(f"--config={path} failed: {type(error).__name__}: {_one_line(error)}")
    return PmoeError(f"{_one_line(error)}; see --help")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # A KeyError's text is quoted whole.
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _fail(message: object, code: int) -> int:
    print(f"pmoe: {message}", file=sys.stderr)
    return code


# --- train --------------------------------------------------------------------------------------


def _train_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_string(
        "workdir", None, "Run directory to create or go on with.", flag_values=values
    )
    flags.DEFINE_boolean("progress", True, "Show a progress bar.", flag_values=values)
    flags.DEFINE_boolean("profile", False, "Write a trace to WORKDIR/profile.", flag_values=values)
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of the first of several processes that train together; under Slurm and Open MPI "
        "up to 4 none of these three is needed.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "How many processes.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which one this is: 0, 1, ...", flag_values=values)
    path = peek(argv, "config")
    if path is None:
        config_flags.DEFINE_config_dict("config", config_lib.default(), flag_values=values)
    elif not os.path.isfile(path.partition(":")[0]):
        raise PmoeError(f"--config={path} is no file; give one like configs/cifar10.py")
    else:
        config_flags.DEFINE_config_file("config", None, "Config file.", flag_values=values)


def _train(values: flags.FlagValues, words: list[str]) -> int:
    if not values.workdir:
        raise PmoeError("--workdir is missing; give the run directory to create")
    config = values.config
    if not isinstance(config, ml_collections.ConfigDict):
        raise PmoeError("--config gives no ConfigDict; begin with pmoe_jax.config.default()")
    config_lib.validate(config.to_dict())
    launch.prepare(config.model.dtype)
    from pmoe_jax import processes, report, run, trained

    for line in config_lib.notes(config):
        print(f"note: {line}", file=sys.stderr)
    with processes.joined(values.coordinator, values.num_processes, values.process_id):
        try:
            run.train(config, values.workdir, progress=values.progress, profile=values.profile)
        except run.Interrupted as stopped:
            return _fail(stopped, stopped.exit_code)
        if processes.is_first():
            print(report.evaluation_table(trained.recorded(values.workdir)))
    return 0


# --- evaluate -----------------------------------------------------------------------------------


def _evaluate_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, "", meaning, flag_values=values)

    text("checkpoint", "Run directory to evaluate.")
    text("clean", "Run directory of a clean model: adds CAD and its false trigger rate.")
    text("data", "Where the data set lies, if not where the run's config says.")
    text("figures", "Folder for figures: triggers, curves.")
    flags.DEFINE_integer(
        "step", None, "Step to evaluate; the newest by default.", flag_values=values
    )
    flags.DEFINE_boolean("json", False, "Print JSON.", flag_values=values)
    flags.DEFINE_boolean("csv", False, "Print rows as CSV.", flag_values=values)
    # Another trigger than the trained one: --trigger.name=blend --trigger.alpha=0.3
    path = peek(argv, "checkpoint")
    stored = _stored_config(path) if path else config_lib.default()
    for group in ("trigger", "quirks"):
        config_flags.DEFINE_config_dict(group, stored[group], flag_values=values)


def _evaluate(values: flags.FlagValues, words: list[str]) -> int:
    if not values.checkpoint:
        raise PmoeError("--checkpoint is missing; give the directory of a trained run")
    stored = _stored_config(values.checkpoint)
    asked = asked_config(values, stored)
    if values.json and values.csv:
        raise PmoeError("--json and --csv exclude each other; give one of them")
    launch.prepare(stored.model.dtype)
    from pmoe_jax import report, trained
    from pmoe_jax.members import trigger_parameters
    from pmoe_jax.rundir import RunDirectory

    check_effective(stored, asked, trigger_parameters)
    if values.figures:
        from pmoe_jax import figures

        figures.make_folder(values.figures)
    evaluated = trained.evaluate(
        values.checkpoint,
        clean=values.clean or None,
        source=values.data,
        trigger=asked_trigger(values, stored, asked, RunDirectory(values.checkpoint).members()),
        step=values.step,
    )
    if values.json:
        print(report.evaluation_json(evaluated))
    elif values.csv:
        print(report.rows_csv(evaluated.rows))
    else:
        print(report.evaluation_table(evaluated))
    if values.figures:
        for path in figures.write_run(evaluated, values.checkpoint, values.figures, values.data):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def asked_config(values: flags.FlagValues, stored: Any) -> Any:
    """A run's config with the trigger and quirks that flags of `evaluate` or `analyze` give.

    Raises:
      PmoeError: a value is out of range.
    """
    asked = stored.copy_and_resolve_references()
    for group in ("trigger", "quirks"):
        asked[group].update(values[group].value)
    asked.poison.rate = 0.0  # Nothing is poisoned here, so that no trigger is a choice, too.
    config_lib.validate(asked.to_dict())
    return asked


def asked_trigger(
    values: flags.FlagValues, stored: Any, asked: Any, members: Sequence[Member]
) -> Mapping[str, Any] | None:
    """The trigger that flags ask for; None where none does, or the members have it themselves.

    A program of a sweep can hold members of several triggers, of which its config names one.
    """
    from pmoe_jax.members import trigger_parameters

    trigger: Mapping[str, Any] = trigger_parameters(asked)
    named = any(values[name].present for name in values if name.startswith("trigger."))
    if trigger == trigger_parameters(stored) and not named:
        return None
    # Runs of older versions may lack parameters that came later.
    own = (member.trigger.items() for member in members)
    return None if all(each <= trigger.items() for each in own) else trigger


def check_effective(stored: Any, asked: Any, parameters: Callable[[Any], Any]) -> None:
    """Refuses a flag of `evaluate` or `analyze` that the trigger does not use, such as an alpha for
    a square.

    `parameters` gives what a config's fields amount to.
    """
    for group in ("trigger", "quirks"):
        for name, value in asked[group].items():
            alone = asked.copy_and_resolve_references()
            alone[group][name] = stored[group][name]
            if value != stored[group][name] and parameters(alone) == parameters(asked):
                raise PmoeError(
                    f"--{group}.{name}={value} changes nothing about the trigger "
                    f"{asked.trigger.name}; leave it out, or name another --trigger.name"
                )


def _stored_config(checkpoint: str) -> Any:
    from pmoe_jax.rundir import RunDirectory

    return RunDirectory(checkpoint).config()


# --- helpers ------------------------------------------------------------------------------------


def _commands() -> dict[str, Command]:
    fields = "\n".join(
        f"  --config.{name}={field.default!r}  {field.meaning} ({field.allowed})"
        for name, field in config_lib.FIELDS.items()
    )
    return {
        "train": Command(
            _train_flags,
            _train,
            f"pmoe train --workdir=DIR [--config=FILE.py] [--config.FIELD=VALUE ...]\n\n{fields}",
        ),
        "evaluate": Command(
            _evaluate_flags,
            _evaluate,
            "pmoe evaluate --checkpoint=DIR [--clean=DIR] [--trigger.name=NAME ...]",
        ),
        "sweep": Command(
            *_of_module("sweep"), "pmoe sweep --config=FILE.py[:PRESET] --workdir=DIR [--dry_run]"
        ),
        "report": Command(
            *_of_module("report"), "pmoe report DIR... [--output=DIR]", takes_words=True
        ),
        "defend": Command(*_of_module("defend"), defend_config.help_text(), defend_config),
        "analyze": Command(
            *_of_module("analyze"),
            "pmoe analyze --checkpoint=DIR [--clean=DIR] [--output=routing.npz] [--figures=DIR]",
        ),
        "data": Command(
            *_of_module("data.commands"), "pmoe data show|prepare NAME [FLAGS]", takes_words=True
        ),
    }


def _of_module(name: str) -> tuple[AddFlags, Run]:
    """The two functions of a command; the module, with all that it needs, is imported by them."""

    def add_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
        importlib.import_module(f"pmoe_jax.{name}").add_flags(values, argv)

    def run(values: flags.FlagValues, words: list[str]) -> int:
        return importlib.import_module(f"pmoe_jax.{name}").run_command(values, words)

    return add_flags, run


def peek(argv: Sequence[str], name: str) -> str | None:
    """The value of --name, before flags are defined (some flags depend on it)."""
    for i, word in enumerate(argv):
        flag, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and flag == name:
            return value if equals else next(iter(argv[i + 1 : i + 2]), None)
    return None


if __name__ == "__main__":
    entry_point()
