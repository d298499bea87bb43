"""Shared fixtures: tiny data and configs, a persistent compilation cache."""

import os
import tracemalloc  # noqa: F401  pytest imports it within tfds' lazy imports, which breaks it

import jax
import numpy as np
import pytest
from locations import ROOT

from pmoe_jax import config as config_lib
from pmoe_jax.data import dataset as dataset_lib

CACHE = os.environ.setdefault("PMOE_CACHE_DIR", str(ROOT / ".jax_cache"))

jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def tiny_arrays():
    """96 training and 40 test images, 16x16x3, of 4 classes that colours tell apart."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])

    def split(count):
        labels = np.arange(count) % 4
        noise = rng.integers(-30, 30, (count, 16, 16, 3))
        return (colours[labels][:, None, None] + noise).astype(np.uint8), labels.astype(np.int32)

    return split(96), split(40)


@pytest.fixture(scope="session")
def tiny_dataset(tiny_arrays):
    """The same as a `Dataset`."""
    return dataset_lib.make("tiny", *tiny_arrays)


@pytest.fixture(scope="session")
def tiny_npz(tiny_arrays, tmp_path_factory):
    """The same as an `.npz` file."""
    (train_images, train_labels), (test_images, test_labels) = tiny_arrays
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    np.savez(
        path,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )
    return path


@pytest.fixture
def tiny_config(tiny_npz):
    """Trains on `tiny_npz` in seconds: width 1, 16 patches of which 2 experts take 4 each."""
    config = config_lib.default()
    config.data.name = "npz"
    config.data.source = str(tiny_npz)
    config.data.image_size = 16
    config.num_seeds = 2
    config.model.width = 1
    config.model.num_experts = 2
    config.model.patches_per_expert = 4
    config.model.bn_momentum = 0.9
    config.train.epochs = 2
    config.train.batch_size = 16
    config.evaluation.batch_size = 40
    return config
