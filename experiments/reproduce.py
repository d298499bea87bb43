"""Every table and figure of the paper and more: an entry a result, one command for all.

    python experiments/reproduce.py --preset=smoke --workdir=runs/smoke                 # minutes
    python experiments/reproduce.py --preset=cpu --workdir=runs/cpu \
      --data_dir=~/tensorflow_datasets --pattern=hello_kitty.jpg baselines table1 table3

Entries (default: all, in this order), and which others they need before them:

    baselines                 clean models, pMoE and dense
    table1                    attacks on CIFAR-10
    table3                    Fine-Pruning, its controls, detectors      baselines, table1
    table2                    attacks on GTSRB
    quirks                    A1 and A3 in training, A5 in the defence   table1 (table3: beside A5)
    claims                    dense models, other warps, darkness of     baselines, table1,
                              corners, routing of the other triggers,    table2
                              how visible triggers are                   (table3: tuned clean)
    figures                   Figures 1 to 6                             baselines to table2
    report                    tables and page of whatever is there

Each is a list of commands, which --dry_run prints; RUN(CELL) in them stands for the directory of a
cell that is not planned yet. A command that was killed goes on where it was when the same entry is
asked for again, and what is finished is not repeated. How visible triggers are (presets cpu, paper)
needs the extra `experiments`: pip install -e '.[experiments]'.

Presets: paper (width 10, 25 epochs, 5 seeds), cpu (width 2, 10 epochs, GTSRB 8, 3 seeds), cpu_rest
(the other poisoning rates, 1 seed, the square at 0.1 % 3) and smoke (digits; shows that an entry
runs, no figures to quote); more in `pmoe_jax.paper.setting`. For cpu and paper, prepare both first:
`pmoe data prepare cifar10 --source=...`, `pmoe data prepare gtsrb --source=...`. `cpu_rest` adds
poisoning rates to tables 1 and 2 of a `cpu` WORKDIR, and of its squares ASR by darkness (`claims`);
it has no other entries. Below WORKDIR:

    grid/           one sweep with all cells of baselines, table1, table2, quirks, claims
    grid/figures/   figures and arrays
    defences/       what table3 and quirks write, a folder a defence
    claims/         ASR by darkness of the corner; routing of the other triggers
    report/         report.html, report.md, tables.tex, CSV files; attacks.md, defences.md and
                    verdicts.md with what docs/claims.md and docs/defences.md compare
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from pmoe_jax import results
from pmoe_jax.errors import PmoeError
from pmoe_jax.grid import Manifest
from pmoe_jax.paper import setting

HERE = pathlib.Path(__file__).parent
Command = list[str]

#: Of the controls, by preset: what costs too much on a CPU is done on a tenth of the data.
CONTROLS = {
    "paper": [],
    "cpu": ["--config.tune.fractions=(0.1,)", "--config.tune.evaluate_every=5"],
    "smoke": ["--config.tune.epochs=1"],
}
#: Of Fine-Pruning itself: on a CPU also on a tenth, as the controls are compared with that.
WHOLE = {
    "paper": [],
    "cpu": ["--config.tune.fractions=(0.1, 1.0)"],
    "smoke": [*CONTROLS["smoke"], "--config.prune.rates=(0.0, 0.3)"],
}
FEW_IMAGES = {
    "paper": [],
    "cpu": [
        "--config.tune.fractions=(0.01, 0.05, 0.1)", "--config.tune.evaluate_every=5",
        "--config.prune.rates=(0.0,)",
    ],
    "smoke": [
        *CONTROLS["smoke"], "--config.tune.fractions=(0.1,)", "--config.prune.rates=(0.0,)",
        "--config.tune.learning_rates=(0.1,)",
    ],
}  # fmt: skip
CLEANSE = {
    "paper": [],
    "cpu": ["--config.cleanse.rounds=60", "--config.cleanse.batches_per_round=8"],
    "smoke": ["--config.cleanse.rounds=2", "--config.cleanse.batches_per_round=2"],
}
STRIP = {
    "paper": [],
    "cpu": ["--config.strip.images=500"],
    "smoke": ["--config.strip.images=20", "--config.strip.overlays=4"],
}
LAYERS = {
    "paper": [],
    "cpu": ["--config.prune.curve_rates=()"],
    "smoke": ["--config.prune.curve_rates=()", "--config.prune.layers=('stem','experts/conv')"],
}
#: Where clean models lie that were fine-tuned on all images.
TUNED_CLEAN = {"paper": "clean_model", "cpu": "clean_model_all", "smoke": "clean_model"}


class Options(NamedTuple):
    """What the command line says."""

    preset: str
    workdir: pathlib.Path
    data_dir: str
    pattern: str
    jobs: int = 1
    dry_run: bool = False


def sweep(name: str, options: Options) -> Command:
    """Adds the cells of a grid in this folder to the one sweep.

    Programs hold at most a cell of the preset's seeds, so that what is defended and analysed later
    (`trained`) has a program of its own.
    """
    size = {"paper": 5, "smoke": 1}.get(options.preset, 3)
    words = [
        "sweep", f"--config={HERE / name}.py:{options.preset}", f"--workdir={options.workdir}/grid",
        "--append", f"--max_members={size}",
    ]  # fmt: skip
    if options.data_dir:
        words.append(f"--config.data.data_dir={options.data_dir}")
    if options.pattern:
        words.append(f"--config.trigger.pattern_path={options.pattern}")
    if options.jobs > 1:
        words += ["--launcher=local", f"--max_jobs={options.jobs}"]
    return words


def trained(cell: str, options: Options) -> str:
    """The run directory of a cell of the sweep.

    Raises:
      PmoeError: no such cell, or one that is not trained to its end, unless the commands are only
        printed.
    """
    grid = options.workdir / "grid"
    if (grid / "sweep.json").exists():
        manifest = Manifest.read(grid / "sweep.json")
        for each in manifest.cells:
            if each.label == cell:
                state = "done" if options.dry_run else _state(grid, cell)
                if not state.startswith("done"):
                    raise PmoeError(
                        f"{cell!r} in {grid} is not trained yet ({state}); run its entry again, "
                        "which goes on with it"
                    )
                return str(grid / "runs" / manifest.programs[each.members[0].program].name)
    if options.dry_run:
        return f"RUN({cell})"
    entry = "table2" if "GTSRB" in cell else "table1"
    raise PmoeError(f"{grid} has no cell {cell!r} yet; run the entries baselines and {entry} first")


def _state(grid: pathlib.Path, cell: str) -> str:
    """How far a cell of a sweep is, as reports say it."""
    return next(each.state for each in results.gather([grid]).cells if each.label == cell)


def alone(cell: str, options: Options) -> Command:
    """The flag that picks a cell's members of a run that holds others, too."""
    path = options.workdir / "grid" / "sweep.json"
    manifest = Manifest.read(path) if path.exists() else None
    for each in manifest.cells if manifest else ():
        if each.label == cell:
            own = [ref.member for ref in each.members]
            if len(own) < len(manifest.programs[each.members[0].program].members):
                return [f"--members={','.join(map(str, own))}"]
    return []


