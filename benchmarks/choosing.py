"""The tables of docs/choosing.md: what the levels of `cachekit recommend` come to, and the presets that ship."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cachekit.bench.tables import markdown
from cachekit.interface.presets import Preset, shipped
from cachekit.tuning.recommend import RULES

from .calibrations import NAMES, RESULTS


def levels() -> str:
    """Table of the levels' PSNR on each embedded model, beside the best plain steps of equal cost."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    cells = {(row["model"], row["scheduler"], row["guidance"], row["interval"]): row for row in stored}
    keys = dict.fromkeys(key[:3] for key in cells)
    header = ["model", "scheduler", "guidance"]
    for rule in RULES.calibrated:
        header += [f"{rule.level}: `{rule.spec}`", "`forecast`", "plain steps"]
    rows = [[NAMES[key[0]], NAMES[key[1]], f"{key[2]:g}", *_figures(cells, key)] for key in keys]
    return markdown(header, rows, left=2) if rows else ""


def _figures(cells: dict[Any, Any], key: tuple[Any, ...]) -> Iterator[str]:
    for rule in RULES.calibrated:
        interval = int(rule.spec.rpartition("=")[2])
        row = cells[key + (interval,)]
        yield f"{row['calibrated']:.1f}"
        yield f"{row['forecast']:.1f}"
        yield f"{max(row['plain'].values()):.1f}"


def presets() -> str:
    """Table of the published presets, with their sources."""
    loaded = {name: Preset.load(path) for name, path in shipped().items()}
    rows = [
        [f"`{name}`", preset.summary, f"{preset.evidence.steps or '-'}", preset.evidence.source or ""]
        for name, preset in loaded.items()
        if preset.evidence.source
    ]
    return markdown(["preset", "what", "steps", "source"], rows, left=4)
