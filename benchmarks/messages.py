"""The table of docs/messages.md: every error and warning of cachekit and its plugins, read from their source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cachekit.tools.bench.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
#: Functions whose texts are put into errors and warnings.
_REASONS = re.compile(
    r"reads_attention|refus|reason|misfit|caution|warnings|_discarded|_missing_|_of_pipeline|_of_run|_how_to_get|_failed|_warn$"
)
#: Those whose texts are warnings.
_WARNING = {
    **dict.fromkeys(("warnings", "_discarded", "caution"), "report"),
    "_warn": "PresetWarning",
    "_failed": "PluginError",
    "__str__": "PluginWarning",
}
#: Folders with messages for authors of policies, and for users of the command line; the others are met by all users.
_GROUPS = {
    "Applying, planning and running": (
        "applying.py",
        "attaching",
        "tools/clusters.py",
        "costs",
        "driving",
        "planning",
        "runs",
        "switches",
    ),
    "Specs, parts and presets": ("interface", "parts", "registry", "errors.py"),
    "Models, and what diffusers gives": ("models", "upstream"),
    "Calibrating and tuning": ("tools/calibrating", "tools/tuning"),
}
_OTHERS = "Command line, benchmarks, analysis"
_PLUGINS = "Policies that ship"
#: Functions that raise an error with their last argument as its reason.
_REFUSING = {"_error": "SpecError", "_refuse": "GuidanceError", "refuse_narrowing": "GuidanceError"}
_VALUE = "…"


class Message(NamedTuple):
    """A message, with `…` for each value in it, the class that carries it, and the file that it is in."""

    text: str
    kind: str
    path: Path


def table() -> str:
    """Make a table for each group."""
    found: dict[str, dict[str, str]] = {}
    for message in messages():
        found.setdefault(_group(message.path), {}).setdefault(message.text, message.kind)
    sections = []
    for title in (*_GROUPS, _OTHERS, _PLUGINS):
        rows = [
            [_cell(text), f"`{kind}`"] for text, kind in sorted(found[title].items(), key=lambda row: row[0].lower())
        ]
        sections.append(f"## {title}\n\n{markdown(['message', 'raised as'], rows, left=2)}")
    return "\n".join(sections)


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)


def _group(path: Path) -> str:
    if ROOT / "cachekit" not in path.parents:
        return _PLUGINS
    return next((title for title, rooms in _GROUPS.items() if is_in(path, rooms)), _OTHERS)


def is_in(path: Path, rooms: Iterable[str]) -> bool:
    """Whether a file is in one of the rooms, or is one of them; rooms are given by their paths within `cachekit/`."""
    core = ROOT / "cachekit"
    return any(core / room in (path, *path.parents) for room in rooms)


def messages() -> Iterator[Message]:
    """Yield the messages of all errors and warnings in the source; what is only another's text is left out."""
    folders = ("cachekit", "plugins", "adapters")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text()) for path in paths if "scaffolds" not in path.parts}
    kinds = _errors(trees.values())
    for path, tree in trees.items():
        for kind, node in _carried(tree, kinds):
            yield from (Message(text, kind, path) for text in _texts(node) if _is_message(text))


def _errors(trees: Iterable[ast.Module]) -> dict[str, str]:
    """Map the names of the error classes that users see to what carries their texts; private ones are only signals."""
    # A validator's ValueError is quoted by the error of a spec.
    found = {"CachekitError": "CachekitError", "ValueError": "SpecError"}
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    for node in classes * 2:  # a base may be found after what is derived from it
        base = ast.unparse(node.bases[0])
        if base in found and not node.name.startswith("_"):
            found[node.name] = node.name
    return found


def _is_message(text: str) -> bool:
    return len(re.sub(r"[^a-z]", "", text)) >= 12 and " " in text


def _carried(tree: ast.Module, kinds: dict[str, str]) -> Iterator[tuple[str, ast.expr]]:
    """Yield the expression of each message with the class that carries it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and _name(node) in kinds:
            yield kinds[_name(node)], node.args[0]
        elif isinstance(node, ast.Call) and node.args and _name(node) in _REFUSING:
            yield _REFUSING[_name(node)], node.args[-1]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "_log.warning") and node.args:
            kind = ast.unparse(node.args[1]) if len(node.args) > 1 else "log"
            yield kind if kind.endswith("Warning") else "log", node.args[0]
        elif isinstance(node, ast.ClassDef) and node.name == "Failure":
            for one in node.body:
                if isinstance(one, ast.FunctionDef):
                    yield from _reasons(one)
        elif isinstance(node, ast.ClassDef) and node.name == "Obstacle":
            yield from (("part of an error", one.value) for one in node.body if isinstance(one, ast.Assign))
        elif isinstance(node, ast.FunctionDef) and _REASONS.search(node.name):
            yield from _reasons(node)


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _reasons(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield the texts that a function returns or yields for others' messages."""
    kind = _WARNING.get(function.name, "part of an error")
    for node in ast.walk(function):
        if isinstance(node, (ast.Return, ast.Yield, ast.Assign)) and node.value is not None:
            yield kind, node.value


def _texts(node: ast.expr) -> Iterator[str]:
    """Yield the texts of an expression, with a sign for each value in them."""
    if isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)
    elif isinstance(node, (ast.List, ast.ListComp, ast.GeneratorExp)):
        inside = node.elts if isinstance(node, ast.List) else [node.elt]
        for item in inside:
            yield from _texts(item)
    elif isinstance(node, (ast.JoinedStr, ast.Constant)) or (
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    ):
        text = _text(node)
        if text:
            yield re.sub(rf"{_VALUE}(?:{_VALUE})+", _VALUE, text)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else _VALUE for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return _VALUE
