"""The command line: help, flags, and one clear line for every mistake."""

import contextlib
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from locations import ROOT

from pmoe_jax import cli, launch, signals
from pmoe_jax import config as config_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.members import from_config
from pmoe_jax.rundir import RunDirectory

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def pmoe(monkeypatch, tmp_path, capfd):
    """pmoe(*argv) -> (exit code, stdout, stderr); runs in an empty folder, "w" is the workdir."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pmoe"])

    def call(*argv):
        capfd.readouterr()
        code = cli.main([str(word) for word in argv])
        return code, *capfd.readouterr()

    return call


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0), (["help"], 0)])
def test_usage_names_every_command(pmoe, argv, code):
    got, out, err = pmoe(*argv)
    assert got == code and not err
    assert len(cli._commands()) == 7
    for command in cli._commands():
        assert f"\n  {command}  " in out


def test_train_help_lists_every_field_with_default_range_and_meaning(pmoe):
    code, out, err = pmoe("train", "--help")
    assert code == 0 and not err
    assert "--workdir" in out and "--[no]progress" in out
    for name, field in config_lib.FIELDS.items():
        line = f"  --config.{name}={field.default!r}  {field.meaning} ({field.allowed})\n"
        assert line in out, name


@pytest.mark.parametrize(
    ("command", "words"),
    [("evaluate", ["--checkpoint", "--clean", "--trigger", "--[no]json", "--[no]csv"]),
     ("data", ["show", "prepare", "--source"]),
     ("sweep", ["--config", "--workdir", "--[no]append", "--[no]dry_run", "--launcher"]),
     ("report", ["--output"]),
     ("defend", ["--checkpoint", "--workdir", "--members", "--config.prune.rates="]),
     ("analyze", ["--checkpoint", "--clean", "--defended", "--figures"])],
)  # fmt: skip
def test_help_of_the_other_commands(pmoe, command, words):
    code, out, err = pmoe(command, "--help")
    assert code == 0 and not err
    for word in words:
        assert word in out


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_holds_no_dump_of_a_config(pmoe, command):
    _, out, _ = pmoe(command, "--help")
    assert "ConfigDict" not in out and "a1_near_black_square: false" not in out


def test_help_wins_over_other_mistakes(pmoe):
    code, out, _ = pmoe("evaluate", "--checkpoint=nowhere", "--nonsense", "--help")
    assert code == 0 and "--checkpoint" in out


# --- mistakes -----------------------------------------------------------------------------------

TRAIN = ["train", "--workdir=w", "--noprogress"]
SQUARE = ["--config.trigger.name=square", "--config.poison.rate=0.1"]
NPZ = [*TRAIN, "--config.data.name=npz"]

CONFIG_FILES = {
    "typo.py": "from pmoe_jax import config\ndef get_config():\n"
    "    c = config.default()\n    c.model.widht = 2\n    return c\n",
    "syntax.py": "def get_config(:\n",
    "empty.py": "",
    "none.py": "def get_config():\n    return None\n",
    "dict.py": "def get_config():\n    return {'seed': 0}\n",
    "range.py": "from pmoe_jax import config\ndef get_config():\n"
    "    c = config.default()\n    c.train.epochs = 0\n    return c\n",
    "import.py": "import no_such_package\n",
    "preset.py": "def get_config(preset=''):\n    raise ValueError(f'no preset {preset}')\n",
}

MISTAKES = [
    # the command
    (["trian"], "unknown command 'trian'; choose one of train, evaluate, "),
    (["--workdir=w"], "unknown command"),
    # flags
    (["train"], "--workdir is missing"),
    (["train", "--workdir="], "--workdir is missing"),
    (["train", "--workdir"], "workdir"),
    ([*TRAIN, "--nonsense"], "nonsense"),
    ([*TRAIN, "--progress=perhaps"], "progress"),
    ([*TRAIN, "extra"], "unexpected word 'extra'"),
    (["evaluate"], "--checkpoint is missing"),
    (["evaluate", "--checkpoint=nowhere"], "nowhere/config.json does not exist"),
    (["evaluate", "--checkpoint=nowhere", "--step=x"], "nowhere/config.json does not exist"),
    (["evaluate", "--step=x"], "step"),
    # config fields
    ([*TRAIN, "--config.model.widht=2"], "did you mean model.width?"),
    ([*TRAIN, "--config.epochs=2"], "did you mean train.epochs?"),
    ([*TRAIN, "--config.model.width=two"], "width=two is no valid int; allowed: 1 to 64"),
    ([*TRAIN, "--config.model.width=2.5"], "--config.model.width=2.5 is no valid int"),
    ([*TRAIN, "--config.model.width=0"], "model.width=0 is out of range; allowed: 1 to 64"),
    ([*TRAIN, "--config.model.width"], "model.width"),
    ([*TRAIN, "--config.model=wide_resnet"], "config field 'model' does not exist"),
    ([*TRAIN, "--config.data.crop_roi=perhaps"], "data.crop_roi"),
    ([*TRAIN, "--config.poison.rate=nan"], "poison.rate=nan is no finite number"),
    ([*TRAIN, "--config.train.learning_rate=-1"], "allowed: above 0"),
    ([*TRAIN, "--config.trigger.name=sqare"], "one of none, square, blend, warp"),
    # contradictions within the config
    ([*TRAIN, "--config.poison.rate=0.1"], "without a trigger"),
    ([*TRAIN, *SQUARE, "--config.trigger.size=40"], "larger than the image"),
    ([*TRAIN, *SQUARE, "--config.poison.source=0"], "are both 0"),
    ([*TRAIN, "--config.seed=2147483647"], "go beyond 2147483647"),
    # config files
    ([*TRAIN, "--config=missing.py"], "--config=missing.py is no file"),
    ([*TRAIN, "--config=typo.py"], "--config=typo.py failed: AttributeError"),
    ([*TRAIN, "--config=syntax.py"], "--config=syntax.py failed: SyntaxError"),
    ([*TRAIN, "--config=import.py"], "--config=import.py failed: ModuleNotFoundError"),
    ([*TRAIN, "--config=empty.py"], "--config=empty.py failed"),
    ([*TRAIN, "--config=preset.py:x"], "--config=preset.py:x failed: ValueError: no preset x"),
    ([*TRAIN, "--config=none.py"], "--config gives no ConfigDict"),
    ([*TRAIN, "--config=dict.py"], "--config gives no ConfigDict"),
    ([*TRAIN, "--config=range.py"], "train.epochs=0 is out of range"),
    # data
    ([*TRAIN, "--config.data.name=cifar"], "unknown data set 'cifar'"),
    (NPZ, "npz needs a source"),
    ([*NPZ, "--config.data.source=none.npz"], "none.npz"),
    ([*NPZ, "--config.data.source=typo.py"], "typo.py"),
    # contradictions between config, model and data; the .npz has 60 images 16x16x3 of 3 classes
    *(
        ([*NPZ, "--config.data.source=tiny.npz", "--config.train.batch_size=20", *words], said)
        for words, said in [
            (["--config.train.batch_size=61"], "larger than the 60 training images"),
            (["--config.poison.target=3"], "poison.target=3 is no class"),
            (["--config.train.epochs=1", "--config.train.warmup_epochs=0.99"],
             "train.warmup_epochs=0.99 takes all 3 steps"),
            ([*SQUARE, "--config.poison.rate=0.5", "--config.poison.source=3"],
             "poison.source=3 is no class"),
            ([*SQUARE, "--config.poison.rate=0.01"], "less than one image"),
            ([*SQUARE, "--config.poison.rate=0.5", "--config.poison.source=1"], "only 20 may be"),
            ([*SQUARE, "--config.trigger.size=17"], "17"),
            (["--config.model.patches_per_expert=17"], "patches"),
            ([*SQUARE, "--config.trigger.name=blend", "--config.trigger.pattern_path=no.png"],
             "trigger.pattern_path=no.png does not exist"),
            ([*SQUARE, "--config.trigger.name=blend", "--config.trigger.pattern_path=tiny.npz"],
             "trigger.pattern_path=tiny.npz is no readable image"),
        ]
    ),
]  # fmt: skip


@pytest.fixture(scope="session")
def beside(tmp_path_factory):
    """Files that the mistaken command lines refer to."""
    folder = tmp_path_factory.mktemp("beside")
    for name, text in CONFIG_FILES.items():
        (folder / name).write_text(text)
    images, labels = np.zeros((60, 16, 16, 3), np.uint8), np.arange(60) % 3
    np.savez(folder / "tiny.npz", train_images=images, train_labels=labels,
             test_images=images, test_labels=labels)  # fmt: skip
    return folder


@pytest.mark.parametrize(("argv", "said"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(pmoe, beside, tmp_path, argv, said):
    for path in beside.iterdir():
        (tmp_path / path.name).symlink_to(path)
    before = sorted(os.listdir())
    code, out, err = pmoe(*argv)
    assert code == 2 and not out
    assert err.startswith("pmoe: ") and err.count("\n") == 1, err
    assert said in err
    assert "Traceback" not in err
    assert [name for name in sorted(os.listdir()) if name != "__pycache__"] == before


def test_an_interrupted_command_is_one_line(pmoe, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert pmoe("train") == (130, "", "pmoe: interrupted\n")


def test_a_terminated_command_is_one_line_and_can_be_repeated(pmoe, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def terminated(argv):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr(cli, "_run", terminated)
    said = "pmoe: stopped by SIGTERM; run the same command again to go on\n"
    assert pmoe("sweep") == (75, "", said)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGTERM, (75, "pmoe: stopped by SIGTERM; run the same command again to go on\n")),
        (signal.SIGINT, (130, "pmoe: interrupted\n")),
    ],
)
def test_a_signal_is_known_in_another_exception(number, expected, pmoe, monkeypatch):
    """Python makes a RuntimeError of what is raised in `__set_name__`, libraries of all else."""
    before = signal.getsignal(number)

    class Field:
        def __set_name__(self, owner, name):
            signal.raise_signal(number)  # To this thread, not to any of the process.

    def stopped(argv):
        try:
            type("Owner", (), {"field": Field()})
        except RuntimeError as error:
            raise PmoeError(f"cannot write x ({error})") from error
        pytest.fail("it went on")

    monkeypatch.setattr(cli, "_run", stopped)
    assert pmoe("data") == (expected[0], "", expected[1])
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["atexit", "__del__"])
def test_a_signal_behind_the_end_changes_no_exit_code(number, moment):
    """The interpreter calls `atexit` before it forgets its handlers, `__del__` afterwards."""
    script = f"""
