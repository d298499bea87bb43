"""Sweeps: packing by hand, pairing, resuming, being killed.

Most tests train a linear model, so that they take seconds; those of packing and of kills train the
real one.
"""

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import bounded
import jax
import numpy as np
import pytest
from locations import ROOT
from rich.console import Console
from small import Small

from pmoe_jax import checkpoints as checkpoints_lib
from pmoe_jax import cli, cluster, grid, inputs, memory, report, results, sweep, training
from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import DiskError, check_sum
from pmoe_jax.grid import Manifest, Ref
from pmoe_jax.rundir import RunDirectory

SQUARE = {"name": "square", "trigger.name": "square", "trigger.size": 6, "poison.rate": 0.25}
WARP = {"name": "warp", "trigger.name": "warp", "poison.rate": 0.25}
CELLS = [{"name": "clean"}, SQUARE, WARP]


REAL_BUILD_MODEL = training.build_model


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", lambda config, classes: Small(classes))
        yield


@pytest.fixture
def real_model(monkeypatch):
    monkeypatch.setattr(training, "build_model", REAL_BUILD_MODEL)


def config_of(source, **changes):
    """Two seeds, 3 epochs of 6 steps."""
    return grid.with_fields(config_lib.default(), {
        "data.name": "npz", "data.source": str(source), "data.image_size": 16, "num_seeds": 2,
        "train.epochs": 3, "train.batch_size": 16, "evaluation.batch_size": 40, **changes,
    })  # fmt: skip


@pytest.fixture
def config(tiny_npz):
    return config_of(tiny_npz)


@pytest.fixture(scope="module")
def swept(tiny_npz, tmp_path_factory):
    """A finished sweep of `CELLS`, a program a cell."""
    folder = tmp_path_factory.mktemp("sweep") / "swept"
    sweep.run(config_of(tiny_npz), CELLS, folder, max_members=2, progress=False)
    return folder


@pytest.fixture
def copied(swept, tmp_path):
    """A copy of `swept`, to do things to."""
    return shutil.copytree(swept, tmp_path / "copied")


def test_what_kills_left_is_removed_when_a_sweep_goes_on(config, copied):
    left = [copied / ".rows.jsonl.99.tmp", copied / "paired" / ".one.jsonl.sha256.99.tmp"]
    for path in left:
        path.write_text("{")
    sweep.run(config, CELLS, copied, progress=False)
    assert not any(path.exists() for path in left)


def forget(folder, program):
    """Removes what a program's pairing wrote."""
    for path in (folder / "paired").glob(f"{program}.jsonl*"):
        path.unlink()


def names_in(folder):
    """The programs of a sweep."""
    return [program.name for program in Manifest.read(folder / "sweep.json").programs]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def keyed(rows):
    """(run, member, epoch, metric) -> value; fails on a row that is there twice."""
    keys = [(row["run"], row["member"], row["epoch"], row["metric"]) for row in rows]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, (row["value"] for row in rows), strict=True))


def packed(config, cells, limit=100):
    return grid.pack(config, cells, lambda shared: limit)


def described(manifest):
    """Per program, what its members are."""
    return [
        [f"{m.trigger['name']} {m.rate:g} seed {m.seed}" for m in program.members]
        for program in manifest.programs
    ]


# --- packing ------------------------------------------------------------------------------------


def test_product_varies_the_last_field_fastest():
    assert grid.product({"seed": [1, 2], "poison.rate": [0.1, 0.2]}) == [
        {"seed": 1, "poison.rate": 0.1}, {"seed": 1, "poison.rate": 0.2},
        {"seed": 2, "poison.rate": 0.1}, {"seed": 2, "poison.rate": 0.2},
    ]  # fmt: skip


def test_members_fill_programs_in_the_order_of_the_grid(config):
    manifest = packed(config, CELLS, limit=4)
    assert described(manifest) == [
        ["none 0 seed 0", "none 0 seed 1", "square 0.25 seed 0", "square 0.25 seed 1"],
        ["warp 0.25 seed 0", "warp 0.25 seed 1"],
    ]
    assert [cell.members for cell in manifest.cells] == [
        (Ref(0, 0), Ref(0, 1)), (Ref(0, 2), Ref(0, 3)), (Ref(1, 0), Ref(1, 1)),
    ]  # fmt: skip
    assert [cell.baselines for cell in manifest.cells] == [
        (None, None), (Ref(0, 0), Ref(0, 1)), (Ref(0, 0), Ref(0, 1)),
    ]  # fmt: skip


def test_baselines_come_before_the_cell_that_needs_them_and_are_shared(config):
    manifest = packed(config, [SQUARE, {**SQUARE, "poison.rate": 0.1}], limit=3)
    assert described(manifest) == [
        ["none 0 seed 0", "none 0 seed 1", "square 0.25 seed 0"],
        ["square 0.25 seed 1", "square 0.1 seed 0", "square 0.1 seed 1"],
    ]


def test_a_cell_may_go_without_baselines(config):
    manifest = packed(config, [{**SQUARE, "baseline": False}])
    assert described(manifest) == [["square 0.25 seed 0", "square 0.25 seed 1"]]
    assert manifest.cells[0].baselines == (None, None)


