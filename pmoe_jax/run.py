"""Runs: trains the members of a config in a run directory.

What happens when training starts, in this order: the config is checked; the data set is read; the
run directory is locked, and created or recognised; the newest whole checkpoint, if there is one, is
restored, and figures after it are dropped; training goes on from the step behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pmoe_jax import config as config_lib
from pmoe_jax import (
    evaluation,
    inputs,
    launch,
    memory,
    mesh,
    processes,
    provenance,
    signals,
    trained,
)
from pmoe_jax import members as members_lib
from pmoe_jax.checkpoints import Checkpoints
from pmoe_jax.data import Dataset, stream
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import DiskError
from pmoe_jax.members import Attack, Member
from pmoe_jax.rows import Row
from pmoe_jax.rundir import RunDirectory
from pmoe_jax.training import Plan, TrainState, plan_of, programs_of

#: Images of the training set are kept on the device up to this share of its memory.
DEVICE_SHARE = 0.25

#: Free memory goes back to the system at the end of an epoch, not more often than this.
GIVE_BACK_SECONDS = 60


class Interrupted(Exception):
    """Training was asked to stop (SIGTERM, SIGINT) and has saved its state."""

    exit_code = 75


def _loss_sum(meta: Mapping[str, Any], count: int, run: RunDirectory) -> np.ndarray:
    """float64 [M] of a checkpoint's meta, which may come from a stranger."""
    stored: Any = meta.get("loss_sum")
    timing = meta.get("evaluation_missing")
    fine = isinstance(stored, list) and len(stored) == count and all(map(_is_number, stored))
    if not fine or not (timing is None or _are_two_numbers(timing)):
        raise PmoeError(f"the newest checkpoint of {run.path} has damaged meta; remove it")
    return np.asarray(stored, np.float64)


def _are_two_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    """A whole number of JSON may be larger than a float holds."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)


def train(
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    members: Sequence[Member] | None = None,
    dataset: Dataset | None = None,
    progress: bool = True,
    profile: bool = False,
    watch: Callable[[int, int], None] | None = None,
    stop: Stop | None = None,
) -> list[Row]:
    """Trains all members of a run, or goes on where a killed one stopped.

    Args:
      config: see `pmoe_jax.config`.
      workdir: the run directory; it is created.
      members: members that the config alone does not describe (mixed rates or triggers).
      dataset: an already loaded data set; by default the configured one is read.
      progress: show a progress bar on stderr.
      profile: write a trace of one step (the sixth, or the last) to `workdir/profile`.
      watch: called after every step with the steps done and the steps of the whole training.
      stop: of a caller that holds `stop_signal`; by default training listens to signals itself.

    Returns:
      The rows of the last epoch.

    Raises:
      PmoeError: bad input. Nothing is written for errors that can be seen before training.
      Interrupted: stopped by a signal, after saving.
    """
    config_lib.validate(config.to_dict())
    if os.path.lexists(workdir) and not os.path.isdir(workdir):
        raise PmoeError(f"{workdir} is no folder; choose another workdir")
    members = list(members or members_lib.from_config(config))
    dataset = dataset or inputs.load_data(config)
    check_against_data(config, members, dataset)
    processes.check_same(
        "versions of pmoe_jax or its libraries", json.dumps(provenance.facts()["packages"])
    )
    processes.check_same("config, members or data set", _described(config, members, dataset))
    run = RunDirectory(workdir)
    # Before the directory is touched: this raises what only model and data together can tell.
    session = _Session(config, members, dataset, run, progress, profile, watch, stop)
    with run:
        run.start(config, members)
        # The first has added this session to a file that the others can see, if they can.
        if not processes.same(_text_of(run.path / "provenance.json")):
            raise PmoeError(
                f"{run.path} is not the same directory for all processes; give a --workdir on a "
                "file system that all of them see"
            )
        if run.whole_steps() and not run.noted("dataset"):
            raise PmoeError(
                f"{run.path / 'provenance.json'} does not say any more which data the run was "
                "begun with, and it must not go on with others; restore the file"
            )
        # Only the first process notes it, and so only that one reads all images for it.
        known = dataset.fingerprint() if processes.is_first() else ""
        run.note(dataset={"name": dataset.name, "sha256": known})
        processes.say(_scale(config, dataset))
        return session.train()


def _scale(config: Any, dataset: Dataset) -> str:
    """What is trained on what, for who has taken a default for something else."""
    place = config.data.source or ("prepared earlier" if dataset.origin else "")
    return (
        f"{dataset.name}{place and f' ({place})'}, {len(dataset.train_images)} training images: "
        f"{config.model.name} of width {config.model.width}, {config.train.epochs} epochs"
    )


def _described(config: Any, members: Sequence[Member], dataset: Dataset) -> str:
    """What all processes of a run must have alike; the data set by its labels."""
    labels = [dataset.train_labels, dataset.test_labels]
    return json.dumps({
        "config": config_lib.to_json(config),
        "members": [member.to_json() for member in members],
        "labels": [hashlib.sha256(array.tobytes()).hexdigest() for array in labels],
    })  # fmt: skip


def _text_of(path: pathlib.Path) -> str:
    """A file's text; "" if there is none."""
    return path.read_text() if path.exists() else ""


