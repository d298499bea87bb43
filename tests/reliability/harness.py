"""Kills commands at random moments, lets them go on, and compares with what nobody killed.

`crash` is for the four commands that write for long: train, sweep, defend, data prepare. A kill
that hits counts as one moment; up to five hit one after another before a run may finish and is
compared, so that what an earlier kill left behind meets the later ones.
"""

import collections
import csv
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import tally

from pmoe_jax import data
from pmoe_jax.grid import Manifest
from pmoe_jax.rundir import RunDirectory

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: Exit codes by signal. Before a command has begun Python's own ways to die count as well.
HANDLED = {signal.SIGKILL: {-9}, signal.SIGTERM: {75, 0}, signal.SIGINT: {75, 130, 0}}
EARLY = {signal.SIGKILL: {-9}, signal.SIGTERM: {75, 0, -15}, signal.SIGINT: {75, 130, 0, -2}}
KILLS_IN_A_ROW = 5


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
    """A running command."""

    def __init__(self, words, env):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.began = time.time_ns()
        # -P as the console script has it: the current directory is no place to import from.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pmoe_jax.cli", *map(str, words)],
            env=env, stdout=subprocess.DEVNULL, stderr=self._said, start_new_session=True,
        )  # fmt: skip

    def said(self):
        """What it wrote to stderr."""
        self._said.seek(0)
        return self._said.read()

    def has_begun(self, out):
        """Whether it wrote to its directory."""
        return any(changed(path) >= self.began for path in [out, *out.rglob("*")])

    def wait_for_beginning(self, out):
        while self.process.poll() is None and not self.has_begun(out):
            time.sleep(0.01)

    def ended_within(self, seconds):
        """Waits; whether it ended."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def changed(path):
    try:
        return path.stat().st_mtime_ns
    except OSError:  # There a moment ago.
        return 0


def finish(words, env):
    """Runs a command line to its end, and returns what it said."""
    process = Process(words, env)
    assert process.process.wait(600) == 0, process.said()
    return process.said()


def kill_once(words, out, env, chance, work):
    """Starts a command and signals it at a random moment.

    Args:
      work: seconds that the command takes from its first write to its end.

    Returns:
      Signal, exit code and seconds from one to the other; None if it was done before.
    """
    process, number = Process(words, env), chance.choice(SIGNALS)
    if chance.random() < 0.85:
        process.wait_for_beginning(out)
        delay = chance.uniform(0, work)
    else:  # anywhere, the imports included
        delay = chance.uniform(0, 2 * work)
    if process.ended_within(delay):
        assert process.process.returncode == 0, process.said()
        return None
    begun = process.has_begun(out)
    sent = time.monotonic()
    process.process.send_signal(number)
    assert process.ended_within(120), f"{number.name} did not end it"
    seconds, code, said = time.monotonic() - sent, process.process.returncode, process.said()
    assert code in (HANDLED if begun else EARLY)[number], (number, code, begun, said)
    if code in (75, 130):
        assert "Traceback" not in said, said
        assert said.splitlines()[-1].startswith(("pmoe: stopped by", "pmoe: interrupted")), said
    return number, code, seconds


def crash(command, folder, env, moments, chance):
    """Kills a command at so many moments; raises at the first difference."""
    whole = folder / "whole" / "run"
    whole.parent.mkdir(parents=True)
    finish(command.words(whole), env)  # fills the compilation cache
    again = folder / "again" / "run"
    again.parent.mkdir()
    process = Process(command.words(again), env)
    process.wait_for_beginning(again)
    begun = time.monotonic()
    assert process.process.wait(600) == 0, process.said()
    work = time.monotonic() - begun
    command.compare(again, whole)  # the same command twice
    codes, slowest, tried, chain = collections.Counter(), 0.0, 0, 0
    while tried < moments:
        out = folder / str(chain) / "run"
        out.parent.mkdir()
        chain += 1
        history = []
        while tried < moments and len(history) < KILLS_IN_A_ROW:
            hit = kill_once(command.words(out), out, env, chance, work)
            if hit is None:
                break
            number, code, seconds = hit
            history.append(f"{number.name}->{code}")
            codes[history[-1]] += 1
            if number == signal.SIGTERM:
                slowest = max(slowest, seconds)
            tried += 1
        try:
            finish(command.words(out), env)
            command.compare(out, whole)
        except BaseException:
            tally.add(f"killed: {command.name}", len(history), losses=1)
            print(f"{command.name} was killed by {history} in {out}", file=sys.stderr)
            raise
        tally.add(f"killed: {command.name}", len(history))
    tally.add(
        f"killed: {command.name}", 0, runs_compared=chain, codes=dict(codes),
        seconds_from_sigterm_at_most=round(slowest, 2), seconds_of_work=round(work, 1),
    )  # fmt: skip
    return codes, slowest


# --- comparing ------------------------------------------------------------------------------------


def assert_bit_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes()


def raw_arrays(path, step):
    """The arrays of a checkpoint, read without any model."""
    with ocp.PyTreeCheckpointer() as reader:
        folder = (path / "checkpoints" / str(step)).absolute()
        return [reader.restore(folder / item) for item in ("state", "attack")]


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
