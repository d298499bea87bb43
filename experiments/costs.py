"""What the parts of training cost: experts, input pipeline, evaluation, bfloat16, start-up.

    python experiments/costs.py --output=costs.json --chart=moe_layer.png

Everything that is compared takes turns in one process, and a ratio is the median of the rounds'
ratios; start-up is the time of processes of their own. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmoe_jax import config as config_lib
from pmoe_jax import kernels, launch, models, training
from pmoe_jax import members as members_lib
from pmoe_jax.report import markdown

BATCH, PATCHES = 128, 64
OPTIONS = kernels.compiler_options(jax.default_backend())

# --- The mixture-of-experts layer, gathered and masked ------------------------------------------


class _Gathered(models.nn.Module):
    """The layer as the model computes it: routers, selected patches, experts, pooling."""

    num_experts: int
    taken: int
    features: int

    @models.nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        scores = models._Routers(self.num_experts)(patches)
        used = models._route(scores, self.taken, None)
        selected = models._gather(patches, used.indices) * used.gates[..., None]
        rest = jnp.zeros((self.num_experts, patches.shape[-1]))
        experts = models._Experts(self.features, PATCHES)
        maps = experts(models._FoldedMap(selected, rest), train=True)
        unselected = PATCHES - self.taken
        return (maps.selected.sum(2) + unselected * maps.rest) / PATCHES


class _Masked(models.nn.Module):
    """The same layer on all patches, those that an expert does not take set to zero."""

    num_experts: int
    taken: int
    features: int

    @models.nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        scores = models._Routers(self.num_experts)(patches)
        used = models._route(scores, self.taken, None)
        gates = jax.nn.one_hot(used.indices, PATCHES) * used.gates[..., None]
        maps = models._FoldedMap(
            patches[:, None] * gates.sum(2)[..., None],
            jnp.zeros((self.num_experts, patches.shape[-1])),
        )
        return models._Experts(self.features, PATCHES)(maps, train=True).selected.mean(2)


def moe_layer(width: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds, forward and backward, against k (at n = 4) and n (at k = 16)."""
    patches = jax.random.normal(jax.random.key(0), (BATCH, PATCHES, 64 * width))
    settings = [(4, k) for k in (4, 8, 16, 32, 64)] + [(n, 16) for n in (2, 8, 16)]
    records = []
    for experts, taken in settings:
        steps = {}
        values = {}
        for name, layer in (("gathered", _Gathered), ("masked", _Masked)):
            module = layer(experts, taken, 16 * width)
            variables = module.init(jax.random.key(1), patches)
            routers = variables["params"]["_Routers_0"]
            routers["kernel"] = 0.1 * jax.random.normal(jax.random.key(2), routers["kernel"].shape)

            def loss(params: Any, patches: Any, module: Any = module, v: Any = variables) -> Any:
                y, _ = module.apply({**v, "params": params}, patches, mutable=["batch_stats"])
                return jnp.square(y).sum()

            compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=OPTIONS)
            steps[name] = lambda f=compiled, p=variables["params"]: f(p, patches)
            values[name] = float(steps[name]()[0])
        np.testing.assert_allclose(values["gathered"], values["masked"], rtol=1e-3)
        for name, seconds in turns(steps, rounds).items():
            records.append(
                {"what": "moe_layer", "form": name, "width": width, "n": experts, "k": taken,
                 "rounds": rounds, "ms": round(1e3 * statistics.median(seconds), 2)}
            )  # fmt: skip
    return records


def chart(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time of the layer against k and n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    own = [record for record in records if record["what"] == "moe_layer"]
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    for axes, axis, held, title in (
        (panels[0], "k", ("n", 4), "n = 4 experts"),
        (panels[1], "n", ("k", 16), "k = 16 of 64 patches"),
    ):
        for form, colour, mark in (("masked", "#D55E00", "s"), ("gathered", "#0072B2", "o")):
            points = sorted(
                (r[axis], r["ms"]) for r in own if r["form"] == form and r[held[0]] == held[1]
            )
            axes.plot(*zip(*points, strict=True), color=colour, marker=mark, label=form)
        axes.set(title=title, ylim=(0, None), ylabel="forward and backward [ms]")
        axes.set_xlabel("patches an expert takes, k" if axis == "k" else "experts, n")
        axes.set_xscale("log", base=2)
        axes.set_xticks([p[0] for p in points], [str(p[0]) for p in points])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"The mixture-of-experts layer, width {own[0]['width']}, batch {BATCH}")
    figure.savefig(path, dpi=160)
    plt.close(figure)


# --- Pipeline, evaluation, bfloat16 -------------------------------------------------------------


def programs(width: int, **fields: Any) -> tuple[training.Programs, Any, tuple[Any, ...], Any]:
    """Programs of one member, its state, and the arguments of a step; images are noise."""
    config = config_lib.default()
    config.data.name, config.num_seeds, config.model.width = "cifar10", 1, width
    with config.unlocked():
        for name, value in fields.items():
            section, field = name.split("__")
            config[section][field] = value
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8192, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, len(images)).astype(np.int32)
    members = members_lib.from_config(config)
    plan = training.Plan(len(images), BATCH, False, 1)
    made = training.programs_of(config, 10, plan)
    attack = members_lib.attacks(members, labels, (32, 32, 3))
    order = made.epoch_order(jnp.stack([members[0].key("order")]), np.int32(0))
    arguments = (attack, order, np.int32(0), jnp.asarray(images), jnp.asarray(labels))
    return made, made.init(members, (32, 32, 3)), arguments, config


def stepper(width: int, **fields: Any) -> Callable[[], Any]:
    """A training step that keeps its state."""
    made, state, arguments, _ = programs(width, **fields)
    held = [state]

    def once() -> Any:
        held[0], loss = made.step(held[0], *arguments, BATCH)
        return loss

    return once


