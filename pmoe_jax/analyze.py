"""`pmoe analyze`: the routing of a trained run over its whole test set, as arrays, rows, figures.

The way through: `analyze` restores checkpoints; `routing_arrays` runs the pure functions of
`routing` over the test set; `routing_rows` makes rows of the arrays; `routing_output` writes both;
`figures_routing` draws them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from pmoe_jax import config as config_lib
from pmoe_jax import (
    data,
    inputs,
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
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.members import Attack, Member
from pmoe_jax.routing_output import Analysis, OnImages
from pmoe_jax.rows import Row
from pmoe_jax.rundir import RunDirectory

#: Prefixes of the arrays of models beside the analysed one.
CLEAN, DEFENDED = routing_arrays.PREFIXES


def analyze(
    workdir: str | os.PathLike[str],
    *,
    clean: str | os.PathLike[str] | None = None,
    defended: str | os.PathLike[str] | None = None,
    others: Sequence[str | os.PathLike[str]] = (),
    shown: Sequence[int] = (),
    members: Sequence[int] = (),
    source: str = "",
    trigger: Mapping[str, Any] | None = None,
    every_epoch: bool = False,
    causes: bool = True,
    single_image: bool = False,
    dataset: Dataset | None = None,
    progress: bool = False,
) -> Analysis:
    """Analyses the routing of all members of a run on its whole test split.

    Args:
      workdir: the run directory. Nothing in it is executed.
      clean: run directory of clean models: the same analysis of its members of the same seeds,
        with this run's trigger. Attacked members that it has, too, are left alone.
      defended: the same of this run after a defence (a cell that `pmoe defend` wrote).
      others: further attacked runs on the same data set, of which only the `shown` images are
        looked at, each with its own trigger.
      shown: positions of test images; by default the first of each of two classes but the target.
      members: which members of the run, by their position in it; all by default. They must share
        one attack and have different seeds.
      source: where the data set lies, if not where the run's config says.
      trigger: {"name": ..., parameters} to apply instead of the trained one.
      every_epoch: all saved checkpoints instead of the newest.
      causes: force routings and silence experts, too.
      single_image: take patch values from the first shown image alone (quirk A4).
      dataset: an already loaded data set.
      progress: show a progress bar on stderr.

    Raises:
      PmoeError: missing or damaged directory, one that does not fit the data, a dense model,
        members of several attacks, or runs that cannot be compared.
    """
    run = RunDirectory(workdir)
    config, everybody = run.config(), run.members()
    _check_model(config, causes)
    _check_finished(run)
    chosen = _chosen(run, everybody, members)
    trained = [everybody[index] for index in chosen]
    given = dict(trained[0].trigger) if trigger is None else trigger
    attacked = [dataclasses.replace(member, trigger=given) for member in trained]
    attacked_class = config.poison.source if config.poison.source >= 0 else None
    beside = {}
    if clean is not None:
        beside[CLEAN] = _clean_beside(RunDirectory(clean), run, attacked)
    if defended is not None:
        beside[DEFENDED] = _defended_beside(RunDirectory(defended), run, trained, attacked)
    _check_others([RunDirectory(path) for path in others], run)
    dataset = dataset or inputs.load_data(config, source)
    images = list(shown) or _example_images(dataset, trained[0].target)
    for position in images:
        if not 0 <= position < len(dataset.test_images):
            raise PmoeError(
                f"--images: there is no test image {position}; choose 0 to "
                f"{len(dataset.test_images) - 1}"
            )
    single = images[0] if single_image else None
    _note_data(run, dataset, source)
    on_images = [_on_images(RunDirectory(path), dataset, images) for path in others]
    options: dict[str, Any] = {"causes": causes, "single_image": single, "progress": progress}
    of_step: list[dict[str, np.ndarray]] = []
    rows: list[Row] = []
    epoch: Any = 0
    for step in run.whole_steps() if every_epoch else [None]:
        restored = trained_lib.restore(run, config, everybody, dataset, step)
        state, attack = members_lib.take((restored.state, restored.attack), chosen)
        if trigger is not None:
            attack = trained_lib.with_trigger(attack, attacked, dataset.image_shape)
        epoch = restored.epoch
        common = {"run": run.name, "epoch": epoch, "stage": restored.stage(trigger is not None)}
        found, of_members = _of_state(
            restored.programs, state, attack, config, attacked, attacked_class, dataset, common,
            **options,
        )  # fmt: skip
        rows += of_members
        # Of the earlier ones, only what is kept for every epoch.
        of_step = [{name: each[name] for name in _BY_EPOCH if name in each} for each in of_step]
        of_step.append(found)
    arrays = _joined(of_step)

    def scale(rows: list[Row], described: list[Member], config: Any, epoch: float) -> str:
        other = given if given != described[0].trigger else None
        line = report.scale(trained_lib.Evaluated(rows, described, config, epoch, [], other))
        return f"{line}; {len(dataset.test_labels)} test images"

    own_scale = scale(rows, trained, config, epoch)
    scales, names = {}, {run.name}
    for prefix, other in beside.items():
        restored = trained_lib.restore(other.run, other.config, other.everybody, dataset)
        state = members_lib.take(restored.state, other.pairs)
        kind = prefix.partition("_")[0]
        name = other.run.name if other.run.name not in names else f"{other.run.name} ({kind})"
        names.add(name)
        common = {"run": name, "epoch": restored.epoch,
                  "stage": restored.stage(trigger is not None)}  # fmt: skip
        found, of_members = _of_state(
            restored.programs, state, attack, other.config, other.members, attacked_class, dataset,
            common, **options,
        )  # fmt: skip
        arrays |= {
            f"{prefix}{array_name}": array
            for array_name, array in _joined([found]).items()
            if not _same(array, arrays.get(array_name))
        }
        rows += of_members
        # A clean model's own trigger is none, whatever is applied to it here.
        described = [other.everybody[pair] for pair in other.pairs]
        scales[prefix] = scale(of_members, described, other.config, restored.epoch)
    made_from = routing_output.made_from(
        {"": run, **{prefix: other.run for prefix, other in beside.items()}},
        members=members, trigger=trigger, every_epoch=every_epoch, causes=causes,
        single_image=single,
    )  # fmt: skip
    return Analysis(
        arrays=arrays,
        rows=rows,
        scale=own_scale,
        dataset=dataset,
        config=config,
        members=trained,
        trigger=attack.trigger if routing_arrays.has_trigger(attacked) else None,
        applied=given,
        scales=scales,
        shown=images,
        others=on_images,
        made_from=made_from,
    )


# --- What is analysed together --------------------------------------------------------------


@dataclasses.dataclass
class _Beside:
    """A run whose models of the same seeds are analysed with the same trigger.

    Attributes:
      run, config, everybody: the run, and all of its members.
      pairs: the position of each analysed member's counterpart.
      members: the counterparts, with the trigger that is applied.
    """

    run: RunDirectory
    config: Any
    everybody: list[Member]
    pairs: np.ndarray
    members: list[Member]


def _clean_beside(run: RunDirectory, of: RunDirectory, attacked: Sequence[Member]) -> _Beside:
    """The clean models of the members' seeds.

    Raises:
      PmoeError: the run has none for a seed, or is not comparable.
    """
    _check_comparable(run, of, "--clean")
    everybody = run.members()
    clean = [index for index, member in enumerate(everybody) if member.rate == 0]
    if not clean:
        raise PmoeError(f"{run.path} is not a clean run: its poisoning rate is above 0")
    seeds = [everybody[index].seed for index in clean]
    pairs = []
    for member in attacked:
        if seeds.count(member.seed) != 1:
            have = ", ".join(map(str, seeds))
            raise PmoeError(
                f"{run.path} needs one clean model of seed {member.seed}; it has those of {have}"
            )
        pairs.append(clean[seeds.index(member.seed)])
    members = [dataclasses.replace(member, rate=0.0) for member in attacked]
    return _Beside(run, run.config(), everybody, np.asarray(pairs), members)


def _defended_beside(
    run: RunDirectory, of: RunDirectory, trained: Sequence[Member], attacked: Sequence[Member]
) -> _Beside:
    """The same members after a defence.

    Raises:
      PmoeError: no defence, one of another run or checkpoint, or a member is missing.
    """
    _check_comparable(run, of, "--defended")
    defence, newest = run.noted("defence"), of.whole_steps()[-1]
    if not defence:
        raise PmoeError(
            f"--defended: {run.path} is no defended run; give one that 'pmoe defend' wrote"
        )
    if defence.get("of") != of.name:
        raise PmoeError(
            f"--defended: {run.path} is a defence of {defence.get('of')}, not of {of.name}; give "
            "one of the analysed run"
        )
    digest = of.sum_of_checkpoint(newest)
    if defence.get("step") == newest and defence.get("checkpoint", digest) != digest:
        raise PmoeError(
            f"--defended: {run.path} is a defence of another run that was called {of.name}; give "
            "one of the analysed run"
        )
    if defence.get("step") != newest:
        raise PmoeError(
            f"--defended: {run.path} is a defence of step {defence.get('step')}, {of.name} is at "
            f"{newest}; defend it again"
        )
    everybody = run.members()
    missing = [member.seed for member in trained if member not in everybody]
    if missing:
        raise PmoeError(f"--defended: {run.path} lacks the member of seed {missing[0]}")
    pairs = np.asarray([everybody.index(member) for member in trained])
    return _Beside(run, run.config(), everybody, pairs, list(attacked))


def _chosen(run: RunDirectory, everybody: Sequence[Member], asked: Sequence[int]) -> np.ndarray:
    """Positions of the members to analyse.

    Raises:
      PmoeError: there is no such member, or they are of several attacks, or of one seed.
    """
    for index in asked:
        if not 0 <= index < len(everybody):
            raise PmoeError(
                f"--members: {run.path} has no member {index}; choose 0 to {len(everybody) - 1}"
            )
    chosen = list(asked) or list(range(len(everybody)))
    first, seeds = everybody[chosen[0]], set[int]()
    problem, alike = "", []
    for index in chosen:
        member = everybody[index]
        if not members_lib.alike(member, first):
            problem = problem or (
                f"member {index} has {_attack_text(member)}, member {chosen[0]} "
                f"{_attack_text(first)}"
            )
        elif member.seed in seeds:
            problem = problem or f"member {index} has seed {member.seed} once more"
        else:
            alike.append(index)
            seeds.add(member.seed)
    if problem:
        raise PmoeError(
            f"members of {run.path} cannot be analysed together: {problem}; choose some of one "
            f"attack and different seeds, such as --members={','.join(map(str, alike))}"
        )
    return np.asarray(chosen)


def _attack_text(member: Member) -> str:
    parameters = [f"{name} {value}" for name, value in member.trigger.items() if name != "name"]
    return (
        f"trigger {' '.join([member.trigger['name'], *parameters])}, rate {member.rate:g}, "
        f"target {member.target}"
    )


def _check_comparable(run: RunDirectory, of: RunDirectory, flag: str) -> None:
    """Refuses a run of another model or other data.

    Raises:
      PmoeError: it is one, or has no checkpoint.
    """
    own, other = (config_lib.flatten(each.config().to_dict()) for each in (of, run))
    if name := trained_lib.other_setting(own, other):
        raise PmoeError(
            f"{flag}: {run.path} was trained with {name}={other[name]}, {of.name} with "
            f"{own[name]}; give a run of the same model and data"
        )
    trained_lib.check_same_images(run, of, f"{flag}: ")
    _check_finished(run)


def _check_finished(run: RunDirectory) -> None:
    if not run.whole_steps():
        raise PmoeError(f"{run.path} has no finished checkpoint yet; train it first")


def _check_others(others: Sequence[RunDirectory], of: RunDirectory) -> None:
    names = [run.name for run in others]
    for run in others:
        if names.count(run.name) > 1:
            raise PmoeError(f"--others: two runs have the name {run.name}; rename one of them")
        _check_comparable(run, of, "--others")
        _chosen(run, run.members(), ())


def _note_data(run: RunDirectory, dataset: Dataset, source: str) -> None:
    """Says on stderr what a reader of the figures must know of the data."""
    trained_lib.is_own_data(run, dataset, source)
    if dataset.name == "gtsrb" and dataset.test_boxes is None:
        print(
            "note: this gtsrb has no boxes of the signs, so that object and background cannot be "
            "told apart; see `pmoe data prepare --help` for --boxes",
            file=sys.stderr,
        )


# --- Arrays and rows of a state -------------------------------------------------------------

#: Arrays that are kept of every analysed checkpoint, and their names there.
_BY_EPOCH = {
    "epoch": "epoch",
    "frequency": "frequency_by_epoch",
    "selection_of_image": "selection_of_image",
}


def _joined(of_step: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of several checkpoints: of the last one, and of all on a T axis."""
    last = of_step[-1]
    by_epoch = {
        joined: np.stack([each[name] for each in of_step])
        for name, joined in _BY_EPOCH.items()
        if name in last
    }
    return {**last, **by_epoch}


