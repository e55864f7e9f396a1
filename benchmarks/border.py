"""Measure what it costs to check what policies return: `python -m benchmarks.border`.

Runs of the embedded models alternate: with the checks, without them, and without them again, whose ratio to the second
is noise. Beside the ratio of the medians, the seconds within the checks are measured as a share of a run's.
`python -m benchmarks.readme` writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

import cachekit
from cachekit.models.demo import DEMO_GUIDANCE, DEMO_STEPS, heldout_captions
from cachekit.runs import border, call, run
from cachekit.tools.bench.tables import markdown

from .calibrations import MODELS
from .overhead import MALLOC

RESULTS = Path(__file__).parent / "results" / "border.json"
#: One output predicted in a step, and one of every layer: reused as it is, and extrapolated, which has most to check.
SPECS = ("forecast", "fora:interval=3", "taylorseer:interval=3")
#: What the table calls the ratios.
COLUMNS = {
    "wall": "wall time with checks / without",
    "wall_noise": "without / without",
    "cpu": "CPU time with / without",
    "cpu_noise": "without / without",
}
#: Seconds of wall and of CPU.
Times = tuple[float, float]


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    if MALLOC.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.border", *sys.argv[1:]], {**os.environ, **MALLOC})
    torch.set_num_threads(2)
    rows = []
    for kind in MODELS:
        pipe = cachekit.demo_pipeline(kind)
        pipe.set_progress_bar_config(disable=True)
        for spec in SPECS:
            rows.append({"model": kind, "spec": spec, **measured(pipe, spec, options.rounds)})
            print({name: value for name, value in rows[-1].items() if name != "times"}, flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def measured(pipe: Any, spec: str, rounds: int) -> dict[str, Any]:
    """Time runs in turns: ratios of the medians, by wall and by CPU, and the share of the checks in a run."""
    times: list[list[Times]] = [[], [], []]
    shares = []
    with cachekit.apply(pipe, spec):
        draw(pipe)
        for round_ in range(rounds):
            for place in range(3):
                contender = (place + round_) % 3
                with without_checks() if contender else checked():
                    times[contender].append(draw(pipe))
            with timed_checks() as spent:
                whole, _ = draw(pipe)
            shares.append(sum(spent) / whole)
    found: dict[str, Any] = {"share": median(shares), "times": times}
    for kind, name in enumerate(("wall", "cpu")):
        checks, none, again = (median(each[kind] for each in contender) for contender in times)
        found |= {name: checks / none, f"{name}_noise": again / none}
    return found


def draw(pipe: Any) -> Times:
    """Run a pipeline, and get the seconds of wall and CPU."""
    given = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    wall, cpu = time.perf_counter(), time.process_time()
    pipe(heldout_captions(1)[0], num_inference_steps=DEMO_STEPS, guidance_scale=DEMO_GUIDANCE, **given)
    return round(time.perf_counter() - wall, 5), round(time.process_time() - cpu, 5)


@contextmanager
def checked() -> Iterator[None]:
    """Leave the checks as they are."""
    yield


@contextmanager
def without_checks() -> Iterator[None]:
    """Take what the parts of policies return as it is."""
    with (
        patch.object(call, "like_kept", lambda bound, method, at, made, kept: made),
        patch.object(call, "asked", lambda bound, method, at, ask, *given: ask(*given)),
        patch.object(run, "asked", lambda bound, method, at, ask, *given: ask(*given)),
        patch.object(run, "agreed_action", lambda bound, method, at, action: action),
    ):
        yield


@contextmanager
def timed_checks() -> Iterator[list[float]]:
    """Note the seconds within the checks of what is predicted, in a list."""
    spent: list[float] = []

    def timed(check: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*given: Any) -> Any:
            begun = time.perf_counter()
            made = check(*given)
            spent.append(time.perf_counter() - begun)
            return made

        return timing

    with patch.object(call, "like_kept", timed(border.like_kept)):
        yield spent


def table() -> str:
    """Table of the results."""
    if not RESULTS.exists():
        return ""
    rows = [
        [row["model"], f"`{row['spec']}`", *(f"{row[name]:.4f}" for name in COLUMNS), f"{row['share']:.6f}"]
        for row in json.loads(RESULTS.read_text())
    ]
    header = ["model", "policy", *COLUMNS.values(), "share of a run in checks"]
    return markdown(header, rows, left=2)


if __name__ == "__main__":
    main()
