"""Grids of experiments, and how they are cut into programs.

A sweep's config file has, besides `get_config()`, a function `get_grid()`: the list of cells, most
important first. A cell is a dict of config fields that differ from the config; two keys that are no
field are allowed: "name", what tables call it, and "baseline" (default True), whether clean members
of the same seeds are trained for its CAD and false trigger rate.

    def get_grid():
        return [{}] + grid.product({"trigger.name": ["square"], "poison.rate": [0.005, 0.02]})

- Cell: `num_seeds` members that differ in their seed only.
- Program: members that one jitted program trains together, in one run directory. They share every
  config field but those that make a member: seeds, trigger, rate, target, streams. Programs run in
  the order in which the cells first ask for them. A cell joins the newest program of its config
  while that has room, and so is trained before cells of another config in between.
- Baseline: the clean member that an attacked one is paired with: same seed, same initialisation,
  same data order. Equal members are trained once, whichever cells ask for them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import runpy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import check_sum
from pmoe_jax.members import Member

FORMAT = 1
#: Keys of a cell that are no config field, and their types.
CELL_KEYS = {"name": str, "baseline": bool}
#: Fields that only the poisoning of attacked members reads; a baseline is the same whatever they
#: say.
_ATTACK_ONLY = ("poison.include_target", "poison.source", "poison.carriers")
_OF_MEMBERS = [
    name
    for name in config_lib.FIELDS
    if name in ("seed", "num_seeds", "poison.rate", "poison.target")
    or name.startswith(("trigger.", "streams.", "quirks.a1_", "quirks.a3_"))
]
#: Fields that say where, how fast and how often, not what is trained: they do not part runs from
#: baselines. Where data come from does not matter, as their fingerprint says what they are.
_NOT_WHAT = [
    name
    for name in config_lib.FIELDS
    if name.startswith(("evaluation.", "checkpoint."))
    or name in ("data.source", "data.data_dir", "data.residence", "data.boxes", "data.max_bytes",
                "data.skip_corrupt", "model.kernels", "quirks.a4_single_image", *config_lib.HOW)
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
    """Members trained together: the name of their run directory, its config, and they."""

    name: str
    config: ml_collections.ConfigDict
    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class Ref:
    """A member of a program: index of the program, index in it."""

    program: int
    member: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the grid.

    Attributes:
      label: what tables call it.
      members: one a seed.
      baselines: the clean member of each, or None.
    """

    label: str
    members: tuple[Ref, ...]
    baselines: tuple[Ref | None, ...]

    @property
    def programs(self) -> set[int]:
        """Indices of the programs that train its members and their baselines."""
        return {ref.program for ref in (*self.members, *self.baselines) if ref is not None}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A grid packed into programs; what `sweep.json` keeps.

    Attributes:
      config: the config that the cells change.
      grid: the cells as given.
      programs, cells: the packing, in the order in which programs run.
    """

    config: ml_collections.ConfigDict
    grid: list[dict[str, Any]]
    programs: tuple[Program, ...]
    cells: tuple[Cell, ...]

    def member(self, ref: Ref) -> Member:
        """The member that a cell points to."""
        return self.programs[ref.program].members[ref.member]

    def pairs(self) -> dict[Ref, Ref]:
        """Attacked member -> its clean counterpart, for all that have one."""
        return {
            own: clean
            for cell in self.cells
            for own, clean in zip(cell.members, cell.baselines, strict=True)
            if clean is not None
        }

    def to_json(self) -> str:
        """The manifest as JSON text."""
        content = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "grid": self.grid,
            "programs": [
                {
                    "name": program.name,
                    "config": program.config.to_dict(),
                    "members": [member.to_json() for member in program.members],
                }
                for program in self.programs
            ],
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }
        return json.dumps(content, indent=1) + "\n"

    @staticmethod
    def read(path: pathlib.Path) -> Manifest:
        """Reads what `to_json` wrote; nothing in it is executed.

        Raises:
          PmoeError: missing, damaged, or of another format.
        """
        check_sum(path)
        try:
            stored = json.loads(config_lib.read_text(path))
        except FileNotFoundError:
            raise PmoeError(f"{path} does not exist; give the directory of a sweep") from None
        except (OSError, ValueError, RecursionError) as error:
            raise PmoeError(f"{path} cannot be read as JSON ({error}); restore the file") from None
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise PmoeError(f"{path} holds no sweep of format {FORMAT}; restore the file")
        try:
            manifest = Manifest(
                config_from(stored["config"]),
                [dict(cell) for cell in stored["grid"]],
                tuple(
                    Program(
                        str(entry["name"]),
                        config_from(entry["config"]),
                        tuple(Member.from_json(member) for member in entry["members"]),
                    )
                    for entry in stored["programs"]
                ),
                tuple(
                    Cell(
                        str(entry["label"]),
                        tuple(Ref(**ref) for ref in entry["members"]),
                        tuple(None if ref is None else Ref(**ref) for ref in entry["baselines"]),
                    )
                    for entry in stored["cells"]
                ),
            )
            _check_whole(manifest)
        except (PmoeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise PmoeError(f"{path} is damaged ({error}); restore the file") from None
        return manifest


def _check_whole(manifest: Manifest) -> None:
    """Raises a ValueError if names are no file names or references lead nowhere."""
    names = [program.name for program in manifest.programs]
    if any(pathlib.PurePath(name).parts != (name,) or name.startswith(".") for name in names):
        raise ValueError("a program's name is no file name")
    if len(set(names)) < len(names):
        raise ValueError("two programs have one name")
    if len(manifest.grid) != len(manifest.cells):
        raise ValueError("grid and cells differ in number")
    sizes = [len(program.members) for program in manifest.programs]
    places = {Ref(p, m) for p, size in enumerate(sizes) for m in range(size)}
    if not all(sizes):
        raise ValueError("a program has no members")
    for cell in manifest.cells:
        if not cell.members or len(cell.members) != len(cell.baselines):
            raise ValueError(f"cell {cell.label} has not one baseline a member")
        for ref in (*cell.members, *(ref for ref in cell.baselines if ref is not None)):
            if {type(ref.program), type(ref.member)} != {int} or ref not in places:
                raise ValueError(f"cell {cell.label} refers to a member that does not exist")


def config_from(stored: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A validated config from nested plain values; fields that are younger get their defaults."""
    made = with_fields(config_lib.default(), config_lib.flatten(stored))
    config_lib.validate(made.to_dict())
    return made


