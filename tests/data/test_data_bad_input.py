"""Damaged and hostile files: one clear PmoeError each, nothing run, nothing written outside."""

import contextlib
import gzip
import io
import os
import pickle
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from pmoe_jax import cli, data
from pmoe_jax.data.files import read_npz
from pmoe_jax.errors import PmoeError


def refused(match, name, source, **options):
    """The message with which both `load` and `pmoe data show` refuse, the latter with code 2."""
    with pytest.raises(PmoeError, match=match) as error:
        data.load(name, source, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    given = {**({} if source is None else {"source": source}), **options, "sheet": ""}
    words = [f"--{option}={value}" for option, value in given.items()]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(None):
        assert cli.main(["data", "show", name, *words]) == 2
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("note: ")]
    assert lines == [f"pmoe: {message}"]
    return message


# --- What is asked for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "name", "options"),
    [
        (r"unknown data set 'cifar'; did you mean cifar10\?", "cifar", {}),
        (r"unknown data set 'mnist' \(allowed are digits, cifar10", "mnist", {}),
        ("npz needs a source", "npz", {}),
        ("folder needs a source", "folder", {}),
        ("does not exist", "cifar10", {"source": "/nowhere/at/all"}),
        ("does not exist", "npz", {"source": "/nowhere/at/all.npz"}),
        ("is not prepared in /nowhere; give its source", "cifar10", {"data_dir": "/nowhere"}),
        ("image_size is 0", "digits", {"image_size": 0}),
        ("max_bytes is 0", "digits", {"max_bytes": 0}),
        ("unknown resize filter", "digits", {"resize_filter": "best"}),
        ("crop_roi needs sign boxes", "digits", {"crop_roi": True}),
    ],
)
def test_bad_requests(match, name, options):
    refused(match, name, options.pop("source", None), **options)


# --- CIFAR-10 batches -----------------------------------------------------------------------


