"""Several processes that train one run together, on loopback with CPU collectives."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import time
from typing import NamedTuple

import bounded
import jax
import numpy as np
import pytest
from jax._src import distributed, xla_bridge
from test_mesh import command, environment, small_npz, state_of, train

from pmoe_jax import checkpoints, cli, inputs, memory, processes
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax.errors import PmoeError
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
def started(config, workdir, count=2, devices=2, *more, trouble=("", ""), words=command):
    """`count` processes that train together, as many sessions; killed in the end.

    Each has a directory of its own if `workdir` is a tuple. `trouble`: see `mesh_worker.TROUBLES`.
    `words(config, workdir, *more)` is the command.
    """
    places = workdir if isinstance(workdir, tuple) else (workdir,) * count
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(bounded.started(
                words(config, place, f"--coordinator=127.0.0.1:{port}",
                        f"--num_processes={count}", f"--process_id={number}", *more),
                env={**environment(devices), "TROUBLE": trouble[number]},
            ))
            for number, place in enumerate(places)
        ]  # fmt: skip


class Free(NamedTuple):
    """Of the host's memory."""

    available: int


def wait_for(condition, what, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def has_checkpoint(path):
    return (path / "manifest.json").exists() and bool(RunDirectory(path).whole_steps())


def own_lines(text):
    return [line for line in text.splitlines() if line.startswith("pmoe:")]


def ended(process, begin):
    """What a process wrote to stderr that ends because another one is gone."""
    _, said = process.communicate(timeout=BOUND)
    assert time.monotonic() - begin < BOUND
    assert process.returncode == processes.OTHER_IS_GONE, said[-3000:]
    (line,) = own_lines(said)
    assert "cannot go on, most likely because another one is gone" in line
    return said


def ended_with_the_first(process, begin):
    """As `ended`, if the first one is gone: JAX may notice that by itself, sooner than we do."""
    if process.wait(BOUND) == -signal.SIGABRT:
        assert time.monotonic() - begin < BOUND
        assert "JAX distributed service detected fatal errors" in process.communicate()[1]
    else:
        ended(process, begin)


def test_two_processes_train_are_killed_go_on_and_equal_one(config, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    train(config, alone, 1)

    with started(config, together) as (first, second):
        wait_for(lambda: has_checkpoint(together) or first.poll() is not None, "no checkpoint")
        assert first.poll() is None, bounded.end(first)[1][-3000:]
        second.kill()
        assert "process 0 of 2" in ended(first, time.monotonic())
    step = RunDirectory(together).whole_steps()[-1]
    assert 0 < step < 20

    # One process with as many devices goes on as well.
    single = shutil.copytree(together, tmp_path / "single")
    assert f"resuming {single} at step {step}" in train(config, single, 4)

    # Both in one row now: each process has its half of every batch. The second does not see the
    # newest checkpoint: where to go on is the first one's choice.
    mesh, trouble = "--config.train.mesh=1x4", ("", "sees damage")
    with started(config, together, 2, 2, mesh, trouble=trouble) as both:
        ends = [process.communicate(timeout=150) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends[0][1][-3000:]
    assert f"resuming {together} at step {step}" in ends[0][1]
    assert "ASR" in ends[0][0] and "ASR" not in ends[1][0]  # one table
    assert ["epoch 4: " in said for _, said in ends] == [True, False]  # one line an epoch

    one = state_of(alone, 20)
    for other in (state_of(path, 20) for path in (together, single)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), one, other)
    rows = [
        [
            (row["member"], row["epoch"], row["metric"], row["value"])
            for row in RunDirectory(p).rows()
        ]
        for p in (alone, together, single)
    ]
    assert rows[0] == rows[1] == rows[2]


def test_workdirs_that_are_not_shared_are_named(config, tmp_path):
    with started(config, (tmp_path / "one", tmp_path / "two"), 2, 1) as both:
        ends = [process.communicate(timeout=150) for process in both]
    assert [process.returncode for process in both] == [2, 2], ends
    for number, name in enumerate(("one", "two")):
        (line,) = own_lines(ends[number][1])
        assert f"{name} is not the same directory for all processes" in line


def installed(config, workdir, *more):
    """`pmoe train` as the console script runs it, with the real model."""
    python, _, _, *words = command(config, workdir, *more)
    return [python, "-c", "from pmoe_jax.cli import entry_point; entry_point()", *words]


@pytest.mark.slow
def test_the_real_model_is_trained_by_two_processes_killed_and_equals_one(config, tmp_path):
    """Of width 1, 2 experts that take 2 of 4 patches each, every batch cut into two."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    config.update_from_flattened_dict({
        "data.image_size": 8, "trigger.size": 3, "model.patches_per_expert": 2,
        "model.kernels": "plain", "train.epochs": 2,
    })  # fmt: skip
    done = bounded.run(installed(config, alone), 400, env=environment(1))
    assert done.returncode == 0, done.stderr[-3000:]
    mesh = "--config.train.mesh=1x2"
    with started(config, together, 2, 1, mesh, words=installed) as (first, second):
        wait_for(lambda: has_checkpoint(together) or first.poll() is not None, "no checkpoint", 400)
        assert first.poll() is None, bounded.end(first)[1][-3000:]
        second.kill()
        ended(first, time.monotonic())
    step = RunDirectory(together).whole_steps()[-1]
    assert 0 < step < 10
    with started(config, together, 2, 1, mesh, words=installed) as both:
        ends = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends[0][1][-3000:]
    assert f"resuming {together} at step {step}" in ends[0][1]
    one, two = state_of(alone, 10), state_of(together, 10)
    assert one["params"].keys() > {"group1", "routers", "experts"}
    both = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    largest = max(np.abs(a.astype(np.float64) - b).max() for a, b in both)
    print(f"largest difference of the real model's state: {largest:.1e}")
    assert largest < 1e-8
    assert [row["value"] for row in RunDirectory(alone).rows()] == [
        row["value"] for row in RunDirectory(together).rows()
    ]


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        (0, "dies evaluating"),
        pytest.param(0, "dies saving", marks=pytest.mark.slow),
        pytest.param(1, "dies evaluating", marks=pytest.mark.slow),
        pytest.param(1, "dies saving", marks=pytest.mark.slow),
    ],
)
def test_when_one_dies_the_other_ends(config, tmp_path, victim, moment):
    workdir = tmp_path / "run"
    if moment == "dies evaluating":
        config.evaluation.every_epochs = 1
    trouble = [moment if number == victim else "" for number in range(2)]
    with started(config, workdir, 2, 1, trouble=trouble) as both:
        assert both[victim].wait(200) == -signal.SIGKILL
        (ended_with_the_first if victim == 0 else ended)(both[1 - victim], time.monotonic())
    steps = RunDirectory(workdir).whole_steps()
    assert steps == ([2, 4] if moment == "dies evaluating" else [])
    assert all(RunDirectory(workdir).damage(step) is None for step in steps)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_one_cannot_write_its_part_all_end(config, tmp_path, victim):
    """The other waits within orbax then, and must not be waited for."""
    workdir = tmp_path / "run"
    trouble = ["no room" if number == victim else "" for number in range(2)]
    with started(config, workdir, 2, 1, trouble=trouble) as both:
        _, said = both[victim].communicate(timeout=200)
        assert both[victim].returncode == 2, said[-3000:]
        (line,) = own_lines(said)
        assert "checkpoint 2 in" in line and "cannot be written (No space left on device)" in line
        (ended_with_the_first if victim == 0 else ended)(both[1 - victim], time.monotonic())
    assert RunDirectory(workdir).whole_steps() == []


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
    ("error", "gone"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: heartbeat of a task is missing"), True),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("UNKNOWN: Error writing a file [OS error 5: EIO Input/output error]"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: cuBLAS call failed"), False),
        (jax.errors.JaxRuntimeError("UNKNOWN: cuDNN failed"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed"), True),
        (jax.errors.JaxRuntimeError("UNKNOWN: Connection reset by peer"), True),
        (ValueError("operands could not be broadcast together"), False),
        (OSError(28, "No space left on device"), False),
        (PmoeError("the processes of this run have different data"), False),
    ],
)
def test_which_errors_say_that_a_process_is_gone(monkeypatch, error, gone):
    assert not processes.peer_is_gone(error)  # There is none.
    monkeypatch.setattr(processes, "several", lambda: True)
    assert processes.peer_is_gone(error) == gone


def test_the_first_process_chooses_where_to_go_on(monkeypatch):
    """Here in another one, which does not even look."""
    further = object.__new__(checkpoints.Checkpoints)
    further._chosen = []
    monkeypatch.setattr(further, "_read", lambda step, abstract: (f"read {step}",), raising=False)
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "_said_by_first", lambda text: "")
    monkeypatch.setattr(processes, "of_first", lambda own: [4])
    assert further.restore(None) == (4, "read 4")
    monkeypatch.setattr(processes, "_said_by_first", lambda text: "all are damaged")
    with pytest.raises(PmoeError, match="all are damaged"):
        further.restore(None)


def test_processes_of_a_host_share_its_memory(monkeypatch):
    hosts = np.asarray([[1, 2], [1, 2], [1, 3]])
    monkeypatch.setattr(processes, "_on_this_host", 1)
    monkeypatch.setattr(processes, "_sums_of_all", lambda text: hosts)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Free(100))
    assert inputs._decode_up_to("auto") == 50 and memory.device_memory() == 100
    processes._count_on_this_host()
    assert processes.on_this_host() == 2
    assert inputs._decode_up_to("auto") == 25 and memory.device_memory() == 50


def test_processes_compare_all_that_figures_depend_on(tiny_config, tiny_dataset):
    members = members_lib.from_config(tiny_config)
    labels = (tiny_dataset.test_labels + 1) % 4
    other = dataclasses.replace(tiny_dataset, test_labels=labels)
    texts = {
        run_lib._described(tiny_config, members, tiny_dataset),
        run_lib._described(tiny_config, members[:1], tiny_dataset),
        run_lib._described(tiny_config, members, other),
    }
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--num_processes=2"], "belong together"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "has 0 to 1|have 0 to 1"),
        (["--coordinator=h", "--num_processes=2", "--process_id=1"], "must be HOST:PORT"),
        (["--coordinator=h:99999", "--num_processes=2", "--process_id=1"], "from 1 to 65535"),
        (["--coordinator=h:1", "--num_processes=0", "--process_id=0"], "num_processes=0 must be"),
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


def test_a_port_that_is_taken_is_refused_before_jax_crashes(config, tmp_path, capsys):
    source = f"--config.data.source={config.data.source}"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=0"]
        code = cli.main(
            ["train", f"--workdir={tmp_path / 'w'}", "--config.data.name=npz", source, *flags]
        )
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"port {port} of this host cannot be served (Address already in use)" in line


def test_a_batch_script_of_slurm_is_a_single_process(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert processes._launched() == 1
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert processes._launched() == 4
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert processes._launched() == 3


#: Of srun, in one of four tasks.
STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_NODES": "1",
}  # fmt: skip
MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "gpus"),
    [
        ({**STEP, "CUDA_VISIBLE_DEVICES": "0"}, "all"),  # --gpus-per-task=1
        ({**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "2"),
        ({**STEP, "SLURM_STEP_NUM_NODES": "4", "SLURM_LOCALID": "0"}, "all"),  # one a host
        (STEP, "2"),
        ({**STEP, "CUDA_VISIBLE_DEVICES": "0", "JAX_LOCAL_DEVICE_IDS": "3"}, "3"),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "1"),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
    ],
)
def test_which_gpus_a_process_takes(monkeypatch, launcher, gpus):
    """What JAX makes of the environment, up to where it would connect."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "CUDA_"))]:
        monkeypatch.delenv(name)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    asked = []

    def client(*args, **options):
        asked.append(xla_bridge.CUDA_VISIBLE_DEVICES.value)
        raise RuntimeError("no connection")

    monkeypatch.setattr(distributed._jax, "get_distributed_runtime_client", client)
    monkeypatch.setattr(distributed, "global_state", distributed.State())
    # Other tests may have used JAX here before.
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    try:
        with pytest.raises(PmoeError, match="cannot be reached"), processes.joined():
            pass
    finally:
        for kind in ("cuda", "rocm"):
            jax.config.update(f"jax_{kind}_visible_devices", "all")
    assert asked == [gpus]


def test_open_mpi_that_jax_does_not_know_is_told_what_to_do(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(PmoeError, match="with Open MPI 5 give --coordinator"), processes.joined():
        pass
