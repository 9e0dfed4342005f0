"""Models that a server holds a few of at once: loaded when needed, kept while used, unloaded to make room."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from provider_support import BATCH, Server, body_of, encoded, run_config, truth
from test_provider_prompt_logprobs import completions

from daunce_api._util.clock import InstantClock
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import ConfigurationError, RejectedError, StopError, TransientError
from daunce_api.providers import vllm as adapters
from daunce_api.providers.base import ScorerCapabilities, TokenScores
from daunce_api.providers.hosting import Host, HostedScorer, Pool
from daunce_api.providers.polling import Poll
from daunce_api.score.client import ScoringClient
from daunce_api.store import RunStore


class FakeHost(Host):
    """Records what is loaded, and fails the test where more than the limit is."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.held: set[str] = set()
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.failing: set[str] = set()
        self.refusals: list[Exception] = []
        self.stuck: asyncio.Event | None = None
        self.reached = asyncio.Event()
        self.closed = False

    async def create(self, model: str) -> tuple[str, str, Mapping[str, Any]]:
        await asyncio.sleep(0)
        if model in self.failing:
            self.failing.discard(model)
            raise RejectedError(f"{model} does not load")
        self.loads.append(model)
        self.held.add(f"served-{model}")
        assert len(self.held) <= self.limit
        self.reached.set()
        if self.stuck is not None:
            await self.stuck.wait()
        return f"served-{model}", model, {}

    async def listed(self, model: str) -> list[str]:
        return [model]

    async def delete(self, loaded: str, model: str) -> None:
        await asyncio.sleep(0)
        if self.refusals:
            raise self.refusals.pop(0)
        self.unloads.append(model)
        self.held.discard(f"served-{model}")

    async def close(self) -> None:
        self.closed = True


class Records:
    """What a store keeps, in a list."""

    def __init__(self, *models: str) -> None:
        self.models = list(models)

    def load_intent(self, model: str) -> None:
        self.models.append(model)

    def unloaded(self, model: str) -> None:
        self.models.remove(model)


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


async def test_a_load_that_failed_or_was_interrupted_is_undone() -> None:
    """The host had done its part already; nobody would ever take it off again."""
    host, records = FakeHost(2), Records()
    pool = Pool(host, InstantClock(), records)
    host.stuck = asyncio.Event()

    async def use() -> None:
        async with pool.serving("a"):
            pass

    task = asyncio.create_task(use())
    await host.reached.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert records.models == ["a"]
    await asyncio.wait_for(pool.close(), 30.0)
    assert (host.held, host.unloads, records.models) == (set(), ["a"], [])
    host.stuck, host.failing = None, {"b"}
    with pytest.raises(RejectedError, match="b does not load"):
        async with Pool(host, InstantClock(), records).serving("b"):
            pass
    assert (host.unloads, records.models) == (["a", "b"], [])


async def test_what_cannot_be_taken_off_is_tried_again_and_stays_written_down() -> None:
    host, records, clock = FakeHost(2), Records("a"), InstantClock()
    pool = Pool(host, clock, records)
    async with pool.serving("b"):
        pass
    host.refusals = [TransientError("busy"), TransientError("busy")]
    await pool.take_off("a")
    assert 3.0 <= clock.now() <= 6.0
    host.refusals = [StopError("expired")] * 2
    with pytest.raises(StopError):
        await pool.close()
    assert host.closed
    assert (host.held, records.models) == ({"served-b"}, ["b"])
    scorer = HostedScorer(Inner(host), host, clock=clock)
    scorer.record(records)
    host.refusals = [TransientError("busy")] * 3
    kept = await scorer.take_off(["b"])
    assert kept["b"].startswith("busy Given up after 3 tries in ")
    assert await scorer.take_off(["b"]) == {}
    assert (host.held, records.models) == (set(), [])
    host.refusals = [StopError("expired")]
    records.models = ["c"]
    with pytest.raises(StopError):
        await scorer.take_off(["c"])


async def test_a_member_whose_place_was_not_freed_is_taken_off_at_the_end() -> None:
    host, records = FakeHost(1), Records()
    pool = Pool(host, InstantClock(), records)
    async with pool.serving("a"):
        pass
    host.refusals = [RejectedError("locked")]
    with pytest.raises(RejectedError):
        async with pool.serving("b"):
            pass
    await pool.close()
    assert (host.held, records.models) == (set(), [])


# vLLM's adapters.


