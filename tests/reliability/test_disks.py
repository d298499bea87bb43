"""Disks that are full, read-only, over quota or gone while a run trains.

Small disks are real mounts: that needs root, and is skipped without.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import subprocess

import harness
import orbax.checkpoint as ocp
import pytest
import small
import tally

from pmoe_jax import run as run_lib
from pmoe_jax import rundir
from pmoe_jax.errors import PmoeError
from pmoe_jax.rundir import DiskError, RunDirectory


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    small.use(monkeypatch)


@pytest.fixture
def config(tiny_config):
    """Checkpoints after steps 4, 6, 8 and 12."""
    return small.attacked(tiny_config)


@pytest.fixture
def whole(config, tmp_path):
    small.train(config, tmp_path / "whole" / "run")
    return tmp_path / "whole" / "run"


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, timeout=60)


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    made = mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", folder)
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({made.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True, timeout=60)


def fill(folder, left):
    """Takes all space but so many bytes."""
    path = folder / "filling"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with open(path, "r+b") as file:
        file.truncate(max(0, path.stat().st_size - left))
    return path


def at(step, action):
    """A `watch` that does something once when a step is done."""

    def watch(done, total):
        if done == step:
            action()

    return watch


def same(path, whole):
    one, other = small.restored(path), small.restored(whole)
    harness.assert_bit_equal(one, other)
    assert (path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("left", [0, 8192, 24 * 1024])
def test_a_disk_that_is_full_for_a_while(left, config, whole, disk, capfd):
    """Training goes on, and saves as soon as there is room again."""
    run = RunDirectory(disk / "run")
    seen = []

    def watch(done, total):
        if done == 5:
            seen.append(fill(disk, left))
        if done == 11:
            seen.append(run.whole_steps())
            seen[0].unlink()

    small.train(config, disk / "run", watch=watch)
    said = capfd.readouterr().err
    if left == 0:
        assert seen[1] == [4], said
        assert said.count("warning: training goes on unsaved") == 2  # steps 6 and 8
        assert "No space left on device" in said
    assert "Traceback" not in said
    same(disk / "run", whole)
    assert all(run.damage(step) is None for step in run.whole_steps())
    assert [name for name in os.listdir(disk / "run" / "checkpoints") if not name.isdigit()] == []
    tally.add("disk: full for a while")


@pytest.mark.parametrize("passes", [True, False])
def test_a_quota_that_a_checkpoint_exceeds(passes, config, whole, tmp_path, monkeypatch, capfd):
    """As a full disk; it is met when the files of a checkpoint that is begun are written."""
    path, write, done = tmp_path / "run", ocp.StandardCheckpointHandler.async_save, [0]

    def watch(step, total):
        done[0] = step

    async def refuse(handler, *args, **options):
        if done[0] in range(5, 10 if passes else 13):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return await write(handler, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "async_save", refuse)
        if passes:
            small.train(config, path, watch=watch)
        else:
            with pytest.raises(DiskError, match=r"\(Disk quota exceeded\); make room"):
                small.train(config, path, watch=watch)
            run = RunDirectory(path)
            assert run.whole_steps() == [4] and run.damage(4) is None
            assert os.listdir(path / "checkpoints") == ["4"]
    said = capfd.readouterr().err
    assert said.count("warning: training goes on unsaved") == 2  # steps 6 and 8
    assert "Traceback" not in said
    if not passes:
        small.train(config, path)
    same(path, whole)
    tally.add("disk: over quota")


@pytest.mark.parametrize("left", [0, 4096, 16 * 1024, 40 * 1024])
def test_a_disk_that_stays_full(left, config, whole, disk):
    """The last whole checkpoint survives, the error is clear, and the same command goes on."""
    with pytest.raises(DiskError, match="make room") as caught:
        small.train(config, disk / "run", watch=at(5, lambda: fill(disk, left)))
    assert "\n" not in str(caught.value) and "No space left" in str(caught.value)
    run = RunDirectory(disk / "run")
    steps = run.whole_steps()
    assert steps and all(run.damage(step) is None for step in steps[-1:])
    (disk / "filling").unlink()
    small.train(config, disk / "run")
    same(disk / "run", whole)
    tally.add("disk: stays full")


def test_a_disk_that_turns_read_only(config, whole, disk):
    path = disk / "run"
    folder = path / "checkpoints"

    def turn():
        # This folder alone: a mount where a file, as the lock, is open for writing stays writable.
        mount("--bind", folder, folder).check_returncode()
        mount("-o", "remount,bind,ro", folder).check_returncode()

    try:
        with pytest.raises(DiskError, match="Read-only file system"):
            small.train(config, path, watch=at(5, turn))
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=60)
    assert RunDirectory(path).whole_steps() == [4]
    mount("-o", "remount,ro", disk).check_returncode()
    with pytest.raises(PmoeError, match=r"cannot be written .*; choose another workdir"):
        small.train(config, path)
    assert run_lib.evaluate(path).epoch == 4 / 6  # reading needs no writing
    mount("-o", "remount,rw", disk).check_returncode()
    small.train(config, path)
    same(path, whole)
    tally.add("disk: read-only")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_vanishes(replaced, config, tmp_path):
    """Nothing is written into what may be another owner's directory by now."""
    path = tmp_path / "run"

    def vanish():
        shutil.rmtree(path)
        if replaced:
            path.mkdir()
            (path / ".lock").write_text("")
            (path / "thesis.tex").write_text("mine")

    with pytest.raises(PmoeError, match="was removed or replaced while it was in use") as caught:
        small.train(config, path, watch=at(5, vanish))
    assert not isinstance(caught.value, DiskError)
    assert sorted(os.listdir(path) if path.exists() else []) == (
        [".lock", "thesis.tex"] if replaced else []
    )
    tally.add("disk: vanished")


def test_a_refused_append_leaves_no_torn_line(config, tmp_path, monkeypatch):
    with RunDirectory(tmp_path / "run") as run:
        run.append("metrics.jsonl", [{"epoch": 1}])

        def refuse(descriptor):
            raise OSError(122, "Disk quota exceeded")

        with monkeypatch.context() as patch, pytest.raises(DiskError, match="quota exceeded"):
            patch.setattr(rundir.os, "fsync", refuse)
            run.append("metrics.jsonl", [{"epoch": 2}])
        run.append("metrics.jsonl", [{"epoch": 2}])
        assert run.rows() == [{"epoch": 1}, {"epoch": 2}]
    assert pathlib.Path(tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
