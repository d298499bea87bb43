"""Runs from beginning to end: training, being killed, going on, evaluation.

Most tests train a model of two layers, so that they take seconds; the last ones train the real
model through the command line in processes of their own, and kill them.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import bounded
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from small import Small

from pmoe_jax import checkpoints as checkpoints_lib
from pmoe_jax import (
    cli,
    defend,
    defend_config,
    evaluation,
    figures,
    inputs,
    memory,
    report,
    rundir,
    training,
)
from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.rows import ROW_FIELDS
from pmoe_jax.rundir import RunDirectory

METRICS = {"ba", "asr", "clean_target_rate", "robust_accuracy", "asr_with_target"}


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        small.use(patch)
        yield


@pytest.fixture
def config(tiny_config):
    """Two members, square, 2 epochs of 6 steps, checkpoints after steps 4, 6, 8 and 12."""
    return with_fields(tiny_config, **{
        "trigger.name": "square", "trigger.size": 6, "poison.rate": 0.1, "poison.target": 1,
        "checkpoint.every_steps": 4,
    })  # fmt: skip


def with_fields(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


def train(config, path, **options):
    return run_lib.train(config, path, progress=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(config, **options) -> directory of a finished run; each is trained once."""
    made = {}

    def get(config, **options):
        text = config_lib.to_json(config) + repr(options.get("members"))
        if text not in made:
            path = tmp_path_factory.mktemp("finished") / "run"
            train(config, path, **options)
            made[text] = path
        return made[text]

    return get


@pytest.fixture
def base(finished, config):
    return finished(config)


@pytest.fixture
def clean(finished, config):
    """A clean run for `base`; trained so little that its members are not all right."""
    return finished(clean_config(config))


def clean_config(config, **changes):
    fields = {"trigger.name": "none", "poison.rate": 0.0, "train.epochs": 1,
              "train.learning_rate": 1e-3}  # fmt: skip
    return with_fields(config, **(fields | changes))


