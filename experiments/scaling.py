"""What more devices do to a step, and what a member needs: the numbers of docs/scaling.md.

    python experiments/scaling.py devices --output=scaling.json --chart=docs/figures/scaling.png
    python experiments/scaling.py sizes --output=sizes.json

`devices` times steps on 1, 2, 4 and 8 devices that XLA simulates on this machine's processor
cores: it shows what spreading and exchanging cost, not what more hardware gives. `sizes` compiles
steps without running them, and counts. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from typing import Any

#: The same work on every mesh, by the number of devices.
MEMBERS, BATCH, WIDTH = 8, 16, 1
MESHES = {
    1: ("1x1",),
    2: ("2x1", "1x2"),
    4: ("4x1", "1x4"),
    8: ("8x1", "4x2", "1x8"),
}
#: Data, side, training images, classes, patches an expert, width, batch. Of ImageNet's 56 x 56
#: patches an expert takes a quarter, as of CIFAR-10's 8 x 8.
SIZES = (
    ("CIFAR-10", 32, 50_000, 10, 16, 2, 128),
    ("CIFAR-10", 32, 50_000, 10, 16, 10, 128),
    ("ImageNet", 224, 1_281_167, 1000, 784, 10, 16),
    ("ImageNet", 224, 1_281_167, 1000, 784, 10, 32),
)
_BYTES = {"f32": 4, "f64": 8, "bf16": 2, "s32": 4, "pred": 1}


def config_of(width: int, members: int, batch: int, side: int, patches: int, mesh: str) -> Any:
    """A config of the paper's model and optimiser; square trigger, 2 %."""
    from pmoe_jax import config as config_lib

    config = config_lib.default()
    config.update_from_flattened_dict({
        "model.width": width, "num_seeds": members, "train.batch_size": batch,
        "data.image_size": side, "model.patches_per_expert": patches, "trigger.name": "square",
        "poison.rate": 0.02, "train.mesh": mesh,
    })  # fmt: skip
    return config


# --- devices --------------------------------------------------------------------------------------


def exchanged(program: str) -> dict[str, int]:
    """Number of all-reduces in the compiled program of a device, and bytes that go into them."""
    count = total = 0
    # The name and result of an operation; results of several arrays hold "=" in comments.
    for result in re.findall(r"^[^=]*= (.*?) all-reduce(?:-start)?\(", program, re.MULTILINE):
        count += 1
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            sizes = [int(size) for size in shape.split(",") if size]
            total += _BYTES[dtype] * math.prod(sizes)
    return {"all_reduces": count, "all_reduce_bytes": total}


class Timed:
    """The step of one mesh, ready to be called; its data is noise."""

    def __init__(self, mesh_name: str):
        import jax
        import numpy as np

        from pmoe_jax import members as members_lib
        from pmoe_jax import mesh, training

        config = config_of(WIDTH, MEMBERS, BATCH, 32, 16, mesh_name)
        members = members_lib.from_config(config)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (2048, 32, 32, 3)).astype(np.uint8)
        labels = (np.arange(2048) % 10).astype(np.int32)
        layout = mesh.choose(mesh_name, MEMBERS, BATCH)
        plan = training.Plan(len(images), BATCH, False, 1)
        programs = training.programs_of(config, 10, plan, layout)
        attack = layout.put(members_lib.attacks(members, labels, images.shape[1:]), mesh.MEMBERS)
        self._state = programs.init(members, images.shape[1:])
        order = programs.epoch_order(programs.keys(members, "order"), np.int32(0))
        held = layout.put(jax.device_put((images, labels)), mesh.SAME)
        self._rest = (attack, order, np.int32(0), *held)
        self._compiled = programs.step.lower(self._state, *self._rest, BATCH).compile()

    def __call__(self) -> float:
        """Takes a step; its seconds."""
        begin = time.perf_counter()
        self._state, losses = self._compiled(self._state, *self._rest)
        losses.block_until_ready()
        return time.perf_counter() - begin

    def exchanged(self) -> dict[str, int]:
        """What devices exchange in a step."""
        return exchanged(self._compiled.as_text())


def time_meshes(meshes: list[str], rounds: int) -> list[dict[str, Any]]:
    """Median seconds of a step on each mesh, which take turns."""
    from pmoe_jax import launch

    launch.use_compilation_cache()
    steps = {mesh: Timed(mesh) for mesh in meshes}
    seconds: dict[str, list[float]] = {mesh: [] for mesh in meshes}
    for _ in range(rounds + 1):
        for mesh, step in steps.items():
            seconds[mesh].append(step())
    records = []
    for mesh, step in steps.items():
        median = statistics.median(seconds[mesh][1:])  # The first step also allocates.
        records.append({
            "mesh": mesh, "step_seconds": median, "images_per_second": MEMBERS * BATCH / median,
            "rounds": rounds, **step.exchanged(),
        })  # fmt: skip
    return records


