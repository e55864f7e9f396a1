"""Write measured figures into the documents, between their markers: `python -m benchmarks.readme`.

Run it after `cachekit demo` and `python -m benchmarks.overhead`; a test checks that no document is stale.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from cachekit.models.demo import DEMO_GUIDANCE
from cachekit.models.demo.pipeline import PIPELINES
from cachekit.registry.catalog import installed
from cachekit.tools.bench import demo
from cachekit.tools.bench.figures import FIGURES
from cachekit.tools.bench.results import read
from cachekit.tools.bench.summary import Group, Row, groups
from cachekit.tools.bench.tables import CONFIGURATION, EQUAL_COST, EQUAL_LEGEND, headings, markdown, texts, title
from cachekit.tools.coverage.page import markdown as coverage_page
from cachekit.tools.coverage.results import read as read_coverage

from . import (
    analyses,
    border,
    calibrations,
    carry_tables,
    choosing,
    few_steps,
    gpu_tables,
    kit,
    messages,
    method_figures,
    methods,
    new_projects,
    pictures,
    recipes,
    tuned,
    using,
    waiting,
)
from .frontier import SHORT
from .ship import GRIDS, RESULTS

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "cachekit" / "models" / "demo" / "weights"


def main() -> None:
    """Store the demo's files with the results, then fill every marker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder written by `cachekit demo`; default: the stored results")
    parser.add_argument("--demo-euler", type=Path, help="folder written by `cachekit demo --scheduler EulerDiscrete`")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a document is stale")
    options = parser.parse_args()
    if options.demo:
        store_demo(options.demo)
    if options.demo_euler:
        shutil.copy(options.demo_euler / "table.json", RESULTS / "demo-table-euler.json")
    stale = {file: text for file, text in filled().items() if not file.exists() or file.read_text() != text}
    if options.check and stale:
        raise SystemExit("stale: " + ", ".join(str(document.relative_to(ROOT)) for document in stale))
    for document, text in stale.items():
        document.write_text(text)
        print(f"wrote {document.relative_to(ROOT)}")


def store_demo(folder: Path) -> None:
    """Copy the demo's figures and pictures to the repository."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "table.json", RESULTS / "demo-table.json")
    shutil.copy(folder / "pictures.png", ROOT / "docs" / "demo.png")


def filled() -> dict[Path, str]:
    """Each document with markers, and the text it should have."""
    parts = {
        "demo table": demo_table("demo-table.json"),
        "demo table with Euler": demo_table("demo-table-euler.json"),
        "frontier": frontier_tables(),
        "overhead table": overhead_table(),
        "border": border.table(),
        "soak table": soak_table(),
        "model figures": model_figures(),
        "paper table": paper_table(),
        **{f"{name} grid": grid_table(name) for name in GRIDS},
        "verdict": verdict(),
        "methods": methods.table(),
        "policies": methods.policies("../plugins"),
        "policies of the README": methods.policies("plugins"),
        "places": methods.parts("place", installed().places),
        "schedules": methods.parts("schedule", installed().schedules),
        "stand-ins": methods.parts("stand-in", installed().stand_ins),
        "method figures": method_figures.table(),
        "ahead": method_figures.ahead(),
        "caught": method_figures.caught(),
        "settings": method_figures.settings(),
        "steep": method_figures.steep(),
        "magnitudes": method_figures.magnitudes(),
        "leads": leads(),
        "calibrations": calibrations.table(),
        "carried": carry_tables.uses(),
        "longer runs": carry_tables.longer(),
        "batches": carry_tables.batches(),
        "gpu": gpu_tables.table(),
        "gates": gate_tables(),
        "rules": choosing.rules(),
        "levels": choosing.levels(),
        "architectures": choosing.architectures(),
        "kit models": kit.models(),
        "kit checks": kit.checks(),
        "levels read": choosing.leads(),
        "presets": choosing.presets(),
        "messages": messages.table(),
        **{f"analysis {model}": analyses.tables(model) for model in analyses.MODELS},
        **{f"analysis {model} read": analyses.read(model) for model in analyses.MODELS},
        "calibration times": calibrations.times(),
        "few steps gates": few_steps.gates(),
        "few steps forecasts": few_steps.forecasts(),
        "tuned": tuned.table(),
        "using": using.table(),
        "new projects": new_projects.table(),
        "commands": waiting.commands(),
        "first image": waiting.first_image(),
        "batch speed": waiting.batches(),
        **recipes.parts(),
    }
    documents = {
        ROOT / "docs" / "coverage.md": coverage_page(read_coverage(ROOT / "docs" / "coverage.json")),
        ROOT / "docs" / "pictures" / "plan.svg": pictures.plan(),
        **{ROOT / "docs" / "pictures" / f"{name}.svg": drawn for name, drawn in analyses.pictures().items()},
    }
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = document.read_text()
        if "<!-- " in text:
            documents[document] = fill(text, parts)
    return documents


def fill(text: str, parts: dict[str, str]) -> str:
    """Replace the text between each pair of `<!-- name: begin -->` and `<!-- name: end -->`."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text and part:
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n{part.strip()}\n{end}{rest.split(end, 1)[1]}"
    return text


