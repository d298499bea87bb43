"""The differences that the verdicts of docs/claims.md rest on, from the rows that are beside this.

    python experiments/verdicts.py

Seed by seed, mean ± sd with the 95 % interval of the mean: what is left of the ASR behind a defence
above the rate at which clean models take triggered images for the target; what a warp adds to the
clean images that its models send there; the ASR where corners are dark; how visible triggers are on
one data set and the other; and by which quantity experts choose. `attacks.py` and `defences.py`
print the other figures.
"""

import argparse
import pathlib
import runpy
import sys

import pandas as pd

from pmoe_jax import metrics, report
from pmoe_jax.errors import PmoeError
from pmoe_jax.rundir import write_atomically

HERE = pathlib.Path(__file__).parent
QUANTITIES = ("luminance", "contrast", "edges")


def points(values):
    """A difference of percentages over seeds: see `report.values_text`."""
    return report.values_text(list(values), "cad")


def text(values, digits):
    """A difference of other units over seeds: mean ± sd [95 % interval], or the single value."""
    summary = metrics.summarize(values)
    if summary.interval is None:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    mean, sd, *ends = (
        f"{value:.{digits}f}" for value in (summary.mean, summary.sd, *summary.interval)
    )
    return f"{mean} ± {sd} [{', '.join(ends)}]"


def left_by_tuning(folder):
    """ASR behind fine-tuning on truly clean images minus the false trigger rate of clean models."""
    attacks, defences = (runpy.run_path(str(HERE / name)) for name in ("attacks.py", "defences.py"))
    tuned = defences["as_the_text_says"](defences["read"](folder / "defences"))
    tuned = tuned[(tuned["data"] == "clean") & (tuned["trigger"] != "none") & (tuned["lr"] == 0.1)]
    models = attacks["read"]([folder / "cpu_grid"])
    lines = []
    for (data, trigger, rate, share, pruned), cells in tuned.groupby(
        ["dataset", "trigger", "rate", "share", "pruned"]
    ):
        of = {"data": data, "model": "pmoe", "trigger": trigger, "rate": round(100 * rate, 6)}
        false = attacks["select"](models, **of)["false_trigger_rate"]
        left = defences["select"](cells).set_index("seed")["asr"] - false
        name = (
            f"{data}, {trigger}, {100 * rate:g} %: pruned {pruned:g} %, {share:g} % of the images"
        )
        lines.append([name, points(left)])
    return report.markdown(
        ["tuned on clean images", "ASR minus false trigger rate [points]"], lines
    )


def table_of(path):
    """A CSV file of this folder; "none", which a trigger may be, is no missing value.

    Raises:
      PmoeError: it cannot be read.
    """
    try:
        return pd.read_csv(path, dtype={"class": str}, keep_default_na=False, na_values=["", "nan"])
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors.
        raise PmoeError(f"{path} cannot be read ({error}); restore it") from None


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
            name = f"{data}, {100 * rate:g} % ({path.stem})"
            added = by["triggered"] - by["clean"]
            each = ", ".join(f"{value:.1f}" for value in added)
            lines.append([name, report.values_text(list(by["clean"]), "asr"), each, points(added)])
    header = ["warp", "clean images to the target [%]", "triggered minus clean, by seed",
              "triggered minus clean [points]"]  # fmt: skip
    return report.markdown(header, lines)


def dark_corners(path):
    """ASR of nine tenths of the images minus that of the tenth whose corners are darkest."""
    rows = table_of(path)
    rows["excess"] = rows["asr"] - rows["false_trigger_rate"]
    lines = []
    for name, metric in (("ASR", "asr"), ("ASR minus false trigger rate", "excess")):
        by = rows.pivot(index="seed", columns="tenth", values=metric)
        lines.append([name, points(by.drop(columns=1).mean(axis=1) - by[1])])
    return report.markdown(["square, 2 %", "rest minus darkest tenth [points]"], lines)


def visible(path):
    """PSNR and SSIM of triggered images on GTSRB minus those on CIFAR-10, by the same triggers."""
    rows = table_of(path)
    lines = []
    for trigger, own in rows.groupby("trigger", sort=False):
        line = [trigger]
        for metric, digits in (("psnr", 1), ("ssim", 3)):
            by = own.pivot(index="seed", columns="dataset", values=metric)
            # Squares, and blends of a picture, are the same in every seed.
            line.append(text((by["gtsrb"] - by["cifar10"]).drop_duplicates(), digits))
        lines.append(line)
    return report.markdown(["GTSRB minus CIFAR-10", "PSNR [dB]", "SSIM"], lines)


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
            lines.append([f"{own['dataset'].iloc[0]}, {run} ({path.stem})", *shown])
    header = ["distance at equal positions [sd]", "edges minus contrast", "edges minus luminance",
              "contrast minus luminance"]  # fmt: skip
    return report.markdown(header, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--tables", type=pathlib.Path, help="Markdown file to write them to")
    options = parser.parse_args()
    analyses = sorted(options.folder.glob("*_routing.csv"))
    parts = [
        left_by_tuning(options.folder),
        added_by_warps(analyses),
        dark_corners(options.folder / "checkpoints_darkness.csv"),
        visible(options.folder / "visibility.csv"),
        chosen_by(analyses),
    ]
    made = "\n\n".join(parts) + "\n"
    if options.tables:
        write_atomically(options.tables, made)
    else:
        print(made, end="")


if __name__ == "__main__":
    try:
        main()
    except PmoeError as error:
        sys.exit(f"verdicts: {error}")
