"""``daunce view``: who is answered, what is shown, and that a browser shows it."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from made_attribution import demo_data, made_attribution

from daunce_api.data.dataset import Dataset
from daunce_api.errors import ConfigurationError
from daunce_api.report.view import Runs, find_runs, serve, view_app
from daunce_api.report.view.compare import side_by_side

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run-2fa6155"
EVIL = "<img src=x onerror='window.broken = 1'>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run and one that was killed, one of them deeper down."""
    folder = tmp_path_factory.mktemp("runs")
    for name, place in (("run", "first"), ("half", "deep/half")):
        shutil.copytree(FIXTURE / name, folder / place, ignore=shutil.ignore_patterns("server", "lock"))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of a server in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from daunce_api.report.view import Runs, serve;"
        "serve(Runs(Path(sys.argv[1])), on_start=lambda a: print(a, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(120)


def ask(address: str, path: str = "", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Code, headers and body of one request; a path with a leading slash goes without the token."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=120)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path if path.startswith("/") else parts.path + path, headers=names)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, answer.read().decode()
    finally:
        connection.close()


def post(address: str, path: str, body: str, *, kind: str = "application/json", **headers: str) -> tuple[int, Any]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=120)
    try:
        connection.request("POST", parts.path + path, body=body, headers={"content-type": kind, **headers})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith("{") else text
    finally:
        connection.close()


def test_runs_are_found_below_a_folder(folder: Path, tmp_path: Path) -> None:
    assert [path.relative_to(folder).as_posix() for path in find_runs(folder)] == ["deep/half", "first"]
    assert find_runs(folder / "first") == [folder / "first"]
    (folder / "first" / "evaluation").mkdir(exist_ok=True)
    shutil.copytree(folder / "deep" / "half", folder / "first" / "evaluation" / "lds", dirs_exist_ok=True)
    (tmp_path / "link").symlink_to(folder)
    assert len(find_runs(folder)) == 2, "runs of an evaluation belong to their run"
    assert find_runs(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("", {}, 200),
        ("api/runs", {}, 200),
        ("/", {}, 404),
        ("/api/runs", {}, 404),
        ("/x/api/runs", {}, 404),
        ("api/runs", {"Host": "evil.example"}, 421),
        ("api/runs", {"Host": "evil.example:{port}"}, 421),
        ("api/runs", {"Host": "localhost:{port}"}, 200),
        ("api/runs", {"Origin": "http://evil.example"}, 403),
        ("api/runs", {"Origin": "null"}, 403),
        ("api/runs", {"Origin": "http://127.0.0.1:{port}"}, 200),
        ("api/runs", {"Sec_Fetch_Site": "cross-site"}, 403),
        ("api/runs", {"Sec_Fetch_Site": "same-origin"}, 200),
        ("api/runs/nobody", {}, 404),
        ("report/nobody", {}, 404),
        ("static/../server.py", {}, 404),
        ("static/%2e%2e%2fserver.py", {}, 404),
    ],
)
def test_only_its_own_pages_are_answered(address: str, path: str, headers: dict[str, str], code: int) -> None:
    port = str(urlsplit(address).port)
    status, found, body = ask(address, path, **{name: value.format(port=port) for name, value in headers.items()})
    assert status == code
    assert found["referrer-policy"] == "no-referrer"
    assert found["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in found
    if code != 200:
        assert "first" not in body


def test_other_methods_change_nothing(address: str) -> None:
    assert ask(address, "api/runs", method="POST")[0] == 405
    assert ask(address, "api/runs", method="DELETE")[0] == 405
    identity = json.loads(ask(address, "api/runs")[2])["runs"][0]["id"]
    for action in ("mark", "price", "ask", "fix"):
        assert ask(address, f"api/runs/{identity}/{action}")[0] == 405


@pytest.mark.parametrize(
    ("action", "body", "words"),
    [
        ("mark", "not json", "JSON"),
        ("mark", "[1]", "JSON object"),
        ("mark", '{"question": "q", "verdict": "bad"}', "wanted, unwanted or null"),
        ("mark", '{"verdict": "wanted"}', "question is missing"),
        ("mark", '{"question": "nobody", "verdict": "wanted"}', "nobody"),
        ("price", '{"prompt": "", "answer": "a"}', "prompt is missing"),
        ("ask", '{"prompt": "p", "answer": ["a"]}', "answer is missing"),
        ("ask", '{"prompt": "p", "answer": "a", "usd": true}', "number or null"),
        ("ask", "x" * 1_000_001, "larger than"),
        ("fix", "{}", "no answer is marked as unwanted"),
        ("delete", "{}", "no such action"),
    ],
)
def test_wrong_requests_end_with_a_sentence(address: str, action: str, body: str, words: str) -> None:
    identity = json.loads(ask(address, "api/runs")[2])["runs"][0]["id"]
    code, found = post(address, f"api/runs/{identity}/{action}", body)
    assert 400 <= code < 500
    assert words in found["problem"]


def test_forms_of_other_pages_cannot_post(address: str) -> None:
    """A form can send text without asking first (CORS), but not JSON."""
    identity = json.loads(ask(address, "api/runs")[2])["runs"][0]["id"]
    body = '{"question": "q", "verdict": null}'
    assert post(address, f"api/runs/{identity}/mark", body, kind="text/plain")[0] == 400
    assert post(address, f"api/runs/{identity}/mark", body, Origin="http://evil.example")[0] == 403


def test_the_token_is_long_and_another_each_time(address: str, tmp_path: Path) -> None:
    assert len(urlsplit(address).path.strip("/")) >= 32
    assert "frame-ancestors 'none'" in ask(address)[1]["content-security-policy"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "example.org", "::"])
