"""Runs whose samples do not depend on what the denoiser returns."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cachekit.upstream.pipelines import denoiser_of


@contextmanager
def steered(
    pipe: Any, sample_after: Callable[[int, torch.Tensor], torch.Tensor] | None = None
) -> Iterator[list[torch.Tensor]]:
    """Take the next sample from `sample_after(step, sample)`, by default the scheduler's.

    Yields the guided outputs that the scheduler gets, one for each step.
    """
    scheduler, outputs = pipe.scheduler, []
    original = scheduler.step

    @functools.wraps(original)
    def step(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(output, timestep, sample, *args, **kwargs)
        outputs.append(output.clone())
        return (sample_after(len(outputs) - 1, sample),) if sample_after else found

    vars(scheduler)["step"] = step
    try:
        yield outputs
    finally:
        del vars(scheduler)["step"]


def on_a_fixed_path(step: int, sample: torch.Tensor) -> torch.Tensor:
    """Compute a sample that depends on the step and the noise at the beginning alone."""
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float32)
    return 0.9 * sample + 0.3 * noise.to(sample)


@contextmanager
def standing_still(pipe: Any) -> Iterator[list[torch.Tensor]]:
    """Give the denoiser the sample and the timestep of the first step in all steps."""
    denoiser = denoiser_of(pipe)
    signature = inspect.signature(type(denoiser).forward)
    first: list[float] = []

    def hold(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = signature.bind(module, *args, **kwargs)
        given = torch.as_tensor(bound.arguments["timestep"])
        first.extend([] if first else [given.flatten()[0].item()])
        bound.arguments["timestep"] = torch.full_like(given, first[0])
        return bound.args[1:], bound.kwargs

    handle = denoiser.register_forward_pre_hook(hold, with_kwargs=True)
    try:
        with steered(pipe, lambda step, sample: sample) as outputs:
            yield outputs
    finally:
        handle.remove()
