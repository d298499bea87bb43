"""The differences that the verdicts of docs/claims.md rest on, from the rows that are beside this.

    python experiments/verdicts.py                     # of experiments/results
    python experiments/verdicts.py runs/cpu            # of a directory of reproduce.py

Seed by seed, mean ± sd with the 95 % interval of the mean: what is left of the ASR behind a defence
above the rate at which clean models, and clean models that were fine-tuned in the same way, take
triggered images for the target; what a warp adds to the
clean images that its models send there; whether experts take the trigger's places more often than
those of clean models or images; the ASR where corners are dark; how visible triggers are on
one data set and the other; what squares of 1/255 do to models that learnt black ones; and by which
quantity experts choose. At last how many pixels the authors' truncated warp moves, which is chance.
`attacks.py` and `defences.py` print the other figures.
"""

import argparse
import pathlib
import re
import runpy
import sys

import jax
import numpy as np
import pandas as pd

from pmoe_jax import grid, members, metrics, report, triggers
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import write_atomically
from pmoe_jax.paper import setting

HERE = pathlib.Path(__file__).parent
ATTACKS, DEFENCES = (runpy.run_path(str(HERE / name)) for name in ("attacks.py", "defences.py"))
QUANTITIES = ("luminance", "contrast", "edges")


def points(values):
    """A difference of percentages over seeds: see `report.values_text`."""
    return report.values_text(list(values), "cad")


def text(values, digits):
    """A difference of other units over seeds: mean ± sd [95 % interval], or the single value."""
    if not len(values):
        return "–"
    summary = metrics.summarize(values)
    if summary.interval is None:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    mean, sd, *ends = (
        f"{value:.{digits}f}" for value in (summary.mean, summary.sd, *summary.interval)
    )
    return f"{mean} ± {sd} [{', '.join(ends)}]"


def tuned_clean_models(paths):
    """Triggered images that clean models, fine-tuned at a learning rate of 0.1, send to the target.

    A Series [%] by seed, of (data set, trigger, pruned [%], share of the images [%]).

    Raises:
      PmoeError: several analyses are of one of these.
    """
    found = {}
    for path in paths:
        rows = rows_of(path)
        rows = rows[(rows["metric"] == "target_rate") & (rows["condition"] == "triggered")]
        rows = rows[rows["stage"] == "fine_tuned_other_trigger"]
        for (data, trigger, run), own in rows.groupby(["dataset", "trigger", "run"]):
            cell = re.match(DEFENCES["CELL"], run)
            if cell and cell["data"] == "clean" and float(cell["lr"]) == 0.1:
                key = data, trigger, float(cell["pruned"]), float(cell["share"] or 100)
                if key in found:
                    raise PmoeError(
                        f"{path} and another analysis are both of {run} on {data}, {trigger}; "
                        "remove one of them"
                    )
                found[key] = own.set_index("seed")["value"]
    return found


def left_by_tuning(models, folder, analyses):
    """ASR behind fine-tuning minus the false trigger rate of clean models, and of clean models that
    were fine-tuned in the same way, on clean images."""
    tuned_too = tuned_clean_models(analyses)
    tuned = DEFENCES["read"](folder / "defences")
    authors = tuned[tuned["a5"] & (tuned["tuned"] == "everything")]
    tuned = pd.concat([DEFENCES["as_the_text_says"](tuned), authors])
    tuned = tuned[(tuned["trigger"] != "none") & (tuned["lr"] == 0.1)]
    lines = []
    for (a5, images, data, trigger, rate, share, pruned), cells in tuned.groupby(
        ["a5", "data", "dataset", "trigger", "rate", "share", "pruned"]
    ):
        of = {"data": data, "model": "pmoe", "trigger": trigger, "rate": round(100 * rate, 6)}
        false = ATTACKS["select"](models, **of)["false_trigger_rate"]
        asr = DEFENCES["select"](cells).set_index("seed")["asr"]
        # Attacks may have more seeds than were defended; one that was and has no pair is missing.
        false = false.reindex(asr.index)
        likewise = None if a5 else tuned_too.get((data, trigger, pruned, share))
        name = (
            f"{data}, {trigger}, {100 * rate:g} %: pruned {pruned:g} %{' (A5)' if a5 else ''}, "
            f"{share:g} % of the images"
        )
        beside = "" if likewise is None else points(asr - likewise.reindex(asr.index))
        lines.append([name, images, points(asr - false), beside])
    header = ["fine-tuned", "on images", "ASR minus false trigger rate [points]",
              "... of clean models fine-tuned likewise"]  # fmt: skip
    return report.markdown(header, lines)


