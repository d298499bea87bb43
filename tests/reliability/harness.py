"""Kills commands at random moments, lets them go on, and compares with what nobody killed.

Nothing here waits for ever: a command that takes longer than PATIENCE (seconds, $PMOE_PATIENCE) is
killed with all its children, and its test fails with what it said.

`crash` is for the four commands that write for long: train, sweep, defend, data prepare. A kill
that hits counts as one moment; up to five hit one after another before a run may finish and is
compared, so that what an earlier kill left behind meets the later ones.
"""

import collections
import csv
import dataclasses
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import bounded
import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import tally

from pmoe_jax import data
from pmoe_jax.grid import Manifest
from pmoe_jax.rundir import RunDirectory

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: Exit codes by signal. Before a command has begun Python's own ways to die count as well.
HANDLED = {signal.SIGKILL: {-9}, signal.SIGTERM: {75}, signal.SIGINT: {75, 130}}
EARLY = {signal.SIGKILL: {-9}, signal.SIGTERM: {75, -15}, signal.SIGINT: {75, 130, -2}}
KILLS_IN_A_ROW = 5
PATIENCE = float(os.environ.get("PMOE_PATIENCE", "500"))
#: CPU seconds that a command may take from SIGTERM to its end; of a clock's, which are partly the
#: neighbours' on a busy machine, twice as many.
STOPS_WITHIN = 15


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line that writes to a directory.

    Attributes:
      name: in tables.
      words: of the directory, the words after `pmoe`.
      compare: of two finished directories, raises where they differ.
    """

    name: str
    words: Callable[[pathlib.Path], list[str]]
    compare: Callable[[pathlib.Path, pathlib.Path], None]


def environment(cache):
    """A user's, with unoptimised programs, which compile fast, and a cache of its own."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PMOE_CACHE_DIR": str(cache)}
    env.pop("GLIBC_TUNABLES", None)  # so that the command restarts itself, as for a user
    return env


