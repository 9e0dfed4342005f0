"""The objectives of :mod:`daunce_api.providers.objective`, computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.tokenizers import EncodedExample
from ..objective import Objective
from .head import Head, log_sum_exp, token_statistics
from .lora import Active, AdaptedModel, Positions, pad


def combine(
    objective: Objective, nats: Tensor, margin: Tensor, shift: Tensor, nats_0: Tensor, margin_0: Tensor, xi: Tensor
) -> Tensor:
    """Value of the objective for each example (R,), from the examples' mean nats, mean margin and <g, z - z_0>."""
    if objective.kind == "subset":
        return nats
    signed = objective.rho * (2 * xi - 1)
    if objective.kind == "influence":
        return objective.gamma * (nats - nats_0) - (1 + signed) * shift
    return objective.gamma * (margin - margin_0) ** 2 - signed * shift


@dataclass(frozen=True)
class Reference:
    """theta_0's view of one example: last hidden states (targets, width), log sum exp (targets,), mean nats, margin."""

    hidden: Tensor
    log_sum: Tensor
    nats: float
    margin: float


class References:
    """theta_0's hidden states, kept for as many examples as fit in ``keep_bytes`` and recomputed for the others."""

    def __init__(self, model: AdaptedModel, head: Head, start: Active | None, keep_bytes: int) -> None:
        self.head = head
        self._model, self._start = model, start
        self._room = keep_bytes
        self._kept: dict[str, Reference] = {}

    def of(self, examples: Sequence[EncodedExample]) -> list[Reference]:
        """One answer an example, in order."""
        found: dict[str, Reference] = {}
        for example in examples:
            key = example.key
            if key in found:
                continue
            reference = self._kept.get(key) or self._compute(example)
            found[key] = reference
            size = reference.hidden.nbytes + reference.log_sum.nbytes
            if key not in self._kept and size <= self._room:
                self._room -= size
                self._kept[key] = reference
        return [found[e.key] for e in examples]

    def _compute(self, example: EncodedExample) -> Reference:
        positions = positions_of([example], self._model.device)
        inputs = pad([example.ids[: example.targets[-1]]], self._model.device)
        with self._model.using(self._start), torch.no_grad():
            hidden = self._model.hidden(inputs, positions)
            nats, margin, _ = token_statistics(hidden, self.head, positions.target, with_margin=True)
            return Reference(hidden, log_sum_exp(hidden, self.head), nats.mean().item(), margin.mean().item())


def row_values(
    model: AdaptedModel,
    head: Head,
    objective: Objective,
    examples: Sequence[EncodedExample],
    references: Sequence[Reference],
    xi: Sequence[float],
    head_0: Head | None = None,
) -> tuple[Tensor, Tensor]:
    """Objective and mean nats per completion token of each example (R,), under the weights that are in force.

    ``references`` and ``xi`` are empty for ``subset``; ``head_0`` is theta_0's output head where it is another one.
    """
    positions = positions_of(examples, model.device)
    inputs = pad([e.ids[: e.targets[-1]] for e in examples], model.device)
    hidden = model.hidden(inputs, positions)
    if not objective.perturbed:
        nats, _, _ = token_statistics(hidden, head, positions.target)
        mean = _per_example(nats, positions.row, len(examples))
        return mean, mean.detach()
    hidden_0 = torch.cat([r.hidden for r in references])
    log_sum_0 = torch.cat([r.log_sum for r in references])
    with_margin = objective.kind == "fisher"
    statistics = token_statistics(
        hidden, head, positions.target, hidden_0, log_sum_0, head_0=head_0, with_margin=with_margin
    )
    mean, margin, shift = (_per_example(v, positions.row, len(examples)) for v in statistics)
    fixed = torch.tensor([[r.nats for r in references], [r.margin for r in references], list(xi)], dtype=mean.dtype)
    nats_0, margin_0, drawn = fixed.to(mean.device)
    return combine(objective, mean, margin, shift, nats_0, margin_0, drawn), mean.detach()


def positions_of(examples: Sequence[EncodedExample], device: torch.device) -> Positions:
    """The positions before each target token, and the target tokens."""
    row = [r for r, e in enumerate(examples) for _ in e.targets]
    column = [t - 1 for e in examples for t in e.targets]
    target = [e.ids[t] for e in examples for t in e.targets]
    return Positions(*(torch.tensor(v, device=device) for v in (row, column, target)))


def _per_example(values: Tensor, row: Tensor, count: int) -> Tensor:
    row = row.to(values.device)
    counts = torch.bincount(row, minlength=count)
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, row, values) / counts
