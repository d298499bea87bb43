"""How few clean images and how small a learning rate remove the backdoor; not pruned, and by 30 %.

pmoe defend --checkpoint=runs/cifar10_square_2 --config=configs/defences/few_images.py \
  --workdir=runs/cifar10_square_2_few_images
"""

from pmoe_jax import defend_config


def get_config():
    config = defend_config.default()
    config.prune.rates = (0.0, 0.3)
    config.prune.curve_rates = ()
    config.tune.fractions = (0.01, 0.05, 0.1, 1.0)
    config.tune.learning_rates = (0.1, 0.01, 0.001)
    return config
