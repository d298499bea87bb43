"""Training programs: members alone and together, the input pipeline, lowering for other devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pmoe_jax import members as members_lib
from pmoe_jax import models, training, triggers
from pmoe_jax.members import Attack


def _start(config, dataset, seeds, strategy):
    """Programs, state, attack, orders and data for these seeds."""
    config = config.copy_and_resolve_references()
    config.train.strategy = strategy
    chosen = [m for m in members_lib.from_config(config) if m.seed in seeds]
    plan = training.plan_of(config, len(dataset.train_images))
    programs = training.programs_of(config, dataset.num_classes, plan)
    attack = members_lib.attacks(chosen, dataset.train_labels, dataset.image_shape)
    keys = jnp.stack([member.key("order") for member in chosen])
    order = programs.epoch_order(keys, np.int32(0))
    data = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    return programs, programs.init(chosen, dataset.image_shape), attack, order, data


def _steps(config, dataset, seeds, strategy, count):
    programs, state, attack, order, data = _start(config, dataset, seeds, strategy)
    losses = []
    for step in range(count):
        start, size = programs.plan.batch_at(step)
        state, loss = programs.step(state, attack, order, np.int32(start), *data, size)
        losses.append(loss)
    return state, np.asarray(losses)


@pytest.fixture
def attacked_config(tiny_config):
    tiny_config.num_seeds = 2
    tiny_config.trigger.name = "warp"
    tiny_config.poison.rate = 0.25
    tiny_config.train.momentum = 0.9
    tiny_config.train.weight_decay = 1e-3
    return tiny_config


class TestMemberAloneEqualsMemberAmongOthers:
    """The M axis changes nothing but rounding."""

    def test_one_step_in_float32(self, attacked_config, tiny_dataset):
        alone, loss = _steps(attacked_config, tiny_dataset, (1,), "unroll", 1)
        for strategy in training.STRATEGIES:
            together, losses = _steps(attacked_config, tiny_dataset, (0, 1), strategy, 1)
            np.testing.assert_allclose(losses[:, 1], loss[:, 0], atol=1e-5)
            _assert_member_equals(together, 1, alone, 1e-5)

    def test_five_steps_in_float64(self, attacked_config, tiny_dataset):
        with jax.enable_x64(True):
            attacked_config.model.dtype = "float64"
            attacked_config.train.batch_size = 3  # XLA:CPU has only a slow float64 convolution
            alone, _ = _steps(attacked_config, tiny_dataset, (1,), "unroll", 5)
            assert alone.params["stem"]["kernel"].dtype == np.float64
            for strategy in training.STRATEGIES:
                together, _ = _steps(attacked_config, tiny_dataset, (0, 1), strategy, 5)
                _assert_member_equals(together, 1, alone, 1e-10)

    def test_members_differ_in_everything_they_draw(self, attacked_config, tiny_dataset):
        _, state, attack, order, _ = _start(attacked_config, tiny_dataset, (0, 1), "vmap")
        drawn = (state.params["stem"]["kernel"], attack.triggered, attack.trigger.grid, order)
        for first, second in drawn:
            assert (np.asarray(first) != np.asarray(second)).any()


def _assert_member_equals(state, index, alone, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[index], b[0], atol=tolerance), state, alone
    )


def test_a_fixed_stream_is_shared_and_the_others_are_not(attacked_config, tiny_dataset):
    attacked_config.streams.poison = 7
    _, _, attack, order, _ = _start(attacked_config, tiny_dataset, (0, 1), "vmap")
    np.testing.assert_array_equal(*attack.triggered)
    assert (np.asarray(order[0]) != np.asarray(order[1])).any()


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(tiny_config, tiny_dataset):
    programs, _, _, first, _ = _start(tiny_config, tiny_dataset, (0, 1), "vmap")
    keys = jnp.stack([m.key("order") for m in members_lib.from_config(tiny_config)])
    second = programs.epoch_order(keys, np.int32(1))
    for order in (*first, *second):
        np.testing.assert_array_equal(np.sort(order), np.arange(96))
    assert (np.asarray(first) != np.asarray(second)).any()


@pytest.mark.parametrize(("keep", "steps", "last"), [(False, 6, (80, 16)), (True, 7, (96, 4))])
def test_the_last_partial_batch_is_dropped_or_kept(keep, steps, last):
    plan = training.Plan(num_images=100, batch_size=16, keep_last_batch=keep, epochs=3)
    assert (plan.steps_per_epoch, plan.total_steps) == (steps, 3 * steps)
    assert plan.batch_at(2 * steps - 1) == last
    assert plan.batch_at(steps) == (0, 16)


def test_a_batch_is_converted_triggered_and_relabelled_where_the_masks_say():
    trigger = triggers.make("square", jax.random.key(0), (8, 8, 3), size=2)
    attack = Attack(
        triggered=jnp.asarray([False, True, False, True]),
        relabelled=jnp.asarray([False, True, False, False]),
        trigger=trigger,
        target=jnp.asarray(2),
    )
    index = jnp.asarray([3, 0, 1])
    images = jnp.full((3, 8, 8, 3), 51, jnp.uint8)
    out, labels = training.attacked_batch(attack, index, images, jnp.asarray([5, 6, 7]))
    np.testing.assert_allclose(out[:, 5, 5], 0.2, rtol=1e-6)
    np.testing.assert_allclose(out[:, 0, 0, 0], [0, 0.2, 0], rtol=1e-6)  # image 3, 0 and 1
    np.testing.assert_array_equal(labels, [5, 6, 2])  # 3 only carries the trigger, 1 is relabelled


def test_one_step_is_plain_sgd_on_the_mean_cross_entropy(tiny_config, tiny_dataset):
    """A step of the program against the same written out for one member."""
    programs, state, attack, order, (images, labels) = _start(
        tiny_config, tiny_dataset, (1,), "unroll"
    )
    own = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf[0])), state)
    index = order[0, 16:32]
    after, loss = programs.step(state, attack, order, np.int32(16), images, labels, 16)

    @jax.jit
    def loss_of(params):
        model = models.PMoEWideResNet(
            4, width=1, num_experts=2, patches_per_expert=4, bn_momentum=0.9
        )
        variables = {"params": params, "batch_stats": own.batch_stats}
        x = images[index].astype(jnp.float32) / 255
        logits, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return -(jax.nn.one_hot(labels[index], 4) * jax.nn.log_softmax(logits)).sum(-1).mean()

    expected, grads = jax.jit(jax.value_and_grad(loss_of))(own.params)
    np.testing.assert_allclose(loss[0], expected, rtol=1e-5)
    by_hand = jax.tree.map(lambda p, g: p - 0.1 * g, own.params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-5), after.params, by_hand)
    assert int(after.step[0]) == 1


class _Toy:
    """A model of one number w: logits [0, w * mean of the image]."""

    def apply(self, variables, images, train, mutable):
        mean = images.mean((1, 2, 3))
        score = variables["params"]["w"] * mean
        return jnp.stack([jnp.zeros_like(score), score], -1), {"batch_stats": {}}


def test_a_member_that_diverges_stops_and_the_others_go_on():
    state = training.TrainState(
        params={"w": jnp.asarray([1.0, jnp.inf])},
        batch_stats={},
        opt_state=optax.sgd(0.1).init({}),
        step=jnp.asarray([4, 4]),
        diverged_at=jnp.asarray([-1, -1]),
    )
    step = training.over_members(
        functools.partial(training.member_step, _Toy(), optax.sgd(0.1)), "vmap", shared=(1, 2)
    )
    images, labels = jnp.ones((2, 2, 2, 3)), jnp.asarray([0, 1])
    for _ in range(2):
        state, loss = step(state, images, labels)
    assert not np.isfinite(loss[1])
    np.testing.assert_array_equal(state.diverged_at, [-1, 4])
    np.testing.assert_array_equal(state.step, [6, 6])
    assert state.params["w"][1] == jnp.inf  # as it was, not NaN
    assert 0 < state.params["w"][0] < 1  # two steps of descent


def test_runs_that_train_alike_share_their_programs(tiny_config):
    """What is attacked, and by which seeds, is no part of them; how is trained, and what, is."""

    def made(classes=4, **changes):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        return training.programs_of(config, classes, training.plan_of(config, 96))

    one = made()
    other = {"trigger.name": "square", "poison.rate": 0.1, "seed": 7, "num_seeds": 3}
    assert made(**other) is one
    for changes in ({"train.learning_rate": 0.2}, {"train.epochs": 3}, {"model.width": 2},
                    {"quirks.a6_two_layer_experts": True}, {"classes": 5}):  # fmt: skip
        assert made(**changes) is not one, changes


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_learning_rate_schedules(tiny_config, schedule):
    """Steps of plain SGD on a constant gradient of 1 show the learning rate."""
    tiny_config.train.schedule = schedule
    tiny_config.train.warmup_epochs = 1.0
    plan = training.Plan(num_images=64, batch_size=16, keep_last_batch=False, epochs=3)
    optimizer = training.build_optimizer(tiny_config.train, plan)
    params = {"w": jnp.zeros(())}
    state, rates = optimizer.init(params), []
    for _ in range(12):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        rates.append(-float(updates["w"]))
    np.testing.assert_allclose(rates[:4], [0, 0.025, 0.05, 0.075], atol=1e-7)
    left = 1 - np.arange(8) / 8
    shape = {"constant": np.ones(8), "linear": left, "cosine": (1 - np.cos(np.pi * left)) / 2}
    np.testing.assert_allclose(rates[4:], 0.1 * shape[schedule], atol=1e-6)


@pytest.mark.parametrize("strategy", training.STRATEGIES)
def test_the_step_lowers_for_accelerators(attacked_config, tiny_dataset, strategy):
    programs, state, attack, order, data = _start(attacked_config, tiny_dataset, (0, 1), strategy)
    step = jax.jit(functools.partial(programs._all_step, size=16))
    for platform in ("cuda", "tpu"):
        exported = jax.export.export(step, platforms=[platform])(
            state, attack, order, np.int32(0), *data
        )
        assert exported.platforms == (platform,)
        assert "stablehlo.convolution" in exported.mlir_module()


def test_predictions_of_a_split_do_not_depend_on_the_batch_size(tiny_config, tiny_dataset):
    programs, state, _, _, _ = _start(tiny_config, tiny_dataset, (0, 1), "unroll")
    images = tiny_dataset.test_images
    all_at_once = training.predict_all(programs, state.variables, images, None, 40)
    in_parts = training.predict_all(programs, state.variables, images, None, 16)
    assert all_at_once.shape == (2, 40)
    np.testing.assert_array_equal(all_at_once, in_parts)
