"""Training on data that other tests do not train on: decoded on the way, and of 64x64 pixels."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from pmoe_jax import cli, inputs, training
from pmoe_jax import run as run_lib
from pmoe_jax import trained as trained_lib
from pmoe_jax.data import records
from pmoe_jax.rundir import RunDirectory


class Small(nn.Module):
    """Stands in for the real models where only their data matter."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.avg_pool(images, (4, 4), (4, 4)).reshape(len(images), -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_classes)(x)


def folder_config(tiny_config, tiny_arrays, make, tmp_path, corrupt):
    """`tiny_config` with its images as PNG files, some of which may be damaged."""
    files = {}
    for split, (images, labels) in zip(("train", "test"), tiny_arrays, strict=True):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            content = b"x" if (split, index) in corrupt else make.png(image)
            files[f"{split}/{label}/{index:03d}.png"] = content
    config = tiny_config.copy_and_resolve_references()
    config.data.update(name="folder", source=make.write_folder(tmp_path / "images", files))
    config.data.skip_corrupt = bool(corrupt)
    config.trigger.update(name="square", size=6)
    config.poison.rate = 0.1
    return config


def trained(config, path):
    """The leaves of the last checkpoint's state and attack, and the figures."""
    run_lib.train(config, path, progress=False)
    run = RunDirectory(path)
    dataset = inputs.load_data(config)
    _, _, state, attack, _ = trained_lib.restore(run, config, run.members(), dataset)
    rows = [{**row, "run": ""} for row in run.rows()]
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state, attack))], rows


@pytest.mark.parametrize("corrupt", [(), (("train", 5), ("test", 7))], ids=["whole", "corrupt"])
def test_lazily_decoded_equals_resident_bit_for_bit(
    corrupt, tiny_config, tiny_arrays, make, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "build_model", lambda config, classes: Small(classes))
    config = folder_config(tiny_config, tiny_arrays, make, tmp_path, corrupt)
    assert isinstance(inputs.load_data(config).train_images, np.ndarray)  # it fits
    config.data.residence = "device"
    monkeypatch.setattr(inputs, "HOST_SHARE", 1e-12)  # "auto" finds that it does not fit
    resident = trained(config, tmp_path / "resident")
    config.data.residence = "auto"
    streamed, batches = [], run_lib.stream.batches

    def spy(images, labels, order):
        assert isinstance(images, records.LazyImages)
        for batch in batches(images, labels, order):
            streamed.append(batch.indices.shape)
            yield batch

    monkeypatch.setattr(run_lib.stream, "batches", spy)
    lazy = trained(config, tmp_path / "lazy")
    count = 96 - len([split for split, _ in corrupt if split == "train"])
    assert streamed == [(2, 16)] * (count // 16) * 2
    assert len(resident[0]) == len(lazy[0]) > 10
    for one, other in zip(resident[0], lazy[0], strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
    assert resident[1] == lazy[1] and {row["metric"] for row in lazy[1]} >= {"ba", "asr"}


def test_64x64_from_training_to_evaluation(make, tmp_path, capsys):
    """The real model by the command line: 256 patches instead of 64."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 3
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    noise = rng.integers(-30, 30, (24, 64, 64, 3))
    images = (colours[labels][:, None, None] + noise).astype(np.uint8)
    source, path = tmp_path / "large.npz", tmp_path / "run"
    source.write_bytes(
        make.npz_bytes(
            train_images=images[:16], train_labels=labels[:16],
            test_images=images[16:], test_labels=labels[16:],
        )
    )  # fmt: skip
    flags = {
        "data.name": "npz", "data.source": source, "num_seeds": 1, "model.width": 1,
        "model.num_experts": 2, "model.patches_per_expert": 8, "model.bn_momentum": 0.5,
        "train.epochs": 2, "train.batch_size": 8, "evaluation.batch_size": 8,
        "trigger.name": "warp", "poison.rate": 0.25,
    }  # fmt: skip
    words = [f"--config.{name}={value}" for name, value in flags.items()]
    assert cli.main(["train", f"--workdir={path}", "--noprogress", *words]) == 0
    trained_rows = {row["metric"]: row for row in RunDirectory(path).rows() if row["epoch"] == 2}
    assert trained_rows["ba"]["n"] == 8 and {"ba", "asr"} <= trained_rows.keys()
    capsys.readouterr()
    assert cli.main(["evaluate", f"--checkpoint={path}", "--csv"]) == 0
    evaluated = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    metric, value = (evaluated[0].index(name) for name in ("metric", "value"))
    found = {line[metric]: float(line[value]) for line in evaluated[1:]}
    assert found["ba"] == trained_rows["ba"]["value"]
    assert found["asr"] == trained_rows["asr"]["value"]

    run = RunDirectory(path)
    dataset = inputs.load_data(run.config())
    programs, step, state, _, _ = trained_lib.restore(run, run.config(), run.members(), dataset)
    assert step == 4 and dataset.image_shape == (64, 64, 3)
    one = jax.tree.map(lambda leaf: leaf[0], state.variables)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    _, routing = jax.eval_shape(
        lambda variables, x: programs.model.apply(variables, x, return_routing=True), one, images
    )
    assert routing.indices.shape == (1, 2, 8)
    fresh = programs.init(run.members(), dataset.image_shape)
    pairs = zip(*map(jax.tree.leaves, (fresh.params, state.params)), strict=True)
    assert all(np.isfinite(new).all() and (old != new).any() for old, new in pairs)
