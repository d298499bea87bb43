"""Trained runs: read from their directories for code of your own, and evaluated.

Nothing in a run directory is executed.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pmoe_jax import config as config_lib
from pmoe_jax import evaluation, memory, mesh, processes, triggers
from pmoe_jax import members as members_lib
from pmoe_jax.checkpoints import Checkpoints, DataShape
from pmoe_jax.data import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.inputs import load_data, load_patterns
from pmoe_jax.members import Attack, Member
from pmoe_jax.rows import Row, checked_row
from pmoe_jax.rundir import RunDirectory
from pmoe_jax.training import Programs, TrainState, plan_of, programs_of

#: Fields beside the model's that a run and its clean counterpart share.
SAME_FOR_CAD = (
    "data.name", "data.heldout", "data.image_size", "data.crop_roi", "data.resize_filter",
    "quirks.a6_two_layer_experts",
)  # fmt: skip


@dataclasses.dataclass
class Evaluated:
    """Figures of a run at one epoch, and what they refer to.

    Attributes:
      rows: a row a member and metric.
      members, config: the run's.
      epoch: epochs trained; a fraction within an epoch.
      last3: rows averaged over the last three epochs; empty if they are not known.
      shown: the trigger that was applied, where it is not the trained one.
      attack: what was applied, or None.
    """

    rows: list[Row]
    members: list[Member]
    config: Any
    epoch: float
    last3: list[Row]
    shown: Mapping[str, Any] | None = None
    attack: Attack | None = None


def evaluate(
    workdir: str | os.PathLike[str],
    *,
    clean: str | os.PathLike[str] | None = None,
    source: str = "",
    trigger: Mapping[str, Any] | None = None,
    step: int | None = None,
    dataset: Dataset | None = None,
) -> Evaluated:
    """Evaluates the checkpoint of a run on its data set's test split.

    Args:
      workdir: the run directory. Nothing in it is executed.
      clean: run directory of a clean model, for CAD and its false trigger rate, paired by seed.
      source: where the data set lies, if not where the run's config says.
      trigger: {"name": ..., parameters} to apply instead of the trained one.
      step: which checkpoint; by default the newest whole one.
      dataset: an already loaded data set.

    Raises:
      PmoeError: missing or damaged directory, or one that does not fit the data.
    """
    run = RunDirectory(workdir)
    config, members = run.config(), run.members()
    _check_trained(run)
    dataset = dataset or load_data(config, source)
    same_data = is_own_data(run, dataset, source or config.data.source)
    if clean is not None:
        _check_clean(RunDirectory(clean), run, config, members)
    trained = members
    if trigger is not None:
        members = [dataclasses.replace(member, trigger=trigger) for member in members]
    restored = restore(run, config, trained, dataset, step)
    attack = restored.attack
    if trigger is not None:
        attack = with_trigger(attack, members, dataset.image_shape)
    applied = attack if any(member.trigger["name"] != "none" for member in members) else None
    common: dict[str, Any] = {
        "run": run.name,
        "dataset": dataset.name,
        "epoch": restored.epoch,
        "stage": restored.stage(other_trigger=trigger is not None),
    }
    split = dataset.test_images, dataset.test_labels
    programs, state = restored.programs, restored.state
    rows = rows_of(config, members, programs, state, applied, *split, **common)
    last3: list[Row] = []
    if trigger is None and same_data and step is None:
        last3 = evaluation.last_epochs(_recorded_rows(run, common["stage"]), common["epoch"])
    if clean is not None:
        rows += _against_clean(
            pathlib.Path(clean), rows, config, members, applied, dataset, common, step is not None
        )
    return Evaluated(rows, trained, config, common["epoch"], last3, trigger, applied)


def is_own_data(run: RunDirectory, dataset: Dataset, given: str) -> bool:
    """Whether a run was trained on these data, as far as is known; says on stderr if not, or if it
    is not known. `given`: where they lie."""
    known, shown = run.noted("dataset").get("sha256"), given or dataset.name
    if known is None:
        print(
            f"note: provenance.json of {run.name} does not say which data it was trained on; "
            f"{shown} is taken for them",
            file=sys.stderr,
        )
        return True
    same = known == dataset.fingerprint()
    if not same:
        print(f"note: {shown} is not the data set that {run.name} was trained on", file=sys.stderr)
    return same


def _recorded_rows(run: RunDirectory, stage: str) -> list[Row]:
    """What training wrote; nothing, and a warning, if that is damaged: the model is not."""
    try:
        return [row for row in checked_rows(run) if row["stage"] in (stage, "diverged")]
    except PmoeError as error:
        print(f"warning: {error}; without the mean of the last epochs", file=sys.stderr)
        return []


def checked_rows(run: RunDirectory) -> list[Row]:
    """All recorded rows; raises a `PmoeError` for one that is not of the common schema."""
    return [checked_row(row) for row in run.rows()]


def recorded(workdir: str | os.PathLike[str]) -> Evaluated:
    """The figures that training wrote for the last epoch, without computing anything."""
    run = RunDirectory(workdir)
    config, rows = run.config(), checked_rows(run)
    if not rows:
        raise PmoeError(
            f"{run.path / 'metrics.jsonl'} holds no figures; "
            f"compute them with 'pmoe evaluate --checkpoint={run.path}'"
        )
    last = max(row["epoch"] for row in rows)
    last3 = evaluation.last_epochs(rows, last)
    chosen = [row for row in rows if row["epoch"] == last]
    return Evaluated(chosen, run.members(), config, last, last3)


def rows_of(
    config: Any,
    members: Sequence[Member],
    programs: Programs,
    state: TrainState,
    attack: Attack | None,
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] = (),
    **common: Any,
) -> list[Row]:
    """Evaluates all members on one split and returns rows.

    `names` is what warnings call the members; `common` as in `rows_of_classes`.
    """
    size, variables = config.evaluation.batch_size, state.variables
    if programs.layout.mesh is None:  # A mesh trains one's own runs.
        trigger = None if attack is None else attack.trigger
        size = memory.batch_that_fits(
            programs.predict, lambda b: (variables, b, trigger), images, size
        )
    clean, triggered = evaluation.predictions(programs, variables, images, attack, size)
    diverged = mesh.fetch(state.diverged_at) >= 0
    nowhere = evaluation.has_no_class(clean, triggered)
    tell_of_outputs(members, np.flatnonzero(nowhere & ~diverged), names)
    return rows_of_classes(config, members, clean, triggered, labels, diverged, **common)


def rows_of_classes(
    config: Any,
    members: Sequence[Member],
    clean: np.ndarray,
    triggered: np.ndarray | None,
    labels: np.ndarray,
    diverged: np.ndarray,
    **common: Any,
) -> list[Row]:
    """Rows from the classes int [M, N] that members give a split's images.

    Members that diverged, and those with outputs that are not finite, are marked. `common` is as in
    `evaluation.member_rows`, but for the width, which the config has.
    """
    source = config.poison.source if config.poison.source >= 0 else None
    measured = [
        evaluation.measure(
            clean[index],
            None if triggered is None or member.trigger["name"] == "none" else triggered[index],
            labels,
            member.target,
            source,
        )
        for index, member in enumerate(members)
    ]
    gone = diverged | evaluation.has_no_class(clean, triggered)
    return evaluation.member_rows(measured, members, gone, width=config.model.width, **common)


def tell_of_outputs(
    members: Sequence[Member], indices: Iterable[int], names: Sequence[str] = ()
) -> None:
    """Warns of members whose outputs are not finite, though no loss of theirs was."""
    for index in indices:
        name = names[index] if names else f"member {index}"
        processes.say(
            f"warning: {name} (seed {members[index].seed}) has outputs that are not finite; it is "
            "marked as diverged and left out of means"
        )


class Restored(NamedTuple):
    """A checkpoint.

    Attributes:
      programs: the run's, for its members.
      step: its step.
      state, attack: the members', stacked.
      meta: what else stands there.
    """

    programs: Programs
    step: int
    state: TrainState
    attack: Attack
    meta: Mapping[str, Any]

    @property
    def epoch(self) -> int | float:
        """Epochs trained; a fraction within an epoch."""
        epoch = self.meta["epoch"]
        return int(epoch) if epoch == int(epoch) else epoch

    def stage(self, other_trigger: bool = False) -> str:
        """What rows of this checkpoint say; those of a defence's runs have its stage."""
        stage = self.meta.get("stage", "trained")
        if not other_trigger:
            return stage
        return "other_trigger" if stage == "trained" else f"{stage}_other_trigger"


