"""The files that a denoiser's call passes through are those that the page on the architecture lists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from support import tiny
from support.sources import ROOT

import cachekit

CORE = Path(cachekit.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LISTED = re.compile(r"<!-- call path: begin -->\n(.*?)<!-- call path: end -->", re.DOTALL)


def listed() -> set[str]:
    """Read the files in the page's table."""
    found = LISTED.search(PAGE)
    assert found
    rows = [row.split("|") for row in found[1].splitlines()[2:]]
    rooms = [("".join(re.findall(r"`(.*)`", room)), re.findall(r"`([^`]+)`", files)) for _, room, files, _ in rows]
    return {f"{room}{file}.py" for room, files in rooms for file in files}


def traced(pipe: Any, specs: list[str]) -> set[str]:
    """Collect the files of the core whose code runs between the end of the first step and that of the last."""
    seen: set[str] = set()

    def note(frame: Any, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(CORE):
            seen.add(path.relative_to(CORE).as_posix())

    def ended(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        sys.setprofile(note if step < 6 else None)
        return given

    with cachekit.apply(pipe, specs):
        tiny.latents(pipe, steps=8)  # what is made once is made here
        try:
            tiny.latents(pipe, steps=8, callback_on_step_end=ended)
        finally:
            sys.setprofile(None)
    return seen


def test_the_page_lists_the_files_of_a_call() -> None:
    found = traced(tiny.small(), ["tgate:m=4", "deepcache:interval=3"])
    assert {"driving/driver.py", "switches/switch.py", "runs/store.py"} < found
    assert found == listed()
