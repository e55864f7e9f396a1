"""Parse specs such as `tgate:m=10,keep=cond` into policies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cachekit.errors import SpecError, nearest
from cachekit.interface.policy import Policy

#: A policy, or its spec: `name` or `name:key=value,key=value`.
Spec = Union[str, Policy]

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def parse(spec: Spec, policies: Mapping[str, type[Policy]]) -> Policy:
    """Parse one spec, with the known policy classes by name. A policy object is returned unchanged.

    >>> class Half(Policy):
    ...     name = "half"
    ...     kinds = frozenset()
    ...     start: int = 0
    ...     stop: int | None = None
    >>> parse("half: start=3, stop=none", {"half": Half})
    Half(start=3, stop=None)
    >>> parse("half:strat=3", {"half": Half})
    Traceback (most recent call last):
    ...
    cachekit.errors.SpecError: spec 'half:strat=3': unknown key 'strat' (did you mean 'start'?); allowed: start, stop

    Raises `SpecError` with the spec, the part that is wrong, and what is allowed.
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, str):
        raise SpecError(f"spec {spec!r}: is a {type(spec).__name__}; give a string or a policy")
    name, colon, text = (part.strip() for part in spec.partition(":"))
    if name not in policies:
        known = ", ".join(sorted(policies)) or "none"
        raise SpecError(f"spec {spec!r}: unknown policy {name!r}{nearest(name, policies)}; known: {known}")
    if colon and not text:
        raise SpecError(f"spec {spec!r}: nothing after ':'; write {name!r} or '{name}:key=value'")
    return _build(spec, policies[name], _pairs(spec, text))


def parse_all(specs: Spec | Iterable[Spec], policies: Mapping[str, type[Policy]]) -> tuple[Policy, ...]:
    """Parse one spec or several; raises `SpecError` as `parse` does, and for a policy that is named twice."""
    if isinstance(specs, Mapping) or not isinstance(specs, (str, Policy, Iterable)):
        raise SpecError(f"specs {specs!r}: is a {type(specs).__name__}; give a spec or a list of specs")
    # A policy is iterable too, over its fields.
    listed = [specs] if isinstance(specs, (str, Policy)) else list(specs)
    parsed = tuple(parse(spec, policies) for spec in listed)
    seen: dict[str, Policy] = {}
    for policy in parsed:
        if policy.name in seen:
            raise SpecError(
                f"spec {str(policy)!r}: policy {policy.name!r} is given twice (also {str(seen[policy.name])!r});"
                " keep one of them"
            )
        seen[policy.name] = policy
    return parsed


def is_name(name: str) -> bool:
    """Whether `name` is valid before the colon of a spec: lower case, digits and underscores, a letter first."""
    return bool(_NAME.fullmatch(name))


def _pairs(spec: str, text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in text.split(",") if text else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise SpecError(f"spec {spec!r}: {item.strip()!r} is not key=value")
        if key in pairs:
            raise SpecError(f"spec {spec!r}: key {key!r} is given twice; keep one of them")
        pairs[key] = value
    return pairs


def _build(spec: str, policy: type[Policy], pairs: dict[str, str]) -> Policy:
    fields = policy.model_fields
    for key in pairs:
        if key not in fields:
            allowed = ", ".join(fields) or "none"
            raise SpecError(f"spec {spec!r}: unknown key {key!r}{nearest(key, fields)}; allowed: {allowed}")
    values = {
        key: None if value == "none" and _may_be_none(fields[key].annotation) else value for key, value in pairs.items()
    }
    try:
        return policy(**values)
    except ValidationError as error:
        raise SpecError(f"spec {spec!r}: {_reason(error.errors()[0])}") from None


def _may_be_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _reason(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}={repr(error['input'])[1:-1]}: {message}" if where else message
