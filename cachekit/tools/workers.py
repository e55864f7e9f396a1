"""Work shared out to this process, to processes of its own, or to the actors of a Ray cluster."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from cachekit.errors import CachekitError, first_line, nearest
from cachekit.tools.clusters import cluster, imported_ray
from cachekit.tools.teams import Actors, Lost, Processes, Team, Work, WorkersError

__all__ = [
    "EXECUTORS",
    "FAILURES",
    "Crew",
    "Lost",
    "Work",
    "WorkersError",
    "check_executor",
    "default_workers",
    "failure_line",
    "share_out",
    "threads_of",
]

#: Exceptions that fail a single item and not the others: memory, shapes, a published package that is too old.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError)
#: Where work can be done.
EXECUTORS = ("serial", "process", "ray")

#: An item, and its result or what stands for it.
Outcome = tuple[Any, Any]
#: Called with an item that is done once more, and the reason.
Again = Callable[[Any, str], None]


def check_executor(name: str) -> None:
    """Raise `WorkersError` for an unknown executor."""
    if name not in EXECUTORS:
        raise WorkersError(f"unknown executor {name!r}{nearest(name, EXECUTORS)}; known: {', '.join(EXECUTORS)}")


def share_out(
    name: str,
    work: Work,
    items: Sequence[Any],
    workers: int,
    tries: int = 1,
    again: Again = lambda item, reason: None,
) -> Iterator[Outcome]:
    """Do all items with the workers of a crew that ends with them; see `Crew.share_out`."""
    with Crew(name, min(workers, len(items))) as crew:
        yield from crew.share_out(work, items, tries, again)


class Crew:
    """Workers of an executor, which are kept from one lot of items to the next with all that they have loaded.

        with Crew("process", 2) as crew:
            for item, result in crew.share_out(work, items):
                print(item, result)

    They are started when they are needed, for the threads and the device of the first work. Raises `WorkersError` for
    an unknown executor.
    """

    def __init__(self, name: str, workers: int) -> None:
        """Begin without a worker."""
        check_executor(name)
        self.name = name
        self.workers = workers
        self._team: Team | None = None
        self._held = ExitStack()

    def __enter__(self) -> Crew:
        """Enter a block at whose end all workers are ended."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End all workers."""
        self._end()

    def share_out(
        self,
        work: Work,
        items: Sequence[Any],
        tries: int = 1,
        again: Again = lambda item, reason: None,
    ) -> Iterator[Outcome]:
        """Do all items; yield each with its result as soon as it is done.

        A worker that dies loses the item that it was doing, and another takes its place. The item is done up to `tries`
        times in all; after that its result is `Lost`. What `do` raises is raised here, and ends all workers.
        """
        if self.name == "serial" or not items:
            yield from ((item, work.do(item)) for item in items)
            return
        self._team = self._team or self._started(work)
        try:
            yield from _spread(self._team, work, items, min(self.workers, len(items)), tries, again)
        except BaseException:
            self._end()  # what the others still do isn't wanted any more
            raise

    def _started(self, work: Work) -> Team:
        if self.name == "process":
            return self._held.enter_context(Processes(work, self.workers))
        ray = imported_ray()
        self._held.enter_context(cluster(ray, self.workers, work.threads or 1))
        return self._held.enter_context(Actors(ray, work, self.workers))

    def _end(self) -> None:
        self._held.close()
        self._team = None


def failure_line(error: Exception) -> str:
    """Write a failure of a single item in one line: a refusal as it is, another library's error with its type."""
    return str(error) if isinstance(error, CachekitError) else f"{type(error).__name__}: {first_line(error)}"


def default_workers(name: str) -> int:
    """As many workers as there are GPUs, or two without a GPU; one for serial runs."""
    import torch

    if name == "serial":
        return 1
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def threads_of(name: str, workers: int | None = None) -> int | None:
    """Threads of each process that shares this machine with others; None where they are left as the user has them."""
    if name != "process" or "OMP_NUM_THREADS" in os.environ:
        return None
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // (workers or default_workers(name)))


def _spread(team: Team, work: Work, items: Sequence[Any], count: int, tries: int, again: Again) -> Iterator[Outcome]:
    left, idle = deque((item, 1) for item in items), team.idle
    idle.extend([team.start() for _ in range(count - len(idle))])
    busy: dict[Any, tuple[Any, Any, int]] = {}

    def fill() -> None:
        while left and len(busy) < count:
            worker = idle.pop() if idle else team.start()
            item, turn = left.popleft()
            busy[team.give(worker, work, item)] = worker, item, turn

    fill()
    while busy:
        ticket, found = team.finished(list(busy))
        worker, item, turn = busy.pop(ticket)
        repeated = isinstance(found, Lost) and turn < tries
        if not isinstance(found, Lost):
            idle.append(worker)
        elif repeated:
            left.append((item, turn + 1))
            again(item, found.reason)
        # Before the result is given away: who takes it may be slow.
        fill()
        if not repeated:
            yield item, found
