"""Mutated archives, batches, tables and pictures: a data set or a PmoeError, nothing else.

PMOE_FUZZ_EXAMPLES sets how many mutations each kind of file gets (60 by default, the same ones each
time), PMOE_FUZZ_SECONDS how long it may take (5 by default; what is left by then is passed over).
"""

import gzip
import io
import os
import shutil
import time
import zipfile

import numpy as np
import pytest
import tally
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmoe_jax import data
from pmoe_jax.data import prepared
from pmoe_jax.errors import PmoeError

EXAMPLES = int(os.environ.get("PMOE_FUZZ_EXAMPLES", "60"))
SECONDS = float(os.environ.get("PMOE_FUZZ_SECONDS", "5"))
TOKENS = (
    *(b"", b"\0", b"\xff" * 8, b"\x80", b"-1", b"99999999999999999999", b"1e9", b"nan", b'"', b";"),
    *(b",", b"\n", b"\r", b"../", b"/etc/passwd", b"cos\nsystem\n", b"R", b"(", b"O", b"|O", b"{}"),
)
POSITION = st.integers(0, 2**24)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), POSITION, st.integers(0, 255)),
        st.tuples(st.just("insert"), POSITION, st.one_of(st.sampled_from(TOKENS), st.binary())),
        st.tuples(st.just("over"), POSITION, st.one_of(st.sampled_from(TOKENS), st.binary())),
        st.tuples(st.just("delete"), POSITION, st.integers(1, 600)),
        st.tuples(st.just("double"), POSITION, st.integers(1, 600)),
        st.tuples(st.just("cut"), POSITION, st.just(0)),
    ),
    min_size=1,
    max_size=6,
)


def mutate(content, edits):
    out = bytearray(content)
    for kind, position, value in edits:
        # Half of the positions in the first kilobyte, where headers are.
        limit = len(out) if position % 2 else min(len(out), 1024)
        at = (position // 2) % (limit + 1)
        if kind == "set":
            out[at : at + 1] = bytes([value])
        elif kind == "insert":
            out[at:at] = value
        elif kind == "over":
            out[at : at + len(value)] = value
        elif kind == "delete":
            del out[at : at + value]
        elif kind == "double":
            out[at:at] = out[at : at + value]
        else:
            del out[at:]
    return bytes(out)


def survives(name, source):
    """Loads, and checks what was loaded."""
    try:
        loaded = data.load(name, source, max_bytes=2**24)
    except PmoeError as error:
        assert "\n" not in str(error)
        return
    for split in ("train", "test"):
        images, labels = getattr(loaded, f"{split}_images"), getattr(loaded, f"{split}_labels")
        assert images.dtype == np.uint8 and images.shape[1:] == loaded.image_shape
        assert len(images) == len(labels) > 0
        assert labels.min() >= 0 and labels.max() < loaded.num_classes


def arrays():
    rng = np.random.default_rng(0)
    pixels = {
        f"{s}_images": rng.integers(0, 256, (3, 4, 4, 3), np.uint8) for s in ("train", "test")
    }
    return {**pixels, "train_labels": np.array([0, 1, 1]), "test_labels": np.array([1, 0, 0])}


def gtsrb_arrays():
    """The arrays of a resized GTSRB, and of the file with its boxes."""
    more, rois = arrays(), {}
    for split in ("train", "test"):
        names = [f"00001/00000_{i:05d}" if split == "train" else f"{i:05d}" for i in range(3)]
        more[f"{split}_names"] = np.array(names, "S")
        more[f"{split}_sizes"] = np.full((3, 2), 30, np.uint16)
        rois[f"{split}_rois"] = np.array([[2, 3, 20, 25]] * 3, np.uint16)
    return more, rois


def pictures(make):
    shades = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    places = ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "test/a/0", "test/b/0")
    return {f"{place}.png": make.png(s) for place, s in zip(places, shades, strict=True)}


