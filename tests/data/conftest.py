"""Tiny data sets in every layout that pmoe_jax.data reads, written for each test."""

import csv
import io
import pickle
import struct
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TRAIN, TEST = 4, 3  # CIFAR-10 images in each of the five training batches, and in the test batch


def cifar_arrays():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5 * TRAIN + TEST, 32, 32, 3), np.uint8)
    labels = np.arange(len(images)) % 10
    return images, labels.astype(np.int32)


def python2_pickle(pixels, labels):
    """A batch as Python 2's cPickle wrote the official ones: text opcodes, numpy by reduce."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R("
    array += b"K\x01" + b"M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86"
    array += b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
    array += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = text(b"batch_label") + text(b"training batch 1 of 5")
    items += text(b"labels") + numbers + text(b"data") + array
    return b"\x80\x02}(" + items + b"u."


def cifar_files(kind="python"):
    """{name: bytes} of the six batches: "python" (as the originals), "python3" or "binary"."""
    images, labels = cifar_arrays()
    files = {}
    for number in range(6):
        rows = slice(number * TRAIN, (number + 1) * TRAIN if number < 5 else None)
        name = "test_batch" if number == 5 else f"data_batch_{number + 1}"
        pixels = np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2)).reshape(-1, 3072)
        if kind == "binary":
            content = np.concatenate([labels[rows, None].astype(np.uint8), pixels], 1).tobytes()
            files[f"cifar-10-batches-bin/{name}.bin"] = content
        elif kind == "python3":
            batch = {"data": pixels, "labels": labels[rows].tolist()}
            files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=2)
        else:
            files[f"cifar-10-batches-py/{name}"] = python2_pickle(pixels, labels[rows])
    return files


def png(array, **options):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG", **options)
    return content.getvalue()


def gtsrb_rows(train_tracks=2, frames=3, classes=(0, 7)):
    """[(split, class, track, frame or number, pixels, box)] of a small GTSRB."""
    rng = np.random.default_rng(1)
    rows = []
    for label in classes:
        for track in range(train_tracks):
            for frame in range(frames):
                height, width = 20 + track, 30 + frame
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                rows.append(("train", label, track, frame, pixels, (3, 4, width - 5, height - 2)))
    for number in range(3):
        pixels = rng.integers(0, 256, (25, 25, 3), np.uint8)
        rows.append(("test", classes[number % 2], 0, number, pixels, (1, 2, 20, 24)))
    return rows


def gtsrb_files(layout, **options):
    """{name: bytes} of `gtsrb_rows` in the "official" or "kaggle" layout."""
    files, tables = {}, {}
    for split, label, track, frame, pixels, box in gtsrb_rows(**options):
        size = [pixels.shape[1], pixels.shape[0]]
        content = io.BytesIO()
        if layout == "official":
            Image.fromarray(pixels).save(content, "PPM")
            if split == "train":
                folder, file = (
                    f"GTSRB/Final_Training/Images/{label:05d}",
                    f"{track:05d}_{frame:05d}",
                )
                table = f"{folder}/GT-{label:05d}.csv"
            else:
                folder, file = "GTSRB/Final_Test/Images", f"{frame:05d}"
                table = f"{folder}/GT-final_test.csv"
            files[f"{folder}/{file}.ppm"] = content.getvalue()
            tables.setdefault(table, []).append([f"{file}.ppm", *size, *box, label])
        else:
            file = f"Train/{label}/{label:05d}_{track:05d}_{frame:05d}.png"
            file = file if split == "train" else f"Test/{frame:05d}.png"
            files[file] = png(pixels)
            table = tables.setdefault(f"{split.capitalize()}.csv", [])
            table.append([*size, *box, label, file])
    roi = ["Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"]
    for name, rows in tables.items():
        text = io.StringIO()
        writer = csv.writer(text, delimiter=";" if layout == "official" else ",")
        writer.writerow(["Filename", *roi] if layout == "official" else [*roi, "Path"])
        writer.writerows(rows)
        files[name] = text.getvalue().encode()
    return files


def write_folder(root, files):
    for name, content in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def tar_bytes(files, mode="w:gz"):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def zip_bytes(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def npz_bytes(**arrays):
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def as_tfrecord(folder):
    """Turns a prepared folder's array_record files into tfrecord files, which TFDS writes."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for path in Path(folder).glob("*.array_record-*"):
        source = ArrayRecordDataSource([str(path)])
        rows = [source[i] for i in range(len(source))][::-1]  # TFDS shuffles when writing
        content = b"".join(struct.pack("<Q4x", len(row)) + row + bytes(4) for row in rows)
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(content)
        path.unlink()


@pytest.fixture(scope="session")
def make():
    """The makers above, for the test modules."""
    makers = (cifar_arrays, cifar_files, png, gtsrb_rows, gtsrb_files)
    makers += (write_folder, tar_bytes, zip_bytes, npz_bytes, as_tfrecord)
    return types.SimpleNamespace(**{maker.__name__: maker for maker in makers})


@pytest.fixture(scope="session")
def shared():
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared image data are not on this machine")
    return folder
