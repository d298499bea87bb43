"""Reports: statistics by hand, the paper's figures, tables, and the page in a real browser."""

import csv
import dataclasses
import html
import io
import json
import pathlib
import re
import runpy
import shutil
import subprocess

import pytest

from pmoe_jax import cli, grid, paper, report, report_html, results
from pmoe_jax import config as config_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.results import Figure
from pmoe_jax.rundir import RunDirectory

SETTING = {"data.name": "cifar10", "model.width": 2, "train.epochs": 4}
SQUARE = {"trigger.name": "square", "poison.rate": 0.02}

#: BA of the clean members of seeds 0 to 2 at epochs 2 to 4.
CLEAN_BA = [[60, 70, 80], [62, 72, 82], [64, 74, 84]]
#: BA and ASR of the attacked ones.
SQUARE_BA = [[59, 69, 79], [61, 69, 80], [61, 72, 81]]
SQUARE_ASR = [[90, 92, 94], [90, 94, 98], [90, 96, 96]]


def rows_of(run, member, seed, metric, values, stage="trained", first_epoch=2):
    return [
        {"run": run, "member": member, "seed": seed, "dataset": "cifar10", "width": 2,
         "epoch": epoch, "stage": stage, "trigger": "square", "rate": 0.02, "metric": metric,
         "value": float(value), "n": 100}
        for epoch, value in enumerate(values, first_epoch)
    ]  # fmt: skip


def packed(cells, **changes):
    config = grid.with_fields(config_lib.default(), {**SETTING, "num_seeds": 3, **changes})
    return grid.pack(config, cells, lambda shared: 100)


