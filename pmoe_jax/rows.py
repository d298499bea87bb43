"""Rows of figures, the one schema that every command writes and reads, and their files."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from pmoe_jax.errors import PmoeError
from pmoe_jax.files import LINES_LIMIT, oversized

#: A row is one figure: `value` in percent of `n` images, of one member at one epoch. `stage` is
#: "trained", "diverged" (then excluded from means) or a defence's; `seed` pairs rows for CAD.
ROW_FIELDS = (
    "run",
    "member",
    "seed",
    "dataset",
    "width",
    "epoch",
    "stage",
    "trigger",
    "rate",
    "metric",
    "value",
    "n",
)

Row = dict[str, Any]
#: Fields of a row that figures are made of.
_KINDS: dict[str, Any] = {"run": str, "member": int, "seed": int, "epoch": int | float,
                         "stage": str, "metric": str, "value": int | float}  # fmt: skip
#: The lines of a file of figures, the bytes of one, and its fields: a row has 12 or a few more.
COUNT_LIMIT = 2**21
LINE_LIMIT = 2**14
FIELDS_LIMIT = 64


def checked_row(row: Any) -> Row:
    """The row, if its fields are all there and hold what they should."""
    if not isinstance(row, dict) or not row.keys() >= set(ROW_FIELDS):
        run = row.get("run", "a run") if isinstance(row, dict) else "a run"
        raise PmoeError(f"a row of {run} lacks fields of the common schema; restore its file")
    for name, kind in _KINDS.items():
        given = row[name]
        if not isinstance(given, kind) or (isinstance(given, float) and not math.isfinite(given)):
            raise PmoeError(f"a row of {row['run']} has {name}={given!r}; restore its file")
    return row


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of figures.

    It is read line by line, as each of them can take many times its bytes in memory.

    Raises:
      PmoeError: an oversized file, or a damaged line. A last line without its end is none: a kill
        in the middle of an append leaves it, and it is left out.
    """
    if not path.exists():
        return []
    if problem := oversized(path, LINES_LIMIT):
        raise PmoeError(f"{problem}; restore the file")
    lines: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        while line := file.readline(LINE_LIMIT):
            if not line.endswith(b"\n") and len(line) < LINE_LIMIT:
                break
            entry = _figures(line)
            if entry is None:
                raise PmoeError(
                    f"line {len(lines) + 1} of {path} is damaged; restore or remove the line"
                )
            if len(lines) == COUNT_LIMIT:
                raise PmoeError(
                    f"{path} has more lines than the limit of {COUNT_LIMIT}; restore the file"
                )
            lines.append(entry)
    return lines


def _figures(line: bytes) -> dict[str, Any] | None:
    """A line of figures: single values of an epoch; None for anything else."""
    if not line.endswith(b"\n"):  # It is longer than `LINE_LIMIT`.
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or len(entry) > FIELDS_LIMIT:
        return None
    # Not in lists and the like: "[]," is three bytes, and takes 64.
    single = not any(isinstance(value, list | dict) for value in entry.values())
    return entry if single and isinstance(entry.get("epoch"), int | float) else None
