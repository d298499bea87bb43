"""Shared fixtures: tiny data and configs; programs that are compiled quickly, and once."""

# ruff: noqa: E402  Flags are set before JAX, which reads them, is imported.

import os
import signal
import tracemalloc  # noqa: F401  pytest imports it within tfds' lazy imports, which breaks it

#: LLVM's first level takes a third less CPU than its last, also in the processes that tests start.
#: What runs at the last level: tests/reliability/everything.py, and whoever sets it.
FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in FLAGS:
    os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_backend_optimization_level=1".strip()

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


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what is to run in the background like this, and children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signal_handlers_of_one_test():
    """What a command sets until its process ends does not reach the worker's later tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


#: Files that take minutes, longest first: a worker that begins one last ends long after the others.
LONG = (
    "test_experiments", "test_sweep", "test_defences", "test_training", "test_run", "test_kernels",
    "test_analyze", "test_routing", "test_crashes", "test_processes", "test_mesh",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files first, where workers take them in this order (`--no-loadscope-reorder`)."""
    place = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


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
