"""Metrics by hand on ten predictions, over batches, under jit and vmap, and over seeds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pmoe_jax import evaluation, metrics
from pmoe_jax.errors import PmoeError

# Three target images (class 0), four of class 1, three of class 2.
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
CLEAN = np.array([0, 0, 1, 1, 1, 1, 2, 2, 0, 0])  # 6 of 10 right
TRIGGERED = np.array([0, 0, 1, 0, 0, 0, 1, 0, 2, 1])


class MetricVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        measured = self.variant(
            lambda: {
                "BA": metrics.benign_accuracy(CLEAN, LABELS),
                "ASR": metrics.attack_success_rate(TRIGGERED, LABELS, 0),
                "ASR all": metrics.attack_success_rate(TRIGGERED, LABELS, 0, include_target=True),
                "ASR source": metrics.attack_success_rate(TRIGGERED, LABELS, 0, source=1),
                "FPR": metrics.false_positive_rate(TRIGGERED, LABELS, 0, source=1),
                "RA": metrics.robust_accuracy(TRIGGERED, LABELS, 0),
                "RA all": metrics.robust_accuracy(TRIGGERED, LABELS, 0, include_target=True),
                "RA source": metrics.robust_accuracy(TRIGGERED, LABELS, 0, source=1),
            }
        )()
        expected = {
            "BA": 60.0,
            "ASR": 100 * 4 / 7,  # 3 of class 1 and 1 of class 2, of 7
            "ASR all": 100 * 6 / 10,
            "ASR source": 100 * 3 / 4,
            "FPR": 100 * 1 / 3,  # class 2 only: the target's own images prove nothing
            "RA": 100 * 2 / 7,
            "RA all": 100 * 4 / 10,
            "RA source": 100 * 1 / 4,
        }
        assert measured.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(measured[name], value, rtol=1e-6, err_msg=name)

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_traced_target_and_member_axis(self):
        targets = jnp.array([0, 2])
        predicted = jnp.stack([TRIGGERED, CLEAN])
        rates = self.variant(
            jax.vmap(lambda p, t: metrics.attack_success_rate(p, LABELS, t), in_axes=(0, 0))
        )(predicted, targets)
        np.testing.assert_allclose(rates, [100 * 4 / 7, 100 * 1 / 7], rtol=1e-6)


def test_what_an_evaluation_measures():
    """Clean images of other classes that go to the target, beside the triggered ones: none without
    a trigger."""
    measured = evaluation.measure(CLEAN, TRIGGERED, LABELS, 0)
    assert measured["asr"] == (pytest.approx(100 * 4 / 7), 7)
    assert measured["clean_target_rate"] == (pytest.approx(100 * 2 / 7), 7)
    by_source = evaluation.measure(CLEAN, TRIGGERED, LABELS, 0, source=2)
    assert by_source["clean_target_rate"] == (pytest.approx(100 * 2 / 3), 3)
    assert evaluation.measure(CLEAN, None, LABELS, 0) == {"ba": (60.0, 10)}


@pytest.mark.parametrize("source", [None, 1])
def test_padded_batches_add_up_to_the_whole(source):
    whole = metrics.counts(CLEAN, TRIGGERED, LABELS, 0, source=source)
    parts = []
    for start in (0, 4, 8):
        piece = slice(start, start + 4)
        padding = 4 - len(LABELS[piece])
        # Padding that would be a hit of every metric if it counted.
        padded = [np.pad(a[piece], (0, padding)) for a in (CLEAN, TRIGGERED, LABELS)]
        valid = np.arange(4) < 4 - padding
        parts.append(metrics.counts(*padded, 0, source=source, include_target=False, valid=valid))
    added = jax.tree.map(lambda *counts: sum(counts), *parts)
    assert set(added) == {"BA", "ASR", "RA"} | ({"FPR"} if source else set())
    chex.assert_trees_all_equal(added, whole)
    chex.assert_trees_all_equal(
        {name: metrics.to_percent(count) for name, count in added.items()}["BA"], jnp.float32(60)
    )


def test_no_image_that_counts_is_nan():
    assert np.isnan(metrics.attack_success_rate(TRIGGERED[:3], LABELS[:3], 0))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), target=st.integers(0, 3), source=st.integers(0, 3))
def test_shares_of_the_same_images(seed, target, source):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 4, (2, 40))
    source = None if source == target else source
    asr = metrics.attack_counts(predicted, labels, target, source=source)
    robust = metrics.robust_counts(predicted, labels, target, source=source)
    assert asr.total == robust.total
    assert 0 <= asr.hits + robust.hits <= asr.total  # an image is a hit of at most one of them
    if source is None:
        # Including the target class adds its images to both sums, and as many hits as RA gets.
        everything = metrics.attack_counts(predicted, labels, target, include_target=True)
        own = (labels == target).sum()
        assert everything.total == asr.total + own == 40
        assert everything.hits == asr.hits + ((labels == target) & (predicted == target)).sum()


def test_cad_is_paired_by_seed():
    clean, attacked = {2: 83.0, 0: 85.0, 1: 84.5}, {0: 84.0, 1: 85.0, 2: 82.5}
    assert metrics.clean_accuracy_drop(clean, attacked) == {0: 1.0, 1: -0.5, 2: 0.5}
    assert list(metrics.clean_accuracy_drop(clean, attacked)) == [0, 1, 2]


def test_cad_names_unpaired_seeds():
    with pytest.raises(PmoeError, match="no clean run of seed 3, no attacked run of seed 1"):
        metrics.clean_accuracy_drop({0: 85.0, 1: 84.5}, {0: 84.0, 3: 80.0})
    with pytest.raises(PmoeError, match="no clean run of seed 3; "):
        metrics.clean_accuracy_drop({0: 85.0}, {0: 84.0, 3: 80.0}, allow_extra_clean=True)
    more_baselines = {0: 85.0, 1: 84.5}
    assert metrics.clean_accuracy_drop(more_baselines, {0: 84.0}, allow_extra_clean=True) == {0: 1}


def test_summarize_by_hand():
    assert metrics.summarize([90.0]) == (1, 90.0, None, None)
    two = metrics.summarize([90.0, 92.0])
    assert (two.n, two.mean, two.interval) == (2, 91.0, None)
    assert two.sd == pytest.approx(2**0.5)
    three = metrics.summarize(iter([90.0, 92.0, 94.0]))
    assert three[:3] == (3, 92.0, pytest.approx(2.0))
    # t(0.975, 2 degrees of freedom) is 4.302653.
    half = 4.302653 * 2 / 3**0.5
    assert three.interval == pytest.approx((92 - half, 92 + half), rel=1e-6)


def test_summarize_agrees_with_scipy():
    values = np.random.default_rng(0).normal(50, 3, 7)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert metrics.summarize(values).interval == pytest.approx(tuple(interval))


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_summarize_refuses(values):
    with pytest.raises(PmoeError):
        metrics.summarize(values)


@pytest.mark.parametrize("shape", [(5, 5), (5, 1), (4,)])
def test_predictions_that_are_no_classes_are_refused(shape):
    labels = jnp.zeros(5, int)
    with pytest.raises(PmoeError, match="give integer classes of equal shape"):
        metrics.benign_accuracy(jnp.zeros(shape, int), labels)
    with pytest.raises(PmoeError, match="give integer classes"):
        metrics.attack_success_rate(jnp.zeros(5), labels, 1)
