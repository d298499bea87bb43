"""Tables and figure of the attacks, and what docs/claims.md compares, from sweeps of this folder.

    python experiments/attacks.py                      # of experiments/results/cpu_grid
    python experiments/attacks.py runs/cpu/grid --figure=attacks.png

Printed are BA, CAD and ASR of every cell beside the rate at which clean models take the same
triggered images for the target anyway (false trigger rate); the same by rate; the README's short
table of ASRs; then differences: of quirks A1 and A3, of dense models, and of GTSRB against
CIFAR-10; last the warps by k and strength. Cells of one data set are compared seed by seed, as the
same seed has the same data order and trigger in both (but for the two kinds of warp, whose fields
differ), and their ASR also as if their seeds had nothing in common (Welch's interval), as that is
all that two data sets allow. In percent and points, mean ± sd over seeds with the 95 % interval of
the mean (from three seeds on). The figure shows the ASR of every seed.

An ASR contains images that clean models call so, too. That an ASR is above their rate (`excess`)
says that there is a backdoor; which of two is larger is not told by `excess`, which cannot reach
100: for that chance is taken out as Abbott (1925) does for insecticides, (ASR - c) / (100 - c) with
c the clean models' rate.
"""

import argparse
import pathlib
import re
import sys
import warnings

import pandas as pd
from scipy import stats

from pmoe_jax import config as config_lib
from pmoe_jax import grid, report, results
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import write_atomically

RESULTS = pathlib.Path(__file__).parent / "results"
METRICS = ("asr", "false_trigger_rate", "ba", "cad")
RECORDED = (*METRICS, "clean_target_rate")
OVERVIEW = {"ba": "BA", "cad": "CAD", "asr": "ASR", "false_trigger_rate": "false trigger rate",
            "excess": "ASR minus that"}  # fmt: skip
EFFECTS = {"asr": "ASR", "beyond_chance": "ASR without chance (Abbott)", "ba": "BA"}
UNPAIRED = "ASR, seeds not paired"
TITLES = {"cifar10": "CIFAR-10", "gtsrb": "GTSRB"}
WARPS = ("k", "strength")
TRUNCATED = "warp (authors' truncation)"  # quirk A3
NEAR_BLACK = "square (value 0.00392)"  # quirk A1


def read(folders):
    """Figures [%] of every finished cell at its last epoch, a line a seed.

    Columns: data, model, trigger (as reports name it, without a blend's picture), k and strength
    (of bilinear warps), rate [%] (0 of clean models), seed, `RECORDED`, and what `compared` adds.
    NaN for seeds that diverged or have no clean model, and if not recorded.

    Raises:
      PmoeError: no sweep or run, no finished cell in them, or cells that look the same here.
    """
    lines = []
    for cell in results.gather(folders).cells:
        if not cell.state.startswith("done"):
            continue
        made = cell.member.trigger
        # What these tables do not show: seeds that differ in it are not of one cell.
        hidden = {
            **config_lib.flatten(grid.setting(cell.config, cell.member)), "data": cell.data,
            "the picture": results.attack_text(cell.config, cell.members),
        }  # fmt: skip
        bilinear = made.get("sampling") == "bilinear"
        for seed in cell.seeds:
            figures = {
                name: cell.figures[name].points.get(seed) if name in cell.figures else None
                for name in RECORDED
            }
            lines.append({
                "data": cell.config.data.name, "model": cell.config.model.name,
                "trigger": results.attack_text(cell.config, cell.members, picture=False),
                "k": made["k"] if bilinear else None,
                "strength": made["strength"] if bilinear else None,
                "rate": round(100 * cell.member.rate, 6), "seed": seed, **figures, "hidden": hidden,
            })  # fmt: skip
    if not lines:
        raise PmoeError(f"{', '.join(map(str, folders))}: no cell is finished yet")
    table = pd.DataFrame(lines).astype(dict.fromkeys(RECORDED, float))
    told_apart = ["data", "model", "trigger", "k", "strength", "rate"]
    for key, cells in table.groupby(told_apart, dropna=False, sort=False):
        hidden = pd.DataFrame(list(cells["hidden"])).astype(str)
        fields = [name for name in hidden if hidden[name].nunique() > 1]
        if fields or cells["seed"].duplicated().any():
            named = zip(told_apart, key, strict=True)
            of = ", ".join(f"{name} {value}" for name, value in named if name not in WARPS)
            raise PmoeError(
                f"several cells are {of}, and these tables do not show what they differ in "
                f"({', '.join(fields) or 'nothing: they hold the same seeds'}); give directories "
                "that hold one of them"
            )
    return compared(table.drop(columns="hidden"))


