"""Output: results to stdout, errors and warnings as one line each to stderr."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import typer
from rich.console import Console
from typer.core import TyperGroup

from cachekit.errors import CachekitError, IdleWarning, PluginWarning, PresetWarning

#: Width in characters where stdout is no terminal, enough for every table.
_WIDTH = 140


class Group(TyperGroup):
    """A group of commands in which an error of cachekit is one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn a `CachekitError` into a line on stderr."""
        # Silences advice about optional packages; the user's own setting wins.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # diffusers passes an argument that the hub client has deprecated.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated")
            try:
                return super().invoke(ctx)
            except CachekitError as error:
                typer.echo(f"error: {' '.join(str(error).split())}", err=True)
                raise typer.Exit(2) from None


def console() -> Console:
    """Make a console on the current stdout."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def say(text: object = "") -> None:
    """Print text without markup, wrapping or colours."""
    typer.echo(str(text))


def write(path: Path, text: str) -> None:
    """Write a file and print its name; raise a `CachekitError` where it cannot be written."""
    try:
        path.write_text(text)
    except OSError as error:
        raise CachekitError(f"cannot write {str(path)!r}: {error.strerror}") from error
    say(f"wrote {path}")


def check_writable(path: Path | None) -> None:
    """Raise a `CachekitError` for a file that cannot be written, before the work for it."""
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise CachekitError(f"cannot write {str(path)!r}: {error.strerror}") from error


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """Print a table with its first column aligned left and the others right; a caption stands below it."""
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


class Progress(Protocol):
    """Updates a progress bar."""

    def __call__(self, done: int, total: int, warning: str | None = None, /, name: str | None = None) -> None:
        """Show how much of all is done; print a warning, and rename the bar, where one is given."""


@contextmanager
def progress_bar(name: str) -> Iterator[Progress]:
    """Show a progress bar during the block, which is given the function that updates it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task(name, total=None)

        def show(done: int, total: int, warning: str | None = None, /, name: str | None = None) -> None:
            bar.update(task, completed=done, total=total or None, description=name)
            if warning:
                typer.echo(f"warning: {warning}", err=True)

        yield show


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    if issubclass(category, (IdleWarning, PluginWarning, PresetWarning)):
        typer.echo(f"warning: {message}", err=True)
    else:
        typer.echo(warnings.formatwarning(message, category, *rest[:2]), err=True, nl=False)
