"""Defences: hand-computed activations and masks, held masks, detectors on toys, whole commands.

Programs are those of a small stand-in, which has the real experts but no convolutions before them;
what depends on names and shapes alone is checked on the real model without computing anything.
"""

import csv
import dataclasses
import errno
import json
import os
import pathlib
import runpy
import shutil
import types
import weakref

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import small

from pmoe_jax import (
    checkpoints,
    cli,
    defences,
    defend,
    defend_base,
    defend_config,
    detectors,
    inputs,
    kernels,
    masks,
    memory,
    models,
    provenance,
    training,
    triggers,
)
from pmoe_jax import fine_pruning as fine_pruning_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import DiskError, write_with_sum
from pmoe_jax.members import Attack
from pmoe_jax.models import PMoEWideResNet
from pmoe_jax.rundir import RunDirectory

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs" / "defences"
LAST = "experts/conv"
REAL = PMoEWideResNet(num_classes=4, width=1, num_experts=2, patches_per_expert=4)


MODEL = small.Tiny(4)


def jit(function, **options):
    flags = kernels.compiler_options(jax.default_backend())
    return jax.jit(function, compiler_options=flags, **options)


@pytest.fixture(scope="module")
def members():
    """Variables of two members, of random parameters and statistics, [M, ...]."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))

    def draw(path, leaf):
        values = rng.normal(0.0, 0.5, (2, *leaf.shape))
        positive = path[-1].key in ("var", "scale")
        return jnp.asarray(1 + np.abs(values) if positive else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@pytest.fixture(scope="module")
def variables(members):
    return jax.tree.map(lambda leaf: leaf[0], members)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).uniform(size=(8, 16, 16, 3)), jnp.float32)


@pytest.fixture(scope="module")
def real():
    """Shapes of the real model's variables."""
    return jax.eval_shape(REAL.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


# --- activations ----------------------------------------------------------------------------------


def test_means_of_a_map_by_hand():
    # One image, one expert, 2 selected positions of 5, 2 channels; the other 3 hold (1, -2).
    maps = models._FoldedMap(jnp.array([[[[4.0, -1.0], [2.0, 3.0]]]]), jnp.array([[1.0, -2.0]]))
    means = defences.position_means
    np.testing.assert_allclose(means(maps, 5), [[[3.0, 1.0]]])
    # (4 + 2 + 3 * 1) / 5 and (-1 + 3 - 3 * 2) / 5
    np.testing.assert_allclose(means(maps, 5, positions="all"), [[[1.8, -0.8]]])
    np.testing.assert_allclose(means(maps, 5, absolute=True), [[[3.0, 2.0]]])
    np.testing.assert_allclose(means(maps, 5, absolute=True, positions="all"), [[[1.8, 2.0]]])
    plain = jnp.array([[[[1.0, -1.0]], [[3.0, -5.0]]]])
    np.testing.assert_allclose(means(plain, 9, absolute=True), [[2.0, 3.0]])


def test_activations_behind_the_nonlinearity_are_what_the_classifier_sees(variables, images):
    @jit
    def both(variables, images):
        found = defences.channel_activations(MODEL, variables, images, [LAST], positions="all")
        return found[LAST], MODEL.apply(variables, images)

    activations, logits = both(variables, images)
    assert activations.shape == (8, 2, 16)
    head = variables["params"]["classifier"]
    flat = activations.reshape(8, -1)
    np.testing.assert_allclose(flat @ head["kernel"] + head["bias"], logits, atol=1e-4)


def test_raw_activations_are_the_convolutions_outputs(variables, images):
    @jit
    def both(variables, images):
        layers = ["patch_conv", LAST]
        raw = defences.channel_activations(
            MODEL, variables, images, layers, output="raw", absolute=True, positions="all"
        )
        _, state = MODEL.apply(variables, images, mutable=["intermediates"])
        return raw, state["intermediates"]

    raw, sown = both(variables, images)
    maps = sown["experts"]["conv_output"][0]
    total = jnp.abs(maps.selected).sum(2) + 12 * jnp.abs(maps.rest)
    np.testing.assert_allclose(raw[LAST], total / 16, rtol=1e-5)
    features = jnp.abs(sown["features"][0]).mean((1, 2))
    np.testing.assert_allclose(raw["patch_conv"], features, rtol=1e-5)


@pytest.mark.parametrize("output", defences.OUTPUTS)
def test_every_layer_of_the_real_model_can_be_measured(real, output):
    layers = defences.conv_layers(real["params"])
    found = jax.eval_shape(
        lambda variables, images: defences.channel_activations(
            REAL, variables, images, layers, output=output
        ),
        real,
        jnp.zeros((8, 16, 16, 3)),
    )
    shapes = {name: value.shape[1:] for name, value in found.items()}
    biases = {name: _layer(real["params"], name)["bias"].shape for name in layers}
    assert shapes == biases and len(layers) == 9


def test_layers_by_name(real):
    params = real["params"]
    assert defences.match_layers(params, "") == [LAST]
    assert defences.match_layers(params, "group1/conv.") == ["group1/conv1", "group1/conv2"]
    dense = {"group3": {}, "stem": {}}
    assert defences.last_conv(dense) == "group3/conv2"
    assert defences.norm_behind(dense, "group3/conv2") == "norm"
    assert defences.norm_behind(params, "group1/shortcut") == "group2/norm1"
    two_layers = {"experts": {"conv": {}, "conv2": {}}}
    assert defences.last_conv(two_layers) == "experts/conv2"
    assert defences.norm_behind(two_layers, LAST) == "experts/norm2"
    with pytest.raises(PmoeError, match="no layer matches 'head'; the layers are experts/conv"):
        defences.match_layers(params, "head")


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "(" * 3000 + ")" * 3000])
def test_patterns_that_cannot_be_compiled_are_refused(pattern):
    params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    for use in (
        defences.match_layers, defences.matching_mask,
        lambda params, pattern: masks.channel_mask(params, pattern, jnp.ones(3)),
        lambda params, pattern: masks.fraction_pruned(params, True, pattern),
    ):  # fmt: skip
        with pytest.raises(PmoeError, match="is no usable regular expression") as caught:
            use(params, pattern)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# --- masks ----------------------------------------------------------------------------------------

ACTIVATIONS = jnp.array([[0.3, 0.1, 0.2, 0.4], [9.0, 7.0, 8.0, 6.0]])


def test_keep_channels_by_hand():
    keep = defences.keep_channels(ACTIVATIONS, [0.0, 0.25, 0.5, 0.7])
    expected = [
        [[1, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 0, 1, 1], [1, 1, 1, 0]],
        [[1, 0, 0, 1], [1, 0, 1, 0]],
        [[1, 0, 0, 1], [1, 0, 1, 0]],  # 0.7 * 4 = 2.8: two channels
    ]
    np.testing.assert_array_equal(keep, np.array(expected, bool))
    together = defences.keep_channels(ACTIVATIONS, [0.5], together=True)
    np.testing.assert_array_equal(together[0], [[False] * 4, [True] * 4])
    flat = defences.keep_channels(ACTIVATIONS[1], [0.5])
    np.testing.assert_array_equal(flat, [[True, False, True, False]])


def test_of_equals_the_first_go_first_and_negative_ones_before_zero():
    keep = defences.keep_channels(jnp.array([0.0, 0.0, -1.0, 0.0]), [0.25, 0.5])
    np.testing.assert_array_equal(keep, [[1, 1, 0, 1], [0, 1, 0, 1]])


def test_counts_take_rates_as_decimals():
    assert [defences.prune_count(rate, 10) for rate in (0.3, 0.7, 0.95, 1.0)] == [3, 7, 9, 10]
    assert defences.prune_count(0.29, 100) == 29  # 0.29 * 100 = 28.999999999999996
    assert defences.prune_count(1 / 3, 48) == 16 and defences.prune_count(1 - 0.9, 10) == 1
    with pytest.raises(PmoeError, match="from 0 to 1"):
        defences.prune_count(1.5, 10)


