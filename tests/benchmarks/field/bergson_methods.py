"""bergson 2.5.1 on a CPU: projected gradients of every module and their autocorrelation as the preconditioner."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.field.cells import Method, Result
from tests.benchmarks.field.simple import GRADIENTS
from tests.benchmarks.field.subjects import Subject


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class _Transformer(nn.Module):
    """What the library asks of a transformer: a device, a type, and logits as an attribute."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, tokens: Tensor) -> _Output:
        """Logits of the next token at every position."""
        return _Output(self.inner(tokens))


def preconditioned(subject: Subject, damping: float, projection: int = 16) -> Result:
    """Module by module: query gradient times the inverse autocorrelation of training gradients times train gradient."""
    from bergson.collector.collector import CollectorComputer
    from bergson.collector.in_memory_collector import InMemoryCollector
    from bergson.config.config import IndexConfig, InversionConfig
    from bergson.gradients import GradientProcessor
    from bergson.hessians.preconditioner import DensePreconditioner
    from datasets import Dataset

    logging.disable(logging.INFO)
    model: Any = _Transformer(subject.model)
    processor = GradientProcessor(projection_dim=projection)

    def gradients(side: tuple[Tensor, Tensor], fit: bool, config: Any) -> dict[str, Tensor]:
        # the library shifts labels by one, the subject's are shifted already: a first token that is no label
        last = torch.zeros_like(side[0][:, :1])
        tokens = torch.cat([side[0], last], dim=1).tolist()
        labels = torch.cat([last - 100, side[1]], dim=1).tolist()
        data = Dataset.from_dict({"input_ids": tokens, "labels": labels})
        collector: Any = InMemoryCollector(
            model=model,
            processor=processor,
            target_modules={f"inner.{name}" for name in subject.layers},
            data=data,
            cfg=config,
            skip_hessians=not fit,
        )
        batches = [list(range(i, min(i + 20, len(data)))) for i in range(0, len(data), 20)]
        computer = CollectorComputer(model=model, data=data, collector=collector, batches=batches, cfg=config)
        with contextlib.redirect_stdout(io.StringIO()):
            computer.run_with_collector_hooks()  # leaves the losses in the folder
        return {name: g.float() for name, g in collector.gradients.items()}

    with tempfile.TemporaryDirectory(suffix=".part") as folder:
        config = IndexConfig(run_path=folder.removesuffix(".part"), loss_reduction="mean")
        train = gradients(subject.train, True, config)
        queries = gradients(subject.test, False, config)
    solver = DensePreconditioner.from_processor(processor, inversion_cfg=InversionConfig(damping_factor=damping))
    test = solver.apply(queries)
    score = torch.stack([train[name] @ test[name].float().T for name in train]).sum(0)
    logging.disable(logging.NOTSET)
    return Result([score.numpy()])


METHODS = (
    Method(
        "bergson",
        GRADIENTS,
        preconditioned,
        {"damping": 0.1},
        tuple({"damping": d} for d in (1e-3, 1e-2, 1.0, 10.0)),
        refuses=lambda task: "" if task == "lm" else "needs a transformer",
    ),
)