def write_sweep(folder, manifest, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(manifest.to_json())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def manifest():
    """Clean and square at 2 and 10 %; three seeds: members 0-2, 3-5, 6-8 of one program."""
    return packed([{"name": "clean"}, SQUARE, {**SQUARE, "poison.rate": 0.1}])


@pytest.fixture
def rows(manifest):
    """Of the clean members and of square at 2 %; of square at 10 % nothing yet."""
    run = manifest.programs[0].name
    made = []
    for seed in range(3):
        made += rows_of(run, seed, seed, "ba", CLEAN_BA[seed])
        made += rows_of(run, 3 + seed, seed, "ba", SQUARE_BA[seed])
        made += rows_of(run, 3 + seed, seed, "asr", SQUARE_ASR[seed])
        made += rows_of(run, 3 + seed, seed, "robust_accuracy", [2 + seed], first_epoch=4)
        made += rows_of(run, 3 + seed, seed, "false_trigger_rate", [1 + seed], first_epoch=4)
    return made


@pytest.fixture
def gathered(tmp_path, manifest, rows):
    return results.gather([write_sweep(tmp_path / "sweep", manifest, rows)])


# --- statistics ---------------------------------------------------------------------------------


def test_figures_by_hand(gathered):
    clean, square, waiting = gathered.cells
    asr = square.figures["asr"]
    assert asr.points == {0: 94, 1: 98, 2: 96}
    assert (asr.summary.n, asr.summary.mean) == (3, 96)
    assert asr.summary.sd == pytest.approx(2)  # ((2^2 + 2^2 + 0) / 2) ** 0.5
    # 4.302653 is Student's t of 2 degrees of freedom at 97.5 %; / 3 ** 0.5 * 2 = 4.968275
    assert asr.summary.interval == pytest.approx((96 - 4.968275, 96 + 4.968275), abs=1e-5)
    assert asr.last3_points == {0: 92, 1: 94, 2: 94}
    assert asr.last3.mean == pytest.approx(280 / 3)
    assert asr.last3.sd == pytest.approx((4 / 3) ** 0.5)
    assert square.figures["false_trigger_rate"].points == {0: 1, 1: 2, 2: 3}
    assert square.figures["false_trigger_rate"].last3 is None  # measured at the last epoch alone
    assert "cad" not in clean.figures
    assert (clean.state, square.state, waiting.state) == ("done", "done", "not started")


def test_cad_pairs_seeds_and_is_unresolved_where_its_interval_contains_zero(gathered):
    cad = gathered.cells[1].figures["cad"]
    assert cad.points == {0: 1, 1: 2, 2: 3}  # 80-79, 82-80, 84-81
    # mean 2, sd 1, t / 3 ** 0.5 = 2.484: from -0.48
    assert cad.resolved is False
    assert report.verdict(cad) == "unresolved"
    assert cad.last3.mean == pytest.approx((1 + 2 + 8 / 3) / 3)  # by seed: (1+1+1, 1+3+2, 3+2+3)/3


def figure(*values, last3=()):
    return Figure(dict(enumerate(values)), dict(enumerate(last3)))


@pytest.mark.parametrize(("values", "wanted"), [
    # Half the interval is 2.484 standard deviations of three values.
    ((2.5, 1.5, 3.5), "resolved"), ((-2.5, -1.5, -3.5), "resolved"),
    ((2.4, 1.4, 3.4), "unresolved"), ((0, 0, 0), "unresolved"),
    ((2, 3), "2 seeds: no interval"), ((2,), "1 seed: no interval"), ((), ""),
])  # fmt: skip
def test_verdicts(values, wanted):
    assert report.verdict(figure(*values)) == wanted


def test_one_or_two_seeds_show_their_points_and_three_their_mean():
    assert report.points_or_mean(figure(90.04)) == "90.0"
    assert report.points_or_mean(figure(90, 95)) == "90.0, 95.0"
    assert report.points_or_mean(figure(94, 98, 96)) == "96.0 ± 2.0"
    assert report.points_or_mean(None) == report.points_or_mean(figure()) == "–"
    assert report.points_or_mean(Figure({0: 94, 2: 96, 3: 98}, lost=2)) == "96.0 ± 2.0 (3 of 5)"
    assert report.points_or_mean(Figure({}, lost=2)) == "– (0 of 2)"
    assert report.difference(figure(90, 95), 92.5) == "-2.5, +2.5"
    assert report.difference(figure(94, 98, 96), 96.6) == "-0.6"
    assert report.difference(figure(94, 98, 96), 96.6, False) == "(-0.6)"
    assert report.difference(figure(94), None) == ""


def test_intervals_end_where_percentages_do():
    high, low = figure(94, 98, 96).summary, figure(0, 4, 2).summary
    assert report.interval_text(high, "asr") == "91.0 to 100.0"
    assert report.interval_text(low, "asr") == "0.0 to 7.0"
    assert report.interval_text(low, "cad") == "-3.0 to 7.0"
    assert report.interval_text(figure(94, 98).summary, "asr") == ""


def test_the_last_three_epochs_follow_the_same_rule(manifest, rows, tmp_path):
    two = [row for row in rows if row["seed"] < 2]
    square = results.gather([write_sweep(tmp_path, manifest, two)]).cells[1]
    assert square.figures["asr"].last3_points == {0: 92, 1: 94}
    (section,) = report.sections([square])
    table = section.tables[0]
    assert table.lines[0][table.header.index("last 3 epochs")] == "92.0, 94.0"
    (line,) = [x for x in csv.DictReader(io.StringIO(report.cells_csv([square])))
               if x["metric"] == "asr"]  # fmt: skip
    assert (line["last3_values"], line["last3_mean"], line["last3_n"]) == ("92.0 94.0", "93.0", "2")


def test_diverged_members_are_left_out_and_counted(manifest, rows, tmp_path):
    for row in rows:
        if row["member"] == 1:  # the clean one of seed 1: no CAD and false trigger rate of seed 1
            row["stage"] = "diverged"
    clean, square, _ = results.gather([write_sweep(tmp_path, manifest, rows)]).cells
    assert clean.figures["ba"].points == {0: 80, 2: 84}
    assert clean.state == "done, 1 diverged"
    assert square.figures["cad"].points == {0: 1, 2: 3}
    assert square.figures["false_trigger_rate"].points == {0: 1, 2: 3}
    assert square.figures["ba"].points == {0: 79, 1: 80, 2: 81}
    # Wherever fewer seeds count than belong to it, a figure says so.
    shown = report.overview([square])
    cells = dict(zip(shown.header, shown.lines[0], strict=True))
    assert cells["CAD [%]"].startswith("1.0, 3.0 (2 of 3)")
    assert cells["false trigger rate [%]"] == "1.0, 3.0 (2 of 3)" and "of 3" not in cells["BA [%]"]
    (section,) = report.sections([clean])
    (line,) = next(table for table in section.tables if table.title == "Benign accuracy").lines
    assert "80.0, 84.0 (2 of 3)" in line and report.LEFT_OUT in section.notes


def test_the_false_trigger_rate_leaves_out_what_its_asr_leaves_out(manifest, rows, tmp_path):
    for row in rows:
        # Its false trigger rate is the clean model's, which did not diverge.
        if row["member"] == 4 and row["metric"] != "false_trigger_rate":
            row["stage"] = "diverged"
    square = results.gather([write_sweep(tmp_path, manifest, rows)]).cells[1]
    assert square.figures["asr"].points.keys() == {0, 2}
    assert square.figures["false_trigger_rate"].points == {0: 1, 2: 3}


def test_unfinished_members_do_not_count(manifest, rows, tmp_path):
    ends = [r for r in rows if r["epoch"] < 4 or r["member"] in (0, 1, 2, 3)]
    square = results.gather([write_sweep(tmp_path / "a", manifest, ends)]).cells[1]
    assert square.state == "unfinished: 1 of 3 seeds"
    assert square.figures["asr"].points == {0: 94}
    none = [r for r in rows if r["epoch"] < 4]
    square = results.gather([write_sweep(tmp_path / "b", manifest, none)]).cells[1]
    assert square.state == "unfinished: epoch 3 of 4"
    assert square.figures["asr"].summary is None


# --- one evaluated run --------------------------------------------------------------------------


def evaluated_of(seeds, attacked=True, last3=True):
    """The attacked (or clean) members of some seeds, as `pmoe evaluate --clean` sees them."""
    made = packed([SQUARE])
    chosen = [m for m in made.programs[0].members if m.seed in seeds and (m.rate > 0) == attacked]
    rows, means = [], []
    for index, member in enumerate(chosen):
        seed, curves = member.seed, {"ba": SQUARE_BA, "asr": SQUARE_ASR} if attacked else {
            "ba": CLEAN_BA}  # fmt: skip
        for metric, values in curves.items():
            rows += rows_of("r", index, seed, metric, values[seed][2:], first_epoch=4)
            means += rows_of("r", index, seed, metric, [sum(values[seed]) / 3], first_epoch=4)
        cad = CLEAN_BA[seed][2] - SQUARE_BA[seed][2]
        rows += rows_of("r", index, seed, "cad", [cad], first_epoch=4) if attacked else []
    config = made.programs[0].config
    return trained_lib.Evaluated(rows, chosen, config, 4, means if last3 else [])


def lines_of(table):
    """Markdown lines -> first cell: other cells."""
    found = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in table.splitlines() if line.startswith("|")]  # fmt: skip
    return {first: rest for first, *rest in found}


