"""What README and docs promise: examples run, commands name what exists, links lead somewhere."""

import ast
import re
import runpy
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from locations import ROOT

from pmoe_jax import cli, inputs, metrics, triggers
from pmoe_jax import trained as trained_lib
from pmoe_jax.config import FIELDS
from pmoe_jax.defend_config import FIELDS as DEFENCE_FIELDS
from pmoe_jax.errors import PmoeError

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "experiments" / "README.md", ROOT / "checkpoints" / "README.md"]  # fmt: skip


def test_the_python_examples_run(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    shape, rate, pruned, detected = capsys.readouterr().out.splitlines()
    assert shape == "(40, 4, 16)"
    assert 0 <= float(rate) <= 100
    assert float(pruned) == pytest.approx(5 / 16)
    assert 0 <= ast.literal_eval(detected)["far"] <= 100


def test_shipped_models_give_their_recorded_figures_in_code_of_ones_own():
    trained = trained_lib.load(ROOT / "checkpoints" / "digits_square")
    data = inputs.load_data(trained.config)
    images, labels = jnp.asarray(data.test_images, jnp.float32) / 255, data.test_labels
    recorded = {
        (row["seed"], row["metric"]): row["value"]
        for row in trained_lib.recorded(ROOT / "checkpoints" / "digits_square").rows
    }
    for index, member in enumerate(trained.members):
        variables, trigger = trained.member(index)
        shown = np.asarray(trained.model.apply(variables, triggers.apply(images, trigger)))
        rate = metrics.attack_success_rate(shown.argmax(-1), labels, member.target)
        assert float(rate) == pytest.approx(recorded[member.seed, "asr"], abs=1.0)


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    folder = ROOT / "checkpoints" / "digits_square"
    with pytest.raises(PmoeError, match="there is no member 2: the run has 0 to 1"):
        trained_lib.load(folder).member(2)
    with pytest.raises(PmoeError, match="has no checkpoint of step 7; it has 528"):
        trained_lib.load(folder, step=7)
    with pytest.raises(PmoeError, match="holds no checkpoints"):
        trained_lib.load(ROOT / "experiments/results/cpu_grid/runs/003_gtsrb_wide_resnet_w2")
    damaged = tmp_path / "run"
    shutil.copytree(folder, damaged)
    victim = max(
        (damaged / "checkpoints" / "528" / "state").rglob("*"), key=lambda f: f.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(PmoeError, match=r"no checkpoint of .* is whole"):
        trained_lib.load(damaged)
    for file in (damaged / "checkpoints" / "528").glob("*/_METADATA"):
        file.write_text("{}")
    with pytest.raises(PmoeError, match="its arrays are not those of a model and an attack"):
        trained_lib.load(damaged)


def rows_of(text):
    """Lines of Markdown tables, cell by cell."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_tables_of_the_attacks_are_those_that_their_script_prints():
    attacks = runpy.run_path(str(ROOT / "experiments" / "attacks.py"))
    table = attacks["read"]([attacks["RESULTS"] / "cpu_grid"])
    printed = rows_of(attacks["overview"](table))[2:]
    attacked = [row for row in printed if row[0].endswith("%")]
    assert len(attacked) >= 5
    for name, expected in (("results.md", printed), ("claims.md", attacked)):
        shown = rows_of((ROOT / "docs" / name).read_text())
        first = shown.index(expected[0])
        assert shown[first : first + len(expected) + 1][:-1] == expected, name
        assert not shown[first + len(expected)][0].startswith(("CIFAR-10, ", "GTSRB, ")), name

    # "of 17 CADs one leaves zero out": how many do of those of three seeds.
    ends = [found for row in attacked for found in re.findall(r"\[(.*), (.*)\]", row[2])]
    resolved = sum(float(low) > 0 or float(high) < 0 for low, high in ends)
    text = (ROOT / "docs" / "results.md").read_text()
    many = ["none leaves", "one leaves", "two leave", "three leave", "four leave"][resolved]
    assert f"of {len(ends)} CADs {many} zero out" in text

    short = rows_of(attacks["short"](table))
    shown = rows_of(README)
    first = shown.index(short[0])
    assert shown[first : first + len(short)] == short
    (block,) = re.findall(r"^\| ASR \[%\] \(clean models\).*?\n\n", README, re.DOTALL | re.M)
    assert len(rows_of(block)) == len(short)


#: What the README's table of defences calls cells of `defences.read`.
DEFENDED = {
    "30 % of the experts' channels pruned": {"pruned": 30, "data": ""},
    "fine-tuned on all 50,000 images, clean": {"share": 100, "data": "clean"},
    "fine-tuned on all 50,000 images, contaminated (A2)": {"share": 100, "data": "contaminated"},
    "fine-tuned on a tenth of the images, clean": {"share": 10, "data": "clean"},
    "fine-tuned on a tenth of the images, contaminated (A2)": {"share": 10, "data": "contaminated"},
    "routers alone fine-tuned on a tenth of the images, clean": {
        "share": 10, "data": "clean", "tuned": "routers alone"
    },
}  # fmt: skip


def test_the_table_of_the_defences_is_what_their_rows_say():
    defences = runpy.run_path(str(ROOT / "experiments" / "defences.py"))
    table = defences["read"](defences["RESULTS"] / "defences")
    whole = {"pruned": 30, "data": "contaminated", "share": 100, "a5": True}
    left = metrics.summarize(defences["select"](table, **whole)["asr"])
    assert f"A5: from 95.1 to {left.mean:.1f} ± {left.sd:.1f} %)" in README
    table = table[(table["trigger"] == "square") & ~table["a5"]]
    table = table[(table["lr"] == 0.1) | (table["data"] == "")]
    shown = rows_of(README)
    first = shown.index(["CIFAR-10, square, 2 %", "BA [%]", "ASR [%]", "RA [%]"])
    assert [row[0] for row in shown[first + 3 : first + 9]] == list(DEFENDED)
    for name, *figures in shown[first + 3 : first + 9]:
        wanted = {"pruned": 0, "tuned": "everything", **DEFENDED[name]}
        if wanted["data"]:
            cells = defences["select"](table, **wanted)
        else:
            cells = defences["select"](table[table["measured"] == "clean"], **wanted)
        found = (metrics.summarize(cells[name]) for name in defences["METRICS"])
        assert figures == [f"{each.mean:.1f} ± {each.sd:.1f}" for each in found], name


def words_of(page):
    """The shell commands of a page, those over several lines joined."""
    blocks = re.findall(r"```\n(.*?)```", page, re.DOTALL) + re.findall(r"`([^`\n]+)`", page)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.split() for line in joined.splitlines() if line.startswith(("pmoe ", "$defend"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_fields_and_links_of_the_pages_exist(path):
    page = path.read_text()
    assert set(re.findall(r"^pmoe (\w+)", page, re.MULTILINE)) <= set(cli._commands())
    for field in re.findall(r"--config\.([\w.]+)=", page):
        assert field in FIELDS or field in DEFENCE_FIELDS
    for script in re.findall(r"(?:experiments|configs)/[\w/]+\.py", page):
        assert (ROOT / script).is_file(), script
    for folder in re.findall(r"checkpoints/(?:digits|cifar10|gtsrb)_\w+", page):
        assert (ROOT / folder / "config.json").is_file(), folder
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        linked, _, anchor = target.partition("#")
        file = path.parent / linked if linked else path
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            kept = (re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)
            assert anchor in kept, target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_flags_of_the_pages_exist(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pmoe"])  # ml_collections looks there for fields.
    for command, *words in words_of(path.read_text()):
        name = "defend" if command == "$defend" else words[0]
        known = flags.FlagValues()
        # Without the flags themselves: the runs and files that they name are only examples.
        cli._commands()[name].add_flags(known, [word for word in words if word[0] != "-"])
        for word in words:
            flag = re.match(r"--(?:no)?([a-z_]+)(?==|$)", word)
            if flag and flag[1] != "help":
                assert flag[1] in known or word[2:] in known, f"{name} {word}"
