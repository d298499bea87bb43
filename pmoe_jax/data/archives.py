"""Read-only access to folders and to strangers' tar and zip files.

Nothing is ever extracted: members are read into memory after every name was checked, with limits
on the unpacked size, on the number of members and on what describes them. So an archive can neither
write outside a folder nor fill disk or memory.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import hashlib
import io
import lzma
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from pmoe_jax.errors import PmoeError

#: Members of an archive at most, each of which takes some hundred bytes even if it is empty: GTSRB
#: has 52,000 files.
MEMBERS_LIMIT = 10**6
#: Bytes of a zip file's directory at most; 134 a member of the above.
DIRECTORY_LIMIT = 2**27
#: Bytes of what stands before a tar member at most: long names, lists of holes.
HEADER_LIMIT = 2**18

_CHUNK = 1 << 16
_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7")  # .gz, .bz2, .xz


class Tree:
    """Files by relative name ("a/b.png"), wherever they come from."""

    #: Bytes that the members of an archive unpack to; 0 for a folder, whose files lie on disk.
    unpacked = 0

    def __init__(self, path: str, names: list[str]):
        self.path = path
        self.names = sorted(names)
        self._names = frozenset(names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        """The content of one of `names`."""
        raise NotImplementedError

    def signature(self) -> str:
        """Changes when the files change: SHA-256 over sizes and modification times."""
        raise NotImplementedError


class FolderTree(Tree):
    """A folder with everything below it; links are followed."""

    def __init__(self, path: str, max_bytes: int):
        self._max_bytes = max_bytes
        names: list[str] = []
        above = {path: [os.path.realpath(path)]}  # real paths of a folder and those it lies in
        with readable(path):
            walk = os.walk(path, onerror=_raise, followlinks=True)
            for folders, (folder, below, files) in enumerate(walk):
                parents = above.pop(folder)
                for name in list(below):
                    inner = os.path.join(folder, name)
                    real = os.path.realpath(inner)
                    if real in parents:  # a link back up
                        below.remove(name)
                    else:
                        above[inner] = [*parents, real]
                relative = os.path.relpath(folder, path)
                # Links that lead nowhere (editors' locks) and pipes are no files.
                names += [
                    os.path.normpath(os.path.join(relative, file))
                    for file in files
                    if os.path.isfile(os.path.join(folder, file))
                ]
                if len(names) + folders > MEMBERS_LIMIT:
                    raise PmoeError(f"{path} holds more than {MEMBERS_LIMIT} files and folders")
        super().__init__(path, [name.replace(os.sep, "/") for name in names])

    def read(self, name: str) -> bytes:
        with readable(f"{self.path}/{printable(name)}"):
            full = os.path.join(self.path, *name.split("/"))
            if not os.path.isfile(full):
                raise PmoeError(f"{self.path}: {printable(name)} is not a file")
            if os.path.getsize(full) > self._max_bytes:
                raise PmoeError(_too_large(full, self._max_bytes))
            with open(full, "rb") as file:
                return file.read()

    def signature(self) -> str:
        return file_signature(self.path, self.names)


class ZipTree(Tree):
    """A zip file, read member by member."""

    def __init__(self, path: str, max_bytes: int):
        self._infos: dict[str, zipfile.ZipInfo] = {}
        total = 0
        with readable(path):
            self._zip = open_zip(path)
            for info in self._zip.infolist():
                check_name(info.filename, path)
                if (info.external_attr >> 16) & 0o170000 == 0o120000:
                    raise PmoeError(f"{path}: {printable(info.filename)} is a link; refused")
                if info.flag_bits & 1:
                    raise PmoeError(
                        f"{path}: {printable(info.filename)} is encrypted; unpack it first"
                    )
                check_compression(info, path)
                total += info.file_size
                if not info.is_dir():
                    self._infos[posixpath.normpath(info.filename)] = info
        if total > max_bytes:
            raise PmoeError(_too_large(path, max_bytes))
        super().__init__(path, list(self._infos))
        self.unpacked = total

    def read(self, name: str) -> bytes:
        with readable(f"{self.path}: {printable(name)}"):
            parts = []
            # In pieces: a member that unpacks to more than it declares is cut off early.
            with self._zip.open(self._infos[name]) as member:
                while part := member.read(_CHUNK):
                    parts.append(part)
            return b"".join(parts)

    def signature(self) -> str:
        return file_signature(self.path)


class TarTree(Tree):
    """A tar file (plain, .gz, .bz2, .xz), read once into memory: such files have no index."""

    def __init__(self, path: str, max_bytes: int):
        self._files: dict[str, bytes] = {}
        with readable(path), _decompressed(path) as raw:
            limited = _Limited(raw, path, max_bytes)
            limited.allow(HEADER_LIMIT)
            members = 0
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                while (member := archive.next()) is not None:
                    members += 1
                    if members > MEMBERS_LIMIT:
                        raise PmoeError(_too_many(path))
                    # It would keep a kilobyte of each.
                    archive.members.clear()  # type: ignore[attr-defined]
                    limited.allow(max_bytes)
                    check_name(member.name, path)
                    if member.isdir():
                        limited.allow(HEADER_LIMIT)
                        continue
                    # The holes of a sparse file take no bytes in the archive.
                    if not member.isreg() or member.issparse():
                        raise PmoeError(
                            f"{path}: {printable(member.name)} is a link, device or sparse file; "
                            "only plain files are allowed"
                        )
                    file = archive.extractfile(member)
                    content = file.read() if file is not None else b""
                    if len(content) != member.size:
                        raise PmoeError(f"{path} is cut short at {printable(member.name)}")
                    self._files[posixpath.normpath(member.name)] = content
                    limited.allow(HEADER_LIMIT)
            limited.allow(max_bytes)
            # The checksum of a .gz stands at its end, behind tar's end mark.
            while limited.read(_CHUNK):
                pass
        super().__init__(path, list(self._files))
        self.unpacked = sum(map(len, self._files.values()))

    def read(self, name: str) -> bytes:
        return self._files[name]

    def signature(self) -> str:
        return file_signature(self.path)


class UnionTree(Tree):
    """Several trees seen as one; where two have the same name the first wins."""

    def __init__(self, path: str, trees: list[Tree]):
        self._trees = trees
        self._owner = {name: tree for tree in reversed(trees) for name in tree.names}
        super().__init__(path, list(self._owner))

    def read(self, name: str) -> bytes:
        return self._owner[name].read(name)

    def signature(self) -> str:
        return " ".join(tree.signature() for tree in self._trees)


def open_tree(path: str, max_bytes: int) -> Tree:
    """Opens a folder, zip or tar file.

    Raises:
      PmoeError: nothing there, not an archive, damaged, unsafe member names, or more than
        `max_bytes` when unpacked.
    """
    if os.path.isdir(path):
        return FolderTree(path, max_bytes)
    with readable(path):
        if not os.path.exists(path):
            raise PmoeError(f"{path} does not exist; give a folder or an archive (.tar.gz, .zip)")
        if not os.path.isfile(path):
            raise PmoeError(f"{path} is neither a folder nor a file")
        kind = _archive_kind(path)
    return ZipTree(path, max_bytes) if kind == "zip" else TarTree(path, max_bytes)


def _archive_kind(path: str) -> str:
    """ "zip" or "tar"; refuses what is neither, before a parser speaks of headers."""
    if zipfile.is_zipfile(path):
        return "zip"
    with open(path, "rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if not start:
        raise PmoeError(f"{path} cannot be read: it is empty")
    if start.startswith(b"PK\x03\x04"):
        raise PmoeError(f"{path} cannot be read: a zip file that is cut short or damaged")
    if not start.startswith(_COMPRESSED):
        try:
            tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise PmoeError(
                f"{path} cannot be read: it is neither a folder nor a zip or tar file (.zip, "
                ".tar, .tar.gz, .tar.bz2, .tar.xz)"
            ) from error
    return "tar"


def open_archives(path: str, files: Sequence[str], max_bytes: int) -> Tree:
    """Several archives seen as one; `path` is what they are called together.

    Raises:
      PmoeError: as of `open_tree`; `max_bytes` is for all of them together.
    """
    trees: list[Tree] = []
    for file in files:
        trees.append(open_tree(file, max_bytes))
        if sum(tree.unpacked for tree in trees) > max_bytes:
            raise PmoeError(_too_large(path, max_bytes))
    return UnionTree(path, trees)


def check_name(name: str, where: str) -> None:
    """Raises PmoeError unless `name` is a plain relative path that stays below its root."""
    parts = name.replace("\\", "/").split("/")
    drive = len(name) > 1 and name[1] == ":"
    if not name or name[0] in "/\\" or drive or ".." in parts or "\0" in name:
        raise PmoeError(
            f"{where}: unsafe name {printable(name)!r}; names must be relative and stay inside"
        )


def check_compression(info: zipfile.ZipInfo, where: str) -> None:
    """Raises PmoeError for a member whose unpacked size `zipfile` does not bound: all but stored
    and deflated ones are unpacked whole, whatever size they declare."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise PmoeError(
            f"{where}: {printable(info.filename)} is compressed by method {info.compress_type}; "
            "allowed are stored and deflated files (in an .npz also LZMA): pack it anew"
        )


