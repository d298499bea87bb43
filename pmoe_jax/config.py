"""What can be configured: one table of fields, and the checks on it.

`default()` makes the `ConfigDict` that the files in `configs/` start from. `validate` checks types,
ranges and contradictions before anything is allocated. The defaults follow the paper
(Section 4), but for the number of seeds, which is 3.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
import re
import stat
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_collections

from pmoe_jax.errors import PmoeError, shown

Value = bool | int | float | str

#: The largest JSON file that is read: members.json of ten thousand members has 3 MB, a sweep of ten
#: thousand cells some 10 MB.
JSON_LIMIT = 16 * 2**20
#: Values in it at most, each of which takes some 100 bytes: those members have 130,000.
JSON_VALUES = 2**20


@dataclasses.dataclass(frozen=True)
class Field:
    """One configurable value: its default, what is allowed, and what it means.

    A value keeps the default's type. If that is a tuple, the value is a list, and `check` holds for
    each of its entries.
    """

    default: Any
    allowed: str
    check: Callable[[Any], bool]
    meaning: str


def free(default: bool | str, meaning: str) -> Field:
    kind = {bool: "True or False", str: "any text"}[type(default)]
    return Field(default, kind, lambda value: True, meaning)


def choice(default: Any, choices: Sequence[str], meaning: str) -> Field:
    return Field(default, "one of " + ", ".join(choices), lambda value: value in choices, meaning)


def ranged(default: Any, low: float, high: float | None, meaning: str) -> Field:
    allowed = f"at least {low:g}" if high is None else f"{low:g} to {high:.10g}"
    return Field(
        default, allowed, lambda value: low <= value and (high is None or value <= high), meaning
    )


def above_0(default: Any, meaning: str) -> Field:
    return Field(default, "above 0", lambda value: value > 0, meaning)


def below_1(default: float, meaning: str) -> Field:
    return Field(default, "0 to 1, 1 excluded", lambda value: 0 <= value < 1, meaning)


_MESH = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

#: As `pmoe_jax.triggers.NAMES`, which needs JAX; the tests compare them.
TRIGGERS = ("none", "square", "blend", "warp")

FIELDS: dict[str, Field] = {
    "seed": ranged(0, 0, 2**31 - 1, "seed of the first member"),
    "num_seeds": ranged(3, 1, 10_000, "members of the run: seed, seed + 1, ..."),
    # --- data -------------------------------------------------------------------------------
    "data.name": free("digits", "data set: digits, cifar10, gtsrb, npz, folder"),
    "data.source": free("", "archive, folder or file to read; empty: embedded or prepared data"),
    "data.data_dir": free("", "where prepared TFDS data sets lie; empty: TFDS's default"),
    "data.image_size": ranged(32, 8, 1024, "height and width that other sizes are resized to"),
    "data.resize_filter": choice(
        "bilinear", ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"), "PIL filter"
    ),
    "data.crop_roi": free(False, "GTSRB: crop to the sign's box before resizing"),
    "data.heldout": ranged(0.0, 0.0, 0.9, "fraction split off as clean held-out data"),
    "data.heldout_seed": ranged(0, 0, 2**31 - 1, "seed of that split"),
    "data.skip_corrupt": free(False, "skip and count images that cannot be decoded"),
    "data.boxes": free("", "GTSRB from an .npz: the .npz with its sign boxes"),
    "data.max_bytes": ranged(4 * 2**30, 1, None, "what an archive or file may unpack to"),
    "data.residence": choice(
        "auto", ("auto", "device", "host"), "where the images lie; host streams them in batches"
    ),
    # --- model ------------------------------------------------------------------------------
    "model.name": choice("pmoe", ("pmoe", "wide_resnet"), "mixture of experts, or dense"),
    "model.width": ranged(10, 1, 64, "widening factor w"),
    "model.num_experts": ranged(4, 1, 1024, "experts E"),
    "model.patches_per_expert": ranged(16, 1, 65536, "patches K that each expert takes"),
    "model.bn_momentum": below_1(0.99, "momentum of running statistics"),
    "model.dtype": choice("float32", ("float32", "bfloat16", "float64"), "compute dtype"),
    "model.kernels": choice("auto", ("auto", "plain"), "convolutions: fast forms, or XLA's own"),
    # --- attack -----------------------------------------------------------------------------
    "trigger.name": choice("none", TRIGGERS, "the trigger"),
    "trigger.size": ranged(4, 1, 1024, "square: side in pixels"),
    "trigger.corner": choice(
        "top_left", ("top_left", "top_right", "bottom_left", "bottom_right"), "square: where"
    ),
    "trigger.value": ranged(0.0, 0.0, 1.0, "square: its grey value"),
    "trigger.alpha": ranged(0.5, 0.0, 1.0, "blend: weight of the pattern"),
    "trigger.pattern_path": free("", "blend: image to use; empty: procedural, drawn per seed"),
    "trigger.k": ranged(2, 2, 256, "warp: side of the control grid"),
    "trigger.strength": ranged(0.25, 0.0, 16.0, "warp: s"),
    "poison.rate": ranged(0.0, 0.0, 1.0, "fraction of the training images that is poisoned"),
    "poison.target": ranged(0, 0, 65535, "target label"),
    "poison.include_target": free(True, "images of the target class may be picked, too"),
    "poison.source": ranged(-1, -1, 65535, "poison this class only; -1: source-agnostic"),
    "poison.carriers": ranged(
        0.0,
        0.0,
        1.0,
        "source-specific: fraction of images of other classes that carry the "
        "trigger and keep their label",
    ),
    # --- training ---------------------------------------------------------------------------
    "train.epochs": ranged(25, 1, 100_000, "epochs"),
    "train.batch_size": ranged(128, 1, 65536, "images in a batch"),
    "train.keep_last_batch": free(False, "train on the last partial batch of an epoch, as Keras"),
    "train.optimizer": choice("sgd", ("sgd", "adam", "adamw"), "optimiser (optax)"),
    "train.learning_rate": above_0(0.1, "peak learning rate"),
    "train.momentum": below_1(0.0, "SGD's momentum"),
    "train.weight_decay": ranged(0.0, 0.0, 1.0, "weight decay"),
    "train.schedule": choice("constant", ("constant", "cosine", "linear"), "to 0 over training"),
    "train.warmup_epochs": ranged(0.0, 0.0, None, "linear warm-up from 0"),
    "train.strategy": choice(
        "auto", ("auto", "vmap", "unroll"), "how one program trains many members"
    ),
    "train.mesh": Field(
        "auto",
        "auto or SxD, such as 4x2",
        lambda value: value == "auto" or bool(_MESH.fullmatch(value)),
        "members over S devices, each batch over D; auto: as many devices as possible",
    ),
    # --- measuring and saving ---------------------------------------------------------------
    "evaluation.every_epochs": ranged(1, 1, None, "the last three epochs are always evaluated"),
    "evaluation.batch_size": ranged(500, 1, 65536, "images in an evaluation batch"),
    "checkpoint.every_steps": ranged(0, 0, None, "besides each epoch's end; 0: only there"),
    "checkpoint.keep_every_epochs": ranged(0, 0, None, "keep these for good; 0: newest two only"),
    # --- one switch for a stream: -1 takes the member's own seed -------------------------------
    "streams.init": ranged(-1, -1, 2**31 - 1, "fixed seed of the initialisation; -1: member's"),
    "streams.poison": ranged(-1, -1, 2**31 - 1, "fixed seed of the poison choice; -1: member's"),
    "streams.trigger": ranged(-1, -1, 2**31 - 1, "fixed seed of the trigger; -1: member's"),
    "streams.order": ranged(-1, -1, 2**31 - 1, "fixed seed of the data order; -1: member's"),
    # --- where the authors' notebooks differ from the text --------------------------------------
    "quirks.a1_near_black_square": free(False, "the square's value is 1/255 instead of 0"),
    "quirks.a3_truncating_warp": free(
        False, "warp by clamped half-pixel upsampling and sampling at truncated coordinates"
    ),
    "quirks.a4_single_image": free(
        False, "pmoe analyze: one image's patch values, and maps that add up over epochs"
    ),
    "quirks.a6_two_layer_experts": free(False, "two layers an expert, as the text says"),
}


#: Field -> the field that it belongs to, and with which of its values it says anything: texts by
#: name, numbers above 0.
BELONGS = {
    "trigger.size": ("trigger.name", "square"),
    "trigger.corner": ("trigger.name", "square"),
    "trigger.value": ("trigger.name", "square"),
    "trigger.alpha": ("trigger.name", "blend"),
    "trigger.pattern_path": ("trigger.name", "blend"),
    "trigger.k": ("trigger.name", "warp"),
    "trigger.strength": ("trigger.name", "warp"),
    "quirks.a1_near_black_square": ("trigger.name", "square"),
    "quirks.a3_truncating_warp": ("trigger.name", "warp"),
    # Without any images in training, the source still says which images of the test set count.
    "poison.source": ("trigger.name", ", ".join(TRIGGERS[1:])),
    "poison.include_target": ("poison.rate", "a rate above 0"),
    "poison.carriers": ("poison.rate", "a rate above 0"),
    "model.num_experts": ("model.name", "pmoe"),
    "model.patches_per_expert": ("model.name", "pmoe"),
    "quirks.a6_two_layer_experts": ("model.name", "pmoe"),
}

#: Fields that say how devices compute a run, not what: they may change from session to session.
HOW = ("train.strategy", "train.mesh")


def default() -> ml_collections.ConfigDict:
    """A locked `ConfigDict` with the paper's setting, on the embedded data set."""
    return defaults(FIELDS)


