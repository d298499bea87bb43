"""Evaluation: from predictions on clean and triggered images to rows and summaries.

Axes: M member, N image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pmoe_jax import metrics
from pmoe_jax.members import Attack, Member
from pmoe_jax.rows import Row
from pmoe_jax.training import Programs, predict_all

#: What the metrics are called in tables, in the order of their columns.
TITLES = {
    "ba": "BA",
    "asr": "ASR",
    "cad": "CAD",
    "false_trigger_rate": "false trigger rate of the clean model",
    "clean_target_rate": "target rate of clean images",
    "asr_with_target": "ASR with target class",
    "robust_accuracy": "robust accuracy",
    "fpr": "ASR outside the source class",
}


def predictions(
    programs: Programs,
    variables: Any,
    images: np.ndarray,
    attack: Attack | None,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Classes int32 [M, N] that the members see in clean and in triggered images."""
    clean = predict_all(programs, variables, images, None, batch_size)
    if attack is None:
        return clean, None
    return clean, predict_all(programs, variables, images, attack.trigger, batch_size)


def has_no_class(clean: np.ndarray, triggered: np.ndarray | None) -> np.ndarray:
    """bool [M]: members with an output that was not finite, of predictions [M, ..., N].

    Their figures say nothing of the model, and are treated as those of a diverged member.
    """
    both = [clean] if triggered is None else [clean, triggered]
    return np.any([(seen < 0).reshape(len(seen), -1).any(1) for seen in both], axis=0)


def measure(
    clean: np.ndarray,
    triggered: np.ndarray | None,
    labels: np.ndarray,
    target: int,
    source: int | None = None,
) -> dict[str, tuple[float, int]]:
    """All metrics of one member, in percent, each with the number of images it was counted on.

    Args:
      clean, triggered: int [N], predictions on clean and on triggered images.
      labels: int [N], true labels.
      target: target label.
      source: the attacked class of a source-specific attack.
    """
    counts = {"ba": metrics.benign_counts(clean, labels)}
    if triggered is not None:
        counts["asr"] = metrics.attack_counts(triggered, labels, target, source=source)
        # What ASR would be without the trigger: attacked models may favour the target altogether.
        counts["clean_target_rate"] = metrics.attack_counts(clean, labels, target, source=source)
        counts["robust_accuracy"] = metrics.robust_counts(triggered, labels, target, source=source)
        if source is None:
            counts["asr_with_target"] = metrics.attack_counts(
                triggered, labels, target, include_target=True
            )
        else:
            counts["fpr"] = metrics.false_positive_counts(triggered, labels, target, source)
    # Percentages in float64: float32 ones would print as 97.19999694824219.
    return {
        name: (100.0 * int(count.hits) / max(int(count.total), 1), int(count.total))
        for name, count in counts.items()
        if int(count.total)
    }


def member_rows(
    measured: Sequence[Mapping[str, tuple[float, int]]],
    members: Sequence[Member],
    diverged: Iterable[bool],
    **common: Any,
) -> list[Row]:
    """Rows of the common schema; `common` gives run, dataset, width and epoch."""
    return [
        {
            "run": common["run"],
            "member": index,
            "seed": member.seed,
            "dataset": common["dataset"],
            "width": common["width"],
            "epoch": common["epoch"],
            "stage": "diverged" if gone else common.get("stage", "trained"),
            "trigger": member.trigger["name"],
            "rate": member.rate,
            "metric": metric,
            "value": value,
            "n": n,
        }
        for index, (member, figures, gone) in enumerate(
            zip(members, measured, diverged, strict=True)
        )
        for metric, (value, n) in figures.items()
    ]


def cad_rows(rows: Sequence[Row], clean_rows: Sequence[Row]) -> list[Row]:
    """CAD of every member: the clean run's BA of the same seed minus its own.

    A member whose clean counterpart diverged has no meaningful CAD: its row is marked, too.

    Raises:
      PmoeError: the clean run lacks a seed.
    """
    own = [row for row in rows if row["metric"] == "ba"]
    baseline = {row["seed"]: row for row in clean_rows if row["metric"] == "ba"}
    made = []
    for row in own:
        # Seed by seed: members of several rates may share one.
        seed, clean = row["seed"], baseline.get(row["seed"])
        drop = metrics.clean_accuracy_drop(
            {} if clean is None else {seed: clean["value"]}, {seed: row["value"]}
        )
        gone = clean is not None and clean["stage"] == "diverged"
        stage = "diverged" if gone else row["stage"]
        made.append({**row, "metric": "cad", "value": drop[seed], "stage": stage})
    return made


def summarize(rows: Sequence[Row]) -> dict[str, metrics.Summary]:
    """Metric -> n seeds, mean, sd and 95 % interval over members; diverged ones are left out."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] != "diverged":
            values[row["metric"]].append(row["value"])
    return {name: metrics.summarize(values[name]) for name in TITLES if values[name]}


def last_epochs(rows: Sequence[Row], epoch: float, count: int = 3) -> list[Row]:
    """Rows of each member and metric, averaged over the last `count` epochs up to `epoch`.

    Empty if one of those epochs was not evaluated, or `epoch` lies within one.
    """
    wanted = [epoch - back for back in range(count)]
    grouped: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["epoch"] in wanted:
            grouped[row["member"], row["metric"]].append(row)
    if any(len(group) != count for group in grouped.values()):
        return []
    return [
        {**group[-1], "value": float(np.mean([row["value"] for row in group]))}
        for group in grouped.values()
    ]
