"""The examples in docstrings are true, and those of modules that need no torch run without it."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys

import pytest
from support.sources import ROOT, SHIPPED

#: Modules with examples, and how many of their docstrings have one.
WITHOUT_TORCH = {
    "cachekit.errors": 2,
    "cachekit.interface.adapter": 2,
    "cachekit.interface.moment": 1,
    "cachekit.interface.parts": 2,
    "cachekit.interface.policy": 1,
    "cachekit.interface.sites": 5,
    "cachekit.parts.places": 1,
    "cachekit.parts.schedules": 6,
    "cachekit.parts.standins": 2,
    "cachekit.planning.plan": 1,
}
#: Those that need torch, or the catalog, which has adapters that do.
WITH_TORCH = {
    "cachekit.calibrating.measured": 1,
    "cachekit.cli.coverage": 1,
    "cachekit.interface.indicators": 2,
    "cachekit.interface.specs": 3,
    "cachekit.tensors": 1,
    "cachekit.upstream.attention": 1,
    "cachekit_spectrum.policy": 1,
}
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers', 'numpy']))"
RUN = """
import doctest, importlib
for name in sys.argv[1:]:
    print(name, *doctest.testmod(importlib.import_module(name)))
"""


def test_every_module_with_examples_is_listed():
    with_examples = {module_of(path) for path in SHIPPED if re.search(r"^ *>>> ", path.read_text(), re.MULTILINE)}
    assert with_examples == WITHOUT_TORCH.keys() | WITH_TORCH.keys()


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("plugins.").removeprefix("adapters.")


@pytest.mark.parametrize("name", {**WITHOUT_TORCH, **WITH_TORCH})
def test_examples(name):
    module = importlib.import_module(name)
    found = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert len(found) == {**WITHOUT_TORCH, **WITH_TORCH}[name]
    assert doctest.testmod(module).failed == 0


def test_examples_without_torch():
    done = subprocess.run([sys.executable, "-c", BLOCKED + RUN, *WITHOUT_TORCH], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = [line.split() for line in done.stdout.splitlines()]
    assert [(name, failed) for name, failed, _ in said] == [(name, "0") for name in WITHOUT_TORCH], done.stdout
