"""Signal handlers that raise: where the exception would be lost, the signal is sent again."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


def sent_again(number: int, frame: FrameType | None) -> bool:
    """Whether a handler must not raise now, as Python ignores what garbage collection raises.

    If so, the same signal comes again in a moment.

    Args:
      number, frame: what the handler was called with.
    """
    while frame is not None:
        if frame.f_code.co_name in ("_xla_gc_callback", "__del__"):  # JAX's, and finalisers
            _send_again(number)
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def heard(number_of: Callable[[type[BaseException]], int | None]) -> Iterator[None]:
    """Within, a signal comes again if Python ignored what its handler raised.

    That is so in callbacks of weak references, which no frame tells from other functions.

    Args:
      number_of: the signal of an exception's type, None for what is no handler's.
    """
    previous = sys.unraisablehook

    def ignored(unraisable: sys.UnraisableHookArgs) -> None:
        number = number_of(unraisable.exc_type)
        if number is None:
            previous(unraisable)
        else:
            _send_again(number)

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = previous


def _send_again(number: int) -> None:
    timer = threading.Timer(0.02, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
