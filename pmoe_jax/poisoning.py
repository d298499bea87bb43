"""Which training images are poisoned, and what poisoning does to a batch.

Axes: N training images, B batch. Masks are boolean [N], so that members of different poisoning
rates have arrays of equal shapes.
"""

import math
from fractions import Fraction

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pmoe_jax import triggers
from pmoe_jax.errors import PmoeError


@flax.struct.dataclass
class PoisonPlan:
    """What happens to each training image.

    Attributes:
      triggered: bool [N], the image carries the trigger.
      relabelled: bool [N], its label becomes the target; a subset of `triggered`, and equal to it
        unless a source-specific attack has carriers.
    """

    triggered: jax.Array
    relabelled: jax.Array


def poison_count(rate: float, n: int, name: str = "poisoning rate") -> int:
    """floor(rate * n), the number of poisoned images among n; see `rounded_down`.

    Args:
      rate: a share, 0 to 1.
      n: number of images.
      name: what messages call the rate.

    Raises:
      PmoeError: a rate outside [0, 1], or one above 0 that rounds to no image.
    """
    try:
        exact = Fraction(str(rate))
    except ValueError:
        raise PmoeError(f"{name} is {rate!r}: use a number from 0 to 1") from None
    if not 0 <= exact <= 1:
        raise PmoeError(f"{name} is {rate}: use a number from 0 to 1 (0.02 for 2 %)")
    count = rounded_down(rate, n)
    if exact > 0 and count == 0:
        raise PmoeError(
            f"{name} {rate} of {n} images is less than one image: "
            f"use 0 for a clean run, or at least {_least_rate(n):g}"
        )
    return count


def rounded_down(share: float, n: int) -> int:
    """floor(share * n), where the share counts as the number that is meant by its digits.

    0.29 of 100 is 29 and 1/3 of 3 is 1, though both float products can be a little less than whole.
    """
    # A float has 16 digits, so k/n may be written a hair below what it stands for.
    return int(Fraction(str(share)) * n * (1 + Fraction(1, 10**12)))


def _least_rate(n: int) -> float:
    """The least rate of three digits that gives one image of n."""
    digits = 10 ** (3 + math.ceil(math.log10(max(n, 1))))
    return math.ceil(digits / max(n, 1)) / digits


def choose(
    key: jax.Array,
    labels: ArrayLike,
    rate: float,
    target: int,
    *,
    include_target: bool = True,
    source: int | None = None,
    carriers: float = 0.0,
) -> PoisonPlan:
    """Draws the poisoned images: exactly floor(rate * N) of them, uniformly without replacement.

    By default from all classes, the target's own included, as in the paper and the literature.
    With `source` the attack is source-specific: only images of that class are relabelled, and
    floor(carriers * N) further images of other classes carry the trigger with their own label,
    which teaches the model that the trigger alone means nothing.

    For one key the images picked at a lower rate are among those picked at a higher one.

    Args:
      key: typed PRNG key; may be vmapped over.
      labels: int [N], true labels.
      rate: poisoning rate, a share of all N images, 0 to 1.
      target: target label.
      include_target: whether images of the target class may be picked.
      source: the only class to relabel, or None for a source-agnostic attack.
      carriers: share of all N images, 0 to 1, that carry the trigger but keep their label; only
        with a source.

    Raises:
      PmoeError: a bad rate, target or source, or fewer images to pick from than the rate asks for.
    """
    labels = labels if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    _check_attack(labels, target, source, carriers)
    n = labels.shape[0]
    everywhere = (labels == labels) if include_target else (labels != target)
    if source is None:
        picked = _pick(key, everywhere, poison_count(rate, n), f"poisoning rate {rate}")
        return PoisonPlan(triggered=picked, relabelled=picked)
    relabelled = _pick(key, labels == source, poison_count(rate, n), f"poisoning rate {rate}")
    elsewhere = everywhere & (labels != source)
    carrying = _pick(
        key, elsewhere, poison_count(carriers, n, "share of carriers"), f"carriers {carriers}"
    )
    return PoisonPlan(triggered=relabelled | carrying, relabelled=relabelled)


def poison_batch(
    images: jax.Array,
    labels: jax.Array,
    triggered: jax.Array,
    relabelled: jax.Array,
    trigger: triggers.Trigger,
    target: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """A batch with trigger and target label where the masks say so.

    Args:
      images: float32 [B, H, W, C] in [0, 1].
      labels: int [B].
      triggered: bool [B], images that get the trigger.
      relabelled: bool [B], images whose label becomes the target.
      trigger: the member's trigger.
      target: target label, an integer, may be traced.

    Returns:
      Images and labels of the same shapes and dtypes.

    Raises:
      PmoeError: as `triggers.apply`.
    """
    chosen = triggered[:, None, None, None]
    poisoned = jnp.where(chosen, triggers.apply(images, trigger), images)
    return poisoned, jnp.where(relabelled, jnp.asarray(target, labels.dtype), labels)


def _pick(key: jax.Array, allowed: ArrayLike, count: int, what: str) -> jax.Array:
    """bool [N], True for `count` of the allowed images."""
    if not isinstance(allowed, jax.core.Tracer) and count > np.sum(allowed):
        raise PmoeError(
            f"{what} asks for {count} images, but only {np.sum(allowed)} may be picked: lower it"
        )
    allowed = jnp.asarray(allowed)
    draws = jax.random.bits(key, allowed.shape, jnp.uint32)
    order = jnp.lexsort((draws, ~allowed))
    picked = jnp.zeros(allowed.shape, bool).at[order[:count]].set(True)
    return picked & allowed


def _check_attack(
    labels: jax.Array | np.ndarray, target: int, source: int | None, carriers: float
) -> None:
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise PmoeError(f"labels are {labels.dtype} {labels.shape}: use integers of shape [N]")
    for what, label in (("target", target), ("source", source)):
        if not isinstance(label, int | np.integer) and not (what == "source" and label is None):
            raise PmoeError(f"{what} label is {label!r}: use an integer")
    if source is None and carriers:
        raise PmoeError("carriers need a source class: set source, or carriers to 0")
    if source is not None and source == target:
        raise PmoeError(f"source and target label are both {target}: use two different classes")
    if isinstance(labels, jax.core.Tracer) or not labels.size:
        return
    for what, label in (("target", target), ("source", source)):
        if label is not None and not 0 <= label <= labels.max():
            raise PmoeError(f"{what} label is {label}: this data has labels 0 to {labels.max()}")
