"""Call diffusers pipelines: names of their arguments, their results, their callbacks, their scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: Number of steps, and what the call returns: "latent", "pil" or "np".
STEPS, OUTPUT = "num_inference_steps", "output_type"
#: The scale of guidance in most pipelines.
SCALE = "guidance_scale"
#: What the image shall not show, with which the names of its embeddings begin.
NEGATIVE_PROMPT = "negative_prompt"
_STEP_ENDED, _CALLED_BACK = "callback_on_step_end", "callback"


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Get the parameters of a pipeline's call, by name; `pipe` is a pipeline or its class."""
    kind = pipe if isinstance(pipe, type) else type(pipe)
    return inspect.signature(kind.__call__).parameters


def results_of(output: Any) -> Any:
    """Get the images, or the frames of the videos, or the latents of either, from what a pipeline's call returns."""
    return getattr(output, "images", getattr(output, "frames", None))


def on_step_end(pipe: Any, ended: Callable[[int], None]) -> dict[str, Any]:
    """Make the argument by which a pipeline's call reports each 0-based step at its end; none where it has none."""

    def call(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ended(step)
        return tensors

    known = call_parameters(pipe)
    if _STEP_ENDED in known:
        return {_STEP_ENDED: call}
    if _CALLED_BACK in known:
        return {_CALLED_BACK: lambda step, time, latents: ended(step)}
    return {}


@contextmanager
def with_scheduler(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Give a pipeline another scheduler for the block."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before
