"""CIFAR-10 and GTSRB as TensorFlow Datasets folders: written once, read without TensorFlow.

`write` makes `DATA_DIR/NAME/VERSION/` of array_record shards with the metadata that
`tfds.load` and `tfds.data_source` expect. It works in a hidden folder beside it that is renamed
at the very end; a run that was interrupted goes on after the last complete shard.
`read` takes folders written by this module, by `tfds build` or by TFDS itself (array_record or
tfrecord), with feature specifications of its own: nothing a folder says is imported or run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from pmoe_jax import config as config_lib
from pmoe_jax import locks
from pmoe_jax.data import cifar10, gtsrb
from pmoe_jax.data.archives import printable, readable
from pmoe_jax.data.records import CorruptImage, Origin, Record, decode
from pmoe_jax.errors import PmoeError

#: TFDS's own version of CIFAR-10, whose features are used as they are, and that of our builder.
VERSIONS = {"cifar10": "3.0.2", "gtsrb": "1.0.0"}
SHARD_RECORDS = 4096
_CHECKSUMS = "checksums.sha256"
#: What the data set was prepared from, and with which options.
_ORIGIN = "origin.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be prepared.

    Attributes:
      splits: the records of train and test.
      origin, source: where they come from; `origin.signature` changes when the source changes, and
        an interrupted run is only continued for an unchanged source.
      skip_corrupt: leave out images that cannot be decoded, and say how many.
    """

    name: str
    splits: Mapping[str, Sequence[Record]]
    origin: Origin
    source: str
    skip_corrupt: bool
    max_bytes: int

    def signature(self) -> str:
        """Changes when files, labels, boxes or options change; quick, as no picture is read."""
        rows = [(r.name, r.label, r.box, r.size) for part in self.splits.values() for r in part]
        digest = hashlib.sha256(repr((SHARD_RECORDS, self.skip_corrupt, rows)).encode())
        return f"{self.origin.signature} {digest.hexdigest()}"

    def content(self) -> str:
        """SHA-256 over all records with their pictures, wherever the files lie."""
        shards = _shards(self.name, self.splits)
        return _joined(_joined(map(_digest_of, part)) for _, part in shards)


