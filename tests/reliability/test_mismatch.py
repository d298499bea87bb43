"""What does not belong together is refused by name; what came from another device is read."""

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap

import harness
import numpy as np
import pytest
import small
import tally

from pmoe_jax import defend_base
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.rundir import RunDirectory


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    small.use(monkeypatch)


@pytest.fixture
def config(tiny_config):
    return small.attacked(tiny_config)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Where the run of `killed` is trained for the first test that asks for it."""
    return tmp_path_factory.mktemp("once") / "run"


@pytest.fixture
def killed(config, once, tmp_path):
    """A run that was killed in step 10."""
    if not once.exists():
        small.train_until(10, config, once)
    return shutil.copytree(once, tmp_path / "run")


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_without_its_provenance_the_data_of_a_run_are_said_to_be_unknown(killed, capfd):
    trained_lib.evaluate(killed)
    assert "provenance" not in capfd.readouterr().err
    (killed / "provenance.json").unlink()
    trained_lib.evaluate(killed)
    noted = [line for line in capfd.readouterr().err.splitlines() if "provenance.json" in line]
    assert len(noted) == 1 and "does not say which data it was trained on" in noted[0]


def test_without_its_provenance_a_run_does_not_go_on(config, killed):
    """It alone says which data the run was begun with."""
    (killed / "provenance.json").unlink()
    with pytest.raises(PmoeError, match=r"provenance\.json does not say any more which data"):
        small.train(config, killed)
    tally.add("mismatches")


def test_other_data_under_the_same_path_are_said(config, tmp_path, capfd):
    small.train(config, tmp_path / "run")
    with np.load(config.data.source) as archive:
        arrays = {name: archive[name] for name in archive.files}
    other = {name: np.roll(array, 1, axis=0) for name, array in arrays.items()}
    moved = tmp_path / "other.npz"
    np.savez(moved, **other)
    stored = json.loads((tmp_path / "run/config.json").read_text())
    stored["data"]["source"] = str(moved)
    text = json.dumps(stored)
    (tmp_path / "run/config.json").write_text(text)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    del manifest["sha256"]
    manifest["config.json"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    capfd.readouterr()
    evaluated = trained_lib.evaluate(tmp_path / "run")
    assert "other.npz is not the data set that run was trained on" in capfd.readouterr().err
    assert not evaluated.last3
    defend_base.load(tmp_path / "run", tmp_path / "defended")
    assert "other.npz is not the data set that run was trained on" in capfd.readouterr().err
    tally.add("mismatches", 2)


def test_a_clean_run_on_other_images_gives_no_cad(config, tmp_path):
    with np.load(config.data.source) as archive:
        other = {name: np.roll(archive[name], 1, axis=0) for name in archive.files}
    np.savez(tmp_path / "other.npz", **other)
    small.train(config, tmp_path / "run")
    for name, source in (("same", config.data.source), ("other", str(tmp_path / "other.npz"))):
        changes = {"trigger.name": "none", "poison.rate": 0.0, "data.source": source}
        small.train(small.with_fields(config, **changes), tmp_path / name)
    found = trained_lib.evaluate(tmp_path / "run", clean=tmp_path / "same")
    assert any(row["metric"] == "cad" for row in found.rows)
    with pytest.raises(PmoeError, match=r"^CAD: .*other was trained on other images than run"):
        trained_lib.evaluate(tmp_path / "run", clean=tmp_path / "other")
    tally.add("mismatches")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.width": 2}, r"model\.width: 1 -> 2"),
        ({"num_seeds": 4}, r"num_seeds: 2 -> 4"),  # S = 4 from S = 2: refused
        ({"num_seeds": 1}, r"num_seeds: 2 -> 1"),
        ({"poison.rate": 0.2}, r"poison\.rate: 0\.1 -> 0\.2"),
        ({"train.learning_rate": 0.2}, r"train\.learning_rate: 0\.1 -> 0\.2"),
    ],
)
def test_another_config_does_not_go_on(changes, said, config, killed):
    before = contents(killed)
    with pytest.raises(PmoeError, match=f"holds a run with another config .*{said}"):
        small.train(small.with_fields(config, **changes), killed)
    assert contents(killed) == before
    tally.add("mismatches")


def other_data(tiny_arrays, classes=4, side=16, name="npz", roll=0):
    (images, labels), (test_images, test_labels) = tiny_arrays
    made = [(np.ascontiguousarray(i[:, :side, :side]), np.roll(np.arange(len(y)) % classes, roll))
            for i, y in ((images, labels), (test_images, test_labels))]  # fmt: skip
    return dataset_lib.make(name, *made)


@pytest.mark.parametrize(
    ("data", "said"),
    [({"roll": 1}, "was begun with another dataset"), ({"classes": 5}, "another dataset"),
     ({"side": 8}, "another dataset")],
)  # fmt: skip
def test_other_data_do_not_go_on(data, said, config, killed, tiny_arrays):
    before = {name: text for name, text in contents(killed).items() if "checkpoints" in str(name)}
    with pytest.raises(PmoeError, match=said) as caught:
        small.train(config, killed, dataset=other_data(tiny_arrays, **data))
    assert "\n" not in str(caught.value)
    after = contents(killed)
    assert {name: after[name] for name in before} == before
    small.train(config, killed)  # with its own data it does
    tally.add("mismatches")


def test_other_classes_are_not_evaluated(killed, tiny_arrays):
    with pytest.raises(PmoeError, match="does not fit its config and data set"):
        trained_lib.evaluate(killed, dataset=other_data(tiny_arrays, classes=5))
    tally.add("mismatches")


def list_again(path):
    """Brings the manifest up to date with altered files."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest:
        if " " not in manifest[name]:
            manifest[name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_of_another_format_is_refused(config, killed):
    for step in (6, 8):
        meta = killed / "checkpoints" / str(step) / "meta" / "metadata"
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 2}))
    list_again(killed)
    with pytest.raises(PmoeError, match="has format 2; this version reads format 1"):
        small.train(config, killed)
    tally.add("mismatches")


