"""What Fine-Pruning does with the cuts of one combination: it trains them, and keeps each as a run.

Axes: M member, R pruning rate, T model (a cut of a member, cut by cut), E expert, C channel.

All cuts of one combination of layers, fine-tuning data, fraction and learning rate are trained by
one program. Each cut becomes a run directory of its own, with a checkpoint an epoch (the epochs
count from 0, as pruned); a killed program goes on with the last epoch that all of them have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pmoe_jax import defences, defend_config, masks, memory, training
from pmoe_jax import members as members_lib
from pmoe_jax.checkpoints import Checkpoints
from pmoe_jax.defend_base import Base, jit, tile
from pmoe_jax.errors import PmoeError
from pmoe_jax.rows import Row
from pmoe_jax.rundir import RunDirectory
from pmoe_jax.training import TrainState, programs_of

#: Sets the order of images in fine-tuning apart from that of training.
ORDER = zlib.crc32(b"fine-tuning")


@dataclasses.dataclass(frozen=True)
class Cut:
    """One way to prune all members.

    Attributes:
      name: of its directory.
      label: in tables.
      rates: pruning rate of each member.
      keeps: layer -> bool [M, C] or [M, E, C].
    """

    name: str
    label: str
    rates: list[float]
    keeps: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One way to fine-tune: data, fraction of it, learning rate."""

    data: str
    fraction: float
    learning_rate: float

    @property
    def name(self) -> str:
        """What it adds to a directory's name."""
        share = "" if self.fraction == 1 else f"_{100 * self.fraction:g}pct"
        return f"then_{self.data}{share}_lr{self.learning_rate:g}"

    @property
    def label(self) -> str:
        """In tables."""
        return f"{100 * self.fraction:g} % {self.data}, lr {self.learning_rate:g}"


@dataclasses.dataclass(frozen=True)
class Result:
    """Rows of one cut after pruning and after each epoch of fine-tuning, and its time a model."""

    cut: Cut
    tuning: Tuning | None
    pruned: list[Row]
    tuned: list[Row]
    seconds: float | None


