"""Sweeps as jobs of a cluster, through submitit: one job trains one program of the grid.

A sweep's directory then also holds

    jobs/PROGRAM.json   the job that trains the program
    jobs/PROGRAM.error  why it failed, if it did
    jobs/ID_*           submitit's own files: what is run, logs, results

A job that is preempted or runs out of time saves its state, is queued again by submitit, and goes
on from its newest checkpoint. Nothing that a job leaves is executed or unpickled here: whether it
is done shows in its run directory.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from pmoe_jax import launch
from pmoe_jax.errors import PmoeError
from pmoe_jax.grid import Manifest
from pmoe_jax.rundir import write_atomically

#: "submitit" takes Slurm where there is one, else processes on this machine.
LAUNCHERS = ("submitit", "slurm", "local")
#: Unless asked otherwise; submitit's own default is some minutes.
TIMEOUT_MIN = 24 * 60
#: How often a job may run out of time and be queued again.
MAX_TIMEOUTS = 1000
POLL_SECONDS = 2.0
#: How long Slurm may take to say whether a job is there; a job it is silent about counts as there.
SQUEUE_SECONDS = 60


class Training:
    """The work of one job: trains a program, or goes on with it."""

    def __init__(self, folder: str, name: str):
        self.folder, self.name = folder, name

    def __call__(self) -> None:
        """Trains until the program is finished, or the job is asked to make room."""
        from pmoe_jax import run as run_lib

        folder = pathlib.Path(self.folder)
        program = next(
            p for p in Manifest.read(folder / "sweep.json").programs if p.name == self.name
        )
        launch.use_compilation_cache()
        if program.config.model.dtype == "float64":
            import jax

            jax.config.update("jax_enable_x64", True)
        requeue = _save_before_requeue()
        try:
            run_lib.train(
                program.config, folder / "runs" / self.name, members=program.members,
                progress=False,
            )  # fmt: skip
        except run_lib.Interrupted:
            requeue()
            raise
        except PmoeError as error:
            write_atomically(folder / "jobs" / f"{self.name}.error", f"{error}\n")
            raise

    def checkpoint(self) -> Any:
        """What submitit queues in place of a preempted job: the same, since it resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _save_before_requeue() -> Callable[[], None]:
    """Lets training save its state before submitit queues the job again.

    submitit queues it again at once when its signal comes (SIGUSR1 or 2, by version), and ignores
    SIGTERM, with which Slurm asks a preempted job to end. Here both stop training as SIGTERM does.

    Returns:
      What queues the job again, to be called when training has stopped.
    """
    terminate = signal.getsignal(signal.SIGTERM)
    handlers: dict[int, Callable[..., Any]] = {}

    def stop_training(number: int, frame: Any) -> None:
        if signal.getsignal(signal.SIGTERM) == terminate:  # Training has not begun.
            handlers[number](number, frame)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        handler: Any = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
            signal.signal(number, stop_training)

    def requeue() -> None:
        for number, handler in handlers.items():
            try:
                handler(number, None)
            except subprocess.CalledProcessError:
                sys.exit(1)  # Slurm does it by itself, and refuses to do it twice.

    return requeue


