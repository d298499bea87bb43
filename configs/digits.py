"""Digits: real 8x8 images of scikit-learn as 32x32x3, embedded, no download.

pmoe train --config=configs/digits.py --workdir=runs/digits_clean
pmoe train --config=configs/digits.py --workdir=runs/digits_square \
  --config.trigger.name=square --config.poison.rate=0.1

In the paper's setting an epoch would have only 11 steps. So batches are smaller, running statistics
follow faster, and the learning rate falls to 0, which keeps the last epochs from jumping.
"""

from pmoe_jax import config as config_lib


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
