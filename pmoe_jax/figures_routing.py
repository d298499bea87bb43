"""Figures of the routing analysis: the paper's Figures 1 and 3 to 6, atlas, causes.

Every figure is written as PNG and PDF, with its numbers beside it (CSV or npz). Colours are Okabe
and Ito's and the map cividis, which colour-blind readers can tell apart. Widths fit a two-column
paper: 3.5 or 7.2 inches.
"""

from __future__ import annotations

import csv
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import patches as shapes
from matplotlib import pyplot as plt

from pmoe_jax import figures, training, triggers
from pmoe_jax.analyze import Analysis

#: Okabe and Ito's colours, one an expert.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
COLUMN, PAGE = 3.5, 7.2


class MapRow(NamedTuple):
    """A row of `write_patch_maps`: an image and what each expert takes from it.

    Attributes:
      label: text beside the image.
      image: float [H, W, C] in [0, 1].
      times: float [E, P], how often the expert takes the patch: 0 or 1 of one model.
      gates: float [E, P], gate values; 0 where nothing is taken.
      marked: bool [P], patches to frame (the trigger's), or None.
    """

    label: str
    image: np.ndarray
    times: np.ndarray
    gates: np.ndarray
    marked: np.ndarray | None


def write_all(
    analysis: Analysis, folder: str, shown: Sequence[int], single_image: bool = False
) -> list[pathlib.Path]:
    """Writes all figures of an analysis.

    Args:
      analysis: what to draw.
      folder: where to write; created.
      shown: positions of the test images whose patch maps are drawn.
      single_image: quirk A4: one image's histograms of sums, maps added up over epochs.

    Returns:
      The PNG files.
    """
    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    arrays, config = analysis.arrays, analysis.config
    written = [
        write_architecture(
            training.build_model(config, analysis.dataset.num_classes),
            analysis.dataset.image_shape,
            out / "figure1_architecture",
        )
    ]
    grid = tuple(arrays["grid"].tolist())
    rows = _triggered_rows(analysis, shown[0], single_image)
    title = f"{analysis.dataset.name}, test image {shown[0]}, seed {arrays['seed'][0]}"
    if single_image:
        title += f" (quirk A4: summed over {len(arrays['epoch'])} epochs)"
    written.append(write_patch_maps(rows, grid, out / "figure3_patch_maps", title))
    clean = _prefix(arrays)
    rows = [_row(analysis, clean, "clean", i, f"image {i}\n{_class(analysis, i)}") for i in shown]
    title = f"{analysis.dataset.name}, {'clean' if clean else 'this'} model, clean images"
    written.append(write_patch_maps(rows, grid, out / "figure4_clean_maps", title))
    written.append(write_values(analysis, out / "figure5_patch_values", single_image))
    written.append(write_atlas(analysis, out / "atlas_frequency"))
    written.append(write_class_atlas(analysis, out / "atlas_classes"))
    if "forcings" in arrays:
        written.append(write_causes(analysis, out / "causes"))
    if len(arrays["epoch"]) > 1 and "iou" in arrays:
        written.append(write_epochs(analysis, out / "by_epoch"))
    return written


# --- Figure 1 -------------------------------------------------------------------------------


