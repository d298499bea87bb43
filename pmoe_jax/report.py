"""Tables of figures, as Markdown that reads well in a terminal and pastes into a paper."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from pmoe_jax import config as config_lib
from pmoe_jax import evaluation, grid, metrics, results
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import write_atomically
from pmoe_jax.members import Member, same_attack
from pmoe_jax.metrics import Summary
from pmoe_jax.results import CellResult, Defended, Figure, Results
from pmoe_jax.rows import ROW_FIELDS, Row
from pmoe_jax.trained import Evaluated


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns but the first are set flush right."""
    columns = zip(header, *lines, strict=True)
    # At least two: Markdown knows no table whose mark is ":" alone.
    widths = [max(2, *(len(cell) for cell in column)) for column in columns]

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
    config, members = evaluated.config, evaluated.members
    trigger = "; ".join(dict.fromkeys(_attack_text(member, config) for member in members))
    if evaluated.shown is not None:
        trigger = f"trained with {trigger}; shown {_trigger_text(evaluated.shown)}"
    rates = sorted({member.rate for member in members})
    seeds = len({member.seed for member in members})
    many = f"{len(members)} members of {seeds} seeds" if seeds < len(members) else f"{seeds} seeds"
    shown = ", ".join(f"{100 * rate:g}" for rate in rates)
    stages = {row["stage"].replace("_", "-") for row in evaluated.rows} - {"trained", "diverged"}
    gone = {row["member"] for row in evaluated.rows if row["stage"] == "diverged"}
    left_out = f" ({len(gone)} diverged, left out)" if gone else ""
    return (
        f"{config.data.name}, {config.model.name} of width {config.model.width}, "
        f"{''.join(f'{stage}, ' for stage in sorted(stages))}epoch "
        f"{evaluated.epoch} of {config.train.epochs}, {many}{left_out}, "
        f"poisoning rate {shown} %, trigger: {trigger}"
    )


def _attack_text(member: Member, config: Any) -> str:
    """The trigger, and where it leads."""
    text = _trigger_text(member.trigger)
    if member.trigger["name"] != "none":
        text += f", target label {member.target}"
        if config.poison.source >= 0:
            carriers = 100 * config.poison.carriers
            text += f", source class {config.poison.source}, carriers {carriers:g} %"
    return text


def _trigger_text(trigger: Mapping[str, Any]) -> str:
    """ "square (size 4, corner top_left, value 0.0)"."""
    given = {name: value for name, value in trigger.items() if name != "name"}
    path = given.pop("pattern_path", None)
    parameters = [f"{name} {value}" for name, value in given.items()]
    if path is not None:
        picture = pathlib.PurePath(path).name
        parameters.append(f"pattern {picture}" if picture else "procedural pattern")
    return trigger["name"] + (f" ({', '.join(parameters)})" if parameters else "")


def evaluation_table(evaluated: Evaluated) -> str:
    """The table of one evaluated run: every seed and, from three seeds, means with intervals.

    Members of several attacks have no means.
    """
    rows = evaluated.rows
    names = [name for name in evaluation.TITLES if any(row["metric"] == name for row in rows)]
    figures = {name: _figure_of(evaluated, name) for name in names}
    alike = same_attack(evaluated.members)
    counts = [figure.summary.n for figure in figures.values() if figure.summary]
    many = alike and max(counts, default=0) >= 3
    labels, lines = [], []
    for index, member in enumerate(evaluated.members):
        own = {row["metric"]: row for row in rows if row["member"] == index}
        attack = "" if alike else f", {member.trigger['name']} {100 * member.rate:g} %"
        labels.append(f"seed {member.seed}{attack}")
        gone = any(row["stage"] == "diverged" for row in own.values())
        lines.append(
            [labels[-1] + (" (diverged, left out)" if gone else "")]
            + [f"{own[name]['value']:.1f}" if name in own else "" for name in names]
        )
    if many:
        lines.append(["mean ± sd"] + [_mean_text(f.summary) for f in figures.values()])
        lines.append(["95 % interval"] + [interval_text(f.summary, n) for n, f in figures.items()])
    if evaluated.last3 and many:
        lines.append(
            ["mean of last 3 epochs ± sd"] + [_mean_text(f.last3) for f in figures.values()]
        )
        lines.append(
            ["its 95 % interval"] + [interval_text(f.last3, n) for n, f in figures.items()]
        )
    elif evaluated.last3:
        for index, label in enumerate(labels):
            points = [figures[name].last3_points.get(index) for name in names]
            if any(point is not None for point in points):
                lines.append([f"{label}, mean of last 3 epochs", *map(_number, points)])
    header = [evaluated.rows[0]["run"]] + [f"{evaluation.TITLES[name]} [%]" for name in names]
    table = f"{scale(evaluated)}\n\n{markdown(header, lines)}"
    if alike and "cad" in figures and figures["cad"].summary:
        table += f"\n\nCAD: {verdict(figures['cad'])}."
    return table


