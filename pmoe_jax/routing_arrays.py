"""From a checkpoint and a test set to the arrays of `SCHEMA`: all that `pmoe analyze` measures.

Axes: M member, N test image, D condition (clean, triggered), E expert, K selected patches, P patch,
Y class, S subset of experts, V forcing, Q quantity of a patch, T analysed checkpoint; see
`pmoe_jax.routing`, whose functions of one member and batch are run here over all of them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pmoe_jax import evaluation, kernels, memory, models, routing, training, triggers
from pmoe_jax.data import Dataset
from pmoe_jax.members import Attack, Member

#: Histograms of patch values have this many bins, so that a bin fits a byte.
BINS = 256
#: Images are resampled for intervals in this many groups.
GROUPS = 50

#: Prefixes of the arrays of a clean and of a defended model; equal arrays are not stored twice.
PREFIXES = ("clean_model_", "defended_model_")
#: Array -> axes and meaning.
SCHEMA = {
    "seed": "int [M], the members' seeds",
    "target": "int [M], their target labels",
    "diverged": "bool [M], members whose training diverged, or whose outputs are not finite; rows "
    "leave them out of means",
    "label": "int [N], true classes",
    "epoch": "float [T], epochs trained of every analysed checkpoint; all else is of the last one",
    "conditions": "text [D], clean and, with a trigger, triggered",
    "indices": "uint [D, M, N, E, K], selected patches, best first; patch = row * columns + column",
    "gates": "float32 [D, M, N, E, K], their gates (softmax over all P patches)",
    "predicted": "int16 [D, M, N], predicted classes",
    "frequency": "float32 [D, M, E, P], share of images in which the expert takes the patch",
    "frequency_by_epoch": "float32 [T, D, M, E, P], the same for every analysed checkpoint",
    "selection_of_image": "bool [T, D, M, E, P], what one image's experts take (quirk A4 alone)",
    "class_frequency": "float32 [D, M, Y, E, P], the same by true class; nan without images",
    "entropy_bits": "float32 [D, M, E], entropy of an expert's frequencies; log2(K) to log2(P)",
    "overlap": "float32 [D, M, E, E], mean IoU of two experts' selections",
    "unused": "float32 [D, M], share of patches that no expert takes",
    "grid": "int [2], rows and columns of patches",
    "nominal_rows": "bool [h, H], pixel rows of each patch row, nominally",
    "nominal_cols": "bool [w, W], the same of columns",
    "field_rows": "bool [h, H], pixel rows that each patch row sees (receptive field)",
    "field_cols": "bool [w, W], the same of columns",
    "trigger_pixels": "bool [M, H, W], pixels that the trigger can change",
    "nominal_patches": "bool [M, P], patches nominally touched by the trigger",
    "field_patches": "bool [M, P], patches whose receptive field the trigger touches",
    "iou": "float32 [M, N, E], IoU of the selections from the clean and the triggered image",
    "captured_change": "float32 [D, M, N, E], share of the trigger's changes in taken patches",
    "forcings": "text [V], what is forced, see routing.FORCINGS",
    "forced_predicted": "int16 [D, M, V, N], predicted classes under it",
    "silences": "text [2], what a silenced expert sends: zero or its running mean",
    "kept_experts": "bool [S, E], experts that are not silenced",
    "silenced_predicted": "int16 [D, M, 2, S, N], predicted classes",
    "quantities": "text [Q], see routing.patch_values",
    "value_edges": "float64 [Q, BINS + 1], bin edges of the histograms",
    "value_histogram": "int64 [D, M, E, Q, BINS], values of the patches an expert takes",
    "value_baseline": "int64 [D, M, Q, BINS], values of all patches",
    "value_by_position": "int64 [D, M, P, Q, BINS], values of all patches, by position",
    "object_share": "float32 [D, M, N, E], taken patch area inside the object's box; nan: no box",
    "object_baseline": "float32 [N], the same of all patches",
    "object_by_position": "float32 [Y, P], the same of each patch, mean over the class's images",
}  # fmt: skip


def measure(
    programs: training.Programs,
    state: Any,
    attack: Attack,
    config: Any,
    members: Sequence[Member],
    dataset: Dataset,
    *,
    causes: bool,
    single_image: int | None,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Arrays of the members at one checkpoint, as in `SCHEMA`, over the whole test split.

    Histograms of patch values are still apart by groups of images, on an axis G before the last
    ones, for intervals; see `without_groups`.

    Args:
      programs, state, attack: of the restored checkpoint.
      config, members, dataset: the run's.
      causes: force routings and silence experts, too.
      single_image: take patch values from this test image alone (quirk A4).
      progress: show a progress bar on stderr.
    """
    arrays = _observe_all(
        programs, state.variables, attack, config, members, dataset, causes, single_image, progress
    )
    nowhere = evaluation.has_no_class(np.moveaxis(arrays["predicted"], 0, 1), None)
    arrays["diverged"] = (np.asarray(state.diverged_at) >= 0) | nowhere
    return arrays | _statistics(arrays, dataset)


