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
    cells = _cells()
    keys = dict.fromkeys(key[:3] for key in cells)
    header = ["model", "scheduler", "guidance"]
    for rule in RULES.calibrated:
        header += [f"{rule.level}: `{rule.spec}`", "`forecast`", "plain steps"]
    rows = [[NAMES[key[0]], NAMES[key[1]], f"{key[2]:g}", *_figures(cells, key)] for key in keys]
    return markdown(header, rows, left=2) if rows else ""


def sentences() -> str:
    """Write a sentence for each level: in how many rows weights and the line are ahead, by how much, and where not."""
    return "\n".join(map(_sentence, RULES.calibrated)) if _cells() else ""


def _sentence(rule: Any) -> str:
    interval = int(rule.spec.rpartition("=")[2])
    rows = {key: row for key, row in _cells().items() if key[3] == interval}
    plain = {key: max(row["plain"].values()) for key, row in rows.items()}
    fitted = _lead({key: row["calibrated"] - plain[key] for key, row in rows.items()})
    line = _lead({key: row["forecast"] - plain[key] for key, row in rows.items()})
    weights = _lead({key: row["forecast"] - row["calibrated"] for key, row in rows.items()})
    return (
        f"- **{rule.level}**, a call in {interval}. `{rule.spec}` beside plain steps: {fitted}. `forecast` beside plain"
        f" steps: {line}. `forecast` beside `{rule.spec}`: {weights}."
    )


def _lead(leads: dict[tuple[Any, ...], float]) -> str:
    """Write the number of rows that are ahead, the range of the leads, and the rows that are behind."""
    behind = [
        f"{NAMES[model]} {NAMES[scheduler]} {scale:g}"
        for (model, scheduler, scale, _), lead in leads.items()
        if lead < 0
    ]
    low, high = min(leads.values()), max(leads.values())
    found = f"ahead in {len(leads) - len(behind)} of {len(leads)} rows, {low:+.1f} to {high:+.1f} dB"
    return f"{found}; behind on {', '.join(behind)}" if 0 < len(behind) < len(leads) else found


def _cells() -> dict[tuple[Any, ...], Any]:
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return {(row["model"], row["scheduler"], row["guidance"], row["interval"]): row for row in stored}


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
