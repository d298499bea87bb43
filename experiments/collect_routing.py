"""Analyses a list of trained runs and collects their key figures of routing in one table.

    python experiments/collect_routing.py --output=runs/routing \
      --clean=runs/cifar10_clean --clean=runs/gtsrb_clean \
      --data=cifar10=cifar-10-python.tar.gz --data=gtsrb=gtsrb32.npz \
      runs/cifar10_square_2 runs/cifar10_blend_2 runs/cifar10_warp_10 runs/gtsrb_square_2

Every run is analysed over its whole test set by `pmoe analyze`, beside the clean run of the same
data set where it has one, into OUTPUT/NAME (figures, too). A run that was analysed before is only
read again, unless --again is given; one that cannot be analysed is named, and the others go on.
OUTPUT/routing.csv holds n, mean, sd and 95 % interval over seeds; OUTPUT/routing.md a table.

Experts have no identity across seeds: figures of experts are first averaged over a seed's experts
(or the largest is taken), then over seeds. What a distance or a Shapley share is: docs/routing.md.
"""

import argparse
import csv
import math
import pathlib
import sys
from collections import defaultdict

from pmoe_jax import cli, metrics, report
from pmoe_jax.errors import PmoeError
from pmoe_jax.rundir import RunDirectory, write_atomically

#: Name of a figure: metric, condition, what to take of a seed's experts, and what the table says.
FIGURES = {
    "asr": ("target_rate", "triggered", "mean", "ASR [%]"),
    "accuracy": ("accuracy", "clean", "mean", "accuracy on clean images [%]"),
    "iou": ("iou", "both", "mean", "selection IoU, clean against triggered [%]"),
    "capture_any": (
        "capture/nominal/any", "triggered", "mean", "trigger's patches taken by any expert [%]"),
    "capture_any_clean": (
        "capture/nominal/any", "clean", "mean", "the same patches on clean images [%]"),
    "capture_any_chance": ("capture/nominal/any", "chance", "mean", "the same by chance [%]"),
    "capture_all": (
        "capture/nominal/all", "triggered", "mean", "trigger's patches taken by all experts [%]"),
    "capture_field_any": (
        "capture/field/any", "triggered", "mean", "patches that see it taken by any expert [%]"),
    "captured_change": (
        "captured_change", "triggered", "mean", "share of the trigger's change taken [%]"),
    "captured_change_chance": ("captured_change", "chance", "mean", "the same by chance [%]"),
    "swap_routing": ("swap/routing", "both", "mean", "part of the ASR by routing [points]"),
    "swap_computation": (
        "swap/computation", "both", "mean", "part of the ASR by computation [points]"),
    "asr_clean_routing": (
        "target_rate/other_routing", "triggered", "mean", "ASR with the clean image's routing [%]"),
    "asr_kept_out": (
        "target_rate/nominal_out", "triggered", "mean", "ASR, trigger's patches kept out [%]"),
    "asr_field_kept_out": (
        "target_rate/field_out", "triggered", "mean", "ASR, patches that see it kept out [%]"),
    "shapley_largest": (
        "shapley/target_rate/zero", "triggered", "max", "largest Shapley share of ASR [points]"),
    "shapley_smallest": (
        "shapley/target_rate/zero", "triggered", "min", "smallest Shapley share [points]"),
    "wasserstein_sum": ("wasserstein/sum", "clean", "mean", "distance, sum of pixels [sd]"),
    "wasserstein_luminance": ("wasserstein/luminance", "clean", "mean", "distance, luminance [sd]"),
    "wasserstein_contrast": ("wasserstein/contrast", "clean", "mean", "distance, contrast [sd]"),
    "wasserstein_edges": ("wasserstein/edges", "clean", "mean", "distance, edges [sd]"),
    "object_share": (
        "object_share", "clean", "mean", "taken patch area inside the object's box [%]"),
    "object_share_all": ("object_share/all", "clean", "mean", "the same of all patches [%]"),
    "unused": ("unused", "clean", "mean", "patches that no expert takes [%]"),
    "entropy": ("entropy", "clean", "mean", "entropy of an expert's patches [bit]"),
    "overlap": ("overlap", "clean", "mean", "overlap (IoU) between experts [%]"),
}  # fmt: skip
FIELDS = ("run", "model", "dataset", "width", "epoch", "trigger", "rate", "figure", "metric",
          "condition", "of_experts", "unit", "n", "mean", "sd", "low", "high")  # fmt: skip
_OF_EXPERTS = {"mean": lambda values: sum(values) / len(values), "max": max, "min": min}


