"""What the paper's claims need beyond its tables: attacked dense models, other strengths of warp.

pmoe sweep --config=experiments/claims.py:cpu --workdir=runs/cpu/grid --append --max_members=3

The dense counterpart is attacked as the mixture of experts is (Section 6 calls the latter more
vulnerable), by the square at 0.5 %, too, where neither is near its ceiling. Warps: the
paper's grid of k and s at 10 % poisoning, one seed (preset paper: five); k = 2, s = 0.25 is in
Table 1.
"""

from pmoe_jax import grid
from pmoe_jax.paper import setting


def get_config(preset="paper"):
    return setting.config(preset)


def get_grid(preset="paper"):
    rates = {"square": setting.RATES[preset][:3], "warp": setting.RATES[preset][:2]}
    dense = setting.attacks("cifar10", preset, ", dense", rates, setting.DENSE)
    sizes = {"trigger.k": [2, 4, 6, 8], "trigger.strength": [0.25, 0.5, 0.75, 1.0]}
    title = dict(setting.datasets(preset))["cifar10"]
    seeds = {} if preset == "paper" else {"num_seeds": 1}
    warps = [
        {"name": f"{title}, warp k={warp['trigger.k']}, s={warp['trigger.strength']:g}, 10 %",
         **seeds, "trigger.name": "warp", "poison.rate": 0.1, **warp}
        for warp in grid.product(sizes)
        if warp != {"trigger.k": 2, "trigger.strength": 0.25}
    ]  # fmt: skip
    return dense + (warps[:1] if preset == "smoke" else warps)
