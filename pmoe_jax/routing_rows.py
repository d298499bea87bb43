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
from pmoe_jax.routing_arrays import mean_known
from pmoe_jax.rundir import ROW_FIELDS, Row

#: A row's fields: those of every figure, and what it was measured on. `low` and `high` are a 95 %
#: bootstrap interval over test images where there is one.
FIELDS = (*ROW_FIELDS, "condition", "expert", "unit", "low", "high")
#: Bootstrap samples of an interval.
RESAMPLES = 200


def rows_of(
    arrays: Mapping[str, np.ndarray],
    config: Any,
    members: Sequence[Member],
    frame: Mapping[str, Any],
    value_images: int,
) -> list[Row]:
    """All rows of one checkpoint.

    Args:
      arrays: of `routing_arrays.measure`.
      config, members: the run's.
      frame: fields that all rows share: run, epoch, stage, dataset, width.
      value_images: how many test images the patch values are of.
    """
    rows = _Rows(frame, members, arrays["diverged"], len(arrays["label"]))
    _selection_rows(rows, arrays, members)
    _prediction_rows(rows, arrays, config, members)
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
        rows.add_experts(
            "captured_change", condition, 100 * mean_known(arrays["captured_change"][d], 1)
        )
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
