"""CIFAR-10 from the official archives (Krizhevsky 2009): python or binary batches."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
from functools import partial
from typing import Any

import numpy as np

from pmoe_jax.data.archives import Tree, open_tree, printable
from pmoe_jax.data.records import Origin, Record
from pmoe_jax.errors import PmoeError

CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
#: Published images per class.
OFFICIAL_COUNTS: dict[str, tuple[int, ...]] = {"train": (5000,) * 10, "test": (1000,) * 10}
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_PIXELS = 3 * 32 * 32
_BATCH_FILES = r"(data_batch_[1-5]|test_batch)(\.bin)?|batches\.meta(\.txt)?"


def read(
    source: str, max_bytes: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], Origin]:
    """(images, labels) of train and test in the official order, and where they come from.

    Args:
      source: folder or archive (`.tar.gz`) with the six python or binary batches.

    Raises:
      PmoeError: batches missing, damaged, or with anything in them but arrays and names.
    """
    if os.path.isfile(source) and re.fullmatch(_BATCH_FILES, os.path.basename(source)):
        folder = os.path.dirname(source) or "."
        raise PmoeError(
            f"{source} is one of the files of CIFAR-10; give the folder that holds all of its "
            f"batches, {folder}"
        )
    tree = open_tree(source, max_bytes)
    reader, train, test = _find_batches(tree)
    batches = []
    for name in (*train, test):
        what = f"{source}: {printable(name)}"
        batches.append(reader(tree.read(name), what))
        labels = batches[-1][1]
        bad = np.flatnonzero((labels < 0) | (labels >= len(CLASS_NAMES)))
        if bad.size:
            raise PmoeError(
                f"{what}: label {labels[bad[0]]} of image {bad[0]} is out of range; allowed are "
                "0 to 9"
            )
    images = np.concatenate([images for images, _ in batches[:-1]])
    labels = np.concatenate([labels for _, labels in batches[:-1]])
    kind = "binary batches" if test.endswith(".bin") else "python batches"
    return (images, labels), batches[-1], Origin(kind, tree.signature())


def records(split: str, images: np.ndarray, labels: np.ndarray) -> list[Record]:
    """The images one by one, named as TFDS names them."""
    return [
        Record(
            name=f"{split}_{index:05d}",
            label=int(label),
            read=partial(images.__getitem__, index),
            where=f"{split} image {index}",
        )
        for index, label in enumerate(labels)
    ]


def download(folder: str) -> str:
    """Fetches the official binary archive through TFDS, which verifies its SHA-256."""
    import tensorflow_datasets as tfds

    try:
        url_infos = tfds.builder_cls("cifar10").url_infos
        manager = tfds.download.DownloadManager(
            download_dir=folder,
            url_infos=url_infos,
            dataset_name="cifar10",
            force_checksums_validation=True,
        )
        return os.fspath(manager.download(next(iter(url_infos))))
    except Exception as error:  # network, disk or checksum, in the types of several libraries
        text = printable(" ".join(str(error).split())) or type(error).__name__
        raise PmoeError(
            f"CIFAR-10 could not be downloaded ({text}); fetch cifar-10-binary.tar.gz or "
            "cifar-10-python.tar.gz yourself and give it as the source"
        ) from error


def _find_batches(tree: Tree) -> tuple[Any, list[str], str]:
    for suffix, reader in (("", _read_python), (".bin", _read_binary)):
        for name in tree.names:
            if os.path.basename(name) != f"test_batch{suffix}":
                continue
            prefix = name[: -len(f"test_batch{suffix}")]
            train = [f"{prefix}{batch}{suffix}" for batch in TRAIN_BATCHES]
            missing = [printable(name) for name in train if name not in tree]
            if missing:
                raise PmoeError(f"{tree.path} lacks {', '.join(missing)}; all 6 batches are needed")
            return reader, train, name
    raise PmoeError(
        f"{tree.path} holds no CIFAR-10; expected data_batch_1..5 and test_batch (python version) "
        "or the same names ending in .bin (binary version)"
    )


def _read_binary(content: bytes, what: str) -> tuple[np.ndarray, np.ndarray]:
    # A row is 1 label byte and 3,072 pixels: all red, then green, then blue, row-major.
    if not content or len(content) % (1 + _PIXELS):
        raise PmoeError(
            f"{what} has {len(content)} bytes, not a multiple of 3073; it is cut short or not a "
            "CIFAR-10 batch"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return _to_images(rows[:, 1:]), rows[:, 0].astype(np.int32)


def _read_python(content: bytes, what: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _restricted_load(content)
        # Keys are bytes or text, depending on the Python that wrote the file.
        batch = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
        pixels = batch["data"].to_numpy()
        labels = np.asarray([int(label) for label in batch["labels"]], np.int32)
        if pixels.ndim != 2 or pixels.shape != (len(labels), _PIXELS):
            raise ValueError(f"data {pixels.shape} does not fit {len(labels)} labels")
    except _Forbidden as error:
        raise PmoeError(f"{what} is refused: {error}; use the official file") from error
    except Exception as error:  # whatever a damaged pickle leads to
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise PmoeError(f"{what} is not a CIFAR-10 batch ({text}); download it again") from error
    return _to_images(pixels), labels


def _to_images(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _Forbidden(Exception):
    """The pickle asks for something that the official files do not contain."""


class _DtypeStub:
    """Stands in for numpy.dtype: keeps the name, ignores the rest."""

    def __init__(self, name: bytes | str, *_: object):
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        pass


class _ArrayStub:
    """Stands in for numpy.ndarray, so that the pickle never drives numpy itself."""

    def __init__(self, *_: object):
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        _, shape, dtype, fortran, content = self.state
        if dtype.name not in ("u1", "|u1") or not isinstance(content, bytes):
            raise ValueError("the data are not uint8")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _encode_stub(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Forbidden(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


# Python 3 spells the same content with numpy._core and _codecs.encode.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _ArrayStub,
    ("numpy._core.multiarray", "_reconstruct"): _ArrayStub,
    ("numpy", "ndarray"): _ArrayStub,
    ("numpy", "dtype"): _DtypeStub,
    ("_codecs", "encode"): _encode_stub,
}
_FORBIDDEN_OPCODES = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"} | {
    *("PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"),
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Forbidden(f"it wants to run {printable(f'{module}.{name}')}")
        return _ALLOWED[module, name]


def _restricted_load(content: bytes) -> dict[Any, Any]:
    # The scan executes nothing. It bounds what could exhaust memory or the C stack before
    # find_class is ever asked: lengths (genops checks them), memo slots, nested tuples.
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _FORBIDDEN_OPCODES:
            raise _Forbidden(f"it contains the pickle opcode {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise _Forbidden("its memo is larger than the file")
        tuples += opcode.name.startswith("TUPLE")
        if tuples > 32:
            raise _Forbidden("it nests tuples")
    batch = _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(batch, dict):
        raise ValueError("not a dictionary")
    return batch
