"""vLLM itself, on this machine's CPU: the same model, the same examples, the same numbers, and a whole run.

    DAUNCE_VLLM=http://127.0.0.1:8601/v1 pytest -s -m long tests/providers/test_real_vllm.py

The server is that of examples/servers/vllm.sh. Figures are printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from real_servers import MEMBERS, away_from_peft, live, small_run

from daunce_api import Run
from daunce_api.cli.doctor import Findings, examine, examine_backend
from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset, Example, Message
from daunce_api.data.tokenizers import EncodedExample, LocalTokenizer, encode_example
from daunce_api.errors import RejectedError
from daunce_api.providers import vllm as scoring
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire import echo
from daunce_api.providers.registry import Context, open_backend
from daunce_api.providers.tokenizers import embedded_folder

URL, pytestmark = live("DAUNCE_VLLM")

MODEL = "daunce-tiny"
TOLERANCE = 2e-4
"""Nats; float32 on both sides, in kernels that add in another order."""


@pytest.fixture(scope="module")
def vllm() -> str:
    """Address of the vLLM server: the embedded model, with adapters loaded at run time."""
    return URL


@pytest.fixture(scope="module")
def daunce(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Our own server with the same model."""
    from daunce_api.server import EmbeddedServer, ServerSettings

    with EmbeddedServer(ServerSettings(model=MODEL, state_dir=tmp_path_factory.mktemp("state"))) as server:
        yield Endpoint(server.base_url, server.api_key, "daunce serve")


@pytest.fixture(scope="module")
def tokenizer() -> LocalTokenizer:
    return LocalTokenizer(embedded_folder())


@pytest.fixture(scope="module")
def examples(tokenizer: LocalTokenizer) -> list[EncodedExample]:
    data = Dataset.from_jsonl(Path(str(files("daunce_api") / "cli" / "demo" / "data" / "test.jsonl")))
    unicode = Example("u", messages=(Message("user", "Was heißt ✓?"), Message("assistant", "naïve 漢字 🙂")))
    return [encode_example(e, tokenizer) for e in [*data[:24], unicode]]


def context(endpoint: Endpoint, kind: str, run_dir: Path | str = "runs/x", **options: Any) -> Context:
    config = RunConfig.from_mapping(
        {
            "run_dir": str(run_dir),
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "backend": {
                "kind": "openai_wire",
                "model": MODEL,
                "base_url": endpoint.base_url,
                "scorer": {"kind": kind, "options": options},
            },
        }
    )
    return Context(config, endpoint)


async def values(scorer: Any, model: str, examples: list[EncodedExample]) -> list[float]:
    found: list[float] = []
    async with scorer:
        size = scorer.capabilities.max_prompts_per_request
        for start in range(0, len(examples), size):
            for scores in await scorer.score(model, examples[start : start + size]):
                found += scores.logprobs
    return found


def furthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


async def test_every_way_to_ask_gives_the_same_numbers(
    vllm: str, daunce: Endpoint, examples: list[EncodedExample]
) -> None:
    server = Endpoint(vllm, provider="vLLM")
    ours = await values(echo.open_scorer(context(daunce, "echo", return_token_ids=True)), MODEL, examples)
    theirs = {
        "echo": echo.open_scorer(context(server, "echo", dialect="vllm")),
        "echo, one token generated": echo.open_scorer(context(server, "echo", dialect="vllm", max_tokens=1)),
        "prompt_logprobs": scoring.open_scorer(context(server, "prompt_logprobs")),
    }
    for name, scorer in theirs.items():
        found = await values(scorer, MODEL, examples)
        distance = furthest(found, ours)
        print(f"\nvLLM {name} against daunce serve: {len(found)} tokens, at most {distance:.2g} nats apart")
        assert distance < TOLERANCE