def order_of_triggers(models):
    """ASR of blends minus that of squares, and of squares minus that of the text's warps."""
    models = ATTACKS["usual"](models[(models["model"] == "pmoe") & (models["rate"] > 0)])
    lines = []
    for (data, rate), cells in models.groupby(["data", "rate"]):
        of = {name: ATTACKS["select"](cells, trigger=name)["asr"]
              for name in ("blend", "square", "warp")}  # fmt: skip
        pairs = (of["blend"] - of["square"], of["square"] - of["warp"])
        if any(pair.notna().any() for pair in pairs):
            lines.append([f"{data}, {rate:g} %", *(points(pair) for pair in pairs)])
    return report.markdown(["ASR [points]", "blend minus square", "square minus warp"], lines)


def table_of(path):
    """A CSV file of this folder; "none", which a trigger may be, is no missing value.

    Raises:
      PmoeError: it cannot be read.
    """
    try:
        return pd.read_csv(path, dtype={"class": str}, keep_default_na=False, na_values=["", "nan"])
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors.
        raise PmoeError(f"{path} cannot be read ({error}); restore it") from None


def named(path):
    """What a table calls an analysis: its file, or the folder of a file that all have."""
    return path.parent.name if path.name == "routing.csv" else path.stem


def rows_of(path):
    """The rows of an analysis at its last epoch, without those of single classes."""
    rows = table_of(path)
    rows = rows[rows["class"].isna() & (rows["stage"] != "diverged")]
    return rows[rows["epoch"] == rows.groupby("run")["epoch"].transform("max")]


def added_by_warps(paths):
    """What the warp itself adds: triggered minus clean images of other classes that go to the
    target, of attacked models."""
    lines = []
    for path in paths:
        rows = rows_of(path)
        rows = rows[(rows["trigger"] == "warp") & (rows["rate"] > 0)]
        rows = rows[rows["metric"] == "target_rate"]
        for (data, rate, _), own in rows.groupby(["dataset", "rate", "run"]):
            by = own.pivot(index="seed", columns="condition", values="value")
            name = f"{data}, {100 * rate:g} % ({named(path)})"
            added = by["triggered"] - by["clean"]
            each = ", ".join(f"{value:.1f}" for value in added)
            lines.append([name, report.values_text(list(by["clean"]), "asr"), each, points(added)])
    header = ["warp", "clean images to the target [%]", "triggered minus clean, by seed",
              "triggered minus clean [points]"]  # fmt: skip
    return report.markdown(header, lines)


def redirected(paths):
    """What experts of attacked models take of the trigger's changes, beside clean models of the
    same analysis, and beside the same places of images without the trigger; mean over experts."""
    lines = []
    for path in paths:
        rows = rows_of(path)
        rows = rows[rows["metric"] == "captured_change"]
        runs = rows[rows["rate"] > 0].groupby(["dataset", "trigger", "rate", "run"])
        for (data, trigger, rate, _), own in runs:
            by = own.groupby(["seed", "condition"])["value"].mean().unstack()
            beside = rows[(rows["rate"] == 0) & (rows["dataset"] == data)]
            if beside["run"].nunique() > 1:
                raise PmoeError(f"{path} holds several clean runs on {data}; keep one of them")
            clean = beside[beside["condition"] == "triggered"].groupby("seed")["value"].mean()
            name = f"{data}, {trigger}, {100 * rate:g} % ({named(path)})"
            each = ", ".join(f"{value:.1f}" for value in by["triggered"])
            lines.append([name, each, points(by["triggered"] - clean.reindex(by.index)),
                          points(by["triggered"] - by["clean"])])  # fmt: skip
    header = ["changes taken by experts [%]", "attacked models, triggered images, by seed",
              "minus clean models [points]", "minus clean images [points]"]  # fmt: skip
    return report.markdown(header, lines)


def dark_corners(paths):
    """ASR of nine tenths of the images minus that of the tenth whose corners are darkest."""
    lines = []
    for path in paths:
        rows = table_of(path)
        rows["excess"] = rows["asr"] - rows["false_trigger_rate"]
        for name, metric in (("ASR", "asr"), ("ASR minus false trigger rate", "excess")):
            by = rows.pivot(index="seed", columns="tenth", values=metric)
            rest = by.drop(columns=1).mean(axis=1) - by[1]
            lines.append([f"{name} ({path.stem})", points(rest)])
    return report.markdown(["square", "rest minus darkest tenth [points]"], lines)


def visible(path):
    """PSNR and SSIM of triggered images on GTSRB minus those on CIFAR-10, by the same triggers that
    both were measured with; an infinite PSNR, of nothing changed, has no difference."""
    rows = table_of(path)
    lines = []
    for trigger, own in rows.groupby("trigger", sort=False):
        if not {"gtsrb", "cifar10"} <= {*own["dataset"]}:
            continue
        line = [trigger]
        for metric, digits in (("psnr", 1), ("ssim", 3)):
            by = own.pivot(index="seed", columns="dataset", values=metric)
            # Squares, and blends of a picture, are the same in every seed.
            differences = (by["gtsrb"] - by["cifar10"]).replace([np.inf, -np.inf], np.nan)
            line.append(text(differences.dropna().drop_duplicates(), digits))
        lines.append(line)
    return report.markdown(["GTSRB minus CIFAR-10", "PSNR [dB]", "SSIM"], lines)


