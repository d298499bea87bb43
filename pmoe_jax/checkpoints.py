"""Checkpoints of a run, by orbax.

A checkpoint holds `state` (the members' `TrainState`), `attack` (their poison masks and triggers:
evaluation needs nothing else than the data set) and `meta` (position in training, format). Nothing
in it is executed when it is read. A checkpoint does not depend on the devices it was written from;
of several processes each writes and reads the parts that lie on its own.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import absl.logging
import jax
import orbax.checkpoint as ocp
import psutil
from orbax.checkpoint import checkpoint_managers

from pmoe_jax import config as config_lib
from pmoe_jax import processes
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import DiskError
from pmoe_jax.rundir import RunDirectory

FORMAT = 1

#: Items of a checkpoint that are trees of arrays.
_ARRAYS = ("state", "attack")

#: Bytes on disk of a member's attack at most: two masks, and the pattern and grid of an image of
#: 1024x1024 pixels, neither of them compressed.
ATTACK_LIMIT = 32 * 2**20


class DataShape(NamedTuple):
    """What the arrays of a checkpoint depend on of its data set: N, classes Y, and (H, W, C)."""

    num_images: int
    num_classes: int
    image_shape: tuple[int, int, int]


class Checkpoints:
    """The checkpoints of one run directory. A context manager."""

    def __init__(self, run: RunDirectory, keep_every_steps: int = 0):
        self._run = run
        self._keep: list[Any] = [checkpoint_managers.LatestN(2)]
        if keep_every_steps:
            self._keep.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        self._failed = False
        self._chosen: list[int] = []
        self._manager = self._new_manager()

    def _new_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            pathlib.Path(self._run.path).absolute() / "checkpoints",
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "attack": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(self._keep),
                # A save takes well under a second, and synchronous saves make the order of what
                # reaches the disk plain: figures, checkpoint, manifest.
                enable_async_checkpointing=False,
                create=True,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, attack: Any, meta: dict[str, Any]) -> None:
        """Saves a step, then lists it in the manifest.

        Raises:
          DiskError: the disk refuses; the last whole checkpoint is left as it is, and nothing of
            this one.
          PmoeError: the directory is gone.
        """
        self._run.check_still_there()
        if self._failed:
            self._remove_leftovers()
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            attack=ocp.args.StandardSave(attack),
            meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta}),
        )
        try:
            with _without_tracebacks():
                self._manager.save(step, args=args, force=True)
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            if processes.peer_is_gone(error):
                raise
            if processes.several():  # The others wait in orbax: none of them can clean up.
                raise PmoeError(
                    f"checkpoint {step} in {self._run.path} cannot be written ({_reason(error)}); "
                    "make room and run the same commands again: they go on from the last whole one"
                ) from None
            self._forget(step)
            raise DiskError(
                f"checkpoint {step} in {self._run.path} cannot be written ({_reason(error)}); "
                "make room and run the same command again: it goes on from the last whole one"
            ) from None
        try:
            self._run.seal(self._manager.all_steps())
        except DiskError:
            self._forget(step)  # Unlisted ones would push the listed ones out.
            raise

    def _forget(self, step: int) -> None:
        """Removes what was written of a step that could not be saved."""
        self._failed = True
        with contextlib.suppress(Exception):  # It may be in any state after a failure.
            self._manager.close()
        shutil.rmtree(self._run.path / "checkpoints" / str(step), ignore_errors=True)
        self._remove_leftovers()
        self._manager = self._new_manager()

    def discard_after(self, step: int) -> None:
        """Removes all but the listed checkpoints up to `step`, which training goes on from.

        What is left are checkpoints that a kill left before the manifest could list them, parts of
        such, and damaged ones, which would be in the way of their successors.
        """
        keep = [listed for listed in self._run.whole_steps() if listed <= step]
        self._run.seal(keep)
        # Of several processes all delete together, and must not delete differently.
        for found in processes.of_first(sorted(set(self._manager.all_steps()) - set(keep))):
            self._manager.delete(found)
        self._remove_leftovers()

    @processes.by_first
    def _remove_leftovers(self) -> None:
        for entry in (self._run.path / "checkpoints").glob("*"):
            if entry.is_dir() and not entry.name.isdigit():
                shutil.rmtree(entry, ignore_errors=True)

    def restore(self, abstract: Any, step: int | None = None) -> tuple[int, Any, Any, Any] | None:
        """The newest whole checkpoint, or the one of a step.

        Args:
          abstract: the state's expected shapes and dtypes; arrays are put where its first leaf
            says, by default on the first device.
          step: which one; None falls back over damaged ones and says so on stderr.

        Returns:
          Step, state, attack and meta; None if there is no checkpoint at all.

        Raises:
          PmoeError: all are damaged, the step does not exist, or shapes do not fit.
        """
        self._choose(step, _most_on_disk(abstract))
        chosen = processes.of_first(self._chosen)
        return (chosen[0], *self._read(chosen[0], abstract)) if chosen else None

    @processes.by_first
    def _choose(self, step: int | None, most: int) -> None:
        """Puts the step to restore into `_chosen`; no step where there is no checkpoint.

        One whose files have more than `most` bytes together is none.
        Only the first of several processes chooses: a file system may show them different files.
        """
        self._chosen = []
        steps = self._run.whole_steps()
        if step is not None and step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise PmoeError(f"{self._run.path} has no checkpoint of step {step}; it has {have}")
        wanted = steps[::-1] if step is None else [step]
        damages = []
        for candidate in wanted:
            damage = self._run.damage(candidate, most)
            if damage is None:
                self._chosen = [candidate]
                return
            damages.append(damage)
            print(f"warning: checkpoint {candidate} is skipped: {damage}", file=sys.stderr)
        if damages:
            raise PmoeError(f"no checkpoint of {self._run.path} is whole: {damages[0]}")

    def data_shape(self, step: int | None = None) -> DataShape:
        """What the arrays of a checkpoint, by default of any, say of the data set of its run.

        Only their shapes are read; whether the checkpoint is whole is for `restore` to find out.

        Raises:
          PmoeError: no checkpoint, or shapes that no model of ours has.
        """
        steps = self._run.whole_steps()
        problem = f"{self._run.path} has no finished checkpoint yet; train it first"
        for candidate in [step] if step in steps else steps[::-1]:
            try:
                return self._shape_at(candidate)
            except Exception as error:  # A stranger's files make their parsers raise anything.
                problem = (
                    f"checkpoint {candidate} of {self._run.path} is damaged: its arrays are not "
                    f"those of a model and an attack ({_first_line(error)})"
                )
        raise PmoeError(problem)

    def _shape_at(self, step: int) -> DataShape:
        for path in (self._run.path / "checkpoints" / str(step)).glob("*/_METADATA"):
            if path.stat().st_size > config_lib.JSON_LIMIT:
                raise ValueError(f"{path.name} is too large")
        stored, found = (self._manager.item_metadata(step)[i] for i in _ARRAYS)
        state = ocp.tree.to_flat_dict(stored.tree, sep=".")
        attack = ocp.tree.to_flat_dict(getattr(found, "tree", found), sep=".")
        height, width, channels = attack["trigger.pattern"].shape[1:]
        return DataShape(
            num_images=attack["triggered"].shape[1],
            num_classes=state["params.classifier.bias"].shape[1],
            image_shape=(height, width, channels),
        )

    def _read(self, step: int, abstract: Any) -> tuple[Any, Any, Any]:
        what = f"checkpoint {step} of {self._run.path}"
        try:
            # Before reading: orbax finds out in the middle, and then leaves tracebacks behind.
            stored, found = (self._manager.item_metadata(step)[i] for i in _ARRAYS)
            check_shapes(abstract, stored.tree, what)
            # Not where they were written from: that may be another machine.
            where = getattr(jax.tree.leaves(abstract)[0], "sharding", None)
            where = where or jax.sharding.SingleDeviceSharding(jax.devices()[0])
            state, attack = (_placed(t, where) for t in (abstract, getattr(found, "tree", found)))
            self._check_size(step, (state, attack))
            for leaf in jax.tree.leaves((stored.tree, getattr(found, "tree", found))):
                _check_chunks(leaf, what)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(state),
                    attack=ocp.args.StandardRestore(attack),
                    meta=ocp.args.JsonRestore(),
                ),
            )
            meta = dict(restored["meta"])
        except PmoeError:
            raise
        except Exception as error:  # A stranger's files make their parsers raise anything.
            if processes.peer_is_gone(error):
                raise
            raise PmoeError(
                f"{what} cannot be read, or does not fit its config and data set "
                f"({_first_line(error)}); evaluate it with the data set it was trained on"
            ) from None
        if meta.get("format") != FORMAT:
            raise PmoeError(
                f"{what} has format {meta.get('format')}; this version reads format {FORMAT}"
            )
        epoch: Any = meta.get("epoch")
        if type(epoch) not in (int, float) or not 0 <= epoch < 2**53:
            raise PmoeError(f"{what} does not say its epoch; its meta is damaged")
        if type(meta.get("stage", "")) is not str:
            raise PmoeError(f"{what} has a stage that is no text; its meta is damaged")
        return restored["state"], restored["attack"], meta

    def _check_size(self, step: int, tree: Any) -> None:
        """A few bytes on disk can declare arrays of any size."""
        leaves = jax.tree.leaves(tree)
        needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        available = psutil.virtual_memory().available
        if needed > available:
            raise PmoeError(
                f"checkpoint {step} of {self._run.path} needs {needed / 2**30:.1f} GiB and "
                f"{available / 2**30:.1f} GiB are available; read it on a larger machine"
            )


def _most_on_disk(abstract: Any) -> int:
    """Bytes that a checkpoint's files may have: compressed, they have fewer than its arrays."""
    leaves = jax.tree.leaves(abstract)
    state = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    members = max((leaf.shape[0] for leaf in leaves if leaf.shape), default=1)
    return 2 * state + ATTACK_LIMIT * members


