"""Instances whose calls are intercepted pass for instances of their own class."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

from cachekit.switches.subclassing import intercept_calls, is_intercepted, stop_intercepting


class Adder:
    """Adds."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, other: int) -> int:
        """Add."""
        return self.number + other


class Rebuilt(Adder):
    def __reduce__(self) -> Any:
        return Rebuilt, (self.number,)


def negated(base: Any) -> Callable[..., Any]:
    return lambda self, other: -base.__call__(self, other)


def test_one_instance_is_intercepted_and_its_class_is_not() -> None:
    adder, other = Adder(1), Adder(1)
    intercept_calls(adder, negated)
    intercept_calls(adder, negated)
    assert (adder(2), other(2)) == (-3, 3)
    stop_intercepting(adder)
    stop_intercepting(adder)
    assert adder(2) == 3
    assert type(adder) is Adder


def test_the_subclass_passes_for_the_class() -> None:
    adder = Adder(1)
    intercept_calls(adder, negated)
    found = type(adder)
    assert issubclass(found, Adder)
    assert (found.__name__, found.__qualname__, found.__module__) == ("Adder", "Adder", __name__)
    assert (found.__doc__, found.__call__.__doc__) == ("Adds.", "Add.")
    other = Adder(2)
    intercept_calls(other, negated)
    assert type(other) is found


def test_copies_are_intercepted_too() -> None:
    adder = Adder(1)
    intercept_calls(adder, negated)
    for twin in (copy.copy(adder), copy.deepcopy(adder), pickle.loads(pickle.dumps(adder))):
        assert type(twin) is type(adder)
        assert twin(2) == -3


def test_a_class_that_decides_how_it_is_copied_is_asked() -> None:
    adder = Rebuilt(1)
    intercept_calls(adder, negated)
    assert type(copy.deepcopy(adder)) is Rebuilt


def test_a_class_that_was_put_over_it_stays() -> None:
    adder = Adder(1)
    intercept_calls(adder, negated)
    over: Any = type("Over", (type(adder),), {})
    adder.__class__ = over
    intercept_calls(adder, negated)
    assert is_intercepted(adder)
    stop_intercepting(adder)
    assert type(adder) is over
