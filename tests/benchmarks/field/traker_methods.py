"""traker 0.3.2: TRAK by its authors."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tests.benchmarks.field.cells import Method, Result
from tests.benchmarks.field.dattri_methods import ENSEMBLE, _room
from tests.benchmarks.field.simple import GRADIENTS
from tests.benchmarks.field.subjects import Subject


def _output(subject: Subject) -> Any:
    from trak.modelout_functions import AbstractModelOutput

    class Output(AbstractModelOutput):
        """Margin, and 1 - p, per completion token where there are several."""

        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
            return subject.margins(functional_call(model, (weights, buffers), (x[None],)), y[None]).sum()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            with torch.no_grad():
                p = functional_call(model, (weights, buffers), (x,)).softmax(-1)
                wrong = 1 - p.gather(-1, y.clamp(min=0)[..., None])[..., 0]
                if y.ndim > 1:
                    known = (y >= 0).float()
                    wrong = (wrong * known).sum(1) / known.sum(1)
            return wrong[:, None]

    return Output()


def trak(subject: Subject, models: int, lambda_reg: float, projection: int = 512) -> Result:
    """TRAK, in single precision as a CPU has no fast half."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    projection = _room(subject, projection, lambda_reg)
    states = [subject.target] if models == 1 else (subject.checkpoints or [])[:models]
    buffers = dict(subject.model.state_dict())
    size = sum(p.numel() for p in subject.model.parameters())
    projector = BasicProjector(
        grad_dim=size,
        proj_dim=projection,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device="cpu",
        block_size=projection,
    )
    with tempfile.TemporaryDirectory() as folder:
        solver = TRAKer(
            model=subject.model,
            task=_output(subject),
            train_set_size=len(subject.train[0]),
            save_dir=folder,
            device="cpu",
            projector=projector,
            proj_dim=projection,
            use_half_precision=False,
            lambda_reg=lambda_reg,
            logging_level=logging.ERROR,
        )
        step = 100
        for i, state in enumerate(states):
            solver.load_checkpoint(buffers | (state or {}), model_id=i)
            for first in range(0, len(subject.train[0]), step):
                batch = [t[first : first + step] for t in subject.train]
                solver.featurize(batch, num_samples=len(batch[0]))
        solver.finalize_features()
        if models == 1:  # the library has freed the matrix and makes a new one only for another model
            projector.generate_sketch_matrix(projector.generator_states[0])
        for i, state in enumerate(states):
            solver.start_scoring_checkpoint(
                "test", buffers | (state or {}), model_id=i, num_targets=len(subject.test[0])
            )
            for first in range(0, len(subject.test[0]), step):
                batch = [t[first : first + step] for t in subject.test]
                solver.score(batch, num_samples=len(batch[0]))
        scores = torch.as_tensor(solver.finalize_scores("test").copy()).float().numpy()
    trained = subject.checkpoint_seconds if models > 1 else 0.0
    return Result([scores], trained, f"{projection} dimensions")


METHODS = tuple(
    Method(
        f"TRAK-{models} (traker)",
        ENSEMBLE if models > 1 else GRADIENTS,
        trak,
        {"models": models, "lambda_reg": 0.0},
        tuple({"models": models, "lambda_reg": v} for v in (1.0, 1e2, 1e4, 1e6)),
    )
    for models in (1, 10)
)
