"""Members: a run trains M of them, each a seed with its own poisoning.

`Member` is the plain description that a run directory keeps; `attacks` turns members into arrays
with a leading M axis for the training program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pmoe_jax import poisoning, triggers
from pmoe_jax.errors import PmoeError
from pmoe_jax.streams import STREAMS, stream_key


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a run: what makes it differ from the others.

    Attributes:
      seed: names the member; its random streams derive from it.
      rate: poisoning rate, 0 to 1.
      target: target label.
      trigger: {"name": ..., parameters of `triggers.make`}; a blend's image is a "pattern_path".
      streams: seed of each named stream; differs from `seed` where a stream is held fixed.
    """

    seed: int
    rate: float
    target: int
    trigger: Mapping[str, Any]
    streams: Mapping[str, int]

    def key(self, stream: str) -> jax.Array:
        """The key of one of the member's named random streams."""
        return stream_key(self.streams[stream], stream)

    def to_json(self) -> dict[str, Any]:
        """The member as a JSON-compatible dict."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(stored: Any) -> Member:
        """Reads what `to_json` wrote.

        Raises:
          PmoeError: a field is missing, unknown, of the wrong type or out of range.
        """
        kinds = {"seed": int, "rate": int | float, "target": int, "trigger": dict, "streams": dict}
        ranges = {"seed": 2**31 - 1, "rate": 1, "target": 2**31 - 1}
        if not isinstance(stored, dict) or stored.keys() != kinds.keys():
            raise PmoeError(f"a member needs exactly the fields {', '.join(kinds)}")
        for name, kind in kinds.items():
            if not isinstance(stored[name], kind):
                raise PmoeError(f"a member's {name} is {stored[name]!r}; wanted {kind}")
            if name in ranges and not 0 <= stored[name] <= ranges[name]:
                raise PmoeError(f"a member's {name} is {stored[name]}; wanted 0 to {ranges[name]}")
        if stored["trigger"].get("name") not in triggers.NAMES:
            raise PmoeError(f"a member's trigger needs a name of {', '.join(triggers.NAMES)}")
        if not {type(value) for value in stored["trigger"].values()} <= {str, int, float, bool}:
            raise PmoeError("a member's trigger has a parameter that is neither number nor text")
        streams = stored["streams"]
        if streams.keys() != set(STREAMS) or {type(seed) for seed in streams.values()} != {int}:
            raise PmoeError(f"a member's streams must be {', '.join(STREAMS)}, each a whole number")
        return Member(**stored)


def alike(member: Member, other: Member) -> bool:
    """Whether both have the same trigger (with its parameters), poisoning rate and target."""
    return (
        dict(member.trigger) == dict(other.trigger)
        and member.rate == other.rate
        and member.target == other.target
    )


def same_attack(members: Sequence[Member]) -> bool:
    """Whether members differ in their seeds alone, so that their figures have a common mean.

    Two of one seed do not: they differ in streams that are held.
    """
    seeds = {each.seed for each in members}
    return len(seeds) == len(members) and all(alike(each, members[0]) for each in members)


@flax.struct.dataclass
class Attack:
    """What the training program needs of a member's attack; leaves stack on a leading M axis.

    Attributes:
      triggered: bool [N], training images that carry the trigger.
      relabelled: bool [N], training images whose label becomes the target.
      trigger: the trigger's arrays.
      target: int32 [], target label.
    """

    triggered: jax.Array
    relabelled: jax.Array
    trigger: triggers.Trigger
    target: jax.Array


def attack_to_tree(attack: Attack) -> dict[str, Any]:
    """An attack as nested dicts of arrays, for a checkpoint."""
    trigger = {"alpha": attack.trigger.alpha, "pattern": attack.trigger.pattern}
    if attack.trigger.grid is not None:
        trigger["grid"] = attack.trigger.grid
    return {
        "triggered": attack.triggered,
        "relabelled": attack.relabelled,
        "target": attack.target,
        "trigger": trigger,
    }


def check_attack_tree(
    tree: Any,
    members: Sequence[Member],
    image_shape: tuple[int, int, int],
    what: str,
    num_images: int | None = None,
) -> None:
    """Refuses arrays of a checkpoint, `what`, that are no attack of the members on such images.

    Args:
      num_images: training images N of the masks; by default as many as the checkpoint's have.

    Raises:
      PmoeError: the first array that is absent, or not of the expected kind and shape.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    have = {name: f"{leaf.dtype.kind}{list(leaf.shape)}" for name, leaf in found.items()}
    count, size = len(members), image_shape[:2]
    if num_images is None:  # Those of another training set evaluate as well.
        num_images = next(iter(getattr(found.get("triggered"), "shape", ())[1:]), 0)
    wanted = {
        "triggered": f"b{[count, num_images]}",
        "relabelled": f"b{[count, num_images]}",
        "target": f"i{[count]}",
        "trigger.alpha": f"f{[count, *size, 1]}",
        "trigger.pattern": f"f{[count, *image_shape]}",
    }
    if "trigger.grid" in have or any(member.trigger["name"] == "warp" for member in members):
        wanted["trigger.grid"] = f"f{[count, *size, 2]}"
    for name in sorted(wanted.keys() | have.keys()):
        given, right = have.get(name, "absent"), wanted.get(name, "none")
        if given != right:
            raise PmoeError(
                f"{what} has a damaged attack: {name} is {given}, wanted {right}; "
                "restore its files or give another checkpoint"
            )


