"""Whatever is killed, and whenever: the same command goes on to the same end.

-m slow tries PMOE_CRASH_MOMENTS (30) moments of every command; PMOE_CRASH_SEED repeats a draw.
"""

import os
import random
import time

import harness
import numpy as np
import psutil
import pytest
from harness import Command

MOMENTS = int(os.environ.get("PMOE_CRASH_MOMENTS", "30"))
SEED = int(os.environ.get("PMOE_CRASH_SEED", time.time_ns() % 10**6))


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return harness.environment(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def fields(tiny_npz):
    """The real model at its smallest: 3 epochs of 6 steps, a checkpoint after every other."""
    return {
        "data.name": "npz", "data.source": str(tiny_npz), "data.image_size": 16, "num_seeds": 2,
        "model.width": 1, "model.num_experts": 2, "model.patches_per_expert": 4,
        "train.epochs": 3, "train.batch_size": 16, "evaluation.batch_size": 40,
        "checkpoint.every_steps": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def attacked(fields):
    attack = {"trigger.name": "square", "trigger.size": 6, "poison.rate": 0.1}
    return [f"--config.{name}={value}" for name, value in {**fields, **attack}.items()]


def train_command(attacked):
    words = ["train", "--noprogress", *attacked]
    return Command("train", lambda out: [*words, f"--workdir={out}"], harness.same_run)


@pytest.fixture(scope="module")
def make(fields, attacked, env, tmp_path_factory):
    """make(name) -> a command, with what it needs."""

    def sweep():
        path = tmp_path_factory.mktemp("sweep") / "grid.py"
        path.write_text(
            "from pmoe_jax import config, grid\n"
            "def get_config():\n"
            f"    return grid.with_fields(config.default(), {fields!r})\n"
            "def get_grid():\n"
            "    return [{'name': 'clean'}, {'trigger.name': 'square', 'trigger.size': 6, "
            "'poison.rate': 0.25}]\n"
        )
        words = ["sweep", f"--config={path}", "--max_members=2", "--noprogress"]
        return Command("sweep", lambda out: [*words, f"--workdir={out}"], harness.same_sweep)

    def defend():
        folder = tmp_path_factory.mktemp("defend")
        harness.finish(train_command(attacked).words(folder / "trained"), env)
        (folder / "config.py").write_text(
            "from pmoe_jax import defend_config\n"
            "def get_config():\n"
            "    config = defend_config.default()\n"
            "    config.prune.rates = (0.0, 0.5)\n"
            "    config.prune.curve_rates = (0.0, 0.5)\n"
            "    config.prune.images = 40\n"
            "    config.tune.update(epochs=4, batch_size=32)\n"
            "    config.tune.learning_rates = (0.05,)\n"
            "    return config\n"
        )
        words = ["defend", f"--checkpoint={folder / 'trained'}",
                 f"--config={folder / 'config.py'}", "--noprogress"]  # fmt: skip
        return Command("defend", lambda out: [*words, f"--workdir={out}"], harness.same_defence)

    def prepare():
        source = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin"
        source.mkdir()
        chance = np.random.default_rng(0)
        for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
            # Three shards; few colours, which take little time to compress.
            batch = chance.integers(0, 10, (2000, 3073), np.uint8)
            (source / f"{name}.bin").write_bytes(batch.tobytes())
        words = ["data", "prepare", "cifar10", f"--source={source}"]
        return Command("prepare", lambda out: [*words, f"--data_dir={out}"], harness.same_data)

    def command(name):
        makers = {"sweep": sweep, "defend": defend, "prepare": prepare}
        return train_command(attacked) if name == "train" else makers[name]()

    return command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "sweep", "defend", "prepare"])
def test_many_random_moments(name, make, env, tmp_path):
    print(f"PMOE_CRASH_SEED={SEED}")
    hits = harness.crash(make(name), tmp_path, env, MOMENTS, random.Random(SEED))
    assert len(hits) == MOMENTS


def test_a_random_moment(make, env, tmp_path):
    """Of training; beside it are kills of sweeps in tests/test_sweep.py, of preparing in
    tests/data/test_data_prepare.py, and all of -m slow."""
    print(f"PMOE_CRASH_SEED={SEED}")
    assert len(harness.crash(make("train"), tmp_path, env, 1, random.Random(SEED))) == 1


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path, monkeypatch):
    """What keeps these tests themselves from hanging."""
    monkeypatch.setattr(harness, "PATIENCE", 0.5)
    hangs = ["sh", "-c", "sleep 1000 & sleep 1000; true"]
    with pytest.raises(AssertionError, match="not done after"):
        harness.finish(["train"], dict(os.environ), prefix=hangs)
    with harness.Process(["train"], dict(os.environ), prefix=hangs) as process:
        with pytest.raises(AssertionError, match="wrote nothing"):
            process.wait_for_beginning(tmp_path / "run")
        group = process.process.pid
    left = [p for p in psutil.process_iter() if p.is_running() and group_of(p) == group]
    assert all(p.status() == psutil.STATUS_ZOMBIE for p in left)


def test_a_folder_that_is_renamed_meanwhile_is_no_error(tmp_path):
    for name in ("run/10.tmp/d", "run/11"):
        (tmp_path / name).mkdir(parents=True)
    seen = []
    for path in harness.everything_in(tmp_path / "run"):
        seen.append(path.name)
        if path.name == "10.tmp":
            path.rename(path.with_name("10"))
    assert sorted(seen) == ["10.tmp", "11"]


def group_of(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None