import atexit, os, sys
class Last:
    def __del__(self, kill=os.kill, own=os.getpid()):
        kill(own, {int(number)})
if {moment!r} == "atexit":
    atexit.register(os.kill, os.getpid(), {int(number)})
else:
    sys.last = Last()
from pmoe_jax import cli
sys.argv = ["pmoe", "--help"]
cli.entry_point()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done


@pytest.mark.parametrize("command", ["evaluate", "defend", "analyze", "sweep", "report"])
def test_a_path_that_cannot_be_is_one_line(command, pmoe, tmp_path):
    path = str(tmp_path / ("x" * 300))
    words = {
        "evaluate": [f"--checkpoint={path}"], "analyze": [f"--checkpoint={path}"],
        "defend": [f"--checkpoint={path}", f"--workdir={tmp_path}/out"],
        "sweep": [f"--config={ROOT}/configs/digits_grid.py", f"--workdir={path}"], "report": [path],
    }[command]  # fmt: skip
    code, _, said = pmoe(command, *words)
    assert code == 2 and said.count("\n") == 1 and "File name too long" in said


def test_a_signal_is_not_lost_in_garbage_collection(pmoe, monkeypatch):
    """Python ignores what a finaliser raises; so the signal comes again."""

    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)
            sum(range(1000))

    def terminated(argv):
        finalised = Finalised()
        del finalised
        for _ in range(500):
            time.sleep(0.01)
        return 0  # It went on.

    monkeypatch.setattr(cli, "_run", terminated)
    code, _, said = pmoe("sweep")
    assert code == 75 and "Traceback" not in said


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_not_lost_in_the_callback_of_a_weak_reference(
    number, expected, pmoe, monkeypatch
):
    """Python ignores what it raises, as JAX's caches have them."""

    def goes(reference):
        signal.raise_signal(number)
        sum(range(1000))

    def stopped(argv):
        held = frozenset({1, 2})
        reference = weakref.ref(held, goes)
        del held
        for _ in range(500):
            time.sleep(0.01)
        return 0 if reference() is None else 1  # It went on.

    monkeypatch.setattr(cli, "_run", stopped)
    hook = sys.unraisablehook
    code, _, said = pmoe("sweep")
    assert code == expected and said.count("\n") == 1 and "Traceback" not in said
    assert sys.unraisablehook is hook


