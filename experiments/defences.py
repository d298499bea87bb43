"""Tables and figure of docs/defences.md, from the rows that `pmoe defend` wrote.

    python experiments/defences.py                      # of experiments/results/defences
    python experiments/defences.py --figure=docs/figures/defences.png

Every folder there holds the `rows.csv` and `defence.json` of a defence. Printed are Fine-Pruning in
the layout of the paper's Table 3, truly clean and contaminated images (quirk A2) side by side, what
quirks A2 and A5 change seed by seed, and fine-tuning without pruning by share of the training
images, learning rate and epochs: in percent, mean ± sd over seeds with the 95 % interval of the
mean. The figure shows the attack success rate of every seed behind each defence.
"""

import argparse
import json
import pathlib
import sys

import ml_collections
import pandas as pd

from pmoe_jax import defend_config, paper, report
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import check_sum, write_atomically
from pmoe_jax.rows import ROW_FIELDS

RESULTS = pathlib.Path(__file__).parent / "results"
METRICS = ["ba", "asr", "robust_accuracy"]
#: Points within which figures of one model may differ, from machine to machine.
SAME = 0.1
#: Cells of other layers than the experts' last have these in front.
CELL = (
    r"^prune_(?P<pruned>[\d.]+)"
    r"(?:_then_(?P<data>[a-z]+)(?:_(?P<share>[\d.]+)pct)?_lr(?P<lr>[\d.e+-]+))?$"
)
#: What was tuned: parameters, and those drawn anew first.
TUNED = {
    (".*", ""): "everything",
    ("routers/.*", ""): "routers alone",
    ("routers/.*", "routers/.*"): "routers drawn anew, alone",
    (".*", "routers/.*"): "routers drawn anew, everything",
}
#: Fields of a defence that no column shows.
OTHER = {
    "prune": tuple(defend_config.AUTHORS_PRUNING),
    "tune": ("momentum", "weight_decay", "batch_size"),
}


def read(folder):
    """Figures [%] at the last epoch of every cell, a line a seed; columns ba, asr, robust_accuracy.

    NaN stands for those of seeds that diverged. Also: folder, dataset, width, trigger, rate, model
    (members, data and step of a checkpoint), pruned [%], a5 (pruned as the authors do), measured
    (the images of the activations; "any" if tuned), pruned_by (the same, also if tuned), data (""
    if pruned only), share [%] of it, lr, tuned (of `TUNED`), epochs, other settings
    (text: those of the defence that no column shows), and seed.
    Cells of other layers than the experts' last are left out.

    Raises:
      PmoeError: no rows, or no config beside them.
    """
    paths = sorted(folder.glob("*/rows.csv"))
    if not paths:
        raise PmoeError(f"{folder} holds no */rows.csv; give a folder of defences")
    rows = pd.concat([table_of(path).assign(**settings(path.parent)) for path in paths])
    rows = rows.reset_index(drop=True).join(rows["run"].str.extract(CELL).reset_index(drop=True))
    rows = rows[rows["pruned"].notna() & rows["metric"].isin(METRICS)]
    last = rows.groupby(["folder", "run"])["epoch"].transform("max")
    rows = rows[rows["epoch"] == last].astype({"pruned": float})
    rows["data"] = rows["data"].fillna("")
    rows["share"] = rows["share"].astype(float).fillna(100.0)
    rows["lr"] = rows["lr"].astype(float).fillna(0.0)
    rows["value"] = rows["value"].where(rows["stage"] != "diverged")
    rows["pruned_by"] = rows["measured"]
    # Quirk A2 contaminates what is called clean, of squares.
    for images in ("data", "measured", "pruned_by"):
        leaked = rows["a2"] & (rows[images] == "clean") & (rows["trigger"] == "square")
        rows[images] = rows[images].mask(leaked, "contaminated")
    only_pruned = rows["data"] == ""
    rows["measured"] = rows["measured"].where(only_pruned, "any")
    # What was not tuned is the same for all, unless routers were drawn anew first.
    rows["tuned"] = rows["tuned"].mask(only_pruned & ~rows["anew"], "everything")
    rows["epochs"] = rows["epochs"].mask(only_pruned, 0)
    # Settings count where they change something: of what is neither pruned nor tuned, none does.
    pruned, tuned = rows["pruned"] > 0, ~only_pruned
    rows["other settings"] = ""
    for name, where in (("prune", pruned), ("tune", tuned), ("hold_mask", pruned & tuned)):
        rows["other settings"] += rows[f"other_{name}"].where(where, "")
    cell = ["dataset", "width", "trigger", "rate", "model", "pruned", "a5", "measured", "data",
            "share", "lr", "tuned", "epochs", "other settings", "seed"]  # fmt: skip
    made = rows.pivot(index=["folder", "pruned_by", *cell], columns="metric", values="value")
    return once(made.reindex(columns=METRICS).reset_index(), cell)


