"""Refuse parts that go by the number of steps, where a run doesn't show it."""

from __future__ import annotations

from collections.abc import Iterable

from cachekit.errors import PolicyError, answered
from cachekit.interface.moment import Moment, Time
from cachekit.interface.parts import Part, StandIn
from cachekit.planning.assignments import Assignment, origin
from cachekit.planning.composer import scheduled

#: Numbers of steps whose schedules are compared; whatever has a period beyond 1 differs in the last step of one of the
#: first two, if it singles out the last.
_LENGTHS = (100, 101, 200)


def refuse_unknown_length(assignments: Iterable[Assignment]) -> None:
    """Raise `PolicyError` for a schedule or stand-in whose answers depend on the number of steps."""
    first_of = {id(bound.choice): bound for bound in reversed(list(assignments))}
    for bound in first_of.values():
        part = _by_length(bound)
        if part is not None:
            raise PolicyError(
                f"{bound.policy}: {part} needs the number of steps, which this loop does not show; take its timesteps"
                " out of scheduler.timesteps, or use a part that does without, such as every(2)"
            )


def _by_length(bound: Assignment) -> Part | None:
    """Find the part of a choice that answers differently in runs of other lengths."""
    *short, longest = ([scheduled(bound, _at(bound, step, steps)) for step in range(steps)] for steps in _LENGTHS)
    if any(cells != longest[: len(cells)] for cells in short):
        return bound.choice.when
    what = bound.choice.what
    if type(what).weights is StandIn.weights:
        return None
    found = [_weights(bound, _at(bound, 5, steps)) for steps in _LENGTHS]
    return what if any(weights != found[0] for weights in found) else None


def _weights(bound: Assignment, at: Moment) -> list[float]:
    times = [Time(4), Time(2), Time(0)]
    return list(answered(lambda: origin(bound, "predict", at), bound.choice.what.weights, times, at))


def _at(bound: Assignment, step: int, steps: int) -> Moment:
    return Moment(step, steps, 0, Time(step), bound.target)
