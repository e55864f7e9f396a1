"""Images of the embedded models in batches, and the plain steps that come nearest to the uncached ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cachekit.tools.bench.cells import Spacing
from cachekit.tools.bench.spacing import scheduler_with, table_of
from cachekit.tools.calibrating.verifying import psnr
from cachekit.upstream.calling import with_scheduler

#: Seed of the first image's noise, far from those of calibrations; the next one's follows.
NOISE = 9000
#: What a spacing is called in tables.
OWN, FULL = "own", "of the full steps"


def images(pipe: Any, prompts: Sequence[str], steps: int, scale: float, first: int = 0, **changes: Any) -> np.ndarray:
    """Draw all prompts in one batch, `(prompts, height, width, channels)` with values from 0 to 1.

    `first` is the number of the first one, on which its noise depends; `changes` are arguments of the pipeline's call.
    """
    import torch

    noise = [torch.Generator().manual_seed(NOISE + first + place) for place in range(len(prompts))]
    given = {"num_inference_steps": steps, "guidance_scale": scale, "generator": noise, "output_type": "np"}
    found: np.ndarray = pipe(list(prompts), **given, **changes).images
    return found


def plain_steps(
    pipe: Any, full: Sequence[int], steps: int, uncached: np.ndarray, draw: Callable[..., np.ndarray]
) -> dict[str, float]:
    """Compare as many plain steps as `full` has with the uncached images of `steps` steps: median PSNR by spacing.

    The spacings are the scheduler's own, those that it has settings for, and the timesteps of the `full` steps. `draw`
    makes images with a number of steps and other arguments of the pipeline's call.
    """
    name, own = type(pipe.scheduler).__name__, scheduler_with(pipe, type(pipe.scheduler).__name__, "")
    found = {OWN: psnr(draw(len(full)), uncached)}
    for spacing in Spacing:
        other = scheduler_with(pipe, name, spacing.value)
        if dict(other.config) != dict(own.config):  # a setting that the scheduler lacks changes nothing
            with with_scheduler(pipe, other):
                found[spacing.value] = psnr(draw(len(full)), uncached)
    table = table_of(pipe, own, steps, full)
    found[FULL] = psnr(draw(len(full), **table), uncached)
    return found


def best_of(found: Mapping[str, float]) -> tuple[float, str]:
    """Find the highest figure and its name."""
    name = max(found, key=lambda each: found[each])
    return found[name], name
