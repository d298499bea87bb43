"""Keeps every non-empty subset of the experts and silences the others (15 subsets of 4 experts).

pmoe defend --checkpoint=runs/cifar10_square_2 --config=configs/defences/expert_subsets.py \
  --workdir=runs/cifar10_square_2_expert_subsets
"""

from pmoe_jax import defend_config


def get_config():
    config = defend_config.default()
    config.method = "expert_subsets"
    return config