class Process:
    """A running command in a process group of its own, which is gone behind `with`."""

    def __init__(self, words, env, prefix=(), python=sys.executable):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.began = time.time_ns()
        self._cpu_before = children_cpu()
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A shell starts what is to run in the background like this, and children inherit it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # -P as the console script has it: the current directory is no place to import from.
        # Its words go to a file: a pipe that nobody reads would stop it when it is full.
        self.process = subprocess.Popen(
            [*prefix, python, "-P", "-m", "pmoe_jax.cli", *map(str, words)],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        bounded.end(self.process)
        self._said.close()

    def said(self):
        """What it wrote to stderr."""
        self._said.seek(0)
        return self._said.read()

    def has_begun(self, out):
        """Whether it wrote to its directory."""
        return any(changed(path) >= self.began for path in [out, *everything_in(out)])

    def wait_for_beginning(self, out):
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and not self.has_begun(out):
            assert time.monotonic() < end, f"wrote nothing within {PATIENCE} s: {self.said()}"
            time.sleep(0.05)  # Looking costs time, too.

    def ended_within(self, seconds):
        """Waits; whether it ended."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def code(self):
        """Waits for its end, and returns its exit code."""
        assert self.ended_within(PATIENCE), f"not done after {PATIENCE} s: {self.said()}"
        return self.process.returncode

    def cpu(self):
        """CPU seconds that it took so far, or in all once it has ended (if no other did since)."""
        if self.process.returncode is not None:
            return children_cpu() - self._cpu_before
        try:
            return sum(psutil.Process(self.process.pid).cpu_times()[:4])
        except psutil.Error:
            return 0.0


def children_cpu():
    """CPU seconds of all children of this process that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def changed(path):
    try:
        return path.stat().st_mtime_ns
    except OSError:  # There a moment ago.
        return 0


def everything_in(out):
    """Files and folders; passes over those renamed while it looks, where rglob would raise."""
    for folder, *names in os.walk(out):
        yield from (pathlib.Path(folder, name) for name in itertools.chain(*names))


def finish(words, env, prefix=(), python=sys.executable):
    """Runs a command line to its end, and returns what it said."""
    with Process(words, env, prefix, python) as process:
        assert process.code() == 0, process.said()
        return process.said()


@dataclasses.dataclass(frozen=True)
class Hit:
    """A kill: signal, exit code, and seconds from one to the other, of a clock and of the CPU."""

    number: signal.Signals
    code: int
    seconds: float
    cpu: float


def kill_once(words, out, env, chance, work):
    """Starts a command and signals it at a random moment.

    Args:
      work: seconds that the command takes from its first write to its end.

    Returns:
      The hit; if it was done before that, the seconds that it took.
    """
    number = chance.choice(SIGNALS)
    with Process(words, env) as process:
        if chance.random() < 0.85:
            process.wait_for_beginning(out)
            delay = chance.uniform(0, work)
        else:  # anywhere, the imports included
            delay = chance.uniform(0, 2 * work)
        since = time.monotonic()
        if process.ended_within(delay):
            assert process.process.returncode == 0, process.said()
            return time.monotonic() - since
        begun, cpu = process.has_begun(out), process.cpu()
        sent = time.monotonic()
        process.process.send_signal(number)
        code = process.code()
        if code == 0:  # It came to its end in that moment.
            return time.monotonic() - since
        hit = Hit(number, code, time.monotonic() - sent, max(0.0, process.cpu() - cpu))
        said = process.said()
    # Python's own end by a SIGINT in its first milliseconds.
    too_early = not begun and code == 1 and "init_import_site" in said
    assert too_early or code in (HANDLED if begun else EARLY)[number], (number, code, begun, said)
    if code in (75, 130):
        assert "Traceback" not in said, said
        assert said.splitlines()[-1].startswith(("pmoe: stopped by", "pmoe: interrupted")), said
    if number == signal.SIGTERM:
        assert hit.cpu < STOPS_WITHIN and hit.seconds < 2 * STOPS_WITHIN, (hit, said)
    return hit


def crash(command, folder, env, moments, chance):
    """Kills a command at so many moments; raises at the first difference.

    Returns:
      The hits.
    """
    whole = folder / "whole" / "run"
    whole.parent.mkdir(parents=True)
    finish(command.words(whole), env)  # fills the compilation cache
    again = folder / "again" / "run"
    again.parent.mkdir()
    with Process(command.words(again), env) as process:
        process.wait_for_beginning(again)
        begun = time.monotonic()
        assert process.code() == 0, process.said()
        work = time.monotonic() - begun
    command.compare(again, whole)  # the same command twice
    hits, chain = [], 0
    while len(hits) < moments:
        assert chain < 10 * moments, "the signals do not end it"
        out = folder / str(chain) / "run"
        out.parent.mkdir()
        chain += 1
        history, names = [], []
        try:
            while len(hits) + len(history) < moments and len(history) < KILLS_IN_A_ROW:
                hit = kill_once(command.words(out), out, env, chance, work)
                if not isinstance(hit, Hit):  # The machine is faster than when it was measured.
                    work = min(work, max(hit, 0.5))
                    break
                history.append(hit)
                names.append(f"{hit.number.name}->{hit.code}")
            if history:
                finish(command.words(out), env)
            command.compare(out, whole)
        except Exception:
            tally.add(f"killed: {command.name}", len(history), losses=1)
            print(f"{command.name} was killed by {names} in {out}", file=sys.stderr)
            raise
        hits += history
        stops = [hit for hit in history if hit.number == signal.SIGTERM]
        tally.add(
            f"killed: {command.name}", len(history), runs_compared=1,
            codes=dict(collections.Counter(names)),
            seconds_from_sigterm_at_most=round(max((h.seconds for h in stops), default=0), 2),
            cpu_seconds_from_sigterm_at_most=round(max((h.cpu for h in stops), default=0), 2),
        )  # fmt: skip
        shutil.rmtree(out.parent)
    return hits


# --- comparing ------------------------------------------------------------------------------------


def assert_bit_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes()


def raw_arrays(path, step):
    """The arrays of a checkpoint, read without any model, on whatever devices it was saved."""
    folder, found = (path / "checkpoints" / str(step)).absolute(), []
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("state", "attack"):
            tree = reader.metadata(folder / item).item_metadata.tree
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            found.append(reader.restore(folder / item, restore_args=plain))
    return found


def untimed(path):
    """The lines of a training.jsonl without what a clock measured."""
    lines = map(json.loads, (path / "training.jsonl").read_text().splitlines())
    timed = ("seconds", "images_per_second")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def files_in(path):
    return sorted(os.listdir(path))


def same_run(one, other):
    """Parameters bit-equal, figures equal line for line, checkpoints whole, nothing beside."""
    assert files_in(one) == files_in(other)
    runs = [RunDirectory(path) for path in (one, other)]
    steps = [run.whole_steps() for run in runs]
    assert steps[0] == steps[1] and steps[0]
    assert files_in(one / "checkpoints") == sorted(map(str, steps[0]))
    for step in steps[0]:
        assert runs[0].damage(step) is None
        assert_bit_equal(raw_arrays(one, step), raw_arrays(other, step))
    if (other / "metrics.jsonl").exists():
        assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        assert runs[0].rows() == runs[1].rows()
    if (other / "training.jsonl").exists():
        assert untimed(one) == untimed(other)


def same_sweep(one, other):
    assert files_in(one) == files_in(other)
    assert (one / "rows.jsonl").read_bytes() == (other / "rows.jsonl").read_bytes()
    programs = Manifest.read(other / "sweep.json").programs
    assert files_in(one / "runs") == sorted(program.name for program in programs)
    for program in programs:
        same_run(one / "runs" / program.name, other / "runs" / program.name)


def same_defence(one, other):
    assert files_in(one) == files_in(other)
    for name in ("before.json", "curve.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    tables = [list(csv.DictReader((path / "rows.csv").open())) for path in (one, other)]
    assert tables[0] == tables[1]
    for folder in sorted(path for path in other.iterdir() if path.is_dir()):
        same_run(one / folder.name, folder)


def same_data(one, other):
    """Prepared data sets."""
    assert files_in(one / "cifar10") == files_in(other / "cifar10") == ["3.0.2"]
    names = [files_in(path / "cifar10" / "3.0.2") for path in (one, other)]
    assert names[0] == names[1]
    loaded = [data.load("cifar10", data_dir=path) for path in (one, other)]
    assert loaded[0].fingerprint() == loaded[1].fingerprint()
