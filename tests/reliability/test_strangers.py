"""Strangers' files: nothing of them is executed, none leads out of its folder, and none takes more
memory than the declared limits (`data.max_bytes`, `config.JSON_LIMIT`, free memory)."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import small
import tally
import tensorstore
from PIL import Image

from pmoe_jax import config as config_lib
from pmoe_jax import data, defend, defend_config, inputs, results
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.checkpoints import Checkpoints
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import check_sum, write_with_sum
from pmoe_jax.grid import Manifest
from pmoe_jax.rundir import RunDirectory


class Hostile:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return open, ("pwned", "w")


POISON = pickle.dumps(Hostile())
CODE = "open('pwned', 'w')\nraise SystemExit('pwned')\n"


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        small.use(patch)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_npz):
    config = small.attacked(small.with_fields(config_lib.default(), **{
        "data.name": "npz", "data.source": str(tiny_npz), "data.image_size": 16, "num_seeds": 2,
        "model.width": 1, "train.epochs": 2, "train.batch_size": 16, "evaluation.batch_size": 40,
    }))  # fmt: skip
    path = tmp_path_factory.mktemp("trained") / "run"
    small.train(config, path)
    return path


@pytest.fixture(scope="module")
def rows(trained):
    """Of the run's newest checkpoint."""
    return trained_lib.evaluate(trained).rows


@pytest.fixture
def strange(trained, tmp_path, monkeypatch):
    """A copy of a run, in which we stand."""
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    monkeypatch.chdir(path)
    monkeypatch.setattr(sys, "path", [str(path), *sys.path])  # as `python -m` would have it
    return path


def unharmed(*folders):
    for folder in folders:
        assert not list(folder.rglob("pwned"))


def test_python_and_pickles_beside_a_checkpoint(strange, trained):
    for name in ("config", "sitecustomize", "conftest", "get_config", "triggers", "setup"):
        (strange / f"{name}.py").write_text(CODE)
    for name in ("config.pkl", "members.pickle", "checkpoints/state.pkl", "checkpoints/12/.x.pkl"):
        (strange / name).write_bytes(POISON)
    assert trained_lib.evaluate(strange).rows == trained_lib.evaluate(trained).rows
    unharmed(strange)
    tally.add("strangers' files", 10)


@pytest.mark.parametrize(
    "name",
    ["config.json", "members.json", "manifest.json", "metrics.jsonl", "provenance.json",
     "checkpoints/12/state/_METADATA", "checkpoints/12/state/_sharding",
     "checkpoints/12/meta/metadata", "checkpoints/12/_CHECKPOINT_METADATA",
     "checkpoints/12/state/manifest.ocdbt", "checkpoints/12/attack/_METADATA"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pickle", "python", "null"])
def test_every_file_of_a_run_replaced_and_listed(name, kind, strange, rows, capfd):
    """By somebody who also brings the manifest up to date: an error of ours, or the right rows, as
    no model is in the file."""
    content = {"pickle": POISON, "python": CODE.encode(), "null": b"null"}[kind]
    (strange / name).write_bytes(content)
    if name != "manifest.json":
        reseal(strange)
    try:
        found = trained_lib.evaluate(strange).rows
    except PmoeError as error:
        assert "\n" not in str(error)
    else:
        assert found == rows
    unharmed(strange)
    tally.add("strangers' files")


@pytest.mark.parametrize("name", ["sweep.json", "defence.json"])
@pytest.mark.parametrize(
    "content", [POISON, b"null", b"[]", b'"x"', b"[" * 10**5, b'{"format": 1}']
)
def test_other_descriptions(name, content, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PmoeError, match=name) as caught:
        if name == "sweep.json":
            results.gather([tmp_path])
        else:
            config = defend_config.default()
            config.method = "strip"
            defend.defend(trained, config, tmp_path)
    assert "\n" not in str(caught.value)
    unharmed(tmp_path)
    tally.add("strangers' files")


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", ".hidden", ""])
def test_a_sweep_that_names_other_places(name, trained, tmp_path):
    program = {
        "name": name, "config": json.loads((trained / "config.json").read_text()),
        "members": json.loads((trained / "members.json").read_text()),
    }  # fmt: skip
    content = {"format": 1, "config": program["config"], "grid": [], "programs": [program],
               "cells": []}  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(PmoeError, match="no file name"):
        Manifest.read(tmp_path / "sweep.json")
    tally.add("strangers' files")


def test_links_out_of_a_run_are_not_followed_by_the_manifest(strange):
    """A checkpoint's file that is a link to elsewhere must still have the listed sum."""
    victim = next(path for path in (strange / "checkpoints/12/state/d").iterdir())
    secret = strange.parent / "secret"
    secret.write_bytes(b"secret")
    victim.unlink()
    victim.symlink_to(secret)
    assert RunDirectory(strange).damage(12) == f"{victim} does not match its SHA-256 sum"
    tally.add("strangers' files")


@pytest.fixture
def soon():
    """Ends what waits for a pipe that nobody writes to."""

    def fail(number, frame):
        raise TimeoutError("waits for ever")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "members.json", "manifest.json", "metrics.jsonl", "provenance.json",
     "checkpoints/12/state/_METADATA", "checkpoints/12/state/d/more"],
)  # fmt: skip
def test_what_has_no_end_is_not_read(name, kind, strange, soon, capfd):
    path = strange / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/null")
    try:
        trained_lib.evaluate(strange)
    except PmoeError as error:
        assert "\n" not in str(error) and path.name in str(error)
    else:
        assert path.name in capfd.readouterr().err or name == "provenance.json"
    tally.add("strangers' files")


