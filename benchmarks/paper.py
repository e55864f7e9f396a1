"""Store the costs that `cachekit bench paper` prints: `python -m benchmarks.paper`.

Writes benchmarks/results/paper.json; `python -m benchmarks.readme` writes the table into the documents.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cachekit.tools.bench.paper import rebuilt

RESULT = Path(__file__).resolve().parent / "results" / "paper.json"


def main() -> None:
    """Count every row and write all."""
    found = [{**asdict(row), "ratio": row.ratio} for row in rebuilt()]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {RESULT}: {len(found)} rows")


if __name__ == "__main__":
    main()
