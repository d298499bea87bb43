"""Tables of figures, as Markdown that reads well in a terminal and pastes into a paper."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from pmoe_jax import config as config_lib
from pmoe_jax import evaluation, grid, results
from pmoe_jax.errors import PmoeError
from pmoe_jax.metrics import Summary
from pmoe_jax.results import CellResult, Figure, Results
from pmoe_jax.run import Evaluated
from pmoe_jax.rundir import ROW_FIELDS, write_atomically


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
    config, first = evaluated.config, evaluated.members[0]
    trigger = _trigger_text(first.trigger)
    if first.trigger["name"] != "none":
        trigger += f", target label {first.target}"
        if config.poison.source >= 0:
            carriers = 100 * config.poison.carriers
            trigger += f", source class {config.poison.source}, carriers {carriers:g} %"
    if evaluated.shown is not None:
        trigger = f"trained with {trigger}; shown {_trigger_text(evaluated.shown)}"
    rates = sorted({member.rate for member in evaluated.members})
    shown = ", ".join(f"{100 * rate:g}" for rate in rates)
    stages = {row["stage"].replace("_", "-") for row in evaluated.rows} - {"trained", "diverged"}
    return (
        f"{config.data.name}, {config.model.name} of width {config.model.width}, "
        f"{''.join(f'{stage}, ' for stage in sorted(stages))}epoch "
        f"{evaluated.epoch} of {config.train.epochs}, {len(evaluated.members)} seeds, "
        f"poisoning rate {shown} %, trigger: {trigger}"
    )


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
_PAPER_SCALE = {"model.width": 10, "train.epochs": 25}


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
            *(_with_interval(cell.figures.get(n)) for n in ("asr", "false_trigger_rate", "ba")),
            _with_interval(cad) + judged,
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


def _with_interval(figure: Figure | None) -> str:
    """ "90.0, 95.1", or "96.0 ± 2.0 [91.0, 101.0]" from three seeds on."""
    shown = points_or_mean(figure)
    if figure is None or figure.summary is None or figure.summary.interval is None:
        return shown
    low, high = figure.summary.interval
    return f"{shown} [{low:.1f}, {high:.1f}]"


def sections(cells: Sequence[CellResult]) -> list[Section]:
    """Cells grouped by setting, in order of appearance."""
    grouped: dict[str, list[CellResult]] = {}
    for cell in cells:
        setting = grid.setting(cell.config, cell.member)
        grouped.setdefault(config_lib.to_json(setting), []).append(cell)
    made = []
    for group in grouped.values():
        setting = grid.setting(group[0].config, group[0].member)
        flat = config_lib.flatten(setting.to_dict())
        title = f"{flat['data.name']}, {flat['model.name']}, width {flat['model.width']}"
        kinds = (_asr_table, _ba_table, _cad_table, _further_table)
        tables = [make(group) for make in kinds]
        made.append(
            Section(
                title,
                _setting_scale(group, flat),
                _notes(group, flat),
                group,
                [table for table in tables if table.lines],
            )
        )
    return made


def points_or_mean(figure: Figure | None) -> str:
    """One or two values as they are, more as mean ± sd; "–" for none."""
    if figure is None or figure.summary is None:
        return "–"
    if figure.summary.n < 3:
        return ", ".join(f"{value:.1f}" for value in figure.points.values())
    return mean_sd(figure.summary)


def difference(figure: Figure | None, reference: float | None) -> str:
    """Ours minus the reference, in points; of one or two seeds, of each."""
    if figure is None or figure.summary is None or reference is None:
        return ""
    few = figure.summary.n < 3
    ours = list(figure.points.values()) if few else [figure.summary.mean]
    return ", ".join(f"{value - reference:+.1f}" for value in ours)


def verdict(figure: Figure | None) -> str:
    """What an interval says of CAD: "resolved", "unresolved" (0 lies in it), or too few seeds."""
    if figure is None or figure.summary is None:
        return ""
    if figure.resolved is None:
        return f"{figure.summary.n} seed{'s' * (figure.summary.n > 1)}: no interval"
    return "resolved" if figure.resolved else "unresolved"


def _asr_table(cells: Sequence[CellResult]) -> Table:
    header = ["trigger", "rate [%]", "n", "ASR [%]", "95 % interval", "last 3 epochs", "paper",
              "ours - paper", "false trigger rate [%]", "state"]  # fmt: skip
    lines = []
    for cell in cells:
        if cell.member.trigger["name"] == "none":
            continue
        asr, reference = cell.figures.get("asr"), cell.paper("asr")
        lines.append([
            *_first_columns(cell, asr), points_or_mean(asr), _interval_of(asr), _last3_of(asr),
            _number(reference), difference(asr, reference),
            points_or_mean(cell.figures.get("false_trigger_rate")), cell.state,
        ])  # fmt: skip
    return Table("Attack success", header, lines)


def _ba_table(cells: Sequence[CellResult]) -> Table:
    header = ["trigger", "rate [%]", "n", "BA [%]", "95 % interval", "last 3 epochs", "paper",
              "ours - paper", "state"]  # fmt: skip
    lines = []
    for cell in cells:
        ba, reference = cell.figures.get("ba"), cell.paper("ba")
        lines.append([
            *_first_columns(cell, ba), points_or_mean(ba), _interval_of(ba), _last3_of(ba),
            _number(reference), difference(ba, reference), cell.state,
        ])  # fmt: skip
    return Table("Benign accuracy", header, lines)


def _cad_table(cells: Sequence[CellResult]) -> Table:
    header = ["trigger", "rate [%]", "n", "CAD [%]", "95 % interval", "CAD is", "last 3 epochs",
              "paper", "ours - paper", "state"]  # fmt: skip
    lines = []
    for cell in cells:
        cad, reference = cell.figures.get("cad"), cell.paper("cad")
        if cad is None:
            continue
        lines.append([
            *_first_columns(cell, cad), points_or_mean(cad), _interval_of(cad), verdict(cad),
            _last3_of(cad), _number(reference), difference(cad, reference), cell.state,
        ])  # fmt: skip
    return Table("Clean accuracy drop", header, lines)


def _further_table(cells: Sequence[CellResult]) -> Table:
    further = ("robust_accuracy", "asr_with_target", "fpr")
    names = [n for n in further if any(_summary_of(cell, n) for cell in cells)]
    lines = [
        [*_first_columns(cell, cell.figures[names[0]]),
         *(points_or_mean(cell.figures.get(name)) for name in names)]
        for cell in cells
        if names and names[0] in cell.figures
    ]  # fmt: skip
    titles = [f"{evaluation.TITLES[name]} [%]" for name in names]
    return Table("Further metrics", ["trigger", "rate [%]", "n", *titles], lines)


def _first_columns(cell: CellResult, figure: Figure | None) -> list[str]:
    count = figure.summary.n if figure and figure.summary else 0
    rate = f"{100 * cell.member.rate:g}" if cell.member.trigger["name"] != "none" else ""
    return [cell.attack, rate, str(count)]


def _summary_of(cell: CellResult, metric: str) -> Summary | None:
    figure = cell.figures.get(metric)
    return figure.summary if figure else None


def _interval_of(figure: Figure | None) -> str:
    return _interval(figure.summary) if figure and figure.summary else ""


def _last3_of(figure: Figure | None) -> str:
    if figure is None or figure.last3 is None:
        return ""
    return f"mean {figure.last3.mean:.1f}" if figure.last3.n == 2 else mean_sd(figure.last3)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _setting_scale(cells: Sequence[CellResult], flat: Mapping[str, Any]) -> str:
    seeds = sorted({len(cell.seeds) for cell in cells})
    shown = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    other = [
        f"{name} {value}"
        for name, value in flat.items()
        if name not in _NAMED and value != config_lib.FIELDS[name].default
    ]
    return (
        f"width {flat['model.width']}, {flat['train.epochs']} epochs, "
        f"{shown} seed{'s' * (seeds[-1] > 1)} a cell"
        + (f"; unlike the paper: {', '.join(other)}" if other else "")
    )


def _notes(cells: Sequence[CellResult], flat: Mapping[str, Any]) -> list[str]:
    notes = [
        "Figures of the last epoch: mean ± standard deviation over n seeds and 95 % interval of "
        "the mean (Student's t); of one or two seeds, each seed's value. CAD pairs seeds, and is "
        "unresolved where its interval contains 0. The false trigger rate is how often the clean "
        "model of the same seed takes triggered images for the target."
    ]
    if any(cell.paper("asr") is not None for cell in cells):
        text = "Paper: Tables 1 and 2, mean of 5 runs of width 10 and 25 epochs."
        if any(flat[name] != value for name, value in _PAPER_SCALE.items()):
            text += (
                f" Ours are of width {flat['model.width']} and {flat['train.epochs']} epochs: "
                "compare order and shape, not values."
            )
        notes.append(text)
    return notes


def report_markdown(made: Sequence[Section]) -> str:
    """The report as Markdown."""
    parts = ["# Results"]
    for section in made:
        parts += [f"## {section.title}", section.scale]
        for table in section.tables:
            parts += [f"### {table.title}", markdown(table.header, table.lines)]
        parts += section.notes
    return "\n\n".join(parts) + "\n"


def report_latex(made: Sequence[Section]) -> str:
    """The tables as LaTeX, each a `table` with booktabs rules and its scale as caption."""
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
                    r"\end{table}",
                ])
            )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "~": r"\textasciitilde{}",
               "^": r"\textasciicircum{}"}  # fmt: skip
    special |= {letter: "\\" + letter for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in text)


def cells_csv(cells: Sequence[CellResult]) -> str:
    """Every cell and metric as a line, with full precision."""
    lines = []
    for cell in cells:
        for metric, figure in cell.figures.items():
            line: dict[str, Any] = {
                "cell": cell.label,
                "dataset": cell.config.data.name,
                "model": cell.config.model.name,
                "width": cell.config.model.width,
                "epochs": cell.config.train.epochs,
                "trigger": cell.attack,
                "rate": cell.member.rate,
                "target": cell.member.target,
                "state": cell.state,
                "metric": metric,
                "seeds": " ".join(map(str, figure.points)),
                "values": " ".join(map(str, figure.points.values())),
            }
            for prefix, summary in (("", figure.summary), ("last3_", figure.last3)):
                low, high = (summary and summary.interval) or ("", "")
                line |= {
                    f"{prefix}n": summary.n if summary else 0,
                    f"{prefix}mean": summary.mean if summary else "",
                    f"{prefix}sd": summary.sd if summary else "",
                    f"{prefix}low": low,
                    f"{prefix}high": high,
                }
            reference = cell.paper(metric)
            line |= {"paper": reference, "ours_minus_paper": None}
            if reference is not None and figure.summary:
                line["ours_minus_paper"] = figure.summary.mean - reference
            if metric == "cad":
                line["resolved"] = figure.resolved
            lines.append(line)
    out = io.StringIO()
    fields = [*(lines[0] if lines else {}), "resolved"]
    writer = csv.DictWriter(out, list(dict.fromkeys(fields)))
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def write(gathered: Results, output: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Writes report.md, report.html, tables.tex, cells.csv and rows.csv; returns their paths.

    Raises:
      PmoeError: the folder cannot be written.
    """
    from pmoe_jax import report_html

    made, folder = sections(gathered.cells), pathlib.Path(output)
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
        print(report_markdown(sections(gathered.cells)), end="")
        return 0
    for path in write(gathered, values.output):
        print(f"wrote {path}")
    return 0
