"""Fine-Pruning of a trained run: prune, fine-tune, and every control that a config asks for.

Axes: M member, R pruning rate, T model (a cut of a member, cut by cut), E expert, C channel.

A cut is one way to prune all members (a rate, or the stopping rule). Each becomes a run directory,
which `pmoe evaluate` reads like any other: `prune_30` as pruned, and `prune_30_then_clean_lr0.1`
fine-tuned (`fine_tuning`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pmoe_jax import defences, defend_config, memory, report, training
from pmoe_jax.defend_base import METRICS, Base, cells, covered, headline, jit, write_csv
from pmoe_jax.errors import PmoeError, shown
from pmoe_jax.files import check_sum, write_with_sum
from pmoe_jax.fine_tuning import ORDER, Cut, Result, Session, Tuning
from pmoe_jax.rows import Row, read_lines


def run(base: Base, config: Any) -> str:
    """Runs all combinations of a defence's config, and returns the table.

    Raises:
      PmoeError: layers, data or parameters that the run does not have.
    """
    config = defend_config.effective(config)
    check(base, config)
    results: list[Result] = []
    curves: list[Row] = []
    start = _drawn_anew(base, config)
    for pattern in config.prune.layers:
        layers = defences.match_layers(start.state.params, pattern)
        prefix = _prefix(pattern)
        activations = _Activations(start, config, layers)
        if config.prune.curve_rates:
            curves += _curve(start, config, layers, activations, prefix)
        cuts = _cuts(start, config, layers, activations, prefix)
        pruned = Session(start, config, cuts, None).prune()
        if not config.tune.epochs:
            results += pruned
            continue
        rows, tune = [result.pruned for result in pruned], config.tune
        for combination in itertools.product(tune.data, tune.fractions, tune.learning_rates):
            results += Session(start, config, cuts, Tuning(*combination)).tune(rows)
    every_row = [row for r in results for row in [*r.pruned, *r.tuned]]
    unique = {(row["run"], row["epoch"], row["member"], row["metric"]): row for row in every_row}
    write_csv(base.out / "rows.csv", list(unique.values()))
    _draw(base, results, curves)
    return _table(base, config, results)


def check(base: Base, config: Any) -> None:
    """What only config and run together can tell, before anything is written.

    Raises:
      PmoeError: the first contradiction found.
    """
    tune = config.tune

    def of_member(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    params = jax.tree.map(of_member, base.state.params)
    patterns = list(config.prune.layers)
    slugs = [_slug(pattern) for pattern in patterns]
    for pattern, slug in zip(patterns, slugs, strict=True):
        if pattern and not slug:  # Directories would be named as those of the experts' layer.
            raise PmoeError(
                f"prune.layers={shown(pattern)} has no letter to name directories by; write it "
                "with one, such as (stem|trunk|routers|experts).*"
            )
    if len(set(slugs)) < len(slugs):
        raise PmoeError(
            f"prune.layers={shown(patterns)} give equal names of directories; run one by one"
        )
    _check_names(_directories(config))
    for pattern in patterns:
        for layer in defences.match_layers(params, pattern):
            if config.prune.silence_constant:
                keeps = {layer: np.ones(_leaf(params, f"{layer}/bias").shape)}
                mask = functools.partial(defences.prune_mask, keeps=keeps, silence_constant=True)
                jax.eval_shape(mask, params)
    for pattern in (tune.parameters, *filter(None, [tune.reinitialise])):
        jax.eval_shape(functools.partial(defences.matching_mask, pattern=pattern), params)
    if "heldout" in (*tune.data, config.prune.data) or config.prune.stop_drop:
        base.heldout()
    a2 = config.quirks.a2_contaminated_clean_set
    base.check_clean_set(config.prune.data, a2=a2)
    for kind, fraction in itertools.product(tune.data if tune.epochs else (), tune.fractions):
        base.check_clean_set(kind, a2=a2, fraction=fraction)


def _directories(config: Any) -> list[str]:
    """Names of all run directories that a config makes."""
    prune, tune = config.prune, config.tune
    cuts = [f"{100 * rate:g}" for rate in prune.rates]
    cuts += [f"until_drop_{prune.stop_drop:g}"] if prune.stop_drop else []
    ways = itertools.product(tune.data, tune.fractions, tune.learning_rates) if tune.epochs else ()
    ends = ["", *(f"_{Tuning(*way).name}" for way in ways)]
    return [
        f"{_prefix(pattern)}prune_{cut}{end}"
        for pattern in prune.layers
        for cut in cuts
        for end in ends
    ]


def _check_names(names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if name in names[:place]:
            raise PmoeError(
                f"two cells have the name {name}: rates, fractions or learning rates that differ "
                "behind the sixth digit only; leave one out"
            )
        if len(name) > 200:
            raise PmoeError(
                f"prune.layers gives a directory a name of {len(name)} characters, and 200 are "
                "allowed; write a shorter pattern"
            )


def notes(base: Base, config: Any) -> list[str]:
    """Values of the config that are not taken as they are, or that change nothing."""
    prune, tune = config.prune, config.tune
    found = []
    held = base.count(prune.data)
    if prune.images > held and any((*prune.rates, *prune.curve_rates)):
        found.append(f"prune.images={prune.images} is more than there are; all {held} are used")
    if not base.triggered and "contaminated" in (*tune.data, prune.data):
        found.append("nobody attacked these models, so contaminated images are the clean ones")
    if config.quirks.a2_contaminated_clean_set and not any(base.contaminated("clean", True)):
        found.append("quirks.a2_contaminated_clean_set concerns squares, and no member has one")
    for name in ("rates", "curve_rates"):
        idle = _without_channel(base, config, prune[name])
        if idle:
            found.append(f"prune.{name}: {', '.join(idle)} round to no channel, and prune nothing")
    alike = _equal_cuts(base, config, prune.rates)
    if alike:
        found.append(f"prune.rates: {', '.join(alike)} round to the same channels in every layer")
    if tune.epochs:
        counts = {
            f"{100 * fraction:g} % {kind}": base.count(kind, fraction, config.seed)
            for kind, fraction in itertools.product(tune.data, tune.fractions)
        }
        cut = [f"{n} ({what})" for what, n in counts.items() if n < tune.batch_size]
        if cut:
            found.append(
                f"tune.batch_size={tune.batch_size} is more than there are images to tune on; "
                f"batches of all {', '.join(cut)} are used"
            )
    return found


def _without_channel(base: Base, config: Any, rates: Sequence[float]) -> list[str]:
    """Rates above 0 of which a layer loses no channel, each with these layers."""
    found = []
    for rate in filter(None, rates):
        layers = []
        for pattern in config.prune.layers:
            for layer in defences.match_layers(base.state.params, pattern):
                ranked = _ranked(base, config, layer)
                if not defences.prune_count(rate, ranked) and layer not in layers:
                    layers.append(layer)
        found += [f"{rate:g} ({', '.join(layers)})"] if layers else []
    return found


def _equal_cuts(base: Base, config: Any, rates: Sequence[float]) -> list[str]:
    """Rates above 0 that prune as many channels of every layer, and some, as another one."""
    cuts: dict[tuple[int, ...], list[str]] = {}
    for rate in filter(None, rates):
        counts = tuple(
            defences.prune_count(rate, _ranked(base, config, layer))
            for pattern in config.prune.layers
            for layer in defences.match_layers(base.state.params, pattern)
        )
        if any(counts):
            cuts.setdefault(counts, []).append(f"{rate:g}")
    return [" and ".join(equal) for equal in cuts.values() if len(equal) > 1]


def _ranked(base: Base, config: Any, layer: str) -> int:
    """How many channels of a layer are ranked together."""
    shape = _leaf(base.state.params, f"{layer}/bias").shape[1:]  # [C] or [E, C]
    return math.prod(shape) if config.prune.together else shape[-1]


# --- pruning --------------------------------------------------------------------------------------


def _drawn_anew(base: Base, config: Any) -> Base:
    """The run before it is pruned: with fresh parameters where `tune.reinitialise` says so."""
    pattern = config.tune.reinitialise
    if not pattern:
        return base
    optimizer, shape = base.programs.optimizer, base.dataset.image_shape
    keys = jnp.stack([member.key("init") for member in base.members])

    def one(params: Any, key: jax.Array) -> Any:
        key = jax.random.fold_in(key, ORDER)
        fresh = training.init_member(base.model, optimizer, shape, key).params
        return defences.reinitialise(params, fresh, pattern)

    params = jax.jit(jax.vmap(one))(base.state.params, keys)
    state = base.state.replace(params=params)  # type: ignore[attr-defined]
    return dataclasses.replace(base, state=state)


class _Activations:
    """Mean activations of the members' channels, measured when they are first asked for."""

    def __init__(self, base: Base, config: Any, layers: list[str]):
        self._base, self._config, self._layers = base, config, layers
        self._known: dict[str, np.ndarray] | None = None

    def keeps(self, rates: Sequence[float]) -> dict[str, np.ndarray]:
        """Layer -> bool [M, R, ...], the channels that stay at each rate."""
        if not any(rates):
            shapes = {name: self._shape(name) for name in self._layers}
            return {n: np.ones((s[0], len(rates), *s[1:]), bool) for n, s in shapes.items()}
        if self._known is None:
            self._known = measure(self._base, self._config, self._layers)

        def of_member(activations: jax.Array) -> jax.Array:
            together = self._config.prune.together
            return defences.keep_channels(activations, rates, together=together)

        choose = jax.jit(jax.vmap(of_member))
        return {name: np.asarray(choose(value)) for name, value in self._known.items()}

    def _shape(self, layer: str) -> tuple[int, ...]:
        return _leaf(self._base.state.params, f"{layer}/bias").shape


