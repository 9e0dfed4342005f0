"""A recorded run replays bit for bit without network, key or waiting; anything else is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_provider import (
    CONFIG,
    COOKIE,
    EXAMPLES,
    KEY,
    ORGANISATION,
    NoNetwork,
    Provider,
    all_bytes,
    small_run,
    transport,
)

from daunce_api._util.clock import InstantClock
from daunce_api.config import RunConfig
from daunce_api.errors import ReplayError, StoreError
from daunce_api.providers.registry import open_backend
from daunce_api.providers.replay import record, replay, scrub
from daunce_api.providers.replay.tape import JsonLines


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAUNCE_TEST_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", ORGANISATION)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, dict[int, Any]]:
    folder = tmp_path / "recording"
    return folder, asyncio.run(small_run(tmp_path / "first", record(folder), Provider(), clock=InstantClock()))


def reseal(folder: Path) -> None:
    """Checksums as a forger would make them."""
    names = ("cassette.json", "recording.json")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_a_replay_is_bit_identical_and_waits_for_nothing(
    recorded: tuple[Path, dict[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scores = recorded
    monkeypatch.delenv("DAUNCE_TEST_KEY")
    start = time.monotonic()
    again = asyncio.run(small_run(tmp_path / "second", replay(folder), NoNetwork()))
    assert time.monotonic() - start < 55  # the recorded answers asked for a minute
    assert again == scores
    assert len(again[0]) == len(EXAMPLES)


def test_the_label_and_the_checksums(recorded: tuple[Path, dict[int, Any]]) -> None:
    folder, _ = recorded
    label = json.loads((folder / "recording.json").read_text())
    assert label["server"] == "local emulator"
    assert label["complete"] is True
    assert label["exchanges"] == len(json.loads((folder / "cassette.json").read_text())["interactions"])
    assert replay(folder).run_key == label["run_key"]
    before = (folder / "SHA256SUMS").read_text()
    reseal(folder)
    assert (folder / "SHA256SUMS").read_text() == before


def test_a_recording_of_another_host_is_live(tmp_path: Path) -> None:
    config = {**CONFIG, "backend": {**CONFIG["backend"], "base_url": "https://api.example.test/v1"}}
    session = record(tmp_path / "r")
    asyncio.run(small_run(tmp_path / "run", session, Provider(), config=config, clock=InstantClock()))
    assert json.loads((tmp_path / "r" / "recording.json").read_text())["server"] == "live"
    assert b"https://api.example.test/v1/fine_tuning/jobs" in all_bytes(tmp_path / "r")


def test_nothing_secret_is_in_recording_or_run(recorded: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    kept = all_bytes(tmp_path)
    assert len(kept) > 10_000
    for secret in (KEY, ORGANISATION, COOKIE, "marked", "Bearer"):
        assert secret.encode() not in kept
    assert b"key-removed of org-removed is too fast" in kept
    assert b"for key-removed of org-removed" in kept, "in a header, too"


def test_headers_are_an_allow_list(recorded: tuple[Path, dict[int, Any]]) -> None:
    exchanges = json.loads((recorded[0] / "cassette.json").read_text())["interactions"]
    sent = {name for e in exchanges for name in e["request"]["headers"]}
    received = {name for e in exchanges for name in e["response"]["headers"]}
    assert sent == {"content-type"}
    assert received == {"content-type", "retry-after", "x-request-id"}


def test_another_port_replays_and_another_host_does_not(recorded: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    folder, scores = recorded

    def config(url: str) -> dict[str, Any]:
        return {**CONFIG, "backend": {**CONFIG["backend"], "base_url": url}}

    moved = small_run(tmp_path / "b", replay(folder), NoNetwork(), config=config("http://localhost:4321/v1"))
    assert asyncio.run(moved) == scores
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(small_run(tmp_path / "c", replay(folder), NoNetwork(), config=config("http://elsewhere.test/v1")))
    assert caught.group_contains(ReplayError, match=r"no request to this address.*local-server")


def backend_call(folder: Path, call: Callable[[Any], Any]) -> Any:
    async def run() -> Any:
        with replay(folder):
            config = RunConfig.from_mapping(CONFIG)
            async with open_backend(config, http_client=transport(NoNetwork()), replaying=True) as backend:
                return await call(backend)

    return asyncio.run(run())


def test_an_unrecorded_request_is_refused_at_once(recorded: tuple[Path, dict[int, Any]]) -> None:
    folder, _ = recorded
    with pytest.raises(ReplayError, match=r"GET http://local-server/v1/models/other.*no request to this address"):
        backend_call(folder, lambda b: b.trainer.model_info("other"))
    with pytest.raises(ReplayError, match="requests to this address were recorded, all with other contents"):
        backend_call(folder, lambda b: b.scorer.score("ft:other", EXAMPLES[:1]))

    async def poll_on(backend: Any) -> None:
        for _ in range(4):
            await backend.trainer.get("ftjob-0")

    with pytest.raises(ReplayError, match="recorded 3 times and is asked once more"):
        backend_call(folder, poll_on)


def test_a_run_that_asks_for_less_is_not_the_recorded_run(
    recorded: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    folder, _ = recorded
    with pytest.raises(ReplayError, match=r"without making \d+ of \d+ recorded requests"):
        asyncio.run(small_run(tmp_path / "second", replay(folder), NoNetwork(), members=2))


def test_an_error_of_the_run_is_not_covered_up(recorded: tuple[Path, dict[int, Any]]) -> None:
    with pytest.raises(ZeroDivisionError), replay(recorded[0]):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["cassette.json", "recording.json", "SHA256SUMS"])
@pytest.mark.parametrize("edit", ["change", "delete"])
def test_what_was_edited_is_not_replayed(recorded: tuple[Path, dict[int, Any]], name: str, edit: str) -> None:
    path = recorded[0] / name
    if edit == "delete":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1", b"2", 1))
        assert path.read_bytes() != content
    with pytest.raises(ReplayError):
        replay(recorded[0])


def test_a_forged_recording_is_still_checked_for_its_shape(recorded: tuple[Path, dict[int, Any]]) -> None:
    folder, _ = recorded
    (folder / "cassette.json").write_text('{"version":1,"interactions":[{"request":{}}]}')
    reseal(folder)
    with pytest.raises(ReplayError, match="not readable"), replay(folder):
        pass
    (folder / "recording.json").write_text('{"server": "live", "run_key": "../../x"}')
    reseal(folder)
    with pytest.raises(ReplayError, match="not a label"):
        replay(folder)


def test_a_recording_is_never_overwritten(recorded: tuple[Path, dict[int, Any]]) -> None:
    with pytest.raises(ReplayError, match="already"):
        record(recorded[0])
    with pytest.raises(ReplayError, match="no recording"):
        replay(recorded[0].parent)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    provider = Provider()
    with pytest.raises(StoreError, match="could not be written"):
        asyncio.run(small_run(tmp_path / "run", record(tmp_path / "file" / "r"), provider, clock=InstantClock()))
    assert provider.requests == 0


def test_a_session_wants_a_new_run(recorded: tuple[Path, dict[int, Any]], tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="only be replayed into a new run"):
        replay(recorded[0]).check_run("0123abcd")
    with pytest.raises(ReplayError, match="only be recorded from a new run"):
        record(tmp_path / "new").check_run("0123abcd")


def test_an_interrupted_recording_is_kept_and_labelled(tmp_path: Path) -> None:
    class Broken(Provider):
        def _completions(self, request: httpx2.Request) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(small_run(tmp_path / "run", record(tmp_path / "r"), Broken(), clock=InstantClock()))
    label = json.loads((tmp_path / "r" / "recording.json").read_text())
    assert label["complete"] is False
    assert label["exchanges"] > 0
    assert KEY.encode() not in all_bytes(tmp_path)


def test_an_empty_recording(tmp_path: Path) -> None:
    with record(tmp_path / "r"):
        pass
    with replay(tmp_path / "r"):
        pass


def test_the_network_is_back_afterwards(recorded: tuple[Path, dict[int, Any]]) -> None:
    async def ask() -> int:
        async with transport(lambda _: httpx2.Response(204)) as http:
            return (await http.get("http://x.test/")).status_code

    with pytest.raises(ReplayError), replay(recorded[0]):
        asyncio.run(ask())
    assert asyncio.run(ask()) == 204


BODIES = [
    (b'{"b": 1, "a": [1.0, 2]}', b'{"a":[1.0,2],"b":1}', "application/json", True),
    (b'{"a": 1}', b'{"a": 2}', "application/json", False),
    (b"not json", b"not json", "application/json", True),
    (b'"\\ud800"', b'"\\ud800"', "application/json", True),
    (
        b"--x\r\nbody\r\n--x--",
        b"--daunce-boundary\r\nbody\r\n--daunce-boundary--",
        "multipart/form-data; boundary=x",
        True,
    ),
]


@pytest.mark.parametrize(("one", "other", "content_type", "equal"), BODIES)
def test_bodies_in_one_form(one: bytes, other: bytes, content_type: str, equal: bool) -> None:
    assert (scrub.request_body(one, content_type) == scrub.request_body(other, content_type)) is equal
    cleaned = scrub.request_body(one, content_type)
    assert scrub.request_body(cleaned, scrub.request_headers({"content-type": content_type})["content-type"]) == cleaned


@pytest.mark.parametrize(
    ("address", "cleaned"),
    [
        ("http://127.0.0.1:41213/v1/files?limit=2&after=x", "http://local-server/v1/files?after=x&limit=2"),
        ("http://[::1]:80/v1", "http://local-server/v1"),
        ("https://api.openai.com/v1/models", "https://api.openai.com/v1/models"),
        ("https://me:pw@x.test:8443/v1?api-key=s3cret&b=#f", "https://x.test:8443/v1?b="),
    ],
)
def test_addresses_in_one_form(address: str, cleaned: str) -> None:
    assert scrub.uri(address) == cleaned
    assert scrub.uri(cleaned) == cleaned


@given(st.binary(max_size=60))
def test_any_body_survives_the_file(body: bytes) -> None:
    exchange = {
        "request": {"method": "POST", "uri": "http://x/", "body": body, "headers": {"content-type": ["a"]}},
        "response": {"status": {"code": 200, "message": "OK"}, "headers": {}, "body": {"string": body}},
    }
    restored = JsonLines.deserialize(JsonLines.serialize({"interactions": [exchange]}))
    assert restored == {"version": 1, "interactions": [exchange]}


NASTY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just({"base64": "!"}),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["version", "interactions", "request", "body", "base64", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(NASTY)
def test_no_file_raises_anything_but_replay_errors(content: Any) -> None:
    for text in (json.dumps(content), json.dumps({"version": 1, "interactions": content}), str(content), "[" * 3000):
        try:
            JsonLines.deserialize(text)
        except ReplayError:
            continue
