"""Write the measured figures into README.md, each table between its two markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cachekit.models.demo.pipeline import WEIGHTS
from cachekit.tools.bench.results import read
from cachekit.tools.bench.tables import markdown

from ..ship import RESULTS
from .choose import CHOICE
from .evaluate import table

README = Path(__file__).parent / "README.md"
SOURCES = {
    "figures": WEIGHTS / "unet" / "figures.json",
    "choice": CHOICE,
    "transformer": WEIGHTS / "dit" / "figures.json",
    "flow": WEIGHTS / "flow" / "figures.json",
    "consistency": WEIGHTS / "lcm" / "figures.json",
}
#: Figures of the models as they were before `denoisers` trained them further.
BEFORE = Path(__file__).parent / "before.json"
#: Captions that methods which end guidance showed on the UNet before that, and the commit they are from.
BEFORE_GUIDANCE = Path(__file__).parent / "before-guidance.json"


def insert(text: str, name: str, content: str) -> str:
    """Replace what is between a name's two markers with `content`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def _classifier() -> str:
    """Write a sentence on the accuracy of the classifier."""
    found = json.loads((WEIGHTS / "classifier" / "figures.json").read_text())
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found["accuracies"].items())
    return f"Right on {found['n']} held-out scenes, of what there is in their quarters: {shares}."


def _autoencoder(found: dict[str, Any]) -> list[str]:
    """Write a sentence on the autoencoder alone, where it was measured."""
    if "reconstruction" not in found:
        return []
    measured = found["reconstruction"]
    share, psnr = f"{100 * measured['shown']:.1f} %", f"{measured['psnr']:.1f} dB"
    return [f"Of {measured['n']} true images, {share} pass the checker after the autoencoder alone ({psnr})."]


def _guidance() -> str:
    """Tabulate the captions that methods which end guidance showed on the UNet before, and show at the same setting."""
    before = json.loads(BEFORE_GUIDANCE.read_text())
    now = {_setting(result.cell.model_dump(mode="json")): result for result in read(RESULTS / "demo.jsonl")[0]}
    pairs = [(row, now[_setting(row)].samples) for row in before["rows"]]
    counts = [(row["shown"], sum(bool(sample.shown) for sample in samples)) for row, samples in pairs]
    plain = [(row["uncached_shown"], sum(bool(sample.uncached_shown) for sample in samples)) for row, samples in pairs]
    rows = [
        [" + ".join(row["specs"]), row["scheduler"].removesuffix("Scheduler"), *map(str, shown), *map(str, uncached)]
        for (row, _), shown, uncached in zip(pairs, counts, plain)
    ]
    header = ["policy", "scheduler", "captions shown before", "after", "uncached before", "uncached after"]
    more = sum(after > first for first, after in counts)
    (shown, shown_now), (uncached, uncached_now) = ([sum(one) for one in zip(*both)] for both in (counts, plain))
    return (
        f"{markdown(header, rows, left=2)}\n"
        f"More captions are shown in {more} of {len(rows)} rows, each of {before['rows'][0]['n']} captions in"
        f" {before['rows'][0]['steps']} steps, with the same noise before and after: {shown} before and {shown_now}"
        f" after in all rows together, where the uncached model shows {uncached} and {uncached_now}. The figures"
        f" before are those of `{before['file']}` in commit {before['commit']}."
    )


def _setting(cell: dict[str, Any]) -> tuple[Any, ...]:
    """List what a figure before and after must have in common, which the weights are not."""
    return (tuple(cell["specs"]), *(cell[name] for name in ("scheduler", "steps", "seed", "captions", "guidance")))


def main() -> None:
    """Update README.md."""
    README.write_text(filled())


def filled() -> str:
    """README.md with the figures as they are stored."""
    text = README.read_text()
    for name, path in SOURCES.items():
        found = json.loads(path.read_text())
        text = insert(text, name, "\n\n".join([table(found["rows"]), *_autoencoder(found)]))
    for name, rows in json.loads(BEFORE.read_text()).items():
        text = insert(text, f"{name} before", table(rows))
    text = insert(text, "guidance before", _guidance())
    return insert(text, "classifier", _classifier())


if __name__ == "__main__":
    main()
