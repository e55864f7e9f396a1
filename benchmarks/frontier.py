"""Measure forecasts beside fewer plain steps with every spacing: `python -m benchmarks.frontier [MODEL ...]`.

Each model has a results file of its own, so that two can be measured at once, on a processor each. Captions come in
blocks; a block that the file holds isn't measured again, so an interrupted run is resumed, and `--captions` can be
raised later. Within a block all contenders take turns with the uncached pipeline, caption by caption.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from cachekit.errors import CachekitError
from cachekit.interface.specs import parse_all
from cachekit.models.demo import heldout_captions
from cachekit.registry.catalog import installed
from cachekit.tools.bench.cells import Cell, Setting
from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.measuring import Configuration
from cachekit.tools.bench.results import Result, Results, Sample, read
from cachekit.tools.bench.spacing import absent, computed_steps, rivals
from cachekit.tools.bench.suite import Suite
from cachekit.tools.bench.summary import Group, Row, groups
from cachekit.tools.bench.tables import CONFIGURATION, EQUAL_COST, headings, markdown, texts
from cachekit.tools.bench.workbench import Contender, Workbench

from .ship import RESULTS

#: Share of captions whose loss is mentioned.
LOST = 0.05
NAMES = ("calibrated", "forecast")
#: What schedulers are called in tables.
SHORT = {"EulerDiscreteScheduler": "Euler", "DPMSolverMultistepScheduler": "DPM++"}
MODELS = ("demo", "demo-dit", "demo-flow")
SCHEDULERS = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
GUIDANCE = (3.5, 5.0)
STEPS = 25
SPECS = (
    *(f"forecast:interval={interval}" for interval in (2, 3)),
    *(f"calibrated:interval={interval}" for interval in (2, 3, 4, 5, 6)),
)
#: Captions in a block.
BLOCK = 24
#: Seed of the captions, and of those that may have served for calibration or that the demo shows.
FRESH, USED = 1000, range(100)
#: Seed of the noise of the first caption's image, far from those of calibrations; the next one's follows.
NOISE = 10_000


def main() -> None:
    """Parse the command line and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all, one after the other")
    parser.add_argument("--scheduler", action="append", choices=SCHEDULERS + FLOW_SCHEDULERS, help="default: all")
    parser.add_argument("--guidance", action="append", type=float, help=f"default: {GUIDANCE}")
    parser.add_argument("--spec", action="append", help=f"default: {', '.join(SPECS)}")
    parser.add_argument("--captions", type=int, default=96, help=f"a multiple of {BLOCK}; default: 96")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them, a multiple too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    blocks = range(options.first, options.captions, BLOCK)
    for model, guidance, start in product(options.models or MODELS, options.guidance or GUIDANCE, blocks):
        setting = Setting(
            model=model,
            captions=fresh_captions(options.captions)[start : start + BLOCK],
            device="cpu",
            threads=1,
            guidance=guidance,
            pictures=0,
        )
        for scheduler in options.scheduler or (FLOW_SCHEDULERS if model == "demo-flow" else SCHEDULERS):
            path = options.results / f"frontier-{model}.jsonl"
            measure(setting, scheduler, options.spec or SPECS, start, Results(path))


def fresh_captions(count: int) -> tuple[str, ...]:
    """List held-out captions that neither a calibration nor the demo uses."""
    found = dict.fromkeys(heldout_captions(4 * count, FRESH))
    return tuple(caption for caption in found if caption not in _used_captions())[:count]


@cache
def _used_captions() -> frozenset[str]:
    return frozenset(caption for seed in USED for caption in heldout_captions(64, seed))


def measure(setting: Setting, scheduler: str, specs: Sequence[str], seed: int, results: Results) -> None:
    """Measure the cells of one block that `results` lacks, and add them."""
    bench = Workbench(setting)
    planned = list(cells(bench, setting, scheduler, specs, seed))
    wanted = [cell for cell, _ in planned]
    wanted += rivals((cell, len(computed_steps(plan)), plan) for cell, plan in planned)
    missing = [cell for cell in wanted if not absent(cell) and cell not in results]
    contenders = list(prepared(bench, missing))
    where = f"{setting.model}, {scheduler}, guidance {setting.guidance:g}, captions {seed} to {seed + BLOCK - 1}"
    print(f"{where}: {len(contenders)} cells", flush=True)
    if contenders:
        results.add(map(slim, bench.measure(contenders)))