class Jobs:
    """The jobs of one sweep."""

    def __init__(
        self,
        folder: pathlib.Path,
        launcher: str,
        options: Mapping[str, Any],
        names: Sequence[str],
        most: int = 0,
    ):
        """Submits the programs that no job of an earlier command is training.

        Args:
          folder: the sweep's directory, on a file system that all nodes see.
          launcher: one of `LAUNCHERS`.
          options: parameters of submitit's executor.
          names: programs that are to be trained, most important first.
          most: jobs at a time; 0: all that the cluster runs.

        Raises:
          PmoeError: submitit is not installed, or refuses the options.
        """
        self._folder = folder.resolve() / "jobs"
        self._folder.mkdir(exist_ok=True)
        self._executor = _executor(self._folder, launcher, options)
        self._waiting = [name for name in names if not self._alive(name)]
        self._most = most or len(names)
        self._fill()

    def wait(self, name: str, poll: Callable[[], None] = lambda: None) -> None:
        """Returns when the job of a program has ended; calls `poll` now and then until it has.

        Raises:
          PmoeError: it failed for a reason that it could name.
        """
        while name in self._waiting or self._alive(name):
            self._fill()
            poll()
            time.sleep(POLL_SECONDS)
        self._fill()
        problem = self._folder / f"{name}.error"
        if problem.exists():
            raise PmoeError(f"the job of {name} failed: {problem.read_text().strip()}")

    def logs(self, name: str) -> str:
        """Where the job of a program writes its output."""
        return f"{self._folder}/{self._known(name).get('job', '*')}_*"

    def _fill(self) -> None:
        while self._waiting and self._running() < self._most:
            name = self._waiting.pop(0)
            (self._folder / f"{name}.error").unlink(missing_ok=True)
            work = Training(str(self._folder.parent), name)
            try:
                job = self._executor.submit(work)
            except Exception as error:  # submitit's, sbatch's and the operating system's
                raise PmoeError(f"the job of {name} cannot be submitted ({error})") from None
            known = {"launcher": self._executor.cluster, "job": str(job.job_id)}
            write_atomically(self._folder / f"{name}.json", json.dumps(known) + "\n")
            print(f"submitted {name}: {known['launcher']} job {known['job']}", file=sys.stderr)

    def _running(self) -> int:
        return sum(self._alive(path.stem) for path in self._folder.glob("*.json"))

    def _known(self, name: str) -> dict[str, str]:
        try:
            known = json.loads((self._folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return {}
        fine = isinstance(known, dict) and str(known.get("job", "")).isdigit()
        return known if fine else {}

    def _alive(self, name: str) -> bool:
        """Whether the program's job is queued or running."""
        known = self._known(name)
        if not known:
            return False
        if known.get("launcher") == "slurm":
            # A finished job leaves its result before Slurm forgets it.
            if list(self._folder.glob(f"{known['job']}_*_result.pkl")):
                return False
            try:
                listed = subprocess.run(
                    ["squeue", "--noheader", "--jobs", known["job"]],
                    capture_output=True, text=True, timeout=SQUEUE_SECONDS,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return True
            except OSError as error:
                raise PmoeError(
                    f"squeue cannot be run ({error.strerror}); give the command where Slurm's are"
                ) from None
            # Of an unknown job squeue says so; any other failure (of the network, say) is no end.
            return bool(listed.stdout.strip()) or (
                listed.returncode != 0 and "Invalid job id" not in listed.stderr
            )
        try:
            process = psutil.Process(int(known["job"]))
            own = any("submitit" in word for word in process.cmdline())
            return own and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """["timeout_min=60", "slurm_partition=gpu"] -> values for submitit, whole numbers as such.

    Raises:
      PmoeError: a word without "=", or one that asks for several processes a job.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise PmoeError(
                f"--launcher_options={word} must be NAME=VALUE,..., such as "
                "timeout_min=600,gpus_per_node=1,slurm_partition=gpu"
            )
        if name.removeprefix("slurm_") in ("nodes", "tasks_per_node", "ntasks_per_node", "ntasks"):
            raise PmoeError(
                f"--launcher_options={word}: a job is one process; to train one run with several, "
                "start `srun pmoe train`"
            )
        options[name] = int(value) if value.isdigit() else value
    return options


def _executor(folder: pathlib.Path, launcher: str, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise PmoeError(
            f"--launcher={launcher} needs submitit; pip install 'pmoe_jax[cluster]'"
        ) from None
    try:
        executor = submitit.AutoExecutor(
            folder, cluster=None if launcher == "submitit" else launcher,
            slurm_max_num_timeout=MAX_TIMEOUTS, local_max_num_timeout=MAX_TIMEOUTS,
        )  # fmt: skip
        executor.update_parameters(**{"timeout_min": TIMEOUT_MIN, "name": "pmoe", **options})
    except Exception as error:  # NameError, TypeError, ValueError, RuntimeError: by what is wrong
        raise PmoeError(f"--launcher={launcher}: {' '.join(str(error).split())[:300]}") from None
    return executor
