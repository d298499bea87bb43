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

from pmoe_jax import cli, detectors, fine_pruning, fine_tuning, launch, rundir, sweep
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import DiskError
from pmoe_jax.rundir import RunDirectory


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    small.use(monkeypatch)


@pytest.fixture
def config(tiny_config):
    """Checkpoints after steps 4, 6, 8 and 12."""
    return small.attacked(tiny_config)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Where the run of `whole` is trained for the first test that asks for it."""
    return tmp_path_factory.mktemp("once") / "run"


@pytest.fixture
def whole(config, once, tmp_path):
    if not once.exists():
        small.train(config, once)
    return shutil.copytree(once, tmp_path / "whole" / "run")


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
    if left <= 8192:  # A checkpoint is larger than that; of one that is begun nothing stays.
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

    async def refuse(handler, directory, *args, **options):
        if done[0] in range(5, 10 if passes else 13):
            (directory / "d").mkdir(exist_ok=True)
            (directory / "d" / "beginning").write_bytes(bytes(4096))
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return await write(handler, directory, *args, **options)

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
    assert trained_lib.evaluate(path).epoch == 4 / 6  # reading needs no writing
    mount("-o", "remount,rw", disk).check_returncode()
    small.train(config, path)
    same(path, whole)
    tally.add("disk: read-only")


def vanish(path, replaced):
    """Removes a directory; another owner may have one of the same name then."""
    shutil.rmtree(path)
    if replaced:
        path.mkdir()
        (path / ".lock").write_text("")
        (path / "thesis.tex").write_text("mine")


def left_alone(path, replaced):
    """Whether nothing was written there since it vanished."""
    found = sorted(os.listdir(path)) if path.exists() else []
    return found == ([".lock", "thesis.tex"] if replaced else [])


def behind(patch, owner, name, action):
    """Does something once, behind the first call of a function."""
    original, done = getattr(owner, name), []

    def called(*args, **options):
        result = original(*args, **options)
        if not done:
            done.append(True)
            action()
        return result

    patch.setattr(owner, name, called)


GONE = "was removed or replaced while it was in use"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_vanishes(replaced, config, tmp_path):
    """Nothing is written into what may be another owner's directory by now."""
    path = tmp_path / "run"
    with pytest.raises(PmoeError, match=GONE) as caught:
        small.train(config, path, watch=at(5, lambda: vanish(path, replaced)))
    assert not isinstance(caught.value, DiskError)
    assert left_alone(path, replaced)
    tally.add("disk: vanished")


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("moment", ["a program is trained", "paired", "kept"])
def test_a_sweep_whose_directory_vanishes_between_programs(
    moment, replaced, config, tmp_path, monkeypatch
):
    path = tmp_path / "link" / "sweep"
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    cells = [{"name": "clean", "trigger.name": "none", "poison.rate": 0.0}, {"name": "attacked"}]
    owner, name = {
        "a program is trained": (run_lib, "train"), "paired": (sweep, "_pair"),
        "kept": (sweep, "_keep"),
    }[moment]  # fmt: skip
    behind(monkeypatch, owner, name, lambda: vanish(path, replaced))
    with pytest.raises(PmoeError, match=f"sweep {GONE}") as caught:
        sweep.run(
            small.with_fields(config, **{"train.epochs": 1}), cells, path, max_members=2,
            progress=False,
        )  # fmt: skip
    assert "\n" not in str(caught.value) and not isinstance(caught.value, DiskError)
    assert left_alone(path, replaced)
    tally.add("disk: vanished")


def test_a_program_whose_run_is_lost_does_not_count_as_finished(config, tmp_path, monkeypatch):
    """One without pairs reads nothing of it."""
    path = tmp_path / "sweep"
    cells = [{"name": "clean", "trigger.name": "none", "poison.rate": 0.0}]
    shared = small.with_fields(config, **{"train.epochs": 1})
    with monkeypatch.context() as patch:
        behind(patch, run_lib, "train", lambda: shutil.rmtree(path / "runs"))
        with pytest.raises(PmoeError, match="does not hold its last step any more"):
            sweep.run(shared, cells, path, progress=False)
    assert not (path / "paired").exists() and not (path / "rows.jsonl").exists()
    sweep.run(shared, cells, path, progress=False)
    assert (path / "rows.jsonl").stat().st_size


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    ("method", "owner", "name"),
    [
        ("fine_pruning", fine_pruning, "_curve"),
        ("fine_pruning", fine_tuning.Session, "prune"),
        ("fine_pruning", fine_tuning.Session, "tune"),
        ("strip", detectors, "_logits_of"),
        ("neural_cleanse", detectors, "read_json"),
    ],
)
def test_a_defence_whose_directory_vanishes_between_cells(
    method, owner, name, replaced, whole, tmp_path, monkeypatch, capfd
):
    path, file = tmp_path / "defence", tmp_path / "defence.py"
    file.write_text(
        "from pmoe_jax import defend_config\n"
        "def get_config():\n"
        "    config = defend_config.default()\n"
        "    config.prune.update(layers=('Dense_0',), output='raw', rates=(0.5,), images=40)\n"
        "    config.prune.curve_rates = (0.0, 0.5)\n"
        "    config.tune.update(epochs=1, learning_rates=(0.1, 0.01))\n"
        "    config.strip.update(images=20, overlays=4)\n"
        "    config.cleanse.update(rounds=2, batches_per_round=2, batch_size=8)\n"
        f"    config.method = {method!r}\n"
        "    return config\n"
    )
    words = ["defend", f"--checkpoint={whole}", f"--workdir={path}", f"--config={file}",
             "--noprogress"]  # fmt: skip
    monkeypatch.setattr(launch, "use_compilation_cache", lambda: None)
    behind(monkeypatch, owner, name, lambda: vanish(path, replaced))
    assert cli.main(words) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(said) == 1 and f"defence {GONE}" in said[0], said
    assert left_alone(path, replaced)
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
