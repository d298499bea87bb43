"""Masks: what they keep, how they broadcast, and that a held mask holds through any optimiser."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pmoe_jax import masks
from pmoe_jax.errors import PmoeError


@pytest.fixture
def params():
    """Two experts' 1x1 convolution of 3 to 4 channels, and a dense layer."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "experts": {
            "conv": {
                "kernel": normal(2, 3, 4),
                "bias": normal(2, 4),
            }
        },
        "classifier": {
            "kernel": normal(8, 5),
            "bias": normal(5),
        },
    }


EXPERT_CONV = ".*experts/conv/(kernel|bias)"
KEEP = np.array([[1, 0, 1, 1], [1, 1, 0, 0]])


def test_ones_keep_everything(params):
    chex.assert_trees_all_equal(masks.apply(params, masks.ones_like(params)), params)
    assert masks.fraction_pruned(params, masks.ones_like(params)) == 0


class MaskVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_apply_by_hand(self):
        params = {"a": jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), "b": {"c": jnp.array([5.0])}}
        # Weights of any dtype: a broadcast row of ints, and a bool.
        mask = {"a": jnp.array([1, 0]), "b": {"c": jnp.array(True)}}
        pruned = self.variant(masks.apply)(params, mask)
        expected = {"a": jnp.array([[1.0, 0.0], [3.0, 0.0]]), "b": {"c": jnp.array([5.0])}}
        chex.assert_trees_all_equal(pruned, expected)

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_prefix_stands_for_its_subtree(self):
        params = {"a": {"x": jnp.ones(2), "y": jnp.ones((3, 2))}, "b": jnp.ones(4)}
        pruned = self.variant(masks.apply)(params, {"a": jnp.array([1, 0]), "b": jnp.array(1)})
        chex.assert_trees_all_equal(
            pruned,
            {"a": {"x": jnp.array([1.0, 0]), "y": jnp.array([[1.0, 0]] * 3)}, "b": jnp.ones(4)},
        )


def test_channel_mask_prunes_weights_and_biases_of_each_expert(params):
    pruned = masks.apply(params, masks.channel_mask(params, EXPERT_CONV, KEEP))
    conv = params["experts"]["conv"]
    expected = {
        **params,
        "experts": {
            "conv": {"kernel": conv["kernel"] * KEEP[:, None], "bias": conv["bias"] * KEEP}
        },
    }
    chex.assert_trees_all_equal(pruned, expected)


def test_channel_mask_of_a_plain_layer(params):
    mask = masks.channel_mask(params, "classifier/.*", [1, 1, 0, 1, 1])
    assert mask["classifier"]["kernel"].sum() == 8 * 4
    assert mask["classifier"]["bias"].tolist() == [True, True, False, True, True]
    assert mask["experts"]["conv"]["kernel"].all()


def test_fraction_pruned(params):
    mask = masks.channel_mask(params, EXPERT_CONV, KEEP)
    # 3 of 8 channels, each of 3 weights and a bias; 32 + 45 parameters in all.
    assert masks.fraction_pruned(params, mask, EXPERT_CONV) == pytest.approx(3 / 8)
    assert masks.fraction_pruned(params, mask) == pytest.approx(12 / 77)
    assert masks.fraction_pruned(params, False) == 1


def test_combine_keeps_what_all_keep(params):
    first = masks.channel_mask(params, EXPERT_CONV, [1, 0, 1, 1] * np.ones((2, 1)))
    second = masks.channel_mask(params, EXPERT_CONV, [[1, 1, 1, 1], [1, 1, 0, 0]])
    both = masks.combine(params, first, second)
    by_hand = masks.channel_mask(params, EXPERT_CONV, [[1, 0, 1, 1], [1, 0, 0, 0]])
    chex.assert_trees_all_equal(both, by_hand)


OPTIMISERS = {
    "momentum and decay": lambda: optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clip and noise": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_noise(0.1, 0.55, jax.random.key(0)),
        optax.sgd(0.1),
    ),
}