def _figure_of(evaluated: Evaluated, metric: str) -> Figure:
    """Points by member: members of several rates may share a seed."""

    def points(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
        return {
            row["member"]: row["value"]
            for row in rows
            if row["metric"] == metric and row["stage"] != "diverged"
        }

    gone = [r for r in evaluated.rows if r["metric"] == metric and r["stage"] == "diverged"]
    return Figure(points(evaluated.rows), points(evaluated.last3), len(gone))


def _mean_text(summary: Summary | None) -> str:
    return mean_sd(summary) if summary and summary.n >= 3 else ""


def evaluation_json(evaluated: Evaluated) -> str:
    """Rows and summaries as JSON; summaries of several attacks at once are null."""
    alike = same_attack(evaluated.members)

    def summary(rows: Sequence[Row]) -> Any:
        return {n: s._asdict() for n, s in evaluation.summarize(rows).items()} if alike else None

    content: dict[str, Any] = {
        "scale": scale(evaluated),
        "rows": evaluated.rows,
        "summary": summary(evaluated.rows),
        "mean_of_last_3_epochs": summary(evaluated.last3),
    }
    cad = _figure_of(evaluated, "cad")
    if alike and cad.summary:
        content["cad_resolved"] = cad.resolved
    return json.dumps(content, indent=2)


def rows_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the common schema as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ROW_FIELDS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def interval_text(summary: Summary | None, metric: str) -> str:
    """ "91.0 to 100.0", cut at what a percentage can be; empty below three seeds."""
    if summary is None or summary.interval is None:
        return ""
    low, high = summary.interval
    least = -100.0 if metric == "cad" else 0.0
    return f"{max(low, least):.1f} to {min(high, 100.0):.1f}"


def values_text(values: Sequence[float], metric: str) -> str:
    """ "98.1 ± 0.7 [96.4, 99.8]" with the 95 % interval of the mean; one or two values as they are.

    NaN stands for seeds that diverged: " (2 of 3)" says how many count; "–" if none does.
    """
    kept = [float(value) for value in values if not math.isnan(value)]
    if not kept:
        return "–"
    if len(kept) < 3:
        shown = ", ".join(f"{value:.1f}" for value in kept)
    else:
        summary = metrics.summarize(kept)
        shown = f"{mean_sd(summary)} [{interval_text(summary, metric).replace(' to', ',')}]"
    return shown + f" ({len(kept)} of {len(values)})" * (len(kept) < len(values))


# --- reports of sweeps and runs -----------------------------------------------------------------


class Table(NamedTuple):
    """A table of texts with its title."""

    title: str
    header: list[str]
    lines: list[list[str]]


class Section(NamedTuple):
    """Cells of one setting: what they share, and their tables.

    Attributes:
      title: data set and model.
      scale: one line: width, epochs, seeds, and what differs from the paper's setting.
      notes: how to read the tables.
      cells: the cells.
      tables: see `Table`.
    """

    title: str
    scale: str
    notes: list[str]
    cells: list[CellResult]
    tables: list[Table]


#: Fields that a section's title and scale always name.
_NAMED = ("data.name", "model.name", "model.width", "train.epochs")
#: What "(2 of 3)" behind a figure means.
LEFT_OUT = (
    '"(2 of 3)": the other seeds diverged, or the clean models that they are paired with, and are '
    "left out."
)
#: What stands in place of a figure that needs a clean model where there is none.
_NO_CLEAN = "no clean model"


def overview(cells: Sequence[CellResult]) -> Table:
    """All cells in one table: what a sweep shows while it works and at its end.

    The title is the cells' scale; if they differ in it, the title is empty and a column says it.
    """
    scales = [_scale_of(cell) for cell in cells]
    mixed = len(set(scales)) != 1
    lines = []
    for cell, own in zip(cells, scales, strict=True):
        cad = cell.figures.get("cad")
        judged = f" {verdict(cad)}" if cad and cad.resolved is not None else ""
        lines.append([
            cell.label,
            *([own] if mixed else []),
            *(with_interval(cell.figures.get(n), n) for n in ("asr", "false_trigger_rate", "ba")),
            with_interval(cad, "cad") + judged,
            cell.state,
        ])  # fmt: skip
    scale_column = ["scale"] if mixed else []
    figures = ["ASR [%]", "false trigger rate [%]", "BA [%]", "CAD [%]"]
    return Table("" if mixed else scales[0], ["cell", *scale_column, *figures, "state"], lines)


def _scale_of(cell: CellResult) -> str:
    config, seeds, epochs = cell.config, len(cell.seeds), cell.config.train.epochs
    return (
        f"{config.data.name}, {config.model.name} of width {config.model.width}, "
        f"{epochs} epoch{'s' * (epochs > 1)}, {seeds} seed{'s' * (seeds > 1)}"
    )


def sections(
    cells: Sequence[CellResult],
    defended: Sequence[Defended] = (),
    told: Mapping[str, str] | None = None,
) -> list[Section]:
    """Cells grouped by setting and data, in order of appearance; behind them, what defences left.

    Of a defence without models (see `Results.told`) that is the table which it printed.

    No two sections share title and scale.
    """
    grouped: dict[str, list[CellResult]] = {}
    for cell in cells:
        setting = grid.setting(cell.config, cell.member)
        grouped.setdefault(config_lib.to_json(setting) + cell.data, []).append(cell)
    made: list[Section] = []
    for group in grouped.values():
        flat = config_lib.flatten(grid.setting(group[0].config, group[0].member).to_dict())
        title = f"{flat['data.name']}, {flat['model.name']}, width {flat['model.width']}"
        shown = _setting_scale(group, flat)
        if any((title, shown) == (other.title, other.scale) for other in made):
            shown += f"; data set {group[0].data or 'unknown'}"
        start = _Start(group)
        tables = [make(group, start) for make in (_asr_table, _ba_table, _cad_table, _more_table)]
        tables = [_without_empty_columns(table) for table in tables if table.lines]
        made.append(Section(title, shown, _notes(group, flat), group, tables))
    by_run: dict[tuple[str, str], list[Defended]] = {}
    for entry in defended:
        by_run.setdefault((entry.of, entry.label.rpartition("/")[0]), []).append(entry)
    made += [_defence_section(entries) for entries in by_run.values()]
    return made + [_told_section(name, text) for name, text in (told or {}).items()]


def _without_empty_columns(table: Table) -> Table:
    kept = [i for i in range(len(table.header)) if any(line[i] for line in table.lines)]
    lines = [[line[i] for i in kept] for line in table.lines]
    return Table(table.title, [table.header[i] for i in kept], lines)


def points_or_mean(figure: Figure | None) -> str:
    """One or two values as they are, more as mean ± sd; "–" for none.

    Where seeds were left out, "(2 of 3)" says how many count.
    """
    if figure is None:
        return "–"
    counted = f" ({len(figure.points)} of {len(figure.points) + figure.lost})" * bool(figure.lost)
    if figure.summary is None:
        return "–" + counted
    if figure.summary.n < 3:
        return ", ".join(f"{value:.1f}" for value in figure.points.values()) + counted
    return mean_sd(figure.summary) + counted


def difference(figure: Figure | None, reference: float | None, like_for_like: bool = True) -> str:
    """Ours minus the reference, in points; of one or two seeds, of each.

    In brackets where the two are not like for like.
    """
    if figure is None or figure.summary is None or reference is None:
        return ""
    few = figure.summary.n < 3
    ours = list(figure.points.values()) if few else [figure.summary.mean]
    shown = ", ".join(f"{value - reference:+.1f}" for value in ours)
    return shown if like_for_like else f"({shown})"


def verdict(figure: Figure | None) -> str:
    """What an interval says of CAD: "resolved", "unresolved" (0 lies in it), or too few seeds."""
    if figure is None or figure.summary is None:
        return ""
    if figure.resolved is None:
        return f"{figure.summary.n} seed{'s' * (figure.summary.n > 1)}: no interval"
    return "resolved" if figure.resolved else "unresolved"


class _Start:
    """The first columns of every table of a section: name, trigger, rate, n.

    Names are shown where the grid gives some that say more than the trigger, or where rows would
    otherwise look the same.
    """

    def __init__(self, cells: Sequence[CellResult]):
        alike = [(cell.attack, cell.member.rate) for cell in cells]
        self._names = [
            cell.name or (cell.label if alike.count(seen) > 1 else "")
            for cell, seen in zip(cells, alike, strict=True)
        ]
        self._cells = cells
        self._shown = any(
            name not in ("", cell.attack) for name, cell in zip(self._names, cells, strict=True)
        )
        self.header = ["cell"] * self._shown + ["trigger", "rate [%]", "n"]

    def __call__(self, cell: CellResult, figure: Figure | None) -> list[str]:
        count = figure.summary.n if figure and figure.summary else 0
        rate = f"{100 * cell.member.rate:g}" if cell.attacked else ""
        index = next(i for i, other in enumerate(self._cells) if other is cell)
        return [self._names[index]] * self._shown + [cell.attack, rate, str(count)]


def _asr_table(cells: Sequence[CellResult], start: _Start) -> Table:
    header = [*start.header, "ASR [%]", "95 % interval", "last 3 epochs", "paper", "ours - paper",
              "false trigger rate [%]", "state"]  # fmt: skip
    lines = []
    for cell in cells:
        if not cell.attacked:
            continue
        asr, false_rate = cell.figures.get("asr"), cell.figures.get("false_trigger_rate")
        alone = false_rate is None and cell.member.rate > 0 and not cell.baselines
        lines.append([
            *start(cell, asr), *_common(cell, "asr"),
            _NO_CLEAN if alone else points_or_mean(false_rate), cell.state,
        ])  # fmt: skip
    return Table("Attack success", header, lines)


def _ba_table(cells: Sequence[CellResult], start: _Start) -> Table:
    header = [*start.header, "BA [%]", "95 % interval", "last 3 epochs", "paper", "ours - paper",
              "state"]  # fmt: skip
    lines = [
        [*start(cell, cell.figures.get("ba")), *_common(cell, "ba"), cell.state] for cell in cells
    ]
    return Table("Benign accuracy", header, lines)


def _cad_table(cells: Sequence[CellResult], start: _Start) -> Table:
    header = [*start.header, "CAD [%]", "95 % interval", "last 3 epochs", "paper", "ours - paper",
              "CAD is", "state"]  # fmt: skip
    lines = []
    for cell in cells:
        if not cell.member.rate:
            continue
        cad = cell.figures.get("cad")
        found = verdict(cad) if cell.baselines else _NO_CLEAN
        lines.append([*start(cell, cad), *_common(cell, "cad"), found, cell.state])
    return Table("Clean accuracy drop", header, lines)


def _more_table(cells: Sequence[CellResult], start: _Start) -> Table:
    names = [
        name
        for name in ("clean_target_rate", "robust_accuracy", "asr_with_target", "fpr")
        if any(name in cell.figures for cell in cells)
    ]
    titles = [f"{evaluation.TITLES[name]} [%]" for name in names]
    lines = [
        [*start(cell, cell.figures.get(names[0])),
         *(with_interval(cell.figures.get(name), name) for name in names), cell.state]
        for cell in cells
        if names and cell.attacked
    ]  # fmt: skip
    return Table("Further metrics", [*start.header, *titles, "state"], lines)


def _common(cell: CellResult, metric: str) -> list[str]:
    """Last epoch, its interval, mean of the last three epochs, the paper's value, the difference"""
    figure, reference = cell.figures.get(metric), cell.paper(metric)
    return [
        points_or_mean(figure),
        interval_text(figure.summary if figure else None, metric),
        _last3_of(figure, metric),
        _number(reference),
        difference(figure, reference, cell.like_for_like),
    ]


def with_interval(figure: Figure | None, metric: str) -> str:
    """ "90.0, 95.1", or "96.0 ± 2.0 [91.0, 100.0]" from three seeds on."""
    interval = interval_text(figure.summary if figure else None, metric)
    return points_or_mean(figure) + (f" [{interval.replace(' to', ',')}]" if interval else "")


def _last3_of(figure: Figure | None, metric: str) -> str:
    if figure is None or figure.last3 is None:
        return ""
    return with_interval(Figure(figure.last3_points, lost=figure.lost), metric)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _setting_scale(cells: Sequence[CellResult], flat: Mapping[str, Any]) -> str:
    counts = sorted({len(cell.seeds) for cell in cells})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    parts = [
        f"width {flat['model.width']}, {flat['train.epochs']} epochs, "
        f"{seeds} seed{'s' * (counts[-1] > 1)} a cell"
    ]
    if len({cell.seeds for cell in cells}) == 1:
        parts[0] += f" ({_ranges(cells[0].seeds)})"
    sources = {pathlib.PurePath(cell.config.data.source).name for cell in cells} - {""}
    if sources:
        parts.append(f"data from {', '.join(sorted(sources))}")
    other = [
        f"{name} {value}"
        for name, value in flat.items()
        if name not in _NAMED and value != config_lib.FIELDS[name].default
    ]
    if other:
        parts.append(f"unlike the defaults: {', '.join(other)}")
    return "; ".join(parts)


def _ranges(seeds: Sequence[int]) -> str:
    """ "0 to 4", or all of them where one is left out."""
    first, last = min(seeds), max(seeds)
    if len(seeds) > 2 and last - first + 1 == len(seeds):
        return f"{first} to {last}"
    return ", ".join(map(str, seeds))


def _notes(cells: Sequence[CellResult], flat: Mapping[str, Any]) -> list[str]:
    notes = [
        "Figures of the last epoch, and the mean of each seed's last three: mean ± standard "
        "deviation over n seeds and 95 % interval of the mean (Student's t, cut where a percentage "
        "ends); of one or two seeds, each seed's value. CAD pairs seeds, and is unresolved where "
        "its interval contains 0. The false trigger rate is how often the clean model of the same "
        "seed takes triggered images for the target, at the last epoch."
    ]
    compared = [cell for cell in cells if any(map(cell.paper, ("asr", "ba", "cad")))]
    if compared:
        text = "Paper: Tables 1 and 2, mean of 5 runs of width 10 and 25 epochs."
        if not all(cell.like_for_like for cell in compared):
            text += (
                " Differences in brackets are not like for like, as model, training, random "
                "streams or blended picture are not the paper's: compare order and shape, not "
                "values."
            )
        notes.append(text)
    if any(cell.member.rate and not cell.baselines for cell in cells):
        notes.append(
            f'"{_NO_CLEAN}": none of the same setting, data and seed is in the same sweep, or '
            "among the runs that are reported beside each other. Train one and report it, too."
        )
    if any(figure.lost for cell in cells for figure in cell.figures.values()):
        notes.append(LEFT_OUT)
    if any(
        cell.baselines and cell.state.startswith("done")
        and "asr" in cell.figures and "false_trigger_rate" not in cell.figures
        for cell in cells
    ):  # fmt: skip
        notes.append(
            "The false trigger rate of a run trained by itself is not kept: 'pmoe evaluate "
            "--checkpoint=RUN --clean=CLEAN_RUN' prints it."
        )
    return notes


def _defence_section(entries: Sequence[Defended]) -> Section:
    """Fine-Pruning of one run: its directories beside the paper's Table 3."""
    config, stages = entries[0].config, ("before", "pruned", "fine_tuned")
    header = ["directory", "trigger", "rate [%]", "pruned [%]", "n"]
    for title in ("BA", "ASR"):
        header += [f"{title} {stage.replace('_', '-')} [%]" for stage in stages] + ["paper"]
    lines = []
    for entry in entries:
        pruned = entry.stages["pruned"].get("ba")
        line = [
            entry.label,
            entry.attack,
            f"{100 * entry.members[0].rate:g}",
            "varies" if entry.pruned is None else f"{100 * entry.pruned:g}",
            str(len(pruned.points) if pruned else 0),
        ]
        for metric in ("ba", "asr"):
            line += [with_interval(entry.stages[s].get(metric), metric) for s in stages]
            known = [entry.paper(stage, metric) for stage in stages]
            line.append(" / ".join(_number(value) or "–" for value in known) if any(known) else "")
        lines.append([*line, entry.state])
    tuned = max(entry.epochs[1] for entry in entries)
    title = f"Fine-Pruning of {entries[0].of}: {config.data.name}, {config.model.name}"
    seeds = sorted({len(entry.members) for entry in entries})[-1]
    shown = f"width {config.model.width}, {seeds} seed{'s' * (seeds > 1)}, " + (
        f"{tuned} epoch{'s' * (tuned > 1)} of fine-tuning" if tuned else "no fine-tuning"
    )
    notes = [
        "Before the defence, as pruned, and after the last epoch of fine-tuning: mean ± standard "
        "deviation [95 % interval of the mean] over n seeds; of one or two, each seed's value."
    ]
    if any(entry.paper("before", "ba") or entry.paper("pruned", "ba") for entry in entries):
        notes.append(
            "Paper: Table 3, before / pruned / fine-tuned, mean of 3 runs of width 10, 25 epochs "
            "and 5 epochs of fine-tuning; – where the source is not legible. Compare values only "
            "where the scale is the same."
        )
    figures = (f for e in entries for stage in e.stages.values() for f in stage.values())
    if any(figure.lost for figure in figures):
        notes.append(LEFT_OUT)
    table = _without_empty_columns(Table("Fine-Pruning", [*header, "state"], lines))
    return Section(title, shown, notes, [], [table])


def _told_section(name: str, text: str) -> Section:
    """A defence as its `table.md` tells it: the scale, notes, tables."""
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    tables, notes = [], []
    for lines in blocks:
        if not all(line.startswith("|") for line in lines) or len(lines) < 2:
            notes += lines
            continue
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        width = len(rows[0])
        kept = [row[:width] + [""] * (width - len(row)) for row in rows[2:]]
        tables.append(Table("As the defence printed it", rows[0], kept))
    return Section(f"Defence: {name}", notes[0] if notes else "", notes[1:], [], tables)


def report_markdown(made: Sequence[Section]) -> str:
    """The report as Markdown."""
    parts = ["# Results"]
    for section in made:
        parts.append(f"## {section.title}")
        for table in section.tables:
            parts += [f"### {table.title}", section.scale, markdown(table.header, table.lines)]
        parts += section.notes
    return "\n\n".join(parts) + "\n"


def report_latex(made: Sequence[Section]) -> str:
    """The tables as LaTeX: booktabs rules, the scale as caption, below the notes."""
    parts = ["% Needs \\usepackage{booktabs,graphicx}."]
    for section in made:
        for table in section.tables:
            rows = [" & ".join(map(_tex, line)) + r" \\" for line in [table.header, *table.lines]]
            parts.append(
                "\n".join([
                    r"\begin{table}",
                    rf"\caption{{{_tex(f'{table.title}: {section.title}; {section.scale}.')}}}",
                    r"\resizebox{\linewidth}{!}{%",
                    rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
                    r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule",
                    r"\end{tabular}}",
                    r"\par\footnotesize " + _tex(" ".join(section.notes)),
                    r"\end{table}",
                ])
            )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "~": r"\textasciitilde{}",
               "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
               "|": r"\textbar{}", '"': r"\char34{}", "−": "$-$"}  # fmt: skip
    special |= {letter: "\\" + letter for letter in "&%$#_{}"}
    # A hyphen is a minus where a number follows it, or where it stands alone.
    text = re.sub(r"(?<![\w.-])-(?=\d)|(?<= )-(?= )", "−", text)
    return "".join(special.get(letter, letter) for letter in text)


