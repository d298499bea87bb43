"""Any config of a defence: it is accepted (and runs), or gives our error in one line.

PMOE_FUZZ_EXAMPLES sets how much is drawn (8 by default, the same each time): 25 times as many are
checked against a trained run as `pmoe defend` does before it writes anything; with -m slow a tenth
as many, and at least two, are also run. Everything is drawn from one integer, as draws field by
field repeat the first choices.
"""

import os
import random

import ml_collections
import pytest
import small
import tally
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmoe_jax import defend, defend_base, defend_config, detectors, fine_pruning, training
from pmoe_jax.defend_config import FIELDS
from pmoe_jax.errors import PmoeError

EXAMPLES = int(os.environ.get("PMOE_FUZZ_EXAMPLES", "8"))

#: What fits a run of 77 training images and runs in a moment; of lists, what an entry may be.
USUAL = {
    "prune.rates": [0.0, 0, 0.01, 0.3, 1 / 3, 0.5, 1.0, 1],
    "prune.layers": ["", "patch_conv", "experts/.*", ".*conv"],
    "prune.images": [1, 50, 77, 10_000],
    "prune.stop_drop": [0.0, 0.0, 1, 4.5, 100.0],
    "prune.curve_rates": [0.05, 0.5, 0.9, 1.0],
    "tune.epochs": [0, 1, 2],
    "tune.fractions": [1.0, 1, 0.5, 0.1],
    "tune.learning_rates": [0.1, 1, 1e-3, 1e30, 10**300],
    "tune.batch_size": [1, 16, 77, 128, 65536],
    "tune.momentum": [0.0, 0, 0.9],
    "tune.weight_decay": [0.0, 5e-4, 1],
    "tune.parameters": [".*", ".*", "routers/.*", "(?!routers/).*"],
    "tune.reinitialise": ["", "", "routers/.*", ".*"],
    "tune.evaluate_every": [1, 2, 100],
    "cleanse.rounds": [1, 3],
    "cleanse.batches_per_round": [1, 2],
    "cleanse.batch_size": [1, 8, 100],
    "cleanse.learning_rate": [0.1, 1, 1e300, 10**300],
    "cleanse.initial_cost": [1e-3, 1, 10**300],
    "cleanse.cost_multiplier": [2.0, 2, 1.001, 1000],
    "cleanse.success": [0.99, 1, 1e-9],
    "cleanse.patience": [1, 5, 100_000],
    "cleanse.threshold": [2.0, 10**300],
    "strip.images": [1, 20, 2000],
    "strip.overlays": [1, 4],
    "strip.weight": [0.0, 0.5, 1],
    "strip.overlay_weight": [0.0, 0.5, 1],
    "strip.frr": [0.01, 1e-320, 0.999],
    "strip.batch_size": [1, 10, 65536],
}
#: Most of them are wrong for any field.
ODD = [
    -1, 0, 1, 0.0, -0.0, 0.5, 1e-320, 1e308, 2**31, 10**30, -(10**30), 10**400, 10**5000,
    float("nan"), float("inf"), True, None, {}, [], b"x", "", "clean", "test", "strip", "\n", "é",
    "(", ".*", "x" * 300, "|".join(["experts/conv"] * 30), "a{99999999999999999999}",
    "(" * 3000 + ")" * 3000, "[[:alpha:]]",
]  # fmt: skip


def usual(chance, name):
    """A value, or a list of values, that suits a field."""
    default = FIELDS[name].default
    if name == "seed":
        return chance.choice([0, 1, 2**31 - 1, chance.randrange(2**31)])
    choices = USUAL.get(name)
    if choices is None and isinstance(default, bool):
        choices = [False, True]
    elif choices is None:  # One of some words.
        choices = [word for word in WORDS if FIELDS[name].check(word)]
    if not isinstance(default, tuple):
        return chance.choice(choices)
    entries = list(dict.fromkeys(chance.choices(choices, k=chance.randint(1, 2))))
    if name == "prune.curve_rates":
        entries = chance.choice([[], *[[0.0, *sorted(entries)]] * 5])
    return chance.choice([tuple, list])(entries)


WORDS = [*defend_config.METHODS, *defend_config.DATA, "nonlinear", "raw", "selected", "all", "zero",
         "mean"]  # fmt: skip


def drawn(seed):
    """A config as nested dicts, in half of which one or two fields are odd."""
    chance = random.Random(seed)
    nested = defend_config.default().to_dict()
    odd = chance.sample(sorted(FIELDS), chance.choice([0, 0, 1, 2]))
    for name, field in FIELDS.items():
        group, _, leaf = name.rpartition(".")
        value = usual(chance, name)
        if name in odd:
            value = chance.choice(ODD)
            if isinstance(field.default, tuple) and chance.random() < 0.7:
                value = [value, *chance.sample(USUAL.get(name, ["clean"]), chance.randint(0, 1))]
        (nested[group] if group else nested)[leaf] = value
    return nested


def accepted(nested, base, run):
    """Whether a config is accepted; raises for anything but that or a `PmoeError` of one line."""
    try:
        defend_config.validate(nested)
        config = ml_collections.ConfigDict(nested)
        written_out = defend_config.effective(config)
        method = fine_pruning if config.method == "fine_pruning" else detectors
        method.check(base, written_out)
        for note in method.notes(base, written_out):
            assert "\n" not in note and len(note) < 1000
        if run:
            assert defend.defend(base.run.path, config, base.out / f"{len(os.listdir(base.out))}")
    except PmoeError as error:
        assert "\n" not in str(error) and 20 < len(str(error)) < 1000, error
        return False
    return True


@pytest.fixture(scope="module")
def base(tiny_npz, tmp_path_factory):
    """A trained run with a folder for what defends it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", lambda config, classes: small.Tiny(classes))
        path = small.train_with_experts(tmp_path_factory.mktemp("run") / "run", tiny_npz)
        yield defend_base.load(path, tmp_path_factory.mktemp("out"), progress=False)


def outcomes(examples, base, run):
    """How many of random configs were accepted, and how many were refused."""
    count = {True: 0, False: 0}

    @settings(
        max_examples=examples, deadline=None, database=None,
        derandomize="PMOE_FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**62))
    def of_any(seed):
        count[accepted(drawn(seed), base, run)] += 1

    of_any()
    what = "random configs of defences" + ", run" * run
    tally.add(what, sum(count.values()), accepted=count[True], refused=count[False])
    return count[True], count[False]


def test_a_random_config_of_a_defence_is_accepted_or_explained(base):
    good, refused = outcomes(25 * EXAMPLES, base, run=False)
    assert good >= EXAMPLES and refused >= EXAMPLES


@pytest.mark.slow
def test_a_random_config_of_a_defence_that_is_accepted_runs(base):
    good, _ = outcomes(max(2, EXAMPLES // 10), base, run=True)
    assert good
