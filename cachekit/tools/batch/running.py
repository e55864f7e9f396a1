"""Drawing all rows of a batch that its folder lacks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cachekit.tools.batch.drawing import Drawing, Drawn, Job
from cachekit.tools.batch.manifest import Folder
from cachekit.tools.batch.rows import BatchError, Task
from cachekit.tools.workers import Lost, share_out

__all__ = ["Batch", "Outcome"]

#: How often a row is drawn whose workers die, before it counts as failed.
_TRIES = 3
#: How many rows may fail in the same way before any is drawn.
_ALIKE = 5


@dataclass(frozen=True)
class Outcome:
    """A row that was drawn, or the reason why it wasn't."""

    task: Task
    failure: str = ""


@dataclass
class Batch:
    """Tasks, the folder of their images, and how far the work has come."""

    job: Job
    tasks: Sequence[Task]
    folder: Folder
    drawn: int = 0
    failed: int = 0
    #: What was warned of, and of how many images.
    warned: Counter[str] = field(default_factory=Counter)
    begun: float = field(default_factory=time.monotonic)

    @property
    def total(self) -> int:
        """Number of different images."""
        return len({task.key for task in self.tasks})

    @property
    def kept(self) -> int:
        """Number of images that exist."""
        return sum(key in self.folder.images for key in {task.key for task in self.tasks})

    @property
    def per_minute(self) -> float:
        """Images drawn per minute, the loading of the model included."""
        return 60 * self.drawn / max(time.monotonic() - self.begun, 1e-9)

    def run(self, executor: str, workers: int, again: Callable[[str], None] = lambda line: None) -> Iterator[Outcome]:
        """Draw the images that the folder lacks; yield each row when its image is written, or has failed.

        A row whose worker dies is drawn by another one; `again` is called with a line about it. Raises a
        `CachekitError` for what concerns all rows, such as a model that can't be loaded, and where the first rows all
        fail for one reason.
        """
        self.begun = time.monotonic()
        left = self.folder.left(self.tasks)
        reasons: set[str] = set()

        def repeat(task: Task, reason: str) -> None:
            again(f"line {task.line}: {reason.removesuffix('; run it again')}; its row is drawn again")

        for task, found in share_out(executor, Drawing(self.job), left, workers, _TRIES, repeat):
            if isinstance(found, Drawn):
                self.folder.keep(task, found)
                self.drawn += 1
                self.warned.update(found.warnings)
                yield Outcome(task)
                continue
            reason = f"{found.reason}, {_TRIES} times" if isinstance(found, Lost) else found
            self.folder.fail(task, reason)
            self.failed += 1
            reasons.add(reason)
            if not self.drawn and len(reasons) == 1 and self.failed == _ALIKE and len(left) > _ALIKE:
                raise BatchError(f"none of the first {_ALIKE} rows can be drawn, all for one reason: {reason}")
            yield Outcome(task, reason)
