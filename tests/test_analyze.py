"""`pmoe analyze` from beginning to end, on tiny trained runs; and `collect_routing`."""

import csv
import dataclasses
import itertools
import json
import re
import runpy
import shutil
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from locations import ROOT

from pmoe_jax import (
    analyze,
    cli,
    figures_routing,
    kernels,
    launch,
    memory,
    models,
    routing,
    routing_arrays,
    routing_output,
    routing_rows,
    rundir,
)
from pmoe_jax import config as config_lib
from pmoe_jax import members as members_lib
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import dataset as dataset_lib
from pmoe_jax.errors import PmoeError


@pytest.fixture(scope="module")
def data(tiny_arrays):
    """The tiny data set with boxes that differ by image; image 0 has none."""
    n = np.arange(40)
    boxes = np.stack([n % 3, 2 * (n % 4), 8 + n % 5, 10 + n % 7], axis=1).astype(np.float32)
    boxes[0] = 0
    return dataclasses.replace(dataset_lib.make("tiny", *tiny_arrays), test_boxes=boxes)


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Intervals from few samples, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_rows, "RESAMPLES", 20)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Tiny trained runs: "square" (both epochs saved), and what is analysed beside it.

    "clean" and "defended" have the seeds in reverse order. "packed" holds an attacked (by source
    class) and a clean member of one seed, as sweeps do.
    """
    folder = tmp_path_factory.mktemp("routing")
    config = config_lib.default()
    config.data.name = "npz"
    config.data.source = "given to every call instead"
    config.data.image_size = 16
    config.num_seeds = 2
    config.model.width = 1
    config.model.num_experts = 2
    config.model.patches_per_expert = 4
    config.model.bn_momentum = 0.9
    config.train.epochs = 2
    config.train.batch_size = 16
    config.evaluation.batch_size = 24  # the last batch of 40 images is filled up
    config.checkpoint.keep_every_epochs = 1

    def train(name, members):
        run_lib.train(config, folder / name, members=members, dataset=data, progress=False)

    clean = members_lib.from_config(config)
    train("clean", clean[::-1])
    config.trigger.name = "square"
    config.poison.rate = 0.25
    attacked = members_lib.from_config(config)
    train("square", attacked)
    config.train.epochs = 1
    # A defence is known by its note; what matters here is that it is another model.
    train("defended", attacked[::-1])
    newest = rundir.RunDirectory(folder / "square").whole_steps()[-1]
    rundir.RunDirectory(folder / "defended").note(defence={"of": "square", "step": newest})
    config.poison.source = 1
    train("packed", [attacked[0], clean[0]])
    shutil.copytree(folder / "square", folder / "other")
    return folder


@pytest.fixture(scope="module")
def analysed(runs, data):
    found = analyze.analyze(
        runs / "square", clean=runs / "clean", defended=runs / "defended",
        others=[runs / "other"], shown=[3, 1], every_epoch=True, dataset=data,
    )  # fmt: skip
    return found, routing_output.write(found, runs / "out" / "routing.npz")


@pytest.fixture(scope="module")
def figures(analysed, tmp_path_factory):
    """The folder of all figures, and the paths that were returned."""
    from pmoe_jax import figures_paper, figures_routing

    found, folder = analysed[0], tmp_path_factory.mktemp("figures")
    square = jax.tree.map(lambda leaf: leaf[0], found.trigger)
    strip = figures_paper.Strip(found.dataset, [3, 1], {"square": square})
    written = figures_routing.write_all(
        found, folder, [3, 1], strips=[strip], trigger_labels={"square": "square"}
    )
    return folder, written


class TestArrays:
    def test_are_as_the_schema_says(self, analysed):
        _, paths = analysed
        size = dict(D=2, M=2, N=40, E=2, K=4, P=16, Y=4, S=4, V=6, Q=7, T=2, H=16, W=16, h=4, w=4)
        size["BINS"] = 256
        with np.load(paths[0]) as stored:
            assert stored.keys() >= routing_arrays.SCHEMA.keys() - {"selection_of_image"}
            for name, array in stored.items():
                base = re.sub("^(clean|defended)_model_", "", name)
                described = routing_arrays.SCHEMA[base]
                kind, axes = re.match(r"(\w+) \[(.*?)\]", described).groups()
                own = size if base == name else {**size, "T": 1}
                expected = tuple(eval(axis, {}, own) for axis in axes.split(", "))
                assert array.shape == expected, name
                assert array.dtype.name.startswith({"text": "str"}.get(kind, kind)), name

    def test_the_documentation_has_every_array_with_its_axes(self):
        text = (ROOT / "docs" / "routing.md").read_text()
        for name, described in routing_arrays.SCHEMA.items():
            axes = described.partition("]")[0].replace("BINS + 1", "257").replace("BINS", "256")
            assert f"| `{name}` | {axes}] |" in text, name

    def test_models_beside_it_have_their_own_epochs(self, analysed):
        arrays = analysed[0].arrays
        assert arrays["epoch"].tolist() == [1, 2] and arrays["defended_model_epoch"] == [1]
        np.testing.assert_array_equal(arrays["frequency_by_epoch"][-1], arrays["frequency"])
        for prefix in routing_arrays.PREFIXES:
            own = arrays[f"{prefix}frequency"]
            np.testing.assert_array_equal(arrays[f"{prefix}frequency_by_epoch"], own[None])
        assert "clean_model_label" not in arrays  # equal arrays are not stored twice

    def test_other_runs_on_the_shown_images(self, analysed):
        found, _ = analysed
        (other,) = found.others
        np.testing.assert_array_equal(
            other.arrays["indices"], found.arrays["indices"][:, :, [3, 1]]
        )
        assert found.scales.keys() == set(routing_arrays.PREFIXES)

    def test_histograms_by_position_add_up(self, analysed):
        arrays = analysed[0].arrays
        np.testing.assert_array_equal(arrays["value_by_position"].sum(2), arrays["value_baseline"])
        assert (arrays["value_by_position"].sum(-1) == 40).all()

    def test_objects(self, analysed, data):
        """Against a mask of each image's box, patch by patch."""
        arrays = np.load(analysed[1][0])
        pixel = np.arange(16)
        inside = np.full((40, 16), np.nan)
        for n, (x1, y1, x2, y2) in enumerate(data.test_boxes.tolist()):
            mask = ((pixel >= y1) & (pixel < y2))[:, None] & ((pixel >= x1) & (pixel < x2))
            if n:
                inside[n] = mask.reshape(4, 4, 4, 4).mean((1, 3)).ravel()
        np.testing.assert_allclose(arrays["object_baseline"], inside.mean(1), rtol=1e-6)
        for d, m, e in np.ndindex(2, 2, 2):
            taken = arrays["indices"][d, m, :, e].astype(int)
            expected = np.take_along_axis(inside, taken, 1).mean(1)
            np.testing.assert_allclose(arrays["object_share"][d, m, :, e], expected, rtol=1e-6)
        for label in range(4):
            use = (arrays["label"] == label) & (np.arange(40) > 0)
            np.testing.assert_allclose(
                arrays["object_by_position"][label], inside[use].mean(0), rtol=1e-6
            )

    def test_members_in_one_vectorised_program(self, analysed, runs, data):
        """strategy=vmap, as on GPUs: the same predictions, also of forced and silenced forms."""
        run = rundir.RunDirectory(runs / "square")
        config, members = run.config(), run.members()
        config.train.strategy = "vmap"
        programs, _, state, attack, _ = trained_lib.restore(run, config, members, data)
        arrays = routing_arrays.measure(
            programs, state, attack, config, members, data,
            causes=True, single_image=None, progress=False,
        )  # fmt: skip
        assert programs.strategy == "vmap"
        for name in ("predicted", "forced_predicted", "silenced_predicted"):
            same = np.mean(arrays[name] == analysed[0].arrays[name])
            assert same > 0.98, name  # sums in another order may turn a close call

    def test_fewer_images_where_memory_is_short(self, analysed, runs, data, monkeypatch, capfd):
        """A run's config decides the size of batches, and may be a stranger's."""
        monkeypatch.setattr(memory, "_FITTING", weakref.WeakKeyDictionary())
        monkeypatch.setattr(memory, "device_memory", lambda: 2**21)
        found = analyze.analyze(runs / "square", dataset=data, causes=False)
        assert "(evaluation.batch_size) would take more than" in capfd.readouterr().err
        same = np.mean(found.arrays["predicted"] == analysed[0].arrays["predicted"])
        assert same > 0.98


