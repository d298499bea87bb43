"""What can be configured of a defence: one table of fields, and the checks on it.

Lists name alternatives that one command runs: every layer pattern, data set, fraction and learning
rate is combined with every other, and all pruning rates of a combination train in one program.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from pmoe_jax.config import FIELDS as TRAINED
from pmoe_jax.config import (
    Field,
    above_0,
    below_1,
    choice,
    defaults,
    flatten,
    free,
    is_finite,
    ranged,
)
from pmoe_jax.errors import PmoeError, compiled, shown

#: The groups of fields that each method reads.
GROUPS = {
    "fine_pruning": ("prune", "tune", "quirks"),
    "expert_subsets": ("subsets",),
    "neural_cleanse": ("cleanse",),
    "strip": ("strip",),
}
METHODS = tuple(GROUPS)
DATA = ("clean", "contaminated", "heldout")
#: The largest of whole numbers without a limit of their own: arrays hold it.
MOST = 2**31 - 1
#: How the authors' notebooks measure, rank and zero channels (quirk A5): what is pruned depends on
#: these fields, `prune.data` and `prune.layers`.
AUTHORS_PRUNING = {
    "output": "raw",
    "absolute": False,
    "positions": "all",
    "together": False,
    "images": 10_000,
    "silence_constant": False,
}
#: What may set a threshold or fit a trigger: clean training images, or the held-out split.
HELD = ("clean", "heldout")


def _held() -> Field:
    return Field(
        "clean",
        f"one of {', '.join(HELD)}; the test set selects and fits nothing",
        lambda value: value in HELD,
        "clean images that the defender holds: training images, or the held-out split",
    )


def _pattern(default: Any, meaning: str) -> Field:
    return Field(default, "a regular expression", _compiles, meaning)


def _compiles(pattern: str) -> bool:
    try:
        compiled(pattern)
    except PmoeError:
        return False
    return True


FIELDS: dict[str, Field] = {
    "method": choice("fine_pruning", METHODS, "which defence"),
    "seed": ranged(0, 0, MOST, "seed of the defender's draws, the same for every member"),
    # --- Fine-Pruning: what is pruned ----------------------------------------------------------
    "prune.rates": ranged((0.0, 0.1, 0.2, 0.3), 0.0, 1.0, "pruning rates; 0 is fine-tuning alone"),
    "prune.layers": _pattern(
        ("",), "layers by name, pruned together; a list prunes each in turn; '': experts' last"
    ),
    "prune.output": choice(
        "nonlinear", ("nonlinear", "raw"), "activations behind the nonlinearity, or raw outputs"
    ),
    "prune.absolute": free(False, "rank absolute activations"),
    "prune.positions": choice(
        "selected", ("selected", "all"), "an expert's selected patches, or all with the constant"
    ),
    "prune.together": free(False, "rank the channels of all experts together, not each expert's"),
    "prune.data": choice("clean", DATA, "images that activations are measured on"),
    "prune.images": ranged(10_000, 1, MOST, "how many of them"),
    "prune.silence_constant": free(
        False, "also zero the following batch norm, through which a zeroed channel sends a constant"
    ),
    "prune.stop_drop": ranged(
        0.0, 0.0, 100.0, "above 0: also prune until held-out accuracy drops by so many points"
    ),
    "prune.curve_rates": ranged(
        tuple(round(0.05 * step, 2) for step in range(20)), 0.0, 1.0, "rates of the pruning curve"
    ),
    # --- Fine-Pruning: fine-tuning -------------------------------------------------------------
    "tune.epochs": ranged(5, 0, 100_000, "epochs of fine-tuning; 0 only prunes"),
    "tune.data": choice(("clean",), DATA, "fine-tuning data"),
    "tune.fractions": Field(
        (1.0,), "above 0, to 1", lambda value: 0 < value <= 1, "fractions of it, class by class"
    ),
    "tune.learning_rates": above_0((0.1,), "learning rates (SGD, constant)"),
    "tune.evaluate_every": ranged(1, 1, MOST, "epochs; the last one is always evaluated"),
    "tune.batch_size": ranged(128, 1, 65536, "images in a batch"),
    "tune.momentum": below_1(0.0, "SGD's momentum"),
    "tune.weight_decay": ranged(0.0, 0.0, 1.0, "weight decay"),
    "tune.hold_mask": free(True, "pruned weights stay zero; else they may regrow"),
    "tune.parameters": _pattern(".*", "parameters that train: routers/.* for routers only"),
    "tune.reinitialise": _pattern("", "names of parameters drawn anew first, such as routers/.*"),
    # --- subsets of experts --------------------------------------------------------------------
    "subsets.silence": choice("zero", ("zero", "mean"), "what a pruned expert sends"),
    # --- Neural Cleanse (defaults of the authors' code) -----------------------------------------
    "cleanse.data": _held(),
    "cleanse.rounds": ranged(1000, 1, MOST, "rounds at most"),
    "cleanse.batches_per_round": ranged(31, 1, MOST, "batches in a round"),
    "cleanse.batch_size": ranged(32, 1, 65536, "images in a batch"),
    "cleanse.learning_rate": above_0(0.1, "of Adam"),
    "cleanse.initial_cost": above_0(1e-3, "weight of the mask's norm at first"),
    "cleanse.cost_multiplier": Field(
        2.0,
        "above 1, to 1000",
        lambda value: 1 < value <= 1000,
        "how the weight grows (shrinks: to the 1.5)",
    ),
    "cleanse.success": Field(
        0.99, "above 0, to 1", lambda value: 0 < value <= 1, "share of images to reach the class"
    ),
    "cleanse.patience": ranged(5, 1, 100_000, "rounds in a row before the weight changes"),
    "cleanse.threshold": above_0(2.0, "anomaly index from which a class is suspicious"),
    # --- STRIP (defaults of the authors' code) --------------------------------------------------
    "strip.data": _held(),
    "strip.images": ranged(2000, 1, MOST, "images for the threshold, and as many under test"),
    "strip.overlays": ranged(100, 1, MOST, "clean images blended with each"),
    "strip.weight": ranged(1.0, 0.0, 1.0, "weight of the image"),
    "strip.overlay_weight": ranged(1.0, 0.0, 1.0, "weight of the overlay"),
    "strip.frr": Field(
        0.01, "between 0 and 1", lambda value: 0 < value < 1, "false rejection rate aimed at"
    ),
    "strip.batch_size": ranged(10, 1, 65536, "images in a batch, each with all its overlays"),
    # --- where the authors' notebooks differ from the text --------------------------------------
    "quirks.a2_contaminated_clean_set": free(
        False,
        "clean training data of square members holds their triggered images, with true labels",
    ),
    "quirks.a5_authors_pruning": free(
        False,
        "raw signed activations over all positions of 10,000 images, per expert; mask not held",
    ),
}


def default() -> ml_collections.ConfigDict:
    """A locked `ConfigDict`: the paper's Fine-Pruning (Section 5.3), on truly clean data."""
    return defaults(FIELDS)