def default_data_dir() -> str:
    """$TFDS_DATA_DIR, or ~/tensorflow_datasets as TFDS has it."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")


def features(name: str) -> Any:
    """The `tfds.features.FeaturesDict` of a data set.

    GTSRB: image at the size of the source; box (x1, y1, x2, y2) in pixels of the original image,
    zeros if unknown; size (width, height) of the original image; the id of a training image is
    `CCCCC/TTTTT_FFFFF`, class, track and frame.
    """
    import tensorflow_datasets as tfds

    if name == "cifar10":
        return tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(names=list(cifar10.CLASS_NAMES)),
            }
        )
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(gtsrb.CLASS_NAMES)),
            "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
            "size": tfds.features.Tensor(shape=(2,), dtype=np.int32),
        }
    )


def example(name: str, record: Record, max_bytes: int) -> dict[str, Any]:
    """What TFDS stores of a record; the picture is decoded once, so damaged ones are found."""
    pixels = decode(record, max_bytes)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    fields = {"id": record.name, "image": content.getvalue(), "label": record.label}
    if name == "gtsrb":
        fields["box"] = np.array(record.box or (0, 0, 0, 0), np.int32)
        height, width = pixels.shape[:2]
        fields["size"] = np.array(record.size or (width, height), np.int32)
    return fields


def write(job: Job, data_dir: str, *, overwrite: bool = False) -> str:
    """Writes the data set and returns its folder; one that is there already stays.

    Args:
      overwrite: replace one that is there already, once the new one is whole.

    Raises:
      PmoeError: no space, no permission, a damaged image, another process at work, or a data set
        from another source that is there already. Whatever was in `data_dir` before stays as it
        was.
    """
    name, splits = job.name, job.splits
    for split, records in splits.items():
        if not records:
            raise PmoeError(f"{name}: the {split} split is empty; at least one image is needed")
    signature = job.signature()
    final = os.path.join(data_dir, name, VERSIONS[name])
    partial_dir = os.path.join(data_dir, name, f".{VERSIONS[name]}.partial")
    aside = os.path.join(data_dir, name, f".{VERSIONS[name]}.replaced")
    with _writable(final), _locked(partial_dir + ".lock"):
        if os.path.exists(aside) and not os.path.exists(final):
            os.rename(aside, final)  # stopped between the two renames below
        if os.path.exists(os.path.join(final, "dataset_info.json")):
            if not overwrite:
                check_same(job, final)
                return final
        elif os.path.exists(final):
            raise PmoeError(f"{final} exists but is no TFDS data set; move it away first")
        os.makedirs(partial_dir, exist_ok=True)
        done = _resume(partial_dir, signature, dict(_shards(name, splits)))
        left = [r for file, part in _shards(name, splits) if file not in done for r in part]
        _check_space(left, partial_dir)
        _write_shards(job, {"signature": signature, "shards": done}, partial_dir)
        skipped = sum(entry["skipped"] for entry in done.values())
        if skipped:
            print(f"note: {name}: skipped {skipped} corrupt images", file=sys.stderr)
        _finish(job, signature, partial_dir, done)
        if os.path.exists(final):
            os.rename(final, aside)
        try:
            os.rename(partial_dir, final)
        except OSError:
            if os.path.exists(aside):
                os.rename(aside, final)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    return final


def find(name: str, data_dir: str) -> str | None:
    """The newest prepared version in `data_dir`, or None. `data_dir` may also be its folder.

    Raises:
      PmoeError: the folder holds another data set, or its description is damaged.
    """
    folder: str | None = data_dir
    if not os.path.isfile(os.path.join(data_dir, "dataset_info.json")):
        infos = glob.glob(os.path.join(glob.escape(data_dir), name, "[0-9]*", "dataset_info.json"))
        folder = max(map(os.path.dirname, infos), key=_version, default=None)
    if folder is not None:
        _info(name, folder)
    return folder


def check_same(job: Job, folder: str) -> None:
    """Whether what lies in `folder` was prepared from the same source with the same options.

    Raises:
      PmoeError: it was not, or nobody can tell.
    """
    stored = _origin(folder)
    if stored is None:
        raise PmoeError(
            f"{folder} does not say what it was prepared from, so it cannot be compared with "
            f"{job.source}; leave the source out to use it as it is, or replace it with --overwrite"
        )
    check_options(folder, job.skip_corrupt)
    if stored["signature"] == job.signature():
        return
    content = job.content()
    if stored["content"] != content:
        raise PmoeError(
            f"{folder} was prepared from another source ({stored['source']}, {stored['kind']}, "
            f"content {stored['content'][:12]}) than {job.source} ({job.origin.kind}, content "
            f"{content[:12]}); choose another data_dir, or replace it with --overwrite"
        )


def check_options(folder: str, skip_corrupt: bool) -> None:
    """The part of `check_same` that needs no source; passes if nothing is recorded."""
    stored = _origin(folder)
    if stored is not None and stored["skip_corrupt"] != skip_corrupt:
        raise PmoeError(
            f"{folder} was prepared with skip_corrupt={stored['skip_corrupt']}, not "
            f"{skip_corrupt}; choose another data_dir, or replace it with --overwrite"
        )


def check_replaceable(name: str, found: str, data_dir: str) -> None:
    """Whether a data set written into `data_dir` takes the place of the one found there.

    Raises:
      PmoeError: `found` would still be read instead.
    """
    final = os.path.join(data_dir, name, VERSIONS[name])
    if os.path.abspath(found) == os.path.abspath(data_dir):
        raise PmoeError(
            f"{data_dir} is the data set itself; to overwrite it, give the data_dir in which "
            f"{name}/{VERSIONS[name]} lies"
        )
    if _version(found) > _version(final):
        raise PmoeError(
            f"{found} is newer than the version {VERSIONS[name]} that would be written, and would "
            "still be read; move it away first"
        )


def origin_of(folder: str) -> str:
    """The layout that a prepared folder was written from; "" if it does not say."""
    return (_origin(folder) or {"kind": ""})["kind"]


def read(
    name: str, folder: str, lazy: Callable[[int], bool] = lambda count: False
) -> dict[str, list[Record]]:
    """Records of the splits train and test; sorted by name they are in the source's order.

    Args:
      lazy: of a number of images, whether to read their bytes again when they are decoded instead
        of keeping them.

    Raises:
      PmoeError: missing, altered or damaged files, or another data set.
    """
    import tensorflow_datasets as tfds

    lengths = _info(name, folder)
    _check_sums(folder)
    spec = features(name)
    raw_images = {"image": tfds.decode.SkipDecoding()}
    splits = {}
    later = lazy(sum(sum(lengths.get(split, ())) for split in ("train", "test")))
    for split in ("train", "test"):
        with readable(f"{folder}: {split} split"):
            source = _open_shards(name, split, folder, lengths[split])
            records = []
            for index in range(len(source)):
                fields = spec.deserialize_example_np(source[index], decoders=raw_images)
                again = partial(_image_bytes, source, index, spec, raw_images)
                records.append(_record(name, split, fields, folder, again if later else None))
        splits[split] = records
    return splits


def _text(path: str) -> str:
    return config_lib.read_text(pathlib.Path(path))


def _info(name: str, folder: str) -> dict[str, list[int]]:
    """Images in each shard of every split."""
    try:
        with readable(folder):
            info = json.loads(_text(os.path.join(folder, "dataset_info.json")))
            stored = printable(str(info["name"]))
            lengths = {s["name"]: [int(n) for n in s["shardLengths"]] for s in info["splits"]}
    except PmoeError as error:
        raise PmoeError(f"{error}; move the folder away to prepare it anew") from None
    if stored != name:
        raise PmoeError(f"{folder} holds {stored}, not {name}; give another folder")
    return lengths


def _origin(folder: str) -> dict[str, Any] | None:
    """What a folder was prepared from; None if TFDS wrote it."""
    path = os.path.join(folder, _ORIGIN)
    if not os.path.exists(path):
        return None
    with readable(path):
        stored = json.loads(_text(path))
        texts = {key: printable(str(stored[key])) for key in ("kind", "source", "content")}
        return {
            **texts, "signature": stored["signature"], "skip_corrupt": bool(stored["skip_corrupt"])
        }  # fmt: skip


def _digest_of(record: Record) -> str:
    content = record.read()
    digest = hashlib.sha256(repr((record.name, record.label, record.box, record.size)).encode())
    if isinstance(content, np.ndarray):
        digest.update(repr(content.shape).encode())
        content = content.tobytes()
    digest.update(content)
    return digest.hexdigest()


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _read_once(record: Record) -> Record:
    content = record.read()
    return dataclasses.replace(record, read=lambda: content)


def _record(
    name: str, split: str, fields: dict[str, Any], folder: str, again: Callable[[], bytes] | None
) -> Record:
    identifier = fields["id"].decode("utf-8")
    content = fields["image"]
    box = size = group = None
    if name == "gtsrb":
        x1, y1, x2, y2 = (int(value) for value in fields["box"])
        width, height = (int(value) for value in fields["size"])
        if 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:
            box, size = (x1, y1, x2, y2), (width, height)
        group = identifier[:11] if split == "train" and "/" in identifier else None
    return Record(
        name=identifier,
        label=int(fields["label"]),
        read=again or (lambda: content),
        where=f"{folder}: {printable(identifier)}",
        group=group,
        box=box,
        size=size,
    )


def _image_bytes(source: Any, index: int, spec: Any, decoders: Any) -> bytes:
    return bytes(spec.deserialize_example_np(source[index], decoders=decoders)["image"])


def _shards(
    name: str, splits: Mapping[str, Sequence[Record]]
) -> Iterator[tuple[str, Sequence[Record]]]:
    for split, records in splits.items():
        count = max(1, -(-len(records) // SHARD_RECORDS))
        bounds = np.linspace(0, len(records), count + 1).astype(int)
        for shard in range(count):
            file = f"{name}-{split}.array_record-{shard:05d}-of-{count:05d}"
            yield file, records[bounds[shard] : bounds[shard + 1]]


def _resume(
    partial_dir: str, signature: str, shards: Mapping[str, Sequence[Record]]
) -> dict[str, dict[str, Any]]:
    """The complete shards of an interrupted run; everything else in the folder is removed."""
    state: Any = None
    state_path = os.path.join(partial_dir, "state.json")
    # A damaged state is none: everything is written anew.
    with contextlib.suppress(OSError, ValueError, RecursionError):
        state = json.loads(_text(state_path))
    stored: Any = None
    if isinstance(state, dict) and state.get("signature") == signature:
        stored = state.get("shards")
    done = {}
    for shard, records in shards.items() if isinstance(stored, dict) else ():
        entry, path = stored.get(shard), os.path.join(partial_dir, shard)
        whole = _is_entry(entry, len(records)) and os.path.isfile(path)
        if whole and _sha256(path) == entry["sha256"]:
            done[shard] = entry
    for leftover in set(os.listdir(partial_dir)) - done.keys() - {"state.json"}:
        os.remove(os.path.join(partial_dir, leftover))
    return done


def _is_entry(entry: Any, records: int) -> bool:
    """Whether state.json says of a shard what `_write_shards` writes of it."""
    if not isinstance(entry, dict):
        return False
    counts: list[Any] = [entry.get(key) for key in ("images", "bytes", "skipped")]
    texts = [entry.get(key) for key in ("content", "sha256")]
    return (
        all(type(count) is int and 0 <= count < 2**60 for count in counts)
        and all(isinstance(text, str) for text in texts)
        and counts[0] + counts[2] == records
    )


def _write_shards(job: Job, state: dict[str, Any], folder: str) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tqdm import tqdm

    name, splits = job.name, job.splits
    spec = features(name)
    done = state["shards"]
    total = sum(len(records) for records in splits.values())
    with tqdm(total=total, desc=f"preparing {name}", unit=" images", disable=None) as progress:
        for file, records in _shards(name, splits):
            if file in done:
                progress.update(len(records))
                continue
            path = os.path.join(folder, file)
            writer = ArrayRecordWriter(path + ".tmp", "group_size:1")
            entry = {"images": 0, "bytes": 0, "skipped": 0}
            contents = []
            try:
                for record in map(_read_once, records):
                    progress.update()
                    contents.append(_digest_of(record))
                    try:
                        fields = example(name, record, job.max_bytes)
                    except CorruptImage:
                        if not job.skip_corrupt:
                            raise
                        entry["skipped"] += 1
                        continue
                    content = spec.serialize_example(spec.encode_example(fields))
                    writer.write(content)
                    entry["images"] += 1
                    entry["bytes"] += len(content)
            finally:
                writer.close()
            os.replace(path + ".tmp", path)
            done[file] = {**entry, "content": _joined(contents), "sha256": _sha256(path)}
            _write_text(os.path.join(folder, "state.json"), json.dumps(state))


def _finish(job: Job, signature: str, folder: str, done: dict[str, dict[str, Any]]) -> None:
    """TFDS's metadata, the origin and the checksums."""
    import tensorflow_datasets as tfds

    name, splits = job.name, job.splits
    spec = features(name)
    infos = []
    for split, records in splits.items():
        shards = [file for file, _ in _shards(name, {split: records})]
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[done[file]["images"] for file in shards],
                num_bytes=sum(done[file]["bytes"] for file in shards),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=spec,
        split_infos=infos,
        version=VERSIONS[name],
        check_data=False,
        description=f"{name} from {job.origin.kind}, written by pmoe_jax in the order of its ids.",
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )
    files = [file for file, _ in _shards(name, splits)]
    origin = {
        "kind": job.origin.kind,
        "source": os.path.basename(os.path.abspath(job.source)),
        "content": _joined(done[file]["content"] for file in files),
        "signature": signature,
        "skip_corrupt": job.skip_corrupt,
        "skipped": sum(done[file]["skipped"] for file in files),
    }
    _write_text(os.path.join(folder, _ORIGIN), json.dumps(origin, indent=1))
    names = sorted(file for file in os.listdir(folder) if file not in (_CHECKSUMS, "state.json"))
    lines = [f"{_sha256(os.path.join(folder, file))}  {file}\n" for file in names]
    _write_text(os.path.join(folder, _CHECKSUMS), "".join(lines))
    # Last: as long as it is there, an interrupted run finds the finished shards again.
    os.remove(os.path.join(folder, "state.json"))


