"""Examine many pipelines, each in a process of its own with a time limit: a crash or a hang is a line, not an end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_all_start_methods, get_context
from typing import Any

from cachekit.coverage.trial import Trial

__all__ = ["survey"]

#: From how many pipelines on it pays to load them all beforehand.
_MANY = 8


@dataclass
class _Running:
    name: str
    process: Any
    pipe: Any
    limit: float
    deadline: float


def survey(names: Sequence[str], specs: Sequence[str], workers: int, limit: float) -> Iterator[Trial]:
    """Yield a trial for each pipeline class in the order in which they end; `limit` is in seconds for each."""
    context = _context(len(names))
    waiting, running = list(names), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_start(context, waiting.pop(0), specs, limit))
            connection.wait([one.pipe for one in running], timeout=1.0)
            for one in list(running):
                trial = _ended(one)
                if trial is not None:
                    running.remove(one)
                    yield trial
    finally:
        for one in running:
            one.process.kill()


def _context(count: int) -> Any:
    """Return how processes are made: from one that has loaded the libraries already, where the system can."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.{'preloaded' if count > _MANY else 'worker'}"])
    return context


def _start(context: Any, name: str, specs: Sequence[str], limit: float) -> _Running:
    from cachekit.coverage.worker import work

    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs, name, list(specs)), daemon=True)
    process.start()
    theirs.close()
    return _Running(name, process, ours, limit, time.monotonic() + limit)


def _ended(one: _Running) -> Trial | None:
    """Return the trial of a process that has ended or whose time is up, or None."""
    if one.pipe.poll():
        try:
            trial: Trial = one.pipe.recv()
        except EOFError:
            one.process.join()
            return Trial(one.name, f"the process ended with code {one.process.exitcode}")
        one.process.join()
        return trial
    if time.monotonic() < one.deadline:
        return None
    one.process.kill()
    one.process.join()
    return Trial(one.name, f"took longer than {one.limit:g} seconds")
