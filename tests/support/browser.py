"""
A real browser, driven without a window: Chromium over its debugging pipe, cut off from the network.

    with Browser(tmp_path) as browser:
        page = browser.open(tmp_path / "page.html", width=1200, dark=True)
        page.evaluate("document.title"), page.problems, page.addresses
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.support.processes import ended_after

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOUND = next(filter(None, map(shutil.which, NAMES)), None)
WHY_NOT = f"none of {', '.join(NAMES)} is installed"
PATIENCE = 30


class Browser:
    """
    One process of Chromium for several pages.

    Args:
        folder (`Path`): for its profile and its log.
    """

    def __init__(self, folder: Path):
        self.folder, self.closing = folder, contextlib.ExitStack()

    def __enter__(self) -> "Browser":
        self.folder.mkdir(parents=True, exist_ok=True)
        reads, self.writes = os.pipe()
        self.reads, writes = os.pipe()
        self.closing.callback(os.close, self.writes)
        self.closing.callback(os.close, self.reads)
        command = [
            # the pipe is of descriptors 3 and 4
            *("sh", "-c", f'exec "$@" 3</dev/fd/{reads} 4>/dev/fd/{writes}', "sh", FOUND),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={self.folder / 'profile'}", "about:blank"),
        ]
        log = self.closing.enter_context((self.folder / "browser.log").open("w"))
        process = subprocess.Popen(command, pass_fds=(reads, writes), stdout=log, stderr=log)
        self.closing.enter_context(ended_after(process))
        os.close(reads)
        os.close(writes)
        self.waiting, self.number, self.events = b"", 0, []
        return self

    def __exit__(self, *error) -> None:
        self.closing.close()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol; what happens meanwhile is kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str, session: str) -> None:
        def there():
            return any(one.get("method") == event and one.get("sessionId") == session for one in self.events)

        while not there():
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self.waiting:
            ready, _, _ = select.select([self.reads], [], [], max(deadline - time.monotonic(), 0))
            log = (self.folder / "browser.log").read_text(errors="replace")[-2000:]
            assert ready, f"the browser does not answer: {log}"
            part = os.read(self.reads, 1 << 16)
            assert part, f"the browser has ended: {log}"
            self.waiting += part
        message, self.waiting = self.waiting.split(b"\0", 1)
        return json.loads(message)

    def open(self, file: Path, *, width: int, dark: bool = False, script: bool = True) -> "Page":
        """
        Open a file in a new tab.

        Args:
            file (`Path`): the page.
            width (`int`): of the window, in CSS pixels.
            dark (`bool`, defaults to `False`): the reader's preferred theme.
            script (`bool`, defaults to `True`): whether scripts of the page run.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        if not script:
            self.call("Emulation.setScriptExecutionDisabled", session, value=True)
        page = Page(self, session)
        self.call("Page.navigate", session, url=file.resolve().as_uri())
        self.wait_for("Page.loadEventFired", session)
        return page


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.browser.call("Runtime.evaluate", self.session, expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page as a PNG."""
        answer = self.browser.call(
            "Page.captureScreenshot", self.session, format="png", captureBeyondViewport=True, fromSurface=True
        )
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def _happened(self, method: str) -> list[dict[str, Any]]:
        self.evaluate("0")  # what happened before has arrived then
        return [
            event["params"]
            for event in self.browser.events
            if event.get("method") == method and event.get("sessionId") == self.session
        ]

    @property
    def problems(self) -> list[str]:
        """Whatever the page or the browser has written to the console, and errors of scripts."""
        said = [json.dumps(one["args"]) for one in self._happened("Runtime.consoleAPICalled")]
        said += [one["entry"]["text"] for one in self._happened("Log.entryAdded")]
        return said + [one["exceptionDetails"]["text"] for one in self._happened("Runtime.exceptionThrown")]

    @property
    def addresses(self) -> list[str]:
        """All that the page has asked for."""
        return [one["request"]["url"] for one in self._happened("Network.requestWillBeSent")]


# for every text that can be seen: its contrast with what is behind it, by WCAG 2
CONTRASTS = r"""
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  function parsed(colour) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  }
  const over = (top, below) => top.slice(0, 3).map((part, i) => part * top[3] + below[i] * (1 - top[3]));
  function luminance(colour) {
    const [r, g, b] = colour.map(part => part / 255).map(p => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  document.querySelectorAll("details").forEach(one => one.open = true);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, text = node.data.trim();
    if (!text || element.closest("script, style, .hidden")) continue;
    element.scrollIntoView({block: "center", inline: "center"});
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getClientRects()[0];
    if (!box || !box.width) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement;
    let behind = parsed(getComputedStyle(document.body).backgroundColor).slice(0, 3);
    // a cell of a matrix is behind its number, and so are an element's ancestors
    const stack = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2).reverse();
    for (const one of new Set([...stack, ...(drawn ? [] : [element])])) {
      if (one === element && drawn || one.tagName === "text" || one.tagName === "use") continue;
      const own = getComputedStyle(one);
      const top = parsed(one instanceof SVGElement && one.tagName !== "svg" ? own.fill : own.backgroundColor);
      top[3] *= own.opacity * (one instanceof SVGElement ? own.fillOpacity : 1);
      behind = over(top, behind);
    }
    const colour = parsed(drawn ? style.fill : style.color);
    colour[3] *= style.opacity;
    const [a, b] = [luminance(over(colour, behind)), luminance(behind)];
    found.push([text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
})()
"""
