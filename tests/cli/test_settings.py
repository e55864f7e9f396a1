"""Commands made from settings: an option for each field, inherited ones included."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer
from typer.testing import CliRunner

from cachekit.cli.settings import command


@dataclass(frozen=True, kw_only=True)
class Shared:
    steps: Annotated[list[int], typer.Option(min=1, help="Number of steps.")] = field(default_factory=lambda: [25])


@dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    model: Annotated[str, typer.Argument()]
    kind: Annotated[str | None, typer.Option("--type")] = None


def invoke(*words):
    found = []

    @command(Settings)
    def measure(settings: Settings) -> None:
        """Measure something."""
        found.append(settings)

    app = typer.Typer()
    app.command()(measure)
    return CliRunner().invoke(app, words), found


def test_fields_are_options_and_defaults_are_kept():
    _, found = invoke("demo")
    assert found == [Settings(model="demo", steps=[25], kind=None)]
    _, found = invoke("demo", "--steps", "3", "--steps", "4", "--type", "x")
    assert found == [Settings(model="demo", steps=[3, 4], kind="x")]


def test_help_and_bounds_are_those_of_the_fields():
    result, _ = invoke("--help")
    assert "Measure something." in result.stdout
    assert "Number of steps." in result.stdout
    assert invoke("demo", "--steps", "0")[0].exit_code == 2


def test_a_field_without_a_default_is_required():
    result, found = invoke()
    assert (result.exit_code, found) == (2, [])
    assert "Missing argument" in result.stderr
