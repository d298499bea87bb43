"""The run directory and its checkpoints: what a kill, damage or a second process does to them."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pmoe_jax import checkpoints as checkpoints_lib
from pmoe_jax import config as config_lib
from pmoe_jax import files, provenance, rows
from pmoe_jax.checkpoints import FORMAT, Checkpoints
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import DiskError, write_atomically
from pmoe_jax.members import from_config
from pmoe_jax.rundir import RunDirectory

META = {"epoch": 1.0, "loss_sum": [0.5, float("nan")]}


def state_of(seed=0, width=3):
    """Two members' worth of odd values: 0-d, int, bool, negative zero, infinity, subnormal."""
    rng = np.random.default_rng(seed)
    odd = jnp.asarray([[-0.0, np.inf, 1e-41], [1.0, -1.5, 3e38]], jnp.float32)
    return {
        "params": {"kernel": jnp.asarray(rng.normal(size=(2, width, 4)), jnp.float32), "odd": odd},
        "opt_state": (jnp.asarray(rng.integers(0, 9, 2), jnp.int32), {}),
        "step": jnp.asarray([seed, seed], jnp.int32),
    }


def attack_of(seed=0):
    rng = np.random.default_rng(seed)
    masks = jnp.asarray(rng.random((2, 10)) < 0.3)
    return {"triggered": masks, "trigger": {"alpha": jnp.asarray(rng.random((2, 4, 4, 1)))}}


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def assert_bit_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def started(path, **changes):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    run = RunDirectory(path)
    with run:
        run.start(config, from_config(config))
    return run


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run with checkpoints 1 and 2; tests damage copies of it."""
    run = started(tmp_path_factory.mktemp("whole") / "run")
    with Checkpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), attack_of(step), META)
    return run.path


@pytest.fixture
def run(two_checkpoints, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(two_checkpoints, path)
    return RunDirectory(path)


def restore(run, expected=None, step=None):
    with Checkpoints(run) as checkpoints:
        return checkpoints.restore(abstract(state_of()) if expected is None else expected, step)


def files_of(run, step):
    folder = run.path / "checkpoints" / str(step)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest_file(run, step):
    return max(files_of(run, step), key=lambda path: path.stat().st_size)


# --- writing files ------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_text_and_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PmoeError, match=r"file\.json cannot be written \(No space left on device"):
        write_atomically(path, "new" * 10_000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_appended_rows_are_read_back_without_the_torn_last_line(tmp_path):
    run = started(tmp_path / "run")
    rows = [{"epoch": epoch, "value": 0.1 * epoch} for epoch in (1, 2, 3)]
    run.append("metrics.jsonl", rows[:1])
    run.append("metrics.jsonl", rows[1:])
    assert run.rows() == rows
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "va')
    assert run.rows() == rows


@pytest.mark.parametrize("damaged", ['{"epoch": 1, "val', "[1]", '{"value": 3}', "\x00\x00"])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path, damaged):
    run = started(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text('{"epoch": 1}\n' + damaged + '\n{"epoch": 2}\n')
    with pytest.raises(PmoeError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        run.rows()


def test_drop_after_keeps_earlier_epochs_line_for_line(tmp_path):
    run = started(tmp_path / "run")
    run.drop_after(0)  # no files yet: nothing to do
    lines = [{"epoch": epoch, "value": 100 / 3, "n": epoch} for epoch in (1, 1, 2, 3)]
    for name in ("metrics.jsonl", "training.jsonl"):
        run.append(name, lines)
        with open(run.path / name, "a") as file:
            file.write('{"epoch": 2, "torn')
    before = (run.path / "metrics.jsonl").read_text().splitlines()
    run.drop_after(2)
    for name in ("metrics.jsonl", "training.jsonl"):
        assert (run.path / name).read_text().splitlines() == before[:3]
    run.append("metrics.jsonl", lines[3:])
    assert run.rows() == lines


# --- one owner, one run -------------------------------------------------------------------------

HOLD = textwrap.dedent("""
    import sys, time
    from pmoe_jax.rundir import RunDirectory
    with RunDirectory(sys.argv[1]):
        print("locked", flush=True)
        time.sleep(600)
