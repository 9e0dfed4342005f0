"""What was paid for once is not asked for again: in this run, another one, or another process."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from provider_support import BATCH, LONG, SHORT, Server, run_config, truth
from test_provider_prompt_logprobs import completions

from daunce_api._util.clock import InstantClock
from daunce_api.providers import prompt_logprobs
from daunce_api.providers.base import TokenScores
from daunce_api.providers.registry import scoring_address
from daunce_api.score.cache import FILE_NAME, ScoredCache, open_cache
from daunce_api.score.client import ScoringClient
from daunce_api.store import RunStore
from tests.store_rows import by_key

SCORES = {"k1": TokenScores((-1.5, -0.25)), "k2": TokenScores((-3.0,), (True,))}


def test_what_was_saved_is_found_exactly(tmp_path: Path) -> None:
    with ScoredCache(tmp_path, "echo https://x") as cache:
        cache.save("f", "m", SCORES)
        cache.save("f", "m", {"k1": SCORES["k1"]})
    with ScoredCache(tmp_path, "echo https://x") as cache:
        assert cache.lookup("f", "m", ["k1", "k2", "k3"]) == SCORES
        assert cache.hits == 2
        assert len(cache.lookup("f", "m", [f"n{i}" for i in range(1201)] + ["k1"])) == 1


@pytest.mark.parametrize(
    ("address", "fingerprint", "model", "key"),
    [("other", "f", "m", "k1"), ("a", "other", "m", "k1"), ("a", "f", "other", "k1"), ("a", "f", "m", "other")],
)
def test_another_endpoint_scorer_model_or_example_is_another_question(
    address: str, fingerprint: str, model: str, key: str, tmp_path: Path
) -> None:
    with ScoredCache(tmp_path, "a") as cache:
        cache.save("f", "m", SCORES)
    with ScoredCache(tmp_path, address) as cache:
        assert cache.lookup(fingerprint, model, [key]) == {}


def test_what_another_model_answered_can_be_forgotten(tmp_path: Path) -> None:
    with ScoredCache(tmp_path, "a") as cache:
        cache.save("f", "m", SCORES)
        cache.save("f", "other", SCORES)
        cache.discard("f", "m", ["k1", "k3"])
    with ScoredCache(tmp_path, "a") as cache:
        assert cache.lookup("f", "m", SCORES) == {"k2": SCORES["k2"]}
        assert cache.lookup("f", "other", SCORES) == SCORES


def test_damaged_rows_are_not_known_and_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    with ScoredCache(tmp_path, "a") as cache:
        cache.save("f", "m", SCORES)
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("UPDATE scores SET logprobs = zeroblob(16) WHERE censored IS NULL")
    with ScoredCache(tmp_path, "a") as cache:
        assert cache.lookup("f", "m", ["k1", "k2"]) == {"k2": SCORES["k2"]}
    (tmp_path / FILE_NAME).write_bytes(b"no database at all" * 100)
    with ScoredCache(tmp_path, "a") as cache:
        assert cache.lookup("f", "m", ["k1"]) == {}
        cache.save("f", "m", SCORES)
    assert (tmp_path / FILE_NAME).with_suffix(".damaged").exists()


def test_no_text_and_no_name_is_in_the_file(tmp_path: Path) -> None:
    with ScoredCache(tmp_path, "echo https://secret-host") as cache:
        cache.save("fingerprint", "ft:model-name", {LONG.key: SCORES["k1"]})
    content = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    for text in (b"secret-host", b"model-name", b"fingerprint", LONG.key.encode()):
        assert text not in content


def _write(folder: str, start: int) -> None:
    with ScoredCache(Path(folder), "a") as cache:
        for i in range(start, start + 50):
            cache.save("f", "m", {f"k{i}": TokenScores((-float(i),))})


def test_several_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(str(tmp_path), start)) for start in (0, 25, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    with ScoredCache(tmp_path, "a") as cache:
        assert len(cache.lookup("f", "m", [f"k{i}" for i in range(100)])) == 100


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
def test_only_paid_remote_endpoints_are_kept(changes: dict[str, Any], address: str | None, tmp_path: Path) -> None:
    config = run_config(**changes)
    assert scoring_address(config) == address
    cache = open_cache(config, tmp_path)
    assert (cache is None) == (address is None)
    if cache is not None:
        cache.close()


def test_a_scorer_of_its_own_has_its_own_address_and_the_cache_can_be_switched_off(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "data": {"train": "a", "test": "b"},
        "backend": {"kind": "openai", "scorer": {"kind": "fireworks"}},
    }
    from daunce_api.config import RunConfig

    assert scoring_address(RunConfig.from_mapping(content)) == "fireworks https://api.fireworks.ai/inference/v1"
    off = RunConfig.from_mapping({**content, "scoring": {"cache": False}})
    assert open_cache(off, tmp_path) is None


def client(server: Server, run_dir: Path, cache: ScoredCache) -> tuple[ScoringClient, RunStore]:
    scorer = prompt_logprobs.open_scorer(server.context(run_config(scorer="prompt_logprobs")))
    store = RunStore.create_or_open(run_dir, {"config": {}})
    return ScoringClient(scorer, store, clock=InstantClock(), cache=cache), store


def prompts(server: Server) -> int:
    """Prompts that were scored; the probe's generation is none."""
    bodies = [json.loads(r.content) for r in server.requests]
    return sum(len(body["prompt"]) for body in bodies if "prompt_logprobs" in body)


async def test_a_second_run_sends_only_what_no_run_has_paid_for(tmp_path: Path) -> None:
    with ScoredCache(tmp_path / "cache", "a") as cache:
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
    with ScoredCache(tmp_path / "cache", "a") as cache:
        scoring, store = client(server, tmp_path / "one", cache)
        with store:
            await scoring.score_member(0, "ft", [LONG, SHORT])
            await scoring.probe_noise(0, "ft", [LONG, SHORT], 1)
            assert prompts(server) == 3
            assert len(by_key(store, 0, replicate=1)) == 1
