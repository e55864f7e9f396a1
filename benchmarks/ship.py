"""Measure the grids that come with the repository: `python -m benchmarks.ship [demo|demo-dit|sd15|pixart ...]`.

Each is a `cachekit bench grid` command, so an interrupted one is resumed. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import shlex

from cachekit.cli import app

from .readme import RESULTS

DEMO = (
    "demo --steps 25 --captions 12 --executor process --threads 1"
    " --spec tgate:m=3|5|8|10|15 --spec deepcache:interval=2|3|5 --spec adaptive_guidance:m=15"
    " --spec adaptive_guidance:threshold=0.99 --spec tgate:m=10|15+deepcache:interval=3"
    " --spec adaptive_guidance:m=15+deepcache:interval=3 --spec tgate:m=15+deepcache:interval=3+adaptive_guidance:m=10"
)
TRANSFORMER = (
    "demo-dit --steps 25 --captions 12 --executor process --threads 1 --no-peers"
    " --spec tgate:m=5|10|15 --spec delta_dit:interval=2|3 --spec adaptive_guidance:m=10|15"
    " --spec tgate:m=10|15+delta_dit:interval=2"
)
TRUE_SIZE = (
    "--height 256 --width 256 --steps 6 --captions 2 --threads 2 --scheduler DDIMScheduler --no-peers"
    " --spec tgate:m=2 --spec adaptive_guidance:m=2"
)
GRIDS = {
    "demo": [
        f"{DEMO} --scheduler {name} --no-peers"
        for name in ("DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler")
    ],
    "demo-dit": [f"{TRANSFORMER} --scheduler DPMSolverMultistepScheduler"],
    "sd15": [f"sd15 {TRUE_SIZE} --spec deepcache:interval=3 --spec tgate:m=3+deepcache:interval=3"],
    "pixart": [f"pixart-alpha {TRUE_SIZE} --spec delta_dit:interval=2 --spec tgate:m=3+delta_dit:interval=2"],
}


def main() -> None:
    """Parse the command line and run the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grids", nargs="*", choices=[*GRIDS, []], help="grids to measure; default: all")
    for name in parser.parse_args().grids or GRIDS:
        for command in GRIDS[name]:
            print(f"cachekit bench grid {command}", flush=True)
            output = ["--output", str(RESULTS / f"{name}.jsonl")]
            app(["bench", "grid", *shlex.split(command), *output], standalone_mode=False)


if __name__ == "__main__":
    main()