@pytest.mark.parametrize("field", [{"model.width": 2}, {"train.epochs": 5}, {"data.heldout": 0.1}])
def test_what_members_cannot_differ_in_makes_another_program_with_baselines_of_its_own(
    config, field
):
    manifest = packed(config, [SQUARE, {**SQUARE, **field}])
    assert [len(program.members) for program in manifest.programs] == [4, 4]
    assert manifest.cells[1].baselines == (Ref(1, 0), Ref(1, 1))


def test_warps_of_different_sampling_do_not_share_a_program(config):
    authors = {**WARP, "name": "authors", "quirks.a3_truncating_warp": True}
    manifest = packed(config, [WARP, SQUARE, authors])
    assert described(manifest) == [
        [*(f"none 0 seed {s}" for s in (0, 1)), *(f"warp 0.25 seed {s}" for s in (0, 1)),
         *(f"square 0.25 seed {s}" for s in (0, 1))],
        [f"warp 0.25 seed {s}" for s in (0, 1)],
    ]  # fmt: skip


def test_a_cell_joins_a_program_of_its_config_that_has_room_before_cells_in_between(config):
    config = grid.with_fields(config, {"num_seeds": 1})
    wide = {**SQUARE, "model.width": 2, "baseline": False}
    cells = [{**SQUARE, "baseline": False}, wide, {**WARP, "baseline": False}]
    both = [["square 0.25 seed 0", "warp 0.25 seed 0"], ["square 0.25 seed 0"]]
    assert described(packed(config, cells)) == both
    alone = [["square 0.25 seed 0"], ["square 0.25 seed 0"], ["warp 0.25 seed 0"]]
    assert described(packed(config, cells, limit=1)) == alone


@pytest.mark.parametrize("residence", ["device", "host"])
def test_memory_decides_how_many_members_a_program_has(config, monkeypatch, residence):
    config = grid.with_fields(config, {"data.residence": residence})
    member = members_lib.from_config(config)[:1]
    alone = run_lib.calibrate(config, member, inputs.load_data(config), steps=0)
    # Streamed, no more than a batch is on the device.
    assert alone.fixed_bytes == (96 * 16 * 16 * 3 if residence == "device" else 0)
    room = alone.fixed_bytes + 3.5 * (alone.bytes - alone.fixed_bytes)

    def sizes(free):
        monkeypatch.setattr(memory, "device_memory", lambda: free)
        return [len(program.members) for program in sweep.plan(config, CELLS).programs]

    assert sizes(room / sweep.MEMORY_SHARE) == [3, 3]
    assert sizes(2**40) == [sweep.MEMBERS_ON_CPU, 2] == [4, 2]


def test_a_baseline_shares_initialisation_and_order_but_not_what_only_poisoning_reads(config):
    config = grid.with_fields(config, {"num_seeds": 1, "seed": 5})
    fixed = [{**SQUARE, f"streams.{stream}": 7} for stream in ("poison", "trigger", "order")]
    manifest = packed(config, fixed)
    clean = [member for member in manifest.programs[0].members if member.rate == 0]
    assert [member.streams["order"] for member in clean] == [5, 7]  # one for the first two


def test_a_wrong_cell_is_named(config):
    with pytest.raises(PmoeError, match=r"cell 2 .*poison.rat.*did you mean poison.rate"):
        packed(config, [SQUARE, {"poison.rat": 0.1}])
    with pytest.raises(PmoeError, match="the cell square is in the grid twice"):
        packed(config, [SQUARE, dict(SQUARE)])


@pytest.mark.parametrize(("fields", "message"), [
    ({"num_seeds": np.int64(3)}, "num_seeds=.*wrong type"),
    ({"name": 3}, "name=3 has the wrong type; give a str"),
    ({"baseline": "no"}, "baseline='no' has the wrong type; give a bool"),
    ({1: 2}, "'1' does not exist"),
])  # fmt: skip
def test_a_cell_of_wrong_types_is_named_at_the_start_and_when_resuming(
    swept, config, tmp_path, fields, message
):
    for folder in (tmp_path / "new", swept):
        with pytest.raises(PmoeError, match=rf"cell 2 .*{message}"):
            sweep.run(config, [{}, fields], folder, max_members=4, progress=False)
    assert not (tmp_path / "new").exists()


def test_a_manifest_reads_back_what_was_written(config, tmp_path):
    manifest = packed(config, CELLS, limit=4)
    (tmp_path / "sweep.json").write_text(manifest.to_json())
    assert Manifest.read(tmp_path / "sweep.json") == manifest


@pytest.mark.parametrize("damage", [
    lambda stored: stored["programs"][0].update(name="../outside"),
    lambda stored: stored["cells"][0]["members"][0].update(member=99),
    lambda stored: stored["programs"][0]["config"].update(bad=1),
    lambda stored: stored["cells"][0]["members"][0].update(member=-1),
    lambda stored: stored["cells"][0]["members"][0].update(member=True),
    lambda stored: stored["cells"][1]["baselines"].pop(),
    lambda stored: stored["cells"][1]["baselines"].__setitem__(0, 0),
    lambda stored: (stored["cells"][0]["members"].clear(), stored["cells"][0]["baselines"].clear()),
    lambda stored: stored["programs"][0]["members"].clear(),
    lambda stored: stored["programs"].append(stored["programs"][0]),
    lambda stored: stored.update(config=[1]),
    lambda stored: stored["grid"].pop(),
    lambda stored: stored.pop("grid"),
    lambda stored: stored.update(format=99),
])  # fmt: skip
def test_a_damaged_manifest_is_refused(config, tmp_path, damage):
    stored = json.loads(packed(config, CELLS).to_json())
    damage(stored)
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    with pytest.raises(PmoeError, match="restore"):
        Manifest.read(tmp_path / "sweep.json")


