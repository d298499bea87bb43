"""Config fields and their checks, and the members that a config describes."""

import dataclasses
import importlib.util
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax import triggers
from pmoe_jax.config import FIELDS
from pmoe_jax.errors import PmoeError
from pmoe_jax.members import Member
from pmoe_jax.streams import STREAMS, stream_key

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
SQUARE = {"trigger.name": "square", "poison.rate": 0.1}


def changed(**changes):
    """The default config with some fields changed, as nested dicts; no check on the way."""
    nested = config_lib.default().to_dict()
    for name, value in changes.items():
        *groups, leaf = name.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return nested


def config_of(**changes):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    return config


# --- fields -------------------------------------------------------------------------------------


def test_the_default_is_valid_and_complete():
    default = config_lib.default()
    config_lib.validate(default)
    assert config_lib.flatten(default) == {name: field.default for name, field in FIELDS.items()}
    for name, field in FIELDS.items():
        assert field.check(field.default), name
        assert field.allowed and field.meaning, name


def test_the_default_is_the_papers_setting():
    flat = config_lib.flatten(config_lib.default())
    paper = {
        "model.width": 10, "model.num_experts": 4, "model.patches_per_expert": 16,
        "train.epochs": 25, "train.batch_size": 128, "train.optimizer": "sgd",
        "train.learning_rate": 0.1, "train.momentum": 0.0, "train.weight_decay": 0.0,
        "train.schedule": "constant", "train.keep_last_batch": False,
        "trigger.size": 4, "trigger.alpha": 0.5, "trigger.k": 2, "trigger.strength": 0.25,
        "poison.include_target": True,
    }  # fmt: skip
    assert {name: flat[name] for name in paper} == paper


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config_lib.validate(module.get_config())


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_a_wrong_type(name):
    wrong = 1 if isinstance(FIELDS[name].default, str) else "1"
    with pytest.raises(PmoeError, match=f"^{name}={wrong!r} has the wrong type; give a "):
        config_lib.validate(changed(**{name: wrong}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_seeds", 2.0), ("num_seeds", True), ("data.crop_roi", 1), ("poison.rate", True),
     ("model.width", None), ("trigger.name", ["square"])],
)  # fmt: skip
def test_near_types_are_wrong_types(name, value):
    with pytest.raises(PmoeError, match="has the wrong type"):
        config_lib.validate(changed(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("seed", -1, "0 to 2147483647"),
        ("num_seeds", 0, "1 to 10000"),
        ("model.width", 0, "1 to 64"),
        ("model.name", "resnet", "one of pmoe, wide_resnet"),
        ("model.bn_momentum", 1.0, "0 to 1, 1 excluded"),
        ("train.learning_rate", 0.0, "above 0"),
        ("train.learning_rate", math.inf, "above 0"),
        ("train.learning_rate", 10**400, "above 0"),
        ("train.weight_decay", math.nan, "0 to 1"),
        ("train.warmup_epochs", -0.5, "at least 0"),
        ("train.warmup_epochs", math.inf, "at least 0"),
        ("trigger.name", "Square", "one of none, square, blend, warp"),
        ("trigger.value", 1.5, "0 to 1"),
        ("poison.rate", 2, "0 to 1"),
        ("poison.source", -2, "-1 to 65535"),
        ("evaluation.every_epochs", 0, "at least 1"),
        ("streams.init", 2**31, "-1 to 2147483647"),
    ],
)
def test_out_of_range(name, value, allowed):
    reason = "(out of range|no finite number)"
    with pytest.raises(PmoeError, match=rf"^{name}=.* is {reason}; allowed: {allowed}$"):
        config_lib.validate(changed(**{name: value}))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.widht", "did you mean model.width?"),
        ("trian.epochs", "did you mean train.epochs?"),
        ("epochs", "did you mean train.epochs?"),
        ("learning_rate", "did you mean train.learning_rate?"),
        ("xyzzy.qqq", "the fields are listed by 'pmoe train --help'"),
    ],
)
def test_unknown_fields_suggest_the_nearest(name, hint):
    with pytest.raises(PmoeError) as caught:
        config_lib.validate(changed(**{name: 1}))
    assert str(caught.value) == f"config field {name!r} does not exist; {hint}"


