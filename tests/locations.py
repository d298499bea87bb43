"""Where the checkout is, and the shared reference data beside it, if there is any."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def shared(name):
    """Path of a file of the shared reference data; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared reference data is absent ({name})")
    return path
