"""A page in a headless Chromium, for tests: opened as users open it, and watched for what no page of ours may do.

    with chromium() as browser, visiting(browser) as visit:
        page = visit("http://127.0.0.1:8000", but="status of 422 ")

At the end of the block: nothing was asked of anybody else, no word became a script, and nothing went wrong but what
matches `but`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCRIPT = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
"""A word that must stay one."""
PATIENCE = 60_000
"""ms a page may take. Far more than it needs."""
expect.set_options(timeout=PATIENCE)
Visit = Callable[..., Page]
"""(address, but, prepare, options of its context) -> page."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    flags = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@contextmanager
def visiting(browser: Browser) -> Iterator[Visit]:
    """See the module. `prepare(page)` is called before the address is opened."""
    visits: list[tuple[str, Page, list[str], list[str], str]] = []

    def opened(address: str, but: str = r"(?!)", prepare: Callable[[Page], Any] | None = None, **options: Any) -> Page:
        page = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options}).new_page()
        page.set_default_timeout(PATIENCE)
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        if prepare is not None:
            prepare(page)
        visits.append((address, page, asked, wrong, but))
        page.goto(address)
        return page

    yield opened
    for address, page, asked, wrong, but in visits:
        assert page.evaluate("window.hacked") is None
        page.context.close()
        assert asked and not [url for url in asked if not url.startswith((f"{address}/", f"blob:{address}/", "data:"))]
        assert not [text for text in wrong if not re.search(but, text)]
