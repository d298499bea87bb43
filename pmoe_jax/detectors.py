"""Detectors, and subsets of experts, on a trained run: what these defences write and print.

Axes: M member, R subset, Y class, N image, H W image, C channel.
"""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pmoe_jax import defences, memory, report, training, triggers
from pmoe_jax import trained as trained_lib
from pmoe_jax.defend_base import (
    METRICS,
    Base,
    brief,
    cells,
    covered,
    headline,
    jit,
    read_json,
    write_csv,
    write_npz,
)
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import check_sum, write_with_sum


def check(base: Base, config: Any) -> None:
    """What only config and run together can tell, before anything is written.

    Raises:
      PmoeError: no experts, or too many; no images of the kind asked for, or too few; memory.
    """
    if config.method == "expert_subsets":
        if "experts" not in base.state.params:
            raise PmoeError(f"{base.run.path} is a dense model; it has no experts to prune")
        defences.expert_subsets(base.model.num_experts)
    if config.method == "neural_cleanse":
        base.held(config.cleanse.data)
    if config.method == "strip":
        _check_strip(base, config.strip)


def _check_strip(base: Base, options: Any) -> None:
    held = len(base.held(options.data)[1])
    if held < 2:
        raise PmoeError(f"strip.data={options.data} holds {held} image; 2 are needed")
    size = min(options.batch_size, _strip_count(base, options))
    needed = 4 * size * options.overlays * math.prod(base.dataset.image_shape)
    available = memory.device_memory()
    if needed > available:
        raise PmoeError(
            f"strip.overlays={options.overlays} on batches of {size} are {needed / 2**30:.1f} GiB "
            f"of blended images, and {available / 2**30:.1f} GiB are available; lower it or "
            "strip.batch_size"
        )


def notes(base: Base, config: Any) -> list[str]:
    """Values of the config that are not taken as they are."""
    options, held = config.strip, base.count(config.strip.data) if config.method == "strip" else 0
    if 2 * options.images <= held or config.method != "strip":
        return []
    return [
        f"strip.images={options.images} is more than half of the {held} {options.data} images; "
        f"{_strip_count(base, options)} are used"
    ]


# --- subsets of experts ---------------------------------------------------------------------------


def expert_subsets(base: Base, config: Any) -> str:
    """Evaluates every non-empty subset of experts; writes `subsets.csv`, returns the table."""
    subsets = jnp.asarray(defences.expert_subsets(base.model.num_experts))
    silence = config.subsets.silence

    def one(variables: Any, trigger: Any, images: jax.Array) -> jax.Array:
        inputs = training.to_float(images)
        return defences.expert_subset_predictions(
            base.model, variables, subsets, inputs, trigger, silence=silence
        )

    program = jit(training.over_members(one, base.strategy, shared=(2,)))

    def classes(trigger: Any) -> np.ndarray:
        def arguments(batch: Any) -> tuple[Any, ...]:
            return base.state.variables, trigger, batch

        images, size = base.dataset.test_images, base.config.evaluation.batch_size
        size = memory.batch_that_fits(program, arguments, images, size)
        return base.over_images(lambda batch: program(*arguments(batch)), images, size)

    clean = classes(None)
    triggered = classes(base.attack.trigger) if base.triggered else None
    rows, lines = [], []
    for index, subset in enumerate(subsets):
        kept = " ".join(str(expert) for expert in np.flatnonzero(subset))
        own = base.measured_rows(
            clean[:, index], None if triggered is None else triggered[:, index],
            run=base.run.name, epoch=0, stage="experts",
        )  # fmt: skip
        rows += [{**row, "kept": kept} for row in own]
        lines.append([kept, *cells(own)])
    write_csv(base.out / "subsets.csv", rows)
    table = report.markdown(["experts kept (from 0)", *METRICS.values()], lines)
    return f"{headline(base)}\npruned experts send {silence}\n\n{table}"


# --- Neural Cleanse -------------------------------------------------------------------------------


