"""Tables and figure of docs/defences.md, from the rows that `pmoe defend` wrote.

    python experiments/defences.py                      # of experiments/results/defences
    python experiments/defences.py --figure=docs/figures/defences.png

Every folder there holds the `rows.csv` of a defence. Printed are Fine-Pruning in the layout of the
paper's Table 3, truly clean and contaminated images (quirk A2) side by side and their difference
seed by seed, and fine-tuning without pruning by share of the training images and learning rate: in
percent, mean ± sd over seeds with the 95 % interval of the mean. The figure shows the attack
success rate of every seed behind each defence.
"""

import argparse
import pathlib
import sys

import pandas as pd

from pmoe_jax import metrics, report
from pmoe_jax.errors import PmoeError

RESULTS = pathlib.Path(__file__).parent / "results"
#: Cells of other layers than the experts' last have these in front.
CELL = (
    r"^prune_(?P<pruned>[\d.]+)"
    r"(?:_then_(?P<data>[a-z]+)(?:_(?P<share>[\d.]+)pct)?_lr(?P<lr>[\d.]+))?$"
)
#: Folders whose cells are named like Fine-Pruning's, but in which other parameters were tuned.
ROUTERS = {
    "routers": "routers alone",
    "routers_anew": "routers drawn anew, alone",
    "routers_anew_all_tuned": "routers drawn anew, everything",
}


def read(folder):
    """Figures [%] at the last epoch of every cell, a line a seed; columns ba, asr, robust_accuracy.

    NaN stands for those of seeds that diverged. Also: folder, trigger, pruned [%], data ("" if
    pruned only), share [%] of it, lr, seed.

    Raises:
      PmoeError: no rows.
    """
    paths = sorted(folder.glob("*/rows.csv"))
    if not paths:
        raise PmoeError(f"{folder} holds no */rows.csv; give a folder of defences")
    rows = pd.concat([pd.read_csv(path).assign(folder=path.parent.name) for path in paths])
    rows = rows.reset_index(drop=True).join(rows["run"].str.extract(CELL).reset_index(drop=True))
    rows = rows[rows["pruned"].notna() & rows["metric"].isin(["ba", "asr", "robust_accuracy"])]
    last = rows.groupby(["folder", "run"])["epoch"].transform("max")
    rows = rows[rows["epoch"] == last].astype({"pruned": float})
    rows["data"] = rows["data"].fillna("")
    rows["share"] = rows["share"].astype(float).fillna(100.0)
    rows["lr"] = rows["lr"].astype(float).fillna(0.0)
    rows["value"] = rows["value"].where(rows["stage"] != "diverged")
    index = ["folder", "trigger", "pruned", "data", "share", "lr", "seed"]
    return rows.pivot(index=index, columns="metric", values="value").reset_index()


def texts(seeds):
    """ "20.5 ± 8.1 [0.4, 40.6]" of accuracy, ASR and robust accuracy; dashes without seeds.

    "(2 of 3)" behind it is of how many seeds it is, where some diverged.
    """
    cells = []
    for metric in ("ba", "asr", "robust_accuracy"):
        values = seeds[metric].dropna() if metric in seeds else []
        if not len(values):
            cells.append("–")
            continue
        summary = metrics.summarize(values)
        interval = report.interval_text(summary, metric).replace(" to ", ", ")
        cells.append(report.mean_sd(summary) + (f" [{interval}]" if interval else ""))
        if len(values) < len(seeds):
            cells[-1] += f" ({len(values)} of {len(seeds)})"
    return cells


def select(table, **wanted):
    """Lines in which every named column has the wanted value; one a seed."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.drop_duplicates("seed")


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


def effect_of_a2(table):
    """What contaminated instead of truly clean images change, paired by seed [points]."""
    lines = []
    for share in (100, 10):
        for pruned in (0, 10, 20, 30):
            clean, a2 = (
                select(table, pruned=pruned, data=data, share=share, lr=0.1).set_index("seed")
                for data in ("clean", "contaminated")
            )
            cells = []
            for metric in ("ba", "asr"):
                differences = (a2[metric] - clean[metric]).dropna()
                if differences.empty:
                    cells.append("–")
                    continue
                found = metrics.summarize(differences)
                cells.append(report.mean_sd(found))
                if found.interval:
                    cells[-1] += f" [{found.interval[0]:.1f}, {found.interval[1]:.1f}]"
                if len(differences) < len(clean):
                    cells[-1] += f" ({len(differences)} of {len(clean)})"
            lines.append([f"{share} % of the images, pruned {pruned} %", *cells])
    return report.markdown(["tuned on A2 minus tuned on clean", "CA", "ASR"], lines)


def by_share(table):
    """Fine-tuning without pruning, on truly clean images."""
    lines = []
    for (share, lr), _ in select_all(table).groupby(["share", "lr"]):
        seeds = select(table, pruned=0, data="clean", share=share, lr=lr)
        lines.append([f"{share:g} %", f"{lr:g}", *texts(seeds)])
    return report.markdown(["clean images", "learning rate", "CA", "ASR", "RA"], lines)


def select_all(table):
    """Cells without pruning, tuned on truly clean images."""
    return table[(table["pruned"] == 0) & (table["data"] == "clean")]


def draw(table, routers, path):
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
    for folder, name in ROUTERS.items():
        seeds = select(routers, folder=folder, pruned=0, data="clean")
        bars.append((f"tuned: {name} (10 % clean)", seeds, figures.GREEN))
    with figures.plt.rc_context(figures.PAPER_STYLE):
        figure, axes = figures.plt.subplots(figsize=(5.4, 3.6), layout="constrained")
        for place, (_, seeds, colour) in enumerate(bars):
            axes.plot(seeds["asr"], [place] * len(seeds), "o", ms=3.5, alpha=0.5, color=colour)
            axes.plot([seeds["asr"].mean()], [place], "|", ms=11, mew=2, color=colour)
        axes.set(yticks=range(len(bars)), xlim=(-2, 102), xlabel="ASR [%], each seed and the mean")
        axes.set_yticklabels([name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=170)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=RESULTS / "defences")
    parser.add_argument("--figure", type=pathlib.Path, help="also draw the figure")
    options = parser.parse_args()
    everything = read(options.folder)
    attacked = everything[everything["trigger"] != "none"]
    routers = attacked["folder"].isin(ROUTERS)
    table = attacked[~routers]
    for share in (100, 10):
        print(f"Table 3's layout, fine-tuned on {share} % of the images\n")
        print(table3(table, share) + "\n")
    print(f"What A2 changes, in points\n\n{effect_of_a2(table)}\n")
    print(f"Fine-tuned without pruning, truly clean images\n\n{by_share(table)}\n")
    lines = [
        [f"{name}", *texts(select(attacked, folder=folder, data="clean"))]
        for folder, name in ROUTERS.items()
    ]
    print(report.markdown(["tuned, 10 % clean", "CA", "ASR", "RA"], lines) + "\n")
    never = everything[everything["trigger"] == "none"]
    lines = []
    for pruned in sorted(never["pruned"].unique()):
        lines.append([f"{pruned:g} %", texts(select(never, pruned=pruned, data=""))[0],
                      texts(select(never, pruned=pruned, data="clean"))[0]])  # fmt: skip
    print(report.markdown(["clean model, pruned", "CA pruned", "CA tuned, 10 % clean"], lines))
    if options.figure:
        draw(table, attacked[routers], options.figure)


if __name__ == "__main__":
    try:
        main()
    except PmoeError as error:
        sys.exit(f"defences: {error}")