def _check_sums(folder: str) -> None:
    # Folders that TFDS itself wrote have no such file.
    path = os.path.join(folder, _CHECKSUMS)
    if not os.path.exists(path):
        return
    with readable(path):
        for line in _text(path).splitlines():
            checksum, _, name = line.partition("  ")
            if "/" in name or not os.path.isfile(os.path.join(folder, name)):
                raise PmoeError(
                    f"{folder} lacks {printable(name)}; delete the folder, prepare again"
                )
            if _sha256(os.path.join(folder, name)) != checksum:
                raise PmoeError(
                    f"{folder}: {printable(name)} was altered or is damaged (its SHA-256 is not "
                    "that of the prepared file); delete the folder and prepare again"
                )


class _TfRecords:
    """Random access to TFRecord files: length (8 bytes), its CRC (4), content, its CRC (4)."""

    def __init__(self, paths: list[str]):
        self._places = []
        for path in paths:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                at = 0
                while at < size:
                    file.seek(at)
                    (length,) = struct.unpack("<Q", file.read(8))
                    if at + 16 + length > size:
                        raise ValueError(f"{os.path.basename(path)} is cut short")
                    self._places.append((path, at + 12, length))
                    at += 16 + length

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes:
        path, at, length = self._places[index]
        with open(path, "rb") as file:
            file.seek(at)
            return file.read(length)


