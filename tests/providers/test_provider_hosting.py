"""Models that a server holds a few of at once: loaded when needed, kept while used, unloaded to make room."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from provider_support import BATCH, KEY, Server, body_of, run_config, truth
from test_provider_prompt_logprobs import completions

from daunce_api.backends.azure import AzureScorerOptions, azure_options
from daunce_api.backends.azure_deployments import DeploymentHost
from daunce_api.backends.base import ScorerCapabilities, TokenScores
from daunce_api.backends.hosting import HostedScorer, Pool
from daunce_api.backends.openai_wire import adapters
from daunce_api.clock import InstantClock
from daunce_api.errors import ConfigurationError, RejectedError, StopError, TransientError
from daunce_api.tokens import EncodedExample


class FakeHost:
    """Records what is loaded, and fails the test where more than the limit is."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: set[str] = set()
        self.loads: list[str] = []
        self.failing: set[str] = set()
        self.closed = False

    async def load(self, model: str) -> str:
        await asyncio.sleep(0)
        if model in self.failing:
            self.failing.discard(model)
            raise RejectedError(f"{model} does not load")
        self.loads.append(model)
        self.held.add(f"served-{model}")
        assert len(self.held) <= self.limit
        return f"served-{model}"

    async def unload(self, model: str, served: str) -> None:
        await asyncio.sleep(0)
        self.held.remove(served)

    async def close(self) -> None:
        self.closed = True


class Inner:
    """A scorer that insists on models that are held."""

    capabilities = ScorerCapabilities("inner", "any")
    fingerprint = "inner"

    def __init__(self, host: FakeHost) -> None:
        self.host = host

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        for _ in range(3):
            assert model in self.host.held
            await asyncio.sleep(0)
        return [TokenScores((-1.0,)) for _ in batch]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


@given(
    limit=st.integers(1, 4),
    order=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=25),
    failing=st.sets(st.sampled_from("abcdef"), max_size=2),
)
def test_never_more_than_the_limit_and_never_unloaded_while_used(
    limit: int, order: list[str], failing: set[str]
) -> None:
    async def run() -> None:
        host = FakeHost(limit)
        host.failing = set(failing)
        async with HostedScorer(Inner(host), host) as scorer:
            done = await asyncio.gather(*(scorer.score(m, BATCH) for m in order), return_exceptions=True)
        assert all(isinstance(d, list | RejectedError) for d in done)
        assert sum(isinstance(d, list) for d in done) == 0 or host.loads
        assert host.held == set()
        assert host.closed

    asyncio.run(run())


async def test_members_stay_hot_and_the_least_recently_used_makes_room() -> None:
    host = FakeHost(2)
    pool = Pool(host)
    for model in ("a", "a", "b", "a", "c", "a", "b"):
        async with pool.serving(model) as served:
            assert served == f"served-{model}"
    assert host.loads == ["a", "b", "c", "b"]
    await pool.close()
    assert host.held == set()


async def test_a_model_that_did_not_load_is_tried_again() -> None:
    host = FakeHost(1)
    host.failing = {"a"}
    pool = Pool(host)
    with pytest.raises(RejectedError):
        async with pool.serving("a"):
            pass
    async with pool.serving("a"):
        pass
    assert host.loads == ["a"]


async def test_a_cancelled_user_leaves_nothing_loaded_behind() -> None:
    host = FakeHost(1)
    pool = Pool(host)

    async def use() -> None:
        async with pool.serving("a"):
            pass

    task = asyncio.create_task(use())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await pool.close()
    assert host.held == set()


# vLLM's adapters.


class Vllm:
    """Loads adapters like vLLM does, and answers completions of those only."""

    def __init__(self, runtime: bool = True) -> None:
        self.runtime = runtime
        self.adapters: dict[str, str] = {}

    def __call__(self, request: httpx2.Request) -> Any:
        path, body = request.url.path, body_of(request)
        if path.endswith("lora_adapter") and not self.runtime:
            return httpx2.Response(404, json={"detail": "Not Found"})
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return httpx2.Response(400, json={"error": {"message": "has already been loaded", "code": 400}})
            if "missing" in body["lora_path"]:
                return httpx2.Response(404, json={"error": {"message": "No adapter found", "code": 404}})
            self.adapters[body["lora_name"]] = body["lora_path"]
            return httpx2.Response(200, text="Success: LoRA adapter added.")
        if path == "/v1/unload_lora_adapter":
            if self.adapters.pop(body["lora_name"], None) is None:
                return httpx2.Response(404, json={"error": {"message": "adapter cannot be found", "code": 404}})
            return httpx2.Response(200, text="Success")
        assert body["model"] == "base" or body["model"] in self.adapters
        return completions()(request)


def adapter(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / adapters.WEIGHTS).write_bytes(content)
    return folder


def hosted(vllm: Vllm, run_dir: Path, **options: Any) -> tuple[Any, Server]:
    server = Server(vllm)
    config = run_config("openai_wire", "vllm", model="base", options=options, run_dir=str(run_dir))
    return adapters.open_scorer(server.context(config)), server


async def test_members_are_loaded_scored_and_unloaded_within_the_limit(tmp_path: Path) -> None:
    for i in range(3):
        adapter(tmp_path / "local" / "models" / f"ft-{i}", bytes([i]))
    vllm = Vllm()
    scorer, server = hosted(vllm, tmp_path)
    async with scorer:
        for i in (0, 0, 1, 2):
            served = {}
            (scores, *_) = await scorer.score(f"ft-{i}", BATCH)
            served = set(vllm.adapters)
            assert len(served) == 1
            assert scores.logprobs == truth(served.pop(), BATCH[0])
    assert vllm.adapters == {}
    assert server.paths.count("POST /v1/load_lora_adapter") == 3


