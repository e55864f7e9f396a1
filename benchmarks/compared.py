"""What the methods are compared with, read from the marks of the tests in their source: no test is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
#: The decorator of the tests, and its parameters, in order.
MARK, PARAMETERS = "compared", ("method", "to", "on", "exactly")
#: How the page names the tests' pipelines.
NAMES = {
    "sd": "SD",
    "small": "SD",
    "sdxl": "SDXL",
    "pixart": "PixArt",
    "pixart_alpha": "PixArt",
    "pixart_sigma": "PixArt-sigma",
    "dit": "DiT",
    "sd3": "SD3",
    "flux": "FLUX",
    "flux, true guidance": "FLUX with true guidance",
    "wan": "Wan",
    "svd": "SVD",
    "controlled": "a ControlNet",
    "NucleusMoEImagePipeline": "Nucleus-MoE",
}


@dataclass(frozen=True)
class Comparison:
    """One test's mark: the method, what it is compared with, on which pipelines, how exactly, and where."""

    method: str
    to: str
    on: tuple[str, ...]
    exactly: str
    file: Path
    test: str


def comparisons() -> list[Comparison]:
    """List the marks of all tests, by method."""
    files = [file for file in TESTS.rglob("test_*.py") if f"@{MARK}(" in file.read_text()]
    return sorted((one for file in files for one in _marks(file)), key=lambda one: (one.method, one.file, one.to))


def _marks(file: Path) -> Iterator[Comparison]:
    module = ast.parse(file.read_text())
    values = {**_assigned(ast.parse((TESTS / "support" / "comparisons.py").read_text())), **_assigned(module)}
    for test in (one for one in module.body if isinstance(one, ast.FunctionDef)):
        for mark in test.decorator_list:
            if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == MARK:
                yield _comparison(file, test, mark, values)


def _assigned(module: ast.Module) -> dict[str, ast.expr]:
    """Map the module's names to the expressions that they are assigned."""
    found: dict[str, ast.expr] = {}
    for statement in module.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            found[statement.target.id] = statement.value
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                names, parts = [target], [statement.value]
                if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                    names, parts = target.elts, statement.value.elts
                found.update({name.id: part for name, part in zip(names, parts) if isinstance(name, ast.Name)})
    return found


def _comparison(file: Path, test: ast.FunctionDef, mark: ast.Call, values: dict[str, ast.expr]) -> Comparison:
    given = dict(zip(PARAMETERS, mark.args)) | {str(keyword.arg): keyword.value for keyword in mark.keywords}
    on, place = given["on"], 0
    if isinstance(on, ast.Constant):
        on, place = _parametrized(test, str(on.value))
    texts = {
        name: str(ast.literal_eval(values.get(one.id, one) if isinstance(one, ast.Name) else one))
        for name, one in {"exactly": values["BIT"], **given}.items()
        if name != "on"
    }
    return Comparison(on=tuple(dict.fromkeys(_names(on, place, values))), file=file, test=test.name, **texts)


def _parametrized(test: ast.FunctionDef, name: str) -> tuple[ast.expr, int]:
    """Find the values that a parameter of a test takes, and its place among the parameters that are given together."""
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parametrize":
            names = ast.literal_eval(mark.args[0])
            names = (names,) if isinstance(names, str) else names
            if name in names:
                return mark.args[1], names.index(name)
    raise LookupError(f"{test.name} has no parameter {name!r}")


def _names(values: ast.expr, place: int, known: dict[str, ast.expr]) -> Iterator[str]:
    """Yield the names of pipelines among values: keys of a dict, or items of a list."""
    if isinstance(values, ast.Name):
        yield from _names(known[values.id], place, known)
        return
    if not isinstance(values, (ast.Dict, ast.List, ast.Tuple)):
        raise LookupError(f"cannot read names of pipelines from {ast.unparse(values)}; list them in the mark")
    for item in values.keys if isinstance(values, ast.Dict) else values.elts:
        assert item is not None
        yield str(ast.literal_eval(item.elts[place] if isinstance(item, ast.Tuple) else item))


def rows() -> dict[str, list[list[str]]]:
    """Make the rows of the table by method: what it is compared with, on what, how exactly, the file of the tests."""
    found: dict[str, dict[tuple[str, str, str], list[str]]] = {}
    for one in comparisons():
        key = (one.to, one.exactly, f"`{one.file.relative_to(TESTS.parent)}`")
        found.setdefault(one.method, {}).setdefault(key, []).extend(NAMES[name] for name in one.on)
    return {
        method: [[to, ", ".join(dict.fromkeys(on)), exactly, file] for (to, exactly, file), on in groups.items()]
        for method, groups in found.items()
    }
