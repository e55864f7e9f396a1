"""The examples in docstrings are true, and those of modules that need no torch run without it."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys

import pytest
from support.sources import ROOT, SHIPPED


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("plugins.").removeprefix("adapters.")


#: Modules with examples.
MODULES = sorted(
    module_of(path) for path in SHIPPED if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
)
#: Those that policies are written with, which neither need torch nor the catalog, whose adapters do.
WITHOUT_TORCH = [
    "cachekit.errors",
    "cachekit.interface.adapter",
    "cachekit.interface.moment",
    "cachekit.interface.parts",
    "cachekit.interface.policy",
    "cachekit.interface.sites",
    "cachekit.parts.places",
    "cachekit.parts.schedules",
    "cachekit.parts.standins",
    "cachekit.planning.plan",
]
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers', 'numpy']))"
RUN = """
import doctest, importlib
for name in sys.argv[1:]:
    print(name, *doctest.testmod(importlib.import_module(name)))
"""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert (failed, attempted > 0) == (0, True)


def test_examples_without_torch():
    assert set(WITHOUT_TORCH) < set(MODULES)
    done = subprocess.run([sys.executable, "-c", BLOCKED + RUN, *WITHOUT_TORCH], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = [line.split() for line in done.stdout.splitlines()]
    assert [(name, failed) for name, failed, _ in said] == [(name, "0") for name in WITHOUT_TORCH], done.stdout
