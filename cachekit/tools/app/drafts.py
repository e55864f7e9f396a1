"""Specs in the making: the values of a form as they are written in a spec, checked or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Union

from cachekit.errors import SpecError
from cachekit.interface.parts import Part, Schedule, StandIn, Where, word
from cachekit.interface.policy import Policy
from cachekit.interface.specs import Vocabulary, alternatives, joined, parse_all

__all__ = ["JOIN", "Draft", "base_of", "canonical", "drafts_of", "parts_of", "specs_of"]

#: Joins specs that are applied together.
JOIN = " + "
#: The text of a value, or a part in the making.
Value = Union[str, "Draft"]


@dataclass(frozen=True)
class Draft:
    """A policy or part in the making: its name, and the values that were given for its keys.

    >>> str(Draft("every", {"n": "3"})), Draft("window", {"stop": "9", "when": Draft("every", {"n": "3"})}).spec
    ('every(n=3)', 'window:stop=9,when=every(n=3)')
    """

    name: str
    values: Mapping[str, Value] = field(default_factory=dict)

    @classmethod
    def of(cls, part: Part) -> Draft:
        """Take apart what has been parsed; values that are defaults are left out."""
        return cls(part.name, {key: _value(value) for key, value in part.given()})

    def with_value(self, key: str, value: Value | None) -> Draft:
        """Change the value of a key; None or an empty text leaves it to its default."""
        others = {name: given for name, given in self.values.items() if name != key}
        return replace(self, values={**others, key: value} if value else others)

    @property
    def spec(self) -> str:
        """The spec of a policy, as it was given."""
        return f"{self.name}:{self._keys}" if self.values else self.name

    def __str__(self) -> str:
        """Write the value of a key that takes a part."""
        return f"{self.name}({self._keys})" if self.values else self.name

    @property
    def _keys(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.values.items())


def _value(value: object) -> Value:
    return Draft.of(value) if isinstance(value, Part) else word(value)


def specs_of(text: str) -> tuple[str, ...]:
    """Split specs that are joined by `+`; an empty text has none.

    Raises `SpecError` where there is nothing on one side of a `+`.
    """
    return tuple(joined(text)) if text.strip() else ()


def drafts_of(text: str, words: Vocabulary) -> tuple[Draft, ...]:
    """Parse specs joined by `+` into drafts; a preset becomes the policies that it stands for.

    Raises a `CachekitError` as `parse_all` does.
    """
    return tuple(Draft.of(policy) for policy in parse_all(specs_of(text), words))


def canonical(drafts: Sequence[Draft], words: Vocabulary) -> str:
    """Write drafts as the policies write themselves, or as they were given where they can't be parsed."""
    given = [draft.spec for draft in drafts]
    try:
        return JOIN.join(map(str, parse_all(given, words)))
    except SpecError:
        return JOIN.join(given)


def base_of(made: type[Part], key: str) -> type[Part] | None:
    """Find what a key takes, if it is a part: `Where`, `Schedule` or `StandIn`."""
    types = [one for one in alternatives(made.model_fields[key].annotation) if isinstance(one, type)]
    return next((base for base in (Where, Schedule, StandIn) if any(issubclass(one, base) for one in types)), None)


def parts_of(base: type[Part], words: Vocabulary) -> Mapping[str, type[Part]]:
    """List the parts or policies of a kind by name, sorted."""
    found: dict[type[Part], Mapping[str, type[Part]]] = {
        Policy: words.policies, Where: words.places, Schedule: words.schedules, StandIn: words.stand_ins
    }  # fmt: skip
    return dict(sorted(found[base].items()))
