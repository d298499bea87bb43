"""Reports: statistics by hand, the paper's figures, tables, and the page in a real browser."""

import csv
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
from pmoe_jax.errors import PmoeError
from pmoe_jax.metrics import Summary
from pmoe_jax.results import Figure

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
    # Means over three epochs: 92, 94, 94.
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


@pytest.mark.parametrize(("interval", "wanted"), [
    ((0.1, 2.0), "resolved"), ((-2.0, -0.1), "resolved"), ((-0.1, 2.0), "unresolved"),
    ((0.0, 2.0), "unresolved"), (None, "2 seeds: no interval"),
])  # fmt: skip
def test_verdicts(interval, wanted):
    summary = Summary(2 if interval is None else 3, 1.0, 1.0, interval)
    assert report.verdict(Figure({}, summary, None)) == wanted


def test_one_or_two_seeds_show_their_points_and_three_their_mean():
    def figure(*values):
        return Figure(dict(enumerate(values)), results._summary(values), None)

    assert report.points_or_mean(figure(90.04)) == "90.0"
    assert report.points_or_mean(figure(90, 95)) == "90.0, 95.0"
    assert report.points_or_mean(figure(94, 98, 96)) == "96.0 ± 2.0"
    assert report.points_or_mean(None) == "–"
    assert report.difference(figure(90, 95), 92.5) == "-2.5, +2.5"
    assert report.difference(figure(94, 98, 96), 96.6) == "-0.6"
    assert report.difference(figure(94), None) == ""


def test_diverged_members_are_left_out_and_counted(manifest, rows, tmp_path):
    for row in rows:
        if row["member"] == 1:  # the clean one of seed 1: no CAD of seed 1
            row["stage"] = "diverged"
    clean, square, _ = results.gather([write_sweep(tmp_path, manifest, rows)]).cells
    assert clean.figures["ba"].points == {0: 80, 2: 84}
    assert clean.state == "done, 1 diverged"
    assert square.figures["cad"].points == {0: 1, 2: 3}
    assert square.figures["ba"].points == {0: 79, 1: 80, 2: 81}


def test_unfinished_members_do_not_count(manifest, rows, tmp_path):
    ends = [r for r in rows if r["epoch"] < 4 or r["member"] in (0, 1, 2, 3)]
    square = results.gather([write_sweep(tmp_path / "a", manifest, ends)]).cells[1]
    assert square.state == "unfinished: 1 of 3 seeds"
    assert square.figures["asr"].points == {0: 94}
    none = [r for r in rows if r["epoch"] < 4]
    square = results.gather([write_sweep(tmp_path / "b", manifest, none)]).cells[1]
    assert square.state == "unfinished: epoch 3 of 4"
    assert square.figures["asr"].summary is None


# --- the paper ----------------------------------------------------------------------------------


def test_figures_of_the_paper():
    assert paper.attack("cifar10", "square", 0.02, "asr") == 96.6
    assert paper.attack("gtsrb", "warp", 0.1, "ba") == 96.6
    assert paper.attack("cifar10", "blend", 0.001, "cad") == 1.5
    assert paper.attack("cifar10", "square", 0.03, "asr") is None
    assert paper.attack("digits", "square", 0.02, "asr") is None
    assert len(paper.table("attacks")) == 30
    assert paper.table("fine_pruning")[-1]["asr"] == "2.2"


@pytest.mark.parametrize(("fields", "asr"), [
    (SQUARE, 96.6),
    ({**SQUARE, "quirks.a1_near_black_square": True}, 96.6),
    ({**SQUARE, "trigger.size": 5}, None),
    ({**SQUARE, "trigger.value": 1.0}, None),
    ({**SQUARE, "model.name": "wide_resnet"}, None),
    ({"trigger.name": "warp", "poison.rate": 0.1}, 93.8),
    ({"trigger.name": "warp", "poison.rate": 0.1, "quirks.a3_truncating_warp": True}, 93.8),
    ({"trigger.name": "warp", "poison.rate": 0.1, "trigger.k": 4}, None),
])  # fmt: skip
def test_only_the_same_attack_is_held_against_the_paper(fields, asr):
    (cell,) = results.cells_of(packed([fields]), [])
    assert cell.paper("asr") == asr