def compared(table):
    """Adds excess, ASR minus false trigger rate; beyond_chance, the share of those images that a
    clean model does not send to the target; and added, ASR minus what the same model sends there of
    the images without the trigger."""
    excess = table["asr"] - table["false_trigger_rate"]
    beyond = 100 * excess / (100 - table["false_trigger_rate"])
    added = table["asr"] - table["clean_target_rate"]
    return table.assign(excess=excess, beyond_chance=beyond, added=added)


def select(table, **wanted):
    """Lines in which every named column has the wanted value, by seed."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.set_index("seed")


def usual(table):
    """Without warps of another k and strength than the paper's."""
    return table[table["k"].fillna(2).eq(2) & table["strength"].fillna(0.25).eq(0.25)]


def text(values, metric="cad"):
    """See `report.values_text`; differences can be what "cad" can."""
    return report.values_text(list(values), metric)


def overview(table):
    """BA, CAD, ASR and false trigger rate, a line a cell; without warps of other k and strength."""
    lines = []
    for (data, model, rate, trigger), cells in usual(table).groupby(
        ["data", "model", "rate", "trigger"], sort=False
    ):
        name = f"{TITLES.get(data, data)}, {trigger}" + ", dense" * (model == "wide_resnet")
        name += f", {rate:g} %" if rate else ""
        # The difference may be negative, as CAD may.
        kinds = {metric: "cad" if metric == "excess" else metric for metric in OVERVIEW}
        shown = (text(select(cells)[metric], kind) for metric, kind in kinds.items())
        lines.append([name, *shown])
    return report.markdown(["cell", *OVERVIEW.values()], lines)


def by_rate(table, metric):
    """A metric of every trigger (lines) at every poisoning rate (columns), model by model."""
    table = table[table[metric].notna().groupby([table["data"], table["model"], table["trigger"]])
                  .transform("any")]  # fmt: skip
    rates = sorted(table["rate"].unique())
    lines = []
    for (data, model, trigger), cells in table.groupby(["data", "model", "trigger"], sort=False):
        name = f"{TITLES.get(data, data)}, {trigger}" + ", dense" * (model == "wide_resnet")
        kind = metric if metric in METRICS else "cad"
        lines.append([name, *(text(select(cells, rate=rate)[metric], kind) for rate in rates)])
    return report.markdown([metric, *(f"{rate:g} %" for rate in rates)], lines)


def effects(table, column, on, off):
    """What it changes that a column is `on` instead of `off`, all else equal [points]; the ASR also
    by means of all seeds."""
    others = [name for name in ("data", "model", "trigger", "rate") if name != column]
    lines = []
    for key, cells in table.groupby(others, sort=False):
        sides = [select(cells, **{column: value}) for value in (on, off)]
        if any(side.empty for side in sides):
            continue
        # Of seeds that both have; one that diverged on either side is counted as missing.
        both = sides[0].index.intersection(sides[1].index)
        changed = sides[0].loc[both, list(EFFECTS)] - sides[1].loc[both, list(EFFECTS)]
        where = dict(zip(others, key, strict=True))
        words = [TITLES.get(where["data"], where["data"]), where.get("trigger")]
        name = ", ".join(word for word in words if word) + f", {where['rate']:g} %"
        name += ", dense" * (where.get("model") == "wide_resnet")
        paired = (text(changed[metric]) for metric in EFFECTS)
        lines.append([name, *paired, welch(*(side["asr"] for side in sides))])
    return report.markdown(["difference", *EFFECTS.values(), UNPAIRED], lines)


