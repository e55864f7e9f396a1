"""Names of models, the same in Python and on the command line: embedded ones, architectures, folders and hub ids."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources
from pathlib import Path

from cachekit.errors import CachekitError, nearest

__all__ = ["DEMOS", "EMBEDDED", "ModelError", "ModelName", "Sort", "canonical", "is_architecture", "named"]

#: The embedded models by name, and the kind that each is. The kinds are names too.
DEMOS = {"demo": "unet", "demo-dit": "dit", "demo-flow": "flow", "demo-lcm": "lcm"}
EMBEDDED = ", ".join(map(repr, DEMOS))
_KINDS = {kind: name for name, kind in DEMOS.items()}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ModelError(CachekitError):
    """A model that can't be found or read, or a setting that it doesn't take."""


class Sort(Enum):
    """What a name stands for."""

    EMBEDDED = "embedded"
    ARCHITECTURE = "architecture"
    FOLDER = "folder"
    HUB = "hub"


@dataclass(frozen=True)
class ModelName:
    """A name, and what it stands for."""

    name: str
    sort: Sort

    @property
    def kind(self) -> str:
        """The kind of an embedded model: "unet", "dit" or "flow"."""
        return DEMOS[self.name]


@cache
def architecture_names() -> tuple[str, ...]:
    """List the known architectures; they aren't read, which needs torch."""
    return tuple(sorted(json.loads(resources.files("cachekit.models").joinpath("architectures.json").read_text())))


def canonical(model: str) -> str:
    """Write the name of an embedded model that is given by its kind; any other name is left as it is.

    >>> canonical("dit"), canonical("sd15")
    ('demo-dit', 'sd15')
    """
    return _KINDS.get(model, model)


def is_architecture(model: str) -> bool:
    """Whether a name is that of an architecture, which has no weights."""
    return model in architecture_names()


def named(model: str) -> ModelName:
    """Find out what a name stands for; nothing is read.

    A folder with the name of an embedded model or an architecture is given as `./NAME`. Raises `ModelError` for a name
    that is none of these, with the nearest one.
    """
    name = canonical(model)
    if name in DEMOS:
        return ModelName(name, Sort.EMBEDDED)
    if is_architecture(name):
        return ModelName(name, Sort.ARCHITECTURE)
    if _is_folder(name):
        return ModelName(name, Sort.FOLDER)
    if name.startswith((".", "/", "~", "\\")):
        raise ModelError(f"cannot read model {model!r}: there is no such folder (give {_given()})")
    if _HUB_ID.fullmatch(name):
        return ModelName(name, Sort.HUB)
    known = [*DEMOS, *_KINDS, *architecture_names()]
    raise ModelError(
        f"unknown model {model!r}{nearest(model, known)}; give {_given()}, or an architecture:"
        f" {', '.join(architecture_names())}"
    )


def without_weights(model: str) -> ModelError:
    """Make the error for an architecture where a model with weights is needed."""
    return ModelError(f"{model} is an architecture, which has no weights; give a folder, a hub id, or {EMBEDDED}")


def unreadable(model: str, reason: str) -> ModelError:
    """Make the error for a model that can't be read."""
    return ModelError(f"cannot read model {model!r}: {reason} (give {_given()})")


def _given() -> str:
    return f"a folder, a hub id such as owner/name, or {EMBEDDED}"


def _is_folder(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False
