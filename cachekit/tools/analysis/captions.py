"""The captions of an analysis, none of which is empty or cut off by the text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cachekit.tools.bench.captions import cut_off, read_captions
from cachekit.tools.bench.cells import BenchError


def usable_captions(source: str, limit: int | None, pipe: Any) -> tuple[str, ...]:
    """Read captions as the bench does; raises `BenchError` for the first line that is empty or too long for `pipe`."""
    texts = read_captions(source, limit).texts
    lines = list(_lines(source)) or list(enumerate(texts, 1))
    for number, line in lines[:limit]:
        if not line.strip():
            raise BenchError(f"captions {source!r}: line {number} is empty; write a caption in each line")
        if reason := cut_off(line, pipe):
            raise BenchError(f"captions {source!r}: line {number} {reason}: shorten it")
    return texts


def _lines(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, but for an empty end; none of another source."""
    if source.isdecimal() or source.lower().endswith(".json"):
        return
    yield from enumerate(Path(source).read_text(encoding="utf-8").rstrip().split("\n"), 1)
