"""CIFAR-10: clean, and squares at two poisoning rates.

pmoe sweep --config=configs/cifar10_grid.py --workdir=runs/cifar10_grid \
  --config.data.source=cifar-10-python.tar.gz

In the paper's setting (width 10, 25 epochs, 5 seeds); --config=configs/cifar10_grid.py:cpu trains
width 2 for 5 epochs with 2 seeds, about an hour on two cores.
"""

from pmoe_jax import config as config_lib
from pmoe_jax import grid

PRESETS = ("paper", "cpu")


def get_config(preset="paper"):
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; choose one of {PRESETS}")
    config = config_lib.default()
    config.data.name = "cifar10"
    config.num_seeds = 5
    if preset == "cpu":
        config.num_seeds = 2
        config.model.width = 2
        config.train.epochs = 5
        config.evaluation.every_epochs = 5
        config.checkpoint.every_steps = 130
    return config


def get_grid(preset="paper"):
    """Cells, most important first. Fields that a cell leaves out are the config's."""
    del preset  # The same cells at every scale.
    squares = grid.product({"trigger.name": ["square"], "poison.rate": [0.02, 0.005]})
    return [{"name": "clean"}, *squares]
