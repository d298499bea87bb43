"""Several processes, on one or many hosts, that train one run together.

All of them run the same command on the same files; JAX sees the devices of all. Each computes what
lies on its own devices, and writes its share of a checkpoint (orbax). Everything else is written by
the first process alone, while the others wait for it (`by_first`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pmoe_jax.errors import PmoeError

#: Seconds after which a process that gives no sign of life counts as dead, and all others end.
HEARTBEAT_SECONDS = 30
#: Seconds that a process waits for the others to start.
START_SECONDS = 300
#: Exit code of a process that ends because another one is gone.
OTHER_IS_GONE = 76

#: How an error of JAX begins that a process which is gone leaves to the others.
_CODES = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED")
#: With these begin many others, too; what the error is about tells them apart.
_WIDE_CODES = ("UNKNOWN", "INTERNAL")
_ABOUT_OTHERS = ("gloo", "nccl", "connection", "heartbeat", "coordination", "barrier")
_MESSAGE_BYTES = 2048
_writing = False
_on_this_host = 1


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Joins the other processes of a run, if there are any.

    Without arguments they are found through Slurm (`srun`) or Open MPI up to 4 (`mpirun`). Among
    several, an error within the context ends this process at once with one line on stderr: whoever
    waited for the others to end in order would wait for a process that may be stuck. Without an
    error the context ends when all processes have come to its end.

    Raises:
      PmoeError: incomplete or contradicting arguments, or the others cannot be reached.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None,) * 3 and _launched() < 2:
        yield
        return
    _connect(*given)
    try:
        _count_on_this_host()
        yield
    except SystemExit:
        raise
    except BaseException as error:
        sys.stdout.flush()
        text, code = _last_words(error)
        print(f"pmoe: {text}", file=sys.stderr, flush=True)
        os._exit(code)
    # The first one serves all: were it to leave before them, they would end as if it had died.
    with contextlib.suppress(RuntimeError):  # One died now: all is written, nothing is lost.
        jax.distributed.shutdown()


def several() -> bool:
    """Whether other processes take part."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes tables, figures and locks."""
    return not several() or jax.process_index() == 0


def say(text: str) -> None:
    """A line on stderr, once for all processes."""
    if is_first():
        print(text, file=sys.stderr)


def on_this_host() -> int:
    """How many processes of the run, this one included, share the memory of its host."""
    return _on_this_host


def peer_is_gone(error: BaseException) -> bool:
    """Whether an error most likely says that another process does not answer any more.

    JAX raises it from collectives as a ValueError, from programs as a JaxRuntimeError.
    """
    if not several() or not isinstance(error, ValueError | RuntimeError):
        return False
    text = str(error).strip()
    of_the_disk = "OS error" in text or "tensorstore" in text
    about_others = any(word in text.lower() for word in _ABOUT_OTHERS)
    by_code = text.startswith(_CODES) or (text.startswith(_WIDE_CODES) and about_others)
    return not of_the_disk and ("Gloo" in text or by_code)


