"""kronfluence 1.0.1: EK-FAC."""

from __future__ import annotations

import copy
import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.benchmarks.field.cells import Method, Result
from tests.benchmarks.field.simple import GRADIENTS
from tests.benchmarks.field.subjects import Subject

Batch = tuple[Tensor, Tensor]


def _library_task(subject: Subject) -> Any:
    from kronfluence.task import Task

    class Fit(Task):
        """Loss and its version with labels drawn from the model, for the Fisher matrix."""

        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            logits = model(x)
            if sample:
                drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
                y = torch.where(y >= 0, drawn, y)
            return subject.losses(logits, y).sum()

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return subject.losses(model(batch[0]), batch[1]).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return subject.layers

        def get_attention_mask(self, batch: Batch) -> Tensor | None:
            if subject.texts is None:
                return None
            return ((batch[1] >= 0).flip(1).cumsum(1).flip(1) > 0).long()  # the library counts tokens in integers

    return Fit()


def ekfac(subject: Subject, damping: float | None, strategy: str = "ekfac") -> Result:
    """EK-FAC influence of the target; damping None is the library's heuristic."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    logging.disable(logging.WARNING)
    task = _library_task(subject)
    model = prepare_model(copy.deepcopy(subject.model), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "peers", model, task, cpu=True, output_dir=folder, disable_tqdm=True, disable_model_save=True
        )
        train, test = TensorDataset(*subject.train), TensorDataset(*subject.test)
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=100, factor_args=FactorArguments(strategy=strategy)
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            test,
            train,
            per_device_query_batch_size=50,
            per_device_train_batch_size=100,
            score_args=ScoreArguments(damping_factor=damping),
        )
        found = analyzer.load_pairwise_scores("scores")["all_modules"]
    logging.disable(logging.NOTSET)
    return Result([found.T.float().numpy()])


METHODS = (
    Method(
        "EK-FAC (kronfluence)",
        GRADIENTS,
        ekfac,
        {"damping": 1e-8},
        tuple({"damping": d} for d in (1e-4, 1e-3, 1e-2, 1e-1)),
    ),
    Method("EK-FAC (kronfluence), damping None", GRADIENTS, ekfac, {"damping": None}),
)
