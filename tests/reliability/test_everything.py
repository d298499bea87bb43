"""The rules of `make reliability`: nothing passes that did not run, was skipped, or once failed."""

import ast
import json
import random
import signal
import subprocess

import everything
import harness
import pytest

KILLS = {"what": "killed: train", "losses": 0}


@pytest.fixture
def output(tmp_path, monkeypatch):
    """Two parts: kills, and tests of a file."""
    test = tmp_path / "test_part.py"
    monkeypatch.setattr(everything, "PARTS", {"kill_train": [str(test)], "disks": [str(test)]})
    for name in everything.PARTS:
        test.write_text("")
        (tmp_path / f"{name}.code").write_text(everything.code(name))
    return tmp_path


def test_results_are_of_all_that_checks_are_made_of():
    """Every module of tests/ that a check of reliability imports, or one of those does."""
    folder = everything.ROOT / "tests"
    modules = {path.stem for path in folder.glob("*.py")}
    seen, todo = set(), {"conftest", *imports_of(folder.glob("reliability/*.py"))} & modules
    while todo:
        seen |= todo
        todo = imports_of(folder / f"{name}.py" for name in todo) & modules - seen
    assert {f"tests/{name}.py" for name in seen} <= set(everything.SHARED)


def imports_of(paths):
    """Names of modules that files import as a whole or from."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {*whole, *(node.module for node in nodes if isinstance(node, ast.ImportFrom))}


@pytest.fixture
def pretend(monkeypatch):
    """pretend(code, *counts) replaces pytest; returns the moments that each call asked for."""

    def install(code, *counts):
        asked = []

        def run(words, cwd, env):
            asked.append(int(env["PMOE_CRASH_MOMENTS"]))
            with open(env["PMOE_TALLY"], "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in counts)
            return subprocess.CompletedProcess(words, code)

        monkeypatch.setattr(everything.subprocess, "run", run)
        return asked

    return install


def show(output, capsys, *words):
    """Exit code and text of a run over all."""
    capsys.readouterr()
    code = everything.main([f"--output={output}", *words])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("option", ["moments", "examples", "minutes"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_nothing_passes_by_running_nothing(option, value, output, capsys):
    with pytest.raises(SystemExit):
        everything.main([f"--output={output}", f"--{option}={value}"])
    assert "must be positive" in capsys.readouterr().err
    assert not list(output.glob("*.json*"))


def test_results_of_other_code_are_put_aside(output, capsys, pretend):
    pretend(0, {**KILLS, "tried": 30})
    assert "kill_train | passed" in show(output, capsys, "--parts=kill_train")[1]
    assert asked_again(output, capsys, pretend) == []  # It passed.
    (output / "kill_train.code").write_text("0123456789ab")
    (output / "disks.json").write_text('{"passed": true}')
    asked = pretend(0, {**KILLS, "tried": 30})
    assert "| killed: train | 30 |" in show(output, capsys, "--parts=kill_train")[1]
    assert asked == [30] and (output / "of_code_0123456789ab" / "kill_train.json").exists()
    assert (output / "disks.json").exists()  # its code is as it was
    (output / "test_part.py").write_text("# another check\n")
    assert asked_again(output, capsys, pretend) == [30]


def asked_again(output, capsys, pretend):
    asked = pretend(0, {**KILLS, "tried": 30})
    show(output, capsys, "--parts=kill_train")
    return asked


def test_a_signal_that_ended_nothing_is_no_kill(output, capsys, pretend):
    """Such counts of earlier versions neither show nor keep moments from being tried."""
    old = {**KILLS, "tried": 6, "codes": {"SIGINT->0": 2, "SIGKILL->-9": 4}}
    (output / "kill_train.jsonl").write_text(json.dumps(old) + "\n")
    asked = pretend(0, {**KILLS, "tried": 6, "codes": {"SIGINT->75": 6}})
    _, said = show(output, capsys, "--moments=10", "--parts=kill_train")
    assert asked == [6]
    assert "| killed: train | 10 | 0 | codes SIGINT->75 6 SIGKILL->-9 4 |" in said
    assert "| kill_train | passed |" in said
    _, said = show(output, capsys, "--moments=11", "--show")  # ten are too few for this
    assert "| kill_train | unfinished |" in said


def test_the_harness_counts_no_signal_that_ended_nothing(monkeypatch, tmp_path):
    class Ignores:
        """A process that a signal does not disturb."""

        def __init__(self, words, env):
            self.process, self.sent = self, []
            self.send_signal = self.sent.append

        def __enter__(self):
            return self

        def __exit__(self, *unused):
            assert self.sent  # It was signalled.

        wait_for_beginning = has_begun = lambda self, out: True
        ended_within = lambda self, seconds: False  # noqa: E731
        code = cpu = lambda self: 0

    monkeypatch.setattr(harness, "Process", Ignores)
    monkeypatch.setattr(harness, "SIGNALS", (signal.SIGINT,))
    hit = harness.kill_once([], tmp_path, {}, random.Random(0), work=1)
    assert not isinstance(hit, harness.Hit)


def test_a_part_that_failed_stays_failed_until_it_passes(output, capsys, pretend):
    words = ("--parts=kill_train", "--moments=5")
    asked = pretend(1, {**KILLS, "tried": 5})  # All moments without a loss, and yet it failed.
    assert "kill_train (failed)" in show(output, capsys, *words)[1]
    asked = pretend(everything.INTERRUPTED)
    assert "kill_train (failed)" in show(output, capsys, *words)[1]
    assert asked == [1]
    asked = pretend(0, {**KILLS, "tried": 1})
    assert "| kill_train | passed |" in show(output, capsys, *words)[1]
    assert asked == [1]


@pytest.mark.parametrize("code", [everything.INTERRUPTED, -signal.SIGKILL])
def test_a_part_that_was_stopped_goes_on(code, output, capsys, pretend):
    words = ("--parts=kill_train", "--moments=5")
    pretend(code, {**KILLS, "tried": 2})
    assert "kill_train (unfinished)" in show(output, capsys, *words)[1]
    asked = pretend(0, {**KILLS, "tried": 3})
    assert "| kill_train | passed |" in show(output, capsys, *words)[1]
    assert asked == [3]


def test_after_a_loss_all_moments_are_tried_again(output, capsys, pretend):
    words = ("--parts=kill_train", "--moments=5")
    pretend(1, {**KILLS, "tried": 4}, {**KILLS, "tried": 1, "losses": 1})
    code, said = show(output, capsys, *words)
    assert code == 1 and "| kill_train | failed |" in said and "losses: 1" in said
    asked = pretend(0, {**KILLS, "tried": 5})
    assert "losses: 0" in show(output, capsys, *words)[1]
    assert asked == [5]
    assert (output / "kill_train.lost.jsonl").exists()  # what was lost is kept


def test_skipped_tests_are_no_passed_ones(output, capsys, pretend):
    """Of a real pytest; every figure in the table says what it counts."""
    test = output / "test_part.py"
    test.write_text("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no root')\n")
    code, said = show(output, capsys, "--parts=disks")
    assert "| disks | 1 skipped | 2 | failed tests of the part |" in said
    assert code == 1 and "parts that passed: 0 of 2; others: disks (1 skipped)" in said
    test.write_text("def test_a(): assert 0\ndef test_b(): pass\n")
    assert "losses: 1" in show(output, capsys, "--parts=disks")[1]
    test.write_text("def test_a(): pass\ndef test_b(): pass\n")
    code, said = show(output, capsys, "--parts=disks")
    assert "| disks | passed | 2 |" in said
    assert code == 1 and "not run: kill_train" in said
    pretend(0, {**KILLS, "tried": 30})
    assert show(output, capsys)[0] == 0


def test_every_part_that_counts_losses_says_what_they_are():
    assert set(everything.LOSSES) | set(everything.SIZES) <= set(everything.PARTS)
