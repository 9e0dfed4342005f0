"""What was paid for once is not asked for again: in this run, another one, or another process."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from provider_support import BATCH, LONG, SHORT, Server, run_config, truth
from test_provider_prompt_logprobs import completions

from daunce_api._util.clock import InstantClock
from daunce_api.providers import vllm
from daunce_api.providers.base import TokenScores
from daunce_api.providers.registry import scoring_address
from daunce_api.score.cache import ScoredCache, open_cache
from daunce_api.score.client import ScoringClient
from daunce_api.store import RunStore
from tests.store_rows import by_key, put

ANSWERS = {LONG.key: TokenScores((-1.5, -0.25)), SHORT.key: TokenScores((-3.0,), (True,))}


def held(folder: Path, member: int = 0, checkpoint: int = 0) -> Path:
    """A run folder that holds the answers."""
    with RunStore.create_or_open(folder, {"config": {}}) as store:
        store.scores.ids_of([LONG, SHORT])
        put(store, member, 0, "f", ANSWERS, checkpoint)
    return folder


def test_what_another_run_holds_is_found_exactly_and_not_kept_twice(tmp_path: Path) -> None:
    cache = ScoredCache(tmp_path / "cache", "echo https://x")
    cache.note("f", "m", held(tmp_path / "run", 3, 1), 3, 1)
    cache = ScoredCache(tmp_path / "cache", "echo https://x")
    assert cache.lookup("f", "m", BATCH) == ANSWERS
    assert cache.lookup("f", "m", BATCH, besides=tmp_path / "run") == {}
    shutil.rmtree(tmp_path / "run")
    assert cache.lookup("f", "m", BATCH) == {}
    content = b"".join(p.read_bytes() for p in (tmp_path / "cache" / "scored").iterdir())
    for text in (np.array([-1.5, -0.25]).tobytes(), LONG.key.encode(), b"https://x"):
        assert text not in content


@pytest.mark.parametrize(("address", "fingerprint", "model"), [("other", "f", "m"), ("a", "g", "m"), ("a", "f", "n")])
def test_another_endpoint_scorer_or_model_is_another_question(
    address: str, fingerprint: str, model: str, tmp_path: Path
) -> None:
    cache = ScoredCache(tmp_path / "cache", "a")
    cache.note("f", "m", held(tmp_path / "run"), 0, 0)
    cache = ScoredCache(tmp_path / "cache", address)
    assert cache.lookup(fingerprint, model, [LONG]) == {}


def test_what_was_set_aside_or_damaged_in_its_run_is_not_found(tmp_path: Path) -> None:
    cache = ScoredCache(tmp_path / "cache", "a")
    for name in ("aside", "damaged"):
        cache.note("f", name, held(tmp_path / name), 0, 0)
    with RunStore.open(tmp_path / "aside") as store:
        store.scores.set_aside([0], "all alike", suspect=True)
    with RunStore.open(tmp_path / "damaged") as store:
        store._db.execute("UPDATE blobs SET logprobs = zeroblob(24)")
    assert cache.lookup("f", "aside", [LONG]) == {}
    assert cache.lookup("f", "damaged", [LONG]) == {}


def test_a_damaged_line_is_passed_over_and_the_others_are_read(tmp_path: Path) -> None:
    folder, cache = held(tmp_path / "run"), ScoredCache(tmp_path, "a")
    cache.note("f", "m", tmp_path / "gone", 0, 0)
    (path,) = (tmp_path / "scored").iterdir()
    path.write_bytes(path.read_bytes() + b'\x00\xff no line at all\n["torn')
    assert cache.lookup("f", "m", [LONG]) == {}
    cache.note("f", "m", folder, 0, 0)  # is no part of the torn line
    assert cache.lookup("f", "m", [LONG]) == {LONG.key: ANSWERS[LONG.key]}
    before = path.read_bytes()
    cache.note("f", "m", folder, 0, 0)
    assert path.read_bytes() == before


def test_a_cache_that_cannot_be_read_or_written_costs_the_run_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "scored").write_text("a file where the folder should be")
    cache = ScoredCache(tmp_path, "a")
    cache.note("f", "m", held(tmp_path / "run"), 0, 0)
    assert cache.lookup("f", "m", [LONG]) == {}
    assert "could not be written" in caplog.text
    caplog.clear()
    ScoredCache(tmp_path / "other", "a").note("f", "m", Path("/runs/\udcff"), 0, 0)  # a name that is no Unicode
    assert "could not be written" in caplog.text


def _write(folder: str, start: int) -> None:
    cache = ScoredCache(Path(folder), "a")
    for i in range(start, start + 50):
        cache.note("f", f"m{i}", Path(folder) / "run", 0, 0)


def test_several_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(str(tmp_path), start)) for start in (0, 25, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    held(tmp_path / "run")
    cache = ScoredCache(tmp_path, "a")
    assert all(cache.lookup("f", f"m{i}", [LONG]) for i in range(0, 100, 9))


ADDRESSES: list[tuple[dict[str, Any], str | None]] = [
    ({"kind": "openai", "base_url": None}, "chat_token https://api.openai.com/v1"),
    ({"kind": "together", "base_url": None}, "together https://api.together.ai/v1"),
    ({"kind": "openai_wire", "base_url": "http://10.0.0.7:8000/v1/"}, "echo http://10.0.0.7:8000/v1"),
    ({"kind": "openai_wire", "base_url": "http://127.0.0.1:8000/v1"}, None),
    ({"kind": "openai_wire", "base_url": "http://localhost:8000/v1"}, None),
    ({"kind": "embedded", "base_url": None}, None),
    ({"kind": "local", "base_url": None}, None),
]


@pytest.mark.parametrize(("changes", "address"), ADDRESSES)
def test_only_paid_remote_endpoints_are_kept(changes: dict[str, Any], address: str | None) -> None:
    config = run_config(**changes)
    assert scoring_address(config) == address
    assert (open_cache(config) is None) == (address is None)


def test_a_scorer_of_its_own_has_its_own_address_and_the_cache_can_be_switched_off() -> None:
    content: dict[str, Any] = {
        "data": {"train": "a", "test": "b"},
        "backend": {"kind": "openai", "scorer": {"kind": "fireworks"}},
    }
    from daunce_api.config import RunConfig

    assert scoring_address(RunConfig.from_mapping(content)) == "fireworks https://api.fireworks.ai/inference/v1"
    off = RunConfig.from_mapping({**content, "scoring": {"cache": False}})
    assert open_cache(off) is None


def client(server: Server, run_dir: Path, cache: ScoredCache) -> tuple[ScoringClient, RunStore]:
    scorer = vllm.open_scorer(server.context(run_config(scorer="prompt_logprobs")))
    store = RunStore.create_or_open(run_dir, {"config": {}})
    return ScoringClient(scorer, store, clock=InstantClock(), cache=cache), store


def prompts(server: Server) -> int:
    """Prompts that were scored; the probe's generation is none."""
    bodies = [json.loads(r.content) for r in server.requests]
    return sum(len(body["prompt"]) for body in bodies if "prompt_logprobs" in body)


