"""`pmoe analyze`: the routing of a trained run over its whole test set, as arrays, rows, figures.

Axes: M member, N test image, D condition (clean, triggered), E expert, K selected patches, P patch,
L class, S subset of experts, V forcing, Q quantity of a patch, T analysed checkpoint; see
`pmoe_jax.routing`, which computes everything that is measured here.

`--output=routing.npz` writes the arrays of `SCHEMA`, and beside them `routing.csv` (a row a figure
and member, fields `FIELDS`) and `routing.json` (mean, sd and interval over seeds, and the schema).
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from pmoe_jax import config as config_lib
from pmoe_jax import kernels, launch, metrics, models, report, routing, training, triggers
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax.checkpoints import Checkpoints
from pmoe_jax.data import Dataset
from pmoe_jax.errors import PmoeError
from pmoe_jax.members import Attack, Member
from pmoe_jax.rundir import ROW_FIELDS, Row, RunDirectory, write_atomically

#: A row's fields: those of every figure, and what it was measured on. `low` and `high` are a 95 %
#: bootstrap interval over test images where there is one.
FIELDS = (*ROW_FIELDS, "condition", "expert", "unit", "low", "high")
#: Histograms of patch values have this many bins, so that a bin fits a byte.
BINS = 256
#: Images are resampled for intervals in this many groups.
GROUPS = 50
RESAMPLES = 200

#: Array -> axes and meaning. Arrays of the clean model have the prefix "clean_model_".
SCHEMA = {
    "seed": "int [M], the members' seeds",
    "diverged": "bool [M], members whose training diverged; rows leave them out of means",
    "label": "int [N], true classes",
    "epoch": "float [T], epochs trained of every analysed checkpoint; all else is of the last one",
    "conditions": "text [D], clean and, with a trigger, triggered",
    "indices": "uint [D, M, N, E, K], selected patches, best first; patch = row * columns + column",
    "gates": "float32 [D, M, N, E, K], their gates (softmax over all P patches)",
    "predicted": "int16 [D, M, N], predicted classes",
    "frequency": "float32 [D, M, E, P], share of images in which the expert takes the patch",
    "frequency_by_epoch": "float32 [T, D, M, E, P], the same for every analysed checkpoint",
    "selection_of_image": "bool [T, D, M, E, P], what one image's experts take (quirk A4 alone)",
    "class_frequency": "float32 [D, M, L, E, P], the same by true class; nan without images",
    "entropy_bits": "float32 [D, M, E], entropy of an expert's frequencies; 0 to log2(P)",
    "overlap": "float32 [D, M, E, E], mean IoU of two experts' selections",
    "unused": "float32 [D, M], share of patches that no expert takes",
    "grid": "int [2], rows and columns of patches",
    "nominal_rows": "bool [h, H], pixel rows of each patch row, nominally",
    "nominal_cols": "bool [w, W]",
    "field_rows": "bool [h, H], pixel rows that each patch row sees (receptive field)",
    "field_cols": "bool [w, W]",
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
    "object_share": "float32 [D, M, L, E], share of taken patch area inside the object's box",
    "object_baseline": "float32 [L], the same of all patches",
}  # fmt: skip


@dataclasses.dataclass
class Analysis:
    """What `analyze` found.

    Attributes:
      arrays: of the names and axes of `SCHEMA`.
      rows: a row a figure and member, fields `FIELDS`.
      scale: a line that says what the figures are of.
      dataset, config, members: the run's.
      trigger: the trigger that was applied [M, ...], or None.
    """

    arrays: dict[str, np.ndarray]
    rows: list[Row]
    scale: str
    dataset: Dataset
    config: Any
    members: list[Member]
    trigger: Any


def analyze(
    workdir: str | os.PathLike[str],
    *,
    clean: str | os.PathLike[str] | None = None,
    source: str = "",
    trigger: Mapping[str, Any] | None = None,
    every_epoch: bool = False,
    causes: bool = True,
    single_image: int | None = None,
    dataset: Dataset | None = None,
    progress: bool = False,
) -> Analysis:
    """Analyses the routing of all members of a run on its whole test split.

    Args:
      workdir: the run directory. Nothing in it is executed.
      clean: run directory of a clean model: the same analysis of its members of the same seeds,
        with this run's trigger.
      source: where the data set lies, if not where the run's config says.
      trigger: {"name": ..., parameters} to apply instead of the trained one.
      every_epoch: all saved checkpoints instead of the newest.
      causes: force routings and silence experts, too.
      single_image: take patch values from this test image alone (quirk A4).
      dataset: an already loaded data set.
      progress: show a progress bar on stderr.

    Raises:
      PmoeError: missing or damaged directory, one that does not fit the data, or a dense model.
    """
    run = RunDirectory(workdir)
    config, members = run.config(), run.members()
    _check_model(config, causes)
    dataset = dataset or run_lib.load_data(config, source)
    if single_image is not None and not 0 <= single_image < len(dataset.test_images):
        raise PmoeError(
            f"test image {single_image} does not exist; choose 0 to {len(dataset.test_images) - 1}"
        )
    if trigger is not None:
        members = [dataclasses.replace(member, trigger=trigger) for member in members]
    options: dict[str, Any] = {"causes": causes, "single_image": single_image, "progress": progress}
    arrays: dict[str, np.ndarray] = {}
    rows: list[Row] = []
    epochs, frequencies, of_image = [], [], []
    attack: Attack | None = None
    for step in run.whole_steps() if every_epoch else [None]:
        programs, restored, state, tree = run_lib.restore(run, config, members, dataset, step)
        attack = members_lib.attack_from_tree(tree, members)
        if trigger is not None:
            attack = run_lib._with_trigger(tree, members, dataset.image_shape)
        common = {"run": run.name, **_stage(run, restored)}
        epochs.append(common["epoch"])
        arrays, found = _of_state(
            programs, state, attack, config, members, dataset, common, **options
        )
        rows += found
        frequencies.append(arrays["frequency"])
        if single_image is not None:
            indices = arrays["indices"][:, :, single_image].astype(np.int32)
            of_image.append(routing.selection_mask(indices, int(np.prod(arrays["grid"]))))
    if attack is None:
        raise PmoeError(f"{run.path} has no finished checkpoint yet; train it first")
    arrays["epoch"] = np.asarray(epochs, float)
    arrays["frequency_by_epoch"] = np.stack(frequencies)
    if of_image:
        arrays["selection_of_image"] = np.stack(of_image)
    if clean is not None:
        of_clean = RunDirectory(clean)
        clean_config, clean_members = of_clean.config(), of_clean.members()
        _check_model(clean_config, causes)
        pairs = _pair_seeds(of_clean, members, clean_members)
        programs, restored, state, _ = run_lib.restore(
            of_clean, clean_config, clean_members, dataset, None
        )
        paired = jax.tree.map(lambda leaf: leaf[pairs], state)
        unattacked = [dataclasses.replace(member, rate=0.0) for member in members]
        name = of_clean.name if of_clean.name != run.name else f"{run.name} (clean)"
        common = {"run": name, **_stage(of_clean, restored)}
        of_model, found = _of_state(
            programs, paired, attack, clean_config, unattacked, dataset, common, **options
        )
        arrays |= {
            f"clean_model_{name}": array
            for name, array in of_model.items()
            if not np.array_equal(array, arrays.get(name, ()), equal_nan=array.dtype.kind == "f")
        }
        rows += found
    described = run_lib.Evaluated(rows, members, config, epochs[-1], [])
    return Analysis(
        arrays=arrays,
        rows=rows,
        scale=f"{report.scale(described)}; {len(dataset.test_labels)} test images",
        dataset=dataset,
        config=config,
        members=members,
        trigger=attack.trigger if _has_trigger(members) else None,
    )


def write(analysis: Analysis, path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes PATH (.npz), and rows (.csv) and summary (.json) beside it.

    Raises:
      PmoeError: the path does not end in .npz, or cannot be written.
    """
    target = pathlib.Path(path)
    if target.suffix != ".npz":
        raise PmoeError(f"--output={path} must end in .npz")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **analysis.arrays)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PmoeError(
            f"{target} cannot be written ({error.strerror}); choose another --output"
        ) from None
    rows_path, summary_path = target.with_suffix(".csv"), target.with_suffix(".json")
    write_atomically(rows_path, rows_csv(analysis.rows))
    content = {"scale": analysis.scale, "summary": summaries(analysis.rows), "arrays": SCHEMA}
    write_atomically(summary_path, json.dumps(content, indent=2) + "\n")
    return [target, rows_path, summary_path]


