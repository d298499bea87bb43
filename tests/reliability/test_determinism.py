"""The same command gives the same bits; what does not is measured.

The measured differences are the largest ones between parameters of one member after 18 steps of the
real model at its smallest, in float32, from the same initial values. $PMOE_OTHER_PYTHON may be an
interpreter with another version of JAX, which is measured, too.
"""

import dataclasses
import os
import sys

import harness
import jax
import numpy as np
import pytest
import tally
from locations import ROOT

from pmoe_jax.rundir import RunDirectory


@dataclasses.dataclass
class Trainer:
    """Trains the real model in processes of their own."""

    folder: object
    source: object
    caches: int = 0

    def __call__(self, *flags, cache="", prefix=(), level="0", devices=1, python=sys.executable):
        """Parameters of every member after the run, as a list of arrays [M, ...]."""
        self.caches += 1
        env = harness.environment(self.folder / f"cache{cache or self.caches}")
        if level != "0":
            env["XLA_FLAGS"] = f"--xla_backend_optimization_level={level}"
        if python != sys.executable:
            env["PYTHONPATH"] = str(ROOT)
        if devices > 1:
            env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
        out = self.folder / f"{self.caches}" / "run"
        words = [
            "train", "--noprogress", f"--workdir={out}", "--config.data.name=npz",
            f"--config.data.source={self.source}", "--config.data.image_size=16",
            "--config.num_seeds=2", "--config.model.width=1", "--config.model.num_experts=2",
            "--config.model.patches_per_expert=4", "--config.train.epochs=3",
            "--config.train.batch_size=16", "--config.evaluation.batch_size=40",
            "--config.trigger.name=warp", "--config.poison.rate=0.1", *flags,
        ]  # fmt: skip
        harness.finish(words, env, prefix, python)
        step = RunDirectory(out).whole_steps()[-1]
        state, attack = harness.raw_arrays(out, step)
        return state["params"], (state, attack)


def gap(one, other):
    """Largest absolute difference of two parameter trees."""
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def member(params, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], params)


@pytest.mark.slow
def test_the_same_command_and_what_is_not_the_same(tmp_path, tiny_npz):
    train = Trainer(tmp_path, tiny_npz)
    base, everything = train()
    # Compiled anew, in another directory.
    harness.assert_bit_equal(everything, train()[1])
    tally.add("same command twice, bit for bit")
    optimised, everything = train(level="3")  # as users run it
    harness.assert_bit_equal(everything, train(level="3")[1])
    tally.add("same command twice, bit for bit")
    measured = {"unoptimised or optimised by XLA": gap(optimised, base)}
    for level, kind, together in (("0", "unoptimised", base), ("3", "optimised", optimised)):
        alone, _ = train("--config.num_seeds=1", level=level)
        mapped, _ = train("--config.train.strategy=vmap", level=level)
        mapped_alone, _ = train(
            "--config.train.strategy=vmap", "--config.num_seeds=1", level=level
        )  # fmt: skip
        measured |= {
            f"alone or with another seed (unroll, {kind})": gap(
                member(alone, 0), member(together, 0)
            ),
            f"alone or with another seed (vmap, {kind})": gap(
                member(mapped_alone, 0), member(mapped, 0)
            ),
            f"vmap or unroll ({kind})": gap(mapped, together),
        }
    plain, _ = train("--config.model.kernels=plain")
    measured["model.kernels plain or auto"] = gap(plain, base)
    if os.path.exists("/usr/bin/taskset"):
        one_core, _ = train(prefix=("taskset", "-c", "0"))
        measured["one core or two"] = gap(one_core, base)
    for mesh in ("2x1", "1x2"):
        spread, _ = train(f"--config.train.mesh={mesh}", devices=2)
        measured[f"one device or a mesh of {mesh}"] = gap(spread, base)
    if other := os.environ.get("PMOE_OTHER_PYTHON"):
        others, _ = train(level="3", python=other)
        measured["another version of JAX (optimised)"] = gap(others, optimised)
    # It is the same model still: another seed's is farther away by far.
    apart = gap(member(base, 0), member(base, 1))
    for what, value in measured.items():
        tally.add(f"difference: {what}", 1, largest=float(f"{value:.2g}"))
        assert value < apart / 10, (what, value, apart)