class TestRows:
    def test_figures_of_evaluation_are_found_again(self, analysed, runs):
        """Those that training wrote, seed by seed, of the run and of those beside it."""
        found, _ = analysed
        names = {"ba": ("accuracy", "clean"), "asr": ("target_rate", "triggered")}
        matched = []
        for name in ("square", "clean", "defended"):
            for row in rundir.RunDirectory(runs / name).rows():
                if row["metric"] not in names or (name == "clean" and row["epoch"] == 1):
                    continue
                key = (*names[row["metric"]], row["epoch"], row["seed"])
                value, = [
                    r["value"] for r in found.rows if r["run"] == name
                    and (r["metric"], r["condition"], r["epoch"], r["seed"]) == key
                ]  # fmt: skip
                assert value == pytest.approx(row["value"])
                matched.append((name, row["metric"]))
        assert matched.count(("square", "ba")) == matched.count(("square", "asr")) == 4
        assert matched.count(("defended", "ba")) == matched.count(("defended", "asr")) == 2
        assert matched.count(("clean", "ba")) == 2

    def test_selection_follows_from_the_stored_arrays(self, analysed):
        found, paths = analysed
        arrays = np.load(paths[0])
        assert np.flatnonzero(arrays["nominal_patches"][0]).tolist() == [0]
        indices = arrays["indices"].astype(int)
        for d, condition in enumerate(("clean", "triggered")):
            for m in range(2):
                hit = (indices[d, m] == 0).any(-1)  # [N, E]
                of_expert = pytest.approx(100 * hit[:, 1].mean())
                assert _value(found, "capture/nominal", condition, m, 1) == of_expert
                some = pytest.approx(100 * hit.any(1).mean())
                assert _value(found, "capture/nominal/any", condition, m) == some
                assert 2 <= _value(found, "entropy", condition, m, 0) <= 4
        sets = [[set(indices[d, 1, n, 0].tolist()) for n in range(40)] for d in range(2)]
        iou = np.mean([len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)])
        assert _value(found, "iou", "both", 1, 0) == pytest.approx(100 * iou, rel=1e-5)
        assert _value(found, "capture/nominal/any", "chance", 0) == pytest.approx(43.75)

    def test_shapley_shares_and_swap_shares_sum_to_the_total(self, analysed):
        found, _ = analysed
        for m, mode in itertools.product(range(2), ("zero", "mean")):
            name = f"target_rate/silence_{mode}/kept_"
            total = _value(found, f"{name}11", "triggered", m)
            total -= _value(found, f"{name}00", "triggered", m)
            assert _value(found, f"{name}11", "triggered", m) == pytest.approx(
                _value(found, "target_rate", "triggered", m)
            )

            def shares(metric, condition, m=m, mode=mode):
                name = f"shapley/{metric}/{mode}"
                return sum(_value(found, name, condition, m, e) for e in range(2))

            assert shares("target_rate", "triggered") == pytest.approx(total)
            parts = [
                _value(found, f"swap/{part}", "both", m) for part in ("routing", "computation")
            ]
            rise = _value(found, "target_rate", "triggered", m)
            rise -= _value(found, "target_rate", "clean", m)
            assert sum(parts) == pytest.approx(rise)
            assert shares("asr", "both") == pytest.approx(rise)

    def test_object_share_by_class_and_against_positions(self, analysed):
        found, _ = analysed
        arrays = found.arrays
        known = np.arange(40) > 0
        for m, e in np.ndindex(2, 2):
            share = arrays["object_share"][1, m, :, e]
            value = _value(found, "object_share", "triggered", m, e)
            assert value == pytest.approx(100 * share[known].mean(), rel=1e-5)
            of_class = known & (arrays["label"] == 2)
            value = _value(found, "object_share", "triggered", m, e, 2)
            assert value == pytest.approx(100 * share[of_class].mean(), rel=1e-5)
            positions = arrays["class_frequency"][1, m, 2, e] @ arrays["object_by_position"][2] / 4
            value = _value(found, "object_share/position", "triggered", m, e, 2)
            assert value == pytest.approx(100 * positions, rel=1e-5)
        every = 100 * arrays["object_baseline"][known].mean()
        assert _value(found, "object_share/all", "clean", 1) == pytest.approx(every, rel=1e-5)

    def test_on_disk_and_summarised(self, analysed):
        found, paths = analysed
        with open(paths[1]) as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(found.rows) and tuple(rows[0]) == routing_rows.FIELDS
        assert {row["run"] for row in rows} == {"square", "clean", "defended"}
        stored = json.loads(paths[2].read_text())

        def summary(metric, condition, of_experts):
            one, = [
                s for s in stored["summary"] if s["run"] == "square" and s["epoch"] == 2
                and (s["metric"], s["condition"], s["of_experts"], s["class"])
                == (metric, condition, of_experts, "")
            ]  # fmt: skip
            return one

        asr = summary("target_rate", "triggered", "")
        values = [_value(found, "target_rate", "triggered", m) for m in range(2)]
        assert asr["n"] == 2 and asr["mean"] == pytest.approx(np.mean(values))
        assert asr["sd"] == pytest.approx(np.std(values, ddof=1))
        # Experts have no identity across seeds: first over a seed's experts, then over seeds.
        iou = np.array([[_value(found, "iou", "both", m, e) for e in range(2)] for m in range(2)])
        for kind, of_seed in (("mean", iou.mean(1)), ("max", iou.max(1)), ("min", iou.min(1))):
            assert summary("iou", "both", kind)["mean"] == pytest.approx(of_seed.mean())
            sd = np.std(of_seed, ddof=1)
            assert summary("iou", "both", kind)["sd"] == pytest.approx(sd)
        assert not any("expert" in s for s in stored["summary"])
        assert stored["made_from"]["runs"].keys() == {"", *routing_arrays.PREFIXES}
        assert stored["made_from"]["data"] == found.dataset.fingerprint()
        assert stored["made_by"]["git_revision"]

    def test_the_table_has_what_readme_promises(self, analysed):
        text = routing_output.table(analysed[0])
        for words in ("ASR [%]", "inside the object's box", "at equal positions", "by chance",
                      "Shapley", "contrast"):  # fmt: skip
            assert words in text
        rates = [_value(analysed[0], "target_rate", "triggered", m) for m in range(2)]
        asr = f"{rates[0]:.1f}, {rates[1]:.1f}"
        assert re.search(rf"\| ASR \[%\] +\| +{asr} \|", text)


