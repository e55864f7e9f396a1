"""Arguments that name a model, the same for all commands: wrong names are refused before torch is imported."""

from __future__ import annotations

from typing import Annotated

import typer

from cachekit.cli.output import choice, warn
from cachekit.models.loading import DTYPES
from cachekit.models.names import DEMOS, EMBEDDED, Sort, architecture_names, named, without_weights

__all__ = [
    "ANY_MODEL",
    "RUNNABLE_MODEL",
    "AnyModel",
    "Dtype",
    "RunnableModel",
    "any_model",
    "complete_any",
    "complete_runnable",
    "runnable",
    "runnable_name",
    "warn_of_shapes",
]

#: Help for models with weights, which can be run, and for models by their configs, for plans and estimates.
RUNNABLE_MODEL = f"Folder or hub id of a diffusers pipeline, or {EMBEDDED}."
ANY_MODEL = f"Architecture such as sd15, folder or hub id of a diffusers pipeline, or {EMBEDDED}."


def any_model(model: str) -> str:
    """Check the name of a model, and that the hub can be reached where it is needed."""
    found = named(model)
    if found.sort is Sort.HUB:
        from cachekit.models.hub import hub_arguments

        hub_arguments(found.name)
    return found.name


def runnable_name(model: str) -> str:
    """Check the name of a model that has weights."""
    found = named(model)
    if found.sort is Sort.ARCHITECTURE:
        raise without_weights(model)
    return found.name


def runnable(model: str) -> str:
    """Check the name of a model that has weights, and that the hub can be reached where it is needed."""
    return any_model(runnable_name(model))


def warn_of_shapes(captions: str, model: str) -> None:
    """Warn where a number of captions, which are of coloured shapes, was drawn with a model that isn't embedded."""
    if captions.isdecimal() and named(model).sort in (Sort.FOLDER, Sort.HUB):
        warn(
            f"the {captions} captions were of coloured shapes, made for embedded models; for {model} give a file with"
            " a caption or prompt on each line"
        )


def complete_any(incomplete: str) -> list[str]:
    """List the names that a word may become."""
    return [name for name in (*DEMOS, *architecture_names()) if name.startswith(incomplete)]


def complete_runnable(incomplete: str) -> list[str]:
    """List the names of models with weights that a word may become."""
    return [name for name in DEMOS if name.startswith(incomplete)]


RunnableModel = Annotated[
    str, typer.Argument(help=RUNNABLE_MODEL, metavar="MODEL", parser=runnable, autocompletion=complete_runnable)
]
AnyModel = Annotated[
    str, typer.Argument(help=ANY_MODEL, metavar="MODEL", parser=any_model, autocompletion=complete_any)
]
Dtype = Annotated[str | None, typer.Option(help="Precision.", **choice(DTYPES, "dtype"))]
