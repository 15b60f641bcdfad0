"""Debian's Chromium, headless, driven by Playwright; tests that need it are skipped where it is not installed."""

from __future__ import annotations

import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
TIMEOUT = 30_000  # milliseconds

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


def record_faults(page, own):
    """Return the list that gets the page's errors, and its requests for addresses that start with none of `own`."""
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(own) else faults.append(request.url))
    return faults


class Tab:
    """A tab that shows pages of this machine's files; `page` is Playwright's."""

    def __init__(self, chromium):
        self.page = chromium.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.faults = record_faults(self.page, ("file:", "data:", "blob:", "about:"))

    def open(self, path, fragment="", width=1200, height=900, ready="#metrics", dark=False):
        """Open a page, and wait until an element that its script or its source has is there."""
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.goto("about:blank")
        self.faults.clear()
        self.page.goto(path.as_uri() + fragment)
        self.page.locator(ready).first.wait_for(state="attached")

    def evaluate(self, expression):
        return self.page.evaluate(expression)

    def wait(self, condition):
        """Wait until a condition holds; the page's policy forbids the eval of Playwright's own function for that."""
        script = (
            f"new Promise((done) => {{ const until = performance.now() + {TIMEOUT}; const look = () => "
            f"{{ if ({condition}) done(true); else if (performance.now() > until) done(false); "
            "else setTimeout(look, 20); }; look(); })"
        )
        assert self.page.evaluate(script), f"waited in vain for {condition}"

    def hover(self, selector):
        self.page.locator(selector).first.hover()

    def press(self, key):
        self.page.keyboard.press(key)

    def type(self, selector, text):
        self.page.locator(selector).fill(text)

    def texts(self, selector):
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]

    def faint_texts(self):
        """Return the texts on the page whose contrast with what is behind them is below 4.5, as WCAG 2 measures it."""
        return self.page.evaluate(FAINT)