# --- a finished sweep ---------------------------------------------------------------------------


def test_every_member_has_its_rows_once(swept):
    rows = keyed(rows_of(swept))
    manifest = Manifest.read(swept / "sweep.json")
    for program in manifest.programs:
        for m, member in enumerate(program.members):
            metrics = {"ba"} if member.rate == 0 else {"ba", "asr", "cad"}
            for epoch in (1, 2, 3):
                assert metrics <= {k[3] for k in rows if k[:3] == (program.name, m, epoch)}


def test_cad_and_false_trigger_rate_are_those_of_pmoe_evaluate(swept):
    rows = keyed(rows_of(swept))
    clean, *attacked = (p.name for p in Manifest.read(swept / "sweep.json").programs)
    assert len(attacked) == 2
    for name in attacked:
        evaluated = trained_lib.evaluate(swept / "runs" / name, clean=swept / "runs" / clean)
        wanted = {
            (name, row["member"], 3, row["metric"]): row["value"]
            for row in evaluated.rows
            if row["metric"] in ("cad", "false_trigger_rate")
        }
        assert len(wanted) == 4
        assert {key: rows[key] for key in wanted} == pytest.approx(wanted)
        assert rows[name, 1, 2, "cad"] == pytest.approx(
            rows[clean, 1, 2, "ba"] - rows[name, 1, 2, "ba"]
        )


def test_a_finished_sweep_trains_nothing_again(swept, config, monkeypatch, capsys):
    before = (swept / "rows.jsonl").read_bytes()
    monkeypatch.setattr(run_lib, "train", lambda *args, **options: pytest.fail("trained again"))
    sweep.run(config, CELLS, swept, max_members=2, progress=False)
    assert capsys.readouterr().err == ""
    sweep.run(config, CELLS, swept, max_members=1, progress=False)
    assert "it keeps the packing" in capsys.readouterr().err
    assert (swept / "rows.jsonl").read_bytes() == before


def test_figures_of_deleted_run_directories_are_kept(swept, config, copied):
    clean, square, warp = names_in(copied)
    shutil.rmtree(copied / "runs" / square)
    sweep.run(config, CELLS, copied, progress=False)
    assert rows_of(copied) == rows_of(swept)
    kept, whole = (json.loads((f / "provenance.json").read_text()) for f in (copied, swept))
    assert kept == whole
    (cell,) = [cell for cell in results.gather([copied]).cells if cell.label == "square"]
    assert cell.state == "done"
    # What could not be paired any more is not trained.
    shutil.rmtree(copied / "runs" / clean)
    forget(copied, warp)
    with pytest.raises(PmoeError, match=rf"no checkpoint any more, and {warp} .*remove .*{clean}"):
        sweep.run(config, CELLS, copied, progress=False)


def test_a_baseline_is_never_an_older_checkpoint(swept, config, copied):
    clean, square, _ = names_in(copied)
    forget(copied, square)
    newest = copied / "runs" / clean / "checkpoints" / "18"
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-1])
    manifest = Manifest.read(copied / "sweep.json")
    with pytest.raises(PmoeError, match="is whole"):
        sweep.false_trigger_rows(manifest, 1, copied, inputs.load_data(config))
    with pytest.raises(PmoeError, match=rf"SHA-256.*remove .*{clean}\.jsonl to train them again"):
        sweep.run(config, CELLS, copied, progress=False)
    forget(copied, clean)
    sweep.run(config, CELLS, copied, progress=False)
    assert rows_of(copied) == rows_of(swept)


def test_a_job_pairs_its_program_once_the_baselines_are_trained(swept, config, copied):
    clean, square, _ = names_in(copied)
    forget(copied, square)
    manifest, dataset = Manifest.read(copied / "sweep.json"), inputs.load_data(config)
    baseline = copied / "runs" / clean
    baseline.rename(copied / "elsewhere")
    sweep.pair_if_ready(manifest, 1, copied, dataset)
    assert not (copied / "paired" / f"{square}.jsonl").exists()
    (copied / "elsewhere").rename(baseline)
    sweep.pair_if_ready(manifest, 1, copied, dataset)
    here, there = (folder / "paired" / f"{square}.jsonl" for folder in (copied, swept))
    assert here.read_text() == there.read_text() != ""


def test_no_folder_for_the_pairs(config, copied):
    shutil.rmtree(copied / "paired")
    (copied / "paired").write_text("")
    with pytest.raises(PmoeError, match="paired cannot be created"):
        sweep.run(config, CELLS, copied, progress=False)


