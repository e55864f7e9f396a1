"""Measure how often an embedded model's images match held-out captions, and write figures.json.

A row is a sampler, a number of steps and a guidance scale, with the share of captions that are matched in full, its
standard error, and the share of each aspect. `python -m benchmarks.train.evaluate` measures all rows; `--table` prints
those measured before as Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from cachekit.models.demo import DEMO_GUIDANCE, DEMO_STEPS, heldout_captions
from cachekit.models.demo.checker import Verdict, shows
from cachekit.models.demo.pipeline import WEIGHTS, load_pipeline

from .autoencoder import reconstruction

BATCH = 25
STRICT_FIT = 0.86
SEED = 1
SCHEDULERS = {"DDIM": DDIMScheduler, "Euler": EulerDiscreteScheduler}
#: What tables call the schedulers that the models have of their own.
OWN, FLOW, LCM = "DPM++", "flow Euler", "LCM"


@dataclass(frozen=True)
class Row:
    """One setting to measure on `n` captions; without `text` the captions are replaced by empty ones."""

    sampler: str
    steps: int
    guidance: float
    text: bool
    n: int


def rows(headline: int, others: int, own: str) -> list[Row]:
    """List the settings of the published table; the first ones are measured on more captions."""
    if own == LCM:
        several = [Row(own, steps, DEMO_GUIDANCE, True, others) for steps in (1, 2, 3, 8)]
        return [Row(own, 4, DEMO_GUIDANCE, True, headline), *several, Row(own, 4, DEMO_GUIDANCE, False, others)]
    main = [Row(own, steps, DEMO_GUIDANCE, True, headline) for steps in (DEMO_STEPS, 8)]
    plain = [
        Row(own, DEMO_STEPS, 1.0, True, headline),
        Row(own, DEMO_STEPS, DEMO_GUIDANCE, False, others),
    ]
    steps = [Row(own, steps, DEMO_GUIDANCE, True, others) for steps in (5, 12, 50)]
    names = SCHEDULERS if own == OWN else ()
    other = [Row(name, steps, DEMO_GUIDANCE, True, others) for name in names for steps in (8, DEMO_STEPS)]
    return main + plain + steps + other


def sample(pipe: Any, captions: list[str], steps: int, guidance: float, seed: int) -> Iterator[Any]:
    """Generate a 64 x 64 x 3 image in [0, 1] per caption, in batches, each image from its own seed."""
    batch = BATCH if pipe.device.type == "cpu" else 10 * BATCH
    for start in range(0, len(captions), batch):
        chunk = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(1000 * seed + start + index) for index in range(len(chunk))]
        settings: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "output_type": "np",
        }
        yield from pipe(chunk, generator=generators, **settings).images


def _aspects(verdicts: list[Verdict]) -> dict[str, float]:
    return {name: float(np.mean([getattr(verdict, name) for verdict in verdicts])) for name in vars(verdicts[0])}


def measure(pipe: Any, row: Row, seed: int = SEED) -> dict[str, Any]:
    """Measure one row: its settings, and the shares of captions and aspects that are matched."""
    captions = heldout_captions(row.n, seed)
    prompts = captions if row.text else [""] * row.n
    torch.set_num_threads(1)
    images = list(sample(pipe, prompts, row.steps, row.guidance, seed))
    strict = [bool(shows(image, text, STRICT_FIT)) for image, text in zip(images, captions, strict=True)]
    verdicts = [shows(image, text) for image, text in zip(images, captions, strict=True)]
    shown = float(np.mean([bool(verdict) for verdict in verdicts]))
    error = float(np.sqrt(shown * (1 - shown) / row.n))
    return asdict(row) | {
        "shown": shown,
        "error": error,
        "shown_strict": float(np.mean(strict)),
        "aspects": _aspects(verdicts),
    }


def prepare(folder: Path, sampler: str, device: str = "cpu") -> Any:
    """Load the model in `folder` with a scheduler of `SCHEDULERS`, or else its own."""
    pipe = load_pipeline(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    if sampler in SCHEDULERS:
        pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    return pipe


def table(measured: list[dict[str, Any]]) -> str:
    """Format measured rows as a Markdown table."""
    lines = [
        f"| sampler | steps | guidance | text | n | caption match | with fit {STRICT_FIT} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        shown = f"{100 * row['shown']:.1f} ± {100 * row['error']:.1f} %"
        text = "caption" if row["text"] else "empty"
        cells = (
            row["sampler"],
            row["steps"],
            row["guidance"],
            text,
            row["n"],
            shown,
            f"{100 * row['shown_strict']:.1f} %",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def measure_row(task: tuple[Path, Row, str]) -> dict[str, Any]:
    """Load the model in a folder onto a device, and measure one row."""
    folder, row, device = task
    return measure(prepare(folder, row.sampler, device), row)


def stored(folder: Path) -> list[dict[str, Any]]:
    """Read the rows measured before."""
    path = folder / "figures.json"
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def is_stored(row: Row, measured: list[dict[str, Any]]) -> bool:
    """Whether the same setting was measured before, on any number of captions."""
    same = ("sampler", "steps", "guidance", "text")
    return any(all(other[name] == getattr(row, name) for name in same) for other in measured)


def evaluate(folder: Path, headline: int, others: int, processes: int, resumed: bool, device: str) -> None:
    """Measure every row, or where `resumed` those that are missing, and write figures.json after each one."""
    measured = stored(folder) if resumed else []
    figures: dict[str, Any] = {"seed": SEED, "rows": measured}
    if (folder / "vae").is_dir():
        figures["reconstruction"] = reconstruction(load_pipeline(folder).vae)
    names = {"FlowMatchEulerDiscreteScheduler": FLOW, "LCMScheduler": LCM}
    own = names.get(type(load_pipeline(folder).scheduler).__name__, OWN)
    tasks = [(folder, row, device) for row in rows(headline, others, own) if not is_stored(row, measured)]
    with get_context("spawn").Pool(processes) as pool:
        for row in pool.imap(measure_row, tasks, chunksize=1):
            measured.append(row)
            (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
            print(table([row]).splitlines()[-1], flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=WEIGHTS / "unet")
    parser.add_argument("--headline", type=int, default=1000, help="captions for the first rows")
    parser.add_argument("--others", type=int, default=300, help="captions for the other rows")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--resume", action="store_true", help="only measure what is missing; the model must be the same"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="print the figures that were measured before")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads((options.folder / "figures.json").read_text())["rows"]))
    else:
        evaluate(options.folder, options.headline, options.others, options.processes, options.resume, options.device)


if __name__ == "__main__":
    main()
