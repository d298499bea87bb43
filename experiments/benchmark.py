"""Speed of one training step, side by side: Keras, PyTorch, plain flax.linen, pmoe_jax.

    pip install -e '.[benchmark]'
    python experiments/benchmark.py --widths=2,4,10 --seeds=1,2,4,8 --rounds=5 --output=out.json

Every system runs in a process of its own, with the same weights, batch, batch statistics, SGD,
number of threads and allocator settings. Their losses must agree over three steps before anything
is timed. Then they take turns (A B C D A B C D ...), the waiting ones stopped, so that a noisy
machine hits all of them alike: trust the ratios. Peers train one seed; what they would do for S
seeds is S such runs.

Prints a table, writes a bar chart and, with --output, a JSON list of records.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pmoe_jax import launch

BATCH, CLASSES, EXPERTS, TAKEN = 128, 10, 4, 16
LEARNING_RATE = 0.1
SYSTEMS = ("keras", "pytorch", "flax_plain", "pmoe_jax")
PEERS = ("keras", "pytorch")
SINGLE_SEED = (*PEERS, "flax_plain")
STRATEGIES = ("unroll", "vmap")
AGREEMENT = 2e-3  # relative; three float32 steps with different orders of summation

# --- The work: the same arrays for everybody ----------------------------------------------------


def keras_arrays(width: int, seed: int) -> list[np.ndarray]:
    """Initial variables of one seed, in the order of `models.variables_from_keras`."""
    rng = np.random.default_rng(seed)
    wide, mid, top = 16 * width, 32 * width, 64 * width

    def norm(size: int) -> list[np.ndarray]:
        return [np.ones(size), np.zeros(size), np.zeros(size), np.ones(size)]

    def conv(size: int, before: int, after: int) -> list[np.ndarray]:
        limit = (6 / (size * size * (before + after))) ** 0.5
        return [rng.uniform(-limit, limit, (size, size, before, after)), np.zeros(after)]

    arrays = conv(3, 3, 16)
    for before, after in ((16, wide), (wide, mid)):
        arrays += [*norm(before), *conv(3, before, after), *norm(after)]
        arrays += [*conv(1, before, after), *conv(3, after, after)]
    arrays += [*norm(mid), *conv(3, mid, top)]
    # Routers as decisive as after some training: top-k without near ties, so that losses agree.
    arrays += [rng.normal(0, 0.5 / width**0.5, (1, 1, top, 1)) for _ in range(EXPERTS)]
    arrays += norm(top) * EXPERTS
    arrays += [array for _ in range(EXPERTS) for array in conv(1, top, wide)]
    dense = conv(1, EXPERTS * wide, CLASSES)
    arrays += [*norm(EXPERTS * wide), dense[0][0, 0], dense[1]]
    return [array.astype(np.float32) for array in arrays]


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [B, 32, 32, 3] and labels int32 [B]."""
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(BATCH, 32, 32, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, BATCH).astype(np.int32)


def flops_per_image(width: int) -> float:
    """Multiplications and additions of the convolutions and experts, forward and backward."""
    wide, mid, top = 16 * width, 32 * width, 64 * width
    layers = [  # positions, kernel, channels before and after
        (1024, 9, 3, 16), (1024, 9, 16, wide), (1024, 9, wide, wide), (1024, 1, 16, wide),
        (256, 9, wide, mid), (256, 9, mid, mid), (256, 1, wide, mid), (64, 9, mid, top),
        (EXPERTS * TAKEN, 1, top, wide),
    ]  # fmt: skip
    return 3 * sum(2 * places * kernel * a * b for places, kernel, a, b in layers)


# --- The systems: each returns a function that takes one step and gives its losses, a list --------


