"""Run batches of prompts in step with each other, and add up their sums before a step is solved."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from typing import TypeVar

from cachekit.tools.calibrating.fits import StepFit
from cachekit.tools.calibrating.sums import Sums

#: Adds the sums of a step over all processes: given the step and this process' sums, it gives the total.
Exchange = Callable[[int, Sums], Sums]
_Made = TypeVar("_Made")


def alone(step: int, sums: Sums) -> Sums:
    """Exchange sums with no other process."""
    return sums


class Lockstep:
    """Where the threads of all batches meet in each step; at most `turns` of them run at once."""

    def __init__(self, batches: int, turns: int, exchange: Exchange) -> None:
        """Wait for `batches` threads in each step."""
        self.fits: list[StepFit] = []
        self._turns = threading.Semaphore(turns)
        self._entrance = threading.Lock()
        self._exchange = exchange
        self._sums: list[Sums | None] = [None] * batches
        self._barrier = threading.Barrier(batches, action=self._solve)

    def meet(self, place: int, step: int, sums: Sums) -> StepFit:
        """Add the sums of batch `place`, wait for the others, and get the step's weights."""
        self._sums[place] = sums
        self._turns.release()
        try:
            self._barrier.wait()
        finally:
            self._turns.acquire()
        return self.fits[step]

    @contextlib.contextmanager
    def entering(self) -> Iterator[Callable[[], None]]:
        """Keep other threads out of this block until the function that it is given is called, or it ends.

        Before their loop, pipelines use tokenizers, which are no good in several threads.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._entrance)
            yield stack.close

    def _solve(self) -> None:
        # In the order of the batches, so that rounding doesn't depend on which thread came first.
        total = reduce(add, [sums for sums in self._sums if sums is not None])
        self.fits.append(StepFit.of(self._exchange(len(self.fits), total)))

    def run(self, works: Sequence[Callable[[], _Made]]) -> list[_Made]:
        """Run the work of each batch in a thread; raises the first error that isn't another's consequence."""
        with ThreadPoolExecutor(len(works)) as pool:
            futures = [pool.submit(self._in_turn, work) for work in works]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def _in_turn(self, work: Callable[[], _Made]) -> _Made:
        with self._turns:
            try:
                return work()
            except BaseException:
                self._barrier.abort()
                raise