def defaults(fields: Mapping[str, Field]) -> ml_collections.ConfigDict:
    """A locked `ConfigDict` with the default of each field of a table."""
    config = ml_collections.ConfigDict()
    for name, field in fields.items():
        node = config
        *groups, leaf = name.split(".")
        for group in groups:
            if group not in node:
                node[group] = ml_collections.ConfigDict()
            node = node[group]
        node[leaf] = field.default
    return config.lock()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config -> {"group.field": value}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def mesh_shape(text: str) -> tuple[int, int]:
    """S and D of a mesh written "SxD"."""
    seeds, shards = text.split("x")
    return int(seeds), int(shards)


def whole_numbers(flag: str, text: str) -> list[int]:
    """What a flag such as --members=0,2 lists.

    Raises:
      PmoeError: anything but whole numbers from 0.
    """
    try:
        found = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [-1]
    if any(index < 0 for index in found):
        raise PmoeError(f"--{flag}={text} must be whole numbers from 0, such as 3,17")
    return found


def unknown_field(name: str) -> PmoeError:
    """The error for a field that does not exist, with the nearest one that does."""
    # A wrong group or a right leaf in the wrong group are both likely slips.
    by_leaf = {known.split(".")[-1]: known for known in FIELDS}
    near = difflib.get_close_matches(name, FIELDS, 1, 0.5)
    near = near or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(name.split(".")[-1], by_leaf, 1)
    ]
    hint = f"did you mean {near[0]}?" if near else "the fields are listed by 'pmoe train --help'"
    return PmoeError(f"config field {name!r} does not exist; {hint}")


