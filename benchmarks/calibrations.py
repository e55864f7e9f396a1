"""Make the calibrations of the embedded models that ship: python -m benchmarks.calibrations.

Calibrates on captions of scenes that the models may have been trained on, so that those held out stay for measuring.
Then measures each on held-out captions, beside the linear forecast and plain steps of equal cost with every spacing,
and adds the figures to results/calibrations.json, which keeps those that it has: remove it where they are outdated.
`--measure` leaves the calibrations as they are; `--make KIND SCHEDULER INTERVAL` makes one and measures nothing;
`--add SCALE` adds weights for one more guidance scale to each. `python -m benchmarks.readme` writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

import cachekit
from cachekit.models.demo import heldout_captions
from cachekit.models.demo.scenes import caption, scenes
from cachekit.models.loading import scheduler_for
from cachekit.tools.bench.tables import markdown
from cachekit.tools.calibrating.calibration import FOLDER, Calibration, path_of
from cachekit.tools.calibrating.verifying import psnr

from .nearness import OWN, best_of, images, plain_steps

STEPS = 25
INTERVALS = (2, 3, 4, 5, 6)
#: Those that the models are measured at, and the default of Stable Diffusion; the 7 of SD3 lies between.
GUIDANCE = (3.5, 5.0, 7.5)
SCHEDULERS = ("euler", "dpm++")
PROMPTS = 16
TIMES = Path(__file__).parent / "results" / "calibration-times.json"
RESULTS = Path(__file__).parent / "results" / "calibrations.json"
#: What tables call models and schedulers.
NAMES = {"unet": "UNet", "dit": "transformer", "flow": "flow model", "lcm": "LCM", "euler": "Euler", "dpm++": "DPM++"}
#: The models that have calibrations; few steps leave nothing to forecast.
MODELS = ("unet", "dit", "flow")
#: The models with schedulers that they take.
PAIRS = [pair for pair in product(MODELS, SCHEDULERS) if pair != ("flow", "dpm++")]


def captions() -> list[str]:
    """Captions of scenes that aren't held out."""
    return [caption(scene) for scene in islice(scenes(np.random.default_rng(11), heldout=False), PROMPTS)]


def pipelines() -> Iterator[tuple[str, str, Any]]:
    """Yield kind of model, scheduler and pipeline."""
    for kind, scheduler in PAIRS:
        yield kind, scheduler, _pipeline(kind, scheduler)


def _pipeline(kind: str, scheduler: str) -> Any:
    pipe = cachekit.demo_pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_for(pipe, scheduler)
    return pipe


def make(kind: str, scheduler: str, interval: int, scales: tuple[float, ...] = GUIDANCE) -> None:
    """Make one file, or add weights for other guidance scales to it."""
    FOLDER.mkdir(exist_ok=True)
    begun = time.perf_counter()
    made = cachekit.calibrate(
        _pipeline(kind, scheduler),
        f"calibrated:interval={interval}",
        captions(),
        num_inference_steps=STEPS,
        guidance_scale=scales,
    )
    file = path_of(made.key)
    if scales != GUIDANCE:
        held = Calibration.load(file)
        kept = [fit for fit in held.fits if fit.guidance not in scales]
        made = Calibration.merge(held.model_copy(update={"fits": kept}), made)
    made.save(file)
    print(f"{file.name}: {kind}, {scheduler}, {time.perf_counter() - begun:.1f} s", flush=True)


def measure(count: int = 12) -> None:
    """Measure PSNR in dB to uncached images, medians over held-out captions; rows that are stored stay."""
    prompts = heldout_captions(count, seed=77)
    for (kind, scheduler, pipe), scale in product(pipelines(), GUIDANCE):
        draw = partial(_images, pipe, prompts, scale)
        uncached = cache(draw)
        for interval in INTERVALS:
            row = {"model": kind, "scheduler": scheduler, "guidance": scale, "interval": interval}
            if not any(row.items() <= other.items() for other in stored()):
                row |= compared(pipe, interval, uncached(STEPS), draw)
                RESULTS.write_text(json.dumps([*stored(), row], indent=1) + "\n")
                print(row, flush=True)


