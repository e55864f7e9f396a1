"""Measure how long it takes to enter a `using` block on a denoiser as large as that of Stable Diffusion XL.

`python -m benchmarks.using --output FILE` enters blocks with a spec that acts on places without a switch yet, with
other settings of it, and with a spec that an earlier block had. The denoiser is on the meta device, since nothing runs
between; each round attaches anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cachekit
from cachekit.models.architectures import architecture
from cachekit.tools.bench.tables import markdown

MODEL, APPLIED = "sdxl", "forecast:interval=2"
RESULTS = Path(__file__).resolve().parent / "results"
#: What is measured of a spec, in milliseconds, and the heading of its column.
KINDS = {"new": "new", "changed": "new, on places with a switch", "known": "used before"}


@dataclass(frozen=True)
class Spec:
    """A spec, the same policy with other settings, and its name in the table."""

    text: str
    other: str
    name: str = ""


CURVES = f"file={RESULTS / 'smoothcache-demo.json'}"
SPECS = (
    Spec("forecast:interval=4", "forecast:interval=5"),
    Spec("deepcache:interval=3", "deepcache:interval=4"),
    Spec("tgate:m=10", "tgate:m=12"),
    Spec("tgate:m=10,sp_interval=3,fi_interval=2,warm_up=2", "tgate:m=12,sp_interval=2,fi_interval=3,warm_up=1"),
    Spec(f"smoothcache:{CURVES}", f"smoothcache:threshold=0.2,{CURVES}", "smoothcache, with a file"),
)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=RESULTS / "using.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = architecture(MODEL).build()
    rows = [measure(denoiser, spec, options.rounds) for spec in SPECS]
    for row in rows:
        print(
            row["spec"], *(f"{kind} {row[kind]['median']:.3f} ({row[kind]['max']:.3f})" for kind in KINDS), flush=True
        )
    environment = {"torch": torch.__version__, "python": platform.python_version(), "processors": os.cpu_count()}
    found = {"model": MODEL, "applied": APPLIED, "rounds": options.rounds, "environment": environment, "rows": rows}
    options.output.write_text(json.dumps(found, indent=1) + "\n")


def measure(denoiser: Any, spec: Spec, rounds: int) -> dict[str, Any]:
    """Measure the milliseconds to enter blocks with a spec; the first round prepares, and doesn't count."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds + 1):
        with cachekit.apply(denoiser, APPLIED) as attachment:
            for kind, text in zip(KINDS, (spec.text, spec.other, spec.text)):
                times[kind].append(entered(attachment, text))
    counted = {kind: found[1:] for kind, found in times.items()}
    with cachekit.apply(denoiser, spec.text) as attachment:
        places = len(attachment.setup.assignments)
    figures = {kind: {"median": median(found), "max": max(found)} for kind, found in counted.items()}
    return {"spec": spec.name or spec.text, "places": places, **figures}


def entered(attachment: Any, text: str) -> float:
    """Enter a block and leave it; the milliseconds until it is entered."""
    begun = time.perf_counter()
    with attachment.using(text):
        return (time.perf_counter() - begun) * 1e3


def table() -> str:
    """Table of the results."""
    file = RESULTS / "using.json"
    if not file.exists():
        return ""
    rows = [
        [
            f"`{row['spec']}`",
            f"{row['places']}",
            *(f"{row[kind]['median']:.2f} / {row[kind]['max']:.2f}" for kind in KINDS),
        ]
        for row in json.loads(file.read_text())["rows"]
    ]
    return markdown(["spec", "places", *KINDS.values()], rows)


if __name__ == "__main__":
    main()
