"""The report of `cachekit bench grid` as one page: complete, escaped, and without anything from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from support import tiny
from support.browser import CSS, Keys, chromium, empty_logs

from cachekit.registry.catalog import installed
from cachekit.tools.bench.cells import Method, Setting, expand
from cachekit.tools.bench.page import write_page
from cachekit.tools.bench.results import Results
from cachekit.tools.bench.suite import Suite, measure_suite
from cachekit.tools.bench.summary import Group, groups
from cachekit.tools.bench.verdict import lead, verdict

HOSTILE = '<script>alert(1)</script> " onerror="x'


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
    tiny.small(layers_per_block=1).save_pretrained(folder / "model")
    setting = Setting(model=str(folder / "model"), captions=(HOSTILE,), device="cpu", threads=1)
    suite = Suite(setting, expand(["tgate:m=2"], installed()), steps=(4,), peers=False)
    results, news = Results(folder / "r.jsonl"), []
    assert measure_suite(suite, results, lambda *shown: news.append(shown)) == []
    write_page(groups(results.all), folder / "r.html")
    # Each of the cells has its image and the uncached one beside it, which are counted one by one.
    counts = [done for done, _, _ in news]
    assert set(counts) == set(range(2 * len(results.all) + 1))
    assert counts == sorted(counts)
    assert news[-1][:2] == (2 * len(results.all),) * 2
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
    # The name of the language of pictures is no address that anybody asks.
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text())


def test_everything_is_there(page, file):
    text = file.read_text()
    for word in ("tgate:m=2", "uncached, 4 steps", "plain step", "PSNR", "Environment", "torch"):
        assert word in text
    plots = [one["aria-label"] for one in page.of("svg")]
    assert plots == [
        "PSNR to uncached (dB) over speedup (wall time)",
        "PSNR to uncached (dB) over MAC reduction",
        "steps across, sites down",
    ]
    assert len(page.of("img")) == 2 * len([one for one in page.of("input") if one["type"] == "range"])
    for meaning in ("step 1: compute and keep", "steps 2 to 3: reuse"):
        assert f"<title>{meaning}</title>" in text


def test_the_verdict_is_first_and_says_where_the_page_comes_from(file):
    text = file.read_text()
    verdict = re.search(r'<p class="verdict">(.*?)</p>', text)[1]
    assert re.search(r"tgate:m=2 (wins by most|comes nearest)[:,] .* MAC reduction .* \d plain steps? have", verdict)
    assert re.search(r"[01] of 1 configurations are nearer", text)
    places = [text.index(part) for part in ('class="verdict"', 'class="plots"', 'class="figures"', 'class="pictures"')]
    assert places == sorted(places)
    assert re.search(r"Written on \d{4}-\d\d-\d\d by <code>cachekit\b", text)


def test_an_uncached_image_is_in_the_page_once(file):
    uncached = [image for image in Page(file.read_text()).of("img") if "uncached:" in image["alt"]]
    sources = [image["src"] for image in uncached if "id" in image]
    assert len(sources) == len(set(sources))
    assert {image["data-same"] for image in uncached if "id" not in image} <= {image.get("id") for image in uncached}
    assert len(sources) < len(uncached)


def test_without_plain_steps_the_verdict_says_that_nothing_is_shown(file):
    (group,) = groups(Results(file.with_suffix(".jsonl")).all)
    alone = Group([row for row in group.rows if row.cell.method is not Method.PLAIN])
    (sentence,) = verdict(alone)
    assert sentence.startswith("Nothing here shows whether a cache is worth having")
    assert lead(alone, alone.rows[0]) is None


def test_spacings_of_plain_steps_are_named(tmp_path):
    tiny.small(layers_per_block=1).save_pretrained(tmp_path / "model")
    setting = Setting(model=str(tmp_path / "model"), captions=("a",), device="cpu", threads=1)
    compositions = expand(["forecast:interval=2"], installed())
    suite = Suite(setting, compositions, schedulers=["EulerDiscrete"], steps=(5,), peers=False)
    results = Results(tmp_path / "r.jsonl")
    assert measure_suite(suite, results, lambda *news: None) == []
    write_page(groups(results.all), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    for words in (
        "3 plain steps, karras",
        "3 plain steps, timesteps of forecast",
        "plain steps left out: EulerDiscreteScheduler takes no use_lu_lambdas",
        "how much of that is due to the spacing",
    ):
        assert words in text
    (keys,) = re.findall(r"<tr>(?:(?!</tr>).)*>forecast<.*?</tr>", text, re.DOTALL)
    assert re.search(r'data-value="3">3[:,]', keys)


# -- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def shown(browser, file):
    """Show the page anew, after a look away that empties the logs."""
    empty_logs(browser)
    browser.get(file.as_uri())
    return browser


def test_a_browser_asks_nobody_and_complains_of_nothing(shown, file):
    shown.execute_async_script("setTimeout(arguments[0], 200)")
    events = [json.loads(entry["message"])["message"] for entry in shown.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert file.as_uri() in asked
    assert all(url == file.as_uri() or url.startswith("data:image/") for url in asked)
    assert shown.get_log("browser") == []


def test_a_hostile_caption_is_shown_as_text(shown):
    captions = {caption.text for caption in shown.find_elements(CSS, "details[open] figcaption")}
    assert captions == {HOSTILE}
    assert shown.execute_script("return document.scripts.length") == 1


@pytest.fixture
def whole(shown):
    """Show all columns of the page."""
    for box in shown.find_elements(CSS, ".columns input:not(:checked)"):
        shown.execute_script("arguments[0].click()", box)
    return shown


def test_a_click_on_a_head_sorts_and_a_second_one_turns_it_around(whole):
    heads = [head.text for head in whole.find_elements(CSS, ".figures th")]
    place = heads.index("GMACs")
    rows = "return [...document.querySelectorAll('.figures tbody tr')].map(row => row.cells[arguments[0]].innerText)"
    before = [float(text) for text in whole.execute_script(rows, place)]
    assert before != sorted(before)
    button = whole.find_elements(CSS, ".figures th button")[place]
    button.click()
    assert [float(text) for text in whole.execute_script(rows, place)] == sorted(before)
    button.click()
    assert [float(text) for text in whole.execute_script(rows, place)] == sorted(before, reverse=True)
    assert whole.find_elements(CSS, ".figures th")[place].get_attribute("aria-sort") == "descending"


def test_a_cell_without_a_value_comes_last_either_way(whole):
    heads = [head.text for head in whole.find_elements(CSS, ".figures th")]
    place = heads.index("reused")
    button = whole.find_elements(CSS, ".figures th button")[place]
    for _ in range(2):
        button.click()
        assert whole.find_elements(CSS, ".figures tbody tr:first-child td")[place].text != "-"
        assert whole.find_elements(CSS, ".figures tbody tr:last-child td")[place].text == "-"


def test_the_slider_moves_the_border_between_the_images(shown):
    slider = shown.find_element(CSS, "details[open] input[type=range]")
    border = "return getComputedStyle(arguments[0].previousElementSibling.querySelector('img + img')).clipPath"
    assert shown.execute_script(border, slider) == "inset(0px 0px 0px 50%)"
    for key, wanted in ((Keys.ARROW_RIGHT, "51%"), (Keys.END, "100%"), (Keys.HOME, "0px")):
        slider.send_keys(key)
        assert shown.execute_script(border, slider).removesuffix(")").split()[-1] in (wanted, wanted.replace("px", "%"))


def visible_rows(shown):
    return shown.execute_script(
        "return [...document.querySelectorAll('.figures tbody tr')].map(r => r.offsetHeight > 0)"
    )


def test_the_filter_leaves_the_rows_that_have_its_words(shown):
    box = shown.find_element(CSS, ".filter")
    assert all(visible_rows(shown))
    box.send_keys("TGATE m=2")
    assert sum(visible_rows(shown)) == 1
    box.clear()
    box.send_keys("no such thing")
    assert not any(visible_rows(shown))


def test_columns_can_be_chosen(shown):
    names = [head.text for head in shown.find_elements(CSS, ".figures th") if head.is_displayed()]
    assert "lead (dB)" in names
    assert "spread" not in names
    assert re.fullmatch(r"\d+ columns not shown", shown.find_element(CSS, ".hidden-columns").text)
    shown.find_element(CSS, ".columns summary").click()
    boxes = shown.find_elements(CSS, ".columns label")
    next(box for box in boxes if box.text == "spread").click()
    names = [head.text for head in shown.find_elements(CSS, ".figures th") if head.is_displayed()]
    assert "spread" in names


def test_a_picture_opens_at_full_size_with_its_slider(shown):
    small = shown.find_element(CSS, "details[open] button.pair")
    width = small.size["width"]
    small.click()
    large = shown.find_element(CSS, "dialog[open] .pair")
    assert large.size["width"] > 2 * width
    slider = shown.find_element(CSS, "dialog input[type=range]")
    slider.send_keys(Keys.END)
    assert shown.execute_script("return arguments[0].style.getPropertyValue('--cut')", large) == "100%"
    shown.find_element(CSS, "dialog form button").click()
    assert not shown.find_elements(CSS, "dialog[open]")


@pytest.mark.parametrize("width", [1400, 400])
def test_no_column_is_clipped(shown, width):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    shown.refresh()
    wide = "const box = document.querySelector('.figures').parentElement; return [box.scrollWidth, box.clientWidth]"
    needed, there = shown.execute_script(wide)
    assert needed <= there
    assert [head for head in shown.find_elements(CSS, ".figures th") if head.text == "lead (dB)"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_dark_screens_can_be_read(shown, scheme):
    screen = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    assert shown.execute_script("return document.documentElement.scrollWidth") == 400
    ground = luminance(shown.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.5) == (scheme == "light")
    for selector, name in (("p", "color"), (".figures td", "color"), (".plots text", "fill"), ("details svg", "fill")):
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        ink = luminance(shown.execute_script(script, selector, name))
        low, high = sorted((ground, ink))
        assert (high + 0.05) / (low + 0.05) > 4.5, selector


def luminance(colour):
    """Compute the relative luminance of rgb(...), as the guidelines for accessible pages define it."""
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
