"""Cells: measurements of one contender beside the uncached pipeline, and the grids of specs they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import product
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from cachekit.errors import CachekitError
from cachekit.files import digest
from cachekit.interface.policy import Policy
from cachekit.interface.specs import Vocabulary, parse_all, split_outside
from cachekit.models.names import canonical
from cachekit.tools.bench.measuring import Configuration

__all__ = ["FULL_STEPS", "BenchError", "Cell", "Method", "Setting", "Spacing", "digest", "expand"]

#: The beginning of the spacing whose timesteps are those of the full steps of specs, which follow joined by `+`.
FULL_STEPS = "full_steps:"


class BenchError(CachekitError):
    """A measurement that cannot be made, or results that cannot be read or written."""


class Method(str, Enum):
    """What generates the images: cachekit, the plain pipeline, a policy's published package, or another cache."""

    CACHEKIT = "cachekit"
    PLAIN = "plain"
    PUBLISHED = "published"
    DIFFUSERS = "diffusers"
    CACHE_DIT = "cache-dit"


class Spacing(str, Enum):
    """Where plain steps lie that differ from the scheduler's own: by its settings `use_lu_lambdas` and so on."""

    LU_LAMBDAS = "lu_lambdas"
    KARRAS = "karras"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setting(_Frozen):
    """All that a worker needs besides a cell: the model, how to load it and how to call it."""

    model: Annotated[str, AfterValidator(canonical)]
    captions: tuple[str, ...]
    dtype: str | None = None
    device: str | None = None
    compiled: str | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    threads: int | None = None
    #: Whether images of scenes are compared with rendered ones too, by the Frechet distance.
    reference: bool = True
    metrics: tuple[tuple[str, str], ...] = ()
    pictures: int = 4


class Cell(_Frozen):
    """One measurement: everything that its figures depend on, and so the key of its result.

    `steps` are those of the contender, `uncached_steps` those of the uncached pipeline beside it; `model_hash`,
    `captions` and `environment` are digests. `spacing` is where plain steps lie: "" for the scheduler's own, a
    `Spacing`, or `full_steps:SPECS` for the timesteps of the uncached run in which these specs compute the denoiser.
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
    spacing: str = ""

    @property
    def id(self) -> str:
        """A digest of all fields."""
        # Without a spacing as it was before there were any, so that older results still count.
        return digest(self.model_dump(mode="json", exclude=None if self.spacing else {"spacing"}))

    @property
    def row(self) -> tuple[Any, ...]:
        """All fields but the seed: cells that differ in nothing else share a row."""
        return tuple(value for name, value in self if name != "seed")

    @property
    def group(self) -> tuple[Any, ...]:
        """The fields that cells compared with each other share."""
        return tuple(value for name, value in self if name not in ("seed", "method", "specs", "steps", "spacing"))

    @property
    def label(self) -> str:
        """The name of the contender in tables."""
        name = Configuration(self.steps, self.specs).label + (f", {self.spelled}" if self.spacing else "")
        if self.method in (Method.DIFFUSERS, Method.CACHE_DIT):
            return f"{self.method.value}: {name}"
        return f"{name} (published)" if self.method is Method.PUBLISHED else name

    @property
    def spelled(self) -> str:
        """The spacing in words."""
        return spelled(self.spacing)

    def plain(self, steps: int, spacing: str = "") -> Cell:
        """Cell of that many plain steps, with all else the same."""
        return self.model_copy(update={"method": Method.PLAIN, "specs": (), "steps": steps, "spacing": spacing})


def spelled(spacing: str) -> str:
    """Write a spacing in words."""
    if spacing.startswith(FULL_STEPS):
        return f"timesteps of {spacing.removeprefix(FULL_STEPS)}"
    return spacing


def expand(texts: Iterable[str], words: Vocabulary) -> list[tuple[Policy, ...]]:
    """Expand grids such as `tgate:m=3|5+deepcache:interval=2|3` into compositions, each listed once.

    Alternatives are whole values, such as `when=every(2)|mask(0;1;4)`: `|` is no separator within brackets, and binds
    weaker than the `;` of lists.
    """
    found: dict[tuple[str, ...], tuple[Policy, ...]] = {}
    for text in texts:
        for specs in product(*map(_choices, Configuration.parse(text, 1).specs)):
            parsed = parse_all(specs, words)
            found.setdefault(tuple(sorted(map(str, parsed))), parsed)
    return list(found.values())


def _choices(spec: str) -> Iterator[str]:
    """Expand one spec with alternatives, such as `tgate:m=3|5`."""
    name, colon, text = spec.partition(":")
    keys, values = [], []
    for pair in split_outside(text, ","):
        key, equals, alternatives = pair.partition("=")
        keys.append(key + equals)
        values.append(split_outside(alternatives, "|"))
    for chosen in product(*values):
        yield name + colon + ",".join(key + value for key, value in zip(keys, chosen))
