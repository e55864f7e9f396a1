"""Put measured figures into the documents, between their markers: `python -m benchmarks.readme`.

Run after `cachekit demo` and `python -m benchmarks.overhead`; a test checks that no document is stale.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from cachekit.bench.page import against, columns, title
from cachekit.bench.results import read
from cachekit.bench.summary import Group, groups

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "cachekit" / "models" / "demo" / "weights" / "unet" / "figures.json"


def main() -> None:
    """Keep the demo's files with the results, then fill every marker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder written by `cachekit demo`; without it the kept one is used")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a document is stale")
    options = parser.parse_args()
    if options.demo:
        keep_demo(options.demo)
    stale = {document: text for document, text in filled().items() if document.read_text() != text}
    if options.check and stale:
        raise SystemExit("stale: " + ", ".join(str(document.relative_to(ROOT)) for document in stale))
    for document, text in stale.items():
        document.write_text(text)
        print(f"wrote {document.relative_to(ROOT)}")


def keep_demo(folder: Path) -> None:
    """Copy the demo's table and pictures to where the documents find them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("table.md", "table.json"):
        shutil.copy(folder / name, RESULTS / f"demo-{name}")
    shutil.copy(folder / "pictures.png", ROOT / "docs" / "demo.png")


def filled() -> dict[Path, str]:
    """Return each document with markers as it should read."""
    parts = {
        "demo table": demo_table(),
        "overhead table": overhead_table(),
        "soak table": soak_table(),
        "model figures": model_figures(),
        "paper table": paper_table(),
        **{f"{name} grid": grid_table(name) for name in ("demo", "demo-dit", "sd15", "pixart")},
        "verdict": verdict(),
    }
    documents = {}
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = document.read_text()
        if "<!-- " in text:
            documents[document] = fill(text, parts)
    return documents


def fill(text: str, parts: dict[str, str]) -> str:
    """Return `text` with what stands between `<!-- name: begin -->` and `<!-- name: end -->` replaced."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text and part:
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n{part.strip()}\n{end}{rest.split(end, 1)[1]}"
    return text


def demo_table() -> str:
    """Return the demo's table."""
    table = RESULTS / "demo-table.md"
    return table.read_text() if table.exists() else ""


def overhead_table() -> str:
    """Return the overhead comparisons of every model measured."""
    source = RESULTS / "overhead.json"
    if not source.exists():
        return ""
    lines = ["| model | comparison | seconds | ratio of wall times |", "| --- | --- | ---: | ---: |"]
    for model, held in json.loads(source.read_text()).items():
        for name, result in held["comparisons"].items():
            seconds = " / ".join(f"{value:.3f}" for value in result["seconds"]) or "-"
            lines.append(f"| {model}, {held['steps']} steps | {name} | {seconds} | {result['ratio']:.3f} |")
    return "\n".join(lines)


def grid_table(name: str) -> str:
    """Return what `python -m benchmarks.ship` measured of one model, a table for each scheduler."""
    names = ["configuration", "s/image", "faster", "fewer", "PSNR", "shown", "Frechet", "kept"]
    parts = []
    for group in grid(name):
        rows = [group.uncached, *group.rows]
        texts = [columns(group, row) | {"plain at equal time": against(group, row, "wall time")} for row in rows]
        shown = [n for n in [*names, "plain at equal time"] if any(text.get(n, "-") != "-" for text in texts)]
        lines = [f"**{title(group)}**", "", f"| {' | '.join(shown)} |", "|" + " --- |" + " ---: |" * (len(shown) - 1)]
        lines += [f"| {' | '.join(text.get(n, '-') for n in shown)} |" for text in texts]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def verdict() -> str:
    """Return which compositions show more captions than plain steps that take as long, and which do not."""
    lines = ["| scheduler | composition | faster | shown | plain steps as fast | shown |", "|" + " --- |" * 6]
    for group in grid("demo"):
        for row in group.rows:
            plain = group.plain(row.plain_steps()["wall time"])
            if len(row.cell.specs) < 2 or plain is None or row.shown is None or plain.shown is None:
                continue
            figures = f"{row.faster:.2f}x | {row.shown:.0%} | {plain.cell.steps} | {plain.shown:.0%}"
            lines.append(f"| {group.cell.scheduler} | {row.label} | {figures} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def grid(name: str) -> list[Group]:
    """Return the shipped results of one model, or none where nothing was measured."""
    source = RESULTS / f"{name}.jsonl"
    return groups(read(source)[0]) if source.exists() else []


def soak_table() -> str:
    """Return what many changing runs lost and left behind."""
    source = RESULTS / "soak.json"
    if not source.exists():
        return ""
    soak, threads = (json.loads(source.read_text())[part] for part in ("soak", "threads"))
    lines = ["| what | at the start | at the end |", "| --- | ---: | ---: |"]
    for name, scale, unit in (("bytes", 2**20, "MiB of the process"), ("tensors", 1, "tensors alive")):
        start, end = (f"{soak[f'{name}_{when}'] / scale:,.0f}" for when in ("start", "end"))
        lines.append(f"| {unit} | {start} | {end} |")
    lines += [
        "",
        f"{soak['runs']} runs in {soak['ways']} ways, {soak['faults']} broken by an exception,"
        f" {soak['paused']} paused: {soak['lost']} images lost."
        f" {threads['threads']} threads with a pipeline each over one denoiser, {threads['runs_each']} runs each:"
        f" {threads['lost']} images lost.",
    ]
    return "\n".join(lines)


def paper_table() -> str:
    """Return the published multiply-accumulates beside ours."""
    source = RESULTS / "paper.json"
    if not source.exists():
        return ""
    lines = ["| table | row | paper (T) | cachekit (T) | ratio |", "| --- | --- | ---: | ---: | ---: |"]
    for row in json.loads(source.read_text()):
        figures = f"{row['paper']:.3f} | {row['ours']:.3f} | {row['ratio']:.5f}"
        lines.append(f"| {row['table']} | {row['name']} | {figures} |")
    return "\n".join(lines)


def model_figures() -> str:
    """Return what the embedded model reaches on held-out captions."""
    if not FIGURES.exists():
        return ""
    lines = [
        "| sampler | steps | guidance | text | captions shown | with stricter outlines | images |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in json.loads(FIGURES.read_text())["rows"]:
        shown = f"{100 * row['shown']:.1f} ± {100 * row['error']:.1f} %"
        text, strict = ("caption" if row["text"] else "empty"), f"{100 * row['shown_strict']:.1f} %"
        lines.append(
            f"| {row['sampler']} | {row['steps']} | {row['guidance']:g} | {text} | {shown} | {strict} | {row['n']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
