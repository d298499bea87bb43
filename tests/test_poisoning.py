"""Poisoning: exact counts, who may be picked, and what a batch looks like afterwards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmoe_jax import triggers
from pmoe_jax.errors import PmoeError
from pmoe_jax.poisoning import choose, poison_batch, poison_count

KEY = jax.random.key(0)
LABELS = np.arange(1000) % 10


@pytest.mark.parametrize(
    ("rate", "n", "count"),
    [
        (0.0, 50_000, 0),
        (0.001, 50_000, 50),
        (0.005, 50_000, 250),
        (0.02, 50_000, 1000),
        (0.1, 39_209, 3920),
        (0.07, 100, 7),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in floating point
        (0.57, 100, 57),
        (0.000_02, 50_000, 1),
        (2e-5, 99_999, 1),
        (1, 7, 7),
        (1 / 3, 3, 1),  # the float lies just below a third
        (np.float32(0.29), 100, 29),
    ],
)
def test_count_is_the_floor_of_the_exact_product(rate, n, count):
    assert poison_count(rate, n) == count


@settings(max_examples=200)
@given(thousandths=st.integers(0, 1000), n=st.integers(1000, 100_000))
def test_count_of_any_rate_written_in_decimals(thousandths, n):
    assert poison_count(float(f"{thousandths / 1000:.3f}"), n) == thousandths * n // 1000


@settings(max_examples=300)
@given(st.data())
def test_count_of_a_quotient_is_its_numerator(data):
    n = data.draw(st.integers(1, 100_000))
    k = data.draw(st.integers(1, n))
    assert poison_count(k / n, n) == k


@given(n=st.integers(1, 100_000))
def test_the_advised_rate_is_enough_for_one_image(n):
    with pytest.raises(PmoeError, match="less than one image") as caught:
        poison_count(0.9 / n, n)
    assert poison_count(float(str(caught.value).rsplit(" ", 1)[1]), n) >= 1


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0.000_99, "less than one image: use 0 for a clean run, or at least 0.001"),
        (2, "poisoning rate is 2: use a number from 0 to 1"),
        (-0.1, "poisoning rate is -0.1"),
        (float("nan"), "poisoning rate is nan"),
        ("much", "poisoning rate is 'much'"),
    ],
)
def test_bad_rates(rate, message):
    with pytest.raises(PmoeError, match=message):
        choose(KEY, LABELS, rate, 0)


class PoisoningVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_exactly_as_many_from_all_classes(self):
        plan = self.variant(lambda key: choose(key, LABELS, 0.07, 3))(KEY)
        assert plan.triggered.shape == (1000,) and plan.triggered.dtype == bool
        assert plan.triggered.sum() == 70
        np.testing.assert_array_equal(plan.triggered, plan.relabelled)
        everything = self.variant(lambda key: choose(key, LABELS, 1.0, 3))(KEY)
        assert everything.triggered.all()

    @chex.variants(with_jit=True, without_jit=True)
    def test_vmapped_equals_alone(self):
        keys = jax.random.split(KEY, 3)
        plans = self.variant(
            jax.vmap(lambda key: choose(key, LABELS, 0.02, 0, source=1, carriers=0.05))
        )(keys)
        for i in range(3):
            alone = choose(keys[i], LABELS, 0.02, 0, source=1, carriers=0.05)
            chex.assert_trees_all_equal(jax.tree.map(lambda m, i=i: m[i], plans), alone)
        assert (plans.triggered[0] != plans.triggered[1]).any()

    @chex.variants(with_jit=True, without_jit=True)
    def test_traced_labels(self):
        pick = self.variant(lambda key, labels: choose(key, labels, 0.02, 0, source=1))
        chex.assert_trees_all_equal(pick(KEY, LABELS), choose(KEY, LABELS, 0.02, 0, source=1))

    @chex.variants(with_jit=True, without_jit=True)
    def test_batch_by_hand(self):
        images = np.random.default_rng(0).random((4, 5, 5, 3), np.float32)
        labels = jnp.array([1, 2, 0, 1], jnp.int32)
        triggered = jnp.array([True, False, True, True])
        relabelled = jnp.array([True, False, True, False])
        trigger = triggers.make("square", KEY, (5, 5, 3), size=2)
        poisoned, new_labels = self.variant(poison_batch)(
            images, labels, triggered, relabelled, trigger, jnp.int32(7)
        )
        expected = np.array(images)
        expected[[0, 2, 3], :2, :2] = 0
        np.testing.assert_array_equal(poisoned, expected)
        assert new_labels.tolist() == [7, 2, 7, 1] and new_labels.dtype == jnp.int32

    @chex.variants(with_jit=True, without_jit=True)
    def test_members_poison_their_own_batches(self):
        """Triggers, masks and targets on a member axis: as each member alone."""
        names = ("none", "square", "blend", "warp")
        made = [triggers.make(name, KEY, (6, 6, 3)) for name in names]
        images = np.random.default_rng(0).random((4, 5, 6, 6, 3), np.float32)
        labels = jnp.tile(jnp.arange(5), (4, 1))
        masks = np.random.default_rng(1).random((4, 5)) < 0.5
        targets = jnp.array([0, 1, 2, 3])
        together = self.variant(jax.vmap(poison_batch))(
            images, labels, masks, masks, triggers.stack(made), targets
        )
        for i in range(4):
            alone = poison_batch(images[i], labels[i], masks[i], masks[i], made[i], targets[i])
            np.testing.assert_allclose(together[0][i], alone[0], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(together[1][i], alone[1])
        # Images without the trigger are the very same, also where a warp is in the program.
        np.testing.assert_array_equal(together[0][~masks], images[~masks])


def test_rate_zero_poisons_nothing():
    plan = choose(KEY, LABELS, 0.0, 0)
    assert not plan.triggered.any() and not plan.relabelled.any()


def test_every_image_is_as_likely():
    keys = jax.random.split(KEY, 400)
    picked = jax.vmap(lambda key: choose(key, LABELS, 0.1, 0).triggered)(keys)
    share = picked.mean(0)  # of 400 draws at 0.1: standard deviation 0.015
    assert share.min() > 0.02 and share.max() < 0.18
    by_class = [picked[:, label == LABELS].mean() for label in range(10)]
    np.testing.assert_allclose(by_class, 0.1, atol=0.01)


def test_target_class_is_included_unless_told_otherwise():
    assert choose(KEY, LABELS, 0.5, 3).triggered[LABELS == 3].any()
    plan = choose(KEY, LABELS, 0.9, 3, include_target=False)
    assert plan.triggered.sum() == 900
    np.testing.assert_array_equal(plan.triggered, LABELS != 3)


def test_lower_rates_are_subsets_of_higher_ones():
    low, high = (choose(KEY, LABELS, rate, 0).triggered for rate in (0.02, 0.1))
    assert (high[low]).all()


def test_source_specific():
    plan = choose(KEY, LABELS, 0.03, 0, source=4)
    np.testing.assert_array_equal(plan.triggered, plan.relabelled)
    assert plan.relabelled.sum() == 30 and (LABELS[plan.relabelled] == 4).all()


@pytest.mark.parametrize("include_target", [True, False])
def test_carriers_have_the_trigger_and_keep_their_label(include_target):
    plan = choose(KEY, LABELS, 0.03, 0, source=4, carriers=0.2, include_target=include_target)
    assert plan.relabelled.sum() == 30 and (LABELS[plan.relabelled] == 4).all()
    carrying = plan.triggered & ~plan.relabelled
    assert carrying.sum() == 200 and (LABELS[carrying] != 4).all()
    assert (LABELS[carrying] == 0).any() == include_target
    assert plan.triggered[plan.relabelled].all()
    # The same images are relabelled with and without carriers.
    np.testing.assert_array_equal(plan.relabelled, choose(KEY, LABELS, 0.03, 0, source=4).triggered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": 3}, "source and target label are both 3"),
        ({"source": 10}, "source label is 10: this data has labels 0 to 9"),
        ({"target": 10}, "target label is 10: this data has labels 0 to 9"),
        ({"target": -1}, "target label is -1"),
        ({"source": 4, "rate": 0.11}, "rate 0.11 asks for 110 images, but only 100 may be picked"),
        ({"include_target": False, "rate": 0.95}, "950 images, but only 900 may be picked"),
        ({"carriers": 0.1}, "carriers need a source class"),
        ({"source": 4, "carriers": 0.95}, "carriers 0.95 asks for 950 images, but only 900"),
        ({"labels": LABELS / 1.0}, r"labels are float64 \(1000,\): use integers"),
        ({"labels": 3}, r"labels are int64 \(\): use integers"),
        ({"target": 1.5}, "target label is 1.5: use an integer"),
        ({"target": None}, "target label is None: use an integer"),
        ({"source": "cat"}, "source label is 'cat': use an integer"),
    ],
)
def test_bad_attacks(options, message):
    arguments = {"labels": LABELS, "rate": 0.05, "target": 3} | options
    with pytest.raises(PmoeError, match=message):
        choose(KEY, **arguments)


def test_the_choice_does_not_depend_on_the_precision():
    plan = choose(KEY, LABELS, 0.05, 0)
    with jax.enable_x64(True):
        wide = choose(KEY, LABELS, 0.05, 0)
    chex.assert_trees_all_equal(plan, wide)
