"""Several processes that train one run together, on loopback with CPU collectives."""

import contextlib
import re
import signal
import socket
import time

import bounded
import jax
import numpy as np
import pytest
from test_mesh import command, environment, small_npz, state_of, train

from pmoe_jax import cli, processes
from pmoe_jax.rundir import RunDirectory

#: Seconds within which the others end when a process dies: a missing sign of life counts after
#: `processes.HEARTBEAT_SECONDS`, and it is looked for as often.
BOUND = 2 * processes.HEARTBEAT_SECONDS + 10

__all__ = ["small_npz"]  # a fixture


@pytest.fixture
def config(tiny_config, small_npz):
    """Two members, 4 epochs of 5 steps in float64, streamed; a checkpoint every other step."""
    tiny_config.data.source = str(small_npz)
    tiny_config.update_from_flattened_dict({
        "model.dtype": "float64", "train.batch_size": 8, "train.learning_rate": 0.01,
        "train.epochs": 4, "evaluation.every_epochs": 4, "checkpoint.every_steps": 2,
        "trigger.name": "square", "poison.rate": 0.25, "data.residence": "host",
    })  # fmt: skip
    return tiny_config


@contextlib.contextmanager
def started(config, workdir, count=2, devices=2, *more):
    """`count` processes that train together, as many sessions; killed in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(bounded.started(
                command(config, workdir, f"--coordinator=127.0.0.1:{port}",
                        f"--num_processes={count}", f"--process_id={number}", *more),
                env=environment(devices),
            ))
            for number in range(count)
        ]  # fmt: skip


def wait_for(condition, what, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def has_checkpoint(path):
    return (path / "manifest.json").exists() and bool(RunDirectory(path).whole_steps())


def own_lines(text):
    return [line for line in text.splitlines() if line.startswith("pmoe:")]


def test_two_processes_train_are_killed_go_on_and_equal_one(config, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    train(config, alone, 1)

    with started(config, together) as (first, second):
        wait_for(lambda: has_checkpoint(together) or first.poll() is not None, "no checkpoint")
        assert first.poll() is None, bounded.end(first)[1][-3000:]
        second.kill()
        begin = time.monotonic()
        _, said = first.communicate(timeout=BOUND)
        assert time.monotonic() - begin < BOUND
    assert first.returncode == processes.OTHER_IS_GONE, said[-3000:]
    (line,) = own_lines(said)
    assert re.match(
        r"pmoe: process 0 of 2 cannot go on, most likely because another one is gone", line
    )
    step = RunDirectory(together).whole_steps()[-1]
    assert 0 < step < 20

    # Both in one row now: each process has its half of every batch.
    with started(config, together, 2, 2, "--config.train.mesh=1x4") as both:
        ends = [process.communicate(timeout=150) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends[0][1][-3000:]
    assert f"resuming {together} at step {step}" in ends[0][1]
    assert "ASR" in ends[0][0] and "ASR" not in ends[1][0]  # one table

    one, two = state_of(alone, 20), state_of(together, 20)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), one, two)
    rows = [
        [
            (row["member"], row["epoch"], row["metric"], row["value"])
            for row in RunDirectory(p).rows()
        ]
        for p in (alone, together)
    ]
    assert rows[0] == rows[1]


def test_all_processes_save_and_stop_when_one_is_asked_to(config, tmp_path):
    workdir = tmp_path / "run"
    config.train.epochs = 20
    with started(config, workdir, 2, 1) as both:
        wait_for(lambda: has_checkpoint(workdir) or both[0].poll() is not None, "no checkpoint")
        both[1].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [75, 75], ends
    (line,) = set(own_lines(ends[0][1] + ends[1][1]))
    saved = re.search(r"stopped by SIGTERM after step (\d+), which is saved", line)
    assert saved and RunDirectory(workdir).whole_steps()[-1] == int(saved[1])


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_falls_silent_ends_the_other(config, tmp_path, silent):
    """It is stopped, so that its connections stay open: only its sign of life is missing."""
    workdir = tmp_path / "run"
    config.train.epochs = 200
    with started(config, workdir, 2, 1) as both:
        other = both[1 - silent]
        wait_for(lambda: has_checkpoint(workdir) or other.poll() is not None, "no checkpoint")
        assert other.poll() is None, bounded.end(other)[1][-3000:]
        both[silent].send_signal(signal.SIGSTOP)
        other.communicate(timeout=BOUND)
    assert other.returncode != 0
    step = RunDirectory(workdir).whole_steps()[-1]
    assert RunDirectory(workdir).damage(step) is None


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--num_processes=2"], "belong together"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "has 0 to 1|have 0 to 1"),
        (["--coordinator=h", "--num_processes=2", "--process_id=1"], "must be HOST:PORT"),
    ],
)
def test_flags_for_processes_that_make_no_sense(config, tmp_path, capsys, flags, problem):
    config.model.dtype = "float32"
    source = f"--config.data.source={config.data.source}"
    code = cli.main(
        ["train", f"--workdir={tmp_path / 'w'}", "--config.data.name=npz", source, *flags]
    )
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(problem, line)
    assert not (tmp_path / "w").exists()


def test_a_batch_script_of_slurm_is_a_single_process(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert processes._launched() == 1
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert processes._launched() == 4
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert processes._launched() == 3
