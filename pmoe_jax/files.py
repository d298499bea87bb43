"""Files that are whole or not there: written in one move, beside their sums, in locked folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any, Self

from pmoe_jax import config as config_lib
from pmoe_jax import locks, processes
from pmoe_jax.errors import PmoeError

#: Bytes of a file of figures or another result: a million rows have some 200 MB.
LINES_LIMIT = 256 * 2**20


class DiskError(PmoeError):
    """The disk refuses to be written: it is full, over quota or read-only, which may pass."""


class LockedFolder:
    """A folder that one process works in: a context manager that holds its lock.

    Whatever `write_atomically` then writes in it, however deep, is written only as long as the
    folder is the one that was locked. Of several processes that train a run together, the first
    one locks and writes.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._lock: Any = None
        #: What the directory held before this process made the lock's file; None if it was there.
        self._found: set[str] | None = None
        #: Where it was when it was locked: as it was given, in full, and without links.
        self._places: set[pathlib.Path] = set()

    def __enter__(self) -> Self:
        """Takes the lock; the operating system frees it when its owner dies.

        Raises:
          PmoeError: another process works here, or the directory cannot be written.
        """
        self._take_lock()
        return self

    @processes.by_first
    def _take_lock(self) -> None:
        check_still_there(self.path)  # What it lies in: making it anew would write elsewhere.
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            before = set(os.listdir(self.path))
            self._found = None if ".lock" in before else before
            self._lock = locks.take(self.path / ".lock")
        except BlockingIOError:
            raise PmoeError(
                f"{self.path} is in use by another process; wait for it or choose another workdir"
            ) from None
        except (OSError, ValueError) as error:  # A name with a zero byte is a ValueError.
            reason = getattr(error, "strerror", None) or error
            raise PmoeError(
                f"{self.path} cannot be written ({reason}); choose another workdir"
            ) from None
        self._places = {self.path, *_places(self.path)}
        _LOCKED.append(self)

    def __exit__(self, kind: object = None, *unused: object) -> None:
        if self._lock is not None:
            _LOCKED.remove(self)
            if kind is not None and self._found is not None:
                # A folder that was refused stays as it was: without our lock, but with its own.
                with contextlib.suppress(OSError):
                    own = locks.is_held(self._lock, self.path / ".lock")
                    if own and set(os.listdir(self.path)) == self._found | {".lock"}:
                        (self.path / ".lock").unlink()
            self._lock.close()
        self._lock = None

    def check_still_there(self) -> None:
        """Raises if the locked directory was removed or replaced: what is written now would be lost
        or get in another owner's way.

        Raises:
          PmoeError: it was.
        """
        if self._lock is not None and not locks.is_held(self._lock, self.path / ".lock"):
            raise PmoeError(
                f"{self.path} was removed or replaced while it was in use, so that nothing more is "
                "written there; restore it, or start over in another workdir"
            )


#: What this process has locked.
_LOCKED: list[LockedFolder] = []


def check_still_there(path: pathlib.Path) -> None:
    """Raises if a directory that this process locked, and the path lies in, is gone.

    Raises:
      PmoeError: it was removed or replaced.
    """
    parents = {parent for place in _places(path) for parent in place.parents}
    for locked in _LOCKED:
        if locked._places & parents:
            locked.check_still_there()


def _places(path: pathlib.Path) -> set[pathlib.Path]:
    try:
        return {path.absolute(), pathlib.Path(os.path.realpath(path))}
    except FileNotFoundError:  # The current directory is gone.
        return {path}


def write_atomically(path: pathlib.Path, text: str | bytes) -> None:
    """Writes a file in one move: readers see the old or the new content, never a part.

    Raises:
      DiskError: the disk refuses.
      PmoeError: the locked directory that it lies in is gone.
    """
    check_still_there(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_encoded(text))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # A signal, too.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise DiskError(
            f"{path} cannot be written ({error.strerror}); make room or choose another directory"
        ) from None


def remove_leftovers(folder: pathlib.Path, names: Iterable[str] = ()) -> None:
    """Removes what `write_atomically` leaves if it is killed: of these files, where a folder may
    be somebody else's; else of any file."""
    known = "|".join(map(re.escape, names)) or ".+"
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.({known})\.[0-9]+\.tmp", path.name) and path.is_file():
            path.unlink()


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def write_with_sum(path: pathlib.Path, text: str | bytes) -> None:
    """Writes a file in one move, and beside it NAME.sha256, as `sha256sum` has it.

    Raises: as `write_atomically`.
    """
    new = f"{hashlib.sha256(_encoded(text)).hexdigest()}  {path.name}\n"
    # A kill in between finds what the file is then among two sums.
    old = sha256(path) if path.is_file() else _MISSING
    write_atomically(_sum_file(path), f"{new}{old}  {path.name}\n")
    write_atomically(path, text)
    write_atomically(_sum_file(path), new)


def check_sum(path: pathlib.Path) -> None:
    """Compares a file with its NAME.sha256; a file without one passes.

    Raises:
      PmoeError: they differ.
    """
    try:
        lines = config_lib.read_text(_sum_file(path)).splitlines()
    except (OSError, ValueError):
        return
    listed = [line.split(" ")[0] for line in lines[:2]] or [""]
    if _MISSING in listed and not path.exists():
        return
    problems = [oversized(path, LINES_LIMIT) or damage_of(path, digest) for digest in listed]
    if all(problems):
        raise PmoeError(
            f"{problems[0]} in {_sum_file(path).name}; restore it, or remove both to have it made "
            "anew"
        )


#: Stands for the sum of a file that does not exist yet.
_MISSING = "missing"


def _sum_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.sha256")


def oversized(path: pathlib.Path, limit: int) -> str | None:
    """What is wrong with the size or kind of a file.

    Looked at before a file is read: a file with a hole can claim any size, and a pipe or a link
    to /dev/zero has no end."""
    if path.exists() and not path.is_file():
        return f"{path} is no regular file"
    if path.is_file() and path.stat().st_size > limit:
        return f"{path} is larger than the limit of {limit} bytes"
    return None


def damage_of(path: pathlib.Path, digest: str) -> str | None:
    """What is wrong with a file that should have this SHA-256 sum."""
    if not path.is_file():
        return f"{path} is missing"
    return None if sha256(path) == digest else f"{path} does not match its SHA-256 sum"


def sha256(path: pathlib.Path, size: int | None = None) -> str:
    """The sum of a file, or of its first `size` bytes, which are not read at once."""
    with open(path, "rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while size > 0 and (part := file.read(min(size, 2**20))):
            digest.update(part)
            size -= len(part)
        return digest.hexdigest()


def sum_of_object(known: dict[str, Any]) -> str:
    """SHA-256 of a JSON object that bears it as its entry "sha256", which is left out."""
    own = {name: fact for name, fact in known.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