def loss(params, target):
    """Every parameter gets a gradient, pruned ones too."""
    differences = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
    return sum(jax.tree.leaves(differences))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_held_mask_stays_exactly_zero(params, name):
    mask = masks.channel_mask(params, EXPERT_CONV, KEEP)
    optimiser = masks.hold(OPTIMISERS[name](), mask)
    target = jax.tree.map(lambda leaf: leaf + 1.0, params)
    current = masks.apply(params, mask)
    state = optimiser.init(current)

    @jax.jit
    def step(current, state):
        updates, state = optimiser.update(jax.grad(loss)(current, target), state, current)
        return optax.apply_updates(current, updates), state

    start = current
    for _ in range(100):
        current, state = step(current, state)
    pruned = ~mask["experts"]["conv"]["kernel"]
    assert (current["experts"]["conv"]["kernel"][pruned] == 0).all()
    assert (current["experts"]["conv"]["bias"][KEEP == 0] == 0).all()
    moved = jax.tree.map(lambda a, b: (a != b).mean(), current, start)
    assert moved["classifier"]["kernel"] == 1
    assert moved["experts"]["conv"]["kernel"] == pytest.approx(5 / 8)


def test_kept_parameters_train_as_if_the_pruned_were_not_there():
    # Pruned entries must not enter the global norm: [3, 4] has norm 5, [3, 4, 100] has not.
    optimiser = masks.hold(optax.clip_by_global_norm(1.0), jnp.array([1, 1, 0]))
    params = jnp.zeros(3)
    updates, _ = optimiser.update(jnp.array([3.0, 4.0, 100.0]), optimiser.init(params), params)
    np.testing.assert_allclose(updates, [0.6, 0.8, 0.0], rtol=1e-6)


def test_members_hold_masks_of_their_own(params):
    """Seeds and pruning rates on a leading axis: as each alone."""
    keeps = jnp.array([np.ones_like(KEEP), KEEP, np.zeros_like(KEEP)])
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1, leaf + 2]), params)
    plain = OPTIMISERS["momentum and decay"]()

    def train(member, keep):
        mask = masks.channel_mask(member, EXPERT_CONV, keep)
        optimiser = masks.hold(plain, mask)
        member = masks.apply(member, mask)
        state = optimiser.init(member)
        for _ in range(3):
            grads = jax.grad(loss)(member, jax.tree.map(jnp.ones_like, member))
            updates, state = optimiser.update(grads, state, member)
            member = optax.apply_updates(member, updates)
        return member, masks.fraction_pruned(member, mask, EXPERT_CONV)

    together, fractions = jax.jit(jax.vmap(train))(members, keeps)
    np.testing.assert_allclose(fractions, [0, 3 / 8, 1])
    for i in range(3):
        alone, _ = jax.jit(train)(jax.tree.map(lambda leaf, i=i: leaf[i], members), keeps[i])
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, atol=1e-6
        )
    assert not together["experts"]["conv"]["kernel"][2].any()


def test_errors_say_what_does_not_fit(params):
    with pytest.raises(PmoeError, match="no parameter matches 'head': names are like classifier/"):
        masks.channel_mask(params, "head", KEEP)
    with pytest.raises(
        PmoeError, match=r"channel mask of shape \(3, 4\) does not fit experts/conv"
    ):
        masks.channel_mask(params, EXPERT_CONV, np.ones((3, 4)))
    with pytest.raises(PmoeError, match=r"mask of shape \(7,\) does not fit parameter classifier"):
        masks.apply(params, {"experts": True, "classifier": {"kernel": np.ones(7), "bias": 1}})
    with pytest.raises(PmoeError, match="mask does not have the parameters' structure"):
        masks.apply(params, {"experts": True})
    with pytest.raises(PmoeError, match="no parameter matches"):
        masks.fraction_pruned(params, True, "head")
