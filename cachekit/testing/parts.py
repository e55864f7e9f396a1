"""Checks of a policy's parts: specs, names, forecasts, what they read and write."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from math import sqrt
from typing import Any, TypeVar

import torch

from cachekit.errors import CachekitError
from cachekit.interface.moment import Entry, Streams, Time
from cachekit.interface.parts import Part, Schedule, StandIn, Where, inner_parts
from cachekit.interface.policy import Policy
from cachekit.interface.specs import parse
from cachekit.parts.standins import Chebyshev, Hermite
from cachekit.registry.catalog import Catalog
from cachekit.testing.models import in_bfloat16
from cachekit.testing.places import first_not_finite
from cachekit.testing.results import CheckFailedError, NotApplicableError
from cachekit.testing.spies import Prediction
from cachekit.testing.subject import Subject, distance

#: Forecasts are computed in float64 here.
_EXACT = 1e-6
#: What a line may lie along.
_AXES = ("step", "timestep", "sigma", "log_snr")
#: Stand-ins that give a value below the line, or below a constant, by design.
_SHRINKING = (Chebyshev, Hermite)

_Base = TypeVar("_Base", bound=Part)


# -- names and specs --------------------------------------------------------------------------------------------


def check_spec_round_trip(subject: Subject) -> None:
    """A policy's text is a spec that parses back to an equal policy."""
    for policy in subject.policies:
        try:
            parsed = parse(str(policy), with_words_of(policy, subject.catalog))
        except CachekitError as error:
            raise CheckFailedError(f"{str(policy)!r} does not parse: {error}") from None
        if parsed != policy:
            raise CheckFailedError(f"{str(policy)!r} parses to another policy, {parsed!r}")


def with_words_of(policy: Policy, catalog: Catalog) -> Catalog:
    """Add a policy and the parts in its fields to a catalog, so that neither has to be registered."""
    parts = list(inner_parts(policy))
    return replace(
        catalog,
        policies={**catalog.policies, policy.name: type(policy)},
        places={**_named(parts, Where), **catalog.places},
        schedules={**_named(parts, Schedule), **catalog.schedules},
        stand_ins={**_named(parts, StandIn), **catalog.stand_ins},
    )


def _named(parts: Iterable[Part], base: type[_Base]) -> dict[str, type[_Base]]:
    return {part.name: type(part) for part in parts if isinstance(part, base)}


def check_names(subject: Subject) -> None:
    """No method or class variable of the policy or of its parts is a protocol's name with a slip in it."""
    for part in _all_parts(subject):
        base = next(base for base in (Policy, Where, Schedule, StandIn) if isinstance(part, base))
        for cls in type(part).__mro__:
            if issubclass(cls, Part) and not cls.__module__.startswith("cachekit."):
                _refuse_slips(cls, base)


def _all_parts(subject: Subject) -> Iterator[Part]:
    for policy in subject.policies:
        yield policy
        for choice in policy.chosen().values():
            yield from (choice.where, choice.when, choice.what)


def _refuse_slips(cls: type[Part], base: type[Part]) -> None:
    known = {name for name in dir(base) if not name.startswith(("_", "model_"))}
    for name, value in vars(cls).items():
        if name.startswith("_") or name in known or name in cls.model_fields or isinstance(value, property):
            continue
        same = [one for one in known if _is_method(base, one) == isinstance(value, types.FunctionType)]
        close = difflib.get_close_matches(name, same, n=1, cutoff=0.8)
        if close:
            raise CheckFailedError(f"{cls.__name__} has {name!r}, which nothing calls; did you mean {close[0]!r}?")


def _is_method(base: type[Part], name: str) -> bool:
    return callable(getattr(base, name)) and not isinstance(getattr(base, name), type)


# -- forecasts ----------------------------------------------------------------------------------------------------


def check_linear_ramp(subject: Subject) -> None:
    """Of equal values any stand-in makes that value, and of values on a line a forecast makes the line's next one.

    A stand-in that reads several entries is a forecast, unless its class variable `order` is 0.
    """
    found = [one for one in _predicting(subject) if not isinstance(one.part, _SHRINKING)]
    if not found:
        raise NotApplicableError("no stand-in of it has to give a line")
    for one in found:
        times = _times(one.part.entries or 4)
        level, slope = one.made[0].double(), torch.ones_like(one.made[0], dtype=torch.float64)
        far = distance(_made(one, times, [level] * len(times)), level)
        if far > _EXACT:
            raise CheckFailedError(f"{_where(one, times)} of equal values it makes another (by {far:.2g} of its norm)")
        if not _reads_several(one, times, level) or _order(one.part) == 0:
            continue
        misses = [_miss(one, times, axis, level, slope) for axis in _AXES]
        if min(misses) > _EXACT:
            raise CheckFailedError(
                f"{_where(one, times)} of values on a line it makes one that misses it by {min(misses):.2g} of the norm"
            )


