"""The entries of experiments/: their grids at every scale."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pandas
import pytest
from locations import ROOT

from pmoe_jax import cli, defend_config, grid, results, triggers
from pmoe_jax import data as data_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import write_with_sum
from pmoe_jax.paper import attack, setting

GRIDS = ("baselines", "table1", "table2", "quirks", "claims")
ENTRIES = ("baselines", "table1", "table3", "table2", "quirks", "claims", "figures", "report")


def packed(names, preset):
    """The grids in one sweep, one after another, as the commands add them."""
    manifest = None
    for name in names:
        entry = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))
        config = entry["get_config"](preset)
        manifest = grid.pack(config, entry["get_grid"](preset), lambda shared: 3, onto=manifest)
    return manifest


@pytest.mark.parametrize("preset", ["paper", "cpu", "smoke"])
def test_all_grids_share_one_sweep(preset):
    manifest = packed(GRIDS, preset)
    labels = [cell.label for cell in manifest.cells]
    assert len(set(labels)) == len(labels)
    # Whatever is attacked is paired with a clean model, and those of the baselines suffice.
    clean = {ref for cell in manifest.cells if "clean" in cell.label for ref in cell.members}
    for cell in manifest.cells:
        if "clean" not in cell.label:
            assert set(cell.baselines) <= clean and None not in cell.baselines


def test_tables_1_and_2_have_every_cell_of_the_paper_at_its_scale():
    """Five rates of three triggers, of which the warp comes in two kinds, on two data sets."""
    manifest = packed(("baselines", "table1", "table2"), "paper")
    found = set()
    for cell in manifest.cells:
        member = manifest.member(cell.members[0])
        config = manifest.programs[cell.members[0].program].config
        assert (config.model.width, config.train.epochs) == (10, 25)
        assert len(cell.members) == (5 if member.rate else 10)
        name = member.trigger["name"]
        if attack(config.data.name, name, member.rate, "asr") is not None:
            sampling = member.trigger.get("sampling")
            found.add((config.data.name, name, sampling, member.rate))
    assert len(found) == 2 * 5 * (3 + 1)


def test_the_other_rates_have_a_seed_and_failing_squares_three():
    """Claims of the paper hang on the square at 0.1 %; its seeds share a program, as a cell is
    analysed by that."""
    manifest = packed(("baselines", "table1", "table2"), "cpu")
    done = {cell.label for cell in manifest.cells}
    for name in ("table1", "table2"):
        entry = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))
        config, cells = entry["get_config"]("cpu_rest"), entry["get_grid"]("cpu_rest")
        manifest = grid.pack(config, cells, lambda shared: 3, onto=manifest)
    added = {cell.label: cell for cell in manifest.cells if cell.label not in done}
    assert len(added) == 2 * 2 * (3 + 1)
    for label, cell in added.items():
        failing = label.endswith("square, 0.1 %")
        assert len(cell.members) == (3 if failing else 1)
        assert len({ref.program for ref in cell.members}) == 1


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="'huge' is unknown; choose one of paper, cpu"):
        setting.config("huge")


def reproduce(*words):
    script = ROOT / "experiments" / "reproduce.py"
    return subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=3000
    )


def test_entries_as_commands(tmp_path):
    """Programs at once are jobs; the preset that adds cells to tables has no other entries."""
    at = f"--workdir={tmp_path}"
    done = reproduce(at, "--preset=cpu", "--jobs=2", "--dry_run", "table1")
    assert done.stderr.strip().endswith("--max_members=3 --launcher=local --max_jobs=2")
    assert "--launcher" not in reproduce(at, "--preset=cpu", "--dry_run", "table1").stderr
    done = reproduce(at, "--preset=cpu_rest", "--dry_run")
    assert [line.split("]")[0] for line in done.stderr.splitlines()[:3]] == [
        "[table1", "[table2", "[claims"
    ]  # fmt: skip
    done = reproduce(at, "--preset=cpu_rest", "table3")
    assert (
        done.returncode == 2
        and "has the entries table1, table2, claims, report only" in done.stderr
    )


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 3)])
def test_signals_are_left_to_the_command(sent, code, tmp_path):
    """It saves its work: SIGTERM is passed on, and a terminal's Ctrl-C reaches it by itself."""
    module = runpy.run_path(str(ROOT / "experiments" / "reproduce.py"))
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"up, end = (pathlib.Path({str(tmp_path)!r}) / name for name in ('up', 'end'))\n"
        "up.touch()\n"
        "last = time.monotonic() + 60\n"
        "while not end.exists() and time.monotonic() < last: time.sleep(0.01)\n"
        "sys.exit(3)\n"
    )
    module["wait_for"].__globals__["run"] = lambda command: [sys.executable, "-c", child]

    def send():
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), sent)
        if sent == signal.SIGINT:
            time.sleep(0.5)
            (tmp_path / "end").touch()

    sender = threading.Thread(target=send)
    sender.start()
    before = signal.getsignal(sent)
    assert module["wait_for"](["train"]) == code
    assert signal.getsignal(sent) == before
    sender.join()


def test_figures_of_preset_paper_are_of_the_seeds_that_are_defended(tmp_path):
    done = reproduce(
        f"--workdir={tmp_path}/new", "--preset=paper", "--dry_run", "table3", "figures"
    )
    defences = [line for line in done.stderr.splitlines() if " defend " in line]
    assert len(defences) > 10 and all("--members=0,1,2" in line for line in defences)
    defended = [line for line in done.stderr.splitlines() if "--defended=" in line]
    assert len(defended) == 1 and "--members=0,1,2" in defended[0]


def test_defences_need_the_trained_models(tmp_path):
    done = reproduce(f"--workdir={tmp_path}", "table3")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        f"reproduce.py: table3: {tmp_path}/grid has no cell 'digits, square, 10 %' yet; run the "
        "entries baselines and table1 first"
    )