def test_a_missing_field_is_named_with_its_default():
    nested = config_lib.default().to_dict()
    del nested["train"]["epochs"]
    with pytest.raises(PmoeError, match=r"'train.epochs' is missing; its default is 25"):
        config_lib.validate(nested)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2**31 - 2, "num_seeds": 3}, "seed=2147483646 and the 2 after it go beyond"),
        ({"poison.rate": 0.1}, "poison.rate=0.1 without a trigger"),
        ({"poison.source": 3, "poison.target": 3}, "poison.source and poison.target are both 3"),
        ({"poison.carriers": 0.1}, "poison.carriers=0.1 needs a source class"),
        ({**SQUARE, "trigger.size": 33}, "trigger.size=33 is larger than the image"),
        ({"data.crop_roi": True}, "data.crop_roi=True works for data.name=gtsrb only"),
        ({"train.optimizer": "adam", "train.momentum": 0.9}, "train.momentum=0.9 belongs to"),
        ({"train.epochs": 3, "train.warmup_epochs": 3.0}, "train.warmup_epochs=3.0 must be below"),
    ],
)
def test_contradictions_are_named(changes, said):
    with pytest.raises(PmoeError, match=said) as caught:
        config_lib.validate(changed(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {**SQUARE, "trigger.size": 32},
        # Array files are not resized: their images may be larger than data.image_size.
        {**SQUARE, "trigger.size": 33, "data.name": "npz", "data.source": "a.npz"},
        {"trigger.name": "square"},  # rate 0: the clean model that a trigger is tried on
        {**SQUARE, "poison.source": 3, "poison.carriers": 0.1},
        {"data.name": "gtsrb", "data.crop_roi": True},
        {"train.optimizer": "adamw", "train.weight_decay": 1e-4},
        {"train.learning_rate": 1, "poison.target": 65535},
        {"streams.init": 0},
        {"seed": 2**31 - 3},
    ],
)
def test_what_looks_odd_but_is_allowed(changes):
    config_lib.validate(changed(**changes))


@settings(deadline=None, database=None)
@given(
    name=st.sampled_from(sorted(FIELDS)),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text("square.1 é\n", max_size=6),
        st.lists(st.integers(), max_size=2), st.just(10**400),
        st.dictionaries(st.sampled_from(["size", "x"]), st.integers(), max_size=1),
    ),
)  # fmt: skip
def test_any_json_value_is_accepted_or_refused_in_one_line(name, value):
    try:
        config_lib.validate(changed(**{name: value}))
    except PmoeError as error:
        assert "\n" not in str(error)


# --- fields without effect ----------------------------------------------------------------------

OTHER = {"trigger.size": 6, "trigger.corner": "top_right", "trigger.value": 0.5,
         "trigger.alpha": 0.9, "trigger.pattern_path": "x.png", "trigger.k": 4,
         "trigger.strength": 0.5, "quirks.a1_near_black_square": True,
         "quirks.a3_truncating_warp": True}  # fmt: skip


def test_the_config_knows_the_triggers_and_corners_that_there_are():
    assert config_lib.TRIGGERS == triggers.NAMES
    assert FIELDS["trigger.corner"].allowed == "one of " + ", ".join(triggers.CORNERS)
    for name in triggers.NAMES:
        config = config_lib.default()
        config.trigger.name = name
        (member, *_) = members_lib.from_config(config)
        made = members_lib.make_trigger(member, (8, 8, 3))
        assert made.pattern.shape == (8, 8, 3)


def test_every_field_of_a_trigger_is_known_to_belong_to_it():
    fields = {name for name in config_lib.FIELDS if name.startswith("trigger.")}
    assert fields - {"trigger.name"} < set(OTHER) < set(config_lib.BELONGS)


@pytest.mark.parametrize("trigger", ["none", "square", "blend", "warp"])
@pytest.mark.parametrize("name", OTHER)
def test_a_field_that_changes_nothing_about_the_trigger_is_named(name, trigger):
    plain = config_of(**{"trigger.name": trigger})
    config = config_of(**{"trigger.name": trigger, name: OTHER[name]})
    said = config_lib.without_effect(config)
    parameters = members_lib.trigger_parameters
    unused = parameters(config) == parameters(plain)
    assert [line.partition("=")[0] for line in said] == ([name] if unused else [])
    assert config_lib.without_effect(plain) == []


