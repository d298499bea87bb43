"""What is measured of an attack, in percent (paper, Section 4).

- BA, benign accuracy: untriggered images predicted as their true class.
- ASR, attack success rate: triggered images predicted as the target. Of a model that was never
  attacked, the same figure is its false trigger rate.
- RA, robust accuracy: triggered images predicted as their true class.
- FPR, false positive rate, of a source-specific attack: triggered images of the classes it should
  leave alone predicted as the target.
- CAD, clean accuracy drop: BA of the clean model minus BA of the attacked one, paired by seed.

ASR and RA are shares of the same images: those of the source class if the attack has one, else of
all classes but the target (with `include_target=True`: of all classes). A target image predicted as
the target proves nothing, so counting it would flatter the attack.

Axes: N images, Y classes. Arrays are int [N] classes, `valid` bool [N]; under vmap each member has
its own. The `*_counts` forms give a `Count` that adds up over batches; the others are `to_percent`
of it, float32 [] in [0, 100]. All raise a `PmoeError` where predictions are no integers of the
labels' shape.

ASR and BA go back to Gu et al., "BadNets", 2017; the paper's ASR leaves the target class out.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pmoe_jax.errors import PmoeError


class Count(NamedTuple):
    """How many of the images that count were hits: int32 scalars."""

    hits: jax.Array
    total: jax.Array


def predicted_classes(logits: jax.Array) -> jax.Array:
    """int32 [...]: the classes of logits [..., Y]; -1, which is no class, where one is not finite.

    The largest of logits that are NaN would be class 0, often the target.
    """
    finite = jnp.isfinite(logits).all(-1)
    return jnp.where(finite, logits.argmax(-1), -1).astype(jnp.int32)


# --- Counts ---------------------------------------------------------------------------------


def benign_counts(predicted: ArrayLike, labels: ArrayLike, valid: ArrayLike | None = None) -> Count:
    """BA as counts: `predicted` are classes of untriggered images."""
    predicted, labels = _classes(predicted, labels)
    return _count(predicted == labels, True, valid)


def attack_counts(
    predicted_on_triggered: ArrayLike,
    labels: ArrayLike,
    target: ArrayLike,
    include_target: bool = False,
    source: ArrayLike | None = None,
    valid: ArrayLike | None = None,
) -> Count:
    """ASR as counts: hits are predictions of the target; `labels` are the true ones."""
    predicted, labels = _classes(predicted_on_triggered, labels)
    among = _attacked(labels, target, include_target, source)
    return _count(predicted == target, among, valid)


def robust_counts(
    predicted_on_triggered: ArrayLike,
    labels: ArrayLike,
    target: ArrayLike,
    include_target: bool = False,
    source: ArrayLike | None = None,
    valid: ArrayLike | None = None,
) -> Count:
    """RA as counts: hits are predictions of the true class, among the images that ASR counts."""
    predicted, labels = _classes(predicted_on_triggered, labels)
    among = _attacked(labels, target, include_target, source)
    return _count(predicted == labels, among, valid)


def false_positive_counts(
    predicted_on_triggered: ArrayLike,
    labels: ArrayLike,
    target: ArrayLike,
    source: ArrayLike,
    valid: ArrayLike | None = None,
) -> Count:
    """FPR as counts: among triggered images of neither source nor target class."""
    predicted, labels = _classes(predicted_on_triggered, labels)
    among = (labels != source) & (labels != target)
    return _count(predicted == target, among, valid)


def counts(
    predicted: ArrayLike,
    predicted_on_triggered: ArrayLike,
    labels: ArrayLike,
    target: ArrayLike,
    include_target: bool = False,
    source: ArrayLike | None = None,
    valid: ArrayLike | None = None,
) -> dict[str, Count]:
    """All metrics of a batch: "BA", "ASR", "RA", and "FPR" if the attack has a source class.

    Sum over batches with `jax.tree.map(jnp.add, ...)`, then call `to_percent` on each.

    Args:
      predicted: int [N], classes of the untriggered images.
      predicted_on_triggered: int [N], classes of the same images with the trigger.
      labels: int [N], true classes.
      target: target label, may be traced.
      include_target: whether ASR and RA count images of the target class.
      source: source class of a source-specific attack, or None.
      valid: bool [N], False for the padding of a last batch.
    """
    triggered = predicted_on_triggered, labels, target
    measured = {
        "BA": benign_counts(predicted, labels, valid),
        "ASR": attack_counts(*triggered, include_target, source, valid),
        "RA": robust_counts(*triggered, include_target, source, valid),
    }
    if source is not None:
        measured["FPR"] = false_positive_counts(*triggered, source, valid)
    return measured


def to_percent(count: Count) -> jax.Array:
    """float32 in [0, 100]; nan where no image counted."""
    total = jnp.asarray(count.total, jnp.float32)
    return jnp.where(total > 0, 100.0 * count.hits / jnp.maximum(total, 1.0), jnp.nan)


# --- Percentages ----------------------------------------------------------------------------


def benign_accuracy(
    predicted: ArrayLike, labels: ArrayLike, valid: ArrayLike | None = None
) -> jax.Array:
    """BA in percent; arguments as in `counts`."""
    return to_percent(benign_counts(predicted, labels, valid))


def attack_success_rate(
    predicted_on_triggered: ArrayLike,
    true_labels: ArrayLike,
    target: ArrayLike,
    include_target: bool = False,
    source: ArrayLike | None = None,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """ASR in percent; arguments as in `counts`."""
    return to_percent(
        attack_counts(predicted_on_triggered, true_labels, target, include_target, source, valid)
    )


def robust_accuracy(
    predicted_on_triggered: ArrayLike,
    true_labels: ArrayLike,
    target: ArrayLike,
    include_target: bool = False,
    source: ArrayLike | None = None,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """RA in percent; arguments as in `counts`."""
    return to_percent(
        robust_counts(predicted_on_triggered, true_labels, target, include_target, source, valid)
    )


def false_positive_rate(
    predicted_on_triggered: ArrayLike,
    true_labels: ArrayLike,
    target: ArrayLike,
    source: ArrayLike,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """FPR in percent; arguments as in `counts`."""
    return to_percent(
        false_positive_counts(predicted_on_triggered, true_labels, target, source, valid)
    )


# --- Over seeds -----------------------------------------------------------------------------


def clean_accuracy_drop(
    clean_ba_by_seed: Mapping[int, float],
    attacked_ba_by_seed: Mapping[int, float],
    allow_extra_clean: bool = False,
) -> dict[int, float]:
    """CAD in percentage points for every seed: clean BA minus attacked BA, in order of seeds.

    Args:
      clean_ba_by_seed: seed to BA in percent, of models that were not attacked.
      attacked_ba_by_seed: the same of the attacked models.
      allow_extra_clean: accept clean seeds without an attacked one (more baselines than runs).

    Raises:
      PmoeError: a seed without its counterpart.
    """
    without_clean = sorted(set(attacked_ba_by_seed) - set(clean_ba_by_seed))
    without_attacked = sorted(set(clean_ba_by_seed) - set(attacked_ba_by_seed))
    if without_clean or (without_attacked and not allow_extra_clean):
        missing = [f"no clean run of seed {seed}" for seed in without_clean]
        missing += [f"no attacked run of seed {seed}" for seed in without_attacked]
        raise PmoeError(f"CAD is paired by seed: {', '.join(missing)}; train or leave out the seed")
    return {
        seed: float(clean_ba_by_seed[seed]) - float(attacked_ba_by_seed[seed])
        for seed in sorted(attacked_ba_by_seed)
    }


class Summary(NamedTuple):
    """Values of several seeds in short.

    `sd` is the sample standard deviation (ddof 1), None for n < 2; `interval` the 95 % interval of
    the mean by Student's t, None for n < 3.
    """

    n: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None


def summarize(values: Iterable[float]) -> Summary:
    """n, mean, sd and 95 % interval of one value a seed.

    Raises:
      PmoeError: no values, or one that is not finite (a diverged seed).
    """
    array = np.asarray(list(values), np.float64)
    n = array.size
    if not n:
        raise PmoeError("no values to summarise: give the value of one seed or more")
    if not np.isfinite(array).all():
        raise PmoeError(
            f"values to summarise are not all finite ({array}): leave diverged seeds out"
        )
    mean = float(array.mean())
    if n < 2:
        return Summary(n, mean, None, None)
    sd = float(array.std(ddof=1))
    if n < 3:
        return Summary(n, mean, sd, None)
    from scipy import stats  # imported here because it is slow to load

    half = float(stats.t.ppf(0.975, n - 1)) * sd / n**0.5
    return Summary(n, mean, sd, (mean - half, mean + half))


# --- Helpers --------------------------------------------------------------------------------


def _classes(predicted: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    predicted, labels = jnp.asarray(predicted), jnp.asarray(labels)
    if predicted.shape != labels.shape or not jnp.issubdtype(predicted.dtype, jnp.integer):
        # Broadcasting would turn logits into a rate of 100 %.
        raise PmoeError(
            f"predictions are {predicted.dtype} {predicted.shape}, labels {labels.shape}; give "
            "integer classes of equal shape (logits.argmax(-1))"
        )
    return predicted, labels


def _attacked(
    labels: jax.Array, target: ArrayLike, include_target: bool, source: ArrayLike | None
) -> jax.Array:
    """bool [N]: the images that an attack is judged by."""
    if source is not None:
        return labels == source
    return jnp.ones(labels.shape, bool) if include_target else labels != target


def _count(hit: jax.Array, among: ArrayLike, valid: ArrayLike | None) -> Count:
    counted = jnp.broadcast_to(among, hit.shape)
    if valid is not None:
        counted &= jnp.asarray(valid, bool)
    return Count(jnp.sum(hit & counted, dtype=jnp.int32), jnp.sum(counted, dtype=jnp.int32))
