"""What every defence starts from: a trained run, read whole, with its data and programs.

Axes: M member, T model (of several defended copies of the members, copy by copy), N image.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmoe_jax import config as config_lib
from pmoe_jax import defences, inputs, kernels, metrics, training
from pmoe_jax import members as members_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import Dataset
from pmoe_jax.data.dataset import stratified_choice
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import check_sum, write_with_sum
from pmoe_jax.members import Attack, Member
from pmoe_jax.rows import ROW_FIELDS, Row
from pmoe_jax.rundir import RunDirectory
from pmoe_jax.training import TrainState

#: The metrics of a defence's tables, and what Table 3 calls them.
METRICS = {"ba": "CA", "asr": "ASR", "robust_accuracy": "RA"}


@dataclasses.dataclass(frozen=True)
class CleanSet:
    """What a defender holds: images uint8 [N, H, W, C], true labels int32 [N], and the members'
    attack on them [M, ...], which relabels nothing and triggers images only if contaminated."""

    images: np.ndarray
    labels: np.ndarray
    attack: Attack


@dataclasses.dataclass
class Base:
    """A trained run that is to be defended.

    Attributes:
      run, config, members: the run, and its description.
      dataset: its data.
      state, attack: of its newest checkpoint.
      step, epoch: the checkpoint's.
      own_data: whether the data are those that it was trained on, as far as is known.
      out: the folder that the defence writes.
      progress: whether to show progress bars.
    """

    run: RunDirectory
    config: Any
    members: list[Member]
    dataset: Dataset
    state: TrainState
    attack: Attack
    step: int
    epoch: float
    own_data: bool
    out: pathlib.Path
    progress: bool = True

    def __post_init__(self) -> None:
        # Other data than the run's may be fewer than a batch; nothing is trained by these.
        images = max(len(self.dataset.train_images), self.config.train.batch_size)
        plan = training.plan_of(self.config, images)
        self.programs = training.programs_of(self.config, self.dataset.num_classes, plan)
        self.model, self.strategy = self.programs.model, self.programs.strategy

    @functools.cached_property
    def fingerprint(self) -> str:
        """The data set's; run directories note it."""
        return self.dataset.fingerprint()

    @property
    def triggered(self) -> bool:
        """Whether any member has a trigger."""
        return any(member.trigger["name"] != "none" for member in self.members)

    @property
    def source(self) -> int | None:
        """The attacked class of a source-specific attack."""
        return self.config.poison.source if self.config.poison.source >= 0 else None

    def rows(self, state: TrainState, names: Sequence[str], epoch: float, stage: str) -> list[Row]:
        """Rows of T models: as many copies of the members as there are names of runs."""
        copies, count = len(names), len(self.members)
        rows = trained_lib.rows_of(
            self.config, self.members * copies, self.programs, state,
            tile(self.attack, copies) if self.triggered else None,
            self.dataset.test_images, self.dataset.test_labels,
            names=[f"member {index} of {name}" for name in names for index in range(count)],
            run="", dataset=self.dataset.name, epoch=epoch, stage=stage,
        )  # fmt: skip
        return [
            {**row, "run": names[row["member"] // count], "member": row["member"] % count}
            for row in rows
        ]

    def before(self) -> list[Row]:
        """Rows of the run as it is; measured once, then kept in `before.json`."""
        path = self.out / "before.json"
        if path.exists():
            return read_json(path)
        rows = self.rows(self.state, [self.run.name], self.epoch, "trained")
        write_with_sum(path, json.dumps(rows, indent=1) + "\n")
        return rows

    def measured_rows(
        self, predicted: np.ndarray, triggered: np.ndarray | None, **common: Any
    ) -> list[Row]:
        """Rows from predictions int [M, N] on the test images."""
        return trained_lib.rows_of_classes(
            self.config, self.members, predicted, triggered, self.dataset.test_labels,
            self.diverged, dataset=self.dataset.name, **common,
        )  # fmt: skip

    @property
    def diverged(self) -> np.ndarray:
        """bool [M], members that are left out of means."""
        return np.asarray(self.state.diverged_at) >= 0

    def count(self, kind: str, fraction: float = 1.0, seed: int = 0) -> int:
        """How many images `clean_set` has for the same arguments.

        Raises:
          PmoeError: as `clean_set`.
        """
        labels = self.heldout()[1] if kind == "heldout" else self.dataset.train_labels
        return int(stratified_choice(labels, fraction, seed).sum()) if fraction < 1 else len(labels)

    def check_clean_set(self, kind: str, *, a2: bool = False, fraction: float = 1.0) -> None:
        """Raises what `clean_set` would for the same arguments, without making it."""
        labels = self.heldout()[1] if kind == "heldout" else self.dataset.train_labels
        if any(self.contaminated(kind, a2)) and not self.own_data:
            raise PmoeError(
                f"--data is not what {self.run.path} was trained on, so that none of its images "
                "were triggered; use its own data, or truly clean images (tune.data=('clean',), "
                "prune.data=clean, quirks.a2_contaminated_clean_set=False)"
            )
        lone = np.flatnonzero(np.bincount(labels) == 1)
        if fraction < 1 and lone.size:
            raise PmoeError(
                f"class {lone[0]} has a single image, so that no share of it can be chosen; use "
                "tune.fractions=(1.0,) or add data"
            )

    def contaminated(self, kind: str, a2: bool) -> list[bool]:
        """Of each member, whether its clean set holds triggered images."""
        names = [member.trigger["name"] for member in self.members]
        return [kind == "contaminated" or (a2 and kind == "clean" and n == "square") for n in names]

    def clean_set(
        self, kind: str, *, a2: bool = False, fraction: float = 1.0, seed: int = 0
    ) -> CleanSet:
        """Training images with true labels, or held-out ones.

        Args:
          kind: "clean", "contaminated" (the members' triggered images stay so) or "heldout".
          a2: quirk A2, which contaminates the clean set of members with a square.
          fraction: of each class.
          seed: of the choice.

        Raises:
          PmoeError: no held-out images, a class too small for the fraction, or contamination of
            images that the run was not trained on.
        """
        self.check_clean_set(kind, a2=a2, fraction=fraction)
        flags = self.contaminated(kind, a2)
        images, labels = self.dataset.train_images, self.dataset.train_labels
        if kind == "heldout":
            images, labels = self.heldout()
        if not any(flags):
            none = jnp.zeros((len(self.members), len(labels)), bool)
            attack = self.attack.replace(triggered=none, relabelled=none)  # type: ignore[attr-defined]
        else:
            attack = jax.vmap(defences.clean_set)(self.attack, jnp.asarray(flags))
        if fraction < 1:
            chosen = stratified_choice(labels, fraction, seed)
            # Images that appear when indexed have a subset of their own.
            images = images.subset(chosen) if hasattr(images, "subset") else images[chosen]
            labels = labels[chosen]
            attack = attack.replace(
                triggered=attack.triggered[:, chosen], relabelled=attack.relabelled[:, chosen]
            )
        return CleanSet(images, labels.astype(np.int32), attack)

    def heldout(self) -> tuple[np.ndarray, np.ndarray]:
        """Held-out images and labels.

        Raises:
          PmoeError: the run has none.
        """
        if not len(self.dataset.heldout_images):
            raise PmoeError(
                f"{self.run.path} was trained without held-out images; train it with "
                "--config.data.heldout=0.1, or use other data for this defence"
            )
        return self.dataset.heldout_images, self.dataset.heldout_labels

    def held(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Clean images and labels that a detector fits to: of `defend_config.HELD`.

        Raises:
          PmoeError: any other kind, such as the test set, or no held-out images.
        """
        if kind == "heldout":
            return self.heldout()
        if kind != "clean":
            raise PmoeError(
                f"a detector may not hold {kind!r} images; allowed are clean (training images) and "
                "heldout, as the test set selects and fits nothing"
            )
        return self.dataset.train_images, self.dataset.train_labels

    def over_images(
        self, function: Callable[[np.ndarray], Any], images: np.ndarray, size: int
    ) -> np.ndarray:
        """A function of batches [B, ...] whose results [..., B] are joined along their last axis.

        The last batch is filled up and cut again, so that one program serves all.
        """
        size = min(size, len(images))
        parts = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            filling = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
            parts.append(np.asarray(function(np.concatenate([batch, filling]))))
        return np.concatenate(parts, axis=-1)[..., : len(images)]


def load(
    checkpoint: str | os.PathLike[str],
    out: pathlib.Path,
    *,
    source: str = "",
    dataset: Dataset | None = None,
    progress: bool = True,
    members: Sequence[int] = (),
) -> Base:
    """Reads the newest checkpoint of a run.

    Args:
      checkpoint, out, source, dataset, progress, members: see `defend.defend`.

    Raises:
      PmoeError: no run, one that does not fit the data, or no such members.
    """
    run = RunDirectory(checkpoint)
    config, everybody = run.config(), run.members()
    chosen = list(members) or list(range(len(everybody)))
    if max(chosen) >= len(everybody) or len(set(chosen)) < len(chosen):
        raise PmoeError(
            f"--members={','.join(map(str, chosen))} must name each member of {run.path} once at "
            f"most; it has 0 to {len(everybody) - 1}"
        )
    if not members_lib.same_attack([everybody[index] for index in chosen]):
        first = everybody[chosen[0]]
        own = {everybody[i].seed: i for i in chosen if members_lib.alike(first, everybody[i])}
        raise PmoeError(
            f"members of {run.path} have several attacks (or one seed several times), and a "
            "defence's tables one mean; choose some of one attack, such as "
            f"--members={','.join(map(str, own.values()))}"
        )
    dataset = dataset or inputs.load_data(config, source)
    own_data = trained_lib.is_own_data(run, dataset, source or config.data.source)
    found = trained_lib.restore(run, config, everybody, dataset)
    state, attack = members_lib.take((found.state, found.attack), chosen)
    kept = [everybody[index] for index in chosen]
    return Base(
        run, config, kept, dataset, state, attack, found.step, found.epoch, own_data, out, progress
    )


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` with the compiler options that convolutions need."""
    flags = kernels.compiler_options(jax.default_backend())
    return functools.partial(jax.jit, compiler_options=flags)(function, **options)


def tile(tree: Any, copies: int) -> Any:
    """[M, ...] -> [copies * M, ...], copy by copy."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * copies), tree)


# --- tables -------------------------------------------------------------------------------------


def cells(rows: Sequence[Row]) -> list[str]:
    """Over members, each of `METRICS`: one or two values as they are, more as mean ± sd.

    Empty where nothing was measured; members that diverged are left out, see `covered`.
    """
    sound = [row for row in rows if row["stage"] != "diverged"]
    return [brief([row["value"] for row in sound if row["metric"] == m]) for m in METRICS]


def brief(values: Sequence[float], digits: int = 1) -> str:
    """One or two values as they are, more as mean ± sd; empty for none or not finite ones."""
    if not len(values) or not np.isfinite(values).all():
        return ""
    if len(values) < 3:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    summary = metrics.summarize(values)
    return f"{summary.mean:.{digits}f} ± {summary.sd:.{digits}f}"


def headline(base: Base) -> str:
    """One line that says which models a table's figures belong to, and which are in no mean."""
    config, rates = base.config, sorted({100 * member.rate for member in base.members})
    left_out = covered(base) and f" (in means {covered(base)})"
    triggers = ", ".join(sorted({member.trigger["name"] for member in base.members}))
    seeds = len({member.seed for member in base.members})
    return (
        f"{base.run.name}: {base.dataset.name}, {config.model.name} of width {config.model.width}, "
        f"{trained_for(base)}, {seeds} seeds{left_out}, "
        f"trigger {triggers} at "
        f"{', '.join(f'{rate:g}' for rate in rates)} % (in percent; from three seeds on mean ± sd)"
    )


def trained_for(base: Base) -> str:
    """ "10 epochs", or "epoch 4.5 of 10" of a model that is not trained to its end."""
    epochs = base.config.train.epochs
    return f"{epochs} epochs" if base.epoch >= epochs else f"epoch {base.epoch:g} of {epochs}"


def covered(base: Base, rows: Sequence[Row] | None = None) -> str:
    """How many seeds means are of, such as "2 of 3 seeds; seed 1 diverged"; "" where all are.

    Args:
      base: the run. Members of one seed and several rates are told by their numbers.
      rows: what the means are made from; by default anything measured on the run as it is.
    """
    gone = np.flatnonzero(base.diverged).tolist()
    if rows is not None:
        gone = sorted({row["member"] for row in rows if row["stage"] == "diverged"})
    if not gone:
        return ""
    seeds = [member.seed for member in base.members]
    what, names = "seed", seeds
    if len({*seeds}) < len(seeds):
        what, names = "member", [*range(len(seeds))]
    return (
        f"{len(seeds) - len(gone)} of {len(seeds)} {what}s; {what}{'s' * (len(gone) > 1)} "
        f"{', '.join(str(names[index]) for index in gone)} diverged"
    )


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the common fields first and others behind them."""
    extra = [name for name in (rows[0] if rows else {}) if name not in ROW_FIELDS]
    fields = [name for name in ROW_FIELDS if rows and name in rows[0]] + extra
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_with_sum(path, text.getvalue())


def write_npz(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Compressed arrays, in one move."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_with_sum(path, content.getvalue())


def read_json(path: pathlib.Path) -> Any:
    """A JSON file that a defence wrote.

    Raises:
      PmoeError: it is damaged.
    """
    check_sum(path)
    try:
        return json.loads(config_lib.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise PmoeError(
            f"{path} cannot be read ({error}); remove it to have it made anew"
        ) from None
