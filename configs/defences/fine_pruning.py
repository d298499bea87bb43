"""Fine-Pruning in the layout of the paper's Table 3, on truly clean and on contaminated data.

pmoe defend --checkpoint=runs/cifar10_square_2 --config=configs/defences/fine_pruning.py \
  --workdir=runs/cifar10_square_2_fine_pruning

Prunes the last convolution of each expert by 0, 10, 20 and 30 % and fine-tunes for 5 epochs: once
on the untriggered training images, once with the triggered ones among them (quirk A2). Pruning
alone and fine-tuning alone (0 %) stand in the same table.
"""

from pmoe_jax import defend_config


def get_config():
    config = defend_config.default()
    config.prune.rates = (0.0, 0.1, 0.2, 0.3)
    config.tune.data = ("clean", "contaminated")
    return config
