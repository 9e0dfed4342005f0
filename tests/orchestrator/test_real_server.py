"""The orchestrator on real jobs over HTTP, and the plan against what the server says it trained on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from daunce_api.backends.registry import capabilities_of, open_backend, open_tokenizer
from daunce_api.budget import make_plan
from daunce_api.config import RunConfig
from daunce_api.dataset import Dataset
from daunce_api.ensemble import plan_ensemble
from daunce_api.orchestrator import Orchestrator
from daunce_api.store import RunStore

WORDS = ["amber", "basalt", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "lagoon"]


@pytest.mark.slow
def test_tokens_planned_are_tokens_trained(tmp_path: Path) -> None:
    """Within 2 % of what the embedded server reports (they are the same ids, so in fact equal), and cleaned up."""
    config = RunConfig.from_mapping(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {"train": "a", "test": "b"},
            "backend": {"kind": "embedded", "model": "daunce-tiny"},
            "ensemble": {"members": 3},
            "training": {"hyperparameters": {"n_epochs": 2}},
        }
    )
    records = [
        {
            "messages": [
                {"role": "user", "content": f"What is {w}?"},
                {"role": "assistant", "content": f"{w} " * (i + 1)},
            ]
        }
        for i, w in enumerate(WORDS)
    ] + [{"prompt": f"{w}: ", "completion": f"a {w}, naïve “quoted” 東京 🙂"} for w in WORDS]
    train = Dataset.from_records(records, name="train.jsonl")
    trainer, scorer = capabilities_of(config)
    plan = make_plan(config, train, train, open_tokenizer(config), trainer, scorer)
    plan.check()

    async def main(store: RunStore) -> None:
        async with open_backend(config) as backend:
            orchestrator = Orchestrator(
                backend.trainer,
                store,
                ensemble=plan_ensemble(len(train), 3, 0.5, 0, trainer.min_examples),
                dataset=train,
                config=config,
                costs=plan.costs,
            )
            outcome = await orchestrator.run()
            assert set(outcome.models) == {0, 1, 2}
            reported = {j.member: j.trained_tokens for j in store.jobs()}
            assert reported == plan.training_tokens
            again = await orchestrator.run()
            assert again.models == outcome.models
            report = await orchestrator.clean()
            assert (sorted(report.models), len(report.files), report.kept) == (sorted(outcome.models.values()), 3, {})

    with RunStore.create_or_open(config.run_dir, {"config": config.model_dump(mode="json")}) as store:
        asyncio.run(main(store))