def keras_system(width: int, seeds: int, strategy: str) -> Callable[[], list[float]]:
    """tf.keras as the paper's code uses it: functional model, compiled train function."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import tensorflow as tf
    from keras import layers, ops

    used: list[Any] = []

    def add(layer: Any, *inputs: Any) -> Any:
        used.append(layer)
        return layer(*inputs)

    def norm_relu(x: Any) -> Any:
        return ops.relu(add(layers.BatchNormalization(), x))

    def conv(x: Any, channels: int, size: int = 3, stride: int = 1) -> Any:
        return add(layers.Conv2D(channels, size, stride, padding="same"), x)

    def group(x: Any, channels: int, stride: int) -> Any:
        y = norm_relu(conv(norm_relu(x), channels, 3, stride))
        return conv(x, channels, 1, stride) + conv(y, channels)

    inputs = keras.Input((32, 32, 3))
    x = group(group(conv(inputs, 16), 16 * width, 1), 32 * width, 2)
    features = conv(norm_relu(x), 64 * width, 3, 2)
    maps = []
    for _ in range(EXPERTS):
        score = add(layers.Conv2D(1, 1, use_bias=False), features)
        gates = ops.softmax(ops.reshape(score, (-1, 64)))
        values, indices = ops.top_k(gates, TAKEN)
        mask = ops.sum(ops.one_hot(indices, 64) * ops.expand_dims(values, -1), 1)
        maps.append(features * ops.reshape(mask, (-1, 8, 8, 1)))
    maps = [norm_relu(expert_map) for expert_map in maps]
    maps = [conv(expert_map, 16 * width, 1) for expert_map in maps]
    pooled = ops.mean(norm_relu(ops.concatenate(maps, -1)), (1, 2))
    model = keras.Model(inputs, add(layers.Dense(CLASSES), pooled))
    arrays = iter(keras_arrays(width, 0))
    for layer in used:
        layer.set_weights([next(arrays) for _ in layer.get_weights()])
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    assert {weight.dtype for weight in model.weights} <= {"float32", "int64", "uint32"}
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    images, labels = (tf.constant(array) for array in batch())

    def step() -> list[float]:
        return [float(model.train_on_batch(images, labels))]

    # train_on_batch averages losses since the last reset; a fresh average is this step's loss.
    def fresh_step() -> list[float]:
        model.reset_metrics()
        return step()

    return fresh_step


def pytorch_system(width: int, seeds: int, strategy: str) -> Callable[[], list[float]]:
    """PyTorch eager, channels_last."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    arrays = iter([torch.from_numpy(array) for array in keras_arrays(width, 0)])

    def conv(stride: int = 1) -> nn.Conv2d:
        kernel, bias = next(arrays), next(arrays)
        size, _, before, after = kernel.shape
        padding = size // 2 if stride == 1 else 0
        layer = nn.Conv2d(before, after, size, stride, padding)
        layer.weight.data = kernel.permute(3, 2, 0, 1).contiguous()
        layer.bias.data = bias
        return layer

    def norm() -> nn.BatchNorm2d:
        scale, bias, mean, var = (next(arrays) for _ in range(4))
        layer = nn.BatchNorm2d(len(scale), eps=1e-3, momentum=0.01)
        layer.weight.data, layer.bias.data = scale, bias
        layer.running_mean.data, layer.running_var.data = mean, var
        return layer

    def strided(layer: nn.Conv2d, x: Any) -> Any:
        # TensorFlow pads a strided 3x3 convolution of even size at the end only.
        return layer(functional.pad(x, (0, 1, 0, 1)) if layer.kernel_size == (3, 3) else x)

    class Group(nn.Module):
        def __init__(self, stride: int):
            super().__init__()
            self.norm1, self.conv1, self.norm2 = norm(), conv(stride), norm()
            self.shortcut, self.conv2 = conv(stride), conv()

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.norm1(x))
            two = self.conv1.stride == (2, 2)
            y = torch.relu(self.norm2(strided(self.conv1, y) if two else self.conv1(y)))
            return self.shortcut(x) + self.conv2(y)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.group1, self.group2 = conv(), Group(1), Group(2)
            self.norm, self.patches = norm(), conv(2)
            routers = [next(arrays)[0, 0, :, 0] for _ in range(EXPERTS)]
            self.routers = nn.Parameter(torch.stack(routers))
            self.norms = nn.ModuleList([norm() for _ in range(EXPERTS)])
            self.convs = nn.ModuleList([conv() for _ in range(EXPERTS)])
            self.head = norm()
            self.kernel, self.bias = nn.Parameter(next(arrays)), nn.Parameter(next(arrays))

        def forward(self, x: Any) -> Any:
            x = self.group2(self.group1(self.stem(x)))
            features = strided(self.patches, torch.relu(self.norm(x)))
            scores = torch.einsum("bcp,ec->bep", features.flatten(2), self.routers)
            values, indices = scores.softmax(-1).topk(TAKEN)
            mask = torch.zeros_like(scores).scatter(2, indices, values)
            maps = []
            for expert in range(EXPERTS):
                gated = features * mask[:, expert].reshape(-1, 1, 8, 8)
                maps.append(self.convs[expert](torch.relu(self.norms[expert](gated))))
            pooled = torch.relu(self.head(torch.cat(maps, 1))).mean((2, 3))
            return pooled @ self.kernel + self.bias

    model = Model().to(memory_format=torch.channels_last)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    images, labels = batch()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long()

    def step() -> list[float]:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.item()]

    return step