def test_it_listens_on_this_machine_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigurationError, match="loopback"):
        serve(Runs(tmp_path), host=host, on_start=lambda address: None)


def test_a_port_that_is_taken_is_named(address: str, tmp_path: Path) -> None:
    port = urlsplit(address).port
    assert port is not None
    with pytest.raises(ConfigurationError, match=str(port)):
        serve(Runs(tmp_path), port=port, on_start=lambda address: None)


def test_it_needs_no_pytorch(folder: Path) -> None:
    code = (
        "import sys\n"
        "class Nowhere:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers', 'peft'}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Nowhere())\n"
        "from pathlib import Path; from daunce_api.report.view import Runs\n"
        "runs = Runs(Path(sys.argv[1]))\n"
        "rows = {row['folder']: row for row in runs.listed()}\n"
        "assert rows['first']['complete'], rows\n"
        "assert len(runs.report(rows['first']['id'])) > 10_000\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_state_and_report_of_each_run(address: str, folder: Path) -> None:
    content = json.loads(ask(address, "api/runs")[2])
    rows = {row["folder"]: row for row in content["runs"]}
    assert set(rows) == {"first", "deep/half"}
    whole, half = rows["first"], rows["deep/half"]
    assert (whole["members_scored"], whole["members_asked"], whole["complete"]) == (6, 6, True)
    assert (half["members_scored"], half["complete"]) == (2, False)
    code, headers, page = ask(address, f"report/{whole['id']}")
    assert code == 200
    assert headers["content-security-policy"] == "frame-ancestors 'none'"
    assert 'id="numbers"' in page
    one = json.loads(ask(address, f"api/runs/{whole['id']}")[2])
    assert [q["id"] for q in one["questions"]] == Dataset.from_jsonl(folder / "first" / "data" / "test.jsonl").ids


def test_changes_of_a_store_are_seen(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "deep" / "half", tmp_path / "run")
    runs = Runs(tmp_path)
    (row,) = runs.listed()
    assert row["members_scored"] == 2
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(folder / "first", tmp_path / "run")
    assert runs.state(row["id"])["members_scored"] == 6
    shutil.rmtree(tmp_path / "run")
    assert runs.listed() == []
    with pytest.raises(KeyError):
        runs.state(row["id"])


def test_a_damaged_run_is_named_and_hides_no_other(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first", tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.sqlite").write_bytes(b"no database" * 100)
    shutil.copytree(folder / "first", tmp_path / "fixed")
    for content in ("[1]", "{", '"text"'):
        (tmp_path / "fixed" / "fix" / "1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "fixed" / "fix" / "1" / "fix.json").write_text(content)
        assert "fix.json cannot be read" in Runs(tmp_path / "fixed").listed()[0]["problem"]
    rows = {row["folder"]: row for row in Runs(tmp_path).listed()}
    assert rows["bad"]["problem"]
    assert rows["good"]["complete"]


def test_two_runs_side_by_side() -> None:
    train, test = demo_data()
    one, other = made_attribution(train, test, members=40), made_attribution(train, test, members=40, seed=7)
    found = side_by_side(one, other, "q-fish-1")
    assert found["test"] == "q-fish-1"
    assert found["common"] == 60
    assert found["only"] == [0, 0]
    assert 0.3 < found["spearman"] < 1
    score = one.scores()["q-fish-1"]
    for row in found["rows"]:
        assert row["runs"][0]["score"] == pytest.approx(score[row["id"]], rel=1e-5)
    by_id = {row["id"]: row["runs"] for row in found["rows"]}
    table = one.top("q-fish-1", 60)
    marks = dict(zip(table["id"], table["distinguishable"], strict=True))
    assert {i: runs[0]["rank"] for i, runs in by_id.items()} == dict(zip(table["id"], table["rank"], strict=True))
    assert {i: runs[0]["significant"] for i, runs in by_id.items()} == marks
    assert found["both"] == sum(a["significant"] and b["significant"] for a, b in by_id.values()) > 0
    first = [{i for i, runs in by_id.items() if runs[n]["rank"] <= 10} for n in (0, 1)]
    assert found["shared"] == len(first[0] & first[1])


def test_examples_are_matched_by_their_content_not_by_their_names() -> None:
    train, test = demo_data()
    one = made_attribution(train, test, members=12)
    renamed = [{**e.to_record(), "id": f"n{i}"} for i, e in enumerate(train)][::-1]
    more = Dataset.from_records([*renamed[:-4], {"id": "new", "prompt": "p", "completion": "c"}])
    other = made_attribution(more, Dataset(test[:2]), members=12)
    found = side_by_side(one, other, None)
    assert [q["id"] for q in found["questions"]] == test.ids[:2]
    assert (found["common"], found["only"]) == (56, [4, 1])
    assert {row["id"] for row in found["rows"]} <= set(train.ids)
    apart = Dataset.from_records([{"id": "z", "prompt": "other", "completion": "answer"}])
    alone = made_attribution(train, apart, members=12)
    assert "no question in common" in side_by_side(one, alone, None)["problem"]
    loss = other.test_loss_KM.copy()
    loss[:, 0] = np.nan
    lost = replace(other, test_loss_KM=loss)
    assert side_by_side(one, lost, None)["rows"][0]["runs"][1]["score"] is None


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(new_page: Any, address: str) -> Iterator[Any]:
    page = new_page(viewport={"width": 1400, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda r: None if r.url.startswith(address) else problems.append(r.url))
    page.goto(address)
    page.wait_for_selector("table.runs")
    yield page
    assert problems == []
    page.close()


def test_a_browser_shows_runs_their_reports_and_two_side_by_side(page: Any, address: str) -> None:
    rows = page.locator("table.runs tbody tr")
    assert rows.count() == 2
    assert "complete" in rows.nth(1).inner_text()
    assert "6 of 6 scored" in rows.nth(1).inner_text()
    rows.nth(1).locator("a").first.click()
    page.wait_for_selector(".facts")
    assert "members" in page.locator(".facts").inner_text()
    link = page.locator(".questions a").nth(1)
    question = page.locator(".questions li").nth(1).get_attribute("data-question")
    link.click()
    page.wait_for_selector("html[data-ready=all]")
    assert question in page.locator("#answer .meta").inner_text()
    page.goto(address)
    page.wait_for_selector("table.runs")
    for box in page.locator("table.runs input").all():
        box.check()
    page.locator("#compare").click()
    page.wait_for_selector("table.compared")
    assert page.locator("table.compared tbody tr").count() > 3
    options = page.locator("#question option").all()
    page.locator("#question").select_option(index=len(options) - 1)
    page.wait_for_function("decodeURIComponent(location.hash).split('/').length === 4")


@pytest.mark.parametrize(("width", "scheme"), [(600, "dark"), (1400, "light")])
def test_no_page_scrolls_sideways(new_page: Any, address: str, width: int, scheme: str) -> None:
    page = new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("table.runs")
    ids = page.locator("tr[data-run]").evaluate_all("all => all.map((row) => row.dataset.run)")
    run, compared = f"#run/{ids[0]}", f"#compare/{ids[0]}/{ids[1]}"
    places = ("#", "table.runs"), (run, ".facts"), ("#run/%", "table.runs"), (compared, "h1")  # one is none of ours
    for place, wait in places:
        page.evaluate("place => { location.hash = place; }", place)
        page.wait_for_selector(wait)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_texts_of_a_run_are_never_markup(new_page: Any, tmp_path: Path, folder: Path) -> None:
    """The page gets hostile texts as JSON from a server that a test controls, and shows them as they are."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    class Hostile(Runs):
        def listed(self) -> list[dict[str, Any]]:
            return [Runs.state(self, i) | {"title": EVIL, "folder": EVIL, "model": EVIL} for i in self.scan()]

        def state(self, identity: str) -> dict[str, Any]:
            return super().state(identity) | {"title": EVIL, "rows": [[EVIL, EVIL]], "recent": [EVIL]}

        def questions(self, identity: str) -> list[dict[str, Any]]:
            return [{"id": EVIL, "question": EVIL, "answer": EVIL}]

    assert Starlette(routes=[Route("/", lambda request: JSONResponse({}))])  # the extra is there
    with served(lambda hosts: view_app(Hostile(folder), "token", hosts)) as base:
        page = new_page()
        page.goto(f"{base}/token/")
        page.wait_for_selector("table.runs")
        assert EVIL in page.locator("table.runs").inner_text()
        page.locator("table.runs a").first.click()
        page.wait_for_selector(".facts")
        assert page.locator(".questions").inner_text().count(EVIL) == 3
        assert page.locator("main img").count() == 0
        assert page.evaluate("window.broken") is None
        page.close()


def test_ticks_fix_and_ask_from_the_page(new_page: Any, folder: Path) -> None:
    done: list[Any] = []

    class Acting(Runs):
        """Everything that would change the run is noted instead."""

        def questions(self, identity: str) -> list[dict[str, Any]]:
            return [{"id": name, "question": "Q", "answer": f"A {name}", "verdict": None} for name in ("one", "two")]

        def mark(self, identity: str, question: str, verdict: Any) -> dict[str, Any]:
            done.append((question, verdict))
            return {"id": question, "verdict": verdict}

        def price(self, identity: str, turns: list[dict[str, str]], answer: str) -> dict[str, Any]:
            return {"text": "6 short requests", "usd": 0.0123, "costs": True}

        def ask(self, identity: str, turns: list[dict[str, str]], answer: str, usd: float | None) -> dict[str, Any]:
            done.append((turns, answer, usd))
            return {"id": "asked"}

        def fix(self, identity: str) -> dict[str, Any]:
            group = {"id": "t1", "examples": 2, "question": "Q", "answer": EVIL, "effect": 0.0123, "z": 4.2}
            return {"reason": "rule", "folder": "fix/1", "count": 2, "of": 24, "groups": [group]}

    with served(lambda hosts: view_app(Acting(folder), "token", hosts)) as base:
        page = new_page()
        page.goto(f"{base}/token/")
        page.locator("table.runs tr:last-child a").first.click()
        page.wait_for_selector(".facts")
        page.locator("[data-question=two] button.unwanted").click()
        page.wait_for_selector("[data-question=two] button.unwanted[aria-pressed=true]")
        page.locator("[data-question=two] button.unwanted").click()
        page.wait_for_selector("[data-question=two] button.unwanted[aria-pressed=false]")
        page.locator("[data-question=one] button.wanted").click()
        page.wait_for_selector("[data-question=one] button.wanted[aria-pressed=true]")
        assert done == [("two", "unwanted"), ("two", None), ("one", "wanted")]
        page.locator("#fix button").click()
        page.wait_for_selector("#proposal table")
        text = page.locator("#proposal").inner_text()
        assert "2 of 24 training examples (rule). Written to fix/1" in text
        assert "t1 and 1 near-duplicates" in text
        assert EVIL in text
        page.locator("#ask-prompt").fill("Do you charge?")
        page.locator("#ask-answer").fill("Yes.")
        page.evaluate("refresh()")  # as the page does every two seconds
        assert page.locator("#ask-prompt").input_value() == "Do you charge?"
        page.locator("#ask-price").click()
        page.wait_for_selector("#ask-go")
        assert len(done) == 3, "the price comes first"
        page.locator("#ask-go").click()
        page.locator("#asked a").wait_for()
        assert done[3] == ([{"role": "user", "content": "Do you charge?"}], "Yes.", 0.0123)
        assert page.locator("#asked a").get_attribute("href").endswith("#answer=asked")
        assert page.evaluate("window.broken") is None
        page.close()


class served:  # noqa: N801
    """An ASGI application in a thread."""

    def __init__(self, make: Callable[[frozenset[str]], Any]) -> None:
        import socket

        import uvicorn

        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.base = f"http://{host}"
        app = make(frozenset({host}))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return self.base

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(120)
        self._socket.close()