def _where(one: Prediction, times: Sequence[Time]) -> str:
    """Name the stand-in, its target, the step that is predicted and those of the entries."""
    steps = f"{'steps' if len(times) > 1 else 'step'} {', '.join(str(time.step) for time in times)}"
    return f"{one.part} for {one.target!r} in step {_HERE} from {steps}:"


def _predicting(subject: Subject) -> list[Prediction]:
    """List a prediction of each stand-in whose numbers are not prepared for a run."""
    return [found for found in subject.stand_ins if found.history and not found.is_prepared]


def _miss(one: Prediction, times: Sequence[Time], axis: str, level: torch.Tensor, slope: torch.Tensor) -> float:
    """Compute by how much a stand-in misses a line along an axis."""
    here = getattr(_time(_HERE), axis)
    scale = 0.1 / abs(here - getattr(times[0], axis))
    values = [level + slope * (getattr(time, axis) - here) * scale for time in times]
    return distance(_made(one, times, values), level)


def _reads_several(one: Prediction, times: Sequence[Time], level: torch.Tensor) -> bool:
    values = [level] + [level * 2] * (len(times) - 1)
    return distance(_made(one, times, values), level) > _EXACT


def _order(part: StandIn) -> Any:
    return getattr(part, "order", getattr(part, "degree", None))


def _made(one: Prediction, times: Sequence[Time], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Predict the first stream from other values at other times; all other streams stay."""
    rest = tuple(tensor.double() for tensor in one.history[0].tensors[1:])
    history = tuple(Entry((value, *rest), time) for value, time in zip(values, times))
    return _predict(one, history)[0]


def _predict(one: Prediction, history: Any) -> Streams:
    at = one.at._replace(step=_HERE, steps=_LAST, time=_time(_HERE), memory={}, shared={})
    given = tuple(tensor.double() for tensor in one.given)
    return type(one.part).predict(one.part, history, at, given)


#: The step that is predicted, and the length of the run; entries lie at uneven gaps before it.
_HERE, _LAST = 21, 25


def _times(count: int) -> list[Time]:
    """List `count` times, the newest first, at gaps of 2, 3, 2, 3 steps."""
    return [_time(_HERE - 2 - 5 * place // 2) for place in range(count)]


def _time(step: int) -> Time:
    sigma = 0.95 - 0.9 * step / _LAST if step >= 0 else 0.95 + 0.001 * -step
    return Time(step, 1000 * sigma, sigma, sqrt(1 - sigma**2), "epsilon")


class _WatchedHistory(tuple):  # type: ignore[type-arg]
    """A history that remembers the greatest place that was asked for by number."""

    greatest = -1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, int):
            self.greatest = max(self.greatest, place)
        return super().__getitem__(place)


def check_history_length(subject: Subject) -> None:
    """A stand-in works with every number of entries from one to its length, and reads none beyond."""
    found = _predicting(subject)
    if not found:
        raise NotApplicableError("no stand-in of it reads a history")
    for one in found:
        length = one.part.entries or 4
        value = one.made[0].double()
        for count in range(1, length + 1):
            try:
                made = _made(one, _times(count), [value] * count)
            except Exception as error:
                where, raised = _where(one, _times(count)), f"predict raised {type(error).__name__}: {error}"
                raise CheckFailedError(f"{where} {raised}; its length is {length}") from error
            if made.shape != value.shape:
                raise CheckFailedError(f"{_where(one, _times(count))} it makes the shape {tuple(made.shape)}")
        if one.part.entries is not None:
            _refuse_reading_beyond(one, length, value)


def _refuse_reading_beyond(one: Prediction, length: int, value: torch.Tensor) -> None:
    rest = tuple(tensor.double() for tensor in one.history[0].tensors[1:])
    history = _WatchedHistory(Entry((value, *rest), time) for time in _times(length + 3))
    with suppress(Exception):  # no run has as many: it may refuse them, as a sum does whose weights are fewer
        _predict(one, history)
    if history.greatest >= length:
        raise CheckFailedError(
            f"{_where(one, _times(length))} it reads history[{history.greatest}], but its length is {length}: that"
            " entry is never there"
        )


# -- tensors ------------------------------------------------------------------------------------------------------


def check_no_writes(subject: Subject) -> None:
    """No part changes a tensor that it is given."""
    if subject.first.writes:
        raise CheckFailedError(f"{subject.first.writes[0]} changed a tensor that it was given")


def check_dtype(subject: Subject) -> None:
    """In bfloat16 what is predicted and the image are bfloat16, and finite."""
    try:
        pipe, plain = in_bfloat16(subject.model.name, subject.call)
    except (RuntimeError, TypeError) as error:
        raise NotApplicableError(f"the model doesn't run in bfloat16: {error}") from None
    with subject.applied(pipe) as attachment:
        found = subject.draw(attachment, subject.call, pipe, torch.bfloat16)
    if found.image.dtype is not plain.dtype:
        raise CheckFailedError(f"the image is {found.image.dtype}, uncached it is {plain.dtype}")
    if not bool(found.image.isfinite().all()):
        raise CheckFailedError(f"the image holds NaN or inf{first_not_finite(found.predictions)}")