async def test_a_second_run_sends_only_what_no_run_has_paid_for(tmp_path: Path) -> None:
    cache = ScoredCache(tmp_path / "cache", "a")
    first = Server(completions())
    scoring, store = client(first, tmp_path / "one", cache)
    with store:
        assert await scoring.score_member(0, "ft", [LONG]) == 1
    second = Server(completions())
    scoring, store = client(second, tmp_path / "two", cache)
    with store:
        await scoring.score_member(0, "ft", BATCH)
        assert prompts(second) == 2
        found = by_key(store, 0)
        assert {k: s.logprobs for k, s in found.items()} == {e.key: truth("ft", e) for e in BATCH}
        await scoring.score_member(1, "other", BATCH)
        assert prompts(second) == 5
    third = Server(completions())
    scoring, store = client(third, tmp_path / "three", cache)
    with store:
        await scoring.score_member(0, "ft", BATCH)
        assert third.requests == []


async def test_replicates_are_measured_again(tmp_path: Path) -> None:
    server = Server(completions())
    cache = ScoredCache(tmp_path / "cache", "a")
    scoring, store = client(server, tmp_path / "one", cache)
    with store:
        await scoring.score_member(0, "ft", [LONG, SHORT])
        await scoring.measure(0, "ft", [LONG])
        assert prompts(server) == 3
        assert len(by_key(store, 0, replicate=1)) == 1
