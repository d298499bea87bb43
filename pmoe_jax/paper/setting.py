"""The paper's setting (Section 4), and smaller ones: the presets of the files in experiments/.

- paper: width 10, 25 epochs, 5 seeds; meant for an accelerator.
- cpu: width 2, 10 epochs (GTSRB: 8), 3 seeds; some hours on two cores for a table.
- smoke: digits in place of both data sets, 2 seeds; minutes. It shows that an experiment runs, not
  what its figures are.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from pmoe_jax import config as config_lib

PRESETS = ("paper", "cpu", "smoke")


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
    if preset == "cpu":
        made.num_seeds = 3
        made.model.width = 2
        made.train.epochs = 10
        made.evaluation.every_epochs = 5
        made.checkpoint.every_steps = 130
    if preset == "smoke":
        made.data.name = "digits"
        made.num_seeds = 2
        made.model.update(width=1, bn_momentum=0.9)
        made.train.update(epochs=4, batch_size=32, schedule="cosine")
        made.evaluation.batch_size = 180
    return made


def dataset(name: str, preset: str = "paper") -> dict[str, Any]:
    """What a cell changes to be of "cifar10" or "gtsrb"; nothing for digits."""
    if preset == "smoke" or name == "cifar10":
        return {}
    return {"data.name": name, **({"train.epochs": 8} if preset == "cpu" else {})}
