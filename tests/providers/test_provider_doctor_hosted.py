"""What the doctor tries where models need a place first: nothing is deployed, no base model loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from provider_support import BATCH, Server, run_config
from sdk_support import Service

pytest.importorskip("fireworks")
pytest.importorskip("together")

import test_provider_azure as azure_tests
import test_provider_fireworks as fireworks_tests
import test_provider_together as together_tests

from daunce_api.cli.doctor import Findings, examine_backend, fine_tunes_of
from daunce_api.providers import azure
from daunce_api.providers.base import JobStatus
from daunce_api.providers.fireworks import scorer as fireworks_scorer
from daunce_api.providers.hosting import HostedScorer
from daunce_api.providers.registry import Backend
from daunce_api.providers.together import scorer as together_scorer
from daunce_api.store import RunStore


async def examined(trainer: Any, scorer: Any, model: str, examples: Any = BATCH, **options: Any) -> Findings:
    async with trainer, scorer:
        return await examine_backend(Backend(trainer, scorer), model, examples, Findings(), **options)


def detail(findings: Findings, name: str) -> str:
    return next(c.detail for c in findings.checks if c.name == name)


async def test_fireworks_is_asked_for_the_base_model_on_its_deployment_without_loading_it() -> None:
    models = Service().on("GET /v1/accounts/fireworks/models/base-8b", {"name": fireworks_tests.BASE})
    models.on(f"GET {fireworks_tests.JOBS}", {"supervisedFineTuningJobs": []})
    loads, server = Service(), Server(fireworks_tests.echo())
    inner = fireworks_scorer.open_scorer(server.context(run_config("fireworks")))
    scorer = HostedScorer(inner, fireworks_tests.deployment(loads))
    findings = await examined(fireworks_tests.make(models), scorer, fireworks_tests.BASE)
    assert findings.ok
    assert detail(findings, "log-probabilities").startswith("6 of 15 tokens")
    assert loads.requests == []
    assert server.body()["model"] == f"{fireworks_tests.BASE}#accounts/me/deployments/d"


@pytest.mark.parametrize("trained", [True, False])
async def test_together_is_tried_with_a_fine_tune_of_the_run_or_not_at_all(trained: bool) -> None:
    options = {"project_id": "p", "endpoint_id": "ep_1", "deployment_id": "dep_1"}
    attached, server = together_tests.attaching(), Server(together_tests.echo())
    config = run_config("together", model=together_tests.BASE, tokenizer="daunce-tiny", options=options)
    inner = together_scorer.TogetherScorer(server.client(), config)
    scorer = HostedScorer(inner, together_tests.adapter_host(attached))
    findings = await examined(
        together_tests.make(together_tests.service().on("GET /v1/fine-tunes", {"data": []})),
        scorer,
        together_tests.BASE,
        [together_tests.EXAMPLE],
        fine_tunes=["me/m"] if trained else [],
    )
    assert findings.ok
    if trained:
        assert detail(findings, "log-probabilities of").startswith("me/m, since Together does not serve")
        assert "nats per token" in detail(findings, "log-probabilities")
        assert attached.paths[-1] == f"DELETE {together_tests.ADAPTERS}/dad_1"
    else:
        assert "cannot be tried before a member is trained" in detail(findings, "log-probabilities")
        assert "No problems found; log-probabilities were not tested." in findings.text()
        assert (attached.requests, server.requests) == ([], [])


@pytest.mark.parametrize("makes_deployments", [True, False])
async def test_azure_is_never_made_to_deploy(makes_deployments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_MANAGEMENT_TOKEN", "token-marked")
    options = azure_tests.RESOURCE if makes_deployments else {}

    def handler(request: Any) -> Any:
        if request.url.path.endswith("/models/gpt-4o-mini"):
            return {"id": "gpt-4o-mini"}
        if request.url.path.endswith("/fine_tuning/jobs"):
            return {"data": [], "has_more": False}
        assert request.url.host != "management.azure.com"
        return azure_tests.answer(azure_tests.LISTED)

    server = Server(handler)
    context = server.context(azure_tests.config(**options), azure_tests.URL)
    question = [azure_tests.question()]
    for known in ([], ["ft:m:target"]):
        trainer, scorer = azure.open_trainer(context), azure.open_scorer(context)
        findings = await examine_backend(
            Backend(trainer, scorer), "gpt-4o-mini", question, Findings(), fine_tunes=known
        )
        assert findings.ok
        assert findings.tried is (bool(known) and not makes_deployments)
        words = "billed by the hour" if makes_deployments else "before a member is trained"
        assert findings.tried or words in detail(findings, "log-probabilities")
    asked = [p for p in server.paths if p.startswith("POST")]
    assert all("/deployments/ft:m:target/" in p for p in asked)
    assert bool(asked) is not makes_deployments


def test_the_runs_own_models_are_known_to_the_doctor(tmp_path: Path) -> None:
    config = run_config("together", run_dir=str(tmp_path), ensemble={"members": 8})
    assert fine_tunes_of(config) == []
    with RunStore.create_or_open(tmp_path, {"config": {}}) as store:
        store.jobs.intent("k", 3, 1, "{}")
        store.jobs.submitted("k", "job")
        store.jobs.state("k", JobStatus.SUCCEEDED, "me/m3")
    assert fine_tunes_of(config) == ["me/m3"]
    started = {"members": 8, "start_from": "target", "target_model": "me/t"}
    assert fine_tunes_of(run_config("together", run_dir=str(tmp_path), ensemble=started)) == ["me/t", "me/m3"]
    with RunStore.open(tmp_path):  # a process works on the run, and may have loaded them
        assert fine_tunes_of(config) == []
