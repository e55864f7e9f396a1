"""The app in a browser: what is changed there is planned, estimated and drawn, and nothing comes from outside."""

from __future__ import annotations

import json

import pytest
from support.browser import CSS, ActionChains, Keys, chromium, empty_logs, wait

from cachekit.errors import CachekitError
from cachekit.tools.app.serving import serve

pytest.importorskip("gradio", reason="no gradio, which the extra `app` installs")

HOSTILE = '<img src=x onerror="window.hit=1">${7*7}'


@pytest.fixture(scope="module")
def address():
    server, address = serve("demo", ["deepcache:interval=2"], device="cpu")
    yield address
    server.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium"), "--window-size=1400,1400") as driver:
        empty_logs(driver)
        yield driver


class Shown:
    """The page, with waiting for what it should show."""

    def __init__(self, driver):
        self.driver = driver

    def one(self, selector):
        return self.until(lambda: next(iter(self.driver.find_elements(CSS, selector)), None), selector)

    def text(self, selector):
        return self.driver.execute_script(f"return document.querySelector({selector!r})?.innerText ?? ''")

    def until(self, condition, message=""):
        return wait(self.driver, condition, message)

    def typed(self, selector, text):
        box = self.one(selector)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text, Keys.TAB)


def test_a_spec_is_chosen_planned_drawn_and_compared(browser, address):
    browser.get(address)
    page = Shown(browser)
    page.typed("#steps input[type=number]:enabled", "5")
    page.until(lambda: browser.find_elements(CSS, "#plan title") and "16" not in page.text("#plan"))
    before, plan = page.text("#costs"), page.one("#plan svg").get_attribute("outerHTML")
    assert "MAC reduction" in before

    page.one("#key-0-interval input[type=range]:enabled").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: "deepcache\n" in page.text("#plan"))
    page.until(lambda: page.text("#costs") not in ("", before))
    assert page.one("#plan svg").get_attribute("outerHTML") != plan
    assert page.one("#spec textarea").get_attribute("value") == "deepcache"
    page.one("#python button").click()
    assert "cachekit.apply(pipe, ['deepcache'])" in page.one("#lines textarea").get_attribute("value")

    page.typed("#prompt textarea", HOSTILE)
    page.one("#draw").click()
    page.until(lambda: "PSNR" in page.text("#figures"))
    assert "plain steps, of equal cost" in page.text("#figures")
    moving = page.one("#slider img.fixed")
    border = "return getComputedStyle(arguments[0]).clipPath"
    page.until(lambda: "50%" in browser.execute_script(border, moving))
    handle = page.one("#slider .outer .icon-wrap")
    ActionChains(browser).drag_and_drop_by_offset(handle, 60, 0).perform()
    page.until(lambda: "50%" not in browser.execute_script(border, moving))

    page.typed("#spec textarea", HOSTILE)
    page.until(lambda: HOSTILE in page.text("#costs"))
    assert not browser.find_elements(CSS, "#costs img, #note img, #figures img")
    assert browser.execute_script("return window.hit") is None

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in asked)
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert browser.get_log("browser") == []


def test_two_specs_are_compared_with_their_pictures(browser, address):
    browser.get(address)
    page = Shown(browser)
    page.typed("#steps input[type=number]:enabled", "5")
    page.one("#comparison button").click()
    page.one("#add").click()
    page.until(lambda: "deepcache:interval=2" in page.text("#compared"))
    page.typed("#spec textarea", "tgate:m=2")
    page.until(lambda: "tgate:m=2" in page.text("#plan"))
    page.one("#add").click()
    page.until(lambda: "tgate:m=2" in page.text("#compared"))
    page.one("#compare").click()
    page.until(lambda: "tgate:m=2" in page.text("#ranking"))
    labels = "return [...document.querySelectorAll('#ranking tr')].map(row => row.cells[0].innerText)"
    named = [label for label in browser.execute_script(labels) if "plain steps" not in label]
    assert named == ["picture", "uncached", "deepcache:interval=2", "tgate:m=2"]
    drawn = "return [...document.querySelectorAll('#gallery img')].filter(it => it.naturalWidth).map(it => it.src)"
    page.until(lambda: len({*browser.execute_script(drawn)}) == 3)
    shown = page.text("#gallery")
    assert all(label in shown for label in named[1:])


def test_a_port_that_is_taken_is_refused_in_a_line(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(CachekitError, match=rf"cannot listen on 127.0.0.1, port {port}: .*; give another --port"):
        serve("demo", [], port=port)
