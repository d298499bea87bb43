"""Runs every check of reliability in full, part by part, and prints what was tried and lost.

python tests/reliability/everything.py --output=runs/reliability   (`make reliability`)

Each part leaves NAME.json in the output folder. Run again, the command goes on: parts that passed
are not repeated, and of kills only the missing moments are tried; a part that failed is run again,
its kills from the start if one lost something. A part's results of other code, or of other checks,
than those here now are put aside. --parts=disks,damage runs some; --show only prints. The exit code
is 0 if every part passed at the size that is asked for, without a skipped test.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[2]
KILLS = ("train", "defend", "sweep", "prepare")
#: Part -> pytest's words.
PARTS = {
    **{f"kill_{name}": ["tests/reliability/test_crashes.py", "-k", f"many_random and {name}"]
       for name in KILLS},
    "crashes": ["tests/reliability/test_crashes.py", "tests/test_run.py", "tests/test_sweep.py",
                "-k", "not many_random and (kill or terminat or random or hangs or signal)"],
    "damage": ["tests/reliability/test_damage.py", "-k", "not sample", "tests/test_rundir.py"],
    "disks": ["tests/reliability/test_disks.py", "tests/data/test_data_disks.py"],
    "mismatches": ["tests/reliability/test_mismatch.py"],
    "configs": ["tests/reliability/test_random_configs.py", "tests/test_config.py",
                "tests/reliability/test_defence_configs.py"],
    "numbers": ["tests/reliability/test_numbers.py"],
    "strangers": ["tests/reliability/test_strangers.py", "tests/reliability/test_bounds.py",
                  "tests/data/test_data_bad_input.py"],
    "fuzz": ["tests/data/test_data_fuzz.py"],
    "same_bits": ["tests/reliability/test_determinism.py"],
    "soak": [],
}  # fmt: skip
#: Part -> the option that says how much of it is wanted; all others have one size.
SIZES = {**{f"kill_{name}": "moments" for name in KILLS}, "configs": "examples",
         "fuzz": "examples", "soak": "minutes"}  # fmt: skip
#: What the column of losses counts; elsewhere it counts the part's tests that failed.
LOSSES = {
    **{f"kill_{name}": "runs that after kills ended, went on or came out otherwise than promised"
       for name in KILLS},
    "damage": "harmed files that were neither harmless nor refused by name",
    "soak": "measures that grew beyond their bound",
}  # fmt: skip
#: What checks of all parts are made of.
SHARED = ("tests/reliability/harness.py", "tests/small.py", "tests/tally.py", "tests/bounded.py",
          "tests/locations.py", "tests/conftest.py", "tests/data/conftest.py")  # fmt: skip
INTERRUPTED = 2  # pytest's exit code


def lines_of(path):
    """A part's counts, without signals that ended nothing (exit code 0): those were no kills."""
    lines = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
    for line in lines:
        codes = line.get("codes", {})
        for name in [name for name in codes if name.endswith("->0")]:
            line["tried"] -= codes.pop(name)
    return lines


def added(lines):
    """Counts of one kind made one: what -> {"tried", "losses", further figures}."""
    found = {}
    for line in lines:
        entry = found.setdefault(line["what"], {"tried": 0, "losses": 0})
        for name, value in line.items():
            if name == "what":
                continue
            if isinstance(value, dict):
                old = entry.setdefault(name, {})
                entry[name] = {k: old.get(k, 0) + value.get(k, 0) for k in sorted({*old, *value})}
            elif name.endswith("at_most") or name == "largest":
                entry[name] = max(entry.get(name, value), value)
            else:
                entry[name] = entry.get(name, 0) + value
    return found


def run(name, options):
    """Runs a part, and writes what came of it; nothing where it was stopped, so that it goes on."""
    result, counts = (options.output.resolve() / f"{name}{end}" for end in (".json", ".jsonl"))
    kills, moments = name.startswith("kill_"), options.moments
    before = json.loads(result.read_text()) if result.exists() else {}
    if not kills:
        counts.unlink(missing_ok=True)
    elif any(line["losses"] for line in lines_of(counts)):
        counts.replace(counts.with_suffix(".lost.jsonl"))
    else:  # Moments that were tried before are not tried again; but nothing passes untried.
        moments = max(1, moments - sum(line["tried"] for line in lines_of(counts)))
    report = options.output.resolve() / f"{name}.xml"
    env = {
        # As users run it; tests alone would compile for their own speed.
        "XLA_FLAGS": "--xla_backend_optimization_level=3",
        **os.environ, "PMOE_TALLY": str(counts), "PMOE_FUZZ_SECONDS": "inf",
        "PMOE_CRASH_MOMENTS": str(moments), "PMOE_FUZZ_EXAMPLES": str(options.examples),
    }  # fmt: skip
    begun = time.monotonic()
    if name == "soak":
        words = ["tests/reliability/soak.py", f"--minutes={options.minutes}",
                 f"--output={options.output.resolve() / 'soak'}"]  # fmt: skip
    else:
        # The harness and the tests' own subprocesses have limits; a part as a whole takes its time.
        words = ["-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider",
                 "-o", "faulthandler_timeout=0", "--timeout=0", f"--junitxml={report}",
                 *PARTS[name]]  # fmt: skip
    code = subprocess.run([sys.executable, *words], cwd=ROOT, env=env).returncode
    tests, skipped, failed = counted(report)
    minutes = (before.get("minutes", 0) if kills else 0) + (time.monotonic() - begun) / 60
    summary = {"passed": code == 0, "minutes": round(minutes, 1), "tests": tests,
               "skipped": skipped, "failed": failed}  # fmt: skip
    if name in SIZES:
        summary["size"] = getattr(options, SIZES[name])
    if 0 <= code != INTERRUPTED:
        result.write_text(json.dumps(summary, indent=1) + "\n")