class TestMembers:
    """Some members of a run that holds several, another trigger, an attack of a source class."""

    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, runs, data):
        return analyze.analyze(
            runs / "packed", members=[0], clean=runs / "clean", dataset=data, causes=False,
            trigger={"name": "warp", "k": 2, "strength": 4.0, "upsampling": "wanet",
                     "sampling": "bilinear"},
        )  # fmt: skip

    def test_another_trigger_is_said_everywhere(self, other):
        assert {row["stage"] for row in other.rows} == {"other_trigger"}
        assert {row["trigger"] for row in other.rows} == {"warp"}
        assert "trained with square" in other.scale and "shown warp" in other.scale
        assert "other-trigger" in other.scale
        assert "trained with none; shown warp" in other.scales["clean_model_"]
        assert other.members[0].trigger["name"] == "square"

    def test_a_trigger_that_is_everywhere_leaves_capture_blank(self, other):
        assert other.arrays["nominal_patches"].sum() > 12
        blank = [row for row in other.rows if row["metric"] == "capture/nominal/any"]
        assert len(blank) == 6 and not np.isfinite([row["value"] for row in blank]).any()
        text = routing_output.table(other)
        assert "trigger's own patches" not in text and "share of the trigger's change" in text

    def test_the_source_class_counts_also_for_the_clean_model(self, other):
        for run in ("packed", "clean"):
            n = {row["n"] for row in other.rows if row["run"] == run
                 and row["metric"] == "target_rate"}  # fmt: skip
            assert n == {10}

    def test_a_run_without_trigger(self, runs, data, tmp_path):
        """The clean member of a packed run, also as the clean one of its neighbour."""
        from pmoe_jax import figures_routing

        found = analyze.analyze(runs / "packed", members=[1], dataset=data)
        assert found.arrays["conditions"].tolist() == ["clean"] and found.trigger is None
        assert {row["condition"] for row in found.rows} == {"clean"}
        assert {row["rate"] for row in found.rows} == {0.0}
        names = {row["metric"] for row in found.rows}
        assert "shapley/accuracy/zero" in names and "iou" not in names
        written = figures_routing.write_all(found, tmp_path, [1])
        stems = {path.stem for path in written}
        assert "causes" in stems and "by_epoch" not in stems
        packed = rundir.RunDirectory(runs / "packed")
        beside = analyze._clean_beside(packed, packed, packed.members()[:1])
        assert beside.pairs.tolist() == [1]

    def test_members_that_no_mean_may_mix_are_refused(self, runs, tiny_config):
        run = rundir.RunDirectory(runs / "packed")
        with pytest.raises(PmoeError, match=r"member 1 has trigger none.*such as --members=0$"):
            analyze._chosen(run, run.members(), ())
        square = rundir.RunDirectory(runs / "square").members()
        with pytest.raises(PmoeError, match="seed 0 once more"):
            analyze._chosen(run, [*square, square[0]], ())
        changed = dataclasses.replace(square[1], target=2)
        with pytest.raises(PmoeError, match=r"target 2, member 0 .* target 0"):
            analyze._chosen(run, [square[0], changed], ())
        with pytest.raises(PmoeError, match="no member 2; choose 0 to 1"):
            analyze._chosen(run, square, [2])
        assert analyze._chosen(run, [*square, square[0]], [2, 1]).tolist() == [2, 1]


