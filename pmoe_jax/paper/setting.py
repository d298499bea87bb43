"""The paper's setting (Section 4), and smaller ones: the presets of the files in experiments/.

- paper: width 10, 25 epochs, 5 seeds; meant for an accelerator.
- cpu: width 2, 10 epochs (GTSRB: 8), 3 seeds, poisoning rates 2, 10 and 0.5 %; one to two hours
  a cell on one core. cpu_rest: the other rates, 1 seed; the square at 0.1 % 3 seeds, as claims of
  the paper hang on it.
- smoke: digits of 16x16 pixels in place of both data sets, 1 seed, one rate; minutes. It shows
  that an experiment runs, not what its figures are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from pmoe_jax import config as config_lib

Cell = dict[str, Any]
PRESETS = ("paper", "cpu", "cpu_rest", "smoke")
#: Poisoning rates of Tables 1 and 2, those first that tell triggers apart.
RATES = {
    "paper": (0.02, 0.1, 0.005, 0.001, 0.06),
    "cpu": (0.02, 0.1, 0.005),
    "cpu_rest": (0.001, 0.06),
    "smoke": (0.1,),
}
#: What tables call the triggers, and their fields.
TRIGGERS: dict[str, Cell] = {
    "square": {"trigger.name": "square"},
    "blend": {"trigger.name": "blend"},
    "warp": {"trigger.name": "warp"},
    "warp (truncated)": {"trigger.name": "warp", "quirks.a3_truncating_warp": True},
}
#: Where the paper says that squares fail, and why (Section 5.1).
FAILING = ("square", 0.001)
DENSE: Cell = {"model.name": "wide_resnet"}


def config(preset: str = "paper") -> ml_collections.ConfigDict:
    """CIFAR-10 without an attack, at the preset's scale; `dataset` turns a cell to GTSRB.

    Raises:
      ValueError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    made = config_lib.default()
    made.data.name = "cifar10"
    made.num_seeds = 5
    if preset in ("cpu", "cpu_rest"):
        made.num_seeds = 3
        made.model.width = 2
        made.train.epochs = 10
        made.evaluation.every_epochs = 5
        made.checkpoint.every_steps = 130
    if preset == "smoke":
        made.data.name = "digits"
        made.num_seeds = 1
        made.data.image_size = 16
        made.model.update(width=1, patches_per_expert=4, bn_momentum=0.9)
        made.train.update(epochs=3, batch_size=32)
        made.evaluation.batch_size = 180
    return made


def datasets(preset: str) -> list[tuple[str, str]]:
    """The data sets of a preset, and what tables call them."""
    if preset == "smoke":
        return [("cifar10", "digits"), ("gtsrb", "digits")]
    return [("cifar10", "CIFAR-10"), ("gtsrb", "GTSRB")]


def dataset(name: str, preset: str = "paper") -> Cell:
    """What a cell changes to be of "cifar10" or "gtsrb"; nothing for digits."""
    if preset == "smoke" or name == "cifar10":
        return {}
    return {"data.name": name, **({"train.epochs": 8} if preset.startswith("cpu") else {})}


def attacks(
    name: str,
    preset: str = "paper",
    suffix: str = "",
    rates: Mapping[str, Sequence[float]] | None = None,
    fields: Cell | None = None,
    triggers: Mapping[str, Cell] | None = None,
) -> list[Cell]:
    """Cells of attacks on "cifar10" or "gtsrb", rate by rate.

    Args:
      name: the data set.
      preset: one of `PRESETS`.
      suffix: what else tables say of the models.
      rates: trigger -> poisoning rates; all of `TRIGGERS` at all `RATES` unless given.
      fields: what else the cells change.
      triggers: more of them than `TRIGGERS`.
    """
    known = {**TRIGGERS, **(triggers or {})}
    rates = rates or {trigger: RATES[preset] for trigger in TRIGGERS}
    shared = {**dataset(name, preset), **(fields or {})}
    return [
        {
            "name": f"{dict(datasets(preset))[name]}{suffix}, {trigger}, {100 * rate:g} %",
            **shared, **known[trigger], "poison.rate": rate,
            **({"num_seeds": 1} if preset == "cpu_rest" and (trigger, rate) != FAILING else {}),
        }
        for rate in RATES[preset]
        for trigger in rates
        if rate in rates[trigger]
    ]  # fmt: skip
