"""Measure the grids that come with the repository: `python -m benchmarks.ship [NAME ...]`.

Each is a `cachekit bench grid` command, so an interrupted one is resumed. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from cachekit.cli import app

RESULTS = Path(__file__).resolve().parent / "results"
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
CONSISTENCY = (
    "--steps 4 --captions 96 --executor process --threads 1 --no-peers --scheduler LCMScheduler"
    " --spec tgate:m=1|2 --spec deepcache:interval=2|3 --spec forecast:interval=2|3"
    " --spec forecast:interval=2|3,order=0,of=x0 --spec fora:interval=2"
)
TRUE_SIZE = (
    "--height 256 --width 256 --steps 6 --captions 2 --threads 2 --scheduler DDIMScheduler --no-peers"
    " --spec tgate:m=2 --spec adaptive_guidance:m=2"
)
#: Methods with settings of about the same cost; those that are measured first have files of figures.
METHODS = (
    "--steps 25 --captions 12 --executor process --threads 1 --no-peers"
    " --spec forecast:interval=2 --spec calibrated:interval=4"
    " --spec adaptive_guidance:m=10 --spec guidance_interval:first=2,stop=16"
    " --spec fora:interval=3 --spec pab --spec fastercache --spec taylorseer:interval=3 --spec hicache:interval=3"
    " --spec taylorseer:interval=3,at=features --spec spectrum --spec spectrum:mix=1"
    " --spec easycache:threshold=0.1 --spec seacache"
)
CROSS_ATTENTION = "--scheduler EulerDiscreteScheduler --spec tgate:m=10 --spec text_kv"
FIRST_BLOCK = "--spec delta_dit:interval=2 --spec fbcache:threshold=0.1 --spec dicache"
MEASURED = {
    "demo": ("smoothcache", "block_cache"),
    "demo-dit": ("smoothcache", "magcache", "magcache:threshold=0.24", "teacache"),
    "demo-flow": ("smoothcache", "magcache", "teacache"),
}
#: Settings meant for a third and a quarter of the cost.
STEEP = (
    "--steps 25 --captions 12 --executor process --threads 1 --no-peers"
    " --spec forecast:interval=3|4 --spec calibrated:interval=4|5 --spec fora:interval=5|8"
    " --spec hicache:interval=5|8 --spec taylorseer:interval=5|8,at=features"
)
#: Thresholds of about the same costs, which differ between models whose samples change at other rates.
FAR = (
    "--spec seacache:threshold=0.4,longest=3 --spec seacache:threshold=0.8,longest=5"
    " --spec easycache:threshold=0.4 --spec easycache:threshold=0.8,first=3"
)
FLOWING = (
    "--spec seacache:threshold=0.6,longest=4 --spec seacache:threshold=1,longest=6"
    " --spec easycache:threshold=0.15 --spec easycache:threshold=0.2,first=3"
)
#: Settings of methods whose defaults are far behind on the embedded models, or never act there; at few captions.
SETTINGS = (
    "--captions 4 --threads 1 --no-peers"
    " --spec spectrum:mix=0|0.5|1 --spec spectrum:growth=0,mix=0.5|1"
    " --spec cache:where=denoiser,when=growing(growth=0),what=spectral"
)
FITS = " --spec spectrum:ridge=0.001|1,mix=1 --spec spectrum:degree=1|2,mix=1"
MAGNITUDES = "".join(
    f" --spec magcache:threshold={threshold},file=benchmarks/results/magcache-demo-dit.json"
    for threshold in (0.24, 0.4)
)


def signals(model: str, *thresholds: float) -> str:
    """Specs of teacache with the figures of a model, which `measured` makes."""
    file = f"benchmarks/results/teacache-{model}.json"
    return "".join(f" --spec teacache:threshold={threshold},file={file}" for threshold in thresholds)


GRIDS = {
    "settings": [
        f"demo {SETTINGS} --steps 25 --scheduler EulerDiscreteScheduler",
        f"demo-dit {SETTINGS} --steps 25 --scheduler EulerDiscreteScheduler{FITS}{MAGNITUDES}",
        f"demo-flow {SETTINGS} --steps 25 --scheduler FlowMatchEulerDiscreteScheduler",
        f"demo-dit {SETTINGS} --steps 50 --scheduler EulerDiscreteScheduler",
    ],
    "methods-demo": [f"demo {METHODS} {CROSS_ATTENTION} --spec deepcache:interval=3"],
    "methods-demo-dit": [f"demo-dit {METHODS} {CROSS_ATTENTION} {FIRST_BLOCK}"],
    "methods-demo-flow": [f"demo-flow {METHODS} --scheduler FlowMatchEulerDiscreteScheduler {FIRST_BLOCK}"],
    "steep": [
        f"demo {STEEP} --scheduler EulerDiscreteScheduler {FAR}",
        f"demo-dit {STEEP} --scheduler EulerDiscreteScheduler {FAR}" + signals("demo-dit", 0.3, 0.4),
        f"demo-flow {STEEP} --scheduler FlowMatchEulerDiscreteScheduler {FLOWING}" + signals("demo-flow", 0.24, 0.4),
    ],
    "demo": [
        f"{DEMO} --scheduler {name} --no-peers"
        for name in ("DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler")
    ],
    "demo-dit": [f"{TRANSFORMER} --scheduler DPMSolverMultistepScheduler"],
    "demo-lcm": [f"demo-lcm {CONSISTENCY}"],
    "sd15": [f"sd15 {TRUE_SIZE} --spec deepcache:interval=3 --spec tgate:m=3+deepcache:interval=3"],
    "pixart": [f"pixart-alpha {TRUE_SIZE} --spec delta_dit:interval=2 --spec tgate:m=3+delta_dit:interval=2"],
}


def main() -> None:
    """Parse the command line and run the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grids", nargs="*", choices=[*GRIDS, []], help="grids to measure; default: all")
    for name in parser.parse_args().grids or GRIDS:
        for command in GRIDS[name]:
            if name.startswith("methods"):
                command += "".join(f" --spec {spec}" for spec in measured(command.split()[0]))
            print(f"cachekit bench grid {command}", flush=True)
            output = ["--output", str(RESULTS / f"{name}.jsonl")]
            app(["bench", "grid", *shlex.split(command), *output], standalone_mode=False)


def measured(model: str) -> list[str]:
    """Measure the figures of methods that need some, unless they are there, and list their specs."""
    specs = []
    for spec in MEASURED[model]:
        method, colon, _ = spec.partition(":")
        file = RESULTS / f"{method}-{model}.json"
        if not file.exists():
            given = f"{model} --spec {method} --steps 25 --scheduler euler --guidance 3.5 --output {file}"
            app(["calibrate", *shlex.split(given)], standalone_mode=False)
        specs.append(f"{spec}{',' if colon else ':'}file={file.relative_to(RESULTS.parents[1])}")
    return specs


if __name__ == "__main__":
    main()
