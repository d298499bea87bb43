"""From arrays of a checkpoint to rows: one figure of one member each, with its unit and condition.

Axes as in `pmoe_jax.routing_arrays`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pmoe_jax import metrics, routing
from pmoe_jax.members import Member
from pmoe_jax.routing_arrays import GROUPS, mean_known
from pmoe_jax.rows import ROW_FIELDS, Row

#: A row's fields: those of every figure, and what it was measured on. `low` and `high` are a 95 %
#: bootstrap interval over test images where there is one.
FIELDS = (*ROW_FIELDS, "condition", "expert", "class", "unit", "low", "high")
#: Bootstrap samples of an interval.
RESAMPLES = 200


def rows_of(
    arrays: Mapping[str, np.ndarray],
    source: int | None,
    members: Sequence[Member],
    frame: Mapping[str, Any],
    value_images: int,
) -> list[Row]:
    """All rows of one checkpoint.

    Args:
      arrays: of `routing_arrays.measure`.
      source: the attacked class of a source-specific attack.
      members: the run's, with the trigger that was applied.
      frame: fields that all rows share: run, epoch, stage, dataset, width.
      value_images: how many test images the patch values are of.
    """
    rows = _Rows(frame, members, arrays["diverged"], len(arrays["label"]))
    _selection_rows(rows, arrays, members)
    if "object_share" in arrays:
        _object_rows(rows, arrays)
    _prediction_rows(rows, arrays, source, members)
    _value_rows(rows, arrays, value_images)
    return rows.rows


_capture = jax.jit(jax.vmap(routing.capture))


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
        n: Any = None,
        expert: int | str = "",
        label: int | str = "",
        interval: tuple[Any, Any] | None = None,
    ) -> None:
        """A row a member: values (and n, if it differs) [M], in percent if `unit` says so."""
        every = (len(self._members),)
        values = np.broadcast_to(values, every)
        counts = np.broadcast_to(self._n if n is None else n, every)
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
                    "n": int(counts[index]),
                    "condition": condition,
                    "expert": expert,
                    "class": label,
                    "unit": unit,
                    "low": low,
                    "high": high,
                }
            )

    def add_experts(
        self,
        metric: str,
        condition: str,
        values: Any,
        interval: tuple[Any, Any] | None = None,
        **options: Any,
    ) -> None:
        """A row a member and expert: values, and an interval's ends, float [M, E]."""
        for expert, of_expert in enumerate(np.asarray(values).T):
            ends = None if interval is None else (interval[0][:, expert], interval[1][:, expert])
            self.add(metric, condition, of_expert, expert=expert, interval=ends, **options)


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
        if "iou" not in arrays:
            continue
        rows.add_experts(
            "captured_change", condition, 100 * mean_known(arrays["captured_change"][d], 1)
        )
        for extent in ("nominal", "field"):
            patches = arrays[f"{extent}_patches"]
            found = _capture(arrays["indices"][d].astype(np.int32), patches)
            _capture_rows(rows, extent, condition, found, patches, k)
    if "iou" in arrays:
        rows.add_experts("iou", "both", 100 * arrays["iou"].mean(1))
        chance = np.full((len(members), experts), 100 * k / num_patches)
        rows.add_experts("captured_change", "chance", chance)
        for extent in ("nominal", "field"):
            patches = arrays[f"{extent}_patches"]
            sizes = patches.sum(1)
            rows.add(f"trigger_patches/{extent}", "both", sizes, unit="patches")
            drawn = [routing.chance_capture(int(size), num_patches, k, experts) for size in sizes]
            stacked = routing.Capture(*(np.stack(part) for part in zip(*drawn, strict=True)))
            _capture_rows(rows, extent, "chance", stacked, patches, k)


def _capture_rows(
    rows: _Rows,
    extent: str,
    condition: str,
    found: routing.Capture,
    patches: np.ndarray,
    k: int,
) -> None:
    """Rows of a capture of `patches` bool [M, P]; nan where it could not be otherwise.

    Of more than P - K patches every expert takes at least one; of all P every expert takes K.
    """
    sizes, num_patches = patches.sum(1), patches.shape[1]

    def percent(values: Any, certain: np.ndarray) -> np.ndarray:
        return np.where(certain, np.nan, 100 * np.asarray(values).T).T

    surely_one = sizes > num_patches - k
    share = percent(found.share, sizes == num_patches)
    rows.add_experts(f"capture/{extent}/share", condition, share)
    rows.add_experts(f"capture/{extent}", condition, percent(found.expert, surely_one))
    rows.add(f"capture/{extent}/any", condition, percent(found.any_expert, surely_one))
    rows.add(f"capture/{extent}/all", condition, percent(found.all_experts, surely_one))


