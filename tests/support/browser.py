"""Chromium without a window, driven over the DevTools protocol's pipe: pages as a person uses them.

Needs the program alone, no driver and no package. `Tab` presses real keys and buttons, and keeps what the
page logged and asked for.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No sandbox: needed as root, and there is nothing to protect from a page of our own.
_SWITCHES = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--lang=en-US",
]
# A launcher gives the pipe's ends the numbers that Chromium looks for, whatever they are here.
_LAUNCH = "import os, sys; os.dup2({0}, 3); os.dup2({1}, 4); os.execv(sys.argv[1], sys.argv[1:])"
_TIMEOUT = 60.0  # a busy machine is no defect
_KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "End": 35}
CONTROL, SHIFT = 2, 8
"""Modifiers of `Tab.press`."""
_CONTRASTS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] === 255) return c; } return [255, 255, 255, 255]; };
  const rows = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest('.unseen, :disabled')) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    rows.push([(a + 0.05) / (b + 0.05), e.className, e.textContent.slice(0, 30)]);
  }
  return rows; })()"""


class BrowserError(Exception):
    """Chromium did not do what was asked, or not in time."""


def find_chromium() -> str | None:
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """A running Chromium with an empty profile; leave it as a context manager."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        launcher = (sys.executable, "-S", "-c", _LAUNCH.format(*high))
        self._process = subprocess.Popen(
            [*launcher, program, *_SWITCHES, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=high,
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self._in, self._out = ours_in, ours_out
        self._calls, self._rest = 0, b""
        self._tabs: dict[str, Tab] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(BrowserError, OSError):
            self.call("Browser.close")
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Run a command of the DevTools protocol and return its result. Raises BrowserError."""
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _TIMEOUT
        while (got := self._next(end)).get("id") != self._calls:
            if tab := self._tabs.get(got.get("sessionId", "")):
                tab.happened(got.get("method", ""), got.get("params", {}))
        if "error" in got:
            raise BrowserError(f"{method}: {got['error'].get('message')}")
        return got["result"]

    def tab(self) -> Tab:
        """A new tab in a context of its own: no cookies, no storage of others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, context)
        self._tabs[session] = tab
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.emulate(1200, 900)
        return tab

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._in, 1 << 16) if ready else b""
            if not piece:
                raise BrowserError("the browser does not answer")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


class Tab:
    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self._browser, self._session, self._context = browser, session, context
        self.complaints: list[str] = []  # of the console, and exceptions that nobody caught
        self.requests: list[str] = []  # addresses that the page asked for

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *error: object) -> None:
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def emulate(
        self, width: int, height: int, *, phone: bool = False, dark: bool = False, still: bool = False
    ) -> None:
        """Size of the page's window in CSS pixels, and what the reader prefers."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1 + phone, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        theme, motion = "dark" if dark else "light", "reduce" if still else "no-preference"
        features = {"prefers-color-scheme": theme, "prefers-reduced-motion": motion}
        told = [{"name": name, "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=told)

    def allow(self, *permissions: str) -> None:
        """Grant the page what its browser would ask a person for: clipboardReadWrite, ..."""
        asked = {"browserContextId": self._context, "permissions": list(permissions)}
        self._browser.call("Browser.grantPermissions", **asked)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait_for(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression (a promise's, when it is one), as JSON carries it."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout: float = _TIMEOUT) -> Any:
        """Wait until an expression is true, and return its value. Raises BrowserError."""
        end = time.monotonic() + timeout
        while True:
            with suppress(BrowserError):  # while a page is replaced by the next
                if value := self.evaluate(expression):
                    return value
            if time.monotonic() > end:
                raise BrowserError(f"not in {timeout:.0f} s: {expression}")
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def contrasts(self) -> list[tuple[float, str, str]]:
        """Each visible text: its contrast (WCAG 2.2: 1 to 21), its element's classes, and its beginning."""
        return [tuple(row) for row in self.evaluate(_CONTRASTS)]

    def press(self, key: str, modifiers: int = 0) -> None:
        code, number = (key, _KEYS[key]) if key in _KEYS else (f"Key{key.upper()}", ord(key.upper()))
        text = "\r" if key == "Enter" else "" if key in _KEYS else key
        shared = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        typed = {"text": text} if text and not modifiers & CONTROL else {}
        kind = "keyDown" if typed else "rawKeyDown"
        self.call("Input.dispatchKeyEvent", type=kind, **shared, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def fill(self, selector: str, text: str) -> None:
        field = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"(e => {{ e.focus(); e.value = ''; }})({field})")
        if text:
            self.type(text)

    def click(self, selector: str, number: int = 0) -> None:
        """Press the mouse's button on the middle of the element (of those that match, number `number`)."""
        x, y = self._middle(selector, number)
        self.move_to(x, y)
        shared = {"x": x, "y": y, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **shared)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **shared)

    def tap(self, selector: str, number: int = 0) -> None:
        x, y = self._middle(selector, number)
        self.draw()  # what a finger meets is what was drawn last
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def hover(self, selector: str, number: int = 0) -> None:
        self.move_to(*self._middle(selector, number))

    def move_to(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def draw(self) -> None:
        """Wait until the page as it is now has been drawn."""
        frame = "requestAnimationFrame"
        self.evaluate(f"new Promise(done => {frame}(() => {frame}(() => done(1))))")

    def save_screenshot(self, path: Path) -> None:
        """Write a PNG file of what is in view."""
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def _middle(self, selector: str, number: int) -> tuple[float, float]:
        # An element that is out of view is brought there first; of one on several lines, the first counts.
        box = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const b = e.getClientRects()[0];"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })"
            f"(document.querySelectorAll({json.dumps(selector)})[{number}])"
        )
        return box[0], box[1]

    def happened(self, event: str, details: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            found = details["exceptionDetails"]
            self.complaints.append(found.get("exception", {}).get("description") or found["text"])
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            said = [str(value.get("value", value.get("description"))) for value in details["args"]]
            self.complaints.append(" ".join(said))