def measure(base: Base, config: Any, layers: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean activations over the configured images: layer -> float [M, C] or [M, E, C]."""
    prune = config.prune
    data = base.clean_set(prune.data, a2=config.quirks.a2_contaminated_clean_set)
    count = min(prune.images, len(data.labels))
    chosen = np.random.default_rng(config.seed).permutation(len(data.labels))[:count]
    chosen = chosen.astype(np.int32)

    def one(variables: Any, attack: Any, index: Any, images: Any, labels: Any) -> Any:
        batch, _ = training.attacked_batch(attack, index, images, labels)
        found = defences.channel_activations(
            base.model, variables, batch, layers,
            output=prune.output, absolute=prune.absolute, positions=prune.positions,
        )  # fmt: skip
        return found

    program = jit(training.over_members(one, base.strategy, shared=(2, 3, 4)))

    def arguments(batch: Any) -> tuple[Any, ...]:
        index = labels = jax.ShapeDtypeStruct(batch.shape[:1], np.int32)
        return base.state.variables, data.attack, index, batch, labels

    size = min(base.config.evaluation.batch_size, count)
    size = memory.batch_that_fits(program, arguments, data.images, size)
    totals: dict[str, np.ndarray] = {}
    for start in range(0, count, size):
        index = chosen[start : start + size]
        taken = len(index)
        index = np.concatenate([index, np.zeros(size - taken, index.dtype)])
        batch = np.asarray(data.images[index]), data.labels[index]
        found = program(base.state.variables, data.attack, index, *batch)
        for layer, means in found.items():
            total = np.asarray(means, np.float64)[:, :taken].sum(1)
            totals[layer] = totals.get(layer, 0.0) + total
    return {layer: total / count for layer, total in totals.items()}


def pruned_classes(
    base: Base, config: Any, keeps: dict[str, np.ndarray], images: np.ndarray, triggered: bool
) -> np.ndarray:
    """Classes int32 [M, R, N] under R masks of each member, on clean or on triggered images."""
    silence = config.prune.silence_constant

    def one(variables: Any, keeps: Any, trigger: Any, images: jax.Array) -> jax.Array:
        inputs = training.to_float(images)
        return defences.pruned_predictions(
            base.model, variables, keeps, inputs, trigger, silence_constant=silence
        )

    program = jit(training.over_members(one, base.strategy, shared=(3,)))
    trigger = base.attack.trigger if triggered else None
    rates = next(iter(keeps.values())).shape[1]
    size = max(1, base.config.evaluation.batch_size // rates)

    def arguments(batch: Any) -> tuple[Any, ...]:
        return base.state.variables, keeps, trigger, batch

    size = memory.batch_that_fits(program, arguments, images, size)
    return base.over_images(lambda batch: program(*arguments(batch)), images, size)


def _curve(
    base: Base, config: Any, layers: list[str], activations: _Activations, prefix: str
) -> list[Row]:
    """Rows of the pruning curve, with the fields layers and pruned; kept in `curve.jsonl`."""
    path = base.out / f"{prefix}curve.jsonl"
    if path.exists():
        check_sum(path)
        return read_lines(path)
    rates = list(config.prune.curve_rates)
    keeps = activations.keeps(rates)
    images = base.dataset.test_images
    clean = pruned_classes(base, config, keeps, images, False)
    triggered = pruned_classes(base, config, keeps, images, True) if base.triggered else None
    rows = []
    for index, rate in enumerate(rates):
        measured = base.measured_rows(
            clean[:, index], None if triggered is None else triggered[:, index],
            run=base.run.name, epoch=0, stage="pruned",
        )  # fmt: skip
        rows += [{**row, "layers": " ".join(layers), "pruned": rate} for row in measured]
    write_csv(path.with_suffix(".csv"), rows)
    # Last, as its presence says that the curve is whole; its lines keep numbers as numbers.
    write_with_sum(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _cuts(
    base: Base, config: Any, layers: list[str], activations: _Activations, prefix: str
) -> list[Cut]:
    """The configured rates, and the stopping rule if it is asked for."""
    rates, members = list(config.prune.rates), len(base.members)
    cuts = []
    keeps = activations.keeps(rates) if rates else {}
    for index, rate in enumerate(rates):
        own = {layer: keep[:, index] for layer, keep in keeps.items()}
        text = f"{100 * rate:g}"
        cuts.append(Cut(f"{prefix}prune_{text}", f"{text} %", [rate] * members, own))
    drop = config.prune.stop_drop
    if drop:
        grid = list(config.prune.curve_rates)
        keeps = activations.keeps(grid)
        images, labels = base.heldout()
        hits = pruned_classes(base, config, keeps, images, False) == labels
        accuracies = 100 * hits.mean(-1)
        stops = [defences.stopping_rate(grid, row, drop) for row in accuracies]
        at = [grid.index(stop) for stop in stops]
        own = {
            layer: np.stack([keep[m, index] for m, index in enumerate(at)])
            for layer, keep in keeps.items()
        }
        label = f"until held-out accuracy drops by {drop:g}"
        cuts.append(Cut(f"{prefix}prune_until_drop_{drop:g}", label, stops, own))
    if len(layers) > 1 or prefix:
        where = prefix.rstrip("_") or layers[0]
        cuts = [dataclasses.replace(cut, label=f"{cut.label} of {where}") for cut in cuts]
    return cuts


# --- results --------------------------------------------------------------------------------------


def _table(base: Base, config: Any, results: list[Result]) -> str:
    titles = list(METRICS.values())
    stages = ["before", "pruned", "fine-tuned"] if config.tune.epochs else ["before", "pruned"]
    header = ["pruned, fine-tuned on"] + [f"{t} {stage}" for stage in stages for t in titles]
    header += ["s a model"] if config.tune.epochs else []
    before = cells(base.before())
    lines = []
    for result in results:
        label = result.cut.label + (f"; {result.tuning.label}" if result.tuning else "")
        line = [label, *before, *cells(result.pruned)]
        if result.tuning:
            last = [row for row in result.tuned if row["epoch"] == config.tune.epochs]
            line += [*cells(last), f"{result.seconds:.0f}"]
            if covered(base, last) != covered(base):  # Else the headline says so.
                line[0] += f" (fine-tuned: {covered(base, last)})"
        lines.append(line)
    notes = [headline(base), "CA accuracy on clean images, ASR attack success, RA robust accuracy"]
    tune = config.tune
    if config.quirks.a2_contaminated_clean_set and any(base.contaminated("clean", True)):
        notes.append(
            "quirk A2: what is called clean holds the triggered images, with their true labels"
        )
    if tune.reinitialise:
        notes.append(f"drawn anew before anything else: parameters {tune.reinitialise}")
    if tune.epochs:
        notes.append(
            f"fine-tuning: {tune.epochs} epochs, mask {'' if tune.hold_mask else 'not '}held, "
            f"parameters {tune.parameters}; seconds of fine-tuning steps, of the program's time "
            "divided by its models"
        )
    return "\n".join(notes) + "\n\n" + report.markdown(header, lines)


def _draw(base: Base, results: list[Result], curves: list[Row]) -> None:
    from pmoe_jax.figures import mean_curve, plt, save

    def axes_of(columns: int, size: float) -> Any:
        return plt.subplots(
            2, columns, figsize=(size * columns, 4.6), layout="constrained", sharex="col",
            sharey=True, squeeze=False,
        )  # fmt: skip

    def line(axes: Any, rows: Sequence[Row], by: str, metric: str, colour: Any, label: str) -> None:
        chosen = [r for r in rows if r["metric"] == metric and r["stage"] != "diverged"]
        for member in sorted({row["member"] for row in chosen}):
            own = [(row[by], row["value"]) for row in chosen if row["member"] == member]
            axes.plot(*zip(*own, strict=True), color=colour, alpha=0.3, linewidth=0.7)
        mean = mean_curve([row for row in rows if row["metric"] == metric], by)
        drawn: Any = ([], []) if mean is None else (mean.places, mean.values)
        axes.plot(*drawn, color=colour, linewidth=1.8 if mean else 0.7, label=label)

    metrics = ("ba", "asr")
    colours = plt.get_cmap("viridis")
    if curves:
        names = list(dict.fromkeys(row["layers"] for row in curves))
        figure, grid = axes_of(1, 5.5)
        for index, name in enumerate(names):
            own = [row for row in curves if row["layers"] == name]
            for axes, metric in zip(grid[:, 0], metrics, strict=True):
                colour = colours(index / max(1, len(names)))
                line(axes, own, "pruned", metric, colour, name if len(name) < 40 else "layers")
        grid[1, 0].set_xlabel("fraction of channels pruned")
        _label(grid, "pruned, without fine-tuning")
        save(figure, base.out / "curve")
    tunings = list(dict.fromkeys(r.tuning for r in results if r.tuning))
    if tunings:
        figure, grid = axes_of(len(tunings), 3.4)
        for column, tuning in enumerate(tunings):
            own_results = [r for r in results if r.tuning == tuning]
            for index, result in enumerate(own_results):
                for axes, metric in zip(grid[:, column], metrics, strict=True):
                    colour = colours(index / max(1, len(own_results)))
                    line(axes, result.tuned, "epoch", metric, colour, result.cut.label)
            grid[0, column].set_title(tuning.label if tuning else "", fontsize=8)
            grid[1, column].set_xlabel("epoch of fine-tuning (0: as pruned)")
            grid[1, column].xaxis.get_major_locator().set_params(integer=True)
        _label(grid, "")
        save(figure, base.out / "fine_tuning")


def _label(grid: Any, title: str) -> None:
    for axes, metric in zip(grid[:, 0], ("ba", "asr"), strict=True):
        axes.set(ylabel=f"{METRICS[metric]} [%]", ylim=(-2, 102))
    for axes in grid.ravel():
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        grid[0, 0].set_title(title, fontsize=8)
    grid[0, -1].legend(fontsize=6, frameon=False)


def _prefix(pattern: str) -> str:
    """What the names of a layer pattern's directories and files begin with."""
    return f"{_slug(pattern)}_" if pattern else ""


def _slug(pattern: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", pattern).strip("_")


def _leaf(params: Any, name: str) -> Any:
    node = params
    for part in name.split("/"):
        node = node[part]
    return node


METHODS = {"fine_pruning": run}
