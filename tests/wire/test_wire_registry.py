"""Kinds by name: what is opened, what is refused, and which key goes where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from toy_completions import ToyServer
from wire_support import KEY, Server, encoded

from daunce_api.config import RunConfig
from daunce_api.errors import ConfigurationError
from daunce_api.providers.base import GRACE_SECONDS
from daunce_api.providers.endpoint import ANONYMOUS
from daunce_api.providers.openai_wire.echo import EchoScorer
from daunce_api.providers.openai_wire.trainer import WireTrainer
from daunce_api.providers.registry import capabilities_of, open_backend, open_tokenizer


def config(backend: dict[str, Any]) -> RunConfig:
    return RunConfig.from_mapping({"data": {"train": "a.jsonl", "test": "b.jsonl"}, "backend": backend})


WIRE = {"kind": "openai_wire", "base_url": "http://wire.test/v1", "model": "m"}


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ({"kind": "open_ai"}, "did you mean openai"),
        ({"kind": "xyz"}, "embedded"),
        ({"kind": "openai_wire"}, "backend.base_url"),
        ({**WIRE, "base_url": "wire.test"}, "not an address"),
        ({**WIRE, "scorer": {"kind": "ecco"}}, "did you mean echo"),
        ({**WIRE, "options": {"time_out": 3}}, "did you mean timeout"),
        ({**WIRE, "options": {"timeout": -1}}, "greater than 0"),
        ({**WIRE, "scorer": {"options": {"max_tokens": 2}}}, "backend.scorer.options"),
        ({**WIRE, "api_key_env": "DAUNCE_TEST_KEY"}, "DAUNCE_TEST_KEY"),
        ({"kind": "openai", "model": "gpt-4.1-nano"}, "OPENAI_API_KEY"),
    ],
)
async def test_what_is_wrong_is_named(backend: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("DAUNCE_TEST_KEY", raising=False)
    with pytest.raises(ConfigurationError, match=words):
        async with open_backend(config(backend)):
            pass


@pytest.mark.parametrize("option", ["state_dir", "api_key", "model"])
def test_the_embedded_server_keeps_its_own_options(option: str) -> None:
    with pytest.raises(ConfigurationError, match=option):
        capabilities_of(config({"kind": "embedded", "options": {option: "x"}}))


def test_the_context_of_a_served_model_costs_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = pytest.importorskip("daunce_api.providers.local.models")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 77}')
    downloads: list[str] = []

    def hub_folder(name: str, patterns: Sequence[str], what: str, advice: str) -> Path:
        downloads.extend(patterns)
        return tmp_path

    monkeypatch.setattr(models, "hub_folder", hub_folder)
    trainer, scorer = capabilities_of(config({"kind": "embedded", "model": "owner/of-no-other-test"}))
    assert (trainer.max_context_tokens, scorer.max_context_tokens) == (77, 77)
    assert downloads
    assert not any("safetensors" in pattern for pattern in downloads)


def test_an_option_that_is_null_is_left_out() -> None:
    """Run folders of earlier versions may hold it: null was the default of some."""
    trainer, _ = capabilities_of(config({**WIRE, "options": {"grace_seconds": None, "key_in": None}}))
    assert trainer.grace_seconds == GRACE_SECONDS


def test_capabilities_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    trainer, scorer = capabilities_of(config({"kind": "openai", "model": "gpt-4.1-nano", "scorer": {"kind": "echo"}}))
    assert (trainer.max_concurrent_jobs, trainer.min_examples) == (3, 10)
    assert any("6 January 2027" in note for note in trainer.notes)
    assert scorer.scope == "any"
    trainer, scorer = capabilities_of(config({"kind": "embedded", "options": {"workers": 2, "min_examples": 4}}))
    assert (trainer.max_concurrent_jobs, trainer.min_examples, trainer.notes) == (
        4,
        4,
        ("trains and scores on this machine",),
    )
    assert scorer.max_context_tokens == 512
    assert capabilities_of(config({**WIRE, "max_concurrent_jobs": 9}))[0].max_concurrent_jobs == 9


async def test_trainer_and_scorer_talk_to_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAUNCE_TEST_KEY", KEY)
    server = Server(ToyServer())
    keyed = config({**WIRE, "api_key_env": "DAUNCE_TEST_KEY"})
    async with open_backend(keyed, http_client=server.http()) as backend:
        assert isinstance(backend.trainer, WireTrainer)
        assert isinstance(backend.scorer, EchoScorer)
        await backend.scorer.score("ft", [encoded([1, 2, 3], [2])])
    assert [str(r.url) for r in server.requests] == ["http://wire.test/v1/models", "http://wire.test/v1/completions"]
    assert {r.headers["authorization"] for r in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(repr(backend))


@pytest.mark.parametrize(
    ("backend", "url", "key"),
    [
        (WIRE, "http://wire.test/v1", ANONYMOUS),
        ({**WIRE, "api_key_env": "DAUNCE_TEST_KEY"}, "http://wire.test/v1", KEY),
        # a key never follows to another address unless it is named for it
        (
            {**WIRE, "api_key_env": "DAUNCE_TEST_KEY", "scorer": {"base_url": "http://else.test/v1"}},
            "http://else.test/v1",
            ANONYMOUS,
        ),
        (
            {**WIRE, "scorer": {"base_url": "http://else.test/v1", "api_key_env": "DAUNCE_TEST_KEY"}},
            "http://else.test/v1",
            KEY,
        ),
        (
            {"kind": "openai", "model": "gpt-4.1", "base_url": "http://else.test/v1", "scorer": {"kind": "echo"}},
            "http://else.test/v1",
            ANONYMOUS,
        ),
        (
            {"kind": "openai", "model": "gpt-4.1", "scorer": {"kind": "echo"}},
            "https://api.openai.com/v1",
            "sk-official",
        ),
    ],
)
async def test_which_key_goes_where(
    backend: dict[str, Any], url: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAUNCE_TEST_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-official")
    server = Server(ToyServer())
    async with open_backend(config(backend), http_client=server.http()) as opened:
        await opened.scorer.score("ft", [encoded([1, 2, 3], [2])])
    assert [str(r.url) for r in server.requests] == [url + "/models", url + "/completions"]
    assert {r.headers["authorization"] for r in server.requests} == {f"Bearer {key}"}


def test_tokenizers(tmp_path: Any) -> None:
    assert open_tokenizer(config({})).encode("word")
    assert open_tokenizer(config({**WIRE, "tokenizer": "daunce-tiny"})).encode("word")
    with pytest.raises(ConfigurationError, match=r"backend\.tokenizer"):
        open_tokenizer(config(WIRE))
    with pytest.raises(ConfigurationError, match=r"no folder with tokenizer\.json"):
        open_tokenizer(config({**WIRE, "tokenizer": str(tmp_path)}))