def validate(config: Mapping[str, Any]) -> None:
    """Checks every field and their contradictions.

    Raises:
      PmoeError: unknown or missing field, wrong type, out of range, or fields that contradict.
    """
    _check_fields(flatten(config))


def _check_fields(flat: Mapping[str, Any]) -> None:
    for name in flat:
        if name not in FIELDS:
            raise unknown_field(name)
    for name, field in FIELDS.items():
        if name not in flat:
            raise PmoeError(f"config field {name!r} is missing; its default is {field.default!r}")
        value, wanted = flat[name], type(field.default)
        right = type(value) is wanted or (wanted is float and type(value) is int)
        if not right:
            raise PmoeError(f"{name}={shown(value)} has the wrong type; give a {wanted.__name__}")
        if not is_finite(value):
            raise PmoeError(f"{name}={shown(value)} is no finite number; allowed: {field.allowed}")
        if not field.check(value):
            raise PmoeError(f"{name}={shown(value)} is out of range; allowed: {field.allowed}")
    _contradictions(flat)


def _contradictions(flat: Mapping[str, Any]) -> None:
    if flat["seed"] + flat["num_seeds"] > 2**31:
        raise PmoeError(
            f"seed={flat['seed']} and the {flat['num_seeds'] - 1} after it go beyond "
            f"{2**31 - 1}; choose a smaller seed"
        )
    if flat["trigger.name"] == "none" and flat["poison.rate"] > 0:
        raise PmoeError(
            f"poison.rate={flat['poison.rate']} without a trigger; set trigger.name to "
            f"{', '.join(TRIGGERS[1:-1])} or {TRIGGERS[-1]}, or the rate to 0"
        )
    if flat["poison.source"] == flat["poison.target"]:
        raise PmoeError(
            f"poison.source and poison.target are both {flat['poison.target']}; a source-specific "
            "attack needs two different classes"
        )
    if flat["poison.carriers"] > 0 and flat["poison.source"] < 0:
        raise PmoeError(
            f"poison.carriers={flat['poison.carriers']} needs a source class; set poison.source"
        )
    if (
        flat["trigger.name"] == "square"
        # Array files are not resized; what does not fit into their images is refused with these.
        and flat["data.name"] != "npz"
        and flat["trigger.size"] > flat["data.image_size"]
    ):
        raise PmoeError(
            f"trigger.size={flat['trigger.size']} is larger than the image "
            f"(data.image_size={flat['data.image_size']}); choose a smaller square"
        )
    if flat["data.crop_roi"] and flat["data.name"] != "gtsrb":
        raise PmoeError("data.crop_roi=True works for data.name=gtsrb only; set it to False")
    if flat["train.optimizer"] != "sgd" and flat["train.momentum"] > 0:
        raise PmoeError(
            f"train.momentum={flat['train.momentum']} belongs to train.optimizer=sgd, not "
            f"{flat['train.optimizer']}; set it to 0"
        )
    if flat["train.warmup_epochs"] >= flat["train.epochs"]:
        raise PmoeError(
            f"train.warmup_epochs={flat['train.warmup_epochs']} must be below "
            f"train.epochs={flat['train.epochs']}"
        )