def test_an_evaluated_run_of_one_or_two_seeds_has_no_mean():
    table = report.evaluation_table(evaluated_of([0, 1]))
    assert "±" not in table and "interval |" not in table
    assert lines_of(table)["seed 1"] == ["80.0", "98.0", "2.0"]
    assert lines_of(table)["seed 1, mean of last 3 epochs"] == ["70.0", "94.0", ""]
    assert table.endswith("CAD: 2 seeds: no interval.")
    assert "seeds: no interval" not in report.evaluation_table(evaluated_of([0], attacked=False))


def test_an_evaluated_run_of_three_seeds_has_means_and_intervals():
    table = report.evaluation_table(evaluated_of([0, 1, 2]))
    found = lines_of(table)
    assert found["mean ± sd"] == ["80.0 ± 1.0", "96.0 ± 2.0", "2.0 ± 1.0"]
    assert found["95 % interval"] == ["77.5 to 82.5", "91.0 to 100.0", "-0.5 to 4.5"]
    assert found["mean of last 3 epochs ± sd"][1] == "93.3 ± 1.2"  # 92, 94, 94
    assert found["its 95 % interval"][2] == ""
    assert table.endswith("CAD: unresolved.")
    stored = json.loads(report.evaluation_json(evaluated_of([0, 1, 2])))
    assert stored["cad_resolved"] is False


def test_members_of_several_attacks_have_no_common_mean():
    attacked, clean = evaluated_of([0, 1]), evaluated_of([0, 1], attacked=False)
    shifted = [{**row, "member": row["member"] + 2} for row in clean.rows]
    both = trained_lib.Evaluated(
        attacked.rows + shifted, attacked.members + clean.members, attacked.config, 4, []
    )
    table = report.evaluation_table(both)
    assert "mean ± sd" not in table
    assert lines_of(table).keys() >= {"seed 0, square 2 %", "seed 0, none 0 %"}


# --- the paper ----------------------------------------------------------------------------------


def test_figures_of_the_paper():
    assert paper.attack("cifar10", "square", 0.02, "asr") == 96.6
    assert paper.attack("gtsrb", "warp", 0.1, "ba") == 96.6
    assert paper.attack("cifar10", "blend", 0.001, "cad") == 1.5
    assert paper.attack("cifar10", "square", 0.03, "asr") is None
    assert paper.attack("digits", "square", 0.02, "asr") is None
    assert len(paper.table("attacks")) == 30
    of = "cifar10", "square", 0.02
    assert paper.fine_pruning(*of, 0.3, "fine_tuned", "asr") == 2.2
    assert paper.fine_pruning(*of, 0.1, "pruned", "ba") == 80.1
    assert paper.fine_pruning(*of, 0.2, "fine_tuned", "asr") is None  # not legible
    assert paper.fine_pruning(*of, 0.4, "pruned", "ba") is None
    assert paper.fine_pruning("cifar10", "square", 0.1, 0.3, "pruned", "ba") is None


@pytest.mark.parametrize(("fields", "asr"), [
    (SQUARE, 96.6),
    ({**SQUARE, "quirks.a1_near_black_square": True}, 96.6),
    ({**SQUARE, "trigger.size": 5}, None),
    ({**SQUARE, "trigger.value": 1.0}, None),
    ({**SQUARE, "model.name": "wide_resnet"}, None),
    ({**SQUARE, "poison.target": 3}, None),
    ({**SQUARE, "poison.include_target": False}, None),
    ({**SQUARE, "poison.source": 3}, None),
    ({"trigger.name": "warp", "poison.rate": 0.1}, 93.8),
    ({"trigger.name": "warp", "poison.rate": 0.1, "quirks.a3_truncating_warp": True}, 93.8),
    ({"trigger.name": "warp", "poison.rate": 0.1, "trigger.k": 4}, None),
])  # fmt: skip
def test_only_the_same_attack_is_held_against_the_paper(fields, asr):
    (cell,) = results.cells_of(packed([fields]), [])
    assert cell.paper("asr") == asr


BLEND = {"trigger.name": "blend", "poison.rate": 0.02}
PICTURE = {**BLEND, "trigger.pattern_path": "picture.png"}


@pytest.mark.parametrize(("fields", "wanted"), [
    (SQUARE, True), (PICTURE, True), (BLEND, False),
    ({**SQUARE, "train.keep_last_batch": True}, True),  # as the authors' Keras code
    ({**SQUARE, "data.source": "elsewhere", "model.kernels": "plain"}, True),
    ({**SQUARE, "model.width": 2}, False), ({**SQUARE, "train.epochs": 24}, False),
    ({**SQUARE, "train.optimizer": "adam"}, False), ({**SQUARE, "model.num_experts": 8}, False),
    ({**SQUARE, "quirks.a6_two_layer_experts": True}, False),
    ({**SQUARE, "data.heldout": 0.1}, False), ({**SQUARE, "streams.init": 7}, False),
])  # fmt: skip
def test_like_for_like_means_the_papers_model_and_training(fields, wanted):
    (cell,) = results.cells_of(packed([{"model.width": 10, "train.epochs": 25, **fields}]), [])
    assert cell.like_for_like is wanted
    (section,) = report.sections([cell])
    assert any("not like for like" in note for note in section.notes) is not wanted


# --- tables -------------------------------------------------------------------------------------


