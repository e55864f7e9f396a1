"""Candidates: what a trial tries, from the policies and parts in the catalog and the numbers of their fields."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from torch import nn

from cachekit.driving.setup import Setup
from cachekit.errors import CachekitError, SpecError, nearest
from cachekit.interface.parts import Part, Schedule, StandIn, Where
from cachekit.interface.policy import PARTS, Policy
from cachekit.interface.specs import alternatives, parse_all
from cachekit.registry.catalog import Catalog
from cachekit.tools.bench.cells import spelled
from cachekit.tools.bench.measuring import Configuration

__all__ = ["FILE", "PLAIN", "Candidate", "Chooser", "Space"]

#: The value of the parameter that chooses the policy, for none.
PLAIN = "(plain steps)"
#: What is chosen among the words that a number may be replaced by, to stay with a number.
NUMBER = ""
#: First values of a whole number without a default, from the lowest.
_RUNGS = (3, 4, 5, 6)
#: Whole numbers of which greater ones save more.
_RISING = ("interval", "longest")
#: The key of policies and parts that read a file of weights.
FILE = "file"
#: How often values are drawn for a policy that has no defaults, to find out whether it fits a model.
_DRAWS = 16


@dataclass(frozen=True)
class Candidate:
    """Specs and a number of steps; without specs plain steps, with their spacing."""

    specs: tuple[str, ...]
    steps: int
    spacing: str = ""

    @property
    def label(self) -> str:
        """The name in tables."""
        spacing = f", {spelled(self.spacing)}" if self.spacing else ""
        return f"{Configuration(self.steps, self.specs).label}{spacing}"


class Chooser(Protocol):
    """Chooses values of parameters, as a trial of Optuna does."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Choose a whole number."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Choose a number."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Choose one of several values."""


