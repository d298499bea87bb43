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
from pmoe_jax.files import check_still_there, write_atomically
from pmoe_jax.grid import Manifest

#: "submitit" takes Slurm where there is one, else processes on this machine.
LAUNCHERS = ("submitit", "slurm", "local")
#: Unless asked otherwise; submitit's own default is some minutes.
TIMEOUT_MIN = 24 * 60
#: How often a job may run out of time and be queued again.
MAX_TIMEOUTS = 1000
POLL_SECONDS = 2.0
#: How long Slurm may take to say which jobs are there; if it says nothing, all count as there.
SQUEUE_SECONDS = 60


class Training:
    """The work of one job: trains a program, or goes on with it."""

    def __init__(self, folder: str, name: str):
        self.folder, self.name = folder, name

    def __call__(self) -> None:
        """Trains until the program is finished, or the job is asked to make room.

        Then it pairs the program with its baselines, if they are trained by now.
        """
        from pmoe_jax import inputs, sweep
        from pmoe_jax import run as run_lib

        folder = pathlib.Path(self.folder)
        manifest = Manifest.read(folder / "sweep.json")
        index = [program.name for program in manifest.programs].index(self.name)
        program = manifest.programs[index]
        launch.prepare(program.config.model.dtype)
        requeue = _save_before_requeue()
        try:
            dataset = inputs.load_data(program.config)
            run_lib.train(
                program.config, folder / "runs" / self.name, members=program.members,
                dataset=dataset, progress=False,
            )  # fmt: skip
            sweep.pair_if_ready(manifest, index, folder, dataset)
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

    def queue_again(number: int, frame: Any) -> None:
        try:
            handlers[number](number, frame)
        except subprocess.SubprocessError:
            # Slurm does it by itself, and refuses to do it twice; or it gives no answer. Were the
            # error to become the job's result, the job would count as done.
            sys.exit(1)

    def stop_training(number: int, frame: Any) -> None:
        if signal.getsignal(signal.SIGTERM) == terminate:  # Training has not begun.
            queue_again(number, frame)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        handler: Any = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
            signal.signal(number, stop_training)

    def requeue() -> None:
        for number in handlers:
            queue_again(number, None)

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
          most: jobs at a time; 0: all that the cluster runs, one where submitit finds none.

        Raises:
          PmoeError: submitit is not installed, or refuses the options.
        """
        self._folder = folder.resolve() / "jobs"
        self._folder.mkdir(exist_ok=True)
        self._executor = _executor(self._folder, launcher, options)
        #: The job of each program, but for those that are known to have ended.
        self._jobs = {
            path.stem: self._known(path.stem) for path in sorted(self._folder.glob("*.json"))
        }
        alive = self._alive()
        self._waiting = [name for name in names if name not in alive]
        # Without a cluster, submitit starts processes on this machine, all at once if it may.
        alone = launcher == "submitit" and self._executor.cluster == "local"
        self._most = most or (1 if alone else len(alive) + len(names))
        self._fill(alive)

    def wait(self, name: str, poll: Callable[[], None] = lambda: None) -> None:
        """Returns when the job of a program has ended; calls `poll` now and then until it has."""
        while name in self._waiting or name in self._jobs:
            alive = self._alive()
            self._fill(alive)
            if name in alive or name in self._waiting:
                poll()
                time.sleep(POLL_SECONDS)

    def raise_reason(self, name: str) -> None:
        """To be called when the job of a program has ended before the program was trained.

        Raises:
          PmoeError: it failed for a reason that it could name.
        """
        problem = self._folder / f"{name}.error"
        if problem.exists():
            raise PmoeError(f"the job of {name} failed: {problem.read_text().strip()}")

    def logs(self, name: str) -> str:
        """Where the job of a program writes its output."""
        return f"{self._folder}/{self._known(name).get('job', '*')}_*"

    def _fill(self, alive: set[str]) -> None:
        """Submits what waits, as far as there is room beside the jobs that are `alive`."""
        while self._waiting and len(alive) < self._most:
            check_still_there(self._folder)
            name = self._waiting.pop(0)
            (self._folder / f"{name}.error").unlink(missing_ok=True)
            work = Training(str(self._folder.parent), name)
            try:
                job = self._executor.submit(work)
            except Exception as error:  # submitit's, sbatch's and the operating system's
                raise PmoeError(f"the job of {name} cannot be submitted ({error})") from None
            known = {"launcher": self._executor.cluster, "job": str(job.job_id)}
            write_atomically(self._folder / f"{name}.json", json.dumps(known) + "\n")
            self._jobs[name] = known
            alive.add(name)
            print(f"submitted {name}: {known['launcher']} job {known['job']}", file=sys.stderr)

    def _known(self, name: str) -> dict[str, str]:
        try:
            known = json.loads((self._folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return {}
        fine = isinstance(known, dict) and str(known.get("job", "")).isdigit()
        return known if fine else {}

    def _alive(self) -> set[str]:
        """The programs whose jobs are queued or running; Slurm is asked once for all of them."""
        # A finished job leaves its result before Slurm forgets it.
        results = self._folder.glob("*_result.pkl")
        done = {path.name.partition("_")[0] for path in results}
        numbers = [
            known["job"]
            for known in self._jobs.values()
            if known.get("launcher") == "slurm" and known["job"] not in done
        ]
        queued = _queued(numbers)
        for name, known in list(self._jobs.items()):
            on_slurm = known.get("launcher") == "slurm"
            if not (known.get("job") in queued if on_slurm else _is_process(known.get("job"))):
                del self._jobs[name]
        return set(self._jobs)


def _queued(numbers: Sequence[str]) -> set[str]:
    """Those of some jobs' numbers that Slurm does not say have ended."""
    if not numbers:
        return set()
    try:
        listed = subprocess.run(
            ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(numbers)}"],
            capture_output=True, text=True, timeout=SQUEUE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return set(numbers)
    except OSError as error:
        raise PmoeError(
            f"squeue cannot be run ({error.strerror}); give the command where Slurm's are"
        ) from None
    if listed.returncode == 0:
        return {line.split()[0] for line in listed.stdout.splitlines() if line.strip()}
    if "Invalid job id" not in listed.stderr:  # A failure of the network, say: no end of theirs.
        return set(numbers)
    # Slurm has forgotten it, or one of them.
    return set().union(*(_queued([number]) for number in numbers)) if numbers[1:] else set()


def _is_process(number: str | None) -> bool:
    """Whether a job of submitit on this machine still runs."""
    try:
        process = psutil.Process(int(number or -1))
        own = any("submitit" in word for word in process.cmdline())
        return own and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
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
        several = ("nodes", "tasks_per_node", "ntasks_per_node", "ntasks")
        if name.removeprefix("slurm_") in several and value != "1":
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