def neural_cleanse(base: Base, config: Any) -> str:
    """Inverts triggers of all classes for every member, one after another; resumes by member.

    Writes `cleanse_MEMBER.json` and `.npz` (masks, patterns) a member, `cleanse.csv` and a figure.
    """
    cleanse = config.cleanse
    settings = defences.CleanseSettings(
        rounds=cleanse.rounds,
        batches_per_round=cleanse.batches_per_round,
        batch_size=cleanse.batch_size,
        # Whole numbers are allowed, but such as 10**30 only as floats.
        learning_rate=float(cleanse.learning_rate),
        initial_cost=float(cleanse.initial_cost),
        cost_multiplier=float(cleanse.cost_multiplier),
        success=float(cleanse.success),
        patience=cleanse.patience,
    )
    images, _ = base.held(cleanse.data)
    logits_of = _logits_of(base)
    rows, found = [], []
    for index, member in enumerate(base.members):
        path = base.out / f"cleanse_{index}.json"
        if not path.exists() or not path.with_suffix(".npz").exists():
            variables = jax.tree.map(lambda leaf: leaf[index], base.state.variables)  # noqa: B023
            bar = tqdm(
                total=cleanse.rounds, desc=f"seed {member.seed}", unit="round",
                disable=not base.progress,
            )  # fmt: skip
            inverted = defences.invert_triggers(
                logits_of, variables, images, base.dataset.num_classes,
                settings=settings, seed=config.seed, on_round=lambda _: bar.update(),  # noqa: B023
            )  # fmt: skip
            bar.close()
            best = {name: np.asarray(value) for name, value in inverted.best.items()}
            masks = {name: best[name] for name in ("mask", "pattern")}
            write_npz(path.with_suffix(".npz"), masks)
            norms = best["norm"]
            # Last, as its presence says that the member is done.
            write_with_sum(
                path,
                json.dumps(
                    {
                        "norms": norms.tolist(),
                        "indices": defences.anomaly_indices(norms).tolist(),
                        "success": np.asarray(inverted.success).tolist(),
                    }
                ),
            )
        stored = read_json(path)
        found.append(stored)
        gone = base.diverged[index] or not np.isfinite(stored["norms"]).all()
        rows += [
            {
                "run": base.run.name,
                "member": index,
                "seed": member.seed,
                "dataset": base.dataset.name,
                "width": base.config.model.width,
                "trigger": member.trigger["name"],
                "rate": member.rate,
                "class": label,
                "stage": "diverged" if gone else "trained",
                "is_target": member.rate > 0 and label == member.target,
                "mask_l1": norm,
                "anomaly_index": anomaly,
                "last_success": success,
                "suspicious": anomaly > cleanse.threshold,
            }
            for label, (norm, anomaly, success) in enumerate(
                zip(stored["norms"], stored["indices"], stored["success"], strict=True)
            )
        ]
    write_csv(base.out / "cleanse.csv", rows)
    _draw_triggers(base)
    return _cleanse_table(base, config, found, rows)