class _Drawn:
    """Chooses at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._random.uniform(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._random.choice(choices)


class Space:
    """All candidates for a denoiser: the policies that find their sites in it, alone and in pairs."""

    def __init__(
        self, denoiser: nn.Module, catalog: Catalog, steps: int, spacings: Sequence[str], policies: Collection[str] = ()
    ) -> None:
        """Choose from `catalog`, or from the `policies` named alone.

        `steps` are those of the uncached pipeline, `spacings` those that plain steps have. Raises `SpecError` for an
        unknown policy.
        """
        for name in policies:
            if name not in catalog.policies:
                known = ", ".join(sorted(catalog.policies)) or "none"
                raise SpecError(f"unknown policy {name!r}{nearest(name, catalog.policies)}; known: {known}")
        self._catalog = catalog
        self._steps = steps
        self._spacings = tuple(spacings)
        self._sites = catalog.adapter_for(denoiser).sites(denoiser)
        self.policies = tuple(name for name in sorted(policies or catalog.policies) if self._fits(denoiser, name))

    @property
    def parts(self) -> list[str]:
        """The parts that may be tried."""
        return sorted({*self._catalog.places, *self._catalog.schedules, *self._catalog.stand_ins})

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of steps that cached candidates have."""
        return tuple(sorted({max(2, round(self._steps * share)) for share in (0.6, 1, 1.5, 2)}))

    def choose(self, chooser: Chooser) -> Candidate:
        """Make the candidate of a trial."""
        first = chooser.suggest_categorical("policy", (PLAIN, *self.policies))
        if first == PLAIN:
            steps = chooser.suggest_int("plain.steps", 1, max(1, self._steps - 1))
            return Candidate((), steps, chooser.suggest_categorical("plain.spacing", self._spacings))
        steps = chooser.suggest_categorical("steps", self.lengths)
        # Whether there is a second policy is drawn first: most pairs collide.
        paired = len(self.policies) > 1 and chooser.suggest_categorical("paired", (False, True))
        names = [first, *([chooser.suggest_categorical("with", self.policies)] if paired else [])]
        written = [self._spec(chooser, name, f"{place}.{name}") for place, name in enumerate(names)]
        return Candidate(tuple(sorted(str(_simplest(policy)) for policy in parse_all(written, self._catalog))), steps)

    def beginnings(self) -> Iterator[list[dict[str, Any]]]:
        """Yield ladders of parameters to begin a study with: policies, and plain steps of each spacing, in turns.

        What is higher on a ladder saves more, and is worth trying where what is below it may win: greater intervals,
        and fewer plain steps.
        """
        rungs = sorted({max(1, round(self._steps / ratio)) for ratio in (2, 3, 4)} - {self._steps}, reverse=True)
        plain = [
            [{"policy": PLAIN, "plain.steps": steps, "plain.spacing": spacing} for steps in rungs]
            for spacing in self._spacings
        ]
        ladders = [next(self._ladders(name)) for name in self.policies]
        for pair in zip_longest(ladders, plain):
            yield from filter(None, pair)

    def variations(self) -> Iterator[list[dict[str, Any]]]:
        """Yield ladders to go on with, of the policies in turns: longer runs, and other values of the first number."""
        others = [[*self._ladders(name)][1:] for name in self.policies]
        for turn in zip_longest(*others):
            yield from filter(None, turn)

    def _ladders(self, name: str) -> Iterator[list[dict[str, Any]]]:
        """Yield ladders of a policy alone, with parameters around its defaults."""
        kind, path = self._catalog.policies[name], f"0.{name}"
        alone = {"policy": name, "paired": False, "steps": self._steps, f"{path}.replaced": False}
        alone |= self._defaults(name)
        fields = {key: field for key, field in kind.model_fields.items() if int in alternatives(field.annotation)}
        whole = next((key for key, field in fields.items() if _range(field, self._steps)), None)
        if whole is None:
            yield [alone]
            return
        usual, bounds = fields[whole].default, _range(fields[whole], self._steps)
        values = (usual, usual + 1, 2 * usual) if isinstance(usual, int) else _RUNGS
        within = [value for value in values if bounds and bounds[0] <= value <= bounds[1]]
        rungs = [{**alone, f"{path}.given": whole, f"{path}.{whole}": value} for value in within]
        # A run may be too short for any of the values.
        rungs = rungs or [alone]
        if whole in _RISING:
            yield rungs
            # As many full steps, of twice as many in all.
            doubled = [2 * value for value in within[1:] if 2 * value <= bounds[1]] if bounds else []
            longer = {"steps": self.lengths[-1], f"{path}.given": whole}
            yield [{**alone, **longer, f"{path}.{whole}": value} for value in doubled]
        else:
            yield from ([rung] for rung in rungs)
        for word in _options(fields[whole]):
            yield [{**alone, f"{path}.{whole}.word": word}]

    def _fits(self, denoiser: nn.Module, name: str) -> bool:
        """Whether a policy finds its sites: as it is by default, or with one of a few values drawn at random."""
        if _stands(self._catalog.policies[name]):
            return self._accepts(denoiser, name)
        return any(self._accepts(denoiser, self._spec(_Drawn(seed), name, name)) for seed in range(_DRAWS))

    def _accepts(self, denoiser: nn.Module, spec: str) -> bool:
        try:
            Setup.of({"": denoiser}, parse_all(spec, self._catalog), self._catalog)
        except CachekitError:
            return False
        return True

    def _defaults(self, name: str) -> dict[str, Any]:
        """Parameters of a policy's numbers at their defaults, where those lie within the ranges."""
        fields = self._catalog.policies[name].model_fields
        found = {}
        for key, field in fields.items():
            value, bounds = field.default, _range(field, self._steps)
            if key in PARTS or value is None or value is PydanticUndefined:
                continue
            options = _options(field)
            if options and bounds:
                found[f"0.{name}.{key}.word"] = value if value in options else NUMBER
            if value in options or (bounds and bounds[0] <= value <= bounds[1]):
                found[f"0.{name}.{key}"] = value
        return found

    # -- writing specs ------------------------------------------------------------------------------------

    def _spec(self, chooser: Chooser, name: str, path: str) -> str:
        kind = self._catalog.policies[name]
        keys = self._keys(chooser, kind, path)
        if _takes_parts(kind) and chooser.suggest_categorical(f"{path}.replaced", (False, True)):
            keys.append(chooser.suggest_categorical(f"{path}.part", self._replacements()))
        return f"{name}:{','.join(keys)}" if keys else name

    def _keys(self, chooser: Chooser, kind: type[Part], path: str) -> list[str]:
        """Write the keys of a policy or part, with chosen values."""
        chosen = {}
        optional = []
        for key, field in kind.model_fields.items():
            if key in PARTS and field.default is None:
                continue
            base = next((base for base in (Where, Schedule, StandIn) if base in alternatives(field.annotation)), None)
            if base is not None:
                chosen[key] = self._part(chooser, base, f"{path}.{key}")
            elif field.default is None:
                optional += [key] if _range(field, self._steps) else []
            else:
                chosen[key] = _chosen(chooser, field, f"{path}.{key}", self._steps)
        if optional and not _stands(kind):
            key = chooser.suggest_categorical(f"{path}.given", optional)
            chosen[key] = _chosen(chooser, kind.model_fields[key], f"{path}.{key}", self._steps)
        return [f"{key}={value}" for key, value in chosen.items() if value is not None]

    def _part(self, chooser: Chooser, base: type[Part], path: str) -> str:
        parts = self._parts(base)
        words = [word for kind in parts.values() for word, part in kind.spellings().items() if self._finds(part)]
        alone = [name for name, kind in parts.items() if _stands_alone(kind) and self._finds(kind())]
        name = str(chooser.suggest_categorical(path, sorted([*alone, *words])))
        if name in words:
            return name
        keys = self._keys(chooser, parts[name], f"{path}.{name}") if base is not Where else []
        return f"{name}({','.join(keys)})" if keys else name

    def _finds(self, part: Part) -> bool:
        """Whether a place has targets in the model; other parts have none to find."""
        try:
            return not isinstance(part, Where) or bool(part.find(self._sites))
        except CachekitError:
            return False

    def _parts(self, base: type[Part]) -> Mapping[str, type[Part]]:
        found: dict[type[Part], Mapping[str, type[Part]]] = {
            Where: self._catalog.places, Schedule: self._catalog.schedules, StandIn: self._catalog.stand_ins
        }  # fmt: skip
        return found[base]

    def _replacements(self) -> list[str]:
        """List the parts, as they are by default, that can take the place of a policy's own."""
        pairs = (("when", self._catalog.schedules), ("what", self._catalog.stand_ins))
        return [f"{key}={name}" for key, parts in pairs for name, part in sorted(parts.items()) if _stands_alone(part)]


