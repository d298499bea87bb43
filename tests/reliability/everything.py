"""Runs every check of reliability in full, part by part, and prints what was tried and lost.

python tests/reliability/everything.py --output=runs/reliability   (`make reliability`)

Each part leaves NAME.json in the output folder. Run again, the command goes on: parts that passed
are not repeated, and of kills only the missing moments are tried. --parts=train,damage runs some;
--show only prints. The exit code is 0 if every part passed and nothing was lost.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

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
    "configs": ["tests/reliability/test_random_configs.py", "tests/test_config.py"],
    "numbers": ["tests/reliability/test_numbers.py"],
    "strangers": ["tests/reliability/test_strangers.py", "tests/data/test_data_bad_input.py"],
    "fuzz": ["tests/data/test_data_fuzz.py"],
    "same_bits": ["tests/reliability/test_determinism.py"],
    "soak": [],
}  # fmt: skip


def lines_of(path):
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


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
    """Runs a part, and writes what it counted and whether it passed."""
    result, counts = (options.output.resolve() / f"{name}{end}" for end in (".json", ".jsonl"))
    kills, moments = name.startswith("kill_"), options.moments
    if kills:  # Moments that were tried before are not tried again.
        moments -= sum(line["tried"] for line in lines_of(counts))
    else:
        counts.unlink(missing_ok=True)
    before = json.loads(result.read_text())["minutes"] if kills and result.exists() else 0
    env = {
        **os.environ, "PMOE_TALLY": str(counts), "PMOE_FUZZ_SECONDS": "60",
        "PMOE_CRASH_MOMENTS": str(moments), "PMOE_FUZZ_EXAMPLES": str(options.examples),
    }  # fmt: skip
    begun = time.monotonic()
    if name == "soak":
        words = ["tests/reliability/soak.py", f"--minutes={options.minutes}",
                 f"--output={options.output.resolve()}"]  # fmt: skip
    else:
        # The harness and the tests' own subprocesses have limits; a part as a whole takes its time.
        words = ["-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider",
                 "-o", "faulthandler_timeout=0", "--timeout=0", *PARTS[name]]  # fmt: skip
    code = 0
    if moments > 0:
        code = subprocess.run([sys.executable, *words], cwd=ROOT, env=env).returncode
    minutes = before + (time.monotonic() - begun) / 60
    summary = {"passed": code == 0, "minutes": round(minutes, 1)}
    result.write_text(json.dumps(summary, indent=1) + "\n")


def known(options):
    """Part -> its result, of those that ran; one that was stopped shows what it came to."""
    found = {}
    for name in PARTS:
        path = options.output / f"{name}.json"
        checks = added(lines_of(path.with_suffix(".jsonl")))
        if path.exists():
            found[name] = {**json.loads(path.read_text()), "checks": checks}
        elif checks:
            found[name] = {"passed": False, "minutes": 0, "checks": checks}
    return found


def shown(value):
    if isinstance(value, dict):
        return " ".join(f"{name} {count}" for name, count in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(found):
    """The table as text."""
    lines = ["| what | tried | losses | more |", "|---|---:|---:|---|"]
    for part in found.values():
        for what, entry in part["checks"].items():
            more = {name: v for name, v in entry.items() if name not in ("tried", "losses")}
            said = ", ".join(f"{n.replace('_', ' ')} {shown(v)}" for n, v in more.items())
            lines.append(f"| {what} | {entry['tried']:g} | {entry['losses']} | {said} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "runs" / "reliability")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=30, help="of the soak")
    parser.add_argument("--moments", type=int, default=30, help="that each command is killed at")
    parser.add_argument("--examples", type=int, default=300, help="of everything that is drawn")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    chosen = [name for name in options.parts.split(",") if name]
    if wrong := set(chosen) - set(PARTS):
        parser.error(f"no part {wrong.pop()}; choose of {', '.join(PARTS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in [] if options.show else chosen:
        if not known(options).get(name, {}).get("passed"):
            print(f"--- {name}", flush=True)
            run(name, options)
    found = known(options)
    failed = [name for name, part in found.items() if not part["passed"]]
    missing = [name for name in PARTS if name not in found]
    lost = sum(entry["losses"] for part in found.values() for entry in part["checks"].values())
    text = (
        f"{markdown(found)}\n\nlosses: {lost}; parts that passed: {len(found) - len(failed)}; "
        f"failed or unfinished: {', '.join(failed) or 'none'}; not run: "
        f"{', '.join(missing) or 'none'}; {sum(p['minutes'] for p in found.values()):.0f} minutes"
    )
    (options.output / "reliability.md").write_text(text + "\n")
    print(text)
    return 1 if failed or missing or lost else 0


if __name__ == "__main__":
    sys.exit(main())
