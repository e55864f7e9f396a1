"""Images of the embedded models in batches, and the plain steps that come nearest to the uncached ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cachekit.bench.cells import Spacing
from cachekit.bench.spacing import call_with, scheduler_with, table_of
from cachekit.calibrating.verifying import psnr
from cachekit.models.demo import call_arguments

#: Seed of the first image's noise, far from those of calibrations; the next one's follows.
NOISE = 9000
#: What a spacing is called in tables.
OWN, FULL = "own", "of the full steps"


def images(
    pipe: Any, prompts: Sequence[str], steps: int, scale: float, first: int = 0, **changes: Any
) -> np.ndarray:
    """Draw all prompts in one batch, `(prompts, height, width, channels)` with values from 0 to 1.

    `first` is the number of the first one, on which its noise depends; `changes` are arguments of the pipeline's call.
    """
    import torch

    noise = [torch.Generator().manual_seed(NOISE + first + place) for place in range(len(prompts))]
    given = {"num_inference_steps": steps, "guidance_scale": scale, "generator": noise, "output_type": "np"}
    found: np.ndarray = pipe(list(prompts), **given, **call_arguments(pipe), **changes).images
    return found


def best_plain(
    pipe: Any, full: Sequence[int], steps: int, uncached: np.ndarray, draw: Callable[..., np.ndarray]
) -> tuple[float, str]:
    """Find the spacing of plain steps whose images are nearest to the uncached ones of `steps` steps.

    The spacings are the scheduler's own, those that it has settings for, and the timesteps of the `full` steps. `draw`
    makes images with a number of steps and other arguments of the pipeline's call. The result is the median PSNR in
    dB and the name of the spacing.
    """
    name, own = type(pipe.scheduler).__name__, scheduler_with(pipe, type(pipe.scheduler).__name__, "")
    found = [(psnr(draw(len(full)), uncached), OWN)]
    for spacing in Spacing:
        other = scheduler_with(pipe, name, spacing.value)
        if dict(other.config) != dict(own.config):  # a setting that the scheduler lacks changes nothing
            with call_with(pipe, other):
                found.append((psnr(draw(len(full)), uncached), spacing.value))
    table = table_of(pipe, own, steps, full)
    found.append((psnr(draw(len(full), **table), uncached), FULL))
    return max(found, key=lambda each: each[0])