def _cleanse_table(
    base: Base, config: Any, found: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> str:
    gone = _gone(base, rows)
    lines: list[list[str]] = []
    largest, of_target = [], []
    for member, stored in zip(base.members, found, strict=True):
        indices, norms = np.asarray(stored["indices"]), np.asarray(stored["norms"])
        flagged = np.flatnonzero(indices > config.cleanse.threshold)
        largest.append(float(indices.max()))
        of_target.append(float(indices[member.target]))
        of_class = [
            str(member.target),
            f"{indices[member.target]:.2f}",
            f"{norms[member.target]:.1f}",
        ]
        lines.append(
            [_seed(base, len(lines), gone), f"{indices.max():.2f}",
             ", ".join(map(str, flagged)) or "none",
             *(of_class if member.rate else ["none", "", ""]), f"{np.median(norms):.1f}"]
        )  # fmt: skip
    good = [index for index in range(len(base.members)) if index not in gone]
    if len(good) >= 3:
        attacked = [of_target[index] for index in good if base.members[index].rate]
        means = brief([largest[index] for index in good], 2), brief(attacked, 2)
        lines.append([_mean(base, rows), means[0], "", "", means[1], "", ""])
    header = [
        "model", "anomaly index", "suspicious classes", "target", "target's index",
        "target's mask", "median mask",
    ]  # fmt: skip
    note = f"suspicious above {config.cleanse.threshold:g}; masks by their L1 norm, in pixels"
    return f"{headline(base)}\n{note}\n\n{report.markdown(header, lines)}"


def _draw_triggers(base: Base, classes: int = 12) -> None:
    """Mask times pattern, on white, of the first classes and the target, a row a member."""
    from pmoe_jax.figures import plt, save

    labels = list(range(min(classes, base.dataset.num_classes)))
    if base.members[0].target not in labels:
        labels[-1] = base.members[0].target
    figure, grid = plt.subplots(
        len(base.members), len(labels), squeeze=False, layout="constrained",
        figsize=(len(labels) * 0.9, len(base.members) * 1.05),
    )  # fmt: skip
    for index, (row, member) in enumerate(zip(grid, base.members, strict=True)):
        path = base.out / f"cleanse_{index}.npz"
        check_sum(path)
        with np.load(path) as stored:
            pictures = np.clip(1 - stored["mask"] * (1 - stored["pattern"]), 0, 1)
            masks = stored["mask"].sum((1, 2, 3))
        for label, axes in zip(labels, row, strict=True):
            axes.imshow(pictures[label].squeeze(), vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{label}: {masks[label]:.1f}", fontsize=7)
        row[0].set_ylabel(f"seed {member.seed}", fontsize=7)
    save(figure, base.out / "cleanse")


# --- STRIP ----------------------------------------------------------------------------------------


def strip(base: Base, config: Any) -> str:
    """Entropies under blending, the threshold, FRR and FAR; writes `strip.csv` and `.npz`.

    One half of the clean images sets the threshold and gives the overlays; the other half is under
    test, as it is and with each member's trigger.
    """
    options = config.strip
    images, labels = base.held(options.data)
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(labels))
    count = _strip_count(base, options)
    known, tested = order[:count], order[count : 2 * count]
    overlays = np.asarray(images[known])
    logits_of = _logits_of(base)

    def one(variables: Any, trigger: Any, batch: jax.Array, drawn: jax.Array, held: Any) -> Any:
        inputs = training.to_float(batch)
        if trigger is not None:
            inputs = triggers.apply(inputs, trigger)
        blended_with = training.to_float(held)[drawn]
        return defences.strip_entropies(
            logits_of, variables, inputs, blended_with,
            weight=options.weight, overlay_weight=options.overlay_weight,
        )  # fmt: skip

    program = jit(training.over_members(one, base.strategy, shared=(2, 3, 4)))
    held_on_device = jax.device_put(overlays)

    def entropies(chosen: np.ndarray, trigger: Any) -> np.ndarray:
        """float [M, N]"""

        def of_batch(batch: np.ndarray) -> Any:
            drawn = rng.integers(0, len(known), (len(batch), options.overlays))
            return program(base.state.variables, trigger, batch, drawn, held_on_device)

        return base.over_images(of_batch, np.asarray(images[chosen]), options.batch_size)

    calibration, clean = entropies(known, None), entropies(tested, None)
    triggered = entropies(tested, base.attack.trigger) if base.triggered else None
    measured = [calibration, clean] if triggered is None else [calibration, clean, triggered]
    # Of outputs that are not finite no entropy is.
    nowhere = ~np.all([np.isfinite(each).all(-1) for each in measured], axis=0)
    rows: list[dict[str, Any]] = []
    for index, member in enumerate(base.members):
        # The images that ASR counts: a target image predicted as the target proves nothing.
        source = base.source
        attacked = (
            labels[tested] == source if source is not None else (labels[tested] != member.target)
        )
        carried = triggered is not None and member.trigger["name"] != "none" and attacked.any()
        rates = defences.strip_rates(
            calibration[index],
            clean[index],
            triggered[index, attacked] if triggered is not None and carried else np.zeros(1),
            options.frr,
        )
        if not carried:
            rates["far"] = float("nan")
        rows.append(
            {
                "run": base.run.name,
                "member": index,
                "seed": member.seed,
                "dataset": base.dataset.name,
                "width": base.config.model.width,
                "stage": "diverged" if base.diverged[index] or nowhere[index] else "trained",
                "trigger": member.trigger["name"],
                "rate": member.rate,
                "images": count,
                **rates,
            }
        )
    write_csv(base.out / "strip.csv", rows)
    kept: dict[str, Any] = {"calibration": calibration, "clean": clean}
    if triggered is not None:
        kept["triggered"] = triggered
    write_npz(base.out / "strip.npz", kept)
    gone = _gone(base, rows)
    lines = [
        [_seed(base, row["member"], gone), f"{row['threshold']:.3f}", f"{row['frr']:.1f}",
         "" if triggered is None or np.isnan(row["far"]) else f"{row['far']:.1f}"]
        for row in rows
    ]  # fmt: skip
    good = [row for row in rows if row["stage"] != "diverged"]
    # Members that nobody attacked have no FAR; `brief` leaves out a mean that lacks some.
    values = ([row[name] for row in good] for name in ("threshold", "frr", "far"))
    if len(good) >= 3:
        lines.append([_mean(base, rows), *(brief(each, 2) for each in values)])
    note = (
        f"{count} images for the threshold and {count} under test, {options.overlays} overlays "
        f"each, FRR aimed at {100 * options.frr:g} %"
    )
    header = ["model", "threshold [bits]", "FRR [%]", "FAR [%]"]
    return f"{headline(base)}\n{note}\n\n{report.markdown(header, lines)}"


def _strip_count(base: Base, options: Any) -> int:
    """Images for the threshold, and as many under test."""
    return min(options.images, base.count(options.data) // 2)


# --- helpers --------------------------------------------------------------------------------------


def _gone(base: Base, rows: list[dict[str, Any]]) -> set[int]:
    """The members that are in no mean."""
    found = {row["member"] for row in rows if row["stage"] == "diverged"}
    known = np.flatnonzero(base.diverged).tolist()
    trained_lib.tell_of_outputs(base.members, sorted(found - {*known}))
    return found


def _mean(base: Base, rows: list[dict[str, Any]]) -> str:
    """The title of a row of means."""
    return "mean ± sd" + (f" ({covered(base, rows)})" if covered(base, rows) else "")


def _seed(base: Base, index: int, gone: set[int]) -> str:
    """A row's title."""
    return f"seed {base.members[index].seed}" + " (diverged, in no mean)" * (index in gone)


def _logits_of(base: Base) -> defences.LogitsOf:
    model = base.model

    def logits_of(variables: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, images)
        return logits

    return logits_of


METHODS = {
    "expert_subsets": expert_subsets,
    "neural_cleanse": neural_cleanse,
    "strip": strip,
}