def test_only_cells_that_are_trained_to_their_end_are_defended(tmp_path):
    (tmp_path / "grid").mkdir()
    for name in ("sweep.json", "rows.jsonl", "provenance.json"):
        content = (ROOT / "experiments" / "results" / "cpu_grid" / name).read_bytes()
        (tmp_path / "grid" / name).write_bytes(content)
    module = runpy.run_path(str(ROOT / "experiments" / "reproduce.py"))
    options = module["Options"]("cpu", tmp_path, "", "")
    assert module["trained"]("CIFAR-10, square, 2 %", options).endswith("/004_cifar10_pmoe_w2")
    assert module["alone"]("CIFAR-10, square, 2 %", options) == []
    half = [line for line in (tmp_path / "grid" / "rows.jsonl").read_text().splitlines()
            if "004_cifar10" not in line or '"epoch": 10' not in line]  # fmt: skip
    (tmp_path / "grid" / "rows.jsonl").write_text("\n".join(half) + "\n")
    with pytest.raises(
        PmoeError, match=r"'CIFAR-10, square, 2 %' in .* is not trained yet \(.*9 of 10"
    ):
        module["trained"]("CIFAR-10, square, 2 %", options)


def test_a_cell_of_a_program_with_others_is_analysed_alone(tmp_path):
    fields = [
        {"name": f"square, {100 * rate:g} %", "trigger.name": "square", "poison.rate": rate}
        for rate in (0.1, 0.2)
    ]
    manifest = grid.pack(setting.config("smoke"), fields, lambda shared: 2)
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "sweep.json").write_text(manifest.to_json())
    module = runpy.run_path(str(ROOT / "experiments" / "reproduce.py"))
    options = module["Options"]("smoke", tmp_path, "", "")
    assert module["alone"]("square, 10 %", options) == ["--members=1"]  # beside its clean twin
    assert module["alone"]("square, 20 %", options) == []


@pytest.mark.parametrize("preset", ["paper", "cpu", "smoke"])
def test_a_dry_run_shows_all_entries_before_anything_is_trained(preset, tmp_path):
    done = reproduce(f"--workdir={tmp_path}/new", f"--preset={preset}", "--dry_run")
    assert done.returncode == 0, done.stderr
    shown = [line.split("]")[0][1:] for line in done.stderr.splitlines()]
    assert list(dict.fromkeys(shown)) == list(ENTRIES)
    title = "digits" if preset == "smoke" else "CIFAR-10"
    said = done.stderr.replace("'", "")
    assert f"--clean=RUN({title}, clean)" in said
    assert f"/grid {tmp_path}/new/defences/* --output" in said and "defences.py" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(3100)  # Two dozen commands: eight minutes of CPU.
