"""Table 2: square, blend and warp on GTSRB, at five poisoning rates.

pmoe sweep --config=experiments/table2.py:cpu --workdir=runs/cpu/grid --append --max_members=3 \
  --config.trigger.pattern_path=hello_kitty.jpg

Presets: paper, cpu, cpu_rest, smoke (see `pmoe_jax.paper.setting`). Warp is there twice: sampled
bilinearly, as WaNet does, and truncated, as the authors' notebooks do (quirk A3). Blend takes the
built-in image unless a pattern is given.
"""

from pmoe_jax.paper import setting


def get_config(preset="paper"):
    return setting.config(preset)


def get_grid(preset="paper"):
    return setting.attacks("gtsrb", preset)
