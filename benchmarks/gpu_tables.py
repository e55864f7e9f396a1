"""Tables of what `python -m benchmarks.gpu` measured, for the documents."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from cachekit.tools.bench.cells import Method
from cachekit.tools.bench.tables import markdown

from .gpu import OUTPUT
from .gpu_checks import CHECKS
from .gpu_rows import CHECK, COMPILED, Row
from .gpu_rows import rows as wanted

_HEADER = ("configuration", "seconds", "uncached beside", "speedup", "MAC reduction", "estimated") + (
    "kept, MiB",
    "memory beyond the weights, MiB",
    "equal to uncached",
)
_COMPILED_HEADER = ("configuration", "seconds", "over compiled", "over eager", "seconds of the first run", "kept, MiB")
_WHO = {Method.CACHEKIT.value: "cachekit", Method.PUBLISHED.value: "published package of"}


def table() -> str:
    """Write all tables; empty where nothing was measured."""
    if not OUTPUT.exists():
        return ""
    held = list(json.loads(OUTPUT.read_text())["rows"].values())
    rows = [row for row in held if "error" not in row]
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows if row["kind"] not in (CHECK, COMPILED)):
        found = [row for row in rows if row["model"] == model and row["kind"] != COMPILED]
        parts += [_title(found[0]), markdown(_HEADER, [_cells(row) for row in found])]
    for model in dict.fromkeys(row["model"] for row in rows if row["kind"] == COMPILED):
        found = [row for row in rows if row["model"] == model and row["kind"] == COMPILED]
        parts += [f"{_title(found[0])}, repeated blocks compiled"]
        parts += [markdown(_COMPILED_HEADER, [_compiled(row) for row in found])]
    checks = [[row["text"], row.get("error", row.get("detail", ""))] for row in held if row["kind"] == CHECK]
    if checks:
        parts += ["**Checks**", markdown(("check", "found"), checks, left=2)]
    failed = [
        [f"{row['model']}: {_name(row)}", row["error"]] for row in held if "error" in row and row["kind"] != CHECK
    ]
    if failed:
        parts += ["**Rows that failed**", markdown(("row", "error"), failed, left=2)]
    return "\n\n".join(part.strip() for part in [*parts, _left(held)])


def _left(held: list[dict[str, Any]]) -> str:
    """List the rows of the script that nothing was measured for, by model."""
    there = {Row(row["model"], row["kind"], row["text"]) for row in held}
    left = [row for row in wanted(tiny=False, checks=tuple(CHECKS)) if row not in there]
    lines = []
    for model in dict.fromkeys(row.model for row in left):
        names = (_name(vars(row)).replace("uncached", f"{row.kind} uncached") for row in left if row.model == model)
        lines.append(f"- {model}: {'; '.join(names)}")
    return "\n".join([f"{len(left)} rows of the script are not measured yet:\n", *lines]) if left else ""


def _title(row: dict[str, Any]) -> str:
    return f"**{row['model']}**, {row['steps']} steps, {row['device']}"


def _name(row: dict[str, Any]) -> str:
    if row["kind"] == Method.PLAIN.value or row["text"] == "uncached":
        return "uncached"
    return f"{_WHO.get(row['kind'], row['kind'])} `{row['text']}`"


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        _name(row),
        f"{median(row['seconds']):.3f}",
        f"{median(row['uncached_seconds']):.3f}",
        f"{row['speedup']:.3f}",
        f"{row['mac_reduction']:.3f}",
        _figure(row.get("estimated_mac_reduction"), ".3f"),
        _figure(row["kept_bytes"], ",.1f", 2**20),
        _figure(row["extra_bytes"], ",.0f", 2**20),
        "yes" if row["equal"] else "no",
    ]


def _compiled(row: dict[str, Any]) -> list[str]:
    return [
        "uncached" if row["text"] == "uncached" else f"`{row['text']}`",
        f"{median(row['seconds']):.3f}",
        f"{row['speedup']:.3f}",
        f"{row['eager_speedup']:.3f}",
        f"{row['first_seconds']:.1f}",
        _figure(row["kept_bytes"], ",.1f", 2**20),
    ]


def _figure(value: float | None, form: str, unit: int = 1) -> str:
    return "-" if value is None else format(value / unit, form)
