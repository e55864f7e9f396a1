"""Run a pipeline hundreds of times in changing ways, and check that nothing grows and no image is wrong.

`python -m benchmarks.soak --runs 300 --output FILE` changes policies, scheduler, size, batch, steps and guidance from
run to run, breaks some runs, pauses others, and compares every image with the first one generated in the same way.
Then two threads run two pipelines over one denoiser, and every image is compared with the one generated alone.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch

import cachekit
from cachekit.attaching.lookup import attachment_of
from cachekit.models.demo import heldout_captions
from cachekit.testing.models import twin

SPECS: tuple[tuple[str, ...], ...] = (
    ("tgate:m=2",),
    ("tgate:m=3,sp_interval=2,fi_interval=2,warm_up=1",),
    ("deepcache:interval=2",),
    ("deepcache:interval=3,branch=1", "adaptive_guidance:m=2,linear=true"),
    ("tgate:m=3", "deepcache:interval=2"),
    ("tgate:m=3", "deepcache:interval=2", "adaptive_guidance:threshold=0.99"),
    ("null_text:before=1",),
)
SCHEDULERS = ("DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep")
#: One run in so many is broken by an exception, pauses its policies, or follows a new `apply`.
BROKEN_EVERY, PAUSED_EVERY, APPLIED_EVERY = 5, 7, 4


@dataclass(frozen=True)
class Way:
    """All settings of a run."""

    specs: tuple[str, ...]
    scheduler: str
    height: int
    batch: int
    steps: int
    guidance: float
    seed: int


class PlantedError(Exception):
    """Raised on purpose to break a run."""


def main() -> None:
    """Parse the command line, soak, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--ways", type=int, default=24, help="different settings of runs")
    parser.add_argument("--thread-runs", type=int, default=50, help="runs of each of the two threads")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/soak.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("cachekit").setLevel(logging.ERROR)  # in so few steps some policies never fire
    results = {"soak": soak(options.runs, options.ways), "threads": in_threads(options.thread_runs)}
    for name, figures in results.items():
        print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in figures.items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


class Runner:
    """Runs one pipeline in any way."""

    def __init__(self, pipe: Any) -> None:
        """Silence `pipe`, and store its scheduler's settings, from which every other scheduler is made."""
        self.pipe = pipe
        self.settings = pipe.scheduler.config
        pipe.set_progress_bar_config(disable=True)

    def attach(self, specs: tuple[str, ...]) -> None:
        """Apply exactly these policies."""
        present = attachment_of(self.pipe.unet)
        if present is None or tuple(map(str, present.policies)) != specs:
            cachekit.remove(self.pipe)
            if specs:
                cachekit.apply(self.pipe, specs)

    def run(self, way: Way, **more: Any) -> str:
        """Digest the images of a run: the same for images that are equal to the bit."""
        scheduler = getattr(diffusers, f"{way.scheduler}Scheduler")
        if type(self.pipe.scheduler) is not scheduler:
            self.pipe.scheduler = scheduler.from_config(self.settings)
        images = self.pipe(
            heldout_captions(way.batch, seed=0),
            height=way.height,
            num_inference_steps=way.steps,
            guidance_scale=way.guidance,
            generator=torch.Generator().manual_seed(way.seed),
            output_type="pt",
            **more,
        ).images
        return hashlib.sha256(images.numpy().tobytes()).hexdigest()

    def run_paused(self, way: Way) -> str:
        """Digest the images of a run while the policies are paused."""
        attachment = attachment_of(self.pipe.unet)
        assert attachment is not None
        with attachment.paused():
            return self.run(way)

    def run_broken(self, way: Way, step: int) -> None:
        """Start a run that an exception ends after `step`."""

        def fail(pipe: Any, now: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            if now == step:
                raise PlantedError
            return given

        try:
            self.run(way, callback_on_step_end=fail)
        except PlantedError:
            return
        raise AssertionError(f"the fault at step {step} did not break {way}")


def soak(runs: int, ways: int) -> dict[str, int]:
    """Count the wrong images of `runs` runs in `ways` ways, and what the runs left behind."""
    chance, runner = random.Random(0), Runner(cachekit.demo_pipeline())
    untouched = _outside(runner.pipe)
    known = [_way(number, chance) for number in range(ways)]
    # The first run of each way allocates what later runs reuse, which is no growth.
    expected = {way: _first(runner, way) for way in [*known, *map(_plain, known)]}
    first, start = _rested(runner, known[0])
    counts = dict.fromkeys(("faults", "paused", "lost"), 0)
    for number in range(runs):
        way = chance.choice(known)
        if number % APPLIED_EVERY == 0:
            cachekit.remove(runner.pipe)
        runner.attach(way.specs)
        if number % BROKEN_EVERY == 0:
            runner.run_broken(replace(way, seed=ways), chance.randrange(way.steps))
            counts["faults"] += 1
        if number % PAUSED_EVERY == 0:
            counts["lost"] += runner.run_paused(way) != expected[_plain(way)]
            counts["paused"] += 1
        else:
            counts["lost"] += runner.run(way) != expected[way]
    last, end = _rested(runner, known[0])
    counts["lost"] += last != first
    left = sum(was != now for was, now in zip(untouched, _outside(runner.pipe)))
    figures = {f"{key}_{when}": figure[key] for key in start for when, figure in (("start", start), ("end", end))}
    return {"runs": runs, "ways": ways, **counts, "modules_changed": left, **figures}


def _rested(runner: Runner, way: Way) -> tuple[str, dict[str, int]]:
    """Digest one image, then remove the policies and measure the memory."""
    found = _first(runner, way)
    runner.attach(())
    return found, memory()


def _outside(pipe: Any) -> list[Any]:
    """Record what an attachment could change on each module: its class, and the names of its attributes."""
    return [(type(module), set(vars(module))) for module in pipe.unet.modules()]


def memory() -> dict[str, int]:
    """Measure the bytes of the process and count the tensors alive."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return {"bytes": psutil.Process().memory_info().rss, "tensors": tensors}


def _way(number: int, chance: random.Random) -> Way:
    return Way(
        specs=SPECS[number % len(SPECS)],
        scheduler=SCHEDULERS[number % len(SCHEDULERS)],
        height=chance.choice((32, 48, 64)),
        batch=chance.choice((1, 1, 2)),
        steps=chance.choice((3, 4)),
        guidance=chance.choice((1.0, 3.5, 3.5)),
        seed=number,
    )


def _plain(way: Way) -> Way:
    return replace(way, specs=())


def _first(runner: Runner, way: Way) -> str:
    runner.attach(way.specs)
    return runner.run(way)


def in_threads(runs: int) -> dict[str, int]:
    """Count the images of two threads over one denoiser that differ from those generated alone."""
    chance, first = random.Random(1), cachekit.demo_pipeline()
    runners = (Runner(first), Runner(twin(first)))
    todo = [[_way(number, chance) for number in range(runs)] for _ in runners]
    runners[0].attach(SPECS[4])
    alone = list(map(_run_all, runners, todo))
    with ThreadPoolExecutor(len(runners), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(_run_all, runners, todo))
    pairs = [(one, other) for alike in zip(alone, together) for one, other in zip(*alike)]
    return {"threads": len(runners), "runs_each": runs, "lost": sum(one != other for one, other in pairs)}


def _run_all(runner: Runner, ways: list[Way]) -> list[str]:
    return [runner.run(way) for way in ways]


if __name__ == "__main__":
    main()
