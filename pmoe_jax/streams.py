"""Named streams of randomness: each source of chance in a run has a key of its own.

A member's seed gives one key a stream, so that initialisation, poison choice, trigger draw and
data order can be varied or held fixed one by one. Callers fold step or epoch into the key.
"""

import zlib

import jax
import numpy as np

from pmoe_jax.errors import PmoeError

STREAMS = ("init", "poison", "trigger", "order")


def stream_key(seed: int | jax.Array, name: str) -> jax.Array:
    """The key of one stream of one seed.

    Args:
      seed: integer in [0, 2^31), may be traced or vmapped over.
      name: one of `STREAMS`.

    Returns:
      A typed scalar key. It does not depend on JAX's default generator, nor on what is vmapped.

    Raises:
      PmoeError: unknown name, or a seed out of range.
    """
    if name not in STREAMS:
        raise PmoeError(f"unknown stream {name!r}: use one of {', '.join(STREAMS)}")
    # Beyond 31 bits a Python int and an int32 array would give different keys.
    if isinstance(seed, int | np.integer) and not 0 <= seed < 2**31:
        raise PmoeError(f"seed {seed} is out of range: use an integer from 0 to 2147483647")
    # Threefry is named because other generators give other numbers under vmap.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
