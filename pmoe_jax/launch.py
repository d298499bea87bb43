"""What a process needs before JAX starts: allocator settings, compilation cache."""

from __future__ import annotations

import ctypes
import os
import pathlib
import platform
import sys

#: Large pages and no return of freed memory to the system: a training step touches hundreds of
#: megabytes of fresh buffers, and their page faults cost more than a third of its time on CPUs.
MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
)


def restart_with_allocator() -> None:
    """Re-executes this command once with `MALLOC`, which only counts at process start.

    Does nothing on other C libraries, where GLIBC_TUNABLES is set already (also to ""), or when the
    program was not started from a command line.
    """
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = MALLOC
    # The very same words: with `-m` added, Python would import modules from the current directory,
    # which may be a stranger's run.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back_memory() -> None:
    """Returns the pages of free memory to the system, which `MALLOC` otherwise keeps for good.

    A large buffer that finds no hole goes on top of the heap, and the holes stay resident: over
    many epochs the process grows although it uses no more. Pages that are needed again have to be
    touched anew, which takes about half a second. Does nothing without glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def prepare(dtype: str) -> None:
    """JAX as a model of that dtype needs it, with the compilation cache."""
    use_compilation_cache()
    if dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)


def use_compilation_cache() -> None:
    """Keeps compiled programs in $PMOE_CACHE_DIR, by default ~/.cache/pmoe_jax."""
    import jax

    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = os.environ.get("PMOE_CACHE_DIR") or str(base / "pmoe_jax")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