def time_each() -> None:
    """Time the calibration of one interval at one guidance scale on each model."""
    rows = []
    for kind in MODELS:
        pipe, prompts = _pipeline(kind, "euler"), captions()
        begun = time.perf_counter()
        cachekit.calibrate(
            pipe, "calibrated:interval=4", prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE[0]
        )
        rows.append({"model": kind, "seconds": round(time.perf_counter() - begun, 1), "prompts": len(prompts)})
        print(rows[-1], flush=True)
    TIMES.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")


def times() -> str:
    """Sentence on how long a calibration takes; empty where that was not timed."""
    if not TIMES.exists():
        return ""
    found = json.loads(TIMES.read_text())
    spans = ", ".join(f"{row['seconds']:.0f} s on the {NAMES[row['model']]}" for row in found["rows"])
    return f"One calibration with {found['rows'][0]['prompts']} prompts took {spans}, on {found['cores']} cores."


def _images(pipe: Any, prompts: list[str], scale: float, steps: int = STEPS, **table: Any) -> np.ndarray:
    return images(pipe, prompts, steps, scale, **table)


def compared(pipe: Any, interval: int, uncached: np.ndarray, draw: Callable[..., np.ndarray]) -> dict[str, Any]:
    """Compare the forecasts of one interval, and plain steps of equal cost, with the uncached images."""
    found: dict[str, Any] = {}
    for name in ("calibrated", "forecast"):
        with cachekit.apply(pipe, f"{name}:interval={interval}") as attachment:
            found[name] = round(psnr(draw(), uncached), 1)
            full = attachment.plan(STEPS).full(0)
    plain = {name: round(value, 1) for name, value in plain_steps(pipe, full, STEPS, uncached, draw).items()}
    return {**found, "calls": len(full), "plain": plain}


def stored() -> list[dict[str, Any]]:
    """Read the results, sorted as they are measured."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    order = PAIRS
    return sorted(
        found, key=lambda row: (order.index((row["model"], row["scheduler"])), row["guidance"], row["interval"])
    )


def table() -> str:
    """Table of the results, and in how many rows the calibrations are nearest."""
    header = ["model", "scheduler", "guidance", "interval", "calls", "plain steps", "best spaced", "spacing",
              "`forecast`", "`calibrated`"]  # fmt: skip
    rows = []
    for row in stored():
        best, spacing = best_of(row["plain"])
        figures = [row["plain"][OWN], best, spacing, row["forecast"], row["calibrated"]]
        where = [NAMES[row["model"]], NAMES[row["scheduler"]], f"{row['guidance']:g}", row["interval"], row["calls"]]
        rows.append([str(value) for value in (*where, *figures)])
    return f"{markdown(header, rows, left=2)}\n{_counted(stored())}" if rows else ""


def _counted(rows: list[dict[str, Any]]) -> str:
    plain = sum(row["calibrated"] > best_of(row["plain"])[0] for row in rows)
    line = sum(row["calibrated"] > row["forecast"] for row in rows)
    return (
        f"`calibrated` is nearer than the best spaced plain steps in {plain} of {len(rows)} rows, and than `forecast`"
        f" in {line}."
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="leave the calibrations as they are")
    parser.add_argument("--time", action="store_true", help="only time one calibration of each model")
    parser.add_argument("--make", nargs=3, metavar=("KIND", "SCHEDULER", "INTERVAL"), help="make one, measure nothing")
    parser.add_argument("--add", type=float, metavar="SCALE", help="add weights for this guidance scale to each file")
    options = parser.parse_args()
    if options.time:
        time_each()
    elif options.make:
        kind, scheduler, interval = options.make
        make(kind, scheduler, int(interval))
    else:
        for (kind, scheduler), interval in product(PAIRS, INTERVALS if not options.measure else ()):
            make(kind, scheduler, interval, (options.add,) if options.add else GUIDANCE)
        measure()


if __name__ == "__main__":
    main()