def stored_zip(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return content.getvalue()


def single_file(make, kind):
    """(data set, content to mutate, what turns the mutated content into a file)."""
    cifar = make.cifar_files("binary")
    if kind == "tar.gz":
        return "cifar10", make.tar_bytes(cifar), bytes
    if kind == "tar":
        return "cifar10", make.tar_bytes(make.cifar_files(), "w"), gzip.compress
    if kind == "zip":
        return "cifar10", make.zip_bytes(cifar), bytes
    if kind == "zip of kaggle":
        return "gtsrb", make.zip_bytes(make.gtsrb_files("kaggle")), bytes
    if kind == "zip of a folder":
        return "folder", make.zip_bytes(pictures(make)), bytes
    if kind == "gtsrb npz":
        return "gtsrb", make.npz_bytes(**gtsrb_arrays()[0]), bytes
    if kind == "npz":
        return "npz", make.npz_bytes(**arrays()), bytes
    body = io.BytesIO()
    np.save(body, arrays()["train_images"])
    others = {}
    for key, array in arrays().items():
        other = io.BytesIO()
        np.save(other, array)
        others[f"{key}.npy"] = other.getvalue()
    pack = lambda content: stored_zip({**others, "train_images.npy": content})  # noqa: E731
    return "npz", body.getvalue(), pack


limits = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == 60,
    suppress_health_check=list(HealthCheck),
)


def fuzz(check):
    """Calls check(edits) with many edits, until the time is up; at least with a few."""
    seen, end = [], time.monotonic() + SECONDS

    @limits
    @given(EDITS)
    def run(edits):
        if len(seen) < 3 or time.monotonic() < end:
            seen.append(edits)
            check(edits)

    run()
    tally.add("mutated data files", len(seen))


@pytest.mark.parametrize(
    "kind",
    [
        *("tar.gz", "tar", "zip", "zip of kaggle", "zip of a folder"),
        *("npz", "npz member", "gtsrb npz"),
    ],
)
def test_mutated_files(make, tmp_path, kind):
    name, content, pack = single_file(make, kind)
    path = tmp_path / ("mutated.npz" if "npz" in kind else "mutated")

    def check(edits):
        path.write_bytes(pack(mutate(content, edits)))
        survives(name, path)

    fuzz(check)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("kind", "victim"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar10 of Python 3", "cifar-10-batches-py/test_batch"),
        ("kaggle", "Train.csv"),
        ("kaggle", "Test/00001.png"),
        ("official", "GTSRB/Final_Test/Images/GT-final_test.csv"),
        ("official", "GTSRB/Final_Training/Images/00007/GT-00007.csv"),
        ("official", "GTSRB/Final_Test/Images/00001.ppm"),
        ("gtsrb prepared", "gtsrb-test.array_record-00000-of-00001"),
        ("gtsrb prepared", "dataset_info.json"),
        ("gtsrb prepared", "origin.json"),
        ("gtsrb prepared", "checksums.sha256"),
        ("gtsrb tfrecord", "gtsrb-train.tfrecord-00000-of-00001"),
        ("npy", "gtsrb_test_data_sorted.npy"),
        ("gtsrb npz", "set.npz"),
        ("gtsrb npz", "gtsrb_rois.npz"),
        ("folder", "train/b/1.png"),
    ],
)
def test_mutated_file_in_a_folder(make, tmp_path, kind, victim):
    name = "cifar10" if kind.startswith("cifar10") else "gtsrb"
    source = opened = tmp_path / "source"
    if name == "cifar10":
        make.write_folder(source, make.cifar_files("python3" if kind.endswith("3") else "python"))
    elif kind == "npy":
        source.mkdir()
        for split in ("train", "test"):
            np.save(source / f"gtsrb_{split}_data_sorted.npy", arrays()[f"{split}_images"])
            np.save(source / f"gtsrb_{split}_label_sorted.npy", arrays()[f"{split}_labels"])
    elif kind == "folder":
        name = "folder"
        make.write_folder(source, pictures(make))
    elif kind == "gtsrb npz":
        both = dict(zip(("set.npz", "gtsrb_rois.npz"), gtsrb_arrays(), strict=True))
        make.write_folder(source, {file: make.npz_bytes(**both[file]) for file in both})
        opened = source / "set.npz"
    elif kind in ("gtsrb prepared", "gtsrb tfrecord"):
        raw = make.write_folder(tmp_path / "raw", make.gtsrb_files("kaggle", classes=(0, 1)))
        shutil.move(data.prepare("gtsrb", raw, tmp_path / "tfds"), source)
        if victim != "checksums.sha256":
            (source / "checksums.sha256").unlink()
        if kind == "gtsrb tfrecord":
            make.as_tfrecord(source)
    else:
        make.write_folder(source, make.gtsrb_files(kind))
    content = (source / victim).read_bytes()

    def check(edits):
        (source / victim).write_bytes(mutate(content, edits))
        survives(name, opened)

    fuzz(check)
    assert set(os.listdir(tmp_path)) <= {"source", "raw", "tfds"}