def shown_near_black(path):
    """ASR of models trained with black squares when squares of 1/255 (A1) are shown instead."""
    rows = table_of(path)
    lines = []
    for (data, rate), own in rows[rows["metric"] == "asr"].groupby(["dataset", "rate"]):
        by = own.pivot(index="seed", columns="stage", values="value")
        shown = by["other_trigger"] - by["trained"]
        each = ", ".join(f"{value:.1f}" for value in shown)
        lines.append([f"{data}, {100 * rate:g} %", each, text(shown, 2)])
    header = ["black squares, shown 1/255 (A1)", "ASR minus that of black, by seed", "points"]
    return report.markdown(header, lines)


def chosen_by(paths):
    """How much more one quantity tells the patches that experts take from others of the same
    positions than another one does; mean over experts, on clean images."""
    lines = []
    for path in paths:
        rows = rows_of(path)
        rows = rows[(rows["condition"] == "clean") & rows["expert"].notna()]
        for run, own in rows.groupby("run", sort=False):
            of = own[own["metric"].isin([f"wasserstein_position/{name}" for name in QUANTITIES])]
            if of.empty:
                continue
            by = of.groupby(["seed", "metric"])["value"].mean().unstack()
            by.columns = [name.partition("/")[2] for name in by.columns]
            pairs = (("edges", "contrast"), ("edges", "luminance"), ("contrast", "luminance"))
            shown = [text(by[one] - by[other], 3) for one, other in pairs]
            lines.append([f"{own['dataset'].iloc[0]}, {run} ({named(path)})", *shown])
    header = ["distance at equal positions [sd]", "edges minus contrast", "edges minus luminance",
              "contrast minus luminance"]  # fmt: skip
    return report.markdown(header, lines)


def moved_by_truncation(seeds):
    """Positions of 32x32 that the truncated warp (A3) of each seed reads from elsewhere [%]."""
    drawn = {"num_seeds": seeds, **setting.TRIGGERS["warp (truncated)"]}
    fields = triggers.stack(
        [
            members.make_trigger(member, (32, 32, 3))
            for member in members.from_config(grid.with_fields(setting.config(), drawn))
        ]
    )
    row, column = np.meshgrid(*2 * [np.linspace(0, 1, 32, dtype=np.float32)], indexing="ij")
    positions = np.stack([row, column, 0 * row], -1)[None]
    read = jax.jit(jax.vmap(triggers.apply, in_axes=(None, 0)))(positions, fields)
    return 100 * np.asarray((abs(read - positions) > 1e-3).any(-1)).mean(axis=(1, 2, 3))


def truncated_fields(seeds=1000):
    """Quartiles of `moved_by_truncation`, and how rare fields are that move little."""
    moved = moved_by_truncation(seeds)
    first = ", ".join(f"{value:.1f}" for value in moved[:3])
    middle = ", ".join(f"{value:.0f}" for value in np.percentile(moved, [25, 50, 75]))
    below = [f"{100 * (moved < most).mean():.1f}" for most in (5, 50)]
    header = ["truncated warp", "positions moved by seeds 0, 1, 2 [%]", "quartiles",
              "seeds that move less than 5 % [%]", "less than half"]  # fmt: skip
    return report.markdown(header, [[f"{seeds} seeds", first, middle, *below]])


def tables(folder):
    """All of them that `folder` has the rows of, in the order of docs/claims.md.

    Raises:
      PmoeError: it has no sweep, or rows that cannot be read.
    """
    # What a directory of reproduce.py calls what lies here.
    sweep = folder / "grid" if (folder / "grid").is_dir() else folder / "cpu_grid"
    found = [
        *folder.glob("*_routing.csv"), *folder.glob("claims/*/routing.csv"),
        *folder.glob("grid/figures/*/routing.csv"),
    ]  # fmt: skip
    analyses = sorted(found)
    models = ATTACKS["read"]([sweep])
    parts = []
    if any(folder.glob("defences/*/rows.csv")):
        parts.append(left_by_tuning(models, folder, analyses))
    parts += [order_of_triggers(models), added_by_warps(analyses), redirected(analyses)]
    parts.append(dark_corners(sorted([*folder.glob("*_darkness.csv"),
                                      *folder.glob("claims/darkness_*.csv")])))  # fmt: skip
    seen = [*folder.glob("visibility.csv"), *folder.glob("claims/visibility.csv")]
    parts += [visible(path) for path in seen]
    parts += [shown_near_black(path) for path in folder.glob("*_near_black.csv")]
    return [*parts, chosen_by(analyses), truncated_fields()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--tables", type=pathlib.Path, help="Markdown file to write them to")
    options = parser.parse_args()
    made = "\n\n".join(tables(options.folder)) + "\n"
    if options.tables:
        write_atomically(options.tables, made)
    else:
        print(made, end="")


if __name__ == "__main__":
    try:
        main()
    except PmoeError as error:
        sys.exit(f"verdicts: {error}")
