"""`prepare` writes a TFDS data set once and whole; whatever interrupts it, nothing is lost."""

import fcntl
import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from pmoe_jax import data
from pmoe_jax.data import cifar10, prepared
from pmoe_jax.errors import PmoeError


@pytest.fixture
def sources(make, tmp_path):
    return {
        "cifar10": make.write_folder(tmp_path / "cifar", make.cifar_files()),
        "gtsrb": make.write_folder(tmp_path / "gtsrb", make.gtsrb_files("kaggle")),
    }


def same(left, right):
    assert left.fingerprint() == right.fingerprint()
    for field in ("train_tracks", "train_boxes", "test_boxes"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))


def contents(folder):
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.mark.parametrize("name", ["cifar10", "gtsrb"])
def test_prepared_equals_source(sources, tmp_path, monkeypatch, name):
    monkeypatch.setattr(prepared, "SHARD_RECORDS", 5)
    folder = data.prepare(name, sources[name], tmp_path / "tfds")
    original = data.load(name, sources[name])
    for options in (
        {"data_dir": tmp_path / "tfds"},
        {"source": tmp_path / "tfds"},
        {"source": folder},
        {"source": folder, "decode_up_to": 0},
    ):
        same(data.load(name, **options), original)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    same(data.load(name), original)
    assert len(list(Path(folder).glob(f"{name}-train.array_record-*-of-*"))) > 1
    assert os.listdir(tmp_path / "tfds" / name) == [prepared.VERSIONS[name]]  # no leftovers
    before = contents(tmp_path)
    assert data.prepare(name, sources[name], tmp_path / "tfds") == folder
    assert contents(tmp_path) == before


def test_crop_and_size_are_chosen_when_reading(sources, tmp_path):
    data.prepare("gtsrb", sources["gtsrb"], tmp_path / "tfds")
    options = {"crop_roi": True, "image_size": 20, "resize_filter": "box"}
    same(
        data.load("gtsrb", data_dir=tmp_path / "tfds", **options),
        data.load("gtsrb", sources["gtsrb"], **options),
    )


