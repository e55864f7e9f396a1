"""Watch the scheduler's step of a pipeline, on a copy of it that has a scheduler of its own."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachekit.errors import GuidanceError
from cachekit.interface.moment import Time
from cachekit.upstream.pipelines import hide_progress

_OUTPUT, _SAMPLE = "model_output", "sample"


@dataclass(frozen=True)
class StepCall:
    """A call of a scheduler's step: its arguments by name, and the scheduler in the state before it."""

    scheduler: Any
    arguments: Mapping[str, Any]

    @property
    def output(self) -> Tensor:
        """What the pipeline has made of the denoiser's outputs."""
        found: Tensor = self.arguments[_OUTPUT]
        return found

    @property
    def sample(self) -> Tensor:
        """The sample, as the scheduler keeps it."""
        found: Tensor = self.arguments[_SAMPLE]
        return found

    def run(self, output: Tensor | None = None) -> Any:
        """Make the step, with another output where one is given."""
        given = self.arguments if output is None else {**self.arguments, _OUTPUT: output}
        return type(self.scheduler).step(self.scheduler, **given)

    def try_constant(self, value: float) -> Tensor:
        """Compute in single precision what the step would make of an output that is `value` everywhere."""
        twin = copy.deepcopy(self.scheduler)
        given = {name: argument for name, argument in self.arguments.items() if name != "generator"}
        given[_OUTPUT] = torch.full_like(self.output, value, dtype=torch.float32)
        given[_SAMPLE] = self.sample.float()
        made: Tensor = type(twin).step(twin, **given)[0]
        return made.float()

    @property
    def is_scaled(self) -> bool:
        """Whether the denoiser receives the sample divided, as under sigma-based schedulers."""
        twin = copy.deepcopy(self.scheduler)
        if not hasattr(twin, "scale_model_input"):
            return False
        given: Tensor = twin.scale_model_input(self.sample, self.arguments["timestep"])
        return not torch.equal(given, self.sample)


def predicted_noise(call: StepCall, time: Time) -> Tensor:
    """Compute the noise in a step's sample that its output implies, at a place in the scheduler's table.

    Raises `GuidanceError` where the scheduler doesn't show how much of the sample is noise.
    """
    sigma, alpha, output = time.sigma, time.alpha, call.output.float()
    if not time.kind or sigma is None or alpha is None:
        raise GuidanceError(f"{type(call.scheduler).__name__} doesn't show its predicted noise; use another scheduler")
    # Sigma-based schedulers keep x0 + noise; alpha of it is what the denoiser is given.
    sample = call.sample.float() * (alpha if call.is_scaled else 1.0)
    shared = tuple(slice(min(sizes)) for sizes in zip(sample.shape, output.shape))
    sample, output = sample[shared], output[shared]
    if time.kind == "flow":
        return sample + alpha * output
    if time.kind == "v_prediction":
        return alpha * output + sigma * sample
    return (sample - alpha * output) / sigma if time.kind == "sample" else output


def watched(pipe: Any, watch: Callable[[StepCall], Any]) -> Any:
    """Make a copy of a pipeline whose scheduler, a copy too, has its steps made by `watch`; models are shared."""
    twin = copy.copy(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    own = scheduler.step
    signature = inspect.signature(own)

    # Pipelines look into the signature for what a step takes: `generator`, `eta`.
    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        return watch(StepCall(scheduler, signature.bind(*args, **kwargs).arguments))

    scheduler.step = step
    vars(twin)["scheduler"] = scheduler
    hide_progress(twin)
    return twin