""")


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(PmoeError, match="run is in use by another process; wait"):
            RunDirectory(tmp_path / "run").__enter__()
    finally:
        owner.kill()
        owner.wait()
    with RunDirectory(tmp_path / "run"):
        pass


def test_a_lock_that_its_last_owner_removes_is_taken_anew(tmp_path, monkeypatch):
    """The owner, which is refused, removes its lock between our opening and locking it."""
    take = fcntl.flock

    def flock(file, how):
        monkeypatch.setattr(fcntl, "flock", take)
        (tmp_path / ".lock").unlink()
        take(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunDirectory(tmp_path) as run:
        run.check_still_there()
        with pytest.raises(PmoeError, match="is in use by another process"):
            RunDirectory(tmp_path).__enter__()


@pytest.mark.parametrize("gone", ["sweep", "."])
def test_what_lies_in_a_locked_directory_is_not_written_once_that_is_gone(
    gone, tmp_path, monkeypatch
):
    """Nor a directory in it made; where it was given from may be gone itself."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = "sweep was removed or replaced while it was in use"
    with RunDirectory("sweep"):
        files.write_with_sum(pathlib.Path("sweep/rows"), "1")
        shutil.rmtree(tmp_path / "here" / gone)
        for path in (pathlib.Path("sweep/rows"), pathlib.Path("sweep/deep/down/rows")):
            with pytest.raises(PmoeError, match=said):
                files.write_with_sum(path, "2")
        with pytest.raises(PmoeError, match=said):
            RunDirectory("sweep/runs/one").__enter__()
        assert not (tmp_path / "here" / gone).exists()
    (tmp_path / "here" / "sweep").mkdir(parents=True)
    files.write_with_sum(tmp_path / "here" / "sweep" / "rows", "3")  # It is nobody's now.


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_workdir_that_cannot_be_made_is_one_clear_error(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PmoeError, match=r"cannot be written .* choose another workdir"):
        RunDirectory(tmp_path / path).__enter__()


def test_the_lock_is_no_link_and_no_pipe_that_is_waited_for(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PmoeError, match=r"cannot be written .* choose another workdir"):
        RunDirectory(tmp_path / "run").__enter__()
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "run" / ".lock").unlink()
    os.mkfifo(tmp_path / "run" / ".lock")
    with RunDirectory(tmp_path / "run"):
        pass


def test_provenance_tells_kinds_of_processors_of_one_name_apart(monkeypatch):
    processor = (
        "processor : 0\ncpu family : {}\nmodel : {}\nmodel name : AMD EPYC\nflags : fpu {}\n\n"
    )
    for family, model, flags, kind in (
        (25, 1, "avx avx2", "cpu family 25, model 1, avx2"),
        (26, 2, "avx avx2 avx512f", "cpu family 26, model 2, avx512f"),
    ):
        text = processor.format(family, model, flags) * 2
        monkeypatch.setattr(pathlib.Path, "read_text", lambda *unused, text=text: text)
        assert provenance._processor() == {"cpu": "AMD EPYC", "cpu_kind": kind}


