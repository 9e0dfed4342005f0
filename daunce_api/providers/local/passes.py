"""Log-probabilities of many sequences under one fine-tune, several in a pass: on a CPU to the same bits as one in a
pass, elsewhere in passes of fixed shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from ...errors import CapabilityError
from .head import SLICE_ELEMENTS
from .lora import Active, ActiveFull, AdaptedModel, Positions

WIDTH = 16
"""Sequences are padded to a multiple of this, so that few shapes occur."""
PASS_TOKENS = 256
"""Padded tokens of a pass. SmolLM2 gains nothing from more, and a pass that is not full wastes less."""
HEAD_TOKENS = 64
"""Hidden states that go through the output head at once."""


@dataclass(frozen=True, slots=True)
class PassSizes:
    """``width``: what sequences are padded to a multiple of. ``tokens``: padded tokens of a pass. ``head_tokens``:
    hidden states that go through the output head at once, fewer where they make more than ``head_elements`` logits."""

    width: int = WIDTH
    tokens: int = PASS_TOKENS
    head_tokens: int = HEAD_TOKENS
    head_elements: int = SLICE_ELEMENTS


ACCELERATOR = PassSizes(width=64, tokens=4096, head_tokens=1024, head_elements=1 << 25)
"""A GPU's time goes by passes more than by tokens. Not tuned on one."""

Scored = tuple[Sequence[int], Sequence[int]]
"""Token ids, and the indices (from 1) of those whose log-probabilities are asked for."""

_Shape = tuple[int, frozenset[tuple[str, int]]]
"""Padded width, and the rank of every adapted module."""