def _open_shards(name: str, split: str, folder: str, lengths: list[int]) -> Any:
    count = len(lengths)
    for suffix in ("array_record", "tfrecord"):
        files = [f"{name}-{split}.{suffix}-{i:05d}-of-{count:05d}" for i in range(count)]
        paths = [os.path.join(folder, file) for file in files]
        if not os.path.exists(paths[0]):
            continue
        missing = [file for file in files if not os.path.isfile(os.path.join(folder, file))]
        if missing:
            raise PmoeError(f"{folder} lacks {missing[0]}; prepare the data set again")
        if suffix == "array_record":
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            source: Any = ArrayRecordDataSource(paths)
        else:
            source = _TfRecords(paths)
        if len(source) != sum(lengths):
            raise PmoeError(
                f"{folder} has {len(source)} {split} images instead of {sum(lengths)}; prepare the "
                "data set again"
            )
        return source
    raise PmoeError(f"{folder} has no array_record or tfrecord files of the {split} split")


def _check_space(records: Sequence[Record], folder: str) -> None:
    # A PNG is rarely larger than its pixels; half a kilobyte covers the rest of a record.
    need = sum(3 * r.size[0] * r.size[1] + 512 if r.size else 4096 for r in records)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise PmoeError(
            f"{folder} has {free / 2**20:.0f} MiB free but up to {need / 2**20:.0f} MiB are "
            "needed; free some space or choose another data_dir"
        )


@contextlib.contextmanager
def _writable(what: str) -> Iterator[None]:
    try:
        yield
    except PmoeError:
        raise
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        text = (isinstance(error, OSError) and error.strerror) or printable(str(error))
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = any(os.strerror(code) in text for code in codes)
        advice = (
            "free some space and run the command again, it goes on where it stopped"
            if full
            else "choose another data_dir"
        )
        raise PmoeError(f"cannot write {what} ({text}); {advice}") from error


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        file = locks.take(path)
    except BlockingIOError:
        raise PmoeError(f"another process is preparing {os.path.dirname(path)}; wait") from None
    with file:
        yield
        os.remove(path)  # still locked, and only if all went well


def _write_text(path: str, text: str) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(folder: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", os.path.basename(folder)))
