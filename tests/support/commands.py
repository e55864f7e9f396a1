"""Run commands as a user would, and expect them to succeed."""

from __future__ import annotations

import shlex
from pathlib import Path
from unittest import mock

import typer
from typer.testing import CliRunner

from cachekit.cli import app, models
from cachekit.models.names import ModelName, Sort
from support import tiny


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def printed(*arguments):
    result = run(*arguments)
    assert (result.exit_code, result.exception) == (0, None), result.output
    return result.stdout


def save_without_weights(folder: Path):
    """Save the tiny pipeline as configurations alone, which is all that some commands read."""
    tiny.sd().save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def parsed(line):
    """Parse a line such as `cachekit bench grid demo` into command and parameters; unknown options are errors.

    Any word can name a model, which need not be there.
    """
    program, *words = shlex.split(line)
    assert program == "cachekit"
    command, names = typer.main.get_command(app), []
    while hasattr(command, "commands"):
        names.append(words.pop(0))
        command = command.commands[names[-1]]
    with mock.patch.object(models, "named", lambda name: ModelName(name, Sort.FOLDER)):
        return " ".join(names), command.make_context(names[-1], words).params
