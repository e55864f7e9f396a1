"""Work shared out to this process, to processes of its own, or to the actors of a Ray cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from multiprocessing import connection, get_context, parent_process
from multiprocessing.reduction import ForkingPickler
from textwrap import shorten
from typing import Any, Protocol

from cachekit.clusters import cluster, imported_ray
from cachekit.errors import CachekitError, nearest

__all__ = ["EXECUTORS", "FAILURES", "Lost", "Work", "WorkersError", "check_executor", "default_workers", "share_out"]

#: Exceptions that fail a single item and not the others: memory, shapes, a published package that is too old.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError)
#: Seconds that a worker has to end by itself.
_PATIENCE = 5.0
#: Where work can be done.
EXECUTORS = ("serial", "process", "ray")


class WorkersError(CachekitError):
    """An executor that isn't known, or a cluster with too few processors."""


class Work(Protocol):
    """What a worker does with an item; it is pickled, as items and results are.

    A worker does one item after another, so what `do` loads can be kept in the process for the next one.
    """

    @property
    def threads(self) -> int | None:
        """Threads of each worker; None for as many as torch takes."""

    @property
    def device(self) -> str | None:
        """Device of each worker; None for a GPU where there is one."""

    def do(self, item: Any) -> Any:
        """Do one item; an exception ends all work."""


@dataclass(frozen=True)
class Lost:
    """What stands for the result of an item whose workers died, with the reason."""

    reason: str


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
    """Do all items with an executor; yield each with its result as soon as it is done.

    A worker that dies loses the item that it was doing, and another takes its place. The item is done up to `tries`
    times in all; after that its result is `Lost`. What `do` raises is raised here, and ends all workers.
    """
    check_executor(name)
    count = min(workers, len(items))
    if name == "serial" or not items:
        yield from ((item, work.do(item)) for item in items)
    elif name == "process":
        with _Processes(work, count) as team:
            yield from _spread(team, items, count, tries, again)
    else:
        ray = imported_ray()
        with cluster(ray, count, work.threads or 1):
            yield from _spread(_Actors(ray, work, count), items, count, tries, again)


def default_workers(name: str) -> int:
    """As many workers as there are GPUs, or two without a GPU; one for serial runs."""
    import torch

    if name == "serial":
        return 1
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


class _Team(Protocol):
    """Workers of one sort. A ticket stands for an item that a worker does."""

    def start(self) -> Any:
        """Start a worker."""

    def give(self, worker: Any, item: Any) -> Any:
        """Give an item to a worker that has none; the ticket."""

    def finished(self, tickets: Sequence[Any]) -> tuple[Any, Any]:
        """Wait for one of these tickets; the ticket and its result, or `Lost` where its worker has died."""


def _spread(team: _Team, items: Sequence[Any], count: int, tries: int, again: Again) -> Iterator[Outcome]:
    left = deque((item, 1) for item in items)
    idle = [team.start() for _ in range(count)]
    busy: dict[Any, tuple[Any, Any, int]] = {}

    def fill() -> None:
        while left and len(busy) < count:
            worker = idle.pop() if idle else team.start()
            item, turn = left.popleft()
            busy[team.give(worker, item)] = worker, item, turn

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


# -- processes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    """A process with the end of its pipe, and its place among those that share the GPUs."""

    process: Any
    pipe: Any
    place: int


class _Processes:
    """Processes of this one. A forked process could not use a GPU that its parent has touched, so they are spawned."""

    def __init__(self, work: Work, count: int) -> None:
        self._context = get_context("spawn")
        self._work = work
        self._places = list(range(count))
        self._started: dict[Any, _Process] = {}

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        """End all processes: what they still do is not wanted any more."""
        for one in self._started.values():
            one.pipe.close()
            one.process.terminate()
        for one in self._started.values():
            one.process.join(_PATIENCE)
            one.process.kill()
            one.process.join()

    def start(self) -> _Process:
        own, theirs = self._context.Pipe()
        place = self._places.pop(0)
        process = self._context.Process(target=_serve, args=(theirs, self._work, place), daemon=True)
        process.start()
        theirs.close()
        self._started[own] = _Process(process, own, place)
        return self._started[own]

    def give(self, worker: _Process, item: Any) -> Any:
        # A dead worker has no reader; its end is found when it is waited for.
        with suppress(OSError):
            worker.pipe.send(item)
        return worker.pipe

    def finished(self, tickets: Sequence[Any]) -> tuple[Any, Any]:
        ready: Any = connection.wait(tickets)[0]
        try:
            raised, found = ready.recv()
        except (EOFError, OSError):
            dead = self._started.pop(ready)
            ready.close()
            dead.process.join()
            self._places.append(dead.place)
            return ready, Lost("a worker died, perhaps for want of memory; run it again")
        if raised:
            raise found
        return ready, found


def _serve(pipe: Any, work: Work, place: int) -> None:
    """Do items until the pipe is closed, in a process that ends with its parent."""
    # Ctrl-C reaches all processes of a terminal; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _choose_gpu(place, work.device)
    while True:
        try:
            item = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (False, work.do(item))
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            answer = (True, _picklable(error))
        pipe.send(answer)


def _picklable(error: Exception) -> Exception:
    """Make an error that the parent can read: some can be pickled and not be read again."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # as the pipe does, with what was made here alone
    except Exception:  # noqa: BLE001 - whatever an error's own pickling raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """End this process when its parent ends: a parent that is killed cannot end its workers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _choose_gpu(place: int, device: str | None) -> None:
    """Choose the GPU of a worker; workers share GPUs where there are too few."""
    if device not in (None, "cuda"):
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())


# -- Ray ----------------------------------------------------------------------------------------------------


class _Actor:
    """Does items in a process of Ray, on any machine of the cluster."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def do(self, item: Any) -> Any:
        """Do one item."""
        return self._work.do(item)


class _Actors:
    """Actors of a cluster; the ticket of an item is Ray's reference to its result."""

    def __init__(self, ray: Any, work: Work, count: int) -> None:
        self._ray = ray
        self._begin = partial(ray.remote(**_share(ray, work, count))(_Actor).remote, work)

    def start(self) -> Any:
        return self._begin()

    def give(self, worker: Any, item: Any) -> Any:
        return worker.do.remote(item)

    def finished(self, tickets: Sequence[Any]) -> tuple[Any, Any]:
        (done,), _ = self._ray.wait(list(tickets))
        return done, self._taken(done)

    def _taken(self, done: Any) -> Any:
        ray = self._ray
        try:
            return ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            # The message has many lines, and the last one has the reason.
            *_, reason = str(error).strip().splitlines()
            return Lost(shorten(reason, 200, placeholder=" ..."))


def _share(ray: Any, work: Work, workers: int) -> dict[str, Any]:
    """Resources of each actor; raise `WorkersError` where they could never be had, which Ray would wait for."""
    there = ray.cluster_resources()
    threads, processors, gpus = work.threads or 1, int(there.get("CPU", 0)), int(there.get("GPU", 0))
    if processors < workers * threads:
        needed = f"{workers} workers of {threads} threads"
        raise WorkersError(f"the Ray cluster has {processors} processors, too few for {needed}; ask for fewer")
    on_gpu = gpus and work.device in (None, "cuda")
    return {"num_cpus": threads, "num_gpus": 1 / ceil(workers / gpus) if on_gpu else 0}
