from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from made_attribution import FACTS, WARNINGS, demo_data, made_attribution

from daunce_api.attribution import Attribution
from daunce_api.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def attribution() -> Attribution:
    return made_attribution(*demo_data(), members=16, tokens=True)


@pytest.fixture(scope="session")
def report(attribution: Attribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(attribution, page, run=FACTS, warnings=WARNINGS)


# Not for the session: while Playwright runs, its event loop does, and later tests could not run one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium")
    with api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def new_page(browser: Browser) -> Callable[..., Page]:
    """Open an empty page that waits long enough on a busy machine."""

    def new(**options: object) -> Page:
        page = browser.new_page(**options)
        page.set_default_timeout(120_000)
        return page

    return new


@pytest.fixture
def open_page(new_page: Callable[..., Page]) -> Iterator[Callable[..., Page]]:
    """Open a file and wait until it is built. ``page.problems`` collects errors, refusals and network requests."""
    pages: list[Page] = []

    def open_file(path: Path, wait: str = "[data-ready]", hash: str = "", **options: object) -> Page:
        page = new_page(**{"viewport": {"width": 1400, "height": 900}, **options})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on(
            "request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None
        )
        page.problems = problems  # type: ignore[attr-defined]
        page.goto(path.as_uri() + (f"#{hash}" if hash else ""))
        page.wait_for_selector(f"html{wait}")
        pages.append(page)
        return page

    yield open_file
    for page in pages:
        page.close()