@pytest.fixture
def copied(base, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    return tmp_path / "run"


def saved(path, step=None):
    """State and attack in the newest checkpoint, or that of a step."""
    run = RunDirectory(path)
    config, members = run.config(), run.members()
    dataset = inputs.load_data(config)
    plan = training.plan_of(config, len(dataset.train_images))
    programs = training.programs_of(config, dataset.num_classes, plan)
    with checkpoints_lib.Checkpoints(run) as checkpoints:
        restored = checkpoints.restore(programs.abstract_state(members, dataset.image_shape), step)
    return restored[1], restored[2]


def assert_bit_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def untimed(path):
    """The lines of training.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (path / "training.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
            for line in lines]  # fmt: skip


def assert_same_run(path, other, other_checkpoints=False):
    """Parameters bit-equal, figures equal line for line, checkpoints whole and nothing beside."""
    assert_bit_equal(saved(path), saved(other))
    metrics = "metrics.jsonl"
    assert (path / metrics).read_text() == (other / metrics).read_text()
    assert untimed(path) == untimed(other)
    assert sorted(os.listdir(path)) == sorted(os.listdir(other))
    run = RunDirectory(path)
    if not other_checkpoints:
        assert run.whole_steps() == RunDirectory(other).whole_steps()
    assert sorted(os.listdir(path / "checkpoints")) == sorted(map(str, run.whole_steps()))
    assert all(run.damage(step) is None for step in run.whole_steps())


def values(rows):
    """(member, metric) -> (value, n, stage)."""
    return {(row["member"], row["metric"]): (row["value"], row["n"], row["stage"]) for row in rows}


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- what a run leaves behind -------------------------------------------------------------------


def test_a_run_leaves_what_is_documented(base, config):
    assert sorted(os.listdir(base)) == [
        ".lock", "checkpoints", "config.json", "manifest.json", "members.json", "metrics.jsonl",
        "provenance.json", "training.jsonl",
    ]  # fmt: skip
    run = RunDirectory(base)
    assert run.config().to_dict() == config.to_dict()
    assert run.members() == members_lib.from_config(config)
    assert run.whole_steps() == [8, 12]
    provenance = json.loads((base / "provenance.json").read_text())
    dataset = inputs.load_data(config)
    assert provenance["dataset"] == {"name": "npz", "sha256": dataset.fingerprint()}


def test_rows_follow_the_one_schema(base):
    rows = RunDirectory(base).rows()
    assert {tuple(row) for row in rows} == {ROW_FIELDS}
    expected = {(m, e, metric) for m in (0, 1) for e in (1, 2) for metric in METRICS}
    assert {(row["member"], row["epoch"], row["metric"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["seed"] == row["member"] and row["run"] == "run" and row["dataset"] == "npz"
        assert (row["width"], row["stage"], row["trigger"], row["rate"]) == (
            1, "trained", "square", 0.1)  # fmt: skip
        # 40 test images of 4 classes; the target's 10 count in two of the metrics only.
        assert row["n"] == (40 if row["metric"] in ("ba", "asr_with_target") else 30)
        hits = row["value"] * row["n"] / 100
        assert 0 <= hits <= row["n"] and abs(hits - round(hits)) < 1e-9


def test_training_lines_tell_loss_and_speed(base):
    lines = [json.loads(line) for line in (base / "training.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["member"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for line in lines:
        assert 0 < line["train_loss"] < 5 and line["diverged_at"] == -1
        assert line["seconds"] >= 0 and line["images_per_second"] > 0
    assert lines[2]["train_loss"] < lines[0]["train_loss"]  # it learns


def test_the_poison_masks_are_in_the_checkpoint(base, config):
    _, attack = saved(base)
    assert np.asarray(attack["triggered"]).sum(1).tolist() == [9, 9]  # floor(0.1 * 96)
    assert not np.array_equal(*attack["triggered"])


def test_the_same_command_gives_the_same_bits(base, config, tmp_path):
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", base)


def test_a_finished_run_is_left_as_it_is(copied, config):
    before = contents(copied)
    rows = train(config, copied)
    after = contents(copied)
    assert before.pop(copied / "provenance.json") != after.pop(copied / "provenance.json")
    assert after == before
    assert rows == [row for row in RunDirectory(copied).rows() if row["epoch"] == 2]


def test_what_is_evaluated_and_kept(config, tmp_path):
    changes = {
        "train.epochs": 6, "evaluation.every_epochs": 2,
        "checkpoint.every_steps": 0, "checkpoint.keep_every_epochs": 2,
    }  # fmt: skip
    train(with_fields(config, **changes), tmp_path / "w")
    run = RunDirectory(tmp_path / "w")
    assert {row["epoch"] for row in run.rows()} == {2, 4, 5, 6}  # the last three always
    assert run.whole_steps() == [12, 24, 30, 36]  # every second epoch, and the newest two


# --- being killed -------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as a kill does: nothing in the program catches it."""


def killing(monkeypatch, place, name, nth=1, before=None, after=True):
    """Makes the nth call of place.name the last thing that happens.

    `before` is called with the call's arguments; with `after` the call itself still happens.
    """
    original = getattr(place, name)
    count = 0

    def dying(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth:
            if before is not None:
                before(*args, **kwargs)
            if after:
                original(*args, **kwargs)
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, dying)


def torn(run, name, lines):
    with open(run.path / name, "a") as file:
        file.write(json.dumps(next(iter(lines)))[:-9])


MOMENTS = {
    **{f"in step {n}": (run_lib._Clock, "tick", n) for n in (1, 4, 5, 6, 11)},
    "between config and members": (rundir, "write_atomically", 1),
    "between members and manifest": (rundir, "write_atomically", 2),
    "before figures": (RunDirectory, "append", 1, None, False),
    "between loss and metrics of epoch 1": (RunDirectory, "append", 1),
    "between loss and metrics of epoch 2": (RunDirectory, "append", 3),
    "in the middle of a line": (RunDirectory, "append", 2, torn, False),
    "between metrics and checkpoint": (RunDirectory, "append", 2),
    "between checkpoint and manifest": (RunDirectory, "seal", 3, None, False),
    "between the epoch's checkpoint and manifest": (RunDirectory, "seal", 4, None, False),
    "in the move of the manifest": (os, "replace", 8, None, False),
    "after a checkpoint": (checkpoints_lib.Checkpoints, "save", 1),
    "after the last checkpoint": (checkpoints_lib.Checkpoints, "save", 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_end(moment, base, config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, *MOMENTS[moment])
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", base)


def test_a_run_killed_again_and_again(base, config, tmp_path, monkeypatch):
    # A step further each time: 3 steps from the start, 3 from step 0, ... 4 from step 4, ...
    for steps in (3, 5, 1, 3, 5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing(patch, run_lib._Clock, "tick", steps)
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", base)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(base, config, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killing(patch, run_lib._Clock, "tick", 10)
        train(config, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "8"
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-1])
    train(config, tmp_path / "run")
    said = capfd.readouterr().err
    assert f"checkpoint 8 is skipped: {victim}" in said and "at step 6" in said
    assert_same_run(tmp_path / "run", base)


@pytest.mark.parametrize(
    ("name", "step"), [("SIGTERM", 2), ("SIGINT", 9), ("SIGTERM", 6), ("SIGTERM", 12)]
)
def test_a_signal_stops_behind_a_saved_step(name, step, base, config, tmp_path, monkeypatch, capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    ticks = 0

    def tick(self, size, loss, original=run_lib._Clock.tick):
        nonlocal ticks
        ticks += 1
        if ticks == step:
            signal.raise_signal(signal.Signals[name])
        original(self, size, loss)

    with monkeypatch.context() as patch, pytest.raises(run_lib.Interrupted) as caught:
        patch.setattr(run_lib._Clock, "tick", tick)
        train(config, tmp_path / "run")
    assert caught.value.exit_code == 75 and f"stopped by {name}" in str(caught.value)
    assert RunDirectory(tmp_path / "run").whole_steps()[-1] == step
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(config, tmp_path / "run")
    assert f"at step {step}" in capfd.readouterr().err
    # One checkpoint more was made on the way; the end is the same.
    assert_same_run(tmp_path / "run", base, other_checkpoints=True)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_does_not_wait_for_an_evaluation(
    epoch, base, config, tmp_path, monkeypatch, capfd
):
    """The figures that were about to be made are made when the run goes on, also at its end."""
    evaluations = 0

    def predictions(*args, original=evaluation.predictions):
        nonlocal evaluations
        evaluations += 1
        if evaluations == epoch:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("evaluation went on")
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(run_lib.Interrupted, match="after step"):
        patch.setattr(run_lib.evaluation, "predictions", predictions)
        train(config, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    assert run.whole_steps()[-1] == 6 * epoch
    assert {row["epoch"] for row in run.rows()} == set(range(1, epoch))
    if epoch == 2:  # Killed once more, between the figures' files.
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing(patch, RunDirectory, "append", 1)
            train(config, tmp_path / "run")
    rows = train(config, tmp_path / "run")
    assert rows == [row for row in RunDirectory(base).rows() if row["epoch"] == 2]
    assert_same_run(tmp_path / "run", base)
    # It was made up for: asked once more, nothing is evaluated.
    monkeypatch.setattr(run_lib.evaluation, "predictions", lambda *args: pytest.fail("evaluated"))
    assert train(config, tmp_path / "run") == rows


def test_an_interrupt_that_a_background_job_ignores_stays_ignored():
    """A script's other jobs shall not stop by the Ctrl-C that is meant for one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with run_lib.stop_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_mean_over_several_attacks_is_said(config):
    members = members_lib.from_config(config)
    rows = [{"member": m, "seed": m, "metric": "ba", "value": 50.0 + m, "stage": "trained"}
            for m in (0, 1)]  # fmt: skip
    assert "BA 50.5 (mean over members)" in run_lib._brief(3, rows, members)
    other = [members[0], dataclasses.replace(members[1], rate=0.5)]
    said = run_lib._brief(3, rows, other)
    assert said == "epoch 3: evaluated 2 members, which have no common mean"


def test_calibration_of_streamed_epochs_that_are_shorter_than_it(config, tiny_dataset):
    short = with_fields(config, **{"data.residence": "host", "train.batch_size": 48})
    needed = run_lib.calibrate(short, members_lib.from_config(short), tiny_dataset)
    assert needed.step_seconds > 0 and needed.evaluation_seconds > 0


def test_a_batch_larger_than_the_data_is_named_by_calibration_too(config, tiny_dataset):
    large = with_fields(config, **{"train.batch_size": 97})
    with pytest.raises(PmoeError, match=r"train\.batch_size=97 is larger than the 96 training"):
        run_lib.calibrate(large, members_lib.from_config(large), tiny_dataset)


def test_time_in_saves_is_no_training(config, tmp_path, monkeypatch):
    """Neither in the middle of an epoch nor at its end."""
    save, now, passed = run_lib._Session._save, time.perf_counter, [0.0]

    def slow(*args):
        save(*args)
        passed[0] += 1000

    monkeypatch.setattr(run_lib._Session, "_save", slow)
    monkeypatch.setattr(run_lib.time, "perf_counter", lambda: now() + passed[0])
    train(config, tmp_path / "run")  # Saves behind steps 4, 6, 8 and 12.
    lines = RunDirectory(tmp_path / "run").lines("training.jsonl")
    assert max(line["seconds"] for line in lines) < 1000


def test_a_signal_is_heard_where_python_ignores_exceptions():
    def goes(reference):
        signal.raise_signal(signal.SIGTERM)
        sum(range(1000))

    with pytest.raises(run_lib._StopNow), run_lib.stop_signal() as stop, stop.at_once():
        held = frozenset({1, 2})
        reference = weakref.ref(held, goes)
        del held
        for _ in range(500):
            time.sleep(0.01)
        pytest.fail(f"it went on, {reference}")
    assert stop.asked == "SIGTERM"


@pytest.mark.parametrize("place", ["restore", "discard_after"])
def test_a_signal_before_the_first_step_stops_at_once(place, config, tmp_path, monkeypatch):
    original = getattr(checkpoints_lib.Checkpoints, place)

    def signalled(*args):
        signal.raise_signal(signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(run_lib.Interrupted) as caught:
        patch.setattr(checkpoints_lib.Checkpoints, place, signalled)
        train(config, tmp_path / "run")
    assert "stopped by SIGTERM before a step was taken" in str(caught.value)
    assert RunDirectory(tmp_path / "run").whole_steps() == []


def test_a_run_is_resumed_with_its_own_data_only(copied, config, tiny_dataset):
    labels = np.roll(tiny_dataset.train_labels, 1)
    other = dataclasses.replace(tiny_dataset, name="npz", train_labels=labels)
    with pytest.raises(PmoeError, match="was begun with another dataset"):
        train(config, copied, dataset=other)


def test_a_run_is_resumed_with_its_own_config_only(copied, config):
    before = contents(copied)
    with pytest.raises(PmoeError, match=r"another config \(num_seeds: 2 -> 3\)"):
        train(with_fields(config, num_seeds=3), copied)
    assert contents(copied) == before


# --- variants of training -----------------------------------------------------------------------


def test_streamed_equals_resident_bit_for_bit(config, tmp_path):
    config = with_fields(config, **{"train.batch_size": 40, "train.keep_last_batch": True})
    ends = {}
    for residence in ("device", "host"):
        path = tmp_path / residence / "run"
        train(with_fields(config, **{"data.residence": residence}), path)
        ends[residence] = saved(path), (path / "metrics.jsonl").read_text(), untimed(path)
    assert_bit_equal(ends["device"][0], ends["host"][0])
    assert ends["device"][1:] == ends["host"][1:]


@pytest.mark.parametrize(("keep", "sizes"), [(False, [40, 40]), (True, [40, 40, 16])])
def test_the_last_partial_batch(keep, sizes, config, tmp_path, monkeypatch):
    config = with_fields(config, **{
        "train.batch_size": 40, "train.keep_last_batch": keep, "data.residence": "host",
    })  # fmt: skip
    seen = []

    def step(self, state, attack, index, images, labels, original=None):
        seen.append(np.asarray(index))
        return original(state, attack, index, images, labels)

    programs = training.programs_of(config, 4, training.plan_of(config, 96))
    original = programs.step_on_batch
    monkeypatch.setattr(
        programs, "step_on_batch", functools.partial(step, programs, original=original)
    )
    train(config, tmp_path / "w")
    assert [index.shape[1] for index in seen] == sizes * 2
    steps = len(sizes)
    for member in (0, 1):
        epochs = [
            np.concatenate([index[member] for index in seen[start : start + steps]])
            for start in (0, steps)
        ]
        for epoch in epochs:
            assert len(set(epoch.tolist())) == sum(sizes)  # no image twice
        assert not np.array_equal(*epochs)  # a new order each epoch
    assert not np.array_equal(seen[0][0], seen[0][1])  # each member its own


def test_members_of_mixed_attacks_train_and_evaluate_together(config, tmp_path, pmoe):
    first = members_lib.from_config(config)[0]
    warp = {"name": "warp", "k": 2, "strength": 1.0, "upsampling": "authors",
            "sampling": "truncate"}  # fmt: skip
    members = [
        dataclasses.replace(first, rate=0.5, trigger=warp),
        dataclasses.replace(first, rate=0.0, trigger={"name": "none"}),
    ]
    rows = train(config, tmp_path / "run", members=members)
    assert {(row["member"], row["trigger"], row["rate"]) for row in rows} == {
        (0, "warp", 0.5), (1, "none", 0.0)}  # fmt: skip
    assert {row["metric"] for row in rows if row["member"] == 1} == {"ba"}
    evaluated = trained_lib.evaluate(tmp_path / "run")
    assert evaluated.rows == rows
    assert report.scale(evaluated).endswith(
        "2 members of 1 seeds, poisoning rate 0, 50 %, trigger: warp (k 2, strength 1.0, "
        "upsampling authors, sampling truncate), target label 1; none"
    )
    # Of several attacks there is no common mean.
    summed = json.loads(report.evaluation_json(evaluated))
    assert summed["summary"] is None and "cad_resolved" not in summed
    with pytest.raises(PmoeError, match=r"members of .* have several attacks.* --members=1$"):
        defend.defend(tmp_path / "run", defend_config.default(), tmp_path / "out", members=(1, 0))
    # The config names a trigger that neither member has; asked for, both are shown it.
    command = ["evaluate", f"--checkpoint={tmp_path / 'run'}", "--json"]
    for more, shown in ([], {"warp", "none"}), (["--trigger.name=square"], {"square"}):
        code, text, _ = pmoe(*command, *more)
        assert code == 0 and {row["trigger"] for row in json.loads(text)["rows"]} == shown
    # One that all members have is their own, also where the config names another.
    config = RunDirectory(tmp_path / "run").config()
    asked = with_fields(config, **{"trigger.name": "warp", "trigger.strength": 1.0,
                                   "quirks.a3_truncating_warp": True})  # fmt: skip
    assert cli.asked_trigger({}, config, asked, members[:1]) is None
    assert cli.asked_trigger({}, config, asked, members)["name"] == "warp"
    # The same command means the same members.
    with pytest.raises(PmoeError, match="the members differ"):
        train(config, tmp_path / "run")


def test_a_profile_is_a_trace_of_a_whole_step(config, tmp_path, monkeypatch):
    waited = []

    def ready(tree):
        waited.append(tree)
        return jax.tree.map(lambda leaf: leaf.block_until_ready(), tree)

    class Trace(contextlib.AbstractContextManager):
        def __init__(self, folder):
            self.real = jax_trace(folder)

        def __enter__(self):
            waited.append("begin")
            return self.real.__enter__()

        def __exit__(self, *error):
            waited.append("end")
            return self.real.__exit__(*error)

    jax_trace = jax.profiler.trace
    monkeypatch.setattr(jax.profiler, "trace", Trace)
    monkeypatch.setattr(jax, "block_until_ready", ready)
    train(config, tmp_path / "w", profile=True)
    begin, end = waited.index("begin"), waited.index("end")
    # Earlier work is over when the trace begins, and the step's own when it ends.
    assert begin > 0 and end > begin + 1
    assert list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))


# --- divergence ---------------------------------------------------------------------------------


def test_a_member_stands_still_from_the_step_that_was_not_finite():
    model, optimizer = Small(4), optax.sgd(0.1)
    init = functools.partial(training.init_member, model, optimizer, (16, 16, 3))
    state = jax.jit(init)(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    labels = jnp.arange(8) % 4
    step = jax.jit(functools.partial(training.member_step, model, optimizer))
    first, _ = step(state, images, labels)
    second, loss = step(first, images.at[3].set(jnp.nan), labels)
    third, _ = step(second, images, labels)
    assert not np.isfinite(loss)
    assert [int(s.diverged_at) for s in (first, second, third)] == [-1, 1, 1]
    assert [int(s.step) for s in (first, second, third)] == [1, 2, 3]
    assert_bit_equal((third.variables, third.opt_state), (first.variables, first.opt_state))


@pytest.fixture
def diverging(base, config, monkeypatch):
    """diverging(*members): these start from NaN in runs of `config`, now that `base` is done."""
    programs = training.programs_of(config, 4, training.plan_of(config, 96))
    state = programs.init(members_lib.from_config(config), (16, 16, 3))

    def start(*members):
        where = jnp.asarray(members)
        broken = jax.tree.map(lambda leaf: leaf.at[where].set(jnp.nan), state.params)
        monkeypatch.setattr(programs, "init", lambda *args: state.replace(params=broken))

    return start


@pytest.fixture
def with_diverged(diverging, config, tmp_path, capfd):
    """A run as `base` whose second member diverges; its directory and what was said."""
    diverging(1)
    train(config, tmp_path / "run")
    return tmp_path / "run", capfd.readouterr().err


def test_a_diverged_member_is_marked_and_the_others_go_on(with_diverged, base):
    path, said = with_diverged
    told = re.findall(
        r"warning: member (\d) \(seed 1, trigger square, .* %\) diverged at step 0", said
    )
    assert told == ["1"]  # once, though it is seen at the end of every epoch
    assert "RuntimeWarning" not in said
    (scale,) = (line for line in said.splitlines() if "training images" in line)
    assert scale.endswith("96 training images: pmoe of width 1, 2 epochs")
    rows, whole = RunDirectory(path).rows(), RunDirectory(base).rows()
    assert {(row["member"], row["stage"]) for row in rows} == {(0, "trained"), (1, "diverged")}
    assert [r for r in rows if r["member"] == 0] == [r for r in whole if r["member"] == 0]
    for one, other in zip(*map(jax.tree.leaves, (saved(path), saved(base))), strict=True):
        assert np.asarray(one[0]).tobytes() == np.asarray(other[0]).tobytes()
    lines = untimed(path)
    assert [line["diverged_at"] for line in lines] == [-1, 0, -1, 0]
    assert [line["train_loss"] is None for line in lines] == [False, True, False, True]


def test_a_diverged_member_is_left_out_of_means(with_diverged, clean):
    path, _ = with_diverged
    evaluated = trained_lib.evaluate(path)
    own = {row["metric"]: row["value"] for row in evaluated.rows if row["member"] == 0}
    for metric, summary in evaluation.summarize(evaluated.rows).items():
        assert (summary.n, summary.mean) == (1, own[metric])
    table = report.evaluation_table(evaluated)
    assert "seed 1 (diverged, left out)" in table and "seed 0 " in table
    compared = trained_lib.evaluate(path, clean=clean).rows
    stages = {(row["metric"], row["stage"]) for row in compared if row["member"] == 1}
    assert stages == {(metric, "diverged") for metric in (*METRICS, "cad", "false_trigger_rate")}


def test_cad_against_a_diverged_clean_model_is_marked(base, clean):
    def ba(path):
        return [row for row in trained_lib.recorded(path).rows if row["metric"] == "ba"]

    gone = [{**row, "stage": "diverged"} if row["seed"] == 1 else row for row in ba(clean)]
    rows = evaluation.cad_rows(ba(base), gone)
    assert [(row["seed"], row["stage"]) for row in rows] == [(0, "trained"), (1, "diverged")]


def test_all_members_diverged_is_no_crash(diverging, config, tmp_path, pmoe):
    diverging(0, 1)
    command = ["train", f"--workdir={tmp_path / 'run'}", "--progress", *flags_of(config)]
    code, out, err = pmoe(*command)
    assert code == 0 and "Warning" not in err and "all members diverged" in err
    assert out.count("(diverged, left out)") == 2


# --- evaluation ---------------------------------------------------------------------------------


def test_evaluation_gives_what_training_recorded(base):
    evaluated = trained_lib.evaluate(base)
    assert evaluated.epoch == 2
    assert evaluated.rows == [row for row in RunDirectory(base).rows() if row["epoch"] == 2]
    assert trained_lib.recorded(base).rows == evaluated.rows


def test_evaluation_writes_nothing(copied):
    before = contents(copied)
    trained_lib.evaluate(copied)
    assert contents(copied) == before


def test_an_earlier_step_within_an_epoch(base):
    evaluated = trained_lib.evaluate(base, step=8)
    assert evaluated.epoch == 8 / 6
    assert {row["epoch"] for row in evaluated.rows} == {8 / 6}
    report.evaluation_table(evaluated)
    with pytest.raises(PmoeError, match="has no checkpoint of step 5; it has 8, 12"):
        trained_lib.evaluate(base, step=5)


def test_a_run_stopped_within_an_epoch_is_evaluated(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, run_lib._Clock, "tick", 9)
        train(config, tmp_path / "run")
    assert trained_lib.evaluate(tmp_path / "run").epoch == 8 / 6


def test_the_mean_of_the_last_three_epochs(config, finished):
    path = finished(with_fields(config, **{"train.epochs": 4}))
    evaluated = trained_lib.evaluate(path)
    rows = RunDirectory(path).rows()
    for row in evaluated.last3:
        three = [r["value"] for r in rows if (r["member"], r["metric"]) == (
            row["member"], row["metric"]) and r["epoch"] in (2, 3, 4)]  # fmt: skip
        assert len(three) == 3 and row["value"] == pytest.approx(sum(three) / 3)
    assert values(evaluated.last3).keys() == values(evaluated.rows).keys()
    assert "mean of last 3 epochs" in report.evaluation_table(evaluated)


def test_a_run_is_evaluated_on_data_with_too_few_images_to_train_on(base, tiny_dataset, capfd):
    few = dataclasses.replace(
        tiny_dataset, train_images=tiny_dataset.train_images[:8],
        train_labels=tiny_dataset.train_labels[:8],
    )  # fmt: skip
    rows = trained_lib.evaluate(base, dataset=few).rows
    assert values(rows) == values(trained_lib.evaluate(base).rows)
    assert "is not the data set that" in capfd.readouterr().err


def test_the_clean_runs_epoch_is_what_its_checkpoint_says(base, clean, tiny_dataset, capfd):
    """Whatever data both are evaluated on."""
    more = dataclasses.replace(
        tiny_dataset, train_images=np.concatenate([tiny_dataset.train_images] * 2),
        train_labels=np.concatenate([tiny_dataset.train_labels] * 2),
    )  # fmt: skip
    trained_lib.evaluate(base, clean=clean, dataset=more)
    assert "is taken at epoch 1, the attacked run at epoch 2" in capfd.readouterr().err


def test_figures_of_runs_whose_names_have_dots(base, tmp_path):
    run = shutil.copytree(base, tmp_path / "prune_30_lr0.1")
    evaluated = trained_lib.evaluate(run)
    figures.write_run(evaluated, run, tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        f"prune_30_lr0.1_{end}"
        for end in ("curves.csv", "curves.pdf", "curves.png", "trigger.pdf", "trigger.png")
    ]


def test_means_of_curves_are_of_the_same_members_all_along():
    rows = [
        {"member": m, "epoch": e, "value": 10.0 * m + e, "metric": "ba",
         "stage": "diverged" if (m, e) == (3, 2) else "trained"}
        for m in range(4) for e in (1, 2)
    ]  # fmt: skip
    assert figures.mean_curve(rows, "epoch") == ([1, 2], [11.0, 12.0], 3)
    assert figures.mean_curve([row for row in rows if row["member"] != 0], "epoch") is None


def test_a_moved_run_evaluates_under_its_new_name(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = trained_lib.evaluate(".").rows
    assert values(rows) == values(trained_lib.evaluate(base).rows)
    assert {row["run"] for row in rows} == {"elsewhere"}


def test_cad_and_false_trigger_rate_pair_seeds(base, clean):
    evaluated = trained_lib.evaluate(base, clean=clean)
    own, alone = values(evaluated.rows), values(trained_lib.evaluate(clean).rows)
    trigger = RunDirectory(base).members()[0].trigger
    tried = values(trained_lib.evaluate(clean, trigger=trigger).rows)
    for member in (0, 1):
        drop = alone[member, "ba"][0] - own[member, "ba"][0]
        assert own[member, "cad"] == (drop, 40, "trained")
        assert own[member, "false_trigger_rate"][:2] == tried[member, "asr"][:2]
    assert own[0, "cad"] != own[1, "cad"]  # or this would have shown nothing
    assert {tuple(row) for row in evaluated.rows} == {ROW_FIELDS}


def test_the_clean_runs_seeds_may_come_in_another_order(base, clean, finished):
    config = RunDirectory(clean).config()
    swapped = finished(config, members=members_lib.from_config(config)[::-1])
    rows, expected = (trained_lib.evaluate(base, clean=path).rows for path in (swapped, clean))
    assert values(rows) == values(expected)


def test_members_of_several_rates_each_get_their_cad():
    common = dict.fromkeys(ROW_FIELDS, 0) | {"metric": "ba", "stage": "trained"}
    rows = [{**common, "member": m, "value": v, "rate": r}
            for m, v, r in ((0, 70.0, 0.1), (1, 60.0, 0.5))]  # fmt: skip
    found = evaluation.cad_rows(rows, [{**common, "value": 75.0}])
    assert [(row["member"], row["rate"], row["value"]) for row in found] == [
        (0, 0.1, 5.0), (1, 0.5, 15.0)]  # fmt: skip


def of_width_9(clean, folder):
    """A copy of a clean run whose config says width 9."""
    copy = shutil.copytree(clean, folder / "other")
    stored = json.loads((copy / "config.json").read_text())
    stored["model"]["width"] = 9
    (copy / "config.json").write_text(json.dumps(stored))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["config.json"], manifest["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_the_baseline_must_be_clean_and_have_the_seeds(base, clean, config, finished, tmp_path):
    with pytest.raises(PmoeError, match="is not a clean run"):
        trained_lib.evaluate(clean, clean=base)
    with pytest.raises(
        PmoeError, match=r"trained with model.width=9, the attacked run with \d; CAD"
    ):
        trained_lib.evaluate(base, clean=of_width_9(clean, tmp_path))
    later = clean_config(config, seed=1)
    with pytest.raises(PmoeError, match=r"has no clean model of seed 0; CAD pairs seeds, .* 1, 2"):
        trained_lib.evaluate(base, clean=finished(later))


def test_cad_at_a_step_takes_the_clean_run_at_the_same_epoch(base, config, finished, capfd):
    every = {"checkpoint.keep_every_epochs": 1, "train.epochs": 3}
    changes = {"train.batch_size": 32, "streams.init": 0}  # 3 steps an epoch
    path = finished(clean_config(config, **changes, **every))
    attacked = finished(with_fields(config, **every))
    with pytest.raises(PmoeError, match="has no checkpoint of step 4; it has 3, 6, 8, 9"):
        trained_lib.evaluate(base, clean=path, step=8)  # epoch 4/3 would be step 4
    rows = values(trained_lib.evaluate(attacked, clean=path, step=6).rows)
    benign = values(trained_lib.evaluate(path, step=3).rows)
    for member in (0, 1):
        expected = benign[member, "ba"][0] - rows[member, "ba"][0]
        assert rows[member, "cad"][0] == expected
    first = f"note: CAD is not of the attack alone: {path.name} was trained with "
    assert {line for line in capfd.readouterr().err.splitlines() if "note: " in line} == {
        f"{first}train.batch_size=32, the attacked one with 16",
        f"{first}train.learning_rate=0.001, the attacked one with 0.1",
        f"{first}stream init of seed 0, the attacked one of seed 1 (member of seed 1)",
    }
    trained_lib.evaluate(base, clean=path)  # Of different lengths, on purpose: it is said.
    assert "is taken at epoch 3, the attacked run at epoch 2" in capfd.readouterr().err


def test_source_specific_metrics(base, clean, config, finished):
    changes = {"poison.source": 2, "poison.carriers": 0.1}
    path = finished(with_fields(config, **changes))
    rows = trained_lib.evaluate(path, clean=clean).rows
    counted = {row["metric"]: row["n"] for row in rows}
    # Of the 40 test images 10 are of the source class, and 20 of neither source nor target.
    assert counted == {"ba": 40, "asr": 10, "clean_target_rate": 10, "robust_accuracy": 10,
                       "fpr": 20, "cad": 40, "false_trigger_rate": 10}  # fmt: skip


def test_another_trigger_than_the_trained_one(base):
    unseen = trained_lib.evaluate(base, trigger={"name": "blend", "alpha": 0.0})
    assert {row["trigger"] for row in unseen.rows} == {"blend"} and unseen.last3 == []
    assert {row["stage"] for row in unseen.rows} == {"other_trigger"}
    assert "trained with square" in report.scale(unseen)
    assert "; shown blend (alpha 0.0)" in report.scale(unseen)
    trained, found = values(trained_lib.evaluate(base).rows), values(unseen.rows)
    for member in (0, 1):
        hits = {name: found[member, name][0] * found[member, name][1] / 100 for name in METRICS}
        assert found[member, "ba"][:2] == trained[member, "ba"][:2]
        # A pattern of weight 0 changes nothing, so that robust accuracy and what is right within
        # the target class make up BA.
        right_in_target = hits["asr_with_target"] - hits["asr"]
        assert hits["ba"] == pytest.approx(hits["robust_accuracy"] + right_in_target)
        assert hits["clean_target_rate"] == hits["asr"]


def test_data_of_other_classes_or_size_is_one_clear_line(base, tiny_arrays):
    (images, labels), test = tiny_arrays
    more = dataset_lib.make("npz", (images, (np.arange(96) % 5).astype(np.int32)), test)
    small = dataset_lib.make("npz", (images[:, :8], labels), (test[0][:, :8], test[1]))
    for dataset, leaf in ((more, "bias is float32"), (small, "does not fit")):
        with pytest.raises(PmoeError, match=f"checkpoint 12 of .*{leaf}") as caught:
            trained_lib.evaluate(base, dataset=dataset)
        assert "\n" not in str(caught.value)


def test_an_altered_width_is_found(copied):
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"width": 1', '"width": 2'))
    with pytest.raises(PmoeError, match=r"config\.json does not match its SHA-256 sum"):
        trained_lib.evaluate(copied)


@pytest.mark.parametrize("residence", ["device", "host"])
def test_members_that_do_not_fit_are_refused_before_they_are_made(
    residence, config, tmp_path, monkeypatch
):
    """Of a member the trigger alone takes 16 * 16 * 3 * 4 bytes: 500 need more than 1 MiB."""
    config = with_fields(config, **{"num_seeds": 500, "data.residence": residence})
    monkeypatch.setattr(memory, "device_memory", lambda: 2**20)
    monkeypatch.setattr(members_lib, "attacks", lambda *unused, **options: pytest.fail("made"))
    with pytest.raises(PmoeError, match=r"of 500 members alone take 0\.0 GiB.*at most [12].. fit"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_float64_is_not_silently_float32(tiny_config, monkeypatch):
    monkeypatch.undo()
    from pmoe_jax.training import Plan, programs_of

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", REAL_BUILD_MODEL)
        with pytest.raises(PmoeError, match=r"model\.dtype=float64 needs jax"):
            config = with_fields(tiny_config, **{"model.dtype": "float64"})
            programs_of(config, 4, Plan(96, 16, False, 1))


REAL_BUILD_MODEL = training.build_model


# --- the same through the command line ----------------------------------------------------------


def flags_of(config):
    default = config_lib.flatten(config_lib.default())
    return [
        f"--config.{name}={value}"
        for name, value in config_lib.flatten(config).items()
        if value != default[name]
    ]


@pytest.fixture
def pmoe(monkeypatch, capfd):
    """pmoe(*argv) -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["pmoe"])

    def call(*argv):
        capfd.readouterr()
        code = cli.main([str(word) for word in argv])
        return code, *capfd.readouterr()

    return call


def test_train_prints_the_table_and_goes_on_after_a_signal(
    pmoe, config, base, tmp_path, monkeypatch
):
    command = ["train", f"--workdir={tmp_path / 'run'}", "--noprogress", *flags_of(config)]

    def tick(*args):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_lib._Clock, "tick", tick)
        code, out, err = pmoe(*command)
    assert code == 75 and not out
    assert err.splitlines()[-1].startswith("pmoe: stopped by SIGTERM after step 1, which is saved")
    code, out, err = pmoe(*command)
    assert code == 0 and "resuming" in err
    assert_same_run(tmp_path / "run", base)
    for text in (
        "npz, pmoe of width 1, epoch 2 of 2, 2 seeds, poisoning rate 10 %, trigger: square (size 6",
        *("| run", "BA [%]", "ASR [%]", "| seed 0", "| seed 1"),
    ):
        assert text in out
    assert pmoe(*command)[1] == out  # again, of the finished run


def test_a_config_file_with_overrides(pmoe, config, base, tmp_path):
    fields = config_lib.flatten(with_fields(config, num_seeds=9))
    (tmp_path / "mine.py").write_text(
        "from pmoe_jax import config\n\n\ndef get_config():\n    made = config.default()\n"
        f"    made.update_from_flattened_dict({fields!r})\n    return made\n"
    )
    code, _, _ = pmoe("train", f"--config={tmp_path / 'mine.py'}", "--workdir", tmp_path / "run",
                      "--noprogress", "--config.num_seeds=2")  # fmt: skip
    assert code == 0
    assert_same_run(tmp_path / "run", base)


def test_evaluate_prints_table_json_and_csv(pmoe, base, clean):
    expected = trained_lib.evaluate(base, clean=clean)
    command = ["evaluate", f"--checkpoint={base}", f"--clean={clean}"]
    code, table, _ = pmoe(*command)
    assert code == 0 and table == report.evaluation_table(expected) + "\n"
    assert "CAD [%]" in table and "false trigger rate of the clean model [%]" in table
    code, text, _ = pmoe(*command, "--json")
    found = json.loads(text, parse_constant=pytest.fail)
    assert code == 0 and found["rows"] == expected.rows
    mean = np.mean([row["value"] for row in expected.rows if row["metric"] == "cad"])
    assert found["summary"]["cad"]["n"] == 2 and found["summary"]["cad"]["mean"] == mean
    code, text, _ = pmoe(*command, "--csv")
    reader = csv.DictReader(io.StringIO(text))
    lines = list(reader)
    assert code == 0 and tuple(reader.fieldnames) == ROW_FIELDS
    assert [float(line["value"]) for line in lines] == [row["value"] for row in expected.rows]


def test_evaluate_with_another_trigger_or_step(pmoe, base):
    blend = {"name": "blend", "alpha": 0.25, "pattern_path": ""}
    command = ["evaluate", f"--checkpoint={base}", "--json"]
    code, text, _ = pmoe(*command, "--trigger.name=blend", "--trigger.alpha=0.25")
    assert code == 0
    assert json.loads(text)["rows"] == trained_lib.evaluate(base, trigger=blend).rows
    code, text, _ = pmoe(*command, "--step=8")
    assert code == 0 and json.loads(text)["rows"] == trained_lib.evaluate(base, step=8).rows
    code, text, _ = pmoe(*command, "--trigger.name=none")
    assert {row["metric"] for row in json.loads(text)["rows"]} == {"ba"}


def test_evaluate_finds_data_elsewhere(pmoe, config, copied, tiny_npz, tmp_path):
    moved = tmp_path / "moved.npz"
    shutil.copy(tiny_npz, moved)
    code, text, _ = pmoe("evaluate", f"--checkpoint={copied}", f"--data={moved}", "--csv")
    assert code == 0 and len(text.splitlines()) == 1 + 2 * len(METRICS)
    code, _, err = pmoe("evaluate", f"--checkpoint={copied}", f"--data={tmp_path / 'no.npz'}")
    assert code == 2 and err.count("\n") == 1 and "no.npz" in err


def test_evaluate_writes_figures(pmoe, base, tmp_path):
    folder = tmp_path / "figures"
    code, _, err = pmoe("evaluate", f"--checkpoint={base}", f"--figures={folder}", "--csv")
    assert code == 0 and err.count("wrote ") == 2
    assert sorted(os.listdir(folder)) == [
        "run_curves.csv", "run_curves.pdf", "run_curves.png", "run_trigger.pdf", "run_trigger.png",
    ]  # fmt: skip
    header = (folder / "run_curves.csv").read_text().splitlines()[0]
    assert tuple(header.split(",")) == ROW_FIELDS


def test_a_finished_run_without_its_figures_says_so(pmoe, copied, config):
    (copied / "metrics.jsonl").unlink()
    code, out, err = pmoe("train", f"--workdir={copied}", "--noprogress", *flags_of(config))
    assert (code, out) == (2, "") and "metrics.jsonl is missing" in err.splitlines()[-1]


# --- the real model in processes of their own ---------------------------------------------------


@pytest.fixture(scope="module")
def process_env():
    # Unoptimised programs compile in half the time; what is tested here does not depend on them.
    quick = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick}
    env.pop("GLIBC_TUNABLES", None)  # so that the command restarts itself, as for a user
    return env


def command(*words):
    # -P as the console script has it: the current directory is no place to import from.
    return [sys.executable, "-P", "-m", "pmoe_jax.cli", *map(str, words)]


@pytest.fixture(scope="module")
def real(tiny_npz, tmp_path_factory, process_env):
    """The command line that trains the real model with one seed, and a run that it finished."""
    fields = {
        "data.name": "npz", "data.source": tiny_npz, "data.image_size": 16, "num_seeds": 1,
        "model.width": 1, "model.num_experts": 2, "model.patches_per_expert": 4,
        "train.epochs": 3, "train.batch_size": 16, "evaluation.batch_size": 40,
        "checkpoint.every_steps": 1, "trigger.name": "square", "poison.rate": 0.1,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("real") / "run"
    words = ["train", "--noprogress", *(f"--config.{k}={v}" for k, v in fields.items())]
    subprocess.run(
        command(*words, f"--workdir={path}"), env=process_env, check=True, capture_output=True
    )
    return words, path


def stop_at(step, number, words, path, env):
    """Runs a command line and signals it when a checkpoint of a step is whole."""
    with bounded.started(
        command(*words, f"--workdir={path}"), env=env, stdout=subprocess.DEVNULL
    ) as process:
        run, end = RunDirectory(path), time.monotonic() + 120
        while not (path / "manifest.json").exists() or max(run.whole_steps(), default=0) < step:
            assert process.poll() is None, bounded.end(process)[1]
            assert time.monotonic() < end, f"no checkpoint of step {step}"
            time.sleep(0.005)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


def state_files(path):
    """Raw arrays of the newest checkpoint, without any model."""
    with checkpoints_lib.ocp.PyTreeCheckpointer() as reader:
        step = RunDirectory(path).whole_steps()[-1]
        return step, [
            reader.restore((path / "checkpoints" / str(step) / item).absolute())
            for item in ("state", "attack")
        ]


def test_kill_and_terminate_the_real_thing(real, process_env, tmp_path):
    words, uninterrupted = real
    path = tmp_path / "run"
    code, _ = stop_at(3, signal.SIGKILL, words, path, process_env)
    assert code == -signal.SIGKILL
    assert max(RunDirectory(path).whole_steps()) < 18
    code, said = stop_at(8, signal.SIGTERM, words, path, process_env)
    assert code == 75, said
    assert said.splitlines()[-1].startswith("pmoe: stopped by SIGTERM after step ")
    assert "Traceback" not in said
    assert max(RunDirectory(path).whole_steps()) < 18
    done = subprocess.run(
        command(*words, f"--workdir={path}"), env=process_env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
    one, other = state_files(path), state_files(uninterrupted)
    assert one[0] == other[0] == 18
    assert_bit_equal(one[1], other[1])
    metrics = "metrics.jsonl"
    assert (path / metrics).read_text() == (uninterrupted / metrics).read_text()
    assert untimed(path) == untimed(uninterrupted)


class Hostile:
    def __reduce__(self):
        return open, ("pwned", "w")


def test_evaluating_a_strangers_directory_executes_nothing_of_it(real, process_env, tmp_path):
    _, trained = real
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    code = "open('pwned', 'w')\nraise SystemExit('pwned')\n"
    names = ("config", "sitecustomize", "usercustomize", "numpy", "jax", "json", "pmoe_jax", "data")
    for name in names:
        (path / f"{name}.py").write_text(code)
    poison = pickle.dumps(Hostile())
    for name in ("config.pkl", "checkpoints/state.pkl", "checkpoints/17/.state.pkl"):
        (path / name).write_bytes(poison)
    done = subprocess.run(
        command("evaluate", "--checkpoint=.", "--csv"),
        cwd=path, env=process_env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (path / "pwned").exists()
    rows = [row for row in RunDirectory(trained).rows() if row["epoch"] == 3]
    assert done.stdout.rstrip("\n").replace("\r", "") == report.rows_csv(rows).replace("\r", "")
