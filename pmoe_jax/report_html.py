"""The report as one HTML page: no network, no script; light and dark, wide and narrow screens.

Charts are inline SVG whose colours are CSS variables, so that they follow the reader's colour
scheme. Colours are Okabe and Ito's, which colour-blind readers can tell apart, lightened in the
dark. All texts are escaped: directories may come from strangers.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pmoe_jax.errors import PmoeError
from pmoe_jax.report import Section, Table
from pmoe_jax.results import CellResult, Results

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59626d; --line: #d6dae0; --page: #fff;
  --panel: #f6f7f9; --c0: #d55e00; --c1: #0072b2; --c2: #009e73; --c3: #b0508a; --c4: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3adb8; --line: #3a424c;
  --page: #14181d; --panel: #1d232a; --c0: #f08c4a; --c1: #56b4e9; --c2: #3fcfa4; --c3: #e69fc9;
  --c4: #e0c34a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
h2, p, figcaption, summary { overflow-wrap: anywhere; }
p { margin: .4rem 0; } .scale, .note, figcaption { color: var(--soft); font-size: .875rem; }
.note { max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: baseline; }
th { white-space: normal; vertical-align: bottom; font-weight: 600; min-width: 3.5rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); }
/* A long name neither covers a phone nor stretches its line. */
td:first-child { white-space: normal; overflow-wrap: break-word; max-width: min(18rem, 40vw); }
tr.unfinished td { color: var(--soft); font-style: italic; }
.charts { display: grid; gap: 1rem; margin: .75rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--panel); border-radius: .5rem; min-width: 0; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figcaption strong { color: var(--ink); }
.key { display: inline-block; margin-right: .8rem; max-width: 100%; }
.key svg { display: inline-block; width: 1.6rem; height: .7rem; vertical-align: baseline; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .series { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .thin { stroke-width: 1.25; opacity: .75; } svg .dashed { stroke-dasharray: 5 4; opacity: .9; }
svg .s1 { stroke-dasharray: 7 3; } svg .s2 { stroke-dasharray: 2 3; }
svg .s3 { stroke-dasharray: 7 3 2 3; } svg .ink { stroke: var(--soft); }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); }
circle { fill: var(--panel); stroke-width: 1.5; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; padding: .75rem; background: var(--panel); border-radius: .5rem;
  font-size: .8rem; }
"""
_COLOURS = 5


class Series(NamedTuple):
    """A line of a chart: points (x, y), its colour class, further classes, what it is."""

    points: Sequence[tuple[float, float]]
    colour: int
    classes: str = ""
    name: str = ""


def page(gathered: Results, sections: Sequence[Section]) -> str:
    """The whole page as text."""
    body = ["<h1>Results</h1>", _summary(gathered.cells)]
    for section in sections:
        body += [
            f"<h2>{_text(section.title)}</h2>",
            *(_table(table, section.scale) for table in section.tables),
            *(f'<p class="note">{_text(note)}</p>' for note in section.notes),
            _charts(section),
        ]
    if gathered.pictures:
        body += ["<h2>Figures</h2>", '<div class="charts">']
        body += [_picture(path) for path in gathered.pictures]
        body += ["</div>"]
    body += ["<h2>Configs and provenance</h2>"]
    body += [_details(f"Config: {name}", setup) for name, setup in gathered.setups.items()]
    body += [_details(f"Provenance: {run}", facts) for run, facts in gathered.provenance.items()]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>Results of pmoe_jax</title>\n"
        # Without this browsers ask for a favicon.
        '<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def chart(
    series: Sequence[Series],
    ticks: Mapping[float, str],
    x_label: str,
    y_label: str,
    description: str,
) -> str:
    """A line chart as SVG.

    Args:
      series: the lines; y in percent.
      ticks: x -> text below the axis.
      x_label, y_label: of the axes.
      description: for readers who do not see it.
    """
    width, height, left, right, top, bottom = 340, 220, 36, 10, 20, 36
    values = [y for line in series for _, y in line.points]
    low, high, step = _scale(values)
    xs = [*ticks, *(x for line in series for x, _ in line.points)]
    x_low, x_high = min(xs), max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        share = 0.5 if x_high == x_low else (x - x_low) / (x_high - x_low)
        return (
            left + 6 + share * (width - left - right - 12),
            top + (high - y) / (high - low) * (height - top - bottom),
        )

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(description)}">',
        f'<text x="2" y="10">{_text(y_label)}</text>',
    ]
    for index in range(round((high - low) / step) + 1):
        value = low + index * step
        y = at(x_low, value)[1]
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for x, label in ticks.items():
        parts.append(
            f'<text x="{at(x, low)[0]:.1f}" y="{height - bottom + 15}" text-anchor="middle">'
            f"{_text(label)}</text>"
        )
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">'
        f"{_text(x_label)}</text>"
    )
    for line in series:
        placed = [at(x, y) for x, y in line.points]
        colour = f"c{line.colour % _COLOURS}"
        if len(placed) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(
                f'<polyline class="series {colour} {line.classes}" points="{path}">'
                f"<title>{_text(line.name)}</title></polyline>"
            )
        if len(placed) == 1:
            parts += [
                f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{_text(line.name)}</title></circle>"
                for x, y in placed
            ]
    return "".join(parts) + "</svg>"


