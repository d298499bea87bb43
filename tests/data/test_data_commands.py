"""`pmoe data prepare` and `pmoe data show`, by the functions that the command line calls."""

import json

import numpy as np
import pytest
from absl import flags
from PIL import Image

from pmoe_jax.data import commands
from pmoe_jax.errors import PmoeError


def run(*words):
    flag_values = flags.FlagValues()
    commands.add_flags(flag_values)
    return commands.run_command(flag_values, flag_values(["pmoe", *words])[1:])


def test_show_json(capsys, tmp_path):
    assert run("show", "digits", "--json", f"--sheet={tmp_path}/new/sheet.png") == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert list(figures) == ["name", "splits"] and figures["name"] == "digits"
    assert list(figures["splits"]) == ["train", "test"]
    assert list(figures["splits"]["train"]) == ["images", "per_class", "mean", "std"]
    assert sum(figures["splits"]["test"]["per_class"]) == 360
    assert "sheet.png" in err
    with Image.open(tmp_path / "new/sheet.png") as sheet:
        assert sheet.width > 1000 and len(np.unique(np.asarray(sheet))) > 100


def test_show_text(make, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make.write_folder(tmp_path / "k", make.gtsrb_files("kaggle", train_tracks=4))
    assert run("show", "gtsrb", f"--source={source}", "--heldout=0.25", "--image_size=40") == 0
    out, err = capsys.readouterr()
    assert "images 40x40x3" in out and "39209" in err and (tmp_path / "gtsrb_sheet.png").exists()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["0"] == ["0", "limit", "20", "9", "2", "3"]  # 4 tracks of 3, one held out
    assert run("show", "digits", "--sheet=") == 0
    assert not (tmp_path / "digits_sheet.png").exists()


def test_prepare_then_show(make, capsys, tmp_path):
    source = make.write_folder(tmp_path / "c", make.cifar_files())
    assert run("prepare", "cifar10", f"--source={source}", f"--data_dir={tmp_path}/tfds") == 0
    assert "cifar10 is ready in" in capsys.readouterr().out
    words = ("show", "cifar10", "--json", "--sheet=")
    assert run(*words, f"--data_dir={tmp_path}/tfds") == 0
    prepared = capsys.readouterr().out
    assert run(*words, f"--source={source}") == 0
    assert capsys.readouterr().out == prepared


def test_bad_words(tmp_path):
    for words in ((), ("show",), ("look", "digits"), ("show", "digits", "more")):
        with pytest.raises(PmoeError, match="use `pmoe data prepare NAME`"):
            run(*words)
    with pytest.raises(PmoeError, match=r"cannot write /proc/sheet\.png"):
        run("show", "digits", "--sheet=/proc/sheet.png")
    with pytest.raises(PmoeError, match=r"cannot write .*sheet\.pngg"):
        run("show", "digits", f"--sheet={tmp_path}/sheet.pngg")
    assert not list(tmp_path.iterdir())
