"""STRIP (Gao et al., 2019): triggered images keep a low entropy when others are blended in.

pmoe defend --checkpoint=runs/cifar10_square_2 --config=configs/defences/strip.py \
  --workdir=runs/cifar10_square_2_strip
"""

from pmoe_jax import defend_config


def get_config():
    config = defend_config.default()
    config.method = "strip"
    return config
