"""Print: results to stdout, errors and warnings as one clear line each to stderr."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from cachekit.errors import CachekitError, PluginWarning

#: Columns to assume where stdout is no terminal: enough for every table.
_WIDTH = 120


class Group(TyperGroup):
    """Run a command; an error of cachekit ends it with one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn a `CachekitError` into a line on stderr."""
        # What optional packages transformers could use is of no concern here; the user's own setting wins.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # diffusers still passes on what the hub no longer knows.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated")
            try:
                return super().invoke(ctx)
            except CachekitError as error:
                typer.echo(f"error: {' '.join(str(error).split())}", err=True)
                raise typer.Exit(2) from None


def console() -> Console:
    """Return a console on the present stdout."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def say(text: object = "") -> None:
    """Print text as it is: no markup, no wrapping, no colours."""
    typer.echo(str(text))


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int, str | None], None]]:
    """Give a function that shows how much is done of all, and prints warnings."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task(name, total=None)

        def show(done: int, total: int, warning: str | None) -> None:
            bar.update(task, completed=done, total=total or None)
            if warning:
                typer.echo(f"warning: {warning}", err=True)

        yield show


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    if issubclass(category, PluginWarning):
        typer.echo(f"warning: {message}", err=True)
    else:
        typer.echo(warnings.formatwarning(message, category, *rest[:2]), err=True, nl=False)
