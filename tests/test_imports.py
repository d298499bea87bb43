"""The core is light: importing it loads no TensorFlow, checkpointing, plotting or command line."""

import json
import subprocess
import sys

import pytest

import pmoe_jax

CORE = ("models", "kernels", "triggers", "poisoning", "metrics", "masks", "streams")
HEAVY = (
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "matplotlib",
    "pandas",
    "sklearn",
    "PIL",
    "absl.app",
    "pmoe_jax.cli",
)


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    modules = ["pmoe_jax", *(f"pmoe_jax.{name}" for name in CORE)]
    program = f"import json, sys, {', '.join(modules)}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout))


def test_the_core_was_imported(loaded):
    assert {f"pmoe_jax.{name}" for name in CORE} <= loaded


@pytest.mark.parametrize("heavy", HEAVY)
def test_the_core_does_not_load(loaded, heavy):
    assert heavy not in loaded


def test_version():
    assert pmoe_jax.__version__[0].isdigit()
