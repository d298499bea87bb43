"""Where figures come from: code revision, package versions, hardware, and the file that says so."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax
import psutil

from pmoe_jax import config as config_lib
from pmoe_jax.errors import PmoeError
from pmoe_jax.files import sum_of_object

_VERSIONS = ("pmoe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def read(path: pathlib.Path) -> dict[str, Any]:
    """What a `provenance.json` holds; nothing if it does not exist.

    Raises:
      PmoeError: it is damaged.
    """
    try:
        known = json.loads(config_lib.read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise PmoeError(f"{path} cannot be read ({error}); restore the file") from None
    if not isinstance(known, dict):
        raise PmoeError(f"{path} is damaged; restore the file")
    if known.get("sha256", sum_of_object(known)) != sum_of_object(known):
        raise PmoeError(f"{path} does not match its SHA-256 sum; restore the file")
    return known


def facts() -> dict[str, Any]:
    """Where figures come from: code revision, package versions, hardware."""
    return {
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _VERSIONS},
        "hardware": {
            **_processor(),
            "cores": _cores(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "devices": [device.device_kind for device in jax.devices()],
            "platform": platform.platform(),
        },
    }


def session() -> dict[str, Any]:
    """This session: when it began, its command and backend, and `facts`."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "started": started,
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "backend": jax.default_backend(),
        **facts(),
    }


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git_revision() -> str:
    def git(*words: str) -> str:
        folder = pathlib.Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--", pathlib.Path(__file__).name):
            return "unknown"  # Installed inside a repository of something else.
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
    except OSError:
        return "unknown"
    return (revision or "unknown") + ("+changes" if changed else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> dict[str, str]:
    """The processor's name and kind: one name can stand for several, which round differently."""
    try:
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    lines = (line.partition(":") for line in first.splitlines())
    facts = {name.strip(): fact.strip() for name, _, fact in lines}
    flags = facts.get("flags", "").split()
    kind = [f"{name} {facts[name]}" for name in ("cpu family", "model") if name in facts]
    kind += [name for name in ("avx512f", "avx2", "avx") if name in flags][:1]
    return {"cpu": facts.get("model name") or platform.processor(), "cpu_kind": ", ".join(kind)}