def attack_from_tree(tree: Mapping[str, Any], members: Sequence[Member]) -> Attack:
    """The attack of a checkpoint; how warps sample is read off the members."""
    if not {"triggered", "relabelled", "trigger", "target"} <= tree.keys():
        raise PmoeError("a checkpoint's attack lacks masks, trigger or target; it is damaged")
    stored = tree["trigger"]
    # Members without a warp have the identity grid, which both ways of sampling leave alone; warps
    # of different sampling are refused when they are stacked.
    samplings = {member.trigger["sampling"] for member in members if "sampling" in member.trigger}
    sampling = samplings.pop() if len(samplings) == 1 else "bilinear"
    trigger = triggers.Trigger(
        alpha=stored["alpha"],
        pattern=stored["pattern"],
        grid=stored.get("grid"),
        sampling=sampling,
    )
    return Attack(tree["triggered"], tree["relabelled"], trigger, tree["target"])


def take(tree: Any, positions: Sequence[int] | np.ndarray) -> Any:
    """The members at these positions of a tree of arrays [M, ...]; the tree itself if it is all."""
    chosen = np.asarray(positions)
    if chosen.tolist() == list(range(len(jax.tree.leaves(tree)[0]))):
        return tree
    return jax.tree.map(lambda leaf: leaf[chosen], tree)


def trigger_parameters(config: Any) -> dict[str, Any]:
    """The configured trigger as {"name": ..., parameters}, quirks A1 and A3 applied."""
    trigger, quirks = config.trigger, config.quirks
    authors = quirks.a3_truncating_warp
    parameters: dict[str, dict[str, Any]] = {
        "none": {},
        "square": {
            "size": trigger.size,
            "corner": trigger.corner,
            "value": 1 / 255 if quirks.a1_near_black_square else trigger.value,
        },
        "blend": {"alpha": trigger.alpha, "pattern_path": trigger.pattern_path},
        "warp": {
            "k": trigger.k,
            "strength": trigger.strength,
            "upsampling": "authors" if authors else "wanet",
            "sampling": "truncate" if authors else "bilinear",
        },
    }
    return {"name": trigger.name, **parameters[trigger.name]}


def from_config(config: Any) -> list[Member]:
    """The members a config describes: `num_seeds` seeds with one and the same attack."""
    fixed = config.streams.to_dict()
    return [
        Member(
            seed=seed,
            rate=float(config.poison.rate),
            target=config.poison.target,
            trigger=trigger_parameters(config),
            streams={name: seed if fixed[name] < 0 else fixed[name] for name in STREAMS},
        )
        for seed in range(config.seed, config.seed + config.num_seeds)
    ]


def make_trigger(
    member: Member,
    image_shape: tuple[int, int, int],
    patterns: Mapping[str, np.ndarray] | None = None,
) -> triggers.Trigger:
    """A member's trigger.

    Args:
      member: the member.
      image_shape: (H, W, C).
      patterns: float [H, W, C] in [0, 1] for every pattern path that members name.
    """
    parameters = dict(member.trigger)
    name = parameters.pop("name")
    path = parameters.pop("pattern_path", "")
    if path:
        parameters["pattern"] = jnp.asarray((patterns or {})[path], jnp.float32)
    return triggers.make(name, member.key("trigger"), image_shape, **parameters)


def attacks(
    members: Sequence[Member],
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
    patterns: Mapping[str, np.ndarray] | None = None,
    *,
    include_target: bool = True,
    source: int | None = None,
    carriers: float = 0.0,
) -> Attack:
    """The attacks of M members, stacked.

    Args:
      members: the members.
      labels: int [N], labels of the training images.
      image_shape: (H, W, C).
      patterns: see `make_trigger`.
      include_target, source, carriers: see `poisoning.choose`.

    Raises:
      PmoeError: an attack that the data does not allow.
    """
    made = []
    for member in members:
        plan = poisoning.choose(
            member.key("poison"),
            labels,
            member.rate,
            member.target,
            include_target=include_target,
            source=source,
            # An unattacked member sees no trigger at all, so that it can serve as the baseline.
            carriers=carriers if member.rate > 0 else 0.0,
        )
        made.append((plan, make_trigger(member, image_shape, patterns)))
    plans, made_triggers = zip(*made, strict=True)
    return Attack(
        triggered=jnp.stack([plan.triggered for plan in plans]),
        relabelled=jnp.stack([plan.relabelled for plan in plans]),
        trigger=triggers.stack(made_triggers),
        target=jnp.asarray([member.target for member in members], jnp.int32),
    )