def stored(name: str) -> Any:
    """Read stored results; None where nothing was measured."""
    source = RESULTS / name
    return json.loads(source.read_text()) if source.exists() else None


def demo_table(name: str) -> str:
    """Table of a stored run of the demo."""
    data = stored(name)
    return demo.page(demo.from_json(data)) if data else ""


def frontier_tables() -> str:
    """Tables of forecasts beside fewer steps, and what explains their columns."""
    from .frontier import reading, tables

    found = tables()
    return f"{found}\n{EQUAL_LEGEND}\n\n{reading()}" if found else ""


def gate_tables() -> str:
    """Tables of fixed and found gates."""
    from .gates import tables

    return tables()


def overhead_table() -> str:
    """Overhead comparisons of every model measured."""
    rows = []
    for model, held in (stored("overhead.json") or {}).items():
        title = f"{model}, {held['steps']} steps"
        for name, result in held["comparisons"].items():
            seconds = " / ".join(f"{value:.3f}" for value in result["seconds"]) or "-"
            ratios = [f"{result[key]:.3f}" if key in result else "-" for key in ("ratio", "noise", "cpu_ratio")]
            rows.append([title, name, seconds, *ratios])
        if "deciding_ms" in held:
            rows.append(
                [title, "deciding per step, tgate + deepcache", f"{held['deciding_ms'] / 1e3:.6f}", "-", "-", "-"]
            )
    header = ["model", "comparison", "seconds", "ratio of wall times", "of plain and its copy", "ratio of CPU times"]
    return markdown(header, rows, left=2) if rows else ""


def grid_table(name: str) -> str:
    """Results of `python -m benchmarks.ship` on one model, a table for each scheduler."""
    keys = ("seconds", "speedup", "mac_reduction", "psnr", "caption_match", "frechet", "cache_bytes")
    equal_time = next(name for name, cost in EQUAL_COST.items() if cost == "wall time")
    parts = []
    for group in grid(name):
        rows = [texts(group, row) for row in (group.uncached, *group.rows)]
        names = [CONFIGURATION, *headings(keys), equal_time]
        shown = [name for name in names if any(row[name] != "-" for row in rows)]
        table = markdown(shown, [[row[name] for name in shown] for row in rows])
        # Results from before there were other spacings aren't lacking them for want of a setting.
        notes = group.notes if any(row.cell.spacing for row in group.rows) else []
        parts += [f"**{title(group)}**", table.rstrip(), *notes]
    return "\n\n".join(parts)


def verdict() -> str:
    """Compare the captions that compositions match with those that plain steps of the same wall time match."""
    match, rows = FIGURES["caption_match"], []
    for group in grid("demo"):
        for row in group.rows:
            plain = group.best_plain(row.plain_steps()["wall time"])
            if len(row.cell.specs) < 2 or plain is None or row.caption_match is None or plain.caption_match is None:
                continue
            compared = [FIGURES["speedup"].text(row), match.text(row), plain_steps(plain), match.text(plain)]
            rows.append([group.cell.scheduler, row.label, *compared])
    header = ["scheduler", "composition", FIGURES["speedup"].name, match.name, "plain steps as fast", match.name]
    return markdown(header, rows, left=len(header)) if rows else ""