def test_start_writes_what_describes_a_run(tmp_path):
    run = started(tmp_path / "run", num_seeds=2, seed=5)
    assert config_lib.flatten(run.config())["seed"] == 5
    assert [member.seed for member in run.members()] == [5, 6]
    provenance = json.loads((run.path / "provenance.json").read_text())
    assert provenance["packages"]["jax"] == jax.__version__
    assert provenance["hardware"]["cores"] >= 1
    assert {"cpu", "cpu_kind"} <= set(provenance["hardware"])
    # The program by its name: where somebody keeps it is nobody's business.
    assert provenance["sessions"][0]["command"] == [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
    names = {"config.json", "members.json", "provenance.json", "manifest.json", ".lock"}
    assert set(os.listdir(run.path)) == names


def test_start_again_adds_a_session_and_changes_nothing_else(tmp_path):
    run = started(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    started(tmp_path / "run")
    after = {path.name: path.read_bytes() for path in run.path.iterdir()}
    assert len(json.loads(after.pop("provenance.json"))["sessions"]) == 2
    del before["provenance.json"]
    assert after == before


def test_start_refuses_another_config_and_names_the_fields(tmp_path):
    run = started(tmp_path / "run")
    run.append("metrics.jsonl", [{"epoch": 1}])
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(
        PmoeError, match=r"another config \(model.width: 10 -> 2; num_seeds: 3 -> 4\)"
    ):
        started(tmp_path / "run", **{"model.width": 2, "num_seeds": 4})
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_start_refuses_other_members(tmp_path):
    config = config_lib.default()
    run = started(tmp_path / "run")
    run.append("metrics.jsonl", [{"epoch": 1}])
    with run, pytest.raises(PmoeError, match=r"another config \(the members differ\)"):
        run.start(config, from_config(config)[1:])


def test_a_start_that_nothing_came_of_is_taken_over(tmp_path):
    """A run that did not fit into memory is repeated with fewer seeds in the same workdir."""
    first = started(tmp_path / "run", num_seeds=4)
    first.note(dataset={"sha256": "one"})
    second = started(tmp_path / "run", num_seeds=2)
    second.note(dataset={"sha256": "two"})
    assert len(second.members()) == 2
    assert second.config().num_seeds == 2
    assert second.whole_steps() == []


def test_a_start_that_left_parts_is_taken_over(tmp_path):
    """What stands there may be of a profile, or of a checkpoint that was not finished."""
    path = tmp_path / "run"
    started(path, num_seeds=4)
    (path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir(parents=True)
    (path / "profile").mkdir()
    (path / "training.jsonl").write_text('{"epoch": 1}\n')
    second = started(path, num_seeds=2)
    assert len(second.members()) == 2 and second.lines("training.jsonl") == []
    assert not (path / "checkpoints").exists()


def test_a_take_over_that_is_refused_removes_nothing(tmp_path):
    path = tmp_path / "run"
    started(path, num_seeds=4)
    (path / "thesis.tex").touch()
    before = sorted(os.listdir(path))
    with pytest.raises(PmoeError, match=r"is not empty and holds no run \(thesis.tex\)"):
        started(path, num_seeds=2)
    assert sorted(os.listdir(path)) == before
    assert len(started(path, num_seeds=4).members()) == 4


@pytest.mark.parametrize("files", [("config.json",), ("config.json", "checkpoints/5/model.bin")])
def test_start_leaves_the_config_of_other_programs_alone(files, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"of": "another framework"}')
    with pytest.raises(PmoeError, match=r"is not empty and holds no run \((config.json|check)"):
        started(tmp_path)
    for name in files:
        assert (tmp_path / name).read_text() == '{"of": "another framework"}'
    assert not (tmp_path / ".lock").exists() and not (tmp_path / "members.json").exists()


def test_start_refuses_a_folder_of_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(PmoeError, match=r"is not empty and holds no run \(thesis.tex\)"):
        started(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_start_goes_on_where_a_kill_left_half_a_start(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / ".lock").touch()
    (path / ".config.json.123.tmp").write_text("{")
    (path / "config.json").write_text('{"torn')  # cannot happen, but must not matter either
    run = started(path)
    assert run.config().to_dict() == config_lib.default().to_dict()
    assert not list(path.glob(".*.tmp"))


def test_start_removes_what_kills_left_of_any_file(tmp_path):
    path = tmp_path / "run"
    started(path)
    for name in ("metrics.jsonl", "training.jsonl", "manifest.json"):
        (path / f".{name}.123.tmp").write_text("{")
    (path / ".notes.tmp").write_text("of somebody else")
    started(path)
    assert [file.name for file in path.glob(".*.tmp")] == [".notes.tmp"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_write_that_is_broken_off_leaves_nothing(error, tmp_path, monkeypatch):
    def fails(*args):
        raise error

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises((KeyboardInterrupt, PmoeError)):
        write_atomically(tmp_path / "file", "text")
    assert not os.listdir(tmp_path)


def test_a_failed_save_waits_for_threads_that_only_begin():
    """As orbax's may when a disk is full: such a thread cannot be joined yet."""
    begun, ended = threading.Event(), threading.Event()

    class Slow(threading.Thread):
        def join(self, timeout=None):
            if not begun.is_set():
                begun.set()
                raise RuntimeError("cannot join thread before it is started")
            super().join(timeout)

    def work():
        begun.wait()
        ended.set()

    with pytest.raises(OSError), checkpoints_lib._without_tracebacks():
        Slow(target=work).start()
        raise OSError
    assert ended.is_set()


def test_noted_facts_cannot_change(tmp_path):
    run = started(tmp_path / "run")
    run.note(dataset={"sha256": "one"})
    run.note(dataset={"sha256": "one"}, other=1)
    started(tmp_path / "run")
    with pytest.raises(PmoeError, match="was begun with another dataset"):
        run.note(dataset={"sha256": "two"})


def test_name_is_the_folders_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunDirectory(".").name == tmp_path.name


# --- files with a sum beside them ---------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("killed", [0, 1, 2, 3])
def test_a_kill_while_a_file_and_its_sum_are_written_leaves_them_whole(
    killed, old, tmp_path, monkeypatch
):
    path, written = tmp_path / "rows.jsonl", []
    if old:
        files.write_with_sum(path, old)

    def write(*args):
        if len(written) == killed:
            raise KeyboardInterrupt
        written.append(args)
        write_atomically(*args)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", write)
        with contextlib.suppress(KeyboardInterrupt):
            files.write_with_sum(path, "new")
    files.check_sum(path)
    assert (path.read_text() if path.exists() else None) == ("new" if killed > 1 else old)
    files.write_with_sum(path, b"newer")
    for harm in (lambda: path.write_text("newes"), path.unlink):
        harm()
        with pytest.raises(PmoeError, match=r"rows\.jsonl (does not match|is missing)"):
            files.check_sum(path)


# --- what a stranger's directory may hold -------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "checkpoints/1/../../../secret", "../x", "checkpoints/²/x", "run.py"]
)
def test_a_manifest_that_lists_other_places_is_refused(run, name):
    manifest = json.loads((run.path / "manifest.json").read_text())
    del manifest["sha256"]
    (run.path / "manifest.json").write_text(json.dumps({**manifest, name: "00"}))
    with pytest.raises(PmoeError, match=r"manifest\.json is damaged"):
        restore(run)


def test_a_manifest_that_lost_or_renamed_an_entry_is_refused_by_its_own_name(run):
    """Else a checkpoint would be called damaged, or a file that is listed no more go unchecked."""
    path = run.path / "manifest.json"
    whole = json.loads(path.read_text())
    for name in whole:
        for other in ({}, {name[:-1] + "~": whole[name]}):
            kept = {key: value for key, value in whole.items() if key != name}
            if name == "sha256" and not other:
                continue  # As in manifests of older versions.
            path.write_text(json.dumps({**kept, **other}))
            with pytest.raises(PmoeError, match=r"manifest\.json is damaged"):
                restore(run)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"checkpoints/1/x": 3}', "[" * 100_000])
def test_a_damaged_manifest_is_refused(run, text):
    (run.path / "manifest.json").write_text(text)
    with pytest.raises(PmoeError, match=r"manifest\.json (is damaged|cannot be read)"):
        restore(run)


def test_without_its_manifest_no_checkpoint_is_trusted_or_removed(run):
    (run.path / "manifest.json").unlink()
    config = config_lib.default()
    for use in (lambda: restore(run), lambda: run.start(config, from_config(config))):
        with pytest.raises(PmoeError, match=r"manifest\.json is missing"):
            use()
    assert files_of(run, 1) and files_of(run, 2)


@pytest.mark.parametrize("name", ["config.json", "members.json"])
def test_an_altered_description_is_found(run, name):
    path = run.path / name
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(PmoeError, match=f"{name} does not match its SHA-256 sum"):
        run.config(), run.members()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("config.json", text) for text in (None, "{", "3", "[" * 9999)),
        *(("members.json", text) for text in (None, "{", "[]", "[1]")),
    ],
)
def test_a_missing_or_damaged_description_is_named(tmp_path, name, text):
    run = started(tmp_path / "run")
    (run.path / "manifest.json").unlink()
    (run.path / name).unlink()
    if text is not None:
        (run.path / name).write_text(text)
    with pytest.raises(PmoeError, match=name):
        run.config(), run.members()


