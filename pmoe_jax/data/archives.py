"""Read-only access to folders and to strangers' tar and zip files.

Nothing is ever extracted: members are read into memory, after every name was checked and with a
limit on the unpacked size, so an archive can neither write outside a folder nor fill the disk.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from pmoe_jax.errors import PmoeError

_BROKEN = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError),
    *(MemoryError, OverflowError, RuntimeError, NotImplementedError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
_CHUNK = 1 << 16


class Tree:
    """Files by relative name ("a/b.png"), wherever they come from."""

    def __init__(self, path: str, names: list[str]):
        self.path = path
        self.names = sorted(names)

    def read(self, name: str) -> bytes:
        raise NotImplementedError


class FolderTree(Tree):
    """A folder. `names` lists files below it; links are followed only inside the folder."""

    def __init__(self, path: str, max_bytes: int):
        self._max_bytes = max_bytes
        names = []
        with _readable(path):
            for folder, _, files in os.walk(path, onerror=_raise):
                below = os.path.relpath(folder, path)
                names += [os.path.normpath(os.path.join(below, file)) for file in files]
        super().__init__(path, [name.replace(os.sep, "/") for name in names])
        self._root = os.path.realpath(path)

    def read(self, name: str) -> bytes:
        check_name(name, self.path)
        full = os.path.realpath(os.path.join(self._root, *name.split("/")))
        if os.path.commonpath([full, self._root]) != self._root:
            raise PmoeError(f"{self.path}: {name} is a link that leaves the folder; copy the file")
        with _readable(f"{self.path}/{name}"):
            if os.path.getsize(full) > self._max_bytes:
                raise PmoeError(_too_large(full, self._max_bytes))
            with open(full, "rb") as file:
                return file.read()


class ZipTree(Tree):
    """A zip file, read member by member."""

    def __init__(self, path: str, max_bytes: int):
        with _readable(path):
            self._zip = zipfile.ZipFile(path)
            self._infos = {}
            total = 0
            for info in self._zip.infolist():
                check_name(info.filename, path)
                if (info.external_attr >> 16) & 0o170000 == 0o120000:
                    raise PmoeError(f"{path}: {info.filename} is a link; links are not allowed")
                if info.flag_bits & 1:
                    raise PmoeError(f"{path}: {info.filename} is encrypted; unpack it first")
                total += info.file_size
                if not info.is_dir():
                    self._infos[posixpath.normpath(info.filename)] = info
        if total > max_bytes:
            raise PmoeError(_too_large(path, max_bytes))
        super().__init__(path, list(self._infos))

    def read(self, name: str) -> bytes:
        with _readable(f"{self.path}: {name}"):
            parts = []
            # In pieces: a member that unpacks to more than it declares is cut off early.
            with self._zip.open(self._infos[name]) as member:
                while part := member.read(_CHUNK):
                    parts.append(part)
            return b"".join(parts)


class TarTree(Tree):
    """A tar file (plain, .gz, .bz2, .xz), read once into memory: such files have no index."""

    def __init__(self, path: str, max_bytes: int):
        self._files: dict[str, bytes] = {}
        with _readable(path), _decompressed(path) as raw:
            limited = _Limited(raw, path, max_bytes)
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in archive:
                    check_name(member.name, path)
                    if member.isdir():
                        continue
                    if not member.isreg():
                        raise PmoeError(
                            f"{path}: {member.name} is a link or device; only files are allowed"
                        )
                    file = archive.extractfile(member)
                    content = file.read() if file is not None else b""
                    if len(content) != member.size:
                        raise PmoeError(f"{path} is truncated at {member.name}; download it again")
                    self._files[posixpath.normpath(member.name)] = content
            # The checksum of a .gz stands at its end, behind tar's end mark.
            while limited.read(_CHUNK):
                pass
        super().__init__(path, list(self._files))

    def read(self, name: str) -> bytes:
        return self._files[name]


def open_tree(path: str, max_bytes: int) -> Tree:
    """Opens a folder, zip or tar file.

    Raises:
      PmoeError: nothing there, not an archive, damaged, unsafe member names, or more than
        `max_bytes` when unpacked.
    """
    if os.path.isdir(path):
        return FolderTree(path, max_bytes)
    if not os.path.exists(path):
        raise PmoeError(f"{path} does not exist; give a folder or an archive (.tar.gz, .zip)")
    with _readable(path):
        is_zip = zipfile.is_zipfile(path)
    return ZipTree(path, max_bytes) if is_zip else TarTree(path, max_bytes)


def check_name(name: str, where: str) -> None:
    """Raises PmoeError unless `name` is a plain relative path that stays below its root."""
    parts = name.replace("\\", "/").split("/")
    drive = len(name) > 1 and name[1] == ":"
    if not name or name[0] in "/\\" or drive or ".." in parts or "\0" in name:
        raise PmoeError(
            f"{where}: unsafe name {name[:120]!r}; names must be relative and stay in the folder"
        )


class _Limited(io.RawIOBase):
    """Passes reads on and stops with a PmoeError after `max_bytes`."""

    def __init__(self, raw: io.BufferedIOBase, path: str, max_bytes: int):
        self._raw, self._path, self._left, self._limit = raw, path, max_bytes, max_bytes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._left:
            size = self._left + 1
        # Compressed streams may return less than asked for; tarfile expects full reads.
        parts = []
        while size > 0 and (part := self._raw.read(min(size, 1 << 20))):
            parts.append(part)
            size -= len(part)
            self._left -= len(part)
            if self._left < 0:
                raise PmoeError(_too_large(self._path, self._limit))
        return b"".join(parts)


@contextmanager
def _decompressed(path: str) -> Iterator[io.BufferedIOBase]:
    with open(path, "rb") as file:
        magic = file.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    with openers.get(magic[:2], open)(path, "rb") as stream:  # type: ignore[operator]
        yield stream


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turns whatever a damaged file makes the readers raise into one PmoeError."""
    try:
        yield
    except PmoeError:
        raise
    except _BROKEN as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise PmoeError(
            f"{what} cannot be read ({text}); it is damaged, incomplete or not an archive"
        ) from error


def _too_large(path: str, limit: int) -> str:
    return (
        f"{path} unpacks to more than the limit of {limit} bytes; raise max_bytes if you trust it"
    )


def _raise(error: OSError) -> None:
    raise error