class Vllm:
    """Loads adapters like vLLM does, and answers completions of those and of the base model only."""

    def __init__(self, runtime: bool = True, base: str = "base", answer: Any = None) -> None:
        self.runtime = runtime
        self.base = base
        self.answer = answer or completions()
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
        assert body["model"] == self.base or body["model"] in self.adapters
        return self.answer(request)


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
    scorer, server = hosted(vllm, tmp_path, max_adapters=4)
    names = [await scorer.pool.host.load(str(p)) for p in (one, two, other)]
    assert names[0] == names[1] != names[2]
    async with scorer.pool.serving("base") as served:
        assert served == "base", "it takes no place"
    requests = len(server.requests)
    assert len(server.requests) == requests
    # Another process finds the name again; a folder that is gone is no error.
    again, _ = hosted(vllm, tmp_path, max_adapters=4)
    await again.pool.host.unload(str(one))
    assert list(vllm.adapters) == [names[2]]
    await again.pool.host.unload(str(tmp_path / "gone"))


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
    await scorer.pool.host.unload("ft-unknown")
    await scorer.pool.host.unload(str(tmp_path / "missing"))


async def test_names_that_are_served_already_are_used_as_they_are(tmp_path: Path) -> None:
    scorer, _ = hosted(Vllm(), tmp_path, adapters=False)
    assert not isinstance(scorer, HostedScorer)
    assert scorer.capabilities.scope == "any"


def test_the_example_config_of_local_training_and_vllm_scoring_is_valid() -> None:
    from daunce_api.config import RunConfig
    from daunce_api.providers.registry import SCORERS, scorer_kind

    path = Path(__file__).parents[2] / "examples" / "local_training_vllm_scoring.yaml"
    config = RunConfig.from_yaml(path)
    assert (config.backend.kind, scorer_kind(config)) == ("local", "vllm")
    assert SCORERS["vllm"].endswith("vllm")
    options = adapters.vllm_options(config)
    assert options.max_adapters == 4
    capabilities = adapters.scorer_capabilities(config)
    assert (capabilities.scope, capabilities.max_context_tokens) == ("any", 4096)
    from daunce_api.providers.local.options import LoraSettings, hyperparameters_of

    assert set(config.training.hyperparameters) <= set(hyperparameters_of(LoraSettings))


async def test_a_host_is_waited_for_a_while_and_no_longer() -> None:
    clock, looks = InstantClock(), iter([TransientError("busy"), {"state": "LOADING"}, {"state": "READY"}])

    async def look() -> dict[str, str]:
        answer = next(looks)
        if isinstance(answer, TransientError):
            raise answer
        return answer

    def ready(answer: Mapping[str, Any]) -> bool:
        return bool(answer["state"] == "READY")

    begun = clock.now()
    with pytest.raises(RejectedError, match="adapter m was not ready after 2 minutes"):
        await Poll(60.0, 2, clock).until(ready, {"state": "LOADING"}, look, "adapter m")
    assert clock.now() - begun == 120.0
    await Poll(60.0, 2, clock).until(ready, {"state": "LOADING"}, look, "adapter m")


async def test_a_loaded_model_is_scored_while_another_is_being_unloaded() -> None:
    unloading, go_on = asyncio.Event(), asyncio.Event()

    class Slow(FakeHost):
        async def unload(self, model: str) -> None:
            unloading.set()
            await go_on.wait()
            await super().unload(model)

    pool = Pool(Slow(2), InstantClock())
    async with pool.serving("a"):
        pass
    async with pool.serving("b"):
        pass

    async def use(model: str) -> str:
        async with pool.serving(model) as served:
            return served

    waiting = asyncio.create_task(use("c"))
    await unloading.wait()
    await asyncio.wait_for(use("b"), 30.0)
    again = asyncio.create_task(use("a"))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert not again.done()
    go_on.set()
    await asyncio.wait_for(asyncio.gather(waiting, again), 30.0)
    await pool.close()


async def test_who_gives_up_waiting_for_room_leaves_the_unloading_to_its_end() -> None:
    go_on = asyncio.Event()

    class Slow(FakeHost):
        async def unload(self, model: str) -> None:
            await go_on.wait()
            await super().unload(model)

    host = Slow(1)
    pool = Pool(host, InstantClock())
    async with pool.serving("a"):
        pass

    async def use(model: str) -> None:
        async with pool.serving(model):
            pass

    gone = asyncio.create_task(use("b"))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    go_on.set()
    await asyncio.wait_for(use("c"), 30.0)
    await pool.close()
    assert host.held == set()


TAKING_TURNS = [encoded([1, 2, 3 + i], [2], f"e{i}") for i in range(6)]


async def test_every_member_is_loaded_once_however_many_are_ready(tmp_path: Path) -> None:
    """Members take turns on a server that holds only a few of them: whole members, not requests."""
    for limit in (1, 2):
        host = FakeHost(limit)
        scorer = HostedScorer(Inner(host), host)
        assert scorer.capabilities.max_models == limit
        with RunStore.create_or_open(tmp_path / str(limit), {"config": {}}) as store:
            async with scorer:
                client = ScoringClient(scorer, store, concurrency=4)

                async def member(number: int, client: ScoringClient = client) -> None:
                    await client.score_member(number, f"m{number}", TAKING_TURNS, twice=TAKING_TURNS[:2])

                await asyncio.gather(*(member(i) for i in range(5)))
        assert sorted(host.loads) == [f"m{i}" for i in range(5)]
