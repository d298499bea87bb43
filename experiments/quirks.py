"""Quirks of the authors' notebooks that change training, on against off: A1 and A3 on CIFAR-10.

pmoe sweep --config=experiments/quirks.py:cpu --workdir=runs/cpu/grid --append --max_members=3

A1: the square is 1/255 instead of black. A3: the warp is truncated. Cells without a quirk are those
of Table 1 and are not trained again. A2 and A5 are of the defence: see configs/defences.
"""

from pmoe_jax.paper import setting


def get_config(preset="paper"):
    return setting.config(preset)


def get_grid(preset="paper"):
    near_black = {"square (1/255)": {"trigger.name": "square", "quirks.a1_near_black_square": True}}
    names = ("square", *near_black, "warp", "warp (truncated)")
    rates = dict.fromkeys(names, setting.RATES[preset][:2])
    return setting.attacks("cifar10", preset, rates=rates, triggers=near_black)