class Session:
    """All cuts of one combination: T = R * M models in one program, R run directories."""

    def __init__(self, base: Base, config: Any, cuts: list[Cut], tuning: Tuning | None):
        self.base, self.config, self.cuts, self.tuning = base, config, cuts, tuning
        self.names = [cut.name + (f"_{tuning.name}" if tuning else "") for cut in cuts]
        self.runs = [RunDirectory(base.out / name) for name in self.names]
        self.diverged_in: dict[int, str] = {}  # model -> where its step was not finite
        self.places: list[str] = []
        if tuning is None:
            self.run_config = base.config
            self.programs = base.programs
            self.plan = base.programs.plan
            return
        self.data = base.clean_set(
            tuning.data, a2=config.quirks.a2_contaminated_clean_set,
            fraction=tuning.fraction, seed=config.seed,
        )  # fmt: skip
        self.run_config = tuned_config(base, config, tuning, len(self.data.labels))
        self.plan = training.plan_of(self.run_config, len(self.data.labels))
        self.programs = programs_of(self.run_config, base.dataset.num_classes, self.plan)

    def prune(self) -> list[Result]:
        """Writes the pruned models."""
        with self._opened() as stores:
            if self._resume(stores) is None:
                state = self._start()
                self._finish(0, 0, state, stores, self.base.rows(state, self.names, 0, "pruned"))
        return [
            Result(cut, None, _rows_at(run, 0), [], None)
            for cut, run in zip(self.cuts, self.runs, strict=True)
        ]

    def tune(self, pruned: list[list[Row]]) -> list[Result]:
        """Fine-tunes, or goes on; `pruned` are the rows of each cut before it."""
        epochs = self.plan.epochs
        with self._opened() as stores:
            resumed = self._resume(stores)
            if resumed is None:
                state = self._start()
                rows = [
                    {**row, "run": name}
                    for name, own in zip(self.names, pruned, strict=True)
                    for row in own
                ]
                self._finish(0, 0, state, stores, rows)
                first = 0
            else:
                first, state = resumed
            if first < epochs:
                self._loop(first, state, self._mask(), stores)
        results = []
        for cut, run, own in zip(self.cuts, self.runs, pruned, strict=True):
            lines = run.lines("training.jsonl")
            seconds = sum(line["seconds"] for line in lines if line["member"] == 0)
            results.append(Result(cut, self.tuning, own, run.rows(), seconds))
        return results

    @contextlib.contextmanager
    def _opened(self) -> Any:
        """The run directories, locked, and their checkpoints."""
        with contextlib.ExitStack() as stack:
            stores = []
            for cut, run in zip(self.cuts, self.runs, strict=True):
                stack.enter_context(run)
                run.start(self.run_config, self.base.members)
                run.note(
                    dataset={
                        "name": self.base.dataset.name,
                        "sha256": self.base.fingerprint,
                    },
                    defence=self._description(cut, run.noted("defence")),
                )
                stores.append(stack.enter_context(Checkpoints(run)))
            yield stores

    def _description(self, cut: Cut, known: Mapping[str, Any]) -> dict[str, Any]:
        made = {
            "of": self.base.run.name,
            "step": self.base.step,
            "checkpoint": self.base.run.sum_of_checkpoint(self.base.step),
            "pruned": cut.rates,
            "layers": sorted(cut.keeps),
            "tuning": dataclasses.asdict(self.tuning) if self.tuning else None,
            "config": defend_config.to_json(self.config),
        }
        if known and "checkpoint" not in known:  # Older versions did not note it.
            del made["checkpoint"]
        return made

    def _resume(self, stores: list[Checkpoints]) -> tuple[int, TrainState] | None:
        """Epoch and state of the newest checkpoint that all directories have whole."""
        have = [
            {step for step in run.whole_steps() if run.damage(step) is None} for run in self.runs
        ]
        common = set.intersection(*have)
        for run, whole in zip(self.runs, have, strict=True):
            damaged = sorted(set(run.whole_steps()) - whole)
            if damaged:
                problem = run.damage(damaged[-1])
                if not common:
                    raise PmoeError(
                        f"{problem}, and no checkpoint is whole in all directories of this "
                        f"defence; restore it, or remove {run.path} to have it made anew"
                    )
                print(f"warning: {problem}; going on with step {max(common)}", file=sys.stderr)
        step = max(common) if common else -1
        epoch = step // self.plan.steps_per_epoch if common else -1
        for run, store in zip(self.runs, stores, strict=True):
            store.discard_after(step)
            run.drop_after(epoch)
        if not common:
            return None
        abstract = self.programs.abstract_state(self.base.members, self.base.dataset.image_shape)
        parts = []
        for store in stores:
            restored = store.restore(abstract, step)
            assert restored is not None
            parts.append(restored[1])
        return epoch, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def _mask(self) -> Any:
        """The mask that fine-tuning holds: bool [T, ...] for every parameter."""
        tune = self.config.tune

        def one(params: Any, keeps: Any) -> Any:
            mask = defences.matching_mask(params, tune.parameters)
            if tune.hold_mask:
                mask = masks.combine(params, mask, self._pruned(params, keeps))
            return mask

        return jax.jit(jax.vmap(one))(tile(self.base.state.params, len(self.cuts)), self._keeps())

    def _keeps(self) -> dict[str, np.ndarray]:
        return {
            layer: np.concatenate([cut.keeps[layer] for cut in self.cuts])
            for layer in self.cuts[0].keeps
        }

    def _pruned(self, params: Any, keeps: Any) -> Any:
        silence = self.config.prune.silence_constant
        return defences.prune_mask(params, keeps, silence_constant=silence)

    def _start(self) -> TrainState:
        """The pruned models with a fresh optimiser."""
        optimizer = self.programs.optimizer

        def one(state: TrainState, keeps: Any) -> TrainState:
            params = masks.apply(state.params, self._pruned(state.params, keeps))
            return state.replace(  # type: ignore[attr-defined]
                params=params, opt_state=optimizer.init(params), step=jnp.zeros_like(state.step)
            )

        return jax.jit(jax.vmap(one))(tile(self.base.state, len(self.cuts)), self._keeps())

    def _loop(self, first: int, state: TrainState, mask: Any, stores: list[Checkpoints]) -> None:
        base, plan, programs = self.base, self.plan, self.programs
        copies, models = len(self.cuts), len(self.cuts) * len(base.members)
        keys = self._order_keys()
        attack = tile(self.data.attack, copies)
        order = programs.epoch_order(keys, np.int32(first))
        step_on = self._compiled(state, attack, mask, order)
        images = jax.device_put(np.asarray(self.data.images[:]))
        labels = jax.device_put(self.data.labels)
        steps = range(first * plan.steps_per_epoch, plan.total_steps)
        more = f" and {copies - 1} more rates" if copies > 1 else ""
        bar = tqdm(steps, desc=self.names[0] + more, unit="step", disable=not base.progress)
        losses: list[jax.Array] = []
        since = time.perf_counter()
        for step in bar:
            epoch, position = divmod(step, plan.steps_per_epoch)
            if position == 0:
                order = programs.epoch_order(keys, np.int32(epoch))
                losses, since = [], time.perf_counter()
            start, size = plan.batch_at(step)
            state, loss = step_on[size](state, attack, mask, order, np.int32(start), images, labels)
            losses.append(loss)
            if len(losses) > 1:
                jax.block_until_ready(losses[-2])
            if position + 1 == plan.steps_per_epoch:
                jax.block_until_ready(state)
                seconds = time.perf_counter() - since
                means = np.mean([np.asarray(one, np.float64) for one in losses], axis=0)
                self._tell_diverged(state, mask)
                self._log(epoch + 1, means, np.asarray(state.diverged_at), seconds / models)
                rows: list[Row] = []
                if (epoch + 1) % self.config.tune.evaluate_every == 0 or epoch + 1 == plan.epochs:
                    rows = base.rows(state, self.names, epoch + 1, "fine_tuned")
                self._finish(epoch + 1, step + 1, state, stores, rows)

    def _stepper(self) -> Any:
        model, optimizer = self.base.model, self.programs.optimizer

        def step(
            state: Any, attack: Any, mask: Any, order: Any, start: Any, images: Any, labels: Any,
            size: int,
        ) -> Any:  # fmt: skip
            def one(state: TrainState, attack: Any, mask: Any, order: jax.Array) -> Any:
                index = jax.lax.dynamic_slice(order, (start,), (size,))
                batch = training.attacked_batch(attack, index, images[index], labels[index])
                return defences.fine_tune_step(model, optimizer, state, mask, *batch)

            return training.over_members(one, self.programs.strategy)(state, attack, mask, order)

        return jit(step, static_argnums=7, donate_argnums=0)

    def _compiled(self, state: TrainState, attack: Any, mask: Any, order: Any) -> dict[int, Any]:
        """The step, by the size of its batch.

        Raises:
          PmoeError: all models together, with the images, do not fit into memory.
        """
        plan, images = self.plan, self.data.images
        held = (
            jax.ShapeDtypeStruct(images.shape, np.uint8),
            jax.ShapeDtypeStruct(self.data.labels.shape, np.int32),
        )
        args = (state, attack, mask, order, np.int32(0), *held)
        sizes = {plan.batch_at(0)[1], plan.batch_at(plan.steps_per_epoch - 1)[1]}
        stepper = self._stepper()
        step_on = {size: stepper.lower(*args, size).compile() for size in sizes}
        needed = max(memory.bytes_of(step) or 0 for step in step_on.values())
        available = memory.device_memory()
        if jax.default_backend() == "cpu":  # That is what is left beside these.
            there = jax.tree.leaves((state, attack, mask, order))
            available += sum(leaf.nbytes for leaf in there)
        if needed > available:
            models = len(self.cuts) * len(self.base.members)
            raise PmoeError(
                f"fine-tuning {models} models at once, with all its {len(images)} images, needs "
                f"{needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are available; give "
                "fewer prune.rates or --members, or a smaller tune.batch_size or tune.fractions"
            )
        return step_on

    def _order_keys(self) -> jax.Array:
        """Keys [T] of the order in which fine-tuning sees the images."""
        keys = jnp.stack([member.key("order") for member in self.base.members])
        own = jax.vmap(lambda key: jax.random.fold_in(key, ORDER))(keys)
        return tile(own, len(self.cuts))

    def _tell_diverged(self, state: TrainState, mask: Any) -> None:
        """Warns of models that diverged in fine-tuning, each once, with the place in its step."""
        for model, step in enumerate(np.asarray(state.diverged_at)):
            number, index = divmod(model, len(self.base.members))
            # Those of the run itself were told before anything began.
            if step < 0 or model in self.diverged_in or self.base.diverged[index]:
                continue
            self.diverged_in[model] = self._where_diverged(model, int(step), state, mask)
            tqdm.write(
                f"warning: member {index} of {self.names[number]} diverged at step {step} of "
                f"fine-tuning, first not finite: {self.diverged_in[model]}; it is marked and left "
                "out of means",
                file=sys.stderr,
            )

    def _where_diverged(self, model: int, step: int, state: TrainState, mask: Any) -> str:
        """The layer (or gradient, or new value) that was not finite in a model's last step.

        The model's state stood still from that step on, so that the step can be taken again: with
        its own mask, and the batch of fine-tuning's own order.
        """
        orders = self.programs.epoch_order(
            self._order_keys(), np.int32(step // self.plan.steps_per_epoch)
        )
        start, size = self.plan.batch_at(step)
        index = np.asarray(orders)[model, start : start + size]
        batch = index, np.asarray(self.data.images[index]), self.data.labels[index]
        attack = jax.tree.map(lambda leaf: leaf[model % len(self.base.members)], self.data.attack)
        own, held = jax.tree.map(lambda leaf: leaf[model], (state, mask))
        try:
            flags = self._not_finite(own, held, attack, *batch)
            named = zip(self.places, flags, strict=True)
            return next((name for name, bad in named if bad), "unknown")
        except RuntimeError:  # Such as memory that is short; tuning goes on without the name.
            return "unknown"

    @functools.cached_property
    def _not_finite(self) -> Any:
        """`training.not_finite` of one model's step; its names are then in `places`."""

        def flags(state: TrainState, mask: Any, attack: Any, *batch: jax.Array) -> list[jax.Array]:
            optimizer = masks.hold(self.programs.optimizer, mask)
            inputs = training.attacked_batch(attack, *batch)
            found = training.not_finite(self.base.model, optimizer, state, *inputs)
            self.places = [name for name, _ in found]
            return [flag for _, flag in found]

        return jit(flags)

    def _place_of(self, model: int) -> dict[str, str]:
        """Of a line of `training.jsonl`: where the model was not finite, if it diverged."""
        if self.base.diverged[model % len(self.base.members)]:
            return {"diverged_in": "the run, before it was defended"}
        return {"diverged_in": self.diverged_in[model]} if model in self.diverged_in else {}

    def _images_an_epoch(self) -> int:
        """Without those of a last batch that is left out."""
        return sum(self.plan.batch_at(step)[1] for step in range(self.plan.steps_per_epoch))

    def _log(self, epoch: int, losses: np.ndarray, diverged: np.ndarray, seconds: float) -> None:
        count = len(self.base.members)
        for number, run in enumerate(self.runs):
            run.append(
                "training.jsonl",
                [
                    {
                        "epoch": epoch,
                        "member": index,
                        "seed": member.seed,
                        "train_loss": float(loss) if np.isfinite(loss) else None,
                        "diverged_at": int(diverged[number * count + index]),
                        **self._place_of(number * count + index),
                        "seconds": round(seconds, 2),
                        "images_per_second": round(self._images_an_epoch() / seconds, 1),
                    }
                    for index, (member, loss) in enumerate(
                        zip(self.base.members, losses[number * count :], strict=False)
                    )
                ],
            )

    def _finish(
        self,
        epoch: int,
        step: int,
        state: TrainState,
        stores: list[Checkpoints],
        rows: list[Row],
    ) -> None:
        """Figures, then checkpoints, of all directories."""
        count = len(self.base.members)
        attack = members_lib.attack_to_tree(self.base.attack)
        stage = "fine_tuned" if epoch else "pruned"
        meta = {"epoch": epoch, "loss_sum": [0.0] * count, "stage": stage}
        for number, (run, store) in enumerate(zip(self.runs, stores, strict=True)):
            run.append("metrics.jsonl", [row for row in rows if row["run"] == self.names[number]])
            own = slice(number * count, (number + 1) * count)
            store.save(step, jax.tree.map(lambda leaf: leaf[own], state), attack, meta)  # noqa: B023


def tuned_config(base: Base, config: Any, tuning: Tuning, num_images: int) -> Any:
    """The config of a fine-tuned run directory: the run's own, with the fine-tuning's training."""
    made = base.config.copy_and_resolve_references()
    tune = config.tune
    made.train.update(
        epochs=tune.epochs,
        batch_size=min(tune.batch_size, num_images),
        optimizer="sgd",
        learning_rate=float(tuning.learning_rate),
        momentum=float(tune.momentum),
        weight_decay=float(tune.weight_decay),
        schedule="constant",
        warmup_epochs=0.0,
    )
    return made


def _rows_at(run: RunDirectory, epoch: int) -> list[Row]:
    return [row for row in run.rows() if row["epoch"] == epoch]
