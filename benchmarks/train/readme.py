"""Write the measured figures into README.md, each table between its two markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cachekit.models.demo.pipeline import WEIGHTS

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


def main() -> None:
    """Update README.md."""
    text = README.read_text()
    for name, path in SOURCES.items():
        found = json.loads(path.read_text())
        text = insert(text, name, "\n\n".join([table(found["rows"]), *_autoencoder(found)]))
    for name, rows in json.loads(BEFORE.read_text()).items():
        text = insert(text, f"{name} before", table(rows))
    text = insert(text, "classifier", _classifier())
    README.write_text(text)


if __name__ == "__main__":
    main()