def _check_chunks(leaf: Any, what: str) -> None:
    """A chunk is read as a whole, and its size says nothing of the array's."""
    chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None)
    if chunk is not None and any(
        part > max(1, whole) for part, whole in zip(chunk, leaf.shape, strict=True)
    ):
        raise PmoeError(f"{what} is damaged: an array of shape {leaf.shape} has chunks of {chunk}")


def _placed(tree: Any, where: Any) -> Any:
    """Shapes and dtypes of a tree whose arrays are to lie there."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )


def check_shapes(expected: Any, found: Any, what: str) -> None:
    """Raises a `PmoeError` at the first leaf whose shape or dtype differs from the expected one.

    The trees may be of different types, as long as their paths agree.
    """
    want, have = (ocp.tree.to_flat_dict(tree, sep=".") for tree in (expected, found))
    for name in sorted(want.keys() | have.keys()):
        wanted, stored = (
            f"{tree[name].dtype} {tuple(tree[name].shape)}" if name in tree else "absent"
            for tree in (want, have)
        )
        if wanted != stored:
            raise PmoeError(
                f"{what} does not fit its config and data set: {name} is {stored}, wanted "
                f"{wanted}; evaluate it with the data set it was trained on"
            )


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Within, orbax does not log what it raises as well; on failure its threads end first."""
    before, threads = absl.logging.get_verbosity(), set(threading.enumerate())
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        yield
    except (OSError, ValueError):
        end = time.monotonic() + 10
        while (left := set(threading.enumerate()) - threads) and time.monotonic() < end:
            for thread in left:
                with contextlib.suppress(RuntimeError):  # One that is about to start.
                    thread.join(0.1)
            time.sleep(0.01)
        raise
    finally:
        absl.logging.set_verbosity(before)


def _reason(error: BaseException) -> str:
    """ "No space left on device" instead of a page of tensorstore's."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
    known = [os.strerror(code) for code in codes if os.strerror(code) in str(error)]
    return known[0] if known else _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
