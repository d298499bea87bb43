"""Routing analysis: hand-computed statistics and causes, and one whole `pmoe analyze`."""

import csv
import dataclasses
import functools
import itertools
import json
import math
import re
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from locations import ROOT
from scipy import stats

from pmoe_jax import (
    analyze,
    cli,
    models,
    routing,
    routing_arrays,
    routing_output,
    routing_rows,
    triggers,
)
from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.errors import PmoeError


@pytest.fixture(scope="module")
def paper_model():
    """The paper's shapes at width 1."""
    return models.PMoEWideResNet(num_classes=10, width=1)


@pytest.fixture(scope="module")
def small():
    """A model of 2 experts with 4 of 16 patches each, whose routers and experts differ."""
    model = models.PMoEWideResNet(4, width=1, num_experts=2, patches_per_expert=4)
    images = np.random.default_rng(0).uniform(0, 1, (5, 16, 16, 3)).astype(np.float32)
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(1), images))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), abstract
    )
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf**2 + 0.5, variables["batch_stats"])
    # No class above the others on average: which one is seen depends on what the experts do.
    logits = jax.jit(model.apply)(variables, images)
    bias = variables["params"]["classifier"]["bias"]
    variables["params"]["classifier"]["bias"] = bias - np.asarray(logits).mean(0)
    return model, variables, images


class TestPatchView:
    def test_nominal_patches_are_4x4_blocks(self, paper_model):
        view = routing.nominal(paper_model, (32, 32, 3))
        assert view.grid == (8, 8)
        for axis in view:
            assert [np.flatnonzero(line).tolist() for line in axis] == [
                list(range(4 * i, 4 * i + 4)) for i in range(8)
            ]

    def test_receptive_field_is_17_pixels_from_4i_minus_5(self, paper_model):
        """Position i of the 8x8 grid sees pixels 4i - 5 to 4i + 11 through all convolutions."""
        view = routing.receptive_field(paper_model, (32, 32, 3))
        for axis in view:
            assert [np.flatnonzero(line).tolist() for line in axis] == [
                [p for p in range(4 * i - 5, 4 * i + 12) if 0 <= p < 32] for i in range(8)
            ]

    def test_receptive_field_equals_where_gradients_flow(self, small):
        model, variables, _ = small
        view = routing.receptive_field(model, (16, 20, 3))
        assert view.grid == (4, 5)
        image = np.random.default_rng(2).uniform(0, 1, (1, 16, 20, 3)).astype(np.float32)

        @jax.jit
        def gradient(position):
            def one(image):
                features = routing._features(model, variables, image)[0]
                return (features[position[0], position[1]] ** 2).sum()

            return jnp.abs(jax.grad(one)(image)).sum((0, -1)) > 0

        for i, j in ((0, 0), (1, 2), (3, 4)):
            expected = view.rows[i][:, None] & view.cols[j]
            np.testing.assert_array_equal(gradient(jnp.array([i, j])), expected)

    def test_the_corner_square_is_one_nominal_patch_and_reaches_nine(self, paper_model):
        shape = (32, 32, 3)
        square = triggers.make("square", jax.random.key(0), shape)
        pixels = jax.jit(routing.changed_pixels)(square)
        expected = np.zeros((32, 32), bool)
        expected[:4, :4] = True
        np.testing.assert_array_equal(pixels, expected)
        nominal = routing.nominal(paper_model, shape).touched(pixels)
        assert np.flatnonzero(nominal).tolist() == [0]
        field = routing.receptive_field(paper_model, shape).touched(pixels)
        assert np.flatnonzero(field).tolist() == [0, 1, 2, 8, 9, 10, 16, 17, 18]

    @pytest.mark.parametrize("name", ["none", "blend", "warp"])
    def test_changed_pixels_of_other_triggers(self, name):
        trigger = triggers.make(name, jax.random.key(0), (16, 16, 3))
        changed = np.asarray(jax.jit(routing.changed_pixels)(trigger))
        if name == "warp":  # a displacement may be nil here and there
            assert changed.mean() > 0.8
        else:
            assert changed.all() == (name == "blend") == changed.any()


