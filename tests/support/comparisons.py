"""Marks of tests that compare a method with something else; the page of methods has what they are marked with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Test = TypeVar("_Test", bound=Callable[..., None])
#: How exactly things are equal, as the page says it.
BIT = "to the bit"
ROUNDING = "within rounding"


def compared(method: str, to: str, on: str | Iterable[Any], exactly: str = BIT) -> Callable[[_Test], _Test]:
    """Mark a test that compares the latents of `method` with those of something else.

    `on` are names of pipelines: a list of them, the name of what the test is parametrized with, or a parameter's name.
    `benchmarks.compared` reads all this from the source, so nothing is recorded here.
    """
    return lambda test: test
