"""Run a pipeline hundreds of times in changing ways, and see that nothing grows and no image is lost.

`python -m benchmarks.soak --runs 300 --output FILE` changes policies, scheduler, size, batch, steps and guidance from
run to run, breaks some runs, pauses others, and compares every image with the first one drawn in the same way. Then
two threads draw with two pipelines over one denoiser, and every image is compared with the one drawn alone.
"""

from __future__ import annotations

import argparse
import copy
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
import psutil  # type: ignore[import-untyped]
import torch

import cachekit
from cachekit.attaching.lookup import attachment_of
from cachekit.models.demo import heldout_captions

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
#: Of so many runs one is broken by an exception, one pauses its policies, one is preceded by a new apply.
BROKEN_EVERY, PAUSED_EVERY, APPLIED_EVERY = 5, 7, 4


@dataclass(frozen=True)
class Way:
    """Say how an image is drawn."""

    specs: tuple[str, ...]
    scheduler: str
    height: int
    batch: int
    steps: int
    guidance: float
    seed: int


class PlantedError(Exception):
    """Break a run."""


def main() -> None:
    """Read the command line, soak, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--ways", type=int, default=24, help="different ways of drawing")
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


class Painter:
    """Draw with one pipeline in any way."""

    def __init__(self, pipe: Any) -> None:
        """Silence `pipe`, and remember its scheduler's settings, from which every other one is made."""
        self.pipe = pipe
        self.settings = pipe.scheduler.config
        pipe.set_progress_bar_config(disable=True)

    def attach(self, specs: tuple[str, ...]) -> None:
        """Apply these policies alone."""
        present = attachment_of(self.pipe.unet)
        if present is None or tuple(map(str, present.policies)) != specs:
            cachekit.remove(self.pipe)
            if specs:
                cachekit.apply(self.pipe, specs)

    def draw(self, way: Way, **more: Any) -> str:
        """Return the digest of the images: the same for images that are equal to the bit."""
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

    def draw_paused(self, way: Way) -> str:
        """Return the digest of what is drawn while the policies pause."""
        attachment = attachment_of(self.pipe.unet)
        assert attachment is not None
        with attachment.paused():
            return self.draw(way)

    def draw_broken(self, way: Way, step: int) -> None:
        """Draw until an exception at the end of `step`."""

        def fail(pipe: Any, now: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            if now == step:
                raise PlantedError
            return given

        try:
            self.draw(way, callback_on_step_end=fail)
        except PlantedError:
            return
        raise AssertionError(f"the fault at step {step} did not break {way}")


def soak(runs: int, ways: int) -> dict[str, int]:
    """Return how many images were lost and what was left behind by `runs` runs in so many ways."""
    chance, painter = random.Random(0), Painter(cachekit.demo_pipeline())
    untouched = _outside(painter.pipe)
    known = [_way(number, chance) for number in range(ways)]
    # What is allocated once, by the first run of each way, is no growth.
    expected = {way: _first(painter, way) for way in [*known, *map(_plain, known)]}
    first, start = _rested(painter, known[0])
    counts = dict.fromkeys(("faults", "paused", "lost"), 0)
    for number in range(runs):
        way = chance.choice(known)
        if number % APPLIED_EVERY == 0:
            cachekit.remove(painter.pipe)
        painter.attach(way.specs)
        if number % BROKEN_EVERY == 0:
            painter.draw_broken(replace(way, seed=ways), chance.randrange(way.steps))
            counts["faults"] += 1
        if number % PAUSED_EVERY == 0:
            counts["lost"] += painter.draw_paused(way) != expected[_plain(way)]
            counts["paused"] += 1
        else:
            counts["lost"] += painter.draw(way) != expected[way]
    last, end = _rested(painter, known[0])
    counts["lost"] += last != first
    left = sum(was != now for was, now in zip(untouched, _outside(painter.pipe)))
    figures = {f"{key}_{when}": figure[key] for key in start for when, figure in (("start", start), ("end", end))}
    return {"runs": runs, "ways": ways, **counts, "modules_changed": left, **figures}


def _rested(painter: Painter, way: Way) -> tuple[str, dict[str, int]]:
    """Return the digest of one image, and the memory taken once the policies are gone."""
    found = _first(painter, way)
    painter.attach(())
    return found, memory()


def _outside(pipe: Any) -> list[Any]:
    """Return what an attachment could have left on each module: its class, and the names of what it holds."""
    return [(type(module), set(vars(module))) for module in pipe.unet.modules()]


def memory() -> dict[str, int]:
    """Return the bytes of the process and the number of tensors alive."""
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


def _first(painter: Painter, way: Way) -> str:
    painter.attach(way.specs)
    return painter.draw(way)


def in_threads(runs: int) -> dict[str, int]:
    """Return how many images that two threads drew at once, over one denoiser, differ from those drawn alone."""
    chance, first = random.Random(1), cachekit.demo_pipeline()
    # A tokenizer serves one thread at a time.
    own = {name: copy.deepcopy(getattr(first, name)) for name in ("tokenizer", "scheduler")}
    second = type(first)(**{**first.components, **own}, requires_safety_checker=False)
    painters = (Painter(first), Painter(second))
    todo = [[_way(number, chance) for number in range(runs)] for _ in painters]
    painters[0].attach(SPECS[4])
    alone = list(map(_draw_all, painters, todo))
    with ThreadPoolExecutor(len(painters), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        together = list(pool.map(_draw_all, painters, todo))
    pairs = [(one, other) for alike in zip(alone, together) for one, other in zip(*alike)]
    return {"threads": len(painters), "runs_each": runs, "lost": sum(one != other for one, other in pairs)}


def _draw_all(painter: Painter, ways: list[Way]) -> list[str]:
    return [painter.draw(way) for way in ways]


if __name__ == "__main__":
    main()
