"""Any config: it trains two steps, or gives our error in one line.

PMOE_FUZZ_EXAMPLES sets how many configs are drawn (8 by default, the same ones each time). Fields
of half of them agree with each other and with the data, so that they train; most of the others are
refused. They train a small model, and the real one is traced, which finds what does not fit; with
-m slow a tenth as many, and at least four, train the real one.
"""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tally
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax import training
from pmoe_jax.config import FIELDS
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.errors import PmoeError

EXAMPLES = int(os.environ.get("PMOE_FUZZ_EXAMPLES", "8"))

#: What can be trained in a moment; everything else of a field's type comes by `odd`.
USUAL = {
    "seed": st.integers(0, 2**31 - 1),
    "num_seeds": st.integers(1, 3),
    "data.name": st.just("npz"),
    "data.image_size": st.sampled_from([8, 16, 32]),
    "data.resize_filter": st.sampled_from(["bilinear", "nearest"]),
    "data.heldout": st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    "data.residence": st.sampled_from(["auto", "device", "host"]),
    "model.name": st.sampled_from(["pmoe", "wide_resnet"]),
    "model.width": st.integers(1, 2),
    "model.num_experts": st.integers(1, 4),
    "model.patches_per_expert": st.sampled_from([1, 4, 16, 17, 64]),
    "model.bn_momentum": st.floats(0, 0.999),
    "model.dtype": st.sampled_from(["float32", "float32", "bfloat16", "float64"]),
    "model.kernels": st.sampled_from(["auto", "plain"]),
    "trigger.name": st.sampled_from(["none", "square", "blend", "warp"]),
    "trigger.size": st.sampled_from([1, 4, 16, 17, 33]),
    "trigger.corner": st.sampled_from(["top_left", "bottom_right"]),
    "trigger.value": st.floats(0, 1),
    "trigger.alpha": st.floats(0, 1),
    "trigger.pattern_path": st.sampled_from(["", "", "no such file.png"]),
    "trigger.k": st.sampled_from([2, 3, 8]),
    "trigger.strength": st.floats(0, 16),
    "poison.rate": st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 1.0, 0.001]),
    "poison.target": st.sampled_from([0, 1, 3, 4]),
    "poison.source": st.sampled_from([-1, -1, 0, 1, 4]),
    "poison.carriers": st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    "train.epochs": st.integers(1, 3),
    "train.batch_size": st.sampled_from([1, 8, 16, 40, 96, 97]),
    "train.optimizer": st.sampled_from(["sgd", "adam", "adamw"]),
    "train.learning_rate": st.one_of(st.floats(1e-6, 1), st.floats(1e-300, 1e300)),
    "train.momentum": st.sampled_from([0.0, 0.0, 0.9]),
    "train.weight_decay": st.floats(0, 1),
    "train.schedule": st.sampled_from(["constant", "cosine", "linear"]),
    "train.warmup_epochs": st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.9]),
    "train.strategy": st.sampled_from(["auto", "vmap", "unroll"]),
    "evaluation.every_epochs": st.integers(1, 10**6),
    "evaluation.batch_size": st.sampled_from([1, 7, 40, 500]),
    "checkpoint.every_steps": st.integers(0, 10),
    "checkpoint.keep_every_epochs": st.integers(0, 10**6),
}
#: Too large to be tried: they are valid, and refused only where memory ends.
LARGE = ("num_seeds", "data.image_size", "model.width", "model.num_experts", "trigger.k",
         "train.batch_size", "evaluation.batch_size")  # fmt: skip


def odd(name):
    """Values of any kind, most of which are wrong for the field."""
    numbers = st.one_of(st.floats(), st.sampled_from([-1, 0, 0.0, -0.0, 1e-320]))
    if name not in LARGE:
        numbers = st.one_of(numbers, st.integers())
    texts = st.sampled_from(["", "none", "digits", "folder", "\0", "a b", "../x", "é", "x" * 300])
    return st.one_of(numbers, texts, st.booleans(), st.none())


@st.composite
def configs(draw):
    """A config of usual values, in which up to two fields are odd."""
    nested = config_lib.default().to_dict()
    wrong = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=2, unique=True))
    if draw(st.booleans()):
        wrong = []
    for name in FIELDS:
        value = nested
        *groups, leaf = name.split(".")
        for group in groups:
            value = value[group]
        if name in wrong:
            value[leaf] = draw(odd(name))
        elif name in USUAL:
            value[leaf] = draw(USUAL[name])
        elif isinstance(FIELDS[name].default, bool) and name != "data.crop_roi":
            value[leaf] = draw(st.booleans())
    return nested


