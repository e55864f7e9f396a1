"""Refuse prompts whose guidance branches are equal, which leave open how weights are divided between them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cachekit.attaching.attachment import Attachment
from cachekit.errors import CalibrationError
from cachekit.tools.calibrating.batches import Batch, call_of, size_of
from cachekit.tools.calibrating.standins import Recorder, Terms
from cachekit.tools.calibrating.terms import FRESH
from cachekit.upstream.stepping import StepCall, watched

if TYPE_CHECKING:
    from torch import Tensor

#: Relative distance up to which the outputs of two branches are equal, in single precision.
_ROUNDING = 1e-5


class _ComparedError(CalibrationError):
    """The end of a run whose first step has been compared."""


def refuse_equal_branches(
    pipe: Any,
    attachment: Attachment,
    recorder: Recorder,
    batches: Sequence[Batch],
    steps: int,
    arguments: Mapping[str, Any],
) -> None:
    """Raise `CalibrationError` for a prompt that the denoiser cannot distinguish from the negative prompt.

    Each batch is run up to its first step, because pipelines differ in what they make of an empty prompt.
    `recorder` is the stand-in of the attachment's policy.
    """
    number = 1
    for batch in batches:
        terms = _first_step(pipe, attachment, recorder, call_of(batch, steps, arguments))
        outputs = [term for name, term in terms.items() if name.startswith(FRESH)]
        if len(outputs) < 2:
            return
        for place, (one, other) in enumerate(zip(*outputs)):
            if _equal(one, other):
                raise CalibrationError(
                    f"{_named(batch, place, number)} is encoded exactly like the negative prompt: with equal"
                    " branches, nothing shows how weights divide between them; leave it out, or give another prompt"
                )
        number += size_of(batch)


def _first_step(pipe: Any, attachment: Attachment, recorder: Recorder, call: dict[str, Any]) -> Terms:
    """Collect the terms of all calls of the denoiser in the first step."""
    found: Terms = {}

    def step(_: StepCall) -> Any:
        for seen in recorder.take():
            found.update(seen.terms)
        raise _ComparedError("the first step has been compared")

    twin = watched(pipe, step)
    with contextlib.suppress(_ComparedError), attachment.run_of(twin, (), call):
        twin(**call)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal up to rounding, in low precision to the bit."""
    if one.element_size() < 4:
        return bool((one == other).all())
    return bool((one - other).norm() <= _ROUNDING * other.norm())


def _named(batch: Batch, place: int, first: int) -> str:
    """Name a prompt of a batch by its text, or by its number."""
    prompts = batch.get("prompt")
    return f"prompt {prompts[place]!r}" if prompts else f"prompt {first + place}"
