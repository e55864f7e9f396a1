"""`cachekit generate --prompts`: an image for each row of a file, into a folder."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cachekit.cli.output import Pace, duration, json_results, progress_bar, say, warn

if TYPE_CHECKING:
    from cachekit.tools.batch.drawing import Job
    from cachekit.tools.batch.rows import Defaults
    from cachekit.tools.batch.running import Batch

#: Exit code of a command that Ctrl-C has ended.
_INTERRUPTED = 130
#: Seconds between lines of progress where the output is no terminal.
_QUIET = 60.0


def draw(
    prompts: str, job: Job, defaults: Defaults, folder: Path, executor: str, workers: int | None, json: Path | None
) -> None:
    """Draw the rows of a file that a folder lacks; exit code 1 where some of them can't be drawn."""
    from cachekit.interface.specs import parse_all
    from cachekit.registry.catalog import installed
    from cachekit.tools.batch.checking import check_job
    from cachekit.tools.batch.manifest import Folder
    from cachekit.tools.batch.rows import read_rows, tasks_of
    from cachekit.tools.batch.running import Batch
    from cachekit.tools.workers import default_workers

    with json_results(json) as give:
        parse_all(defaults.specs, installed())
        rows = read_rows(prompts)
        tasks, wrong = tasks_of(rows, defaults, job.identity)
        problems = rows.problem_lines(wrong)
        for problem in problems:
            warn(f"{problem}; this row is left out")
        check_job(job, defaults.specs)
        batch = Batch(job, tasks, Folder(folder))
        seconds = _run(batch, executor, workers or default_workers(executor))
        _print(batch, len(problems), seconds)
        give(_data(batch, problems, seconds))
    if problems or batch.failed:
        raise typer.Exit(1)


def _run(batch: Batch, executor: str, workers: int) -> float:
    """Draw behind a progress bar; the seconds that it took."""
    shown, pace = time.monotonic(), Pace(batch.kept)
    if batch.kept:
        say(f"{batch.kept} of {batch.total} images are in {batch.folder.path} already")
    try:
        with progress_bar(batch.job.model) as show:
            done = batch.kept
            show(done, batch.total)
            for outcome in batch.run(executor, workers, warn):
                done += 1
                failure = f"line {outcome.task.line}: {outcome.failure}" if outcome.failure else None
                show(done, batch.total, failure)
                if not sys.stdout.isatty() and time.monotonic() - shown > _QUIET:
                    shown = time.monotonic()
                    said = (f"{done} of {batch.total}", _speed(batch), pace.left(done, batch.total))
                    say(", ".join(filter(None, said)))
    except KeyboardInterrupt:
        _stopped(batch)
    return pace.seconds


def _stopped(batch: Batch) -> None:
    """Print what is kept and how to go on, and end the command."""
    left = batch.total - batch.kept
    typer.echo(f"stopped: {batch.kept} images are kept in {batch.folder.path}, {left} are left; to go on:", err=True)
    typer.echo(f"  {shlex.join(['cachekit', *sys.argv[1:]])}", err=True)
    raise typer.Exit(_INTERRUPTED)


def _speed(batch: Batch) -> str:
    return f"{batch.per_minute:.1f} images per minute"


def _print(batch: Batch, unread: int, seconds: float) -> None:
    drawn = f"{batch.drawn} drawn in {duration(seconds)} ({_speed(batch)})" if batch.drawn else "nothing to draw"
    lost = ", ".join(f"{count} {what}" for count, what in ((batch.failed, "failed"), (unread, "not read")) if count)
    say(f"{drawn}, {batch.kept} of {batch.total} images in {batch.folder.path}{lost and f'; rows: {lost}'}")
    if batch.failed:
        say("the same command draws rows that failed once more")
    for line, count in batch.warned.items():
        warn(f"{line} ({count} of {batch.drawn} images drawn now)")


def _data(batch: Batch, problems: list[str], seconds: float) -> dict[str, Any]:
    return {
        "folder": os.fspath(batch.folder.path),
        "images": batch.total,
        "kept": batch.kept,
        "drawn": batch.drawn,
        "failed": batch.failed,
        "not_read": problems,
        "seconds": seconds,
        "images_per_minute": batch.per_minute if batch.drawn else None,
    }