def test_a_disk_that_is_full_while_rows_are_collected(swept, config, copied, monkeypatch):
    """The rows of before stay whole, and the same command goes on."""
    _, _, warp = names_in(copied)
    forget(copied, warp)
    fsync, before = os.fsync, sorted(os.listdir(copied))

    def full(descriptor):
        # Its sum is written before.
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/.rows.jsonl.{os.getpid()}.tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DiskError, match=r"rows\.jsonl cannot be written .*; make room"
        ) as caught:
            sweep.run(config, CELLS, copied, progress=False)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(copied)) == before
    check_sum(copied / "rows.jsonl")
    assert rows_of(copied) == rows_of(swept)
    (copied / "rows.jsonl").unlink()  # As in a sweep that had none yet.
    (copied / "rows.jsonl.sha256").unlink()
    sweep.run(config, CELLS, copied, progress=False)
    check_sum(copied / "rows.jsonl")
    assert rows_of(copied) == rows_of(swept)


def test_a_changed_config_is_refused_with_the_difference(swept, config):
    before = (swept / "sweep.json").read_bytes()
    changed = grid.with_fields(config, {"train.epochs": 9})
    with pytest.raises(PmoeError, match=r"train\.epochs: 3 -> 9"):
        sweep.run(changed, CELLS, swept, progress=False)
    with pytest.raises(PmoeError, match=r"cell 3: .*warp.* -> absent"):
        sweep.run(config, CELLS[:2], swept, progress=False)
    assert (swept / "sweep.json").read_bytes() == before


def test_appended_cells_are_trained_beside_what_is_there(swept, config, copied, monkeypatch):
    """One new cell whose baselines exist, in a grid that also repeats a cell by another name."""
    stronger = {"name": "more squares", "trigger.name": "square", "poison.rate": 0.5}
    trained, train = [], run_lib.train
    monkeypatch.setattr(
        run_lib,
        "train",
        lambda *words, **more: trained.append(words[1].name) or train(*words, **more),
    )
    other = grid.with_fields(config, {"trigger.size": 3})  # What the squares differ in.
    before = keyed(rows_of(copied))
    same = {**SQUARE, "name": "squares as before"}
    manifest = sweep.run(other, [same, stronger], copied, append=True, progress=False)
    assert trained == ["003_npz_pmoe_w10"] and [c.label for c in manifest.cells] == [
        "clean", "square", "warp", "more squares",
    ]  # fmt: skip
    assert [m.trigger["size"] for m in manifest.programs[3].members] == [3, 3]
    assert {ref.program for ref in manifest.cells[3].baselines} == {0}
    after = keyed(rows_of(copied))
    assert before.items() <= after.items()
    metrics = {key[3] for key in after.keys() - before.keys()}
    assert metrics >= {"ba", "asr", "cad", "false_trigger_rate"}

    # Asked again, all is there; and the order of the commands does not matter for what is kept.
    assert sweep.run(config, CELLS, copied, append=True, progress=False) == manifest
    assert len(trained) == 1


def test_appended_baselines_pair_what_was_finished_without(config, tmp_path):
    """The cell's models are kept; only the clean ones are trained, and the pairs measured."""
    alone = {**SQUARE, "baseline": False}
    folder = tmp_path / "sweep"
    sweep.run(config, [alone], folder, max_members=2, progress=False)
    assert "false_trigger_rate" not in {row["metric"] for row in rows_of(folder)}
    paired = {**SQUARE, "name": "paired"}
    manifest = sweep.run(config, [paired], folder, append=True, max_members=2, progress=False)
    assert [len(program.members) for program in manifest.programs] == [2, 2]
    found = [row for row in rows_of(folder) if row["metric"] == "false_trigger_rate"]
    assert {row["run"] for row in found} == {manifest.programs[0].name}
    assert len(found) == len(manifest.programs[0].members)


def test_a_grid_with_two_cells_of_one_name_can_be_appended_again(config):
    stronger = {**SQUARE, "poison.rate": 0.5}
    begun = packed(config, [{"name": "clean"}])
    manifest = grid.pack(config, [SQUARE, stronger], lambda shared: 4, begun)
    assert [cell.label for cell in manifest.cells] == ["clean", "square", "square"]
    again = grid.pack(config, [SQUARE, stronger], lambda shared: 4, manifest)
    assert again == manifest


def test_cells_that_do_not_do_what_they_say_are_noted(config, capsys):
    cells = [
        {"name": "forgotten rate", "trigger.name": "square"},
        {**SQUARE, "trigger.alpha": 0.3},
        WARP,
    ]
    sweep.plan(grid.with_fields(config, {"trigger.pattern_path": "x.png"}), cells, 4)
    clean, alpha = capsys.readouterr().err.splitlines()
    assert clean.startswith("note: cell 1 (forgotten rate): poison.rate is 0")
    assert alpha.startswith("note: cell 2 (square): trigger.alpha=0.3 changes nothing")


def test_an_appended_cell_of_a_known_name_must_be_the_same(config, copied):
    before = (copied / "sweep.json").read_bytes()
    longer = grid.with_fields(config, {"train.epochs": 9})
    with pytest.raises(PmoeError, match=r"cell warp is there already.*train\.epochs: 3 -> 9"):
        sweep.run(longer, [WARP], copied, append=True, progress=False)
    with pytest.raises(PmoeError, match=r"baseline: True -> False"):
        sweep.run(config, [{**WARP, "baseline": False}], copied, append=True, progress=False)
    with pytest.raises(PmoeError, match=r"square size is 20: use 1 to 16"):
        cell = {"name": "huge", "trigger.name": "square", "trigger.size": 20, "poison.rate": 0.25}
        sweep.run(config, [cell], copied, append=True, progress=False)
    assert (copied / "sweep.json").read_bytes() == before


