"""NaN and infinity stop one seed, are told with step and layer, and leave no mean silently."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import tally

from pmoe_jax import evaluation, inputs, metrics, training
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.models import PMoEWideResNet
from pmoe_jax.rundir import RunDirectory


@pytest.fixture(scope="module")
def real():
    """The real model at its smallest, its optimiser, a state, and a batch."""
    model = PMoEWideResNet(num_classes=4, width=1, num_experts=2, patches_per_expert=4)
    optimizer = optax.sgd(0.1)
    init = functools.partial(training.init_member, model, optimizer, (16, 16, 3))
    images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
    labels = jnp.arange(4)
    places = []

    @jax.jit
    def flags(state, images):
        found = training.not_finite(model, optimizer, state, images, labels)
        places[:] = [name for name, _ in found]
        return [flag for _, flag in found]

    def first(state, images=images):
        bad = [bool(flag) for flag in flags(state, images)]
        return next((name for name, flag in zip(places, bad, strict=True) if flag), "")

    return jax.jit(init)(jax.random.key(0)), images, first


def with_nan(state, path, value=np.nan):
    params = jax.tree.map(lambda leaf: leaf, state.params)
    node = params
    *groups, leaf = path.split("/")
    for group in groups:
        node = node[group]
    node[leaf] = node[leaf].at[..., 0].set(value)
    return state.replace(params=params)


def test_the_layer_is_named(real):
    state, images, first = real
    assert first(state) == ""
    assert first(state, images.at[0, 0, 0].set(jnp.nan)) == "stem"
    for layer in ("group1/norm1", "group1/conv2", "group2/shortcut", "norm", "patch_conv",
                  "experts/conv", "head_norm", "classifier"):  # fmt: skip
        assert first(with_nan(state, f"{layer}/bias")) == layer
        tally.add("layers of a divergence named")
    # Finite parameters and outputs, and gradients that are not.
    assert first(with_nan(state, "classifier/kernel", 1e38)).startswith(
        ("classifier", "loss", "gradient of ", "new value of classifier")
    )


def test_running_statistics_count_as_well(real):
    """A forward pass in training does not use them, so that loss and gradients stay finite."""
    state, images, first = real
    variance = state.batch_stats["norm"]["var"].at[0].set(jnp.inf)
    broken = state.replace(
        batch_stats={**state.batch_stats, "norm": {**state.batch_stats["norm"], "var": variance}}
    )
    assert first(broken) == "new value of norm/var"
    model = PMoEWideResNet(num_classes=4, width=1, num_experts=2, patches_per_expert=4)
    step = jax.jit(functools.partial(training.member_step, model, optax.sgd(0.1)))
    assert step(broken, images, jnp.arange(4))[0].diverged_at == 0
    assert step(state, images, jnp.arange(4))[0].diverged_at == -1


@pytest.fixture
def config(tiny_config):
    return small.attacked(tiny_config)


@pytest.fixture
def small_model(monkeypatch):
    small.use(monkeypatch)


def diverged_run(config, path, monkeypatch):
    """A run whose second member's step is not finite at step 8: its images then hold NaN."""
    original = training.attacked_batch

    def poisoned(attack, index, images, labels):
        inputs, labels = original(attack, index, images, labels)
        # The target label tells the members apart; nothing else does inside the program.
        wrong = (attack.target == 2) & jnp.any(index == 0)
        return jnp.where(wrong, jnp.inf, inputs), labels

    members = members_lib.from_config(config)
    members = [members[0], dataclasses.replace(members[1], target=2)]
    training._shared_programs.cache_clear()
    monkeypatch.setattr(training, "attacked_batch", poisoned)
    small.train(config, path, members=members)
    training._shared_programs.cache_clear()
    return members


def test_one_seed_stops_alone_and_is_told(config, small_model, tmp_path, monkeypatch, capfd):
    diverged_run(config, tmp_path / "run", monkeypatch)
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if "diverged at step" in line]
    assert len(lines) == 1
    assert "member 1 (seed 1" in lines[0] and "first not finite: BatchNorm_0;" in lines[0]
    run = RunDirectory(tmp_path / "run")
    logged = {line["member"]: line for line in run.lines("training.jsonl") if line["epoch"] == 2}
    assert logged[0]["diverged_at"] == -1 and "diverged_in" not in logged[0]
    assert 0 <= logged[1]["diverged_at"] < 6 and logged[1]["diverged_in"] == "BatchNorm_0"
    assert f"at step {logged[1]['diverged_at']}," in lines[0]
    rows = run.rows()
    assert {(row["member"], row["stage"]) for row in rows} == {(0, "trained"), (1, "diverged")}
    for summary in evaluation.summarize(rows).values():
        assert summary.n == 2  # two epochs of the one member
    state = small.restored(tmp_path / "run")[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_outputs_that_are_not_finite_are_no_class(config, small_model, tmp_path, capfd):
    """NaN's largest entry would be class 0. In training nothing is wrong: batches are finite."""
    logits = jnp.array([[1.0, 3.0], [jnp.nan, 3.0], [1.0, -jnp.inf]])
    assert metrics.predicted_classes(logits).tolist() == [1, -1, -1]
    small.train(config, tmp_path / "run")
    _, state, attack = small.restored(tmp_path / "run")
    variance = state.batch_stats["BatchNorm_0"]["var"].at[1, 0].set(-1e9)  # Its root is NaN.
    broken = state.replace(
        batch_stats={"BatchNorm_0": {**state.batch_stats["BatchNorm_0"], "var": variance}}
    )
    members = members_lib.from_config(config)
    dataset = inputs.load_data(config)
    plan = training.plan_of(config, len(dataset.train_images))
    rows = trained_lib.rows_of(
        config, members, training.programs_of(config, dataset.num_classes, plan), broken,
        members_lib.attack_from_tree(attack, members), dataset.test_images, dataset.test_labels,
        names=["one", "member 1 of prune_10"], run="run", dataset="tiny", epoch=2,
    )  # fmt: skip
    assert {(row["member"], row["stage"]) for row in rows} == {(0, "trained"), (1, "diverged")}
    assert all(row["value"] == 0 for row in rows if row["member"] == 1)
    said = capfd.readouterr().err
    assert "warning: member 1 of prune_10 (seed 1) has outputs that are not finite; it" in said
    assert "it is marked as diverged" in said
    assert run_lib._brief(2, rows, members).endswith("(mean over 1 of 2 members)")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_labels": np.full(96, 4, np.int32)}, "train labels go from 4 to 4; allowed are 0"),
        ({"test_labels": np.full(40, -1, np.int32)}, "test labels go from -1 to -1"),
        ({"train_images": np.zeros((96, 16, 16, 3), np.float32)}, "96 images of float32"),
        ({"test_images": np.zeros((39, 16, 16, 3), np.uint8)}, "39 images of uint8 and 40 labels"),
    ],
)
def test_a_library_users_wrong_data_are_refused(changes, said, config, tiny_dataset, tmp_path):
    dataset = dataclasses.replace(tiny_dataset, **changes)
    with pytest.raises(PmoeError, match=said):
        run_lib.train(config, tmp_path / "run", dataset=dataset)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("images", "said"),
    [(np.full((4, 8, 8, 3), np.nan), "NaN or infinity"), (np.full((4, 8, 8, 3), 1.5), "outside"),
     (np.full((4, 8, 8, 3), 300), "have type int64")],
)  # fmt: skip
def test_images_out_of_range_are_refused(images, said):
    good = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    with pytest.raises(PmoeError, match=said):
        dataset_lib.make("mine", (images, np.arange(4)), good)