def is_finite(value: Any) -> bool:
    """Whether a number is one that a float can be: neither NaN nor an infinity nor larger than all
    floats. True for what is no number."""
    # `math.isfinite` raises for integers that no float reaches; the comparison does not.
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max


def notes(config: Mapping[str, Any], fields: Collection[str] | None = None) -> list[str]:
    """Lines about a config that may not do what was meant: see `without_effect`."""
    flat = flatten(config)
    trigger = flat["trigger.name"]
    clean = f"poison.rate is 0, so no training image carries the {trigger}; the model stays clean"
    none_carries = trigger != "none" and not flat["poison.rate"]
    return [clean] * none_carries + without_effect(config, fields)


def without_effect(config: Mapping[str, Any], fields: Collection[str] | None = None) -> list[str]:
    """A line for every field that was set, but changes nothing, such as an alpha for a square.

    With `fields`, for those alone.
    """
    flat = flatten(config)
    return [
        f"{name}={flat[name]!r} changes nothing with {other}={flat[other]}; it is for {wanted}"
        for name, (other, wanted) in BELONGS.items()
        if flat[name] != FIELDS[name].default
        and not _has_effect(flat[other], wanted)
        and (fields is None or name in fields)
    ]


def _has_effect(value: Value, wanted: str) -> bool:
    return value in wanted.split(", ") if isinstance(value, str) else value > 0


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = ()
) -> list[str]:
    """Lines "field: old -> new" for every field in which two configs differ, but for some."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before.get(name, 'absent')!r} -> {after.get(name, 'absent')!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in ignore
    ]


def from_json(path: pathlib.Path) -> ml_collections.ConfigDict:
    """Reads a run's `config.json`; nothing in it is executed.

    Raises:
      PmoeError: missing file, damaged JSON or invalid values.
    """
    try:
        stored = json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        raise PmoeError(
            f"{path} does not exist; give the directory of a run{_inside(path)}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PmoeError(f"{path} cannot be read as JSON ({error}); restore the file") from None
    if not isinstance(stored, dict):
        raise PmoeError(f"{path} holds no config; restore the file")
    # A run of an older version lacks newer fields, whose defaults keep what it did.
    known = {name: field.default for name, field in FIELDS.items()}
    _check_fields({**known, **flatten(stored)})
    config = default()
    with config.ignore_type():
        for name, value in flatten(stored).items():
            node = config
            *groups, leaf = name.split(".")
            for group in groups:
                node = node[group]
            node[leaf] = value
    return config


def _inside(path: pathlib.Path) -> str:
    """Points to a run in the folder of several (a sweep's, a defence's) that was given instead."""
    found = sorted((*path.parent.glob("*/config.json"), *path.parent.glob("runs/*/config.json")))
    return f", such as {found[0].parent}" if found else ""


def read_text(path: pathlib.Path) -> str:
    """The text of a file of limited size.

    Raises:
      ValueError: it is larger than `JSON_LIMIT`, would be more than `JSON_VALUES` values as JSON,
        is no text, or no regular file.
      OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # A pipe or /dev/zero would never end.
        raise ValueError("it is no regular file")
    if status.st_size > JSON_LIMIT:
        raise ValueError(f"it is larger than the limit of {JSON_LIMIT} bytes")
    text = path.read_text(encoding="utf-8")
    # Before it is parsed: each value but the first follows one of these.
    if sum(map(text.count, ",[{")) >= JSON_VALUES:
        raise ValueError(f"it holds more than the limit of {JSON_VALUES} values")
    return text


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as indented JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"