@pytest.mark.parametrize(("within", "ends"), [(10.0, "whole"), (0.0, "")])
def test_a_signal_waits_for_an_import_but_not_for_ever(within, ends, pmoe, monkeypatch, tmp_path):
    """What a library in C++ does with an exception while it is imported is unknown."""
    (tmp_path / "imported.py").write_text(
        "import signal, sys, time\n"
        "sys.imported = ''\n"
        "signal.raise_signal(signal.SIGTERM)\n"
        "time.sleep(0.1)\n"
        "sys.imported = 'whole'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "imported", "", raising=False)
    monkeypatch.setattr(signals, "IMPORTS_WITHIN", within)

    def stopped(argv):
        importlib.import_module("imported")
        for _ in range(500):
            time.sleep(0.01)
        return 0  # It went on.

    monkeypatch.setattr(cli, "_run", stopped)
    monkeypatch.delitem(sys.modules, "imported", raising=False)
    assert pmoe("sweep")[0] == 75 and sys.imported == ends


def test_after_a_signal_nobody_hears_of_what_threads_waited_for(pmoe, monkeypatch):
    """As tensorstore's, for an event loop that is closed: Python says so on stderr otherwise."""

    class Broken:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    def stopped(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            Broken()

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(cli, "_run", stopped)
    code, _, said = pmoe("sweep")
    assert code == 75 and said.count("\n") == 1


# --- evaluation of what is no trained run -------------------------------------------------------


@pytest.fixture
def untrained(tmp_path):
    config = config_lib.default()
    with RunDirectory(tmp_path / "run") as run:
        run.start(config, from_config(config))
    return run.path


def test_evaluating_a_run_without_checkpoints(pmoe, untrained):
    code, out, err = pmoe("evaluate", f"--checkpoint={untrained}")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "run holds no checkpoints" in err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--trigger.nme=square", "did you mean trigger.name?"),
        ("--trigger.name=circle", "one of none, square, blend, warp"),
        ("--trigger.size=big", "--trigger.size=big is no valid int"),
        ("--quirks.a9=True", "config field 'quirks.a9' does not exist"),
        ("--trigger.alpha=0.9", "--trigger.alpha=0.9 changes nothing about the trigger none"),
        ("--quirks.a6_two_layer_experts=True", "changes nothing about the trigger"),
        ("--step=one", "step"),
        ("--config.model.width=2", "config"),
    ],
)
def test_mistaken_flags_of_evaluate(pmoe, untrained, flag, said):
    code, out, err = pmoe("evaluate", f"--checkpoint={untrained}", flag)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("pmoe: ") and said in err


