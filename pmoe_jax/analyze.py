"""`pmoe analyze`: the routing of a trained run over its whole test set, as arrays, rows, figures.

The way through: `analyze` restores checkpoints; `routing_arrays` runs the pure functions of
`routing` over the test set; `routing_rows` makes rows of the arrays; `routing_output` writes both;
`figures_routing` draws them.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from pmoe_jax import config as config_lib
from pmoe_jax import (
    data,
    launch,
    report,
    routing,
    routing_arrays,
    routing_output,
    routing_rows,
    training,
    triggers,
)
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax.checkpoints import Checkpoints
from pmoe_jax.data import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.members import Attack, Member
from pmoe_jax.routing_output import Analysis, OnImages
from pmoe_jax.rundir import Row, RunDirectory

#: Prefixes of the arrays of models beside the analysed one.
CLEAN, DEFENDED = routing_arrays.PREFIXES


def analyze(
    workdir: str | os.PathLike[str],
    *,
    clean: str | os.PathLike[str] | None = None,
    defended: str | os.PathLike[str] | None = None,
    others: Sequence[str | os.PathLike[str]] = (),
    shown: Sequence[int] = (),
    source: str = "",
    trigger: Mapping[str, Any] | None = None,
    every_epoch: bool = False,
    causes: bool = True,
    single_image: int | None = None,
    dataset: Dataset | None = None,
    progress: bool = False,
) -> Analysis:
    """Analyses the routing of all members of a run on its whole test split.

    Args:
      workdir: the run directory. Nothing in it is executed.
      clean: run directory of a clean model: the same analysis of its members of the same seeds,
        with this run's trigger.
      defended: the same of this run after a defence (a cell that `pmoe defend` wrote).
      others: further attacked runs on the same data set, of which only the `shown` images are
        looked at, each with its own trigger.
      shown: positions of test images.
      source: where the data set lies, if not where the run's config says.
      trigger: {"name": ..., parameters} to apply instead of the trained one.
      every_epoch: all saved checkpoints instead of the newest.
      causes: force routings and silence experts, too.
      single_image: take patch values from this test image alone (quirk A4).
      dataset: an already loaded data set.
      progress: show a progress bar on stderr.

    Raises:
      PmoeError: missing or damaged directory, one that does not fit the data, or a dense model.
    """
    run = RunDirectory(workdir)
    config, members = run.config(), run.members()
    _check_model(config, causes)
    dataset = dataset or run_lib.load_data(config, source)
    if single_image is not None and not 0 <= single_image < len(dataset.test_images):
        raise PmoeError(
            f"test image {single_image} does not exist; choose 0 to {len(dataset.test_images) - 1}"
        )
    if trigger is not None:
        members = [dataclasses.replace(member, trigger=trigger) for member in members]
    beside = {
        prefix: _Beside(RunDirectory(path), members, clean=prefix == CLEAN, causes=causes)
        for prefix, path in ((CLEAN, clean), (DEFENDED, defended))
        if path is not None
    }
    # Before the long part, so that a mistake shows early.
    on_images = [_on_images(RunDirectory(path), config, dataset, list(shown)) for path in others]
    options: dict[str, Any] = {"causes": causes, "single_image": single_image, "progress": progress}
    arrays: dict[str, np.ndarray] = {}
    rows: list[Row] = []
    epochs, frequencies, of_image = [], [], []
    attack: Attack | None = None
    for step in run.whole_steps() if every_epoch else [None]:
        programs, restored, state, tree = run_lib.restore(run, config, members, dataset, step)
        attack = members_lib.attack_from_tree(tree, members)
        if trigger is not None:
            attack = run_lib._with_trigger(tree, members, dataset.image_shape)
        common = {"run": run.name, **_stage(run, restored)}
        epochs.append(common["epoch"])
        arrays, found = _of_state(
            programs, state, attack, config, members, dataset, common, **options
        )
        rows += found
        frequencies.append(arrays["frequency"])
        if single_image is not None:
            indices = arrays["indices"][:, :, single_image].astype(np.int32)
            of_image.append(routing.selection_mask(indices, int(np.prod(arrays["grid"]))))
    if attack is None:
        raise PmoeError(f"{run.path} has no finished checkpoint yet; train it first")
    scale = _scale(rows, members, config, epochs[-1], dataset)
    arrays["epoch"] = np.asarray(epochs, float)
    arrays["frequency_by_epoch"] = np.stack(frequencies)
    if of_image:
        arrays["selection_of_image"] = np.stack(of_image)
    scales, names = {}, {run.name}
    for prefix, other in beside.items():
        programs, restored, state, _ = run_lib.restore(
            other.run, other.config, other.all_members, dataset, None
        )
        paired = jax.tree.map(lambda leaf, pairs=other.pairs: leaf[pairs], state)
        kind = prefix.partition("_")[0]
        name = other.run.name if other.run.name not in names else f"{other.run.name} ({kind})"
        names.add(name)
        common = {"run": name, **_stage(other.run, restored)}
        of_model, found = _of_state(
            programs, paired, attack, other.config, other.members, dataset, common, **options
        )
        arrays |= {
            f"{prefix}{array_name}": array
            for array_name, array in of_model.items()
            if not _same(array, arrays.get(array_name))
        }
        rows += found
        # A clean model's own trigger is none, whatever is applied to it here.
        described = [other.all_members[pair] for pair in other.pairs]
        scales[prefix] = _scale(found, described, other.config, common["epoch"], dataset)
    return Analysis(
        arrays=arrays,
        rows=rows,
        scale=scale,
        dataset=dataset,
        config=config,
        members=members,
        trigger=attack.trigger if routing_arrays.has_trigger(members) else None,
        scales=scales,
        others=on_images,
    )


@dataclasses.dataclass
class _Beside:
    """A run whose models of the same seeds are analysed with the trigger of `attacked`.

    Raises:
      PmoeError: a seed is missing, the model is dense, or a clean run is asked for and it is none.
    """

    run: RunDirectory
    attacked: Sequence[Member]
    clean: bool
    causes: bool

    def __post_init__(self) -> None:
        self.config, self.all_members = self.run.config(), self.run.members()
        _check_model(self.config, self.causes)
        if not self.run.whole_steps():
            raise PmoeError(f"{self.run.path} has no finished checkpoint yet; train it first")
        kind = "clean" if self.clean else "defended"
        if self.clean and any(member.rate > 0 for member in self.all_members):
            raise PmoeError(f"{self.run.path} is not a clean run: its poisoning rate is above 0")
        by_seed = {member.seed: index for index, member in enumerate(self.all_members)}
        for member in self.attacked:
            if member.seed not in by_seed:
                have = ", ".join(map(str, by_seed))
                raise PmoeError(
                    f"{self.run.path} has no {kind} model of seed {member.seed}; it has {have}"
                )
        self.pairs = np.asarray([by_seed[member.seed] for member in self.attacked])
        self.members = [
            dataclasses.replace(member, rate=0.0 if self.clean else member.rate)
            for member in self.attacked
        ]


def _on_images(run: RunDirectory, like: Any, dataset: Dataset, positions: list[int]) -> OnImages:
    """A run's routing of a few test images, with its own trigger."""
    config, members = run.config(), run.members()
    _check_model(config, causes=False)
    if config.data.name != like.data.name:
        raise PmoeError(
            f"--others: {run.path} was trained on {config.data.name}, not on {like.data.name}; "
            "give runs on the same data set"
        )
    few = dataclasses.replace(
        dataset,
        test_images=np.asarray(dataset.test_images[np.asarray(positions)]),
        test_labels=dataset.test_labels[np.asarray(positions)],
        test_boxes=None,
    )
    programs, restored, state, tree = run_lib.restore(run, config, members, dataset)
    attack = members_lib.attack_from_tree(tree, members)
    arrays = routing_arrays.measure(
        programs, state, attack, config, members, few,
        causes=False, single_image=None, progress=False,
    )  # fmt: skip
    stage = _stage(run, restored)
    row = {"stage": stage["stage"]}
    described = run_lib.Evaluated([row], members, config, stage["epoch"], [])
    trigger = attack.trigger if routing_arrays.has_trigger(members) else None
    return OnImages(run.name, report.scale(described), trigger, arrays, positions)