def test_tables_hold_ours_the_papers_and_the_difference(gathered):
    (section,) = report.sections(gathered.cells)
    assert section.title == "cifar10, pmoe, width 2"
    assert section.scale == "width 2, 4 epochs, 3 seeds a cell (0 to 2)"
    assert any("compare order and shape" in note for note in section.notes)
    asr, ba, cad, more = section.tables
    assert asr.lines == [
        ["square", "2", "3", "96.0 ± 2.0", "91.0 to 100.0", "93.3 ± 1.2 [90.5, 96.2]", "96.6",
         "(-0.6)", "2.0 ± 1.0", "done"],
        ["square", "10", "0", "–", "", "", "99.1", "", "–", "not started"],
    ]  # fmt: skip
    assert ba.lines[:2] == [
        ["clean", "", "3", "82.0 ± 2.0", "77.0 to 87.0", "72.0 ± 2.0 [67.0, 77.0]", "", "",
         "done"],
        ["square", "2", "3", "80.0 ± 1.0", "77.5 to 82.5", "70.1 ± 1.2 [67.2, 73.0]", "83.2",
         "(-3.2)", "done"],
    ]  # fmt: skip
    # What is not finished is listed everywhere.
    assert cad.lines == [
        ["square", "2", "3", "2.0 ± 1.0", "-0.5 to 4.5", "1.9 ± 0.8 [-0.2, 4.0]", "1.8", "(+0.2)",
         "unresolved", "done"],
        ["square", "10", "0", "–", "", "", "2.3", "", "", "not started"],
    ]  # fmt: skip
    assert more.header[-2:] == ["robust accuracy [%]", "state"]
    assert more.lines == [
        ["square", "2", "3", "3.0 ± 1.0 [0.5, 5.5]", "done"],
        ["square", "10", "0", "–", "not started"],
    ]


def test_settings_have_sections_of_their_own(manifest, tmp_path):
    wide = packed([SQUARE], **{"model.width": 10, "train.epochs": 25, "train.momentum": 0.9,
                               "model.kernels": "plain", "num_seeds": 2})  # fmt: skip
    folders = [write_sweep(tmp_path / "a", manifest, []), write_sweep(tmp_path / "b", wide, [])]
    first, second = report.sections(results.gather(folders).cells)
    assert second.scale == (
        "width 10, 25 epochs, 2 seeds a cell (0, 1); unlike the defaults: train.momentum 0.9"
    )
    assert len(first.cells) == 3 and len(second.cells) == 1


def test_data_of_several_sources_have_sections_of_their_own():
    made = packed([{**SQUARE, "data.name": "npz", "data.source": f"/d/{x}.npz"} for x in "ab"])
    first, second = report.sections(results.cells_of(made, []))
    assert first.scale.endswith("; data from a.npz") and second.scale.endswith("data from b.npz")
    # Equal data from two places are one setting, unequal ones of the same name are not.
    names = [program.name for program in made.programs]
    (both,) = report.sections(results.cells_of(made, [], dict.fromkeys(names, "f00")))
    assert both.scale.endswith("; data from a.npz, b.npz")
    alike = packed([{**SQUARE, "data.source": f"/{x}/d.npz"} for x in "ab"])
    titles = [(s.title, s.scale) for s in report.sections(results.cells_of(alike, []))]
    assert len(set(titles)) == 2


def test_rows_that_would_look_the_same_are_told_apart():
    held = {f"streams.{name}": 0 for name in ("poison", "order")}
    made = packed([{"name": "clean"}, SQUARE, {**SQUARE, "name": "held", **held}, BLEND])
    asr, ba, *_ = report.sections(results.cells_of(made, []))[0].tables
    assert asr.header[:3] == ["cell", "trigger", "rate [%]"]
    # Seed 0 of the first member is the held one: the others tell.
    assert [line[:3] for line in asr.lines] == [
        ["", "square", "2"], ["held", "square (poison, order held at 0)", "2"],
        ["", "blend (procedural pattern)", "2"],
    ]  # fmt: skip
    assert ba.lines[0][:2] == ["clean", "clean"]
    source = {**SQUARE, "poison.source": 3}
    made = packed([{**source, "poison.carriers": rate} for rate in (0.1, 0.2)])
    (section,) = report.sections(results.cells_of(made, []))
    assert [line[0] for line in section.tables[0].lines] == [
        "square (source 3, carriers 10 %)", "square (source 3, carriers 20 %)",
    ]  # fmt: skip
    made = packed([SQUARE, {**SQUARE, "seed": 10}])
    (section,) = report.sections(results.cells_of(made, []))
    assert "seed=10" in section.tables[0].lines[1][0]
    assert section.scale == "width 2, 4 epochs, 3 seeds a cell"


def test_all_forms_are_written_and_agree(gathered, tmp_path):
    written = report.write(gathered, tmp_path / "out")
    texts = {path.name: path.read_text() for path in written}
    assert texts.keys() == {"report.md", "report.html", "tables.tex", "cells.csv", "rows.csv"}
    for name in ("report.md", "report.html"):
        assert "96.0 ± 2.0" in texts[name] and "not started" in texts[name]
        assert texts[name].count("width 2, 4 epochs, 3 seeds a cell (0 to 2)") >= 4  # a table each
    assert r"96.0 $\pm$ 2.0" in texts["tables.tex"] and r"rate [\%]" in texts["tables.tex"]
    assert texts["tables.tex"].count("compare order and shape, not values") == 4
    lines = list(csv.DictReader(io.StringIO(texts["cells.csv"])))
    (asr,) = [x for x in lines if (x["metric"], x["rate"]) == ("asr", "0.02")]
    assert (asr["values"], asr["mean"], asr["paper"]) == ("94.0 98.0 96.0", "96.0", "96.6")
    assert float(asr["ours_minus_paper"]) == pytest.approx(-0.6)
    assert asr["like_for_like"] == "False"
    (cad,) = [x for x in lines if x["metric"] == "cad"]
    assert cad["resolved"] == "False"
    (waiting,) = [x for x in lines if x["rate"] == "0.1"]
    assert (waiting["state"], waiting["metric"], waiting["n"]) == ("not started", "", "0")
    assert len(texts["rows.csv"].splitlines()) == 1 + len(gathered.rows)


