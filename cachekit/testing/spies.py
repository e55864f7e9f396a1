"""Record what a policy's parts are given and return, without changing what they do."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from cachekit.interface.moment import History, Moment, Streams
from cachekit.interface.parts import Choice, Part, StandIn
from cachekit.interface.policy import Policy
from cachekit.tensors import tensors

_Made = TypeVar("_Made", bound=Part)


class Prediction(NamedTuple):
    """One call of a stand-in's `predict`: what it was given and what it made."""

    part: StandIn
    history: History
    at: Moment
    given: Streams
    made: Streams

    @property
    def target(self) -> str:
        """The name of the target."""
        return _name(self.at)

    @property
    def place(self) -> str:
        """The target and the step, for messages."""
        return f"{self.target!r} in step {self.at.step}"

    @property
    def is_prepared(self) -> bool:
        """Whether the stand-in has prepared numbers for this run: it has a `begin`, and something is shared."""
        return type(self.part).begin is not StandIn.begin and bool(self.at.shared)


class Recorder(threading.local):
    """What the parts of policies were given and returned in this thread since its last run began."""

    def __init__(self) -> None:
        """Begin with nothing, in each thread."""
        self.predictions: list[Prediction] = []
        #: Part, method, target and step of each call that changed a tensor which it was given.
        self.writes: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        """Share the recorder with copies of a pipeline."""
        return self

    def call(self, part: Part, name: str, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call a method of a part, and record it."""
        at = next((value for value in (*given, *named.values()) if isinstance(value, Moment)), None)
        held = [(tensor, tensor._version) for tensor in _tensors(given, named)]
        made = method(part, *given, **named)
        if any(tensor._version != version for tensor, version in held):
            where = f" for {_name(at)!r} in step {at.step}" if at else ""
            self.writes.append(f"{name} of {part}{where}")
        if name == "predict" and isinstance(part, StandIn):
            self.predictions.append(Prediction(part, given[0], given[1], given[2] if len(given) > 2 else (), made))
        return made


def watched(policy: Policy, recorder: Recorder) -> Policy:
    """Make a policy that does the same, and whose parts report to `recorder`."""
    twin = _watched(policy, recorder)

    def chosen() -> Mapping[str, Choice]:
        choices = type(policy).chosen(twin)
        return {
            name: choice.with_parts(when=_watched(choice.when, recorder), what=_watched(choice.what, recorder))
            for name, choice in choices.items()
        }

    vars(twin)["chosen"] = chosen
    return twin


def _watched(part: _Made, recorder: Recorder) -> _Made:
    """Copy a part; functions in an instance's dictionary come before those of its class."""
    twin = part.model_copy()
    for name in set(_protocol(type(part))):
        vars(twin)[name] = functools.partial(recorder.call, twin, name, getattr(type(part), name))
    return twin


def _protocol(cls: type[Part]) -> Iterator[str]:
    """Yield the methods of an interface that receive tensors, or may."""
    for base in cls.__mro__:
        if base.__module__.startswith("cachekit.interface.") and base is not Part:
            for name, value in vars(base).items():
                if isinstance(value, types.FunctionType) and not name.startswith("_") and name not in _PLAIN:
                    yield name


#: Methods that receive no tensors, or not those of a call.
_PLAIN = frozenset({"chosen", "choices", "given", "full", "weights", "missing", "begin"})


def _tensors(given: tuple[Any, ...], named: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments; memories, which a moment holds, may be written."""
    yield from tensors([value for value in (*given, *named.values()) if not isinstance(value, (Moment, dict))])


def _name(at: Moment | None) -> str:
    return at.target.name if at is not None and at.target is not None else "?"
