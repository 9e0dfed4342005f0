"""Models retrained on chosen subsets, to compare predictions with: runs with another design, scored on questions alone.

Each lives in ``RUN/evaluation/NAME`` and is resumed, paid for, cancelled and cleaned like a run. Its models start from
the base with the target's recipe, and never serve as members.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..attribution.matrices import loss_matrix
from ..config import RunConfig
from ..core import resolve_censored
from ..data.subsets import Ensemble
from ..errors import StoreError
from ..run import Run
from ..store import RunStore

EVALUATION_FOLDER = "evaluation"


@dataclass(frozen=True, eq=False)
class RetrainedLosses:
    """What the retrained models say.

    Attributes:
        models: which models of the design are scored, ascending; those that failed for good are left out.
        inclusion_SN: (S, N) bool, what each of them was trained on.
        loss_SM: (S, M) their losses of the questions, as the run measures them; NaN for a question of which a
            model gave only a lower bound.
    """

    models: tuple[int, ...]
    inclusion_SN: NDArray[np.bool_]
    loss_SM: NDArray[np.float64]

    def by_subset(self) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """(S', N) distinct subsets and (S', M) losses, averaged over the models of each that are scored."""
        subset, of = np.unique(self.inclusion_SN, axis=0, return_inverse=True)
        of = of.ravel()
        return subset, np.stack([self.loss_SM[of == s].mean(axis=0) for s in range(len(subset))])


def retraining(run: Run, name: str, design: Ensemble, *, wanted: int | None = None) -> Run:
    """The run that trains a model on each subset of ``design`` and scores it on the questions of ``run``.

    ``wanted``: only the first models (default: all); the others stay part of the folder. Nothing is written or
    sent before :meth:`Run.measure`.
    """
    folder = run.run_dir / EVALUATION_FOLDER / name
    shape, training = run.config.ensemble, run.config.training
    inclusion = design.inclusion_KN
    config: RunConfig = run.config.model_copy(
        update={
            "name": f"{run.config.name[: 39 - len(name)]}-{name}",
            "run_dir": folder,
            "ensemble": shape.model_copy(
                update={
                    "members": design.members,
                    "subset_ratio": min(float(inclusion.mean()), 1 - 1 / inclusion.shape[1]),
                    "start_from": "base",
                    "target_model": None,
                    "stop": None,
                    "checkpoints": 1,
                }
            ),
            "training": training.model_copy(
                update={
                    "hyperparameters": training.target_hyperparameters or training.hyperparameters,
                    "target_hyperparameters": None,
                    "min_members": 2,
                }
            ),
            "scoring": run.config.scoring.model_copy(update={"noise_probe": 0, "target": False}),
            "attribution": run.config.attribution.model_copy(update={"estimator": "auto"}),
        }
    )
    retrained = Run.of(
        config, run.train, run.test, design=design, wanted=wanted, questions_only=True, purpose="retrain"
    )
    retrained.share_encoding(run)
    return retrained


def kept_shape(run: Run, name: str) -> tuple[int, float]:
    """How many models the design of ``RUN/evaluation/NAME`` has, and their share of the training set; 0 models where it
    was never started."""
    try:
        with RunStore.open(run.run_dir / EVALUATION_FOLDER / name, read_only=True) as store:
            shape = store.manifest["config"]["ensemble"]
            return int(shape["members"]), float(shape["subset_ratio"])
    except StoreError:
        return 0, 0.0


def question_losses(run: Run) -> RetrainedLosses:
    """The losses of the models of a run that are scored on all its questions by now.

    Raises StoreError where it was never started.
    """
    material = run.material
    with RunStore.open(run.run_dir, read_only=True) as store:
        models = run.trained_members(store)
        ids = store.scores.find_ids(material.encoded_test)
        loss, censored = loss_matrix(store, [(k, 0) for k in models], ids, run.config.attribution.loss)
    # A bound of one model is no measurement to rank the others against.
    known = np.asarray(resolve_censored(loss, censored, max_share=0.0), dtype=np.float64)
    return RetrainedLosses(tuple(models), material.ensemble.inclusion_KN[models], known)
