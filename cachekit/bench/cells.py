"""Name what is measured: cells, each one contender beside the uncached pipeline, and grids of specs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from itertools import product
from typing import Any

from pydantic import BaseModel, ConfigDict

from cachekit.bench.measuring import Configuration
from cachekit.errors import CachekitError
from cachekit.interface.policy import Policy
from cachekit.interface.specs import parse_all

__all__ = ["BenchError", "Cell", "Method", "Setting", "digest", "expand"]


class BenchError(CachekitError):
    """Report a measurement that cannot be made, or results that cannot be read or written."""


class Method(str, Enum):
    """Say who draws: cachekit, the plain pipeline, the published package of a policy, or a cache of others."""

    CACHEKIT = "cachekit"
    PLAIN = "plain"
    PUBLISHED = "published"
    DIFFUSERS = "diffusers"
    CACHE_DIT = "cache-dit"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setting(_Frozen):
    """Hold what a worker must know before it can measure any cell: the model, how to load and how to call it."""

    model: str
    captions: tuple[str, ...]
    dtype: str | None = None
    device: str | None = None
    compiled: str | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    threads: int | None = None
    metrics: tuple[tuple[str, str], ...] = ()
    pictures: int = 4


class Cell(_Frozen):
    """Name one measurement: everything that its figures depend on, and so the key of its result.

    `steps` are the contender's, `uncached_steps` those of the pipeline beside it; `model_hash`, `captions` and
    `environment` are digests.
    """

    model: str
    model_hash: str
    method: Method
    specs: tuple[str, ...]
    steps: int
    uncached_steps: int
    scheduler: str
    seed: int
    captions: str
    dtype: str | None
    device: str | None
    compiled: str | None
    height: int | None
    width: int | None
    guidance: float | None
    metrics: tuple[str, ...]
    environment: str

    @property
    def id(self) -> str:
        """Return the digest of all fields."""
        return digest(self.model_dump(mode="json"))

    @property
    def row(self) -> tuple[Any, ...]:
        """Return what cells share that differ in their seeds alone."""
        return tuple(value for name, value in self if name != "seed")

    @property
    def group(self) -> tuple[Any, ...]:
        """Return what cells share that are compared with each other."""
        return tuple(value for name, value in self if name not in ("seed", "method", "specs", "steps"))

    @property
    def label(self) -> str:
        """Return what tables call the contender."""
        name = Configuration(self.steps, self.specs).label
        if self.method in (Method.DIFFUSERS, Method.CACHE_DIT):
            return f"{self.method.value}: {name}"
        return f"{name} (published)" if self.method is Method.PUBLISHED else name


def digest(data: Any) -> str:
    """Return a short digest of plain data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expand(texts: Iterable[str], policies: Mapping[str, type[Policy]]) -> list[tuple[Policy, ...]]:
    """Return the compositions that a grid stands for, each once, such as `tgate:m=3|5+deepcache:interval=2|3`."""
    found: dict[tuple[str, ...], tuple[Policy, ...]] = {}
    for text in texts:
        for specs in product(*map(_choices, Configuration.parse(text, 1).specs)):
            parsed = parse_all(specs, policies)
            found.setdefault(tuple(sorted(map(str, parsed))), parsed)
    return list(found.values())


def _choices(spec: str) -> Iterator[str]:
    """Yield the specs that one spec with alternatives stands for."""
    name, colon, text = spec.partition(":")
    keys, values = [], []
    for pair in text.split(","):
        key, equals, alternatives = pair.partition("=")
        keys.append(key + equals)
        values.append(alternatives.split("|"))
    for chosen in product(*values):
        yield name + colon + ",".join(key + value for key, value in zip(keys, chosen))
