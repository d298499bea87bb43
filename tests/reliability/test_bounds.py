"""Memory that strangers' files can take: measured in a process of its own, for each file that is
small on disk and would be large in memory."""

import gzip
import json
import os
import struct
import subprocess
import sys
import tarfile
import textwrap
import weakref

import pytest
import small
import tally
from test_strangers import reseal

from pmoe_jax import config as config_lib
from pmoe_jax import data, inputs, memory
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import archives
from pmoe_jax.errors import PmoeError
from pmoe_jax.rundir import RunDirectory

TESTS = os.path.dirname(small.__file__)


def said(imports, work, folder, most=100, before=""):
    """What `work` says to an address space of 2 GiB more than it begins with.

    It may take `most` MiB; `before` it is what is not measured.
    """
    lines = [
        "import resource", "from pmoe_jax.errors import PmoeError", *imports.splitlines(),
        "def peak():",
        "    status = open('/proc/self/status').read()",
        "    return int(status.split('VmHWM:')[1].split()[0]) / 1024",
        *textwrap.dedent(before).splitlines(),
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**31",
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))",
        "begin = peak()",
        "try:",
        f"    {work}",
        "except PmoeError as error:",
        "    print(f'PmoeError: {error}')",
        f"assert peak() - begin < {most}, f'{{peak() - begin}} MiB were taken'",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=folder,
        timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tally.add("strangers' files")
    return done.stdout + done.stderr


# --- figures and descriptions ---------------------------------------------------------------------