async def test_adapters_are_loaded_scored_and_unloaded(
    vllm: str, tokenizer: LocalTokenizer, examples: list[EncodedExample], tmp_path: Path
) -> None:
    from daunce_api.providers.local.language import LanguageModel, LoraSettings
    from daunce_api.providers.local.train import fine_tune

    model = LanguageModel.load(MODEL)
    folder = tmp_path / "local" / "models"
    for seed in (0, 1):
        settings = LoraSettings(n_epochs=2)
        trainee = model.trainee([(examples[:12], seed)], settings)
        fine_tune(model.adapted, trainee, settings)
        model.save(folder / f"ft-{seed}", trainee)
    scorer: Any = scoring.open_scorer(context(Endpoint(vllm, provider="vLLM"), "vllm", tmp_path))
    base = await values(scoring.open_scorer(context(Endpoint(vllm), "prompt_logprobs")), MODEL, examples)
    async with scorer:
        for seed in (0, 1, 0):
            found: list[float] = []
            for example in examples:
                found += (await scorer.score(f"ft-{seed}", [example]))[0].logprobs
            local = model.token_logprobs([e.ids for e in examples], adapter=folder / f"ft-{seed}")
            reference = [float(a.logprobs[t - 1]) for a, e in zip(local, examples, strict=True) for t in e.targets]
            distance = furthest(found, reference)
            print(f"\nadapter {seed} on vLLM against PyTorch: {len(found)} tokens, at most {distance:.2g} nats apart")
            assert distance < TOLERANCE
            assert furthest(found, base) > 0.1
        listed = httpx2.get(f"{vllm}/models", trust_env=False).json()["data"]
        assert len([m for m in listed if m["id"].startswith("daunce-") and m["id"] != MODEL]) == 1
    listed = httpx2.get(f"{vllm}/models", trust_env=False).json()["data"]
    assert [m["id"] for m in listed] == [MODEL]


async def test_prompt_logprobs_agree_with_its_own_generation(vllm: str, examples: list[EncodedExample]) -> None:
    async with scoring.open_scorer(context(Endpoint(vllm), "prompt_logprobs")) as scorer:
        report = await scorer.probe(MODEL, next(e for e in examples if e.example.is_chat))
    assert report.checked
    assert report.largest_difference is not None
    assert report.largest_difference < TOLERANCE


async def test_a_missing_model_keeps_its_meaning(vllm: str, examples: list[EncodedExample]) -> None:
    scorer = scoring.open_scorer(context(Endpoint(vllm), "prompt_logprobs"))
    async with scorer:
        with pytest.raises(RejectedError) as info:
            await scorer.score("no-such-model", examples[:1])
    assert info.value.status == 404


def test_a_run_of_adapters_trained_here(vllm: str, tmp_path: Path) -> None:
    backend = {"kind": "local", "model": MODEL, "scorer": {"kind": "vllm", "base_url": vllm}}
    run = small_run(tmp_path, backend, {"learning_rate": 0.002, "lora_rank": 8})
    run.execute()
    findings = examine(Run.open(run.run_dir))
    print(f"\n{findings.text()}")
    assert findings.ok
    differences = away_from_peft(run, lambda model: run.run_dir / scoring.LOCAL_MODELS / model, "vLLM")
    assert differences.size == MEMBERS * 26
    assert np.abs(differences).max() < TOLERANCE
    asked = run.ask(prompt="What is carbon?", answer="A black element.")
    assert np.isfinite(asked.test_loss_KM).all()
    run.clean()
    listed = httpx2.get(f"{vllm}/models", trust_env=False).json()["data"]
    assert [m["id"] for m in listed] == [MODEL]


async def test_the_doctor_finds_local_training_with_vllm_scoring_usable(
    vllm: str, examples: list[EncodedExample], tmp_path: Path
) -> None:
    config = RunConfig.from_mapping(
        {
            "run_dir": str(tmp_path),
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "backend": {"kind": "local", "model": MODEL, "scorer": {"kind": "vllm", "base_url": vllm}},
        }
    )
    async with open_backend(config) as backend:
        findings = await examine_backend(backend, MODEL, examples[:4], Findings())
    print(f"\n{findings.text()}")
    assert findings.ok
    assert findings.sigma_example is not None
    assert findings.sigma_example < TOLERANCE


async def test_the_doctor_recognises_it(vllm: str, examples: list[EncodedExample]) -> None:
    config = context(Endpoint(vllm), "echo").config
    async with open_backend(config) as backend:
        findings = await examine_backend(backend, MODEL, examples[:4], Findings())
    # vLLM trains nothing: it has no route of jobs and does not answer questions about a base model.
    assert [c.name for c in findings.checks if c.ok is False] == ["base model", "fine-tuning jobs"]
    assert any("dialect: vllm" in a for a in findings.advice)