def test_packing_differently_changes_no_member(tiny_arrays, tmp_path):
    """One step, all in one program, where the warp gives the others an identity grid, against two
    programs."""
    (images, labels), (test_images, test_labels) = tiny_arrays
    np.savez(tmp_path / "few.npz", train_images=images[:15], train_labels=labels[:15],
             test_images=test_images[:8], test_labels=test_labels[:8])  # fmt: skip
    config = config_of(tmp_path / "few.npz", num_seeds=1, **{
        "train.batch_size": 15, "train.epochs": 1,
    })  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert len(sweep.run(config, CELLS, one, max_members=3, progress=False).programs) == 1
    assert len(sweep.run(config, CELLS, two, max_members=2, progress=False).programs) == 2
    for cell in range(3):
        ours, theirs = _weights(one, cell, 0), _weights(two, cell, 0)
        assert ours.keys() == theirs.keys() and len(ours) > 5
        for name, leaf in ours.items():
            np.testing.assert_allclose(leaf, theirs[name], atol=1e-5, err_msg=name)


def _weights(folder, cell, seed):
    manifest = Manifest.read(folder / "sweep.json")
    ref = manifest.cells[cell].members[seed]
    program = manifest.programs[ref.program]
    dataset = inputs.load_data(program.config)
    run = RunDirectory(folder / "runs" / program.name)
    state = trained_lib.restore(run, program.config, program.members, dataset)[2]
    flat = checkpoints_lib.ocp.tree.to_flat_dict(state.variables, sep=".")
    return {name: np.asarray(leaf[ref.member]) for name, leaf in flat.items()}


# --- errors, command line -----------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "message"), [
    ({**SQUARE, "poison.target": 7}, "7 is no class"),
    ({**SQUARE, "poison.rate": 0.0001}, "less than one image"),
    ({**SQUARE, "trigger.size": 99}, "square size is 99: use 1 to 16 on images of 16x16"),
    ({**SQUARE, "model.dtype": "float64"}, "float64"),
])  # fmt: skip
def test_nothing_is_written_for_a_cell_that_cannot_be_trained(config, tmp_path, fields, message):
    with pytest.raises(PmoeError, match=message):
        sweep.run(config, [{}, fields], tmp_path / "new", max_members=4, progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("shape", "problem"), [("2x4", "possible"), ("3x1", "must divide")])
def test_a_mesh_of_other_machines_need_not_fit_this_one(config, tmp_path, shape, problem):
    config = grid.with_fields(config, {"train.mesh": shape, "train.epochs": 1})
    manifest, datasets = packed(config, CELLS[:1]), sweep._Datasets()
    if shape == "2x4":
        sweep.check(manifest, datasets, elsewhere=True)
        assert sweep.estimate(manifest, datasets, elsewhere=True)[0].seconds > 0
    with pytest.raises(PmoeError, match=rf"cell 1 .*train\.mesh={shape} .*{problem}"):
        sweep.check(manifest, datasets, elsewhere=problem == "must divide")


def test_a_cell_that_no_model_can_be_built_for_is_found_at_the_start(real_model, config, tmp_path):
    fields = {**SQUARE, "model.patches_per_expert": 100}
    with pytest.raises(PmoeError, match=r"cell 2 \(square\): patches_per_expert=100 exceeds"):
        sweep.run(config, [{}, fields], tmp_path / "new", max_members=4, progress=False)
    assert not (tmp_path / "new").exists()


def test_float64_of_cells_is_set_and_that_of_the_config_alone_is_not(config, monkeypatch, tmp_path):
    path = tmp_path / "grid_config.py"
    seen = []

    def run(config, cells, workdir, **options):
        seen.append(jax.config.jax_enable_x64)
        raise PmoeError("enough")

    monkeypatch.setattr(sweep, "run", run)
    for of_config, of_cells in (("float32", "float64"), ("float64", "float32")):
        stored = grid.with_fields(config, {"model.dtype": of_config}).to_dict()
        path.write_text(
            "from pmoe_jax import grid\n"
            f"def get_config():\n    return grid.config_from({stored!r})\n"
            f"def get_grid():\n    return {[{'model.dtype': of_cells}]!r}\n"
        )
        try:
            assert cli.main(["sweep", f"--config={path}", f"--workdir={tmp_path / 'x'}"]) == 2
        finally:
            jax.config.update("jax_enable_x64", False)
    assert seen == [True, False]


