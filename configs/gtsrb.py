"""GTSRB in the paper's setting (Section 4): width 10, 25 epochs, 5 seeds.

pmoe train --config=configs/gtsrb.py --workdir=runs/gtsrb_square_2 \
  --config.data.source=GTSRB \
  --config.trigger.name=square --config.poison.rate=0.02

The paper's size is meant for an accelerator; on a CPU try --config.model.width=2
--config.train.epochs=10 --config.num_seeds=2.
"""

from pmoe_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.name = "gtsrb"
    config.num_seeds = 5
    return config