def _object_rows(rows: _Rows, arrays: Mapping[str, np.ndarray]) -> None:
    """Area inside the object's box: of the patches taken, of all, and of the positions taken.

    Objects lie in the middle of images, and experts may, too, whatever is there. What an expert's
    positions would have inside by themselves is therefore given beside it.
    """
    labels, of_position = arrays["label"], arrays["object_by_position"]
    known = ~np.isnan(arrays["object_baseline"])
    images = np.bincount(labels[known], minlength=len(of_position))
    if not known.any():
        return
    k = arrays["indices"].shape[4]
    # Everything first, then class by class.
    chosen: list[tuple[int | str, np.ndarray]] = [("", known)]
    chosen += [(label, known & (labels == label)) for label in np.flatnonzero(images).tolist()]
    for d, condition in enumerate(arrays["conditions"].tolist()):
        for label, use in chosen:
            options: dict[str, Any] = {"n": int(use.sum()), "label": label}
            share = 100 * arrays["object_share"][d][:, use].astype(np.float64)  # [M, n, E]
            interval = _interval(share, np.flatnonzero(use) % GROUPS)
            rows.add_experts("object_share", condition, share.mean(1), interval, **options)
            every = 100 * arrays["object_baseline"][use].mean(dtype=np.float64)
            rows.add("object_share/all", condition, every, **options)
            if isinstance(label, str):
                frequency = arrays["frequency"][d]
                inside = np.average(of_position[images > 0], axis=0, weights=images[images > 0])
            else:
                frequency, inside = arrays["class_frequency"][d][:, label], of_position[label]
            matched = 100 * (frequency.astype(np.float64) @ inside) / k
            rows.add_experts("object_share/position", condition, matched, **options)


def _draws(groups: int) -> np.ndarray:
    """Bootstrap samples of groups: how often each is drawn, int [RESAMPLES, groups]."""
    rng = np.random.default_rng(0)
    return rng.multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)


