"""The paper's Figures 1 to 6, of our own models.

1 architecture; 2 triggers; 3 patches that clean and attacked models take; 4 patches that a clean
model takes; 5 what is in the patches taken; 6 patches taken before and after a defence. Every
figure is written as PNG and PDF, with its numbers beside it (CSV or npz). Where experts are shown
by number, every seed has a figure or a row of its own: expert 0 of one seed is not expert 0 of
another, so that a mean over seeds would mix experts that do different things.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pmoe_jax import figures, routing_arrays, triggers
from pmoe_jax.data import Dataset
from pmoe_jax.figures import COLOURS, COLUMN, PAGE, plt
from pmoe_jax.routing_output import Analysis

# `figures` chooses matplotlib's backend first.
from matplotlib import lines as line_shapes  # isort: skip
from matplotlib import patches as shapes  # isort: skip

# --- Figure 1 -------------------------------------------------------------------------------


def write_architecture(
    model: Any, image_shape: tuple[int, int, int], path: pathlib.Path, title: str = ""
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

    def text(shape: Sequence[int], sign: str = "×") -> str:
        return sign.join(map(str, shape))

    def output(name: str) -> str:
        return text(seen[name]["__call__"][0].shape[1:])

    features = seen["features"][0].shape[1:]
    experts, k = routing.indices.shape[1:]
    expert_map = jax.tree.leaves(seen["experts"]["__call__"][0])[0].shape
    num_patches, channels = features[0] * features[1], features[2]
    trunk = [
        ("image", text(image_shape)),
        ("conv 3×3", output("stem")),
        ("group 1", output("group1")),
        ("group 2", output("group2")),
        ("BN, ReLU,\nconv 3×3", text(features)),
    ]
    figure, axes = plt.subplots(figsize=(PAGE, 0.75 + 0.42 * experts), layout="constrained")
    middle = (experts - 1) / 2
    x = 0.0
    for i, (name, shape) in enumerate(trunk):
        _box(axes, x, middle, name, shape, "#FFFFFF" if i == 0 else "#DCE9F2")
        if i:
            _arrow(axes, (x - 0.95, middle), (x - 0.65, middle))
        x += 1.6
    axes.text(x - 1.6, middle + 0.42, f"a grid of\n{num_patches} patches", ha="center", va="top")
    for expert in range(experts):
        colour, y = COLOURS[expert % len(COLOURS)], float(expert)
        _box(axes, x + 0.15, y, f"router {expert}", f"top {k} of {num_patches}", "#FFFFFF", colour,
             0.75)  # fmt: skip
        selected = f"{k}×{channels} to {k}×{expert_map[-1]}"
        _box(axes, x + 2.3, y, f"expert {expert}", selected, "#FFFFFF", colour, 1.05)
        _arrow(axes, (x - 0.95, middle), (x - 0.6, y))
        _arrow(axes, (x + 0.9, y), (x + 1.25, y))
        _arrow(axes, (x + 3.35, y), (x + 3.7, middle))
    head = f"{experts}×{features[0]}×{features[1]}×{expert_map[-1]}"
    _box(axes, x + 4.5, middle, "concatenate,\nBN, ReLU", head, "#DCE9F2", width=0.8)
    _arrow(axes, (x + 5.3, middle), (x + 5.6, middle))
    _box(axes, x + 6.15, middle, "mean", text((experts * expert_map[-1],)), "#DCE9F2", width=0.55)
    _arrow(axes, (x + 6.7, middle), (x + 7.0, middle))
    _box(axes, x + 7.55, middle, "dense", text(logits.shape[1:]), "#DCE9F2", width=0.55)
    axes.set(xlim=(-0.7, x + 8.15), ylim=(experts - 0.55, -0.45))
    axes.axis("off")
    figures.set_title(figure, title)
    lines = []
    for name, parameters in variables["params"].items():
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
        calls = jax.tree.leaves(seen.get(name, {}).get("__call__", ()))
        lines.append([name, text(calls[0].shape[1:], "x") if calls else "", count])
    figures.write_csv(path, ["layer", "output of an image", "parameters"], lines)
    return figures.save(figure, path)


def _box(
    axes: Any, x: float, y: float, name: str, shape: str, fill: str, edge: str = "#333333",
    width: float = 0.65,
) -> None:  # fmt: skip
    box = shapes.FancyBboxPatch(
        (x - width, y - 0.39), 2 * width, 0.78, boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=fill, edgecolor=edge, linewidth=1,
    )  # fmt: skip
    axes.add_patch(box)
    axes.text(x, y, f"{name}\n{shape}", ha="center", va="center", fontsize=6, linespacing=1.25)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": "#333333", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0,
             "mutation_scale": 7}  # fmt: skip
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


# --- Figure 2 -------------------------------------------------------------------------------


class Strip(NamedTuple):
    """Images of one data set for `write_triggers`.

    Attributes:
      dataset: where they are from.
      positions: of its test images.
      named: a single trigger of every name.
    """

    dataset: Dataset
    positions: Sequence[int]
    named: Mapping[str, triggers.Trigger]


def write_triggers(
    strips: Sequence[Strip], labels: Mapping[str, str], path: pathlib.Path, title: str = ""
) -> pathlib.Path:
    """Figure 2: images (rows) as they are, with each trigger, and what each trigger changes.

    Beside it: an npz of the pictures, float32 [1 + triggers, H, W, C], one a row.

    Args:
      strips: the images of each data set.
      labels: text above the column of each trigger.
      path: without suffix.
      title: above all.
    """
    rows: list[tuple[str, np.ndarray]] = []
    for strip in strips:
        images = np.asarray(strip.dataset.test_images[np.asarray(strip.positions)], np.float32)
        clean = images / 255
        made = [np.asarray(jax.jit(triggers.apply)(clean, t)) for t in strip.named.values()]
        for index, pictures in enumerate(np.stack([clean, *made], axis=1)):
            name = strip.dataset.class_names[strip.dataset.test_labels[strip.positions[index]]]
            rows.append((f"{strip.dataset.name}\n{shortened(name, 14)}", pictures))
    names = list(strips[0].named)
    columns = 1 + 2 * len(names)
    figure, cells = plt.subplots(
        len(rows), columns, figsize=(PAGE, 0.7 + 0.95 * len(rows)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (label, pictures), line in zip(rows, cells, strict=True):
        # Changes are shown on white, so that what stays as it is does not look like a black image.
        changes = [
            np.clip(1 - figures.amplified(name) * np.abs(picture - pictures[0]), 0, 1)
            for name, picture in zip(names, pictures[1:], strict=True)
        ]
        for axes, picture in zip(line, [*pictures, *changes], strict=True):
            axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
        line[0].set_ylabel(label)
    heads = ["clean", *(labels[name] for name in names)]
    for name in names:
        factor = figures.amplified(name)
        heads.append(f"change by\n{name}" + (f" (×{factor})" if factor > 1 else ""))
    for axes, head in zip(cells[0], heads, strict=True):
        axes.set_title(head)
    figures.set_title(figure, title)
    numbers: dict[str, Any] = {f"row_{i}": pictures for i, (_, pictures) in enumerate(rows)}
    columns_text = np.asarray(["clean", *names])
    figures.write_npz(path, columns=columns_text, **numbers)
    return figures.save(figure, path)


# --- Figures 3, 4 and 6 ---------------------------------------------------------------------


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


_TAKEN = COLOURS[5]


def write_patch_maps(
    rows: Sequence[MapRow], grid: tuple[int, ...], path: pathlib.Path, *title: str
) -> pathlib.Path:
    """Figures 3, 4 and 6: the patches that each expert (column) takes from images (rows).

    What is not taken fades to grey; a taken patch's frame is the thicker the higher its gate. The
    trigger's patches have a frame around them: solid where the expert takes them, dotted where it
    does not. Below are the smallest and the largest gate: an expert that weighs patches alike has
    thick frames by chance. Beside it: an npz of `times` and `gates` [rows, E, P], `marked`
    [rows, P] and the `images`.
    """
    experts = len(rows[0].times)
    figure, cells = plt.subplots(
        len(rows), experts + 1, squeeze=False, layout="constrained",
        figsize=(PAGE, 0.7 + (0.15 + PAGE / (experts + 1) * 0.97) * len(rows)),
    )  # fmt: skip
    for row, line in zip(rows, cells, strict=True):
        most = row.times.max()  # Some rows may be sums over epochs (quirk A4), others not.
        height, width = row.image.shape[:2]
        step = np.array([-(-height // grid[0]), -(-width // grid[1])])
        picture = np.broadcast_to(row.image, (height, width, 3))
        faded = 0.15 * picture + 0.85 * 0.55
        line[0].imshow(picture, interpolation="nearest")
        line[0].set_ylabel(row.label)
        for expert, axes in enumerate(line[1:]):
            share = row.times[expert].reshape(grid) / max(most, 1)
            shown = np.kron(share, np.ones(step))[:height, :width, None]
            axes.imshow(picture * shown + faded * (1 - shown), interpolation="nearest")
            highest = row.gates[expert].max()
            if most <= 1:
                lowest = row.gates[expert][row.times[expert] > 0].min()
                axes.set_xlabel(f"gates {lowest:.2g} to {highest:.2g}", fontsize=6.5, labelpad=1)
            for patch in np.flatnonzero(row.times[expert]):
                strength = row.gates[expert, patch] / highest if highest > 0 else 0.0
                _frame(axes, patch, grid, step, -0.35, edgecolor=_TAKEN,
                       linewidth=0.4 + 1.2 * strength)  # fmt: skip
            for patch in np.flatnonzero(row.marked) if row.marked is not None else ():
                style: Any = "solid" if row.times[expert, patch] else (0, (1, 1))
                _frame(axes, patch, grid, step, 0.7, edgecolor=figures.ORANGE, linestyle=style,
                       linewidth=1.6, clip_on=False)  # fmt: skip
        for axes in line:
            # Room for a frame around a patch in the corner.
            axes.set(xticks=[], yticks=[], xlim=(-2, width + 1), ylim=(height + 1, -2))
            axes.spines[:].set_visible(False)
            outline = shapes.Rectangle((-0.5, -0.5), width, height, fill=False, zorder=0.5)
            outline.set(edgecolor="#888888", linewidth=1)
            axes.add_patch(outline)
    for expert, axes in enumerate(cells[0, 1:]):
        axes.set_title(f"expert {expert}")
    figures.set_title(figure, *title)
    handles: list[Any] = [
        shapes.Patch(fill=False, edgecolor=_TAKEN, label="taken (thicker: nearer the highest gate)")
    ]
    if any(row.marked is not None for row in rows):
        styles: Any = (("taken", "solid"), ("not taken", (0, (1, 1))))
        for label, style in styles:
            handles.append(
                line_shapes.Line2D([], [], color=figures.ORANGE, linestyle=style, linewidth=1.6,
                                   label=f"the trigger's patch, {label}")
            )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figures.write_npz(
        path,
        labels=np.asarray([row.label for row in rows]),
        times=np.stack([row.times for row in rows]),
        gates=np.stack([row.gates for row in rows]),
        marked=np.stack([_marked(row) for row in rows]),
        images=np.stack([row.image for row in rows]),
    )
    return figures.save(figure, path)


def _marked(row: MapRow) -> np.ndarray:
    """The framed patches, bool [P]; none of a row without frames."""
    return np.zeros(row.times.shape[1], bool) if row.marked is None else row.marked


def _frame(
    axes: Any, patch: Any, grid: tuple[int, ...], step: np.ndarray, margin: float, **style: Any
) -> None:
    """A frame around a patch, `margin` pixels outside of it."""
    y, x = np.array(divmod(patch, grid[1])) * step - 0.5 - margin
    height, width = step + 2 * margin
    axes.add_patch(shapes.Rectangle((x, y), width, height, fill=False, **style))


class Model(NamedTuple):
    """A model whose maps are drawn: arrays as in `SCHEMA`, and where each image is in them."""

    label: str
    arrays: Mapping[str, np.ndarray]
    trigger: Any
    positions: Mapping[int, int]


def models_of(analysis: Analysis, shown: Sequence[int]) -> dict[str, Model]:
    """The analysed model and those beside it, by the prefix of their arrays; `others` by name."""
    arrays = analysis.arrays
    own = {name: arrays[name] for name in routing_arrays.SCHEMA if name in arrays}
    here = {image: image for image in shown}
    attacked = analysis.members[0].trigger["name"]
    label = "analysed model" if attacked == "none" else f"{attacked} model"
    found = {"": Model(label, own, analysis.trigger, here)}
    for prefix, label in zip(
        routing_arrays.PREFIXES, ("clean model", "defended model"), strict=True
    ):
        if prefix in analysis.scales:
            beside = {name: arrays.get(prefix + name, array) for name, array in own.items()}
            found[prefix] = Model(label, beside, analysis.trigger, here)
    for other in analysis.others:
        places = {image: index for index, image in enumerate(other.positions)}
        found[other.name] = Model(other.name, other.arrays, other.trigger, places)
    return found


def map_row(
    dataset: Dataset, model: Model, seed: int, condition: str, image: int, label: str
) -> MapRow:
    """What a seed's model takes from one test image."""
    arrays = model.arrays
    d = arrays["conditions"].tolist().index(condition)
    member, position = arrays["seed"].tolist().index(seed), model.positions[image]
    experts, num_patches = arrays["indices"].shape[3], int(np.prod(arrays["grid"]))
    indices = arrays["indices"][d, member, position].astype(int)
    times, gates = np.zeros((experts, num_patches)), np.zeros((experts, num_patches))
    np.put_along_axis(times, indices, 1.0, 1)
    np.put_along_axis(gates, indices, arrays["gates"][d, member, position], 1)
    picture = np.asarray(dataset.test_images[image : image + 1], np.float32) / 255
    marked = None
    if condition == "triggered":
        trigger = jax.tree.map(lambda leaf: leaf[member], model.trigger)
        picture = np.asarray(jax.jit(triggers.apply)(picture, trigger))
        touched = arrays["nominal_patches"][member]
        # Of a trigger that is everywhere, frames would say nothing.
        marked = touched if touched.mean() <= 0.5 else None
    return MapRow(label, picture[0], times, gates, marked)


