"""Forms of policies and parts: a control for each key, made from the schema of the class that a plugin registers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from cachekit.errors import CachekitError
from cachekit.interface.parts import Part, word
from cachekit.interface.policy import PARTS, Policy
from cachekit.interface.specs import Vocabulary
from cachekit.tools.app.drafts import Draft, base_of, parts_of

__all__ = ["OWN", "Control", "Kind", "controls", "edited", "number", "started"]

#: The value of a menu that leaves a part to its policy.
OWN = ""
#: Sliders have about this many marks where the values are no whole numbers.
_MARKS = 100
#: The greatest end of a slider that is taken from a bound of the schema; a bound beyond it only forbids nonsense.
_FAR = 100


class Kind(str, Enum):
    """How the value of a key is chosen."""

    NUMBER = "number"
    FLAG = "flag"
    MENU = "menu"
    TEXT = "text"
    PART = "part"


@dataclass(frozen=True)
class Control:
    """How the value of one key is chosen, and its present value as it is written in a spec.

    A number has ends where it can be a slider. `words` are those of a menu, and those that may stand in place of a
    number, or the names of parts. `part` is what a key that takes a part has at present, given or by default.
    """

    key: str
    kind: Kind
    text: str = ""
    words: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    part: Draft | None = None
    base: type[Part] | None = None
    #: The name of the part that the policy chooses where none is given; None where the key can't be left out.
    own: str | None = None

    @property
    def is_word(self) -> bool:
        """Whether a number's present value is one of the words."""
        return self.text in self.words

    @property
    def number(self) -> float:
        """The present value of a number, or what to begin with where it is a word."""
        if self.is_word:
            return self.low if self.low is not None else 0
        return float(self.text)


def controls(draft: Draft, base: type[Part], words: Vocabulary) -> list[Control]:
    """List a control for each key of a policy or part, in the order of its fields.

    A policy's `where`, `when` and `what` come last, where a spec may give them. There are no controls for a name that
    `words` lacks.
    """
    made = parts_of(base, words).get(draft.name)
    if made is None:
        return []
    hidden, own = _replaceable(made)
    keys = sorted(made.model_fields, key=lambda key: key in PARTS and issubclass(made, Policy))
    return [_control(key, made, draft, words, own) for key in keys if key not in hidden]


def started(name: str, base: type[Part], words: Vocabulary) -> Draft:
    """Begin a policy or part: keys that are needed have the first value that their schema allows."""
    made = parts_of(base, words)[name]
    draft, schema = Draft(name), _schema(made)
    for key, described in made.model_fields.items():
        if not described.is_required():
            continue
        kind = base_of(made, key)
        if kind is not None:
            draft = draft.with_value(key, started(next(iter(parts_of(kind, words))), kind, words))
        else:
            draft = draft.with_value(key, _first(_options(schema.get("properties", {}).get(key, {}), schema)))
    return draft


def edited(draft: Draft, base: type[Part], path: Sequence[str], value: str, words: Vocabulary) -> Draft:
    """Change the value at the end of a path of keys; a part is given by its name, and begins anew.

    >>> from cachekit import Schedule
    >>> from cachekit.registry.catalog import installed
    >>> print(edited(Draft("window"), Schedule, ("when", "n"), "4", installed()))
    window(when=every(n=4))
    """
    key, *rest = path
    made = parts_of(base, words)[draft.name]
    kind = base_of(made, key)
    if kind is None:
        return draft.with_value(key, value)
    if not rest:
        known = value in parts_of(kind, words)
        return draft.with_value(key, started(value, kind, words) if known else None)
    inner = _present(draft, key, made)
    return draft.with_value(key, edited(inner, kind, rest, value, words)) if inner else draft


def number(value: float) -> str:
    """Write a number of a slider without the error of its binary fraction.

    >>> number(0.1 + 0.2), number(3.0)
    ('0.3', '3')
    """
    return format(value, ".12g")


# -- from a schema to controls ----------------------------------------------------------------------------


@functools.cache
def _replaceable(made: type[Part]) -> tuple[frozenset[str], Mapping[str, str]]:
    """Find the keys that a spec can't give, and the names of the parts that stand at those that it can.

    Parts can be replaced where a policy has one choice.
    """
    if not issubclass(made, Policy):
        return frozenset(), {}
    try:
        choices = list(made().chosen().values())
    except CachekitError:  # the choices depend on keys that are needed
        return frozenset(), {}
    if len(choices) != 1:
        return frozenset(PARTS), {}
    return frozenset(), {key: getattr(choices[0], key).name for key in PARTS}


@functools.cache
def _schema(made: type[Part]) -> dict[str, Any]:
    """Make the JSON schema of a class; empty for one that has none, whose keys are texts."""
    try:
        return made.model_json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}


