"""Make the calibrations of the embedded models that ship: python -m benchmarks.calibrations.

Calibrates on captions of scenes that the models may have been trained on, so that those held out stay for measuring.
Then measures each on held-out captions, beside the linear forecast and plain steps of equal cost, and writes the
figures to results/calibrations.json and the table in docs/calibrating.md. `--measure` leaves the files as they are, and
`--table` the figures too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

import cachekit
from cachekit.calibrating.calibration import FOLDER, path_of
from cachekit.calibrating.verifying import psnr
from cachekit.models.demo import call_arguments, heldout_captions
from cachekit.models.demo.pipeline import PIPELINES
from cachekit.models.demo.scenes import caption, scenes
from cachekit.models.loading import scheduler_for

STEPS = 25
INTERVALS = (2, 3, 4, 5, 6)
GUIDANCE = (3.5, 5.0)
SCHEDULERS = ("euler", "dpm++")
PROMPTS = 16
RESULTS = Path(__file__).parent / "results" / "calibrations.json"
PAGE = Path(__file__).parents[1] / "docs" / "calibrating.md"
BEGIN, END = "<!-- calibrations: begin -->", "<!-- calibrations: end -->"


def captions() -> list[str]:
    """Captions of scenes that aren't held out."""
    return [caption(scene) for scene in islice(scenes(np.random.default_rng(11), heldout=False), PROMPTS)]


def pipelines() -> Iterator[tuple[str, str, Any]]:
    """Yield kind of model, scheduler and pipeline."""
    for kind, scheduler in product(PIPELINES, SCHEDULERS):
        pipe = cachekit.demo_pipeline(kind)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler_for(pipe, scheduler)
        yield kind, scheduler, pipe


def make() -> None:
    """Make all files."""
    FOLDER.mkdir(exist_ok=True)
    for kind, scheduler, pipe in pipelines():
        for interval in INTERVALS:
            begun = time.perf_counter()
            made = cachekit.calibrate(
                pipe,
                f"calibrated:interval={interval}",
                captions(),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                **call_arguments(pipe),
            )
            made.save(path_of(made.key))
            print(f"{path_of(made.key).name}: {kind}, {scheduler}, {time.perf_counter() - begun:.1f} s", flush=True)


def images(pipe: Any, prompts: list[str], steps: int, scale: float) -> np.ndarray:
    """Draw all prompts in one batch, `(prompts, height, width, channels)` with values from 0 to 1."""
    import torch

    noise = [torch.Generator().manual_seed(9000 + place) for place in range(len(prompts))]
    given = {"num_inference_steps": steps, "guidance_scale": scale, "generator": noise, "output_type": "np"}
    found: np.ndarray = pipe(prompts, **given, **call_arguments(pipe)).images
    return found


def measure(count: int = 12) -> list[dict[str, Any]]:
    """Measure PSNR in dB to uncached images, medians over held-out captions."""
    prompts, rows = heldout_captions(count, seed=77), []
    for (kind, scheduler, pipe), scale in product(pipelines(), GUIDANCE):
        uncached = images(pipe, prompts, STEPS, scale)
        for interval in INTERVALS:
            found = {}
            for name in ("calibrated", "forecast"):
                with cachekit.apply(pipe, f"{name}:interval={interval}") as attachment:
                    found[name] = round(psnr(images(pipe, prompts, STEPS, scale), uncached), 1)
                    calls = attachment.report().calls
            found["plain"] = round(psnr(images(pipe, prompts, calls, scale), uncached), 1)
            rows.append(
                {
                    "model": kind,
                    "scheduler": scheduler,
                    "guidance": scale,
                    "interval": interval,
                    "calls": calls,
                    **found,
                }
            )
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Write figures as a table in Markdown."""
    names = {"unet": "UNet", "dit": "transformer", "euler": "Euler", "dpm++": "DPM++"}
    lines = [
        "| model | scheduler | guidance | interval | calls | plain steps | `forecast` | `calibrated` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        where = [names[row["model"]], names[row["scheduler"]], f"{row['guidance']:g}"]
        figures = [row[name] for name in ("interval", "calls", "plain", "forecast", "calibrated")]
        lines.append(f"| {' | '.join(map(str, [*where, *figures]))} |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]]) -> None:
    """Put the table between its marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    if not {"--measure", "--table"} & {*sys.argv}:
        make()
    if "--table" not in sys.argv:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    write(json.loads(RESULTS.read_text()))
