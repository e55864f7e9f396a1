"""Run commands as a user would, and expect them to succeed."""

from __future__ import annotations

import shlex

import typer
from typer.testing import CliRunner

from cachekit.cli import app


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def printed(*arguments):
    result = run(*arguments)
    assert (result.exit_code, result.exception) == (0, None), result.output
    return result.stdout


def parsed(line):
    """Return the parameters of a line such as `cachekit bench demo`; what the command does not know is an error."""
    program, name, *words = shlex.split(line)
    assert program == "cachekit"
    return name, typer.main.get_command(app).commands[name].make_context(name, words).params