def test_a_folder_with_other_files_is_refused_before_any_work(config, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_data", lambda *args: pytest.fail("data were read"))
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(PmoeError, match=r"thesis\.tex"):
        sweep.run(config, [{}], tmp_path, max_members=4, progress=False)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(PmoeError, match="choose another workdir"):
        sweep.run(config, [{}], tmp_path / "thesis.tex", max_members=4, progress=False)


def test_a_folder_that_another_sweep_works_in_is_left_alone(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lib, "train", lambda *args, **options: pytest.fail("trained"))
    with RunDirectory(tmp_path), pytest.raises(PmoeError, match="in use by another process"):
        sweep.run(config, [{}], tmp_path, max_members=4, progress=False)
    assert os.listdir(tmp_path) == [".lock"]


@pytest.fixture
def config_file(config, tmp_path):
    path = tmp_path / "grid_config.py"
    path.write_text(
        "from pmoe_jax import config as config_lib, grid\n"
        "def get_config(preset='full'):\n"
        f"    stored = {config.to_dict()!r}\n"
        "    return grid.config_from(stored)\n"
        "def get_grid(preset='full'):\n"
        f"    return {CELLS!r}[:1 if preset == 'smoke' else 3]\n"
    )
    return path


def test_a_dry_run_prints_programs_and_leaves_nothing(config_file, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    assert cli.main(["sweep", f"--config={config_file}", f"--workdir={workdir}", "--dry_run",
                     "--max_members=4", "--config.train.epochs=2"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "000_npz_pmoe_w10" in printed and "001_npz_pmoe_w10" in printed and "GiB" in printed
    assert not workdir.exists()


def test_times_are_extrapolated_from_steps_and_evaluations(swept, copied, monkeypatch):
    measured = run_lib.Calibration(2**30, 0, 2.0, 3.0)
    monkeypatch.setattr(run_lib, "calibrate", lambda *args: measured)
    manifest, datasets = Manifest.read(swept / "sweep.json"), sweep._Datasets()
    estimates = sweep.estimate(manifest, datasets)
    # 18 steps of 2 s and 3 evaluations of 3 s; one more where there is a trigger.
    assert [needs.seconds for needs in estimates] == [45, 48, 48]
    forget(copied, names_in(copied)[2])
    estimates = sweep.estimate(manifest, datasets, copied)
    assert estimates == [None, None, (2**30, 48)]
    lines = sweep.estimate_table(manifest, estimates).splitlines()[2:6]
    assert [[part.strip() for part in line.split("|")[2:5]] for line in lines] == [
        ["2", "", "finished"], ["2", "", "finished"], ["2", "1.00 GiB", "48 s"], ["6", "", "48 s"],
    ]  # fmt: skip


def test_a_dry_run_of_a_finished_sweep_measures_nothing(swept, config_file, monkeypatch, capsys):
    monkeypatch.setattr(run_lib, "calibrate", lambda *args: pytest.fail("measured"))
    words = ["sweep", f"--config={config_file}", f"--workdir={swept}", "--dry_run"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("finished") == 3


def test_a_preset_and_overrides_reach_the_grid(config_file, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    words = ["sweep", f"--config={config_file}:smoke", f"--workdir={workdir}", "--max_members=4",
             "--config.train.epochs=1", "--config.num_seeds=1"]  # fmt: skip
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert "| clean" in captured.out and "done" in captured.out
    assert "npz, pmoe of width 10, 1 epoch, 1 seed\n" in captured.out
    assert "time left: unknown yet" in captured.err and "100 %; time left: none" in captured.err
    (program,) = Manifest.read(workdir / "sweep.json").programs
    assert [member.seed for member in program.members] == [0]
    assert program.config.train.epochs == 1


def test_a_config_without_grid_is_named(tmp_path, capsys):
    (tmp_path / "plain.py").write_text(
        "from pmoe_jax import config\ndef get_config():\n    return config.default()\n"
    )
    assert cli.main(["sweep", f"--config={tmp_path / 'plain.py'}", "--dry_run"]) == 2
    assert "get_grid()" in capsys.readouterr().err


# --- progress -----------------------------------------------------------------------------------


def test_time_left_by_hand(config, tmp_path, monkeypatch):
    """Two programs of 3 epochs, of 4 and of 2 members: 12 and 6 epochs of a member."""
    manifest, now, shown = packed(config, CELLS, limit=4), [0.0], []
    monkeypatch.setattr(sweep, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    board = sweep._Board(manifest, tmp_path, lambda *drawn: shown.append(drawn))

    def at(second, call, *args):
        now[0] = second
        call(*args)
        head, _, at_work = shown[-1]
        return head.partition("members): ")[2], at_work

    def finish(index):
        (tmp_path / "paired").mkdir(exist_ok=True)
        sweep._paired(tmp_path, manifest.programs[index]).touch()
        board.finish()

    assert at(0, board.start, 0) == ("0 %; time left: unknown yet", 0)
    at(10, board.watch, 1, 18)
    # Half of 12 in 100 s: 100 s more, and 100 s for the other program.
    assert at(100, board.watch, 9, 18) == ("50 %; time left: about 3 min", 0)
    assert at(210, finish, 0) == ("100 %; time left: about 2 min", 0)  # 6 / 12 of 210 s
    # The second program is resumed behind 9 of 18 steps: its share so far took no time now.
    assert at(210, board.start, 1) == ("0 %; time left: about 2 min", 2)
    at(220, board.watch, 10, 18)
    # 210 s for 12 and 40 s for 7 / 18 of 6, hence 17.4 s each; 2 / 18 of 6 are left.
    assert at(250, board.watch, 16, 18) == ("89 %; time left: about 12 s", 2)
    assert at(260, finish, 1) == ("100 %; time left: none", 2)


TALL = report.Table(
    "cifar10, pmoe of width 2, 5 epochs, 3 seeds",
    ["cell", "ASR [%]", "false trigger rate [%]", "BA [%]", "CAD [%]", "state"],
    [
        [f"cell {i}, trigger.name=square, poison.rate=0.005", *["96.0 ± 2.0 [91.0, 100.0]"] * 3,
         "2.0 ± 1.0 [-0.5, 4.5] unresolved", "unfinished: epoch 3 of 25"]
        for i in range(40)
    ],
)  # fmt: skip


@pytest.mark.parametrize("at_work", [0, 17, 39])
def test_the_cells_at_work_stay_in_view(at_work):
    terminal = Console(file=io.StringIO(), width=80, height=24, color_system=None)
    terminal.print(sweep._picture("HEAD", TALL, at_work, terminal))
    drawn = terminal.file.getvalue().splitlines()
    assert drawn[0] == "HEAD" and 12 < len(drawn) < 24
    assert any(line.strip().startswith(f"cell {at_work},") for line in drawn)
    shown = sum(line.strip().startswith("cell ") for line in drawn) - 1  # and the header
    above, below = map(int, re.search(r"(\d+) cells above, (\d+) below", drawn[-1]).groups())
    assert above + shown + below == 40


def test_a_small_table_is_shown_whole():
    terminal = Console(file=io.StringIO(), width=200, height=24, color_system=None)
    short = TALL._replace(lines=TALL.lines[:3])
    terminal.print(sweep._picture("HEAD", short, 0, terminal))
    drawn = terminal.file.getvalue()
    assert TALL.title in drawn and "above" not in drawn
    for cell in short.lines[2]:
        assert cell in drawn


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_table_is_drawn_and_goes_away(config, tmp_path, monkeypatch):
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("LINES", "30")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    screen = sys.stderr
    with sweep._board(packed(config, CELLS, limit=4), tmp_path, progress=True) as board:
        board.start(0)
        board.watch(1, 18)
        print("warning: said meanwhile", file=sys.stderr)
        time.sleep(1.2)  # It is drawn twice a second.
        drawn = screen.getvalue()
        assert "program 1 of 2" in drawn and "not started" in drawn and "said meanwhile" in drawn
    assert sys.stderr is screen
    assert screen.getvalue().endswith("\x1b[2K")  # the last line is erased


def test_the_table_says_scale_interval_and_verdict(config):
    (manifest,) = [packed(grid.with_fields(config, {"num_seeds": 3}), [SQUARE])]
    run = manifest.programs[0].name

    def rows(member, metric, value):
        return [{
            "run": run, "member": member, "seed": member % 3, "dataset": "npz", "width": 10,
            "epoch": 3, "stage": "trained", "trigger": "square", "rate": 0.25, "metric": metric,
            "value": float(value), "n": 40,
        }]  # fmt: skip

    figures = []
    for seed, (clean, attacked) in enumerate([(80, 79), (82, 80), (84, 81)]):
        figures += rows(seed, "ba", clean) + rows(3 + seed, "ba", attacked)
    cells = results.cells_of(manifest, results.with_cad(manifest, figures))
    table = report.overview(cells)
    assert table.title == "npz, pmoe of width 10, 3 epochs, 3 seeds"
    # sd 1 of three: t / 3 ** 0.5 = 2.484
    assert table.lines == [["square", "–", "–", "80.0 ± 1.0 [77.5, 82.5]",
                            "2.0 ± 1.0 [-0.5, 4.5] unresolved", "done"]]  # fmt: skip
    other = packed(grid.with_fields(config, {"model.width": 2}), [SQUARE])
    mixed = report.overview([*cells, *results.cells_of(other, [])])
    assert mixed.title == "" and mixed.header[1] == "scale"
    assert [line[1] for line in mixed.lines] == [
        "npz, pmoe of width 10, 3 epochs, 3 seeds", "npz, pmoe of width 2, 3 epochs, 2 seeds",
    ]  # fmt: skip


# --- being stopped ------------------------------------------------------------------------------


def _assert_same_as(swept, folder):
    """Same rows in the same order and with the same values: nothing lost, nothing repeated."""
    assert rows_of(folder) == rows_of(swept)
    for name in names_in(swept):
        one, other = (RunDirectory(f / "runs" / name).rows() for f in (folder, swept))
        assert one == other
        assert json.loads((folder / "provenance.json").read_text())[name]["sessions"]


@pytest.mark.parametrize("moment", ["last step", "pairing"])
def test_a_signal_between_programs_counts(moment, swept, config, tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    calls = 0
    owner, name = {"last step": (run_lib._Clock, "tick"), "pairing": (sweep, "_pair")}[moment]
    wanted = {"last step": 18, "pairing": 1}[moment]

    original = getattr(owner, name)

    def ask(*args):
        nonlocal calls
        calls += 1
        if calls == wanted:
            assert signal.getsignal(signal.SIGTERM) != handlers[0]
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    folder = tmp_path / "swept"
    with monkeypatch.context() as patch, pytest.raises(run_lib.Interrupted, match="by SIGTERM"):
        patch.setattr(owner, name, ask)
        sweep.run(config, CELLS, folder, max_members=2, progress=False)
    first, *_ = names_in(folder)
    assert os.listdir(folder / "runs") == [first]
    assert RunDirectory(folder / "runs" / first).whole_steps()[-1] == 18
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    sweep.run(config, CELLS, folder, progress=False)
    _assert_same_as(swept, folder)


#: The real model on real digits, most of them held out, so that an epoch has few steps.
DIGITS = {
    "data.name": "digits", "data.heldout": 0.9, "num_seeds": 1, "model.width": 1,
    "data.image_size": 16, "model.num_experts": 2, "model.patches_per_expert": 4,
    "model.bn_momentum": 0.9, "train.epochs": 3, "train.batch_size": 24,
    "evaluation.batch_size": 360, "checkpoint.every_steps": 2,
}  # fmt: skip


def _saved(folder):
    """Steps that are safe on disk, a program."""
    found = {path.name: RunDirectory(path).whole_steps() for path in folder.glob("runs/*")}
    return {name: steps[-1] if steps else 0 for name, steps in found.items()}


def _sessions(folder, names):
    stored = {n: json.loads((folder / "runs" / n / "provenance.json").read_text()) for n in names}
    return {name: len(entry["sessions"]) for name, entry in stored.items()}


@pytest.mark.parametrize("thirds", [(1, 4), pytest.param((0, 1, 2, 3, 4), marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_and_repeat_nothing(thirds, real_model, tmp_path):
    config = grid.with_fields(config_lib.default(), DIGITS)
    path, folder, whole = tmp_path / "digits.py", tmp_path / "killed", tmp_path / "whole"
    path.write_text(
        "from pmoe_jax import grid\n"
        f"def get_config():\n    return grid.config_from({config.to_dict()!r})\n"
        f"def get_grid():\n    return {CELLS[:2]!r}\n"
    )
    sweep.run(config, CELLS[:2], whole, max_members=1, progress=False)
    (steps,) = set(_saved(whole).values())

    seed = time.time_ns()
    print(f"chance = random.Random({seed})")  # pytest shows it with a failure
    chance = random.Random(seed)
    # When so many of the steps of the two programs are saved, and some milliseconds later.
    moments = [k * steps // 3 + chance.randrange(4) for k in thirds]
    saved, finished, sessions, inside = {}, set(), {}, 0
    for moment in [*moments, None]:
        with bounded.started(
            [sys.executable, "-c", "from pmoe_jax import cli; cli.entry_point()", "sweep",
             f"--config={path}", f"--workdir={folder}", "--max_members=1"],
            stdout=subprocess.DEVNULL, cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                 "GLIBC_TUNABLES": ""},  # so that the command does not restart itself
        ) as process:  # fmt: skip
            if moment is not None:
                begun, end = sum(saved.values()), time.monotonic() + 120
                while process.poll() is None and (
                    sum(_saved(folder).values()) < max(moment, begun + 1)
                ):
                    assert time.monotonic() < end, f"not at step {moment}"
                    time.sleep(0.002)
                time.sleep(chance.random() / 10)
                process.kill()
            said = process.communicate(timeout=120)[1]
        assert process.returncode == (0 if moment is None else -signal.SIGKILL), said
        # It went on from the newest of all steps that were saved, and left alone what was finished.
        resumed = {
            os.path.basename(name): int(step)
            for name, step in re.findall(r"^resuming (.*) at step (\d+)", said, re.MULTILINE)
        }
        assert resumed == {n: step for n, step in saved.items() if step and n not in finished}
        assert _sessions(folder, finished) == sessions
        saved = _saved(folder)
        finished = {name for name in saved if (folder / "paired" / f"{name}.jsonl").exists()}
        sessions = _sessions(folder, finished)
        inside += any(0 < step < steps for step in saved.values())
    assert inside and len(finished) == 2
    _assert_same_as(whole, folder)
    for name in names_in(folder):
        lines = (folder / "runs" / name / "training.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_collected_rows_alone_give_the_same_cells(swept, tmp_path):
    for name in ("sweep.json", "rows.jsonl", "provenance.json"):
        (tmp_path / name).write_bytes((swept / name).read_bytes())
    kept, whole = results.gather([tmp_path]), results.gather([swept])
    assert [cell.figures for cell in kept.cells] == [cell.figures for cell in whole.cells]
    assert kept.provenance == whole.provenance


def test_a_trained_program_is_left_to_its_job_while_that_runs(config, copied, monkeypatch):
    """It may be computing what the command would. What an earlier attempt left does not count."""
    name = Manifest.read(copied / "sweep.json").programs[-1].name
    for path in (copied / "paired").glob(f"{name}.jsonl*"):
        path.unlink()
    (copied / "jobs").mkdir()
    known = {"launcher": "local", "job": "7"}
    (copied / "jobs" / f"{name}.json").write_text(json.dumps(known))
    (copied / "jobs" / f"{name}.error").write_text("disk full")
    monkeypatch.setattr(cluster, "_executor", lambda *args: None)
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.02)
    asked, paired = [], []

    def runs(number):
        asked.append(number)
        return len(asked) < 4

    monkeypatch.setattr(cluster, "_is_process", runs)
    monkeypatch.setattr(
        sweep, "_write_pairs", lambda _, index, *more: paired.append((index, len(asked)))
    )
    sweep.run(
        config, CELLS, copied, progress=False,
        jobs=lambda folder, names: cluster.Jobs(folder, "local", {}, names),
    )  # fmt: skip
    assert paired[0] == (2, 4) and set(asked) == {"7"}
