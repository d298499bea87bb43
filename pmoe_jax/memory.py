"""How much memory there is, and how large a batch fits into it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import psutil

from pmoe_jax import processes
from pmoe_jax.errors import PmoeError

#: A call on a batch whose size a run's config decides takes up to this share of the free memory.
CALL_SHARE = 0.4

#: Program -> shapes of its arguments -> images a call. A size that followed the free memory from
#: call to call would have programs compiled again and again.
_FITTING: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()


def device_memory() -> int:
    """Bytes that a program can use: a GPU's limit, or the machine's free memory."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    # Simulated devices share the machine's memory, and so do processes.
    sharing = jax.local_device_count() * processes.on_this_host()
    return int(psutil.virtual_memory().available) // sharing


def bytes_of(compiled: Any) -> int | None:
    """Device memory that a compiled program needs; None where JAX cannot tell."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    needed = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    return needed + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def batch_that_fits(
    program: Any, arguments: Callable[[Any], tuple[Any, ...]], images: np.ndarray, size: int
) -> int:
    """How many images a call takes: `size`, which a stranger's config may have set, or fewer if
    memory does not hold as many.

    Args:
      program: jitted; for the size that is returned it is compiled afterwards.
      arguments: what it is called with, of the shape of a batch [B, H, W, C].
      images: uint8 [N, H, W, C], of which batches are taken.
      size: as configured.

    Raises:
      PmoeError: not even a single image fits.
    """
    size = max(1, min(size, len(images)))

    def of(count: int) -> tuple[Any, ...]:
        return arguments(jax.ShapeDtypeStruct((count, *images.shape[1:]), np.uint8))

    known, shapes = _FITTING.setdefault(program, {}), str(jax.tree.map(np.shape, of(size)))
    if shapes not in known:
        known[shapes] = _largest_batch(program, of, size, math.prod(images.shape[1:]))
    return known[shapes]


def _largest_batch(program: Any, of: Callable[[int], Any], size: int, image_bytes: int) -> int:
    def needed(count: int) -> int:
        # What the arguments take is taken already, but for the images, of which there are copies.
        analysis = program.lower(*of(count)).compile().memory_analysis()
        made = analysis and analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        return 3 * count * image_bytes + (made or 0)

    available = device_memory()
    allowed = CALL_SHARE * available
    fitting = max(1, min(size, int(allowed / (3 * image_bytes))))
    while (taken := needed(fitting)) > allowed and fitting > 1:
        fitting = max(1, min(fitting // 2, int(fitting * allowed / taken)))
    if taken > available:
        raise PmoeError(
            f"a single image needs {taken / 2**30:.1f} GiB with this model and "
            f"{available / 2**30:.1f} GiB are available; evaluate it on a larger machine"
        )
    if fitting < size:
        processes.say(
            f"note: batches of {size} images (evaluation.batch_size) would take more than "
            f"{allowed / 2**30:.1f} GiB, {100 * CALL_SHARE:g} % of the free memory; {fitting} are "
            "taken at a time"
        )
    return fitting
