"""The page's table of comparisons is read from the tests' marks, and the tests do what their marks say."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from support.comparisons import BIT, ROUNDING
from support.sources import ROOT

compared, of_methods = (importlib.import_module(f"benchmarks.{name}") for name in ("compared", "methods"))

#: What a test of each exactness calls.
CALLS = {BIT: {"equal"}, ROUNDING: {"allclose", "assert_allclose", "assert_close"}}
#: What tests call latents of the pipeline itself. A comparison with those shows that a method is undone and no more,
#: unless the method changes nothing.
OWN = re.compile(r"\b(undone|plain|uncached|again)\b(?!\()")


@functools.cache
def parts_of(file: Path) -> dict[str, list[ast.stmt]]:
    """The statements of a module that give a name its meaning: definitions, assignments, imports."""
    found: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names = [statement.name]
        elif isinstance(statement, ast.ImportFrom):
            names = [alias.asname or alias.name for alias in statement.names]
        else:
            names = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
        for name in names:
            found.setdefault(name, []).append(statement)
    return found


def source_of(file: Path, name: str, seen: set[tuple[Path, str]]) -> str:
    """The text of a name's meaning and of all that it uses, in its module and in the support of tests."""
    if (file, name) in seen:
        return ""
    seen.add((file, name))
    text = ""
    for statement in parts_of(file).get(name, ()):
        if isinstance(statement, ast.ImportFrom):
            continue
        text += ast.unparse(statement) + "\n"
        for node in ast.walk(statement):
            if isinstance(node, ast.arg):
                text += source_of(file, node.arg, seen)  # a fixture's name
            elif isinstance(node, ast.Name):
                text += source_of(file, node.id, seen)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                text += "".join(source_of(other, node.attr, seen) for other in support(file, node.value.id))
    return text


def support(file: Path, name: str) -> list[Path]:
    """The module of the tests' support that a name stands for."""
    imports = [one for one in parts_of(file).get(name, ()) if isinstance(one, ast.ImportFrom)]
    aliases = [alias.name for one in imports if one.module == "support" for alias in one.names]
    paths = [ROOT / "tests" / "support" / f"{alias}.py" for alias in aliases]
    return [path for path in paths if path.exists()]


@pytest.mark.parametrize("one", compared.comparisons(), ids=lambda one: f"{one.method}-{one.test}")
def test_a_test_does_what_its_mark_says(one: Any) -> None:
    text = source_of(one.file, one.test, set())
    class_name = one.method.replace("_", "")
    assert one.method in text or class_name in text.lower()
    for name in one.on:
        assert f"'{name}'" in text or f"tiny.{name}" in text or f"{name}." in text, name
    if one.exactly in CALLS:
        assert misses(text, one.exactly, itself="uncached" in one.to) == ""


def asserted(text: str, itself: bool) -> set[str]:
    """The comparisons of tensors that a text calls, without those that are negated.

    Those with the pipeline itself count if a test is about them.
    """
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            continue
        is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_method and (itself or not OWN.search(ast.unparse(node))):
            found.add(node.func.attr)
        nodes += ast.iter_child_nodes(node)
    return found & set().union(*CALLS.values())


def misses(text: str, exactly: str, itself: bool = False) -> str:
    """What a test lacks, or has too much, for what its mark says; "" if nothing."""
    found = asserted(text, itself)
    if not found & CALLS[exactly]:
        return f"compares nothing {exactly}"
    near = sorted(found & CALLS[ROUNDING]) if exactly == BIT else []
    return f"compares {', '.join(near)}, not {exactly}" if near else ""


SAME = "assert torch.equal(found, wanted)"
UNDONE = "assert torch.equal(undone, plain)"
UNLIKE = "assert not torch.allclose(found, plain)"
NEAR = "torch.testing.assert_close(found, wanted)"


@pytest.mark.parametrize(
    ("lines", "exactly", "missed"),
    [
        ((UNLIKE, SAME, UNDONE), BIT, ""),
        ((UNLIKE, UNDONE), BIT, "compares nothing to the bit"),
        ((NEAR, SAME, UNDONE), BIT, "compares assert_close, not to the bit"),
        ((UNLIKE, "assert not torch.equal(found, plain)"), BIT, "compares nothing to the bit"),
        ((NEAR, UNDONE), ROUNDING, ""),
        (("assert torch.allclose(found, wanted)", UNLIKE), ROUNDING, ""),
        ((UNLIKE, UNDONE), ROUNDING, "compares nothing within rounding"),
    ],
)
def test_comparisons_that_are_negated_prove_nothing(lines: tuple[str, ...], exactly: str, missed: str) -> None:
    assert misses("\n".join(lines), exactly) == missed


def test_every_method_is_compared_with_something() -> None:
    assert set(compared.rows()) == set(of_methods.methods())


MARKED = """
@compared("fora", "a replay", {on})
@pytest.mark.parametrize(("name", "count"), PAIRS)
def test_it(name, count): ...
PAIRS = [("sd", 1), ("wan", 2), ("sd", 3)]
PIPES: dict = {{"flux": 1, "sd3": 2}}
"""


@pytest.mark.parametrize(
    ("on", "names"), [('"name"', ("sd", "wan")), ("PIPES", ("flux", "sd3")), ('["svd"]', ("svd",))]
)
def test_pipelines_are_read_from_what_the_test_is_given(on: str, names: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(MARKED.format(on=on))
    (found,) = compared._marks(file)
    assert found == compared.Comparison("fora", "a replay", names, BIT, file, "test_it")


@pytest.mark.parametrize(("on", "reason"), [('"pipe"', "test_it has no parameter 'pipe'"), ("made()", "cannot read")])
def test_what_can_not_be_read_is_an_error(on: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(MARKED.format(on=on))
    with pytest.raises(LookupError, match=reason):
        list(compared._marks(file))