# --- checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_is_restored_bit_for_bit(run):
    step, state, attack, meta = restore(run)
    assert step == 2
    assert_bit_equal(state, state_of(2))
    assert_bit_equal(attack, attack_of(2))
    assert meta["format"] == FORMAT and meta["step"] == 2 and meta["epoch"] == 1.0
    np.testing.assert_array_equal(meta["loss_sum"], [0.5, np.nan])


def test_a_step_can_be_asked_for(run):
    assert_bit_equal(restore(run, step=1)[1], state_of(1))
    with pytest.raises(PmoeError, match="has no checkpoint of step 7; it has 1, 2"):
        restore(run, step=7)


def test_no_checkpoint_at_all(tmp_path):
    empty = started(tmp_path / "run")
    assert restore(empty) is None
    with (
        Checkpoints(empty) as checkpoints,
        pytest.raises(PmoeError, match="has no finished checkpoint yet; train it first"),
    ):
        checkpoints.data_shape()


def test_arrays_of_no_model_say_nothing_of_the_data(run):
    with (
        Checkpoints(run) as checkpoints,
        pytest.raises(PmoeError, match=r"checkpoint 1 of .* its arrays are not those of a model"),
    ):
        checkpoints.data_shape()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, truncate, pathlib.Path.unlink])
