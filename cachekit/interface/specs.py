"""Read spec strings such as `tgate:m=10,keep=cond` into policies; the only parser there is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cachekit.errors import SpecError, nearest
from cachekit.interface.policy import Policy

Spec = Union[str, Policy]

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def parse(spec: Spec, policies: Mapping[str, type[Policy]]) -> Policy:
    """Return the policy that `spec` describes, `name` or `name:key=value,key=value`.

    Raise `SpecError` with one line that names the spec, the offender and what is allowed.
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
    """Return the policies of one spec or several; raise `SpecError` if one policy is named twice."""
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
    """Tell whether `name` can stand before the colon of a spec."""
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
        raise SpecError(f"spec {spec!r}: {_first(error.errors()[0])}") from None


def _may_be_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _first(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}={repr(error['input'])[1:-1]}: {message}" if where else message