def unknown_field(name: str) -> PmoeError:
    """The error for a field that does not exist, with the nearest one that does."""
    if name in TRAINED:
        return PmoeError(
            f"field {name!r} is one of 'pmoe train', not of a defence; give a config like "
            "configs/defences/fine_pruning.py"
        )
    near = difflib.get_close_matches(name, FIELDS, 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else "'pmoe defend --help' lists the fields"
    return PmoeError(f"defence field {name!r} does not exist; {hint}")


def validate(config: Mapping[str, Any]) -> None:
    """Checks every field and their contradictions.

    Raises:
      PmoeError: unknown or missing field, wrong type, out of range, or fields that contradict.
    """
    flat = flatten(config)
    for name in flat:
        if name not in FIELDS:
            raise unknown_field(name)
    for name, field in FIELDS.items():
        if name not in flat:
            raise PmoeError(f"defence field {name!r} is missing; its default is {field.default!r}")
        value, many = flat[name], isinstance(field.default, tuple)
        if many != isinstance(value, tuple | list):
            raise PmoeError(f"{name}={shown(value)} has the wrong type; give {_kind(field)}")
        for entry in value if many else [value]:
            _check(name, entry, field)
        if many and len(set(value)) != len(value):
            raise PmoeError(f"{name}={shown(value)} names an entry twice; name each once")
    _contradictions(flat)


def _check(name: str, value: Any, field: Field) -> None:
    wanted = type(field.default[0] if isinstance(field.default, tuple) else field.default)
    if not (type(value) is wanted or (wanted is float and type(value) is int)):
        raise PmoeError(f"{name}={shown(value)} has the wrong type; give {_kind(field)}")
    if not is_finite(value):
        raise PmoeError(f"{name}={shown(value)} is no finite number; allowed: {field.allowed}")
    if not field.check(value):
        reason = (
            "is no usable regular expression" if field.check is _compiles else "is out of range"
        )
        raise PmoeError(f"{name}={shown(value)} {reason}; allowed: {field.allowed}")


def _kind(field: Field) -> str:
    if isinstance(field.default, tuple):
        return f"a list of {type(field.default[0]).__name__}, such as {field.default!r}"
    return f"a {type(field.default).__name__}"


def _contradictions(flat: Mapping[str, Any]) -> None:
    rates, curve = tuple(flat["prune.rates"]), tuple(flat["prune.curve_rates"])
    if flat["method"] == "fine_pruning":
        for name in ("prune.layers", "tune.data", "tune.fractions", "tune.learning_rates"):
            if not flat[name]:
                raise PmoeError(f"{name} is empty; name at least one entry")
        if not rates and not flat["prune.stop_drop"]:
            raise PmoeError("prune.rates is empty; give rates such as (0.0, 0.3), or a stop_drop")
    if flat["prune.stop_drop"] and (not curve or curve[0] != 0 or list(curve) != sorted(curve)):
        raise PmoeError(
            "prune.stop_drop looks for the rate along prune.curve_rates, which must ascend from 0"
        )


def effective(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with quirk A5 written out in the fields that it stands for."""
    config = config.copy_and_resolve_references()
    if config.quirks.a5_authors_pruning:
        config.prune.update(AUTHORS_PRUNING)
        config.tune.hold_mask = False
    return config


def notes(config: ml_collections.ConfigDict) -> list[str]:
    """Values that differ from their defaults and are not taken as they are, or change nothing."""
    flat, taken = flatten(config.to_dict()), flatten(effective(config).to_dict())
    groups = ("method", "seed", *GROUPS[config.method])
    found = []
    for name, field in FIELDS.items():
        if flat[name] == field.default:
            continue
        if name.partition(".")[0] not in groups:
            found.append(f"{name}={shown(flat[name])} changes nothing for method={config.method}")
        elif flat[name] != taken[name]:
            found.append(
                f"{name}={shown(flat[name])} is not taken: quirks.a5_authors_pruning stands for "
                f"{shown(taken[name])}"
            )
    return found


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as what JSON gives back: lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def help_text() -> str:
    """The command's help: usage and every field."""
    fields = "\n".join(
        f"  --config.{name}={field.default!r}  {field.meaning} ({field.allowed})"
        for name, field in FIELDS.items()
    )
    return f"pmoe defend --checkpoint=DIR --workdir=DIR [--config=FILE.py] [FLAGS]\n\n{fields}"