def counted(report):
    """How many tests pytest ran, skipped, and saw fail, of its report."""
    if not report.exists():
        return 0, 0, 0
    found = xml.etree.ElementTree.parse(report)
    report.unlink()
    tests, skipped, failed, broken = (
        len(list(found.iter(kind))) for kind in ("testcase", "skipped", "failure", "error")
    )
    return tests, skipped, failed + broken


def code(name):
    """A sum of the code that is checked, and of a part's checks."""
    checks = [word for word in PARTS[name] or ["tests/reliability/soak.py"] if word.endswith(".py")]
    files = sorted((ROOT / "pmoe_jax").rglob("*.py"))
    files += [ROOT / path for path in (*SHARED, *checks)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def put_aside(output):
    """Moves results of other code into folders of their own: they say nothing of this one."""
    for name in PARTS:
        mark = output / f"{name}.code"
        of = mark.read_text().strip() if mark.exists() else "unknown"
        held = [path for path in output.glob(f"{name}.*") if path != mark]
        if held and of != code(name):
            older = output / f"of_code_{of}"
            older.mkdir(exist_ok=True)
            for path in held:
                path.replace(older / path.name)
            print(f"{name}: results of other code are put aside in {older}", flush=True)
        mark.write_text(code(name) + "\n")


def known(options):
    """Part -> its result and state, of those that ran; also of one that was stopped."""
    found = {}
    for name in PARTS:
        path = options.output / f"{name}.json"
        part = json.loads(path.read_text()) if path.exists() else {}
        part["checks"] = added(lines_of(path.with_suffix(".jsonl")))
        if path.exists() or part["checks"]:
            found[name] = {**part, "state": state(name, part, options)}
    return found


def state(name, part, options):
    """Of a result: passed, failed, unfinished, or that tests were skipped."""
    checks = part["checks"].values()
    if any(entry["losses"] for entry in checks) or part.get("passed") is False:
        return "failed"
    size = part.get("size", 0)
    if name.startswith("kill_"):
        size = sum(entry["tried"] for entry in checks)
    if "passed" not in part or (name in SIZES and size < getattr(options, SIZES[name])):
        return "unfinished"
    return f"{part['skipped']} skipped" if part.get("skipped") else "passed"


def shown(value):
    if isinstance(value, dict):
        return " ".join(f"{name} {count}" for name, count in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(found):
    """The tables as text: what was tried, and the parts."""
    lines = ["| what | tried | losses | more |", "|---|---:|---:|---|"]
    for name, part in found.items():
        for what, entry in part["checks"].items():
            more = {name: v for name, v in entry.items() if name not in ("tried", "losses")}
            said = ", ".join(f"{n.replace('_', ' ')} {shown(v)}" for n, v in more.items())
            losses = entry["losses"] if name in LOSSES else part.get("failed", "-")
            lines.append(f"| {what} | {entry['tried']:g} | {losses} | {said} |")
    lines += ["", "| part | state | tests | losses are |", "|---|---|---:|---|"]
    for name, part in found.items():
        means = LOSSES.get(name, "failed tests of the part")
        lines.append(f"| {name} | {part['state']} | {part.get('tests') or '-'} | {means} |")
    return "\n".join(lines)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "runs" / "reliability")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=30, help="of the soak")
    parser.add_argument("--moments", type=int, default=30, help="that each command is killed at")
    parser.add_argument("--examples", type=int, default=300, help="of everything that is drawn")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args(words)
    for name in set(SIZES.values()):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive: a part that runs nothing shows nothing")
    chosen = [name for name in options.parts.split(",") if name]
    if wrong := set(chosen) - set(PARTS):
        parser.error(f"no part {wrong.pop()}; choose of {', '.join(PARTS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.show:
        put_aside(options.output)
    for name in [] if options.show else chosen:
        if known(options).get(name, {}).get("state") != "passed":
            print(f"--- {name}", flush=True)
            run(name, options)
    found = known(options)
    others = [f"{name} ({part['state']})" for name, part in found.items()
              if part["state"] != "passed"]  # fmt: skip
    missing = [name for name in PARTS if name not in found]
    lost = sum(entry["losses"] for part in found.values() for entry in part["checks"].values())
    lost += sum(part.get("failed", 0) for name, part in found.items() if name not in LOSSES)
    kills = sum(part.get("minutes", 0) for name, part in found.items() if "kill_" in name)
    text = (
        f"{markdown(found)}\n\nlosses: {lost}; parts that passed: "
        f"{len(found) - len(others)} of {len(PARTS)}; others: {', '.join(others) or 'none'}; "
        f"not run: {', '.join(missing) or 'none'}; "
        f"{sum(part.get('minutes', 0) for part in found.values()):.0f} minutes, "
        f"of which {kills:.0f} of kills"
    )
    (options.output / "reliability.md").write_text(text + "\n")
    print(text)
    return 1 if others or missing else 0


if __name__ == "__main__":
    sys.exit(main())