class Calibration(NamedTuple):
    """What a run will need.

    Attributes:
      bytes: device memory of a step, the training images included; None where JAX cannot tell.
      fixed_bytes: the part of it that does not grow with the members.
      step_seconds: a step of all members.
      evaluation_seconds: a whole evaluation: clean and, if there is a trigger, triggered images.
    """

    bytes: int | None
    fixed_bytes: int
    step_seconds: float
    evaluation_seconds: float


def calibrate(
    config: Any, members: Sequence[Member], dataset: Dataset, steps: int = 3
) -> Calibration:
    """Compiles the step of a run and times a few; leaves nothing on disk but the compile cache.

    With `steps=0` nothing is timed.

    Raises:
      PmoeError: bad input, or members that do not fit into memory.
    """
    session = _Session(config, members, dataset, RunDirectory("calibration"))
    programs, attack = session.programs, session.attack
    state = programs.init(members, dataset.image_shape)
    keys = programs.keys(members, "order")
    step_on = session.stepper(state, attack)
    needed, fixed = session.needed_bytes, dataset.train_images.size
    if needed is None:  # Images are streamed: only a batch of them is on the device.
        needed, fixed = session.streamed_bytes(state, attack), 0
    if not steps:
        return Calibration(needed, fixed, math.nan, math.nan)
    seconds = []
    for step in range(min(1 + steps, session.plan.total_steps)):
        epoch, position = divmod(step, session.plan.steps_per_epoch)
        if position == 0:
            order = programs.epoch_order(keys, np.int32(epoch))
        begin = time.perf_counter()
        state, losses = step_on(state, attack, order, *session.plan.batch_at(step))
        jax.block_until_ready(losses)
        seconds.append(time.perf_counter() - begin)
    size = min(config.evaluation.batch_size, len(dataset.test_images))
    applied = attack if session.triggered else None
    for _ in range(2):  # The first one compiles.
        begin = time.perf_counter()
        evaluation.predictions(programs, state.variables, dataset.test_images[:size], applied, size)
        batch_seconds = time.perf_counter() - begin
    batches = math.ceil(len(dataset.test_images) / size)
    # The first step of a program also allocates.
    return Calibration(
        needed,
        fixed,
        float(np.median(seconds[1:] or seconds)),
        batches * batch_seconds,
    )


def check_against_data(config: Any, members: Sequence[Member], dataset: Dataset) -> None:
    """Contradictions between config and data set, before anything is allocated.

    Raises:
      PmoeError: the first one found.
    """
    for split in ("train", "test"):
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if len(images) != len(labels) or images.dtype != np.uint8:
            raise PmoeError(
                f"{dataset.name}: the {split} split has {len(images)} images of {images.dtype} and "
                f"{len(labels)} labels; build data sets by pmoe_jax.data.make"
            )
        if low < 0 or high >= dataset.num_classes:
            raise PmoeError(
                f"{dataset.name}: {split} labels go from {low} to {high}; allowed are 0 to "
                f"{dataset.num_classes - 1}"
            )
    count = len(dataset.train_images)
    if config.train.batch_size > count:
        raise PmoeError(
            f"train.batch_size={config.train.batch_size} is larger than the {count} training "
            f"images of {dataset.name}; choose at most {count}"
        )
    labels = [("poison.target", member.target) for member in members]
    for name, label in [("poison.source", config.poison.source), *labels]:
        if label >= dataset.num_classes:
            raise PmoeError(
                f"{name}={label} is no class of {dataset.name}; it has 0 to "
                f"{dataset.num_classes - 1}"
            )


