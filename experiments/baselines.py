"""Clean models of both data sets: the mixture of experts, and its dense counterpart.

pmoe sweep --config=experiments/baselines.py:cpu --workdir=runs/cpu/grid --append --max_members=3

Presets: paper, cpu, smoke (see `pmoe_jax.paper.setting`). All grids in this folder fit into one
directory, where they share their clean models; prepare both data sets first (`pmoe data prepare`).
"""

from pmoe_jax.paper import setting


def get_config(preset="paper"):
    return setting.config(preset)


def get_grid(preset="paper"):
    """The paper trained 10 baselines a data set."""
    seeds = {"num_seeds": 10} if preset == "paper" else {}
    return [
        {"name": f"{title}, clean{suffix}", **setting.dataset(data, preset), **model, **seeds}
        for data, title in setting.datasets(preset)[: 1 if preset == "smoke" else 2]
        for suffix, model in [("", {}), (", dense", setting.DENSE)]
    ]
