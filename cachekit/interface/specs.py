"""Parse specs such as `tgate:m=10,keep=cond` or `cache:where=denoiser,when=every(3),what=linear` into policies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Protocol, TypeVar, Union, get_args, get_origin

from cachekit.errors import SpecError, nearest
from cachekit.interface.parts import Part, Schedule, StandIn, Where
from cachekit.interface.policy import PARTS, Policy
from cachekit.interface.presets import Preset, expanded, is_preset

#: A policy, or its spec: `name` or `name:key=value,key=value`, or several joined by `+`.
Spec = Union[str, Policy]

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_BRACKETS = {"(": 1, ")": -1}
_NOUNS: Mapping[type[Part], str] = {Where: "place", Schedule: "schedule", StandIn: "stand-in"}
_Made = TypeVar("_Made", bound=Part)


class Vocabulary(Protocol):
    """The words of specs: classes of policies and of parts, by name."""

    @property
    def policies(self) -> Mapping[str, type[Policy]]:
        """Policies."""

    @property
    def places(self) -> Mapping[str, type[Where]]:
        """What `where=` can be."""

    @property
    def schedules(self) -> Mapping[str, type[Schedule]]:
        """What `when=` can be."""

    @property
    def stand_ins(self) -> Mapping[str, type[StandIn]]:
        """What `what=` can be."""

    @property
    def clashes(self) -> Mapping[str, str]:
        """Words that stand for nothing, such as "policy 'calm'", and why."""


def parse(spec: Spec, words: Vocabulary) -> Policy:
    """Parse one spec. A policy object is returned unchanged.

    A value is a word, a number, a list with semicolons, or a part with keys of its own in brackets.

    >>> from cachekit.registry.catalog import installed
    >>> parse("null_text: after=5, before=none", installed())
    NullText(where=None, when=None, what=None, after=5, before=None)
    >>> str(parse("cache:where=denoiser,when=every(3),what=linear(of=residual)", installed()))
    'cache:where=denoiser,when=every(n=3),what=linear(of=residual)'
    >>> parse("cair:m=3", installed())
    Traceback (most recent call last):
    ...
    cachekit.errors.SpecError: spec 'cair:m=3': unknown key 'm'; allowed: n, keep, mean, where, when, what

    Raises `SpecError` with the spec, the part that is wrong, and what is allowed.
    """
    policy = spec if isinstance(spec, Policy) else _built(spec, words)
    policy.chosen()  # refuses parts that the policy has no place for
    return policy


def _built(spec: str, words: Vocabulary) -> Policy:
    if not isinstance(spec, str):
        raise SpecError(f"spec {spec!r}: is a {_described(spec)}; give a string or a policy")
    name, colon, text = (part.strip() for part in spec.partition(":"))
    clash = words.clashes.get(f"policy {name!r}")
    if clash:
        raise SpecError(f"spec {spec!r}: {clash}")
    if name not in words.policies:
        known = ", ".join(sorted(words.policies)) or "none"
        raise SpecError(f"spec {spec!r}: unknown policy {name!r}{nearest(name, words.policies)}; known: {known}")
    if len(split_outside(text, "|")) > 1:
        raise SpecError(f"spec {spec!r}: '|' separates alternatives, for cachekit bench grid; give one value here")
    if colon and not text:
        raise SpecError(f"spec {spec!r}: nothing after ':'; write {name!r} or '{name}:key=value'")
    return _Parser(spec, words).build(words.policies[name], text, "")


def parse_all(specs: Spec | Iterable[Spec], words: Vocabulary) -> tuple[Policy, ...]:
    """Parse one spec or several; a preset among them stands for its own.

    Raises `SpecError` as `parse` does, and for a policy that is named twice, and `PresetError` for a preset that can't
    be used.
    """
    return read_all(specs, words)[0]


def read_all(specs: Spec | Iterable[Spec], words: Vocabulary) -> tuple[tuple[Policy, ...], list[Preset]]:
    """Parse as `parse_all` does; list the presets among the specs too."""
    listed, presets = expanded(listed_specs(specs), words.policies)
    parsed = tuple(parse(spec, words) for spec in listed)
    seen: dict[str, Policy] = {}
    for policy in parsed:
        if policy.name in seen and not policy.repeats:
            raise SpecError(
                f"spec {str(policy)!r}: policy {policy.name!r} is given twice (also {str(seen[policy.name])!r});"
                " keep one of them"
            )
        seen[policy.name] = policy
    return parsed, presets


def listed_specs(specs: Spec | Iterable[Spec]) -> list[Spec]:
    """List specs that are given as one or several, each of which may be several joined by `+`.

    Raises `SpecError` for anything else.
    """
    if isinstance(specs, Mapping) or not isinstance(specs, (str, Policy, Iterable)) or isinstance(specs, type):
        raise SpecError(f"specs {specs!r}: is a {_described(specs)}; give a spec or a list of specs")
    # A policy is iterable too, over its fields.
    listed = [specs] if isinstance(specs, (str, Policy)) else list(specs)
    return [one for spec in listed for one in (joined(spec) if isinstance(spec, str) else [spec])]


def is_name(name: str) -> bool:
    """Whether `name` is valid before the colon of a spec: lower case, digits and underscores, a letter first."""
    return bool(_NAME.fullmatch(name))


def split_outside(text: str, separator: str) -> list[str]:
    """Split at a separator that does not stand within brackets.

    >>> split_outside("a=every(n=2,first=3),b=1;2", ",")
    ['a=every(n=2,first=3)', 'b=1;2']
    """
    found, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth = max(depth + _BRACKETS.get(character, 0), 0)
        if character == separator and not depth:
            found.append(text[start:place])
            start = place + 1
    return [*found, text[start:]]


def split_specs(text: str) -> list[str]:
    """Split specs that are joined by `+`. A plus sign before a digit belongs to an exponent, as in 1e+3.

    >>> split_specs("tgate:m=5+deepcache:power=1e+0")
    ['tgate:m=5', 'deepcache:power=1e+0']
    """
    found: list[str] = []
    for piece in split_outside(text, "+"):
        if found and piece[:1].isdecimal():
            found[-1] += f"+{piece}"
        else:
            found.append(piece)
    return found


def joined(text: str) -> list[str]:
    """List specs that are joined by `+`; a file of a preset may have a plus sign in its name.

    Raises `SpecError` where there is nothing on one side.

    >>> joined("tgate:m=5 + deepcache")
    ['tgate:m=5', 'deepcache']
    """
    if is_preset(text) and Path(text.partition(":")[2].strip()).expanduser().exists():
        return [text]
    specs = [spec.strip() for spec in split_specs(text)]
    if len(specs) > 1 and not all(specs):
        raise SpecError(f"spec {text!r}: nothing on one side of '+'; write 'name:key=value', joined by '+'")
    return specs


class _Parser:
    """Parses the texts of one spec, so that errors can quote it."""

    def __init__(self, spec: str, words: Vocabulary) -> None:
        self._spec = spec
        self._words: dict[type[Part], Mapping[str, type[Part]]] = {
            Where: words.places, Schedule: words.schedules, StandIn: words.stand_ins
        }  # fmt: skip
        self._clashes = words.clashes

    def build(self, made: type[_Made], text: str, path: str) -> _Made:
        """Build a policy or part from the text of its keys; `path` leads there, for errors."""
        self._refuse_unbalanced(text, path)
        fields = made.model_fields
        values = {}
        for key, value in self._pairs(made, text, path):
            if key not in fields:
                allowed = ", ".join(sorted(fields, key=lambda name: name in PARTS)) or "none"
                raise self._error(path, f"unknown key {key!r}{nearest(key, fields)}; allowed: {allowed}")
            values[key] = self._value(fields[key].annotation, value, f"{path}{key}=")
        try:
            return made(**values)
        except SpecError as error:
            raise self._error(path, str(error).removeprefix(f"{made.__name__}: ")) from None

    def _pairs(self, made: type[Part], text: str, path: str) -> Iterator[tuple[str, str]]:
        seen = set()
        for place, item in enumerate(split_outside(text, ",") if text else []):
            key, equals, value = (part.strip() for part in item.partition("="))
            if "(" in key or (not equals and key and place == 0 and made.positional):
                key, equals, value = made.positional if place == 0 else "", "=", item.strip()
            if not equals or not key or not value:
                raise self._error(path, f"{item.strip()!r} is not key=value")
            if key in seen:
                raise self._error(path, f"key {key!r} is given twice; keep one of them")
            seen.add(key)
            yield key, value

    def _value(self, annotation: Any, text: str, path: str) -> Any:
        """Convert the text of a value as far as its type needs; pydantic does the rest."""
        types = alternatives(annotation)
        if text == "none" and type(None) in types:
            return None
        for one in types:
            if get_origin(one) in (tuple, list):
                return tuple(self._value(get_args(one)[0], item, path) for item in self._items(text, path))
            bases = [base for base in self._words if isinstance(one, type) and issubclass(one, base)]
            if bases:
                return self._part(bases[0], text, path)
        return text

    def _items(self, text: str, path: str) -> list[str]:
        items = [item.strip() for item in split_outside(text, ";")] if text != ";" else []
        if not all(items):
            raise self._error(path, f"an item of the list {text!r} is empty; write them as a;b")
        return items

    def _part(self, base: type[Part], text: str, path: str) -> Part:
        self._refuse_unbalanced(text, path)
        name, bracket, rest = (part.strip() for part in text.partition("("))
        if bracket and not rest.endswith(")"):
            raise self._error(path, f"{rest.rpartition(')')[2]!r} follows the bracket; write {name}(key=value)")
        if name in self._words[base]:
            return self.build(self._words[base][name], rest[:-1].strip(), f"{path}{name}.")
        spelled = {word: part for made in self._words[base].values() for word, part in made.spellings().items()}
        if name in spelled and bracket:
            raise self._error(path, f"{name!r} has no keys; write it without a bracket")
        if name in spelled:
            return spelled[name]
        clash = self._clashes.get(f"{_NOUNS[base]} {name!r}")
        if clash:
            raise self._error(path, clash)
        known = sorted({*self._words[base], *spelled})
        raise self._error(path, f"unknown word {name!r}{nearest(name, known)}; known: {', '.join(known) or 'none'}")

    def _refuse_unbalanced(self, text: str, path: str) -> None:
        depth = 0
        for character in text:
            depth += _BRACKETS.get(character, 0)
            if depth < 0:
                break
        if depth:
            raise self._error(path, f"a bracket of {text!r} is not {'closed' if depth > 0 else 'opened'}")

    def _error(self, path: str, reason: str) -> SpecError:
        return SpecError(f"spec {self._spec!r}: {f'{path[:-1]}: ' if path else ''}{reason}")


def _described(value: Any) -> str:
    return f"class, not an instance; write {value.__name__}()" if isinstance(value, type) else type(value).__name__


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """List the types that an annotation allows: those of a union, or itself."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(one for part in get_args(annotation) for one in alternatives(part))
    return (annotation,)