def test_damage_falls_back_to_the_checkpoint_before_and_says_so(run, harm, capsys):
    victim = largest_file(run, 2)
    harm(victim)
    step, state, attack, _ = restore(run)
    assert step == 1
    assert_bit_equal((state, attack), (state_of(1), attack_of(1)))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "checkpoint 2 is skipped" in said and str(victim) in said
    with pytest.raises(PmoeError, match=r"no checkpoint .* is whole"):
        restore(run, step=2)


def test_damage_to_any_file_is_noticed(run):
    for path in files_of(run, 2):
        if not path.stat().st_size:
            continue
        content = path.read_bytes()
        flip(path)
        assert str(path) in run.damage(2)
        path.unlink()
        assert run.damage(2) == f"{path} is missing"
        path.write_bytes(content)
    assert run.damage(2) is None


@pytest.mark.parametrize("name", ["state/checkpoint", "config.py", "meta/metadata2"])
def test_a_file_that_was_added_is_damage(run, name):
    added = run.path / "checkpoints" / "2" / name
    added.write_bytes(b"\x80\x04.")
    assert run.damage(2) == f"{added} is not part of the checkpoint"
    assert restore(run)[0] == 1


def test_if_all_are_damaged_the_newest_damaged_file_is_named(run, capsys):
    for step in (1, 2):
        flip(largest_file(run, step))
    with pytest.raises(PmoeError, match="no checkpoint") as caught:
        restore(run)
    assert str(largest_file(run, 2)) in str(caught.value)


def test_after_a_fall_back_the_damaged_step_is_saved_anew(run):
    flip(largest_file(run, 2))
    with Checkpoints(run) as checkpoints:
        step, _, _, _ = checkpoints.restore(abstract(state_of()))
        checkpoints.discard_after(step)
        checkpoints.save(2, state_of(22), attack_of(22), META)
    assert run.damage(2) is None
    step, state, attack, _ = restore(run)
    assert step == 2
    assert_bit_equal((state, attack), (state_of(22), attack_of(22)))


def test_a_checkpoint_left_by_a_kill_is_ignored_and_replaced(run):
    # Killed after orbax had finished step 3, before the manifest could list it.
    sealed = (run.path / "manifest.json").read_bytes()
    with Checkpoints(run) as checkpoints:
        checkpoints.save(3, state_of(33), attack_of(33), META)
    (run.path / "manifest.json").write_bytes(sealed)
    assert not files_of(run, 1) and files_of(run, 3)
    with Checkpoints(run) as checkpoints:
        step, state, _, _ = checkpoints.restore(abstract(state_of()))
        assert step == 2
        assert_bit_equal(state, state_of(2))
        checkpoints.discard_after(step)
        assert not files_of(run, 3)
        checkpoints.save(3, state_of(3), attack_of(3), META)
    step, state, _, _ = restore(run)
    assert step == 3
    assert_bit_equal(state, state_of(3))
    assert run.whole_steps() == [2, 3]