def leads() -> str:
    """Table of the lead of each configuration of the demo over plain steps at equal MACs, under both schedulers.

    Forecasts are measured on more captions by `frontier`, which come first.
    """
    from .frontier import stored as measured

    held = [demo.from_json(data) for data in map(stored, ("demo-table.json", "demo-table-euler.json")) if data]
    forecasts = [group for group in measured(RESULTS / "frontier-demo.jsonl") if group.cell.guidance == DEMO_GUIDANCE]
    found: dict[str, dict[str, tuple[Row, float]]] = {}
    for group in [*forecasts, *held]:
        for row in (row for row in group.rows if row.cell.specs):
            plain = group.best_plain(row.plain_steps()["MACs"])
            if plain and row.psnr is not None and plain.psnr is not None:
                lead = row.psnr - plain.psnr
                found.setdefault(row.label, {}).setdefault(group.cell.scheduler, (row, lead))
    labels = dict.fromkeys(row.label for group in held for row in group.rows if row.label in found)
    return (
        markdown(
            ["spec", "MAC reduction", *(f"{name}, dB" for name in SHORT.values()), "captions"],
            [
                [
                    label,
                    f"{mean(row.mac_reduction for row, _ in found[label].values()):.2f}x",
                    *(f"{found[label][name][1]:+.1f}" if name in found[label] else "-" for name in SHORT),
                    f"{max(row.checked_images for row, _ in found[label].values())}",
                ]
                for label in labels
            ],
        )
        if held
        else ""
    )


def plain_steps(row: Row) -> str:
    """Write the number of plain steps of a row, with the name of another spacing than the scheduler's own."""
    return f"{row.cell.steps}" + (f", {row.cell.spelled}" if row.cell.spacing else "")


def grid(name: str) -> list[Group]:
    """Read the stored results of one model, none where nothing was measured."""
    source = RESULTS / f"{name}.jsonl"
    return groups(read(source)[0]) if source.exists() else []


def soak_table() -> str:
    """Memory before and after many changing runs, and the images lost."""
    found = stored("soak.json")
    if not found:
        return ""
    soak, threads = found["soak"], found["threads"]
    rows = [
        [unit, *(f"{soak[f'{name}_{when}'] / scale:,.0f}" for when in ("start", "end"))]
        for name, scale, unit in (("bytes", 2**20, "MiB of the process"), ("tensors", 1, "tensors alive"))
    ]
    return (
        f"{markdown(['what', 'at the start', 'at the end'], rows)}\n"
        f"{soak['runs']} runs in {soak['ways']} ways, {soak['faults']} broken by an exception,"
        f" {soak['paused']} paused: {soak['lost']} images lost."
        f" {threads['threads']} threads with a pipeline each over one denoiser, {threads['runs_each']} runs each:"
        f" {threads['lost']} images lost."
    )


def paper_table() -> str:
    """Table of the published costs beside the counted ones."""
    rows = [
        [row["table"], row["name"], f"{row['paper']:.3f}", f"{row['ours']:.3f}", f"{row['ratio']:.5f}"]
        for row in stored("paper.json") or ()
    ]
    return markdown(["table", "row", "paper (T)", "cachekit (T)", "ratio"], rows, left=2) if rows else ""


def model_figures() -> str:
    """Share of held-out captions that the embedded models match."""
    rows = [
        [
            calibrations.NAMES[kind],
            row["sampler"],
            f"{row['steps']}",
            f"{row['guidance']:g}",
            "caption" if row["text"] else "empty",
            f"{100 * row['shown']:.1f} ± {100 * row['error']:.1f} %",
            f"{100 * row['shown_strict']:.1f} %",
            f"{row['n']}",
        ]
        for kind in PIPELINES
        for row in json.loads((WEIGHTS / kind / "figures.json").read_text())["rows"]
    ]
    match = FIGURES["caption_match"].name
    return markdown(["model", "sampler", "steps", "guidance", "text", match, "with stricter outlines", "images"], rows)


if __name__ == "__main__":
    main()
