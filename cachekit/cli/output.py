"""Output: results to stdout, errors and warnings as one line each to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from cachekit.errors import CachekitError, IdleWarning, PluginWarning, PresetWarning, nearest

if TYPE_CHECKING:
    from rich.table import Table

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
    """Make a console on stdout, or on stderr while stdout is for JSON alone."""
    stream = sys.stderr if _Stdout.is_taken else sys.stdout
    return Console(file=stream) if stream.isatty() else Console(file=stream, width=_width())


def _width() -> int:
    """Width where the output is no terminal: that of the environment, else enough for every table."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else _WIDTH


def say(text: object = "") -> None:
    """Print text without markup, wrapping or colours; nothing while stdout is for JSON alone."""
    if not _Stdout.is_taken:
        typer.echo(str(text))


def warn(text: object) -> None:
    """Print a line of warning on stderr."""
    typer.echo(f"warning: {' '.join(str(text).split())}", err=True)


def write(path: Path, text: str) -> None:
    """Write a file and print its name, or write to stdout where it is "-".

    Raises a `CachekitError` where it cannot be written.
    """
    if path == _STDOUT:
        typer.echo(text, nl=False)
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise CachekitError(f"cannot write {str(path)!r}: {error.strerror}; give another path") from error
    say(f"wrote {path}")


def check_writable(*paths: Path | None) -> None:
    """Raise a `CachekitError` for a file that cannot be written, before the work for it."""
    for path in paths:
        if path is None or path == _STDOUT:
            continue
        is_new = not path.exists()
        try:
            path.open("a").close()
        except OSError as error:
            raise CachekitError(f"cannot write {str(path)!r}: {error.strerror}; give another file") from error
        if is_new:
            path.unlink()


def check_folder(path: Path) -> None:
    """Make a folder; raise a `CachekitError` where files cannot be written there, before the work for them."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise CachekitError(f"cannot write to {str(path)!r}: {error.strerror}; give another folder") from error


# -- JSON ---------------------------------------------------------------------------------------------------

_STDOUT = Path("-")
_JSON = "Write the results as JSON to this file; - is stdout, with nothing else on it."
#: The option of a command that prints a table.
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help=_JSON)]


class _Stdout:
    """Whether stdout is for JSON alone."""

    is_taken = False


@contextmanager
def json_results(file: Path | None) -> Iterator[Callable[[Any], None]]:
    """Give the block a function that writes results as JSON to a file, checked here; without a file, it does nothing.

    Where the file is "-", what else the block prints is left out, and its progress goes to stderr.
    """
    check_writable(file)
    before, _Stdout.is_taken = _Stdout.is_taken, file == _STDOUT
    try:
        yield lambda data: write(file, json.dumps(finite(data), indent=1) + "\n") if file is not None else None
    finally:
        _Stdout.is_taken = before


def finite(data: Any) -> Any:
    """Replace what JSON has no word for: infinite and undefined numbers become null."""
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


# -- choices and tables -------------------------------------------------------------------------------------


def choice(words: Sequence[str], noun: str) -> dict[str, Any]:
    """Make the arguments of an option with a closed list of words, which its help and completion list.

    Another word is an error of one line with the nearest.
    """

    def parse(word: str) -> str:
        if word not in words:
            raise CachekitError(f"unknown {noun} {word!r}{nearest(word, words)}; allowed: {', '.join(words)}")
        return word

    return {"parser": parse, "metavar": "|".join(words), "autocompletion": lambda: list(words)}


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """Print a table with its first column aligned left and the others right; a caption stands below it.

    Where it is too wide, rows have numbers instead of their first cells, which are listed below the table. If it still
    is too wide, it is printed in parts with some of the columns each.
    """
    if _Stdout.is_taken:
        return
    out = console()
    if _natural_width(header, rows) <= out.width or len(header) < 3:
        out.print(_table(header, rows, caption))
        return
    labels = [row[0] for row in rows]
    header, rows = ["", *header[1:]], [[f"{number}", *row[1:]] for number, row in enumerate(rows, 1)]
    for columns in _parts(header, rows, out.width):
        out.print(_table([header[i] for i in columns], [[row[i] for i in columns] for row in rows], None))
    for number, label in enumerate(labels, 1):
        say(f"{number:>3}  {label}")
    if caption:
        out.print(caption, style="italic", markup=False, highlight=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None) -> Table:
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left")
    for place, name in enumerate(header):
        table.add_column(escape(name), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Width of each column: that of its longest cell, and of the longest word of its heading, with its frame."""
    heads = (max((len(word) for word in name.split()), default=0) for name in header)
    return [3 + max([head, *(len(row[place]) for row in rows)]) for place, head in enumerate(heads)]


def _natural_width(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    return 1 + sum(_widths(header, rows))


def _parts(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Divide the columns among tables that fit, each with the first column."""
    first, *others = _widths(header, rows)
    parts: list[list[int]] = []
    room = 0
    for place, needed in enumerate(others, 1):
        if needed > room:
            parts.append([0])
            room = width - 1 - first
        parts[-1].append(place)
        room -= needed
    return parts


class Progress(Protocol):
    """Updates a progress bar."""

    def __call__(self, done: int, total: int, warning: str | None = None, /, name: str | None = None) -> None:
        """Show how much of all is done; print a warning, and rename the bar, where one is given."""


@contextmanager
def progress_bar(name: str) -> Iterator[Progress]:
    """Show a progress bar during the block, which is given the function that updates it.

    The time left is that of what is left at the speed so far, however slow.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(TextColumn("{task.description}", markup=False), *columns, console=console()) as bar:
        task = bar.add_task(name, total=None, left="")
        pace: Pace | None = None

        def show(done: int, total: int, warning: str | None = None, /, name: str | None = None) -> None:
            nonlocal pace
            pace = pace or Pace(done)
            left = pace.left(done, total)
            bar.update(task, completed=done, total=total or None, description=name, left=left)
            if warning:
                warn(warning)

        yield show


class Pace:
    """How fast work is done from now on; what is `done` already was not done at any speed."""

    def __init__(self, done: int) -> None:
        """Begin."""
        self._begun = time.monotonic()
        self._first = done

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._begun

    def left(self, done: int, total: int) -> str:
        """Write the time that is left; "" before anything was done, and at the end."""
        if done <= self._first or done >= total:
            return ""
        return f"{duration(self.seconds * (total - done) / (done - self._first))} left"


def duration(seconds: float) -> str:
    """Write a duration in its two greatest units.

    >>> [duration(8.2), duration(95), duration(7260)]
    ['8s', '1m 35s', '2h 1m']
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {rest}s" if minutes else f"{rest}s"


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    if issubclass(category, (IdleWarning, PluginWarning, PresetWarning)):
        typer.echo(f"warning: {message}", err=True)
    else:
        typer.echo(warnings.formatwarning(message, category, *rest[:2]), err=True, nl=False)