@pytest.mark.parametrize("name", ["dataset_info.json", "origin.json", "checksums.sha256"])
def test_prepared_data_without_an_end_are_not_read(name, soon, tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(PmoeError) as caught:
        data.load("cifar10", data_dir=str(tmp_path))
    assert "\n" not in str(caught.value)
    tally.add("strangers' files")


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "members.json", "manifest.json"])
def test_a_huge_json_file_is_not_read(name, strange):
    with open(strange / name, "wb") as file:
        file.truncate(2**40)  # a hole: it takes no space
    with pytest.raises(PmoeError, match=rf"{name} .*larger than the limit of 16777216 bytes"):
        RunDirectory(strange).config(), RunDirectory(strange).members()
    tally.add("strangers' files")


def test_huge_files_of_figures_are_not_read(strange, tmp_path):
    with open(strange / "metrics.jsonl", "ab") as file:
        file.truncate(2**40)
    with pytest.raises(PmoeError, match=r"metrics\.jsonl is larger than the limit of 268435456"):
        RunDirectory(strange).rows()
    rows = tmp_path / "rows.jsonl"
    write_with_sum(rows, "{}\n")
    with open(rows, "ab") as file:
        file.truncate(2**40)
    with pytest.raises(PmoeError, match=r"rows\.jsonl is larger than the limit of 268435456"):
        check_sum(rows)
    tally.add("strangers' files")


def test_a_checkpoint_that_declares_more_than_there_is(strange, monkeypatch):
    class Little:
        available = 1000

    dataset = inputs.load_data(RunDirectory(strange).config())  # There is memory for that.
    with monkeypatch.context() as patch, pytest.raises(PmoeError, match=r"GiB and 0\.0 GiB"):
        patch.setattr("pmoe_jax.checkpoints.psutil.virtual_memory", lambda: Little)
        trained_lib.evaluate(strange, dataset=dataset)
    tally.add("strangers' files")


def test_a_config_that_allows_itself_more_than_there_is(strange, monkeypatch):
    """The data set takes 136 * 16 * 16 * 3 bytes and more."""
    config = json.loads((strange / "config.json").read_text())
    config["data"]["max_bytes"] = 2**60
    (strange / "config.json").write_text(json.dumps(config))
    reseal(strange)

    class Little:
        available = 100_000

    with monkeypatch.context() as patch, pytest.raises(PmoeError, match="more than the limit of 1"):
        patch.setattr("pmoe_jax.data.psutil.virtual_memory", lambda: Little)
        trained_lib.evaluate(strange)
    tally.add("strangers' files")


def npy(shape, descr="'|u1'", version=b"\x01\x00", size=None):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", size or len(header))
    return b"\x93NUMPY" + version + length + header


