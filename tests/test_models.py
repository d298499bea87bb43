"""The model: figures of the public Keras code, the masked form, routing and silencing hooks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from locations import shared
from reference import masked_head

from pmoe_jax import models
from pmoe_jax.errors import PmoeError


@pytest.fixture(scope="module")
def golden():
    with np.load(shared("golden/keras_pmoe_w1_c10.npz")) as file:
        return dict(file)


def _weights(golden, moment):
    return [golden[name] for name in sorted(golden) if name.startswith(f"{moment}/")]


@pytest.fixture(scope="module")
def small():
    """A two-expert model on 16x16 images, with decisive routers, and its input."""
    model = models.PMoEWideResNet(5, width=1, num_experts=2, patches_per_expert=4)
    images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    routers = variables["params"]["routers"]
    routers["kernel"] = jax.random.normal(jax.random.key(2), routers["kernel"].shape)
    return model, variables, images


class TestKerasFigures:
    """The public Keras model's figures, to 1e-5 and better."""

    def test_evaluation(self, golden):
        model = models.PMoEWideResNet(10, width=1)
        variables = models.variables_from_keras(_weights(golden, "w0"))
        apply = jax.jit(
            functools.partial(model.apply, return_routing=True, mutable="intermediates")
        )
        (logits, routing), seen = apply(variables, golden["x"])
        features = seen["intermediates"]["features"][0]
        np.testing.assert_allclose(features, golden["eval/features"], atol=1e-5)
        np.testing.assert_allclose(jax.nn.softmax(logits), golden["eval/probs"], atol=1e-6)
        patches = np.asarray(features).reshape(8, 64, 64)
        for expert in range(4):
            selected = np.zeros((8, 64), bool)
            np.put_along_axis(selected, np.asarray(routing.indices[:, expert]), True, 1)
            np.testing.assert_array_equal(selected, golden[f"eval/selected_{expert}"] > 0)
            gates = np.zeros((8, 64), np.float32)
            np.put_along_axis(
                gates, np.asarray(routing.indices[:, expert]), routing.gates[:, expert], 1
            )
            gated = golden[f"eval/gated_{expert}"].reshape(8, 64, 64)
            np.testing.assert_allclose(patches * gates[..., None], gated, atol=1e-5)

    def test_one_sgd_step(self, golden):
        model = models.PMoEWideResNet(10, width=1)
        before = models.variables_from_keras(_weights(golden, "w0"))
        expected = models.variables_from_keras(_weights(golden, "w1"))
        labels = jnp.asarray(golden["y"], jnp.int32)

        @jax.jit
        def step(params):
            def loss_of(params):
                variables = {**before, "params": params}
                logits, updated = model.apply(
                    variables, golden["x"], train=True, mutable=["batch_stats"]
                )
                chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
                return -chosen.mean(), (logits, updated["batch_stats"])

            (loss, extra), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
            return loss, extra, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        loss, (logits, stats), params = step(before["params"])
        np.testing.assert_allclose(loss, golden["train/loss"], rtol=1e-6)
        np.testing.assert_allclose(jax.nn.softmax(logits), golden["train/probs"], atol=1e-5)
        after = {"params": params, "batch_stats": stats}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, expected)
        probs = jax.nn.softmax(model.apply(after, golden["x"]))
        np.testing.assert_allclose(probs, golden["eval1/probs"], atol=1e-5)

    def test_loaded_variables_fit_the_model(self, golden):
        loaded = models.variables_from_keras(_weights(golden, "w0"))
        model = models.PMoEWideResNet(10, width=1)
        fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, fresh)


def _keras_weights(width=1, classes=3, experts=2, seed=0):
    """Random arrays with the shapes of a Keras model."""
    rng = np.random.default_rng(seed)
    wide, mid, top = 16 * width, 32 * width, 64 * width
    norm = lambda size: [(size,)] * 4  # noqa: E731
    conv = lambda size, a, b: [(size, size, a, b), (b,)]  # noqa: E731
    shapes = conv(3, 3, 16)
    for a, b in ((16, wide), (wide, mid)):
        shapes += [*norm(a), *conv(3, a, b), *norm(b), *conv(1, a, b), *conv(3, b, b)]
    shapes += [*norm(mid), *conv(3, mid, top)]
    shapes += [(1, 1, top, 1)] * experts + norm(top) * experts + conv(1, top, wide) * experts
    shapes += [*norm(wide * experts), (wide * experts, classes), (classes,)]
    return [rng.uniform(0.5, 1.5, shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("width", "classes", "experts"), [(1, 3, 2), (2, 43, 4), (1, 7, 1)])
def test_width_classes_and_experts_are_read_off_the_keras_shapes(width, classes, experts):
    variables = models.variables_from_keras(_keras_weights(width, classes, experts))
    model = models.PMoEWideResNet(classes, width=width, num_experts=experts)
    fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, fresh)