def test_an_unfinished_save_is_ignored_and_replaced(run):
    # Killed while orbax was writing: it works in a folder of another name and moves it at the end.
    folder = run.path / "checkpoints"
    for name in ("3.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-1700000000"):
        shutil.copytree(folder / "2", folder / name)
        (folder / name / "meta").rename(folder / name / "meta.orbax-checkpoint-tmp")
    assert restore(run)[0] == 2
    with Checkpoints(run) as checkpoints:
        checkpoints.discard_after(2)
        checkpoints.save(3, state_of(3), attack_of(3), META)
    assert restore(run)[0] == 3
    assert sorted(os.listdir(folder)) == ["2", "3"]


def test_sealing_again_does_not_hide_damage(run):
    flip(largest_file(run, 1))
    files_of(run, 2)[0].unlink()
    damages = [run.damage(step) for step in (1, 2)]
    run.seal([1, 2])
    assert all(damages) and [run.damage(step) for step in (1, 2)] == damages


def test_the_newest_two_stay_and_those_to_be_kept(tmp_path):
    run = started(tmp_path / "run")
    with Checkpoints(run, keep_every_steps=2) as checkpoints:
        for step in (1, 2, 3, 4, 5, 6):
            checkpoints.save(step, state_of(step), attack_of(step), META)
    # Step 5 is the newest but one.
    assert run.whole_steps() == [2, 4, 5, 6]
    assert all(run.damage(step) is None for step in run.whole_steps())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_whole_checkpoint(code, run, monkeypatch):
    reason = os.strerror(code)
    with Checkpoints(run) as checkpoints:

        async def full(handler, folder, *args, **kwargs):
            raise OSError(code, reason)

        with monkeypatch.context() as patch:
            patch.setattr(ocp.StandardCheckpointHandler, "async_save", full)
            with pytest.raises(DiskError, match=rf"checkpoint 3 .*\({reason}\); make room"):
                checkpoints.save(3, state_of(3), attack_of(3), META)
        assert sorted(os.listdir(run.path / "checkpoints")) == ["1", "2"]
        assert restore(run)[0] == 2
        checkpoints.save(3, state_of(3), attack_of(3), META)
    assert restore(run)[0] == 3 and run.whole_steps() == [2, 3]


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (state_of(width=5), r"params.kernel is float32 \(2, 3, 4\), wanted float32 \(2, 5, 4\)"),
        ({**state_of(), "step": jnp.zeros(2)}, r"step is int32 \(2,\), wanted float32 \(2,\)"),
        ({"params": state_of()["params"]}, r"opt_state.0 is int32 \(2,\), wanted absent"),
        ({**state_of(), "momentum": jnp.zeros(2)}, r"momentum is absent, wanted float32 \(2,\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_clear_line(run, expected, said, capfd):
    with pytest.raises(PmoeError, match="checkpoint 2 of .*run does not fit .*" + said) as caught:
        restore(run, abstract(expected))
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err


def test_another_format_is_refused(tmp_path, monkeypatch):
    run = started(tmp_path / "run")
    monkeypatch.setattr("pmoe_jax.checkpoints.FORMAT", FORMAT + 1)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, state_of(1), attack_of(1), META)
    monkeypatch.undo()
    said = f"has format {FORMAT + 1}; this version reads format {FORMAT}"
    with pytest.raises(PmoeError, match=said):
        restore(run)


def test_reading_leaves_the_directory_as_it_is(run):
    before = sorted(run.path.rglob("*"))
    restore(run)
    assert sorted(run.path.rglob("*")) == before


def test_row_fields_are_the_one_schema():
    # Written down once more on purpose: other tools read these names.
    assert rows.ROW_FIELDS == (
        "run", "member", "seed", "dataset", "width", "epoch", "stage", "trigger", "rate",
        "metric", "value", "n",
    )  # fmt: skip
