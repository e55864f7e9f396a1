"""Validate what policies return: errors name policy, method, target and step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from cachekit.errors import PolicyError, answered
from cachekit.interface.beginning import Beginning
from cachekit.interface.indicators import Indicator, Signal
from cachekit.interface.moment import Action, Moment, Streams
from cachekit.interface.parts import Schedule, StandIn
from cachekit.planning.assignments import Assignment, origin

Answer = TypeVar("Answer")


def asked(bound: Assignment, method: str, at: Moment, ask: Callable[..., Answer], *given: Any) -> Answer:
    """Call a method of a part; errors other than cachekit's become a `PolicyError`."""
    return answered(lambda: origin(bound, method, at), ask, *given)


def begun(bound: Assignment, part: Schedule | StandIn, at: Moment, run: Beginning, shared: dict[str, Any]) -> None:
    """Call `begin` of the schedule or the stand-in; errors other than cachekit's become a `PolicyError`."""
    answered(lambda: origin(bound, "begin", at, part), part.begin, run, shared)


def agreed_action(bound: Assignment, method: str, at: Moment, action: Any) -> Action:
    """Check an action that must be decided by now."""
    if not isinstance(action, Action):
        raise PolicyError(f"{origin(bound, method, at)} returned {action!r}; return an Action")
    return action


def decided(bound: Assignment, signal: Signal, at: Moment, vote: Callable[[Action], Action]) -> Action:
    """Ask an indicator about a signal: STORE or REUSE, as all processes agree."""
    when = bound.choice.when
    assert isinstance(when, Indicator), "only indicators are shown signals"
    found = asked(bound, "needs", at, when.needs, signal, at)
    if not isinstance(found, bool):
        given = f"a {type(found).__name__}" if isinstance(found, Tensor) else repr(found)
        raise PolicyError(f"{origin(bound, 'needs', at)} returned {given}; return True or False")
    return vote(Action.STORE if found else Action.REUSE)


def like_kept(bound: Assignment, method: str, at: Moment, made: Any, kept: Streams) -> Streams:
    """Check that tensors are as many, of the same shapes, dtypes and devices, as those kept."""
    if type(made) is not tuple or len(made) != len(kept):
        found = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise PolicyError(f"{origin(bound, method, at)} returned {found}; return a tuple of {len(kept)} tensors")
    for place, (tensor, like) in enumerate(zip(made, kept)):
        if tensor is like:
            continue
        if not isinstance(tensor, Tensor):
            raise PolicyError(
                f"{origin(bound, method, at)} returned a {type(tensor).__name__} as stream {place}; return tensors"
            )
        if tensor.shape != like.shape or tensor.dtype is not like.dtype or tensor.device != like.device:
            raise PolicyError(
                f"{origin(bound, method, at)} returned {_described(tensor)} as stream {place};"
                f" it must be {_described(like)}"
            )
    return made


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
