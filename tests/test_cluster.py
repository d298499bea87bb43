"""Sweeps as jobs, through submitit's local executor."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import bounded
import psutil
import pytest
from locations import ROOT

from pmoe_jax import cli, cluster
from pmoe_jax.errors import PmoeError
from pmoe_jax.grid import Manifest

CONFIG = """
import json
from pmoe_jax import config as config_lib, grid

def get_config():
    return grid.with_fields(config_lib.default(), json.loads({fields!r}))

def get_grid():
    square = {{"name": "square", "trigger.name": "square", "poison.rate": 0.25}}
    return [{{"name": "clean"}}, square]
"""


@pytest.fixture
def sweep_file(tiny_npz, tmp_path):
    """A grid of two programs of one seed each, 2 epochs of 24 steps, a checkpoint an epoch."""
    fields = {
        "data.name": "npz", "data.source": str(tiny_npz), "data.image_size": 16, "num_seeds": 1,
        "model.width": 1, "model.num_experts": 2, "model.patches_per_expert": 4,
        "train.epochs": 2, "train.batch_size": 4, "evaluation.batch_size": 40,
        "evaluation.every_epochs": 2, "checkpoint.every_steps": 0,
    }  # fmt: skip
    path = tmp_path / "grid.py"
    path.write_text(CONFIG.format(fields=json.dumps(fields)))
    return path


def sweep(path, workdir, *more):
    program = "import sys; from pmoe_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    return bounded.started(
        [sys.executable, "-c", program, "sweep", f"--config={path}", f"--workdir={workdir}",
         "--max_members=1", *more],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def wait_for(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, bounded.end(process)[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def logs(workdir):
    return "".join(path.read_text() for path in (workdir / "jobs").glob("*_log.*"))


def test_jobs_are_preempted_go_on_and_are_collected(sweep_file, tmp_path):
    pytest.importorskip("submitit")
    workdir = tmp_path / "sweep"
    first = workdir / "runs" / "000_npz_pmoe_w1"
    job = workdir / "jobs" / f"{first.name}.json"
    with sweep(sweep_file, workdir, "--launcher=local") as running:
        # Said before the first step.
        wait_for(lambda: "a step needs" in logs(workdir) and job.exists(), running)
        # As a cluster preempts: SIGTERM, and the signal by which submitit knows it.
        (task,) = psutil.Process(int(json.loads(job.read_text())["job"])).children()
        task.send_signal(signal.SIGTERM)
        task.send_signal(preemption_signal())
        table, said = running.communicate(timeout=250)
    assert running.returncode == 0, said[-3000:]
    assert "Requeued job" in logs(workdir)
    # Not at an epoch's end: what was done was saved before the job was queued again.
    (step,) = re.findall(r"resuming .* at step (\d+)", logs(workdir))
    assert int(step) % 24
    assert "square" in table and "clean" in table
    rows = [json.loads(line) for line in (workdir / "rows.jsonl").read_text().splitlines()]
    assert {row["metric"] for row in rows} >= {"ba", "asr", "cad", "false_trigger_rate"}
    sessions = json.loads((first / "provenance.json").read_text())["sessions"]
    assert len(sessions) == 2
    # The second job found its baseline trained, and paired the program itself before it ended.
    second = workdir / "jobs" / "001_npz_pmoe_w1.json"
    (result,) = (workdir / "jobs").glob(f"{json.loads(second.read_text())['job']}_*_result.pkl")
    paired = workdir / "paired" / "001_npz_pmoe_w1.jsonl"
    assert paired.stat().st_mtime <= result.stat().st_mtime

    # All is done: nothing is submitted again.
    with sweep(sweep_file, workdir, "--launcher=local") as again:
        _, said = again.communicate(timeout=100)
    assert again.returncode == 0 and "submitted" not in said
    assert len(Manifest.read(workdir / "sweep.json").programs) == 2


@pytest.mark.parametrize(
    "answer",
    [subprocess.CalledProcessError(1, "scontrol"), subprocess.TimeoutExpired("scontrol", 60)],
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_job_that_slurm_does_not_queue_again_leaves_no_result(answer, begun):
    """submitit writes one for any error, but not for an exit."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def refuses(number, frame):
        raise answer

    try:
        signal.signal(signal.SIGUSR2, refuses)
        requeue = cluster._save_before_requeue()
        with pytest.raises(SystemExit) as ended:
            requeue() if begun else signal.getsignal(signal.SIGUSR2)(signal.SIGUSR2, None)
        assert ended.value.code == 1
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def preemption_signal():
    from submitit.core.job_environment import JobEnvironment

    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


class Executor:
    """Stands in for submitit's, with jobs that do nothing but exist."""

    cluster = "local"

    def __init__(self):
        self.jobs = []

    def submit(self, work):
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60) # submitit"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.jobs.append(process)
        process.job_id = process.pid
        return process


@pytest.fixture
def executor(monkeypatch):
    made = Executor()
    monkeypatch.setattr(cluster, "_executor", lambda *args: made)
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.02)
    yield made
    for process in made.jobs:
        process.kill()
        process.wait()


def test_jobs_run_so_many_at_a_time(executor, tmp_path):
    jobs = cluster.Jobs(tmp_path, "local", {}, ["a", "b", "c"], most=2)
    assert len(executor.jobs) == 2
    executor.jobs[0].kill()
    executor.jobs[0].wait()
    jobs.wait("a")
    assert len(executor.jobs) == 3


