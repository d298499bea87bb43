"""What the paper reports, to hold our figures against. In percent.

`attacks.csv`: Tables 1 and 2, mean of 5 runs a cell; CADs as printed, also where they do not equal
clean accuracy minus BA. `fine_pruning.csv`: Table 3 (CIFAR-10, square, 2 % poisoning, mean of 3
runs); cells that are not legible in the source are empty.
"""

from __future__ import annotations

import csv
import functools
import math
import pathlib

_FOLDER = pathlib.Path(__file__).parent


def attack(dataset: str, trigger: str, rate: float, metric: str) -> float | None:
    """A value of Tables 1 and 2, or None.

    Args:
      dataset: "cifar10" or "gtsrb".
      trigger: "square", "blend" or "warp".
      rate: poisoning rate from 0 to 1.
      metric: "asr", "ba" or "cad".
    """
    for line in table("attacks"):
        same = line["dataset"] == dataset and line["trigger"] == trigger
        if same and math.isclose(float(line["poison_rate_percent"]), 100 * rate, rel_tol=1e-6):
            return float(line[metric]) if line.get(metric) else None
    return None


def fine_pruning(
    dataset: str, trigger: str, rate: float, pruned: float, stage: str, metric: str
) -> float | None:
    """A value of Table 3, or None.

    Args:
      dataset, trigger, rate: see `attack`.
      pruned: pruning rate from 0 to 1.
      stage: "before", "pruned" or "fine_tuned".
      metric: "ba" (the table's CA) or "asr".
    """
    if (dataset, trigger) != ("cifar10", "square") or not math.isclose(rate, 0.02):
        return None
    names = {"before": "before", "pruned": "after_pruning", "fine_tuned": "after_fine_tuning"}
    for line in table("fine_pruning"):
        same = math.isclose(float(line["pruning_rate_percent"]), 100 * pruned, rel_tol=1e-6)
        if same and line["stage"] == names[stage]:
            value = line["ca" if metric == "ba" else metric]
            return float(value) if value else None
    return None


@functools.cache
def table(name: str) -> tuple[dict[str, str], ...]:
    """The lines of one of the data files, "attacks" or "fine_pruning", as text."""
    with open(_FOLDER / f"{name}.csv", newline="") as file:
        return tuple(csv.DictReader(file))
