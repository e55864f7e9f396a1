"""The files of the project, and what Python makes of them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "cachekit").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
ADAPTERS = sorted((ROOT / "adapters").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
SHIPPED = [*CORE, *PLUGINS, *ADAPTERS, *EXAMPLES]


def short(path):
    return path.relative_to(ROOT).as_posix()


each = functools.partial(pytest.mark.parametrize, "path", ids=short)


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def load_benchmarks():
    """Make the package `benchmarks` importable, which is no part of the wheel, without the folder around it."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules.setdefault(folder.name, importlib.util.module_from_spec(spec))