def devices(rounds: int, turns: int) -> list[dict[str, Any]]:
    """Times all meshes; the median of turns, in each a process for each number of devices."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for turn in range(turns):
        for count, meshes in MESHES.items():
            flag = f"--xla_force_host_platform_device_count={count}"
            words = [sys.executable, __file__, "worker", *meshes, f"--rounds={rounds}"]
            env = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(words, env=env, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{meshes} failed:\n{done.stderr[-3000:]}")
            for record in json.loads(done.stdout.splitlines()[-1]):
                measured.setdefault(record["mesh"], []).append(record)
                print(f"turn {turn + 1}: {record}", file=sys.stderr)
    records = []
    for found in measured.values():
        speeds = [record["images_per_second"] for record in found]
        records.append({
            **found[0], "turns": turns, "members": MEMBERS, "batch": BATCH, "width": WIDTH,
            "cores": len(os.sched_getaffinity(0)),
            "step_seconds": statistics.median(record["step_seconds"] for record in found),
            "images_per_second": statistics.median(speeds),
            "slowest": min(speeds), "fastest": max(speeds),
        })  # fmt: skip
    return records


def chart(records: list[dict[str, Any]], path: str) -> None:
    """Throughput against simulated devices, one curve for each way of using them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from pmoe_jax.figures import BLUE, COLUMN, GREEN, ORANGE, PAPER_STYLE

    found = {tuple(map(int, r["mesh"].split("x"))): r for r in records}
    curves = (
        ("members spread (S×1)", [(s, d) for s, d in found if d == 1], BLUE, "o-"),
        ("batches spread (1×D)", [(s, d) for s, d in found if s == 1], ORANGE, "s-"),
        ("both (4×2)", [(s, d) for s, d in found if s > 1 and d > 1], GREEN, "^"),
    )
    with plt.rc_context(PAPER_STYLE):
        figure, axis = plt.subplots(figsize=(COLUMN, 2.4), layout="constrained")
        for label, shapes, colour, mark in curves:
            own = [found[shape] for shape in shapes]
            middle = [record["images_per_second"] for record in own]
            below = [r["images_per_second"] - r["slowest"] for r in own]
            above = [r["fastest"] - r["images_per_second"] for r in own]
            axis.errorbar(
                [s * d for s, d in shapes], middle, (below, above), fmt=mark, color=colour,
                label=label, markersize=3.5, linewidth=1, capsize=2,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.minorticks_off()
        axis.set_ylim(0)
        axis.set_xlabel(f"devices, simulated on {records[0]['cores']} processor cores")
        axis.set_ylabel("images/s, all members")
        axis.set_title(
            f"SIMULATED devices: the cost of spreading\n{MEMBERS} members, width {WIDTH}, "
            f"batch {BATCH}; median and range of {records[0]['turns']} turns"
        )
        axis.legend(loc="best")
        figure.savefig(path, dpi=200)


# --- sizes ----------------------------------------------------------------------------------------


def sizes() -> list[dict[str, Any]]:
    """Bytes that one member needs, of shapes and of the compiled step on a streamed batch."""
    import jax
    import jax.numpy as jnp

    from pmoe_jax import launch, training
    from pmoe_jax import members as members_lib

    launch.use_compilation_cache()
    records = []
    for name, side, images, classes, patches, width, batch in SIZES:
        config = config_of(width, 1, batch, side, patches, "1x1")
        members, shape = members_lib.from_config(config), (side, side, 3)
        plan = training.Plan(images, batch, False, 1)
        programs = training.programs_of(config, classes, plan)
        state = programs.abstract_state(members, shape)
        trigger = jax.eval_shape(lambda m=members[0], s=shape: members_lib.make_trigger(m, s))
        masks = [jax.ShapeDtypeStruct((images,), jnp.bool_)] * 2
        own = (
            members_lib.Attack(*masks, trigger, jax.ShapeDtypeStruct((), jnp.int32)),
            *(jax.ShapeDtypeStruct((batch, *further), kind)
              for further, kind in (((), jnp.int32), (shape, jnp.uint8), ((), jnp.int32))),
        )  # fmt: skip
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), own)
        begin = time.perf_counter()
        memory = programs.step_on_batch.lower(state, *stacked).compile().memory_analysis()
        records.append({
            "data": name, "width": width, "batch": batch,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "state_bytes": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)),
            "mask_bytes": 2 * images, "order_bytes": 4 * images,
            "batch_bytes": batch * math.prod(shape),
            "temporary_bytes_xla_cpu": memory.temp_size_in_bytes,
            "compile_seconds": round(time.perf_counter() - begin, 1),
        })  # fmt: skip
        print(records[-1], file=sys.stderr)
    return records


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("devices", "sizes", "worker"))
    parser.add_argument("meshes", nargs="*", help="of a worker")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed")
    parser.add_argument("--turns", type=int, default=2, help="processes a number of devices")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--chart")
    args = parser.parse_args()
    if args.what == "worker":
        print(json.dumps(time_meshes(args.meshes, args.rounds)))
        return
    records = sizes() if args.what == "sizes" else devices(args.rounds, args.turns)
    if args.output:
        args.output.write_text(json.dumps(records, indent=1) + "\n")
    if args.chart and args.what == "devices":
        chart(records, args.chart)


if __name__ == "__main__":
    main()