def test_without_a_cluster_programs_are_trained_one_by_one(executor, tmp_path):
    """submitit then starts processes on this machine, as many as it is asked for."""
    cluster.Jobs(tmp_path, "submitit", {}, ["a", "b", "c"])
    assert len(executor.jobs) == 1


def test_a_job_that_runs_is_not_submitted_again(executor, tmp_path):
    cluster.Jobs(tmp_path, "local", {}, ["a"])
    cluster.Jobs(tmp_path, "local", {}, ["a", "b"])
    assert len(executor.jobs) == 2


@pytest.mark.parametrize(
    ("script", "alive"),
    [
        ("echo '7 low pmoe root PD 0:00 1 (Priority)'", True),
        ("true", False),  # It has ended.
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
        ("exec sleep 60", True),
    ],
)
def test_a_job_of_slurm_has_ended_only_if_slurm_says_so(
    executor, tmp_path, monkeypatch, script, alive
):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(cluster, "SQUEUE_SECONDS", 2)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a.json").write_text('{"launcher": "slurm", "job": "7"}')
    cluster.Jobs(tmp_path, "slurm", {}, ["a"])
    assert len(executor.jobs) == (not alive)
    # What it leaves tells before Slurm does.
    (tmp_path / "jobs" / "a.json").write_text('{"launcher": "slurm", "job": "7"}')
    (tmp_path / "jobs" / "7_0_result.pkl").write_bytes(b"")
    cluster.Jobs(tmp_path, "slurm", {}, ["a"])
    assert len(executor.jobs) == 1 + (not alive)


def test_slurm_is_asked_once_about_all_jobs(executor, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(
        f"#!/bin/sh\necho $* >> {tmp_path}/asked\ncat {tmp_path}/queue\n"
    )
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "jobs").mkdir()
    for number in range(20):
        known = {"launcher": "slurm", "job": str(100 + number)}
        (tmp_path / "jobs" / f"p{number:02}.json").write_text(json.dumps(known))
    (tmp_path / "queue").write_text("".join(f"{100 + number}\n" for number in range(18)))
    names = [f"p{number:02}" for number in range(20)]
    jobs = cluster.Jobs(tmp_path, "slurm", {}, names, most=19)
    asked = tmp_path / "asked"
    assert len(asked.read_text().splitlines()) == 1
    assert len(executor.jobs) == 1  # p18: one of the two that have ended; beside 18 that run
    (tmp_path / "queue").write_text("101\n102\n")
    polls = []
    jobs.wait("p00", lambda: polls.append(1))
    (line,) = asked.read_text().splitlines()[1:]
    assert line.endswith("--jobs=" + ",".join(map(str, range(100, 118)))) and not polls
    assert len(executor.jobs) == 2  # p19, too
    # What has ended is not asked about again.
    jobs.wait("p03")
    assert len(asked.read_text().splitlines()) == 2

    def end():
        (tmp_path / "queue").write_text("102\n")

    jobs.wait("p01", end)
    assert [line.rpartition("=")[2] for line in asked.read_text().splitlines()[2:]] == [
        "101,102", "101,102",
    ]  # fmt: skip


def test_jobs_that_slurm_has_forgotten_are_told_apart(executor, tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\ncase $3 in --jobs=8) echo 8;; "
        "*) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1;; esac\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cluster._queued(["7", "8", "9"]) == {"8"}


def test_a_machine_without_slurms_commands_is_refused(executor, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a.json").write_text('{"launcher": "slurm", "job": "7"}')
    with pytest.raises(PmoeError, match="squeue cannot be run"):
        cluster.Jobs(tmp_path, "slurm", {}, ["a"])


def test_a_failed_job_says_why(executor, tmp_path):
    jobs = cluster.Jobs(tmp_path, "local", {}, ["a"])
    (tmp_path / "jobs" / "a.error").write_text("disk full\n")
    executor.jobs[0].kill()
    executor.jobs[0].wait()
    jobs.wait("a")
    with pytest.raises(PmoeError, match="the job of a failed: disk full"):
        jobs.raise_reason("a")


def test_options_are_words_with_values():
    assert cluster.parse_options(["timeout_min=60", "slurm_partition=gpu"]) == {
        "timeout_min": 60, "slurm_partition": "gpu",
    }  # fmt: skip
    with pytest.raises(PmoeError, match="must be NAME=VALUE"):
        cluster.parse_options(["gpu"])
    for name in ("nodes", "tasks_per_node", "slurm_ntasks_per_node"):
        with pytest.raises(PmoeError, match="a job is one process"):
            cluster.parse_options([f"{name}=2"])
    assert cluster.parse_options(["nodes=1"]) == {"nodes": 1}


def test_an_unknown_option_is_refused_before_anything_is_submitted(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(PmoeError, match=r"--launcher=local: .*no_such_option"):
        cluster.Jobs(tmp_path, "local", {"no_such_option": 1}, ["a"])


def test_a_job_names_its_program_only(tmp_path):
    """What is pickled for the cluster: two texts."""
    work = cluster.Training("/folder", "program")
    assert vars(work) == {"folder": "/folder", "name": "program"}


@pytest.mark.parametrize("option", ["--launcher_options=timeout_min=3", "--max_jobs=2"])
def test_options_of_jobs_without_a_launcher_are_refused(option, tmp_path, capsys):
    config = ROOT / "configs" / "digits_grid.py"
    assert cli.main(["sweep", f"--config={config}", f"--workdir={tmp_path / 'w'}", option]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "give --launcher=slurm" in line and not (tmp_path / "w").exists()