def restore(
    run: RunDirectory,
    config: Any,
    members: Sequence[Member],
    dataset: Dataset,
    step: int | None = None,
) -> Restored:
    """A run's checkpoint, by default the newest whole one, for use with these data.

    Raises:
      PmoeError: no checkpoint, a damaged one, or one that does not fit the data.
    """
    shape = DataShape(len(dataset.train_images), dataset.num_classes, dataset.image_shape)
    return _restore(run, config, members, shape, step)


def _restore(
    run: RunDirectory, config: Any, members: Sequence[Member], shape: DataShape, step: int | None
) -> Restored:
    # Other data than the run's may have too few images to be trained on; here nothing is.
    plan = plan_of(config, max(shape.num_images, config.train.batch_size))
    programs = programs_of(config, shape.num_classes, plan)
    _check_trained(run)
    with Checkpoints(run) as checkpoints:
        abstract = programs.abstract_state(members, shape.image_shape)
        restored = checkpoints.restore(abstract, step)
    if restored is None:
        raise PmoeError(f"{run.path} has no finished checkpoint yet; train it first")
    what = f"checkpoint {restored[0]} of {run.path}"
    members_lib.check_attack_tree(restored[2], members, shape.image_shape, what)
    targets = [member.target for member in members]
    if (mesh.fetch(restored[2]["target"]) != targets).any():
        raise PmoeError(
            f"{run.path / 'members.json'} names other target labels than checkpoint {restored[0]}; "
            "restore the file"
        )
    found, state, tree, meta = restored
    return Restored(programs, found, state, members_lib.attack_from_tree(tree, members), meta)


