"""Fine-tune on chosen training examples through a run's own backend, and read the losses of its test examples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from daunce_api import Run
from daunce_api.data.subsets import Ensemble
from daunce_api.evaluation.retraining import question_losses, retraining

Mask = NDArray[np.bool_]


def retrained_losses(run: Run, name: str, masks: Mapping[str, list[Mask]]) -> dict[str, NDArray[np.float64]]:
    """(S, M) test losses in nats per completion token of models trained on the S masks under each label.

    A mask is (N,) bool over the training examples; one that is listed twice is trained with two seeds. The models
    live in ``RUN/evaluation/NAME-DIGEST``: the same call resumes where it was interrupted. Raises any DaunceError, and
    SystemExit where a model could not be trained.
    """
    rows = [mask for group in masks.values() for mask in group]
    labels = [label for label, group in masks.items() for _ in group]
    design = Ensemble(np.stack(rows), np.random.default_rng(0).integers(2**31, size=len(rows)), 0)
    truth = retraining(run, f"{name}-{design.digest[:8]}", design)
    truth.measure()
    measured = question_losses(truth)
    if len(measured.models) < len(rows):
        raise SystemExit(f"{len(rows) - len(measured.models)} models could not be trained; see {truth.run_dir}")
    return {label: measured.loss_SM[np.array(labels) == label] for label in masks}
