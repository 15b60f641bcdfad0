"""Headless Chromium, driven through the DevTools protocol over a pipe."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_CHROMIUM = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
    pytest.mark.xdist_group("chromium"),
]
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]

FAINT = """(() => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  const layers = (node) => (node ? [...layers(node.parentElement), getComputedStyle(node)] : []);
  const pixel = () => [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
  const linear = (v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = (rgb) => rgb.reduce((sum, v, i) => sum + linear(v) * [.2126, .7152, .0722][i], 0);
  const paint = (colour) => { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); };
  const faint = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.getClientRects().length || node.closest('script, style, noscript, .hidden, option')) continue;
    const styles = layers(node), last = styles.at(-1);
    paint('white');
    for (const style of styles) paint(style.backgroundColor);
    const behind = light(pixel());
    paint(node instanceof SVGElement ? last.fill : last.color);
    const front = light(pixel());
    if ((Math.max(front, behind) + .05) / (Math.min(front, behind) + .05) < 4.5) faint.push(node.textContent.trim());
  }
  return faint;
})()"""


class Browser:
    """One tab; Chromium reads commands from file descriptor 3 and answers on 4."""

    def __init__(self, profile):
        inward, self._send = os.pipe()
        self._receive, outward = os.pipe()

        def place_pipes():
            high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (inward, outward)]
            for descriptor, wanted in zip(high, (3, 4), strict=True):
                os.dup2(descriptor, wanted)

        self._process = subprocess.Popen(
            [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place_pipes,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inward)
        os.close(outward)
        self._buffer, self._next, self.faults = b"", 0, []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Page", "Log", "Network"):
            self.call(f"{domain}.enable", self._session)

    def call(self, method, session=None, **parameters):
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        os.write(self._send, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._read()).get("id") != self._next:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            part = os.read(self._receive, 1 << 20)
            assert part, "Chromium closed the pipe"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.faults.append(parameters["exceptionDetails"].get("exception", {}).get("description"))
        if message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.faults.append(parameters["entry"]["text"])
        if message.get("method") == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "about:")):
                self.faults.append(f"asked the network for {url}")
        return message

    def open(self, path, fragment="", width=1200, height=900, ready="#metrics", dark=False):
        """Open a page, and wait until an element that its script or its source has is there."""
        self.faults.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", self._session, features=scheme)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", self._session, **metrics)
        self.call("Page.navigate", self._session, url="about:blank")
        self.call("Page.navigate", self._session, url=path.as_uri() + fragment)
        self.wait(f"document.readyState === 'complete' && document.querySelector({json.dumps(ready)})")

    def evaluate(self, expression):
        arguments = {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", self._session, **arguments)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition):
        """Wait, frame by frame, until a condition holds."""
        script = (
            "new Promise((done, fail) => { const until = performance.now() + 30000; const look = () => "
            f"{{ if ({condition}) done(true); else if (performance.now() > until) "
            f"fail(new Error({json.dumps(condition)})); else setTimeout(look, 20); }}; look(); }})"
        )
        assert self.evaluate(script)

    def hover(self, selector):
        found = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getBoundingClientRect())"
        )
        for shift in (-3, 0):
            where = {"type": "mouseMoved", "x": box[0] + shift, "y": box[1]}
            self.call("Input.dispatchMouseEvent", self._session, **where)

    def press(self, key, code=0, text=""):
        """Press a key; Enter acts on a button only with the text "\\r"."""
        for kind, typed in (("keyDown", {"text": text} if text else {}), ("keyUp", {})):
            key_event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code} | typed
            self.call("Input.dispatchKeyEvent", self._session, **key_event)

    def type(self, selector, text):
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", self._session, text=text)

    def texts(self, selector):
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent.trim())")

    def close(self):
        self._process.terminate()
        self._process.wait()
        os.close(self._send)
        os.close(self._receive)

    def faint_texts(self):
        """Return the texts on the page whose contrast with what is behind them is below 4.5, as WCAG 2 measures it."""
        return self.evaluate(FAINT)