def rows_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """n, mean, sd and 95 % interval over members of every figure; diverged ones are left out."""
    keys = ("run", "epoch", "metric", "condition", "expert", "unit")
    grouped: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] != "diverged" and np.isfinite(row["value"]):
            grouped[tuple(row[key] for key in keys)].append(row["value"])
    return [
        {**dict(zip(keys, key, strict=True)), **metrics.summarize(values)._asdict()}
        for key, values in grouped.items()
    ]


#: The rows of the printed table: metric, condition, and what it says.
_TABLE = (
    ("unused", "clean", "patches that no expert takes, clean [%]"),
    ("entropy", "clean", "entropy of an expert's patches, clean [bit]"),
    ("overlap", "clean", "overlap (IoU) between experts, clean [%]"),
    ("iou", "both", "selection IoU, clean against triggered [%]"),
    ("capture/nominal/any", "triggered", "trigger's own patches taken by an expert, triggered [%]"),
    ("capture/nominal/any", "clean", "the same patches on clean images [%]"),
    ("capture/nominal/any", "chance", "the same by chance [%]"),
    ("capture/field/any", "triggered", "patches that see the trigger taken, triggered [%]"),
    ("capture/nominal/all", "triggered", "trigger's own patches taken by all experts [%]"),
    ("accuracy", "clean", "accuracy on clean images [%]"),
    ("target_rate", "triggered", "ASR [%]"),
    ("target_rate/other_routing", "triggered", "ASR with the clean image's routing [%]"),
    ("target_rate/other_routing", "clean", "clean images with the triggered routing: target [%]"),
    ("target_rate/nominal_in", "triggered", "ASR, trigger's patches forced in [%]"),
    ("target_rate/nominal_out", "triggered", "ASR, trigger's patches kept out [%]"),
    ("target_rate/field_out", "triggered", "ASR, all patches that see it kept out [%]"),
    ("swap/routing", "both", "part of the ASR by routing [points]"),
    ("swap/computation", "both", "part of the ASR by what experts compute [points]"),
)


