"""Checks of what a class of parts declares: its fields and its class variables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, NamedTuple

from cachekit.errors import PolicyError

#: The kinds of attributes that no field may replace, and that may stand for a class variable.
_METHODS = (FunctionType, property, classmethod, staticmethod)


class _Rule(NamedTuple):
    #: Whether a value can be used.
    accepts: Callable[[Any], bool]
    #: What can be, for the error.
    wanted: str


_TEXT = _Rule(lambda value: isinstance(value, str), "a text")
_FLAG = _Rule(lambda value: isinstance(value, bool), "True or False")
_LENGTH = _Rule(
    lambda value: value is None or (type(value) is int and value >= 0), "a number of entries, 0 or more, or None"
)
_WORDS = _Rule(
    lambda value: isinstance(value, tuple) and all(isinstance(word, str) for word in value),
    "a tuple of names of fields",
)
#: The rules of the class variables of all parts and policies, by name.
_RULES = {
    **dict.fromkeys(("name", "summary", "paper", "positional"), _TEXT),
    **dict.fromkeys(("insists", "amends", "watches", "repeats"), _FLAG),
    "length": _LENGTH,
    "exclusive": _WORDS,
}


def refuse_fields(cls: type, fields: Iterable[str]) -> None:
    """Raise `PolicyError` for a field with the name of a method: its value would take the method's place."""
    for key in fields:
        if any(isinstance(vars(base).get(key), _METHODS) for base in cls.__mro__[1:]):
            raise PolicyError(f"{cls.__name__}.{key} is a field with the name of a method; rename it")


def refuse_variables(cls: type) -> None:
    """Raise `PolicyError` for a class variable of the wrong type, which would fail in the middle of a run."""
    for key, rule in _RULES.items():
        value = vars(cls).get(key)
        if key in vars(cls) and not isinstance(value, _METHODS) and not rule.accepts(value):
            raise PolicyError(f"{cls.__name__}.{key} is {value!r}; make it {rule.wanted}")
