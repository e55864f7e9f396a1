"""Examine many pipelines, each in a process of its own: a crash or a hang ends one trial, not the survey."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection, get_all_start_methods, get_context
from typing import Any

from cachekit.tools.coverage.results import Trial

__all__ = ["survey"]

#: Number of pipelines from which it pays to load all pipeline classes before processes are forked.
_MANY = 8


def survey(names: Sequence[str], specs: Sequence[str], workers: int, limit: float) -> Iterator[Trial]:
    """Examine pipeline classes in `workers` processes at a time, and yield their trials as they finish.

    A process that takes longer than `limit` seconds is killed.
    """
    context = _context(len(names))
    waiting, running = list(names), list[TrialProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(TrialProcess(context, waiting.pop(0), specs, limit))
            connection.wait([process.answer for process in running], timeout=1.0)
            for process in list(running):
                trial = process.trial()
                if trial is not None:
                    running.remove(process)
                    yield trial
    finally:
        for process in running:
            process.kill()


class TrialProcess:
    """A process that examines one pipeline class; its memory is freed when it ends."""

    def __init__(self, context: Any, name: str, specs: Sequence[str], limit: float) -> None:
        """Start it; `limit` is in seconds."""
        from cachekit.tools.coverage.worker import work  # loads the libraries

        self.name, self.limit = name, limit
        self.answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=work, args=(theirs, name, list(specs)), daemon=True)
        self._process.start()
        theirs.close()
        self.deadline = time.monotonic() + limit

    def trial(self) -> Trial | None:
        """Receive the trial of a process that has ended or run out of time; None while it runs."""
        if self.answer.poll():
            try:
                trial: Trial = self.answer.recv()
            except EOFError:
                self._process.join()
                return Trial(self.name, f"the process ended with code {self._process.exitcode}")
            self._process.join()
            return trial
        if time.monotonic() < self.deadline:
            return None
        self.kill()
        return Trial(self.name, f"took longer than {self.limit:g} seconds")

    def kill(self) -> None:
        """Kill the process, and wait for its end."""
        self._process.kill()
        self._process.join()


def _context(count: int) -> Any:
    """Choose how processes start: forked from one that has loaded the libraries, where the system can do that."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.{'preloaded' if count > _MANY else 'worker'}"])
    return context
