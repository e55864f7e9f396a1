"""Read the small configurations of models and the calls of pipelines, which are data."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

_SAID_OF_CLASSES = ("like", "from", "needs")


@dataclass(frozen=True)
class Facts:
    """Hold what is known of one pipeline: parts that differ from the annotated ones, and arguments.

    `before` names methods that make ready what the call needs, with their arguments. `skip` says why not to try,
    `needs` names a package without which it is of no use; `because` explains the error that it raises with the
    libraries of the time. `output` names the part of the output that a seed determines, where others are random.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    skip: str = ""
    needs: str = ""
    because: str = ""
    output: str = ""


def entries() -> list[dict[str, Any]]:
    """Return what the facts say, in order: each entry is for the pipelines whose name its pattern matches."""
    found: list[dict[str, Any]] = _read("pipelines.json")
    return found


def facts_of(pipeline: str) -> Facts:
    """Return the facts of a pipeline class: all entries whose pattern matches its name, later ones first."""
    parts: dict[str, Any] = {}
    call: dict[str, Any] = {}
    before: dict[str, dict[str, Any]] = {}
    said = {"skip": "", "needs": "", "because": "", "output": ""}
    for entry in entries():
        if re.search(entry["match"], pipeline):
            parts |= entry.get("parts", {})
            call |= entry.get("call", {})
            before |= entry.get("before", {})
            said |= {key: entry[key] for key in said if key in entry}
    return Facts(parts, call, before, **said)


def model_config(name: str) -> dict[str, Any] | None:
    """Return the small configuration called `name` (a class, or class/variant), or None where there is none."""
    found = _read("models.json").get(name)
    if found is None:
        return None
    own = {key: value for key, value in found.items() if key not in _SAID_OF_CLASSES}
    return {**(model_config(found["like"]) or {}), **own} if "like" in found else own


def said_of(name: str) -> dict[str, str]:
    """Return what is known of a class besides its configuration: the module it is `from`, the package it `needs`."""
    found = _read("models.json").get(name.partition("/")[0], {})
    return {key: found[key] for key in _SAID_OF_CLASSES if key in found}


def known_models() -> list[str]:
    """Return the names of all small configurations."""
    return sorted(_read("models.json"))


@functools.cache
def _read(name: str) -> Any:
    return json.loads(files(__package__).joinpath(name).read_text())