def title_of(arrays: Mapping[str, np.ndarray], member: int) -> str:
    """What figures call a member."""
    return f"seed {arrays['seed'][member]}" + "\n(diverged)" * bool(arrays["diverged"][member])


def without_groups(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays with histograms over all images."""
    names = ("value_histogram", "value_baseline")
    return {**arrays, **{name: arrays[name].sum(2) for name in names}}


def has_trigger(members: Sequence[Member]) -> bool:
    """Whether any member has a trigger."""
    return any(member.trigger["name"] != "none" for member in members)


def _observe_all(
    programs: training.Programs,
    variables: Any,
    attack: Attack,
    config: Any,
    members: Sequence[Member],
    dataset: Dataset,
    causes: bool,
    single_image: int | None,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Runs `routing.observe` and `routing.patch_values` over the test split."""
    shape = dataset.image_shape
    trigger = attack.trigger if has_trigger(members) else None
    nominal, field = _views(programs.model, shape)
    largest = _largest(nominal, shape[2])
    pixels = near = far = None
    if trigger is not None:
        pixels = _changed_pixels(trigger)
        near, far = _touched(nominal, pixels), _touched(field, pixels)
    program = _program(programs.model, programs.strategy, shape, causes)
    counts = _Counts(len(largest), single_image)
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    images = dataset.test_images

    def arguments(batch: Any) -> tuple[Any, ...]:
        return variables, trigger, near, far, batch

    size = _batch_size(config, len(images), causes)
    size = memory.batch_that_fits(program, arguments, images, size)
    starts = range(0, len(images), size)
    for start in tqdm(starts, unit="batch", disable=not progress, desc="analysing"):
        batch = np.asarray(images[start : start + size])
        filling = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
        seen = program(*arguments(np.concatenate([batch, filling])))
        # M D B ... -> D M B ..., and B is the last axis of the predictions of forced images.
        host = {name: np.asarray(array).swapaxes(0, 1) for name, array in seen.items()}
        for name in host:
            axis = -1 if name in ("forced", "silenced") else 2
            host[name] = np.moveaxis(np.moveaxis(host[name], axis, 0)[: len(batch)], 0, axis)
        counts.add(start, host["indices"], host.pop("bins"))
        for name, array in host.items():
            parts[name].append(_shrunk(name, array, nominal.num_patches))

    def joined(name: str) -> np.ndarray:
        return np.concatenate(parts[name], axis=-1 if name in ("forced", "silenced") else 2)

    arrays = {
        "seed": np.asarray([member.seed for member in members]),
        "target": np.asarray([member.target for member in members]),
        "label": np.asarray(dataset.test_labels),
        "conditions": np.asarray(routing.CONDITIONS[: 1 if trigger is None else 2]),
        "grid": np.asarray(nominal.grid),
        "nominal_rows": nominal.rows,
        "nominal_cols": nominal.cols,
        "field_rows": field.rows,
        "field_cols": field.cols,
        **{name: joined(name) for name in ("indices", "gates", "predicted")},
        "quantities": np.asarray(list(largest)),
        "value_edges": np.asarray(list(largest.values()))[:, None] * np.linspace(0, 1, BINS + 1),
        **counts.arrays(),
    }
    if trigger is not None:
        arrays["trigger_pixels"] = np.asarray(pixels)
        arrays["nominal_patches"], arrays["field_patches"] = np.asarray(near), np.asarray(far)
        arrays["captured_change"] = joined("captured")
    if causes:
        arrays["silences"] = np.asarray(models.SILENCE_MODES)
        arrays["kept_experts"] = routing.subsets(config.model.num_experts)
        arrays["silenced_predicted"] = joined("silenced")
        if trigger is not None:
            arrays["forcings"] = np.asarray(routing.FORCINGS)
            arrays["forced_predicted"] = joined("forced")
    return arrays


_changed_pixels = jax.jit(jax.vmap(routing.changed_pixels))
_touched = jax.jit(routing.PatchView.touched)


def _views(model: Any, shape: tuple[int, int, int]) -> tuple[routing.PatchView, routing.PatchView]:
    """The nominal patches and the receptive fields."""
    return routing.nominal(model, shape), routing.receptive_field(model, shape)


def _largest(nominal: routing.PatchView, channels: int) -> dict[str, float]:
    block = int(nominal.rows[0].sum() * nominal.cols[0].sum())
    return routing.quantities(channels, block)


@functools.lru_cache(maxsize=8)
def _program(model: Any, strategy: str, shape: tuple[int, int, int], causes: bool) -> Any:
    """The jitted program of a batch, for all members; the same for all checkpoints of a model.

    It maps (variables, trigger, nominal and field patches, all [M, ...], images uint8 [B, H, W, C])
    to what `routing.observe` gives, "captured" [M, D, B, E] and "bins" uint8 [M, D, B, P, Q].
    """
    nominal, _ = _views(model, shape)
    scales = jnp.asarray(list(_largest(nominal, shape[2]).values()))

    def one(variables: Any, trigger: Any, near: Any, far: Any, images: jax.Array) -> Any:
        inputs = training.to_float(images)
        seen = routing.observe(model, variables, inputs, trigger, near, far, causes)
        conditions = [inputs]
        if trigger is not None:
            conditions.append(triggers.apply(inputs, trigger))
            change = nominal.sums(jnp.abs(conditions[1] - inputs)).sum(-1)
            captured = [routing.captured_change(indices, change) for indices in seen["indices"]]
            seen["captured"] = jnp.stack(captured)
        values = jnp.stack([routing.patch_values(x, nominal) for x in conditions])
        seen["bins"] = jnp.clip(values / scales * BINS, 0, BINS - 1).astype(jnp.uint8)
        return seen

    return jax.jit(
        training.over_members(one, strategy, shared=(4,)),
        compiler_options=kernels.compiler_options(jax.default_backend()),
    )


class _Counts:
    """Histograms of patch values [D, M, ..., Q, BINS]: by groups of images, or by position."""

    def __init__(self, num_quantities: int, single_image: int | None):
        self._quantities = num_quantities
        self._single = single_image
        self._taken: Any = 0
        self._all: Any = 0
        self._places: Any = 0

    def add(self, start: int, indices: np.ndarray, bins: np.ndarray) -> None:
        """Adds a batch: indices int [D, M, B, E, K], bins uint8 [D, M, B, P, Q]."""
        conditions, members, batch, experts, _ = indices.shape
        image = np.arange(start, start + batch)
        use = slice(None) if self._single is None else image == self._single
        group = (image % GROUPS)[use]
        cells = np.arange(self._quantities) * BINS
        shape = conditions, members, GROUPS
        taken = np.zeros((*shape, experts, self._quantities, BINS), np.int64)
        everything = np.zeros((*shape, self._quantities, BINS), np.int64)
        patch = np.arange(bins.shape[3])[:, None]
        places = np.zeros((*shape[:2], len(patch), self._quantities, BINS), np.int64)
        for d, m in np.ndindex(conditions, members):
            own = bins[d, m][use].astype(np.int64) + cells  # [B, P, Q]
            row = self._quantities * BINS
            index = own + group[:, None, None] * row
            everything[d, m] = _count(index, everything[d, m].shape)
            places[d, m] = _count(own + patch * row, places[d, m].shape)
            chosen = np.take_along_axis(own[:, None], indices[d, m][use][..., None], axis=2)
            expert = np.arange(experts)[:, None, None]
            index = chosen + (group[:, None, None, None] * experts + expert) * row
            taken[d, m] = _count(index, taken[d, m].shape)
        self._taken, self._all = self._taken + taken, self._all + everything
        self._places = self._places + places

    def arrays(self) -> dict[str, np.ndarray]:
        """The histograms."""
        return {
            "value_histogram": self._taken,
            "value_baseline": self._all,
            "value_by_position": self._places,
        }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _selections(
    indices: jax.Array, labels: jax.Array, num_patches: int, num_classes: int
) -> dict[str, jax.Array]:
    """What follows from the members' selections int [M, N, E, K] in one condition."""

    def one(indices: jax.Array) -> dict[str, jax.Array]:
        overall, by_class = routing.frequency(indices, labels, num_patches, num_classes)
        return {
            "frequency": overall,
            "class_frequency": by_class,
            "entropy_bits": routing.entropy_bits(overall),
            "overlap": routing.overlap(indices, num_patches),
            "unused": routing.unused(indices, num_patches),
        }

    return jax.vmap(one)(indices)


_iou = jax.jit(routing.iou, static_argnums=2)


def _statistics(arrays: Mapping[str, np.ndarray], dataset: Dataset) -> dict[str, np.ndarray]:
    """What follows from the selections alone, vmapped over members; one condition at a time."""
    num_patches, labels = int(np.prod(arrays["grid"])), np.asarray(dataset.test_labels)
    nominal = routing.PatchView(arrays["nominal_rows"], arrays["nominal_cols"])

    indices = arrays["indices"].astype(np.int32)
    sizes = num_patches, dataset.num_classes
    found = [jax.device_get(_selections(each, labels, *sizes)) for each in indices]
    made = {name: np.stack([one[name] for one in found]) for name in found[0]}
    if len(indices) == 2:
        made["iou"] = np.asarray(_iou(*indices, num_patches))
    if dataset.test_boxes is not None:
        inside = np.asarray(jax.jit(lambda b: routing.inside_boxes(b, nominal))(dataset.test_boxes))
        of_expert = jax.jit(jax.vmap(routing.mean_over_selected, in_axes=(0, None)))
        made["object_share"] = np.stack([np.asarray(of_expert(i, inside)) for i in indices])
        made["object_baseline"] = inside.mean(1)
        classes = range(dataset.num_classes)
        of_class = [mean_known(inside[labels == label], 0) for label in classes]
        made["object_by_position"] = np.stack(of_class)
    return made


def _batch_size(config: Any, num_images: int, causes: bool) -> int:
    """Images a call: the forced and silenced forms of a batch stay within 256 MiB a member."""
    model, budget = config.model, 2**28
    taken = 4 * 2 * model.num_experts * model.patches_per_expert * 16 * model.width
    forms = max(4 * len(routing.FORCINGS), 2**model.num_experts) if causes else 4
    fitting = max(1, budget // (taken * forms))
    return min(config.evaluation.batch_size, num_images, fitting)


def _shrunk(name: str, array: np.ndarray, num_patches: int) -> np.ndarray:
    """The smallest type that holds an array of `routing.observe`."""
    if name == "indices":
        return array.astype(np.min_scalar_type(num_patches - 1))
    if name in ("predicted", "forced", "silenced"):
        return array.astype(np.int16)
    return array.astype(np.float32)


def _count(index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.bincount(index.ravel(), minlength=int(np.prod(shape))).reshape(shape)


def mean_known(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over what is known; nan where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