def is_evaluated(epoch: int, config: Any) -> bool:
    """Whether training evaluates behind an epoch (counted from 1)."""
    every, last = config.evaluation.every_epochs, config.train.epochs
    return epoch % every == 0 or epoch > last - 3


def check(config: Any, members: Sequence[Member], dataset: Dataset) -> None:
    """What training would refuse before its first step, memory aside; leaves nothing on disk.

    Raises:
      PmoeError: the first contradiction between config, members and data set.
    """
    _Session(config, members, dataset, RunDirectory("check"))


@dataclasses.dataclass
class _Session:
    """One process's work on a run."""

    config: Any
    members: Sequence[Member]
    dataset: Dataset
    run: RunDirectory
    progress: bool = False
    profile: bool = False
    watch: Callable[[int, int], None] | None = None
    stop: Stop | None = None

    def __post_init__(self) -> None:
        config, dataset = self.config, self.dataset
        check_against_data(config, self.members, dataset)
        if not processes.is_first():
            self.progress = self.profile = False
        self.plan = plan_of(config, len(dataset.train_images))
        members = len(self.members)
        self.layout = mesh.choose(config.train.mesh, members, config.train.batch_size)
        self.programs = programs_of(config, dataset.num_classes, self.plan, self.layout)
        self.source = config.poison.source if config.poison.source >= 0 else None
        self.triggered = any(member.trigger["name"] != "none" for member in self.members)
        self.needed_bytes: int | None = None
        self.diverged_in: dict[int, str] = {}  # member -> where its step was not finite
        self.unwritten: list[tuple[str, list[Row]]] = []  # files and lines that are to be written
        self.abstract = self.programs.abstract_state(self.members, dataset.image_shape)
        self._check_members_fit()
        attack = members_lib.attacks(
            self.members,
            dataset.train_labels,
            dataset.image_shape,
            inputs.load_patterns(self.members, dataset.image_shape),
            include_target=config.poison.include_target,
            source=self.source,
            carriers=config.poison.carriers,
        )
        self.attack = self.layout.put(attack, mesh.MEMBERS)

    def _check_members_fit(self) -> None:
        """Refuses members that cannot even be held, before any of them is made; what a step needs
        beside them is known only once it is compiled (`_report_memory`)."""
        leaves, shape = jax.tree.leaves(self.abstract), self.dataset.image_shape
        state = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        masks, pattern = 2 * len(self.dataset.train_labels), 4 * math.prod(shape)
        per_member = state // len(self.members) + masks + pattern
        members = len(self.members) // self.layout.shape[0]  # on each device
        needed, available = members * per_member, memory.device_memory()
        each = "" if self.layout.size == 1 else " on each device"
        if needed > available:
            raise PmoeError(
                f"the states, poison masks and triggers of {members} members alone take "
                f"{needed / 2**30:.1f} GiB{each} and {available / 2**30:.1f} GiB are available; at "
                f"most {available // per_member} fit{each}: lower num_seeds or width"
            )

    def train(self) -> list[Row]:
        checkpoint, per_epoch = self.config.checkpoint, self.plan.steps_per_epoch
        listening = contextlib.nullcontext(self.stop) if self.stop else stop_signal()
        with (
            Checkpoints(self.run, checkpoint.keep_every_epochs * per_epoch) as self.checkpoints,
            listening as stop,
        ):
            try:
                with stop.at_once():
                    first, state, attack, meta = self._begin()
                    loss_sum = _loss_sum(meta, len(self.members), self.run)
                    epoch, missing = first // per_epoch, meta.get("evaluation_missing")
                    if missing and processes.of_first([int(self._has_figures(epoch))])[0]:
                        missing = None  # It was made up for in an earlier session.
                    self.run.drop_after(epoch - 1 if missing else epoch)
                    if missing:
                        self._finish_epoch(epoch, state, attack, loss_sum, missing, _quiet)
                        loss_sum = np.zeros(len(self.members))
                        self._write_figures()
                        self.run.seal(self.run.whole_steps())
                if first < self.plan.total_steps:
                    self._loop(first, state, attack, loss_sum, stop)
            except _StopNow:
                raise Interrupted(
                    f"stopped by {stop.asked} before a step was taken; run the same command again "
                    "to go on"
                ) from None
            return [
                row for row in trained.checked_rows(self.run) if row["epoch"] == self.plan.epochs
            ]

    def _has_figures(self, epoch: int) -> bool:
        """Whether all that training writes of an epoch was written before the last seal."""
        name = "metrics.jsonl" if is_evaluated(epoch, self.config) else "training.jsonl"
        known = self.run.lines(name) if self.run.is_sealed(name) else []
        return any(line.get("epoch") == epoch for line in known)

    def _begin(self) -> tuple[int, TrainState, Attack, dict[str, Any]]:
        """Step, state, attack and what was noted beside them: of the newest checkpoint, or fresh.

        "loss_sum" is the sum of the epoch's losses so far, "evaluation_missing" the time that an
        epoch took which could not be evaluated before a signal.
        """
        restored = self.checkpoints.restore(self.abstract)
        self.checkpoints.discard_after(0 if restored is None else restored[0])
        if restored is not None:
            step, state, tree, meta = restored
            members_lib.check_attack_tree(
                tree, self.members, self.dataset.image_shape,
                f"checkpoint {step} of {self.run.path}", len(self.dataset.train_labels),
            )  # fmt: skip
            end = ": it is finished, nothing to train" if step == self.plan.total_steps else ""
            processes.say(f"resuming {self.run.path} at step {step}{end}")
            attack = members_lib.attack_from_tree(tree, self.members)
            return step, state, attack, meta
        state = self.programs.init(self.members, self.dataset.image_shape)
        if self.layout.mesh is None:  # On a mesh it is where it belongs.
            state = self.layout.put(state, mesh.MEMBERS)
        return 0, state, self.attack, {"loss_sum": [0.0] * len(self.members)}

    def _loop(
        self, first: int, state: TrainState, attack: Attack, loss_sum: np.ndarray, stop: Stop
    ) -> None:
        plan, config = self.plan, self.config
        keys = self.programs.keys(self.members, "order")
        with stop.at_once():  # It compiles.
            step_on = self.stepper(state, attack)
        order = None
        pending: list[jax.Array] = []
        mean_loss = np.full(len(self.members), np.nan)
        given_back = time.monotonic()
        clock = _Clock(self.members, plan, self.progress, first)
        for step in range(first, plan.total_steps):
            epoch, position = divmod(step, plan.steps_per_epoch)
            if order is None or position == 0:
                order = self.programs.epoch_order(keys, np.int32(epoch))
            start, size = plan.batch_at(step)
            traced = self.profile and step == min(first + 5, plan.total_steps - 1)
            with self._trace(state) if traced else contextlib.nullcontext():
                state, losses = step_on(state, attack, order, start, size)
                if traced:
                    jax.block_until_ready(state)
            pending.append(losses)
            # The next step is sent off before this one's loss is fetched, and no more than that:
            # a queue of steps would hold memory and make progress lie.
            if len(pending) > 1:
                loss_sum = loss_sum + mesh.fetch(pending.pop(0)).astype(np.float64)
            if position:
                mean_loss = loss_sum / position
            clock.tick(size, mean_loss)
            if self.watch is not None:
                self.watch(step + 1, plan.total_steps)
            stop.asked = stop.asked or processes.stop_asked(step)
            ends_epoch = position + 1 == plan.steps_per_epoch
            every = config.checkpoint.every_steps
            if not (ends_epoch or stop.asked or (every and (step + 1) % every == 0)):
                continue
            while pending:
                loss_sum = loss_sum + mesh.fetch(pending.pop(0)).astype(np.float64)
            missing = None
            if ends_epoch:
                mean_loss = loss_sum / plan.steps_per_epoch
                timing = clock.epoch()
                try:
                    with stop.at_once():
                        self._finish_epoch(epoch + 1, state, attack, loss_sum, timing, clock.say)
                    loss_sum = np.zeros(len(self.members))
                except _StopNow:  # Evaluation can take minutes; it is made up for later.
                    missing = list(timing)
                if time.monotonic() - given_back > GIVE_BACK_SECONDS:
                    launch.give_back_memory()
                    given_back = time.monotonic()
            last = step + 1 == plan.total_steps
            began = time.perf_counter()
            try:
                self._save(step + 1, state, attack, loss_sum, missing)
            except DiskError as error:
                if last or stop.asked:
                    raise
                clock.say(f"warning: training goes on unsaved: {error}", keep=True)
            if ends_epoch:
                clock.resume()
            else:
                clock.leave_out(time.perf_counter() - began)
            if stop.asked and (missing or not last):
                clock.close()
                raise Interrupted(
                    f"stopped by {stop.asked} after step {step + 1}, which is saved in "
                    f"{self.run.path}; run the same command again to go on"
                )
        clock.close()

    def _save(
        self,
        step: int,
        state: TrainState,
        attack: Attack,
        loss_sum: np.ndarray,
        missing: Sequence[float] | None,
    ) -> None:
        """Figures, then the checkpoint, so that none is without the figures before it."""
        self._write_figures()
        meta: dict[str, Any] = {
            "epoch": step / self.plan.steps_per_epoch, "loss_sum": loss_sum.tolist()
        }  # fmt: skip
        if missing:
            meta["evaluation_missing"] = missing
        self.checkpoints.save(step, state, members_lib.attack_to_tree(attack), meta)

    def _write_figures(self) -> None:
        while self.unwritten:  # What the disk refused stays for the next time.
            self.run.append(*self.unwritten[0])
            del self.unwritten[0]

    def stepper(self, state: TrainState, attack: Attack) -> Any:
        """step(state, attack, order, start, size) for data on the device, or streamed."""
        images, labels = self.dataset.train_images, self.dataset.train_labels
        # Images that were too large to be decoded at once appear batch by batch.
        fits = isinstance(images, np.ndarray) and self._on_device(images.size)
        if processes.all_agree(fits):
            held, held_labels = self._held(images), self._held(labels.astype(np.int32))
            shape = jax.ShapeDtypeStruct((len(self.members), len(labels)), jnp.int32)
            order = self.layout.shapes(shape, mesh.MEMBERS)
            size = min(self.plan.batch_size, len(labels))
            compiled = self.programs.step.lower(
                state, attack, order, np.int32(0), held, held_labels, size
            ).compile()
            self._report_memory(compiled)

            def step(state: Any, attack: Any, order: Any, start: int, taken: int) -> Any:
                args = (state, attack, order, np.int32(start), held, held_labels)
                return compiled(*args) if taken == size else self.programs.step(*args, taken)

            return step

        epoch: Any = None
        ahead: Iterator[stream.Batch] = iter(())

        def step_from_host(state: Any, attack: Any, order: Any, start: int, taken: int) -> Any:
            nonlocal epoch, ahead
            if order is not epoch:
                drawn = mesh.own_rows(order)
                first = start // self.plan.batch_size
                parts = map(self.plan.batch_at, range(first, self.plan.steps_per_epoch))
                wanted = (drawn[:, self._own_images(begin, size)] for begin, size in parts)
                epoch, ahead = order, stream.batches(images, labels, wanted)
            batch = self._on_mesh(next(ahead), taken)
            return self.programs.step_on_batch(state, attack, *batch)

        return step_from_host

    def streamed_bytes(self, state: TrainState, attack: Attack) -> int | None:
        """Device memory of a step on a batch from the host; None where JAX cannot tell."""
        drawn = (len(self.members), self.plan.batch_at(0)[1])
        shape = self.dataset.image_shape
        index, images, labels = (
            jax.ShapeDtypeStruct((*drawn, *further), kind)
            for further, kind in (((), np.int32), (shape, np.uint8), ((), np.int32))
        )
        step = self.programs.step_on_batch
        return memory.bytes_of(step.lower(state, attack, index, images, labels).compile())

    def _held(self, array: np.ndarray) -> Any:
        """The training set's images or labels, on every device."""
        if self.layout.mesh is None:
            return jax.device_put(array)
        return self.layout.put(array, mesh.SAME)

    def _own_images(self, begin: int, size: int) -> slice:
        """Places in the epoch's order of what this process reads of a batch."""
        shape = (len(self.members), size)
        own = self.layout.box(shape, self.programs.batch_cut(size))[1]
        return slice(begin + own.start, begin + own.stop)

    def _on_mesh(self, batch: stream.Batch, size: int) -> tuple[Any, ...]:
        """A batch of which this process has read its share."""
        cut = self.programs.batch_cut(size)
        return tuple(
            self.layout.put_box(part, (len(self.members), size, *part.shape[2:]), cut)
            for part in batch
        )

    def _on_device(self, size: int) -> bool:
        residence = self.config.data.residence
        if residence == "auto":
            return size <= DEVICE_SHARE * memory.device_memory()
        return residence == "device"

    def _report_memory(self, compiled: Any) -> None:
        """Prints what a step needs; refuses what cannot fit."""
        needed = memory.bytes_of(compiled)
        if needed is None:
            return
        fixed = self.dataset.train_images.size
        self.needed_bytes = needed
        available = memory.device_memory()
        members = len(self.members) // self.layout.shape[0]  # on each device
        per_member = (needed - fixed) / members
        each = "" if self.layout.size == 1 else " on each device"
        processes.say(
            f"{len(self.members)} members{self.layout.describe()}, {self.programs.strategy}: "
            f"a step needs {needed / 2**30:.2f} GiB{each} ({per_member / 2**30:.2f} GiB a member); "
            f"{available / 2**30:.1f} GiB available"
        )
        if needed > available:
            fitting = max(0, math.floor((available - fixed) / per_member))
            raise PmoeError(
                f"{members} members need {needed / 2**30:.1f} GiB{each} and "
                f"{available / 2**30:.1f} GiB are available; at most {fitting} fit{each}: lower "
                "num_seeds, batch size or width"
            )

    def _finish_epoch(
        self,
        epoch: int,
        state: TrainState,
        attack: Attack,
        loss_sum: np.ndarray,
        timing: Sequence[float],
        say: Callable[..., None],
    ) -> None:
        """Measures the end of an epoch; its lines are then in `unwritten`.

        Args:
          timing: seconds of the epoch's steps, images per second.
          say: shows a text.
        """
        diverged = mesh.fetch(state.diverged_at)
        for index, (member, when) in enumerate(zip(self.members, diverged, strict=True)):
            if when >= 0 and index not in self.diverged_in:
                where = self._where_diverged(index, int(when), state, attack)
                self.diverged_in[index] = where
                processes.say(
                    f"warning: member {index} (seed {member.seed}, trigger "
                    f"{member.trigger['name']}, poisoning rate {100 * member.rate:g} %) diverged "
                    f"at step {when}, first not finite: {where}; it is marked and left out of "
                    "means"
                )
        lines = [
            {
                "epoch": epoch,
                "member": index,
                "seed": member.seed,
                "train_loss": _mean_or_none(loss_sum[index], self.plan.steps_per_epoch),
                "diverged_at": int(diverged[index]),
                **({"diverged_in": self.diverged_in[index]} if diverged[index] >= 0 else {}),
                "seconds": round(timing[0], 2),
                "images_per_second": round(timing[1], 1),
            }
            for index, member in enumerate(self.members)
        ]
        rows = None
        if is_evaluated(epoch, self.config):
            say(f"evaluating epoch {epoch}")
            rows = self._rows(epoch, state, attack)
            say(_brief(epoch, rows, self.members), keep=True)
        self.unwritten.append(("training.jsonl", lines))
        if rows is not None:
            self.unwritten.append(("metrics.jsonl", rows))

    def _where_diverged(
        self, member: int, step: int, state: TrainState, attack: Attack
    ) -> str:  # fmt: skip
        """The layer (or gradient, or new value) that was not finite in a member's last step.

        The member's state stood still from that step on, so that the step can be taken again, by
        this member alone and on one device, wherever it was trained.
        """
        keys = self.programs.keys(self.members, "order")
        order = self.programs.epoch_order(keys, np.int32(step // self.plan.steps_per_epoch))
        start, size = self.plan.batch_at(step)
        index = mesh.fetch(order)[member, start : start + size]
        images = np.asarray(self.dataset.train_images[index])
        labels = self.dataset.train_labels[index].astype(np.int32)
        one, own = jax.tree.map(lambda leaf: mesh.fetch(leaf)[member], (state, attack))
        try:
            return self.programs.first_not_finite(one, own, index, images, labels) or "unknown"
        except RuntimeError:  # Such as memory that is short; training goes on without the name.
            return "unknown"

    def _rows(self, epoch: int, state: TrainState, attack: Attack) -> list[Row]:
        return trained.rows_of(
            self.config, self.members, self.programs, state, attack if self.triggered else None,
            self.dataset.test_images, self.dataset.test_labels,
            run=self.run.name, dataset=self.dataset.name, epoch=epoch,
        )  # fmt: skip

    @contextlib.contextmanager
    def _trace(self, state: TrainState) -> Iterator[None]:
        """A trace of one step, long behind compilation; it opens in Perfetto or XProf."""
        jax.block_until_ready(state)  # The step before belongs to another trace.
        with jax.profiler.trace(str(self.run.path / "profile")):
            yield


def _mean_or_none(total: float, count: int) -> float | None:
    """The mean; None, which JSON knows, in place of NaN and infinity."""
    return float(total / count) if math.isfinite(total) else None


def _quiet(text: str, keep: bool = False) -> None:
    """Stands in for a progress bar: only what is kept is shown."""
    if keep and processes.is_first():
        print(text, file=sys.stderr)


def _brief(epoch: int, rows: Sequence[Row], members: Sequence[Member]) -> str:
    if not members_lib.same_attack(members):
        return f"epoch {epoch}: evaluated {len(members)} members, which have no common mean"
    parts = [
        f"{evaluation.TITLES[name]} {summary.mean:.1f}"
        for name, summary in evaluation.summarize(rows).items()
        if name in ("ba", "asr")
    ]
    every = {row["member"] for row in rows}
    gone = {row["member"] for row in rows if row["stage"] == "diverged"}
    over = f"{len(every - gone)} of {len(every)} members" if gone else "members"
    return f"epoch {epoch}: {', '.join(parts) or 'all members diverged'} (mean over {over})"


class _StopNow(SystemExit):
    """A signal where nothing is lost by stopping at once.

    A SystemExit, as that is not taken for a failure on its way up.
    """


@dataclasses.dataclass
class Stop:
    """The name of the signal that asked to stop, if one did."""

    asked: str = ""
    raises: bool = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal (also one that came before) raises `_StopNow`."""
        self.raises = True
        try:
            if self.asked:
                raise _StopNow
            yield
        except Exception:
            if self.asked:  # Python or a library wrapped what the handler raised.
                raise _StopNow from None
            raise
        finally:
            self.raises = False


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """SIGTERM and SIGINT ask to stop behind the current step; a second SIGINT stops at once."""
    stop = Stop()
    if processes.several():  # They stop together: see `processes.stop_asked`.
        yield stop
        return

    ending: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if (stop.asked or stop.raises) and signals.sent_again(number, frame):
            return
        if stop.asked and number == signal.SIGINT:
            ending.append(number)
            raise KeyboardInterrupt
        stop.asked = signal.Signals(number).name
        if stop.raises:
            ending.append(number)
            raise _StopNow

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell's background job ignores SIGINT: it is meant for another one.
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, ask)
    except ValueError:
        pass  # Only the main thread may set handlers; a library user's thread goes without.

    def sent(kind: type[BaseException]) -> int | None:
        if kind is _StopNow:
            return signal.Signals[stop.asked]
        return signal.SIGINT if kind is KeyboardInterrupt else None

    try:
        with signals.heard(sent, ending):
            yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Clock:
    """The progress bar, and the time spent in training steps alone."""

    def __init__(self, members: Sequence[Member], plan: Plan, show: bool, first: int):
        self._members = len(members)
        self._bar = tqdm(
            total=plan.total_steps, initial=first, unit="step", disable=not show, smoothing=0.1,
            dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip
        self._images = 0
        self._since = time.perf_counter()

    def tick(self, size: int, loss: np.ndarray) -> None:
        """Counts one step of `size` images a member."""
        self._images += size * self._members
        elapsed = time.perf_counter() - self._since
        finite = loss[np.isfinite(loss)]
        shown = f"loss {finite.mean():.3f}, " if finite.size else ""
        self._bar.set_postfix_str(f"{shown}{self._images / elapsed:.0f} images/s", refresh=False)
        self._bar.update()

    def epoch(self) -> tuple[float, float]:
        """Seconds and images per second since the epoch (or session) began."""
        elapsed = time.perf_counter() - self._since
        return elapsed, self._images / elapsed

    def resume(self) -> None:
        """Starts the next epoch's clock."""
        self._images, self._since = 0, time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Does not count what was no training."""
        self._since += seconds

    def say(self, text: str, keep: bool = False) -> None:
        """Shows a text in the bar, or for good above it."""
        if not keep:
            self._bar.set_postfix_str(text)
        elif processes.is_first():  # A bar that is not shown would write, too.
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