def _scale(values: Sequence[float]) -> tuple[float, float, float]:
    """Low end, high end and step of a percent axis: all of 0 to 100 unless a small part is used."""
    low, high = min(values, default=0.0), max(values, default=100.0)
    if low >= 0 and high <= 100 and high - low > 30:
        return 0, 100, 25
    step = next(s for s in (1, 2, 5, 10, 25, 50, 100) if (high - low) / s <= 5 or s == 100)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return low, max(high, low + step), step


def _charts(section: Section) -> str:
    figures = [_by_rate(section, "asr", "ASR"), _by_rate(section, "cad", "CAD")]
    figures += [_by_epoch(cell) for cell in section.cells]
    shown = "\n".join(figure for figure in figures if figure)
    return f'<div class="charts">\n{shown}\n</div>' if shown else ""


def _by_rate(section: Section, metric: str, name: str) -> str:
    """A metric by poisoning rate: a line a trigger through the means, each seed's points, and the
    paper's values. Cells of equal trigger and rate are lines of their own."""
    chosen = [
        cell
        for cell in section.cells
        if metric in cell.figures and cell.figures[metric].summary and cell.member.rate
    ]
    alike = [(cell.attack, cell.member.rate) for cell in chosen]
    attacks: dict[str, list[CellResult]] = {}
    for cell, seen in zip(chosen, alike, strict=True):
        line = cell.attack if alike.count(seen) == 1 else f"{cell.attack}, {cell.label}"
        attacks.setdefault(line, []).append(cell)
    rates = sorted({cell.member.rate for cell in chosen})
    if len(rates) < 2:
        return ""
    place = {rate: float(index) for index, rate in enumerate(rates)}
    series, keys = [], []
    for colour, (attack, cells) in enumerate(attacks.items()):
        cells = sorted(cells, key=lambda cell: cell.member.rate)
        means, points, reference = [], [], []
        for cell in cells:
            x, figure = place[cell.member.rate], cell.figures[metric]
            assert figure.summary is not None
            means.append((x, figure.summary.mean))
            points += [((x, value), seed) for seed, value in figure.points.items()]
            paper = cell.paper(metric)
            if paper is not None:
                reference.append((x, paper))
        series.append(Series(means, colour, name=attack))
        series += [Series([point], colour, name=f"{attack}, seed {seed}") for point, seed in points]
        keys.append(_key(colour, attack))
        if reference:
            series.append(Series(reference, colour, "thin dashed", f"{attack}, paper"))
            keys.append(_key(colour, f"{attack}, paper", "thin dashed"))
    ticks = {place[rate]: f"{100 * rate:g}" for rate in rates}
    description = f"{name} by poisoning rate, {section.title}"
    drawn = chart(series, ticks, "poisoning rate [%]", f"{name} [%]", description)
    how = "line: mean; circles: seeds"
    return _figure(drawn, f"{name} by poisoning rate", [how, section.scale], keys)


