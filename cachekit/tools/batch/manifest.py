"""The folder of a batch: its images, and a manifest with a line for each row that was drawn or failed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cachekit.files import write_whole
from cachekit.tools.batch.drawing import Drawn
from cachekit.tools.batch.rows import BatchError, Task

__all__ = ["MANIFEST", "Folder", "is_batch"]

MANIFEST = "manifest.jsonl"


def is_batch(path: Path) -> bool:
    """Whether a folder is that of a batch."""
    return (path / MANIFEST).is_file()


class Folder:
    """Images named by the number of their row and the digest of what they depend on.

    An image is written in one piece, so a file that exists is whole. The manifest is only appended to: the last line
    of a row holds.
    """

    def __init__(self, path: Path) -> None:
        """Make the folder; raises `BatchError` where nothing can be written there."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._file.open("a").close()
        except OSError as error:
            raise BatchError(f"cannot write images to {str(path)!r}: {error.strerror}; give another folder") from error

    @property
    def _file(self) -> Path:
        return self.path / MANIFEST

    @cached_property
    def images(self) -> dict[str, str]:
        """The names of the images that exist, by the digest of what they depend on."""
        return {path.stem.rpartition("-")[2]: path.name for path in sorted(self.path.glob("*-*.png"))}

    def left(self, tasks: Sequence[Task]) -> list[Task]:
        """List the tasks whose images don't exist, the first of each that several rows share."""
        return list({task.key: task for task in reversed(tasks) if task.key not in self.images}.values())[::-1]

    def keep(self, task: Task, drawn: Drawn) -> Path:
        """Write an image, and then its line of the manifest."""
        path = self.path / f"{task.number:06}-{task.key}.png"
        write_whole(path, drawn.png, BatchError)
        self.images[task.key] = path.name
        self._append(task, {"file": path.name, **drawn.description, "worker": drawn.worker, "report": drawn.report})
        return path

    def fail(self, task: Task, reason: str) -> None:
        """Write the line of a row that could not be drawn."""
        self._append(task, {"file": None, **task.settings, "error": reason})

    def _append(self, task: Task, data: dict[str, Any]) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        line = json.dumps({"row": task.number, "line": task.line, "key": task.key, "at": at, **data})
        try:
            with self._file.open("a") as end:
                end.write(line + "\n")
        except OSError as error:
            raise BatchError(f"cannot write {str(self._file)!r}: {error.strerror}; give another path") from error