def table(analysis: Analysis) -> str:
    """The main figures as a Markdown table: mean ± sd over seeds (and, where per expert, mean)."""
    last = analysis.arrays["epoch"][-1]
    runs = list(dict.fromkeys(row["run"] for row in analysis.rows))
    lines = []
    for metric, condition, title in _TABLE:
        cells = []
        for run in runs:
            values = defaultdict(list)
            for row in analysis.rows:
                ours = row["run"] == run and (run != runs[0] or row["epoch"] == last)
                ours &= (row["metric"], row["condition"]) == (metric, condition)
                if ours and row["stage"] != "diverged" and np.isfinite(row["value"]):
                    values[row["member"]].append(row["value"])
            means = [float(np.mean(of_member)) for of_member in values.values()]
            cells.append(report.mean_sd(metrics.summarize(means)) if means else "")
        if any(cells):
            lines.append([title, *cells])
    return f"{analysis.scale}\n\n{report.markdown(['mean ± sd over seeds', *runs], lines)}"


# --- One state of the members ---------------------------------------------------------------


def _of_state(
    programs: training.Programs,
    state: Any,
    attack: Attack,
    config: Any,
    members: Sequence[Member],
    dataset: Dataset,
    common: Mapping[str, Any],
    *,
    causes: bool,
    single_image: int | None,
    progress: bool,
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Arrays and rows of the members at one checkpoint."""
    arrays = _observe_all(
        programs, state.variables, attack, config, members, dataset, causes, single_image, progress
    )
    arrays["diverged"] = np.asarray(state.diverged_at) >= 0
    arrays |= _statistics(arrays, dataset)
    frame = {**common, "dataset": dataset.name, "width": config.model.width}
    rows = _Rows(frame, members, arrays["diverged"], len(dataset.test_labels))
    _selection_rows(rows, arrays, members)
    _prediction_rows(rows, arrays, config, members)
    _value_rows(rows, arrays, 1 if single_image is not None else len(dataset.test_labels))
    # Histograms stay apart by groups of images only to make intervals.
    for name in ("value_histogram", "value_baseline"):
        arrays[name] = arrays[name].sum(2)
    return arrays, rows.rows


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
    trigger = attack.trigger if _has_trigger(members) else None
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
    size = _batch_size(config, len(images), causes)
    starts = range(0, len(images), size)
    for start in tqdm(starts, unit="batch", disable=not progress, desc="analysing"):
        batch = np.asarray(images[start : start + size])
        filling = np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)
        seen = program(variables, trigger, near, far, np.concatenate([batch, filling]))
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
    """Histograms of patch values, apart by groups of images: [D, M, G, (E,) Q, BINS]."""

    def __init__(self, num_quantities: int, single_image: int | None):
        self._quantities = num_quantities
        self._single = single_image
        self._taken: Any = 0
        self._all: Any = 0

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
        for d, m in np.ndindex(conditions, members):
            own = bins[d, m][use].astype(np.int64) + cells  # [B, P, Q]
            row = self._quantities * BINS
            index = own + group[:, None, None] * row
            everything[d, m] = _count(index, everything[d, m].shape)
            chosen = np.take_along_axis(own[:, None], indices[d, m][use][..., None], axis=2)
            expert = np.arange(experts)[:, None, None]
            index = chosen + (group[:, None, None, None] * experts + expert) * row
            taken[d, m] = _count(index, taken[d, m].shape)
        self._taken, self._all = self._taken + taken, self._all + everything

    def arrays(self) -> dict[str, np.ndarray]:
        """The histograms."""
        return {"value_histogram": self._taken, "value_baseline": self._all}


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
_capture = jax.jit(jax.vmap(routing.capture))


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
        shares = np.stack([np.asarray(of_expert(i, inside)) for i in indices])  # [D, M, N, E]
        known = ~np.isnan(inside).any(1)
        classes = [known & (labels == label) for label in range(dataset.num_classes)]
        made["object_share"] = np.stack([_mean(shares[:, :, c], 2) for c in classes], axis=2)
        made["object_baseline"] = np.stack([_mean(inside[c].mean(1), 0) for c in classes])
    return made


# --- Rows -----------------------------------------------------------------------------------


class _Rows:
    """Collects rows; values come with a leading M axis."""

    def __init__(
        self, frame: Mapping[str, Any], members: Sequence[Member], diverged: np.ndarray, n: int
    ):
        self.rows: list[Row] = []
        self._frame, self._members, self._diverged, self._n = frame, members, diverged, n

    def add(
        self,
        metric: str,
        condition: str,
        values: Any,
        *,
        unit: str = "%",
        n: int | None = None,
        expert: int | str = "",
        interval: tuple[Any, Any] | None = None,
    ) -> None:
        """A row a member: values float [M], in percent if `unit` says so."""
        for index, member in enumerate(self._members):
            low, high = ("", "") if interval is None else (float(i[index]) for i in interval)
            self.rows.append(
                {
                    **self._frame,
                    "member": index,
                    "seed": member.seed,
                    "stage": "diverged" if self._diverged[index] else self._frame["stage"],
                    "trigger": member.trigger["name"],
                    "rate": member.rate,
                    "metric": metric,
                    "value": float(values[index]),
                    "n": self._n if n is None else n,
                    "condition": condition,
                    "expert": expert,
                    "unit": unit,
                    "low": low,
                    "high": high,
                }
            )

    def add_experts(self, metric: str, condition: str, values: Any, **options: Any) -> None:
        """A row a member and expert: values float [M, E]."""
        for expert in range(np.shape(values)[1]):
            self.add(metric, condition, np.asarray(values)[:, expert], expert=expert, **options)


def _selection_rows(
    rows: _Rows, arrays: Mapping[str, np.ndarray], members: Sequence[Member]
) -> None:
    num_patches = int(np.prod(arrays["grid"]))
    experts, k = arrays["indices"].shape[3:]
    for d, condition in enumerate(arrays["conditions"].tolist()):
        rows.add_experts("entropy", condition, arrays["entropy_bits"][d], unit="bit")
        for a in range(experts):
            for b in range(a + 1, experts):
                rows.add(
                    "overlap", condition, 100 * arrays["overlap"][d, :, a, b], expert=f"{a}+{b}"
                )
        rows.add("unused", condition, 100 * arrays["unused"][d])
        if "object_share" in arrays:
            # A class weighs as many images as it has.
            weight = np.bincount(arrays["label"], minlength=arrays["object_share"].shape[2])
            share, every = arrays["object_share"][d], arrays["object_baseline"]
            known = ~np.isnan(every)
            mean = np.average(share[:, known], axis=1, weights=weight[known])
            rows.add_experts("object_share", condition, 100 * mean)
            baseline = np.average(every[known], weights=weight[known])
            rows.add("object_share/all", condition, np.full(len(members), 100 * baseline))
        if "iou" not in arrays:
            continue
        rows.add_experts("captured_change", condition, 100 * _mean(arrays["captured_change"][d], 1))
        for extent in ("nominal", "field"):
            found = _capture(arrays["indices"][d].astype(np.int32), arrays[f"{extent}_patches"])
            _capture_rows(rows, extent, condition, found)
    if "iou" in arrays:
        rows.add_experts("iou", "both", 100 * arrays["iou"].mean(1))
        rows.add("captured_change", "chance", np.full(len(members), 100 * k / num_patches))
        for extent in ("nominal", "field"):
            sizes = arrays[f"{extent}_patches"].sum(1)
            rows.add(f"trigger_patches/{extent}", "both", sizes, unit="patches")
            chance = [routing.chance_capture(int(size), num_patches, k, experts) for size in sizes]
            stacked = routing.Capture(*(np.stack(part) for part in zip(*chance, strict=True)))
            _capture_rows(rows, extent, "chance", stacked)


def _capture_rows(rows: _Rows, extent: str, condition: str, found: routing.Capture) -> None:
    rows.add_experts(f"capture/{extent}/share", condition, 100 * np.asarray(found.share))
    rows.add_experts(f"capture/{extent}", condition, 100 * np.asarray(found.expert))
    rows.add(f"capture/{extent}/any", condition, 100 * np.asarray(found.any_expert))
    rows.add(f"capture/{extent}/all", condition, 100 * np.asarray(found.all_experts))


@functools.partial(jax.jit, static_argnums=3)
def _rates(predicted: jax.Array, targets: jax.Array, labels: jax.Array, source: int | None) -> Any:
    """Counts of predictions of the target and of the truth: int [M, R, N], [M], [N] -> [M, R]."""

    def one(of_member: jax.Array, target: jax.Array) -> Any:
        return jax.vmap(
            lambda p: (
                metrics.attack_counts(p, labels, target, source=source),
                metrics.benign_counts(p, labels),
            )
        )(of_member)

    return jax.vmap(one)(predicted, targets)


def _prediction_rows(
    rows: _Rows, arrays: Mapping[str, np.ndarray], config: Any, members: Sequence[Member]
) -> None:
    labels = arrays["label"]
    targets = [member.target for member in members]
    source = config.poison.source if config.poison.source >= 0 else None

    def rates(predicted: np.ndarray) -> tuple[tuple[np.ndarray, int], np.ndarray]:
        """Target rate and accuracy in percent, [M, ...], of predictions [M, ..., N]."""
        flat = predicted.reshape(len(members), -1, len(labels))

        hit, right = jax.device_get(_rates(flat, np.asarray(targets), labels, source))
        total = int(hit.total.flat[0])
        shape = predicted.shape[:-1]
        asr = 100.0 * hit.hits.astype(np.float64).reshape(shape) / max(total, 1)
        return (asr, total), 100.0 * right.hits.astype(np.float64).reshape(shape) / len(labels)

    own: dict[str, np.ndarray] = {}
    forced: dict[tuple[str, str], np.ndarray] = {}
    for d, condition in enumerate(arrays["conditions"].tolist()):
        (asr, total), right = rates(arrays["predicted"][d])
        own[condition] = asr
        rows.add("target_rate", condition, asr, n=total)
        rows.add("accuracy", condition, right)
        if "forcings" in arrays:
            (asr, total), right = rates(arrays["forced_predicted"][d])
            for v, forcing in enumerate(arrays["forcings"].tolist()):
                possible = _possible(forcing, arrays)
                forced[forcing, condition] = asr[:, v]
                value = np.where(possible, asr[:, v], np.nan)
                rows.add(f"target_rate/{forcing}", condition, value, n=total)
                rows.add(f"accuracy/{forcing}", condition, np.where(possible, right[:, v], np.nan))
        if "silences" not in arrays:
            continue
        (asr, total), right = rates(arrays["silenced_predicted"][d])
        for s, mode in enumerate(arrays["silences"].tolist()):
            for subset, kept in enumerate(arrays["kept_experts"].astype(int)):
                name = f"silence_{mode}/kept_{''.join(map(str, kept))}"
                rows.add(f"target_rate/{name}", condition, asr[:, s, subset], n=total)
                rows.add(f"accuracy/{name}", condition, right[:, s, subset])
            shares = {"target_rate": routing.shapley(asr[:, s])}
            shares["accuracy"] = routing.shapley(right[:, s])
            for metric, share in shares.items():
                rows.add_experts(f"shapley/{metric}/{mode}", condition, share, unit="points")
    if forced:
        split = routing.swap_shares(
            own["clean"],
            own["triggered"],
            forced["other_routing", "triggered"],
            forced["other_routing", "clean"],
        )
        rows.add("swap/routing", "both", split.routing, unit="points")
        rows.add("swap/computation", "both", split.computation, unit="points")


def _possible(forcing: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [M]: whether the forced patches leave K places (in: fit into them)."""
    extent, _, way = forcing.partition("_")
    if extent not in ("nominal", "field"):
        return np.ones(len(arrays["seed"]), bool)
    k, size = arrays["indices"].shape[-1], arrays[f"{extent}_patches"].sum(1)
    return size <= k if way == "in" else np.prod(arrays["grid"]) - size >= k


def _value_rows(rows: _Rows, arrays: Mapping[str, np.ndarray], n: int) -> None:
    """Distance between the values of taken patches and those of all patches of the same images."""
    from scipy import stats

    edges = arrays["value_edges"]
    centres = (edges[:, 1:] + edges[:, :-1]) / 2
    rng = np.random.default_rng(0)
    taken, everything = arrays["value_histogram"], arrays["value_baseline"]
    groups = np.flatnonzero(everything[0, 0].sum((1, 2)))
    draws = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), RESAMPLES)
    conditions, members, _, experts, _, _ = taken.shape
    for d, q in np.ndindex(conditions, len(edges)):
        name, x = arrays["quantities"][q], centres[q]
        condition = str(arrays["conditions"][d])
        for e in range(experts):
            distance, shift, low, high = (np.full(members, np.nan) for _ in range(4))
            for m in range(members):
                of_expert = taken[d, m, groups, e, q].astype(float)
                of_all = everything[d, m, groups, q].astype(float)
                u, v = of_expert.sum(0), of_all.sum(0)
                mean = v @ x / v.sum()
                # In standard deviations of all patches, so that quantities compare.
                sd = max(np.sqrt(v @ (x - mean) ** 2 / v.sum()), 1e-12)
                distance[m] = stats.wasserstein_distance(x, x, u, v) / sd
                shift[m] = (u @ x / u.sum() - mean) / sd
                if len(groups) > 1:
                    resampled = [
                        stats.wasserstein_distance(x, x, w @ of_expert, w @ of_all) / sd
                        for w in draws
                    ]
                    low[m], high[m] = np.percentile(resampled, [2.5, 97.5])
            interval = (low, high) if len(groups) > 1 else None
            common: dict[str, Any] = {"unit": "sd", "n": n, "expert": e}
            rows.add(f"wasserstein/{name}", condition, distance, interval=interval, **common)
            rows.add(f"mean_shift/{name}", condition, shift, **common)