def test_texts_in_latex():
    assert report._tex('a < b > c | "d" & 5 % of x_1 # {y} ~ ^ \\ $ – ±') == (
        r"a \textless{} b \textgreater{} c \textbar{} \char34{}d\char34{} \& 5 \% of x\_1 \# \{y\} "
        r"\textasciitilde{} \textasciicircum{} \textbackslash{} \$ -- $\pm$"
    )
    assert report._tex("ours - paper: (-0.6), -0.5 to -4.5") == (
        "ours $-$ paper: ($-$0.6), $-$0.5 to $-$4.5"
    )
    assert report._tex("cifar-10-batches-py, 2-4") == "cifar-10-batches-py, 2-4"


# --- directories --------------------------------------------------------------------------------


def write_run(folder, config, members, rows, **noted):
    """A run directory as `pmoe train` leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_lib.to_json(config))
    (folder / "members.json").write_text(json.dumps([m.to_json() for m in members]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "provenance.json").write_text(json.dumps(noted))
    return folder


@pytest.fixture
def two_runs(tmp_path, rows):
    """Makes a clean and an attacked run directory, as two `pmoe train` leave them."""

    def make(changes=(), clean_sha="f00", sha="f00"):
        made = packed([{"name": "clean"}, SQUARE])
        config, members = made.programs[0].config, made.programs[0].members
        for name, offset, digest in (("clean", 0, clean_sha), ("square", 3, sha)):
            own = [{**r, "member": r["member"] - offset} for r in rows
                   if r["member"] - offset in range(3) and r["metric"] != "false_trigger_rate"
                  ]  # fmt: skip
            fields = dict(changes) if name == "clean" else {}
            write_run(tmp_path / name, grid.with_fields(config, fields),
                      members[offset : offset + 3], own, dataset={"sha256": digest})  # fmt: skip
        return [tmp_path / "clean", tmp_path / "square"]

    return make


@pytest.mark.parametrize("changes", [
    {}, {"data.source": "elsewhere", "model.kernels": "plain", "data.max_bytes": 10**9},
])  # fmt: skip
def test_plain_runs_are_paired_among_each_other(two_runs, changes):
    gathered = results.gather(two_runs(changes))
    assert [cell.label for cell in gathered.cells] == ["clean", "square"]
    assert gathered.cells[1].figures["cad"].points == {0: 1, 1: 2, 2: 3}
    (section,) = report.sections(gathered.cells)
    assert any("pmoe evaluate" in note for note in section.notes)


def test_runs_of_other_data_are_no_baselines(two_runs):
    gathered = results.gather(two_runs(sha="0ff"))
    assert "cad" not in gathered.cells[1].figures
    _, section = report.sections(gathered.cells)
    asr, _, cad, _ = section.tables
    assert asr.lines[0][asr.header.index("false trigger rate [%]")] == "no clean model"
    assert cad.lines[0][cad.header.index("CAD is")] == "no clean model"
    assert any("none of the same setting, data and seed" in note for note in section.notes)


def test_a_renamed_run_keeps_its_figures(two_runs):
    _, square = two_runs()
    (cell,) = results.gather([square.rename(square.with_name("other"))]).cells
    assert (cell.label, cell.state) == ("other", "done")


def test_several_sweeps_do_not_overwrite_each_other(manifest, rows, tmp_path):
    folders = [write_sweep(tmp_path / name, manifest, rows) for name in "ab"]
    run = manifest.programs[0].name
    for folder in folders:
        (folder / "provenance.json").write_text(json.dumps({run: {"of": folder.name}}))
    gathered = results.gather(folders)
    assert {name: facts["of"] for name, facts in gathered.provenance.items()} == {
        f"a/{run}": "a", f"b/{run}": "b",
    }  # fmt: skip
    keys = [(r["run"], r["member"], r["epoch"], r["metric"]) for r in gathered.rows]
    assert len(set(keys)) == len(keys)
    (section,) = report.sections(gathered.cells)
    named = [line[0] for line in section.tables[0].lines]
    assert [name[:9] for name in named] == ["a/trigger", "a/trigger", "b/trigger", "b/trigger"]
    assert gathered.setups.keys() == {"a", "b"}


def test_a_directory_given_twice_is_refused(manifest, tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "a", manifest, [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PmoeError, match="is given twice"):
        results.gather([folder, "a"])
    other = write_sweep(tmp_path / "b" / "a", manifest, [])
    with pytest.raises(PmoeError, match="two directories are called a "):
        results.gather([folder, other])


def test_members_of_one_seed_are_cells_of_their_own(two_runs, tmp_path):
    """They differ in a stream that is held, and none may stand for the other."""
    _, square = two_runs()
    config, members = (run := RunDirectory(square)).config(), run.members()
    held = dataclasses.replace(members[0], streams={**members[0].streams, "init": 7})
    several = [*members, held]
    rows = []
    for index, member in enumerate(several):
        last = config.train.epochs
        rows += rows_of("x", index, member.seed, "ba", [70.0 + index], first_epoch=last)
    write_run(tmp_path / "held", config, several, rows)
    cells = results.gather([tmp_path / "held"]).cells
    assert [cell.seeds for cell in cells] == [(0, 1, 2), (0,)]
    assert list(cells[0].figures["ba"].points.values()) == [70.0, 71.0, 72.0]
    assert list(cells[1].figures["ba"].points.values()) == [73.0]


def test_defended_runs_have_a_table_beside_the_papers(two_runs, tmp_path):
    _, square = two_runs()
    config, members = (run := RunDirectory(square)).config(), run.members()
    out = tmp_path / "defended"
    tuned = grid.with_fields(config, {"train.epochs": 2, "train.batch_size": 64})
    noted = {"defence": {"of": "square", "pruned": [0.3] * 3, "tuning": {"data": "clean"}}}
    rows, before = [], []
    for seed in range(3):
        for metric, values in (("ba", [60, 70, 72 + seed]), ("asr", [95, 50, 2 * seed])):
            rows += rows_of("x", seed, seed, metric, values[:1], "pruned", 0)
            rows += rows_of("x", seed, seed, metric, values[1:], "fine_tuned", 1)
            before += rows_of("square", seed, seed, metric, [80 + seed], first_epoch=4)
    write_run(out / "prune_30_then_clean_lr0.1", tuned, members, rows, **noted)
    (out / "before.json").write_text(json.dumps(before))
    gathered = results.gather([square, out / "prune_30_then_clean_lr0.1"])
    assert [cell.label for cell in gathered.cells] == ["square"]
    *_, section = report.sections(gathered.cells, gathered.defended)
    assert section.title == "Fine-Pruning of square: cifar10, pmoe"
    assert section.scale == "width 2, 3 seeds, 2 epochs of fine-tuning"
    assert section.tables[0].lines == [
        ["prune_30_then_clean_lr0.1", "square", "2", "30", "3",
         "81.0 ± 1.0 [78.5, 83.5]", "60.0 ± 0.0 [60.0, 60.0]", "73.0 ± 1.0 [70.5, 75.5]",
         "85.2 / 72.2 / –",
         "81.0 ± 1.0 [78.5, 83.5]", "95.0 ± 0.0 [95.0, 95.0]", "2.0 ± 2.0 [0.0, 7.0]",
         "97.4 / 95.3 / 2.2", "done"],
    ]  # fmt: skip
    # Other layers than the paper's are not held against it, nor other ways of fine-tuning.
    for change, known in (
        ({"layers": ["stem"]}, (80, None, None)),
        ({"layers": ["experts/conv", "experts/conv2"]}, (80, None, None)),
        ({"layers": ["experts/conv2"]}, (80, None, None)),  # There is none without quirk A6.
        ({"config": {"prune": {"output": "raw"}}}, (80, None, None)),
        ({"config": {"prune": {"data": "heldout"}}}, (80, None, None)),
        ({"config": {"tune": {"momentum": 0.9}}}, (80, 60, None)),
        ({"tuning": {"data": "heldout"}}, (80, 60, None)),
        ({"tuning": {"data": "clean", "fraction": 0.01}}, (80, 60, None)),
    ):
        other = {"defence": {**noted["defence"], **change}}
        write_run(tmp_path / "other" / "prune_30", tuned, members, rows, **other)
        (entry,) = results.gather([tmp_path / "other" / "prune_30"]).defended
        found = [entry.paper(stage, "ba") for stage in ("before", "pruned", "fine_tuned")]
        assert [value is None for value in found[:2]] == [value is None for value in known[:2]]
        assert entry.paper("fine_tuned", "asr") is None
        shutil.rmtree(tmp_path / "other")
    # With quirk A6 an expert has two convolutions, of which the last is the paper's.
    two_layers = grid.with_fields(tuned, {"quirks.a6_two_layer_experts": True})
    for layer, known in (("experts/conv", False), ("experts/conv2", True)):
        other = {"defence": {**noted["defence"], "layers": [layer]}}
        write_run(tmp_path / "other" / "prune_30", two_layers, members, rows, **other)
        (entry,) = results.gather([tmp_path / "other" / "prune_30"]).defended
        assert ("pruned" in entry.papers) is known
        shutil.rmtree(tmp_path / "other")
    # The defence's folder stands for what is in it; what is not tuned to the end says so.
    (out / "defence.json").write_text("{}")
    unfinished = [row for row in rows if row["epoch"] < 2]
    write_run(out / "prune_10_then_clean_lr0.1", tuned, members, unfinished, **noted)
    write_run(out / "prune_10", config, members, [r for r in rows if r["epoch"] == 0],
              defence={"of": "square", "pruned": [0.1] * 3, "tuning": None})  # fmt: skip
    made = report.report_markdown(report.sections([], results.gather([out]).defended))
    states = {first: rest[-1] for first, rest in lines_of(made).items() if "prune" in first}
    assert states == {
        "defended/prune_10": "done", "defended/prune_10_then_clean_lr0.1": "unfinished: epoch 1 of "
        "2", "defended/prune_30_then_clean_lr0.1": "done",
    }  # fmt: skip


def test_the_command_prints_and_writes(tmp_path, manifest, rows, capsys):
    folder = write_sweep(tmp_path / "sweep", manifest, rows)
    assert cli.main(["report", str(folder)]) == 0
    assert "### Attack success" in capsys.readouterr().out
    assert cli.main(["report", str(folder), f"--output={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_wrong_directories_are_named(tmp_path, manifest, rows, capsys):
    with pytest.raises(PmoeError, match="neither a sweep nor a run"):
        results.gather([tmp_path])
    assert cli.main(["report"]) == 2
    del rows[0]["value"]
    with pytest.raises(PmoeError, match="common schema"):
        results.gather([write_sweep(tmp_path / "sweep", manifest, rows)])


@pytest.mark.parametrize(("field", "value"), [
    ("value", "high"), ("value", None), ("value", float("nan")), ("member", "0"), ("run", ["r"]),
    ("stage", 3), ("metric", {}), ("seed", 0.5),
])  # fmt: skip
def test_rows_of_wrong_values_are_refused(tmp_path, manifest, rows, field, value):
    rows[0][field] = value
    said = "line 1 of .*is damaged" if isinstance(value, list | dict) else f"has {field}="
    with pytest.raises(PmoeError, match=said):
        results.gather([write_sweep(tmp_path, manifest, rows)])


def test_fields_that_rows_should_not_have_are_left_out(rows):
    text = report.rows_csv([{**row, "layers": "all"} for row in rows])
    assert "layers" not in text and len(text.splitlines()) == 1 + len(rows)


def test_a_manifest_whose_grid_is_cut_is_refused(tmp_path, manifest):
    stored = json.loads(manifest.to_json())
    stored["grid"].pop()
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    with pytest.raises(PmoeError, match="differ in number"):
        results.gather([tmp_path])


def test_pictures_that_cannot_be_read_are_named(tmp_path, manifest):
    folder = write_sweep(tmp_path / "s", manifest, [])
    (folder / "figures" / "folder.png").mkdir(parents=True)
    with pytest.raises(PmoeError, match=r"folder\.png cannot be read"):
        report.write(results.gather([folder]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- variance -----------------------------------------------------------------------------------


@pytest.fixture
def variance():
    root = pathlib.Path(__file__).resolve().parents[1]
    return runpy.run_path(str(root / "experiments" / "variance.py"))


@pytest.fixture
def varied(variance):
    """The packed grid, and rows of its first two cells."""
    made = grid.pack(variance["get_config"]("smoke"), variance["get_grid"]("smoke"), lambda _: 100)
    # BA of 78, 80, 82 (variance 4) where all varies; of 79, 80, 81 (1) by initialisation alone.
    rows = []
    for seed, (whole, init) in enumerate([(78, 79), (80, 80), (82, 81)]):
        for label, value in (("everything", whole), ("init", init)):
            ref = next(cell for cell in made.cells if cell.label == label).members[seed]
            run = made.programs[ref.program].name
            rows += rows_of(run, ref.member, seed, "ba", [value], first_epoch=3)
    return made, rows


def test_shares_of_variance_by_hand(variance, varied):
    made, rows = varied
    assert [cell.label for cell in made.cells] == [
        "everything", "init", "poison", "trigger", "order",
    ]  # fmt: skip
    for cell in made.cells[1:]:
        members = [made.member(ref) for ref in cell.members]
        differing = {s for s in members[0].streams if len({m.streams[s] for m in members}) > 1}
        assert differing == {cell.label}
    lines = variance["shares"](results.cells_of(made, rows), "ba")
    assert lines[0][:3] == ["everything", "3", "2.00"]
    # chi-square of 2 degrees: 7.3778 and 0.05064; F of 2 and 2: 39 and 1/39
    assert lines[1] == ["init", "3", "1.00", "0.52 to 6.28", "25 %", "1 % to 975 %"]
    assert lines[2][:3] == ["poison", "0", "–"]


def test_the_variance_command(variance, varied, manifest, tmp_path, capsys):
    variance["main"]([str(write_sweep(tmp_path / "v", *varied))])
    said = capsys.readouterr().out
    assert said.count("digits, pmoe, width 1; width 1, 3 epochs, 3 seeds a cell (0 to 2)") == 2
    assert "1 % to 975 %" in said and "approximate" in said
    for words in ([], ["a", "b"]):
        with pytest.raises(PmoeError, match="usage"):
            variance["main"](words)
    with pytest.raises(PmoeError, match="no sweep of one setting"):
        variance["main"]([str(write_sweep(tmp_path / "other", manifest, []))])


# --- the page -----------------------------------------------------------------------------------


LONG = "a_very_long_name_of_a_cell_that_has_no_space_to_break_at_" * 3


@pytest.fixture
def page(tmp_path, manifest, rows):
    """A sweep of a hostile name, with a picture."""
    config = grid.with_fields(manifest.config, {"data.source": "<script>alert(1)</script>"})
    cells = [{"name": "clean"}, {**SQUARE, "name": LONG}, {**SQUARE, "poison.rate": 0.1}]
    folder = write_sweep(tmp_path / "s", grid.pack(config, cells, lambda shared: 100), rows + [
        {**row, "member": row["member"] + 3, "rate": 0.1} for row in rows if row["member"] > 2
    ])  # fmt: skip
    (folder / "figures").mkdir()
    root = pathlib.Path(__file__).resolve().parents[1]
    shutil.copy(root / "docs/figures/triggers.png", folder / "figures" / "the_triggers.png")
    report.write(results.gather([folder]), tmp_path / "out")
    return tmp_path / "out" / "report.html"


def test_the_page_needs_nothing_else_and_escapes_texts(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "url(" not in text and "@import" not in text
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_the_config_that_was_given_its_grid_and_packing(page):
    (shown,) = re.findall(r"<summary>Config: s</summary><pre>(.*?)</pre>", page.read_text(), re.S)
    setup = json.loads(html.unescape(shown))
    assert setup["config"]["trigger"]["name"] == "none"  # which the packing's program is not
    assert setup["grid"][2] == {**SQUARE, "poison.rate": 0.1}
    ((_, members),) = setup["programs"].items()
    assert members[:2] == ["clean: seed 0", "clean: seed 1"] and len(members) == 9


def test_seeds_have_dashes_of_their_own_and_names(page):
    first = re.search(r'aria-label="clean: BA.*?</figure>', page.read_text(), re.S)[0]
    lines = re.findall(r'<polyline class="([^"]*)"[^>]*><title>([^<]*)</title>', first)
    assert lines == [
        ("series c1 thin s0", "BA, seed 0"), ("series c1 thin s1", "BA, seed 1"),
        ("series c1 thin s2", "BA, seed 2"), ("series c1 ", "BA, mean"),
    ]  # fmt: skip
    assert "> seed 2</span>" in first


def test_a_chart_places_points_by_hand():
    line = report_html.Series([(1.0, 0.0), (3.0, 100.0)], 0)
    drawn = report_html.chart([line], {1.0: "1", 3.0: "3"}, "epoch", "%", "A <chart>")
    # x from 36 + 6 to 340 - 10 - 6, y from 220 - 36 to 20.
    assert 'points="42.0,184.0 324.0,20.0"' in drawn
    assert "A &lt;chart&gt;" in drawn


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

#: Measures the page; a phone's width is that of a frame, as windows have a least one.
PROBE = """<script>
  const page = document.documentElement, wide = page.scrollWidth > page.clientWidth;
  const drawn = [...document.querySelectorAll("figure svg[role=img], figure img")]
    .filter(e => e.getBoundingClientRect().height > 50).length;
  const loaded = [...document.images].every(i => i.naturalWidth > 0);
  const named = [...document.querySelectorAll("td:first-child")]
    .map(e => e.getBoundingClientRect().width);
  parent.postMessage({wide, drawn, loaded, named: Math.max(...named), width: innerWidth,
    tables: document.querySelectorAll("table").length,
    cells: document.querySelectorAll("td").length}, "*");
