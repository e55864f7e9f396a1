"""The table of all methods: where each acts, how it decides, what it can't be combined with; read from the policies."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import cachekit
from cachekit import ConflictError, Measured, Policy, SiteError
from cachekit.bench.tables import markdown
from cachekit.driving.setup import Setup
from cachekit.interface.specs import parse
from cachekit.planning.assignments import assign
from cachekit.registry.catalog import installed
from cachekit.upstream.pipelines import denoisers_of

#: Policies that are no method of their own: another name, a tool, and one that needs a file to be shown.
_LEFT_OUT = {"cair", "cache", "null_text"}
#: What a policy can't do without.
_NEEDED = {"calibrated": "calibrated:interval=4"}
_KINDS = ("unet", "dit")


def table() -> str:
    """Make the table."""
    header = ["method", "where", "decides", "UNet", "transformer", "not beside", "paper"]
    return markdown(header, [row(name) for name in methods()], left=len(header))


def methods() -> list[str]:
    """List the names of all methods that ship, in order."""
    return sorted(name for name in installed().policies if name not in _LEFT_OUT)


def row(name: str) -> list[str]:
    """Make the row of a method."""
    made = policy(name)
    where = dict.fromkeys(str(choice.where) for choice in made.chosen().values())
    uses = [", ".join(dict.fromkeys(str(bound.target.kind) for bound in bounds(kind, name))) or "-" for kind in _KINDS]
    link = f"[`{name}`](../plugins/{_folder(made)}/README.md)"
    return [link, ", ".join(f"`{one}`" for one in where), decides(made), *uses, clashes(name), made.paper or "-"]


def policy(name: str) -> Policy:
    """Make a policy with its defaults."""
    return parse(_NEEDED.get(name, name), installed())


def _folder(made: Policy) -> str:
    return type(made).__module__.partition(".")[0]


def decides(made: Policy) -> str:
    """Name what a policy decides by."""
    parts = [part for choice in made.chosen().values() for part in (choice.when, choice.what)]
    if made.observes or any(isinstance(part, cachekit.Indicator) for part in parts):
        return "by values"
    if any(isinstance(part, Measured) for part in parts):
        return "by measured figures"
    return "by weights measured on the model" if isinstance(parts[1], cachekit.Calibrated) else "before the run"


@functools.cache
def _denoisers(kind: str) -> Any:
    return Setup.of(denoisers_of(cachekit.demo_pipeline(kind)), [], installed()).denoisers


@functools.cache
def bounds(kind: str, name: str) -> tuple[Any, ...]:
    """Bind a method to an embedded model; nothing where it is refused there."""
    try:
        return Setup.of(
            {key: one.module for key, one in _denoisers(kind).items()}, [policy(name)], installed()
        ).assignments
    except SiteError:
        return ()


def clashes(name: str) -> str:
    """List the methods that would write the same targets of an embedded model, so that both are refused."""
    return ", ".join(f"`{other}`" for other in _clashing(name)) or "-"


def _clashing(name: str) -> Iterator[str]:
    for other in methods():
        if other != name and any(_clash(kind, name, other) for kind in _KINDS):
            yield other


def _clash(kind: str, one: str, other: str) -> bool:
    try:
        assign(bound for name in (one, other) for bound in bounds(kind, name))
    except ConflictError:
        return True
    return False
