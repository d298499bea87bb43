"""Digits: real 8x8 images of scikit-learn as 32x32x3, embedded, no download.

pmoe train --config=configs/digits.py --workdir=runs/digits_clean
pmoe train --config=configs/digits.py --workdir=runs/digits_square \
  --config.trigger.name=square --config.poison.rate=0.1

An epoch has only 11 steps, so running statistics need a lower momentum than the paper's data sets.
"""

from pmoe_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "digits"
    config.num_seeds = 3
    config.model.width = 1
    config.model.bn_momentum = 0.9
    config.train.epochs = 40
    config.evaluation.every_epochs = 5
    config.evaluation.batch_size = 180
    return config
