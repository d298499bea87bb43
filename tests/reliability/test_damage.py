"""Damage to any file of a run, a sweep or a defence: harmless, or a clear error that names the
file. Never other parameters or figures without a word.

-m slow harms every file in every way; without it a sample of files.
"""

import hashlib
import os
import random
import shutil

import harness
import pytest
import small
import tally

from pmoe_jax import config as config_lib
from pmoe_jax import defend, defend_config, grid, results, sweep
from pmoe_jax import trained as trained_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.rundir import RunDirectory

chance = random.Random(0)


def delete(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def overwrite_a_digit(path):
    """What JSON still reads, and a figure may be made of."""
    content = bytearray(path.read_bytes())
    digits = [place for place, byte in enumerate(content) if 49 <= byte <= 57]
    if digits:
        content[chance.choice(digits)] = ord("0")
    path.write_bytes(content)


HARMS = (delete, cut, empty, flip, flip, overwrite_a_digit)


@pytest.fixture(autouse=True)
def own_chance(request):
    """Each test draws the same, alone or among others."""
    chance.seed(request.node.name)


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        small.use(patch)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_npz):
    """made(name) -> folder of a finished "run", one "killed" in step 10, a "sweep" or "defence"."""
    folder, config = tmp_path_factory.mktemp("made"), config_lib.default()
    config = small.attacked(small.with_fields(config, **{
        "data.name": "npz", "data.source": str(tiny_npz), "data.image_size": 16, "num_seeds": 2,
        "model.width": 1, "train.epochs": 2, "train.batch_size": 16, "evaluation.batch_size": 40,
    }))  # fmt: skip
    small.train(config, folder / "whole" / "run")
    small.train_until(10, config, folder / "killed" / "run")
    return folder, config


def victims(folder):
    return sorted(
        path for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size and path.suffix != ".png"
    )  # fmt: skip


def cases(folder, everything):
    """(relative path, harm) pairs; a sample has one of each of several kinds of files."""
    files = [path.relative_to(folder) for path in victims(folder)]
    if everything:
        return [(file, harm) for file in files for harm in HARMS]
    kinds = {}
    for file in files:
        kinds.setdefault((file.suffix, len(file.parts)), []).append(file)
    return [(chance.choice(same), chance.choice(HARMS)) for same in kinds.values()]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def harmed(source, target, file, harm):
    """A copy with one file harmed; None if that changed nothing."""
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(source, target)
    before = digest(target / file)
    harm(target / file)
    return None if digest(target / file) == before else target / file


def named(error, file, said):
    """An error is one line that names the file by its path within the directory; of a sum, itself
    or its owner, which it does not fit."""
    assert "\n" not in str(error)
    owner = file.with_name(file.name.removesuffix(".sha256"))
    assert any(str(path) in f"{error} {said}" for path in (file, owner)), (error, said, file)


def each(source, name, everything, tmp_path, capfd, use, same):
    """Harms files one by one.

    Args:
      use: gives a result or an error, of a folder.
      same: compares the result; whether it was made from an older checkpoint.

    Returns:
      How many harms were harmless, fell back and were refused by name.
    """
    outcomes = {"harmless": 0, "fell_back": 0, "refused": 0}
    for file, harm in cases(source, everything):
        victim = harmed(source, tmp_path / "copy" / "run", file, harm)
        if victim is None:
            continue
        capfd.readouterr()
        try:
            result = use(tmp_path / "copy" / "run")
        except PmoeError as error:
            named(error, file, capfd.readouterr().err)
            outcomes["refused"] += 1
        else:
            try:
                fell_back = same(result, victim, capfd.readouterr().err)
            except BaseException:
                tally.add(f"damage: {name}", losses=1)
                print(f"{harm.__name__} of {file}")
                raise
            outcomes["fell_back" if fell_back else "harmless"] += 1
        tally.add(f"damage: {name}")
    tally.add(f"damage: {name}", 0, **outcomes)
    return outcomes


EVERYTHING = pytest.mark.parametrize(
    "everything", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sample", "all"]
)