def defend(config: str, name: str, checkpoint: str, options: Options, more: Command) -> Command:
    """A defence of a cell."""
    path = HERE.parent / "configs" / "defences" / f"{config}.py"
    # The paper defends three of its five runs.
    some = ["--members=0,1,2"] if options.preset == "paper" else []
    return [
        "defend", f"--checkpoint={checkpoint}", f"--config={path}",
        f"--workdir={options.workdir}/defences/{name}", *some, *more,
    ]  # fmt: skip


def cells(options: Options, data: str = "cifar10") -> dict[str, str]:
    """The cells that defences and figures are about: square at the first rate, and others."""
    title = dict(setting.datasets(options.preset))[data]
    rates = setting.RATES[options.preset]
    named = {"clean": f"{title}, clean", "square": f"{title}, square, {100 * rates[0]:g} %"}
    return named | {
        name: f"{title}, {name}, {100 * rates[:2][-1]:g} %" for name in ("blend", "warp")
    }


def datasets(options: Options) -> dict[str, str]:
    """The data sets that differ, and what tables call them: those of `smoke` are the same."""
    named = dict(setting.datasets(options.preset))
    return {"cifar10": named["cifar10"]} if options.preset == "smoke" else named


def baselines(options: Options) -> list[Command]:
    """Clean models."""
    return [sweep("baselines", options)]