class TestFigures:
    def test_all_are_written_with_their_numbers(self, figures):
        _, written = figures
        assert {path.stem for path in written} == {
            "figure1_architecture", "figure2_triggers", "figure5_patch_values", "atlas_frequency",
            "biases", "causes", "causes_subsets", "by_epoch",
            *(f"{name}_seed{seed}" for seed in (0, 1) for name in (
                "figure3_patch_maps", "figure4_clean_maps", "figure6_before_after", "atlas_classes",
            )),
        }  # fmt: skip
        for path in written:
            assert path.stat().st_size > 5000 and path.with_suffix(".pdf").exists()
            assert path.with_suffix(".csv").exists() or path.with_suffix(".npz").exists()

    def test_patch_maps_show_the_model_and_image_that_they_name(self, figures, analysed):
        folder, arrays = figures[0], analysed[0].arrays

        def taken(name, condition, image):
            return routing.selection_mask(arrays[name][condition, 1, image].astype(int), 16)

        maps = np.load(folder / "figure3_patch_maps_seed1.npz")
        names = ["clean_model_indices"] * 2 + ["indices"] * 3  # the last one is the other run's
        expected = [taken(name, d, 3) for name, d in zip(names, (0, 1, 0, 1, 1), strict=True)]
        np.testing.assert_array_equal(maps["times"], expected)
        gates = np.sort(arrays["gates"][1, 1, 3], axis=-1)[..., ::-1]
        np.testing.assert_array_equal(np.sort(maps["gates"][3], -1)[..., :-5:-1], gates)
        assert np.flatnonzero(maps["marked"][3]).tolist() == [0] and not maps["marked"][2].any()
        assert (maps["images"][3, :4, :4] == 0).all()
        maps = np.load(folder / "figure4_clean_maps_seed1.npz")
        expected = [taken("clean_model_indices", 0, image) for image in (3, 1)]
        np.testing.assert_array_equal(maps["times"], expected)
        maps = np.load(folder / "figure6_before_after_seed1.npz")
        expected = [
            taken(name, 1, image) for image in (3, 1)
            for name in ("indices", "defended_model_indices")
        ]  # fmt: skip
        np.testing.assert_array_equal(maps["times"], expected)
        assert (arrays["indices"] != arrays["defended_model_indices"]).any()

    def test_triggers_and_architecture(self, figures):
        pictures = np.load(figures[0] / "figure2_triggers.npz")
        assert pictures["row_0"].shape == (2, 16, 16, 3)
        assert (pictures["row_0"][1, :4, :4] == 0).all()
        layers = dict(
            line.split(",")[:2]
            for line in (figures[0] / "figure1_architecture.csv").read_text().splitlines()
        )
        assert layers["stem"] == "16x16x16" and layers["group2"] == "8x8x32"

    def test_patch_values(self, figures, analysed):
        arrays = analysed[0].arrays
        q = arrays["quantities"].tolist().index("luminance")
        lines = [
            line for line in _csv(figures[0] / "figure5_patch_values.csv")
            if line["quantity"] == "luminance" and line["seed"] == "1"
        ]  # fmt: skip
        counts = {"all": arrays["value_baseline"][0, 1, q]}
        counts |= {str(e): arrays["value_histogram"][0, 1, e, q] for e in range(2)}
        centres = (arrays["value_edges"][q, 1:] + arrays["value_edges"][q, :-1]) / 2
        for line in lines:
            own = counts[line["expert"]]
            within = (centres >= float(line["from"])) & (centres < float(line["to"]))
            expected = own[within].sum() / own.sum()
            assert float(line["share"]) == pytest.approx(expected, abs=1e-12)
        for expert in counts:
            shares = [float(line["share"]) for line in lines if line["expert"] == expert]
            assert sum(shares) == pytest.approx(1)

    def test_causes_biases_and_epochs_show_the_rows(self, figures, analysed):
        found, folder = analysed[0], figures[0]
        rows = {
            (row["metric"], row["condition"], str(row["expert"]), str(row["seed"]), row["epoch"]):
            row["value"] for row in found.rows if row["run"] == "square" and row["class"] == ""
        }  # fmt: skip
        seen = set()
        for line in _csv(folder / "causes.csv"):
            key = (line["metric"], line["condition"], line["expert"], line["seed"], 2)
            assert float(line["value"]) == rows[key]
            seen.add(line["metric"])
        assert {"target_rate", "target_rate/nominal_out", "shapley/asr/zero"} <= seen
        lines = _csv(folder / "causes_subsets.csv")
        assert len(lines) == 2 * 2 * 2 * 4  # metrics, seeds, modes, subsets
        for line in lines:
            metric = f"{line['metric']}/silence_{line['silence']}/kept_{line['kept']}"
            key = (metric, line["condition"], "", line["seed"], 2)
            assert float(line["value"]) == rows[key]
        lines = _csv(folder / "by_epoch.csv")
        assert len(lines) == 4 * 2 * 2  # curves, seeds, epochs
        for line in lines:
            key = (line["metric"], line["condition"], "", line["seed"], float(line["epoch"]))
            assert float(line["value"]) == rows[key]
        lines = _csv(folder / "biases.csv")
        assert {line["metric"] for line in lines} >= {
            "wasserstein/red", "mean_shift_position/edges", "object_share/position",
        }  # fmt: skip
        for line in lines:
            key = (line["metric"], "clean", line["expert"], line["seed"], 2)
            assert float(line["value"]) == rows[key]

    def test_biases_of_a_single_test_image(self, analysed, tmp_path):
        """It has no values against those of its positions in other images."""
        rows = [row for row in analysed[0].rows if "_position/" not in row["metric"]]
        few = dataclasses.replace(analysed[0], rows=rows)
        figures_routing.write_biases(few, tmp_path / "biases")
        named = {line["metric"] for line in _csv(tmp_path / "biases.csv")}
        assert "mean_shift/edges" in named and "mean_shift_position/edges" not in named

    def test_atlases(self, figures, analysed):
        folder, arrays = figures[0], analysed[0].arrays
        stored = np.load(folder / "atlas_frequency.npz")
        np.testing.assert_array_equal(stored["frequency"], arrays["frequency"])
        stored = np.load(folder / "atlas_classes_seed1.npz")
        expected = arrays["class_frequency"][:, 1]
        np.testing.assert_array_equal(stored["class_frequency"], expected)
        assert stored["classes"].tolist() == [0, 1, 2, 3]

    def test_epochs_of_a_trigger_that_is_everywhere(self, analysed, tmp_path):
        """Capture says nothing there; the share of the change does, averaged over experts."""
        from pmoe_jax import figures_routing

        found = analysed[0]
        blank = [
            {**row, "value": float("nan")} if row["metric"].startswith("capture/") else row
            for row in found.rows
        ]
        everywhere = dataclasses.replace(found, rows=blank)
        figures_routing.write_epochs(everywhere, tmp_path / "by_epoch")
        line, = [
            line for line in _csv(tmp_path / "by_epoch.csv") if line["seed"] == "1"
            and (line["metric"], line["condition"]) == ("captured_change", "triggered")
            and line["epoch"] == "2"
        ]  # fmt: skip
        values = [_value(found, "captured_change", "triggered", 1, e) for e in range(2)]
        assert float(line["value"]) == pytest.approx(np.mean(values))