class TestSelection:
    """Two images, two experts that take 2 of 4 patches: worked out by hand."""

    INDICES = np.array([[[0, 1], [1, 2]], [[3, 0], [2, 1]]])

    def test_mask(self):
        expected = [[[1, 1, 0, 0], [0, 1, 1, 0]], [[1, 0, 0, 1], [0, 1, 1, 0]]]
        np.testing.assert_array_equal(routing.selection_mask(self.INDICES, 4), expected)

    def test_frequency(self):
        overall, by_class = routing.frequency(self.INDICES, np.array([1, 0]), 4, 3)
        np.testing.assert_allclose(overall, [[1, 0.5, 0, 0.5], [0, 1, 1, 0]])
        np.testing.assert_allclose(by_class[0], [[1, 0, 0, 1], [0, 1, 1, 0]])
        np.testing.assert_allclose(by_class[1], [[1, 1, 0, 0], [0, 1, 1, 0]])
        assert np.isnan(by_class[2]).all()

    def test_entropy(self):
        # 1/2, 1/4, 1/4: 0.5 + 0.5 + 0.5 bits; two alike: 1 bit; a single one: 0.
        shares = [[1, 0.5, 0, 0.5], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
        np.testing.assert_allclose(routing.entropy_bits(shares), [1.5, 1, 0, 2], atol=1e-6)

    def test_iou(self):
        a, b = np.array([[0, 1], [0, 1], [0, 1]]), np.array([[1, 0], [1, 2], [2, 3]])
        np.testing.assert_allclose(routing.iou(a, b, 4), [1, 1 / 3, 0], rtol=1e-6)

    def test_overlap_between_experts(self):
        # Image 0: {0,1} and {1,2} share 1 of 3; image 1: {0,3} and {1,2} share none.
        expected = [[1, 1 / 6], [1 / 6, 1]]
        np.testing.assert_allclose(routing.overlap(self.INDICES, 4), expected, rtol=1e-6)

    def test_unused(self):
        # Image 0 leaves patch 3 of 4, image 1 none.
        np.testing.assert_allclose(routing.unused(self.INDICES, 4), 1 / 8)

    def test_vmaps_over_members(self):
        stacked = np.stack([self.INDICES, self.INDICES[::-1, ::-1]])
        got = jax.jit(jax.vmap(lambda i: routing.overlap(i, 4)))(stacked)
        np.testing.assert_allclose(got[1], routing.overlap(stacked[1], 4), rtol=1e-6)

    def test_captured_change(self):
        change = np.array([[1.0, 3, 0, 4], [0, 0, 2, 2]])
        expected = [[4 / 8, 3 / 8], [2 / 4, 2 / 4]]
        np.testing.assert_allclose(routing.captured_change(self.INDICES, change), expected)

    def test_mean_over_selected(self):
        values = np.array([[0.0, 1, 2, 3], [4, 5, 6, 7]])
        expected = [[0.5, 1.5], [5.5, 5.5]]
        np.testing.assert_allclose(routing.mean_over_selected(self.INDICES, values), expected)


class TestCapture:
    def test_by_hand(self):
        # T = {0, 3}. Expert 0 takes one of it, then both; expert 1 none, then none.
        found = routing.capture(TestSelection.INDICES, np.array([1, 0, 0, 1], bool))
        np.testing.assert_allclose(found.share, [0.75, 0])
        np.testing.assert_allclose(found.expert, [1, 0])
        assert (found.any_expert, found.all_experts) == (1, 0)
        # T = {2}: expert 0 never, expert 1 always; nobody together.
        found = routing.capture(TestSelection.INDICES, np.array([0, 0, 1, 0], bool))
        np.testing.assert_allclose(found.share, [0, 1])
        # T = {1}: image 0 by both, image 1 by expert 1 alone.
        found = routing.capture(TestSelection.INDICES, np.array([0, 1, 0, 0], bool))
        np.testing.assert_allclose(found.expert, [0.5, 1])
        assert (found.any_expert, found.all_experts) == (1, 0.5)

    def test_chance_of_one_patch_is_k_of_p(self):
        chance = routing.chance_capture(1, 64, 16, 4)
        np.testing.assert_allclose(chance.share, [0.25] * 4)
        np.testing.assert_allclose(chance.expert, [0.25] * 4)
        assert chance.any_expert == pytest.approx(1 - 0.75**4)
        assert chance.all_experts == pytest.approx(0.25**4)

    def test_chance_equals_counting_all_draws(self):
        draws = list(itertools.combinations(range(6), 2))
        for size in range(7):
            hits = np.mean([any(patch < size for patch in draw) for draw in draws])
            chance = routing.chance_capture(size, 6, 2, 3)
            np.testing.assert_allclose(chance.expert, hits, atol=1e-12)
            assert math.isnan(chance.share[0]) == (size == 0)


class TestPatchValues:
    def test_by_hand(self, paper_model):
        view = routing.nominal(paper_model, (8, 8, 3))
        image = np.zeros((1, 8, 8, 3), np.float32)
        image[0, :4, :4] = 1.0  # patch 0 white
        image[0, :4, 4:, 0] = 0.5  # patch 1 half red
        image[0, 4:, 4:6] = 1.0  # patch 3: two white columns of four
        names = list(routing.quantities(3, 16))
        got = np.asarray(jax.jit(lambda x: routing.patch_values(x, view))(image))[0]
        table = {name: got[:, i] for i, name in enumerate(names)}
        np.testing.assert_allclose(table["sum"], [48, 8, 0, 24], atol=1e-5)
        np.testing.assert_allclose(table["red"], [1, 0.5, 0, 0.5], atol=1e-6)
        np.testing.assert_allclose(table["blue"], [1, 0, 0, 0.5], atol=1e-6)
        np.testing.assert_allclose(table["luminance"], [1, 0.1495, 0, 0.5], atol=1e-6)
        np.testing.assert_allclose(table["contrast"], [0, 0, 0, 0.5], atol=1e-6)
        # Patch 2, black, sees white to the right of its last column and above its first row:
        # column 3 has horizontal gradient 0.5, row 4 vertical gradient 0.5; both meet once.
        expected = (3 * 0.5 + 3 * 0.5 + math.sqrt(0.5)) / 16
        np.testing.assert_allclose(table["edges"][2], expected, atol=1e-6)

    def test_quantities_are_within_their_ranges(self, paper_model):
        noise = np.random.default_rng(0).integers(0, 2, (20, 8, 8, 3)).astype(np.float32)
        view = routing.nominal(paper_model, (8, 8, 3))
        measure = jax.jit(lambda x: routing.patch_values(x, view))
        got = measure(noise)
        largest = np.array(list(routing.quantities(3, 16).values()))
        assert got.shape == (20, 4, len(largest))
        assert (got >= 0).all() and (got <= largest + 1e-5).all()
        grey = measure(noise[..., :1])
        assert grey.shape == (20, 4, len(routing.quantities(1, 16)))

    def test_inside_boxes(self, paper_model):
        view = routing.nominal(paper_model, (8, 8, 3))
        boxes = np.array([[0, 0, 8, 4], [2, 1.5, 4, 8], [0, 0, 0, 0]], np.float32)
        got = routing.inside_boxes(boxes, view)
        # The second covers columns 2-3 and rows 1.5-8: 2 * 2.5 of 16 pixels, then 2 * 4 of 16.
        np.testing.assert_allclose(got[:2], [[1, 1, 0, 0], [5 / 16, 0, 0.5, 0]])
        assert np.isnan(got[2]).all()


class TestShapley:
    def test_shares_sum_to_the_total(self):
        values = np.random.default_rng(0).uniform(0, 100, (3, 16))
        shares = routing.shapley(values)
        np.testing.assert_allclose(shares.sum(-1), values[:, 15] - values[:, 0])

    def test_two_experts_by_hand(self):
        # none 0, expert 0 alone 60, expert 1 alone 20, both 100: (60 + 80) / 2, (20 + 40) / 2.
        np.testing.assert_allclose(routing.shapley([0, 60, 20, 100]), [70, 30])

    def test_equals_the_mean_over_all_orders(self):
        values = np.random.default_rng(1).normal(size=16)
        expected = np.zeros(4)
        for order in itertools.permutations(range(4)):
            kept = 0
            for expert in order:
                expected[expert] += (values[kept | 1 << expert] - values[kept]) / 24
                kept |= 1 << expert
        np.testing.assert_allclose(routing.shapley(values), expected)

    def test_one_sufficient_expert_gets_all(self):
        kept = routing.subsets(4)
        np.testing.assert_allclose(routing.shapley(100.0 * kept[:, 2]), [0, 0, 100, 0], atol=1e-9)

    def test_too_many_experts_and_odd_lengths_are_errors(self):
        with pytest.raises(PmoeError, match="up to 6"):
            routing.subsets(7)
        with pytest.raises(PmoeError, match="one for each subset"):
            routing.shapley(np.zeros(12))


def test_swap_shares():
    # Routing alone lifts 10 to 30 and, on triggered features, 70 to 90: 20 and 20.
    shares = routing.swap_shares(10, 90, 70, 30)
    assert (shares.routing, shares.computation) == (20, 60)
    with_interaction = routing.swap_shares(0, 100, 0, 0)
    assert (with_interaction.routing, with_interaction.computation) == (50, 50)


class TestForcing:
    def _routing(self):
        logits = jnp.log(jnp.array([[[0.1, 0.4, 0.2, 0.3], [0.25, 0.15, 0.35, 0.25]]]))
        return models.Routing(logits, *reversed(jax.lax.top_k(jax.nn.softmax(logits), 2)))

    def test_in_and_out(self):
        own = self._routing()
        patches = jnp.array([True, False, False, False])
        indices, gates = routing.force(own, patches, True)
        np.testing.assert_array_equal(indices, [[[0, 1], [0, 2]]])
        np.testing.assert_allclose(gates, [[[0.1, 0.4], [0.25, 0.35]]], rtol=1e-6)
        indices, gates = routing.force(own, patches, False)
        np.testing.assert_array_equal(indices, [[[1, 3], [2, 3]]])
        np.testing.assert_allclose(gates, [[[0.4, 0.3], [0.35, 0.25]]], rtol=1e-6)

    def test_of_many_patches_the_best_are_taken(self):
        indices, _ = routing.force(self._routing(), jnp.array([True, False, True, True]), True)
        np.testing.assert_array_equal(indices, [[[3, 2], [2, 0]]])  # ties: the first one

    def test_nothing_forced_is_the_routers_own_choice(self):
        own = self._routing()
        for take in (True, False):
            indices, gates = routing.force(own, jnp.zeros(4, bool), take)
            np.testing.assert_array_equal(indices, own.indices)
            np.testing.assert_array_equal(gates, own.gates)


class TestObserve:
    """The model program: what it reports equals the model's plain calls, one by one."""

    @pytest.fixture(scope="class")
    @classmethod
    def seen(cls, small):
        model, variables, images = small
        trigger = triggers.make("square", jax.random.key(0), (16, 16, 3), size=6)
        patches = jnp.arange(16) < 2, jnp.arange(16) < 9
        program = jax.jit(routing.observe, static_argnums=0)
        found = program(model, variables, images, trigger, *patches)
        triggered = triggers.apply(images, trigger)

        @functools.partial(jax.jit, static_argnames="silence")
        def apply(inputs, routing=None, mask=None, silence="zero"):
            return model.apply(
                variables, inputs, return_routing=True, routing=routing, expert_mask=mask,
                silence=silence,
            )  # fmt: skip

        return found, (images, triggered), patches, apply

    def test_routing_and_predictions(self, seen):
        found, inputs, _, apply = seen
        for condition, images in enumerate(inputs):
            logits, used = apply(images)
            np.testing.assert_array_equal(found["predicted"][condition], logits.argmax(-1))
            np.testing.assert_array_equal(found["indices"][condition], used.indices)
            np.testing.assert_allclose(found["gates"][condition], used.gates, rtol=1e-5)

    def test_forced_to_its_own_value_changes_no_bit(self, seen):
        _, inputs, _, apply = seen
        for images in inputs:
            logits, used = apply(images)
            own = (used.indices, routing.gates_at(used.logits, used.indices))
            np.testing.assert_array_equal(apply(images, own)[0], logits)
            nothing = routing.force(used, jnp.zeros(16, bool), True)
            for forced in (used, used.indices, nothing):
                np.testing.assert_array_equal(apply(images, forced)[0], logits)

    def test_the_whole_program_with_the_own_routing_changes_no_prediction(self, small):
        """Without a change in the image, the other condition's routing is the image's own."""
        model, variables, images = small
        nothing = triggers.make("none", jax.random.key(0), (16, 16, 3))
        program = jax.jit(routing.observe, static_argnums=0)
        seen = program(model, variables, images, nothing, *[jnp.zeros(16, bool)] * 2)
        assert len(set(seen["predicted"][0].tolist())) > 1
        for condition, forcing in itertools.product(range(2), range(len(routing.FORCINGS))):
            own = seen["predicted"][condition]
            np.testing.assert_array_equal(seen["forced"][condition, forcing], own)

    def test_forcings(self, seen):
        found, inputs, (nominal, field), apply = seen
        used = [apply(images)[1] for images in inputs]
        for condition, images in enumerate(inputs):
            own, other = used[condition], used[1 - condition]
            expected = {
                "other_routing": (other.indices, other.gates),
                "other_patches": other.indices,
                "nominal_in": routing.force(own, nominal, True),
                "nominal_out": routing.force(own, nominal, False),
                "field_in": routing.force(own, field, True),
                "field_out": routing.force(own, field, False),
            }
            assert tuple(expected) == routing.FORCINGS
            for row, chosen in zip(found["forced"][condition], expected.values(), strict=True):
                np.testing.assert_array_equal(row, apply(images, chosen)[0].argmax(-1))
        # Not one and the same answer throughout, which any program would give.
        assert len({tuple(row) for row in found["forced"].reshape(-1, 5).tolist()}) > 3

    def test_silenced_subsets(self, seen):
        found, inputs, _, apply = seen
        assert found["silenced"].shape == (2, 2, 4, 5)
        for condition, mode, subset in itertools.product(range(2), range(2), range(4)):
            mask = jnp.array([subset & 1, subset >> 1])
            logits, _ = apply(inputs[condition], mask=mask, silence=("zero", "mean")[mode])
            got = found["silenced"][condition, mode, subset]
            np.testing.assert_array_equal(got, logits.argmax(-1))
        assert len({tuple(row) for row in found["silenced"].reshape(-1, 5).tolist()}) > 3


class TestValues:
    """Histograms of patch values, and their distances."""

    def test_histograms_count_taken_and_all_patches_by_group(self):
        # One condition and member, 2 images, 1 expert that takes 1 of 2 patches, 2 quantities.
        counts = routing_arrays._Counts(2, None)
        bins = np.array([[[5, 7], [6, 8]], [[5, 9], [5, 9]]], np.uint8)[None, None]
        counts.add(3, np.array([[[1]], [[0]]])[None, None], bins)
        taken, every = counts.arrays().values()
        assert taken.shape == (1, 1, routing_arrays.GROUPS, 1, 2, 256)
        found = sorted(zip(*(axis.tolist() for axis in np.nonzero(taken)), strict=True))
        assert found == [
            (0, 0, 3, 0, 0, 6),
            (0, 0, 3, 0, 1, 8),
            (0, 0, 4, 0, 0, 5),
            (0, 0, 4, 0, 1, 9),
        ]
        assert every[0, 0, 4, 0, 5] == 2 and every.sum() == 8

    def test_a_single_image_alone_counts(self):
        counts = routing_arrays._Counts(1, 4)
        for start in (0, 3):
            bins = np.full((1, 1, 3, 2, 1), start, np.uint8)
            counts.add(start, np.zeros((1, 1, 3, 1, 1), int), bins)
        every = counts.arrays()["value_baseline"]
        assert every.sum() == 2 and every[0, 0, 4, 0, 3] == 2

    def test_distance_and_its_interval(self, tiny_members):
        """Against SciPy on the samples themselves: equal to a bin's width."""
        rng = np.random.default_rng(0)
        values = rng.uniform(0, 1, (400, 8))  # images, patches
        order = np.argsort(values, 1)[:, None, -2:]  # the expert prefers bright patches
        bins = (values * 256).astype(np.uint8)[None, None, ..., None]
        counts = routing_arrays._Counts(1, None)
        counts.add(0, order[None, None], bins)
        arrays = {
            "value_edges": np.linspace(0, 1, 257)[None], "quantities": np.array(["luminance"]),
            "conditions": np.array(["clean"]), **counts.arrays(),
        }  # fmt: skip
        rows = routing_rows._Rows({"stage": "trained"}, tiny_members, np.zeros(1, bool), 400)
        routing_rows._value_rows(rows, arrays, 400)
        distance, shift = rows.rows
        taken = np.take_along_axis(values, order[:, 0], 1).ravel()
        expected = stats.wasserstein_distance(taken, values.ravel()) / values.std()
        assert distance["value"] == pytest.approx(expected, abs=0.01)
        assert distance["low"] < distance["value"] < distance["high"]
        assert distance["high"] - distance["low"] < 0.1
        expected = (taken.mean() - values.mean()) / values.std()
        assert shift["value"] == pytest.approx(expected, abs=0.01)


class TestRows:
    """Rows of 4 images (one of the target class 0), 2 experts that take 2 of 4 patches, by hand."""

    @pytest.fixture
    def rows(self, tiny_config, tiny_members):
        triggered = [[[0, 1], [2, 3]], [[0, 3], [0, 1]], [[2, 3], [1, 2]], [[1, 2], [3, 1]]]
        clean = [[[2, 3], [2, 3]]] * 4
        predicted = {"clean": [1, 1, 2, 0], "triggered": [0, 0, 2, 0]}
        forced = np.full((2, 1, 6, 4), 3)
        forced[0, 0, 0] = [1, 0, 2, 0]  # clean images with the triggered routing: 1 of 3
        forced[1, 0, 0] = [1, 1, 2, 0]  # triggered images with the clean routing: none
        silenced = np.full((2, 1, 2, 4, 4), 3)
        silenced[1, 0, 0] = [[1, 1, 1, 1], [0, 1, 2, 0], [1, 1, 2, 0], [0, 0, 2, 0]]
        arrays = {
            "seed": np.array([0]), "label": np.array([1, 1, 2, 0]), "grid": np.array([2, 2]),
            "conditions": np.array(routing.CONDITIONS),
            "indices": np.array([[clean], [triggered]], np.uint8),
            "predicted": np.array(list(predicted.values()), np.int16)[:, None],
            "nominal_patches": np.array([[True, False, False, False]]),
            "field_patches": np.array([[True, True, False, False]]),
            "iou": np.array([[[1, 0], [0.5, 0], [0, 0], [0.5, 1]]], np.float32),
            "captured_change": np.full((2, 1, 4, 2), 0.5, np.float32),
            "entropy_bits": np.ones((2, 1, 2)), "overlap": np.ones((2, 1, 2, 2)),
            "unused": np.zeros((2, 1)),
            "forcings": np.array(routing.FORCINGS), "forced_predicted": forced,
            "silences": np.array(models.SILENCE_MODES), "silenced_predicted": silenced,
            "kept_experts": routing.subsets(2),
        }  # fmt: skip
        rows = routing_rows._Rows({"stage": "trained"}, tiny_members, np.zeros(1, bool), 4)
        routing_rows._selection_rows(rows, arrays, tiny_members)
        routing_rows._prediction_rows(rows, arrays, tiny_config, tiny_members)
        return {(r["metric"], r["condition"], r["expert"]): r["value"] for r in rows.rows}

    def test_capture(self, rows):
        expected = {
            "nominal": {("", 0): 50, ("", 1): 25, ("/any", ""): 50, ("/all", ""): 25,
                        ("/share", 0): 50, ("/share", 1): 25},
            "field": {("", 0): 75, ("", 1): 75, ("/any", ""): 100, ("/all", ""): 50,
                      ("/share", 0): 50, ("/share", 1): 50},
        }  # fmt: skip
        for extent, values in expected.items():
            for (kind, expert), value in values.items():
                name = f"capture/{extent}{kind}"
                assert rows[name, "triggered", expert] == pytest.approx(value), name
                assert rows[name, "clean", expert] == 0
        assert rows["capture/nominal/any", "chance", ""] == pytest.approx(75)
        assert rows["capture/nominal/all", "chance", ""] == pytest.approx(25)

    def test_iou(self, rows):
        assert (rows["iou", "both", 0], rows["iou", "both", 1]) == (50, 25)

    def test_target_rates_leave_the_target_class_out(self, rows):
        assert rows["target_rate", "clean", ""] == 0
        assert rows["target_rate", "triggered", ""] == pytest.approx(200 / 3)
        assert rows["accuracy", "triggered", ""] == 50
        assert rows["target_rate/other_routing", "clean", ""] == pytest.approx(100 / 3)
        assert rows["target_rate/other_routing", "triggered", ""] == 0

    def test_swap(self, rows):
        # Routing lifts 0 to 1/3 alone and 0 to 2/3 on triggered features; features 0 and 1/3.
        assert rows["swap/routing", "both", ""] == pytest.approx(50)
        assert rows["swap/computation", "both", ""] == pytest.approx(50 / 3)

    def test_shapley(self, rows):
        # Expert 0 adds 1/3 to nobody and 2/3 to expert 1; expert 1 adds 0 and 1/3.
        assert rows["shapley/target_rate/zero", "triggered", 0] == pytest.approx(50)
        assert rows["shapley/target_rate/zero", "triggered", 1] == pytest.approx(50 / 3)
        assert rows["shapley/target_rate/mean", "triggered", 0] == 0


@pytest.fixture
def tiny_members(tiny_config):
    tiny_config.num_seeds = 1
    return members_lib.from_config(tiny_config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_arrays):
    """A tiny trained run with a square trigger (both epochs saved), and its clean counterpart."""
    folder = tmp_path_factory.mktemp("routing")
    config = config_lib.default()
    config.data.name = "npz"
    config.data.source = "given to every call instead"
    config.data.image_size = 16
    config.num_seeds = 2
    config.model.width = 1
    config.model.num_experts = 2
    config.model.patches_per_expert = 4
    config.model.bn_momentum = 0.9
    config.train.epochs = 2
    config.train.batch_size = 16
    config.evaluation.batch_size = 24  # the last batch of 40 images is filled up
    config.checkpoint.keep_every_epochs = 1
    (train_images, train_labels), (test_images, test_labels) = tiny_arrays
    boxes = np.tile(np.array([[4.0, 4, 12, 12]], np.float32), (40, 1))
    boxes[0] = 0
    data = dataset_lib.make("tiny", (train_images, train_labels), (test_images, test_labels))
    data = dataclasses.replace(data, test_boxes=boxes)
    run_lib.train(config, folder / "clean", dataset=data, progress=False)
    config.trigger.name = "square"
    config.poison.rate = 0.25
    run_lib.train(config, folder / "square", dataset=data, progress=False)
    # What a defence leaves need not be known here, only that it is another model.
    shutil.copytree(folder / "clean", folder / "defended")
    shutil.copytree(folder / "square", folder / "other")
    return folder, data


@pytest.fixture(scope="module")
def analysed(runs):
    folder, data = runs
    found = analyze.analyze(
        folder / "square", clean=folder / "clean", defended=folder / "defended",
        others=[folder / "other"], shown=[3, 1], every_epoch=True, dataset=data,
    )  # fmt: skip
    paths = routing_output.write(found, folder / "out" / "routing.npz")
    return found, paths


class TestAnalyze:
    """A tiny trained run from beginning to end."""

    def test_arrays_are_as_the_schema_says(self, analysed):
        _, paths = analysed
        size = dict(D=2, M=2, N=40, E=2, K=4, P=16, L=4, S=4, V=6, Q=7, T=2, H=16, W=16, h=4, w=4)
        size["BINS"] = 256
        with np.load(paths[0]) as stored:
            assert stored.keys() >= routing_arrays.SCHEMA.keys() - {"selection_of_image"}
            for name, array in stored.items():
                base = re.sub("^(clean|defended)_model_", "", name)
                described = routing_arrays.SCHEMA[base]
                kind, axes = re.match(r"(\w+) \[(.*?)\]", described).groups()
                expected = tuple(eval(axis, {}, size) for axis in axes.split(", "))
                assert array.shape == expected, name
                assert array.dtype.name.startswith({"text": "str"}.get(kind, kind)), name

    def test_the_documentation_has_every_array_with_its_axes(self):
        text = (ROOT / "docs" / "routing.md").read_text()
        for name, described in routing_arrays.SCHEMA.items():
            axes = described.partition("]")[0].replace("BINS + 1", "257").replace("BINS", "256")
            assert f"| `{name}` | {axes}] |" in text, name

    def test_figures_of_evaluation_are_found_again(self, analysed, runs):
        found, _ = analysed
        recorded = run_lib.RunDirectory(runs[0] / "square").rows()
        names = {"ba": ("accuracy", "clean"), "asr": ("target_rate", "triggered")}
        for row in recorded:
            if row["metric"] in names:
                key = (*names[row["metric"]], row["epoch"], row["seed"])
                value, = [
                    r["value"] for r in found.rows if r["run"] == "square"
                    and (r["metric"], r["condition"], r["epoch"], r["seed"]) == key
                ]  # fmt: skip
                assert value == pytest.approx(row["value"])

    def test_selection_rows_follow_from_the_stored_arrays(self, analysed):
        found, paths = analysed
        arrays = np.load(paths[0])
        assert np.flatnonzero(arrays["nominal_patches"][0]).tolist() == [0]
        indices = arrays["indices"].astype(int)
        for d, condition in enumerate(("clean", "triggered")):
            for m in range(2):
                hit = (indices[d, m] == 0).any(-1)  # [N, E]
                of_expert = pytest.approx(100 * hit[:, 1].mean())
                assert _value(found, "capture/nominal", condition, m, 1) == of_expert
                some = pytest.approx(100 * hit.any(1).mean())
                assert _value(found, "capture/nominal/any", condition, m) == some
        sets = [[set(indices[d, 1, n, 0].tolist()) for n in range(40)] for d in range(2)]
        iou = np.mean([len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)])
        assert _value(found, "iou", "both", 1, 0) == pytest.approx(100 * iou, rel=1e-5)
        assert _value(found, "capture/nominal/any", "chance", 0) == pytest.approx(43.75)
        np.testing.assert_array_equal(arrays["frequency_by_epoch"][-1], arrays["frequency"])

    def test_shapley_shares_and_swap_shares_sum_to_the_total(self, analysed):
        found, _ = analysed
        for m, mode in itertools.product(range(2), ("zero", "mean")):
            name = f"target_rate/silence_{mode}/kept_"
            total = _value(found, f"{name}11", "triggered", m)
            total -= _value(found, f"{name}00", "triggered", m)
            assert _value(found, f"{name}11", "triggered", m) == pytest.approx(
                _value(found, "target_rate", "triggered", m)
            )
            shares = [
                _value(found, f"shapley/target_rate/{mode}", "triggered", m, e) for e in range(2)
            ]
            assert sum(shares) == pytest.approx(total)
            parts = [
                _value(found, f"swap/{part}", "both", m) for part in ("routing", "computation")
            ]
            rise = _value(found, "target_rate", "triggered", m)
            rise -= _value(found, "target_rate", "clean", m)
            assert sum(parts) == pytest.approx(rise)

    def test_object_share(self, analysed):
        """The box covers the four patches in the middle; image 0 has none."""
        _, paths = analysed
        arrays = np.load(paths[0])
        inside = np.isin(arrays["indices"][0], [5, 6, 9, 10]).mean(-1)  # [M, N, E]
        use = (arrays["label"] == 0) & (np.arange(40) > 0)
        np.testing.assert_allclose(
            arrays["object_share"][0, :, 0], inside[:, use].mean(1), rtol=1e-6
        )
        np.testing.assert_allclose(arrays["object_baseline"], 0.25)

    def test_summary_and_rows_on_disk(self, analysed):
        found, paths = analysed
        with open(paths[1]) as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(found.rows) and tuple(rows[0]) == routing_rows.FIELDS
        summary = json.loads(paths[2].read_text())["summary"]
        asr, = [
            s for s in summary if s["metric"] == "target_rate" and s["condition"] == "triggered"
            and s["run"] == "square" and s["epoch"] == 2
        ]  # fmt: skip
        values = [_value(found, "target_rate", "triggered", m) for m in range(2)]
        assert asr["n"] == 2 and asr["mean"] == pytest.approx(np.mean(values))
        assert asr["sd"] == pytest.approx(np.std(values, ddof=1))
        assert {row["run"] for row in rows} == {"square", "clean", "defended"}
        assert "ASR" in routing_output.table(found)

    def test_models_beside_it(self, analysed):
        """The clean model and the (equal) defended one; the other run on the shown images."""
        found, _ = analysed
        arrays = found.arrays
        np.testing.assert_array_equal(
            arrays["clean_model_indices"], arrays["defended_model_indices"]
        )
        assert (arrays["clean_model_indices"] != arrays["indices"]).any()
        assert "clean_model_label" not in arrays  # equal arrays are not stored twice
        (other,) = found.others
        np.testing.assert_array_equal(other.arrays["indices"], arrays["indices"][:, :, [3, 1]])
        assert found.scales.keys() == set(routing_arrays.PREFIXES)

    def test_figures_with_their_numbers(self, analysed, tmp_path):
        from pmoe_jax import figures_paper, figures_routing

        found = analysed[0]
        square = jax.tree.map(lambda leaf: leaf[0], found.trigger)
        strip = figures_paper.Strip(found.dataset, [3, 1], {"square": square})
        written = figures_routing.write_all(
            found, tmp_path, [3, 1], strips=[strip], trigger_labels={"square": "square"}
        )
        assert {path.stem for path in written} == {
            "figure1_architecture", "figure2_triggers", "figure5_patch_values", "atlas_frequency",
            "causes", "causes_subsets", "by_epoch",
            *(f"{name}_seed{seed}" for seed in (0, 1) for name in (
                "figure3_patch_maps", "figure4_clean_maps", "figure6_before_after", "atlas_classes",
            )),
        }  # fmt: skip
        for path in written:
            assert path.stat().st_size > 5000 and path.with_suffix(".pdf").exists()
            assert path.with_suffix(".csv").exists() or path.with_suffix(".npz").exists()
        maps = np.load(tmp_path / "figure3_patch_maps_seed1.npz")
        # Clean and attacked model on the image as it is and triggered, and the other run.
        assert maps["times"].shape == (5, 2, 16) and (maps["times"].sum(-1) == 4).all()
        np.testing.assert_array_equal(maps["gates"][3], maps["gates"][4])
        taken = found.arrays["indices"][1, 1, 3, 0].tolist()
        assert sorted(taken) == np.flatnonzero(maps["times"][3, 0]).tolist()
        pictures = np.load(tmp_path / "figure2_triggers.npz")
        assert pictures["row_0"].shape == (2, 16, 16, 3)
        assert (pictures["row_0"][1, :4, :4] == 0).all()
        layers = dict(
            line.split(",")[:2]
            for line in (tmp_path / "figure1_architecture.csv").read_text().splitlines()
        )
        assert layers["stem"] == "16x16x16" and layers["group2"] == "8x8x32"

    def test_command_with_quirk_a4(self, runs, tmp_path, capsys):
        """One image's values, maps summed over the saved epochs, no causes."""
        folder, data = runs
        np.savez(
            tmp_path / "tiny.npz",
            train_images=data.train_images, train_labels=data.train_labels,
            test_images=data.test_images, test_labels=data.test_labels,
        )  # fmt: skip
        out = tmp_path / "routing.npz"
        args = [f"--checkpoint={folder / 'square'}", f"--data={tmp_path / 'tiny.npz'}"]
        args += [f"--output={out}", f"--figures={tmp_path / 'figures'}", "--images=2,3"]
        args += ["--every_epoch", "--nocauses", "--noprogress", "--quirks.a4_single_image=True"]
        assert cli.main(["analyze", *args]) == 0
        assert "trigger's own patches" in capsys.readouterr().out
        arrays = np.load(out)
        assert arrays["value_baseline"][0, 0, 0].sum() == 16  # the patches of a single image
        assert "silenced_predicted" not in arrays
        maps = np.load(tmp_path / "figures" / "figure3_patch_maps_seed0.npz")
        assert maps["times"].sum() == 2 * 2 * 2 * 4  # images, epochs, experts, patches

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ([], "--checkpoint is missing"),
            (["--checkpoint={run}", "--output=routing.csv"], "must end in .npz"),
            (["--checkpoint={run}", "--images=a"], "--images=a must be whole numbers"),
            (["--checkpoint={run}", "more"], "unexpected word"),
            (["--checkpoint={run}/nowhere"], "does not exist"),
            (["--checkpoint={run}", "--more_data=gtsrb"], "must be NAME=SOURCE"),
        ],
    )
    def test_mistakes_are_one_line(self, runs, capsys, args, said):
        code = cli.main(["analyze", *(arg.format(run=runs[0] / "square") for arg in args)])
        assert code == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1

    def test_dense_models_have_no_routing(self, runs):
        config = config_lib.default()
        config.model.name = "wide_resnet"
        with pytest.raises(PmoeError, match="no routers"):
            analyze._check_model(config, True)


