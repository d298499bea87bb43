"""Which source of chance makes results scatter: initialisation, poison choice, trigger or order?

    pmoe sweep --config=experiments/variance.py:smoke --workdir=runs/variance
    python experiments/variance.py runs/variance

Every cell trains the same attack with `num_seeds` seeds. In the first cell all four named streams
follow the seed, in each of the others only one does (`streams.NAME=HELD` holds the rest). The
second command prints, for the last epoch, the standard deviation of every cell with its 95 %
interval (chi-square), and its variance as a share of the variance when everything varies. Shares of
sources that act independently and additively add up to 100 %; that they do not is a finding, too.
With few seeds the intervals are wide: believe them, not the shares. Those of shares are
approximate: an F interval takes the two cells as independent, but each shares the streams that vary
in it with the first (the same seeds), which makes them rather too wide.

Presets: smoke (digits, minutes), cpu (CIFAR-10, width 2), paper (CIFAR-10, width 10).
"""

import math
import sys

from scipy import stats

from pmoe_jax import config as config_lib
from pmoe_jax import report, results
from pmoe_jax.errors import PmoeError
from pmoe_jax.streams import STREAMS

#: The seed that streams are held at: none of the members' own.
HELD = 1_000_000
EVERYTHING = "everything"


def get_config(preset="smoke"):
    config = config_lib.default()
    config.trigger.name = "warp"  # The trigger that is drawn anew for every seed.
    if preset == "smoke":
        config.data.name = "digits"
        config.num_seeds = 3
        config.model.width = 1
        config.model.bn_momentum = 0.9
        config.train.epochs = 3
        config.train.batch_size = 32
        config.evaluation.batch_size = 180
    elif preset in ("cpu", "paper"):
        config.data.name = "cifar10"
        config.num_seeds = 5
        if preset == "cpu":
            config.model.width = 2
            config.train.epochs = 5
    else:
        raise PmoeError(f"unknown preset {preset!r}; choose one of smoke, cpu, paper")
    config.poison.rate = 0.1
    return config


def get_grid(preset="smoke"):
    """What varies, per cell. Baselines tell nothing here: none are trained."""
    cells = [{"name": EVERYTHING}]
    for varied in STREAMS:
        held = {f"streams.{name}": HELD for name in STREAMS if name != varied}
        cells.append({"name": varied, **held})
    return [{**cell, "baseline": False} for cell in cells]


def shares(cells, metric):
    """Lines of a table: what varies, n, sd, its interval, share of the variance of everything.

    The share's interval is of the ratio of two variances (F distribution, see the top of the file).
    """
    by_name = {cell.label: cell.figures.get(metric) for cell in cells}
    whole = by_name.get(EVERYTHING)
    lines = []
    for name, figure in by_name.items():
        summary = figure.summary if figure else None
        if summary is None or summary.n < 2:
            lines.append([name, str(summary.n if summary else 0), "–", "", "", ""])
            continue
        degrees = summary.n - 1
        low, high = (summary.sd * math.sqrt(degrees / q)
                     for q in stats.chi2.ppf([0.975, 0.025], degrees))  # fmt: skip
        line = [name, str(summary.n), f"{summary.sd:.2f}", f"{low:.2f} to {high:.2f}"]
        if name != EVERYTHING and whole and whole.summary and whole.summary.sd:
            ratio = (summary.sd / whole.summary.sd) ** 2
            ends = stats.f.ppf([0.975, 0.025], degrees, whole.summary.n - 1)
            line += [f"{100 * ratio:.0f} %", " to ".join(f"{100 * ratio / e:.0f} %" for e in ends)]
        lines.append(line + [""] * (6 - len(line)))
    return lines


def main(arguments):
    if len(arguments) != 1:
        raise PmoeError("usage: python experiments/variance.py SWEEP_DIR")
    cells = results.gather(arguments).cells
    made = report.sections(cells)
    if len(made) != 1 or EVERYTHING not in [cell.label for cell in cells]:
        raise PmoeError(
            f"{arguments[0]} holds no sweep of one setting with a cell {EVERYTHING!r}; "
            "make one with --config=experiments/variance.py"
        )
    header = ["what varies", "n", "sd [points]", "95 % interval", "share of variance",
              "95 % interval"]  # fmt: skip
    for metric, title in (("ba", "BA"), ("asr", "ASR")):
        print(f"{title}, last epoch; {made[0].title}; {made[0].scale}\n")
        print(report.markdown(header, shares(cells, metric)) + "\n")
    print(
        "Intervals of shares are approximate: the F distribution takes cells as independent, but "
        "each shares the streams that vary in it with the first."
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PmoeError as error:
        sys.exit(str(error))