def test_keras_arrays_of_a_wrong_count_or_shape_are_named():
    weights = _keras_weights()
    with pytest.raises(PmoeError, match=r"got 55 Keras arrays; .* 42 \+ 7n"):
        models.variables_from_keras(weights[:-1])
    weights[30] = weights[30][:-1]
    with pytest.raises(PmoeError, match=r"Keras array 30 has shape \(31,\); .* \(32,\)"):
        models.variables_from_keras(weights)
    with pytest.raises(PmoeError, match="got 0 Keras arrays"):
        models.variables_from_keras([])


@pytest.mark.parametrize("layers", [1, 2])
def test_gathered_experts_equal_the_masked_form(small, layers):
    """Values to 1e-10 and gradients to 1e-8 in float64."""
    with jax.enable_x64(True):
        model = small[0].copy(expert_layers=layers)
        images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3), jnp.float64)
        variables = jax.jit(model.init)(jax.random.key(1), images)
        keys = iter(jax.random.split(jax.random.key(3), 100))
        params = jax.tree.map(
            lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), variables["params"]
        )
        variables = {**variables, "params": params}
        head = ("routers", "experts", "head_norm", "classifier")

        @jax.jit
        def ours(head_params):
            logits, state = model.apply(
                {**variables, "params": {**params, **head_params}},
                images,
                train=True,
                mutable=["batch_stats", "intermediates"],
            )
            return logits, state["intermediates"]["features"][0]

        head_params = {name: params[name] for name in head}
        logits, features = ours(head_params)
        masked = jax.jit(masked_head, static_argnums=2)
        np.testing.assert_allclose(logits, masked(params, features, 4), atol=1e-10)
        weights = jax.random.normal(jax.random.key(4), logits.shape, jnp.float64)
        grads = jax.jit(jax.grad(lambda p: (ours(p)[0] * weights).sum()))(head_params)
        expected = jax.jit(jax.grad(lambda p: (masked_head(p, features, 4) * weights).sum()))(
            head_params
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), grads, expected)


@pytest.mark.parametrize("expert", [0, 1])
def test_unselected_features_get_no_gradient_through_an_expert(small, expert):
    """Property: with the gates held constant, an expert learns from its own patches only."""
    model, variables, images = small
    used = model.apply(variables, images, return_routing=True)[1]
    grid = jnp.zeros((6, 4, 4, 64))

    def output(change):
        def add(call, args, kwargs, context):
            y = call(*args, **kwargs)
            return y + change if context.module.name == "patch_conv" else y

        with nn.intercept_methods(add):
            logits, _ = model.apply(
                variables, images, train=True, mutable=["batch_stats"],
                routing=(used.indices, used.gates), expert_mask=jnp.arange(2) == expert,
            )  # fmt: skip
        return jnp.sin(logits).sum()

    touched = np.abs(jax.jit(jax.grad(output))(grid)).sum(-1).reshape(6, 16) > 0
    expected = np.zeros((6, 16), bool)
    np.put_along_axis(expected, np.asarray(used.indices)[:, expert], True, 1)
    np.testing.assert_array_equal(touched, expected)


@pytest.mark.parametrize("model", [models.PMoEWideResNet(3, 1), models.WideResNet(3, 1)])
def test_integer_images_are_refused(model):
    with pytest.raises(PmoeError, match="images are uint8; give floats"):
        model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": jnp.full((6, 2, 4), 16)}, "names patch 16; there are 0 to 15"),
        ({"routing": jnp.full((6, 2, 4), -1)}, "names patch -1"),
        ({"routing": jnp.array([[[0, 1, 2, 3], [4, 7, 5, 7]]] * 6)}, "the same patch twice"),
        ({"routing": jnp.zeros((6, 1, 4), int)}, r"indices of shape \(6, 1, 4\); give \[6, 2, K\]"),
        ({"routing": jnp.zeros((6, 2, 4))}, "indices of dtype float32"),
        ({"routing": (jnp.zeros((6, 2, 4), int), jnp.zeros((6, 2)))}, "they must be equal"),
        ({"expert_mask": [1.0]}, r"expert_mask has shape \(1,\); give one number for each"),
    ],
)
def test_bad_hooks_are_refused(small, options, message):
    model, variables, images = small
    with pytest.raises(PmoeError, match=message):
        model.apply(variables, images, **options)


class TestRouting:
    """The routing that is returned, and the hook that replaces it."""

    def test_takes_the_k_best_scores_with_softmax_gates(self, small):
        model, variables, images = small
        _, routing = model.apply(variables, images, return_routing=True)
        scores = np.asarray(routing.logits)
        assert scores.shape == (6, 2, 16)
        best = np.argsort(-scores, axis=-1)[..., :4]
        np.testing.assert_array_equal(routing.indices, best)
        softmax = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected = np.take_along_axis(softmax, best, -1)
        np.testing.assert_allclose(routing.gates, expected, rtol=1e-5)

    def test_forced_to_its_own_value_changes_nothing(self, small):
        model, variables, images = small
        logits, routing = model.apply(variables, images, return_routing=True)
        for forced in (routing, routing.indices, (routing.indices, routing.gates)):
            np.testing.assert_array_equal(model.apply(variables, images, routing=forced), logits)

    def test_forced_indices_are_used_with_the_routers_own_gates(self, small):
        model, variables, images = small
        forced = jnp.broadcast_to(jnp.arange(4), (6, 2, 4))
        logits, used = model.apply(variables, images, routing=forced, return_routing=True)
        np.testing.assert_array_equal(used.indices, forced)
        np.testing.assert_allclose(used.gates, jax.nn.softmax(used.logits)[..., :4], rtol=1e-6)
        zero = model.apply(variables, images, routing=(forced, jnp.zeros((6, 2, 4))))
        assert np.ptp(np.asarray(zero), axis=0).max() < 1e-6  # closed gates: no image gets through
        assert np.ptp(np.asarray(logits), axis=0).max() > 1e-3


