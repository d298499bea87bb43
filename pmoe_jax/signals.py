"""Signal handlers that raise: where the exception would be lost, the signal is sent again."""

from __future__ import annotations

import os
import threading
from types import FrameType


def sent_again(number: int, frame: FrameType | None) -> bool:
    """Whether a handler must not raise now, as Python ignores what garbage collection raises.

    If so, the same signal comes again in a moment.

    Args:
      number, frame: what the handler was called with.
    """
    while frame is not None:
        if frame.f_code.co_name in ("_xla_gc_callback", "__del__"):  # JAX's, and finalisers
            timer = threading.Timer(0.02, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            return True
        frame = frame.f_back
    return False