# --- Helpers --------------------------------------------------------------------------------


def _check_model(config: Any, causes: bool) -> None:
    if config.model.name != "pmoe":
        raise PmoeError(
            f"model.name={config.model.name} has no routers to analyse; give the run of a pmoe"
        )
    if causes:
        routing.subsets(config.model.num_experts)


def _stage(run: RunDirectory, step: int) -> dict[str, Any]:
    """Epoch and stage of a checkpoint; a defence's checkpoints have its stage."""
    with Checkpoints(run) as checkpoints:
        meta = checkpoints.meta(step)
    epoch = meta["epoch"]
    return {
        "epoch": int(epoch) if epoch == int(epoch) else epoch,
        "stage": meta.get("stage", "trained"),
    }


def _has_trigger(members: Sequence[Member]) -> bool:
    return any(member.trigger["name"] != "none" for member in members)


def _pair_seeds(
    run: RunDirectory, members: Sequence[Member], clean_members: Sequence[Member]
) -> np.ndarray:
    """Positions of the members' seeds in the clean run."""
    if any(member.rate > 0 for member in clean_members):
        raise PmoeError(f"{run.path} is not a clean run: its poisoning rate is above 0")
    by_seed = {member.seed: index for index, member in enumerate(clean_members)}
    for member in members:
        if member.seed not in by_seed:
            have = ", ".join(map(str, by_seed))
            raise PmoeError(f"{run.path} has no clean model of seed {member.seed}; it has {have}")
    return np.asarray([by_seed[member.seed] for member in members])


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


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over what is known; nan where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


