"""Sweeps: packing by hand, pairing, resuming, being killed."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import linen as nn

from pmoe_jax import checkpoints as checkpoints_lib
from pmoe_jax import cli, grid, results, sweep, training
from pmoe_jax import config as config_lib
from pmoe_jax import run as run_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.grid import Manifest, Ref
from pmoe_jax.rundir import RunDirectory

SQUARE = {"name": "square", "trigger.name": "square", "trigger.size": 6, "poison.rate": 0.25}
WARP = {"name": "warp", "trigger.name": "warp", "poison.rate": 0.25}
CELLS = [{"name": "clean"}, SQUARE, WARP]


class Small(nn.Module):
    """Stands in for the real models: a linear classifier of 8x8 averages, with batch norm."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.avg_pool(images, (8, 8), (8, 8)).reshape(len(images), -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_classes)(x)


def use_small_model(patch=setattr):
    patch(training, "build_model", lambda config, classes: Small(classes))


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        use_small_model(patch.setattr)
        yield


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


def test_a_manifest_reads_back_what_was_written(config, tmp_path):
    manifest = packed(config, CELLS, limit=4)
    (tmp_path / "sweep.json").write_text(manifest.to_json())
    assert Manifest.read(tmp_path / "sweep.json") == manifest


@pytest.mark.parametrize("damage", [
    lambda stored: stored["programs"][0].update(name="../outside"),
    lambda stored: stored["cells"][0]["members"][0].update(member=99),
    lambda stored: stored["programs"][0]["config"].update(bad=1),
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
        evaluated = run_lib.evaluate(swept / "runs" / name, clean=swept / "runs" / clean)
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


def test_a_finished_sweep_trains_nothing_again(swept, config, monkeypatch):
    before = (swept / "rows.jsonl").read_bytes()
    monkeypatch.setattr(run_lib, "train", lambda *args, **options: pytest.fail("trained again"))
    sweep.run(config, CELLS, swept, max_members=1, progress=False)  # The packing is kept.
    assert (swept / "rows.jsonl").read_bytes() == before


def test_a_changed_config_is_refused_with_the_difference(swept, config):
    before = (swept / "sweep.json").read_bytes()
    changed = grid.with_fields(config, {"train.epochs": 9})
    with pytest.raises(PmoeError, match=r"train\.epochs: 3 -> 9"):
        sweep.run(changed, CELLS, swept, progress=False)
    with pytest.raises(PmoeError, match=r"cell 3: .*warp.* -> absent"):
        sweep.run(config, CELLS[:2], swept, progress=False)
    assert (swept / "sweep.json").read_bytes() == before


def test_packing_differently_changes_no_member(swept, config, tmp_path):
    """All in one program (warps give the others an identity grid) against a program a cell."""
    sweep.run(config, CELLS, tmp_path / "one", max_members=6, progress=False)
    for cell in range(3):
        for seed in range(2):
            ours, theirs = (_weights(f, cell, seed) for f in (swept, tmp_path / "one"))
            assert ours.keys() == theirs.keys()
            for name, leaf in ours.items():
                np.testing.assert_allclose(leaf, theirs[name], atol=1e-5, err_msg=name)


def _weights(folder, cell, seed):
    manifest = Manifest.read(folder / "sweep.json")
    ref = manifest.cells[cell].members[seed]
    program = manifest.programs[ref.program]
    dataset = run_lib.load_data(program.config)
    run = RunDirectory(folder / "runs" / program.name)
    state = run_lib.restore(run, program.config, program.members, dataset)[2]
    flat = checkpoints_lib.ocp.tree.to_flat_dict(state.variables, sep=".")
    return {name: np.asarray(leaf[ref.member]) for name, leaf in flat.items()}


# --- errors, command line -----------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "message"), [
    ({**SQUARE, "poison.target": 7}, "7 is no class"),
    ({**SQUARE, "poison.rate": 0.0001}, "less than one image"),
    ({**SQUARE, "trigger.size": 99}, "larger than the image"),
    ({**SQUARE, "model.dtype": "float64"}, "float64"),
])  # fmt: skip
def test_nothing_is_written_for_a_cell_that_cannot_be_trained(config, tmp_path, fields, message):
    with pytest.raises(PmoeError, match=message):
        sweep.run(config, [{}, fields], tmp_path / "new", max_members=4, progress=False)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_files_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(PmoeError, match=r"thesis\.tex"):
        sweep.run(config, [{}], tmp_path, max_members=4, progress=False)
    assert not (tmp_path / "sweep.json").exists()


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