def table1(options: Options) -> list[Command]:
    """CIFAR-10."""
    return [sweep("table1", options)]


def table2(options: Options) -> list[Command]:
    """GTSRB."""
    return [sweep("table2", options)]


def table3(options: Options) -> list[Command]:
    """Fine-Pruning of the square (2 % in the paper), its controls, and detectors."""
    square, clean = (trained(cells(options)[name], options) for name in ("square", "clean"))
    preset = options.preset
    controls = CONTROLS[preset]
    routers = [*controls, "--config.prune.rates=(0.0,)"]
    anew = "--config.tune.reinitialise=routers/.*"
    # Nothing contaminates the clean set of a model that was never attacked.
    never_attacked = [*(WHOLE if preset == "smoke" else CONTROLS)[preset],
                      "--config.tune.data=('clean',)"]  # fmt: skip
    made = [
        defend("fine_pruning", "fine_pruning", square, options, WHOLE[preset]),
        defend("expert_subsets", "expert_subsets", square, options, []),
        defend("routers", "routers", square, options, routers),
        defend("routers", "routers_anew", square, options, [*routers, anew]),
        defend("routers", "routers_anew_all_tuned", square, options,
               [*routers, anew, "--config.tune.parameters=.*"]),
        defend("each_layer", "each_layer", square, options, LAYERS[preset]),
        defend("fine_pruning", "clean_model", clean, options, never_attacked),
        defend("few_images", "few_images", square, options, FEW_IMAGES[preset]),
        defend("strip", "strip", square, options, STRIP[preset]),
        defend("strip", "strip_clean_model", clean, options, STRIP[preset]),
        defend("neural_cleanse", "neural_cleanse", square, options, CLEANSE[preset]),
        defend("neural_cleanse", "neural_cleanse_clean_model", clean, options, CLEANSE[preset]),
    ]  # fmt: skip
    if preset == "cpu":  # The reference of what is tuned on all images; elsewhere `clean_model` is.
        made.append(defend("fine_pruning", TUNED_CLEAN[preset], clean, options,
                           ["--config.prune.rates=(0.0,)", "--config.prune.curve_rates=()",
                            "--config.tune.data=('clean',)"]))  # fmt: skip
    return made


def quirks(options: Options) -> list[Command]:
    """A1 and A3 in training; A5 in the defence, without and with A2."""
    square = trained(cells(options)["square"], options)
    rates = ["--config.prune.rates=(0.3,)"] if options.preset == "smoke" else []
    flags = [*CONTROLS[options.preset], *rates]
    clean = "--config.quirks.a2_contaminated_clean_set=False"
    return [
        sweep("quirks", options),
        defend("authors", "authors", square, options, flags),
        defend("authors", "authors_clean", square, options, [*flags, clean]),
    ]