def test_tfds_reads_it(sources, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    for name in ("cifar10", "gtsrb"):
        folder = data.prepare(name, sources[name], tmp_path / "tfds")
        original = data.load(name, sources[name], image_size=32, resize_filter="bilinear")
        info = tfds.builder_from_directory(folder).info
        assert info.features["label"].names == list(original.class_names)
        assert info.splits["train"].num_examples == len(original.train_images)
        source = tfds.builder_from_directory(folder).as_data_source("train")
        assert [int(row["label"]) for row in source] == original.train_labels.tolist()
    rows = tfds.data_source("cifar10", split="test", data_dir=tmp_path / "tfds")
    images = [row["image"] for row in rows]
    np.testing.assert_array_equal(images, data.load("cifar10", sources["cifar10"]).test_images)
    assert rows[0]["id"] == b"test_00000"


def test_the_builder_writes_the_same(sources, tmp_path):
    """`tfds build` runs this class; the command itself needs TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from pmoe_jax.data.gtsrb_builder import Gtsrb

    builder = Gtsrb(data_dir=tmp_path / "built")
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(manual_dir=sources["gtsrb"]),
    )
    same(data.load("gtsrb", data_dir=tmp_path / "built"), data.load("gtsrb", sources["gtsrb"]))


def test_tfrecord_folders_are_read(make, sources, tmp_path):
    """TFDS writes tfrecord files by default."""
    folder = Path(data.prepare("cifar10", sources["cifar10"], tmp_path / "tfds"))
    make.as_tfrecord(folder)
    (folder / "checksums.sha256").unlink()
    same(data.load("cifar10", folder), data.load("cifar10", sources["cifar10"]))
    path = next(folder.glob("*train.tfrecord-*"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(PmoeError, match="cut short"):
        data.load("cifar10", folder)


def test_altered_and_incomplete_folders(sources, tmp_path):
    folder = Path(data.prepare("gtsrb", sources["gtsrb"], tmp_path / "tfds"))
    shard = next(folder.glob("*train*"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-20] + b"x" + good[-19:])
    with pytest.raises(PmoeError, match="was altered or is damaged"):
        data.load("gtsrb", folder)
    shard.unlink()
    with pytest.raises(PmoeError, match="lacks gtsrb-train"):
        data.load("gtsrb", folder)
    (folder / "checksums.sha256").unlink()
    with pytest.raises(PmoeError, match="no array_record or tfrecord files of the train split"):
        data.load("gtsrb", folder)
    shard.write_bytes(good[: len(good) // 2])
    with pytest.raises(PmoeError, match="cannot be read"):
        data.load("gtsrb", folder)
    shard.write_bytes(good)
    info = json.loads((folder / "dataset_info.json").read_text())
    with pytest.raises(PmoeError, match="holds gtsrb, not cifar10"):
        data.load("cifar10", folder)
    info["splits"][0]["shardLengths"] = ["99"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(PmoeError, match="instead of 99"):
        data.load("gtsrb", folder)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(PmoeError, match="cannot be read"):
        data.load("gtsrb", folder)


def test_features_file_is_never_imported(sources, tmp_path):
    """TFDS imports the module that features.json names."""
    folder = Path(data.prepare("gtsrb", sources["gtsrb"], tmp_path / "tfds"))
    (folder / "checksums.sha256").unlink()
    for path in ("features.json", "dataset_info.json"):
        text = (folder / path).read_text()
        text = text.replace("tensorflow_datasets.core.features.", "antigravity.")
        (folder / path).write_text(text)
    same(data.load("gtsrb", folder), data.load("gtsrb", sources["gtsrb"]))
    assert "antigravity" not in sys.modules


def run_until_killed(source, data_dir, shards):
    """Prepares GTSRB in another process, which SIGKILL ends in the middle of a shard."""
    script = f"""
        import os, signal
        from pmoe_jax import data
        from pmoe_jax.data import prepared
        prepared.SHARD_RECORDS = 3
        serialise, seen = prepared.example, [0]
        def example(*arguments):
            seen[0] += 1
            if seen[0] > 3 * {shards} + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return serialise(*arguments)
        prepared.example = example
        data.prepare("gtsrb", {str(source)!r}, {str(data_dir)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert done.returncode == -9, done.stderr


def test_resumes_after_sigkill(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD_RECORDS", 3)  # 12 training images: 4 shards
    target = tmp_path / "tfds"
    data.prepare("cifar10", sources["cifar10"], target)
    bystander = contents(target)
    run_until_killed(sources["gtsrb"], target, shards=2)
    with pytest.raises(PmoeError, match="gtsrb is not prepared"):
        data.load("gtsrb", data_dir=target)
    half = contents(target / "gtsrb/.1.0.0.partial")
    finished = {name for name in half if name.endswith("-of-00004")}
    assert len(finished) == 2 and [n for n in half if n.endswith(".tmp")]
    # As of a run with another number of shards.
    (target / "gtsrb/.1.0.0.partial/gtsrb-train.array_record-00006-of-00007").write_bytes(b"old")
    folder = data.prepare("gtsrb", sources["gtsrb"], target)
    after = contents(folder)
    assert {name: after[name] for name in finished} == {name: half[name] for name in finished}
    assert os.listdir(target / "gtsrb") == ["1.0.0"]
    assert not [name for name in after if name.endswith((".tmp", "state.json", "-of-00007"))]
    same(data.load("gtsrb", folder), data.load("gtsrb", sources["gtsrb"]))
    assert {name: contents(target)[name] for name in bystander} == bystander


def test_resumes_after_a_stop_at_the_very_end(sources, tmp_path, monkeypatch):
    """Metadata and checksums are still missing: the finished shards are kept."""
    tfds = pytest.importorskip("tensorflow_datasets")
    target = tmp_path / "tfds"

    def stop(**metadata):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tfds.folder_dataset, "write_metadata", stop)
        data.prepare("gtsrb", sources["gtsrb"], target)
    half = contents(target / "gtsrb/.1.0.0.partial")
    shards = {name for name in half if "array_record" in name}
    assert shards
    after = contents(data.prepare("gtsrb", sources["gtsrb"], target))
    assert {name: after[name] for name in shards} == {name: half[name] for name in shards}
    same(data.load("gtsrb", data_dir=target), data.load("gtsrb", sources["gtsrb"]))


def test_a_damaged_state_is_not_believed(sources, tmp_path, monkeypatch):
    """Entries that cannot be of the shard beside them are written anew."""
    monkeypatch.setattr(prepared, "SHARD_RECORDS", 5)

    def stop(*_):
        raise KeyboardInterrupt

    target = tmp_path / "tfds"
    path = target / "gtsrb/.1.0.0.partial/state.json"
    for changes in ({"images": 5}, {"bytes": "many"}, {"skipped": -1}, {"content": None}):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prepared, "_finish", stop)
            data.prepare("gtsrb", sources["gtsrb"], target)
        state = json.loads(path.read_text())
        entry = state["shards"]["gtsrb-test.array_record-00000-of-00001"]
        assert entry["images"] == 3
        entry.update(changes)
        path.write_text(json.dumps(state))
        data.prepare("gtsrb", sources["gtsrb"], target)
        same(data.load("gtsrb", data_dir=target), data.load("gtsrb", sources["gtsrb"]))
        shutil.rmtree(target)


def test_prepared_from_another_source(make, sources, tmp_path):
    target = tmp_path / "tfds"
    folder = data.prepare("gtsrb", sources["gtsrb"], target)
    before = contents(target)
    # The same files, newer ones, and the same files in an archive.
    os.utime(Path(sources["gtsrb"], "Train.csv"), (1, 1))
    packed = tmp_path / "kaggle.zip"
    packed.write_bytes(make.zip_bytes(make.gtsrb_files("kaggle")))
    for source in (sources["gtsrb"], packed, None):
        assert data.prepare("gtsrb", source, target) == folder
    official = make.write_folder(tmp_path / "official", make.gtsrb_files("official"))
    with pytest.raises(
        PmoeError, match=r"another source \(gtsrb, Kaggle layout, .*official \(official release"
    ):
        data.prepare("gtsrb", official, target)
    files = make.gtsrb_files("kaggle")
    table = files["Test.csv"].decode().replace("1,2,20,24", "1,2,20,23")
    boxes = make.write_folder(tmp_path / "boxes", {**files, "Test.csv": table.encode()})
    one = make.png(np.zeros((25, 25, 3), np.uint8))
    picture = make.write_folder(tmp_path / "picture", {**files, "Test/00001.png": one})
    for source in (boxes, picture):
        with pytest.raises(PmoeError, match="was prepared from another source"):
            data.prepare("gtsrb", source, target)
    for source in (sources["gtsrb"], None):
        with pytest.raises(PmoeError, match="was prepared with skip_corrupt=False, not True"):
            data.prepare("gtsrb", source, target, skip_corrupt=True)
    assert contents(target) == before
    (Path(folder) / "origin.json").unlink()  # as TFDS itself leaves a folder
    with pytest.raises(PmoeError, match="does not say what it was prepared from"):
        data.prepare("gtsrb", sources["gtsrb"], target)
    assert data.prepare("gtsrb", None, target) == folder


def test_overwrite(make, sources, tmp_path, monkeypatch):
    target = tmp_path / "tfds"
    folder = data.prepare("gtsrb", sources["gtsrb"], target)
    before = contents(target)
    files = make.gtsrb_files("kaggle", classes=(1, 2))
    other = make.write_folder(tmp_path / "other", files)
    bad = make.write_folder(tmp_path / "bad", {**files, "Test/00002.png": b"x"})
    with pytest.raises(PmoeError, match="is not a readable image"):
        data.prepare("gtsrb", bad, target, overwrite=True)
    assert {name: contents(target)[name] for name in before} == before
    rename = os.rename

    def refuse(old, new):
        if new == folder and old.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(PmoeError, match=r"cannot write .*Permission denied"):
            data.prepare("gtsrb", other, target, overwrite=True)
    assert {name: contents(target)[name] for name in before} == before
    # Killed between the two renames: the old one comes back.
    os.rename(folder, target / "gtsrb/.1.0.0.replaced")
    assert data.prepare("gtsrb", sources["gtsrb"], target) == folder
    assert {name: contents(target)[name] for name in before} == before
    assert data.prepare("gtsrb", other, target, overwrite=True) == folder
    same(data.load("gtsrb", data_dir=target), data.load("gtsrb", other))
    assert os.listdir(target / "gtsrb") == ["1.0.0"]
    with pytest.raises(PmoeError, match=r"is the data set itself; .* in which gtsrb/1\.0\.0 lies"):
        data.prepare("gtsrb", other, folder, overwrite=True)
    shutil.copytree(folder, target / "gtsrb/2.0.0")
    with pytest.raises(PmoeError, match=r"2\.0\.0 is newer than the version 1\.0\.0"):
        data.prepare("gtsrb", other, target, overwrite=True)


def test_folders_of_another_data_set(sources, tmp_path):
    folder = data.prepare("cifar10", sources["cifar10"], tmp_path / "tfds")
    before = contents(tmp_path)
    for place in (folder, tmp_path / "renamed"):
        if place != folder:
            shutil.copytree(folder, place / "gtsrb/1.0.0")
            before = contents(tmp_path)
        for call in (data.prepare, data.load):
            with pytest.raises(PmoeError, match="holds cifar10, not gtsrb"):
                call("gtsrb", sources["gtsrb"] if call is data.prepare else None, data_dir=place)
    assert contents(tmp_path) == before


def test_the_origin_is_kept(make, sources, tmp_path):
    """A set prepared from small pictures can be told from one of the full-size ones."""
    full = data.load("gtsrb", sources["gtsrb"])
    arrays = {
        f"{split}_{kind}": getattr(full, f"{split}_{kind}")
        for split in ("train", "test")
        for kind in ("images", "labels")
    }
    (tmp_path / "small.npz").write_bytes(make.npz_bytes(**arrays))
    for number, (source, kind) in enumerate(
        [(sources["gtsrb"], "Kaggle layout"), (tmp_path / "small.npz", ".npz of 32x32 images")]
    ):
        target = tmp_path / str(number)
        folder = Path(data.prepare("gtsrb", source, target))
        assert data.load("gtsrb", source).origin == kind
        assert data.load("gtsrb", data_dir=target).origin == kind
        assert f"from {kind}, written by" in (folder / "dataset_info.json").read_text()
        assert json.loads((folder / "origin.json").read_text())["source"] == Path(source).name
    with pytest.raises(PmoeError, match="was prepared from another source"):
        data.prepare("gtsrb", sources["gtsrb"], tmp_path / "1")


def test_a_changed_source_starts_anew(make, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD_RECORDS", 3)
    run_until_killed(sources["gtsrb"], tmp_path / "tfds", shards=2)
    files = make.gtsrb_files("kaggle")
    image = "Train/0/00000_00000_00000.png"
    files[image] = make.png(np.zeros((20, 30, 3), np.uint8))
    make.write_folder(sources["gtsrb"], {image: files[image]})
    data.prepare("gtsrb", sources["gtsrb"], tmp_path / "tfds")
    gtsrb = data.load("gtsrb", data_dir=tmp_path / "tfds")
    assert gtsrb.train_images[0].max() == 0
    same(gtsrb, data.load("gtsrb", sources["gtsrb"]))


def test_two_at_once(sources, tmp_path):
    with (
        prepared._locked(str(tmp_path / "tfds/gtsrb/.1.0.0.partial.lock")),
        pytest.raises(PmoeError, match="another process is preparing"),
    ):
        data.prepare("gtsrb", sources["gtsrb"], tmp_path / "tfds")


def test_a_lock_that_its_last_owner_removes_is_taken_anew(tmp_path, monkeypatch):
    """Between our opening and our locking it."""
    path, take = str(tmp_path / "x.lock"), fcntl.flock

    def flock(file, how):
        monkeypatch.setattr(fcntl, "flock", take)
        os.remove(path)
        take(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with prepared._locked(path):
        assert os.path.exists(path)
        with pytest.raises(PmoeError, match="another process is"), prepared._locked(path):
            pass
    assert not os.path.exists(path)


def test_full_and_read_only_disks(sources, tmp_path, monkeypatch):
    target = tmp_path / "tfds"
    data.prepare("cifar10", sources["cifar10"], target)
    before = contents(target)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("U", "free")(1000))
    with pytest.raises(PmoeError, match=r"MiB free but up to .* are needed"):
        data.prepare("gtsrb", sources["gtsrb"], target)
    monkeypatch.undo()
    for place in (tmp_path / "cifar/cifar-10-batches-py/test_batch", "/proc/pmoe", "/dev/null"):
        with pytest.raises(PmoeError, match=r"cannot write .*; choose another data_dir"):
            data.prepare("gtsrb", sources["gtsrb"], place)
    # A real write error: no file of this process may pass 20 kB.
    script = f"""
        import resource
        from pmoe_jax import data
        from pmoe_jax.errors import PmoeError
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            data.prepare("gtsrb", {sources["gtsrb"]!r}, {str(target)!r})
        except PmoeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert "File too large" in done.stdout and "goes on where it stopped" in done.stdout
    now = contents(target)
    assert {name: now[name] for name in before} == before
    data.prepare("gtsrb", sources["gtsrb"], target)
    same(data.load("gtsrb", data_dir=target), data.load("gtsrb", sources["gtsrb"]))


def test_corrupt_images(make, sources, tmp_path, capsys):
    bad = "Train/7/00007_00001_00002.png"
    make.write_folder(sources["gtsrb"], {bad: b"x"})
    with pytest.raises(PmoeError, match=r"00007_00001_00002\.png is not a readable image"):
        data.prepare("gtsrb", sources["gtsrb"], tmp_path / "tfds")
    assert prepared.find("gtsrb", str(tmp_path / "tfds")) is None
    data.prepare("gtsrb", sources["gtsrb"], tmp_path / "tfds", skip_corrupt=True)
    assert "skipped 1 corrupt images" in capsys.readouterr().err
    assert len(data.load("gtsrb", data_dir=tmp_path / "tfds").train_images) == 11


def test_bad_requests(make, sources, tmp_path):
    with pytest.raises(PmoeError, match="'digits' cannot be prepared; allowed are cifar10, gtsrb"):
        data.prepare("digits", None, tmp_path)
    with pytest.raises(PmoeError, match="gtsrb needs a source"):
        data.prepare("gtsrb", None, tmp_path)
    files = make.cifar_files("binary")
    files["cifar-10-batches-bin/test_batch.bin"] = b"\x0a" + bytes(3072)
    bad = make.write_folder(tmp_path / "bad", files)
    with pytest.raises(PmoeError, match="label 10 of image 0 is out of range"):
        data.prepare("cifar10", bad, tmp_path / "tfds")
    table = make.gtsrb_files("kaggle")["Test.csv"].splitlines(keepends=True)[0]
    empty = make.write_folder(tmp_path / "e", {**make.gtsrb_files("kaggle"), "Test.csv": table})
    with pytest.raises(PmoeError, match="the test split is empty"):
        data.prepare("gtsrb", empty, tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()
    (tmp_path / "other/gtsrb/1.0.0").mkdir(parents=True)
    with pytest.raises(PmoeError, match="is no TFDS data set; move it away"):
        data.prepare("gtsrb", sources["gtsrb"], tmp_path / "other")


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    (tmp_path / "www").mkdir()
    handler = functools.partial(Quiet, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"
        server.shutdown()


def test_download(make, server, tmp_path, monkeypatch):
    """CIFAR-10 without a source: fetched and verified through TFDS's download manager."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder, url = server
    archive = make.tar_bytes(make.cifar_files("binary"))
    (folder / "cifar.tar.gz").write_bytes(archive)
    from tensorflow_datasets.core.download.checksums import UrlInfo

    builder = tfds.builder_cls("cifar10")
    info = UrlInfo(len(archive), hashlib.sha256(archive).hexdigest(), "cifar.tar.gz")
    monkeypatch.setattr(builder, "url_infos", {url: info})
    data.prepare("cifar10", None, tmp_path / "tfds")
    images, _ = make.cifar_arrays()
    cifar = data.load("cifar10", data_dir=tmp_path / "tfds")
    np.testing.assert_array_equal(cifar.test_images, images[20:])
    (folder / "cifar.tar.gz").write_bytes(archive[:-1] + b"?")
    with pytest.raises(
        PmoeError, match=r"CIFAR-10 could not be downloaded .*give it as the source"
    ):
        cifar10.download(str(tmp_path / "elsewhere"))
