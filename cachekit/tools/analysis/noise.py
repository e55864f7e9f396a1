"""The mean of the noise that a pipeline predicts in each step (arXiv 2404.02747, figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

from cachekit.applying import attach
from cachekit.tools.bench.measuring import Arguments, timed_call
from cachekit.upstream.calling import STEPS
from cachekit.upstream.prediction import times_of
from cachekit.upstream.stepping import StepCall, predicted_noise, watched

#: The mean and the spread over images of each step.
Curve = dict[str, list[float]]


def mean_noise(
    pipe: Any,
    arguments: Arguments,
    specs: Sequence[str],
    steps: int,
    prompts: Sequence[tuple[str, int]],
    ran: Callable[[], None],
) -> Curve:
    """Compute the curve of a pipeline with specs, over prompts with a seed each; `ran` is called after each image.

    Raises `GuidanceError` under a scheduler that doesn't show how much of its sample is noise.
    """
    found: list[list[float]] = []
    for prompt, seed in prompts:
        watch = _Watch()
        twin = watched(pipe, watch)
        with attach(twin, specs):
            timed_call(twin, {STEPS: steps, **arguments(prompt)}, seed)
        found.append(watch.means())
        ran()
    columns = list(zip(*found))
    return {"mean": [fmean(values) for values in columns], "spread": [pstdev(values) for values in columns]}


class _Watch:
    """Takes the mean of the predicted noise in each call of the scheduler."""

    def __init__(self) -> None:
        self._times: tuple[Any, ...] = ()
        self._means: list[Any] = []

    def __call__(self, call: StepCall) -> Any:
        if not self._means:
            self._times = times_of(call.scheduler, None, len(call.scheduler.timesteps))
        self._means.append(predicted_noise(call, self._times[len(self._means)]).float().mean())
        return call.run()

    def means(self) -> list[float]:
        """Read the means of all steps at once."""
        import torch

        found: list[float] = torch.stack(self._means).tolist()
        return found