HEADERS = {
    "huge shape": npy("(1000000000000, 32, 32, 3)"),
    "overflowing shape": npy(f"({2**40}, {2**40}, {2**40})"),
    "negative shape": npy("(-1, 32, 32, 3)"),
    "objects": npy("(4,)", "'|O'") + POISON,
    "objects in fields": npy("(4,)", "[('a', '|O')]") + POISON,
    "oversized header": npy("(4,)", version=b"\x02\x00", size=2**31),
    "code in the header": npy("(open('pwned', 'w'),)"),
    "deep header": npy("(" * 5000 + ")" * 5000),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_array_files(kind, tmp_path):
    """In a process that may take little more memory than it starts with."""
    path = tmp_path / "set.npz"
    good = io.BytesIO()
    np.save(good, np.zeros((4, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", HEADERS[kind])
        for name in ("test_images", "train_labels", "test_labels"):
            archive.writestr(f"{name}.npy", good.getvalue())
    said = loaded_in_little_memory("npz", path)
    assert said.startswith("PmoeError: ") and said.count("\n") == 1, said
    unharmed(tmp_path)
    tally.add("strangers' files")


def test_a_bomb_is_defused_within_its_limit(tmp_path):
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train_images", "test_images", "train_labels", "test_labels"):
            archive.writestr(f"{name}.npy", npy("(1000, 1000, 40)") + bytes(4 * 10**7))
    said = loaded_in_little_memory("npz", path)
    assert "more than the limit of 16777216" in said, said
    tally.add("strangers' files")


def test_chunks_larger_than_their_array_are_not_read(strange):
    """A checkpoint of 25 KB whose one array would be unpacked to 3 TB."""
    state = strange / "checkpoints" / "12" / "state"
    store = {"driver": "ocdbt", "base": f"file://{state}/"}
    kept = tensorstore.KvStore.open(store).result()
    name = min(key for key in kept.list().result() if key.endswith(b"kernel/.zarray")).decode()
    facts = json.loads(kept.read(name).result().value)
    facts["chunks"][-1] = 10**9
    kept.write(name, json.dumps(facts).encode()).result()
    reseal(strange)
    with pytest.raises(PmoeError, match=r"checkpoint 12 of .* is damaged: an array .* has chunks"):
        trained_lib.evaluate(strange)
    tally.add("strangers' files")


@pytest.mark.parametrize("kind", ["pipe", "device", "damaged", "bomb"])
def test_a_pattern_that_is_no_picture(kind, soon, tmp_path):
    path, picture = tmp_path / "pattern.png", io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(picture, "png")
    content = picture.getvalue()
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    if kind == "damaged":  # PIL raises a SyntaxError
        path.write_bytes(content[:second] + b"\1\2\3\4" + content[second + 4 :])
    elif kind == "bomb":  # 20 KB that are 170 million pixels
        Image.new("1", (13000, 13000)).save(path)
        assert path.stat().st_size < 40_000
    else:
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    config = config_lib.default()
    config.trigger.update(name="blend", pattern_path=str(path))
    config.poison.rate = 0.1
    with pytest.raises(PmoeError, match=r"pattern_path=.*pattern\.png is no readable image"):
        inputs.load_patterns(members_lib.from_config(config), (32, 32, 3))
    tally.add("strangers' files")


def loaded_in_little_memory(name, path, more=600 * 2**20):
    """What loading a data set says in a process with an address space limited to `more` bytes
    beyond what it has once everything is imported."""
    script = f"""
        import resource
        from pmoe_jax import data
        from pmoe_jax.data import archives, dataset, files, records
        from pmoe_jax.errors import PmoeError
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + {more}
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            data.load({name!r}, {str(path)!r}, max_bytes=2**24)
        except PmoeError as error:
            print(f"PmoeError: {{error}}")
        # Running out of memory gives a PmoeError as well.
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < 100, f"{{grown}} MiB were taken"
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, cwd=path.parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    return done.stdout


# --- well formed, but wrong -----------------------------------------------------------------------


def reseal(run):
    """As somebody does who changes and adds files and brings the manifest up to date."""
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["sha256"]
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file():
            manifest.setdefault(path.relative_to(run).as_posix(), "")
    for listed, known in manifest.items():
        content = (run / listed).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        grows = " of the first " in known
        manifest[listed] = f"{digest} of the first {len(content)} bytes" if grows else digest
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": 10**30}, r"target is 1000.*wanted 0 to"),
        ({"target": -3}, "target is -3; wanted 0 to"),
        ({"target": 2}, "other target labels than checkpoint"),
        ({"rate": float("nan")}, "rate is nan; wanted 0 to 1"),
        ({"rate": 2}, "rate is 2; wanted 0 to 1"),
        ({"trigger": {"name": "square", "sampling": [1]}}, "neither number nor text"),
    ],
)
def test_a_member_of_wrong_values(change, said, strange):
    members = json.loads((strange / "members.json").read_text())
    members[0].update(change)
    (strange / "members.json").write_text(json.dumps(members))
    reseal(strange)
    with pytest.raises(PmoeError, match=said):
        trained_lib.evaluate(strange)
    tally.add("strangers' files")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"epoch": 2}', "lacks fields of the common schema"),
        ('{"epoch": 2, "stage": "trained"}', "lacks fields of the common schema"),
        ('{"epoch": 2, "stage": {}}', "is damaged"),
    ],
)
def test_a_row_of_wrong_fields(line, said, strange, capfd):
    """The model is whole, and evaluates; what training recorded of it is not."""
    with open(strange / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    assert trained_lib.evaluate(strange).last3 == []
    warned = capfd.readouterr().err
    assert f"{said}; restore" in warned and "; without the mean of the last epochs" in warned
    run = RunDirectory(strange)
    config, members = run.config(), run.members()
    for read in (
        lambda: trained_lib.recorded(strange),
        lambda: run_lib.train(config, strange, members=members, progress=False),
    ):
        with pytest.raises(PmoeError, match=said):
            read()
    tally.add("strangers' files")


@pytest.mark.parametrize("epoch", [float("nan"), float("inf"), -1, True, "2", 10**400])
def test_an_epoch_of_wrong_values(epoch, strange):
    for path in (strange / "checkpoints").glob("*/meta/metadata"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "epoch": epoch}))
    reseal(strange)
    with pytest.raises(PmoeError, match="does not say its epoch"):
        trained_lib.evaluate(strange)
    tally.add("strangers' files")


@pytest.mark.parametrize(
    "change",
    [
        {"loss_sum": "x"},
        {"loss_sum": [0.0]},
        {"loss_sum": [10**400, 0]},
        {"evaluation_missing": "x"},
        {"evaluation_missing": [10**400, 1]},
    ],
)
def test_meta_of_wrong_values_does_not_go_on(change, strange):
    steps = sorted(int(path.name) for path in (strange / "checkpoints").iterdir())
    path = strange / "checkpoints" / str(steps[-1]) / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    reseal(strange)
    run = RunDirectory(strange)
    with pytest.raises(PmoeError, match="has damaged meta"):
        run_lib.train(run.config(), strange, members=run.members(), progress=False)
    tally.add("strangers' files")


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("target", None, "target is absent"),
        ("target", np.zeros(3, np.int32), r"target is i\[3\], wanted i\[2\]"),
        ("triggered", np.zeros(2, bool), r"relabelled is b\[2, 96\], wanted b\[2, 0\]"),
        ("relabelled", np.zeros((2, 96), np.int32), "relabelled is i.*wanted b"),
        ("trigger", {"alpha": np.zeros((2, 16, 16, 1), np.float32)}, r"trigger\.pattern is absent"),
        ("more", np.zeros(1, np.float32), "more is f.*wanted none"),
    ],
)
def test_an_attack_of_wrong_arrays(name, array, said, strange):
    step, state, tree = small.restored(strange)
    changed = {key: value for key, value in {**tree, name: array}.items() if value is not None}
    run = RunDirectory(strange)
    config, members = run.config(), run.members()
    with Checkpoints(run) as checkpoints:
        checkpoints.save(step + 1, state, changed, {"epoch": 2, "loss_sum": [0.0, 0.0]})
    with pytest.raises(PmoeError, match=rf"checkpoint 13 of .* damaged attack: {said}"):
        trained_lib.evaluate(strange)
    with pytest.raises(PmoeError, match=r"has a damaged attack: .*; restore its files"):
        run_lib.train(config, strange, members=members, progress=False)
    tally.add("strangers' files")


def test_a_huge_file_of_a_checkpoint_is_not_read(strange):
    with open(strange / "checkpoints/12/meta/metadata", "ab") as file:
        file.truncate(2**30)
    assert "larger than the limit of 16777216 bytes" in RunDirectory(strange).damage(12)
    tally.add("strangers' files")


def test_figures_are_not_written_through_a_link(strange):
    outside = strange.parent / "outside"
    outside.write_text("mine")
    (strange / "training.jsonl").unlink()
    (strange / "training.jsonl").symlink_to(outside)
    with pytest.raises(PmoeError, match=r"training\.jsonl cannot be written"):
        RunDirectory(strange).append("training.jsonl", [{"epoch": 3}])
    assert outside.read_text() == "mine"
    tally.add("strangers' files")


def test_hidden_files_of_a_foreign_folder_stay(tmp_path, trained):
    for name in (".notes.tmp", ".config.json.tmp", ".thesis.12.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".dir.tmp").mkdir()
    config = RunDirectory(trained).config()
    with pytest.raises(PmoeError, match="not empty and holds no run"):
        run_lib.train(config, tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 4
    tally.add("strangers' files")
