"""Analyses a list of trained runs and collects their key figures of routing in one table.

    python experiments/collect_routing.py --output=runs/routing \
      --clean=runs/cifar10_clean --clean=runs/gtsrb_clean \
      --data=cifar10=cifar-10-python.tar.gz --data=gtsrb=gtsrb32.npz \
      runs/cifar10_square_2 runs/cifar10_blend_2 runs/cifar10_warp_10 runs/gtsrb_square_2

Every run is analysed over its whole test set by `pmoe analyze`, beside the clean run of the same
data set where it has one, and beside the defended run of it, into OUTPUT/NAME (figures, too). An
analysis of the same checkpoints and options that is found there is only read again, unless --again
is given; a run that cannot be analysed is named, and the others go on. OUTPUT/routing.csv holds n,
mean, sd and 95 % interval over seeds; OUTPUT/routing.md a table.

Experts have no identity across seeds: figures of experts are first averaged over a seed's experts
(or the largest is taken), then over seeds. What a distance or a Shapley share is: docs/routing.md.
"""

import argparse
import csv
import io
import json
import pathlib
import sys

from pmoe_jax import cli, report, routing_arrays, routing_output
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import check_sum, write_atomically
from pmoe_jax.rundir import RunDirectory

CLEAN, DEFENDED = routing_arrays.PREFIXES

#: Name of a figure: metric, condition, what to take of a seed's experts, and what the table says.
FIGURES = {
    "asr": ("target_rate", "triggered", "", "ASR [%]"),
    "accuracy": ("accuracy", "clean", "", "accuracy on clean images [%]"),
    "iou": ("iou", "both", "mean", "selection IoU, clean against triggered [%]"),
    "capture_any": (
        "capture/nominal/any", "triggered", "", "trigger's patches taken by any expert [%]"),
    "capture_any_clean": (
        "capture/nominal/any", "clean", "", "the same patches on clean images [%]"),
    "capture_any_chance": ("capture/nominal/any", "chance", "", "the same by chance [%]"),
    "capture_all": (
        "capture/nominal/all", "triggered", "", "trigger's patches taken by all experts [%]"),
    "capture_field": (
        "capture/field/share", "triggered", "mean", "share taken of patches that see it [%]"),
    "capture_field_clean": (
        "capture/field/share", "clean", "mean", "the same patches on clean images [%]"),
    "capture_field_chance": ("capture/field/share", "chance", "mean", "the same by chance [%]"),
    "captured_change": (
        "captured_change", "triggered", "mean", "share of the trigger's change taken [%]"),
    "captured_change_clean": (
        "captured_change", "clean", "mean", "the same by the patches of clean images [%]"),
    "captured_change_chance": ("captured_change", "chance", "mean", "the same by chance [%]"),
    "swap_routing": ("swap/routing", "both", "", "part of the ASR by routing [points]"),
    "swap_computation": ("swap/computation", "both", "", "part of the ASR by computation [points]"),
    "asr_clean_routing": (
        "target_rate/other_routing", "triggered", "", "ASR with the clean image's routing [%]"),
    "asr_kept_out": (
        "target_rate/nominal_out", "triggered", "", "ASR, trigger's patches kept out [%]"),
    "asr_field_kept_out": (
        "target_rate/field_out", "triggered", "", "ASR, patches that see it kept out [%]"),
    "shapley_largest": (
        "shapley/asr/zero", "both", "max", "largest Shapley share of the ASR [points]"),
    "shapley_smallest": (
        "shapley/asr/zero", "both", "min", "smallest Shapley share of the ASR [points]"),
    **{
        f"wasserstein_{name}": (f"wasserstein/{name}", "clean", "mean", f"distance, {text} [sd]")
        for name, text in (("sum", "sum of pixels"), ("luminance", "luminance"),
                           ("contrast", "contrast"), ("edges", "edges"))
    },
    **{
        f"wasserstein_position_{name}": (
            f"wasserstein_position/{name}", "clean", "mean", f"at equal positions: {name} [sd]")
        for name in ("sum", "luminance", "contrast", "edges")
    },
    "object_share": (
        "object_share", "clean", "mean", "taken patch area inside the object's box [%]"),
    "object_share_position": (
        "object_share/position", "clean", "mean", "the same by the positions taken alone [%]"),
    "object_share_all": ("object_share/all", "clean", "", "the same of all patches [%]"),
    "unused": ("unused", "clean", "", "patches that no expert takes [%]"),
    "entropy": ("entropy", "clean", "mean", "entropy of an expert's patches [bit]"),
    "overlap": ("overlap", "clean", "mean", "overlap (IoU) between experts [%]"),
}  # fmt: skip
FIELDS = ("run", "model", "dataset", "width", "epoch", "trigger", "rate", "figure", "metric",
          "condition", "of_experts", "unit", "n", "mean", "sd", "low", "high",
          "values")  # fmt: skip


