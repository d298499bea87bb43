"""The main job on the embedded data set, and the trained runs that ship with the repository."""

import json

import pytest
from locations import ROOT

from pmoe_jax import cli
from pmoe_jax.rundir import RunDirectory


def _summary(capsys, *words):
    assert cli.main(["evaluate", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)["summary"]


def test_the_digits_config_learns_digits_and_backdoor(tmp_path, capsys):
    words = [
        "train",
        f"--config={ROOT / 'configs' / 'digits.py'}",
        f"--workdir={tmp_path / 'run'}",
        "--config.num_seeds=1",
        "--config.trigger.name=square",
        "--config.poison.rate=0.1",
        "--config.evaluation.every_epochs=12",
        "--noprogress",
    ]
    assert cli.main(words) == 0
    capsys.readouterr()
    summary = _summary(capsys, f"--checkpoint={tmp_path / 'run'}")
    assert summary["ba"]["mean"] >= 85
    assert summary["asr"]["mean"] >= 90


def test_the_shipped_runs_evaluate_to_what_they_recorded(capsys):
    folder = ROOT / "checkpoints"
    clean, square = folder / "digits_clean", folder / "digits_square"
    summary = _summary(capsys, f"--checkpoint={square}", f"--clean={clean}")
    rows = [json.loads(line) for line in (square / "metrics.jsonl").read_text().splitlines()]
    last = max(row["epoch"] for row in rows)
    for metric in ("ba", "asr"):
        recorded = [r["value"] for r in rows if (r["epoch"], r["metric"]) == (last, metric)]
        # Another CPU rounds differently: allow one of the 360 test images.
        assert summary[metric]["mean"] == pytest.approx(sum(recorded) / len(recorded), abs=0.3)
    assert summary["ba"]["n"] == summary["cad"]["n"] == 2
    assert abs(summary["cad"]["mean"]) < 3
    assert summary["false_trigger_rate"]["mean"] < 10


def test_the_shipped_runs_have_sums_of_all_that_is_reported():
    for path in (ROOT / "checkpoints").glob("*/manifest.json"):
        listed = json.loads(path.read_text())
        assert {"sha256", "config.json", "members.json", "metrics.jsonl", "training.jsonl"} <= {
            *listed
        }
        assert "sha256" in json.loads((path.parent / "provenance.json").read_text())
        run = RunDirectory(path.parent)
        assert run.damage(run.whole_steps()[-1]) is None and run.rows()


def test_the_shipped_runs_stay_small():
    for prefix, count, most in (("digits_", 2, 1), ("cifar10_", 3, 8), ("gtsrb_", 1, 2.5)):
        folders = list((ROOT / "checkpoints").glob(f"{prefix}*"))
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert len(folders) == count and sum(path.stat().st_size for path in files) < most * 1e6
