"""Counts what tests tried and what was lost, if somebody asks for the count.

A line a count is appended to the file that $PMOE_TALLY names; without it nothing is written.
"""

import json
import os


def add(what, tried=1, losses=0, **more):
    """Counts attempts of one kind; `more` are figures such as seconds or exit codes."""
    if path := os.environ.get("PMOE_TALLY"):
        with open(path, "a") as file:
            file.write(json.dumps({"what": what, "tried": tried, "losses": losses, **more}) + "\n")