def by_first(function: Callable[..., None]) -> Callable[..., None]:
    """Of several processes only the first calls the function; the others wait until it is done.

    The function writes, and returns nothing. All raise the `PmoeError` that it raises in the first.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> None:
        global _writing
        if not several() or _writing:  # A function of this kind within another one.
            function(*args, **kwargs)
            return
        problem = ""
        if is_first():
            _writing = True
            try:
                function(*args, **kwargs)
            except PmoeError as error:
                problem = str(error)
            finally:
                _writing = False
        problem = _said_by_first(problem)
        if problem:
            raise PmoeError(problem)

    return called


def same(text: str) -> bool:
    """Whether all processes have the same text."""
    if not several():
        return True
    everybody = _sums_of_all(text)
    return bool((everybody == everybody[0]).all())


def check_same(what: str, text: str) -> None:
    """Compares a text over all processes.

    Raises:
      PmoeError: (in all of them) it differs.
    """
    if not same(text):
        raise PmoeError(f"the processes of this run have different {what}; start all of them alike")


def of_first(numbers: Sequence[int]) -> list[int]:
    """The numbers (of 31 bits) that the first process has, in all of them."""
    if not several():
        return list(numbers)
    count = multihost_utils.broadcast_one_to_all(np.asarray(len(numbers), np.int32))
    if not count:
        return []
    own = np.asarray(numbers if is_first() else [0] * int(count), np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tolist()


def all_agree(answer: bool) -> bool:
    """Whether all processes answer yes, for choices that each would make by its own memory."""
    if not several():
        return answer
    return bool(multihost_utils.process_allgather(np.asarray(answer)).all())


def stop_asked(step: int) -> str:
    """The signal that asked one of several processes to stop, once all of them reached a step.

    To be called with every step. The steps after which it answers are the same in all processes.
    """
    if several() and multihost_utils.reached_preemption_sync_point(step):
        return "SIGTERM"
    return ""


def _launched() -> int:
    """How many processes srun or mpirun started together with this one."""
    # Not SLURM_NTASKS: that is also set in a batch script, which runs once.
    in_step = "SLURM_STEP_NODELIST" in os.environ
    slurm = os.environ.get("SLURM_STEP_NUM_TASKS", "1") if in_step else "1"
    return max(int(slurm), int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None,) * 3:
        raise PmoeError(
            "--coordinator, --num_processes and --process_id belong together; give all three, or "
            "none under Slurm (srun) and Open MPI up to 4 (mpirun)"
        )
    if num_processes is not None and process_id is not None:
        if num_processes < 1:
            raise PmoeError(f"--num_processes={num_processes} must be 1 or more")
        if not 0 <= process_id < num_processes:
            raise PmoeError(
                f"--process_id={process_id} is out of range; {num_processes} processes have 0 to "
                f"{num_processes - 1}"
            )
        port = (coordinator or "").rpartition(":")[2]
        if not (port.isdigit() and 0 < int(port) < 2**16):
            raise PmoeError(
                f"--coordinator={coordinator} must be HOST:PORT, such as node1:1234, with a port "
                "from 1 to 65535"
            )
        if process_id == 0:
            _check_port(int(port))
        print(
            f"process {process_id} of {num_processes} looks for the others at {coordinator}, for "
            f"up to {START_SECONDS} s",
            file=sys.stderr,
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, local_device_ids=_own_devices(),
            initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        hint = "check that all were started and that --coordinator names the first one's host and "
        if coordinator is None and "OMPI_COMM_WORLD_SIZE" in os.environ:
            hint = "with Open MPI 5 give --coordinator, --num_processes and --process_id; " + hint
        raise PmoeError(
            f"the other processes cannot be reached ({_first_line(error)}); {hint}a free port"
        ) from None


def _check_port(port: int) -> None:
    """Refuses a port of this host that is taken: JAX would crash, or wait for nothing."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            raise PmoeError(
                f"port {port} of this host cannot be served ({error.strerror}); give another free "
                "one, and each process a --process_id of its own"
            ) from None


def _own_devices() -> list[int] | None:
    """What JAX is told of the GPUs of this process: [] all that it sees, None JAX's choice.

    Under Slurm and Open MPI JAX takes the GPU whose number is that of the process on its host. With
    one process a host that leaves the others idle; where each sees a single GPU, it does not exist.
    """
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    step = [os.environ.get(f"SLURM_STEP_NUM_{what}") for what in ("TASKS", "NODES")]
    one_a_host = None not in step and step[0] == step[1]
    one_a_host |= os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [] if one_a_host or (seen and "," not in seen) else None


def _count_on_this_host() -> None:
    global _on_this_host
    hosts = _sums_of_all(socket.gethostname())
    _on_this_host = int((hosts == hosts[jax.process_index()]).all(axis=1).sum())


def _sums_of_all(text: str) -> np.ndarray:
    """Sums of what each process has: uint32 [processes, 8]."""
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    return multihost_utils.process_allgather(own)


def _last_words(error: BaseException) -> tuple[str, int]:
    which = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, PmoeError):
        return f"{which}: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return f"{which}: interrupted", 130
    if peer_is_gone(error):
        return (
            f"{which} cannot go on, most likely because another one is gone "
            f"({_first_line(error)}); run the same commands again, they go on from the last whole "
            "checkpoint"
        ), OTHER_IS_GONE
    traceback.print_exception(error)
    return f"{which} failed: {type(error).__name__}", 1


def _said_by_first(text: str) -> str:
    """The text of the first process, in all of them."""
    # Whole characters only, so that it can be read again.
    encoded = text.encode()[:_MESSAGE_BYTES].decode(errors="ignore").encode()
    buffer = np.zeros(_MESSAGE_BYTES, np.uint8)
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    said = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8)
    return said.tobytes().rstrip(b"\0").decode()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