class TestCommand:
    @pytest.fixture
    def npz(self, data, tmp_path):
        np.savez(
            tmp_path / "tiny.npz",
            train_images=data.train_images, train_labels=data.train_labels,
            test_images=data.test_images, test_labels=data.test_labels,
        )  # fmt: skip
        return tmp_path / "tiny.npz"

    def test_quirk_a4(self, runs, npz, tmp_path, capsys):
        """One image's values, maps summed over the saved epochs, no causes."""
        out = tmp_path / "routing.npz"
        args = [f"--checkpoint={runs / 'square'}", f"--data={npz}"]
        args += [f"--output={out}", f"--figures={tmp_path / 'figures'}", "--images=2,3"]
        args += [
            f"--defended={runs / 'defended'}",
            "--members=0",
            "--every_epoch",
            "--nocauses",
            "--noprogress",
            "--quirks.a4_single_image=True",
        ]
        assert cli.main(["analyze", *args]) == 0
        captured = capsys.readouterr()
        assert "trigger's own patches" in captured.out and "note:" not in captured.err
        arrays = np.load(out)
        assert arrays["value_baseline"][0, 0, 0].sum() == 16  # the patches of a single image
        assert "silenced_predicted" not in arrays
        maps = np.load(tmp_path / "figures" / "figure3_patch_maps_seed0.npz")
        assert maps["times"].sum() == 2 * 2 * 2 * 4  # conditions, epochs, experts, patches
        maps = np.load(tmp_path / "figures" / "figure6_before_after_seed0.npz")
        sums = maps["times"].sum((1, 2))
        assert sums.tolist() == [2 * 2 * 4, 3 * 2 * 4]  # the defended model's on top of training's

    def test_blend_with_a_defended_run_and_more_data(self, runs, npz, data, tmp_path, capsys):
        """Another trigger by flags, on data that are not quite those of training."""
        with np.load(npz) as stored:
            changed = {**stored, "test_images": 255 - data.test_images}
        np.savez(npz, **changed)
        args = [f"--checkpoint={runs / 'square'}", f"--data={npz}", "--noprogress", "--nocauses"]
        args += [f"--defended={runs / 'defended'}", f"--output={tmp_path / 'routing.npz'}"]
        args += [f"--figures={tmp_path / 'figures'}", "--more_data=digits", "--trigger.name=blend"]
        args += ["--members=1"]
        assert cli.main(["analyze", *args]) == 0
        captured = capsys.readouterr()
        assert "is not the data set that square was trained on" in captured.err
        assert "shown blend" in captured.out and "by chance" in captured.out
        stored = json.loads((tmp_path / "routing.json").read_text())
        assert stored["made_from"]["options"]["trigger"]["name"] == "blend"
        assert stored["made_from"]["runs"]["defended_model_"]["name"] == "defended"
        assert (tmp_path / "figures" / "figure6_before_after_seed1.pdf").exists()
        pictures = np.load(tmp_path / "figures" / "figure2_triggers.npz")
        own, other = (pictures[f"row_{i}"][0] for i in (0, 2))  # clean images of both data sets
        assert own.shape == other.shape == (16, 16, 3) and "row_4" not in pictures
        assert (other[..., 0] == other[..., 1]).all() and (own[..., 0] != own[..., 1]).any()

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ([], "--checkpoint is missing"),
            (["--checkpoint={run}", "--output=routing.csv"], "must end in .npz"),
            (["--checkpoint={run}", "--output={run}/config.json/a.npz"], "cannot be written"),
            (["--checkpoint={run}", "--figures={run}/config.json/a"], "cannot be a folder"),
            (
                ["--checkpoint={run}", "--output={run}/config.npz"],
                "config.json, which is something",
            ),
            (["--checkpoint={run}", "--trigger.alpha=0.3"], "trigger.alpha=0.3 changes nothing"),
            (["--checkpoint={run}", "--quirks.a6_two_layer_experts=True"], "changes nothing"),
            (["--checkpoint={run}", "--images=a"], "--images=a must be whole numbers"),
            (["--checkpoint={run}", "--members=-1"], "--members=-1 must be whole numbers"),
            (["--checkpoint={run}", "--members=5"], "has no member 5; choose 0 to 1"),
            (["--checkpoint={run}", "more"], "unexpected word"),
            (["--checkpoint={run}/nowhere"], "does not exist"),
            (["--checkpoint={run}", "--more_data=gtsrb"], "must be NAME=SOURCE"),
            (["--checkpoint={run}", "--clean={run}/../other"], "is not a clean run"),
            (["--checkpoint={run}", "--defended={run}/../clean"], "is no defended run"),
            (["--checkpoint={run}/../other", "--defended={run}/../defended"], "defence of square"),
            (["--checkpoint={run}", "--others={run},{run}"], "two runs have the name square"),
        ],
    )
    def test_mistakes_are_one_line(self, runs, capsys, args, said):
        code = cli.main(["analyze", *(arg.format(run=runs / "square") for arg in args)])
        assert code == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("model.name", "wide_resnet", "has no routers to analyse"),
            ("model.num_experts", 3, "--clean: .* was trained with model.num_experts=3"),
            ("data.image_size", 24, "--clean: .* was trained with data.image_size=24"),
        ],
    )
    def test_other_models_and_data(self, runs, tmp_path, capsys, field, value, said):
        """Found out from the configs alone: nothing of it was ever trained."""
        config = rundir.RunDirectory(runs / "clean").config()
        config.update_from_flattened_dict({field: value})
        with rundir.RunDirectory(tmp_path / "strange") as run:
            run.start(config, rundir.RunDirectory(runs / "clean").members())
        dense = field == "model.name"
        flags = [f"--{'checkpoint' if dense else 'clean'}={tmp_path / 'strange'}"]
        flags += [] if dense else [f"--checkpoint={runs / 'square'}"]
        assert cli.main(["analyze", *flags]) == 2
        assert re.search(said, capsys.readouterr().err)

    def test_figures_on_a_full_disk_are_one_line(self, analysed, tmp_path, monkeypatch):
        from pmoe_jax import figures_paper, figures_routing

        def full(*unused):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(figures_paper, "write_architecture", full)
        with pytest.raises(PmoeError, match="No space left on device"):
            figures_routing.write_all(analysed[0], tmp_path, [3, 1])

    def test_images_that_do_not_exist(self, runs, data):
        with pytest.raises(PmoeError, match="no test image 40; choose 0 to 39"):
            analyze.analyze(runs / "square", shown=[40], dataset=data)

    def test_a_data_set_that_should_have_boxes(self, runs, data, capsys):
        bare = dataclasses.replace(data, name="gtsrb", test_boxes=None)
        analyze._note_data(rundir.RunDirectory(runs / "square"), bare, "")
        assert "no boxes of the signs" in capsys.readouterr().err

    def test_runs_with_the_allocator(self, monkeypatch):
        calls = []
        monkeypatch.setattr(launch, "restart_with_allocator", lambda: calls.append(1))
        monkeypatch.setattr(sys, "argv", ["pmoe", "analyze"])
        with pytest.raises(SystemExit):
            cli.entry_point()
        assert calls == [1]