def others_routing(options: Options) -> list[Command]:
    """The routing of blends and warps, causes included, and of clean models that see a square."""
    made = []
    where = f"{options.workdir}/claims"
    rates = setting.RATES[options.preset]
    # Squares are those of `figures`; rates are the paper's 2 and 10 %.
    chosen = {"blend": rates[0], "warp": rates[:2][-1], "warp (truncated)": rates[:2][-1]}
    if options.preset == "smoke":  # One of them shows that it runs.
        del chosen["blend"], chosen["warp"]
    for data, title in datasets(options).items():
        clean = trained(f"{title}, clean", options)
        for trigger, rate in chosen.items():
            cell = f"{title}, {trigger}, {100 * rate:g} %"
            name = re.sub(r"\W+", "_", f"{data} {trigger} {100 * rate:g}")
            made.append(["analyze", f"--checkpoint={trained(cell, options)}",
                         *alone(cell, options), f"--clean={clean}",
                         f"--output={where}/{name}/routing.npz"])  # fmt: skip
        if data == "cifar10":
            made.append(["analyze", f"--checkpoint={clean}", "--trigger.name=square",
                         f"--output={where}/clean_square/routing.npz"])  # fmt: skip
            folder = options.workdir / "defences" / TUNED_CLEAN[options.preset]
            tuned = folder / "prune_0_then_clean_lr0.1"
            if tuned.exists() or options.dry_run:
                made.append(["analyze", f"--checkpoint={tuned}", "--trigger.name=square",
                             f"--output={where}/clean_tuned_square/routing.npz",
                             "--nocauses"])  # fmt: skip
    return made


def claims(options: Options) -> list[Command]:
    """Attacked dense models, and warps of other strength; ASR by darkness of the corner; routing
    of other triggers than the square; how visible triggers are."""
    made = [] if options.preset == "cpu_rest" else [sweep("claims", options)]
    where = f"{options.workdir}/claims"
    source = [f"--data_dir={options.data_dir}"] if options.data_dir else []
    for data, title in datasets(options).items():
        clean = trained(f"{title}, clean", options)
        known = setting.dataset(data, options.preset).get("data.name")
        for rate in setting.RATES[options.preset]:
            name, cell = f"square_{100 * rate:g}", f"{title}, square, {100 * rate:g} %"
            name = name if data == "cifar10" else f"{data}_{name}"
            made += [
                ["analyze", f"--checkpoint={trained(cell, options)}", *alone(cell, options),
                 f"--clean={clean}", "--nocauses", f"--output={where}/{name}/routing.npz"],
                ["darkness.py", f"--routing={where}/{name}/routing.npz", *source,
                 f"--data={known or setting.config(options.preset).data.name}",
                 f"--output={where}/darkness_{name}.csv"],
            ]  # fmt: skip
    if options.preset != "cpu_rest":
        made += others_routing(options)
    if options.preset in ("paper", "cpu") and not importlib.util.find_spec("skimage"):
        print(
            "note: visibility.py is left out; pip install -e '.[experiments]' brings what it needs",
            file=sys.stderr,
        )
    elif options.preset in ("paper", "cpu"):
        pattern = [f"--pattern={options.pattern}"] if options.pattern else []
        made.append(["visibility.py", "--data=cifar10", "--data=gtsrb", *source, *pattern,
                     f"--output={where}/visibility.csv"])  # fmt: skip
    return made


def figures(options: Options) -> list[Command]:
    """All six figures, from the square's models beside a clean, a defended and other ones."""
    made = []
    folder = options.workdir / "grid" / "figures"
    defended = options.workdir / "defences/fine_pruning/prune_30_then_clean_lr0.1"
    for data in ["cifar10"] if options.preset == "smoke" else ["cifar10", "gtsrb"]:
        runs = {name: trained(cell, options) for name, cell in cells(options, data).items()}
        beside = "" if options.preset == "smoke" else {"cifar10": "gtsrb", "gtsrb": "cifar10"}[data]
        place = folder / data
        command = [
            "analyze", f"--checkpoint={runs['square']}", f"--clean={runs['clean']}",
            f"--others={runs['blend']},{runs['warp']}", f"--output={place}/routing.npz",
            f"--figures={place}",
        ]  # fmt: skip
        if beside:
            command.append(f"--more_data={beside}={options.data_dir}")
        if data == "cifar10" and (defended.exists() or options.dry_run):
            command.append(f"--defended={defended}")
            if options.preset == "paper":  # Those that are defended.
                command.append("--members=0,1,2")
        made.append(command)
    return made


