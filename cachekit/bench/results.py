"""Keep results as lines of JSON: appended one by one, read back, merged, and never lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cachekit.bench.cells import BenchError, Cell
from cachekit.bench.frechet import GaussianStats

__all__ = ["FORMAT", "Result", "Results", "Sample", "read"]

FORMAT = 1


class Sample(BaseModel):
    """Hold the figures of one caption, and those of the uncached pipeline beside it; None is not known."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    caption: str
    seconds: float
    uncached_seconds: float
    macs: int
    uncached_macs: int
    cache_bytes: int | None = None
    deciding_seconds: float = 0.0
    peak_memory: int | None = None
    uncached_peak_memory: int | None = None
    psnr: float | None = None
    ssim: float | None = None
    shown: bool | None = None
    uncached_shown: bool | None = None
    features: list[float] | None = None
    uncached_features: list[float] | None = None
    metrics: dict[str, float] = {}
    uncached_metrics: dict[str, float] = {}


class Result(BaseModel):
    """Hold all that was measured of one cell; pictures are data URIs of the contender and the uncached image.

    `reference` is the crowd of true images that the samples' features are compared with. `first_seconds` is None of
    the uncached pipeline that ran beside others.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    format: int = FORMAT
    id: str
    cell: Cell
    environment: dict[str, Any]
    first_seconds: float | None
    samples: list[Sample]
    counts: list[dict[str, Any]] = []
    plan: dict[str, Any] | None = None
    pictures: list[tuple[str, str, str]] = []
    reference: GaussianStats | None = None
    warnings: list[str] = []


class Results:
    """Append results to a file, and know which cells it holds."""

    def __init__(self, path: Path) -> None:
        """Read what is there; raise `BenchError` where `path` is no results file or cannot be written."""
        self.path = path
        found, self.problems = read(path) if path.exists() else ([], [])
        self._held = {result.id: result for result in found}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise BenchError(f"cannot write {str(path)!r}: {error.strerror}") from error
        self._mend()

    def __contains__(self, cell: Cell) -> bool:
        """Tell whether a cell has been measured."""
        return cell.id in self._held

    @property
    def all(self) -> list[Result]:
        """Return the results in the order in which they came."""
        return list(self._held.values())

    def add(self, results: Iterable[Result]) -> int:
        """Append the results whose cells are not held yet, each safe on disk before the next; return their number."""
        before = len(self._held)
        for result in results:
            if result.id not in self._held:
                self._append(result)
        return len(self._held) - before

    def _append(self, result: Result) -> None:
        try:
            with self.path.open("a") as file:
                file.write(result.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BenchError(f"cannot write {str(self.path)!r}: {error.strerror}") from error
        self._held[result.id] = result

    def _mend(self) -> None:
        """End the file with a whole line: a half-written one is cut off, a whole one gets its end."""
        data = self.path.read_bytes()
        if not data or data.endswith(b"\n"):
            return
        whole = data[: data.rfind(b"\n") + 1]
        if not self.problems:
            whole = data + b"\n"
        with self.path.open("r+b") as file:
            file.truncate(min(len(whole), len(data)))
            file.seek(0, os.SEEK_END)
            file.write(whole[len(data) :])


def read(path: Path) -> tuple[list[Result], list[str]]:
    """Return the results in a file, each cell once, and what was wrong with a half-written last line.

    Raise `BenchError` for a file that cannot be read, is of another format version, or is damaged elsewhere.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BenchError(f"cannot read results {str(path)!r}: {error.strerror}") from error
    whole, _, rest = data.rpartition(b"\n")
    lines = [*whole.split(b"\n")] if whole else []
    problems = []
    if rest and _is_cut_off(rest, bool(lines)):
        problems.append(f"{path}: line {len(lines) + 1} is half written and does not count")
    elif rest:
        lines.append(rest)
    found: dict[str, Result] = {}
    for number, line in enumerate(lines, 1):
        result = _result(path, number, line)
        found.setdefault(result.id, result)
    return list(found.values()), problems


def _is_cut_off(line: bytes, follows: bool) -> bool:
    """Tell whether a last line without an end is the beginning of a result."""
    begin = b'{"format":'
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return follows or line.startswith(begin) or begin.startswith(line)
    return False


def _result(path: Path, number: int, line: bytes) -> Result:
    where = f"{str(path)!r}, line {number}"
    try:
        version = json.loads(line)["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BenchError(f"{where}: not a result of cachekit bench; name another file") from error
    if version != FORMAT:
        raise BenchError(f"{where}: results of format {version!r}, but only {FORMAT} can be read; name another file")
    try:
        return Result.model_validate_json(line)
    except ValidationError as error:
        raise BenchError(f"{where}: damaged, {error.errors()[0]['msg']}; remove the line") from error