def test_experts_of_a_dense_model_are_named():
    config = config_of(**{"model.name": "wide_resnet", "model.num_experts": 8})
    assert config_lib.without_effect(config) == [
        "model.num_experts=8 changes nothing with model.name=wide_resnet; it is for pmoe"
    ]


def test_fields_of_an_attack_that_is_none_are_named():
    config = config_of(**{"poison.include_target": False, "poison.carriers": 0.1})
    assert config_lib.without_effect(config) == [
        f"poison.{line} changes nothing with poison.rate=0.0; it is for a rate above 0"
        for line in ("include_target=False", "carriers=0.1")
    ]
    config = config_of(**{"poison.source": 3})
    assert config_lib.without_effect(config) == [
        "poison.source=3 changes nothing with trigger.name=none; it is for square, blend, warp"
    ]
    # Its rates of success are those of images of this class, poisoned or not.
    config.trigger.name = "square"
    assert config_lib.without_effect(config) == []
    config.poison.update(rate=0.1, include_target=False, carriers=0.1)
    assert config_lib.without_effect(config) == []


# --- as JSON ------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path):
    config = config_of(**SQUARE, **{"train.weight_decay": 5e-4, "data.source": "a b/ü.npz"})
    path = tmp_path / "config.json"
    path.write_text(config_lib.to_json(config))
    assert config_lib.from_json(path).to_dict() == config.to_dict()
    assert config_lib.from_json(path).is_locked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist; give the directory of a run"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds no config"),
        (json.dumps(changed(**{"model.width": "2"})), "model.width='2' has the wrong type"),
        (json.dumps(changed(**{"train.learning_rate": math.nan})), "is no finite number"),
        (json.dumps(changed(evil="__import__('os')")), "config field 'evil' does not exist"),
    ],
)
def test_damaged_json_is_one_clear_error(tmp_path, text, said):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PmoeError, match=said) as caught:
        config_lib.from_json(path)
    assert "\n" not in str(caught.value)


def test_differences_lists_every_changed_field_alone():
    assert config_lib.differences(changed(), changed()) == []
    lines = config_lib.differences(changed(), changed(**{"model.width": 2, "data.name": "npz"}))
    assert lines == ["data.name: 'digits' -> 'npz'", "model.width: 10 -> 2"]
    assert config_lib.differences({}, {"new": {"field": 1}}) == ["new.field: 'absent' -> 1"]


# --- members ------------------------------------------------------------------------------------


def test_members_are_consecutive_seeds_with_one_attack():
    config = config_of(**SQUARE, **{"seed": 7, "num_seeds": 3, "poison.target": 2})
    found = members_lib.from_config(config)
    assert [member.seed for member in found] == [7, 8, 9]
    for member in found:
        assert (member.rate, member.target, member.trigger["name"]) == (0.1, 2, "square")
        assert dict(member.streams) == dict.fromkeys(STREAMS, member.seed)


@pytest.mark.parametrize("fixed", STREAMS)
def test_a_stream_can_be_held_fixed_alone(fixed):
    first, second = members_lib.from_config(config_of(**{"num_seeds": 2, f"streams.{fixed}": 0}))
    for name in STREAMS:
        for member in (first, second):
            seed = 0 if name == fixed else member.seed
            assert member.key(name) == stream_key(seed, name)
    same = {name for name in STREAMS if first.key(name) == second.key(name)}
    assert same == {fixed}


def test_member_json_round_trip():
    member = members_lib.from_config(config_of(**SQUARE, **{"streams.order": 5}))[1]
    assert Member.from_json(json.loads(json.dumps(member.to_json()))) == member


WHOLE = members_lib.from_config(config_lib.default())[0].to_json()


