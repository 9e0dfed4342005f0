"""Azure's deployments: made and deleted, undone where they fail, found again by another process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from provider_support import KEY, Server, polling, run_config

from daunce_api._util.clock import InstantClock
from daunce_api.errors import ConfigurationError, RejectedError, StopError, TransientError
from daunce_api.providers.azure import AzureScorerOptions, DeploymentHost, azure_options, management_token, name_of
from daunce_api.providers.hosting import Pool
from daunce_api.store import RunStore

AZURE = {"subscription": "sub", "resource_group": "group", "account": "acct"}
MODEL = "ft:gpt-4o-mini:x"


class Management:
    """Deployments by name, as Azure's management service keeps them. ``states`` are used up by GET; ``token`` is the
    one that is valid."""

    def __init__(self, *states: Any, token: str = KEY) -> None:
        self.states = list(states)
        self.token = token
        self.deployed: set[str] = set()
        self.server = Server(self)

    def __call__(self, request: httpx2.Request) -> Any:
        if request.headers["authorization"] != f"Bearer {self.token}":
            return httpx2.Response(401, json={"error": {"code": "ExpiredAuthenticationToken", "message": "expired"}})
        name = request.url.path.rsplit("/", 1)[-1]
        if request.method == "DELETE":
            known = name in self.deployed
            self.deployed.discard(name)
            return httpx2.Response(202 if known else 404, json={})
        if request.method == "PUT":
            self.deployed.add(name)
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, httpx2.Response):
            return state
        return {"properties": {"provisioningState": state}}

    @property
    def methods(self) -> list[str]:
        return [r.method for r in self.server.requests]

    def host(self, token: Callable[[], str] = lambda: KEY, clock: InstantClock | None = None) -> DeploymentHost:
        options = AzureScorerOptions(**AZURE)
        return polling(DeploymentHost(self.server.http(), options, token), clock)


BUSY = httpx2.Response(503, json={"error": {"message": "busy"}})


async def test_a_redirect_is_no_answer_of_the_management_service() -> None:
    """A deployment that counts as deleted and is not goes on costing by the hour."""
    away = httpx2.Response(302, headers={"location": "https://login.test"})
    server = Server(lambda _: away)
    host = DeploymentHost(server.http(), AzureScorerOptions(**AZURE), lambda: KEY)
    with pytest.raises(RejectedError, match="answered 302 to deleting the deployment"):
        await host.unload(MODEL)


async def test_azure_deploys_a_fine_tune_and_deletes_the_deployment() -> None:
    azure, clock = Management("Creating", BUSY, "Succeeded"), InstantClock()
    host = azure.host(clock=clock)
    name = await host.load(MODEL)
    assert clock.now() == 30.0
    put = azure.server.requests[0]
    assert put.method == "PUT"
    assert put.url.path.endswith(
        f"/subscriptions/sub/resourceGroups/group/providers/Microsoft.CognitiveServices/accounts/acct/deployments/{name}"
    )
    assert put.url.params["api-version"]
    assert azure.server.body(0)["properties"]["model"] == {"format": "OpenAI", "name": MODEL, "version": "1"}
    await host.unload(MODEL)
    assert azure.deployed == set()
    await host.unload(MODEL)


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
    with pytest.raises(kind) as info:
        await Management(answer).host().load("ft:m")
    assert KEY not in str(info.value)


@pytest.mark.parametrize(
    ("states", "kind"),
    [
        (("Creating", BUSY), RejectedError),  # for an hour
        (("Creating", "Failed"), RejectedError),
        (("Creating", httpx2.Response(403, json={"error": {"message": "no"}})), StopError),
    ],
)
async def test_what_does_not_come_up_is_deleted(states: tuple[Any, ...], kind: type[Exception], tmp_path: Path) -> None:
    azure = Management(*states)
    with RunStore.create_or_open(tmp_path, {"config": {}}) as store:
        pool = Pool(azure.host(), InstantClock(), store.hosted)
        with pytest.raises(kind):
            async with pool.serving(MODEL):
                pass
        assert azure.methods[-1] == "DELETE"
        assert azure.deployed == set()
        assert store.hosted.models() == []
        await pool.close()


async def test_the_token_is_read_at_every_request(tmp_path: Path) -> None:
    path = tmp_path / "token"
    options = AzureScorerOptions(**AZURE, management_token_file=path)
    path.write_text("first\n")
    azure = Management("Succeeded", token="first")
    host = azure.host(lambda: management_token(options))
    await host.load(MODEL)
    path.write_text("second\n")
    azure.token = "second"
    await host.unload(MODEL)
    assert azure.deployed == set()


async def test_a_token_in_the_environment_may_be_renewed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    options = AzureScorerOptions(**AZURE)
    for token in ("first", "second"):
        monkeypatch.setenv("AZURE_MANAGEMENT_TOKEN", token)
        assert management_token(options) == token


@pytest.mark.parametrize("content", [None, "", "two words", "schlüssel"])
def test_a_token_file_without_a_token_is_refused_by_its_name(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=str(path)) as info:
        management_token(AzureScorerOptions(**AZURE, management_token_file=path))
    assert not content or content not in str(info.value)


async def test_a_deployment_that_an_expired_token_left_is_deleted_by_the_next_process(tmp_path: Path) -> None:
    azure = Management("Succeeded")
    with RunStore.create_or_open(tmp_path, {"config": {}}) as store:
        pool = Pool(azure.host(), InstantClock(), store.hosted)
        async with pool.serving(MODEL):
            pass
        azure.token = "renewed-0123456789"
        with pytest.raises(StopError, match=r"AZURE_MANAGEMENT_TOKEN.*daunce-.* may be up.*daunce clean") as info:
            await pool.close()
        assert KEY not in str(info.value)
        assert store.hosted.models() == [MODEL]
    with RunStore.create_or_open(tmp_path, {"config": {}}) as store:
        pool = Pool(azure.host(lambda: azure.token), InstantClock(), store.hosted)
        for model in store.hosted.models():
            await pool.take_off(model)
        assert (azure.deployed, store.hosted.models()) == (set(), [])


def test_names_follow_from_models() -> None:
    assert name_of("a") == name_of("a") != name_of("b")


def test_half_an_azure_resource_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="give all three"):
        azure_options(run_config("azure", options={"account": "x"}))