def report(options: Options) -> list[Command]:
    """All of it, beside the paper's values."""
    folder, to = options.workdir / "defences", options.workdir / "report"
    defended = sorted(str(path.parent) for path in folder.glob("*/table.md"))
    if options.dry_run and not defended:
        defended = [f"{folder}/*"]
    grid = str(options.workdir / "grid")
    made = [
        ["report", grid, *defended, f"--output={to}"],
        ["attacks.py", grid, f"--tables={to}/attacks.md", f"--figure={to}/attacks.png"],
    ]
    if options.dry_run or any(folder.glob("*/rows.csv")):
        made.append(["defences.py", str(folder), f"--tables={to}/defences.md",
                     f"--figure={to}/defences.png"])  # fmt: skip
    return [*made, ["verdicts.py", str(options.workdir), f"--tables={to}/verdicts.md"]]


ENTRIES: dict[str, Callable[[Options], list[Command]]] = {
    entry.__name__: entry
    for entry in (baselines, table1, table3, table2, quirks, claims, figures, report)
}


#: Entries of the preset that only adds cells.
REST = ("table1", "table2", "claims", "report")


def run(command: Command) -> list[str]:
    """The words that run a command: of `pmoe`, or a script of this folder."""
    if command[0].endswith(".py"):
        return [sys.executable, str(HERE / command[0]), *command[1:]]
    return [sys.executable, "-m", "pmoe_jax.cli", *command]


def wait_for(command: Command) -> int:
    """Runs a command and returns its exit code; signals are left to it, as it saves its work.

    A command that a signal came too late for is followed by no other: the code is not 0 then.
    """
    child: subprocess.Popen[bytes] | None = None
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        came.append(number)
        # A terminal's Ctrl-C reaches the child by itself; SIGTERM comes to this process alone.
        if child is not None and number == signal.SIGTERM:
            child.terminate()

    previous = {
        number: signal.signal(number, forward)
        for number in (signal.SIGINT, signal.SIGTERM)
        # What ignores SIGINT was started in the background, and so was its child.
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        child = subprocess.Popen(run(command))
        if signal.SIGTERM in came:  # Before there was a child.
            child.terminate()
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came and not code:
        return 128 + came[0]
    return code if code >= 0 else 128 - code


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=", ".join(ENTRIES))
    parser.add_argument(
        "--preset", default="smoke", choices=setting.PRESETS, help="scale; smoke by default"
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder for all of it")
    parser.add_argument("--data_dir", default="", help="where prepared data sets lie")
    parser.add_argument("--pattern", default="", help="image of the blend trigger")
    parser.add_argument("--jobs", type=int, default=1, help="programs of a sweep to train at once")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the entries")
    options = parser.parse_args(words)
    unknown = [name for name in options.entries if name not in ENTRIES]
    if unknown:
        parser.error(f"unknown entry {unknown[0]!r}; choose of {', '.join(ENTRIES)}")
    entries = options.entries or (REST if options.preset == "cpu_rest" else list(ENTRIES))
    if options.preset == "cpu_rest" and not set(entries) <= set(REST):
        parser.error(f"--preset=cpu_rest has the entries {', '.join(REST)} only; name some of them")
    known = Options(
        options.preset, options.workdir, options.data_dir, options.pattern, options.jobs,
        options.dry_run,
    )  # fmt: skip
    for name in entries:
        try:
            commands = ENTRIES[name](known)
        except PmoeError as error:
            print(f"reproduce.py: {name}: {error}", file=sys.stderr)
            return 2
        for command in commands:
            words = ["python", str(HERE / command[0])] if command[0].endswith(".py") else []
            line = shlex.join([*words, *command[1:]] if words else ["pmoe", *command])
            print(f"[{name}] {line}", file=sys.stderr, flush=True)
            if not options.dry_run:
                code = wait_for(command)
                if code:
                    return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
