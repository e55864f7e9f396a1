"""Figures on the methods: lines of their policies, what tests compare them with, where they beat plain steps."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from cachekit import Calibration, Moment, Policy
from cachekit.cli.samples import sample
from cachekit.registry.catalog import installed
from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.results import read
from cachekit.tools.bench.summary import Group, groups
from cachekit.tools.bench.tables import markdown

from . import compared, frontier
from .compared import TESTS
from .methods import methods
from .ship import GRIDS, MEASURED, RESULTS

#: Wall speedups in the middle of the columns, and the bounds of each.
SPEEDUPS = {"about 2x": (1.75, 2.5), "about 3x": (2.5, 3.5), "about 4x": (3.5, 4.5)}


#: Thresholds of magcache: its default, and greater ones.
THRESHOLDS = (0.06, 0.12, 0.24, 0.4)


def table() -> str:
    """Table of the lines of each method's policy, and of what its tests compare it with."""
    found, cells = compared.rows(), []
    for name in methods():
        first, *others = found[name]
        cells += [[f"`{name}`", f"{lines(name)}", *first], *(["", "", *other] for other in others)]
    return markdown(["method", "lines", "compared with", "on", "how exactly", "tests"], cells, left=6)


def lines(name: str) -> int:
    """Count the lines of the module of a policy, without docstrings, comments, blank lines and imports."""
    source = inspect.getsource(inspect.getmodule(type(sample(name))) or ast)
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (isinstance(node, ast.Expr) and _is_text(node.value)):
            found.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def ahead() -> str:
    """Table of the specs that are nearer to the uncached images than plain steps of equal wall time."""
    found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for group in _measured():
        cell = group.cell
        guidance = "default" if cell.guidance is None else f"{cell.guidance:g}"
        rows = found[cell.model, cell.scheduler, guidance]
        for column, label, lead in _leads(group):
            rows[column][label] = f"`{label}` ({lead:+.1f} dB)"  # of two that are ahead, the later one
    cells = [[*key, *("<br>".join(row[column].values()) or "-" for column in SPEEDUPS)] for key, row in found.items()]
    return markdown(["model", "scheduler", "guidance", *SPEEDUPS], cells, left=6) if cells else ""


def _measured() -> Iterator[Group]:
    for name in GRIDS:
        if name.startswith(("methods", "steep")) and (RESULTS / f"{name}.jsonl").exists():
            yield from groups(read(RESULTS / f"{name}.jsonl")[0])
    for model in frontier.MODELS:
        yield from frontier.stored(RESULTS / f"frontier-{model}.jsonl")


def _leads(group: Group) -> Iterator[tuple[str, str, float]]:
    for row in sorted(group.rows, key=lambda row: row.speedup):
        plain = group.best_plain(row.plain_steps()["wall time"]) if row.cell.specs else None
        if plain is None or row.psnr is None or plain.psnr is None or row.psnr <= plain.psnr:
            continue
        for column, (low, high) in SPEEDUPS.items():
            if low <= row.speedup < high:
                yield column, row.label, row.psnr - plain.psnr


def settings() -> str:
    """Table of other settings of methods that are far behind by default, beside plain steps of as many MACs."""
    return _specs("settings", ["mac_reduction", "psnr", "caption_match"], "MACs")


def steep() -> str:
    """Table of settings meant for a third and a quarter of the cost, beside plain steps of equal wall time."""
    return _specs("steep", ["speedup", "mac_reduction", "psnr", "caption_match"], "wall time")


def _specs(name: str, keys: Sequence[str], equal: str) -> str:
    """Table of the cached rows of a grid, by MACs, beside the best plain steps that cost the same."""
    file, rows, psnr = RESULTS / f"{name}.jsonl", [], FIGURES["psnr"]
    for group in groups(read(file)[0]) if file.exists() else ():
        for row in sorted((row for row in group.rows if row.cell.specs), key=lambda row: row.mac_reduction):
            plain = group.best_plain(row.plain_steps()[equal])
            beside = "-" if plain is None else f"{plain.cell.steps}: {psnr.text(plain)} dB"
            figures = [*(FIGURES[key].text(row) for key in keys), beside]
            rows.append([f"{group.cell.model}, {group.cell.uncached_steps}", f"`{_short(row.label)}`", *figures])
    names = [*(FIGURES[key].name for key in keys), f"plain steps at equal {equal}"]
    return markdown(["model, steps", "spec", *names], rows, left=2)


def magnitudes() -> str:
    """Table of how far magcache's measured ratios are from 1, and of the steps that are full at its thresholds."""
    made: Any = installed().policies["magcache"]
    rows = []
    for model in (name for name, specs in MEASURED.items() if "magcache" in specs):
        file = RESULTS / f"magcache-{model}.json"
        figures = Calibration.load(file).figures
        steps, default = len(figures), made(file=str(file))
        changes = [abs(1 - step["ratio"]) for step in figures[int(default.retained * steps + 0.5) :]]
        full = [f"{sum(_full(made(file=str(file), threshold=most), steps))} of {steps}" for most in THRESHOLDS]
        rows.append([model, f"{min(changes):.3f} to {max(changes):.3f}", *full])
    return markdown(["model", "change per step", *(f"full at {most:g}" for most in THRESHOLDS)], rows)


def _full(policy: Policy, steps: int) -> Iterator[bool]:
    (choice,) = policy.chosen().values()
    return (choice.when.full(Moment(step, steps)) for step in range(steps))


def _short(label: str) -> str:
    """Leave out where the file of a spec is."""
    return re.sub(r",?file=[^,+]*", "", label)


def caught() -> str:
    """Sentence on the wrong policies that the tests of the kit have."""
    source = (TESTS / "support" / "wrong.py").read_text()
    count = len(re.findall(r"^@?caught_by\(", source, re.MULTILINE))
    return (
        f"The kit is tested with {count} policies that have one mistake each, of the kinds that published code has"
        f" had:\nthe check that is named for the mistake catches it in {count} of {count}."
    )
