"""Read pipelines.json and models.json: how to build pipelines and models small, and how to call them."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

#: Keys of models.json that describe a class instead of configuring it.
_CLASS_KEYS = ("like", "from", "needs")


@dataclass(frozen=True)
class Facts:
    """What is known of one pipeline class beyond its signature."""

    #: Components that differ from the annotated ones, by parameter of the constructor.
    components: dict[str, Any] = field(default_factory=dict)
    #: Arguments of a short call.
    call: dict[str, Any] = field(default_factory=dict)
    #: Methods to call first, with their arguments.
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Why the pipeline isn't tried.
    skip: str = ""
    #: Package that the pipeline can't do without.
    needs: str = ""
    #: Cause of the error that the pipeline raises with the present libraries.
    because: str = ""
    #: Part of the output that the seed determines, where others are random.
    output: str = ""


def entries() -> list[dict[str, Any]]:
    """Read the entries of pipelines.json; each is for the pipelines whose names match its pattern."""
    found: list[dict[str, Any]] = _read("pipelines.json")
    return found


def facts_of(pipeline: str) -> Facts:
    """Merge all entries that match the name of a pipeline class; later ones override earlier ones."""
    components: dict[str, Any] = {}
    call: dict[str, Any] = {}
    before: dict[str, dict[str, Any]] = {}
    notes = {"skip": "", "needs": "", "because": "", "output": ""}
    for entry in entries():
        if re.search(entry["match"], pipeline):
            components |= entry.get("components", {})
            call |= entry.get("call", {})
            before |= entry.get("before", {})
            notes |= {key: entry[key] for key in notes if key in entry}
    return Facts(components, call, before, **notes)


def model_config(name: str) -> dict[str, Any] | None:
    """Read the small configuration called `name`, a class or class/variant; None where there is none."""
    found = _read("models.json").get(name)
    if found is None:
        return None
    own = {key: value for key, value in found.items() if key not in _CLASS_KEYS}
    return {**(model_config(found["like"]) or {}), **own} if "like" in found else own


def class_notes(name: str) -> dict[str, str]:
    """Look up what is known of a class besides its configuration: its module (`from`), its package (`needs`)."""
    found = _read("models.json").get(name.partition("/")[0], {})
    return {key: found[key] for key in _CLASS_KEYS if key in found}


@functools.cache
def _read(name: str) -> Any:
    return json.loads(files(__package__).joinpath(name).read_text())