def summed(
    row: MapRow, analysis: Analysis, seed: int, condition: str, defended: bool = False
) -> MapRow:
    """Quirk A4: the row of the one image with its map added up over the analysed checkpoints.

    Behind a defence, the map of the defended model comes on top of those.
    """
    arrays = analysis.arrays
    member = arrays["seed"].tolist().index(seed)
    condition_at = arrays["conditions"].tolist().index(condition)
    taken = arrays["selection_of_image"][:, condition_at, member]
    label = f"{row.label},\nsum of {len(taken) + defended} checkpoints"
    return row._replace(times=taken.sum(0) + defended * row.times, label=label)


def triggered_rows(
    analysis: Analysis, seed: int, image: int, shown: Sequence[int], single_image: bool
) -> list[MapRow]:
    """Figure 3: one image by the clean model and by each attacked one."""
    models, dataset = models_of(analysis, shown), analysis.dataset
    rows = []
    for prefix in ("clean_model_", ""):
        if prefix not in models:
            continue
        model = models[prefix]
        for condition in model.arrays["conditions"].tolist():
            label = f"{model.label},\n{condition} image"
            row = map_row(dataset, model, seed, condition, image, label)
            if single_image and not prefix:
                row = summed(row, analysis, seed, condition)
            rows.append(row)
    for other in analysis.others:
        model = models[other.name]
        if seed in model.arrays["seed"] and "triggered" in model.arrays["conditions"]:
            label = f"{model.label},\ntriggered image"
            rows.append(map_row(dataset, model, seed, "triggered", image, label))
    return rows


