"""Trains, evaluates and checkpoints on digits for half an hour, and watches what grows.

python tests/reliability/soak.py --minutes=30 --output=runs/soak

One process goes round: it trains some epochs (an evaluation and a checkpoint after each), is
interrupted as by SIGTERM, evaluates the checkpoint, and goes on. After each round memory, threads,
open files and disk are measured; the first fifth of the time is warming up. The exit code says
whether anything grew beyond what is allowed below. Writes soak.json and soak.png.
"""

import argparse
import contextlib
import gc
import json
import os
import pathlib
import shutil
import signal
import sys
import time

#: What may be added after warming up: resident memory, threads, open files, and disk besides the
#: figures, which grow by what an epoch writes.
ALLOWED = {"memory_mib": 100, "threads": 2, "files": 2, "disk_kib": 64}
STEPS_A_ROUND = 60


def measure(process, folder):
    """Memory [MiB], threads, open files, disk [KiB] of a run without its figures."""
    gc.collect()
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    grows = ("metrics.jsonl", "training.jsonl", "provenance.json")
    disk = sum(size for path, size in sizes.items() if path.name not in grows)
    return {
        "memory_mib": process.memory_info().rss / 2**20,
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "disk_kib": disk / 2**10,
        "figures_kib": (sum(sizes.values()) - disk) / 2**10,
    }


def soak(minutes, output):
    """Goes round until the time is up; returns a measurement a round."""
    import psutil

    from pmoe_jax import config as config_lib
    from pmoe_jax import launch, run

    launch.use_compilation_cache()
    config = config_lib.default()
    config.update_from_flattened_dict({
        "num_seeds": 1, "model.width": 1, "model.bn_momentum": 0.9, "train.batch_size": 32,
        "train.epochs": 100_000, "evaluation.batch_size": 180, "trigger.name": "square",
        "poison.rate": 0.1, "train.learning_rate": 0.01, "checkpoint.every_steps": 10,
    })  # fmt: skip
    folder, process = output / "run", psutil.Process()
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier soak
    begun, rounds = time.monotonic(), []
    while time.monotonic() < begun + 60 * minutes:
        first = []

        def watch(done, total, first=first):
            first.append(done)
            if len(first) == STEPS_A_ROUND:
                os.kill(os.getpid(), signal.SIGTERM)

        with contextlib.suppress(run.Interrupted):
            run.train(config, folder, progress=False, watch=watch)
        evaluated = run.evaluate(folder)
        rounds.append({
            "minute": (time.monotonic() - begun) / 60, "step": first[-1],
            "ba": next(row["value"] for row in evaluated.rows if row["metric"] == "ba"),
            **measure(process, folder),
        })  # fmt: skip
        print(json.dumps(rounds[-1]), flush=True)
    return rounds


def growth(rounds):
    """Of each measure: the mean of the last fifth less that of the second."""
    fifth = max(1, len(rounds) // 5)
    early, late = rounds[fifth : 2 * fifth] or rounds[:1], rounds[-fifth:]

    def mean(part, name):
        return sum(entry[name] for entry in part) / len(part)

    return {name: mean(late, name) - mean(early, name) for name in ALLOWED}


def draw(rounds, path):
    """Every measure over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = {"memory_mib": "resident memory [MiB]", "threads": "threads", "files": "open files",
              "disk_kib": "disk without figures [KiB]", "figures_kib": "figures [KiB]"}  # fmt: skip
    figure = Figure(figsize=(6, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, title) in zip(figure.subplots(len(titles), sharex=True), titles.items(),
                                   strict=True):  # fmt: skip
        axis.plot([e["minute"] for e in rounds], [e[name] for e in rounds], color="#2a6f97")
        axis.set_ylim(0, 1.15 * max(e[name] for e in rounds))
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("minutes")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/soak"))
    options = parser.parse_args()
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    import tally

    rounds = soak(options.minutes, options.output)
    grown = {name: round(value, 1) for name, value in growth(rounds).items()}
    too_much = {name: value for name, value in grown.items() if value > ALLOWED[name]}
    summary = {"minutes": options.minutes, "rounds": len(rounds), "steps": rounds[-1]["step"],
               "grown": grown, "allowed": ALLOWED}  # fmt: skip
    text = json.dumps({**summary, "measured": rounds}, indent=1)
    (options.output / "soak.json").write_text(text + "\n")
    draw(rounds, options.output / "soak.png")
    tally.add("soak: minutes", options.minutes, losses=len(too_much), rounds=len(rounds), **grown)
    print(json.dumps(summary), flush=True)
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
