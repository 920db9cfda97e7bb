"""A page in a browser, as its user sees it, and the rules that every page keeps."""

import base64
import json
import re
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import expect

# Machines that run the tests may be several times slower than those on which they were written.
expect.set_options(timeout=30_000)


class Screen:
    """One tab. It records what the browser reports.

    Attributes:
        page: Playwright's page.
        allowed: patterns of messages on the console that the test expects.
    """

    def __init__(self, page, url, allowed=()):
        self.page = page
        self.url = url
        self.allowed = list(allowed)
        self.messages, self.errors, self.requests, self.policies = [], [], [], {}
        page.set_default_timeout(30_000)
        page.on("console", lambda message: self.messages.append((message.type, message.text)))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("response", self._record)
        page.on("dialog", lambda dialog: (self.errors.append(f"a dialog: {dialog.message}"), dialog.dismiss()))

    def _record(self, response):
        if "text/html" in response.headers.get("content-type", ""):
            self.policies[response.url] = response.headers.get("content-security-policy", "")

    def check(self):
        """No request has left this machine, nothing failed, and every page has a strict content security policy."""
        foreign = [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname != "127.0.0.1"
        ]
        assert not foreign
        assert not self.errors
        bad = [
            text
            for kind, text in self.messages
            if kind in ("error", "warning") and not any(re.search(pattern, text) for pattern in self.allowed)
        ]
        assert not bad
        assert self.policies
        for policy in self.policies.values():
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy

    # Where it is.

    def go(self, query=""):
        self.page.goto(f"{self.url}/{'?' + query if query else ''}")

    @property
    def parameters(self):
        """The parameters of the address, each a list of texts."""
        return parse_qs(urlsplit(self.page.url).query)

    # What is seen.

    @property
    def tiles(self):
        return self.page.locator("article.tile")

    @property
    def status(self):
        return self.page.locator("#status")

    def tile_number(self, number):
        return self.tiles.nth(number)

    def tile(self, key):
        return self.page.locator(f'article.tile[data-key="{key}"]')

    def keys(self):
        """Keys of the tiles, in the order in which they are shown."""
        return self.tiles.evaluate_all("tiles => tiles.map(tile => tile.dataset.key)")

    def wait_for_keys(self, keys):
        """Wait until exactly these tiles are shown, in this order."""
        self.page.wait_for_function(
            "keys => JSON.stringify([...document.querySelectorAll('article.tile')].map(t => t.dataset.key)) === keys",
            arg=_json(list(keys)),
        )

    def picture(self, folder, name):
        """Take a screenshot; keep it in the folder, if there is one."""
        self.page.wait_for_load_state("networkidle")
        path = None if folder is None else folder / f"{name}.png"
        assert self.page.screenshot(path=path, animations="disabled")

    # What the user does.

    def ask(self, sentence):
        self.page.locator("#q").fill(sentence)
        self.page.locator("#q").press("Enter")

    def bring(self, data, name="tile.png", kind="image/png", event="drop"):
        """Drop a file on the page, or paste it."""
        self.page.evaluate(_BRING, [base64.b64encode(data).decode(), name, kind, event])

    def mark(self, key, mark):
        """Mark the tile as good or bad with its button."""
        self.mark_tile(self.tile(key), mark)

    def mark_tile(self, tile, mark):
        tile.hover()
        tile.locator(f'button.mark[data-mark="{mark}"]').click()

    def slide(self, slider, value):
        """Move a slider and let it go."""
        slider.fill(str(value))
        slider.dispatch_event("change")


_BRING = """([data, name, kind, event]) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], name, {type: kind}));
    const options = {bubbles: true, cancelable: true};
    if (event === "paste") {
        document.body.dispatchEvent(new ClipboardEvent("paste", {...options, clipboardData: carried}));
        return;
    }
    for (const step of ["dragenter", "dragover", "drop"])
        document.querySelector("#drop").dispatchEvent(new DragEvent(step, {...options, dataTransfer: carried}));
}"""


def _json(value):

    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
