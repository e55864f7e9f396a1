"""Measure how long it takes from `cachekit new-policy` to a project that is installed and whose tests pass.

`python -m benchmarks.new_projects --output FILE` writes a project of each kind, installs it without a network into a
folder of its own, and runs all its tests, as its README has it. The processor's seconds count all processes; unlike
the seconds by the clock they hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachekit.tools.bench.tables import markdown

RESULTS = Path(__file__).resolve().parent / "results"
#: Command and options of each kind of project.
KINDS = {
    "policy": ("new-policy",),
    "schedule": ("new-policy", "--schedule"),
    "stand-in": ("new-policy", "--stand-in"),
    "adapter": ("new-adapter",),
}
#: What is measured, in order.
STAGES = ("write", "install", "test")
_PIP = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "new-projects.json")
    parser.add_argument("--kind", action="append", choices=KINDS, help="kind of project; default: all")
    options = parser.parse_args()
    rows = []
    for kind in options.kind or KINDS:
        rows.append(measure(kind))
        print(rows[-1], flush=True)
    environment = {"python": platform.python_version(), "machine": platform.machine(), "processors": os.cpu_count()}
    options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


def measure(kind: str) -> dict[str, Any]:
    """Measure a new project of one kind, in seconds by the clock and of the processor; raises where a stage fails."""
    with tempfile.TemporaryDirectory() as name:
        here, folder = Path(name), Path(name) / "project"
        command, *flags = KINDS[kind]
        commands = {
            "write": [sys.executable, "-m", "cachekit", command, "fresh_one", *flags, "--output", str(folder)],
            "install": [sys.executable, "-m", "pip", "install", *_PIP, "--target", str(here / "site"), str(folder)],
            "test": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder / "tests")],
        }
        found = {stage: timed(commands[stage], here) for stage in STAGES}
        lines = sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))
    passed = re.search(r"(\d+) passed", found["test"].pop("printed"))
    figures = {stage: {key: found[stage][key] for key in ("seconds", "processor")} for stage in STAGES}
    return {"kind": kind, "lines": lines, "passed": int(passed[1]) if passed else 0, **figures}


def timed(command: Sequence[str], here: Path) -> dict[str, Any]:
    """Run a command with what was installed in the folder, and measure it."""
    path = os.pathsep.join([str(here / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    used, begun = _processor(), time.perf_counter()
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True)
    seconds, processor = time.perf_counter() - begun, _processor() - used
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"seconds": round(seconds, 2), "processor": round(processor, 2), "printed": done.stdout}


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table() -> str:
    """Table of the results."""
    file = RESULTS / "new-projects.json"
    if not file.exists():
        return ""
    rows = []
    for row in json.loads(file.read_text())["rows"]:
        clock, processor = (sum(row[stage][key] for stage in STAGES) for key in ("seconds", "processor"))
        parts = [f"{row[stage]['processor']:.1f}" for stage in STAGES]
        rows.append([row["kind"], f"{row['lines']}", f"{row['passed']}", *parts, f"{processor:.0f}", f"{clock:.0f}"])
    stages = ["write it", "install it", "its tests"]
    header = ["project", "lines of Python", "tests passed", *stages, "together", "together, by the clock"]
    return markdown(header, rows)


if __name__ == "__main__":
    main()
