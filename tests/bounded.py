"""Commands that end within a bound, and leave no process behind that holds a pipe open."""

import contextlib
import os
import signal
import subprocess


@contextlib.contextmanager
def started(words, **options):
    """A process in a session of its own, its output in pipes, as text; in the end see `end`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, start_new_session=True, **{**pipes, **options})
    try:
        yield process
    finally:
        end(process)


def end(process):
    """Kills all processes of a session; stdout and stderr of the first one.

    Whoever kills only that one may wait for the end of its output as long as its children live
    (submitit's jobs, say).
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate(timeout=30)


def run(words, seconds, **options):
    """As `subprocess.run` with its output captured as text."""
    with started(words, **options) as process:
        out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
