"""All figures of a routing analysis: the paper's (`figures_paper`), atlas, causes, epochs.

Every figure is written as PNG and PDF, with its numbers beside it (CSV or npz). Colours are Okabe
and Ito's and the maps cividis and PuOr, which colour-blind readers can tell apart. A figure shows
all seeds, or there is one for every seed.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pmoe_jax import figures, figures_paper, routing_arrays, training
from pmoe_jax.errors import PmoeError
from pmoe_jax.figures import COLOURS, COLUMN, PAGE, plt
from pmoe_jax.figures_paper import Strip
from pmoe_jax.routing_output import Analysis

from matplotlib import lines as line_shapes  # isort: skip
from matplotlib import patches as shapes  # isort: skip
from matplotlib.layout_engine import ConstrainedLayoutEngine  # isort: skip
from matplotlib.ticker import MaxNLocator  # isort: skip


def write_all(
    analysis: Analysis,
    folder: str | os.PathLike[str],
    shown: Sequence[int],
    *,
    strips: Sequence[Strip] = (),
    trigger_labels: dict[str, str] | None = None,
    single_image: bool = False,
) -> list[pathlib.Path]:
    """Writes all figures of an analysis.

    Args:
      analysis: what to draw.
      folder: where to write; created.
      shown: positions of the test images whose patch maps are drawn.
      strips, trigger_labels: of Figure 2, which is left out without them.
      single_image: quirk A4: one image's histograms of sums, maps added up over epochs.

    Returns:
      The PNG files.

    Raises:
      PmoeError: the folder cannot be written.
    """
    out = figures.make_folder(folder)
    try:
        with plt.rc_context(figures.PAPER_STYLE):
            return _write_all(analysis, out, shown, strips, trigger_labels or {}, single_image)
    except OSError as error:
        raise PmoeError(
            f"figures in {out} cannot be written ({error.strerror}); make room or choose another "
            "folder"
        ) from None


def _write_all(
    analysis: Analysis,
    out: pathlib.Path,
    shown: Sequence[int],
    strips: Sequence[Strip],
    trigger_labels: dict[str, str],
    single_image: bool,
) -> list[pathlib.Path]:
    arrays, config, dataset = analysis.arrays, analysis.config, analysis.dataset
    scale, grid = analysis.scale, tuple(arrays["grid"].tolist())
    model = training.build_model(config, dataset.num_classes)
    scope = f"{dataset.name} ({dataset.num_classes} classes), {config.model.name} of width"
    written = [
        figures_paper.write_architecture(
            model, dataset.image_shape, out / "figure1_architecture",
            f"{scope} {config.model.width}: shapes of one image",
        )
    ]  # fmt: skip
    if strips:
        names = " and ".join(strip.dataset.name for strip in strips)
        title = f"Triggers on test images of {names}, as seed {arrays['seed'][0]} draws them"
        path = out / "figure2_triggers"
        written.append(figures_paper.write_triggers(strips, trigger_labels, path, title))

    models = figures_paper.models_of(analysis, shown)
    attacked = "triggered" in arrays["conditions"]
    for seed in arrays["seed"].tolist():

        def maps(rows: Any, name: str, *title: str, seed: int = seed) -> None:
            path = out / f"{name}_seed{seed}"
            written.append(figures_paper.write_patch_maps(rows, grid, path, *title))

        what = (
            f"Patches taken from test image {shown[0]} ({_class(analysis, shown[0])}), seed {seed}"
        )
        if single_image:
            what += " (quirk A4)"
        rows = figures_paper.triggered_rows(analysis, seed, shown[0], shown, single_image)
        maps(rows, "figure3_patch_maps", what, scale,
             *(f"{other.name}: {other.scale}" for other in analysis.others))  # fmt: skip
        prefix = "clean_model_" if "clean_model_" in models else ""
        rows = [
            figures_paper.map_row(dataset, models[prefix], seed, "clean", image,
                                  f"image {image}\n{_class(analysis, image, 20)}")
            for image in shown
        ]  # fmt: skip
        what = f"Patches that the {models[prefix].label} takes from clean images, seed {seed}"
        maps(rows, "figure4_clean_maps", what, analysis.scales.get(prefix, scale))
        if "defended_model_" in models and attacked:
            rows = []
            for image in shown[:1] if single_image else shown:
                for each, label in (("", "before"), ("defended_model_", "after")):
                    label = f"{label} defence,\nimage {image}"
                    row = figures_paper.map_row(
                        dataset, models[each], seed, "triggered", image, label
                    )
                    if single_image:
                        row = figures_paper.summed(row, analysis, seed, "triggered", bool(each))
                    rows.append(row)
            what = f"Patches taken from triggered images before and after a defence, seed {seed}"
            maps(rows, "figure6_before_after", what, scale,
                 f"after: {analysis.scales['defended_model_']}")  # fmt: skip
    what = "Values of the patches taken from clean images"
    if single_image:
        what += f" (test image {shown[0]} alone: quirk A4)"
    path = out / "figure5_patch_values"
    written.append(figures_paper.write_values(analysis, path, single_image, what, scale))
    if not single_image:
        written.append(write_biases(analysis, out / "biases"))
    written.append(write_atlas(analysis, out / "atlas_frequency"))
    written += write_class_atlas(analysis, out / "atlas_classes")
    if "silences" in arrays:
        written.append(write_causes(analysis, out / "causes"))
        written.append(write_subsets(analysis, out / "causes_subsets"))
    if len(arrays["epoch"]) > 1 and "iou" in arrays:
        written.append(write_epochs(analysis, out / "by_epoch"))
    return written


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
    # Narrow empty columns keep the experts apart.
    widths = ([1.0] * len(kinds) + [0.25]) * experts
    side = PAGE / (sum(widths) + 1)
    engine = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.02, wspace=0.02, hspace=0.02)
    figure = plt.figure(figsize=(PAGE, 1.25 + members * (side + 0.04)), layout=engine)
    spec = figure.add_gridspec(members, len(widths) - 1, width_ratios=widths[:-1])
    cells = np.empty((members, across), object)
    share = change = None
    for m, expert, kind in np.ndindex(members, experts, len(kinds)):
        axes = figure.add_subplot(spec[m, expert * (len(kinds) + 1) + kind])
        cells[m, expert * len(kinds) + kind] = axes
        if kinds[kind] == "change":
            shown = maps[1, m, expert] - maps[0, m, expert]
            change = axes.imshow(shown.reshape(grid), cmap="PuOr_r", vmin=-1, vmax=1)
        else:
            shown = maps[kind, m, expert]
            share = axes.imshow(shown.reshape(grid), cmap="cividis", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        if m == 0:
            head = f"expert {expert}\n" if kind == len(kinds) // 2 else "\n"
            axes.set_title(head + kinds[kind], fontsize=6.5)
    for m in range(members):
        cells[m, 0].set_ylabel(routing_arrays.title_of(arrays, m))
    # Two bars side by side.
    half = across // 2 if change is not None else across
    _bar(figure, cells[:, :half].ravel().tolist(), share, "share of test images")
    if change is not None:
        _bar(figure, cells[:, half:].ravel().tolist(), change, "change: triggered minus clean")
    figures.set_title(figure, "How often each expert takes each patch", analysis.scale)
    figures.write_npz(path, frequency=maps, seed=seeds)
    return figures.save(figure, path)


def write_class_atlas(
    analysis: Analysis, path: pathlib.Path, most_classes: int = 12
) -> list[pathlib.Path]:
    """How often each expert takes each patch, by true class: a figure a seed.

    Of more than 12 classes, several figures. Beside them: an npz of all classes, [D, Y, E, P].
    """
    arrays = analysis.arrays
    maps = arrays["class_frequency"]  # [D, M, Y, E, P]
    conditions, members, classes, experts, _ = maps.shape
    grid = tuple(arrays["grid"].tolist())
    present = np.unique(arrays["label"])
    parts = np.array_split(present, -(-len(present) // most_classes))
    names = [analysis.dataset.class_names[label] for label in range(classes)]
    upright = max(map(len, names)) > 8
    written = []
    for m, (part, drawn) in itertools.product(range(members), enumerate(parts)):
        side = (PAGE - 0.5) / max(len(drawn), 8)
        height = 1.15 + 0.7 * upright + conditions * experts * (side + 0.03)
        figure, cells = plt.subplots(
            conditions * experts, len(drawn), figsize=(PAGE, height), squeeze=False,
            layout=ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.03, wspace=0.0, hspace=0.0),
        )  # fmt: skip
        share = None
        for row, line in enumerate(cells):
            d, expert = divmod(row, experts)
            for label, axes in zip(drawn, line, strict=True):
                shown = maps[d, m, label, expert].reshape(grid)
                share = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(True)
                if row == 0:
                    short = figures_paper.shortened(names[label], 18)
                    axes.set_title(short, fontsize=6.5, rotation=90 if upright else 0)
            line[0].set_ylabel(f"{('clean', 'trig.')[d]}\nexp. {expert}", fontsize=6.5)
        _bar(figure, cells.ravel().tolist(), share, "share of the class's test images", 0.4)
        of_parts = f" (part {part + 1} of {len(parts)})" if len(parts) > 1 else ""
        figures.set_title(
            figure,
            f"How often each expert takes each patch, by true class{of_parts}, "
            + routing_arrays.title_of(arrays, m).replace("\n", " "),
            analysis.scale,
        )
        own = path.with_name(f"{path.name}_seed{arrays['seed'][m]}")
        figures.write_npz(own, class_frequency=maps[:, m], classes=present)
        if len(parts) > 1:
            own = own.with_name(f"{own.name}_{part + 1}")
        written.append(figures.save(figure, own))
    return written


def _bar(figure: Any, cells: Any, image: Any, label: str, shrink: float = 0.7) -> None:
    bar = figure.colorbar(image, ax=cells, location="bottom", shrink=shrink, aspect=35)
    bar.set_label(label, fontsize=6.5)
    bar.ax.tick_params(labelsize=6.5)


# --- Causes and epochs ----------------------------------------------------------------------

_FORCED = {
    "target_rate": "own routing",
    "target_rate/other_routing": "routing swapped\n(clean ↔ triggered)",
    "target_rate/other_patches": "patches swapped,\nown gates",
    "target_rate/nominal_in": "trigger's patches\nforced in",
    "target_rate/nominal_out": "trigger's patches\nkept out",
    "target_rate/field_in": "patches that see it\nforced in",
    "target_rate/field_out": "patches that see it\nkept out",
}
_BY_MEAN = "by mean"


def write_causes(analysis: Analysis, path: pathlib.Path) -> pathlib.Path:
    """What the target rate becomes under forced routing, and each expert's Shapley share of it.

    Left, a dot a seed and a bar for their mean; right, every seed by itself: shares of what the
    trigger adds to the target rate. Beside it: a CSV of all shown values. Of a run without a
    trigger, the shares of the accuracy are drawn alone.
    """
    own = _last_rows(analysis)
    seeds = list(dict.fromkeys(row["seed"] for row in own))
    attacked = "forcings" in analysis.arrays
    height = 3.4 if attacked else 2.4
    figure, panels = plt.subplots(
        1, 2 if attacked else 1, figsize=(PAGE if attacked else COLUMN, height), squeeze=False,
        width_ratios=(1.25, 1) if attacked else None, layout="constrained",
    )  # fmt: skip
    lines: list[list[Any]] = []
    if attacked:
        left = panels[0, 0]
        # Greys, as colours stand for experts on the right.
        sides = (("triggered", -0.2, "#555555"), ("clean", 0.2, "#BBBBBB"))
        for i, metric in enumerate(_FORCED):
            for condition, shift, colour in sides:
                found = _values(own, metric, condition)
                lines += [[metric, condition, "", seed, value] for seed, value in found.items()]
                if not found:
                    left.text(1, i + shift, "not possible", va="center", color="#555555")
                    continue
                values = list(found.values())
                label = f"{condition} images" if i == 0 else None
                left.barh(i + shift, np.mean(values), 0.38, color=colour, label=label)
                left.plot(values, [i + shift] * len(values), "o", color="#FFFFFF", markersize=3,
                          markeredgecolor="#000000", markeredgewidth=0.6,
                          label="each seed" if i == 0 and shift < 0 else None)  # fmt: skip
        left.set_yticks(range(len(_FORCED)), list(_FORCED.values()))
        left.invert_yaxis()
        source = analysis.config.poison.source
        among = "without images of that class" if source < 0 else f"images of class {source}"
        left.set(xlim=(0, 104), xlabel=f"predicted as target, {among} [%]")
        # Above the axes, so that no bar hides it.
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    right = panels[0, -1]
    figure_of = ("asr", "both") if attacked else ("accuracy", "clean")
    experts = analysis.arrays["indices"].shape[3]
    width = 0.8 / experts
    for expert, mode in np.ndindex(experts, 2):
        name = ("zero", "mean")[mode]
        metric = f"shapley/{figure_of[0]}/{name}"
        found = _values(own, metric, figure_of[1], expert)
        lines += [[metric, figure_of[1], expert, seed, value] for seed, value in found.items()]
        at = [seeds.index(seed) + (expert - (experts - 1) / 2) * width for seed in found]
        colour = COLOURS[expert % len(COLOURS)]
        if name == "zero":
            right.bar(at, list(found.values()), 0.9 * width, color=colour, alpha=0.75,
                      label=f"expert {expert}")  # fmt: skip
        else:
            right.plot(at, list(found.values()), "D", color=colour, markersize=3.2,
                       markeredgecolor="#000000", markeredgewidth=0.5)  # fmt: skip
    right.plot([], [], "D", color="#FFFFFF", markeredgecolor="#000000", markersize=3.2,
               label=_BY_MEAN)  # fmt: skip
    right.axhline(0, color="#333333", linewidth=0.6)
    right.set_xticks(range(len(seeds)), [f"seed {seed}" for seed in seeds])
    of = "what the trigger adds" if attacked else "the accuracy"
    right.set_ylabel(f"Shapley share of {of} [points]\n"
                     "(bars: the others silenced by zero)")  # fmt: skip
    handles = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    by_mean = handles.pop(_BY_MEAN)
    right.legend([*handles.values(), by_mean], [*handles, _BY_MEAN], loc="lower center",
                 bbox_to_anchor=(0.5, 1.0), ncols=3)  # fmt: skip
    figures.set_title(figure, "What the routing and each expert cause", analysis.scale)
    figures.write_csv(path, ["metric", "condition", "expert", "seed", "value"], lines)
    return figures.save(figure, path)


def write_subsets(analysis: Analysis, path: pathlib.Path) -> pathlib.Path:
    """ASR and accuracy with every subset of experts kept, the others silenced by zero.

    A mark a seed; below, which experts are kept. Beside it: a CSV, with silencing by mean, too.
    """
    own = _last_rows(analysis)
    kept = analysis.arrays["kept_experts"].astype(bool)
    order = np.lexsort((np.arange(len(kept)), kept.sum(1)))
    attacked = "forcings" in analysis.arrays
    drawn = {"accuracy": ("clean", "accuracy on clean images", figures.BLUE)}
    if attacked:
        drawn["target_rate"] = ("triggered", "ASR", figures.ORANGE)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(PAGE, 2.1 + 0.16 * kept.shape[1]), sharex=True, layout="constrained",
        height_ratios=(1.5, 0.16 * kept.shape[1]),
    )  # fmt: skip
    lines: list[list[Any]] = []
    seeds = list(dict.fromkeys(row["seed"] for row in own))
    for x, subset in enumerate(order):
        name = "".join(map(str, kept[subset].astype(int)))
        for i, (metric, (condition, _, colour)) in enumerate(drawn.items()):
            for mode in ("zero", "mean"):
                found = _values(own, f"{metric}/silence_{mode}/kept_{name}", condition)
                lines += [[metric, condition, mode, name, s, v] for s, v in found.items()]
                for seed, value in found.items() if mode == "zero" else ():
                    at = x + (i - (len(drawn) - 1) / 2) * 0.3
                    mark = _MARKS[seeds.index(seed) % len(_MARKS)]
                    above.plot(at, value, mark, color=colour, markersize=4, alpha=0.8)
        for expert, here in enumerate(kept[subset]):
            colour = COLOURS[expert % len(COLOURS)]
            below.plot(x, expert, "o", markersize=5, color=colour if here else "#E0E0E0")
    above.set(ylim=(-3, 103), ylabel="percent of test images")
    handles = [
        shapes.Patch(color=colour, label=label) for _, label, colour in drawn.values()
    ] + [
        above.plot([], [], _MARKS[i % len(_MARKS)], color="#555555", markersize=4,
                   label=f"seed {seed}")[0]
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    above.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=8)
    experts = range(kept.shape[1])
    below.set_yticks(experts, [f"expert {expert}" for expert in experts])
    below.set(xticks=[], ylim=(kept.shape[1] - 0.5, -0.5), xlabel="experts kept (coloured)")
    below.spines[:].set_visible(False)
    below.tick_params(length=0)
    figures.set_title(figure, "All subsets of experts, the others silenced by zero", analysis.scale)
    header = ["metric", "condition", "silence", "kept", "seed", "value"]
    figures.write_csv(path, header, lines)
    return figures.save(figure, path)


#: What `write_epochs` draws: of a trigger in some patches, and of one that is everywhere.
_ASR = {("target_rate", "triggered"): ("ASR", COLOURS[1], "-")}
_LOCAL = {
    ("capture/nominal/any", "triggered"): (
        "trigger's patches taken by any expert", COLOURS[0], "-"),
    ("capture/nominal/all", "triggered"): (
        "trigger's patches taken by all experts", COLOURS[2], "-"),
    ("capture/nominal/any", "clean"): (
        "the same patches on clean images, by any", COLOURS[3], "--"),
}  # fmt: skip
_EVERYWHERE = {
    ("captured_change", "triggered"): ("share of the trigger's change taken", COLOURS[0], "-"),
    ("captured_change", "clean"): ("the same by the patches of clean images", COLOURS[3], "--"),
    ("captured_change", "chance"): ("the same by chance", "#777777", ":"),
}


def write_epochs(analysis: Analysis, path: pathlib.Path) -> pathlib.Path:
    """When routing turns to the trigger: ASR and capture by epoch, a thin line a seed.

    Figures of experts are means over them. Beside it: a CSV.
    """
    first = analysis.rows[0]["run"]
    figured: dict[tuple[str, str], dict[tuple[int, float], list[float]]]
    figured = defaultdict(lambda: defaultdict(list))
    ours = [row for row in analysis.rows if row["run"] == first and row["class"] == ""]
    gone = {row["seed"] for row in ours if row["stage"] == "diverged"}
    for row in ours:
        if row["stage"] != "diverged" and np.isfinite(row["value"]):
            at = row["seed"], row["epoch"]
            figured[row["metric"], row["condition"]][at].append(row["value"])
    curves = _ASR | (_LOCAL if ("capture/nominal/any", "triggered") in figured else _EVERYWHERE)
    figure, axes = plt.subplots(figsize=(COLUMN, 3.2), layout="constrained")
    lines: list[list[Any]] = []
    for (metric, condition), (label, colour, style) in curves.items():
        of_epoch: dict[float, list[float]] = defaultdict(list)  # of seeds that never diverged
        of_seed: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for (seed, epoch), values in figured[metric, condition].items():
            value = float(np.mean(values))
            if seed not in gone:
                of_epoch[epoch].append(value)
            of_seed[seed].append((epoch, value))
            lines.append([metric, condition, seed, epoch, value])
        for points in of_seed.values():
            axes.plot(*zip(*points, strict=True), style, color=colour, alpha=0.4, linewidth=0.7)
        few = len(of_seed.keys() - gone) < 3  # One or two seeds are shown as they are.
        means = {} if few else {at: float(np.mean(values)) for at, values in of_epoch.items()}
        axes.plot(list(means), list(means.values()), style, color=colour,
                  linewidth=0.7 if few else 1.8, label=label)  # fmt: skip
    axes.set(ylim=(-2, 102), xlabel="epoch", ylabel="percent")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center")
    kept = len({row["seed"] for row in ours} - gone)
    thin = f"thick: mean over {kept} seeds; thin: each seed" if kept > 2 else "a line a seed"
    figures.set_title(figure, f"When routing turns to the trigger ({thin})", analysis.scale)
    figures.write_csv(path, ["metric", "condition", "seed", "epoch", "value"], lines)
    return figures.save(figure, path)


# --- Biases ---------------------------------------------------------------------------------

_MARKS = "os^Dv<>pPX*hd"


def write_biases(analysis: Analysis, path: pathlib.Path) -> pathlib.Path:
    """How what experts take from clean images differs from all patches, and from their positions.

    A filled mark with its interval for every expert (colour) and seed (shape); the hollow one
    beside it is against patches of the same positions. Where there are boxes, on the right: the
    share of the area taken inside the object, and hollow what the positions alone would have.
    Beside it: a CSV.
    """
    own = [row for row in _last_rows(analysis) if row["condition"] == "clean"]
    own = [row for row in own if row["class"] == ""]
    seeds = list(dict.fromkeys(row["seed"] for row in own))
    experts = analysis.arrays["indices"].shape[3]
    names = analysis.arrays["quantities"].tolist()
    found = {(row["metric"], row["expert"], row["seed"]): row for row in own}
    boxes = any(row["metric"] == "object_share/all" for row in own)
    figure = plt.figure(figsize=(PAGE, 3.9), layout="constrained")
    spec = figure.add_gridspec(2, 1 + boxes, width_ratios=(4, 1)[: 1 + boxes])
    lines: list[list[Any]] = []

    def draw(axes: Any, x: int, metric: str, positions: str) -> None:
        """Marks of a figure around x, and of the same figure against positions."""
        for e, (i, seed) in itertools.product(range(experts), enumerate(seeds)):
            at = x + 0.8 * ((e * len(seeds) + i + 0.5) / (experts * len(seeds)) - 0.5)
            colour, mark = COLOURS[e % len(COLOURS)], _MARKS[i % len(_MARKS)]
            for name, fill in ((positions, "#FFFFFF"), (metric, colour)):
                row = found.get((name, e, seed))
                if row is None:  # Of a single image, nothing is known against positions.
                    continue
                lines.append([name, e, seed, row["value"], row["low"], row["high"]])
                if row["low"] != "":
                    axes.plot([at, at], [row["low"], row["high"]], color=colour, linewidth=0.7)
                axes.plot(at, row["value"], mark, color=colour, markerfacecolor=fill,
                          markersize=2.8, markeredgewidth=0.6)  # fmt: skip

    drawn = (("wasserstein", "distance [sd]"), ("mean_shift", "difference of means [sd]"))
    for i, (metric, label) in enumerate(drawn):
        axes = figure.add_subplot(spec[i, 0])
        for x, name in enumerate(names):
            draw(axes, x, f"{metric}/{name}", f"{metric}_position/{name}")
        axes.axhline(0, color="#333333", linewidth=0.6)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(label)
    if boxes:
        axes = figure.add_subplot(spec[:, 1])
        draw(axes, 0, "object_share", "object_share/position")
        every = _values(own, "object_share/all", "clean")
        lines += [["object_share/all", "", seed, value, "", ""] for seed, value in every.items()]
        for value in set(every.values()):
            axes.axhline(value, color="#777777", linestyle="--", linewidth=0.8, label="all patches")
        axes.set(xticks=[], ylabel="area inside the object's box [%]", xlabel="patches taken")
        axes.legend(loc="best")
    handles: list[Any] = [
        shapes.Patch(color=COLOURS[e % len(COLOURS)], label=f"expert {e}") for e in range(experts)
    ]
    style: Any = {"linestyle": "", "color": "#555555", "markersize": 4}
    for i, seed in enumerate(seeds):
        mark = _MARKS[i % len(_MARKS)]
        handles.append(line_shapes.Line2D([], [], marker=mark, label=f"seed {seed}", **style))
    handles.append(
        line_shapes.Line2D([], [], marker="o", markerfacecolor="#FFFFFF",
                           label="hollow: at equal positions", **style)
    )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7))
    figures.set_title(
        figure, "Patches taken from clean images, against all patches of the images (95 % "
        "intervals over images)", analysis.scale,
    )  # fmt: skip
    figures.write_csv(path, ["metric", "expert", "seed", "value", "low", "high"], lines)
    return figures.save(figure, path)


# --- Helpers --------------------------------------------------------------------------------


def _class(analysis: Analysis, image: int, length: int = 40) -> str:
    name = analysis.dataset.class_names[int(analysis.arrays["label"][image])]
    return figures_paper.shortened(f"class {name}" if len(name) < 3 else name, length)


def _last_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Rows of the run itself (not those beside it) at the last analysed epoch, without diverged."""
    run, epoch = analysis.rows[0]["run"], analysis.arrays["epoch"][-1]
    return [
        row
        for row in analysis.rows
        if row["run"] == run and row["epoch"] == epoch and row["stage"] != "diverged"
    ]


def _values(
    rows: Sequence[dict[str, Any]], metric: str, condition: str, expert: int | str = ""
) -> dict[int, float]:
    """A figure's finite values by seed, over all classes."""
    return {
        row["seed"]: row["value"]
        for row in rows
        if (row["metric"], row["condition"], row["expert"], row["class"])
        == (metric, condition, expert, "")
        and np.isfinite(row["value"])
    }
