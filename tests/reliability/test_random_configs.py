"""Any config: it trains two steps, or gives our error in one line.

PMOE_FUZZ_EXAMPLES sets how many configs are drawn (8 by default, the same ones each time). Fields
of half of them agree with each other and with the data, so that they train; of the others some do
and some are refused. They train a small model, and the real one is traced, which finds what does
not fit; with -m slow a tenth as many, and at least four, train the real one.

Hypothesis draws one number a config, from which all fields are drawn: field by field it varies few
of them at a time, and hundreds of configs were some twenty.
"""

import itertools
import math
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tally
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pmoe_jax import config as config_lib
from pmoe_jax import inputs, training
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax.config import FIELDS
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.errors import PmoeError

EXAMPLES = int(os.environ.get("PMOE_FUZZ_EXAMPLES", "8"))
#: Of the data: pixels a side, which an .npz keeps whatever data.image_size says, and patches.
SIDE, PATCHES, CLASSES = 16, 16, 4


def one_of(*values):
    return lambda chance: chance.choice(values)


def whole(low, high):
    return lambda chance: chance.randint(low, high)


def between(low, high):
    return lambda chance: chance.uniform(low, high)


def power(low, high):
    """Ten to the power of something in between."""
    return lambda chance: 10.0 ** chance.uniform(low, high)


def some(*ways):
    return lambda chance: chance.choice(ways)(chance)


#: What can be trained in a moment; everything else of a field's type comes by `odd`.
USUAL = {
    "seed": whole(0, 2**31 - 1),
    "num_seeds": whole(1, 3),
    "data.name": one_of("npz"),
    "data.image_size": one_of(8, 16, 32),
    "data.resize_filter": one_of("bilinear", "nearest"),
    "data.heldout": one_of(0.0, 0.0, 0.1, 0.9),
    "data.heldout_seed": whole(0, 2**31 - 1),
    "data.residence": one_of("auto", "device", "host"),
    "model.name": one_of("pmoe", "wide_resnet"),
    "model.width": whole(1, 2),
    "model.num_experts": whole(1, 4),
    "model.patches_per_expert": one_of(1, 4, 16, 17, 64),
    "model.bn_momentum": between(0, 0.999),
    "model.dtype": one_of("float32", "float32", "bfloat16", "float64"),
    "model.kernels": one_of("auto", "plain"),
    "trigger.name": one_of("none", "square", "blend", "warp"),
    "trigger.size": one_of(1, 4, 16, 17, 33),
    "trigger.corner": one_of("top_left", "top_right", "bottom_left", "bottom_right"),
    "trigger.value": between(0, 1),
    "trigger.alpha": between(0, 1),
    "trigger.pattern_path": one_of("", "", "no such file.png"),
    "trigger.k": one_of(2, 3, 8),
    "trigger.strength": between(0, 16),
    "poison.rate": one_of(0.0, 0.1, 0.25, 1 / 3, 1.0, 0.001),
    "poison.target": one_of(0, 1, 3, 4),
    "poison.source": one_of(-1, -1, 0, 1, 4),
    "poison.carriers": one_of(0.0, 0.0, 0.1, 1.0),
    "train.epochs": whole(1, 3),
    "train.batch_size": one_of(1, 8, 16, 40, 96, 97),
    "train.optimizer": one_of("sgd", "adam", "adamw"),
    "train.learning_rate": some(power(-6, 0), power(-6, 0), power(-300, 300)),
    "train.momentum": one_of(0.0, 0.0, 0.9),
    "train.weight_decay": between(0, 1),
    "train.schedule": one_of("constant", "cosine", "linear"),
    "train.warmup_epochs": one_of(0.0, 0.0, 0.5, 1.0, 2.9),
    "train.strategy": one_of("auto", "vmap", "unroll"),
    "train.mesh": one_of("auto", "auto", "1x1", "1x1", "2x1", "1x2"),
    "evaluation.every_epochs": some(whole(1, 4), whole(1, 10**6)),
    "evaluation.batch_size": one_of(1, 7, 40, 500),
    "checkpoint.every_steps": whole(0, 10),
    "checkpoint.keep_every_epochs": some(whole(0, 4), whole(0, 10**6)),
    **{
        f"streams.{name}": some(one_of(-1), one_of(-1), whole(0, 2**31 - 1))
        for name in ("init", "poison", "trigger", "order")
    },
    **{
        name: one_of(False, True)
        for name in FIELDS
        if isinstance(FIELDS[name].default, bool) and name != "data.crop_roi"
    },
}
#: Too large to be tried: they are valid, and refused only where memory ends.
LARGE = ("num_seeds", "data.image_size", "model.width", "model.num_experts", "trigger.k",
         "train.batch_size", "evaluation.batch_size")  # fmt: skip


def odd(chance, name):
    """A value of any kind, which most often is wrong for the field."""
    floats = [-1.0, 0.0, -0.0, 1e-320, math.nan, math.inf, -math.inf, chance.uniform(-2, 2),
              power(-300, 300)(chance)]  # fmt: skip
    numbers = [-1, 0]
    if name not in LARGE:
        numbers += [1, 2**31 - 1, 2**31, 2**63, -(2**63), chance.randint(-10, 10**6)]
    texts = ["", "none", "digits", "folder", "\0", "a b", "../x", "é", "x" * 300, "0x1"]
    return chance.choice(chance.choice([floats, numbers, texts, [True, False], [None]]))