# --- Figure 5 -------------------------------------------------------------------------------

#: Of experts, so that lines upon each other can be seen.
_LINES: Any = ("-", (0, (5, 1.5)), (0, (2.5, 1.5)), (0, (1, 1)))
_TITLES = {
    "sum": "sum of pixels\nand channels",
    "luminance": "mean luminance\n",
    "contrast": "contrast\n(sd of luminance)",
    "edges": "edge strength\n(mean gradient)",
}


def write_values(
    analysis: Analysis, path: pathlib.Path, single_image: bool, *title: str
) -> pathlib.Path:
    """Figure 5: what is in the patches that each expert takes, against all patches; a row a seed.

    Beside it: a CSV of the drawn shares.
    """
    arrays = analysis.arrays
    names = arrays["quantities"].tolist()
    chosen = ["sum"] if single_image else [name for name in names if name in _TITLES]
    members, experts = arrays["value_histogram"].shape[1:3]
    figure, cells = plt.subplots(
        members, len(chosen), squeeze=False, layout="constrained", sharex="col", sharey="col",
        figsize=(COLUMN if len(chosen) == 1 else PAGE, 1.0 + 1.35 * members),
    )  # fmt: skip
    lines: list[list[Any]] = []
    for name, column in zip(chosen, cells.T, strict=True):
        q = names.index(name)
        baseline = arrays["value_baseline"][0, :, q]
        # As far as there are values, and in about 16 bins: of 256, most are noise.
        last = int(np.flatnonzero(baseline.sum(0)).max()) + 1
        together = max(1, last // 16)
        bins = -(-last // together)
        edges = arrays["value_edges"][q]
        edges = edges[np.minimum(np.arange(bins + 1) * together, len(edges) - 1)]

        def shares(counts: np.ndarray, bins: int = bins, together: int = together) -> np.ndarray:
            padded = np.zeros(bins * together)
            padded[: min(len(counts), len(padded))] = counts[: len(padded)]
            return padded.reshape(bins, together).sum(1) / max(counts.sum(), 1)

        for m, axes in enumerate(column):
            seed = arrays["seed"][m]
            every = shares(baseline[m])
            axes.stairs(every, edges, fill=True, color="#C8C8C8", label="all patches")
            drawn: list[tuple[Any, np.ndarray]] = [("all", every)]
            for expert in range(experts):
                taken = shares(arrays["value_histogram"][0, m, expert, q])
                colour = COLOURS[expert % len(COLOURS)]
                axes.stairs(taken, edges, color=colour, linewidth=1.2, label=f"expert {expert}",
                            linestyle=_LINES[expert % len(_LINES)])  # fmt: skip
                drawn.append((expert, taken))
            for expert, values in drawn:
                lines += [
                    [name, expert, seed, low, high, share]
                    for low, high, share in zip(edges, edges[1:], values, strict=False)
                ]
        column[-1].set_xlabel(_TITLES[name])
        column[0].set_ylim(0, None)
    for m, axes in enumerate(cells[:, 0]):
        axes.set_ylabel(f"{routing_arrays.title_of(arrays, m)}\nshare of patches")
    handles = cells[0, 0].get_legend_handles_labels()
    columns = experts + 1 if len(chosen) > 1 else 3
    figure.legend(*handles, loc="outside lower center", ncols=columns)
    figures.set_title(figure, *title)
    header = ["quantity", "expert", "seed", "from", "to", "share"]
    figures.write_csv(path, header, lines)
    return figures.save(figure, path)


def shortened(text: str, length: int) -> str:
    """The text, cut to a length."""
    return text if len(text) <= length else text[: length - 1] + "…"