def _on_images(run: RunDirectory, dataset: Dataset, positions: list[int]) -> OnImages:
    """A run's routing of a few test images, with its own trigger."""
    config, members = run.config(), run.members()
    few = dataclasses.replace(
        dataset,
        test_images=np.asarray(dataset.test_images[np.asarray(positions)]),
        test_labels=dataset.test_labels[np.asarray(positions)],
        test_boxes=None,
    )
    restored = trained_lib.restore(run, config, members, dataset)
    arrays = routing_arrays.measure(
        restored.programs, restored.state, restored.attack, config, members, few,
        causes=False, single_image=None, progress=False,
    )  # fmt: skip
    row = {"stage": restored.stage()}
    described = trained_lib.Evaluated([row], members, config, restored.epoch, [])
    trigger = restored.attack.trigger if routing_arrays.has_trigger(members) else None
    return OnImages(run.name, report.scale(described), trigger, arrays, positions)


def _same(array: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and np.array_equal(array, other, equal_nan=array.dtype.kind == "f")


def _of_state(
    programs: training.Programs,
    state: Any,
    attack: Attack,
    config: Any,
    members: Sequence[Member],
    source: int | None,
    dataset: Dataset,
    common: Mapping[str, Any],
    *,
    causes: bool,
    single_image: int | None,
    progress: bool,
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Arrays and rows of the members at one checkpoint; `source` is the attacked class."""
    arrays = routing_arrays.measure(
        programs, state, attack, config, members, dataset,
        causes=causes, single_image=single_image, progress=progress,
    )  # fmt: skip
    arrays["epoch"] = np.asarray(float(common["epoch"]))
    if single_image is not None:
        indices = arrays["indices"][:, :, single_image].astype(np.int32)
        num_patches = int(np.prod(arrays["grid"]))
        arrays["selection_of_image"] = np.asarray(routing.selection_mask(indices, num_patches))
    frame = {**common, "dataset": dataset.name, "width": config.model.width}
    images = 1 if single_image is not None else len(dataset.test_labels)
    rows = routing_rows.rows_of(arrays, source, members, frame, images)
    return routing_arrays.without_groups(arrays), rows


def _check_model(config: Any, causes: bool) -> None:
    if config.model.name != "pmoe":
        raise PmoeError(
            f"model.name={config.model.name} has no routers to analyse; give the run of a pmoe"
        )
    if causes:
        routing.subsets(config.model.num_experts)


# --- Command line ---------------------------------------------------------------------------


def add_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines the flags of `pmoe analyze`."""
    from pmoe_jax import cli

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, "", meaning, flag_values=values)

    text("checkpoint", "Run directory to analyse.")
    text("clean", "Run directory with clean models, for comparison seed by seed.")
    text("defended", "Run directory of the same models after a defence, for comparison (Figure 6).")
    text("others", "Run directories of other attacks, separated by commas, for Figure 3.")
    text("data", "Where the data set lies, if not where the run's config says.")
    text("members", "Which members, such as 0,2, by their position in the run; all by default.")
    text("output", "File for all arrays (.npz); rows (.csv) and summary (.json) go beside it.")
    text("figures", "Folder for figures.")
    text("more_data", "NAME=SOURCE of another data set to draw triggers on (Figure 2).")
    text("images", "Positions of test images to draw, such as 3,17; by default two are chosen.")
    flags.DEFINE_boolean("every_epoch", False, "Analyse all saved checkpoints.", flag_values=values)
    flags.DEFINE_boolean(
        "causes", True, "Force routings and silence experts, too.", flag_values=values
    )
    flags.DEFINE_boolean("progress", True, "Show a progress bar.", flag_values=values)
    path = cli.peek(argv, "checkpoint")
    stored = RunDirectory(path).config() if path else config_lib.default()
    for group in ("trigger", "quirks"):
        config_flags.DEFINE_config_dict(group, stored[group], flag_values=values)


def run_command(values: flags.FlagValues, words: list[str]) -> int:
    """Runs `pmoe analyze`."""
    from pmoe_jax import cli

    if not values.checkpoint:
        raise PmoeError("--checkpoint is missing; give the directory of a trained run")
    stored = RunDirectory(values.checkpoint).config()
    asked = cli.asked_config(values, stored)
    # Figure 2 draws all triggers.
    names = triggers.NAMES if values.figures else (asked.trigger.name,)
    cli.check_effective(stored, asked, functools.partial(_effect, names=names))
    shown = config_lib.whole_numbers("images", values.images)
    members = config_lib.whole_numbers("members", values.members)
    # Before the long part, so that a mistake shows early.
    if values.output:
        routing_output.place(values.output)
    if values.figures:
        from pmoe_jax import figures

        figures.make_folder(values.figures)
    launch.prepare(stored.model.dtype)
    everybody = RunDirectory(values.checkpoint).members()
    # One that does not exist is refused by `analyze`.
    chosen = [everybody[index] for index in members if index < len(everybody)] or everybody
    more = _more_data(stored, values.more_data) if values.more_data else None
    analysis = analyze(
        values.checkpoint,
        clean=values.clean or None,
        defended=values.defended or None,
        others=[path for path in values.others.split(",") if path],
        shown=shown,
        members=members,
        source=values.data,
        trigger=cli.asked_trigger(values, stored, asked, chosen),
        every_epoch=values.every_epoch,
        causes=values.causes,
        single_image=asked.quirks.a4_single_image,
        progress=values.progress,
    )
    print(routing_output.table(analysis))
    if values.output:
        for path in routing_output.write(analysis, values.output):
            print(f"wrote {path}", file=sys.stderr)
    if values.figures:
        from pmoe_jax import figures_paper, figures_routing

        drawn = [(analysis.dataset, analysis.shown)]
        if more is not None:
            drawn.append((more, _example_images(more, stored.poison.target)))
        strips = [
            figures_paper.Strip(each, places, _triggers(analysis, asked, each.image_shape))
            for each, places in drawn
        ]
        written = figures_routing.write_all(
            analysis, values.figures, analysis.shown, strips=strips,
            trigger_labels=_trigger_labels(analysis, asked),
            single_image=asked.quirks.a4_single_image,
        )  # fmt: skip
        for path in written:
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _effect(config: Any, names: Sequence[str]) -> Any:
    """What the fields of trigger and quirks amount to, if triggers of these names are used."""
    quirk = config.quirks.a4_single_image
    return quirk, config.trigger.name, [_member_of(config, name, 0).trigger for name in names]


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
        if name == analysis.applied["name"] and shape == analysis.dataset.image_shape:
            made[name] = jax.tree.map(lambda leaf: leaf[0], analysis.trigger)
            continue
        member = _member_of(asked, name, first.seed)
        if name == analysis.applied["name"]:  # Images of another shape have it, too.
            member = dataclasses.replace(member, trigger=analysis.applied)
        patterns = inputs.load_patterns([member], shape)
        made[name] = members_lib.make_trigger(member, shape, patterns)
    return made


def _trigger_labels(analysis: Analysis, asked: Any) -> dict[str, str]:
    made = {name: _member_of(asked, name, 0).trigger for name in ("square", "blend", "warp")}
    made[analysis.applied["name"]] = analysis.applied
    square, blend, warp = made["square"], made["blend"], made["warp"]
    return {
        "square": f"square\n{square['size']}×{square['size']}, value {square['value']:.3g}",
        "blend": f"blend\nalpha {blend['alpha']:g}",
        "warp": f"warp\nk {warp['k']}, strength {warp['strength']:g}",
    }