def consistent(chance):
    """Usual values, by field, that agree with each other and with `source`: they train."""
    flat = {name: draw(chance) for name, draw in USUAL.items()}
    source = chance.choice([-1, -1, 0, 3])
    return flat | {
        "seed": min(flat["seed"], 2**31 - 4),
        "data.heldout": min(flat["data.heldout"], 0.1),
        "model.patches_per_expert": min(flat["model.patches_per_expert"], PATCHES),
        "model.dtype": chance.choice(["float32", "bfloat16"]),
        "trigger.size": min(flat["trigger.size"], SIDE),
        "trigger.pattern_path": "",
        # A tenth of all images is less than each of the classes has.
        "poison.rate": 0.0 if flat["trigger.name"] == "none" else 0.1,
        "poison.source": source,
        "poison.target": chance.choice([t for t in range(CLASSES) if t != source]),
        "poison.carriers": chance.choice([0.0, 0.1]) if source >= 0 else 0.0,
        "train.batch_size": min(flat["train.batch_size"], 40),
        "train.momentum": flat["train.momentum"] if flat["train.optimizer"] == "sgd" else 0.0,
        "train.warmup_epochs": min(flat["train.warmup_epochs"], 0.5),
        "train.mesh": chance.choice(["auto", "1x1"]),  # on one device
    }


def any_kind(chance):
    """Values, by field: of some, most or all fields drawn without regard to the others, and half
    of the time up to two of them odd."""
    share, flat = chance.choice([0.05, 0.3, 1.0]), consistent(chance)
    flat |= {name: draw(chance) for name, draw in USUAL.items() if chance.random() < share}
    if chance.random() < 0.5:
        for name in chance.sample(sorted(FIELDS), chance.randint(1, 2)):
            flat[name] = odd(chance, name)
    return flat


def nested(flat):
    """A config of these values, of whatever types they are."""
    found = config_lib.default().to_dict()
    for name, value in flat.items():
        node = found
        *groups, leaf = name.split(".")
        for group in groups:
            node = node[group]
        node[leaf] = value
    return found


class Enough(Exception):
    """Two steps are done."""


def enough(done, total):
    if done == min(2, total):
        raise Enough


def trains(values, source, folder, real=False):
    """Whether a config trains; raises for anything but training or a `PmoeError` of one line."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        config_lib.validate(values)
        config = config_lib.default()
        config.update_from_flattened_dict(config_lib.flatten(values))
        if config.data.name == "npz" and not config.data.source:
            config.data.source = str(source)
        dataset = inputs.load_data(config)
        members = members_lib.from_config(config)
        run_lib.check_against_data(config, members, dataset)
        if not real:
            fits(config, dataset, members)
        with pytest.MonkeyPatch.context() as patch:
            if not real:
                small.use(patch)
            small.train(config, folder, watch=enough)
    except PmoeError as error:
        assert "\n" not in str(error) and len(str(error)) > 20, error
        assert not folder.exists()  # Nothing is written before everything is checked.
        return False
    except Enough:
        return True
    raise AssertionError("it went on after two steps")


def fits(config, dataset, members):
    """Traces two steps of the real model."""
    plan = training.plan_of(config, len(dataset.train_images))
    programs = training.programs_of(config, dataset.num_classes, plan)
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
    """How many of the configs of any kind trained, and were refused; all consistent ones train."""
    count, seen = {True: 0, False: 0}, set()
    limits = settings(
        max_examples=examples // 2, deadline=None, database=None, phases=[Phase.generate],
        derandomize="PMOE_FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def drawn(number, kind):
        flat = kind(random.Random(number))
        seen.add(repr(flat))
        return nested(flat)

    @limits
    @given(st.integers(0, 2**64))
    def of_any(number):
        count[trains(drawn(number, any_kind), source, folder, real)] += 1

    @limits
    @given(st.integers(0, 2**64))
    def of_consistent(number):
        trained = trains(drawn(number, consistent), source, folder, real)
        assert trained, "refused, though its fields agree"

    of_any()
    of_consistent()
    tried = 2 * (examples // 2)
    tally.add(
        "random configs" + ", real model" * real, tried, distinct=len(seen),
        trained=tried - count[False], refused=count[False],
        of_any_kind_trained=count[True],
    )  # fmt: skip
    assert len(seen) >= 0.9 * tried
    return count[True], count[False]


def test_a_random_config_trains_or_is_explained(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained, refused = outcomes(EXAMPLES, source, tmp_path / "run")
    # Of those of any kind alone: a quarter trains.
    assert (trained >= EXAMPLES / 20 and refused >= EXAMPLES / 8) or EXAMPLES < 40


def fine(flat):
    """Whether no field is refused by itself or beside another, before data are looked at."""
    try:
        config_lib.validate(nested(flat))
    except PmoeError:
        return False
    return True


@pytest.mark.parametrize(("kind", "few", "many"), [(consistent, 1, 1), (any_kind, 0.2, 0.6)])
def test_configs_are_varied(kind, few, many):
    """Every choice of some fields is met together with every one of others."""
    allowed = {
        "train.optimizer": ["sgd", "adam", "adamw"],
        "train.schedule": ["constant", "cosine", "linear"],
        "trigger.name": ["none", "square", "blend", "warp"],
        "model.name": ["pmoe", "wide_resnet"],
        "data.residence": ["auto", "device", "host"],
        "train.strategy": ["auto", "vmap", "unroll"],
    }
    flats = [kind(random.Random(number)) for number in range(300)]
    assert few <= sum(map(fine, flats)) / len(flats) <= many
    for names in (("train.optimizer", "train.schedule", "trigger.name"),
                  ("model.name", "data.residence", "train.strategy")):  # fmt: skip
        assert {tuple(flat[name] for name in names) for flat in flats} >= set(
            itertools.product(*(allowed[name] for name in names))
        )


@pytest.mark.slow
def test_a_random_config_trains_the_real_model(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes(max(4, EXAMPLES // 10), source, tmp_path / "run", real=True)


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
