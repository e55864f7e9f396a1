"""Commands whose options are the fields of a dataclass, so that commands can share and inherit options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_type_hints

__all__ = ["command"]

SettingsT = TypeVar("SettingsT")


def command(settings: type[SettingsT]) -> Callable[[Callable[[SettingsT], None]], Callable[..., None]]:
    """Turn a function of one settings object into a command with an option for each field of the dataclass.

    Fields are annotated as typer expects of parameters, and a field without a default is required:

        @dataclass(frozen=True, kw_only=True)
        class Settings:
            steps: Annotated[int, typer.Option(help="Number of steps.")] = 25
    """
    hints = get_type_hints(settings, include_extras=True)
    parameters = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=annotation)
        for field in fields(settings)  # type: ignore[arg-type]
        for annotation in [hints[field.name]]
    ]

    def decorate(run: Callable[[SettingsT], None]) -> Callable[..., None]:
        def parse_and_run(**values: Any) -> None:
            run(settings(**{name: value for name, value in values.items() if value is not None}))

        parse_and_run.__name__, parse_and_run.__doc__ = run.__name__, run.__doc__
        parse_and_run.__annotations__ = {name: hints[name] for name in hints}
        parse_and_run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return parse_and_run

    return decorate


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        # click before 8.3 refuses a list as the default of an argument; None leaves the default to the dataclass.
        return field.default_factory() or None
    return inspect.Parameter.empty if field.default is MISSING else field.default
