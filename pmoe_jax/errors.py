"""The one error type that users see: a message, no traceback; and what such messages need."""

import re
from typing import Any


class PmoeError(Exception):
    """Bad input from the user: config, data, checkpoint or command line.

    The message is one line that names what was wrong, what is allowed and what
    to do. The command line prints it and exits with `exit_code`; library users
    catch it like any exception.
    """

    exit_code = 2


def shown(value: Any) -> str:
    """`repr` for a message, cut where it is long; also of numbers that Python does not write."""
    try:
        text = repr(value)
    except ValueError:  # More than some thousand digits.
        return "(a number of thousands of digits)"
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression that a user gave.

    Raises:
      PmoeError: it is none, or one too large for Python.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PmoeError(
            f"pattern {shown(pattern)} is no usable regular expression ({error}); write "
            "one as for Python's re"
        ) from None