class TestSilencing:
    """`expert_mask`: what a silenced expert sends to the concatenation."""

    def test_all_kept_changes_nothing(self, small):
        model, variables, images = small
        kept = model.apply(variables, images, expert_mask=jnp.ones(2))
        np.testing.assert_array_equal(kept, model.apply(variables, images))

    @pytest.mark.parametrize("silence", ["zero", "mean"])
    def test_a_silenced_expert_is_replaced_by_a_constant(self, small, silence):
        model, variables, images = small
        stats = jax.tree.map(lambda leaf: leaf, variables["batch_stats"])
        stats["head_norm"]["mean"] = -jnp.arange(32.0).reshape(2, 16) / 10
        variables = {**variables, "batch_stats": stats}
        silenced = model.apply(variables, images, expert_mask=jnp.asarray([1, 0]), silence=silence)
        # The same by hand: an expert that computes this constant whatever it sees.
        params = jax.tree.map(lambda leaf: leaf, variables["params"])
        constant = stats["head_norm"]["mean"][1] if silence == "mean" else jnp.zeros(16)
        conv = params["experts"]["conv"]
        conv["kernel"] = conv["kernel"].at[1].set(0)
        conv["bias"] = conv["bias"].at[1].set(constant)
        by_hand = model.apply({**variables, "params": params}, images)
        np.testing.assert_allclose(silenced, by_hand, atol=1e-6)
        assert np.abs(silenced - model.apply(variables, images)).max() > 1e-4

    def test_unknown_mode_is_an_error(self, small):
        model, variables, images = small
        with pytest.raises(PmoeError, match="silence='loud'"):
            model.apply(variables, images, expert_mask=jnp.ones(2), silence="loud")


@pytest.mark.parametrize(("size", "patches"), [(16, 16), (32, 64), (64, 256), (20, 25)])
def test_number_of_patches_follows_from_the_image(size, patches):
    model = models.PMoEWideResNet(3, width=1, patches_per_expert=2)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    _, routing = jax.eval_shape(
        lambda v, x: model.apply(v, x, return_routing=True), variables, images
    )
    assert routing.logits.shape == (2, 4, patches)


def test_too_many_patches_or_a_wrong_rank_are_errors():
    model = models.PMoEWideResNet(3, width=1, patches_per_expert=17)
    with pytest.raises(PmoeError, match="patches_per_expert=17 exceeds the 16 patches of 16x16"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(PmoeError, match=r"images must be \[B, H, W, C\]"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((16, 16, 3)))


def test_initialisation_follows_keras():
    model = models.PMoEWideResNet(10, width=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    # Glorot uniform: limit sqrt(6 / (fan_in + fan_out)), of one expert's own fans.
    kernels = {"conv": (params["experts"]["conv"]["kernel"], 128, 32)}
    kernels["g1"] = (params["group1"]["conv2"]["kernel"], 9 * 32, 9 * 32)
    for kernel, fan_in, fan_out in kernels.values():
        limit = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.97 * limit < np.abs(kernel).max() <= limit
        assert abs(np.std(kernel) / (limit / 3**0.5) - 1) < 0.03
    kernels = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel" and path[0].key in ("stem", "group1", "classifier")
    ]
    for path, kernel in kernels:
        fan_in, fan_out = (
            np.prod(kernel.shape[:-1]),
            np.prod((*kernel.shape[:-2], kernel.shape[-1])),
        )
        limit = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.9 * limit < np.abs(kernel).max() <= limit, path
    assert len(kernels) > 4
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias":
            assert not leaf.any(), path
    routers = params["routers"]["kernel"]
    assert routers.shape == (4, 128)
    assert 0.9e-4 < np.std(routers) < 1.1e-4


def test_dense_counterpart_has_a_third_group_and_no_routers():
    model = models.WideResNet(10, width=1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    assert set(variables["params"]) == {
        "stem", "group1", "group2", "group3", "norm", "classifier",
    }  # fmt: skip
    assert variables["params"]["group3"]["conv2"]["kernel"].shape == (3, 3, 64, 64)
    assert model.apply(variables, jnp.zeros((2, 32, 32, 3))).shape == (2, 10)


def test_bfloat16_keeps_parameters_and_statistics_in_float32(small):
    model, variables, images = small
    half = model.copy(dtype=jnp.bfloat16)
    logits, updated = half.apply(variables, images, train=True, mutable=["batch_stats"])
    exact, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    difference = np.abs(logits - exact).max()
    assert 0 < difference < 0.3