def _by_epoch(cell: CellResult) -> str:
    """BA and ASR of a cell by epoch, a line a seed; of three and more thin ones, and their mean."""
    series, keys = [], []
    # Of up to four seeds each has its own dashes; more would not be told apart by them.
    dashes = {seed: f"s{i}" if len(cell.seeds) <= 4 else "" for i, seed in enumerate(cell.seeds)}
    shown: set[int] = set()
    for colour, (metric, name) in enumerate((("asr", "ASR"), ("ba", "BA"))):
        curves = {s: c for s, c in cell.curves.get(metric, {}).items() if s not in cell.diverged}
        if not curves:
            continue
        shown |= curves.keys()
        for seed, curve in curves.items():
            classes = f"{'thin ' * (len(curves) > 2)}{dashes[seed]}"
            series.append(Series(list(curve.items()), colour, classes, f"{name}, seed {seed}"))
        if len(curves) > 2:
            shared = sorted(set.intersection(*(set(curve) for curve in curves.values())))
            means = [(e, float(np.mean([c[e] for c in curves.values()]))) for e in shared]
            series.append(Series(means, colour, name=f"{name}, mean"))
        keys.append(_key(colour, name))
    if not series:
        return ""
    if len(shown) > 1 and len(cell.seeds) <= 4:
        keys += [_key(0, f"seed {seed}", f"ink {dashes[seed]}") for seed in sorted(shown)]
    last = cell.config.train.epochs
    every = max(1, math.ceil(last / 6))
    ticks = {float(epoch): str(epoch) for epoch in range(every, last + 1, every)}
    ticks.setdefault(1.0, "1") if every > 1 else None
    rate = f", {100 * cell.member.rate:g} % poisoned" if cell.member.rate else ""
    title = f"{cell.attack}{rate}"
    if cell.name not in ("", cell.attack):
        title = f"{cell.name}: {title}"
    lines = f"{len(shown)} seeds: thin lines; their mean: thick" if len(shown) > 2 else ""
    drawn = chart(series, ticks, "epoch", "%", f"{title}: BA and ASR by epoch")
    state = "" if cell.state.startswith("done") else cell.state
    return _figure(drawn, title, [state, lines], keys)


def _figure(drawn: str, title: str, notes: Sequence[str], keys: Sequence[str]) -> str:
    shown = "; ".join(note for note in notes if note)
    return (
        f"<figure>{drawn}<figcaption><strong>{_text(title)}</strong> {''.join(keys)}"
        f"<br>{_text(shown)}</figcaption></figure>"
    )


def _key(colour: int, name: str, classes: str = "") -> str:
    line = f'<line class="series c{colour % _COLOURS} {classes}" x1="1" x2="23" y1="5" y2="5"/>'
    return f'<span class="key"><svg viewBox="0 0 24 10">{line}</svg> {_text(name)}</span> '


def _table(table: Table, scale: str) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells)

    last_is_state = table.header[-1] == "state"
    lines = [
        f'<tr class="{"" if not last_is_state or line[-1].startswith("done") else "unfinished"}">'
        f"{row(line, 'td')}</tr>"
        for line in table.lines
    ]
    return (
        f'<h3>{_text(table.title)}</h3>\n<p class="scale">{_text(scale)}</p>\n'
        f'<div class="scroll"><table>\n<thead><tr>{row(table.header, "th")}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


def _summary(cells: Sequence[CellResult]) -> str:
    done = sum(cell.state.startswith("done") for cell in cells)
    members = sum(len(cell.done) for cell in cells)
    if not cells:
        return ""
    return f"<p>{done} of {len(cells)} cells are finished, {members} trained models in them.</p>"


def _picture(path: Any) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise PmoeError(f"{path} cannot be read ({error.strerror}); remove or restore it") from None
    # Folders within `figures` tell them apart.
    parts = path.with_suffix("").parts
    inside = parts[len(parts) - parts[::-1].index("figures") :]
    name = _text(", ".join(inside).replace("_", " "))
    return (
        f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _details(title: str, content: Any) -> str:
    shown = _text(json.dumps(content, indent=2))
    return f"<details><summary>{_text(title)}</summary><pre>{shown}</pre></details>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
