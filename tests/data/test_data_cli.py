"""`pmoe data` as users call it: a bad file ends in one line and code 2, and harms nothing."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from pmoe_jax import cli, data


class Runs:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def truncated(make, tmp_path):
    whole = make.tar_bytes(make.cifar_files())
    return "cifar10", tmp_path / "cut.tar.gz", whole[: len(whole) // 2]


def hostile_pickle(make, tmp_path):
    files = make.cifar_files("python3")
    name = "cifar-10-batches-py/data_batch_3"
    files[name] = pickle.dumps({**pickle.loads(files[name]), "x": Runs(str(tmp_path / "trap"))}, 2)
    return "cifar10", tmp_path / "evil.tar.gz", make.tar_bytes(files)


def escaping_tar(make, tmp_path):
    files = {"../../escaped": b"evil", **make.cifar_files()}
    return "cifar10", tmp_path / "escape.tar.gz", make.tar_bytes(files)


def escaping_zip(make, tmp_path):
    files = {f"{tmp_path}/escaped": b"evil", **make.gtsrb_files("kaggle")}
    return "gtsrb", tmp_path / "escape.zip", make.zip_bytes(files)


def missing(make, tmp_path):
    return "gtsrb", tmp_path / "nowhere.zip", None


def corrupt_image(make, tmp_path):
    files = {**make.gtsrb_files("kaggle"), "Test/00002.png": b"no picture"}
    return "gtsrb", tmp_path / "corrupt.zip", make.zip_bytes(files)


def text_file(make, tmp_path):
    return "gtsrb", tmp_path / "notes.zip", b"Not an archive at all.\n" * 50


CASES = {
    truncated: "cut.tar.gz cannot be read",
    hostile_pickle: "data_batch_3 is refused: it wants to run posix.mkdir",
    escaping_tar: "unsafe name '../../escaped'",
    escaping_zip: "escaped'; names must be relative",
    missing: "nowhere.zip does not exist",
    corrupt_image: "Test/00002.png is not a readable image (cannot identify image file); replace",
    text_file: "notes.zip cannot be read: it is neither a folder nor a zip or tar file (.zip,",
}


def contents(folder):
    """{path: content} of everything below, with modification times."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    folders = {str(path): None for path in folder.rglob("*") if path.is_dir()}
    return folders | {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def one_line(capfd):
    """What was printed: a single line on stderr, and nothing else but notes."""
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("pmoe: "), err
    assert "Traceback" not in err and lines[0].isprintable()
    return lines[0]


@pytest.mark.parametrize("command", ["show", "prepare"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_files(make, tmp_path, capfd, case, command):
    name, source, content = case(make, tmp_path)
    if content is not None:
        source.write_bytes(content)
    sheet, target = tmp_path / "sheet.png", tmp_path / "tfds"
    sheet.write_bytes(b"an older sheet")
    # Another data set is there already, and the same one, from another time.
    good = make.write_folder(tmp_path / "good", make.cifar_files())
    data.prepare("cifar10", good, target)
    words = [f"--source={source}"]
    words += [f"--sheet={sheet}"] if command == "show" else [f"--data_dir={target}", "--overwrite"]
    before = contents(tmp_path)
    capfd.readouterr()
    assert cli.main(["data", command, name, *words]) == 2
    assert CASES[case] in one_line(capfd)
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before or command == "prepare"
    for path, content in before.items():
        assert content is None or after[path] == content
    # What is new can only be the unfinished shards of `prepare`, hidden in data_dir.
    assert all("/tfds/gtsrb" in path for path in after.keys() - before.keys())
    assert not (tmp_path / "tfds/gtsrb/1.0.0").exists()
    assert not any("escaped" in path or path.endswith("trap") for path in after)
    assert not (tmp_path.parent / "escaped").exists()


def test_no_traceback_from_a_process_of_its_own(make, tmp_path):
    name, source, content = truncated(make, tmp_path)
    source.write_bytes(content)
    command = [sys.executable, "-m", "pmoe_jax.cli", "data", "show", name, f"--source={source}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("pmoe: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == [source.name]


def test_prepared_already(make, tmp_path, capfd):
    target = tmp_path / "tfds"
    first = make.write_folder(tmp_path / "a", make.cifar_files())
    other = make.write_folder(tmp_path / "b", make.cifar_files("binary"))
    words = ["data", "prepare", "cifar10", f"--data_dir={target}"]
    assert cli.main([*words, f"--source={first}"]) == 0
    for source in ([f"--source={first}"], []):
        assert cli.main([*words, *source]) == 0
    assert capfd.readouterr().out.count("cifar10 is ready in") == 3
    # The binary batches hold the same images, so they are the same source.
    assert cli.main([*words, f"--source={other}"]) == 0
    capfd.readouterr()
    changed = make.cifar_files("binary")
    batch = "cifar-10-batches-bin/test_batch.bin"
    changed[batch] = changed[batch][:-1] + b"?"
    other = make.write_folder(tmp_path / "b", changed)
    before = contents(target)
    assert cli.main([*words, f"--source={other}"]) == 2
    assert "was prepared from another source (a, python batches, content" in one_line(capfd)
    assert cli.main([*words, f"--source={first}", "--skip_corrupt"]) == 2
    assert "was prepared with skip_corrupt=False, not True" in one_line(capfd)
    assert contents(target) == before
    assert cli.main([*words, f"--source={other}", "--overwrite"]) == 0
    loaded = data.load("cifar10", data_dir=target)
    assert loaded.test_images[-1, -1, -1, -1] == ord("?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "cifar"], "unknown data set 'cifar'; did you mean cifar10? (allowed are digits,"),
        (["prepare", "GTSBR"], "unknown data set 'GTSBR'; did you mean gtsrb?"),
        (["show", "mnist"], "unknown data set 'mnist' (allowed are digits,"),
        (["show", "digits", "--source=x"], "digits is embedded and takes no source"),
        (["show", "digits", "--boxes=x"], "boxes belong to gtsrb from an .npz; digits takes none"),
        (["show", "digits", "--overwrite"], "--overwrite is a flag of `pmoe data prepare`"),
        (["prepare", "gtsrb", "--json"], "--json is a flag of `pmoe data show`, not of prepare"),
        (["prepare", "gtsrb", "--heldout=0.1"], "--heldout is a flag of `pmoe data show`"),
        (["show", "digits", "--image_size=abc"], "invalid literal for int() with base 10: 'abc';"),
    ],
)
def test_bad_words(words, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *words]) == 2
    assert message in one_line(capfd)
    assert not list(tmp_path.iterdir())


def test_one_batch_instead_of_all(make, tmp_path, capfd):
    for kind, file in (("python", "data_batch_2"), ("binary", "test_batch.bin")):
        folder = make.write_folder(tmp_path / kind, make.cifar_files(kind))
        (source,) = (tmp_path / kind).rglob(file)
        assert cli.main(["data", "show", "cifar10", f"--source={source}"]) == 2
        line = one_line(capfd)
        assert f"give the folder that holds all of its batches, {source.parent}" in line
        assert str(source).startswith(folder)


def test_mismatches_in_json(make, tmp_path, capfd):
    source = make.write_folder(tmp_path, make.gtsrb_files("kaggle", train_tracks=2))
    words = ["data", "show", "gtsrb", f"--source={source}", "--json", "--sheet="]
    for held in ([], ["--heldout=0.5"]):
        assert cli.main([*words, *held]) == 0
        figures = json.loads(capfd.readouterr().out)
        assert figures["origin"] == "Kaggle layout"
        mismatch = figures["splits"]["train"]["mismatch"]
        assert mismatch["official_images"] == 39209
        assert mismatch["official_per_class"][1] == 2220
        assert mismatch["classes"] == list(range(43))
    test = figures["splits"]["test"]
    assert test["images"] == 3 and test["mismatch"]["official_images"] == 12630
    assert cli.main(["data", "show", "digits", "--json", "--sheet="]) == 0
    assert "mismatch" not in capfd.readouterr().out