class TestCollect:
    """`experiments/collect_routing.py`."""

    @pytest.fixture(scope="class")
    @classmethod
    def script(cls):
        return runpy.run_path(str(ROOT / "experiments" / "collect_routing.py"))

    def test_experts_first_then_seeds(self, script):
        def row(member, expert, value, epoch="2", metric="iou", stage="trained"):
            return {
                "run": "a", "member": member, "epoch": epoch, "stage": stage, "metric": metric,
                "condition": "both" if metric == "iou" else "triggered", "expert": expert,
                "value": value, "unit": "%", "dataset": "tiny", "width": "1", "trigger": "square",
                "rate": "0.1",
            }  # fmt: skip

        rows = [row("0", "0", "10"), row("0", "1", "20"), row("1", "0", "30"), row("1", "1", "50")]
        rows += [row("0", "0", "99", epoch="1"), row("2", "0", "99", stage="diverged")]
        shapley = (("0", "0", "90"), ("0", "1", "5"), ("1", "0", "-5"), ("1", "1", "70"))
        rows += [row(*each, metric="shapley/target_rate/zero") for each in shapley]
        lines = {line["figure"]: line for line in script["collect"]("a", rows)}
        assert lines.keys() == {"iou", "shapley_largest", "shapley_smallest"}
        assert (lines["iou"]["mean"], lines["iou"]["n"]) == (27.5, 2)  # of 15 and 40
        assert lines["iou"]["sd"] == pytest.approx(25 / 2**0.5)
        assert lines["shapley_largest"]["mean"] == 80 and lines["shapley_smallest"]["mean"] == 0
        assert "80.0 ± 14.1" in script["table"](list(lines.values()))

    def test_every_key_figure_is_one_that_the_analysis_writes(self, script, analysed):
        with open(analysed[1][1], newline="") as file:
            lines = script["collect"]("square", list(csv.DictReader(file)))
        written = {line["figure"] for line in lines if line["model"] == "square"}
        assert written == script["FIGURES"].keys()
        assert {line["model"] for line in lines} == {"square", "clean", "defended"}


def _value(found, metric, condition, member, expert=""):
    """The single row's value, of the square run at the last epoch."""
    value, = [
        row["value"] for row in found.rows
        if row["run"] == "square" and row["epoch"] == 2
        and (row["metric"], row["condition"], row["member"], row["expert"])
        == (metric, condition, member, expert)
    ]  # fmt: skip
    return value