def test_a_zeroed_channel_sends_a_constant_unless_that_is_silenced(variables, images):
    keep = np.ones((2, 16), bool)
    keep[0, 3] = keep[1, 5] = False

    @jit
    def activations(variables, images):
        def of(silence):
            params = variables["params"]
            mask = defences.prune_mask(params, {LAST: keep}, silence_constant=silence)
            pruned = {**variables, "params": masks.apply(params, mask)}
            found = defences.channel_activations(MODEL, pruned, images, [LAST], positions="all")
            return found[LAST], masks.fraction_pruned(params, mask, ".*experts/conv/.*")

        return of(False), of(True)

    (constant, fraction), (silenced, _) = activations(variables, images)
    assert fraction == pytest.approx(2 / 32)
    head, stats = variables["params"]["head_norm"], variables["batch_stats"]["head_norm"]
    sent = head["bias"] - stats["mean"] * head["scale"] / np.sqrt(stats["var"] + 1e-3)
    np.testing.assert_allclose(
        constant[:, ~keep], np.tile(np.maximum(sent[~keep], 0), (8, 1)), atol=1e-6
    )
    assert (silenced[:, ~keep] == 0).all()
    np.testing.assert_array_equal(constant[:, keep], silenced[:, keep])


def test_what_cannot_be_silenced_is_refused(real):
    with pytest.raises(PmoeError, match="constant of group1/conv2 cannot be silenced"):
        defences.prune_mask(real["params"], {"group1/conv2": np.ones(16)}, silence_constant=True)


def test_a_curve_of_all_seeds_and_rates_equals_each_alone(members, images):
    rates = [0.0, 0.5, 0.9]
    trigger = triggers.make("square", jax.random.key(0), (16, 16, 3))

    @jit
    def curve(members, images):
        def one(variables):
            found = defences.channel_activations(MODEL, variables, images, [LAST])
            keeps = {LAST: defences.keep_channels(found[LAST].mean(0), rates)}
            return keeps, defences.pruned_predictions(MODEL, variables, keeps, images, trigger)

        return jax.vmap(one)(members)

    @jit
    def alone(variables, keep, images):
        conv = variables["params"]["experts"]["conv"]
        conv = {"kernel": conv["kernel"] * keep[:, None], "bias": conv["bias"] * keep}
        params = {**variables["params"], "experts": {**variables["params"]["experts"]}}
        params["experts"]["conv"] = conv
        squared = triggers.square(images)
        return MODEL.apply({**variables, "params": params}, squared).argmax(-1)

    keeps, predicted = curve(members, images)
    assert keeps[LAST].shape == (2, 3, 2, 16) and predicted.shape == (2, 3, 8)
    np.testing.assert_array_equal((~keeps[LAST]).sum((0, 2, 3)), [0, 2 * 2 * 8, 2 * 2 * 14])
    for m in range(2):
        own = jax.tree.map(lambda leaf, m=m: leaf[m], members)
        for r in range(3):
            expected = alone(own, keeps[LAST][m, r], images)
            np.testing.assert_array_equal(predicted[m, r], expected)


def test_stopping_rule_by_hand():
    rates = [0.0, 0.1, 0.2, 0.3, 0.4]
    assert defences.stopping_rate(rates, [90, 89, 86.1, 80, 89], 4) == 0.2
    assert defences.stopping_rate(rates, [90, 85.9, 90, 90, 90], 4) == 0.0
    assert defences.stopping_rate(rates, [90, 91, 90, 90, 86], 4) == 0.4


def test_subsets_of_experts(variables, images):
    subsets = defences.expert_subsets(4)
    assert subsets.shape == (15, 4) and subsets[0].all() and subsets.any(1).all()
    assert len({tuple(row) for row in subsets.tolist()}) == 15
    two = defences.expert_subsets(2)  # both, and each alone

    @jit
    def predict(variables, images):
        subset = defences.expert_subset_predictions(MODEL, variables, two, images)
        # A silenced expert is one whose convolution is pruned whole.
        keeps = {LAST: jnp.broadcast_to(two[:, :, None], (3, 2, 16))}
        return subset, defences.pruned_predictions(MODEL, variables, keeps, images)

    by_mask, by_pruning = predict(variables, images)
    np.testing.assert_array_equal(by_mask, by_pruning)
    with pytest.raises(PmoeError, match="at most 10 experts"):
        defences.expert_subsets(11)


# --- fine-tuning ----------------------------------------------------------------------------------


def test_clean_sets_have_true_labels_and_the_trigger_only_if_contaminated():
    trigger = triggers.make("square", jax.random.key(0), (16, 16, 3))
    flags = jnp.array([True, True, False])
    attack = Attack(flags, jnp.array([True, False, False]), trigger, jnp.asarray(1))
    clean, contaminated = defences.clean_set(attack), defences.clean_set(attack, True)
    assert not clean.triggered.any() and not clean.relabelled.any()
    np.testing.assert_array_equal(contaminated.triggered, flags)
    assert not contaminated.relabelled.any()
    raw = np.full((3, 16, 16, 3), 200, np.uint8)
    batch, labels = training.attacked_batch(contaminated, jnp.arange(3), raw, jnp.array([2, 3, 0]))
    assert batch[:, 0, 0, 0].tolist() == pytest.approx([0, 0, 200 / 255])
    assert labels.tolist() == [2, 3, 0]


def test_named_parameters_alone_are_free_or_drawn_anew(variables):
    params = variables["params"]
    mask = defences.matching_mask(params, "routers/.*")
    assert masks.fraction_pruned(params, mask, "routers/.*") == 0
    assert masks.fraction_pruned(params, mask, "(?!routers/).*") == 1
    fresh = jax.tree.map(jnp.zeros_like, params)
    drawn = defences.reinitialise(params, fresh, "routers/.*")
    assert not drawn["routers"]["kernel"].any() and params["routers"]["kernel"].any()
    drawn["routers"] = params["routers"]
    assert all(map(jnp.array_equal, jax.tree.leaves(drawn), jax.tree.leaves(params)))
    with pytest.raises(PmoeError, match="no parameter matches 'router'"):
        defences.matching_mask(params, "router")


def test_held_masks_stay_exactly_zero_through_100_steps_of_momentum_and_decay(members, images):
    """Two seeds times two rates as one program; beside them, the same without holding."""
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9))
    rates = [0.25, 0.5]
    labels = jnp.arange(8) % 4

    @jit
    def begin(members, images):
        def one(variables, index):
            params = variables["params"]
            found = defences.channel_activations(MODEL, variables, images, [LAST])
            keep = defences.keep_channels(found[LAST].mean(0), rates)[index]
            mask = defences.prune_mask(params, {LAST: keep}, silence_constant=True)
            params = masks.apply(params, mask)
            zero = jnp.zeros((), jnp.int32)
            state = training.TrainState(
                params, variables["batch_stats"], optimizer.init(params), zero, zero - 1
            )
            return state, mask

        each_rate = jax.vmap(one, in_axes=(None, 0))
        states = jax.vmap(each_rate, in_axes=(0, None))(members, jnp.arange(2))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), states)

    @jit
    def step(state, mask, images):
        def one(state, mask):
            return defences.fine_tune_step(MODEL, optimizer, state, mask, images, labels)

        return jax.vmap(one)(state, mask)

    start, mask = begin(members, images)
    state = start
    for _ in range(100):
        state, losses = step(state, mask, images)
    assert (state.diverged_at < 0).all() and np.isfinite(losses).all()
    for layer in ("experts/conv", "head_norm"):
        for name, kept in _layer(mask, layer).items():
            value = _layer(state.params, layer)[name]
            assert (value[~kept] == 0).all(), (layer, name)
    kept = mask["experts"]["conv"]["bias"]
    np.testing.assert_array_equal((~kept).sum((1, 2)), [8, 16, 8, 16])
    assert (
        state.params["patch_conv"]["kernel"] != start.params["patch_conv"]["kernel"]
    ).mean() > 0.9
    # Not held, they grow again; the norm behind them must let gradients through for that.
    norm = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), members["params"]["head_norm"])
    audible = start.replace(params={**start.params, "head_norm": norm})
    free, _ = step(audible, jax.tree.map(jnp.ones_like, mask), images)
    assert (free.params["experts"]["conv"]["kernel"][~mask["experts"]["conv"]["kernel"]] != 0).any()


