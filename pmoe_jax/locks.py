"""Locked files: one owner at a time, and none once its process is dead."""

from __future__ import annotations

import fcntl
import os
from typing import IO


def take(path: str | os.PathLike[str]) -> IO[str]:
    """Opens and locks a file, which is made if need be; closing it frees the lock.

    Raises:
      BlockingIOError: another process has it.
      OSError: the file cannot be made.
    """
    # Whatever else bears the name: a link is not followed, a pipe does not stop us.
    way = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        file = open(os.open(path, way, 0o666), "a")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        if is_held(file, path):
            return file
        file.close()


def is_held(file: IO[str], path: str | os.PathLike[str]) -> bool:
    """Whether the file that was locked is the one that others find: its last owner may have removed
    it after it was opened."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(os.fstat(file.fileno()), found)