_CELL_FIELDS = (
    "cell", "dataset", "model", "width", "epochs", "trigger", "rate", "target", "state", "metric",
    "seeds", "values", "n", "mean", "sd", "low", "high", "last3_values", "last3_n", "last3_mean",
    "last3_sd", "last3_low", "last3_high", "paper", "ours_minus_paper", "like_for_like", "resolved",
)  # fmt: skip


def cells_csv(cells: Sequence[CellResult]) -> str:
    """Every cell and metric as a line, with full precision; a line for a cell without figures."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CELL_FIELDS)
    writer.writeheader()
    for cell in cells:
        common: dict[str, Any] = {
            "cell": cell.label,
            "dataset": cell.config.data.name,
            "model": cell.config.model.name,
            "width": cell.config.model.width,
            "epochs": cell.config.train.epochs,
            "trigger": cell.attack,
            "rate": cell.member.rate,
            "target": cell.member.target,
            "state": cell.state,
            "n": 0,
            "last3_n": 0,
        }
        if not cell.figures:
            writer.writerow(common)
        for metric, figure in cell.figures.items():
            line = common | {
                "metric": metric,
                "seeds": " ".join(map(str, figure.points)),
                "values": " ".join(map(str, figure.points.values())),
                "last3_values": " ".join(map(str, figure.last3_points.values())),
            }
            for prefix, summary in (("", figure.summary), ("last3_", figure.last3)):
                if summary is not None:
                    low, high = summary.interval or (None, None)
                    line |= {
                        f"{prefix}n": summary.n,
                        f"{prefix}mean": summary.mean,
                        f"{prefix}sd": summary.sd,
                        f"{prefix}low": low,
                        f"{prefix}high": high,
                    }
            reference = cell.paper(metric)
            if reference is not None:
                line |= {"paper": reference, "like_for_like": cell.like_for_like}
                if figure.summary:
                    line["ours_minus_paper"] = figure.summary.mean - reference
            if metric == "cad":
                line["resolved"] = figure.resolved
            writer.writerow(line)
    return out.getvalue()


def write(gathered: Results, output: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes report.md, report.html, tables.tex, cells.csv and rows.csv; returns their paths.

    Raises:
      PmoeError: the folder cannot be written.
    """
    from pmoe_jax import report_html

    made, folder = sections(gathered.cells, gathered.defended, gathered.told), pathlib.Path(output)
    texts = {
        "report.md": report_markdown(made),
        "report.html": report_html.page(gathered, made),
        "tables.tex": report_latex(made),
        "cells.csv": cells_csv(gathered.cells),
        "rows.csv": rows_csv(gathered.rows) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PmoeError(f"--output={folder} cannot be created ({error.strerror})") from None
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def add_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of `pmoe report`."""
    values.set_gnu_getopt(True)  # Flags may follow the directories.
    flags.DEFINE_string("output", None, "Folder to write the report to.", flag_values=values)


def run_command(values: flags.FlagValues, words: list[str]) -> int:
    """`pmoe report DIR... --output=DIR`: prints the Markdown; with --output writes all forms."""
    if not words:
        raise PmoeError("no directory is given; name the directories of sweeps or runs")
    gathered = results.gather(words)
    if values.output is None:
        print(report_markdown(sections(gathered.cells, gathered.defended, gathered.told)), end="")
        return 0
    for path in write(gathered, values.output):
        print(f"wrote {path}")
    return 0