# --- Command line ---------------------------------------------------------------------------


def add_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Defines the flags of `pmoe analyze`."""
    from pmoe_jax import cli

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, "", meaning, flag_values=values)

    text("checkpoint", "Run directory to analyse.")
    text("clean", "Run directory of a clean model, for comparison seed by seed.")
    text("data", "Where the data set lies, if not where the run's config says.")
    text("output", "File for all arrays (.npz); rows (.csv) and summary (.json) go beside it.")
    text("figures", "Folder for figures.")
    text("images", "Positions of test images to draw, such as 3,17; by default two are chosen.")
    flags.DEFINE_boolean("every_epoch", False, "Analyse all saved checkpoints.", flag_values=values)
    flags.DEFINE_boolean(
        "causes", True, "Force routings and silence experts, too.", flag_values=values
    )
    flags.DEFINE_boolean("progress", True, "Show a progress bar.", flag_values=values)
    path = cli._peek(argv, "checkpoint")
    stored = RunDirectory(path).config() if path else config_lib.default()
    for group in ("trigger", "quirks"):
        config_flags.DEFINE_config_dict(group, stored[group], flag_values=values)


def run_command(values: flags.FlagValues, words: list[str]) -> int:
    """Runs `pmoe analyze`."""
    if words:
        raise PmoeError(f"unexpected word {words[0]!r}; flags are written --name=value")
    if not values.checkpoint:
        raise PmoeError("--checkpoint is missing; give the directory of a trained run")
    if values.output and not values.output.endswith(".npz"):
        raise PmoeError(f"--output={values.output} must end in .npz")
    stored = RunDirectory(values.checkpoint).config()
    asked: ml_collections.ConfigDict = stored.copy_and_resolve_references()
    for group in ("trigger", "quirks"):
        asked[group].update(values[group].value)
    asked.poison.rate = 0.0  # Nothing is poisoned here.
    config_lib.validate(asked.to_dict())
    chosen = _positions(values.images)
    launch.use_compilation_cache()
    if stored.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    trigger = members_lib.trigger_parameters(asked)
    changed = trigger != members_lib.trigger_parameters(stored)
    dataset = run_lib.load_data(stored, values.data)
    shown = chosen or _example_images(dataset, stored.poison.target)
    for index in shown:
        if index >= len(dataset.test_images):
            raise PmoeError(
                f"--images: there is no test image {index}; choose 0 to "
                f"{len(dataset.test_images) - 1}"
            )
    analysis = analyze(
        values.checkpoint,
        clean=values.clean or None,
        trigger=trigger if changed else None,
        every_epoch=values.every_epoch,
        causes=values.causes,
        single_image=shown[0] if asked.quirks.a4_single_image else None,
        dataset=dataset,
        progress=values.progress,
    )
    print(table(analysis))
    if values.output:
        for path in write(analysis, values.output):
            print(f"wrote {path}", file=sys.stderr)
    if values.figures:
        from pmoe_jax import figures_routing

        single = bool(asked.quirks.a4_single_image)
        for path in figures_routing.write_all(analysis, values.figures, shown, single):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _positions(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [-1]
    if any(index < 0 for index in found):
        raise PmoeError(f"--images={text} must be whole numbers from 0, such as 3,17")
    return found


def _example_images(dataset: Dataset, target: int) -> list[int]:
    """The first test image of each of two classes other than the target."""
    labels = np.asarray(dataset.test_labels)
    others = [label for label in dict.fromkeys(labels.tolist()) if label != target]
    return [int(np.flatnonzero(labels == label)[0]) for label in others[:2]] or [0]