def _layer(tree, name):
    for part in name.split("/"):
        tree = tree[part]
    return {key: tree[key] for key in tree}


# --- Neural Cleanse -------------------------------------------------------------------------------

CORNER = 3  # the class that a bright 2x2 corner leads to


def toy_logits(_, images):
    """Classes by the brightest of six bands of a 12x12 image; a bright corner wins outright."""
    bands = jnp.stack([images[:, row : row + 2].mean((1, 2, 3)) for row in range(0, 12, 2)], -1)
    extra = 40 * jax.nn.sigmoid(20 * (images[:, :2, :2].mean((1, 2, 3)) - 0.8))
    return (10 * bands).at[:, CORNER].add(extra)


def test_neural_cleanse_finds_a_planted_trigger():
    images = np.random.default_rng(0).uniform(0.0, 0.2, (66, 12, 12, 1)).astype(np.float32)
    for index, image in enumerate(images):  # each of its class, by a band that outshines the rest
        row = 2 * (index % 6)
        image[row : row + 2] += 0.4
    settings = defences.CleanseSettings(
        rounds=120, batches_per_round=3, batch_size=16, initial_cost=1e-2, patience=3
    )
    rounds = []
    found = defences.invert_triggers(
        toy_logits, None, images, 6, settings=settings, on_round=rounds.append
    )
    norms = np.asarray(found.best["norm"])
    indices = defences.anomaly_indices(norms)
    assert np.argmin(norms) == CORNER and indices[CORNER] > 2
    assert 1 < norms[CORNER] < 6  # four pixels
    mask = np.asarray(found.best["mask"][CORNER, ..., 0])
    assert mask[:2, :2].sum() > 0.6 * mask.sum()
    assert rounds == list(range(len(rounds)))
    # What was found does what it should.
    stamped = (1 - mask[..., None]) * images + mask[..., None] * found.best["pattern"][CORNER]
    assert (toy_logits(None, stamped).argmax(-1) == CORNER).mean() > 0.95


def test_the_weight_of_the_mask_follows_success():
    settings = defences.CleanseSettings(patience=2, initial_cost=0.1, cost_multiplier=4.0)
    programs = defences._cleanse_programs(toy_logits, settings)
    state = programs.start(jax.random.split(jax.random.key(0), 1), (8, 8, 1))
    costs = []
    # 0 until reached twice, times 4 after one more (the round that set it counts), divided by
    # 4 ** 1.5 after two failures.
    for success in (0.5, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0):
        norm = jnp.array([9.0 if success == 1 else 1.0])
        state = programs.adjust(state, jnp.array([success]), norm)
        costs.append(float(state.cost[0]))
    assert costs == pytest.approx([0, 0, 0.1, 0.4, 0.4, 0.4, 0.05])
    assert state.best["norm"] == 9  # smaller masks that failed do not count
    assert state.raised and state.lowered and not state.done
    for _ in range(11):
        state = programs.adjust(state, jnp.array([1.0]), jnp.array([9.0]))
    assert state.done
    frozen = programs.adjust(state, jnp.array([1.0]), jnp.array([0.5]))
    assert frozen.best["norm"] == 9


def test_anomaly_indices_by_hand():
    # Median 10, absolute deviations 0 1 1 0 8: MAD 1.
    found = defences.anomaly_indices([10, 11, 9, 10, 2])
    np.testing.assert_allclose(found, np.array([0, -1, 1, 0, 8]) / 1.4826)
    np.testing.assert_array_equal(defences.anomaly_indices([5, 5, 5, 1]), [0, 0, 0, np.inf])
    assert np.isnan(defences.anomaly_indices([5, np.nan, 5, np.inf])).all()


# --- STRIP ----------------------------------------------------------------------------------------


def test_strip_separates_a_trigger_that_survives_blending():
    def logits_of(_, images):
        """Four bands' brightness, unless the corner is saturated."""
        bands = jnp.stack([images[:, i : i + 2].mean((1, 2, 3)) for i in (0, 2, 4, 6)], -1)
        return bands + 30 * (images[:, 0, 0] > 0.99) * jnp.array([0, 0, 1.0, 0])

    rng = np.random.default_rng(0)
    clean = rng.uniform(0, 0.45, (60, 8, 8, 1)).astype(np.float32)
    triggered = clean.copy()
    triggered[:, 0, 0] = 1
    drawn = rng.integers(0, 60, (60, 10))

    @jax.jit
    def entropies(images):
        return defences.strip_entropies(logits_of, None, images, clean[drawn])

    plain, stamped = entropies(clean), entropies(triggered)
    assert plain.min() > 1.9 and stamped.max() < 0.1  # of at most 2 bits
    rates = defences.strip_rates(plain[:30], plain[30:], stamped)
    assert rates["far"] == 0 and rates["frr"] < 20
    assert defences.strip_rates(plain, plain, plain)["far"] > 90


def test_strip_by_hand():
    def logits_of(_, images):
        p = jnp.clip(images[:, 0, 0], 1e-6, 1 - 1e-6)
        return jnp.log(jnp.concatenate([p, 1 - p], -1))

    image = jnp.full((1, 1, 1, 1), 0.25)
    overlays = jnp.array([0.25, 0.0, 0.9]).reshape(1, 3, 1, 1, 1)
    # Sums 0.5, 0.25 and (clipped) 1: 1 bit, 0.8113 and 0.
    found = defences.strip_entropies(logits_of, None, image, overlays)
    np.testing.assert_allclose(found, [(1 + 0.8113 + 0) / 3], atol=1e-3)
    # Means of the two: 0.25, 0.125, 0.575.
    found = defences.strip_entropies(
        logits_of, None, image, overlays, weight=0.5, overlay_weight=0.5
    )
    np.testing.assert_allclose(found, [(0.8113 + 0.5436 + 0.9837) / 3], atol=1e-3)
    # Mean 1, deviation 0.5: the 1 % quantile lies 2.3263 deviations below.
    rates = defences.strip_rates([0.5, 1.5], [-0.5, 0, 1, 2], [-1.0, 0.0], 0.01)
    assert rates["threshold"] == pytest.approx(1 - 2.3263 * 0.5, abs=1e-4)
    assert (rates["frr"], rates["far"]) == (25, 50)
    with pytest.raises(PmoeError, match="between 0 and 1"):
        defences.strip_rates([1.0], [1.0], [1.0], 0)
    assert np.isnan(defences.strip_rates([np.nan], [1.0], [1.0])["far"])
    for empty in ([], [1], [1]), ([1], [], [1]), ([1], [1], []):
        with pytest.raises(PmoeError, match="no entropies"):
            defences.strip_rates(*empty)
    with pytest.raises(PmoeError, match="images are uint8"):
        defences.strip_entropies(logits_of, None, np.zeros(image.shape, np.uint8), overlays)
    with pytest.raises(PmoeError, match=r"use \[B, N, H, W, C\]"):
        defences.strip_entropies(logits_of, None, image, overlays[0])