def flax_plain_system(width: int, seeds: int, strategy: str) -> Callable[[], list[float]]:
    """flax.linen's own layers, all 64 patches computed and masked, jit with default settings."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def norm_relu(x: Any) -> Any:
                layer = nn.BatchNorm(use_running_average=False, momentum=0.99, epsilon=1e-3)
                return nn.relu(layer(x))

            def conv(x: Any, channels: int, size: int = 3, stride: int = 1) -> Any:
                return nn.Conv(channels, (size, size), stride)(x)

            def group(x: Any, channels: int, stride: int) -> Any:
                y = norm_relu(conv(norm_relu(x), channels, 3, stride))
                return conv(x, channels, 1, stride) + conv(y, channels)

            x = group(group(conv(x, 16), 16 * width, 1), 32 * width, 2)
            features = conv(norm_relu(x), 64 * width, 3, 2)
            maps = []
            for _ in range(EXPERTS):
                scores = nn.Conv(1, (1, 1), use_bias=False)(features).reshape(-1, 64)
                values, indices = jax.lax.top_k(nn.softmax(scores), TAKEN)
                mask = (jax.nn.one_hot(indices, 64) * values[..., None]).sum(1)
                maps.append(features * mask.reshape(-1, 8, 8, 1))
            maps = [norm_relu(expert_map) for expert_map in maps]
            maps = [conv(expert_map, 16 * width, 1) for expert_map in maps]
            x = norm_relu(jnp.concatenate(maps, -1)).mean((1, 2))
            return nn.Dense(CLASSES)(x)

    model = Plain()
    images, labels = (jnp.asarray(array) for array in batch())
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = _fill_in_call_order(shapes, keras_arrays(width, 0))
    return _jax_step(jax.jit(_sgd(model.apply), donate_argnums=0), variables, images, labels)


def _fill_in_call_order(shapes: Any, arrays: list[np.ndarray]) -> Any:
    """Arrays in Keras order into linen variables, whose names count the layers of each kind."""
    import jax.numpy as jnp

    left = iter([jnp.asarray(array) for array in arrays])
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    norms, convs = iter(range(100)), iter(range(100))

    def norm() -> None:
        name = f"BatchNorm_{next(norms)}"
        params[name] = {"scale": next(left), "bias": next(left)}
        stats[name] = {"mean": next(left), "var": next(left)}

    def conv(bias: bool = True) -> None:
        params[f"Conv_{next(convs)}"] = {
            "kernel": next(left),
            **({"bias": next(left)} if bias else {}),
        }

    conv()
    for _ in range(2):
        norm(), conv(), norm(), conv(), conv()
    norm(), conv()
    for make, count in ((lambda: conv(False), EXPERTS), (norm, EXPERTS), (conv, EXPERTS)):
        for _ in range(count):
            make()
    norm()
    params["Dense_0"] = {"kernel": next(left), "bias": next(left)}
    import jax

    filled = {"params": params, "batch_stats": stats}
    assert jax.tree.map(jnp.shape, filled) == jax.tree.map(lambda s: s.shape, shapes)
    return filled


def pmoe_jax_system(width: int, seeds: int, strategy: str) -> Callable[[], list[float]]:
    """This project: its model and compiler options, S members in one program."""
    import jax
    import jax.numpy as jnp

    from pmoe_jax import kernels, models
    from pmoe_jax.training import over_members

    model = models.PMoEWideResNet(CLASSES, width=width)
    images, labels = (jnp.asarray(array) for array in batch())
    members = [models.variables_from_keras(keras_arrays(width, seed)) for seed in range(seeds)]
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def apply(variables: Any, images: Any, **extra: Any) -> Any:
        return model.apply(variables, images, train=True, **extra)

    step = jax.jit(
        over_members(_sgd(apply), strategy, shared=(1, 2)),
        donate_argnums=0,
        compiler_options=kernels.compiler_options(jax.default_backend()),
    )
    return _jax_step(step, variables, images, labels)


def _sgd(apply: Callable[..., Any]) -> Callable[..., Any]:
    import jax
    import optax

    def step(variables: Any, images: Any, labels: Any) -> Any:
        def loss_of(params: Any) -> Any:
            held = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, updated = apply(held, images, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, variables["params"], grads)
        return {"params": params, "batch_stats": stats}, loss

    return step


def _jax_step(step: Any, variables: Any, images: Any, labels: Any) -> Callable[[], list[float]]:
    compiled = step.lower(variables, images, labels).compile()
    lower = [word for word in ("bf16[", "f16[", "f8e") if word in compiled.as_text()]
    if lower:
        raise SystemExit(f"the compiled program holds lower precision: {lower}")
    held = [variables]

    def once() -> list[float]:
        held[0], loss = compiled(held[0], images, labels)
        return np.atleast_1d(np.asarray(loss)).tolist()

    return once


MAKERS = {
    "keras": keras_system,
    "pytorch": pytorch_system,
    "flax_plain": flax_plain_system,
    "pmoe_jax": pmoe_jax_system,
}


# --- A worker process: says its first losses, then steps for as long as it is told ----------------


def work(system: str, width: int, seeds: int, strategy: str) -> None:
    """Serves one system over standard input and output, one JSON line each way."""
    step = MAKERS[system](width, seeds, strategy)
    answer = {"losses": [step() for _ in range(3)]}
    step()
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        began = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "peak_gib": peak}), flush=True)


def environment(threads: int) -> dict[str, str]:
    """The same for all processes: threads, allocator, and nothing that changes precision."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION") and "FPMATH" not in name
    }
    counts = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC")
    return {
        **kept,
        **dict.fromkeys(counts, str(threads)),  # XLA's pool counts NPROC.
        "GLIBC_TUNABLES": launch.MALLOC,
        "JAX_PLATFORMS": "cpu",
    }


