"""Copy the measured figures into README.md, each table between its two markers."""

from __future__ import annotations

import json
from pathlib import Path

from cachekit.demo.pipeline import WEIGHTS

from .choose import CHOICE
from .evaluate import table

README = Path(__file__).parent / "README.md"
SOURCES = {"figures": WEIGHTS / "unet" / "figures.json", "choice": CHOICE}


def insert(text: str, name: str, content: str) -> str:
    """Return the text with `content` between a name's markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def main() -> None:
    """Replace what is between the markers."""
    text = README.read_text()
    for name, path in SOURCES.items():
        text = insert(text, name, table(json.loads(path.read_text())["rows"]))
    README.write_text(text)


if __name__ == "__main__":
    main()
