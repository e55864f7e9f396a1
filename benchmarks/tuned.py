"""Tune the embedded models for two targets each: `python -m benchmarks.tuned [MODEL ...]`.

Each is a `cachekit tune` command with two processes; the second target of a model goes on with the study of the first.
Nothing else should run meanwhile. Tunings that the results hold aren't repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from cachekit.cli import app
from cachekit.models.demo import demo_steps
from cachekit.tools.bench.cells import spelled
from cachekit.tools.bench.tables import markdown

from .ship import RESULTS

MODELS = ("demo", "demo-dit", "demo-flow", "demo-lcm")
TARGETS = {"--caption-match": "-1%", "--at-least": "35dB"}
#: Captions of the verdict on each target: for captions, one is a point.
FRESH = {"--caption-match": 100, "--at-least": 32}
RESULT = RESULTS / "tuned.json"
_FOUND = ["found", "MAC reduction", "speedup", "PSNR", "caption match"]
_FOUND += ["plain steps beside it", "their speedup", "PSNR", "caption match"]


def main() -> None:
    """Parse the command line and tune what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all, one after the other")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for model, target in product(options.models or MODELS, TARGETS):
            if not any((row["model"], row["target"]) == (model, TARGETS[target]) for row in stored()):
                tune(model, target, Path(folder))


def tune(model: str, target: str, folder: Path) -> None:
    """Tune a model for a target, and add a row."""
    folder = folder / model
    folder.mkdir(exist_ok=True)
    data, begun = folder / "data.json", time.perf_counter()
    given = [target, TARGETS[target], "--fresh", f"{FRESH[target]}", "--steps", f"{demo_steps(model)}"]
    given += ["--executor", "process", "--workers", "2"]
    files = {"journal": folder / "study.log", "output": folder / "preset.json", "json": data}
    written = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    app(["tune", model, *given, *written], standalone_mode=False)
    add(model, TARGETS[target], json.loads(data.read_text()), time.perf_counter() - begun)


def add(model: str, target: str, data: dict[str, Any], seconds: float) -> None:
    """Add what a tuning has found to the results."""
    found = {name: data[name] for name in ("preset", "rival", "nearest")}
    row = {"model": model, "target": target, "seconds": round(seconds), **found}
    RESULT.write_text(json.dumps([*stored(), row], indent=1) + "\n")


def stored() -> list[dict[str, Any]]:
    """Read the results."""
    found: list[dict[str, Any]] = json.loads(RESULT.read_text()) if RESULT.exists() else []
    return found


def table() -> str:
    """Table of the tunings: what was asked, found, and beside it; empty without results."""
    rows = [[*_row(row), f"{row['seconds'] / 60:.0f}"] for row in stored()]
    missed = [f"`{row['model']}`, {row['nearest']}." for row in stored() if row.get("nearest")]
    header = ["model", "target", *_FOUND, "minutes"]
    return "\n\n".join([markdown(header, rows, left=3).rstrip(), *missed]) + "\n" if rows else ""


def _row(row: dict[str, Any]) -> list[str]:
    option = next(name for name, target in TARGETS.items() if target == row["target"])
    asked = [row["model"], f"`{option} {row['target']}`"]
    if not row["preset"]:
        return [*asked, "no cached candidate", *["-"] * 4, *_beside(row["rival"])]
    evidence = row["preset"]["evidence"]
    own, steps = evidence["figures"], evidence["steps"]
    others = "" if steps == evidence["reference_steps"] else f", {steps} steps"
    cost = [f"{own['mac_reduction']:.2f}x", f"{own['speedup']:.2f}x"]
    specs = f"`{' + '.join(row['preset']['specs'])}`{others}"
    return [*asked, specs, *cost, *_quality(own), *_beside(evidence["plain"])]


def _beside(plain: dict[str, Any] | None) -> list[str]:
    if not plain:
        return ["-"] * 4
    steps = f"{plain['steps']}, {spelled(plain['spacing'])}" if plain["spacing"] else f"{plain['steps']}"
    return [steps, f"{plain['figures']['speedup']:.2f}x", *_quality(plain["figures"])]


def _quality(figures: dict[str, Any]) -> list[str]:
    psnr = "identical" if figures["psnr"] is None else f"{figures['psnr']:.1f}"
    return [psnr, f"{figures['caption_match']:.0%} (n={figures['images']})"]


if __name__ == "__main__":
    main()
