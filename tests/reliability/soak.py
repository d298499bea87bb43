"""Trains, evaluates and checkpoints on digits for half an hour, and watches what grows.

python tests/reliability/soak.py --minutes=30 --output=runs/soak [--sessions=short]

One session trains all the time, and memory, threads, open files and disk are measured after every
epoch's evaluation and checkpoint. --checkpoint_every=STEPS saves more often. --sessions=short: one
process goes round: it trains some epochs, is interrupted as by SIGTERM, evaluates the checkpoint,
and goes on; it is measured after each session. So growth by epochs, by checkpoints and by sessions
can be told apart. Defences and sweeps are not soaked.

The first fifth of the rounds (sessions, or epochs) is warming up; the exit code says whether
anything grew more than is allowed below behind it. Memory is measured twice: what is resident, and
what of it is in use, that is without the holes in the C allocator's heap. A line is fitted to what
is in use. Resident memory goes up in jumps, when large buffers find no hole, and down when holes
are given back, a pool's threads come one by one, and compressed checkpoints differ in size: a line
through these says nothing, so their level is bounded, the median over a tenth of the rounds. What
is above it for a moment and comes back has not grown. Writes soak.json, soak.png.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import pathlib
import shutil
import signal
import sys
import time

#: What may be added an hour after warming up.
AN_HOUR = {"in_use_mib": 100}
#: How far a measure's level may rise above that behind warming up; disk is without the figures,
#: which grow by what an epoch writes.
IN_ALL = {"memory_mib": 100, "threads": 2, "files": 2, "disk_kib": 64}
STEPS_A_SESSION = 60
#: Fewer measurements show nothing.
FEWEST_ROUNDS = 20


class _Books(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


def memory(process):
    """MiB that are resident, and what is in use: handed out by the C allocator, or not in its heap.

    What Python, which has its own arenas, and libraries hold counts as well; the heap's holes do
    not, whether they are resident or were given back.
    """
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Books
    resident = process.memory_info().rss
    heap = sum(region.rss for region in process.memory_maps() if region.path == "[heap]")
    return {
        "memory_mib": resident / 2**20,
        "in_use_mib": (resident - heap + mallinfo2().uordblks) / 2**20,
    }


def measure(process, folder):
    """Memory [MiB], threads, open files, disk [KiB] of a run without its figures."""
    gc.collect()
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    grows = ("metrics.jsonl", "training.jsonl", "provenance.json")
    disk = sum(size for path, size in sizes.items() if path.name not in grows)
    return {
        **memory(process),
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "disk_kib": disk / 2**10,
        "figures_kib": (sum(sizes.values()) - disk) / 2**10,
    }


def digits(checkpoint_every=0):
    """The config that is soaked."""
    from pmoe_jax import config as config_lib

    config = config_lib.default()
    config.update_from_flattened_dict({
        "num_seeds": 1, "model.width": 1, "model.bn_momentum": 0.9, "train.batch_size": 32,
        "train.epochs": 100_000, "evaluation.batch_size": 180, "trigger.name": "square",
        "poison.rate": 0.1, "train.learning_rate": 0.01, "checkpoint.every_steps": checkpoint_every,
    })  # fmt: skip
    return config


def short_sessions(config, folder, over, steps=STEPS_A_SESSION):
    """Goes round until `over(rounds)`; returns a measurement a session."""
    import psutil

    from pmoe_jax import run, trained

    begun, rounds, process = time.monotonic(), [], psutil.Process()
    while not rounds or not over(rounds):
        first = []

        def watch(done, total, first=first):
            first.append(done)
            if len(first) == steps:
                os.kill(os.getpid(), signal.SIGTERM)

        with contextlib.suppress(run.Interrupted):
            run.train(config, folder, progress=False, watch=watch)
        evaluated = trained.evaluate(folder)
        rounds.append({
            "minute": (time.monotonic() - begun) / 60, "step": first[-1],
            "ba": next(row["value"] for row in evaluated.rows if row["metric"] == "ba"),
            **measure(process, folder),
        })  # fmt: skip
        print(json.dumps(rounds[-1]), flush=True)
    return rounds


def long_session(config, folder, over):
    """Trains in one session until `over(rounds)`; returns a measurement an epoch."""
    import psutil

    from pmoe_jax import run

    begun, rounds, process = time.monotonic(), [], psutil.Process()

    def watch(done, total):
        steps = total // config.train.epochs
        if done == 1 or done % steps != 1:
            return  # The first step of an epoch comes after the evaluation of the one before.
        minute = (time.monotonic() - begun) / 60
        rounds.append({"minute": minute, "step": done, **measure(process, folder)})
        print(json.dumps(rounds[-1]), flush=True)
        if over(rounds):
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(run.Interrupted):
        run.train(config, folder, progress=False, watch=watch)
    return rounds


KINDS = {"short": short_sessions, "long": long_session}


def slopes(rounds):
    """Of each measure but for the first fifth: what it grows by an hour, and by a round."""
    import numpy as np

    kept = rounds[len(rounds) // 5 :]
    hours, numbers = [entry["minute"] / 60 for entry in kept], range(len(kept))

    def slope(over, name):
        return float(np.polyfit(over, [e[name] for e in kept], 1)[0]) if len(kept) > 2 else 0.0

    return {name: (slope(hours, name), slope(numbers, name)) for name in (*AN_HOUR, *IN_ALL)}


def rises(rounds):
    """Of each measure, how far its level got at most above that behind the first fifth."""
    import numpy as np

    kept, size = rounds[len(rounds) // 5 :], max(1, len(rounds) // 10)
    found = {}
    for name in (*AN_HOUR, *IN_ALL):
        values = np.asarray([entry[name] for entry in kept])
        windows = np.lib.stride_tricks.sliding_window_view(values, min(size, len(values)))
        levels = np.median(windows, axis=1)
        found[name] = float((levels - levels[0]).max())
    return found


def draw(rounds, path):
    """Every measure over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = {"memory_mib": "resident memory [MiB]",
              "in_use_mib": "memory in use [MiB]", "threads": "threads", "files": "open files",
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


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sessions", choices=KINDS, default="long")
    parser.add_argument("--checkpoint_every", type=int, default=0, help="steps, besides epochs")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/soak"))
    options = parser.parse_args(words)
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    import tally

    from pmoe_jax import launch

    launch.use_compilation_cache()
    shutil.rmtree(options.output / "run", ignore_errors=True)  # of an earlier soak
    go_round, end = KINDS[options.sessions], time.monotonic() + 60 * options.minutes
    rounds = go_round(
        digits(options.checkpoint_every),
        options.output / "run",
        lambda rounds: time.monotonic() > end,
    )
    found, risen = slopes(rounds), rises(rounds)
    hourly = {f"{name} an hour": round(slope, 2) for name, (slope, _) in found.items()}
    by_round = {f"{name} a round": round(slope, 3) for name, (_, slope) in found.items()}
    too_much = [name for name, most in AN_HOUR.items() if found[name][0] > most]
    too_much += [name for name, most in IN_ALL.items() if risen[name] > most]
    minutes = round(rounds[-1]["minute"], 1)
    if minutes < 0.9 * options.minutes:
        too_much.append(f"it ended after {minutes} of {options.minutes:g} minutes")
    if len(rounds) < FEWEST_ROUNDS:
        too_much.append(f"only {len(rounds)} rounds were measured")
    summary = {"minutes": minutes, "sessions": options.sessions,
               "checkpoint_every": options.checkpoint_every, "rounds": len(rounds),
               "steps": rounds[-1]["step"], "grown": {**hourly, **by_round},
               "allowed_an_hour": AN_HOUR, "risen_at_most": risen, "allowed_in_all": IN_ALL,
               "too_much": too_much}  # fmt: skip
    text = json.dumps({**summary, "measured": rounds}, indent=1)
    (options.output / "soak.json").write_text(text + "\n")
    draw(rounds, options.output / "soak.png")
    tally.add(
        "soak: minutes", minutes, losses=len(too_much), rounds=len(rounds),
        **{f"{name} an hour": hourly[f"{name} an hour"] for name in AN_HOUR},
        **{f"{name}_risen_at_most": round(risen[name], 1) for name in IN_ALL},
    )  # fmt: skip
    print(json.dumps(summary), flush=True)
    return 1 if too_much else 0


if __name__ == "__main__":
    from pmoe_jax.launch import restart_with_allocator

    restart_with_allocator()  # As `pmoe` does.
    sys.exit(main())