@st.composite
def consistent(draw):
    """A config of usual values that agree with each other and with `source`: it trains."""
    switches = [name for name in FIELDS if isinstance(FIELDS[name].default, bool)]
    flat = {name: draw(values) for name, values in USUAL.items()}
    flat |= {name: draw(st.booleans()) for name in switches if name != "data.crop_roi"}
    size, source = flat["data.image_size"], draw(st.sampled_from([-1, -1, 0, 3]))
    flat |= {
        "seed": min(flat["seed"], 2**31 - 4),
        "data.heldout": min(flat["data.heldout"], 0.1),
        # A patch has 8x8 pixels.
        "model.patches_per_expert": min(flat["model.patches_per_expert"], (size // 8) ** 2),
        "model.dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "trigger.size": min(flat["trigger.size"], size),
        "trigger.pattern_path": "",
        # A tenth of all images is less than each of the 4 classes has.
        "poison.rate": 0.0 if flat["trigger.name"] == "none" else 0.1,
        "poison.source": source,
        "poison.target": draw(st.sampled_from([t for t in range(4) if t != source])),
        "poison.carriers": draw(st.sampled_from([0.0, 0.1])) if source >= 0 else 0.0,
        "train.batch_size": min(flat["train.batch_size"], 40),
        "train.momentum": flat["train.momentum"] if flat["train.optimizer"] == "sgd" else 0.0,
        "train.warmup_epochs": min(flat["train.warmup_epochs"], 0.5),
    }
    config = config_lib.default()
    config.update_from_flattened_dict(flat)
    return config.to_dict()


class Enough(Exception):
    """Two steps are done."""


def enough(done, total):
    if done == min(2, total):
        raise Enough


def trains(nested, source, folder, real=False):
    """Whether a config trains; raises for anything but training or a `PmoeError` of one line."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        config_lib.validate(nested)
        config = config_lib.default()
        config.update_from_flattened_dict(config_lib.flatten(nested))
        if config.data.name == "npz" and not config.data.source:
            config.data.source = str(source)
        dataset = run_lib.load_data(config)
        members = members_lib.from_config(config)
        run_lib.check_against_data(config, members, dataset)
        if not real:
            fits(config, dataset, members)
        with pytest.MonkeyPatch.context() as patch:
            if not real:
                small.use(patch, cached=False)
            small.train(config, folder, watch=enough)
    except PmoeError as error:
        assert "\n" not in str(error) and len(str(error)) > 20, error
        left = sorted(path.name for path in folder.rglob("*")) if folder.exists() else []
        assert not any(name.startswith("metrics") for name in left)
        return False
    except Enough:
        return True
    raise AssertionError("it went on after two steps")


def fits(config, dataset, members):
    """Traces two steps of the real model."""
    plan = run_lib.plan_of(config, len(dataset.train_images))
    programs = training.Programs(config, dataset.num_classes, plan, len(members))
    state = programs.abstract_state(members[:1], dataset.image_shape)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    images = jax.ShapeDtypeStruct((plan.batch_at(0)[1], *dataset.image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32)

    def two(state, images, labels):
        for _ in range(2):
            state, loss = training.member_step(
                programs.model, programs.optimizer, state, images, labels
            )
        return state, loss

    jax.eval_shape(two, one, images, labels)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """96 training and 40 test images, 16x16x3, of 4 classes."""
    chance = np.random.default_rng(0)
    pair = [(chance.integers(0, 256, (n, 16, 16, 3), np.uint8), np.arange(n) % 4) for n in (96, 40)]
    path = tmp_path_factory.mktemp("source") / "tiny.npz"
    np.savez(path, train_images=pair[0][0], train_labels=pair[0][1],
             test_images=pair[1][0], test_labels=pair[1][1])  # fmt: skip
    assert dataset_lib.make("tiny", *pair).num_classes == 4
    return path


def outcomes(examples, source, folder, real=False):
    """How many of any configs trained and were refused; of the consistent half all train."""
    count = {True: 0, False: 0}
    limits = settings(
        max_examples=examples // 2, deadline=None, database=None,
        derandomize="PMOE_FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @limits
    @given(configs())
    def of_any(nested):
        count[trains(nested, source, folder, real)] += 1

    @limits
    @given(consistent())
    def of_consistent(nested):
        trained = trains(nested, source, folder, real)
        assert trained, "refused, though its fields agree"
        count[True] += 1

    of_any()
    of_consistent()
    what = "random configs" + ", real model" * real
    tally.add(what, sum(count.values()), trained=count[True], refused=count[False])
    return count[True], count[False]


def test_a_random_config_trains_or_is_explained(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained, refused = outcomes(EXAMPLES, source, tmp_path / "run")
    assert refused and trained >= (trained + refused) / 3


@pytest.mark.slow
def test_a_random_config_trains_the_real_model(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained, _ = outcomes(max(4, EXAMPLES // 10), source, tmp_path / "run", real=True)
    assert trained >= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"poison.source": 1, "poison.target": 1}, "poison.source and poison.target are both 1"),
        ({"trigger.size": 17}, "square size is 17: use 1 to 16"),
        ({"model.patches_per_expert": 17}, "patches_per_expert=17 exceeds the 16 patches"),
        ({"train.batch_size": 97}, "train.batch_size=97 is larger than the 96 training images"),
        ({"poison.rate": 0.01}, "0.01 of 96 images is less than one image"),
        ({"poison.target": 4}, "poison.target=4 is no class"),
    ],
)
def test_contradictions_are_named(changes, said, source, tmp_path):
    config = small.with_fields(config_lib.default(), **{
        "data.name": "npz", "data.source": str(source), "data.image_size": 32, "num_seeds": 1,
        "model.width": 1, "model.patches_per_expert": 4, "trigger.name": "square",
        "poison.rate": 0.1, "train.batch_size": 16, **changes,
    })  # fmt: skip
    with pytest.raises(PmoeError, match=said) as caught:
        small.train(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
