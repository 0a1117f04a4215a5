"""A real headless browser for tests of pages: chromedriver, over plain HTTP (the W3C's WebDriver)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"width": 390, "height": 844, "pixelRatio": 1.0, "mobile": True}
SMALL_PHONE = PHONE | {"width": 360, "height": 780}
DESKTOP = {"width": 1200, "height": 860, "pixelRatio": 1.0, "mobile": False}
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36}
KEYS |= {f"Arrow{name}": 37 + i for i, name in enumerate(("Left", "Up", "Right", "Down"))}
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # root in a container has no user namespaces; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def find_browser() -> tuple[str, str]:
    """(browser, driver). Where one is missing the test is skipped, or fails if QSTAR_BROWSER=required."""
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        reason = "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("QSTAR_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return browser, driver


class Browser:
    """With a screen of its own; a context manager, which ends what it started."""

    def __init__(self, folder: Path, screen: dict[str, Any] = PHONE):
        browser, driver = find_browser()
        self._driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if port := re.search(r"started successfully on port (\d+)", line):
                break
        else:
            raise RuntimeError("chromedriver did not start")
        self._url = f"http://127.0.0.1:{port[1]}/session"
        options = {
            "binary": browser,
            "args": [*FLAGS, f"--user-data-dir={folder}"],
            "mobileEmulation": {"deviceMetrics": screen},
            "perfLoggingPrefs": {"enableNetwork": True},
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        try:
            session = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._driver.kill()
            raise
        self._url += "/" + session["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(20)

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine
        with direct.open(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def colours(self, dark: bool) -> None:
        """What the page sees as the person's wish: these, and nothing that moves."""
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.command("Emulation.setEmulatedMedia", features=features)

    def key(self, key: str) -> None:
        """One press of it, named as in KeyboardEvent.key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key]
            )

    def point(self, selector: str, click: bool = False) -> None:
        """Move the mouse onto the middle of an element, and press its button there."""
        self._mouse("mouseMoved", selector)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self._mouse(kind, selector, button="left", clickCount=1)

    def _mouse(self, kind: str, selector: str, **more: Any) -> None:
        self.command("Input.dispatchMouseEvent", type=kind, **self._middle(selector), **more)

    def tap(self, selector: str) -> None:
        """Touch the middle of an element with a finger."""
        self.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[self._middle(selector)])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _middle(self, selector: str) -> dict[str, float]:
        box = f"const box = document.querySelector({json.dumps(selector)}).getClientRects()[0]; "
        return self.run(box + "return {x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2}")

    def open(self, page: Path) -> None:
        """From here on, `console` and `requests` tell of this page alone."""
        self._call("POST", "/url", {"url": "about:blank"})
        self.console(), self.requests()
        self._call("POST", "/url", {"url": page.absolute().as_uri()})

    def run(self, script: str) -> Any:
        """What the body of a JavaScript function returns in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of Chromium's DevTools."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def console(self) -> list[str]:
        """What the console was told since the last call: errors, and what a page's policy refused."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [x["params"]["request"]["url"] for x in events if x["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path, dark: bool = False, height: int | None = None, scale: float = 1) -> None:
        """A PNG of the page from its top, `height` pixels high (default: the screen's), times scale."""
        self.colours(dark)
        width, screen = self.run("return [innerWidth, innerHeight]")
        area = {"x": 0, "y": 0, "width": width, "height": height or screen, "scale": scale}
        found = self.command("Page.captureScreenshot", clip=area, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
