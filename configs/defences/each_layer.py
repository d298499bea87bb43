"""Prunes every layer in turn, without fine-tuning: where does the backdoor sit (Section 5.3)?

pmoe defend --checkpoint=runs/cifar10_square_2 --config=configs/defences/each_layer.py \
  --workdir=runs/cifar10_square_2_each_layer
"""

from pmoe_jax import defend_config


def get_config():
    config = defend_config.default()
    config.prune.layers = (
        "stem", "group1/conv1", "group1/conv2", "group1/shortcut", "group2/conv1", "group2/conv2",
        "group2/shortcut", "patch_conv", "experts/conv",
    )  # fmt: skip
    config.prune.rates = (0.1, 0.3)
    config.tune.epochs = 0
    return config