def test_features_are_computed_once():
    """XLA finds that all forms of an image have the same features: no convolution is repeated."""
    model = models.PMoEWideResNet(4, width=1, num_experts=2, patches_per_expert=4)
    images = jnp.zeros((2, 16, 16, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))

    def convolutions(causes):
        def seen(variables, images):
            return routing.observe(model, variables, images, causes=causes)

        compiled = (
            jax.jit(seen, compiler_options=kernels.compiler_options("cpu"))
            .lower(variables, images)
            .compile()
        )
        return len(re.findall(r" convolution\(", compiled.as_text()))

    assert convolutions(True) == convolutions(False) > 0


class TestCollect:
    """`experiments/collect_routing.py`."""

    @pytest.fixture(scope="class")
    @classmethod
    def script(cls):
        return runpy.run_path(str(ROOT / "experiments" / "collect_routing.py"))

    def test_experts_first_then_seeds(self, script):
        def row(member, expert, value, epoch="2", metric="iou", stage="trained", label=""):
            return {
                "run": "a", "member": member, "epoch": epoch, "stage": stage, "metric": metric,
                "condition": "both", "expert": expert, "class": label, "value": value,
                "unit": "%", "dataset": "tiny", "width": "1", "trigger": "square", "rate": "0.1",
            }  # fmt: skip

        rows = [row("0", "0", "10"), row("0", "1", "20"), row("1", "0", "30"), row("1", "1", "50")]
        rows += [row("0", "0", "99", epoch="1"), row("2", "0", "99", stage="diverged")]
        rows += [row("0", "0", "99", label="3")]
        shapley = (("0", "0", "90"), ("0", "1", "5"), ("1", "0", "-5"), ("1", "1", "70"))
        rows += [row(*each, metric="shapley/asr/zero") for each in shapley]
        lines = {line["figure"]: line for line in script["collect"]("a", rows)}
        assert lines.keys() == {"iou", "shapley_largest", "shapley_smallest"}
        assert (lines["iou"]["mean"], lines["iou"]["n"]) == (27.5, 2)  # of 15 and 40
        assert lines["iou"]["sd"] == pytest.approx(25 / 2**0.5)
        assert lines["shapley_largest"]["mean"] == 80 and lines["shapley_smallest"]["mean"] == 0
        assert "90.0, 70.0" in script["table"](list(lines.values()))

    def test_every_key_figure_is_one_that_the_analysis_writes(self, script, analysed):
        with open(analysed[1][1], newline="") as file:
            lines = script["collect"]("square", list(csv.DictReader(file)))
        written = {line["figure"] for line in lines if line["model"] == "square"}
        assert written == script["FIGURES"].keys()
        assert {line["model"] for line in lines} == {"square", "clean", "defended"}

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--data=tiny"], "--data=tiny must be NAME=SOURCE of a data set that a run has"),
            (["--data=gtsrb=x"], "--data=gtsrb must be NAME=SOURCE of a data set that a run has"),
            (["--clean={runs}/clean"] * 2, "--clean is given twice for npz; give one"),
        ],
    )
    def test_flags_that_would_be_ignored_are_refused(self, script, runs, tmp_path, flags, said):
        words = [str(runs / "square"), f"--output={tmp_path}"]
        with pytest.raises(PmoeError, match=said):
            script["main"]([*words, *(flag.format(runs=runs) for flag in flags)])

    def test_an_analysis_is_read_again_only_if_it_is_the_same(
        self, script, analysed, runs, tmp_path, monkeypatch
    ):
        shutil.copytree(runs / "out", tmp_path / "out" / "square")
        called = []
        monkeypatch.setattr(cli, "main", lambda words: called.append(words) or 1)
        run, clean, defended = (
            rundir.RunDirectory(runs / name) for name in ("square", "clean", "defended")
        )
        beside = dict(zip(routing_arrays.PREFIXES, (clean, defended), strict=True))

        def ask(beside=beside, every_epoch=True, again=False):
            called.clear()
            return script["analysed"](run, beside, "", tmp_path / "out", every_epoch, again)

        assert len(ask()) == len(analysed[0].rows) and not called
        assert ask(again=True) is None and called
        assert ask(every_epoch=False) is None and called
        assert ask(beside={"clean_model_": clean}) is None
        assert f"--clean={clean.path}" in called[0] and "--every_epoch" in called[0]
        shutil.copytree(runs / "square", tmp_path / "square")
        run = rundir.RunDirectory(tmp_path / "square")
        manifest = run.path / "manifest.json"
        manifest.write_text(manifest.read_text() + "\n")
        assert ask() is None and called

    @pytest.mark.parametrize("name", ["routing.csv", "routing.json"])
    def test_a_digit_that_was_altered_is_refused_and_a_lost_file_made_anew(
        self, name, script, runs, tmp_path, monkeypatch
    ):
        shutil.copytree(runs / "out", tmp_path / "out" / "square")
        called = []
        monkeypatch.setattr(cli, "main", lambda words: called.append(words) or 1)
        run, *others = (rundir.RunDirectory(runs / n) for n in ("square", "clean", "defended"))
        beside = dict(zip(routing_arrays.PREFIXES, others, strict=True))

        def ask():
            return script["analysed"](run, beside, "", tmp_path / "out", True, False)

        assert ask() and not called
        path = tmp_path / "out" / "square" / name
        text = path.read_text()
        place = max(text.rfind(digit) for digit in "123456789")
        path.write_text(text[:place] + "0" + text[place + 1 :])
        with pytest.raises(PmoeError, match=rf"{name} does not match its SHA-256 sum") as caught:
            ask()
        assert "\n" not in str(caught.value) and not called
        path.unlink()
        assert ask() is None and called


