"""Fine-tunes the routers alone.

pmoe defend --checkpoint=runs/cifar10_square_2 --config=configs/defences/routers.py \
  --workdir=runs/cifar10_square_2_routers

With --config.tune.reinitialise='routers/.*' the routers are drawn anew first; with
--config.tune.parameters='.*' in addition, the whole model is then fine-tuned.
"""

from pmoe_jax import defend_config


def get_config():
    config = defend_config.default()
    config.prune.rates = (0.0,)
    config.prune.curve_rates = ()
    config.tune.parameters = "routers/.*"
    return config