def table_of(path):
    """The rows of a defence.

    Raises:
      PmoeError: they do not fit their sum, or are none.
    """
    check_sum(path)
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors.
        raise PmoeError(f"{path} cannot be read ({error}); restore it") from None
    lacking = {*ROW_FIELDS} - {*rows.columns}
    if lacking:
        raise PmoeError(f"{path} has no column {sorted(lacking)[0]}; give rows of pmoe defend")
    return rows


def once(table, cell):
    """The table without lines that another folder has, too; where figures differ, that is said.

    Args:
      table: lines of all folders.
      cell: columns that tell the cells and seeds of a folder apart.
    """
    spread = table.groupby(cell)[METRICS].agg(lambda values: values.max() - values.min())
    different = spread[(spread > SAME).any(axis=1)].index
    if len(different):
        folders = table.set_index(cell).loc[different, "folder"].unique()
        print(
            f"note: {', '.join(sorted(folders))} have other figures of {len(different)} equal "
            f"cells, by {spread.max().max():.1f} points at most; the first folder's are shown",
            file=sys.stderr,
        )
    # What diverged in one of them is taken from another.
    ordered = table.assign(gone=table["ba"].isna()).sort_values(["gone", "folder"], kind="stable")
    return ordered.drop_duplicates(cell).drop(columns="gone").sort_index()