def product(fields: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of the fields' values as cells; the last field changes fastest.

    >>> product({"trigger.name": ["square"], "trigger.size": [2, 4]})
    [{'trigger.name': 'square', 'trigger.size': 2}, {'trigger.name': 'square', 'trigger.size': 4}]
    """
    return [
        dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())
    ]


def load(path: str, argument: str = "") -> list[dict[str, Any]]:
    """The grid of a config file.

    Args:
      path: a Python file with `get_grid()`.
      argument: handed to `get_grid`, as `--config=FILE.py:ARGUMENT` hands it to `get_config`.

    Raises:
      PmoeError: the file has no grid, or its function fails.
    """
    try:
        make = runpy.run_path(path).get("get_grid")
        cells = make and make(*[argument] if argument else [])
    except Exception as error:  # A config file may raise anything.
        raise PmoeError(f"get_grid() of {path} failed: {type(error).__name__}: {error}") from None
    if not isinstance(cells, list | tuple) or not cells:
        raise PmoeError(f"{path} has no get_grid() that gives a list of cells; see 'pmoe sweep -h'")
    if not all(isinstance(cell, Mapping) for cell in cells):
        raise PmoeError(f"get_grid() of {path} gives cells that are no dicts of config fields")
    return [dict(cell) for cell in cells]


def plain(
    config: ml_collections.ConfigDict, cells: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The cells as `sweep.json` keeps them.

    Raises:
      PmoeError: a cell that is not valid, with its number.
    """
    for number, fields in enumerate(cells, 1):
        try:
            cell_config(config, fields)
        except PmoeError as error:
            raise PmoeError(f"cell {number} ({_label(fields)}): {error}") from None
    return [json.loads(json.dumps(dict(fields))) for fields in cells]


def pack(
    config: ml_collections.ConfigDict,
    cells: Sequence[Mapping[str, Any]],
    limit: Callable[[ml_collections.ConfigDict], int],
    onto: Manifest | None = None,
) -> Manifest:
    """Cuts a grid into programs.

    Members take their places in the order of the cells, each cell's baselines before it: in the
    newest program that shares their config and has room, else in a new one.

    Args:
      config: what the cells change.
      cells: see the module's docstring.
      limit: the most members that a program of a config may have.
      onto: a packing that keeps its programs and cells; those that it does not have yet follow, in
        programs of their own. Members that it has, baselines above all, are not trained again.

    Raises:
      PmoeError: a cell that is not valid, with its number, or one that `onto` has otherwise.
    """
    stored, made = plain(config, cells), []
    packing = _Packing(limit, onto.programs if onto else ())
    if onto is not None:
        stored = _missing(onto, config, stored)
        config = onto.config
    for fields in stored:
        own = cell_config(config, fields)
        baselines = []
        members = [canonical(own, member) for member in members_lib.from_config(own)]
        if fields.get("baseline", True):
            baselines = [packing.place(*twin) if (twin := clean_twin(own, member)) else None
                         for _, member in members]  # fmt: skip
        refs = [packing.place(*member) for member in members]
        made.append(Cell(_label(fields), tuple(refs), tuple(baselines or [None] * len(refs))))
    twice = [cell for i, cell in enumerate(made) if cell.members in [c.members for c in made[:i]]]
    if twice:
        raise PmoeError(f"the cell {twice[0].label} is in the grid twice; leave one out")
    if onto is not None:
        stored, made = [*onto.grid, *stored], [*onto.cells, *made]
    return Manifest(config, stored, packing.programs(), tuple(made))


def _trains(config: ml_collections.ConfigDict) -> list[tuple[str, str]]:
    members = (canonical(config, member) for member in members_lib.from_config(config))
    return [(config_lib.to_json(shared), _text(member)) for shared, member in members]


def _missing(
    onto: Manifest, config: ml_collections.ConfigDict, cells: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The cells that a packing does not have yet, as changes of its own config.

    Raises:
      PmoeError: a cell is there by its name, but is another one.
    """
    base = config_lib.flatten(onto.config.to_dict())
    configs = [cell_config(onto.config, fields) for fields in onto.grid]
    known = list(zip(onto.grid, configs, map(_trains, configs), strict=True))
    missing = []
    for fields in cells:
        own, label = cell_config(config, fields), _label(fields)
        baseline, trains = fields.get("baseline", True), _trains(own)
        if any(of == trains and was.get("baseline", True) == baseline for was, _, of in known):
            continue
        clash = [old for was, old, _ in known if _label(was) == label]
        if clash:
            changed = config_lib.differences(clash[0].to_dict(), own.to_dict())
            shown = "; ".join(changed) or f"baseline: {not baseline} -> {baseline}"
            raise PmoeError(
                f"the cell {label} is there already, but as another one ({shown}); give it "
                "another name or choose another workdir"
            )
        flat = config_lib.flatten(own.to_dict())
        changes = {name: value for name, value in flat.items() if base[name] != value}
        missing.append({"name": label, "baseline": baseline, **changes})
    return json.loads(json.dumps(missing))


def of_runs(runs: Sequence[Program], data: Mapping[str, str]) -> Manifest:
    """Run directories that no sweep made, seen as one: cells and pairs are found in them.

    Args:
      runs: the runs, each with a name of its own.
      data: run -> fingerprint of its data set, where it is known; else its source stands for it.
    """
    places: dict[str, Ref] = {}
    groups: dict[str, list[Ref]] = {}
    for p, run in enumerate(runs):
        for m, member in enumerate(run.members):
            seen = data.get(run.name) or run.config.data.source
            places.setdefault(_what(*canonical(run.config, member), seen), Ref(p, m))
            same = json.dumps({**member.to_json(), "seed": 0, "streams": {}})
            # Members of one seed differ in the streams that are held: each is a cell of its own.
            alike = groups.setdefault(f"{p} {same}", [])
            if member.seed in [run.members[ref.member].seed for ref in alike]:
                alike = groups.setdefault(f"{p} {m} {same}", [])
            alike.append(Ref(p, m))
    cells = []
    for refs in groups.values():
        first = runs[refs[0].program]
        seen = data.get(first.name) or first.config.data.source
        twins = [clean_twin(first.config, first.members[ref.member]) for ref in refs]
        baselines = tuple(twin and places.get(_what(*twin, seen)) for twin in twins)
        cells.append(Cell(first.name, tuple(refs), baselines))
    names = [{"name": cell.label} for cell in cells]
    return Manifest(config_lib.default(), names, tuple(runs), tuple(cells))


def cell_config(
    config: ml_collections.ConfigDict, fields: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """The config of a cell, validated.

    Raises:
      PmoeError: unknown fields, or values that are not allowed.
    """
    for name, kind in CELL_KEYS.items():
        if name in fields and type(fields[name]) is not kind:
            raise PmoeError(f"{name}={fields[name]!r} has the wrong type; give a {kind.__name__}")
    changes = {name: value for name, value in fields.items() if name not in CELL_KEYS}
    made = with_fields(config, changes)
    config_lib.validate(made.to_dict())
    return made


def with_fields(
    config: ml_collections.ConfigDict, fields: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A copy with dotted fields changed; types are left to `config.validate`."""
    for name in fields:
        if name not in config_lib.FIELDS:
            raise config_lib.unknown_field(str(name))
    copy = config.copy_and_resolve_references()
    with copy.ignore_type():
        copy.update_from_flattened_dict(dict(fields))
    return copy


def canonical(
    config: ml_collections.ConfigDict, member: Member
) -> tuple[ml_collections.ConfigDict, Member]:
    """What a program must share with the member, and the member, without what is of no effect.

    Equal results are equal trainings.
    """
    dropped = list(_OF_MEMBERS)
    if member.rate == 0 and member.trigger["name"] == "none":
        dropped.extend(_ATTACK_ONLY)
        streams = {**member.streams, "poison": member.seed, "trigger": member.seed}
        member = dataclasses.replace(member, target=0, streams=streams)
    shared = with_fields(config, {name: config_lib.FIELDS[name].default for name in dropped})
    return shared, member


def clean_twin(
    config: ml_collections.ConfigDict, member: Member
) -> tuple[ml_collections.ConfigDict, Member] | None:
    """The baseline of a member in the form of `canonical`; None if it is not attacked itself."""
    if member.rate == 0:
        return None
    clean = dataclasses.replace(member, rate=0.0, trigger={"name": "none"})
    return canonical(config, clean)


def setting(config: ml_collections.ConfigDict, member: Member) -> ml_collections.ConfigDict:
    """The config without what belongs to members, attacks, places and bookkeeping."""
    shared, _ = canonical(config, member)
    dropped = [*_ATTACK_ONLY, *_NOT_WHAT]
    return with_fields(shared, {name: config_lib.FIELDS[name].default for name in dropped})


class _Packing:
    """Programs while they fill."""

    def __init__(
        self, limit: Callable[[ml_collections.ConfigDict], int], begun: Sequence[Program] = ()
    ):
        self._limit = limit
        self._begun = tuple(begun)  # They take no more members.
        self._made: list[tuple[ml_collections.ConfigDict, list[Member]]] = []
        self._places: dict[tuple[str, str], Ref] = {}
        for p, program in enumerate(begun):
            for m, member in enumerate(program.members):
                shared, same = canonical(program.config, member)
                self._places[config_lib.to_json(shared), _text(same)] = Ref(p, m)
        self._limits: dict[str, int] = {}

    def place(self, shared: ml_collections.ConfigDict, member: Member) -> Ref:
        """Where the member is, or now will be, trained."""
        text = config_lib.to_json(shared)
        if (text, _text(member)) not in self._places:
            self._places[text, _text(member)] = self._new(shared, text, member)
        return self._places[text, _text(member)]

    def _new(self, shared: ml_collections.ConfigDict, text: str, member: Member) -> Ref:
        if text not in self._limits:
            self._limits[text] = self._limit(shared)
        alike = [i for i, (config, _) in enumerate(self._made) if config == shared]
        if alike:
            index = alike[-1]
            members = self._made[index][1]
            if len(members) < self._limits[text] and _share_a_program([*members, member]):
                members.append(member)
                return Ref(len(self._begun) + index, len(members) - 1)
        self._made.append((shared, [member]))
        return Ref(len(self._begun) + len(self._made) - 1, 0)

    def programs(self) -> tuple[Program, ...]:
        """The finished programs; their configs name the first attacked member's attack."""
        made = (
            Program(
                f"{index:03d}_{shared.data.name}_{shared.model.name}_w{shared.model.width}",
                _described(shared, members),
                tuple(members),
            )
            for index, (shared, members) in enumerate(self._made, len(self._begun))
        )
        return (*self._begun, *made)


def _share_a_program(members: Sequence[Member]) -> bool:
    """Warps of different sampling cannot be stacked (see `triggers.stack`)."""
    return len({m.trigger["sampling"] for m in members if "sampling" in m.trigger}) <= 1


def _described(
    shared: ml_collections.ConfigDict, members: Sequence[Member]
) -> ml_collections.ConfigDict:
    # A run's members are in its members.json; its config can name only one attack.
    shown = next((member for member in members if member.rate > 0), members[0])
    fields: dict[str, Any] = {
        "seed": min(member.seed for member in members),
        "num_seeds": len({member.seed for member in members}),
        "trigger.name": shown.trigger["name"],
        "poison.rate": shown.rate,
        "poison.target": shown.target,
    }
    for name, value in shown.trigger.items():
        if f"trigger.{name}" in config_lib.FIELDS:
            fields[f"trigger.{name}"] = value
    if shown.trigger.get("sampling") == "truncate":
        fields["quirks.a3_truncating_warp"] = True
    return with_fields(shared, fields)


def _label(fields: Mapping[str, Any]) -> str:
    if fields.get("name"):
        return str(fields["name"])
    parts = [f"{name}={value}" for name, value in fields.items() if name not in CELL_KEYS]
    return ", ".join(parts) or "the config itself"


def _what(shared: ml_collections.ConfigDict, member: Member, data: str) -> str:
    defaults = {name: config_lib.FIELDS[name].default for name in _NOT_WHAT}
    return config_lib.to_json(with_fields(shared, defaults)) + _text(member) + data


def _text(member: Member) -> str:
    return json.dumps(member.to_json(), sort_keys=True)