def _simplest(policy: Policy) -> Policy:
    """Leave out the keys that change none of a policy's choices, such as those of a schedule that is not chosen."""
    for key in [key for key, _ in policy.given() if key not in PARTS]:
        with contextlib.suppress(CachekitError):  # of a key that is needed
            simpler = type(policy)(**{name: value for name, value in policy.given() if name != key})
            policy = simpler if _does_as(simpler, policy) else policy
    return policy


def _does_as(policy: Policy, other: Policy) -> bool:
    """Whether two policies of a kind do the same; what one observes may depend on any of its fields."""
    if policy.observes or other.observes or bool(policy.caution) != bool(other.caution):
        return False
    return policy.chosen() == other.chosen()


def _stands(kind: type[Part]) -> bool:
    """Whether a policy or part can be made without any key."""
    try:
        kind()
    except CachekitError:
        return False
    return True


def _stands_alone(kind: type[Part]) -> bool:
    """Whether a part can be made without any key, and needs no file of weights: those of policies alone are made."""
    return _stands(kind) and FILE not in kind.model_fields


def _takes_parts(kind: type[Part]) -> bool:
    """Whether a spec may replace a part of a policy: where it has one choice by default."""
    if not (issubclass(kind, Policy) and _stands(kind)):
        return False
    try:
        return len(kind().chosen()) == 1
    except CachekitError:
        return False


def _options(field: FieldInfo) -> tuple[Any, ...]:
    """List the values of a field that has only a few."""
    for one in alternatives(field.annotation):
        if one is bool:
            return (False, True)
        if get_origin(one) is Literal:
            return get_args(one)
    return ()


def _range(field: FieldInfo, steps: int) -> tuple[float, float] | None:
    """Find the least and the greatest value worth trying for a number; None for what isn't one."""
    types = alternatives(field.annotation)
    if bool in types or not {int, float} & set(types):
        return None
    metadata = [*_metadata(field)]
    low = max((_float(bound.ge) for bound in metadata if isinstance(bound, Ge)), default=-math.inf)
    low = max((_float(bound.gt) for bound in metadata if isinstance(bound, Gt)), default=low)
    high = min((_float(bound.le) for bound in metadata if isinstance(bound, Le)), default=math.inf)
    high = min((_float(bound.lt) for bound in metadata if isinstance(bound, Lt)), default=high)
    usual = field.default if isinstance(field.default, (int, float)) else None
    if int in types:
        low = max(low, 0)
        return low, max(low, min(high, steps, max(3 * (usual or 4), 8)))
    if usual:
        return max(low, usual / 4), min(high, usual * 4)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Yield the constraints of a field, and of the types that it allows."""
    yield from field.metadata
    for part in get_args(field.annotation):
        for one in get_args(part)[1:] if get_origin(part) is Annotated else ():
            yield from one.metadata if isinstance(one, FieldInfo) else (one,)


def _float(bound: Any) -> float:
    return float(bound)


def _chosen(chooser: Chooser, field: FieldInfo, path: str, steps: int) -> Any:
    """Choose the text of a field; None leaves it as it is."""
    options, bounds = _options(field), _range(field, steps)
    if options and bounds:
        word = chooser.suggest_categorical(f"{path}.word", (NUMBER, *options))
        if word != NUMBER:
            return word
    elif options:
        value = chooser.suggest_categorical(path, options)
        return str(value).lower() if isinstance(value, bool) else value
    if bounds is None or bounds[0] > bounds[1]:
        return None
    low, high = bounds
    if int in alternatives(field.annotation):
        return chooser.suggest_int(path, int(low), int(high))
    return f"{chooser.suggest_float(path, low, high, log=low > 0):.3g}"
