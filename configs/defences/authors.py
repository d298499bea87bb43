"""Fine-Pruning as the authors' notebooks do it: quirks A2 and A5.

pmoe defend --checkpoint=runs/cifar10_square_2 --config=configs/defences/authors.py \
  --workdir=runs/cifar10_square_2_authors
"""

from pmoe_jax import defend_config


def get_config():
    config = defend_config.default()
    config.prune.rates = (0.1, 0.2, 0.3)
    config.quirks.a2_contaminated_clean_set = True
    config.quirks.a5_authors_pruning = True
    return config