</script></body>"""
FRAME = """<!DOCTYPE html><link rel="icon" href="data:,"><body><script>
  onmessage = event => { document.body.dataset.probe = JSON.stringify(event.data); };
</script><iframe src="probe.html" width="360" height="800" style="border: 0"></iframe></body>"""


def browse(path, profile):
    """The page's DOM after its scripts ran, and what the browser logged."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={profile}",
         "--window-size=500,900", "--enable-logging=stderr", "--virtual-time-budget=2000",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
def test_the_page_in_headless_chromium(page, tmp_path):
    """Tables and figures are there, nothing sticks out on a phone, the console is clean."""
    (tmp_path / "probe.html").write_text(page.read_text().replace("</body>", PROBE))
    (tmp_path / "frame.html").write_text(FRAME)
    shown, logged = browse(tmp_path / "frame.html", tmp_path / "profile")
    seen = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', shown)[1]))
    # ASR and CAD by rate, three cells by epoch, one picture.
    assert (seen["tables"], seen["drawn"], seen["loaded"]) == (4, 6, True)
    assert seen["cells"] == 2 * 11 + 3 * 10 + 2 * 11 + 2 * 6
    assert seen["width"] == 360 and not seen["wide"], seen
    assert seen["named"] <= 0.45 * 360, seen  # the names leave room for figures
    assert "CONSOLE" not in logged, logged


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
def test_what_a_console_says_would_be_seen(tmp_path):
    (tmp_path / "loud.html").write_text("<script>console.error('aloud')</script>")
    logged = browse(tmp_path / "loud.html", tmp_path / "profile")[1]
    assert "CONSOLE" in logged and "aloud" in logged