class Dead(Exception):
    """A worker's process ended early."""


class Worker:
    """A system in its own process, stopped while it is not its turn."""

    def __init__(self, system: str, width: int, seeds: int, strategy: str, threads: int):
        self.system, self.seeds, self.strategy = system, seeds, strategy
        words = ["--worker", system, str(width), str(seeds), strategy]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(threads),
        )  # fmt: skip
        self.losses = self._answer()["losses"]
        self.rates: list[float] = []
        self.peak_gib = 0.0
        os.kill(self.process.pid, signal.SIGSTOP)

    def turn(self, seconds: float, steps: int | None) -> int:
        """Steps for about `seconds` (or exactly `steps`), notes the rate, returns the steps."""
        os.kill(self.process.pid, signal.SIGCONT)
        if steps is None:
            steps = max(1, round(seconds / self._ask(1)["seconds"]))
        answer = self._ask(steps)
        os.kill(self.process.pid, signal.SIGSTOP)
        self.rates.append(self.seeds * BATCH * steps / answer["seconds"])
        self.peak_gib = answer["peak_gib"]
        return steps

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()

    def _ask(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` says how it ended.
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise Dead(
            f"{self.system}, {self.seeds} seeds, {self.strategy}: its process ended with code "
            f"{self.process.wait()} (-9: most likely too little memory)"
        )


def agree(workers: list[Worker]) -> None:
    """Stops the benchmark unless seed 0 has the same three losses everywhere."""
    first = np.asarray(workers[0].losses)[:, 0]
    for worker in workers[1:]:
        own = np.asarray(worker.losses)[:, 0]
        if not np.allclose(first, own, rtol=AGREEMENT):
            raise SystemExit(
                f"{worker.system} ({worker.strategy}, {worker.seeds} seeds) computes other losses "
                f"than {workers[0].system}: {own.tolist()} against {first.tolist()}"
            )


def gemm_peak(threads: int) -> float:
    """GF/s of XLA's float32 product of 2048x2048 matrices, the best of ten."""
    code = (
        "import jax, jax.numpy as jnp, time\n"
        "from pmoe_jax import kernels\n"
        "x = jnp.ones((2048, 2048)); options = kernels.compiler_options('cpu')\n"
        "f = jax.jit(jnp.dot, compiler_options=options)\n"
        "times = []\n"
        "for _ in range(11):\n"
        "    t = time.perf_counter(); f(x, x).block_until_ready()\n"
        "    times.append(time.perf_counter() - t)\n"
        "print(2 * 2048**3 / min(times[1:]) / 1e9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment(threads)
    )
    if done.returncode:
        raise SystemExit("the matrix product could not be measured: see above")
    return float(done.stdout)


def measure(
    width: int, plan: list[tuple[str, int, str]], args: argparse.Namespace, turns: int
) -> list[dict[str, Any]]:
    """Records of one group: its systems take turns. `turns` numbers the group."""
    workers: list[Worker] = []
    try:
        for system, seeds, strategy in plan:
            print(f"width {width}: preparing {system}, {seeds} seeds, {strategy}", file=sys.stderr)
            workers.append(Worker(system, width, seeds, strategy, args.threads))
        agree(workers)
        peak = gemm_peak(args.threads)
        steps: list[int | None] = [None] * len(workers)
        for done in range(args.rounds + 1):
            for i, worker in enumerate(workers):
                steps[i] = worker.turn(args.seconds, steps[i])
            print(f"width {width}: round {done} of {args.rounds}", file=sys.stderr)
        records = []
        for worker in workers:
            rates = worker.rates[1:]  # the first turn warms up
            rate = statistics.median(rates)
            share = 100 * rate * flops_per_image(width) / 1e9 / peak
            records.append(
                {
                    "system": worker.system,
                    "width": width,
                    "seeds": worker.seeds,
                    "strategy": worker.strategy,
                    "images_per_second": round(rate, 1),
                    "rounds": len(rates),
                    "all_rounds": [round(r, 1) for r in rates],
                    "turns": turns,
                    "percent_of_gemm_peak": round(share, 1),
                    "gemm_peak_gflops": round(peak),
                    "peak_gib": round(worker.peak_gib, 2),
                    "threads": args.threads,
                    "first_losses": [losses[0] for losses in worker.losses],
                }
            )
        return ratios(records)
    finally:
        for worker in workers:
            worker.close()


def ratios(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds ratios, medians over rounds, between those that took turns with each other.

    `to_best_peer`: to the faster of Keras and PyTorch; `to_one_seed`: of several seeds to one.
    """

    def ratio(record: dict[str, Any], other: dict[str, Any]) -> float:
        rounds = zip(record["all_rounds"], other["all_rounds"], strict=True)
        return round(statistics.median(own / base for own, base in rounds), 2)

    peers = [r for r in records if r["system"] in PEERS]
    best = max(peers, key=lambda r: r["images_per_second"], default=None)
    one = next((r for r in records if r["system"] == "pmoe_jax" and r["seeds"] == 1), None)
    for record in records:
        if best:
            record["to_best_peer"] = ratio(record, best)
        if one and record["seeds"] > 1:
            record["to_one_seed"] = ratio(record, one)
    return records


def table(records: list[dict]) -> str:
    """Markdown; ratios to the faster peer, and to one seed, where they took turns."""
    from pmoe_jax.report import markdown

    lines = []
    for record in records:
        lines.append(
            [
                record["system"],
                str(record["width"]),
                str(record["seeds"]),
                record["strategy"],
                f"{record['images_per_second']:.1f}",
                str(record.get("to_best_peer", "")),
                str(record.get("to_one_seed", "")),
                f"{record['percent_of_gemm_peak']:.0f}",
                f"{record['peak_gib']:.1f}",
            ]
        )
    header = ["system", "width", "seeds", "strategy", "images/s", "to best peer", "to one seed"]
    return markdown([*header, "% of GEMM peak", "peak GiB"], lines)


def chart(records: list[dict], path: pathlib.Path) -> None:
    """A panel a width: images per second of one seed; below, several seeds against one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    widths = sorted({record["width"] for record in records})
    several = any(record["seeds"] > 1 for record in records)
    figure, panels = plt.subplots(
        1 + several, len(widths), figsize=(3 * len(widths), 1.9 + 1.9 * several),
        layout="constrained", squeeze=False, sharey="row",
    )  # fmt: skip
    colours = dict(zip(SYSTEMS, ("#E69F00", "#D55E00", "#999999", "#0072B2"), strict=True))
    for column, width in enumerate(widths):
        own = [record for record in records if record["width"] == width]
        axes = panels[0, column]
        alone: dict[str, float] = {}
        for record in own:
            if record["seeds"] == 1:  # Measured again beside several seeds: the first counts.
                alone.setdefault(record["system"], record["images_per_second"])
        names = [name for name in SYSTEMS if name in alone]
        bars = axes.barh(names, [alone[n] for n in names], color=[colours[n] for n in names])
        axes.bar_label(bars, fmt="%.0f", padding=2)
        axes.margins(x=0.2)
        axes.set(title=f"width {width}", xlabel="images/s, one seed")
        if column == 0:
            axes.invert_yaxis()
        if not several:
            continue
        axes = panels[1, column]
        for strategy, mark, colour in (("unroll", "o", "#0072B2"), ("vmap", "s", "#D55E00")):
            points = [(r["seeds"], r["to_one_seed"]) for r in own
                      if r["strategy"] == strategy and "to_one_seed" in r]  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=mark, label=strategy)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="seeds in one program", ylim=(0, 1.3))
        ticks = sorted({r["seeds"] for r in own if r["seeds"] > 1})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    if several:
        panels[1, 0].set_ylabel("all seeds' images/s\nover one seed's")
        panels[1, 0].legend(frameon=False, loc="lower left")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Parser of a number above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    parse.__name__ = "positive number"
    return parse


def numbers(text: str) -> list[int]:
    """ "2,10" -> [2, 10]."""
    return [positive(int)(part) for part in text.split(",")]


def one_of(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Parser of names separated by commas."""

    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} is unknown; choose of {', '.join(allowed)}"
            )
        return text.split(",")

    return parse


def new_file(text: str) -> pathlib.Path:
    """A path in a folder that exists, so that nothing is measured in vain."""
    path = pathlib.Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder; create it first")
    return path


def groups(args: argparse.Namespace) -> list[list[tuple[str, int, str]]]:
    """What takes turns with what at each width: (system, seeds, strategy).

    All systems with one seed; then each number of seeds and strategy beside one seed, which is all
    that memory has to hold.
    """
    single = [(name, 1, "unroll") for name in args.systems if name in SINGLE_SEED]
    made = [single] if single else []
    if "pmoe_jax" in args.systems:
        alone = ("pmoe_jax", 1, "unroll")
        made = [[*single, *([alone] if 1 in args.seeds else [])]]
        for seeds in args.seeds:
            for strategy in args.strategies if seeds > 1 else []:
                made.append([alone, ("pmoe_jax", seeds, strategy)])
    return [group for group in made if group]


def main() -> None:
    """Runs the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=numbers, default=[2, 4, 10])
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=positive(int), default=5)
    parser.add_argument(
        "--seconds", type=positive(float), default=4.0, help="about how long a turn takes"
    )
    parser.add_argument("--systems", type=one_of(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument(
        "--strategies", type=one_of(STRATEGIES), default=list(STRATEGIES), help="for several seeds"
    )
    parser.add_argument("--threads", type=positive(int), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=new_file, help="JSON records")
    parser.add_argument("--chart", type=new_file, default=pathlib.Path("benchmark.png"))
    args = parser.parse_args()
    for system, package in (("keras", "tensorflow"), ("pytorch", "torch")):
        if system in args.systems and importlib.util.find_spec(package) is None:
            parser.error(
                f"{package} is not installed: pip install -e '.[benchmark]', or leave {system} out "
                "of --systems"
            )
    # Stopped workers would stay for ever.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    records: list[dict[str, Any]] = []
    try:
        for width in args.widths:
            for group in groups(args):
                try:
                    records += measure(width, group, args, len({r["turns"] for r in records}))
                except Dead as error:
                    print(f"width {width}: left out, {error}", file=sys.stderr)
                if args.output:
                    args.output.write_text(json.dumps(records, indent=1) + "\n")
    finally:
        if records:
            print(table(records))
            chart(records, args.chart)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, width_text, seeds_text, strategy_name = sys.argv[2:]
        work(name, int(width_text), int(seeds_text), strategy_name)
    else:
        main()