def _control(key: str, made: type[Part], draft: Draft, words: Vocabulary, own: Mapping[str, str]) -> Control:
    base = base_of(made, key)
    if base is not None:
        inner = _present(draft, key, made)
        names = tuple(parts_of(base, words))
        left_out = own.get(key, "") if made.model_fields[key].default is None else None
        return Control(key, Kind.PART, inner.name if inner else OWN, names, part=inner, base=base, own=left_out)
    schema, default = _schema(made), _default(made, key)
    text = str(draft.values.get(key, default))
    return _chosen(key, text, default, _options(schema.get("properties", {}).get(key, {}), schema))


def _present(draft: Draft, key: str, made: type[Part]) -> Draft | None:
    """Find the part that a key has, given or by default; None where the policy chooses it."""
    given = draft.values.get(key)
    if isinstance(given, Draft):
        return given
    default = made.model_fields[key].get_default(call_default_factory=True)
    return Draft.of(default) if isinstance(default, Part) else None


def _default(made: type[Part], key: str) -> str:
    described = made.model_fields[key]
    return "" if described.is_required() else word(described.get_default(call_default_factory=True))


@dataclass(frozen=True)
class _Options:
    """What a key takes: words, numbers between two bounds, or a text of any kind."""

    words: tuple[str, ...] = ()
    numbers: tuple[dict[str, Any], ...] = ()
    others: tuple[dict[str, Any], ...] = ()


def _options(described: dict[str, Any], schema: dict[str, Any]) -> _Options:
    """Sort the alternatives of a key."""
    words: list[str] = []
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for one in _flat(described, schema):
        if one.get("type") == "null":
            words.append(word(None))
        elif one.get("type") == "boolean" and "const" not in one:
            words += [word(True), word(False)]
        elif "enum" in one or "const" in one:
            words += [word(value) for value in one.get("enum", [one.get("const")])]
        else:
            found[one.get("type") in ("integer", "number")].append(one)
    return _Options(tuple(words), tuple(found[True]), tuple(found[False]))


def _flat(described: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the alternatives of a schema, with definitions in place of references to them."""
    if "$ref" in described:
        yield from _flat(schema["$defs"][described["$ref"].rpartition("/")[2]], schema)
    elif "anyOf" in described:
        for one in described["anyOf"]:
            yield from _flat(one, schema)
    elif "allOf" in described:
        yield from _flat(described["allOf"][0], schema)
    else:
        yield described


def _chosen(key: str, text: str, default: str, options: _Options) -> Control:
    """Choose the control for a key by what it takes."""
    if set(options.words) == {"true", "false"} and not options.numbers + options.others:
        return Control(key, Kind.FLAG, text)
    if options.words and not options.numbers + options.others:
        return Control(key, Kind.MENU, text, options.words)
    if options.numbers and not options.others and (_is_number(text) or text in options.words):
        control = Control(key, Kind.NUMBER, text, options.words)
        return _with_ends(control, options.numbers, float(default) if _is_number(default) else 0)
    return Control(key, Kind.TEXT, text, options.words)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _with_ends(control: Control, numbers: Sequence[dict[str, Any]], default: float) -> Control:
    """Give a number the ends of a slider, from its bounds, its default and its present value.

    A number without a lower bound has none, because no end would be sensible.
    """
    whole = all(one["type"] == "integer" for one in numbers)
    low, above = (_bound(numbers, name) for name in ("minimum", "exclusiveMinimum"))
    high, below = (_bound(numbers, name) for name in ("maximum", "exclusiveMaximum"))
    lowest, highest = (low if low is not None else above), (high if high is not None else below)
    if lowest is None:
        return replace(control, step=1 if whole else None)
    if highest is None or highest > _FAR:
        far = max(10, 3 * default) if whole else lowest + 10 * ((default - lowest) or 1)
        highest = far if highest is None else min(far, highest)
    step = 1 if whole else 10.0 ** math.floor(math.log10((highest - lowest) / _MARKS))
    lowest += step * (low is None)
    highest -= step * (high is None and below is not None and below == highest)
    if not control.is_word:
        lowest, highest = min(lowest, float(control.text)), max(highest, float(control.text))
    return replace(control, low=lowest, high=highest, step=step)


def _bound(numbers: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((float(one[name]) for one in numbers if name in one), None)


def _first(options: _Options) -> str:
    """Find the first value that a key takes."""
    if options.words:
        return options.words[0]
    for one in options.numbers:
        return number(one.get("minimum", one.get("exclusiveMinimum", -1) + 1))
    for one in options.others:
        if one.get("type") == "array":
            items = _options(one.get("items", {}), {})
            return ";".join([_first(items)] * max(1, one.get("minItems", 1)))
    return ""