async def test_names_stand_for_weights_not_for_places(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "a", b"same"), adapter(tmp_path / "b", b"same")
    other = adapter(tmp_path / "c", b"other")
    vllm = Vllm()
    scorer, _ = hosted(vllm, tmp_path, max_adapters=4)
    names = [await scorer.pool.host.load(str(p)) for p in (one, two, other)]
    assert names[0] == names[1] != names[2]
    assert await scorer.pool.host.load("base") == "base"
    await scorer.pool.host.unload("base", "base")


async def test_paths_are_those_that_the_server_sees(tmp_path: Path) -> None:
    adapter(tmp_path / "shared" / "ft-1", b"x")
    vllm = Vllm()
    scorer, _ = hosted(vllm, tmp_path, local_root=str(tmp_path / "shared"), server_root="/mnt/adapters/")
    await scorer.pool.host.load(str(tmp_path / "shared" / "ft-1"))
    assert list(vllm.adapters.values()) == ["/mnt/adapters/ft-1"]
    adapter(tmp_path / "elsewhere", b"y")
    with pytest.raises(RejectedError, match="not inside local_root"):
        await scorer.pool.host.load(str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigurationError, match="go together"):
        hosted(vllm, tmp_path, server_root="/mnt")


async def test_what_does_not_load_says_what_to_do(tmp_path: Path) -> None:
    adapter(tmp_path / "ft-1", b"x")
    scorer, _ = hosted(Vllm(runtime=False), tmp_path)
    with pytest.raises(RejectedError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        await scorer.pool.host.load(str(tmp_path / "ft-1"))
    adapter(tmp_path / "missing", b"z")
    scorer, _ = hosted(Vllm(), tmp_path)
    with pytest.raises(RejectedError, match="No adapter found"):
        await scorer.pool.host.load(str(tmp_path / "missing"))
    with pytest.raises(RejectedError, match="no adapter folder"):
        await scorer.pool.host.load("ft-unknown")
    await scorer.pool.host.unload("ft", "never-loaded")


@pytest.mark.parametrize("route", ["completions", "echo"])
async def test_names_that_are_served_already_are_used_as_they_are(route: str, tmp_path: Path) -> None:
    scorer, _ = hosted(Vllm(), tmp_path, adapters=False, route=route)
    assert not isinstance(scorer, HostedScorer)
    assert scorer.capabilities.scope == "any"


# Azure's deployments.

AZURE = {"subscription": "sub", "resource_group": "group", "account": "acct"}


async def test_azure_deploys_a_fine_tune_and_deletes_the_deployment() -> None:
    states = iter(["Creating", "Creating", "Succeeded"])
    server = Server(
        lambda r: (
            httpx2.Response(202)
            if r.method == "DELETE"
            else httpx2.Response(200, json={"properties": {"provisioningState": next(states)}})
        )
    )
    clock = InstantClock()
    host = DeploymentHost(server.http(), AzureScorerOptions(**AZURE), KEY, clock=clock)
    name = await host.load("ft:gpt-4o-mini:x")
    assert clock.now() == 30.0
    put = server.requests[0]
    assert put.method == "PUT"
    assert put.url.path.endswith(
        f"/subscriptions/sub/resourceGroups/group/providers/Microsoft.CognitiveServices/accounts/acct/deployments/{name}"
    )
    assert put.url.params["api-version"]
    assert server.body(0)["properties"]["model"] == {"format": "OpenAI", "name": "ft:gpt-4o-mini:x", "version": "1"}
    await host.unload("ft:gpt-4o-mini:x", name)
    assert server.requests[-1].method == "DELETE"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (httpx2.Response(200, json={"properties": {"provisioningState": "Failed"}}), RejectedError),
        (httpx2.Response(403, json={"error": {"code": "AuthorizationFailed", "message": f"no {KEY}"}}), StopError),
        (httpx2.Response(429, json={"error": {"message": "slow"}}), TransientError),
        (httpx2.Response(200, content=b"<html>"), TransientError),
    ],
)
async def test_azure_failures(answer: httpx2.Response, kind: type[Exception]) -> None:
    host = DeploymentHost(Server(lambda _: answer).http(), AzureScorerOptions(**AZURE), KEY, clock=InstantClock())
    with pytest.raises(kind) as info:
        await host.load("ft:m")
    assert KEY not in str(info.value)


def test_half_an_azure_resource_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="give all three"):
        azure_options(run_config("azure", options={"account": "x"}))


def test_the_example_config_of_local_training_and_vllm_scoring_is_valid() -> None:
    from daunce_api.backends.registry import SCORERS, scorer_kind
    from daunce_api.config import RunConfig

    path = Path(__file__).parents[2] / "examples" / "local_training_vllm_scoring.yaml"
    config = RunConfig.from_yaml(path)
    assert (config.backend.kind, scorer_kind(config)) == ("local", "vllm")
    assert SCORERS["vllm"].module.endswith("adapters")
    options = adapters.vllm_options(config)
    assert options.max_adapters == 4
    capabilities = adapters.scorer_capabilities(config)
    assert (capabilities.scope, capabilities.max_context_tokens) == ("any", 4096)
    from daunce_api.backends.local.options import HYPERPARAMETERS

    assert set(config.training.hyperparameters) <= HYPERPARAMETERS["lora"]
