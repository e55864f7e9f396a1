"""The errors of cachekit: catch `CachekitError` for all of them, or one class for one cause."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

#: The group of entry points that name plugins.
GROUP = "cachekit"
_Answer = TypeVar("_Answer")


class CachekitError(Exception):
    """Base of all errors of cachekit and its plugins.

    The text is a single line that names what was given, what is wrong with it and what to do.

    >>> from cachekit import Mask
    >>> try:
    ...     Mask(steps=(4, 2))
    ... except CachekitError as error:
    ...     print(error)
    Mask: give steps from 0 on, each once and in order
    """

    def __str__(self) -> str:
        """Join the message's lines: text quoted from a file or a user may hold line breaks."""
        return " ".join(super().__str__().splitlines())


class SpecError(CachekitError):
    """A spec that cannot be parsed: an unknown policy, an unknown key or a bad value."""


class ConflictError(CachekitError):
    """Policies that cannot be combined: two that write the same target, or that a plugin refuses together."""


class SiteError(CachekitError):
    """A policy without a target in this model, or with one whose tensors it cannot use."""


class PolicyError(CachekitError):
    """A policy or a part of one that raised, or that returned what can't be used."""


class AdapterError(CachekitError):
    """A pipeline without a denoiser, or a denoiser that no adapter or more than one matches."""


class AttachmentError(CachekitError):
    """An attachment that cannot be made, copied or used, such as a second one, or one that other code has broken."""


class BudgetError(CachekitError):
    """A limit on cached bytes that no target fits into, or a device that cannot hold cached tensors."""


class CostError(CachekitError):
    """Costs that cannot be counted."""


class GuidanceError(CachekitError):
    """Guidance that a policy cannot handle: branches that cannot be separated safely, or outputs without a known x0."""


class CalibrationError(CachekitError):
    """A calibration that can't be made or read, or that was made for something else than the present run."""


class PresetError(CachekitError):
    """A preset that can't be read or written, or that needs what isn't installed."""


class PluginError(CachekitError):
    """A plugin that raised within a hook or an adapter, or that lacks what its kind needs."""


class PluginWarning(UserWarning):
    """A plugin that failed while the others go on: it was left out, or its hook was, or two plugins claim one name."""


class IdleWarning(UserWarning):
    """Nothing to do: no policy was given."""


class PresetWarning(UserWarning):
    """A pipeline or a run that differs from what a preset's evidence is for."""


def answered(name: Callable[[], str], ask: Callable[..., _Answer], *given: Any) -> _Answer:
    """Call a policy's code; errors other than cachekit's become a `PolicyError` that begins with `name()`."""
    try:
        return ask(*given)
    except CachekitError:
        raise
    except Exception as error:
        raise PolicyError(f"{name()} raised {type(error).__name__}: {error}") from error


def attributed(thing: object) -> str:
    """Write a policy for an error, with the distribution that its class was installed with."""
    return f"{thing}{source_of(thing)}"


def source_of(thing: object) -> str:
    """Name the distribution that an object's class was installed with, as " of cachekit-calm"; "" for no plugin's."""
    package = type(thing).__module__.partition(".")[0]
    points = [point for point in entry_points(group=GROUP) if point.module.partition(".")[0] == package]
    return next((f" of {point.dist.name}" for point in points if point.dist is not None), "")


def reason_of(detail: Mapping[str, Any]) -> str:
    """Write the message of one detail of pydantic's errors, without what it puts before a message of ours.

    >>> reason_of({"msg": "Value error, give steps in order"})
    'give steps in order'
    """
    return str(detail["msg"]).removeprefix("Value error, ")


def first_line(error: BaseException) -> str:
    """Take the first line of another library's error, or its type where it has no text.

    >>> first_line(RuntimeError("no such device"))
    'no such device'
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Suggest the allowed word closest to an unknown one, as the tail of an error; empty where none is close.

    Upper and lower case are the same.

    >>> nearest("intervall", ["interval", "branch"])
    " (did you mean 'interval'?)"
    """
    known = {name.lower(): name for name in sorted(allowed, reverse=True)}
    found = difflib.get_close_matches(word.lower(), sorted(known), n=1)
    return f" (did you mean {known[found[0]]!r}?)" if found else ""