class Runs:
    """Pickles to a call that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def with_batch(make, tmp_path, content):
    files = make.cifar_files()
    files["cifar-10-batches-py/data_batch_3"] = content
    return make.write_folder(tmp_path / "cifar", files)


def test_pickle_that_runs_code(make, tmp_path):
    trap = str(tmp_path / "trap")
    good = pickle.loads(make.cifar_files("python3")["cifar-10-batches-py/data_batch_3"])
    for protocol in (0, 2, 4, 5):
        content = pickle.dumps({**good, "more": Runs(trap)}, protocol)
        source = with_batch(make, tmp_path, content)
        refused("data_batch_3 is refused: it (wants to run|contains)", "cifar10", source)
        assert not os.path.exists(trap)
    pickle.loads(content)  # the trap works
    assert os.path.exists(trap)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((2, 3072)), "labels": [1, 2]}, 2),  # float64
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, 2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", None]}, 2),
        pickle.dumps({"data": np.zeros((2, 3072), object), "labels": [1, 2]}, 2),
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",  # bytes of 2**56
    ],
)
def test_damaged_pickles(make, tmp_path, content):
    refused("data_batch_3 is", "cifar10", with_batch(make, tmp_path, content))


@pytest.mark.parametrize(
    ("match", "content"),
    [
        ("its memo is larger", b"\x80\x02}r\xff\xff\xff\x7f."),  # two thousand million slots
        # Would overflow the C stack, which kills the process.
        ("it nests tuples", b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns."),
    ],
)
def test_pickles_that_exhaust_memory(make, tmp_path, match, content):
    source = with_batch(make, tmp_path, content)
    refused(f"data_batch_3 is refused: {match}", "cifar10", source)


def test_damaged_batches(make, tmp_path):
    files = make.cifar_files("binary")
    name = "cifar-10-batches-bin/data_batch_2.bin"
    short = {**files, name: files[name][:-1]}
    refused("not a multiple of 3073", "cifar10", make.write_folder(tmp_path / "a", short))
    label = {**files, name: bytes([10]) + files[name][1:]}
    refused(
        "data_batch_2.bin: label 10 of image 0 is out of range; allowed are 0 to 9",
        "cifar10",
        make.write_folder(tmp_path / "b", label),
    )
    lacking = {n: files[n] for n in files if n != name}
    refused("lacks .*data_batch_2.bin", "cifar10", make.write_folder(tmp_path / "c", lacking))
    empty = make.write_folder(tmp_path / "d", {"readme.txt": b""})
    refused("holds no CIFAR-10; expected data_batch_1..5", "cifar10", empty)
    assert not [f for f in os.listdir(tmp_path) if f not in "abcd"]


# --- Archives -------------------------------------------------------------------------------


def packed(tmp_path, content):
    path = tmp_path / "archive"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kept", [0, 10, 1000, 0.5, 0.999, -4])
@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
def test_truncated_archives(make, tmp_path, kind, kept):
    files = make.cifar_files()
    whole = make.zip_bytes(files) if kind == "zip" else make.tar_bytes(files, f"w:{kind[4:]}")
    if kind == "tar" and kept in (0.999, -4):
        return  # Only padding is missing.
    kept = int(kept * len(whole)) if isinstance(kept, float) else kept
    refused("cannot be read|cut short|holds no|lacks", "cifar10", packed(tmp_path, whole[:kept]))


def test_altered_archives(make, tmp_path):
    for whole in (make.tar_bytes(make.cifar_files()), make.zip_bytes(make.cifar_files())):
        altered = bytearray(whole)
        altered[len(whole) // 2] ^= 1
        refused("cannot be read", "cifar10", packed(tmp_path, bytes(altered)))


@pytest.mark.parametrize("name", ["/tmp/pmoe_evil", "../evil", "a/../../evil", "..\\evil", "C:\\x"])
def test_members_that_leave_the_folder(make, tmp_path, name):
    files = {name: b"evil", **make.cifar_files()}
    for content in (make.tar_bytes(files), make.zip_bytes(files)):
        refused("unsafe name", "cifar10", packed(tmp_path, content))
    assert os.listdir(tmp_path) == ["archive"] and not os.path.exists("/tmp/pmoe_evil")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_tar(make, tmp_path, kind):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = kind, "/etc/passwd"
        archive.addfile(link)
    refused("is a link, device or sparse file", "cifar10", packed(tmp_path, content.getvalue()))


def test_sparse_files_in_tar(tmp_path):
    """Ten kilobytes that would become 400 MiB in memory."""
    content, name = io.BytesIO(), "train/a/x.png"
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        hole = tarfile.TarInfo(name)
        hole.size = 1
        hole.pax_headers = {
            "GNU.sparse.map": "0,1", "GNU.sparse.size": str(400 * 2**20), "GNU.sparse.name": name
        }  # fmt: skip
        archive.addfile(hole, io.BytesIO(b"x"))
    refused("sparse file", "folder", packed(tmp_path, content.getvalue()), max_bytes=2**20)


def npz_packed(path, method):
    """An .npz of 4 black images of 2 classes, by a method of zip."""
    labels = np.array([0, 1, 0, 1], np.uint8)
    arrays = {f"{split}_{kind}": value for split in ("train", "test") for kind, value in
              (("images", np.zeros((4, 8, 8, 3), np.uint8)), ("labels", labels))}  # fmt: skip
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, value in arrays.items():
            content = io.BytesIO()
            np.save(content, value)
            archive.writestr(f"{key}.npy", content.getvalue())


def test_lzma_in_an_npz_is_bounded_by_what_it_declares(tmp_path):
    path = tmp_path / "set.npz"
    npz_packed(path, zipfile.ZIP_LZMA)
    stored = read_npz(str(path), ("train_labels", "test_images"), 2**20)
    assert stored["train_labels"].tolist() == [0, 1, 0, 1] and not stored["test_images"].any()
    whole = bytearray(path.read_bytes())
    start = whole.index(b"PK\x01\x02")  # of the directory: the first member, train_images
    for at, byte in ((start + 24, 200), (start + 16, 1)):  # its size; its CRC
        damaged = bytearray(whole)
        damaged[at] ^= byte
        path.write_bytes(damaged)
        refused("train_images.npy is damaged", "npz", str(path))
    bomb = io.BytesIO()
    np.save(bomb, np.zeros(2**26, np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("train_images.npy", bomb.getvalue())
        archive.writestr("train_labels.npy", b"")
        archive.writestr("test_images.npy", b"")
        archive.writestr("test_labels.npy", b"")
    content = path.read_bytes()
    size = struct.pack("<I", len(bomb.getvalue()))
    assert content.count(size) == 2  # before the member, and in the directory
    path.write_bytes(content.replace(size, struct.pack("<I", 1000)))
    del bomb
    tracemalloc.start()
    refused("train_images.npy is damaged", "npz", str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_zipfile_unpacks_without_a_bound(make, tmp_path, method):
    said = f"is compressed by method {method}; allowed are stored"
    if method != zipfile.ZIP_LZMA:
        npz_packed(tmp_path / "set.npz", method)
        refused(said, "npz", str(tmp_path / "set.npz"))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, data_of in make.gtsrb_files("kaggle").items():
            archive.writestr(name, data_of)
    refused(said, "gtsrb", packed(tmp_path, content.getvalue()))


def test_names_without_bytes_are_refused_before_they_are_made(tmp_path):
    header = b"{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,), }"
    header = header.ljust(117) + b"\n"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            array = io.BytesIO()
            np.save(array, np.zeros((2, 8, 8, 3) if "images" in name else 2, np.uint8))
            archive.writestr(f"{name}.npy", array.getvalue())
        archive.writestr("class_names.npy", b"\x93NUMPY\x01\x00\x76\x00" + header)
    (tmp_path / "set.npz").write_bytes(content.getvalue())
    refused("class_names is shorter than its header says", "npz", str(tmp_path / "set.npz"))


def test_class_names_of_strangers_are_printable(make, tmp_path):
    arrays = {
        "train_images": np.zeros((2, 8, 8, 3), np.uint8), "train_labels": np.array([0, 1]),
        "test_images": np.zeros((2, 8, 8, 3), np.uint8), "test_labels": np.array([0, 1]),
        "class_names": np.array(["\x1b[2Jcat", "d" * 1000]),
    }  # fmt: skip
    (tmp_path / "set.npz").write_bytes(make.npz_bytes(**arrays))
    cat, dog = data.load("npz", tmp_path / "set.npz").class_names
    assert cat == "?[2Jcat" and len(dog) < 200


@pytest.mark.parametrize("stray", ["val/a/0.png", "train/preview.png", "docs/logo.png"])
def test_images_beside_train_and_test_are_not_mixed_with_them(make, tmp_path, stray):
    grey = make.png(np.zeros((4, 4), np.uint8))
    names = ("train/a/0.png", "train/b/0.png", "test/a/0.png", stray)
    source = make.write_folder(tmp_path, dict.fromkeys(names, grey))
    refused(rf"{stray} is neither in train/CLASS nor in test/CLASS", "folder", source)


def test_a_class_that_cannot_be_divided_is_named(make, tmp_path):
    grey = make.png(np.zeros((4, 4), np.uint8))
    names = ("cats/0.png", "cats/1.png", "dogs/0.png")
    source = make.write_folder(tmp_path, dict.fromkeys(names, grey))
    refused("the class 'dogs' has a single image; it needs two", "folder", source)


def test_boxes_belong_to_an_npz(make, tmp_path):
    boxes = {"boxes": tmp_path / "boxes.npz"}
    refused("boxes belong to gtsrb from an .npz; cifar10 takes none", "cifar10", "x", **boxes)
    with pytest.raises(PmoeError, match=r"boxes belong to gtsrb from an \.npz; cifar10 takes none"):
        data.prepare("cifar10", "x", tmp_path / "tfds", **boxes)
    arrays = {"data": np.zeros((2, 8, 8, 3)), "label": np.array([0, 1])}
    for split in ("train", "test"):
        for kind, array in arrays.items():
            np.save(tmp_path / f"gtsrb_{split}_{kind}_sorted.npy", array)
    refused("boxes belong to an .npz source, and", "gtsrb", tmp_path, **boxes)


def test_a_pipe_for_an_npz_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "set.npz")
    refused("is no regular file", "npz", str(tmp_path / "set.npz"))


def test_links_and_passwords_in_zip(make, tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        link = zipfile.ZipInfo("Train.csv")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    refused("Train.csv is a link", "gtsrb", packed(tmp_path, content.getvalue()))
    content = bytearray(make.zip_bytes({"Train.csv": b"a"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    refused("Train.csv is encrypted", "gtsrb", packed(tmp_path, bytes(content)))


def test_bombs(make, tmp_path):
    zeros = {"zeros": bytes(3 * 2**20), **make.cifar_files()}
    options = {"max_bytes": 2**20}
    for content in (make.tar_bytes(zeros), make.tar_bytes(zeros, "w:xz"), make.zip_bytes(zeros)):
        path = packed(tmp_path, content)
        refused("more than the limit of 1048576 bytes; raise max_bytes", "cifar10", path, **options)
        assert len(data.load("cifar10", path, max_bytes=2**23).train_images) == 20
    # The size that a tar header declares is not trusted either.
    header = bytearray(tarfile.TarInfo("x").tobuf())
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    bomb = gzip.compress(bytes(header) + bytes(2**22))
    refused("more than the limit", "cifar10", packed(tmp_path, bomb), **options)


def test_several_zips_share_the_limit(make, tmp_path):
    """Each of the official zips is below the limit, both together are not."""
    files = make.gtsrb_files("official")
    parts = [{n: files[n] for n in files if word in n} for word in ("Training", "Final_Test")]
    for part in parts:
        part["padding"] = bytes(10**5)
    sizes = [sum(map(len, part.values())) for part in parts]
    zips = {f"{i}.zip": make.zip_bytes(part) for i, part in enumerate(parts)}
    source = make.write_folder(tmp_path, zips)
    message = refused("more than the limit", "gtsrb", source, max_bytes=sum(sizes) - 1)
    assert message.startswith(f"{tmp_path} unpacks") and max(sizes) < sum(sizes) - 1
    assert len(data.load("gtsrb", source, max_bytes=sum(sizes)).train_images) == 12


def test_files_that_are_no_archives(make, tmp_path):
    for content in (b"Some text.\n" * 99, b"x", bytes(range(256)) * 9):
        refused("is neither a folder nor a zip or tar file", "gtsrb", packed(tmp_path, content))
    refused("cannot be read: it is empty", "gtsrb", packed(tmp_path, b""))
    whole = make.zip_bytes(make.gtsrb_files("kaggle"))
    refused("a zip file that is cut short", "gtsrb", packed(tmp_path, whole[:-40]))


def test_zip_member_larger_than_declared(make, tmp_path):
    content = bytearray(make.zip_bytes({"Train.csv": bytes(10**6), "Test.csv": b"x"}))
    for magic, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = content.index(magic) + offset
        content[at : at + 4] = struct.pack("<I", 100)
    refused("cannot be read", "gtsrb", packed(tmp_path, bytes(content)))


# --- Array files ----------------------------------------------------------------------------


def arrays(**changes):
    good = {
        "train_images": np.zeros((4, 8, 8, 3), np.uint8),
        "train_labels": np.array([0, 1, 0, 1]),
        "test_images": np.zeros((2, 8, 8, 3), np.uint8),
        "test_labels": np.array([0, 1]),
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("lacks test_labels", {"test_labels": None}),
        ("holds Python objects", {"train_labels": np.array([0, 1, None, 1], object)}),
        ("int64; allowed are uint8", {"train_images": np.zeros((4, 8, 8, 3), np.int64)}),
        (r"float64 outside \[0, 1\]", {"train_images": np.full((4, 8, 8, 3), 255.0)}),
        ("NaN or infinity", {"train_images": np.full((4, 8, 8, 3), np.nan)}),
        (r"shape \[4, 8\]; allowed", {"train_images": np.zeros((4, 8), np.uint8)}),
        (r"shape \[4, 8, 8, 2\]; allowed", {"train_images": np.zeros((4, 8, 8, 2), np.uint8)}),
        ("they must be equal", {"test_images": np.zeros((2, 9, 8, 3), np.uint8)}),
        ("4 images but 3 labels", {"train_labels": np.array([0, 1, 1])}),
        ("out of range", {"train_labels": np.array([0, 1, -1, 1])}),
        ("out of range", {"train_labels": np.array([0, 1, 2**40, 1])}),
        ("label 100 is out of range", {"train_labels": np.array([0, 1, 100, 1])}),
        ("fractions or NaN", {"train_labels": np.array([0, 1, 0.5, 1])}),
        ("allowed are whole numbers", {"train_labels": np.array(["a", "b", "c", "d"])}),
        (r"shape \[4, 2\]; allowed is \[N\]", {"train_labels": np.zeros((4, 2), int)}),
        ("at least 2 classes", {"train_labels": np.zeros(4, int), "test_labels": np.zeros(2, int)}),
        ("class_names must be", {"class_names": np.array([1, 2])}),
        ("has 65537 names; allowed are up to 65536", {"class_names": np.array(["a"] * 65537)}),
        ("1 class; at least 2 classes are needed", {"class_names": np.array(["only"])}),
        (
            "train label 2 of image 3 is out of range; allowed are 0 to 1",
            {"class_names": np.array(["a", "b"]), "train_labels": np.array([0, 1, 0, 2])},
        ),
        (
            "test split is empty",
            {"test_images": np.zeros((0, 8, 8, 3), np.uint8), "test_labels": np.zeros(0, int)},
        ),
    ],
)
def test_bad_arrays(make, tmp_path, match, changes):
    refused(match, "npz", packed(tmp_path, make.npz_bytes(**arrays(**changes))))


def test_damaged_npz(make, tmp_path):
    whole = make.npz_bytes(**arrays(train_images=np.zeros((4, 99, 99, 3), np.uint8)))
    refused("cannot be read", "npz", packed(tmp_path, whole[:200]))
    refused("cannot be read", "npz", packed(tmp_path, b""))
    refused("more than the limit of 1000", "npz", packed(tmp_path, whole), max_bytes=1000)
    # A header that announces far more than the file holds must not be believed.
    lying = io.BytesIO()
    with zipfile.ZipFile(lying, "w") as archive:
        for key, array in arrays().items():
            content = io.BytesIO()
            np.save(content, array)
            text = content.getvalue()
            if key == "train_images":
                text = text.replace(b"(4, 8, 8, 3)", b"(9999999, 8)")
            archive.writestr(f"{key}.npy", text)
    refused(
        "train_images is shorter than its header says", "npz", packed(tmp_path, lying.getvalue())
    )


def test_bad_npy(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        np.save(tmp_path / f"gtsrb_{split}_data_sorted.npy", np.zeros((count, 8, 8, 3), np.uint8))
        np.save(tmp_path / f"gtsrb_{split}_label_sorted.npy", np.arange(count))
    assert len(data.load("gtsrb", tmp_path).train_images) == 4
    refused("no sign boxes", "gtsrb", tmp_path, crop_roi=True)
    np.save(tmp_path / "gtsrb_test_data_sorted.npy", np.full((2, 8, 8, 3), 0.5))
    refused("not whole numbers in 0..255", "gtsrb", tmp_path)
    np.save(tmp_path / "gtsrb_test_data_sorted.npy", np.array([Runs("x")]), allow_pickle=True)
    refused("Python objects", "gtsrb", tmp_path)
    whole = (tmp_path / "gtsrb_train_data_sorted.npy").read_bytes()
    (tmp_path / "gtsrb_train_data_sorted.npy").write_bytes(whole[:-1])
    refused(r"gtsrb_train_data_sorted.npy cannot be read \(Failed to read all", "gtsrb", tmp_path)
    (tmp_path / "gtsrb_train_data_sorted.npy").write_bytes(whole)
    np.save(tmp_path / "gtsrb_test_data_sorted.npy", np.zeros((2, 8, 8, 3), np.uint8))
    assert len(data.load("gtsrb", tmp_path).test_images) == 2  # whole again
    (tmp_path / "gtsrb_test_label_sorted.npy").unlink()
    refused(
        "gtsrb_test_label_sorted.npy does not exist",
        "gtsrb",
        tmp_path,
    )


# --- GTSRB tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["official", "kaggle"])
@pytest.mark.parametrize(
    ("match", "old", "new"),
    [
        ("line 2: ClassId 43 is out of range; allowed are 0 to 42", "7", "43"),
        ("line 2: ClassId -1 is out of range", "7", "-1"),
        ("must be whole numbers", "7", "seven"),
        ("line 2 points to .*, which does not exist", "00001", "00009"),
        ("line 2 points to .*, which does not exist", "00001", "../../../../etc/passwd"),
        ("not inside", "7", None),
        ("not as many fields", "7", ""),
        ("lacks the columns ClassId", "ClassId", "Class"),
        ("listed twice", "twice", "twice"),
    ],
)
def test_bad_tables(make, tmp_path, layout, match, old, new):
    files = make.gtsrb_files(layout)
    name = "Test.csv" if layout == "kaggle" else "GTSRB/Final_Test/Images/GT-final_test.csv"
    lines = files[name].decode().splitlines()
    separator = ";" if layout == "official" else ","
    row = lines[2].split(separator)
    column = lines[0].split(separator).index("ClassId")
    del lines[1]
    if old == "ClassId":
        lines[0] = lines[0].replace(old, new)
    elif old == "twice":
        lines.append(lines[1])
    elif new is None:
        row[-5 if layout == "official" else -6] = "99"
        lines[1] = separator.join(row)
    elif new == "":
        lines[1] = separator.join(row[:-1])
    elif old == "7":
        row[column] = new
        lines[1] = separator.join(row)
    else:
        lines[1] = lines[1].replace(old, new)
    files[name] = "\n".join(lines).encode()
    refused(match, "gtsrb", make.write_folder(tmp_path, files))


def test_incomplete_gtsrb(make, tmp_path):
    files = make.gtsrb_files("kaggle")
    header = files["Test.csv"].splitlines(keepends=True)[0]
    empty = make.write_folder(tmp_path / "a", {**files, "Test.csv": header})
    refused("the test split is empty", "gtsrb", empty)
    del files["Test.csv"]
    refused("no complete GTSRB", "gtsrb", make.write_folder(tmp_path / "b", files))
    binary = {**files, "Test.csv": b"\xff\xfe\x00\x00" * 50}
    refused("cannot be read|lacks the columns", "gtsrb", make.write_folder(tmp_path / "c", binary))


# --- Images ---------------------------------------------------------------------------------


def test_corrupt_images_are_named_or_skipped(make, tmp_path, capsys):
    files = make.gtsrb_files("kaggle")
    bad = "Train/7/00007_00001_00002.png"
    for content in (b"", b"no picture", files[bad][:-30], b"%!PS-Adobe\n"):
        source = make.write_folder(tmp_path, {**files, bad: content})
        message = refused("is not a readable image", "gtsrb", source)
        assert "00007_00001_00002.png" in message and "skip_corrupt" in message
    capsys.readouterr()
    gtsrb = data.load("gtsrb", source, skip_corrupt=True)
    assert len(gtsrb.train_images) == len(gtsrb.train_boxes) == len(gtsrb.train_tracks) == 11
    assert "skipped 1 corrupt train images" in capsys.readouterr().err
    altered = bytearray(files[bad])
    altered[len(altered) // 2] ^= 255  # caught by the PNG's checksum
    source = make.write_folder(tmp_path, {**files, bad: bytes(altered)})
    refused("is not a readable image", "gtsrb", source)


def test_all_images_corrupt(make, tmp_path):
    files = {
        name: b"x" if name.startswith("Test/") else content
        for name, content in make.gtsrb_files("kaggle").items()
    }
    source = make.write_folder(tmp_path, files)
    refused("the test split is empty", "gtsrb", source, skip_corrupt=True)


def test_sixteen_bit_images(make, tmp_path):
    files = make.gtsrb_files("kaggle")
    files["Test/00001.png"] = make.png(np.zeros((25, 25), np.uint16))
    refused("8 bits a channel", "gtsrb", make.write_folder(tmp_path, files))


def test_formats_that_start_programs(make, tmp_path):
    """PIL hands EPS to Ghostscript; only a few plain formats are opened, whatever the name."""
    files = make.gtsrb_files("kaggle")
    content = io.BytesIO()
    Image.new("RGB", (25, 25)).save(content, "EPS")
    files["Test/00001.png"] = content.getvalue()
    message = refused("is not a readable image", "gtsrb", make.write_folder(tmp_path, files))
    assert "(cannot identify image file)" in message  # and no address in memory


def test_image_bomb(make, tmp_path):
    files = make.gtsrb_files("kaggle")
    chunk = struct.pack(">IIBBBBB", 8300, 8300, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", chunk), (b"IDAT", pixels), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + crc
    files["Test/00001.png"] = content
    refused(
        "unpacks to 8300x8300 pixels, more than a sixteenth",
        "gtsrb",
        make.write_folder(tmp_path, files),
    )


def test_odd_folders(make, tmp_path):
    one = make.png(np.zeros((4, 4), np.uint8))
    for number, (files, match) in enumerate(
        [
            ({}, "images of 0 classes"),
            ({"a/1.png": one}, "images of 1 classes"),
            ({"a/1.png": one, "b/1.png": one}, "the class 'a' has a single image"),
            ({"train/a/1.png": one, "train/b/1.png": one}, "test split is empty"),
            (
                {"train/a/1.png": one, "train/b/1.png": one, "test/c/1.png": one},
                "class 'c' is in test but not in train",
            ),
        ]
    ):
        source = tmp_path / str(number)
        source.mkdir()
        refused(match, "folder", make.write_folder(source, files))


def test_terminal_codes_in_names_are_not_printed(make, tmp_path):
    files = {"../\x1b[2Jevil\n": b"", **make.cifar_files()}
    message = refused("unsafe name", "cifar10", packed(tmp_path, make.tar_bytes(files)))
    assert message.isprintable()