def test_a_preset_and_overrides_reach_the_grid(config_file, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    words = ["sweep", f"--config={config_file}:smoke", f"--workdir={workdir}", "--max_members=4",
             "--config.train.epochs=1", "--config.num_seeds=1"]  # fmt: skip
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert "| clean" in captured.out and "done" in captured.out
    assert "time left" in captured.err
    (program,) = Manifest.read(workdir / "sweep.json").programs
    assert [member.seed for member in program.members] == [0]
    assert program.config.train.epochs == 1


def test_a_config_without_grid_is_named(tmp_path, capsys):
    (tmp_path / "plain.py").write_text(
        "from pmoe_jax import config\ndef get_config():\n    return config.default()\n"
    )
    assert cli.main(["sweep", f"--config={tmp_path / 'plain.py'}", "--dry_run"]) == 2
    assert "get_grid()" in capsys.readouterr().err


# --- being killed -------------------------------------------------------------------------------

_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import test_sweep
from pmoe_jax import cli
test_sweep.use_small_model()
sys.exit(cli.main(sys.argv[2:]))
"""


def _start_process(words):
    tests = str(pathlib.Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, tests, *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def _figures(folder):
    """Lines of figures in all programs of a sweep."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("runs/*/metrics.jsonl"))


def _assert_same_as(swept, folder):
    """Same rows in the same order and with the same values: nothing lost, nothing repeated."""
    assert rows_of(folder) == rows_of(swept)
    for name in (program.name for program in Manifest.read(swept / "sweep.json").programs):
        one, other = (RunDirectory(f / "runs" / name).rows() for f in (folder, swept))
        assert one == other
        assert json.loads((folder / "provenance.json").read_text())[name]["sessions"]


def test_a_killed_sweep_goes_on_to_the_same_rows(swept, config_file, config, tmp_path):
    """Killed in the middle of the second program, then finished."""
    folder = tmp_path / "swept"
    process = _start_process(
        ["sweep", f"--config={config_file}", f"--workdir={folder}", "--max_members=2"]
    )
    while process.poll() is None and _figures(folder) < 10:  # 6 are the first program's.
        time.sleep(0.002)
    process.kill()
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    assert not (folder / "paired" / "002_npz_pmoe_w10.jsonl").exists()
    sweep.run(config, CELLS, folder, progress=False)
    _assert_same_as(swept, folder)


@pytest.mark.slow
def test_a_sweep_killed_at_five_random_moments(swept, config_file, config, tmp_path):
    folder, chance = tmp_path / "swept", random.Random(time.time_ns())
    words = ["sweep", f"--config={config_file}", f"--workdir={folder}", "--max_members=2"]
    for _ in range(5):
        process, figures = _start_process(words), _figures(folder)
        while process.poll() is None and not (folder / "sweep.json").exists():
            time.sleep(0.002)
        # A moment within what is left: after some figures, and then some milliseconds.
        wanted = figures + chance.randrange(10)
        deadline = time.monotonic() + 60
        while process.poll() is None and _figures(folder) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() / 5)
        process.kill()
        process.communicate()
    sweep.run(config, CELLS, folder, progress=False)
    _assert_same_as(swept, folder)


def test_collected_rows_alone_give_the_same_cells(swept, tmp_path):
    for name in ("sweep.json", "rows.jsonl", "provenance.json"):
        (tmp_path / name).write_bytes((swept / name).read_bytes())
    kept, whole = results.gather([tmp_path]), results.gather([swept])
    assert [cell.figures for cell in kept.cells] == [cell.figures for cell in whole.cells]
    assert kept.provenance == whole.provenance
