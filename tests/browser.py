"""Headless Chromium for tests of the page, installed from Debian's packages if it is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PACKAGES = ("chromium", "chromium-driver")
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
LIMIT_S = 60.0


def find_browser() -> tuple[str, str]:
    """Chromium and its driver; skips the test where there are none and none can be had."""
    if not all(map(shutil.which, ("chromium", "chromedriver"))):
        if os.geteuid() or not shutil.which("apt-get"):
            pytest.skip("needs chromium and chromedriver")
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", "-qq", *command], capture_output=True, check=False)
            if done.returncode:
                pytest.skip(f"chromium cannot be installed: {done.stderr.decode()[-300:]}")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser is not None
    assert driver is not None
    return browser, driver


class Browser:
    """One window."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 800) -> None:
        binary, driver = find_browser()
        options = ChromeOptions()
        options.binary_location = binary
        for argument in (*QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.chrome = Chrome(options, ChromeService(driver))

    def open(self, url: str, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """A page as a window of that size shows it, where people prefer light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
        self.chrome.get("about:blank")
        self.chrome.get(url)

    def find(self, selector: str) -> Any:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[Any]:
        return list(self.chrome.find_elements(By.CSS_SELECTOR, selector))

    def wait_for(self, check: Callable[[], Any]) -> Any:
        """What `check` gives once that is true."""
        return WebDriverWait(self.chrome, LIMIT_S, 0.05).until(lambda _: check())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def complaints(self) -> list[str]:
        """What the browser has to say against the page."""
        return [entry["message"] for entry in self.chrome.get_log("browser")]

    def close(self) -> None:
        self.chrome.quit()