READ = "import pathlib\nfrom pmoe_jax import rows, rundir"
LINE = b'{"epoch": 1}\n'
FIGURES = {
    "a hole": (b"", 200 * 2**20, "line 1 of rows.jsonl is damaged"),
    "a larger hole": (b"", 2 * 10**9, "larger than the limit of 268435456 bytes"),
    "lists": (LINE + b'{"epoch": 1, "x": [' + b"[]," * 5000 + b"[]]}\n", 0, "line 2 of"),
    "a long line": (LINE + b'{"epoch": 1, "x": "' + b"x" * 2**25 + b'"}\n', 0, "line 2 of"),
    "fields": (json.dumps({"epoch": 1, **dict.fromkeys(map(str, range(64)))}).encode() + b"\n",
               0, "line 1 of"),
    "short lines": (LINE * (2**16 + 1), 0, "rows.jsonl has more lines than the limit of 65536"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIGURES)
def test_figures(kind, tmp_path):
    content, size, expected = FIGURES[kind]
    (tmp_path / "rows.jsonl").write_bytes(content)
    if size:
        os.truncate(tmp_path / "rows.jsonl", size)
    found = said(READ, "rows.read_lines(pathlib.Path('rows.jsonl'))", tmp_path,
                 before="rows.COUNT_LIMIT = 2**16")  # fmt: skip
    assert found.startswith("PmoeError: ") and expected in found
    assert found.count("\n") == 1


def test_figures_up_to_a_listed_length(tmp_path):
    """The sum of a beginning, whose length the manifest says, is not made of it as a whole."""
    (tmp_path / "metrics.jsonl").touch()
    os.truncate(tmp_path / "metrics.jsonl", 250 * 2**20)
    listed = {"metrics.jsonl": f"{'0' * 64} of the first {250 * 2**20} bytes"}
    (tmp_path / "manifest.json").write_text(json.dumps(listed))
    found = said(READ, "rundir.RunDirectory('.').rows()", tmp_path)
    assert "does not match its SHA-256 sum" in found


@pytest.mark.parametrize("ends", ['{"epoch": 2, "val', '{"epoch": 2}', ""])
def test_a_torn_last_line_is_left_out(ends, tmp_path):
    from pmoe_jax.rows import read_lines

    (tmp_path / "rows.jsonl").write_text('{"epoch": 1}\n' + ends)
    assert read_lines(tmp_path / "rows.jsonl") == [{"epoch": 1}]


@pytest.mark.parametrize("part", ["[],", "{},", "1,", '{"a":1},', "[["])
def test_json_of_many_values(part, tmp_path):
    """Less than the limit of bytes, which would be parsed to up to 400 MiB."""
    text = "[" + part * (15 * 2**20 // len(part)) + "1]"
    (tmp_path / "config.json").write_text(text)
    found = said("import pathlib\nfrom pmoe_jax import config",
                 "config.from_json(pathlib.Path('config.json'))", tmp_path)  # fmt: skip
    assert "config.json cannot be read as JSON (it holds more than the limit of 1048576" in found


def test_the_largest_run_stays_below_the_limits():
    config = config_lib.default()
    config.update_from_flattened_dict({
        "num_seeds": 10_000, "trigger.name": "blend", "trigger.pattern_path": "x" * 100,
    })  # fmt: skip
    members = run_lib.members_lib.from_config(config)
    text = json.dumps([member.to_json() for member in members], indent=2)
    assert len(text) < config_lib.JSON_LIMIT / 2
    assert sum(map(text.count, ",[{")) < config_lib.JSON_VALUES / 2


# --- archives -------------------------------------------------------------------------------------

TREE = "from pmoe_jax.data import archives"


def block(name, kind=tarfile.REGTYPE, size=0):
    """A tar header."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def holes():
    """A sparse file's header that goes on for ever."""
    head = bytearray(block("s", tarfile.GNUTYPE_SPARSE))
    head[482] = 1
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + (b"00000000001\0" * 42 + b"\1" + bytes(7)) * 100_000


TARS = {
    "empty files": (lambda: block("a") * 50_001, "more than the limit of 50000 members"),
    "folders": (lambda: block("a", tarfile.DIRTYPE) * 50_001, "more than the limit of 50000 me"),
    "holes": (holes, "has a header larger than the limit of 262144 bytes"),
    "a long name": (lambda: block("a", tarfile.GNUTYPE_LONGNAME, 2**28) + b"x" * 2**28,
                    "has a header larger than the limit of 262144 bytes"),
    "facts": (lambda: block("a", tarfile.XHDTYPE, 2**28) + b"x" * 2**28,
              "has a header larger than the limit of 262144 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TARS)
def test_tar_files(kind, tmp_path):
    make, expected = TARS[kind]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(make(), 1))
    found = said(TREE, "archives.open_tree('a.tar.gz', 2**32)", tmp_path, most=30,
                 before="archives.MEMBERS_LIMIT = 50_000")  # fmt: skip
    assert found.startswith("PmoeError: a.tar.gz has") and expected in found


def end_of(entries, size, start):
    """A zip file's last record."""
    count = min(entries, 2**16 - 1)
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 0)


@pytest.mark.parametrize(
    "reader", ["archives.open_tree('a.zip', 2**32)", "data.load('npz', 'a.zip')"]
)
@pytest.mark.parametrize("kind", ["a hole", "members"])
def test_directories_of_zip_files(kind, reader, tmp_path):
    with open(tmp_path / "a.zip", "wb") as file:
        if kind == "a hole":
            file.truncate(2**30)
            file.seek(2**30)
            file.write(end_of(1, 2**30, 0))
        else:
            # Whatever count the end declares.
            entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, *[0] * 8, 1, *[0] * 6)
            size = sum(file.write((entry + b"a") * 10_000) for _ in range(101))
            file.write(end_of(1, size, 0))
    found = said(TREE + ", dataset, files\nfrom pmoe_jax import data", reader, tmp_path, most=200)
    limit = "134217728 bytes" if kind == "a hole" else "1000000 members"
    assert found.startswith("PmoeError: a.zip has") and f"limit of {limit}" in found


def test_usual_archives_are_read(tmp_path):
    """Long names and folders need headers of their own."""
    files = {"x" * 300: b"1", "d/y": b"", "d/" + "z" * 90: bytes(10**5)}
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name in files:
            (tmp_path / "file").write_bytes(files[name])
            archive.add(tmp_path / "file", name)
        archive.add(tmp_path, "folder", recursive=False)
    tree = archives.open_tree(str(tmp_path / "a.tar.gz"), 10**6)
    assert {name: tree.read(name) for name in tree.names} == files


# --- runs -----------------------------------------------------------------------------------------


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


def test_a_batch_size_that_a_config_brings(trained, monkeypatch, capfd):
    """Images are taken fewer at a time; the figures are the same."""
    expected = trained_lib.evaluate(trained).rows
    assert "images (evaluation.batch_size)" not in capfd.readouterr().err
    config = json.loads((trained / "config.json").read_text())
    config["evaluation"]["batch_size"] = 65536
    (trained / "config.json").write_text(json.dumps(config))
    reseal(trained)
    monkeypatch.setattr(memory, "_FITTING", weakref.WeakKeyDictionary())
    monkeypatch.setattr(memory, "device_memory", lambda: 200_000)
    assert trained_lib.evaluate(trained).rows == expected
    err = capfd.readouterr().err
    assert err.count("batches of 40 images (evaluation.batch_size) would take more than") == 1
    monkeypatch.setattr(memory, "_FITTING", weakref.WeakKeyDictionary())
    monkeypatch.setattr(memory, "device_memory", lambda: 2000)
    with pytest.raises(PmoeError, match=r"a single image needs .* on a larger machine"):
        trained_lib.evaluate(trained)
    tally.add("strangers' files", 2)


EVALUATION = """
import numpy as np
import small
from pmoe_jax import config, members, memory, training
from pmoe_jax import trained as trained_lib
"""


def test_memory_of_an_evaluation(tmp_path):
    """20,000 images of 48 KiB as the model sees them, twice for the clean and triggered."""
    before = """
        training.build_model = lambda config, classes: small.Small(classes)
        memory.device_memory = lambda: 2**28
        config = config.default()
        config.update_from_flattened_dict({
            "num_seeds": 1, "trigger.name": "square", "evaluation.batch_size": 65536})
        made, labels = members.from_config(config), np.zeros(20_000, np.int32)
        images = np.broadcast_to(np.uint8(7), (20_000, 64, 64, 3))
        programs = training.programs_of(config, 10, training.plan_of(config, 20_000))
        state = programs.init(made, (64, 64, 3))
        attack = members.attacks(made, labels, (64, 64, 3), {})
        common = dict(run="r", dataset="d", epoch=1)
        def evaluate(count):
            return trained_lib.rows_of(
                config, made, programs, state, attack, images[:count], labels[:count], **common)
        evaluate(8)  # compiles, which takes memory as well
    """
    found = said(EVALUATION.strip(), "print(len(evaluate(20_000)))", tmp_path, 500, before)
    assert "note: batches of 20000 images (evaluation.batch_size) would take more" in found


def test_a_huge_array_file_is_not_summed(trained, tmp_path):
    """A hole of a terabyte, which would take an hour; in a copy that lists it."""
    run = RunDirectory(trained)
    victim = next((trained / "checkpoints/12/state/d").iterdir())
    whole = victim.stat().st_size
    os.truncate(victim, 2**40)
    try:
        assert run.damage(12).startswith(f"{victim} is too large: checkpoint 12 can have ")
        with pytest.raises(PmoeError, match="is too large: checkpoint 12 can have"):
            trained_lib.evaluate(trained, step=12)
        os.truncate(victim, 2**29)  # less than the free memory, but more than the model needs
        with pytest.raises(PmoeError, match="is too large: checkpoint 12 can have"):
            trained_lib.evaluate(trained, step=12)
    finally:
        os.truncate(victim, whole)
    assert run.damage(12) is None
    tally.add("strangers' files")


def test_too_many_patches_are_refused_before_images_are_read(monkeypatch):
    def read(*unused, **options):
        raise AssertionError("images were read")

    monkeypatch.setattr(data, "load", read)
    config = config_lib.default()
    config.model.patches_per_expert = 65
    for name in ("digits", "cifar10", "gtsrb", "folder"):
        config.data.name = name
        with pytest.raises(PmoeError, match="=65 exceeds the 64 patches of 32x32 images; choose"):
            inputs.load_data(config, "" if name == "digits" else "somewhere")
    for fields in ({"data.name": "npz"}, {"model.name": "wide_resnet"}, {"data.image_size": 33}):
        with pytest.raises(AssertionError, match="images were read"):
            inputs.load_data(small.with_fields(config, **fields), "somewhere")
