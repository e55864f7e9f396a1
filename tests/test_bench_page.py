"""The report of `cachekit bench` as one page: complete, escaped, and without anything from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import tiny

import cachekit
from cachekit.bench.cells import Setting, expand
from cachekit.bench.page import write_page
from cachekit.bench.results import Results
from cachekit.bench.suite import Suite, measure_suite
from cachekit.bench.summary import groups

HOSTILE = '<script>alert(1)</script> " onerror="x'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    tiny.sd().save_pretrained(folder / "model")
    setting = Setting(model=str(folder / "model"), captions=(HOSTILE,), device="cpu", threads=1)
    suite = Suite(setting, expand(["tgate:m=2"], cachekit.policies()), steps=(4,), peers=False)
    results = Results(folder / "r.jsonl")
    assert measure_suite(suite, results, lambda *news: None) == []
    write_page(groups(results.all), folder / "r.html")
    return folder / "r.html"


@pytest.fixture
def page(file):
    return Page(file.read_text())


def test_captions_are_text_wherever_they_stand(file, page):
    text = file.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert len(page.of("script")) == 1
    assert not any("onerror" in attributes for _, attributes in page.found)
    assert any(HOSTILE in attributes.get("alt", "") for attributes in page.of("img"))


def test_nothing_comes_from_outside(file, page):
    assert not page.of("link")
    assert all("src" not in attributes for attributes in page.of("script"))
    assert all(attributes["src"].startswith("data:image/") for attributes in page.of("img"))
    assert not re.search(r"https?://", file.read_text())


def test_everything_is_there(page, file):
    text = file.read_text()
    for word in ("tgate:m=2", "uncached, 4 steps", "plain step", "PSNR", "Environment", "torch"):
        assert word in text
    plots = page.of("svg")
    assert {plot["aria-label"] for plot in plots} == {
        "PSNR to uncached (dB) over times faster (wall time)",
        "PSNR to uncached (dB) over times fewer MACs",
    }
    assert len(page.of("img")) == 2 * len([one for one in page.of("input") if one["type"] == "range"])
    cells = [one["class"] for one in page.of("td") if "class" in one]
    assert {"compute", "store", "reuse"} <= set(cells)
    assert len(cells) % 4 == 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_without_complaints(file):
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
        file.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert "tgate:m=2" in shown.stdout
    assert "CONSOLE" not in shown.stderr
