"""Tables of figures, as Markdown that reads well in a terminal and pastes into a paper."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from pmoe_jax import evaluation
from pmoe_jax.metrics import Summary
from pmoe_jax.run import Evaluated
from pmoe_jax.rundir import ROW_FIELDS


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns but the first are set flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        pairs = zip(cells, widths, strict=True)
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(pairs)]
        return "| " + " | ".join(padded) + " |"

    marks = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([row(header), row(marks), *map(row, lines)])


def mean_sd(summary: Summary) -> str:
    """ "97.2 ± 0.4", or the mean alone of a single seed."""
    return f"{summary.mean:.1f}" + ("" if summary.sd is None else f" ± {summary.sd:.1f}")


def scale(evaluated: Evaluated) -> str:
    """One line that says what a table's figures are: data, model, scale, attack."""
    config, first = evaluated.config, evaluated.members[0]
    trigger = ", ".join(f"{name} {value}" for name, value in first.trigger.items() if value != "")
    rates = sorted({member.rate for member in evaluated.members})
    shown = ", ".join(f"{100 * rate:g}" for rate in rates)
    return (
        f"{config.data.name}, {config.model.name} of width {config.model.width}, epoch "
        f"{evaluated.epoch} of {config.train.epochs}, {len(evaluated.members)} seeds, "
        f"poisoning rate {shown} %, trigger: {trigger}"
    )


def evaluation_table(evaluated: Evaluated) -> str:
    """The table of one evaluated run: every seed, mean ± sd, interval, mean of the last epochs."""
    rows = evaluated.rows
    summaries = evaluation.summarize(rows)
    names = [name for name in evaluation.TITLES if any(row["metric"] == name for row in rows)]
    lines = []
    for index, member in enumerate(evaluated.members):
        own = {row["metric"]: row for row in rows if row["member"] == index}
        label = f"seed {member.seed}"
        if any(row["stage"] == "diverged" for row in own.values()):
            label += " (diverged, left out)"
        lines.append([label] + [f"{own[n]['value']:.1f}" if n in own else "" for n in names])
    blank = Summary(0, float("nan"), None, None)
    of = [summaries.get(name, blank) for name in names]
    lines.append(["mean ± sd"] + [mean_sd(s) if s.n else "" for s in of])
    if any(s.interval for s in of):
        lines.append(["95 % interval"] + [_interval(s) for s in of])
    if evaluated.last3:
        last3 = evaluation.summarize(evaluated.last3)
        lines.append(
            ["mean of last 3 epochs ± sd"]
            + [mean_sd(last3[name]) if name in last3 else "" for name in names]
        )
    header = [evaluated.rows[0]["run"]] + [f"{evaluation.TITLES[name]} [%]" for name in names]
    return f"{scale(evaluated)}\n\n{markdown(header, lines)}"


def evaluation_json(evaluated: Evaluated) -> str:
    """Rows and summaries as JSON."""
    content: dict[str, Any] = {
        "scale": scale(evaluated),
        "rows": evaluated.rows,
        "summary": {n: s._asdict() for n, s in evaluation.summarize(evaluated.rows).items()},
        "mean_of_last_3_epochs": {
            n: s._asdict() for n, s in evaluation.summarize(evaluated.last3).items()
        },
    }
    return json.dumps(content, indent=2)


def rows_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the common schema as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ROW_FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _interval(summary: Summary) -> str:
    if summary.interval is None:
        return ""
    low, high = summary.interval
    return f"{low:.1f} to {high:.1f}"
