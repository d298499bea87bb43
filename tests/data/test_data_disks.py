"""Disks that are full or read-only, as real mounts: needs root, and is skipped without."""

import contextlib
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pmoe_jax import cli, data
from pmoe_jax.data import prepared
from pmoe_jax.errors import PmoeError


def mount(*words):
    return subprocess.run(["mount", *words], capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    """A file system of 128 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    made = mount("-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder))
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({made.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder, left):
    """Takes all space but so many bytes; the file can be removed again."""
    with open(folder / "filling", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with open(folder / "filling", "r+b") as file:
        file.truncate((folder / "filling").stat().st_size - left)
    return folder / "filling"


def contents(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def source(make, tmp_path):
    return make.write_folder(tmp_path / "gtsrb", make.gtsrb_files("kaggle"))


def test_prepare_on_a_full_disk(source, disk, monkeypatch):
    """Goes on, once there is room again, behind the shards that were whole."""
    monkeypatch.setattr(prepared, "SHARD_RECORDS", 3)
    (disk / "mine.txt").write_text("stays")
    filling = fill(disk, 0)
    with pytest.raises(PmoeError, match="0 MiB free but up to 0 MiB are needed; free some space"):
        data.prepare("gtsrb", source, disk / "tfds")
    # The space is there when it is checked, and gone a little later.
    filling.unlink()
    assert mount("-o", "remount,size=1m", str(disk)).returncode == 0
    filling = fill(disk, 280 * 1024)  # a shard takes 64 or 128 KiB
    monkeypatch.setattr(prepared, "_check_space", lambda records, folder: None)
    with pytest.raises(PmoeError, match=r"No space left on device.*it goes on where it stopped"):
        data.prepare("gtsrb", source, disk / "tfds")
    assert (disk / "mine.txt").read_text() == "stays"
    with pytest.raises(PmoeError, match="gtsrb is not prepared"):
        data.load("gtsrb", data_dir=disk / "tfds")
    filling.unlink()
    half = contents(disk / "tfds/gtsrb/.1.0.0.partial")
    whole = {Path(path).name for path in half if re.search(r"array_record-[0-9of-]+$", path)}
    assert whole
    assert mount("-o", "remount,size=4m", str(disk)).returncode == 0
    monkeypatch.setattr(prepared, "example", counted := Counted(prepared.example))
    folder = data.prepare("gtsrb", source, disk / "tfds")
    assert counted.calls == 15 - 3 * len(whole)
    loaded = data.load("gtsrb", folder)
    assert loaded.fingerprint() == data.load("gtsrb", source).fingerprint()


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_overwrite_on_a_full_disk(source, make, disk, monkeypatch):
    assert mount("-o", "remount,size=1m", str(disk)).returncode == 0
    data.prepare("gtsrb", source, disk)
    before = contents(disk)
    fill(disk, 8192)
    monkeypatch.setattr(prepared, "_check_space", lambda records, folder: None)
    with pytest.raises(PmoeError, match="No space left on device"):
        data.prepare("gtsrb", source, disk, overwrite=True)
    after = contents(disk)
    assert {name: after[name] for name in before} == before
    assert len(data.load("gtsrb", data_dir=disk).train_images) == 12


def test_read_only_disk(source, disk):
    assert mount("-o", "remount,size=1m", str(disk)).returncode == 0
    data.prepare("gtsrb", source, disk)
    (disk / "sheet.png").write_bytes(b"old")
    before = contents(disk)
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    for target, options in ((disk / "new", {}), (disk, {"overwrite": True})):
        with pytest.raises(PmoeError, match=r"Read-only file system\); choose another data_dir"):
            data.prepare("gtsrb", source, target, **options)
    with pytest.raises(PmoeError, match=r"cannot write .*sheet\.png \(Read-only file system\)"):
        draw(disk / "sheet.png")
    assert contents(disk) == before
    # Reading needs no writing.
    assert len(data.load("gtsrb", data_dir=disk).train_images) == 12
    assert data.prepare("gtsrb", source, disk) == str(disk / "gtsrb/1.0.0")


def draw(path):
    from pmoe_jax.data import commands

    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    pair = (pixels, np.array([0, 1, 0, 1]))
    commands.write_contact_sheet(data.dataset.make("npz", pair, pair), str(path))


def test_sheet_on_a_full_disk(disk):
    (disk / "sheet.png").write_bytes(b"old" * 1000)
    filling = fill(disk, 4096)
    before = contents(disk)
    with pytest.raises(PmoeError, match=r"cannot write .*sheet\.png \(No space left on device\)"):
        draw(disk / "sheet.png")
    assert contents(disk) == before
    filling.unlink()
    draw(disk / "sheet.png")
    assert (disk / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(disk) == ["sheet.png"]


def test_full_disk_from_the_command_line(disk, tmp_path, capfd):
    (disk / "sheet.png").write_bytes(b"old" * 1000)
    fill(disk, 0)
    assert cli.main(["data", "show", "digits", f"--sheet={disk}/sheet.png"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "No space left on device" in err
    assert (disk / "sheet.png").read_bytes() == b"old" * 1000