# --- tables -------------------------------------------------------------------------------------


def test_tables_hold_ours_the_papers_and_the_difference(gathered):
    (section,) = report.sections(gathered.cells)
    assert section.title == "cifar10, pmoe, width 2"
    assert section.scale == "width 2, 4 epochs, 3 seeds a cell"
    assert any("compare order and shape" in note for note in section.notes)
    asr, ba, cad = section.tables
    assert asr.lines == [
        ["square", "2", "3", "96.0 ± 2.0", "91.0 to 101.0", "93.3 ± 1.2", "96.6", "-0.6",
         "2.0 ± 1.0", "done"],
        ["square", "10", "0", "–", "", "", "99.1", "", "–", "not started"],
    ]  # fmt: skip
    assert ba.lines[:2] == [
        ["clean", "", "3", "82.0 ± 2.0", "77.0 to 87.0", "72.0 ± 2.0", "", "", "done"],
        ["square", "2", "3", "80.0 ± 1.0", "77.5 to 82.5", "70.1 ± 1.2", "83.2", "-3.2", "done"],
    ]
    assert cad.lines == [
        ["square", "2", "3", "2.0 ± 1.0", "-0.5 to 4.5", "unresolved", "1.9 ± 0.8", "1.8", "+0.2",
         "done"],
    ]  # fmt: skip


def test_settings_have_sections_of_their_own(manifest, tmp_path):
    wide = packed([SQUARE], **{"model.width": 10, "train.epochs": 25, "train.momentum": 0.9})
    folders = [write_sweep(tmp_path / "a", manifest, []), write_sweep(tmp_path / "b", wide, [])]
    first, second = report.sections(results.gather(folders).cells)
    assert second.scale == (
        "width 10, 25 epochs, 3 seeds a cell; unlike the paper: train.momentum 0.9"
    )
    assert not any("compare order" in note for note in second.notes)
    assert len(first.cells) == 3 and len(second.cells) == 1


def test_all_forms_are_written_and_agree(gathered, tmp_path):
    written = report.write(gathered, tmp_path / "out")
    texts = {path.name: path.read_text() for path in written}
    assert texts.keys() == {"report.md", "report.html", "tables.tex", "cells.csv", "rows.csv"}
    for name in ("report.md", "report.html"):
        assert "96.0 ± 2.0" in texts[name] and "not started" in texts[name]
    assert r"96.0 $\pm$ 2.0" in texts["tables.tex"] and r"rate [\%]" in texts["tables.tex"]
    lines = list(csv.DictReader(io.StringIO(texts["cells.csv"])))
    (asr,) = [x for x in lines if (x["metric"], x["rate"]) == ("asr", "0.02")]
    assert (asr["values"], asr["mean"], asr["paper"]) == ("94.0 98.0 96.0", "96.0", "96.6")
    assert float(asr["ours_minus_paper"]) == pytest.approx(-0.6)
    (cad,) = [x for x in lines if x["metric"] == "cad"]
    assert cad["resolved"] == "False"
    assert len(texts["rows.csv"].splitlines()) == 1 + len(gathered.rows)


def test_plain_runs_are_paired_among_each_other(tmp_path, rows):
    """A clean and an attacked run directory, as two `pmoe train` leave them."""
    made = packed([{"name": "clean"}, SQUARE])
    config, members = made.programs[0].config, made.programs[0].members
    for name, chosen, offset in (("clean", members[:3], 0), ("square", members[3:], 3)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config_lib.to_json(config))
        (folder / "members.json").write_text(json.dumps([m.to_json() for m in chosen]))
        own = [{**r, "run": name, "member": r["member"] - offset} for r in rows
               if r["member"] - offset in range(3)]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    gathered = results.gather([tmp_path / "clean", tmp_path / "square"])
    assert [cell.label for cell in gathered.cells] == ["clean", "square"]
    assert gathered.cells[1].figures["cad"].points == {0: 1, 1: 2, 2: 3}


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


