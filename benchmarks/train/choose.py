"""Compare guidance scales and timestep spacings on captions other than the published ones.

`python -m benchmarks.train.choose` writes choice.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cachekit.models.demo import DEMO_GUIDANCE, DEMO_STEPS
from cachekit.models.demo.pipeline import WEIGHTS

from .evaluate import Row, measure, prepare, table

SEED = 11
CHOICE = Path(__file__).parent / "choice.json"


def choose(folder: Path, n: int, guidances: list[float], spacings: list[str]) -> None:
    """Measure 25 and 8 steps for each guidance scale and spacing."""
    measured: list[dict[str, Any]] = []
    for spacing in spacings:
        for guidance in guidances:
            pipe = prepare(folder, "DPM++")
            pipe.scheduler.register_to_config(timestep_spacing=spacing)
            for steps in (DEMO_STEPS, 8):
                row = measure(pipe, Row(f"DPM++ {spacing}", steps, guidance, True, n), SEED)
                measured.append(row)
                CHOICE.write_text(json.dumps({"seed": SEED, "rows": measured}, indent=1) + "\n")
                print(table([row]).splitlines()[-1], flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=WEIGHTS / "unet")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, DEMO_GUIDANCE, 5.0])
    parser.add_argument("--spacing", nargs="+", default=["trailing", "leading"])
    options = parser.parse_args()
    choose(options.folder, options.n, options.guidance, options.spacing)


if __name__ == "__main__":
    main()