class ScoringPasses:
    """Scores sequences with one copy of a model; not safe for several threads beyond what ``AdaptedModel.using`` is.

    On a CPU the answer for a sequence is defined by that sequence alone: right-padded to a multiple of ``WIDTH``
    tokens in a pass of its own, its targets' hidden states through the output head ``HEAD_TOKENS`` at a time. Passes
    of several rows are only a faster way to the same bits. Whether they are is found out, not assumed: matrix kernels
    may add in another order in a larger product, but the order follows from shapes and not from values, so the first
    full pass of every shape is repeated row by row, and where a single bit differs that shape stays at one row a pass.

    On other devices one row a pass would be many times slower, and larger products mostly do have other bits. There
    every pass of a width has the same number of rows, empty ones where sequences are missing, so that an answer still
    does not depend on what else is asked as far as kernels keep to the rule above. Nothing checks that they do.
    """

    def __init__(self, model: AdaptedModel, *, fixed: bool | None = None) -> None:
        """``fixed``: passes of fixed shapes, whatever their bits; default: on every device but a CPU."""
        self._model = model
        self._same_bits: dict[_Shape, bool] = {}
        self._fixed = model.device.type != "cpu" if fixed is None else fixed
        self._sizes = ACCELERATOR if self._fixed else PassSizes()
        self._supported = _rows_are_apart(model, fixed=self._fixed)

    def supports(self, active: Active | None) -> bool:
        """Whether sequences are padded and put together under this fine-tune.

        Not for full fine-tunes; in 8 bits, where one row's outliers are taken out of all rows; for mixtures of experts,
        whose shapes depend on values; for positions that depend on the padded length; and for output heads that are
        adapted or not plain. On a CPU not in half precision or 4 bits either: padding alone moves an example's loss by
        half of what half precision itself does (RESULTS-local.md), and one row a pass costs little more there.
        """
        if not self._supported or isinstance(active, ActiveFull):
            return False
        return active is None or all(self._model.modules[n] is not self._model.head for n in active.weights)

    def logprobs(self, sequences: Sequence[Scored], active: Active | None) -> list[NDArray[np.float64]]:
        """Log-probabilities (nats) of each sequence's targets, in order."""
        adapters = () if active is None or isinstance(active, ActiveFull) else active.weights.items()
        ranks = frozenset((name, a.shape[0]) for name, (a, _) in adapters)
        answers = [np.zeros(0) for _ in sequences]
        step = self._sizes.width
        score = self._in_fixed_shapes if self._fixed else self._of_width
        by_width: dict[int, list[int]] = {}
        for i, (ids, targets) in enumerate(sequences):
            if targets:
                by_width.setdefault(step * -(-(len(ids) - 1) // step), []).append(i)
        with self._model.using(active), torch.inference_mode():
            for width, chosen in by_width.items():
                found = score((width, ranks), [sequences[i] for i in chosen])
                for i, answer in zip(chosen, found, strict=True):
                    answers[i] = answer
        return answers

    def _of_width(self, shape: _Shape, sequences: Sequence[Scored]) -> Iterable[NDArray[np.float64]]:
        width = shape[0]
        rows = max(1, self._sizes.tokens // width)
        for first in range(0, len(sequences), rows):
            group = sequences[first : first + rows]
            same = self._same_bits.get(shape)
            if rows > 1 and same is None and len(group) == rows:
                together, alone = self._pass(width, rows, group), self._alone(width, group)
                self._same_bits[shape] = all(map(np.array_equal, together, alone))
                yield from alone
            elif rows > 1 and same and 2 * len(group) > rows:  # fewer are faster alone than among empty rows
                yield from self._pass(width, rows, group)
            else:
                yield from self._alone(width, group)

    def _in_fixed_shapes(self, shape: _Shape, sequences: Sequence[Scored]) -> Iterable[NDArray[np.float64]]:
        width, first = shape[0], 0
        while first < len(sequences):
            rows = max(1, self._sizes.tokens // width)
            group = sequences[first : first + rows]
            try:
                answers = self._pass(width, rows, group)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                self._sizes = replace(self._sizes, tokens=rows // 2 * width)
                continue
            yield from answers
            first += len(group)

    def _alone(self, width: int, group: Sequence[Scored]) -> list[NDArray[np.float64]]:
        return [answer for sequence in group for answer in self._pass(width, 1, [sequence])]

    def _pass(self, width: int, rows: int, group: Sequence[Scored]) -> list[NDArray[np.float64]]:
        device = self._model.device
        inputs = torch.zeros(rows, width, dtype=torch.long)
        for row, (ids, _) in enumerate(group):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        row_of = torch.tensor([row for row, (_, targets) in enumerate(group) for _ in targets])
        column = torch.tensor([t - 1 for _, targets in group for t in targets])
        target = torch.tensor([ids[t] for ids, targets in group for t in targets])
        hidden = self._model.hidden(inputs.to(device), Positions(row_of, column, target))
        found = self._head(hidden, target)
        ends = np.cumsum([len(targets) for _, targets in group]).tolist()
        return [found[a:b].numpy() for a, b in zip([0, *ends], ends, strict=False)]

    def _head(self, hidden: Tensor, target: Tensor) -> Tensor:
        """log p (n,) of ``target`` after ``hidden`` (n, width), in products of one size whatever n is."""
        head = self._model.output
        size = max(1, min(self._sizes.head_tokens, self._sizes.head_elements // head.vocabulary))
        found = []
        for first in range(0, len(target), size):
            states, wanted = hidden[first : first + size], target[first : first + size]
            empty = states.new_zeros(size - len(states), states.shape[1])
            logits = head.logits(torch.cat([states, empty]), 0, head.vocabulary).double()
            own = logits[: len(wanted)].gather(1, wanted[:, None].to(logits.device))[:, 0]
            found.append(own - logits.logsumexp(1)[: len(wanted)])
        return torch.cat(found).cpu()


def _rows_are_apart(model: AdaptedModel, *, fixed: bool) -> bool:
    kept = {torch.float32, torch.float64} | ({torch.bfloat16, torch.float16} if fixed else set())
    for name, parameter in model.parameters.items():
        four_bit = fixed and type(parameter).__name__ == "Params4bit"  # bitsandbytes', which need not be installed
        if model.own_weights[name].dtype not in kept and not four_bit:
            return False
    config: PretrainedConfig = model.model.config
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return False
    positions = f"{getattr(config, 'rope_parameters', None)} {getattr(config, 'rope_scaling', None)}"
    if "dynamic" in positions or "longrope" in positions:
        return False
    try:
        return bool(model.output)
    except CapabilityError:
        return False