def collect(name, rows):
    """Key figures of one analysis: lines of `FIELDS`, for every model that its rows speak of.

    Args:
      name: of the analysed run.
      rows: of its routing.csv, as texts; of several epochs the last counts.
    """
    last = {row["run"]: max(float(r["epoch"]) for r in rows if r["run"] == row["run"])
            for row in rows}  # fmt: skip
    found = defaultdict(lambda: defaultdict(list))
    frames = {}
    for row in rows:
        value = float(row["value"])
        current = float(row["epoch"]) == last[row["run"]] and row["stage"] != "diverged"
        if current and math.isfinite(value):
            found[row["run"], row["metric"], row["condition"]][row["member"]].append(value)
            frames[row["run"], row["metric"], row["condition"]] = row
    lines = []
    for model in last:
        for figure, (metric, condition, kind, _) in FIGURES.items():
            by_member = found.get((model, metric, condition))
            if not by_member:
                continue
            summary = metrics.summarize(_OF_EXPERTS[kind](values) for values in by_member.values())
            frame = frames[model, metric, condition]
            low, high = summary.interval or ("", "")
            sd = "" if summary.sd is None else summary.sd
            shared = {key: frame[key] for key in ("dataset", "width", "epoch", "trigger", "rate")}
            lines.append(
                {"run": name, "model": model, **shared, "figure": figure, "metric": metric,
                 "condition": condition, "of_experts": kind, "unit": frame["unit"], "n": summary.n,
                 "mean": summary.mean, "sd": sd, "low": low, "high": high}
            )  # fmt: skip
    return lines


def table(lines):
    """A Markdown table: a row a figure, a column a model of a run."""
    heads = {}
    for line in lines:
        label = (
            line["model"] if line["model"] == line["run"] else f"{line['model']} ({line['run']})"
        )
        heads.setdefault((line["run"], line["model"]), f"{label}, n={line['n']}")
    cells = {(line["run"], line["model"], line["figure"]): line for line in lines}
    body = []
    for figure, (*_, title) in FIGURES.items():
        row = []
        for head in heads:
            line = cells.get((*head, figure))
            digits = 2 if line and line["unit"] in ("sd", "bit") else 1
            text = "" if line is None else f"{line['mean']:.{digits}f}"
            row.append(text + (f" ± {line['sd']:.{digits}f}" if line and line["sd"] != "" else ""))
        if any(row):
            body.append([title, *row])
    return report.markdown(["mean ± sd over seeds", *heads.values()], body)


def analysed(run, clean, source, out, again):
    """Rows of a run's analysis, which is made if need be; None if that failed."""
    target = out / run.name / "routing.npz"
    rows = target.with_suffix(".csv")
    if again or not rows.exists():
        flags = [f"--checkpoint={run.path}", f"--output={target}"]
        flags += [f"--figures={target.parent / 'figures'}"]
        flags += [f"--clean={clean.path}"] if clean is not None else []
        flags += [f"--data={source}"] if source else []
        print(f"pmoe analyze {' '.join(flags)}", file=sys.stderr)
        if cli.main(["analyze", *flags]):
            return None
    with open(rows, newline="") as file:
        return list(csv.DictReader(file))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to write to")
    parser.add_argument(
        "--clean", action="append", default=[], help="run directory of clean models"
    )
    parser.add_argument("--data", action="append", default=[], metavar="NAME=SOURCE",
                        help="where a data set lies, if not where its runs say")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="analyse again what was analysed")
    asked = parser.parse_args(argv)
    sources = dict(text.partition("=")[::2] for text in asked.data)
    clean_runs = {}
    for path in asked.clean:
        run = RunDirectory(path)
        clean_runs[run.config().data.name] = run
    runs = [RunDirectory(path) for path in asked.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise PmoeError(f"runs need different names; got {', '.join(names)}")
    lines, failed = [], []
    for run in runs:
        dataset = run.config().data.name
        clean = clean_runs.get(dataset)
        clean = None if clean is None or clean.path.resolve() == run.path.resolve() else clean
        rows = analysed(run, clean, sources.get(dataset, ""), asked.output, asked.again)
        if rows is None:
            failed.append(run.name)
            continue
        lines += collect(run.name, rows)
    if lines:
        with open(asked.output / "routing.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        text = table(lines)
        write_atomically(asked.output / "routing.md", text + "\n")
        print(text)
    if failed:
        raise PmoeError(f"not analysed (see above): {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PmoeError as error:
        sys.exit(str(error))