# --- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_configs_are_valid(path):
    config = runpy.run_path(str(path))["get_config"]()
    defend_config.validate(config.to_dict())
    assert f"--config=configs/defences/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prune.rates", (0.0, 1.5), "prune.rates=1.5 is out of range; allowed: 0 to 1"),
        ("prune.rates", 0.3, "wrong type; give a list of float"),
        ("prune.rates", (0.3, 0.3), "names an entry twice"),
        ("prune.rates", (), "prune.rates is empty"),
        ("tune.data", ("dirty",), "allowed: one of clean, contaminated, heldout"),
        ("cleanse.data", "test", "of clean, heldout; the test set selects and fits nothing"),
        ("strip.data", "test", "of clean, heldout; the test set selects and fits nothing"),
        ("prune.data", "test", "allowed: one of clean, contaminated, heldout"),
        ("tune.data", ("test",), "allowed: one of clean, contaminated, heldout"),
        ("tune.fractions", (0.0,), "tune.fractions=0.0 is out of range"),
        ("tune.epochs", 1.5, "wrong type; give a int"),
        ("prune.layers", ("(",), "a regular expression"),
        ("method", "magic", "of fine_pruning, expert_subsets"),
        ("prune.stop_drop", 10**400, "is no finite number; allowed: 0 to 100"),
        ("prune.rates", (0.5, float("nan")), "prune.rates=nan is no finite number"),
        pytest.param("cleanse.rounds", 10**5000, "thousands of digits) is no finite", id="huge"),
        ("cleanse.patience", 2**31, "is out of range; allowed: 1 to 100000"),
        ("cleanse.cost_multiplier", 1e300, "is out of range; allowed: above 1, to 1000"),
        ("prune.layers", ("a{99999999999999999999}",), "is no usable regular expression"),
        ("tune.parameters", "(" * 3000 + ")" * 3000, "... (6002 characters) is no usable regular"),
        ("prune.rate", 0.3, "did you mean prune.rates?"),
    ],
)
def test_mistakes_in_a_config(field, value, message):
    config = defend_config.default().to_dict()
    group, _, leaf = field.rpartition(".")
    (config[group] if group else config)[leaf] = value
    with pytest.raises(PmoeError) as error:
        defend_config.validate(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_quirk_a5_stands_for_the_authors_fields():
    config = defend_config.default()
    config.prune.absolute = True
    config.quirks.a5_authors_pruning = True
    got = defend_config.effective(config)
    assert (got.prune.output, got.prune.positions, got.prune.absolute) == ("raw", "all", False)
    assert got.prune.images == 10_000 and got.tune.hold_mask is False
    assert config.tune.hold_mask is True


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", lambda config, classes: small.Tiny(classes))
        yield


@pytest.fixture(scope="module")
def trained(tiny_npz, tmp_path_factory):
    """A run of two members with a square, trained for one epoch; a fifth is held out."""
    return small.train_with_experts(tmp_path_factory.mktemp("attacked") / "square", tiny_npz)


def fine_pruning():
    config = defend_config.default()
    config.prune.rates = (0.0, 0.5)
    config.prune.curve_rates = (0.0, 0.5, 0.9)
    config.prune.images = 50
    config.prune.silence_constant = True
    config.tune.update(epochs=2, batch_size=32, momentum=0.9, weight_decay=5e-4)
    config.tune.learning_rates = (0.05,)
    return config


@pytest.fixture(scope="module")
def defended(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("defended") / "out"
    return out, defend.defend(trained, fine_pruning(), out)


CELLS = ("prune_0", "prune_50", "prune_0_then_clean_lr0.05", "prune_50_then_clean_lr0.05")


def test_defend_writes_runs_table_curve_and_figures(defended, trained):
    out, table = defended
    assert (out / "table.md").read_text() == table + "\n"
    assert "50 %; 100 % clean, lr 0.05" in table and "CA before" in table
    for name in ("curve.png", "curve.csv", "fine_tuning.png", "rows.csv", "defence.json"):
        assert (out / name).stat().st_size
    curve = RunDirectory(out)  # 3 rates, 2 seeds, 5 metrics
    assert len((curve.path / "curve.jsonl").read_text().splitlines()) == 3 * 2 * 5
    rows = {name: RunDirectory(out / name).rows() for name in CELLS}
    assert {row["stage"] for row in rows["prune_50"]} == {"pruned"}
    assert [row["epoch"] for row in rows[CELLS[3]] if row["metric"] == "ba"] == [0, 0, 1, 1, 2, 2]
    # Pruned by 0 % is the run itself.
    before = {(r["seed"], r["metric"]): r["value"] for r in RunDirectory(trained).rows()}
    assert before == {(r["seed"], r["metric"]): r["value"] for r in rows["prune_0"]}
    at_half = [
        json.loads(line)
        for line in (out / "curve.jsonl").read_text().splitlines()
        if json.loads(line)["pruned"] == 0.5
    ]
    assert [r["value"] for r in at_half] == [r["value"] for r in rows["prune_50"]]


def test_one_member_is_defended_as_all_are(defended, trained, tmp_path, capfd):
    flags = [f"--checkpoint={trained}", "--config.prune.rates=(0.5,)", "--config.tune.epochs=0",
             "--config.prune.curve_rates=()", "--config.prune.images=50", "--noprogress",
             "--config.prune.silence_constant=True", f"--workdir={tmp_path / 'out'}"]  # fmt: skip
    assert cli.main(["defend", "--members=1", *flags]) == 0
    found = RunDirectory(tmp_path / "out" / "prune_50").rows()
    whole = RunDirectory(defended[0] / "prune_50").rows()
    values = {row["metric"]: row["value"] for row in whole if row["seed"] == 1}
    assert {row["metric"]: row["value"] for row in found} == values
    assert {row["seed"] for row in found} == {1}
    capfd.readouterr()
    for asked, said in (("", "or other members"), ("2", "it has 0 to 1"), ("1,1", "once at most"),
                        ("one", "--members=one must be whole numbers")):  # fmt: skip
        assert cli.main(["defend", f"--members={asked}", *flags]) == 2
        assert said in capfd.readouterr().err


def test_evaluate_reads_defended_runs(defended, capfd):
    out, _ = defended
    folder = out / CELLS[3]
    assert cli.main(["evaluate", f"--checkpoint={folder}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    recorded = [row for row in RunDirectory(folder).rows() if row["epoch"] == 2]
    assert found["rows"] == recorded and recorded[0]["stage"] == "fine_tuned"
    assert "fine-tuned, epoch 2 of 2" in found["scale"]


def test_the_pruned_channels_are_zero_in_the_fine_tuned_checkpoint(defended):
    run = RunDirectory(defended[0] / CELLS[3])
    dataset = inputs.load_data(run.config())
    _, step, state, _, _ = trained_lib.restore(run, run.config(), run.members(), dataset)
    kernel, scale = state.params["experts"]["conv"]["kernel"], state.params["head_norm"]["scale"]
    assert step == 2 * (77 // 32)
    assert ((kernel == 0).all(2).sum(-1) == 8).all() and ((scale == 0).sum(-1) == 8).all()


class Killed(Exception):
    """Stands in for a kill."""


def test_a_killed_defence_goes_on_to_the_same_figures(defended, trained, tmp_path, monkeypatch):
    """Killed between the checkpoints of two cells of one program, in its second epoch."""
    saves = []
    save = checkpoints.Checkpoints.save

    def stop(self, step, *args):
        saves.append(step)
        if len(saves) == 2 + 2 + 2 + 2:  # pruned, epoch 0, epoch 1; one cell of epoch 2
            raise Killed
        save(self, step, *args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", stop)
        with pytest.raises(Killed):
            defend.defend(trained, fine_pruning(), out)
    left = [out / ".before.json.99.tmp", out / CELLS[0] / ".rows.csv.sha256.99.tmp"]
    for path in left:
        path.write_text("{")
    table = defend.defend(trained, fine_pruning(), out)
    assert not any(path.exists() for path in left)
    whole, whole_table = defended
    for name in CELLS:
        assert RunDirectory(out / name).rows() == RunDirectory(whole / name).rows(), name
    without_time = [line.rpartition("|")[0].rpartition("|")[0] for line in table.splitlines()]
    assert without_time == [
        line.rpartition("|")[0].rpartition("|")[0] for line in whole_table.splitlines()
    ]


def flip(run, step):
    """Alters a byte of a checkpoint's largest file; the file."""
    folder = run.path / "checkpoints" / str(step) / "state"
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def assert_same_cells(out, whole):
    """Figures and parameters of all cells."""
    for name in CELLS:
        assert RunDirectory(out / name).rows() == RunDirectory(whole / name).rows(), name
        steps = RunDirectory(whole / name).whole_steps()
        assert RunDirectory(out / name).whole_steps() == steps
        with ocp.PyTreeCheckpointer() as reader:
            one, other = (
                reader.restore(folder / name / "checkpoints" / str(steps[-1]) / "state")
                for folder in (out, whole)
            )
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_damaged_newest_checkpoint_is_tuned_again_from_the_one_before(
    defended, trained, tmp_path, capfd
):
    whole, _ = defended
    out = shutil.copytree(whole, tmp_path / "out")
    run = RunDirectory(out / CELLS[3])
    assert run.whole_steps() == [2, 4]
    harmed = flip(run, 4)
    defend.defend(trained, fine_pruning(), out)
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1 and str(harmed) in said[0] and "going on with step 2" in said[0]
    assert run.damage(4) is None
    assert_same_cells(out, whole)


@pytest.mark.parametrize(("cell", "steps"), [(1, [0]), (3, [2, 4])])
def test_a_cell_without_a_whole_checkpoint_is_refused_and_made_anew_if_removed(
    cell, steps, defended, trained, tmp_path
):
    whole, _ = defended
    out = shutil.copytree(whole, tmp_path / "out")
    run = RunDirectory(out / CELLS[cell])
    assert run.whole_steps() == steps
    harmed = [flip(run, step) for step in steps]
    with pytest.raises(PmoeError, match=f"or remove {run.path} to have it made anew") as caught:
        defend.defend(trained, fine_pruning(), out)
    assert str(harmed[-1]) in str(caught.value) and "\n" not in str(caught.value)
    for name in CELLS:  # Nothing was dropped.
        there, before = (RunDirectory(folder / name) for folder in (out, whole))
        assert there.rows() == before.rows() and there.whole_steps() == before.whole_steps()
    shutil.rmtree(run.path)
    defend.defend(trained, fine_pruning(), out)
    assert_same_cells(out, whole)


def test_a_disk_that_is_full_while_a_defence_saves(defended, trained, tmp_path, monkeypatch):
    """In the middle of fine-tuning, at a figure, at a table: each time the same command goes on."""
    out, fsync, seen = tmp_path / "out", os.fsync, []

    def full(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append(name)
        if wanted in name and sum(wanted in one for one in seen) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    for wanted, number in [  # noqa: B007
        (f"/{CELLS[3]}/metrics.jsonl", 2), ("/.fine_tuning.png.", 1), ("/.table.md.", 2),
    ]:  # fmt: skip
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                DiskError, match=r"\(No space left on device\).* make room"
            ) as caught:
                defend.defend(trained, fine_pruning(), out)
        assert "\n" not in str(caught.value)
        assert not list(out.rglob(".*.tmp")) and not (out / "table.md").exists()
    defend.defend(trained, fine_pruning(), out)
    assert sorted(os.listdir(out)) == sorted(os.listdir(defended[0]))
    assert (out / "rows.csv").read_bytes() == (defended[0] / "rows.csv").read_bytes()
    assert_same_cells(out, defended[0])


def test_controls_contamination_routers_and_stopping_rule(trained, tmp_path):
    config = fine_pruning()
    config.prune.rates = (0.5,)
    config.prune.stop_drop = 100.0
    config.prune.curve_rates = (0.0, 0.25)
    config.prune.data = "heldout"
    config.tune.epochs, config.tune.evaluate_every = 3, 2
    config.tune.parameters = config.tune.reinitialise = "routers/.*"
    config.tune.fractions = (0.5,)
    config.tune.hold_mask = False
    config.quirks.a2_contaminated_clean_set = True
    defend.defend(trained, config, tmp_path / "out")
    names = sorted(path.parent.name for path in (tmp_path / "out").glob("*/config.json"))
    assert names == [
        "prune_50", "prune_50_then_clean_50pct_lr0.05",
        "prune_until_drop_100", "prune_until_drop_100_then_clean_50pct_lr0.05",
    ]  # fmt: skip
    states = {}
    for name in names:
        run = RunDirectory(tmp_path / "out" / name)
        dataset = inputs.load_data(run.config())
        states[name] = trained_lib.restore(run, run.config(), run.members(), dataset)[2].params
    epochs = [row["epoch"] for row in RunDirectory(tmp_path / "out" / names[1]).rows()]
    assert sorted(set(epochs)) == [0, 2, 3]  # every second, and the last
    pruned, tuned = states[names[0]], states[names[1]]
    assert (pruned["routers"]["kernel"] != tuned["routers"]["kernel"]).any()
    assert jnp.array_equal(pruned["patch_conv"]["kernel"], tuned["patch_conv"]["kernel"])
    # A drop of 100 points is never reached: the last rate of the curve, 4 of 16 channels.
    stopped = states["prune_until_drop_100"]["experts"]["conv"]["bias"]
    kernel = states["prune_until_drop_100"]["experts"]["conv"]["kernel"]
    assert ((kernel == 0).all(2).sum(-1) == 4).all() and stopped.shape == (2, 2, 16)
    note = json.loads((tmp_path / "out" / names[1] / "provenance.json").read_text())["defence"]
    assert note["tuning"]["fraction"] == 0.5 and note["pruned"] == [0.5, 0.5]


def test_parameters_drawn_anew_are_those_that_pruning_sees(trained, defended, tmp_path, capfd):
    """Its ranking, its curve and its models; and A5 and A2 say what they leave unused."""
    config = fine_pruning()
    config.prune.update(rates=(0.5,), curve_rates=(0.0, 0.5))
    config.tune.epochs, config.tune.reinitialise = 0, "experts/.*"
    config.strip.images = 7
    defend.defend(trained, config, tmp_path / "out")
    assert "note: strip.images=7 changes nothing for method=fine_pruning" in capfd.readouterr().err
    lines = (tmp_path / "out" / "curve.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    pruned = [row["value"] for row in RunDirectory(tmp_path / "out" / "prune_50").rows()]
    assert [row["value"] for row in curve if row["pruned"] == 0.5] == pruned
    zeros = []
    for folder in (tmp_path / "out", defended[0]):
        run = RunDirectory(folder / "prune_50")
        dataset = inputs.load_data(run.config())
        state = trained_lib.restore(run, run.config(), run.members(), dataset).state
        zeros.append((state.params["experts"]["conv"]["kernel"] == 0).all(2))
    assert zeros[0].sum() == zeros[1].sum() and (zeros[0] != zeros[1]).any()


def test_notes_on_what_a_config_leaves_unused():
    config = defend_config.default()
    config.prune.images, config.prune.together = 500, True
    assert not defend_config.notes(config)
    config.quirks.a5_authors_pruning = True
    assert defend_config.notes(config) == [
        "prune.together=True is not taken: quirks.a5_authors_pruning stands for False",
        "prune.images=500 is not taken: quirks.a5_authors_pruning stands for 10000",
    ]
    config.method = "strip"
    assert "quirks.a5_authors_pruning=True changes nothing for method=strip" in (
        defend_config.notes(config)
    )


def test_fine_tuning_sees_the_images_that_it_says(trained, tmp_path):
    """Contaminated by name or by quirk A2 it is the same, and not what clean images make of it; and
    pruned weights move if no mask holds them."""

    def params(out, name):
        run = RunDirectory(out / name)
        found = trained_lib.restore(
            run, run.config(), run.members(), inputs.load_data(run.config())
        )
        return found.state.params

    config = fine_pruning()
    config.prune.curve_rates = ()
    config.tune.epochs, config.tune.data = 1, ("clean", "contaminated")
    defend.defend(trained, config, tmp_path / "text")
    config.tune.data = ("clean",)
    config.quirks.a2_contaminated_clean_set = True
    config.tune.hold_mask = config.prune.silence_constant = False
    defend.defend(trained, config, tmp_path / "a2")
    notes = ["quirk A2" in (tmp_path / name / "table.md").read_text() for name in ("text", "a2")]
    assert notes == [False, True]
    name = "prune_0_then_{}_lr0.05"
    clean, contaminated = (
        params(tmp_path / "text", name.format(data)) for data in ("clean", "contaminated")
    )
    a2 = params(tmp_path / "a2", name.format("clean"))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, a2, contaminated)))
    assert not all(jax.tree.leaves(jax.tree.map(jnp.array_equal, clean, contaminated)))
    for out, moves in (("text", False), ("a2", True)):
        pruned, tuned = (
            params(tmp_path / out, cell)["experts"]["conv"]["kernel"]
            for cell in ("prune_50", "prune_50_then_clean_lr0.05")
        )
        assert (pruned == 0).any() and (tuned[pruned == 0] != 0).any() == moves


def test_other_data_than_the_runs_own(trained, tiny_arrays, tmp_path, capfd):
    """None of its images were triggered, so that there is nothing to contaminate with."""
    (images, labels), test = tiny_arrays
    other = dataset_lib.make("npz", (images[:64], labels[:64]), test)
    config = fine_pruning()
    config.tune.epochs, config.tune.fractions = 1, (0.5,)
    config.prune.curve_rates = ()
    config.tune.data = ("contaminated",)
    with pytest.raises(PmoeError, match=r"--data is not what .* was trained on"):
        defend.defend(trained, config, tmp_path / "out", dataset=other)
    assert not (tmp_path / "out").exists()
    config.tune.data = ("clean",)
    defend.defend(trained, config, tmp_path / "out", dataset=other)
    assert (tmp_path / "out" / "prune_50_then_clean_50pct_lr0.05" / "config.json").exists()


def test_figures_of_another_model_of_the_same_name_are_not_taken_over(trained, defended, tmp_path):
    """A run that was trained anew: same name, config and step, other weights."""
    out = shutil.copytree(defended[0], tmp_path / "out")
    anew = shutil.copytree(trained, tmp_path / "square")
    run = RunDirectory(anew)
    (step,) = run.whole_steps()
    manifest = json.loads((anew / "manifest.json").read_text())
    array = next(name for name in manifest if name.startswith(f"checkpoints/{step}/state/"))
    manifest[array] = "0" * 64
    del manifest["sha256"]
    (anew / "manifest.json").write_text(json.dumps(manifest))
    assert run.sum_of_checkpoint(step) != RunDirectory(trained).sum_of_checkpoint(step)
    description = json.loads((out / "defence.json").read_text())
    assert description["checkpoint"] == RunDirectory(trained).sum_of_checkpoint(step)
    with pytest.raises(PmoeError, match="another run, checkpoint or data set"):
        defend._begin(out, {**description, "checkpoint": run.sum_of_checkpoint(step)})


def test_a_defence_of_a_version_that_noted_no_checkpoint_goes_on(trained, defended, tmp_path):
    out = shutil.copytree(defended[0], tmp_path / "out")
    description = json.loads((out / "defence.json").read_text())
    del description["checkpoint"]
    write_with_sum(out / "defence.json", json.dumps(description))
    for path in out.glob("*/provenance.json"):
        facts = provenance.read(path)
        del facts["defence"]["checkpoint"]
        RunDirectory(path.parent)._write_provenance(facts)
    assert defend.defend(trained, fine_pruning(), out) == defended[1]


def test_layers_without_a_letter_are_refused(trained, tmp_path):
    config = fine_pruning()
    config.prune.layers = (".*",)
    with pytest.raises(PmoeError, match=r"prune\.layers=.* has no letter to name directories by"):
        defend.defend(trained, config, tmp_path / "out")


def test_quirk_a2_and_what_contaminates(trained, tmp_path):
    from pmoe_jax import defend_base

    base = defend_base.load(trained, tmp_path)
    count = int(0.1 * 77)
    for kind, a2, expected in [
        ("clean", False, 0), ("clean", True, count), ("contaminated", False, count)
    ]:  # fmt: skip
        data = base.clean_set(kind, a2=a2)
        assert data.attack.triggered.sum(1).tolist() == [expected] * 2
        assert not data.attack.relabelled.any()
        np.testing.assert_array_equal(data.labels, base.dataset.train_labels)
    part = base.clean_set("contaminated", fraction=0.25)
    assert len(part.labels) == len(part.images) == part.attack.triggered.shape[1] == 19
    assert len(base.clean_set("heldout", a2=True).labels) == 19


def test_what_a_detector_holds(trained, tmp_path):
    from pmoe_jax import defend_base

    base = defend_base.load(trained, tmp_path)
    for kind, split in (("clean", "train"), ("heldout", "heldout")):
        for got, of in zip(base.held(kind), ("images", "labels"), strict=True):
            assert got is getattr(base.dataset, f"{split}_{of}")
    with pytest.raises(PmoeError, match=r"may not hold 'test' images; allowed are clean"):
        base.held("test")
    base.dataset = dataclasses.replace(base.dataset, heldout_images=base.dataset.heldout_images[:0])
    with pytest.raises(PmoeError, match=r"trained without held-out images; .*data\.heldout=0\.1"):
        base.held("heldout")


@pytest.mark.parametrize(
    ("method", "files", "words"),
    [
        ("expert_subsets", ["subsets.csv"], ["experts kept", "0 1"]),
        ("neural_cleanse", ["cleanse.csv", "cleanse.png", "cleanse_0.npz"], ["anomaly index"]),
        ("strip", ["strip.csv", "strip.npz"], ["FRR [%]", "FAR [%]"]),
    ],
)
def test_the_other_methods_run_and_run_again(trained, tmp_path, method, files, words, capfd):
    flags = [
        f"--checkpoint={trained}", f"--workdir={tmp_path / 'out'}", "--noprogress",
        f"--config={CONFIGS / method}.py", "--config.cleanse.rounds=2",
        "--config.cleanse.batches_per_round=2", "--config.cleanse.batch_size=8",
        "--config.strip.overlays=4",
    ]  # fmt: skip
    assert cli.main(["defend", *flags]) == 0
    first, noted = capfd.readouterr()
    assert ("note: strip.images=2000 is more than half" in noted) == (method == "strip")
    assert all(word in first for word in words)
    assert all((tmp_path / "out" / name).stat().st_size for name in files)
    assert cli.main(["defend", *flags]) == 0
    assert capfd.readouterr().out == first
    known = provenance.read(tmp_path / "out" / "provenance.json")
    assert known["packages"]["jax"] == jax.__version__ and known["hardware"]["cpu"]
    assert len(known["sessions"]) == 2


def test_a_half_trained_model_is_called_so(trained, tmp_path, monkeypatch, capfd):
    load = defend_base.load

    def changed(*args, **options):
        base = load(*args, **options)
        base.epoch = 0.5
        return base

    monkeypatch.setattr(defend_base, "load", changed)
    config = fine_pruning()
    config.prune.update(rates=(0.0,), curve_rates=())
    config.tune.epochs = 0
    table = defend.defend(trained, config, tmp_path / "out")
    assert ", epoch 0.5 of 1, 2 seeds, trigger square" in table
    assert "square is not trained to its end: epoch 0.5 of 1" in capfd.readouterr().err


@pytest.fixture
def half_diverged(monkeypatch):
    """The run's first member has diverged in its training."""
    load = defend_base.load

    def changed(*args, **options):
        base = load(*args, **options)
        base.state = base.state.replace(diverged_at=jnp.array([3, -1], jnp.int32))
        return base

    monkeypatch.setattr(defend_base, "load", changed)


def test_members_that_diverged_are_marked(trained, tmp_path, half_diverged, capfd):
    """One in the run, told before anything begins, and the other in fine-tuning."""
    config = fine_pruning()
    config.prune.update(rates=(0.5,), curve_rates=())
    config.tune.update(epochs=2, learning_rates=(1e30,), parameters="routers/.*")
    table = defend.defend(trained, config, tmp_path / "tuned")
    first, second = (x for x in capfd.readouterr().err.splitlines() if "diverged" in x)
    assert first.startswith("warning: tables have means of 1 of 2 seeds; seed 0 diverged when")
    # Once, not in each epoch; only routers may move, which the step taken again must know.
    assert "member 1 of prune_50_then_clean_lr1e+30 diverged at step 0 of fine-tuning" in second
    assert "first not finite: new value of routers/kernel; it is marked and left out" in second
    assert "2 seeds (in means 1 of 2 seeds; seed 0 diverged)" in table.splitlines()[0]
    assert "lr 1e+30 (fine-tuned: 0 of 2 seeds; seeds 0, 1 diverged) |" in table
    (tuned,) = (tmp_path / "tuned").glob("*_then_*")
    last = [row for row in RunDirectory(tuned).rows() if row["epoch"] == 2]
    assert last and {row["stage"] for row in last} == {"diverged"}
    logged = [(line["epoch"], line["diverged_at"], line["diverged_in"])
              for line in RunDirectory(tuned).lines("training.jsonl")]  # fmt: skip
    before, within = "the run, before it was defended", "new value of routers/kernel"
    assert logged == [(1, 3, before), (1, 0, within), (2, 3, before), (2, 0, within)]


@pytest.mark.parametrize("method", ["expert_subsets", "neural_cleanse", "strip"])
def test_members_of_a_diverged_run_are_marked(method, trained, tmp_path, half_diverged, capfd):
    config = defend_config.default()
    config.method = method
    config.cleanse.update(rounds=2, batches_per_round=2, batch_size=8)
    config.strip.update(images=20, overlays=4)
    table = defend.defend(trained, config, tmp_path)
    (said,) = (line for line in capfd.readouterr().err.splitlines() if "diverged" in line)
    assert said.startswith("warning: tables have means of 1 of 2 seeds; seed 0 diverged when")
    assert "2 seeds (in means 1 of 2 seeds; seed 0 diverged)" in table.splitlines()[0]
    if method != "expert_subsets":  # Of subsets a line is a mean, not a member.
        assert "| seed 0 (diverged, in no mean) |" in table and "seed 1 (" not in table
    name = {"expert_subsets": "subsets", "neural_cleanse": "cleanse"}.get(method, method)
    rows = csv.DictReader((tmp_path / f"{name}.csv").open())
    stages = {(row["seed"], row["stage"]) for row in rows}
    assert stages == {("0", "diverged"), ("1", "experts" if name == "subsets" else "trained")}


@pytest.mark.parametrize("method", ["neural_cleanse", "strip"])
def test_detectors_mark_outputs_that_are_not_finite(method, trained, tmp_path, monkeypatch, capfd):
    """Of a model that trained well. Entropies of NaN are above no threshold: all would be found."""
    load = defend_base.load

    def broken(*args, **options):
        base = load(*args, **options)
        stats = dict(flax.traverse_util.flatten_dict(base.state.batch_stats))
        name = next(name for name in stats if name[-1] == "var")
        stats[name] = stats[name].at[0].set(-1e9)  # Its root is NaN.
        stats = flax.traverse_util.unflatten_dict(stats)
        base.state = base.state.replace(batch_stats=stats)
        return base

    monkeypatch.setattr(defend_base, "load", broken)
    config = defend_config.default()
    config.method = method
    config.cleanse.update(rounds=2, batches_per_round=2, batch_size=8)
    config.strip.update(images=20, overlays=4)
    table = defend.defend(trained, config, tmp_path)
    assert "warning: member 0 (seed 0) has outputs that are not finite" in capfd.readouterr().err
    assert "| seed 0 (diverged, in no mean) |" in table and "seed 1 (" not in table
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    assert {(row["seed"], row["stage"]) for row in rows} == {("0", "diverged"), ("1", "trained")}
    figures = ("frr", "far") if method == "strip" else ("anomaly_index", "mask_l1")
    for row in rows:
        assert all((row[name] in ("nan", "")) == (row["seed"] == "0") for name in figures)


@pytest.mark.parametrize("method", ["fine_pruning", "expert_subsets"])
def test_fewer_images_where_memory_is_short(method, trained, tmp_path, monkeypatch, capfd):
    """A run's config decides evaluation.batch_size, and may be a stranger's."""
    config = fine_pruning()
    config.method = method
    config.tune.epochs = 0
    plenty = defend.defend(trained, config, tmp_path / "plenty")
    assert "(evaluation.batch_size)" not in capfd.readouterr().err
    monkeypatch.setattr(memory, "_FITTING", weakref.WeakKeyDictionary())
    monkeypatch.setattr(memory, "device_memory", lambda: 3 * 40 * 16 * 16 * 3)
    assert defend.defend(trained, config, tmp_path / "little") == plenty
    # Clean and triggered images: the model as it is, the pruning curve; and activations.
    told = capfd.readouterr().err.count("(evaluation.batch_size) would take more than")
    assert told == (5 if method == "fine_pruning" else 2)


def test_a_row_of_means_says_how_many_seeds_it_is_of():
    def base(seeds, gone):
        members = [types.SimpleNamespace(seed=seed) for seed in seeds]
        return types.SimpleNamespace(members=members, diverged=np.isin(range(len(seeds)), gone))

    of_4 = base([5, 6, 7, 8], [])
    assert detectors._mean(of_4, []) == "mean ± sd"
    told = detectors._mean(of_4, [{"member": 1, "stage": "diverged"}])
    assert told == "mean ± sd (3 of 4 seeds; seed 6 diverged)"
    # Two rates of two seeds
    assert (
        defend_base.covered(base([5, 6, 5, 6], [0, 3])) == "2 of 4 members; members 0, 3 diverged"
    )
    rows = [{"member": 0, "stage": "pruned"}, *[{"member": 1, "stage": "diverged"}] * 2]
    assert defend_base.covered(base([5, 6], [0]), rows) == "1 of 2 seeds; seed 6 diverged"


def test_a_divergence_in_fine_tuning_is_named_with_its_layer(trained, tmp_path, monkeypatch, capfd):
    """The step of one image, which fine-tuning's own order finds again."""
    original = training.attacked_batch

    def broken(attack, index, images, labels):
        inputs, labels = original(attack, index, images, labels)
        return jnp.where(jnp.any(index == 0), jnp.inf, inputs), labels

    monkeypatch.setattr(training, "attacked_batch", broken)
    config = fine_pruning()
    config.prune.update(rates=(0.0,), curve_rates=())
    config.tune.update(epochs=1, batch_size=11)  # 7 steps, of all 77 images
    defend.defend(trained, config, tmp_path)
    said = [line for line in capfd.readouterr().err.splitlines() if "diverged" in line]
    assert len(said) == 2 and all("first not finite: patch_conv;" in line for line in said)
    (tuned,) = tmp_path.glob("*_then_*")
    logged = RunDirectory(tuned).lines("training.jsonl")
    assert [line["diverged_in"] for line in logged] == ["patch_conv"] * 2
    for line, told in zip(logged, said, strict=True):
        assert f"diverged at step {line['diverged_at']} of fine-tuning" in told


def test_what_is_not_taken_as_it_is_configured_is_noted(trained, tmp_path):
    base = defend_base.load(trained, tmp_path)
    config = fine_pruning()
    assert fine_pruning_lib.notes(base, config) == []
    config.prune.update(images=78, rates=(0.0, 0.01, 0.05, 0.07), curve_rates=(0.0, 0.5))
    config.prune.layers = ("", "patch_conv")
    config.tune.update(batch_size=40, fractions=(1.0, 0.25), data=("clean", "heldout"))
    assert fine_pruning_lib.notes(base, config) == [
        "prune.images=78 is more than there are; all 77 are used",
        "prune.rates: 0.01 (experts/conv, patch_conv), 0.05 (experts/conv, patch_conv), 0.07 "
        "(patch_conv) round to no channel, and prune nothing",
        "tune.batch_size=40 is more than there are images to tune on; batches of all "
        "19 (25 % clean), 19 (100 % heldout), 5 (25 % heldout) are used",
    ]
    config.prune.together = True  # 32 channels: 0.05 of them are one
    assert (
        "0.01 (experts/conv, patch_conv), 0.05 (patch_conv)"
        in fine_pruning_lib.notes(base, config)[1]
    )
    config.prune.update(layers=("",), rates=(0.1, 0.04), curve_rates=(), images=77)
    config.tune.update(epochs=0, data=("contaminated",))
    assert fine_pruning_lib.notes(base, config) == []  # 3 and 1 of them
    config.prune.rates = (0.1, 0.04, 0.06)
    config.quirks.a2_contaminated_clean_set = True
    alike = "prune.rates: 0.04 and 0.06 round"
    assert fine_pruning_lib.notes(base, config)[0].startswith(alike)
    base.members = [dataclasses.replace(m, trigger={"name": "none"}) for m in base.members]
    assert fine_pruning_lib.notes(base, config)[1] == (
        "quirks.a2_contaminated_clean_set concerns squares, and no member has one"
    )
    config.quirks.a2_contaminated_clean_set = False
    assert fine_pruning_lib.notes(base, config) == [
        "nobody attacked these models, so contaminated images are the clean ones",
        "prune.rates: 0.04 and 0.06 round to the same channels in every layer",
    ]
    config = defend_config.default()
    config.method = "strip"
    config.strip.images = 39
    assert detectors.notes(base, config) == [
        "strip.images=39 is more than half of the 77 clean images; 38 are used"
    ]
    config.strip.images = 38
    assert detectors.notes(base, config) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tune.learning_rates": (0.1, 0.10000001)}, "two cells have the name prune_0_then_clean"),
        ({"prune.rates": (0.1, 0.10000001)}, "two cells have the name prune_10:"),
        ({"prune.layers": ("|".join(["experts/conv"] * 20),)}, "and 200 are allowed; write a"),
        ({"tune.parameters": ""}, "no parameter matches ''"),
        ({"method": "strip", "strip.overlays": 2**31 - 1}, "GiB of blended images, and"),
    ],
)
def test_what_only_config_and_run_can_tell(changes, said, trained, tmp_path):
    config = small.with_fields(fine_pruning(), **changes)
    with pytest.raises(PmoeError, match=said) as caught:
        defend.defend(trained, config, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_strip_without_an_image_of_another_class_has_no_far(trained, tmp_path, monkeypatch):
    load = defend_base.Base.held

    def target_only(base, kind):
        images, labels = load(base, kind)
        return images, np.full_like(labels, 1)

    monkeypatch.setattr(defend_base.Base, "held", target_only)
    config = defend_config.default()
    config.method = "strip"
    config.strip.update(images=20, overlays=4)
    defend.defend(trained, config, tmp_path)
    assert {row["far"] for row in csv.DictReader((tmp_path / "strip.csv").open())} <= {"", "nan"}


def test_strip_of_a_source_specific_attack_counts_its_source_class(trained, tmp_path, monkeypatch):
    counted = []

    def rates(calibration, clean, triggered, frr):
        counted.append(len(triggered))
        return {"threshold": 0.0, "frr": 0.0, "far": 0.0}

    load = defend_base.Base.held

    def four_of_the_source(base, kind):
        images, labels = load(base, kind)
        return images, np.where(np.arange(len(labels)) % 5 == 0, 3, 2)

    monkeypatch.setattr(defend_base.Base, "held", four_of_the_source)
    monkeypatch.setattr(defend_base.Base, "source", 3)
    monkeypatch.setattr(detectors.defences, "strip_rates", rates)
    config = defend_config.default()
    config.method = "strip"
    config.strip.update(images=20, overlays=4)
    defend.defend(trained, config, tmp_path)
    source = {int(row["images"]) for row in csv.DictReader((tmp_path / "strip.csv").open())}
    assert source == {20} and len(set(counted)) == 1 and 0 < counted[0] < 10


def test_a_folder_that_another_defence_works_in_is_left_alone(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(detectors.METHODS, "strip", lambda *unused: pytest.fail("defended"))
    config = defend_config.default()
    config.method = "strip"
    with RunDirectory(tmp_path), pytest.raises(PmoeError, match="in use by another process"):
        defend.defend(trained, config, tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([97.25], "97.2"), ([97.25, 3], "97.2, 3.0"), ([94, 98, 96], "96.0 ± 2.0"),
     ([1, 2, np.nan], "")],
)  # fmt: skip
def test_one_or_two_seeds_are_shown_as_they_are(values, text):
    assert defend_base.brief(values) == text


def test_mistakes_of_the_command(trained, defended, tmp_path, capfd):
    def fails(*words):
        assert cli.main(["defend", *map(str, words)]) == 2
        out, err = capfd.readouterr()
        assert not out and err.count("\n") == 1
        return err

    at, new = f"--checkpoint={trained}", f"--workdir={tmp_path / 'new'}"
    assert "--workdir is missing" in fails(at)
    assert "--checkpoint is missing" in fails(f"--workdir={tmp_path}")
    assert "did you mean prune.rates?" in fails(at, "--config.prune.rate=0.3")
    assert "--config=x.py is no file" in fails(at, "--config=x.py")
    run_config = f"--config={CONFIGS.parent / 'digits.py'}"
    assert "is one of 'pmoe train', not of a defence; give" in fails(at, new, run_config)
    assert f"such as {defended[0]}/prune_" in fails(f"--checkpoint={defended[0]}", new)
    assert "'data_dir'" in fails(at, "--data_dir=d", "--config.tune.epochs=2")
    message = "--config.tune.epochs=two is no valid int; allowed: 0 to 100000"
    assert message in fails(at, "--config.tune.epochs=two")
    assert "is the run itself" in fails(at, f"--workdir={trained}")
    assert "another defence" in fails(at, f"--workdir={defended[0]}")
    assert "no layer matches 'head'" in fails(at, new, "--config.prune.layers=('head',)")
    assert "no parameter matches 'rooters/.*'; they are named like routers/kernel" in fails(
        at, new, "--config.tune.parameters=rooters/.*"
    )
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    for held in [], [".lock"]:  # a stranger's folder stays as it was
        for name in held:
            (tmp_path / "full" / name).write_text("theirs")
        assert "is not empty and holds no defence" in fails(at, f"--workdir={tmp_path / 'full'}")
        assert sorted(os.listdir(tmp_path / "full")) == [*held, "notes.txt"]
    assert (tmp_path / "full" / ".lock").read_text() == "theirs"
