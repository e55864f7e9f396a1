"""Rebuild the published tables that need no weights: `python -m benchmarks.paper`.

Writes benchmarks/results/paper.json; `python -m benchmarks.readme` puts the table into the documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cachekit
from cachekit.architectures import architecture

HERE = Path(__file__).resolve().parent
TABLES = HERE / "paper_tables.json"
RESULT = HERE / "results" / "paper.json"


def main() -> None:
    """Estimate every row, print it and write all."""
    found = []
    for row in rebuilt():
        found.append(row)
        print(f"{row['table']!s:>7}  {row['name']:60}  {row['paper']:9.3f}  {row['ours']:9.3f}  {row['ratio']:.5f}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def rebuilt() -> Iterator[dict[str, Any]]:
    """Yield each published figure beside ours, in 10^12 multiply-accumulates."""
    tables = json.loads(TABLES.read_text())
    for row in (*tables["rows"], *tables["cair"]):
        found = cachekit.estimate(row["model"], row["specs"], num_inference_steps=row["steps"])
        name = f"{row['model']}, {row['steps']} steps, {' + '.join(row['specs']) or 'plain'}"
        yield _beside(row, name, found.macs, params=found.params, fid=row["fid"])
    for row in tables["scaling"]:
        yield _beside(row, _scaling_name(row), scaling_macs(row))


def scaling_macs(row: dict[str, Any]) -> int:
    """Return one step of one branch at a row's image size and number of text tokens (table 10)."""
    known = architecture(row["model"])
    wider = replace(known, tokens=known.tokens * row["token_factor"])
    inputs = wider.inputs(1, row["height"], row["width"])
    found = cachekit.estimate(known.build(), row["specs"], num_inference_steps=2, inputs=inputs, guided=False)
    return found.steps[-1].macs


def _scaling_name(row: dict[str, Any]) -> str:
    specs = " + ".join(row["specs"]) or "plain"
    return f"{row['model']}, {row['height']} px, {row['token_factor']} x text, one step of one branch, {specs}"


def _beside(row: dict[str, Any], name: str, macs: int, **extra: Any) -> dict[str, Any]:
    ours = macs / 1e12
    return {
        "table": row["table"],
        "name": name,
        "paper": row["macs_T"],
        "ours": ours,
        "ratio": ours / row["macs_T"],
        **extra,
    }


if __name__ == "__main__":
    main()