def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> IO[bytes]:
    """A stored, deflated or LZMA member of a zip, unpacked to no more than it declares.

    Raises:
      PmoeError: another method, or a member that is not what it declares.
    """
    if info.compress_type != zipfile.ZIP_LZMA:
        check_compression(info, where)
        return archive.open(info)
    # `zipfile` unpacks LZMA without a bound, so that it only fetches the bytes here.
    raw = copy.copy(info)
    raw.compress_type, raw.file_size = zipfile.ZIP_STORED, info.compress_size
    del raw.CRC  # of what they unpack to
    with archive.open(raw) as file:
        packed = file.read()
    # Two bytes of version, two the size of what follows: lc, lp, pb in one byte, and dictionary.
    size, mixed, dictionary = struct.unpack("<2xHBI", packed[:9])
    if size != 5 or mixed >= 225:
        raise PmoeError(f"{where}: {printable(info.filename)} is damaged; restore the file")
    settings = {
        "id": lzma.FILTER_LZMA1, "lc": mixed % 9, "lp": mixed // 9 % 5, "pb": mixed // 45,
        # Nothing refers further back than there are bytes, whatever is declared.
        "dict_size": max(4096, min(dictionary, info.file_size)),
    }  # fmt: skip
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[settings])
    content = unpacker.decompress(packed[9:], max_length=info.file_size + 1)
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise PmoeError(f"{where}: {printable(info.filename)} is damaged; restore the file")
    return io.BytesIO(content)