def _check_trained(run: RunDirectory) -> None:
    if not (run.path / "checkpoints").is_dir():
        raise PmoeError(f"{run.path} holds no checkpoints; give the directory of a trained run")


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trained models of a run directory, for code of your own.

    Attributes:
      model: the linen module that all M members share.
      variables: {"params", "batch_stats"}, every leaf [M, ...].
      trigger: the members' triggers, every array [M, ...].
      members, config: the run's.
      step: of the checkpoint.
    """

    model: Any
    variables: dict[str, Any]
    trigger: triggers.Trigger
    members: list[Member]
    config: Any
    step: int

    def member(self, index: int) -> tuple[dict[str, Any], triggers.Trigger]:
        """Variables and trigger of one member: what `model.apply` and `triggers.apply` take.

        Raises:
          PmoeError: no such member.
        """
        if not 0 <= index < len(self.members):
            raise PmoeError(f"there is no member {index}: the run has 0 to {len(self.members) - 1}")
        return jax.tree.map(lambda leaf: leaf[index], (self.variables, self.trigger))


def load(workdir: str | os.PathLike[str], step: int | None = None) -> Trained:
    """The models of a run directory, a defence's included; needs no data set, executes nothing.

    Args:
      workdir: the run directory.
      step: which checkpoint; by default the newest whole one.

    Raises:
      PmoeError: missing or damaged directory.
    """
    run = RunDirectory(workdir)
    config, members = run.config(), run.members()
    _check_trained(run)
    with Checkpoints(run) as checkpoints:
        shape = checkpoints.data_shape(step)
    programs, found, state, attack, _ = _restore(run, config, members, shape, step)
    return Trained(programs.model, state.variables, attack.trigger, members, config, found)


def with_trigger(
    attack: Attack, members: Sequence[Member], image_shape: tuple[int, int, int]
) -> Attack:
    """The attack with the triggers that the members have now, for images [H, W, C]."""
    patterns = load_patterns(members, image_shape)
    made = [members_lib.make_trigger(member, image_shape, patterns) for member in members]
    return attack.replace(trigger=triggers.stack(made))  # type: ignore[attr-defined]


def check_same_images(run: RunDirectory, of: RunDirectory, what: str) -> None:
    """Refuses a run that is known to be trained on other images than another one.

    Raises:
      PmoeError: it is one; `what` begins the line.
    """
    prints = [each.noted("dataset").get("sha256") for each in (of, run)]
    if None not in prints and prints[0] != prints[1]:
        raise PmoeError(
            f"{what}{run.path} was trained on other images than {of.name}; give a run on the same"
        )


def other_setting(own: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first field by which two runs' flat configs have other models or data, if any."""
    for name in own:
        # Kernels compute the same function.
        shared = (name.startswith("model.") and name != "model.kernels") or name in SAME_FOR_CAD
        if shared and own[name] != other[name]:
            return name
    return None


