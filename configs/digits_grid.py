"""A grid on digits: clean, and two triggers at two poisoning rates, two seeds each.

pmoe sweep --config=configs/digits_grid.py --workdir=runs/digits_grid
pmoe report runs/digits_grid --output=runs/digits_report
"""

from pmoe_jax import config as config_lib
from pmoe_jax import grid


def get_config():
    config = config_lib.default()
    config.data.name = "digits"
    config.num_seeds = 2
    config.model.width = 1
    config.model.bn_momentum = 0.9
    config.train.epochs = 12
    config.train.batch_size = 32
    config.train.schedule = "cosine"
    config.evaluation.batch_size = 180
    return config


def get_grid():
    """Cells, most important first. Fields that a cell leaves out are the config's."""
    clean = {"name": "clean"}
    return [clean, *grid.product({"trigger.name": ["square", "blend"], "poison.rate": [0.1, 0.02]})]
