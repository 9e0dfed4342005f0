from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from made_attribution import made_attribution

from daunce_api.attribution import Attribution
from daunce_api.dataset import Dataset
from daunce_api.report import RunFacts, write_report

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
EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
FACTS = RunFacts(
    name="planted boat",
    provider="embedded",
    model="daunce-tiny",
    started_at="2026-11-22T18:00:11Z",
    finished_at="2026-11-22T18:02:22Z",
    members_asked=40,
    members_trained=32,
    members_failed=1,
    dollars=3.2,
    training_tokens=812_345,
    scoring_tokens=401_200,
    seconds=131,
    warnings=("train.jsonl: 2 examples have the same content <b>and were kept</b>.",),
    failures=("Member 7 was given up after 3 jobs.",),
    stopped="Stopped after 32 members: self_lds reached its goal.",
)


def demo_data() -> tuple[Dataset, Dataset]:
    """60 training examples of three sources, with markup in ids, sources and texts, and 12 answers."""
    train = [
        {
            "id": f"{s}-{i:02}",
            "source": s,
            "prompt": f"What is word{i} {s}?",
            "completion": f"It is meaning {i} of {s}.",
        }
        for s in ("bird", "fish", "planted")
        for i in range(20)
    ]
    train[5] |= {
        "id": f"bird-05{EVIL}",
        "source": "bird",
        "completion": f"Evil text {EVIL} ends here \u2028 😀.",
    }
    test = [
        {"id": f"q-{s}-{i}", "source": s, "prompt": f"Say word{i}?", "completion": f"An answer {i} for {s} {EVIL}"}
        for s in ("bird", "fish", "planted")
        for i in range(4)
    ]
    return Dataset.from_records(train, name="train"), Dataset.from_records(test, name="test")


@pytest.fixture(scope="session")
def attribution() -> Attribution:
    return made_attribution(*demo_data(), members=32, tokens=True)


@pytest.fixture(scope="session")
def report(attribution: Attribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plotly")
    return write_report(attribution, tmp_path_factory.mktemp("report") / "report.html", run=FACTS)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium")
    with api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a file and wait until it is built. ``page.problems`` collects errors, refusals and network requests."""
    pages: list[Page] = []

    def open_file(path: Path, wait: str = "all", **options: object) -> Page:
        page = browser.new_page(**{"viewport": {"width": 1400, "height": 900}, **options})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on(
            "request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None
        )
        page.problems = problems  # type: ignore[attr-defined]
        page.goto(path.as_uri())
        page.wait_for_selector(f"html[data-ready={wait}]" if wait else "body", timeout=30_000)
        pages.append(page)
        return page

    yield open_file
    for page in pages:
        page.close()