def cells(
    bench: Workbench, setting: Setting, scheduler: str, specs: Sequence[str], seed: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield the cells of one block and their plans; a policy that isn't installed or doesn't fit is reported."""
    for spec in specs:
        try:
            specs_given = Configuration.parse(spec, STEPS).specs
            policies = parse_all(specs_given, installed())
            suite = Suite(
                setting, [policies], schedulers=[scheduler], steps=(STEPS,), seeds=(NOISE + seed,), peers=False
            )
            # Tables show specs as they were given, and not as policies write them.
            cell = suite.cells()[0].model_copy(update={"specs": specs_given})
            yield cell, bench.plan(cell, cell.specs, cell.steps)
        except CachekitError as error:
            print(f"left out: {error}", flush=True)


def prepared(bench: Workbench, missing: Sequence[Cell]) -> Iterator[Contender]:
    """Run each contender once; one that can't run is reported, such as a forecast without a calibration."""
    for cell in missing:
        try:
            yield bench.prepare(cell)
        except CachekitError as error:
            print(f"left out: {cell.label}: {error}", flush=True)


def slim(result: Result) -> Result:
    """Leave out what the tables don't show, and digits beyond what was measured."""
    return result.model_copy(update={"reference": None, "samples": [*map(_rounded, result.samples)]})


def _rounded(sample: Sample) -> Sample:
    figures: dict[str, Any] = {"features": None, "uncached_features": None}
    for name, digits in (("seconds", 5), ("uncached_seconds", 5), ("deciding_seconds", 6), ("psnr", 3), ("ssim", 5)):
        value = getattr(sample, name)
        figures[name] = None if value is None else round(value, digits)
    return sample.model_copy(update=figures)


# -- how it is shown --------------------------------------------------------------------------------------


def tables() -> str:
    """Table of each model, guidance scale and scheduler measured."""
    found = (group for model in MODELS for group in stored(RESULTS / f"frontier-{model}.jsonl"))
    return "\n".join(map(table, found))


def stored(path: Path) -> list[Group]:
    """Read results, those of all blocks together."""
    if not path.exists():
        return []
    # Blocks have captions of their own, whose digests keep them apart in a group; their seeds differ too.
    found = ((result, result.cell.model_copy(update={"captions": ""})) for result in read(path)[0])
    return groups(result.model_copy(update={"cell": cell}) for result, cell in found)


def table(group: Group) -> str:
    """Table of one group: a row for each forecast, with the best plain steps at the same cost beside it."""
    keys = ("mac_reduction", "speedup", "psnr", "caption_match")
    equal = next(name for name, cost in EQUAL_COST.items() if cost == "MACs")
    speedup = FIGURES["speedup"]
    rows = []
    for row in (group.uncached, *(row for row in group.rows if row.cell.specs)):
        shown, plain = texts(group, row), group.best_plain(row.plain_steps()["MACs"]) if row.cell.specs else None
        listed = [shown[name] for name in (CONFIGURATION, *headings(keys), equal)]
        rows.append([*listed, speedup.text(plain) if plain else "-"])
    title = f"**{group.cell.model}, {group.cell.scheduler}, guidance {group.cell.guidance:g}**"
    notes = "".join(f"\n{note}\n" for note in group.notes)
    return f"{title}\n\n{markdown([CONFIGURATION, *headings(keys), equal, f'their {speedup.name}'], rows)}{notes}"


def reading() -> str:
    """Write sentences on the tables: leads over plain steps, captions lost, and wall time beside MACs."""
    found = [group for model in MODELS for group in stored(RESULTS / f"frontier-{model}.jsonl")]
    rows = [(group, row) for group in found for row in group.rows if row.cell.specs]
    parts = [_led(name, [pair for pair in rows if pair[1].label.startswith(name)]) for name in NAMES]
    return "\n\n".join([*parts, _lost(rows), _wall([row for _, row in rows])])


def _led(name: str, rows: Sequence[tuple[Group, Row]]) -> str:
    """How often a policy is nearer to the uncached images than the best plain steps of equal MACs, and where not."""
    leads = {}
    for group, row in rows:
        plain = group.best_plain(row.plain_steps()["MACs"])
        if plain and plain.psnr is not None and row.psnr is not None:
            leads[_place(group, row)] = row.psnr - plain.psnr
    behind = sorted(place for place, lead in leads.items() if lead < 0)
    span = f"{min(leads.values()):+.1f} to {max(leads.values()):+.1f}"
    where = f"; behind: {'; '.join(behind)}" if behind else ""
    return f"`{name}` leads plain steps in {len(leads) - len(behind)} of {len(leads)} rows, by {span} dB{where}."


def _lost(rows: Sequence[tuple[Group, Row]]) -> str:
    """Where more than a share `LOST` of captions is lost against the uncached images."""
    lost = []
    for group, row in rows:
        own, whole = row.caption_match, group.uncached.caption_match
        if own is not None and whole is not None and whole - own > LOST:
            lost.append(f"{_place(group, row)} ({own:.0%} of {whole:.0%})")
    return f"More than {100 * LOST:.0f} points of captions are lost by: {'; '.join(lost) or 'none'}."


def _wall(rows: Sequence[Row]) -> str:
    """How much of the reduction of MACs is one of wall time, by the length of the interval."""
    shares = defaultdict(list)
    for row in rows:
        shares[row.label.partition("interval=")[2].partition(",")[0]].append(row.speedup / row.mac_reduction)
    spans = [f"{min(each):.2f} to {max(each):.2f} at {interval}" for interval, each in sorted(shares.items())]
    return (
        f"The speedup is less than the MAC reduction, since each step has costs outside the denoiser: its share by"
        f" interval is {', '.join(spans)}."
    )


def _place(group: Group, row: Row) -> str:
    scheduler = SHORT.get(group.cell.scheduler, "Euler")
    return f"{row.label} on {group.cell.model}, {scheduler}, guidance {group.cell.guidance:g}"


if __name__ == "__main__":
    main()