@pytest.mark.parametrize("device", ["cuda:0", "TPU_3(process=1,(1,0,0,1))"])
def test_a_checkpoint_of_another_device_is_read_here(device, config, killed, tmp_path):
    """Written on a GPU or TPU, as its files say, and gone on with on a CPU."""
    shutil.copytree(killed, tmp_path / "twin" / "run")
    found = 0
    for path in killed.rglob("_sharding"):
        text = path.read_text()
        found += "cpu:0" in text
        path.write_text(text.replace("cpu:0", device))
    assert found
    list_again(killed)
    for path in (killed, tmp_path / "twin" / "run"):
        small.train(config, path)
    harness.assert_bit_equal(small.restored(killed), small.restored(tmp_path / "twin" / "run"))
    tally.add("mismatches")


# --- two processes --------------------------------------------------------------------------------

HOLD = textwrap.dedent("""
    import signal, sys
    signal.alarm(200)  # It ends by itself, whatever becomes of the test.
    from pmoe_jax.rundir import RunDirectory
    with RunDirectory(sys.argv[1]):
        print("locked", flush=True)
        signal.pause()
""")


def test_a_second_process_is_refused_until_the_first_is_dead(config, killed, tmp_path):
    """The lock is the owner's life: after SIGKILL it is free, though its file is still there."""
    before = contents(killed)
    owner = subprocess.Popen([sys.executable, "-c", HOLD, killed], stdout=subprocess.PIPE)
    try:
        assert owner.stdout.readline() == b"locked\n"
        with pytest.raises(PmoeError, match="is in use by another process"):
            small.train(config, killed)
        assert contents(killed) == before
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert (killed / ".lock").exists()
    small.train(config, killed)
    tally.add("second processes refused")


@pytest.mark.slow
def test_many_at_once_train_it_once(tmp_path, tiny_npz, tmp_path_factory):
    """Five processes begin at the same moment: one trains, four are refused, nothing is doubled."""
    env = harness.environment(tmp_path_factory.mktemp("cache"))
    words = [
        "train", "--noprogress", f"--workdir={tmp_path / 'run'}", "--config.data.name=npz",
        f"--config.data.source={tiny_npz}", "--config.data.image_size=16", "--config.num_seeds=1",
        "--config.model.width=1", "--config.model.num_experts=2",
        "--config.model.patches_per_expert=4", "--config.train.epochs=2",
        "--config.train.batch_size=16", "--config.evaluation.batch_size=40",
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(harness.Process(words, env)) for _ in range(5)]
        ends = [(process.code(), process.said()) for process in processes]
    codes = [code for code, _ in ends]
    refused = [said for code, said in ends if code == 2]
    assert codes.count(0) >= 1 and codes.count(0) + len(refused) == 5, ends
    assert all("is in use by another process" in said for said in refused)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2
    tally.add("second processes refused", len(refused))


def test_the_lock_is_of_the_directory_whatever_it_is_called(config, killed, tmp_path):
    (tmp_path / "link").symlink_to(killed)
    with RunDirectory(killed), pytest.raises(PmoeError, match="in use by another process"):
        small.train(config, tmp_path / "link")