def _scale(
    rows: list[Row], members: list[Member], config: Any, epoch: float, dataset: Dataset
) -> str:
    described = run_lib.Evaluated(rows, members, config, epoch, [])
    return f"{report.scale(described)}; {len(dataset.test_labels)} test images"


def _same(array: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and np.array_equal(array, other, equal_nan=array.dtype.kind == "f")


def _of_state(
    programs: training.Programs,
    state: Any,
    attack: Attack,
    config: Any,
    members: Sequence[Member],
    dataset: Dataset,
    common: Mapping[str, Any],
    *,
    causes: bool,
    single_image: int | None,
    progress: bool,
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Arrays and rows of the members at one checkpoint."""
    arrays = routing_arrays.measure(
        programs, state, attack, config, members, dataset,
        causes=causes, single_image=single_image, progress=progress,
    )  # fmt: skip
    frame = {**common, "dataset": dataset.name, "width": config.model.width}
    images = 1 if single_image is not None else len(dataset.test_labels)
    rows = routing_rows.rows_of(arrays, config, members, frame, images)
    return routing_arrays.without_groups(arrays), rows


def _check_model(config: Any, causes: bool) -> None:
    if config.model.name != "pmoe":
        raise PmoeError(
            f"model.name={config.model.name} has no routers to analyse; give the run of a pmoe"
        )
    if causes:
        routing.subsets(config.model.num_experts)


def _stage(run: RunDirectory, step: int) -> dict[str, Any]:
    """Epoch and stage of a checkpoint; a defence's checkpoints have its stage."""
    with Checkpoints(run) as checkpoints:
        meta = checkpoints.meta(step)
    epoch = meta["epoch"]
    return {
        "epoch": int(epoch) if epoch == int(epoch) else epoch,
        "stage": meta.get("stage", "trained"),
    }


# --- Command line ---------------------------------------------------------------------------


def add_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines the flags of `pmoe analyze`."""
    from pmoe_jax import cli

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, "", meaning, flag_values=values)

    text("checkpoint", "Run directory to analyse.")
    text("clean", "Run directory of a clean model, for comparison seed by seed.")
    text("defended", "Run directory of the same models after a defence, for comparison (Figure 6).")
    text("others", "Run directories of other attacks, separated by commas, for Figure 3.")
    text("data", "Where the data set lies, if not where the run's config says.")
    text("output", "File for all arrays (.npz); rows (.csv) and summary (.json) go beside it.")
    text("figures", "Folder for figures.")
    text("more_data", "NAME=SOURCE of another data set to draw triggers on (Figure 2).")
    text("images", "Positions of test images to draw, such as 3,17; by default two are chosen.")
    flags.DEFINE_boolean("every_epoch", False, "Analyse all saved checkpoints.", flag_values=values)
    flags.DEFINE_boolean(
        "causes", True, "Force routings and silence experts, too.", flag_values=values
    )
    flags.DEFINE_boolean("progress", True, "Show a progress bar.", flag_values=values)
    path = cli._peek(argv, "checkpoint")
    stored = RunDirectory(path).config() if path else config_lib.default()
    for group in ("trigger", "quirks"):
        config_flags.DEFINE_config_dict(group, stored[group], flag_values=values)


def run_command(values: flags.FlagValues, words: list[str]) -> int:
    """Runs `pmoe analyze`."""
    if words:
        raise PmoeError(f"unexpected word {words[0]!r}; flags are written --name=value")
    if not values.checkpoint:
        raise PmoeError("--checkpoint is missing; give the directory of a trained run")
    if values.output and not values.output.endswith(".npz"):
        raise PmoeError(f"--output={values.output} must end in .npz")
    stored = RunDirectory(values.checkpoint).config()
    asked: ml_collections.ConfigDict = stored.copy_and_resolve_references()
    for group in ("trigger", "quirks"):
        asked[group].update(values[group].value)
    asked.poison.rate = 0.0  # Nothing is poisoned here.
    config_lib.validate(asked.to_dict())
    chosen = _positions(values.images)
    launch.use_compilation_cache()
    if stored.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    trigger = members_lib.trigger_parameters(asked)
    changed = trigger != members_lib.trigger_parameters(stored)
    more = _more_data(stored, values.more_data) if values.more_data else None
    dataset = run_lib.load_data(stored, values.data)
    shown = chosen or _example_images(dataset, stored.poison.target)
    for index in shown:
        if index >= len(dataset.test_images):
            raise PmoeError(
                f"--images: there is no test image {index}; choose 0 to "
                f"{len(dataset.test_images) - 1}"
            )
    analysis = analyze(
        values.checkpoint,
        clean=values.clean or None,
        defended=values.defended or None,
        others=[path for path in values.others.split(",") if path],
        shown=shown,
        trigger=trigger if changed else None,
        every_epoch=values.every_epoch,
        causes=values.causes,
        single_image=shown[0] if asked.quirks.a4_single_image else None,
        dataset=dataset,
        progress=values.progress,
    )
    print(routing_output.table(analysis))
    if values.output:
        for path in routing_output.write(analysis, values.output):
            print(f"wrote {path}", file=sys.stderr)
    if values.figures:
        from pmoe_jax import figures_paper, figures_routing

        drawn = {dataset.name: (dataset, shown)}
        if more is not None:
            drawn[more.name] = (more, _example_images(more, stored.poison.target))
        strips = [
            figures_paper.Strip(each, places, _triggers(analysis, asked, each.image_shape))
            for each, places in drawn.values()
        ]
        written = figures_routing.write_all(
            analysis, values.figures, shown, strips=strips, trigger_labels=_trigger_labels(asked),
            single_image=bool(asked.quirks.a4_single_image),
        )  # fmt: skip
        for path in written:
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _positions(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [-1]
    if any(index < 0 for index in found):
        raise PmoeError(f"--images={text} must be whole numbers from 0, such as 3,17")
    return found


def _example_images(dataset: Dataset, target: int) -> list[int]:
    """The first test image of each of two classes other than the target."""
    labels = np.asarray(dataset.test_labels)
    others = [label for label in dict.fromkeys(labels.tolist()) if label != target]
    return [int(np.flatnonzero(labels == label)[0]) for label in others[:2]] or [0]


def _more_data(config: Any, text: str) -> Dataset:
    """Another data set, read like the run's own."""
    name, equals, source = text.partition("=")
    if not equals and name != "digits":
        raise PmoeError(f"--more_data={text} must be NAME=SOURCE, such as gtsrb=GTSRB.zip")
    return data.load(
        name, source or None, image_size=config.data.image_size,
        resize_filter=config.data.resize_filter, max_bytes=config.data.max_bytes,
    )  # fmt: skip


def _member_of(asked: Any, name: str, seed: int) -> Member:
    """A member of that seed with a trigger of the asked parameters, to draw it."""
    config = asked.copy_and_resolve_references()
    config.trigger.name, config.seed, config.num_seeds = name, seed, 1
    return members_lib.from_config(config)[0]


def _triggers(
    analysis: Analysis, asked: Any, shape: tuple[int, int, int]
) -> dict[str, triggers.Trigger]:
    """One trigger of each name: the run's own as its first member has it, the others made anew."""
    first = analysis.members[0]
    made = {}
    for name in triggers.NAMES:
        if name == "none":
            continue
        if name == first.trigger["name"] and shape == analysis.dataset.image_shape:
            made[name] = jax.tree.map(lambda leaf: leaf[0], analysis.trigger)
            continue
        member = _member_of(asked, name, first.seed)
        patterns = run_lib.load_patterns([member], shape)
        made[name] = members_lib.make_trigger(member, shape, patterns)
    return made


def _trigger_labels(asked: Any) -> dict[str, str]:
    trigger, square = asked.trigger, _member_of(asked, "square", 0).trigger
    return {
        "square": f"square\n{square['size']}×{square['size']}, value {square['value']:.3g}",
        "blend": f"blend\nalpha {trigger.alpha:g}",
        "warp": f"warp\nk {trigger.k}, strength {trigger.strength:g}",
    }