def test_shares_of_variance_by_hand():
    root = pathlib.Path(__file__).resolve().parents[1]
    variance = runpy.run_path(str(root / "experiments" / "variance.py"))
    config, cells = variance["get_config"]("smoke"), variance["get_grid"]("smoke")
    made = grid.pack(config, cells, lambda shared: 100)
    assert [cell.label for cell in made.cells] == [
        "everything", "init", "poison", "trigger", "order",
    ]  # fmt: skip
    for cell in made.cells[1:]:
        members = [made.member(ref) for ref in cell.members]
        varied = {s for s in members[0].streams if len({m.streams[s] for m in members}) > 1}
        assert varied == {cell.label}
    # BA of 78, 80, 82 (variance 4) where all varies; of 79, 80, 81 (1) by initialisation alone.
    rows = []
    for seed, (whole, init) in enumerate([(78, 79), (80, 80), (82, 81)]):
        for label, value in (("everything", whole), ("init", init)):
            ref = next(cell for cell in made.cells if cell.label == label).members[seed]
            run = made.programs[ref.program].name
            rows += rows_of(run, ref.member, seed, "ba", [value], first_epoch=3)
    lines = variance["shares"](results.cells_of(made, rows), "ba")
    assert lines[0][:3] == ["everything", "3", "2.00"]
    # chi-square of 2 degrees: 7.3778 and 0.05064; F of 2 and 2: 39 and 1/39
    assert lines[1] == ["init", "3", "1.00", "0.52 to 6.28", "25 %", "1 % to 975 %"]
    assert lines[2][:3] == ["poison", "0", "–"]


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path, manifest, rows):
    """A sweep of a hostile name, with a picture."""
    config = grid.with_fields(manifest.config, {"data.source": "<script>alert(1)</script>"})
    cells = [{"name": "clean"}, SQUARE, {**SQUARE, "poison.rate": 0.1}]
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


def test_a_chart_places_points_by_hand():
    line = report_html.Series([(1.0, 0.0), (3.0, 100.0)], 0)
    drawn = report_html.chart([line], {1.0: "1", 3.0: "3"}, "epoch", "%", "A <chart>")
    # x from 36 + 6 to 340 - 10 - 6, y from 220 - 36 to 20.
    assert 'points="42.0,184.0 324.0,20.0"' in drawn
    assert "A &lt;chart&gt;" in drawn


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
def test_the_page_in_headless_chromium(page, tmp_path):
    """Tables and figures are there, nothing sticks out on a phone, the console is clean."""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", """<script>
      const wide = document.documentElement.scrollWidth > innerWidth;
      const drawn = [...document.querySelectorAll("figure svg[role=img], figure img")]
        .filter(e => e.getBoundingClientRect().height > 50).length;
      const loaded = [...document.images].every(i => i.naturalWidth > 0);
      document.body.dataset.probe = JSON.stringify({wide, drawn, loaded,
        tables: document.querySelectorAll("table").length,
        cells: document.querySelectorAll("td").length, width: innerWidth});
    </script></body>"""))  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=500,900", "--enable-logging=stderr", "--virtual-time-budget=2000",
         "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', done.stdout)[1]))
    # ASR and CAD by rate, three cells by epoch, one picture.
    assert (seen["tables"], seen["drawn"], seen["loaded"]) == (3, 6, True)
    assert seen["cells"] == 2 * 10 + 3 * 9 + 2 * 10
    assert not seen["wide"], seen
    assert "CONSOLE" not in done.stderr, done.stderr


def test_a_narrow_column_is_still_markdown():
    # A delimiter cell needs a hyphen: with ":" alone GitHub shows the whole table as text.
    assert report.markdown(["a", "n"], [["x", "3"]]).splitlines()[1] == "| -- | -: |"
