"""Measure TGATE's fixed gates beside those that the run finds: `python -m benchmarks.gates [MODEL ...]`.

Caption match and PSNR to the uncached images, against MACs, on the embedded models that have cross-attention. All
contenders take turns, caption by caption. Cells that the results file holds aren't measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cachekit.tools.analysis.comparing import cell_of
from cachekit.tools.bench.cells import Setting
from cachekit.tools.bench.results import Results
from cachekit.tools.bench.summary import Group, Row
from cachekit.tools.bench.tables import CONFIGURATION, headings, markdown, texts
from cachekit.tools.bench.workbench import Workbench

from .frontier import NOISE, fresh_captions, slim, stored

MODELS = ("demo", "demo-dit")
STEPS = 25
FIXED = tuple(f"tgate:m={m}" for m in (3, 5, 8, 10, 15, 20))
FOUND = ("tgate:m=auto", *(f"tgate:m=auto,settled={share}" for share in (0.2, 0.3, 0.5)))
#: What happens at a gate, one thing after the other: guidance ends, and attention is kept, of both branches or of one.
APART = ("adaptive_guidance:m=10", "tgate:m=10,keep=cond")
OWN = (*APART, *(f"{spec},keep=cond,mean=false" for spec in ("tgate:m=10", "tgate:m=auto")))
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Parse the command line and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all, one after the other")
    parser.add_argument("--captions", type=int, default=48, help="number of held-out captions; default: 48")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    for model in options.models or MODELS:
        found = Results(path_of(model, options.results))
        measure(model, fresh_captions(options.captions), found, device=options.device)


def measure(model: str, captions: tuple[str, ...], results: Results, steps: int = STEPS, device: str = "cpu") -> None:
    """Measure the specs that `results` lacks, and add them."""
    setting = Setting(model=model, captions=captions, device=device, threads=1, pictures=0)
    own = cell_of(setting, steps, NOISE)
    cells = [own.model_copy(update={"specs": (spec,)}) for spec in (*FIXED, *FOUND, *OWN)]
    missing = [cell for cell in cells if cell not in results]
    print(f"{model}: {len(missing)} cells", flush=True)
    if missing:
        bench = Workbench(setting)
        results.add(map(slim, bench.measure([bench.prepare(cell) for cell in missing])))


# -- how it is shown --------------------------------------------------------------------------------------


def path_of(model: str, folder: Path = RESULTS) -> Path:
    """Find the results file of a model."""
    return folder / f"gates-{model}.jsonl"


def tables() -> str:
    """Table of each model measured, and how far the found gates lie above the fixed ones; empty without results."""
    return "\n".join(map(table, (group for model in MODELS for group in stored(path_of(model)))))


def table(group: Group) -> str:
    """Table of one group, and a line for each found gate."""
    names = [CONFIGURATION, *headings(("macs", "mac_reduction", "psnr", "caption_match"))]
    rows = [texts(group, row) for row in (group.uncached, *group.rows)]
    shown = markdown(names, [[row[name] for name in names] for row in rows])
    return f"**{group.cell.model}, {group.cell.scheduler}, {group.cell.steps} steps**\n\n{shown}\n{_leads(group)}"


def _leads(group: Group) -> str:
    """Compare each found gate with the line through the fixed gates, at the same MACs."""
    rows = {row.cell.specs[0]: row for row in group.rows}
    fixed = sorted((rows[spec] for spec in FIXED if spec in rows), key=lambda row: row.macs)
    return "".join(f"- {line}\n" for spec in FOUND if spec in rows for line in _lead(rows[spec], fixed))


def _lead(row: Row, fixed: Sequence[Row]) -> Iterator[str]:
    """Yield a line on a found gate within the range of the fixed ones."""
    if not fixed or not fixed[0].macs <= row.macs <= fixed[-1].macs:
        return
    costs = [one.macs for one in fixed]
    for name, figure, unit, scale in (("psnr", "PSNR", "dB", 1), ("caption_match", "caption match", "points", 100)):
        curve, value = [getattr(one, name) for one in fixed], getattr(row, name)
        if value is not None and None not in curve:
            lead = scale * (value - float(np.interp(row.macs, costs, curve)))
            where = "above" if lead >= 0 else "below"
            yield f"{row.label}: {figure} {abs(lead):.1f} {unit} {where} the fixed gates at equal MACs"


if __name__ == "__main__":
    main()
