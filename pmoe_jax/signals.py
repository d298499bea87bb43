"""Signal handlers that raise: where the exception would be lost, the signal is sent again."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

#: Seconds that a signal waits for an import, which a config's file may be, at most.
IMPORTS_WITHIN = 10.0
_import_since: list[float] = []


def sent_again(number: int, frame: FrameType | None) -> bool:
    """Whether a handler must not raise now; if so, the same signal comes again in a moment.

    Python ignores what garbage collection raises, and libraries in C++ that are just being imported
    have crashed of it.

    Args:
      number, frame: what the handler was called with.
    """
    importing = False
    while frame is not None:
        if frame.f_code.co_name in ("_xla_gc_callback", "__del__"):  # JAX's, and finalisers
            _send_again(number)
            return True
        importing |= frame.f_code.co_filename.startswith("<frozen importlib.")
        frame = frame.f_back
    if not importing:
        _import_since.clear()
        return False
    if not _import_since:
        _import_since.append(time.monotonic())
    waits = time.monotonic() - _import_since[0] < IMPORTS_WITHIN
    if waits:
        _send_again(number)
    return waits


@contextlib.contextmanager
def heard(
    number_of: Callable[[type[BaseException]], int | None], came: Sequence[int] = ()
) -> Iterator[None]:
    """Within, a signal comes again if Python ignored what its handler raised.

    That is so in callbacks of weak references, which no frame tells from other functions.

    Args:
      number_of: the signal of an exception's type, None for what is no handler's.
      came: the signals so far that end the process. Once there is one, nothing is said of other
        exceptions that Python ignores: threads of libraries, such as those that write checkpoints,
        complain that nobody waits for them any more.
    """
    previous = sys.unraisablehook

    def ignored(unraisable: sys.UnraisableHookArgs) -> None:
        number = number_of(unraisable.exc_type)
        if number is not None:
            _send_again(number)
        elif not came:
            previous(unraisable)

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = previous


def _send_again(number: int) -> None:
    timer = threading.Timer(0.02, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
