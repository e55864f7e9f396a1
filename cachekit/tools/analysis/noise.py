"""The mean of the noise that a pipeline predicts in each step (arXiv 2404.02747, figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from cachekit.applying import attach
from cachekit.tools.bench.measuring import Arguments, timed_call
from cachekit.upstream.calling import STEPS
from cachekit.upstream.prediction import times_of
from cachekit.upstream.stepping import StepCall, predicted_noise, watched

#: The mean and the spread over images of each step.
Curve = dict[str, list[float]]

#: The names of the curves: with text in all steps, before a gate alone, and from it on.
WHOLE, BEFORE, AFTER = "text in all steps", "text before step {}", "text from step {} on"
#: The title and the columns of the table of curves.
TITLE = "Mean of the predicted noise: mean and spread over images"
HEADER = ("text", "first step", "step before the gate", "half way from the gate", "last step")


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


def rows(found: Mapping[str, Curve], gate: int) -> list[list[str]]:
    """Write means and spreads of the first step, the last before the gate, one half way from there, and the last."""
    return [
        [name, *(f"{curve['mean'][step]:.4f} +- {curve['spread'][step]:.4f}" for step in _shown(curve, gate))]
        for name, curve in found.items()
    ]


def order(found: Mapping[str, Curve], gate: int) -> str:
    """Say in a line whether the curves are in the paper's order.

    There the curve with text before the gate alone goes on from the gate as that with text in all steps, and the one
    without text before the gate lies apart. What is compared is the mean distance over the steps from the gate on.
    """
    names = [name.format(gate) for name in (BEFORE, AFTER)]
    before, after = (_distance(found[WHOLE], found[name], gate) for name in names)
    holds = "the paper's order" if before < after else "not the paper's order"
    return (
        f"mean of the predicted noise from step {gate} on, distance to {WHOLE}:"
        f" {before:.4f} {names[0]}, {after:.4f} {names[1]}: {'a tie' if before == after else holds}"
    )


def _shown(curve: Curve, gate: int) -> Iterator[int]:
    last = len(curve["mean"]) - 1
    yield from (0, gate - 1, (gate + last) // 2, last)


def _distance(whole: Curve, other: Curve, gate: int) -> float:
    return fmean(abs(one - another) for one, another in zip(whole["mean"][gate:], other["mean"][gate:]))


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
