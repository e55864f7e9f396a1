"""Debian's Chromium without a screen, which asks nobody for anything by itself; nothing is downloaded.

Tests that import this are skipped where selenium is not installed.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium, which the extra `test` installs")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys
#: How elements are found.
CSS = "css selector"

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium(profile, *flags):
    """Start the browser with a folder for its profile; the test is skipped where there is none."""
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


def empty_logs(driver):
    """Look away from any page, and drop what was logged."""
    driver.get("about:blank")
    for log in ("browser", "performance"):
        driver.get_log(log)


def wait(driver, condition, message=""):
    """Wait until a condition holds, and get what it returned."""
    return WebDriverWait(driver, 90, 0.05).until(lambda _: condition(), message)