def _check_clean(
    run: RunDirectory, of: RunDirectory, config: Any, members: Sequence[Member]
) -> None:
    """Refuses a run that cannot be the clean counterpart of another one's members."""
    if any(member.rate > 0 for member in run.members()):
        raise PmoeError(f"{run.path} is not a clean run: its poisoning rate is above 0")
    own, other = (config_lib.flatten(c.to_dict()) for c in (config, run.config()))
    if name := other_setting(own, other):
        raise PmoeError(
            f"{run.path} was trained with {name}={other[name]}, the attacked run with "
            f"{own[name]}; CAD compares equal models: give a clean run of the same settings"
        )
    seeds = [member.seed for member in run.members()]
    missing = [member.seed for member in members if member.seed not in seeds]
    if missing:
        raise PmoeError(
            f"{run.path} has no clean model of seed {missing[0]}; CAD pairs seeds, and it has "
            f"{', '.join(map(str, seeds))}"
        )
    check_same_images(run, of, "CAD: ")
    _tell_of_training(run, own, other, members)


def _tell_of_training(
    run: RunDirectory,
    own: Mapping[str, Any],
    other: Mapping[str, Any],
    members: Sequence[Member],
) -> None:
    """Says what else than the attack a run and its clean counterpart do not share."""
    names = [name for name in own if name.startswith("train.") and name != "train.epochs"]
    names += ["data.heldout_seed"] if own["data.heldout"] else []
    differing = [
        f"{name}={other[name]}, the attacked one with {own[name]}"
        for name in names
        if name not in config_lib.HOW and own[name] != other[name]
    ]
    by_seed = {member.seed: member for member in run.members()}
    for stream in ("init", "order"):
        pairs = [(by_seed[member.seed].streams[stream], member) for member in members]
        others = [
            f"stream {stream} of seed {clean}, the attacked one of seed {member.streams[stream]} "
            f"(member of seed {member.seed})"
            for clean, member in pairs
            if clean != member.streams[stream]
        ]
        differing += others[:1]
    for difference in differing:
        processes.say(
            f"note: CAD is not of the attack alone: {run.name} was trained with {difference}"
        )


def _against_clean(
    workdir: pathlib.Path,
    rows: Sequence[Row],
    config: Any,
    members: Sequence[Member],
    attack: Attack | None,
    dataset: Dataset,
    common: Mapping[str, Any],
    same_epoch: bool,
) -> list[Row]:
    """CAD, and how often the clean model of the same seed takes the trigger for the target.

    Of the clean run's newest checkpoint, or with `same_epoch` of the one of the same epoch.
    """
    run = RunDirectory(workdir)
    clean_config, clean_members = run.config(), run.members()
    by_seed = {member.seed: index for index, member in enumerate(clean_members)}
    counted = common["stage"] in ("trained", "other_trigger")  # A defence's epochs are its own.
    found = restore(run, clean_config, clean_members, dataset)
    if counted and same_epoch and found.epoch not in (0, common["epoch"]):
        wanted = round(common["epoch"] * found.step / found.epoch)
        found = restore(run, clean_config, clean_members, dataset, wanted)
    if counted and found.epoch != common["epoch"]:
        print(
            f"note: {run.name} is taken at epoch {found.epoch:g}, the attacked run at epoch "
            f"{common['epoch']:g}",
            file=sys.stderr,
        )
    pairs = np.asarray([by_seed[member.seed] for member in members])
    paired = jax.tree.map(lambda leaf: leaf[pairs], found.state)
    split = dataset.test_images, dataset.test_labels
    clean_rows = rows_of(config, members, found.programs, paired, attack, *split, **common)
    lost = {row["member"] for row in rows if row["stage"] == "diverged"}
    false_rate = [
        {**row, "metric": "false_trigger_rate"}
        | ({"stage": "diverged"} if row["member"] in lost else {})
        for row in clean_rows
        if row["metric"] == "asr"
    ]
    return evaluation.cad_rows(rows, clean_rows) + false_rate