def _interval(values: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The 95 % interval of the mean over images: [M, n, E] with groups int [n] -> two [M, E]."""
    found, group = np.unique(group, return_inverse=True)
    if len(found) < 2:
        return None
    sums = np.zeros((len(found), len(values), values.shape[2]))
    np.add.at(sums, group, values.swapaxes(0, 1))
    draws = _draws(len(found))
    counts = draws @ np.bincount(group)
    means = np.tensordot(draws, sums, 1) / counts[:, None, None]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


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
    rows: _Rows, arrays: Mapping[str, np.ndarray], source: int | None, members: Sequence[Member]
) -> None:
    labels = arrays["label"]
    targets = [member.target for member in members]

    def rates(predicted: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Target rate [M, ...] and its images [M], and accuracy, of predictions [M, ..., N].

        In percent; the target rate is nan where no image counts.
        """
        flat = predicted.reshape(len(members), -1, len(labels))

        hit, right = jax.device_get(_rates(flat, np.asarray(targets), labels, source))
        shape = predicted.shape[:-1]
        share = hit.hits / np.maximum(hit.total, 1).astype(np.float64)
        asr = 100 * np.where(hit.total > 0, share, np.nan).reshape(shape)
        accuracy = 100.0 * right.hits.astype(np.float64).reshape(shape) / len(labels)
        return (asr, hit.total[:, 0]), accuracy

    own: dict[str, np.ndarray] = {}
    forced: dict[tuple[str, str], np.ndarray] = {}
    silenced: dict[str, np.ndarray] = {}
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
        silenced[condition] = asr
        for s, mode in enumerate(arrays["silences"].tolist()):
            for subset, kept in enumerate(arrays["kept_experts"].astype(int)):
                name = f"silence_{mode}/kept_{''.join(map(str, kept))}"
                rows.add(f"target_rate/{name}", condition, asr[:, s, subset], n=total)
                rows.add(f"accuracy/{name}", condition, right[:, s, subset])
            shares = {"target_rate": (asr, total), "accuracy": (right, None)}
            for metric, (values, count) in shares.items():
                share = routing.shapley(values[:, s])
                rows.add_experts(
                    f"shapley/{metric}/{mode}", condition, share, unit="points", n=count
                )
    if len(silenced) == 2:
        # Of what the trigger adds: a model whose experts are all silent may well name the target.
        rise = silenced["triggered"] - silenced["clean"]
        for s, mode in enumerate(arrays["silences"].tolist()):
            share = routing.shapley(rise[:, s])
            rows.add_experts(f"shapley/asr/{mode}", "both", share, unit="points", n=total)
    if forced:
        split = routing.swap_shares(
            own["clean"],
            own["triggered"],
            forced["other_routing", "triggered"],
            forced["other_routing", "clean"],
        )
        rows.add("swap/routing", "both", split.routing, unit="points", n=total)
        rows.add("swap/computation", "both", split.computation, unit="points", n=total)


def _possible(forcing: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [M]: whether the forced patches leave K places (in: fit into them)."""
    extent, _, way = forcing.partition("_")
    if extent not in ("nominal", "field"):
        return np.ones(len(arrays["seed"]), bool)
    k, size = arrays["indices"].shape[-1], arrays[f"{extent}_patches"].sum(1)
    return size <= k if way == "in" else np.prod(arrays["grid"]) - size >= k


def _value_rows(rows: _Rows, arrays: Mapping[str, np.ndarray], n: int) -> None:
    """Distance between the values of taken patches and those of all patches of the same images.

    The same, too, against all patches weighted as often as the expert takes their position: what
    is left is a choice by content. Of a single image there is no such thing.
    """
    from scipy import stats

    edges = arrays["value_edges"]
    centres = (edges[:, 1:] + edges[:, :-1]) / 2
    taken, everything = arrays["value_histogram"], arrays["value_baseline"]
    groups = np.flatnonzero(everything[0, 0].sum((1, 2)))
    draws = _draws(len(groups))
    conditions, members, _, experts, _, _ = taken.shape

    def mean(counts: np.ndarray, x: np.ndarray) -> np.ndarray:
        return counts @ x / counts.sum(-1)

    for d, q in np.ndindex(conditions, len(edges)):
        name, x = arrays["quantities"][q], centres[q]
        condition = str(arrays["conditions"][d])
        for e in range(experts):
            distance, shift, at_position, shift_there = np.full((4, members), np.nan)
            ends = np.full((2, 2, members), np.nan)  # of distance and shift, low and high
            for m in range(members):
                of_expert = taken[d, m, groups, e, q].astype(float)
                of_all = everything[d, m, groups, q].astype(float)
                u, v = of_expert.sum(0), of_all.sum(0)
                # In standard deviations of all patches, so that quantities compare.
                sd = max(np.sqrt(v @ (x - mean(v, x)) ** 2 / v.sum()), 1e-12)
                distance[m] = stats.wasserstein_distance(x, x, u, v) / sd
                shift[m] = (mean(u, x) - mean(v, x)) / sd
                if n > 1:
                    there = arrays["frequency"][d, m, e] @ arrays["value_by_position"][d, m, :, q]
                    at_position[m] = stats.wasserstein_distance(x, x, u, there) / sd
                    shift_there[m] = (mean(u, x) - mean(there, x)) / sd
                if len(groups) > 1:
                    us, vs = draws @ of_expert, draws @ of_all
                    pairs = zip(us, vs, strict=True)
                    distances = [stats.wasserstein_distance(x, x, *pair) for pair in pairs]
                    shifts = mean(us, x) - mean(vs, x)
                    resampled = np.stack([distances, shifts], axis=1) / sd
                    ends[:, :, m] = np.percentile(resampled, [2.5, 97.5], axis=0).T
            common: dict[str, Any] = {"unit": "sd", "n": n, "expert": e}
            for i, (metric, values) in enumerate(
                (("wasserstein", distance), ("mean_shift", shift))
            ):
                interval = (ends[i, 0], ends[i, 1]) if len(groups) > 1 else None
                rows.add(f"{metric}/{name}", condition, values, interval=interval, **common)
            if n > 1:
                rows.add(f"wasserstein_position/{name}", condition, at_position, **common)
                rows.add(f"mean_shift_position/{name}", condition, shift_there, **common)
