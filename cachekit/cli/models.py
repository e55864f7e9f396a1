"""Arguments that name a model, the same for all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from cachekit.cli.output import choice
from cachekit.models.loading import DTYPES
from cachekit.models.names import EMBEDDED

__all__ = ["MODEL_HELP", "RUNNABLE_HELP", "AnyModel", "Dtype", "RunnableModel"]

#: Models with weights, which can be run.
RUNNABLE_HELP = f"Folder or hub id of a diffusers pipeline, or {EMBEDDED}."
#: Models by their configs, which is all that plans and estimates need.
MODEL_HELP = f"Architecture such as sd15, folder or hub id of a diffusers pipeline, or {EMBEDDED}."

RunnableModel = Annotated[str, typer.Argument(help=RUNNABLE_HELP)]
AnyModel = Annotated[str, typer.Argument(help=MODEL_HELP)]
Dtype = Annotated[str | None, typer.Option(help="Precision.", **choice(DTYPES, "dtype"))]
