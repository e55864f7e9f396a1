"""Workers of each sort: processes of this machine, and actors of a Ray cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from multiprocessing import connection, get_context, parent_process
from multiprocessing.reduction import ForkingPickler
from textwrap import shorten
from typing import Any, Protocol

from cachekit.errors import CachekitError

__all__ = ["Actors", "Lost", "Processes", "Team", "Work", "WorkersError"]

#: Seconds that a worker has to end by itself.
_PATIENCE = 5.0


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


class Team(Protocol):
    """Workers of one sort. A ticket stands for an item that a worker does."""

    @property
    def idle(self) -> list[Any]:
        """The workers that have no item."""

    def start(self) -> Any:
        """Start a worker."""

    def give(self, worker: Any, work: Work, item: Any) -> Any:
        """Give an item to a worker that has none; the ticket."""

    def finished(self, tickets: Sequence[Any]) -> tuple[Any, Any]:
        """Wait for one of these tickets; the ticket and its result, or `Lost` where its worker has died."""


# -- processes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    """A process with the end of its pipe, and its place among those that share the GPUs."""

    process: Any
    pipe: Any
    place: int


class Processes:
    """Processes of this one. A forked process could not use a GPU that its parent has touched, so they are spawned."""

    def __init__(self, work: Work, count: int) -> None:
        self.idle: list[_Process] = []
        self._context = get_context("spawn")
        self._device = work.device
        self._places = list(range(count))
        self._started: dict[Any, _Process] = {}

    def __enter__(self) -> Processes:
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
        """Spawn a process."""
        own, theirs = self._context.Pipe()
        place = self._places.pop(0)
        process = self._context.Process(target=_serve, args=(theirs, self._device, place), daemon=True)
        process.start()
        theirs.close()
        self._started[own] = _Process(process, own, place)
        return self._started[own]

    def give(self, worker: _Process, work: Work, item: Any) -> Any:
        """Send an item to a process; its end of the pipe."""
        # A dead worker has no reader; its end is found when it is waited for.
        with suppress(OSError):
            worker.pipe.send((work, item))
        return worker.pipe

    def finished(self, tickets: Sequence[Any]) -> tuple[Any, Any]:
        """Wait until one of these pipes has a result, or has lost its process; raises what the work has raised."""
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


def _serve(pipe: Any, device: str | None, place: int) -> None:
    """Do items until the pipe is closed, in a process that ends with its parent."""
    # Ctrl-C reaches all processes of a terminal; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _choose_gpu(place, device)
    with suppress(EOFError, OSError):  # where the parent has closed the pipe
        while True:
            pipe.send(_answer(*pipe.recv()))
    # The process is ending already: to exit from within what runs at exit would print a traceback.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _answer(work: Work, item: Any) -> tuple[bool, Any]:
    """Do an item: whether it has raised, and its result or the error."""
    try:
        return False, work.do(item)
    except Exception as error:  # noqa: BLE001 - raised again in the parent
        return True, _picklable(error)


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

    def do(self, work: Work, item: Any) -> Any:
        """Do one item."""
        return work.do(item)


class Actors:
    """Actors of a cluster; the ticket of an item is Ray's reference to its result."""

    def __init__(self, ray: Any, work: Work, count: int) -> None:
        self.idle: list[Any] = []
        self._ray = ray
        self._begin = ray.remote(**_share(ray, work, count))(_Actor).remote

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *exception: object) -> None:
        """End all actors."""
        self.idle.clear()

    def start(self) -> Any:
        """Ask for an actor."""
        return self._begin()

    def give(self, worker: Any, work: Work, item: Any) -> Any:
        """Call an actor; the reference to its result."""
        return worker.do.remote(work, item)

    def finished(self, tickets: Sequence[Any]) -> tuple[Any, Any]:
        """Wait for one of these results, or for the loss of its actor; raises what the work has raised."""
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
