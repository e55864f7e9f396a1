"""The tables of docs/choosing.md: what the levels of `cachekit recommend` are measured to do, and the presets that ship."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cachekit.bench.tables import markdown
from cachekit.interface.presets import Preset, shipped
from cachekit.tuning.recommend import CALIBRATED

from .calibrations import NAMES
from .frontier import RESULTS


def levels() -> str:
    """Table of the levels' PSNR on each embedded model, beside the best plain steps of equal cost."""
    source = RESULTS / "calibrations.json"
    if not source.exists():
        return ""
    stored = json.loads(source.read_text())
    cells = {(row["model"], row["scheduler"], row["guidance"], row["interval"]): row for row in stored}
    keys = dict.fromkeys(key[:3] for key in cells)
    header = ["model", "scheduler", "guidance"]
    for rule in CALIBRATED:
        header += [f"{rule.level}: `{rule.spec}`", "plain steps"]
    rows = [[NAMES[key[0]], *map(str, key[1:]), *_figures(cells, key)] for key in keys]
    return markdown(header, rows, left=2)


def _figures(cells: dict[Any, Any], key: tuple[Any, ...]) -> Iterator[str]:
    for rule in CALIBRATED:
        policy, _, interval = rule.spec.partition(":interval=")
        row = cells[(*key, int(interval))]
        yield f"{row[policy]:.1f}"
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