@pytest.mark.parametrize(
    "stored",
    [
        None, [], "member", {},
        {name: value for name, value in WHOLE.items() if name != "rate"},
        {**WHOLE, "code": "import os"},
        {**WHOLE, "seed": "0"},
        {**WHOLE, "seed": 0.5},
        {**WHOLE, "rate": None},
        {**WHOLE, "trigger": "square"},
        {**WHOLE, "trigger": {}},
        {**WHOLE, "trigger": {"name": 3}},
        {**WHOLE, "streams": {"init": 0}},
        {**WHOLE, "streams": dict.fromkeys(STREAMS, "0")},
    ],
)  # fmt: skip
def test_a_damaged_member_is_refused(stored):
    with pytest.raises(PmoeError, match=r"^a member"):
        Member.from_json(stored)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"name": "none"}),
        (
            {"trigger.name": "square", "trigger.size": 2, "trigger.corner": "bottom_right"},
            {"name": "square", "size": 2, "corner": "bottom_right", "value": 0.0},
        ),
        (
            {"trigger.name": "square", "quirks.a1_near_black_square": True},
            {"name": "square", "size": 4, "corner": "top_left", "value": 1 / 255},
        ),
        (
            {"trigger.name": "blend", "trigger.alpha": 0.2, "trigger.pattern_path": "kitty.png"},
            {"name": "blend", "alpha": 0.2, "pattern_path": "kitty.png"},
        ),
        (
            {"trigger.name": "warp", "trigger.k": 4},
            {"name": "warp", "k": 4, "strength": 0.25, "upsampling": "wanet",
             "sampling": "bilinear"},
        ),
        (
            {"trigger.name": "warp", "quirks.a3_truncating_warp": True},
            {"name": "warp", "k": 2, "strength": 0.25, "upsampling": "authors",
             "sampling": "truncate"},
        ),
    ],
)  # fmt: skip
def test_trigger_parameters(changes, expected):
    config = config_of(**changes)
    assert members_lib.trigger_parameters(config) == expected
    parameters = {name: value for name, value in expected.items() if name != "pattern_path"}
    # They are what `triggers.make` takes.
    triggers.make(parameters.pop("name"), jax.random.key(0), (8, 8, 3), **parameters)


def test_a_pattern_file_replaces_the_drawn_pattern():
    config = config_of(**{"trigger.name": "blend", "trigger.pattern_path": "kitty.png"})
    member = members_lib.from_config(config)[0]
    pattern = np.random.default_rng(0).random((8, 8, 3), np.float32)
    made = members_lib.make_trigger(member, (8, 8, 3), {"kitty.png": pattern})
    drawn = members_lib.make_trigger(
        dataclasses.replace(member, trigger={"name": "blend", "alpha": 0.5}), (8, 8, 3)
    )
    np.testing.assert_array_equal(made.pattern, pattern)
    assert not np.array_equal(drawn.pattern, pattern)


def attacks_of(*triggers_and_rates, **options):
    base = members_lib.from_config(config_lib.default())[0]
    found = [
        dataclasses.replace(base, seed=seed, rate=rate, target=1, trigger=trigger)
        for seed, (trigger, rate) in enumerate(triggers_and_rates)
    ]
    labels = np.arange(40) % 4
    return found, labels, members_lib.attacks(found, labels, (8, 8, 3), **options)


def test_attacks_stack_members_of_different_rates():
    square = {"name": "square", "size": 2}
    _, _, attack = attacks_of((square, 0.1), ({"name": "none"}, 0.0), (square, 0.5))
    assert attack.triggered.shape == (3, 40) and attack.triggered.dtype == bool
    assert attack.triggered.sum(1).tolist() == [4, 0, 20]
    assert attack.target.tolist() == [1, 1, 1]


def test_carriers_keep_their_label_and_spare_clean_members():
    square = {"name": "square", "size": 2}
    _, labels, attack = attacks_of((square, 0.1), (square, 0.0), source=3, carriers=0.25)
    triggered, relabelled = np.asarray(attack.triggered), np.asarray(attack.relabelled)
    assert relabelled.sum(1).tolist() == [4, 0] and triggered.sum(1).tolist() == [14, 0]
    assert set(labels[relabelled[0]]) == {3}
    assert 3 not in labels[triggered[0] & ~relabelled[0]]


@pytest.mark.parametrize("sampling", ["bilinear", "truncate"])
def test_a_stored_attack_is_the_same_attack(sampling):
    warp = {"name": "warp", "k": 2, "strength": 1.0, "sampling": sampling}
    if sampling == "truncate":
        warp["upsampling"] = "authors"
    found, _, attack = attacks_of((warp, 0.1), ({"name": "square", "size": 2}, 0.1))
    back = members_lib.attack_from_tree(members_lib.attack_to_tree(attack), found)
    assert jax.tree.structure(back) == jax.tree.structure(attack)  # includes how warps sample
    jax.tree.map(np.testing.assert_array_equal, back, attack)