def _csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _value(found, metric, condition, member, expert="", label=""):
    """The single row's value, of the square run at the last epoch."""
    value, = [
        row["value"] for row in found.rows
        if row["run"] == "square" and row["epoch"] == 2
        and (row["metric"], row["condition"], row["member"], row["expert"], row["class"])
        == (metric, condition, member, expert, label)
    ]  # fmt: skip
    return value


def test_figures_say_how_many_members_they_cover():
    common = {"run": "r", "epoch": 1, "metric": "iou", "condition": "both", "class": "",
              "unit": "%", "expert": "0"}  # fmt: skip
    rows = [
        {**common, "member": 0, "stage": "trained", "value": 50.0},
        {**common, "member": 1, "stage": "diverged", "value": 90.0},
        {**common, "member": 2, "stage": "trained", "value": np.nan},
    ]
    found = routing_output.summaries(rows)
    assert {(each["n"], each["of"], each["mean"]) for each in found} == {(1, 3, 50.0)}
    assert routing_output.points_or_mean(found[0]) == "50.0 (1 of 3)"
    arrays = {"seed": np.array([4, 5]), "diverged": np.array([False, True])}
    assert [routing_arrays.title_of(arrays, m) for m in (0, 1)] == ["seed 4", "seed 5\n(diverged)"]