def test_mutations_meet_both_outcomes(make, tmp_path):
    """The mutations neither all fail nor all pass, so the checks above are worth something."""
    outcomes = set()
    path = tmp_path / "table"
    make.write_folder(path, make.gtsrb_files("kaggle"))
    content = (path / "Train.csv").read_bytes()

    @settings(limits, max_examples=60)
    @given(EDITS)
    def run(edits):
        if len(outcomes) == 2:
            return
        (path / "Train.csv").write_bytes(mutate(content, edits))
        try:
            data.load("gtsrb", path)
            outcomes.add("loaded")
        except PmoeError:
            outcomes.add("refused")

    run()  # As many as both take, however slow the machine is.
    assert outcomes == {"loaded", "refused"}


def test_mutated_state_of_an_interrupted_prepare(make, tmp_path, monkeypatch):
    """Whatever state.json says: the whole data set, or a refusal that leaves none."""
    monkeypatch.setattr(prepared, "SHARD_RECORDS", 5)
    source = make.write_folder(tmp_path / "source", make.gtsrb_files("kaggle", classes=(0, 1)))
    interrupted, target = tmp_path / "interrupted", tmp_path / "tfds"
    wanted = data.load("gtsrb", source).fingerprint()

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(prepared, "_finish", stop)
        data.prepare("gtsrb", source, interrupted)
    state = interrupted / "gtsrb/.1.0.0.partial/state.json"
    content = state.read_bytes()
    assert b'"skipped": 0' in content

    def check(edits):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(interrupted, target)
        (target / state.relative_to(interrupted)).write_bytes(mutate(content, edits))
        try:
            data.prepare("gtsrb", source, target, max_bytes=2**24)
        except PmoeError as error:
            assert "\n" not in str(error) and prepared.find("gtsrb", str(target)) is None
            return
        assert data.load("gtsrb", data_dir=target).fingerprint() == wanted

    fuzz(check)


@pytest.mark.parametrize("victim", ["Train.csv", "Test/00001.png"])
def test_mutated_source_of_prepare(make, tmp_path, victim):
    """A mutated source is prepared, or refused and nothing appears."""
    source = tmp_path / "source"
    make.write_folder(source, make.gtsrb_files("kaggle", classes=(0, 1)))
    content, target = (source / victim).read_bytes(), tmp_path / "tfds"

    def check(edits):
        shutil.rmtree(target, ignore_errors=True)
        (source / victim).write_bytes(mutate(content, edits))
        try:
            data.prepare("gtsrb", source, target, max_bytes=2**24)
        except PmoeError as error:
            assert "\n" not in str(error) and prepared.find("gtsrb", str(target)) is None
            return
        prepared_set, direct = data.load("gtsrb", data_dir=target), data.load("gtsrb", source)
        assert prepared_set.fingerprint() == direct.fingerprint()

    fuzz(check)
