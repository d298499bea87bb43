"""Routing: hand-computed statistics, causes and rows; `test_analyze` runs all of it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pmoe_jax import members as members_lib
from pmoe_jax import models, routing, routing_arrays, routing_rows, triggers
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

    def test_edges_at_the_border_count_fully(self, paper_model):
        """A ramp has the same slope everywhere, also where there is one neighbour alone."""
        ramp = np.broadcast_to(np.arange(8, dtype=np.float32) / 8, (1, 8, 8))[..., None]
        view = routing.nominal(paper_model, (8, 8, 1))
        edges = list(routing.quantities(1, 16)).index("edges")
        np.testing.assert_allclose(routing.patch_values(ramp, view)[0, :, edges], 1 / 8, rtol=1e-5)

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
        taken, every, by_position = counts.arrays().values()
        assert taken.shape == (1, 1, routing_arrays.GROUPS, 1, 2, 256)
        found = sorted(zip(*(axis.tolist() for axis in np.nonzero(taken)), strict=True))
        assert found == [
            (0, 0, 3, 0, 0, 6),
            (0, 0, 3, 0, 1, 8),
            (0, 0, 4, 0, 0, 5),
            (0, 0, 4, 0, 1, 9),
        ]
        assert every[0, 0, 4, 0, 5] == 2 and every.sum() == 8
        # Patch 0 has 5 in both images, patch 1 has 6, then 5.
        assert by_position[0, 0, :, 0, 5].tolist() == [2, 1] and by_position[0, 0, 1, 0, 6] == 1

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
        positions = routing.selection_mask(order, 8).mean(0)  # [E, P]
        arrays["frequency"] = np.asarray(positions)[None, None]
        rows = routing_rows._Rows({"stage": "trained"}, tiny_members, np.zeros(1, bool), 400)
        routing_rows._value_rows(rows, arrays, 400)
        distance, shift, at_position, shift_there = rows.rows
        taken = np.take_along_axis(values, order[:, 0], 1).ravel()
        expected = stats.wasserstein_distance(taken, values.ravel()) / values.std()
        assert distance["value"] == pytest.approx(expected, abs=0.01)
        assert distance["low"] < distance["value"] < distance["high"]
        assert distance["high"] - distance["low"] < 0.1
        expected = (taken.mean() - values.mean()) / values.std()
        assert shift["value"] == pytest.approx(expected, abs=0.01)
        assert shift["low"] < shift["value"] < shift["high"]
        # Positions are taken alike, so that the choice is one by content alone.
        assert at_position["value"] == pytest.approx(distance["value"], abs=0.02)
        assert shift_there["value"] == pytest.approx(shift["value"], abs=0.02)

    def test_a_choice_of_positions_is_no_choice_by_content(self, tiny_members):
        """An expert that always takes the two brightest positions: far from all, near its own."""
        rng = np.random.default_rng(0)
        values = rng.uniform(0, 0.5, (400, 8)) + 0.5 * (np.arange(8) > 5)
        counts = routing_arrays._Counts(1, None)
        bins = (values * 256).astype(np.uint8)[None, None, ..., None]
        counts.add(0, np.tile(np.array([6, 7]), (1, 1, 400, 1, 1)), bins)
        arrays = {
            "value_edges": np.linspace(0, 1, 257)[None], "quantities": np.array(["luminance"]),
            "conditions": np.array(["clean"]), **counts.arrays(),
            "frequency": np.array([0.0] * 6 + [1.0] * 2)[None, None, None],
        }  # fmt: skip
        rows = routing_rows._Rows({"stage": "trained"}, tiny_members, np.zeros(1, bool), 400)
        routing_rows._value_rows(rows, arrays, 400)
        found = {row["metric"]: row["value"] for row in rows.rows}
        assert found["wasserstein/luminance"] > 1
        assert found["wasserstein_position/luminance"] == pytest.approx(0, abs=1e-9)
        assert found["mean_shift_position/luminance"] == pytest.approx(0, abs=1e-9)
        # Of one image, positions and content are the same thing.
        rows = routing_rows._Rows({"stage": "trained"}, tiny_members, np.zeros(1, bool), 400)
        routing_rows._value_rows(rows, arrays, 1)
        assert len(rows.rows) == 2 and not any("position" in row["metric"] for row in rows.rows)

    def test_object_rows(self, tiny_members):
        """4 images, classes 0 and 1, one without a box; 1 expert takes 1 of 2 patches."""
        inside = np.array([[1, 0], [0.5, 0], [np.nan, np.nan], [0, 0.25]], np.float32)
        indices = np.array([0, 1, 0, 1])[None, None, :, None, None]
        of_class = np.array([[0.75, 0], [0, 0.25]], np.float32)
        arrays = {
            "label": np.array([0, 0, 1, 1]), "conditions": np.array(["clean"]), "indices": indices,
            "object_share": np.array([1, 0, np.nan, 0.25], np.float32)[None, None, :, None],
            "object_baseline": inside.mean(1), "object_by_position": of_class,
            "frequency": np.array([0.5, 0.5])[None, None, None],
            "class_frequency": np.full((1, 1, 2, 1, 2), 0.5),
        }  # fmt: skip
        rows = routing_rows._Rows({"stage": "trained"}, tiny_members, np.zeros(1, bool), 4)
        routing_rows._object_rows(rows, arrays)
        found = {(row["metric"], row["class"]): row for row in rows.rows}
        assert found["object_share", ""]["value"] == pytest.approx(125 / 3)  # of 1, 0, 1/4
        assert (found["object_share", ""]["n"], found["object_share", 1]["n"]) == (3, 1)
        low, high = (found["object_share", ""][end] for end in ("low", "high"))
        assert 0 <= low < 125 / 3 < high <= 100
        assert found["object_share", 1]["low"] == ""  # one image has no interval
        assert found["object_share", 0]["value"] == 50 and found["object_share", 1]["value"] == 25
        assert found["object_share/all", ""]["value"] == pytest.approx(87.5 / 3)
        # Positions: mean share (1 + 0.5 + 0) / 3 and (0 + 0 + 0.25) / 3, each taken half the time.
        expected = 100 * (0.5 * 1.5 + 0.5 * 0.25) / 3
        assert found["object_share/position", ""]["value"] == pytest.approx(expected)
        assert found["object_share/position", 0]["value"] == pytest.approx(37.5)
        assert found["object_share/position", 1]["value"] == pytest.approx(12.5)


class TestRows:
    """Rows of 4 images (one of the target class 0), 2 experts that take 2 of 4 patches, by hand."""

    @pytest.fixture
    def arrays(self):
        triggered = [[[0, 1], [2, 3]], [[0, 3], [0, 1]], [[2, 3], [1, 2]], [[1, 2], [3, 1]]]
        clean = [[[2, 3], [2, 3]]] * 4
        predicted = {"clean": [1, 1, 2, 0], "triggered": [0, 0, 2, 0]}
        forced = np.full((2, 1, 6, 4), 3)
        forced[0, 0, 0] = [1, 0, 2, 0]  # clean images with the triggered routing: 1 of 3
        forced[1, 0, 0] = [1, 1, 2, 0]  # triggered images with the clean routing: none
        # By subset: none, expert 0, expert 1, both. Without any, all images are of the target.
        silenced = np.full((2, 1, 2, 4, 4), 3)
        silenced[0, 0, 0] = [[0, 0, 0, 0], [1, 1, 2, 0], [0, 1, 2, 0], [1, 1, 2, 0]]
        silenced[1, 0, 0] = [[0, 0, 0, 0], [0, 1, 2, 0], [1, 1, 2, 0], [0, 0, 2, 0]]
        overlap = np.array([[1, 0.25], [0.25, 1]])
        return {
            "seed": np.array([0]), "label": np.array([1, 1, 2, 0]), "grid": np.array([2, 2]),
            "conditions": np.array(routing.CONDITIONS),
            "indices": np.array([[clean], [triggered]], np.uint8),
            "predicted": np.array(list(predicted.values()), np.int16)[:, None],
            "nominal_patches": np.array([[True, False, False, False]]),
            "field_patches": np.array([[True, True, False, False]]),
            "iou": np.array([[[1, 0], [0.5, 0], [0, 0], [0.5, 1]]], np.float32),
            "captured_change": np.array([0.25, 0.5])[:, None, None, None] * np.ones((2, 1, 4, 2)),
            "entropy_bits": np.array([[[1, 1.5]], [[1.25, 2]]]),
            "overlap": np.stack([overlap, overlap * 2])[:, None],
            "unused": np.array([[0.5], [0.125]]),
            "forcings": np.array(routing.FORCINGS), "forced_predicted": forced,
            "silences": np.array(models.SILENCE_MODES), "silenced_predicted": silenced,
            "kept_experts": routing.subsets(2),
        }  # fmt: skip

    @pytest.fixture
    def measured(self, arrays, tiny_members):
        def measure(source=None, field="value", **changed):
            rows = routing_rows._Rows({"stage": "trained"}, tiny_members, np.zeros(1, bool), 4)
            routing_rows._selection_rows(rows, arrays | changed, tiny_members)
            routing_rows._prediction_rows(rows, arrays | changed, source, tiny_members)
            return {(r["metric"], r["condition"], r["expert"]): r[field] for r in rows.rows}

        return measure

    @pytest.fixture
    def rows(self, measured):
        return measured()

    def test_selection(self, rows):
        for condition, expert, value in (
            ("clean", 0, 1), ("clean", 1, 1.5), ("triggered", 0, 1.25), ("triggered", 1, 2),
        ):  # fmt: skip
            assert rows["entropy", condition, expert] == value
        assert rows["overlap", "clean", "0+1"] == 25 and rows["overlap", "triggered", "0+1"] == 50
        assert rows["unused", "clean", ""] == 50 and rows["unused", "triggered", ""] == 12.5
        found = [rows["captured_change", c, 1] for c in ("clean", "triggered", "chance")]
        assert found == [25, 50, 50]

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

    def test_capture_is_blank_where_it_cannot_be_otherwise(self, measured):
        """Who takes 2 of 4 patches takes one of any 3; of all 4, half, whatever it takes."""
        three, four = np.array([[True] * 3 + [False]]), np.ones((1, 4), bool)
        rows = measured(nominal_patches=three, field_patches=four)
        for condition in ("clean", "triggered", "chance"):
            for extent, (kind, expert) in itertools.product(
                ("nominal", "field"), (("", 0), ("/any", ""), ("/all", ""))
            ):
                assert math.isnan(rows[f"capture/{extent}{kind}", condition, expert])
            assert rows["capture/nominal/share", condition, 0] > 0
            assert math.isnan(rows["capture/field/share", condition, 0])

    def test_iou(self, rows):
        assert (rows["iou", "both", 0], rows["iou", "both", 1]) == (50, 25)

    def test_target_rates_leave_the_target_class_out(self, rows, measured):
        assert rows["target_rate", "clean", ""] == 0
        assert rows["target_rate", "triggered", ""] == pytest.approx(200 / 3)
        assert rows["accuracy", "triggered", ""] == 50
        assert rows["target_rate/other_routing", "clean", ""] == pytest.approx(100 / 3)
        assert rows["target_rate/other_routing", "triggered", ""] == 0
        assert measured(field="n")["target_rate", "triggered", ""] == 3

    def test_target_rates_of_a_source_class_alone(self, measured):
        rows, n = measured(source=1), measured(source=1, field="n")
        assert rows["target_rate", "triggered", ""] == 100
        assert (n["target_rate", "triggered", ""], n["accuracy", "triggered", ""]) == (2, 4)
        assert rows["shapley/asr/zero", "both", 0] + rows["shapley/asr/zero", "both", 1] == 100

    def test_without_images_that_count_a_target_rate_is_unknown(self, measured):
        rows = measured(source=3)
        assert math.isnan(rows["target_rate", "triggered", ""])
        assert math.isnan(rows["swap/routing", "both", ""])
        assert rows["accuracy", "triggered", ""] == 50

    def test_forcings_that_are_not_possible_are_blank(self, measured):
        rows = measured(field_patches=np.array([[True] * 3 + [False]]))
        assert math.isnan(rows["target_rate/field_in", "triggered", ""])
        assert math.isnan(rows["target_rate/field_out", "triggered", ""])
        assert rows["target_rate/nominal_out", "triggered", ""] == 0

    def test_swap(self, rows):
        # Routing lifts 0 to 1/3 alone and 0 to 2/3 on triggered features; features 0 and 1/3.
        assert rows["swap/routing", "both", ""] == pytest.approx(50)
        assert rows["swap/computation", "both", ""] == pytest.approx(50 / 3)

    def test_shapley(self, rows):
        # Triggered: expert 0 adds -2/3 to nobody and 2/3 to expert 1; expert 1 adds -1 and 1/3.
        shares = [rows["shapley/target_rate/zero", "triggered", e] for e in range(2)]
        np.testing.assert_allclose(shares, [0, -100 / 3], atol=1e-9)
        assert rows["shapley/target_rate/mean", "triggered", 0] == 0

    def test_shapley_shares_of_the_asr_leave_out_what_nobody_causes(self, rows):
        # Triggered minus clean: nobody 0, expert 0 1/3, expert 1 -1/3, both 2/3.
        shares = [rows["shapley/asr/zero", "both", e] for e in range(2)]
        np.testing.assert_allclose(shares, [200 / 3, 0], atol=1e-9)
        total = rows["swap/routing", "both", ""] + rows["swap/computation", "both", ""]
        assert sum(shares) == pytest.approx(total)
        assert rows["shapley/asr/mean", "both", 0] == 0


@pytest.fixture
def tiny_members(tiny_config):
    tiny_config.num_seeds = 1
    return members_lib.from_config(tiny_config)
