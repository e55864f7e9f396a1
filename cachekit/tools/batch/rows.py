"""Rows of a file of prompts: a prompt on each line, or a JSON object with settings of its own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cachekit.errors import CachekitError, SpecError, nearest, reason_of
from cachekit.files import digest
from cachekit.interface.specs import joined, parse_all
from cachekit.registry.catalog import installed

__all__ = ["BatchError", "Defaults", "Row", "Rows", "Task", "read_rows", "size_of", "tasks_of"]

#: Suffixes of files whose lines are JSON objects.
_JSON = (".json", ".jsonl", ".ndjson")
_SIZE = re.compile(r"(\d{1,5})\s*[xX]\s*(\d{1,5})")


class BatchError(CachekitError):
    """A file of prompts, or a folder of images, that can't be used."""


def size_of(text: Any) -> tuple[int, int]:
    """Read a width and a height in pixels, such as "768x512"; raises `ValueError` for anything else."""
    found = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    width, height = map(int, found.groups()) if found else (0, 0)
    if not width or not height:
        raise ValueError("give width x height in pixels, such as '768x512'")
    return width, height


def _specs(value: Any) -> tuple[str, ...]:
    """Read a spec, several joined by +, or a list of them; an empty one is the plain pipeline."""
    if isinstance(value, str):
        return tuple(joined(value)) if value.strip() else ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("give a spec, or a list of specs")
    return tuple(spec for one in value for spec in joined(one))


class Row(BaseModel):
    """A row of the file; what it leaves out is as for the whole batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    steps: int | None = Field(default=None, ge=1)
    #: Width and height in pixels.
    size: Annotated[tuple[int, int], BeforeValidator(size_of)] | None = None
    guidance: float | None = Field(default=None, ge=0)
    spec: Annotated[tuple[str, ...], BeforeValidator(_specs)] | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of a file with the numbers of their lines, from 1, and why others can't be read."""

    source: str
    rows: Sequence[tuple[int, Row]]
    problems: Sequence[tuple[int, str]] = ()

    def problem_lines(self, others: Sequence[tuple[int, str]]) -> list[str]:
        """Write a line for each row that can't be read or used, in the order of the file."""
        return [f"{self.source}:{number}: {reason}" for number, reason in sorted([*self.problems, *others])]


@dataclass(frozen=True)
class Defaults:
    """What rows have where they leave it out; the seed counts up with the rows."""

    seed: int = 0
    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    specs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """An image to draw. `key` is a digest of all that it depends on, besides the files of the model and versions."""

    #: Number of the row, from 0, and of its line, from 1.
    number: int
    line: int
    prompt: str
    seed: int
    steps: int | None
    size: tuple[int, int] | None
    guidance: float | None
    #: As given, and as the policies write them.
    specs: tuple[str, ...]
    parsed: tuple[str, ...]
    key: str = field(default="", compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What the image depends on, as plain data."""
        size = list(self.size) if self.size else None
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "size": size,
            "guidance": self.guidance,
            "specs": list(self.parsed),
        }


def read_rows(source: str) -> Rows:
    """Read a file of prompts, or standard input where `source` is "-".

    A file with a suffix such as .jsonl, or whose first line begins with a brace, has a JSON object on each line; any
    other file has a prompt on each line. Empty lines are left out. Raises `BatchError` where there is no row that can
    be read.
    """
    # Other line boundaries of Unicode may stand within a prompt.
    lines = [(number, line.strip()) for number, line in enumerate(_text(source).split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise BatchError(f"prompts {source!r}: the file holds none; write a prompt on each line")
    is_json = Path(source).suffix.lower() in _JSON or lines[0][1].startswith("{")
    rows: list[tuple[int, Row]] = []
    problems: list[tuple[int, str]] = []
    for number, line in lines:
        try:
            rows.append((number, _row(line) if is_json else Row(prompt=line)))
        except (SpecError, ValueError, RecursionError) as error:
            problems.append((number, _reason(error)))
    if not rows:
        raise BatchError(f"prompts {source!r}: no row can be read; line {problems[0][0]}: {problems[0][1]}")
    return Rows(source, rows, problems)


def _text(source: str) -> str:
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise BatchError(f"cannot read prompts {source!r}: {reason}; give a text file, or JSON lines") from error


def _row(line: str) -> Row:
    data = json.loads(line)
    if not isinstance(data, dict):
        raise ValueError(f"{line[:40]!r} is no JSON object")
    unknown = next((key for key in data if key not in Row.model_fields), None)
    if unknown is not None:
        allowed = ", ".join(Row.model_fields)
        raise ValueError(f"unknown key {unknown!r}{nearest(unknown, Row.model_fields)}; allowed: {allowed}")
    return Row(**data)


def _reason(error: Exception) -> str:
    """Write one line for a row that can't be read, with what is allowed."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        message = reason_of(first)
        key = str(first["loc"][0])
        if first["type"] == "missing":
            return f"{key} is needed"
        return f"{key}={str(first['input'])[:60]!s}: {message}"
    if isinstance(error, json.JSONDecodeError):
        return f'not JSON: {error}; write {{"prompt": "a cat", "seed": 1}}'
    return " ".join(str(error).split())


def tasks_of(rows: Rows, defaults: Defaults, identity: Any) -> tuple[list[Task], list[tuple[int, str]]]:
    """Make the tasks of rows; collect the lines whose specs are wrong, with the reasons.

    `identity` is plain data that all images depend on.
    """
    tasks: list[Task] = []
    problems: list[tuple[int, str]] = []
    for number, (line, row) in enumerate(rows.rows):
        specs = defaults.specs if row.spec is None else row.spec
        try:
            parsed = tuple(sorted(map(str, parse_all(specs, installed()))))
        except CachekitError as error:
            problems.append((line, str(error)))
            continue
        task = Task(
            number=number,
            line=line,
            prompt=row.prompt,
            seed=defaults.seed + number if row.seed is None else row.seed,
            steps=_either(row.steps, defaults.steps),
            size=_either(row.size, defaults.size),
            guidance=_either(row.guidance, defaults.guidance),
            specs=specs,
            parsed=parsed,
        )
        tasks.append(replace(task, key=digest([identity, task.settings])))
    return tasks, problems


def _either(own: Any, default: Any) -> Any:
    return default if own is None else own