def settings(folder):
    """What the config of a defence says and the names of its cells do not."""
    try:
        defence = json.loads((folder / "defence.json").read_text())
        config = defence["config"]
        tune, quirks = config["tune"], config["quirks"]
        taken = defend_config.effective(ml_collections.ConfigDict(config)).to_dict()
        # Draws of images, and their order, depend on the seed.
        other = {part: [config["seed"], *(f"{name}={taken[part][name]}" for name in names)]
                 for part, names in OTHER.items()}  # fmt: skip
        # Not the name of the run, which may have been copied.
        model = {name: defence[name] for name in ("members", "dataset", "step")}
        return {
            "folder": folder.name,
            "model": json.dumps(model, sort_keys=True),
            "a2": bool(quirks["a2_contaminated_clean_set"]),
            "a5": bool(quirks["a5_authors_pruning"]),
            "measured": config["prune"]["data"],
            "anew": bool(tune["reinitialise"]),
            "tuned": TUNED.get((tune["parameters"], tune["reinitialise"]), "other parameters"),
            "epochs": int(tune["epochs"]),
            **{f"other_{part}": f"{part} {entries} " for part, entries in other.items()},
            "other_hold_mask": f"hold_mask={taken['tune']['hold_mask']}",
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PmoeError(f"{folder}/defence.json cannot be used ({error!r}); restore it") from None


def texts(seeds):
    """Accuracy, ASR and robust accuracy: see `report.values_text`."""
    return [report.values_text(list(seeds[metric]), metric) for metric in METRICS]


def select(table, **wanted):
    """Lines in which every named column has the wanted value; one a seed.

    Raises:
      PmoeError: several cells have them.
    """
    for name, value in wanted.items():
        table = table[table[name] == value]
    twice = table[table.duplicated("seed")]
    if len(twice):
        line = table[table["seed"] == twice.iloc[0]["seed"]]
        hidden = {*METRICS, "pruned_by"}
        columns = [name for name in line if name not in hidden and line[name].nunique() > 1]
        raise PmoeError(
            f"several cells are of {wanted} and differ in {', '.join(columns)}, which this table "
            "does not show; give a folder that holds one of them"
        )
    return table


def as_the_text_says(table):
    """Without quirk A5; everything tuned, for as many epochs as the shortest fine-tuning; not
    pruned by what is measured on contaminated images."""
    table = table[~table["a5"] & (table["tuned"] == "everything")]
    table = table[table["measured"] != "contaminated"]
    return table[table["epochs"].isin([0, table.loc[table["epochs"] > 0, "epochs"].min()])]


def table3(table, share):
    """Fine-Pruning with a share [%] of the training images, in the layout of Table 3."""
    lines = []
    for pruned in (0, 10, 20, 30):
        cells = [select(table, pruned=pruned, data="")]
        for data in ("clean", "contaminated"):
            cells.append(select(table, pruned=pruned, data=data, share=share, lr=0.1))
        lines.append([f"{pruned} %", *(text for seeds in cells for text in texts(seeds)[:2])])
    header = ["pruned", "CA pruned", "ASR pruned", "CA tuned, clean", "ASR tuned, clean",
              "CA tuned, A2", "ASR tuned, A2"]  # fmt: skip
    return report.markdown(header, lines)


def papers_table3():
    """What the paper has; values of another width, so that they stand apart."""
    lines = []
    for pruned in (10, 20, 30):
        cells = [
            paper.fine_pruning("cifar10", "square", 0.02, pruned / 100, stage, metric)
            for stage in ("before", "pruned", "fine_tuned")
            for metric in ("ba", "asr")
        ]
        lines.append([f"{pruned} %", *("" if cell is None else f"{cell:g}" for cell in cells)])
    header = ["pruned", "CA before", "ASR before", "CA pruned", "ASR pruned", "CA tuned",
              "ASR tuned"]  # fmt: skip
    return report.markdown(header, lines)


def differences(on, off):
    """What differs in accuracy and ASR, paired by seed [points]; None if neither is known."""
    on, off = on.set_index("seed"), off.set_index("seed")
    cells = []
    for metric in ("ba", "asr"):
        # Of the seeds of `off`; those that are missing in `on` count as missing.
        found = (on[metric] - off[metric]).reindex(off.index)
        cells.append(report.values_text(list(found), "cad"))
    return None if cells == ["–", "–"] else cells


def effect_of_a2(table):
    """What contaminated instead of truly clean images change, paired by seed [points]."""
    lines = []
    for share in (100, 10):
        for pruned in (0, 10, 20, 30):
            clean, a2 = (
                select(table, pruned=pruned, data=data, share=share, lr=0.1)
                for data in ("clean", "contaminated")
            )
            cells = differences(a2, clean) or ["–", "–"]
            lines.append([f"{share} % of the images, pruned {pruned} %", *cells])
    return report.markdown(["tuned on A2 minus tuned on clean", "CA", "ASR"], lines)


def effect_of_a5(table):
    """What pruning as the authors do changes, paired by seed [points]; only pruned, and tuned."""
    lines = []
    names = {"": "only pruned", "clean": "then tuned on clean", "contaminated": "then tuned on A2"}
    for (data, share, _, pruned, measured), cells in table.groupby(
        ["data", "share", "lr", "pruned", "measured"]
    ):
        sides = [select(cells, a5=on) for on in (True, False)]
        changed = differences(*sides)
        if changed is not None:
            images = f", {share:g} % of the images" if data else f", by {measured} images"
            if data and {*sides[0]["pruned_by"]} != {*sides[1]["pruned_by"]}:
                images += " (theirs pruned by contaminated ones)"
            lines.append([f"pruned {pruned:g} %, {names.get(data, data)}{images}", *changed])
    return report.markdown(["pruned as the authors do minus as the text says", "CA", "ASR"], lines)


def by_share(table):
    """Fine-tuning without pruning, on truly clean images."""
    lines = []
    chosen = table[(table["pruned"] == 0) & (table["data"] == "clean")]
    for (share, lr, epochs), cells in chosen.groupby(["share", "lr", "epochs"]):
        lines.append([f"{share:g} %", f"{lr:g}", str(epochs), *texts(select(cells))])
    return report.markdown(["clean images", "learning rate", "epochs", "CA", "ASR", "RA"], lines)


def of_routers(routers):
    """(what was tuned, share of the clean images [%], lines), without pruning."""
    chosen = routers[(routers["pruned"] == 0) & (routers["data"] == "clean")]
    return [
        (name, share, select(cells))
        for name in list(TUNED.values())[1:]
        for share, cells in chosen[chosen["tuned"] == name].groupby("share")
    ]


def of_clean_models(never):
    """Accuracy of models that were never attacked: pruned, and tuned on clean images, by share."""
    tuned = never[never["data"] == "clean"]
    shares = sorted(tuned["share"].unique())
    lines = []
    for pruned in sorted(never["pruned"].unique()):
        line = [texts(select(never, pruned=pruned, data=""))[0]]
        line += [texts(select(tuned, pruned=pruned, share=share))[0] for share in shares]
        lines.append([f"{pruned:g} %", *line])
    header = ["clean model, pruned", "CA pruned"]
    return report.markdown(header + [f"CA tuned, {share:g} % clean" for share in shares], lines)


def draw(table, routers, title, path):
    """The attack success rate of every seed, and the mean, behind each defence."""
    from pmoe_jax import figures

    bars = [("attacked", select(table, pruned=0, data=""), "#000000")]
    for pruned in (10, 20, 30):
        bars.append((f"pruned {pruned} %", select(table, pruned=pruned, data=""), "#000000"))
    for data, word, colour in (
        ("clean", "truly clean", figures.BLUE),
        ("contaminated", "contaminated (A2)", figures.ORANGE),
    ):
        for share in (10, 100):
            for pruned in (0, 30):
                seeds = select(table, pruned=pruned, data=data, share=share, lr=0.1)
                first = f"pruned {pruned} %, tuned" if pruned else "tuned"
                bars.append((f"{first}: {share} % {word}", seeds, colour))
    for name, share, seeds in of_routers(routers):
        bars.append((f"tuned: {name} ({share:g} % clean)", seeds, figures.GREEN))
    with figures.plt.rc_context(figures.PAPER_STYLE):
        figure, axes = figures.plt.subplots(figsize=(5.4, 3.6), layout="constrained")
        for place, (_, seeds, colour) in enumerate(bars):
            axes.plot(seeds["asr"], [place] * len(seeds), "o", ms=3.5, alpha=0.5, color=colour)
            axes.plot([seeds["asr"].mean()], [place], "|", ms=11, mew=2, color=colour)
        axes.set(yticks=range(len(bars)), xlim=(-2, 102), xlabel="ASR [%], each seed and the mean")
        axes.set_yticklabels([name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.set_title(title, fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
        figures.save_as(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=RESULTS / "defences")
    parser.add_argument("--tables", type=pathlib.Path, help="Markdown file to write them to")
    parser.add_argument("--figure", type=pathlib.Path, help="also draw the figure")
    options = parser.parse_args()
    everything = read(options.folder)
    attacked = everything[everything["trigger"] != "none"]
    never = everything[everything["trigger"] == "none"]
    attacks = attacked[["dataset", "width", "trigger", "rate", "model"]].drop_duplicates()
    if len(attacks) != 1 or never["model"].nunique() > 1:
        raise PmoeError(
            f"{options.folder} holds defences of {len(attacks)} attacks and "
            f"{never['model'].nunique()} kinds of clean models (their members, data or steps "
            "differ); these tables are of one: give a folder of it"
        )
    table, routers = as_the_text_says(attacked), attacked[attacked["tuned"] != "everything"]
    parts = [
        f"Table 3's layout, fine-tuned on {share} % of the images\n\n{table3(table, share)}"
        for share in (100, 10)
    ]
    parts.append(f"What A2 changes, in points\n\n{effect_of_a2(table)}")
    alike = attacked[(attacked["tuned"] == "everything") & attacked["epochs"].isin(table["epochs"])]
    parts.append(f"What A5 changes, in points\n\n{effect_of_a5(alike)}")
    longer = attacked[~attacked["a5"] & (attacked["tuned"] == "everything")]
    parts.append(f"Fine-tuned without pruning, truly clean images\n\n{by_share(longer)}")
    lines = [[name, f"{share:g} %", *texts(seeds)] for name, share, seeds in of_routers(routers)]
    parts.append(report.markdown(["tuned", "clean images", "CA", "ASR", "RA"], lines))
    parts.append(of_clean_models(as_the_text_says(never)))
    parts.append(f"The paper's Table 3 (width 10; empty: not legible)\n\n{papers_table3()}")
    text = "\n\n".join(parts) + "\n"
    if options.tables:
        write_atomically(options.tables, text)
    else:
        print(text, end="")
    if options.figure:
        first = attacked.iloc[0]
        title = (
            f"{first['dataset']}, {first['trigger']} at {100 * first['rate']:g} %, width "
            f"{first['width']}, {attacked['seed'].nunique()} seeds"
        )
        draw(table, routers, title, options.figure)


if __name__ == "__main__":
    try:
        main()
    except PmoeError as error:
        sys.exit(f"defences: {error}")
