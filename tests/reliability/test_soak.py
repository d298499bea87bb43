"""A sample of the soak, in seconds: threads, open files and disk; memory needs the whole."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import small
import soak

from pmoe_jax import launch, run

MEASURES = (*soak.AN_HOUR, *soak.IN_ALL)


def line(hours, **measures):
    """Rounds in which measures grow by so much an hour, after a first fifth that jumps."""
    rounds = []
    for index in range(50):
        at = {
            "minute": 60 * hours * index / 50,
            **dict.fromkeys(MEASURES, 7.0),
        }
        jump = 0 if index < 10 else 1000
        rounds.append(at | {n: jump + v * hours * index / 50 for n, v in measures.items()})
    return rounds


def test_slopes_leave_the_warming_up_out():
    found = soak.slopes(line(0.5, in_use_mib=120.0, threads=-3.0))
    assert found["in_use_mib"] == pytest.approx((120, 120 * 0.5 / 50))
    assert found["threads"] == pytest.approx((-3, -3 * 0.5 / 50))
    assert found["files"] == pytest.approx((0, 0), abs=1e-6)
    risen = soak.rises(line(2, memory_mib=100.0, threads=-3.0))
    # Levels are medians of five rounds: those of the last and of the first five are 35 apart.
    assert risen["memory_mib"] == pytest.approx(200 * 35 / 50) and risen["threads"] == 0


def test_only_what_stays_has_risen():
    rounds = line(1)
    for index in (20, 21, 40):
        rounds[index]["disk_kib"] += 500
    assert soak.rises(rounds)["disk_kib"] == 0
    for index in range(30, 33):
        rounds[index]["disk_kib"] += 80  # More than half of a tenth of the rounds.
    assert soak.rises(rounds)["disk_kib"] == 80


IN_USE = """
import gc, sys, psutil
sys.path.insert(0, sys.argv[1])
import soak
process = psutil.Process()
for make in (lambda: b"x" * 2**26, lambda: [str(n) for n in range(10**6)]):
    before = soak.memory(process)["in_use_mib"]
    held = make()
    grown = soak.memory(process)["in_use_mib"] - before
    del held
    gc.collect()
    print(grown, soak.memory(process)["in_use_mib"] - before)
blocks = [b"x" * 10**5 for _ in range(1000)]  # too small for pages of their own
held, before = blocks[::2], soak.memory(process)
del blocks
after = soak.memory(process)
print(*(before[name] - after[name] for name in ("memory_mib", "in_use_mib")))
"""


GIVES_BACK = """
import gc, sys, psutil
sys.path.insert(0, sys.argv[1])
import soak
from pmoe_jax import launch
process = psutil.Process()
blocks = [b"x" * 10**5 for _ in range(1000)]
held = blocks[::2]
del blocks
gc.collect()
before = soak.memory(process)
launch.give_back_memory()
after = soak.memory(process)
print(*(before[name] - after[name] for name in ("memory_mib", "in_use_mib")))
"""


def alone(code, **variables):
    """Figures that a new process prints, by line: this one has holes where new objects fit in."""
    words = [sys.executable, "-c", code, str(pathlib.Path(soak.__file__).parent)]
    env = {**os.environ, **variables}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=True)
    return [[float(figure) for figure in line.split()] for line in done.stdout.splitlines()]


def test_what_is_in_use_is_known():
    """Of the C allocator's memory and of Python's own, but not what was given back."""
    *held, (resident, in_use) = alone(IN_USE)
    assert all(grown > 50 and left < 15 for grown, left in held) and len(held) == 2
    assert in_use == pytest.approx(48, abs=5) and resident < 5


def test_holes_are_given_back():
    """In a process like the command's, which has one heap."""
    [(resident, in_use)] = alone(GIVES_BACK, GLIBC_TUNABLES=launch.MALLOC)
    assert resident > 40 and in_use == pytest.approx(0, abs=3)


@pytest.mark.parametrize(("seconds", "calls"), [(0, 3), (1000, 0)])
def test_training_gives_holes_back_at_most_so_often(
    seconds, calls, tiny_config, tmp_path, monkeypatch
):
    small.use(monkeypatch)
    monkeypatch.setattr(run, "GIVE_BACK_SECONDS", seconds)
    given = []
    monkeypatch.setattr(launch, "give_back_memory", lambda: given.append(1))
    config = small.with_fields(tiny_config, **{"train.epochs": 3})
    run.train(config, tmp_path / "run", progress=False)
    assert len(given) == calls


@pytest.mark.parametrize(
    ("name", "growth", "hours", "too_much"),
    [("in_use_mib", 99.0, 1, []), ("in_use_mib", 101.0, 1, ["in_use_mib"]),
     ("memory_mib", 140.0, 1, []), ("memory_mib", 145.0, 1, ["memory_mib"]),
     ("threads", 2.0, 1, []), ("threads", 3.0, 1, ["threads"]),
     ("files", 2.0, 0.2, ["it ended after 11.8 of 30 minutes"])],
)  # fmt: skip
def test_the_command_fails_if_something_grows_too_fast(
    name, growth, hours, too_much, tmp_path, monkeypatch
):
    def pretend(config, folder, over):
        folder.mkdir()
        return [{**e, "step": 1, "figures_kib": 1} for e in line(hours, **{name: growth})]

    monkeypatch.setattr(launch, "use_compilation_cache", lambda: None)
    monkeypatch.setitem(soak.KINDS, "long", pretend)
    words = ["--minutes=30", "--sessions=long", f"--output={tmp_path}"]
    assert soak.main(words) == len(too_much)
    summary = json.loads((tmp_path / "soak.json").read_text())
    assert summary["too_much"] == too_much and summary["rounds"] == len(summary["measured"])
    assert summary["grown"][f"{name} an hour"] == pytest.approx(growth)
    assert (tmp_path / "soak.png").stat().st_size > 1000


@pytest.mark.parametrize("sessions", soak.KINDS)
def test_nothing_grows_within_seconds(sessions, tiny_config, tmp_path, monkeypatch):
    """Rounds of some steps, each trained, interrupted, evaluated and resumed; or of an epoch."""
    small.use(monkeypatch)
    config = small.with_fields(small.attacked(tiny_config), **{"train.epochs": 1000})
    options = {"steps": 8} if sessions == "short" else {}
    go_round = soak.KINDS[sessions]
    rounds = go_round(config, tmp_path / "run", lambda rounds: len(rounds) == 5, **options)
    assert len(rounds) == 5 and rounds[-1]["step"] > 24
    for name in ("threads", "files", "disk_kib"):
        grown = rounds[-1][name] - rounds[1][name]
        assert grown <= soak.IN_ALL[name], (name, rounds)
    assert rounds[-1]["figures_kib"] > rounds[1]["figures_kib"]  # It is measured while it works.
