"""Results as lines of JSON: appended one by one, read back and merged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from cachekit.tools.bench.cells import BenchError, Cell
from cachekit.tools.bench.frechet import GaussianStats

__all__ = ["FORMAT", "Result", "Results", "Sample", "read"]

FORMAT = 1


class Sample(BaseModel):
    """The figures of one caption, and those of the uncached pipeline beside it; None where not measured."""

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

    @model_serializer(mode="wrap")
    def _measured(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was not measured."""
        return {name: value for name, value in serialize(self).items() if value is not None and value != {}}


class Result(BaseModel):
    """The measurements of one cell.

    `pictures` are (caption, contender's image, uncached image), as data URIs. `reference` are the statistics of the
    reference images whose features those of the samples are compared with. `first_seconds` is None for the uncached
    pipeline that ran beside others.
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
    """A file of results, which holds each cell once."""

    def __init__(self, path: Path) -> None:
        """Read the file if it exists; raise `BenchError` where it is no results file or cannot be written."""
        self.path = path
        found, self.problems = read(path) if path.exists() else ([], [])
        self._held = {result.id: result for result in found}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise BenchError(f"cannot write {str(path)!r}: {error.strerror}; give another path") from error
        self._mend()

    def __contains__(self, cell: Cell) -> bool:
        """Whether a cell has been measured."""
        return cell.id in self._held

    @property
    def all(self) -> list[Result]:
        """The results in the order of the file."""
        return list(self._held.values())

    def add(self, results: Iterable[Result]) -> int:
        """Append the results of cells that the file lacks, and count them; each is on disk before the next."""
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
            raise BenchError(f"cannot write {str(self.path)!r}: {error.strerror}; give another path") from error
        self._held[result.id] = result

    def _mend(self) -> None:
        """Repair the end of the file: cut off a half-written last line, or add the newline to a whole one."""
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
    """Read the results in a file, each cell once, and the problems found: a half-written last line.

    Raises `BenchError` for a file that cannot be read, is of another format version, or is damaged elsewhere.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BenchError(
            f"cannot read results {str(path)!r}: {error.strerror}; name a file that cachekit bench has written"
        ) from error
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
    """Whether a last line without a newline is the beginning of a result."""
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
