"""Neural Cleanse (Wang et al., 2019): the smallest trigger of every class, and an anomaly index.

pmoe defend --checkpoint=runs/cifar10_square_2 --config=configs/defences/neural_cleanse.py \
  --workdir=runs/cifar10_square_2_neural_cleanse
"""

from pmoe_jax import defend_config


def get_config():
    config = defend_config.default()
    config.method = "neural_cleanse"
    return config