@EVERYTHING
def test_a_killed_run_goes_on(made, everything, tmp_path, capfd):
    folder, config = made
    whole = folder / "whole" / "run"

    def resume(path):
        small.train(config, path)
        return path

    def same(path, victim, said):
        one, other = small.restored(path), small.restored(whole)
        assert one[0] == other[0] == 12
        harness.assert_bit_equal(one[1:], other[1:])
        assert (path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert harness.untimed(path) == harness.untimed(whole)
        fell_back = "8" in victim.parts  # the newest checkpoint
        assert ("checkpoint 8 is skipped" in said and "at step 6" in said) == fell_back
        return fell_back

    outcomes = each(
        folder / "killed" / "run", "resumed run", everything, tmp_path, capfd, resume, same
    )
    assert outcomes["fell_back"] and outcomes["refused"]


@EVERYTHING
def test_a_finished_run_is_evaluated(made, everything, tmp_path, capfd):
    folder, _ = made
    whole = folder / "whole" / "run"
    wanted = {
        step: (trained_lib.evaluate(whole, step=step).rows, small.restored(whole, step))
        for step in (12, 8)
    }

    def same(evaluated, victim, said):
        fell_back = "12" in victim.parts  # the newest checkpoint
        rows, state = wanted[8 if fell_back else 12]
        assert (f"checkpoint 12 is skipped: {victim}" in said) == fell_back
        assert evaluated.rows == rows
        # Few images tell few parameters apart.
        harness.assert_bit_equal(small.restored(tmp_path / "copy" / "run"), state)
        return fell_back

    outcomes = each(whole, "evaluated run", everything, tmp_path, capfd, trained_lib.evaluate, same)
    assert outcomes["fell_back"] and outcomes["harmless"]


@EVERYTHING
def test_figures_of_a_finished_run_are_reported(made, everything, tmp_path, capfd):
    folder, _ = made
    whole = folder / "whole" / "run"
    expected = results.gather([whole])

    def same(found, victim, said):
        assert found.rows == expected.rows
        assert [cell.figures for cell in found.cells] == [c.figures for c in expected.cells]

    each(whole, "reported run", everything, tmp_path, capfd,
         lambda path: results.gather([path]), same)  # fmt: skip


@EVERYTHING
def test_a_sweep_is_repeated_and_reported(made, everything, tmp_path, capfd):
    _, config = made
    cells = [{"name": "clean", "trigger.name": "none", "poison.rate": 0.0}, {"name": "attacked"}]
    whole = tmp_path / "whole" / "run"
    shared = small.with_fields(config, **{"train.epochs": 1})
    sweep.run(shared, cells, whole, max_members=2, progress=False)
    expected = (whole / "rows.jsonl").read_bytes()

    def repeat(path):
        sweep.run(shared, cells, path, progress=False)
        return results.gather([path])

    def same(found, victim, said):
        assert found.rows == results.gather([whole]).rows

    each(whole, "sweep", everything, tmp_path, capfd, repeat, same)
    kept = tmp_path / "kept" / "run"
    kept.mkdir(parents=True)
    for name in ("sweep.json", "rows.jsonl", "rows.jsonl.sha256", "sweep.json.sha256",
                 "provenance.json", "provenance.json.sha256"):  # fmt: skip
        shutil.copy(whole / name, kept / name)
    rows, facts = results.gather([kept]).rows, results.gather([kept]).provenance

    def same_rows(found, victim, said):
        assert found.rows == rows
        assert found.provenance == facts

    each(kept, "kept results", everything, tmp_path, capfd,
         lambda path: results.gather([path]), same_rows)  # fmt: skip
    assert (whole / "rows.jsonl").read_bytes() == expected
    assert grid.Manifest.read(whole / "sweep.json").programs


def defence(method):
    """A config of a defence of the small model in seconds."""
    config = defend_config.default()
    config.method = method
    config.strip.update(images=20, overlays=4)
    config.cleanse.update(rounds=3, batches_per_round=2, batch_size=8)
    config.prune.update(layers=("Dense_0",), output="raw", rates=(0.5,), images=40)
    config.prune.curve_rates = (0.0, 0.5)
    config.tune.update(epochs=1, batch_size=32)
    return config


@EVERYTHING
@pytest.mark.parametrize("method", ["strip", "neural_cleanse"])
def test_a_defence_is_repeated(made, method, everything, tmp_path, capfd):
    folder, _ = made
    base, config = folder / "whole" / "run", defence(method)
    whole = tmp_path / "whole" / "run"
    table = defend.defend(base, config, whole)
    files = {path.name: path.read_bytes() for path in victims(whole)}

    def same(found, victim, said):
        assert found == table
        for name, content in files.items():
            # The only ones that a repeated defence reads; a lost sum is not made again.
            if name.startswith("cleanse_") and not name.endswith(".sha256"):
                assert (victim.parent / name).read_bytes() == content, name

    each(whole, "defence", everything, tmp_path, capfd,
         lambda path: defend.defend(base, config, path), same)  # fmt: skip


@EVERYTHING
def test_fine_pruning_is_repeated(made, everything, tmp_path, capfd):
    """Its figures, and the run directory that each cell is."""
    folder, _ = made
    base, config = folder / "whole" / "run", defence("fine_pruning")
    whole = tmp_path / "whole" / "run"

    def repeat(path):
        # The last column of the table are seconds.
        return [line.rpartition("|")[0].rpartition("|")[0]
                for line in defend.defend(base, config, path).splitlines()]  # fmt: skip

    table = repeat(whole)
    figures = {name: (whole / name).read_bytes() for name in
               ("before.json", "Dense_0_curve.jsonl", "Dense_0_curve.csv", "rows.csv")}  # fmt: skip
    cells = [path.parent.name for path in sorted(whole.glob("*/config.json"))]
    newest = {name: RunDirectory(whole / name).whole_steps()[-1] for name in cells}
    assert len(cells) == 2 and max(newest.values()) == 3

    def same(found, victim, said):
        assert found == table
        path = tmp_path / "copy" / "run"
        for name, content in figures.items():
            # One that is read again is as it was; a lost one is made again.
            if (path / name) != victim or name.endswith(("json", "jsonl")):
                assert (path / name).read_bytes() == content, name
        for name, step in newest.items():
            one, other = path / name, whole / name
            harness.assert_bit_equal(*(harness.raw_arrays(each, step) for each in (one, other)))
            assert RunDirectory(one).damage(step) is None
            assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
        fell_back = "3" in victim.parts  # the newest checkpoint of the fine-tuned cell
        assert not fell_back or (f"{victim}" in said and "going on with step 0" in said)
        return fell_back

    each(whole, "Fine-Pruning", everything, tmp_path, capfd, repeat, same)


def test_sums_of_figures_notice_a_digit_and_allow_more_lines(made, tmp_path):
    folder, _ = made
    path = tmp_path / "run"
    shutil.copytree(folder / "whole" / "run", path)
    run, file = RunDirectory(path), path / "metrics.jsonl"
    rows = run.rows()
    with open(file, "a") as more:  # of an epoch that is not saved yet
        more.write('{"epoch": 3}\n{"epo')
    assert run.rows() == [*rows, {"epoch": 3}]
    text = file.read_text()
    place = text.index('"value": ') + len('"value": ')
    file.write_text(text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :])
    with pytest.raises(PmoeError, match=r"metrics\.jsonl does not match its SHA-256 sum"):
        run.rows()


@pytest.mark.slow
@pytest.mark.parametrize("harm", [cut, empty, flip])
def test_damaged_compiled_programs_are_compiled_anew(harm, tmp_path, tiny_npz):
    """The compilation cache, which JAX writes in place: a kill leaves halves of programs there."""
    env = harness.environment(tmp_path / "cache")

    def train(name):
        harness.finish([
            "train", "--noprogress", f"--workdir={tmp_path / name / 'run'}",
            "--config.data.name=npz", f"--config.data.source={tiny_npz}",
            "--config.data.image_size=16", "--config.num_seeds=1", "--config.model.width=1",
            "--config.model.num_experts=2", "--config.model.patches_per_expert=4",
            "--config.train.epochs=1", "--config.train.batch_size=16",
            "--config.evaluation.batch_size=40",
        ], env)  # fmt: skip

    train("whole")
    programs = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    for path in programs:
        if path.stat().st_size:
            harm(path)
    train("again")
    harness.same_run(tmp_path / "again" / "run", tmp_path / "whole" / "run")
    tally.add("damage: compiled programs", len(programs))
