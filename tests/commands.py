"""Run commands as a user would, and expect them to succeed."""

from __future__ import annotations

from typer.testing import CliRunner

from cachekit.cli import app


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def printed(*arguments):
    result = run(*arguments)
    assert (result.exit_code, result.exception) == (0, None), result.output
    return result.stdout
