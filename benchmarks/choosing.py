"""The tables of docs/choosing.md: the rules of `cachekit recommend`, what its levels come to, the presets that ship."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cachekit.interface.presets import Preset, shipped
from cachekit.models import architectures as published
from cachekit.tools.bench.tables import markdown
from cachekit.tools.calibrating.calibration import FOLDER, Calibration
from cachekit.tools.tuning.recommend import LEVELS, RULES

from .calibrations import NAMES, RESULTS

_AFTER = ", after a calibration"


def rules() -> str:
    """Table of the rules by which lines are chosen, and the bounds that they have."""
    low, high = RULES.balanced
    published = f"of published settings with a MAC reduction of {low:g}x to {high:g}x, the one that keeps least, else "
    groups = (RULES.calibrated, RULES.uncalibrated, RULES.high_order, RULES.noisy)
    rows = [
        [level, *(", else ".join(f"`{rule.spec}`" for rule in rules if rule.level == level) for rules in groups)]
        for level in LEVELS
    ]
    rows[1][2:4] = [published + cell for cell in rows[1][2:4]]
    rows[2][2] += _AFTER
    for row in rows:
        row[3] += _AFTER
    scales = sorted({scale for path in FOLDER.glob("*.json") for scale in Calibration.load(path).scales})
    far = f"none ships; DPM-Solver or UniPC, guidance above {RULES.high_guidance:g}"
    header = ["level", "a calibration ships", "none ships", far, "the scheduler adds noise"]
    ends = f"{scales[0]:g} to {scales[-1]:g}"
    return f"""{markdown(header, rows, left=len(header))}
- Below {RULES.few_steps} steps, as in consistency models, only settings that were published for so few steps are taken.
  Where there are none, or the best saves less than {RULES.least:g}x, there are no lines: take fewer steps instead.
- A line that saves no more MACs than the one before it gives way to the next in its cell, or is left out.
- "A calibration ships" means that the package has one for the model's weights, this scheduler and this number of steps,
  for guidance scales from {ends}. That is so for the embedded models alone; see [calibrating.md](calibrating.md)."""


def levels() -> str:
    """Table of the levels' PSNR on each embedded model, beside the best plain steps of equal cost."""
    cells = _cells()
    keys = dict.fromkeys(key[:3] for key in cells)
    header = ["model", "scheduler", "guidance"]
    for rule in RULES.calibrated:
        header += [f"{rule.level}: `{rule.spec}`", "`forecast`", "plain steps"]
    rows = [[NAMES[key[0]], NAMES[key[1]], f"{key[2]:g}", *_figures(cells, key)] for key in keys]
    return markdown(header, rows, left=2) if rows else ""


def leads() -> str:
    """Table of the rows in which weights and the line lead, beside plain steps and each other, at each level."""
    if not _cells():
        return ""
    header = ["level", "of", "beside", "ahead", "lead in dB", "behind on"]
    return markdown(header, [row for rule in RULES.calibrated for row in _leads(rule)], left=len(header))


def _leads(rule: Any) -> Iterator[list[str]]:
    interval = int(rule.spec.rpartition("=")[2])
    rows = {key: row for key, row in _cells().items() if key[3] == interval}
    plain = "plain steps"
    found = {plain: {key: max(row["plain"].values()) for key, row in rows.items()}}
    found |= {name: {key: row[name] for key, row in rows.items()} for name in ("calibrated", "forecast")}
    for name, other in (("calibrated", plain), ("forecast", plain), ("forecast", "calibrated")):
        leads = {key: value - found[other][key] for key, value in found[name].items()}
        behind = [f"{NAMES[key[0]]} {NAMES[key[1]]} {key[2]:g}" for key, lead in leads.items() if lead < 0]
        ahead = f"{len(leads) - len(behind)} of {len(leads)}"
        span = f"{min(leads.values()):+.1f} to {max(leads.values()):+.1f}"
        yield [rule.level, f"`{name}:interval={interval}`", other, ahead, span, ", ".join(behind) or "-"]


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


def architectures() -> str:
    """Table of the architectures that commands know by name, and how they run by default."""
    rows = []
    for name, known in published.architectures().items():
        guided = "two branches" if known.guided else "one branch"
        rows.append([f"`{name}`", f"`{known.pipeline}`", f"`{known.scheduler}`", f"{known.steps}", guided])
    return markdown(["name", "pipeline", "scheduler", "steps", "guidance"], rows, left=5)


def presets() -> str:
    """Table of the published presets, with their sources."""
    loaded = {name: Preset.load(path) for name, path in shipped().items()}
    rows = [
        [f"`{name}`", preset.summary, f"{preset.evidence.steps or '-'}", preset.evidence.source or ""]
        for name, preset in loaded.items()
        if preset.evidence.source
    ]
    return markdown(["preset", "what", "steps", "source"], rows, left=4)