def test_a_narrow_column_is_still_markdown():
    # A delimiter cell needs a hyphen: with ":" alone GitHub shows the whole table as text.
    assert report.markdown(["a", "n"], [["x", "3"]]).splitlines()[1] == "| -- | -: |"


def test_a_defence_without_models_is_told_by_its_table(tmp_path):
    """Detectors leave none. A folder whose table is missing is not finished."""
    folder = tmp_path / "strip"
    folder.mkdir()
    (folder / "defence.json").write_text("{}")
    with pytest.raises(PmoeError, match="strip holds a defence that is not finished"):
        results.gather([folder])
    (folder / "table.md").write_text(
        "square: digits, 2 seeds\n500 images\n\n| model | FAR |\n| --- | ---: |\n"
        "| seed 0 | 97.8 |\n| a line cut |\n"
    )
    paths = report.write(results.gather([folder]), tmp_path / "report")
    markdown, page = paths[0].read_text(), paths[1].read_text()
    assert "## Defence: strip" in markdown and "square: digits, 2 seeds" in markdown
    assert "| seed 0     | 97.8 |" in markdown and "500 images" in markdown
    assert "<td>97.8</td>" in page and "<td>a line cut</td><td></td>" in page
    (folder / "table.md.sha256").write_text(f"{'0' * 64}  table.md\n")
    with pytest.raises(PmoeError, match=r"table\.md"):
        results.gather([folder])


def test_figures_in_folders_are_named_by_them(tmp_path, two_runs):
    runs = two_runs()
    picture = runs[0] / "figures" / "gtsrb" / "figure4.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"PNG")
    paths = report.write(results.gather(runs), tmp_path / "report")
    assert "<figcaption>gtsrb, figure4</figcaption>" in paths[1].read_text()


def test_a_run_that_was_moved_into_a_sweep_counts(tmp_path, manifest, rows):
    """Its rows have the name that it was trained under."""
    folder = write_sweep(tmp_path / "sweep", manifest, [])
    program = manifest.programs[0]
    own = [{**row, "run": "elsewhere"} for row in rows if row["run"] == program.name]
    write_run(folder / "runs" / program.name, program.config, program.members, own)
    found = results.gather([folder])
    assert {row["run"] for row in found.rows} == {program.name}
    assert found.cells[0].figures["ba"].points
