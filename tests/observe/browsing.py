"""A page of ours in a real browser, Chromium of the system, where that and playwright (extra `browser`) are there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["browse", "open_browser"]

# It draws with the processor, and asks the network for nothing of its own.
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
_FLAGS += ["--no-first-run", "--disable-component-update", "--disable-sync"]


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless browser; the test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=_FLAGS)
        yield browser
        browser.close()


def browse(browser: Any, path: Path, width: int, tab_with_lines: str, expected: str) -> None:
    """Open every tab, hover over a figure, change the theme; nothing is complained of or asked of the network.

    Args:
        browser: of :func:`open_browser`.
        path: of the page.
        width: of the window, in pixels.
        tab_with_lines: name of the tab whose first figure is hovered over.
        expected: part of what then is shown.
    """
    problems: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(240_000)  # of a machine that does much else
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    for tab in page.get_by_role("tab").all():
        tab.click()
        panel = page.locator(f"#{tab.get_attribute('aria-controls')}")
        assert panel.is_visible()
        assert panel.locator(".figure .main-svg").count() >= panel.locator(".figure").count()
        assert _overlaps(page) == []
    page.get_by_role("tab", name=tab_with_lines, exact=True).click()
    page.locator("[role=tabpanel]:not([hidden]) .nsewdrag").first.hover()
    page.wait_for_selector(".hoverlayer text")
    assert expected in " ".join(page.locator(".hoverlayer text").all_text_contents())
    before = page.evaluate("document.documentElement.dataset.theme")
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") != before
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    page.close()


def _overlaps(page: Any) -> list[str]:
    """Titles of axes that lie over the numbers of their axis, in the open tab."""
    found = page.evaluate(
        """() => [...document.querySelectorAll("[role=tabpanel]:not([hidden]) .figure")].flatMap(figure =>
          [["x", ".xtitle"], ["y", ".ytitle"]].flatMap(([axis, title]) => {
            const box = figure.querySelector(title)?.getBoundingClientRect();
            const ticks = [...figure.querySelectorAll(`.${axis}tick text`)].map(tick => tick.getBoundingClientRect());
            return box && ticks.some(tick => tick.left < box.right - 1 && tick.right > box.left + 1 &&
              tick.top < box.bottom - 1 && tick.bottom > box.top + 1)
              ? [figure.querySelector(".gtitle").textContent + ": " + axis] : [];
          }))"""
    )
    return list(found)