def pipeline(width: int, rounds: int) -> list[dict[str, Any]]:
    """The pipeline alone (order, gather, conversion, trigger, labels) as a share of a step.

    Compiled by itself it writes a batch that the step would read at once: an upper bound.
    """
    steps: dict[str, Callable[[], Any]] = {"step": stepper(width)}
    for name in ("none", "square", "blend", "warp"):
        rate = 0.0 if name == "none" else 0.1
        made, _, arguments, _ = programs(width, trigger__name=name, poison__rate=rate)
        attack, order, start, images, labels = arguments
        one = jax.tree.map(lambda leaf: leaf[0], attack)

        def batch(one: Any, order: Any, start: Any, images: Any, labels: Any) -> Any:
            index = jax.lax.dynamic_slice(order[0], (start,), (BATCH,))
            return training.attacked_batch(one, index, images[index], labels[index])

        ready = jax.jit(batch, compiler_options=OPTIONS)
        steps[name] = lambda f=ready, a=(one, order, start, images, labels): f(*a)
    times = turns(steps, rounds)
    key = jnp.stack([jax.random.key(0)])
    shuffle = turns({"order": lambda: made.epoch_order(key, np.int32(1))}, rounds)["order"]
    share = statistics.median(shuffle) / made.plan.steps_per_epoch
    return [
        {"what": "pipeline", "width": width, "trigger": name,
         "percent_of_step": round(100 * (statistics.median(
             a / b for a, b in zip(times[name], times["step"], strict=True))
             + share / statistics.median(times["step"])), 2)}
        for name in times if name != "step"
    ]  # fmt: skip


def evaluation(width: int, rounds: int) -> list[dict[str, Any]]:
    """Images a second of evaluating over those of training, one member."""
    made, state, arguments, config = programs(width)
    images = np.asarray(arguments[3][: config.evaluation.batch_size])
    steps = {"train": stepper(width), "evaluate": lambda: made.predict(variables, images, None)}
    variables = state.variables
    times = turns(steps, rounds)
    ratios = [
        len(images) / e / (BATCH / t)
        for e, t in zip(times["evaluate"], times["train"], strict=True)
    ]
    rate = len(images) / statistics.median(times["evaluate"])
    record = {"what": "evaluation", "width": width, "images_per_second": round(rate, 1)}
    return [{**record, "times_training": round(statistics.median(ratios), 2)}]


def bfloat16(width: int, rounds: int) -> list[dict[str, Any]]:
    """Throughput of bfloat16 compute over float32."""
    steps = {d: stepper(width, model__dtype=d) for d in ("float32", "bfloat16")}
    times = turns(steps, rounds)
    ratios = [a / b for a, b in zip(times["float32"], times["bfloat16"], strict=True)]
    return [
        {"what": "bfloat16", "width": width, "times_float32": round(statistics.median(ratios), 2)}
    ]


def start_up(rounds: int) -> list[dict[str, Any]]:
    """Seconds from the command to the first finished step of the demo's training, cache warm."""
    flags = ["--config=configs/digits.py", "--config.train.epochs=1", "--config.num_seeds=2"]
    seconds = []
    # As a user starts it: the command restarts itself with the allocator's settings.
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):  # The first one fills the compilation cache.
            workdir = pathlib.Path(folder, str(turn))
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "pmoe_jax.cli", "train", f"--workdir={workdir}", *flags],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env={**environment, "PMOE_CACHE_DIR": folder + "/cache"},
            )  # fmt: skip
            assert process.stderr is not None
            text = b""
            while b" loss " not in text and (piece := process.stderr.read1()):
                text += piece
            seconds.append(time.perf_counter() - began)
            process.communicate()
            if process.returncode:
                raise SystemExit(text.decode(errors="replace"))
    return [{"what": "start_up", "cold_s": round(seconds[0], 1),
             "warm_s": round(statistics.median(seconds[1:]), 1)}]  # fmt: skip


# --- Timing -------------------------------------------------------------------------------------


def turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each, in every round; they take turns after one call that warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step())
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
        "pipeline": lambda args: pipeline(2, args.rounds),
        "evaluation": lambda args: evaluation(2, args.rounds),
        "bfloat16": lambda args: bfloat16(2, 5),
        "start_up": lambda args: start_up(3),
        "moe_layer": lambda args: moe_layer(args.width, args.rounds),
    }
    parser.add_argument("--parts", default=",".join(parts))
    parser.add_argument("--width", type=int, default=10, help="of the mixture-of-experts layer")
    parser.add_argument("--rounds", type=int, default=15, help="at least 1")
    parser.add_argument("--output", type=pathlib.Path, help="JSON records")
    parser.add_argument("--chart", type=pathlib.Path, default=pathlib.Path("moe_layer.png"))
    args = parser.parse_args()
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in parts]:
        parser.error(f"--parts has no {unknown[0]!r}; choose of {', '.join(parts)}")
    if args.width < 1 or args.rounds < 1:
        parser.error("--width and --rounds are at least 1")
    for path in (args.output, args.chart):
        if path and not path.parent.is_dir():
            parser.error(f"{path.parent} is no folder; create it first")
    launch.restart_with_allocator()
    records: list[dict[str, Any]] = []
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        records += parts[name](args)
        if args.output:
            args.output.write_text(json.dumps(records, indent=1) + "\n")
    lines = [
        [r["what"], ", ".join(f"{k} {v}" for k, v in r.items() if k != "what")] for r in records
    ]
    print(markdown(["part", "result"], lines))
    if "moe_layer" in names:
        chart(records, args.chart)


if __name__ == "__main__":
    main()
