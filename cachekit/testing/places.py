"""Where two runs part: the site and the step, for the messages of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cachekit.interface.moment import Action
from cachekit.tensors import tensors
from cachekit.testing.spies import Prediction
from cachekit.testing.steering import steered
from cachekit.upstream.pipelines import denoiser_of

if TYPE_CHECKING:
    from cachekit.planning.assignments import Assignment
    from cachekit.runs.record import Record


class Output(NamedTuple):
    """What a module of the denoiser gave in one call."""

    site: str
    step: int
    values: tuple[torch.Tensor, ...]


@contextmanager
def traced(pipe: Any) -> Iterator[list[Output]]:
    """Record the output of each call of a module of the denoiser, in the order in which the calls end."""
    found: list[Output] = []
    with steered(pipe) as ended:

        def record(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                values = output if isinstance(output, (tuple, list, dict)) else getattr(output, "sample", output)
                found.append(Output(name, len(ended), tuple(tensor.clone() for tensor in tensors(values))))

            return hook

        named = [*denoiser_of(pipe).named_modules()]
        handles = [module.register_forward_hook(record(name or "denoiser")) for name, module in named]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def first_module(found: Sequence[Output], expected: Sequence[Output]) -> str:
    """Name the first module that gave something else in one of two runs, with its step; "" where none did."""
    for one, other in zip(found, expected):
        if (one.site, one.step) != (other.site, other.step):
            return f"; first, {one.site!r} is called in step {one.step} in place of {other.site!r}"
        if len(one.values) != len(other.values) or not all(map(torch.equal, one.values, other.values)):
            return f"; the first output that differs is that of {one.site!r} in step {one.step}"
    return ""


def first_not_finite(predictions: Sequence[Prediction]) -> str:
    """Name the first prediction with NaN or inf; "" where there is none."""
    found = (one for one in predictions if not all(bool(tensor.isfinite().all()) for tensor in one.made))
    return next((f"; the first that is predicted with NaN or inf is {one.place}" for one in found), "")


def reused(assignments: Sequence[Assignment], record: Record, steps: Sequence[int]) -> str:
    """Name what the first of some steps in which anything is reused reuses, and the step; "" where none does."""
    for call in record.calls:
        taken = zip(assignments, call.row.actions)
        names = [bound.target.name for bound, action in taken if action is Action.REUSE]
        if names and call.row.step in steps:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{names[0]!r}{others} in step {call.row.step}"
    return ""
