"""Ground truth for evaluations: models retrained on chosen subsets through the run's own backend.

Each experiment is a run folder inside the run's folder: it is resumed, paid for, cancelled and cleaned like a run. Its
models start from the base with the target's recipe, never serve as members, and are asked about the test examples
alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._util.blocking import run_blocking
from .._util.log import logging_to
from ..config import RunConfig
from ..core import per_example_losses
from ..data.subsets import Ensemble
from ..errors import BudgetError, StoreError
from ..execution import booked, tokens_of
from ..plan import Plan, make_plan
from ..plan.epochs import epochs_of
from ..plan.tokens import count
from ..providers.registry import capabilities_of, open_backend
from ..run import DATA_FOLDER, LOG_NAME, Run
from ..score.cache import open_cache
from ..score.client import Progress, ScoringClient
from ..store import RunStore
from ..train import JobClient, OnEvent, Training

EVALUATION_FOLDER = "evaluation"


@dataclass(frozen=True, eq=False)
class TruthLosses:
    """What the retrained models say.

    Attributes:
        models: which of the asked models are there (those that failed for good are left out), ascending.
        inclusion_SN: (S, N) bool, what each of them was trained on.
        loss_SM: (S, M) their losses, as the run measures them.
    """

    models: tuple[int, ...]
    inclusion_SN: NDArray[np.bool_]
    loss_SM: NDArray[np.float64]

    def by_subset(self) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """(S', N) different subsets and (S', M) losses, averaged over the models of each that are there."""
        subset, of = np.unique(self.inclusion_SN, axis=0, return_inverse=True)
        of = of.ravel()
        return subset, np.stack([self.loss_SM[of == s].mean(axis=0) for s in range(len(subset))])


class Truth:
    """Models retrained on the subsets of an ensemble, kept in ``RUN/evaluation/name``.

    ``models``: only the first so many are asked for (default: all), which are :attr:`ensemble`. The others stay part of
    the folder, so that a folder with more models can be asked for fewer.
    """

    def __init__(self, run: Run, name: str, design: Ensemble, *, models: int | None = None) -> None:
        self._run = run
        self._design = design
        self.ensemble = Ensemble(design.inclusion_KN[:models], design.seeds_K[:models], design.target_seed)
        self.folder = run.run_dir / EVALUATION_FOLDER / name
        self.config = _config_of(run.config, self.folder, name, design)

    def plan(self) -> Plan:
        """Jobs, tokens and dollars of the whole experiment; nothing is sent. ``budget.max_usd`` holds for it alone."""
        run = self._run
        shape = self.config.ensemble.model_copy(update={"members": self.ensemble.members})
        config = self.config.model_copy(update={"ensemble": shape})
        trainer, scorer = capabilities_of(config)
        plan = make_plan(
            config, run.train, run.test, run.encoded, trainer, scorer, design=self.ensemble, questions_only=True
        )
        plan = replace(plan, refusals=tuple(r for r in plan.refusals if not isinstance(r, BudgetError)))
        cap = config.budget.max_usd
        if cap is not None and (plan.usd is None or plan.usd > cap):
            price = "has no known price" if plan.usd is None else f"costs about ${plan.usd:,.2f}"
            refusal = BudgetError(
                f"This experiment {price}, and budget.max_usd is ${cap:,.2f}. Nothing was spent. Ask for fewer models, "
                "or raise the cap in the run's config."
            )
            plan = replace(plan, refusals=(*plan.refusals, refusal))
        return plan

    def missing(self) -> int:
        """How many of the models asked for are not trained and scored yet. Nothing is sent."""
        try:
            with RunStore.open(self.folder, read_only=True) as store:
                return self.ensemble.members - len(self._complete(store))
        except StoreError:
            return self.ensemble.members

    def measure(self, *, on_event: OnEvent | None = None, on_progress: Progress | None = None) -> TruthLosses:
        """Train and score what is missing; the same call again does only that.

        Raises any DaunceError; what was trained and scored is kept.
        """
        return run_blocking(self._measure(on_event, on_progress))

    def kept(self) -> TruthLosses:
        """What is measured by now; nothing is trained. Raises StoreError where the experiment was never started."""
        with RunStore.open(self.folder, read_only=True) as store:
            return self._losses(store)

    async def _measure(self, on_event: OnEvent | None, on_progress: Progress | None) -> TruthLosses:
        plan = self.plan()
        if self.missing():  # what is there can be read whatever the plan would refuse now
            plan.check()
        with RunStore.create_or_open(self.folder, self._manifest()) as store, logging_to(self.folder / LOG_NAME):
            self._keep_data()
            if len(self._complete(store)) < self.ensemble.members:
                await self._train_and_score(store, plan, on_event, on_progress)
            return self._losses(store)

    async def _train_and_score(
        self, store: RunStore, plan: Plan, on_event: OnEvent | None, on_progress: Progress | None
    ) -> None:
        config, examples = self.config, self._run.material.encoded_test
        cost, tokens = plan.scoring_usd_per_model or 0.0, tokens_of(examples)
        cache = open_cache(config)
        with cache or nullcontext():
            async with open_backend(config) as backend:
                plan.check_model(await backend.trainer.model_info(config.backend.model))
                client = ScoringClient(
                    backend.scorer,
                    store,
                    concurrency=config.scoring.concurrency,
                    on_progress=on_progress,
                    cache=cache,
                )

                async def score(member: int, model: str) -> None:
                    subject = f"scoring of member {member}"
                    with booked(store, subject, cost, tokens, member, cap=config.budget.max_usd):
                        await client.score_member(member, model, examples)

                jobs = JobClient(
                    backend.trainer,
                    store,
                    # Jobs of models that are not asked for now may have to be booked.
                    costs=replace(plan, training_tokens=self._tokens(self._design)).costs,
                    cap=config.budget.max_usd,
                    on_event=on_event,
                )
                training = Training(jobs, ensemble=self.ensemble, dataset=self._run.train, config=config)
                await training.run(score, finished=self._complete(store))

    def _tokens(self, ensemble: Ensemble) -> dict[int, int]:
        """Billed training tokens of each model."""
        run, config = self._run, self.config
        counts = count(config, run.train, run.test, run.encoded, *capabilities_of(config))
        tokens = {}
        for k in range(ensemble.members):
            subset = ensemble.subset(k)
            epochs, _ = epochs_of(config, len(subset), target=False)
            tokens[k] = epochs * sum(counts.training_N[i] for i in subset)
        return tokens

    def _complete(self, store: RunStore) -> list[int]:
        ids = store.scores.find_ids(self._run.material.encoded_test)
        return [k for k in range(self.ensemble.members) if store.scores.has_all(ids, k)]

    def _losses(self, store: RunStore) -> TruthLosses:
        models = self._complete(store)
        ids = store.scores.find_ids(self._run.material.encoded_test).tolist()
        loss = np.empty((len(models), len(ids)))
        for row, k in enumerate(models):
            answers = store.scores.load(k).scores()
            loss[row] = per_example_losses([answers[i].logprobs for i in ids], self.config.attribution.loss)
        return TruthLosses(tuple(models), self.ensemble.inclusion_KN[models], loss)

    def _keep_data(self) -> None:
        """With the examples in it, the folder is a run folder: `daunce status`, `cancel` and `clean` take it."""
        for side, dataset in (("train", self._run.train), ("test", self._run.test)):
            path = self.folder / DATA_FOLDER / f"{side}.jsonl"
            if not path.exists():
                dataset.to_jsonl(path)

    def _manifest(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "train_digest": self._run.train.digest,
            "test_digest": self._run.test.digest,
            "tokenizer": self._run.tokenizer.fingerprint,
        }


def kept_models(run: Run, name: str) -> int:
    """How many models the folder ``RUN/evaluation/name`` was last started with; 0 where there is none."""
    try:
        with RunStore.open(run.run_dir / EVALUATION_FOLDER / name, read_only=True) as store:
            return int(store.manifest["config"]["ensemble"]["members"])
    except StoreError:
        return 0


def _config_of(config: RunConfig, folder: Path, name: str, ensemble: Ensemble) -> RunConfig:
    """The run's config with the experiment's place and models, and the target's recipe for each of them."""
    shape, training = config.ensemble, config.training
    hyperparameters = training.target_hyperparameters or training.hyperparameters
    return config.model_copy(
        update={
            "name": f"{config.name[: 39 - len(name)]}-{name}",
            "run_dir": folder,
            "ensemble": shape.model_copy(
                update={
                    "members": ensemble.members,
                    "subset_ratio": min(float(ensemble.inclusion_KN.mean()), 1 - 1 / ensemble.inclusion_KN.shape[1]),
                    "start_from": "base",
                    "target_model": None,
                    "stop": None,
                    "checkpoints": 1,
                }
            ),
            "training": training.model_copy(
                update={"hyperparameters": hyperparameters, "target_hyperparameters": None, "min_members": 2}
            ),
            "scoring": config.scoring.model_copy(update={"noise_probe": 0, "target": False}),
        }
    )