def collect(name, rows):
    """Key figures of one analysis: lines of `FIELDS`, for every model that its rows speak of.

    Args:
      name: of the analysed run.
      rows: of its routing.csv, as texts; of several epochs the last counts.
    """
    last = {}
    for row in rows:
        last[row["run"]] = max(last.get(row["run"], 0.0), float(row["epoch"]))
    current = [{**row, "value": float(row["value"])} for row in rows
               if float(row["epoch"]) == last[row["run"]] and row["class"] == ""]  # fmt: skip
    frames = {row["run"]: row for row in current}
    keys = ("run", "metric", "condition", "of_experts")
    found = {tuple(each[key] for key in keys): each for each in routing_output.summaries(current)}
    lines = []
    for model, frame in frames.items():
        shared = {key: frame[key] for key in ("dataset", "width", "epoch", "trigger", "rate")}
        for figure, (metric, condition, kind, _) in FIGURES.items():
            summary = found.get((model, metric, condition, kind))
            if summary is None:
                continue
            low, high = summary["interval"] or ("", "")
            lines.append(
                {"run": name, "model": model, **shared, "figure": figure, "metric": metric,
                 "condition": condition, "of_experts": kind, "unit": summary["unit"],
                 "n": summary["n"], "mean": summary["mean"],
                 "sd": "" if summary["sd"] is None else summary["sd"], "low": low, "high": high,
                 "values": " ".join(f"{value:.6g}" for value in summary["values"]),
                 "text": routing_output.points_or_mean(summary)}
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
            row.append(line["text"] if line else "")
        if any(row):
            body.append([title, *row])
    return report.markdown([routing_output.OVER_SEEDS, *heads.values()], body)


def analysed(run, beside, source, out, every_epoch, again):
    """Rows of a run's analysis, which is made if need be; None if that failed.

    Args:
      run: the run.
      beside: the clean and the defended one, by the prefix of their arrays.
      source: where the data set lies; "": where the run says.
      out: the folder of all analyses.
      every_epoch, again: as the flags say.

    Raises:
      PmoeError: a file of the analysis does not fit its sum.
    """
    target = out / run.name / "routing.npz"
    try:
        wanted = routing_output.made_from({"": run, **beside}, every_epoch=every_epoch)
    except OSError:  # No whole run: `pmoe analyze` says what it lacks.
        wanted = None
    rows_path, summary_path = (target.with_suffix(end) for end in (".csv", ".json"))
    there = not again and rows_path.exists() and summary_path.exists()
    found = _made_from(summary_path) if there else None
    if wanted is None or found != wanted:
        if found is not None:
            print(f"{run.name} was analysed from other checkpoints or options: again",
                  file=sys.stderr)  # fmt: skip
        flags = [f"--checkpoint={run.path}", f"--output={target}"]
        flags += [f"--figures={target.parent / 'figures'}"]
        flags += [f"--{prefix.partition('_')[0]}={each.path}" for prefix, each in beside.items()]
        flags += [f"--data={source}"] if source else []
        flags += ["--every_epoch"] if every_epoch else []
        print(f"pmoe analyze {' '.join(flags)}", file=sys.stderr)
        if cli.main(["analyze", *flags]):
            return None
    check_sum(rows_path)
    with open(rows_path, newline="") as file:
        return list(csv.DictReader(file))


def _made_from(path):
    """What a summary says it was made from; {} of another format, None where it is no summary.

    Raises:
      PmoeError: it does not fit its sum.
    """
    check_sum(path)
    try:
        stored = json.loads(path.read_text()).get("made_from", {})
    except (OSError, ValueError):
        return None
    return {key: value for key, value in stored.items() if key != "data"}


def once(flag, pairs):
    """A dict of what a flag gives, each of which is for something else.

    Raises:
      PmoeError: two are for the same.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PmoeError(f"{flag} is given twice for {twice}; give one")
    return found


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to write to")
    parser.add_argument(
        "--clean", action="append", default=[], help="run directory of clean models"
    )
    parser.add_argument("--defended", action="append", default=[],
                        help="run directory of one of the runs after a defence")  # fmt: skip
    parser.add_argument("--data", action="append", default=[], metavar="NAME=SOURCE",
                        help="where a data set lies, if not where its runs say")  # fmt: skip
    parser.add_argument("--every_epoch", action="store_true", help="analyse all saved checkpoints")
    parser.add_argument("--again", action="store_true", help="analyse again what was analysed")
    asked = parser.parse_args(argv)
    runs = [RunDirectory(path) for path in asked.runs]
    sources = once("--data", [text.partition("=")[::2] for text in asked.data])
    for name, source in sources.items():
        if not source or all(name != run.config().data.name for run in runs):
            raise PmoeError(f"--data={name} must be NAME=SOURCE of a data set that a run has")
    clean, defended = (
        [RunDirectory(path) for path in each] for each in (asked.clean, asked.defended)
    )
    clean_runs = once("--clean", [(run.config().data.name, run) for run in clean])
    defended_runs = once("--defended", [(run.noted("defence").get("of"), run) for run in defended])
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise PmoeError(f"runs need different names; got {', '.join(names)}")
    for of, run in defended_runs.items():
        if of not in names:
            raise PmoeError(f"--defended={run.path} is a defence of none of these runs")
    lines, failed = [], []
    for run in runs:
        dataset = run.config().data.name
        clean, beside = clean_runs.get(dataset), {}
        if clean is not None and clean.path.resolve() != run.path.resolve():
            beside[CLEAN] = clean
        if run.name in defended_runs:
            beside[DEFENDED] = defended_runs[run.name]
        source = sources.get(dataset, "")
        try:
            rows = analysed(run, beside, source, asked.output, asked.every_epoch, asked.again)
        except PmoeError as error:
            print(f"{run.name}: {error}", file=sys.stderr)
            rows = None
        if rows is None:
            failed.append(run.name)
            continue
        lines += collect(run.name, rows)
    if lines:
        file = io.StringIO()
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        write_atomically(asked.output / "routing.csv", file.getvalue())
        text = table(lines)
        write_atomically(asked.output / "routing.md", text + "\n")
        print(text)
    if failed:
        raise PmoeError(f"not analysed (see above): {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PmoeError as error:
        sys.exit(f"collect_routing: {error}")