def write_architecture(
    model: Any, image_shape: tuple[int, int, int], path: pathlib.Path
) -> pathlib.Path:
    """Figure 1: the model from image to logits, with the shapes that it really has."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def run(images: jax.Array) -> Any:
        key = jax.random.key(0)
        return model.init_with_output(
            key, images, return_routing=True, capture_intermediates=True, mutable=True
        )

    (logits, routing), variables = jax.eval_shape(run, images)
    seen = variables["intermediates"]

    def text(shape: Sequence[int]) -> str:
        return "x".join(map(str, shape))

    def output(name: str) -> str:
        return text(seen[name]["__call__"][0].shape[1:])

    features = seen["features"][0].shape[1:]
    experts, k = routing.indices.shape[1:]
    expert_map = jax.tree.leaves(seen["experts"]["__call__"][0])[0].shape
    num_patches, channels = features[0] * features[1], features[2]
    trunk = [
        ("image", text(image_shape)),
        ("conv 3x3", output("stem")),
        ("group 1", output("group1")),
        ("group 2", output("group2")),
        ("BN, ReLU,\nconv 3x3", text(features)),
    ]
    figure, axes = plt.subplots(figsize=(PAGE, 2.5), layout="constrained")
    middle = (experts - 1) / 2
    x = 0.0
    for i, (name, shape) in enumerate(trunk):
        _box(axes, x, middle, name, shape, "#FFFFFF" if i == 0 else "#DCE9F2")
        if i:
            _arrow(axes, (x - 1.15, middle), (x - 0.6, middle))
        x += 1.75
    axes.text(x - 1.75, middle - 0.95, f"{num_patches} patches", ha="center", fontsize=7)
    for expert in range(experts):
        colour, y = COLOURS[expert % len(COLOURS)], float(expert)
        _box(axes, x, y, f"router {expert}", f"{k} of {num_patches}", "#FFFFFF", colour)
        selected = f"{k}x{channels} to {k}x{expert_map[-1]}"
        _box(axes, x + 2.05, y, f"expert {expert}", selected, "#FFFFFF", colour, 0.85)
        _arrow(axes, (x - 1.15, middle), (x - 0.6, y))
        _arrow(axes, (x + 0.6, y), (x + 1.2, y))
        _arrow(axes, (x + 2.9, y), (x + 3.45, middle))
    head = f"{experts}x{features[0]}x{features[1]}x{expert_map[-1]}"
    _box(axes, x + 4.2, middle, "concatenate,\nBN, ReLU", head, "#DCE9F2", width=0.75)
    _arrow(axes, (x + 4.95, middle), (x + 5.45, middle))
    _box(axes, x + 6.1, middle, "mean", text((experts * expert_map[-1],)), "#DCE9F2")
    _arrow(axes, (x + 6.7, middle), (x + 7.25, middle))
    _box(axes, x + 7.85, middle, "dense", text(logits.shape[1:]), "#DCE9F2")
    axes.set(xlim=(-0.8, x + 8.6), ylim=(experts - 0.4, -0.6))
    axes.axis("off")
    lines = []
    for name, parameters in variables["params"].items():
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
        calls = jax.tree.leaves(seen.get(name, {}).get("__call__", ()))
        lines.append([name, text(calls[0].shape[1:]) if calls else "", count])
    _write_csv(path, ["layer", "output of an image", "parameters"], lines)
    return figures.save(figure, path)


def _box(
    axes: Any, x: float, y: float, name: str, shape: str, fill: str, edge: str = "#333333",
    width: float = 0.6,
) -> None:  # fmt: skip
    box = shapes.FancyBboxPatch(
        (x - width, y - 0.36), 2 * width, 0.72, boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=fill, edgecolor=edge, linewidth=1,
    )  # fmt: skip
    axes.add_patch(box)
    axes.text(x, y, f"{name}\n{shape}", ha="center", va="center", fontsize=5.5, linespacing=1.3)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": "#333333", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


# --- Figures 3, 4 and 6 ---------------------------------------------------------------------


def write_patch_maps(
    rows: Sequence[MapRow], grid: tuple[int, ...], path: pathlib.Path, title: str = ""
) -> pathlib.Path:
    """Figures 3, 4 and 6: the patches that each expert (column) takes from images (rows).

    What is not taken is darkened; a taken patch's frame is the brighter the higher its gate. The
    trigger's patches have a dashed frame. Beside it: an npz of `times` and `gates` [rows, E, P].
    """
    experts = len(rows[0].times)
    figure, cells = plt.subplots(
        len(rows), experts + 1, figsize=(PAGE, 0.35 + 1.3 * len(rows)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    most = max(row.times.max() for row in rows)
    for row, line in zip(rows, cells, strict=True):
        height, width = row.image.shape[:2]
        step = np.array([-(-height // grid[0]), -(-width // grid[1])])
        picture = np.broadcast_to(row.image, (height, width, 3))
        line[0].imshow(picture, interpolation="nearest")
        line[0].set_ylabel(row.label, fontsize=7)
        for expert, axes in enumerate(line[1:]):
            share = row.times[expert].reshape(grid) / max(most, 1)
            shown = np.kron(share, np.ones(step))[:height, :width, None]
            axes.imshow(picture * (0.2 + 0.8 * shown), interpolation="nearest")
            highest = row.gates[expert].max()
            for patch in np.flatnonzero(row.times[expert]):
                corner = (np.array(divmod(patch, grid[1])) * step)[::-1] - 0.5
                strength = row.gates[expert, patch] / highest if highest > 0 else 0.0
                colour = plt.get_cmap("cividis")(0.3 + 0.7 * strength)
                axes.add_patch(
                    shapes.Rectangle(corner, step[1], step[0], fill=False, edgecolor=colour)
                )
        for axes in line:
            axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
            for patch in np.flatnonzero(row.marked) if row.marked is not None else ():
                corner = (np.array(divmod(patch, grid[1])) * step)[::-1] - 0.5
                axes.add_patch(
                    shapes.Rectangle(
                        corner,
                        step[1],
                        step[0],
                        fill=False,
                        edgecolor=figures.ORANGE,
                        linestyle=(0, (2, 1)),
                        linewidth=1.6,
                    )
                )
    for expert, axes in enumerate(cells[0, 1:]):
        axes.set_title(f"expert {expert}", fontsize=8)
    figure.suptitle(title, fontsize=8)
    np.savez_compressed(
        path.with_suffix(".npz"),
        labels=np.asarray([row.label for row in rows]),
        times=np.stack([row.times for row in rows]),
        gates=np.stack([row.gates for row in rows]),
    )
    return figures.save(figure, path)


def _triggered_rows(analysis: Analysis, image: int, single_image: bool) -> list[MapRow]:
    arrays = analysis.arrays
    rows = []
    for prefix, model in (("clean_model_", "clean model"), ("", "this model")):
        if prefix and not _prefix(arrays):
            continue
        for condition in arrays["conditions"].tolist():
            row = _row(analysis, prefix, condition, image, f"{model},\n{condition} image")
            if single_image and not prefix:
                d = arrays["conditions"].tolist().index(condition)
                row = row._replace(times=arrays["selection_of_image"][:, d, 0].sum(0))
            rows.append(row)
    return rows


def _row(
    analysis: Analysis, prefix: str, condition: str, image: int, label: str, member: int = 0
) -> MapRow:
    arrays = analysis.arrays
    d = arrays["conditions"].tolist().index(condition)
    experts, num_patches = arrays["indices"].shape[3], int(np.prod(arrays["grid"]))
    indices = arrays[f"{prefix}indices"][d, member, image].astype(int)
    times, gates = np.zeros((experts, num_patches)), np.zeros((experts, num_patches))
    np.put_along_axis(times, indices, 1.0, 1)
    np.put_along_axis(gates, indices, arrays[f"{prefix}gates"][d, member, image], 1)
    picture = np.asarray(analysis.dataset.test_images[image : image + 1], np.float32) / 255
    marked = None
    if condition == "triggered":
        trigger = jax.tree.map(lambda leaf: leaf[member], analysis.trigger)
        picture = np.asarray(jax.jit(triggers.apply)(picture, trigger))
        own = arrays["nominal_patches"][member]
        marked = None if own.all() else own
    return MapRow(label, picture[0], times, gates, marked)


# --- Figure 5 -------------------------------------------------------------------------------


def write_values(analysis: Analysis, path: pathlib.Path, single_image: bool) -> pathlib.Path:
    """Figure 5: what is in the patches that each expert takes, against all patches.

    A line a seed, a thick one for their mean. Beside it: a CSV of the drawn densities.
    """
    arrays = analysis.arrays
    names = arrays["quantities"].tolist()
    chosen = ["sum"] if single_image else [n for n in names if n in _TITLES]
    experts = arrays["value_histogram"].shape[2]
    figure, cells = plt.subplots(
        1, len(chosen), figsize=(COLUMN if len(chosen) == 1 else PAGE, 2.2), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    lines: list[list[Any]] = []
    together = 16 if not single_image else 8  # 256 bins are too many to look at
    for name, axes in zip(chosen, cells[0], strict=True):
        q = names.index(name)
        edges = arrays["value_edges"][q][::together]
        centres = (edges[1:] + edges[:-1]) / 2

        def density(counts: np.ndarray) -> np.ndarray:
            merged = counts.reshape(*counts.shape[:-1], -1, together).sum(-1)
            return merged / np.maximum(merged.sum(-1, keepdims=True), 1)

        every = density(arrays["value_baseline"][0, :, q]).mean(0)
        axes.fill_between(centres, every, color="#BBBBBB", linewidth=0, label="all patches")
        lines += [[name, "all", "", x, y] for x, y in zip(centres, every, strict=True)]
        for expert in range(experts):
            colour = COLOURS[expert % len(COLOURS)]
            of_seed = density(arrays["value_histogram"][0, :, expert, q])
            for curve in of_seed if len(of_seed) > 1 else ():
                axes.plot(centres, curve, color=colour, alpha=0.4, linewidth=0.5)
            label = f"expert {expert}"
            axes.plot(centres, of_seed.mean(0), color=colour, linewidth=1.5, label=label)
            for seed, curve in zip(arrays["seed"], of_seed, strict=True):
                lines += [[name, expert, seed, x, y] for x, y in zip(centres, curve, strict=True)]
        axes.set(xlabel=_TITLES[name], ylim=(0, None))
        axes.xaxis.label.set_size(7)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    cells[0, 0].set_ylabel("share of patches", fontsize=7)
    figure.legend(*cells[0, 0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=experts + 1, fontsize=7, frameon=False)  # fmt: skip
    _write_csv(path, ["quantity", "expert", "seed", "value", "share"], lines)
    return figures.save(figure, path)


_TITLES = {
    "sum": "sum of pixels and channels",
    "luminance": "mean luminance",
    "contrast": "contrast (sd of luminance)",
    "edges": "edge strength (mean gradient)",
}

# --- Atlas ----------------------------------------------------------------------------------


def write_atlas(analysis: Analysis, path: pathlib.Path) -> pathlib.Path:
    """How often each expert takes each patch, over the whole test set: every seed and expert.

    Columns: clean, triggered and their difference for each expert; a row a seed. Beside it: an npz.
    """
    arrays = analysis.arrays
    maps, seeds = arrays["frequency"], arrays["seed"]
    conditions, members, experts, _ = maps.shape
    grid = tuple(arrays["grid"].tolist())
    kinds = ["clean", "trig.", "change"] if conditions == 2 else ["clean"]
    across = experts * len(kinds)
    figure, cells = plt.subplots(
        members, across, figsize=(PAGE, 0.75 + members * PAGE / max(across, 6) * 1.05),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    share = change = None
    for m, line in enumerate(cells):
        for expert in range(experts):
            for kind, name in enumerate(kinds):
                axes = line[expert * len(kinds) + kind]
                if name == "change":
                    shown = maps[1, m, expert] - maps[0, m, expert]
                    change = axes.imshow(shown.reshape(grid), cmap="PuOr_r", vmin=-1, vmax=1)
                else:
                    shown = maps[kind, m, expert]
                    share = axes.imshow(shown.reshape(grid), cmap="cividis", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                if m == 0:
                    head = f"expert {expert}\n" if name == kinds[len(kinds) // 2] else "\n"
                    axes.set_title(head + name, fontsize=6)
        line[0].set_ylabel(f"seed {seeds[m]}", fontsize=7)
    _bars(figure, cells, [(share, "share of images"), (change, "triggered minus clean")])
    np.savez_compressed(path.with_suffix(".npz"), frequency=maps, seed=seeds)
    return figures.save(figure, path)


def write_class_atlas(
    analysis: Analysis, path: pathlib.Path, most_classes: int = 16
) -> pathlib.Path:
    """How often each expert takes each patch, by true class: mean over seeds, at most 16 classes.

    Beside it: an npz of all classes and seeds.
    """
    arrays = analysis.arrays
    maps = arrays["class_frequency"][:, ~arrays["diverged"]]
    if not maps.shape[1]:
        maps = arrays["class_frequency"]
    mean = maps.mean(1)  # [D, L, E, P]
    conditions, classes, experts, _ = mean.shape
    grid = tuple(arrays["grid"].tolist())
    # By rank of how many images they have, so that the best known ones are shown.
    counts = np.bincount(arrays["label"], minlength=classes)
    drawn = np.sort(np.argsort(-counts, kind="stable")[:most_classes])
    drawn = drawn[counts[drawn] > 0]
    figure, cells = plt.subplots(
        conditions * experts, len(drawn),
        figsize=(PAGE, 0.7 + conditions * experts * PAGE / max(len(drawn), 6)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    share = None
    for row, line in enumerate(cells):
        d, expert = divmod(row, experts)
        for label, axes in zip(drawn, line, strict=True):
            shown = mean[d, label, expert].reshape(grid)
            share = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(analysis.dataset.class_names[label][:10], fontsize=6)
        line[0].set_ylabel(f"{('clean', 'trig.')[d]}\nexpert {expert}", fontsize=6)
    _bars(figure, cells, [(share, f"share of images (mean of {maps.shape[1]} seeds)")])
    np.savez_compressed(
        path.with_suffix(".npz"), class_frequency=arrays["class_frequency"], seed=arrays["seed"]
    )
    return figures.save(figure, path)


def _bars(figure: Any, cells: Any, images: Sequence[tuple[Any, str]]) -> None:
    for image, label in images:
        if image is not None:
            bar = figure.colorbar(image, ax=cells, location="bottom", shrink=0.4, aspect=40)
            bar.set_label(label, fontsize=6)
            bar.ax.tick_params(labelsize=6)


# --- Causes and epochs ----------------------------------------------------------------------

_FORCED = {
    "target_rate": "own routing",
    "target_rate/other_routing": "routing swapped",
    "target_rate/other_patches": "patches swapped, own gates",
    "target_rate/nominal_in": "trigger's patches forced in",
    "target_rate/nominal_out": "trigger's patches kept out",
    "target_rate/field_in": "patches that see it forced in",
    "target_rate/field_out": "patches that see it kept out",
}


def write_causes(analysis: Analysis, path: pathlib.Path) -> pathlib.Path:
    """What the target rate becomes under forced routing, and each expert's Shapley share of it.

    A dot a seed, a bar for their mean. Beside it: a CSV of all shown rows.
    """
    own = _last_rows(analysis)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(PAGE, 2.9), width_ratios=(1.7, 1), layout="constrained"
    )
    lines: list[list[Any]] = []

    def bars(axes: Any, position: float, width: float, metric: str, condition: str, expert: Any,
             colour: str, label: str | None, flat: bool) -> None:  # fmt: skip
        values = [
            row["value"] for row in own
            if (row["metric"], row["condition"], row["expert"]) == (metric, condition, expert)
            and np.isfinite(row["value"])
        ]  # fmt: skip
        lines.extend([metric, condition, expert, value] for value in values)
        if not values:
            note = "not possible: too many patches"
            if flat:
                axes.text(1, position, note, va="center", fontsize=5, color="#555555")
            return
        draw = axes.barh if flat else axes.bar
        draw(position, np.mean(values), width, color=colour, label=label)
        at = [position] * len(values)
        first, second = (values, at) if flat else (at, values)
        axes.plot(first, second, "o", color="#000000", markersize=2.5)

    for i, metric in enumerate(_FORCED):
        labels = ("triggered images", "clean images") if i == 0 else (None, None)
        bars(left, i - 0.2, 0.38, metric, "triggered", "", figures.ORANGE, labels[0], True)
        bars(left, i + 0.2, 0.38, metric, "clean", "", figures.BLUE, labels[1], True)
    left.set_yticks(range(len(_FORCED)), list(_FORCED.values()), fontsize=7)
    left.invert_yaxis()
    left.set_xlim(0, 105)
    left.set_xlabel("predicted as target [%]", fontsize=7)
    experts = analysis.arrays["indices"].shape[3]
    for expert in range(experts):
        for j, (mode, colour) in enumerate((("zero", COLOURS[2]), ("mean", COLOURS[4]))):
            bars(right, expert + 0.38 * j - 0.19, 0.36, f"shapley/target_rate/{mode}", "triggered",
                 expert, colour, f"silenced by {mode}" if expert == 0 else None, False)  # fmt: skip
    right.axhline(0, color="#333333", linewidth=0.6)
    right.set_xticks(range(experts), [f"expert {e}" for e in range(experts)])
    right.set_ylabel("Shapley share of the ASR [points]", fontsize=7)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    _write_csv(path, ["metric", "condition", "expert", "value"], lines)
    return figures.save(figure, path)


def write_epochs(analysis: Analysis, path: pathlib.Path) -> pathlib.Path:
    """When routing turns to the trigger: ASR and capture by epoch, a thin line a seed."""
    first = analysis.rows[0]["run"]
    curves = {
        ("target_rate", "triggered"): ("ASR", COLOURS[1]),
        ("capture/nominal/any", "triggered"): ("trigger's patches taken by an expert", COLOURS[0]),
        ("capture/nominal/all", "triggered"): ("by all experts", COLOURS[2]),
        ("capture/nominal/any", "clean"): ("taken on clean images", COLOURS[3]),
    }
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6), layout="constrained")
    lines: list[list[Any]] = []
    for (metric, condition), (label, colour) in curves.items():
        of_epoch: dict[float, list[float]] = defaultdict(list)
        of_member: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for row in analysis.rows:
            found = (row["run"], row["metric"], row["condition"])
            if found == (first, metric, condition) and row["stage"] != "diverged":
                of_epoch[row["epoch"]].append(row["value"])
                of_member[row["member"]].append((row["epoch"], row["value"]))
                lines.append([metric, condition, row["seed"], row["epoch"], row["value"]])
        for points in of_member.values():
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=0.7)
        means = [float(np.mean(values)) for values in of_epoch.values()]
        axes.plot(list(of_epoch), means, color=colour, linewidth=1.8, label=label)
    axes.set(ylim=(-2, 102))
    axes.set_xlabel("epoch", fontsize=7)
    axes.set_ylabel("percent of test images", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=6, frameon=False)
    _write_csv(path, ["metric", "condition", "seed", "epoch", "value"], lines)
    return figures.save(figure, path)


# --- Helpers --------------------------------------------------------------------------------


def _prefix(arrays: dict[str, np.ndarray]) -> str:
    return "clean_model_" if "clean_model_indices" in arrays else ""


def _class(analysis: Analysis, image: int) -> str:
    return analysis.dataset.class_names[int(analysis.arrays["label"][image])]


def _last_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Rows of the run itself (not the clean one) at the last analysed epoch, without diverged."""
    run, epoch = analysis.rows[0]["run"], analysis.arrays["epoch"][-1]
    return [
        row
        for row in analysis.rows
        if row["run"] == run and row["epoch"] == epoch and row["stage"] != "diverged"
    ]


def _write_csv(path: pathlib.Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)
