"""Figures on the methods: lines of their policies, what tests compare them with, where they beat plain steps."""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cachekit.bench.results import read
from cachekit.bench.summary import Group, groups
from cachekit.bench.tables import markdown
from cachekit.cli.samples import sample

from . import frontier
from .methods import methods
from .ship import GRIDS, RESULTS

TESTS = Path(__file__).resolve().parent.parent / "tests"
#: What the tests of a method compare it with, how exactly, and the file of the tests.
COMPARED = {
    "adaptive_guidance": (
        "diffusers' callbacks that cut guidance off, on SD and SDXL",
        "to the bit",
        "plugins/test_oracles.py",
    ),
    "block_cache": ("a replay, on a UNet", "to the bit", "plugins/test_block_cache.py"),
    "calibrated": ("numpy: the weights of a step", "within rounding", "calibrating/test_calibrating.py"),
    "deepcache": ("the package DeepCache, on SD and SDXL", "to the bit", "plugins/test_oracles.py"),
    "delta_dit": ("a replay, on PixArt, DiT, SD3 and Wan", "to the bit", "plugins/test_delta_dit.py"),
    "dicache": ("a replay, on FLUX, SD3, PixArt and Wan", "to the bit", "plugins/test_dicache.py"),
    "easycache": ("a replay, on SD, PixArt, FLUX and Wan", "to the bit", "plugins/test_easycache.py"),
    "fastercache": (
        "diffusers: attention on FLUX, guidance on PixArt; a replay of both, on PixArt and Wan",
        "within rounding",
        "plugins/test_fastercache.py",
    ),
    "fbcache": (
        "diffusers, on FLUX, Wan and PixArt; DBCache of cache-dit, on these and SD3; a replay",
        "to the bit",
        "plugins/test_fbcache.py",
    ),
    "fora": ("a replay, on PixArt, SD3, FLUX, Wan and SD", "to the bit", "plugins/test_fora.py"),
    "forecast": ("a replay, on SD, SDXL, PixArt, SD3, FLUX and Wan", "within rounding", "plugins/test_forecast.py"),
    "guidance_interval": (
        "a callback that switches guidance, on SD; a replay, on SD, SDXL, PixArt, SD3 and Wan",
        "to the bit",
        "plugins/test_guidance_interval.py",
    ),
    "hicache": ("a replay, on PixArt, SD3, FLUX, Wan and SD", "within rounding", "plugins/test_hicache.py"),
    "magcache": ("diffusers, on FLUX, SD3, Wan and PixArt", "to the bit", "plugins/test_magcache.py"),
    "pab": (
        "diffusers, on FLUX, SD3, PixArt and Wan; a replay, on Wan, SD and SVD",
        "to the bit",
        "plugins/test_pab.py",
    ),
    "seacache": (
        "diffusers: the decisions for the same samples, latents on Wan; a replay, on Wan, SD3",
        "decisions equal; latents within rounding",
        "plugins/test_seacache.py",
    ),
    "smoothcache": ("a replay, on DiT, PixArt, FLUX and Wan", "to the bit", "plugins/test_smoothcache.py"),
    "spectrum": (
        "the published code: the steps that are full; a replay, on PixArt, SD3, FLUX, Wan, SD and SDXL",
        "steps equal; latents within 0.001",
        "plugins/test_spectrum.py",
    ),
    "taylorseer": (
        "diffusers, on PixArt, SD3, FLUX and Wan; the calibrator of cache-dit, on a trace (`test_cache_dit.py`)",
        "within rounding; to the bit with diffusers' order of operations",
        "plugins/test_taylorseer.py",
    ),
    "teacache": ("a replay, on FLUX, SD3, PixArt and Wan", "to the bit", "plugins/test_teacache.py"),
    "text_kv": (
        "the uncached run, on SD, SDXL, PixArt, Wan, SVD and a ControlNet",
        "to the bit",
        "plugins/test_text_kv.py",
    ),
    "tgate": ("the package tgate, on SD, SDXL, PixArt and SVD", "to the bit", "plugins/test_oracles.py"),
}
#: Wall speedups in the middle of the columns, and the bounds of each.
SPEEDUPS = {"about 2x": (1.75, 2.5), "about 3x": (2.5, 3.5), "about 4x": (3.5, 4.5)}


def table() -> str:
    """Table of the lines of each method's policy, and of what its tests compare it with."""
    rows = []
    for name in methods():
        what, exactly, file = COMPARED[name]
        assert (TESTS / file).exists(), f"{file} is gone; mend COMPARED"
        rows.append([f"`{name}`", f"{lines(name)}", what, exactly, f"`tests/{file}`"])
    return markdown(["method", "lines", "compared with", "how exactly", "tests"], rows, left=5)


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
    found: dict[tuple[str, str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for group in _measured():
        cell = group.cell
        guidance = "default" if cell.guidance is None else f"{cell.guidance:g}"
        rows = found[cell.model, cell.scheduler, guidance]
        for column, text in _leads(group):
            rows[column].append(text)
    cells = [[*key, *("<br>".join(row[column]) or "-" for column in SPEEDUPS)] for key, row in found.items()]
    return markdown(["model", "scheduler", "guidance", *SPEEDUPS], cells, left=6) if cells else ""


def _measured() -> Iterator[Group]:
    for name in GRIDS:
        if name.startswith("methods") and (RESULTS / f"{name}.jsonl").exists():
            yield from groups(read(RESULTS / f"{name}.jsonl")[0])
    for model in frontier.MODELS:
        yield from frontier.stored(RESULTS / f"frontier-{model}.jsonl")


def _leads(group: Group) -> Iterator[tuple[str, str]]:
    for row in sorted(group.rows, key=lambda row: row.speedup):
        plain = group.best_plain(row.plain_steps()["wall time"]) if row.cell.specs else None
        if plain is None or row.psnr is None or plain.psnr is None or row.psnr <= plain.psnr:
            continue
        for column, (low, high) in SPEEDUPS.items():
            if low <= row.speedup < high:
                yield column, f"`{row.label}` ({row.psnr - plain.psnr:+.1f} dB)"


def caught() -> str:
    """Sentence on the wrong policies that the tests of the kit have."""
    source = (TESTS / "support" / "wrong.py").read_text()
    count = len(re.findall(r"^@?caught_by\(", source, re.MULTILINE))
    return (
        f"The kit is tested with {count} policies that have one mistake each, of the kinds that published code has"
        f" had:\nthe check that is named for the mistake catches it in {count} of {count}."
    )