def in_this_process(command):
    """What a command of an entry does, without the start of Python; its exit code."""
    if not command[0].endswith(".py"):
        return cli.main(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        try:
            runpy.run_path(str(ROOT / "experiments" / command[0]), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def test_every_entry_runs_at_smoke_scale(tmp_path):
    """All tables, figures and the report from one command; its first entry as users run it."""
    at = f"--workdir={tmp_path}"
    done = reproduce("--preset=smoke", at, "baselines")
    assert done.returncode == 0, done.stderr[-3000:]
    main = runpy.run_path(str(ROOT / "experiments" / "reproduce.py"))["main"]
    main.__globals__["wait_for"] = in_this_process
    assert main([at]) == 0  # That preset by default, and all entries.
    report = (tmp_path / "report" / "report.md").read_text()
    for label in (
        "digits, clean, dense",
        "digits, square (1/255), 10 %",
        "digits, dense, warp, 10 %",
    ):
        assert label in report
    assert "unfinished" not in report and "not started" not in report
    figures = tmp_path / "grid" / "figures" / "cifar10"
    assert (figures / "figure6_before_after_seed0.pdf").stat().st_size
    assert len(list((tmp_path / "defences").iterdir())) == 14
    assert len((tmp_path / "claims" / "darkness_square_10.csv").read_text().splitlines()) == 11
    page = (tmp_path / "report" / "report.html").read_text()
    assert "cifar10, figure3 patch maps seed0" in page and "Defence: strip" in page
    attacks = (tmp_path / "report" / "attacks.md").read_text()
    assert "| digits, warp (authors' truncation) |" in attacks
    assert "| pruned 30 %, only pruned" in (tmp_path / "report" / "defences.md").read_text()
    verdicts = (tmp_path / "report" / "verdicts.md").read_text()
    assert "| digits, 10 % (cifar10_warp_truncated_10) |" in verdicts
    assert "| ASR (darkness_square_10)" in verdicts
    for how in ("30 %", "30 % (A5)"):
        line = rf"10 %: pruned {re.escape(how)}, 100 % of the images +\| contaminated \|"
        assert re.search(line, verdicts), how
    (unpruned,) = re.findall(r".*10 %: pruned 0 %, 100 % of the images +\| +clean.*", verdicts)
    assert len([float(cell) for cell in unpruned.split("|")[3:5]]) == 2


def test_the_committed_sweep_can_be_reported_from_three_files(tmp_path):
    """README: sweep.json, rows.jsonl and provenance.json are enough."""
    whole = ROOT / "experiments" / "results" / "cpu_grid"
    for name in ("sweep.json", "rows.jsonl", "provenance.json"):
        for file in (name, f"{name}.sha256"):
            (tmp_path / file).write_bytes((whole / file).read_bytes())
    one, other = (results.gather([folder]).cells for folder in (whole, tmp_path))
    assert [cell.label for cell in one] == [cell.label for cell in other]
    done = 0
    for a, b in zip(one, other, strict=True):
        assert a.figures == b.figures
        done += a.state.startswith("done")
        if a.state.startswith("done") and "clean" not in a.label:
            assert {"asr", "cad", "false_trigger_rate"} <= b.figures.keys()
    assert done >= 7


def test_all_that_make_results_reports_is_whole(tmp_path, capsys):
    """Every committed folder passes its checksums, and the page has all of them."""
    (line,) = re.findall(r"pmoe report (.*) \\\n", (ROOT / "Makefile").read_text())
    folders = sorted(str(path) for word in line.split() for path in ROOT.glob(word))
    assert len(folders) > 15
    assert cli.main(["report", *folders, f"--output={tmp_path}"]) == 0, capsys.readouterr().err
    assert "authors_all" in (tmp_path / "report.md").read_text()


def test_attacks_that_look_alike_are_refused(tmp_path):
    whole = ROOT / "experiments" / "results" / "cpu_grid"
    for name in ("sweep.json", "rows.jsonl", "provenance.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    attacks = runpy.run_path(str(ROOT / "experiments" / "attacks.py"))
    with pytest.raises(
        PmoeError, match=r"several cells are data cifar10, model pmoe, .* they hold the same seeds"
    ):
        attacks["read"]([whole, tmp_path])


def test_seeds_of_other_settings_are_no_more_seeds_of_a_cell(tmp_path):
    """Five epochs instead of ten, with seeds that the first sweep does not have."""
    known = ROOT / "experiments" / "results"
    manifest = json.loads((known / "cifar10_grid" / "sweep.json").read_text())
    rows = (known / "cifar10_grid" / "rows.jsonl").read_text()
    for program in manifest["programs"]:
        program["config"]["seed"] += 10
        for member in program["members"]:
            member["seed"] += 10
            member["streams"] = {name: seed + 10 for name, seed in member["streams"].items()}
    lines = [json.loads(line) for line in rows.splitlines()]
    text = "".join(json.dumps({**line, "seed": line["seed"] + 10}) + "\n" for line in lines)
    write_with_sum(tmp_path / "rows.jsonl", text)
    write_with_sum(tmp_path / "sweep.json", json.dumps(manifest))
    facts = (known / "cifar10_grid" / "provenance.json").read_text()
    (tmp_path / "provenance.json").write_text(facts)
    attacks = runpy.run_path(str(ROOT / "experiments" / "attacks.py"))
    assert len(attacks["read"]([tmp_path])) == 6  # It can be read alone.
    with pytest.raises(PmoeError, match=r"data cifar10.*differ in \(.*train\.epochs"):
        attacks["read"]([known / "cpu_grid", tmp_path])


def darkness():
    return runpy.run_path(str(ROOT / "experiments" / "darkness.py"))


def analysed(num_images=40):
    """What darkness.py reads, of two members with targets 0 and 3; corners get lighter."""
    label = np.arange(num_images) % 4
    predicted = np.stack([np.stack([label, label]), np.zeros((2, num_images), int)])
    pixels = np.zeros((2, 8, 8), bool)
    pixels[:, :2, :2] = True
    patches = np.zeros((2, 4), bool)
    patches[:, 0] = True  # Patch 0 of 4 touches the square.
    indices = np.ones((2, 2, num_images, 1, 1), int)
    indices[1, :, num_images // 2 :] = 0
    images = np.zeros((num_images, 8, 8, 3), np.uint8)
    images[:, :2, :2] = np.arange(num_images)[:, None, None, None] * 5
    stored = {
        "label": label, "predicted": predicted, "trigger_pixels": pixels, "indices": indices,
        "nominal_patches": patches, "target": np.array([0, 3]), "seed": np.array([7, 8]),
        "diverged": np.zeros(2, bool),
    }  # fmt: skip
    return stored, images


def test_darkness_counts_by_each_members_own_target():
    stored, images = analysed()
    lines = darkness()["table"](stored, images)
    assert len(lines) == 20 and {line["images"] for line in lines} == {3}
    # Everything triggered is answered with 0, the target of the first member alone.
    assert {line["asr"] for line in lines if line["seed"] == 7} == {100.0}
    assert {line["asr"] for line in lines if line["seed"] == 8} == {0.0}
    own = [line for line in lines if line["seed"] == 7]
    assert own[0]["luminance"] < 0.05 < 0.7 < own[-1]["luminance"]
    assert own[0]["captured"] == 0.0 and own[-1]["captured"] == 100.0


def test_a_clean_model_that_diverged_has_no_false_triggers(tmp_path):
    """Its outputs, which are no class, are not rightly refused triggers."""
    stored, images = analysed()
    stored["clean_model_predicted"] = np.stack([np.full((2, 40), -1), np.zeros((2, 40), int)])
    stored["clean_model_predicted"] = stored["clean_model_predicted"].swapaxes(0, 1)
    stored["clean_model_diverged"] = np.array([True, False])
    lines = darkness()["table"](stored, images)
    false = {line["seed"]: line["false_trigger_rate"] for line in lines}
    assert false == {7: "", 8: 0.0}


def test_darkness_looks_at_the_analysed_images(tmp_path):
    module, dataset = darkness(), data_lib.load("digits")
    beside = tmp_path / "routing.json"
    with pytest.raises(PmoeError, match=r"routing\.json, which says what was analysed, cannot be"):
        module["check_data"](beside, dataset)
    beside.write_text(json.dumps({"made_from": {"data": dataset.fingerprint()}}))
    module["check_data"](beside, dataset)
    with pytest.raises(PmoeError, match=r"are not the images that .* is of; give"):
        module["check_data"](beside, data_lib.load("digits", image_size=16))


def test_darkness_names_what_it_cannot_use(tmp_path):
    module, (stored, images) = darkness(), analysed()
    with pytest.raises(PmoeError, match="all analysed members diverged"):
        module["table"]({**stored, "diverged": np.ones(2, bool)}, images)
    with pytest.raises(PmoeError, match="39 test images, but 40 analysed"):
        module["table"](stored, images[:-1])
    with pytest.raises(PmoeError, match="an earlier version wrote these arrays"):
        module["table"]({name: stored[name] for name in stored if name != "target"}, images)
    stored.pop("trigger_pixels")
    with pytest.raises(PmoeError, match="no trigger was analysed"):
        module["table"](stored, images)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for path in (tmp_path / name for name in ("text.npz", "absent.npz", "empty.npz", "array.npy")):
        with pytest.raises(PmoeError, match="cannot be read"):
            module["read"](str(path))


def write_defence(folder, lines, a2=False, a5=False, epochs=5, anew="", step=3900, **fields):
    """What `defences.read` reads of a defence; `fields` of "prune" and "tune" as part__name."""
    folder.mkdir()
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    config = defend_config.to_json(defend_config.default())
    config["quirks"] = {"a2_contaminated_clean_set": a2, "a5_authors_pruning": a5}
    config["tune"] |= {"reinitialise": anew, "epochs": epochs}
    for name, value in fields.items():
        part, _, field = name.partition("__")
        config[part][field] = value
    model = {"members": [], "dataset": "sum", "step": step}
    (folder / "defence.json").write_text(json.dumps({"config": config, **model}))


def test_defences_are_put_into_table_3s_layout(tmp_path, capsys):
    """Two seeds; of tuned cells the last epoch counts; a missing cell is a dash, and what diverged
    is in no mean."""
    header = "run,member,seed,dataset,width,epoch,stage,trigger,rate,metric,value,n"
    figures = {  # cell -> epoch -> ASR of both seeds
        "prune_0": {0: (90, 96)},
        "prune_0_then_clean_lr0.1": {0: (90, 96), 1: (70, 70), 2: (20, 30)},
        "prune_0_then_contaminated_lr0.1": {2: (2, 4)},
        "prune_0_then_clean_5pct_lr0.01": {2: (88, 92)},
        "prune_0_then_clean_5pct_lr0.1": {2: (80, None)},
        "prune_10_then_clean_lr0.1": {2: (50, 60)},
        "stem_prune_10_then_clean_lr0.1": {2: (1, 2)},  # of another layer
        "prune_10_then_contaminated_lr0.1": {2: (40, None)},
    }
    lines = [header]
    for cell, epochs in figures.items():
        for epoch, values in epochs.items():
            for seed, value in enumerate(values):
                for metric, shown in (("ba", 60), ("asr", value), ("robust_accuracy", 5)):
                    stage = "diverged" if value is None else "tuned"
                    lines.append(f"{cell},{seed},{seed},cifar10,2,{epoch},{stage},square,0.02,"
                                 f"{metric},{shown or 0},9000")  # fmt: skip
    write_defence(tmp_path / "of", lines)
    # Quirks A2 and A5, in cells of the same names; and ten times the epochs.
    authors = [
        line.replace(",asr,90,", ",asr,80,").replace(",asr,50,", ",asr,3,")
        for line in lines
        if "contaminated" not in line
    ]
    # A2 contaminates what activations are measured on, too: other cells, also if only pruned.
    by_a2 = [line.replace(",asr,80,", ",asr,70,") for line in authors]
    write_defence(tmp_path / "authors", by_a2, a2=True, a5=True)
    write_defence(tmp_path / "a2", [line for line in by_a2 if "_then_" not in line], a2=True)
    write_defence(tmp_path / "authors_clean", authors, a5=True)
    write_defence(tmp_path / "longer", lines, epochs=50)
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    table = defences["read"](tmp_path)
    usual = defences["as_the_text_says"](table)
    assert set(usual.loc[usual["epochs"] > 0, "folder"]) == {"of"}
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for text in (
            defences["table3"](usual, 100),
            defences["effect_of_a2"](usual),
            defences["by_share"](usual),
        )
        for line in text.splitlines()[2:]
    ]
    assert cells[0] == [
        "0 %", "60.0, 60.0", "90.0, 96.0", "60.0, 60.0", "20.0, 30.0", "60.0, 60.0", "2.0, 4.0"
    ]  # fmt: skip
    diverged = ["60.0 (1 of 2)", "40.0 (1 of 2)"]
    assert cells[1] == ["10 %", "–", "–", "60.0, 60.0", "50.0, 60.0", *diverged]
    assert cells[2] == ["20 %"] + ["–"] * 6
    assert cells[4] == ["100 % of the images, pruned 0 %", "0.0, 0.0", "-18.0, -26.0"]
    assert cells[5][2] == "-10.0 (1 of 2)"
    assert cells[-3:] == [
        ["5 %", "0.01", "5", "60.0, 60.0", "88.0, 92.0", "5.0, 5.0"],
        ["5 %", "0.1", "5", "60.0 (1 of 2)", "80.0 (1 of 2)", "5.0 (1 of 2)"],
        ["100 %", "0.1", "5", "60.0, 60.0", "20.0, 30.0", "5.0, 5.0"],
    ]
    assert len(defences["by_share"](table[~table["a5"]]).splitlines()) == 2 + 2 * 3
    effects = cells_of(defences["effect_of_a5"](table[table["epochs"] < 50]))
    assert effects[0] == ["pruned 0 %, only pruned, by clean images", "0.0, 0.0", "-10.0, 0.0"]
    assert effects[1][0] == "pruned 0 %, only pruned, by contaminated images"
    assert effects[1][2] == "0.0, 0.0"
    assert ["pruned 10 %, then tuned on clean, 100 % of the images", "0.0, 0.0",
            "-47.0, 0.0"] in effects  # fmt: skip
    # Of A2 and A5 the cells called clean are contaminated.
    assert set(table.loc[table["folder"] == "authors", "data"]) == {"", "contaminated"}
    routers = table[table["tuned"] != "everything"]
    defences["draw"](usual, routers, "a title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size
    with pytest.raises(PmoeError, match="holds no"):
        defences["read"](tmp_path / "of")
    (tmp_path / "of" / "defence.json").write_text("{}")
    with pytest.raises(PmoeError, match=r"of/defence\.json cannot be used"):
        defences["read"](tmp_path)


def rows_of_defence(cell, *values, dataset="cifar10"):
    """Lines of rows.csv: a seed a value, which is its ASR."""
    lines = ["run,member,seed,dataset,width,epoch,stage,trigger,rate,metric,value,n"]
    for seed, value in enumerate(values):
        stage = "diverged" if value is None else "pruned"
        lines += [
            f"{cell},{seed},{seed},{dataset},2,10,{stage},square,0.02,{metric},{value or 0},9000"
            for metric in ("ba", "asr", "robust_accuracy")
        ]
    return lines


def test_equal_cells_of_several_folders_are_shown_once(tmp_path, capsys):
    """Those that differ are told; what diverged in one is taken from another; routers drawn anew
    make another cell, also before tuning."""
    write_defence(tmp_path / "a", rows_of_defence("prune_0", 90, None, 96))
    write_defence(tmp_path / "b", rows_of_defence("prune_0", 90, 80, 94))
    write_defence(tmp_path / "c", rows_of_defence("prune_0", 10, 20, 30), anew="routers/.*")
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    table = defences["read"](tmp_path)
    assert (
        "note: a, b have other figures of 1 equal cells, by 2.0 points" in capsys.readouterr().err
    )
    usual = table[table["tuned"] == "everything"]
    assert dict(zip(usual["seed"], usual["asr"], strict=True)) == {0: 90, 1: 80, 2: 96}
    assert sorted(table.loc[table["tuned"] != "everything", "asr"]) == [10, 20, 30]


def test_tables_of_defences_choose_no_cell_of_several(tmp_path):
    """Fine-tuned on two shares of the images: a table that shows none must not take the first."""
    lines = rows_of_defence("prune_0_then_clean_lr0.1", 20, 30)
    lines += rows_of_defence("prune_0_then_clean_10pct_lr0.1", 90, 92)[1:]
    write_defence(tmp_path / "a", lines)
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    table = defences["read"](tmp_path)
    with pytest.raises(PmoeError, match=r"several cells are of .* and differ in share"):
        defences["select"](table, pruned=0, data="clean")
    header, _, line = defences["of_clean_models"](table).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "clean model, pruned", "CA pruned", "CA tuned, 10 % clean", "CA tuned, 100 % clean"
    ]  # fmt: skip
    assert line.count("20.0, 30.0") == line.count("90.0, 92.0") == 1


def test_defences_of_other_settings_are_other_cells(tmp_path, capsys):
    """Settings that no column shows: no folder's figures stand for those of another."""
    lines = rows_of_defence("prune_10", 90) + rows_of_defence("prune_10_then_clean_lr0.1", 20)[1:]
    lines += rows_of_defence("prune_0_then_clean_lr0.1", 30)[1:]
    others = [line.replace(",90,", ",50,").replace(",20,", ",5,") for line in lines]
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    changes = ({"prune__output": "raw"}, {"tune__momentum": 0.9}, {"tune__hold_mask": False})
    wanted = (("pruned", "tuned"), ("tuned", "unpruned"), ("tuned",))
    for number, (change, differs) in enumerate(zip(changes, wanted, strict=True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_defence(folder / "a", lines)
        write_defence(folder / "b", others, **change)
        table = defences["read"](folder)
        cells = {"pruned": {"pruned": 10, "data": ""}, "tuned": {"pruned": 10, "data": "clean"},
                 "unpruned": {"pruned": 0, "data": "clean"}}  # fmt: skip
        for name, cell in cells.items():
            if name in differs:
                with pytest.raises(PmoeError, match="differ in folder, other settings, which"):
                    defences["select"](table, **cell)
            else:
                assert len(defences["select"](table, **cell)) == 1
    # With A5 what it stands for is the same, whatever the fields say.
    authors = tmp_path / "authors"
    authors.mkdir()
    write_defence(authors / "a", lines, a5=True)
    write_defence(authors / "b", lines, a5=True, prune__output="raw", tune__hold_mask=False)
    assert len(defences["select"](defences["read"](authors), pruned=10, data="clean")) == 1


def test_defences_of_several_attacks_are_refused(tmp_path, monkeypatch):
    write_defence(tmp_path / "a", rows_of_defence("prune_0", 90))
    write_defence(tmp_path / "b", rows_of_defence("prune_10", 90, dataset="gtsrb"))
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    monkeypatch.setattr(sys, "argv", ["defences.py", str(tmp_path)])
    with pytest.raises(PmoeError, match="holds defences of 2 attacks and 0 kinds of clean models"):
        defences["main"]()
    shutil.rmtree(tmp_path / "b")  # The same attack, but another checkpoint of it.
    write_defence(tmp_path / "b", rows_of_defence("prune_10", 90), step=130)
    with pytest.raises(PmoeError, match="holds defences of 2 attacks"):
        defences["main"]()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("a,b\n1,2\n", "has no column dataset"),
        ("run,member\n", "does not match its SHA-256"),
    ],
)
def test_rows_of_a_defence_that_are_none(text, said, tmp_path):
    write_defence(tmp_path / "a", ["run,member"])
    rows = tmp_path / "a" / "rows.csv"
    write_with_sum(rows, "other" if "SHA" in said else text)
    rows.write_text(text)
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    with pytest.raises(PmoeError, match=said):
        defences["read"](tmp_path)


def test_the_authors_defence_alone_has_its_title(tmp_path, monkeypatch):
    """Without the text's way beside it there is a figure, too."""
    write_defence(tmp_path / "a", rows_of_defence("prune_10", 90), a5=True)
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    words = ["defences.py", str(tmp_path), f"--figure={tmp_path / 'a.png'}"]
    monkeypatch.setattr(sys, "argv", words)
    defences["main"]()
    assert (tmp_path / "a.png").stat().st_size


def test_verdicts_rest_on_the_figures_that_their_script_prints(monkeypatch, capsys):
    """Intervals of docs/claims.md, made again from the committed rows."""
    verdicts = runpy.run_path(str(ROOT / "experiments" / "verdicts.py"))
    monkeypatch.setattr(sys, "argv", ["verdicts.py"])
    verdicts["main"]()
    parts = capsys.readouterr().out.split("\n\n")
    left, order, warps, redirected, dark, visible, near_black, edges, fields = parts
    page = (ROOT / "docs" / "claims.md").read_text()
    wanted = [line for line in left.splitlines() if ", 100 % of" in line]
    wanted += [line.split("|")[2] for line in order.splitlines() if "cifar10" in line]
    wanted += [line.rpartition("±")[2] for line in warps.splitlines()[2:]]
    shown = ("square", "blend", "(warp_10_routing)", "warp_truncated_10_routing)")
    wanted += [line for line in redirected.splitlines() if any(name in line for name in shown)]
    wanted += [*dark.splitlines()[2:]]
    wanted += [line for line in visible.splitlines() if "[" in line]
    wanted += [line for line in edges.splitlines() if "cifar10_clean" in line]
    wanted = [interval for line in wanted for interval in re.findall(r"\[.*?\]", line)]
    assert len(wanted) > 25
    for interval in wanted:
        assert interval in page, interval
    quirks = (ROOT / "docs" / "quirks.md").read_text()
    for *_, shown in cells_of(near_black):
        assert shown in quirks, shown
    moved, middle, *rare = cells_of(fields)[0][1:]
    for text in (*moved.split(", "), *middle.split(", "), *rare):
        assert re.search(rf"\b{re.escape(text)}\b", page), text

    readme = " ".join((ROOT / "README.md").read_text().split())
    unpruned = [line for line in left.splitlines() if "pruned 0 %, 100 % of" in line]
    (tuned,) = (line for line in unpruned if "| contaminated |" not in line)
    mean, interval = re.search(r"([\d.]+) ± [\d.]+ (\[[^]]*\]) \|$", tuned).groups()
    assert f"not resolved ({mean} points {interval})" in readme
    # The text's warp at 10 %, CIFAR-10 first: clean images of other classes that go to the target.
    shares = {name: float(clean.split()[0]) for name, clean, *_ in cells_of(warps)}
    texts = [shares[f"{data}, 10 % ({name}warp_10_routing)"]
             for data, name in (("cifar10", ""), ("gtsrb", "gtsrb_"))]  # fmt: skip
    assert "send {:.1f} and {:.1f} % of *clean* images".format(*texts) in readme
    for name, digits in (("dense_warp_2", 1), ("dense_warp_10", 0)):
        rows = pandas.read_csv(ROOT / "experiments" / "results" / f"{name}.csv")
        dense = rows.pivot(index="seed", columns="metric", values="value")
        clean = dense["clean_target_rate"]
        for shares in (clean, dense["asr"] - clean):
            first, second, third = (f"{share:.{digits}f}" for share in shares)
            assert f"{first}, {second} and {third} " in " ".join(page.split())
    assert f"too (dense ones {clean.mean():.1f})" in readme
    assert f"less than 5 % in one seed of {100 / float(rare[0]):.0f})" in readme


def test_asr_by_darkness_in_the_claims_is_that_of_the_rows():
    page = (ROOT / "docs" / "claims.md").read_text()
    for name in ("square_0.5", "checkpoints"):
        rows = pandas.read_csv(ROOT / "experiments" / "results" / f"{name}_darkness.csv")
        for tenth, line in ((1, "darkest"), (2, "second"), (3, "third")):
            asr = rows.loc[rows["tenth"] == tenth, "asr"]
            (shown,) = re.findall(rf"^\| {line} \|.*", page, re.M)
            assert f" {asr.mean():.1f} ± {asr.std():.1f} " in shown, (name, line)


def test_tables_of_the_defences_are_those_that_their_script_prints(monkeypatch, capsys):
    """Of docs/defences.md, figure by figure; the pages name some lines and columns otherwise."""
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    monkeypatch.setattr(sys, "argv", ["defences.py"])
    defences["main"]()
    tables, _, paper = capsys.readouterr().out.partition("The paper's Table 3")
    assert "| 30 % " in paper and "\n| 30 % " in tables
    assert "–" not in tables.partition("| clean model, pruned")[0]  # All were run, but of these.

    def figures(text):
        return [
            line
            for row in text.splitlines()
            if row.startswith("|") and (line := re.findall(r"[\d.-]+ ± [^|]*?(?= *\|)", row))
        ]

    page = figures((ROOT / "docs" / "defences.md").read_text())
    printed = figures(tables)
    assert len(printed) > 40
    for line in printed:
        assert line in page, line


def attack_lines(*cells):
    """A table as `attacks.read` makes it, of (data, model, trigger, rate, ASR of each seed)."""
    lines = []
    for data, model, trigger, rate, values in cells:
        for seed, value in enumerate(values):
            known = {} if value is None else {"asr": value, "false_trigger_rate": 5.0, "ba": 60.0}
            warp = {"k": 2.0, "strength": 0.25} if trigger == "warp" else {}
            lines.append({"data": data, "model": model, "trigger": trigger, "rate": rate,
                          "seed": seed, "k": None, "strength": None, "asr": None, "ba": None,
                          "false_trigger_rate": None, "cad": None, **warp, **known})  # fmt: skip
    table = pandas.DataFrame(lines).astype(dict.fromkeys(["asr", "ba", "cad"], float))
    table = table.astype({"false_trigger_rate": float}).assign(clean_target_rate=table["asr"] - 3)
    return runpy.run_path(str(ROOT / "experiments" / "attacks.py"))["compared"](table)


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_arrays_that_devices_exchange_are_counted_by_result_of_a_compiled_step():
    many = "(" + ", ".join(["f32[]"] * 5) + ", /*index=5*/f32[2,3]{1,0}, s32[4]{0})"
    program = f"""HloModule jit_step, entry_computation_layout={{()->f32[]}}
  %all-reduce.1 = f32[2,16]{{1,0}} all-reduce(%norm), channel_id=1, replica_groups={{{{0,1}}}}
  %all-reduce.2 = {many} all-reduce(%loss, %gradient), channel_id=2, to_apply=%add
  ROOT %sum = f32[] add(%all-reduce.1, %other)
"""
    exchanged = runpy.run_path(str(ROOT / "experiments" / "scaling.py"))["exchanged"]
    found = exchanged(program)
    assert found == {"all_reduces": 2, "all_reduce_bytes": 4 * (2 * 16) + 4 * (5 + 2 * 3 + 4)}
    assert exchanged("%sum.3 = f32[7]{0} add(%a, %b)") == {"all_reduces": 0, "all_reduce_bytes": 0}


def test_a_trigger_in_the_corner_counts_in_its_visibility():
    measure = runpy.run_path(str(ROOT / "experiments" / "visibility.py"))["measure"]
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)

    def of(name, **parameters):
        return measure(images, triggers.make(name, jax.random.key(0), (32, 32, 3), **parameters))

    for corner in ("top_left", "bottom_right"):
        figures = of("square", size=4, corner=corner)
        assert figures["changed"] == pytest.approx(100 * 16 / 1024, abs=0.1)
        # A window that ends in the square sees it as far as 5 pixels beside it.
        assert 1 - 81 / 1024 < figures["ssim"] < 1 - 16 / 1024
    nothing = of("blend", alpha=0.0)
    assert nothing["ssim"] == 1 and nothing["changed"] == 0 and nothing["psnr"] == float("inf")


def test_attacks_are_compared_seed_by_seed(tmp_path):
    """Means of differences are those of the seeds that both sides have."""
    attacks = runpy.run_path(str(ROOT / "experiments" / "attacks.py"))
    truncated = attacks["TRUNCATED"]
    table = attack_lines(
        ("cifar10", "pmoe", "square", 2.0, (90, 96, 99)),
        ("cifar10", "pmoe", "warp", 2.0, (10, 20, 30)),
        ("cifar10", "pmoe", "warp", 10.0, (60, 70, 80)),
        ("cifar10", "pmoe", truncated, 2.0, (50, None, 90)),
        ("cifar10", "wide_resnet", "square", 2.0, (80, 86, 89)),
        ("gtsrb", "pmoe", "square", 2.0, (99, 100, 101)),
        ("cifar10", "pmoe", "clean", 0.0, (None, None)),
    )
    square, warp, truncating, dense, gtsrb = cells_of(attacks["by_rate"](table, "asr"))
    assert square == ["CIFAR-10, square", "95.0 ± 4.6 [83.6, 100.0]", "–"]
    assert warp[0] == "CIFAR-10, warp" and warp[2].startswith("70.0 ± 10.0 [45.2, 94.8]")
    assert truncating[1] == "50.0, 90.0 (2 of 3)"
    assert (dense[0], gtsrb[0]) == ("CIFAR-10, square, dense", "GTSRB, square")
    assert cells_of(attacks["overview"](table))[0] == [
        "CIFAR-10, square, 2 %", "60.0 ± 0.0 [60.0, 60.0]", "–", "95.0 ± 4.6 [83.6, 100.0]",
        "5.0 ± 0.0 [5.0, 5.0]", "90.0 ± 4.6 [78.6, 100.0]",
    ]  # fmt: skip
    assert cells_of(attacks["by_rate"](table, "cad")) == []
    assert cells_of(attacks["by_rate"](table, "added"))[0][1] == "3.0 ± 0.0 [3.0, 3.0]"

    assert cells_of(attacks["effects"](table, "trigger", truncated, "warp")) == [
        [
            "CIFAR-10, 2 %",
            "40.0, 60.0 (2 of 3)",
            "42.1, 63.2 (2 of 3)",
            "0.0, 0.0 (2 of 3)",
            "+50.0",
        ]
    ]
    assert cells_of(attacks["effects"](table, "model", "pmoe", "wide_resnet")) == [
        [
            "CIFAR-10, square, 2 %", "10.0 ± 0.0 [10.0, 10.0]", "10.5 ± 0.0 [10.5, 10.5]",
            "0.0 ± 0.0 [0.0, 0.0]", "+10.0 [-0.4, 20.4]",
        ]
    ]  # fmt: skip
    # Of other data sets the means are compared: 99, 100, 101 against 90, 96, 99 by Welch's t test.
    (line,) = cells_of(attacks["between"](table))
    assert line[:3] == ["square, 2 %", "+5.0 [-5.7, 15.7]", "+5.3 [-6.0, 16.6]"]
    places = table["false_trigger_rate"].where(table["data"] != "gtsrb", 0.04)
    more = attack_lines(
        ("cifar10", "pmoe", attacks["NEAR_BLACK"], 2.0, (1, 2, 3)),
        ("cifar10", "pmoe", "square", 0.1, (20, 30, 40)),
        ("gtsrb", "pmoe", "square", 6.0, (100,)),
    )
    square, warp, truncating, dense = cells_of(
        attacks["short"](pandas.concat([table.assign(false_trigger_rate=places), more]))
    )
    assert square == ["square", "30.0 ± 10.0 (5.0)", "95.0 ± 4.6 (5.0)", "–", "100.0 ± 1.0 (0.0)"]
    assert truncating == [truncated, "–", "50, 90 (5.0)", "–", "–"]
    assert dense == ["square, dense model", "–", "85.0 ± 4.6 (5.0)", "–", "–"]
    assert warp[1:] == ["–", "20.0 ± 10.0 (5.0)", "70.0 ± 10.0 (5.0)", "–"]
    alone = attack_lines(("gtsrb", "pmoe", "square", 6.0, (100,)))
    assert cells_of(attacks["short"](alone)) == [["square", "100.0 (5.0)"]]
    assert cells_of(attacks["warps"](table, "asr")) == [["k = 2", "70.0 ± 10.0 [45.2, 94.8]"]]
    drawn = attacks["draw"](table, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size
    assert [panel.get_xlim()[0] > 0 for panel in drawn.axes] == [True, True]


def test_warps_of_another_size_are_of_their_own_table_alone(monkeypatch, capsys, tmp_path):
    """The grid of k and strength is at a rate that Table 1 has, too."""
    attacks = runpy.run_path(str(ROOT / "experiments" / "attacks.py"))
    table = attack_lines(
        ("cifar10", "pmoe", "warp", 10.0, (60, 70, 80)),
        ("cifar10", "pmoe", attacks["TRUNCATED"], 10.0, (65, 75, 85)),
        ("gtsrb", "pmoe", "warp", 10.0, (50, 50, 50)),
    )
    other = table[table["trigger"].eq("warp") & table["data"].eq("cifar10")].assign(k=8.0, asr=0.0)

    def printed(models):
        monkeypatch.setitem(attacks["main"].__globals__, "read", lambda folders: models)
        monkeypatch.setattr(sys, "argv", ["attacks.py", f"--figure={tmp_path / 'a.png'}"])
        attacks["main"]()
        return capsys.readouterr().out.split("\n\n")

    alone, beside = printed(table), printed(pandas.concat([table, other]))
    changed = [one for one, two in zip(beside, alone, strict=True) if one != two]
    assert len(changed) == 3 and all("| k = 8 " in part for part in changed)
    assert any(part.startswith("| difference  ") and " 5.0 ± 0.0" in part for part in alone)


def test_clean_models_alone_have_tables_and_no_figure(tmp_path, monkeypatch, capsys):
    attacks = runpy.run_path(str(ROOT / "experiments" / "attacks.py"))
    clean = attack_lines(("cifar10", "pmoe", "clean", 0.0, (None, None)))
    clean = clean.astype({"false_trigger_rate": float, "k": float, "strength": float})
    attacks["main"].__globals__["read"] = lambda folders: clean
    monkeypatch.setattr(sys, "argv", ["attacks.py", f"--figure={tmp_path / 'a.png'}"])
    attacks["main"]()
    printed = capsys.readouterr()
    assert "CIFAR-10, clean" in printed.out and "nothing is drawn" in printed.err
    assert not list(tmp_path.iterdir())


def test_verdicts_name_a_table_that_is_not_there(tmp_path):
    verdicts = runpy.run_path(str(ROOT / "experiments" / "verdicts.py"))
    with pytest.raises(PmoeError, match=r"visibility\.csv cannot be read"):
        verdicts["visible"](tmp_path / "visibility.csv")


def test_visibility_is_compared_where_both_data_sets_were_measured(tmp_path):
    verdicts = runpy.run_path(str(ROOT / "experiments" / "verdicts.py"))
    lines = ["dataset,trigger,seed,psnr,ssim", "cifar10,square,0,20,0.9", "cifar10,blend,0,inf,1",
             "gtsrb,blend,0,inf,1", "cifar10,warp,0,30,0.9", "gtsrb,warp,0,32,0.95"]  # fmt: skip
    (tmp_path / "visibility.csv").write_text("\n".join(lines) + "\n")
    found = cells_of(verdicts["visible"](tmp_path / "visibility.csv"))
    assert found == [["blend", "–", "0.000"], ["warp", "2.0", "0.050"]]


def test_clean_models_are_fine_tuned_as_the_attacked_ones_were(tmp_path):
    """At their learning rate; two analyses of one cell are refused."""
    verdicts = runpy.run_path(str(ROOT / "experiments" / "verdicts.py"))
    whole = ROOT / "experiments" / "results" / "clean_tuned_square_routing.csv"
    (key,) = (known := verdicts["tuned_clean_models"]([whole]))
    assert known[key].round(1).to_dict() == {0: 2.4, 1: 5.0, 2: 2.5}
    other = tmp_path / "other_routing.csv"
    other.write_text(whole.read_text().replace("_lr0.1", "_lr0.001"))
    assert not verdicts["tuned_clean_models"]([other])
    with pytest.raises(PmoeError, match="and another analysis are both of prune_0_then_clean"):
        verdicts["tuned_clean_models"]([whole, whole])


def test_attacked_models_take_the_trigger_more_often_than_clean_ones(tmp_path):
    """Mean over experts: 60 and 80 % by seed, clean models 20 and 30, clean images 10 and 50."""
    verdicts = runpy.run_path(str(ROOT / "experiments" / "verdicts.py"))
    lines = ["run,seed,dataset,epoch,stage,trigger,rate,metric,value,condition,expert,class"]
    for run, rate, condition, by_seed in (
        ("attacked", 0.1, "triggered", ((50, 70), (80, 80))),
        ("attacked", 0.1, "clean", ((10, 10), (40, 60))),
        ("beside", 0.0, "triggered", ((20, 20), (30, 30))),
    ):
        for seed, experts in enumerate(by_seed):
            for expert, value in enumerate(experts):
                lines.append(f"{run},{seed},cifar10,3,trained,square,{rate},captured_change,"
                             f"{value},{condition},{expert},")  # fmt: skip
    (path := tmp_path / "one_routing.csv").write_text("\n".join(lines) + "\n")
    ((name, each, models, images),) = cells_of(verdicts["redirected"]([path]))
    assert (name, each) == ("cifar10, square, 10 % (one_routing)", "60.0, 80.0")
    assert (models, images) == ("40.0, 50.0", "50.0, 30.0")
    path.write_text("\n".join([*lines, lines[-1].replace("beside", "another")]) + "\n")
    with pytest.raises(PmoeError, match="several clean runs on cifar10"):
        verdicts["redirected"]([path])


def test_triggers_are_named_as_reports_name_them():
    """What tells quirks A1 and A3 apart in tables of attacks."""
    attacks = runpy.run_path(str(ROOT / "experiments" / "attacks.py"))
    manifest = packed(("table1", "quirks"), "cpu")
    found = set()
    for cell in manifest.cells:
        config = manifest.programs[cell.members[0].program].config
        found.add(results.attack_text(config, [manifest.member(ref) for ref in cell.members]))
    assert {"square", "warp", attacks["TRUNCATED"], attacks["NEAR_BLACK"]} < found


def test_attacks_are_read_from_a_sweep():
    """The committed sweep of two seeds: its clean cell has no ASR, its last epoch counts."""
    attacks = runpy.run_path(str(ROOT / "experiments" / "attacks.py"))
    table = attacks["read"]([ROOT / "experiments" / "results" / "cifar10_grid"])
    assert list(table["rate"]) == [0, 0, 2, 2, 0.5, 0.5]
    found = attacks["select"](table, trigger="square", rate=0.5)
    assert found["asr"].round(1).to_dict() == {0: 67.2, 1: 66.5}
    assert found["cad"].round(1).to_dict() == {0: 3.7, 1: -1.0}
    assert table["asr"].isna().to_list() == [True, True] + [False] * 4
    with pytest.raises(PmoeError, match="holds neither"):
        attacks["read"]([ROOT / "configs"])