def open_zip(path: str) -> zipfile.ZipFile:
    """A zip file for reading; `zipfile` reads and takes apart its directory as a whole.

    Raises:
      PmoeError: a directory beyond the limits.
    """
    return _BoundedZip(_ZipSource(open(path, "rb", buffering=0), path))


class _ZipSource(io.BufferedReader):
    """The bytes of a zip file; refuses to give a directory beyond the limits."""

    def __init__(self, raw: io.FileIO, path: str):
        super().__init__(raw)
        self._path = path
        #: Whether the directory was read: what follows are members.
        self.opened = False

    def read(self, size: int | None = -1, /) -> bytes:
        if self.opened:
            return super().read(size)
        # The file's end, where the directory is declared, is read without a size.
        size = DIRECTORY_LIMIT if size is None or size < 0 else size
        if size > DIRECTORY_LIMIT:
            raise PmoeError(
                f"{self._path} has a directory larger than the limit of {DIRECTORY_LIMIT} bytes; "
                "unpack it and give the folder if you trust it"
            )
        left = os.fstat(self.fileno()).st_size - self.tell()
        content = super().read(min(size, left))  # It makes room for as much as it is asked for.
        # However many members the directory declares, each begins with this.
        if content.count(b"PK\x01\x02") > MEMBERS_LIMIT:
            raise PmoeError(_too_many(self._path))
        return content


class _BoundedZip(zipfile.ZipFile):
    """Owns its source."""

    def __init__(self, source: _ZipSource):
        self._source = source
        try:
            super().__init__(source)
        except BaseException:
            source.close()
            raise
        source.opened = True

    def close(self) -> None:
        super().close()
        self._source.close()


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turns whatever a damaged file makes its parser raise into one PmoeError.

    For use around the parsing of strangers' bytes only: there every exception means bad input.
    """
    try:
        yield
    except PmoeError:
        raise
    except FileNotFoundError as error:
        missing = what if error.filename is None else printable(str(error.filename), 200)
        raise PmoeError(f"{missing} does not exist; give an existing file or folder") from None
    except Exception as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = printable(" ".join(text.split()), 200) or type(error).__name__
        raise PmoeError(
            f"{what} cannot be read ({text}); it is damaged, incomplete or of another kind"
        ) from error


def printable(text: str, limit: int = 120) -> str:
    """A stranger's text for a message: one line, no control characters, not too long."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= limit else clean[:limit] + "..."


class _Limited(io.RawIOBase):
    """Passes reads on and stops with a PmoeError after `max_bytes`."""

    def __init__(self, raw: io.BufferedIOBase, path: str, max_bytes: int):
        self._raw, self._path, self._left, self._limit = raw, path, max_bytes, max_bytes
        self._allowed = max_bytes

    def allow(self, size: int) -> None:
        """Refuses more than `size` bytes from here on, until it is called again."""
        self._allowed = size

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
            self._allowed -= len(part)
            if self._left < 0:
                raise PmoeError(_too_large(self._path, self._limit))
            if self._allowed < 0:
                raise PmoeError(
                    f"{self._path} has a header larger than the limit of {HEADER_LIMIT} bytes; "
                    "pack it anew"
                )
        return b"".join(parts)


@contextmanager
def _decompressed(path: str) -> Iterator[io.BufferedIOBase]:
    with open(path, "rb") as file:
        magic = file.read(6)
    openers = dict(zip(_COMPRESSED, (gzip.open, bz2.open, lzma.open), strict=True))
    with openers.get(magic[:2], open)(path, "rb") as stream:  # type: ignore[operator]
        yield stream


def file_signature(path: str, names: Sequence[str] = ("",)) -> str:
    """SHA-256 over size and modification time of a file, or of the named files in a folder."""
    digest = hashlib.sha256()
    with readable(path):
        for name in names:
            stat = os.stat(os.path.join(path, name) if name else path)
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


def _too_large(path: str, limit: int) -> str:
    return (
        f"{path} unpacks to more than the limit of {limit} bytes; raise max_bytes or free memory "
        "if you trust it"
    )


def _too_many(path: str) -> str:
    return (
        f"{path} has more than the limit of {MEMBERS_LIMIT} members; unpack it and give the folder "
        "if you trust it"
    )


def _raise(error: OSError) -> None:
    raise error
