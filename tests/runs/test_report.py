"""What a report shows: a line, a text, tables for notebooks, and plain values for JSON."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any, ClassVar

import pytest
from support import tiny

import cachekit
from cachekit import Choice, Every, Observation, Policy, Report, Reuse, Sites
from cachekit.amounts import macs, size

STEPS = 6


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.small()


@pytest.fixture(scope="module")
def report(pipe: Any) -> Report:
    with cachekit.apply(pipe, ["tgate:m=3", "forecast:interval=2"]) as attachment:
        tiny.latents(pipe, steps=STEPS)
        assert repr(attachment) == "<Attachment: tgate:m=3 + forecast on UNet2DConditionModel>"
    assert repr(attachment) == "<Attachment: tgate:m=3 + forecast on UNet2DConditionModel, removed>"
    return attachment.report()


def test_a_line_counts_no_macs(report: Report) -> None:
    line = f"<Report: tgate + forecast, 6 steps, {report.calls} denoiser calls and {report.left_out} left out, "
    assert repr(report) == f"{line}{report.seconds:.3g} s>"
    assert report.calls + report.left_out == STEPS
    assert report.left_out > 0


def test_the_text_has_units(report: Report) -> None:
    lines = str(report).splitlines()
    assert f"{macs(report.macs)} of {macs(report.baseline_macs)}, {report.mac_reduction:.2f}x MAC reduction" in lines
    assert f"kept at peak {size(report.cache_bytes)}" in lines
    assert any(line.startswith(f"{report.seconds:.3g} s, of which deciding ") for line in lines)
    for count in report.counts:
        ran = f"ran {count.computed + count.stored} times, {count.stored} of them kept, reused {count.reused}"
        assert f"{count.policy} {count.kind} x {count.targets}: {ran}" in lines
    assert not re.search(r"\d{5}", str(report))


def test_plain_values_are_the_figures(report: Report) -> None:
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["specs"] == ["tgate:m=3", "forecast"]
    for name in ("steps", "calls", "left_out", "seconds", "macs", "baseline_macs", "mac_reduction", "cache_bytes"):
        assert found[name] == getattr(report, name)
    assert found["speedup"] is None
    assert found["counts"] == [vars(count) for count in report.counts]
    assert found["arguments"]["num_inference_steps"] == STEPS


class Cells(HTMLParser):
    """The texts of a document's cells; anything but tables is refused."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        assert tag in ("table", "tr", "td", "th"), tag
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data.removesuffix("\n")


class Marked(Policy):
    """Has markup in its spec, and records what no file can hold."""

    name: ClassVar[str] = "marked"
    text: str = "<script>alert(1)</script>"

    def choices(self) -> dict[str, Choice]:
        return {"attention": Choice(Sites(kinds="self_attention"), Every(n=2), Reuse())}

    def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
        memory.setdefault("trace", []).append((seen.step, {"kinds": [cachekit.Kind.BLOCK, None, object]}))

    @property
    def caution(self) -> str:
        return "a < b & c"


def test_tables_are_escaped_and_traces_are_plain(pipe: Any) -> None:
    with cachekit.apply(pipe, Marked(text="<b>&")) as attachment:
        tiny.latents(pipe, steps=2)
    report = attachment.report()
    cells = Cells(report._repr_html_()).texts
    assert {"a < b & c", "marked:text=<b>&", "of them kept"} <= set(cells)
    step, seen = json.loads(json.dumps(report.to_dict()))["traces"]["marked"][0]
    assert (step, seen) == (0, {"kinds": ["block", None, "<class 'object'>"]})


def test_what_cannot_be_counted_is_not_made_up(report: Report) -> None:
    def refuse(record: Any) -> Any:
        raise cachekit.CostError("no shapes")

    unknown = Report((), report.record, refuse, lambda record: None)
    found = unknown.to_dict()
    assert (found["macs"], found["mac_reduction"], found["speedup"]) == (None, None, None)
    assert "MACs unknown: no shapes" in Cells(unknown._repr_html_()).texts
    with pytest.raises(cachekit.CostError):
        _ = unknown.mac_reduction
