"""dattri 0.3.0: influence by conjugate gradients, Arnoldi and DataInf, TRAK, TracIn, LoGra."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.field.cells import Method, Result
from tests.benchmarks.field.simple import GRADIENTS
from tests.benchmarks.field.subjects import Subject

HESSIAN_EXAMPLES = {"fashion": 500, "resnet": 200, "lm": 40}  # of all it would take minutes to hours a setting
ENSEMBLE = "10 models of the same recipe, gradients"


def _loader(side: tuple[Tensor, Tensor], batch: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*side), batch_size=batch, shuffle=False)


def _function(subject: Subject, values: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """f(parameters, (x, y)): the mean over one example or a batch."""
    dims = subject.train[0].ndim

    def mean(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (data[0][None], data[1][None]) if data[0].ndim < dims else data
        return values(functional_call(subject.model, parameters, (x,)), y).mean()

    return mean


def _states(subject: Subject, count: int) -> list[Any]:
    chosen = [subject.target] if count == 1 else (subject.checkpoints or [])[:count]
    buffers = dict(subject.model.state_dict())
    return [buffers | (state or {}) for state in chosen]


def _task(subject: Subject, count: int, values: Callable[[Tensor, Tensor], Tensor]) -> Any:
    from dattri.task import AttributionTask

    return AttributionTask(_function(subject, values), subject.model, _states(subject, count))


def influence(subject: Subject, kind: str, regularization: float, models: int = 1) -> Result:
    """g_j^T (H + regularization)^-1 g_i with the library's solvers."""
    from dattri.algorithm import influence_function as library

    task = _task(subject, models, subject.losses)
    solver = getattr(library, f"IFAttributor{kind}")(task, regularization=regularization)
    count = HESSIAN_EXAMPLES.get(subject.name, len(subject.train[0]))
    note = "" if count == len(subject.train[0]) or kind == "DataInf" else f"Hessian of {count} training examples"
    if kind == "DataInf":
        solver.cache(_loader(subject.train, 16))
        score = solver.attribute(_loader(subject.train, len(subject.train[0])), _loader(subject.test, 16))
    else:
        pick = torch.randperm(len(subject.train[0]), generator=torch.Generator().manual_seed(0))[:count]
        solver.cache(_loader((subject.train[0][pick], subject.train[1][pick]), count))
        test = len(subject.test[0])
        score = solver.attribute(_loader(subject.train, len(subject.train[0])), _loader(subject.test, test))
    return Result([score.detach().numpy()], subject.checkpoint_seconds if models > 1 else 0.0, note)


def trak(subject: Subject, regularization: float, models: int, projection: int = 512) -> Result:
    """TRAK on margins. Projections of more dimensions than examples are singular without regularization."""
    from dattri.algorithm.trak import TRAKAttributor

    task = _task(subject, models, subject.margins)
    loss = _function(subject, subject.losses)
    projection = _room(subject, projection, regularization)
    solver = TRAKAttributor(
        task,
        correct_probability_func=lambda parameters, data: torch.exp(-loss(parameters, data)),
        projector_kwargs={"proj_dim": projection},
        regularization=regularization,
    )
    with torch.no_grad():
        solver.cache(_loader(subject.train, 100))
        score = solver.attribute(_loader(subject.test, 100))
    trained = subject.checkpoint_seconds if models > 1 else 0.0
    return Result([score.detach().numpy()], trained, f"{projection} dimensions")


def _room(subject: Subject, projection: int, regularization: float) -> int:
    return projection if regularization else min(projection, len(subject.train[0]) // 2)


def tracin(subject: Subject, models: int) -> Result:
    """TracIn on final models with the library's projection to 512."""
    from dattri.algorithm.tracin import TracInAttributor

    task = _task(subject, models, subject.losses)
    solver = TracInAttributor(task, weight_list=torch.ones(models), normalized_grad=False)
    score = solver.attribute(_loader(subject.train, 250), _loader(subject.test, len(subject.test[0])))
    return Result([score.detach().numpy()], subject.checkpoint_seconds if models > 1 else 0.0)


class _Sequence(nn.Module):
    """A linear layer that sees each example as a sequence of one, which is what LoGra's hooks expect."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the layer."""
        out: Tensor = self.inner(x.unsqueeze(-2)).squeeze(-2)
        return out


def logra(subject: Subject, damping: float | None) -> Result:
    """LoGra on linear layers (the library's only kind): of a ResNet the last layer alone."""
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    model = copy.deepcopy(subject.model)
    layers = [n for n in subject.layers if isinstance(model.get_submodule(n), nn.Linear)]
    if subject.texts is None:
        for name in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _Sequence(model.get_submodule(name)))  # type: ignore[arg-type]
        layers = [f"{name}.inner" for name in layers]

    def loss(net: nn.Module, data: tuple[Tensor, Tensor], device: str) -> Tensor:
        return subject.losses(net(data[0]), data[1]).sum()

    task = AttributionTask(loss, model, {n: t.clone() for n, t in model.state_dict().items()})
    with tempfile.TemporaryDirectory() as folder:
        solver = LoGraAttributor(task, layer_names=layers, damping=damping, cache_dir=folder)
        solver.cache(_loader(subject.train, 50))
        score = solver.attribute(_loader(subject.train, 50), _loader(subject.test, 50))
    return Result([score.detach().numpy()], note=f"{len(layers)} linear layers")


def _slow(task: str) -> str:
    return "ten models take ten times the time of one" if task in HESSIAN_EXAMPLES else ""


DAMPINGS = tuple({"regularization": r} for r in (1e-3, 1e-2, 1e-1, 1.0))


def _with(grid: tuple[dict[str, Any], ...], **fixed: Any) -> tuple[dict[str, Any], ...]:
    return tuple({**fixed, **g} for g in grid)


METHODS = (
    Method(
        "dattri IF-CG",
        GRADIENTS,
        influence,
        {"kind": "CG", "regularization": 0.0},
        _with(DAMPINGS, kind="CG"),
    ),
    Method(
        "dattri IF-CG, 10 models",
        ENSEMBLE,
        influence,
        {"kind": "CG", "regularization": 0.0, "models": 10},
        _with(DAMPINGS[1:3], kind="CG", models=10),
        refuses=_slow,
    ),
    Method(
        "dattri Arnoldi",
        GRADIENTS,
        influence,
        {"kind": "Arnoldi", "regularization": 0.0},
        _with(DAMPINGS[1:3], kind="Arnoldi"),
    ),
    Method(
        "dattri DataInf",
        GRADIENTS,
        influence,
        {"kind": "DataInf", "regularization": 0.0},
        _with(DAMPINGS[1:3], kind="DataInf"),
    ),
    *(
        Method(
            f"dattri TRAK-{models}",
            ENSEMBLE if models > 1 else GRADIENTS,
            trak,
            {"regularization": 0.0, "models": models},
            tuple({"regularization": r, "models": models} for r in TRAK_GRID),
        )
        for TRAK_GRID in [(1e-4, 1e-2, 1.0, 100.0)]
        for models in (1, 10)
    ),
    Method("dattri TracIn", GRADIENTS, tracin, {"models": 1}),
    Method("dattri TracIn, 10 models", ENSEMBLE, tracin, {"models": 10}),
    Method("dattri LoGra", GRADIENTS, logra, {"damping": None}, tuple({"damping": d} for d in (1e-3, 1e-2, 1e-1, 1.0))),
)