def welch(one, other):
    """The difference of two means; of three seeds or more with Welch's 95 % interval."""
    one, other = one.dropna(), other.dropna()
    if one.empty or other.empty:
        return "–"
    shown = f"{one.mean() - other.mean():+.1f}"
    if min(len(one), len(other)) >= 3:
        with warnings.catch_warnings():  # ASRs at their ceiling are nearly equal.
            warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
            low, high = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
        shown += f" [{max(low, -100):.1f}, {min(high, 100):.1f}]"
    return shown


def short(table):
    """The README's table: ASR of every attack, with the clean models' rate in parentheses; of the
    truncated warp, whose fields differ too much for a mean, seed by seed. Quirk A1, which is for
    `effects`, is left out, and so are cells of one seed where others have more."""
    table = usual(table[table["trigger"] != NEAR_BLACK])
    seeds = table.groupby(["data", "model", "trigger", "rate"])["seed"].transform("size")
    table = table[((seeds > 1) | (seeds.max() == 1)) & table["asr"].notna()]
    places = sorted({(data, rate) for data, rate in zip(table["data"], table["rate"], strict=True)})
    lines = []
    for (model, trigger), cells in table.groupby(["model", "trigger"], sort=False):
        line = [trigger + ", dense model" * (model == "wide_resnet")]
        for data, rate in places:
            asr, false = (
                select(cells, data=data, rate=rate)[name] for name in ("asr", "false_trigger_rate")
            )
            shown = re.sub(r" \[.*\]", "", text(asr, "asr"))
            if trigger == TRUNCATED and len(asr):
                shown = ", ".join(f"{value:.0f}" for value in asr.sort_index())
            known = len(asr) and false.notna().all()
            line.append(shown + (f" ({false.mean():.1f})" if known else ""))
        lines.append(line)
    titles = (f"{TITLES.get(data, data)}, {rate:g} %" for data, rate in places)
    return report.markdown(["ASR [%] (clean models)", *titles], lines)


def between(table, on="gtsrb", off="cifar10"):
    """What changes from one data set to another, by Welch's interval of two means [points]."""
    lines = []
    for (model, trigger, rate), cells in table.groupby(["model", "trigger", "rate"], sort=False):
        sides = [select(cells, data=name) for name in (on, off)]
        if rate == 0 or any(side.empty for side in sides):
            continue
        shown = [welch(*(side[metric] for side in sides)) for metric in EFFECTS]
        name = f"{trigger}, {rate:g} %" + ", dense" * (model == "wide_resnet")
        lines.append([name, *shown])
    return report.markdown(["difference of means", *EFFECTS.values()], lines)


def warps(table, metric, rate=10):
    """A metric of the bilinear warps of CIFAR-10 by k (lines) and strength (columns), in the seeds
    that most of them have, as fields of warps differ much from seed to seed."""
    table = table[table["k"].notna() & (table["model"] == "pmoe") & (table["data"] == "cifar10")]
    table = table[table["rate"] == rate]
    cells = table.groupby("seed").size()
    seeds = list(cells[cells == cells.max()].index)
    table = table[table["seed"].isin(seeds)]
    strengths = sorted(table["strength"].unique())
    lines = [
        [f"k = {k:g}", *(text(select(cells, strength=s)[metric], metric) for s in strengths)]
        for k, cells in table.groupby("k")
    ]
    named = ", ".join(map(str, seeds))
    head = [
        f"{metric} at {rate:g} %, seeds {named}",
        *(f"s = {strength:g}" for strength in strengths),
    ]
    return report.markdown(head, lines)