def test_json_and_csv_exclude_each_other(pmoe, untrained):
    code, out, err = pmoe("evaluate", f"--checkpoint={untrained}", "--json", "--csv")
    assert (code, out) == (2, "") and "exclude each other" in err


def test_a_file_is_no_folder_for_figures(pmoe, untrained, tmp_path):
    (tmp_path / "taken").write_text("mine")
    code, out, err = pmoe(
        "evaluate", f"--checkpoint={untrained}", f"--figures={tmp_path / 'taken'}"
    )
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "cannot be a folder for figures" in err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("lock", [None, "theirs"])
@pytest.mark.parametrize(
    ("command", "holds"),
    [
        ("train", {"thesis.tex": "text"}),
        ("train", {"config.json": "text", "members.json": "[]"}),
        ("sweep", {"thesis.tex": "text"}),
        ("sweep", {"sweep.json": "[]"}),
    ],
)
def test_a_strangers_folder_stays_as_it_was(command, holds, lock, pmoe, tmp_path):
    """Also one that has files of our names, and a lock of its own."""
    grid = CONFIGS.parent / "experiments" / "baselines.py"
    words = [f"--config={grid}:smoke"] if command == "sweep" else []
    holds = {**holds, **({".lock": lock} if lock else {})}
    (tmp_path / "mine").mkdir()
    for name, text in holds.items():
        (tmp_path / "mine" / name).write_text(text)
    code, _, err = pmoe(command, f"--workdir={tmp_path / 'mine'}", "--noprogress", *words)
    assert code == 2 and err.count("\n") == 1 and "mine" in err
    found = {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()}
    assert found == holds


def test_what_changes_nothing_is_noted(pmoe, monkeypatch):
    """And is no error: training begins."""
    from pmoe_jax import run

    def train(*args, **options):
        raise PmoeError("begun")

    monkeypatch.setattr(run, "train", train)
    attack = ["--config.trigger.name=square", "--config.poison.rate=0.1"]
    _, _, err = pmoe("train", "--workdir=w", *attack, "--config.trigger.alpha=0.9")
    assert err.splitlines() == [
        "note: trigger.alpha=0.9 changes nothing with trigger.name=square; it is for blend",
        "pmoe: begun",
    ]
    assert "note" not in pmoe("train", "--workdir=w", *attack)[2]


# --- starting -----------------------------------------------------------------------------------


def test_restart_repeats_the_very_same_command(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda *words: calls.append(words))
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/pmoe", "train", "--workdir=w"])
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    launch.restart_with_allocator()
    assert not calls  # the user's own setting stands
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(launch.platform, "libc_ver", lambda: ("musl", "1.2"))
    launch.restart_with_allocator()
    assert not calls
    monkeypatch.setattr(launch.platform, "libc_ver", lambda: ("glibc", "2.36"))
    launch.restart_with_allocator()
    assert calls == [(sys.executable, [sys.executable, "/bin/pmoe", "train", "--workdir=w"])]
    assert os.environ["GLIBC_TUNABLES"] == launch.MALLOC


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])  # below and above a buffer
def test_a_reader_that_has_gone_is_no_error(argv):
    # `pmoe train --help | head -1`
    command = f"import sys; from pmoe_jax import cli; sys.exit(cli.main({argv}))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", command], stdout=write, stderr=subprocess.PIPE)
    with contextlib.suppress(OSError):
        os.close(write)
    assert done.returncode == 0 and not done.stderr