def draw(table, path):
    """The ASR of every seed against the poisoning rate, a panel a data set, dense models dashed;
    returns the figure."""
    from pmoe_jax import figures

    table = table[table["rate"] > 0]
    colours = dict(zip(("square", "blend", "warp", TRUNCATED), figures.COLOURS, strict=False))
    panels = list(table["data"].unique())
    if not panels:
        raise PmoeError("no attacked cell is finished yet; there is nothing to draw")
    with figures.plt.rc_context(figures.PAPER_STYLE):
        figure, axes = figures.plt.subplots(
            1, len(panels), figsize=(3.2 * len(panels) + 1.6, 3), sharey=True,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for panel, data in zip(axes[0], panels, strict=True):
            own = table[table["data"] == data]
            for place, (trigger, colour) in enumerate(colours.items()):
                shift = 1 + 0.04 * (place - 1.5)  # Points of equal rate beside each other.
                for model, line in (("pmoe", "-"), ("wide_resnet", "--")):
                    cells = own[(own["trigger"] == trigger) & (own["model"] == model)]
                    if cells.empty:
                        continue
                    label = trigger + ", dense model" * (model == "wide_resnet")
                    mean = cells.groupby("rate")["asr"].mean()
                    panel.plot(mean.index * shift, mean, line, color=colour, label=label)
                    mark = "o" if model == "pmoe" else "x"
                    panel.plot(
                        cells["rate"] * shift, cells["asr"], mark, ms=3, alpha=0.5, color=colour
                    )
                    if model == "pmoe":
                        false = cells.groupby("rate")["false_trigger_rate"].mean()
                        panel.plot(false.index * shift, false, ":", color=colour, lw=1)
            rates = sorted(table.loc[table["trigger"].isin(colours), "rate"].unique())
            panel.set(xscale="log", xlabel="poisoning rate [%]", ylim=(-2, 102))
            panel.set_title(TITLES.get(data, data))
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        axes[0, 0].set_ylabel("ASR [%]; dotted: of clean models")
        labels = {}  # Of all panels: one may lack a trigger.
        for panel in axes[0]:
            handles, names = panel.get_legend_handles_labels()
            labels |= dict(zip(names, handles, strict=True))
        figure.legend(labels.values(), labels, loc="outside right center")
        figures.save_as(figure, path)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=pathlib.Path, default=[RESULTS / "cpu_grid"])
    parser.add_argument("--tables", type=pathlib.Path, help="Markdown file to write them to")
    parser.add_argument("--figure", type=pathlib.Path, help="also draw the figure")
    options = parser.parse_args()
    models = read(options.folders)
    table = usual(models)
    parts = [overview(table), *(by_rate(table, metric) for metric in METRICS), short(table)]
    if table["added"].notna().any():  # Runs of earlier versions did not record it.
        added = by_rate(table, "added")
        parts.append(f"What the trigger adds: ASR minus target rate of clean images\n\n{added}")
    for title, column, on, off in (
        ("A1, the square is 1/255 instead of black", "trigger", NEAR_BLACK, "square"),
        ("A3, the warp is truncated", "trigger", TRUNCATED, "warp"),
        ("The mixture of experts minus the dense model", "model", "pmoe", "wide_resnet"),
    ):
        parts.append(f"{title} [points]\n\n{effects(table, column, on, off)}")
    parts.append(f"GTSRB minus CIFAR-10 [points]\n\n{between(table)}")
    parts += [warps(models, metric) for metric in METRICS[:3]]
    text = "\n\n".join(parts) + "\n"
    if options.tables:
        write_atomically(options.tables, text)
    else:
        print(text, end="")
    if options.figure and not table["rate"].any():
        print("note: no attacked cell is finished yet; nothing is drawn", file=sys.stderr)
    elif options.figure:
        draw(table, options.figure)


if __name__ == "__main__":
    try:
        main()
    except PmoeError as error:
        sys.exit(f"attacks: {error}")
