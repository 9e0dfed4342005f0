"""Log-probabilities of many sequences under one fine-tune, several in a padded pass; the fine-tunes that are held in
memory; and what fits into it, in bytes and in tokens."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from ...errors import ConfigurationError
from .adapters import CONFIG, WEIGHTS, load_adapter, shapes_of
from .lora import Active, ActiveFull, ActiveLora, AdaptedModel, Batch
from .losses import Head, token_nats
from .models import is_full, load_full

CPU_TOKENS = 768
"""Padded tokens of a training pass on a CPU; 1,024 and 2,048 are 3 % faster with the embedded model, and take a quarter
more memory and twice as much (RESULTS-local.md)."""
CPU_PASS_BYTES = 1 << 30
"""What a training pass may take on a CPU by :func:`token_bytes`: large models gain nothing from longer passes."""
GPU_TOKENS = 16384
SCORED_TOKENS = 512
"""Of a scoring pass on a CPU, which gains nothing from more."""
WASTE = 96
"""Padding, in tokens, that costs as much as one more pass. It decides about speed alone."""

Scored = tuple[Sequence[int], Sequence[int]]
"""Token ids, and the indices (from 1) of those whose log-probabilities are wanted."""


def passes_of(lengths: Sequence[int], max_tokens: int, alone_above: int | None = None) -> list[list[int]]:
    """Indices of ``lengths`` above 0 in passes of at most ``max_tokens`` padded tokens (a longer single row is a pass
    of its own), the longest first: a pass ends where its padding would cost more than another pass. The same lengths
    give the same passes. Rows above ``alone_above`` are alone."""
    passes: list[list[int]] = []
    longest, waste = 0, 0
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i)):
        waste += longest - lengths[i]
        full = not passes or (len(passes[-1]) + 1) * longest > max_tokens or waste > WASTE
        if full or (alone_above is not None and longest > alone_above):
            passes.append([])
            longest, waste = lengths[i], 0
        passes[-1].append(i)
    return passes


class OutOfMemoryError(ConfigurationError):
    """Not even the smallest piece of work fits into memory."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"out of memory: {what}. Set backend.options.gradient_checkpointing: true, dtype: bfloat16, quantisation: "
            "8bit or 4bit, fewer workers, a smaller lora_rank or shorter examples; for a model that one machine cannot "
            "hold use kind: tinker with a Tinker-compatible server."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or in this process."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def default_budget(device: torch.device, workers: int) -> int:
    """Bytes that a worker may use beside the model: half of what is free now, shared by the workers of a CPU."""
    return free_bytes(device) // (2 * (workers if device.type == "cpu" else 1))


def free_bytes(device: torch.device) -> int:
    """Of a GPU, or of this machine or container."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    return min([int(psutil.virtual_memory().available), *_container_rest()])


def _container_rest(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What this process's container (cgroup 2) has left, where it has a limit."""
    try:
        most, now, stat = ((root / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
        return [max(0, int(most) - int(now) + cached)]  # the kernel takes back cached files
    except (OSError, ValueError):  # no container, or "max": no limit
        return []


@dataclass(frozen=True, slots=True)
class Limits:
    """``members`` trained at once, and padded ``tokens`` of a pass."""

    members: int
    tokens: int

    def smaller(self, longest: int) -> Limits | None:
        """What to try when memory ran out: half the members, then half the tokens; None where one row of the
        ``longest`` example is all there is."""
        if self.members > 1:
            return Limits(-(-self.members // 2), self.tokens)
        return Limits(1, max(longest, self.tokens // 2)) if self.tokens > longest else None


def limits_of(
    model: AdaptedModel, *, member_bytes: int, members: int, longest: int, budget: int, tokens: int | None
) -> Limits:
    """As many of ``members`` as half of a ``budget`` in bytes holds, and as many tokens a pass as the rest of it, at
    most ``tokens`` (None: the device's usual); at least one member and one row of the ``longest`` example."""
    on_cpu = model.device.type == "cpu"
    together = max(1, min(members, budget // 2 // max(1, member_bytes)))
    left = budget - together * member_bytes
    if on_cpu and tokens is None:
        left = min(left, CPU_PASS_BYTES)
    most = min(tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS), int(left // token_bytes(model, longest)))
    return Limits(together, max(longest, most))


def token_bytes(model: AdaptedModel, longest: int) -> float:
    """About what one token of a training pass takes: the inputs that a layer's products and functions keep for
    backward (after Korthikanti et al., 2022), of one layer and the boundaries of all where they are checkpointed, and
    as much again for gradients and temporaries."""
    config = model.config
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = getattr(config, "moe_intermediate_size", None)
    inner = inner * int(config.num_experts_per_tok) if inner else getattr(config, "intermediate_size", None)
    inner = 4 * width if inner is None else max(inner) if isinstance(inner, (list, tuple)) else int(inner)
    layer = 14 * width + 4 * inner
    if getattr(config, "_attn_implementation", None) == "eager":
        layer += 2 * int(config.num_attention_heads) * longest
    kept = layers * width + layer if model.checkpointing else layers * layer
    return 1.5 * kept * (2 if model.model.dtype in (torch.bfloat16, torch.float16) else 4)


class FineTunes:
    """The fine-tunes of one model that were used last, at most ``budget`` bytes of them beside the one in use. Read
    again where their file has changed."""

    def __init__(self, name: str, model: AdaptedModel, budget: int | None = None) -> None:
        self._name = name
        self._model = model
        self._budget = budget
        self._held: OrderedDict[tuple[str, int, int], tuple[int, Active]] = OrderedDict()

    def get(self, folder: Path) -> Active:
        """The fine-tune of a PEFT adapter folder or a model folder.

        Raises ConfigurationError where the folder holds neither, or belongs to another model.
        """
        full = not (folder / CONFIG).exists() and is_full(folder)
        try:
            stats = [p.stat() for p in sorted(folder.glob("*.safetensors"))] if full else [(folder / WEIGHTS).stat()]
        except OSError as error:
            raise ConfigurationError(f"{folder} is no PEFT adapter folder: {error.strerror}") from error
        key, size = (str(folder), stats[0].st_mtime_ns, stats[0].st_ino), sum(s.st_size for s in stats)
        with self._model.lock:
            if key not in self._held:
                held = sum(s for s, _ in self._held.values())
                # What is held is part of what could be free.
                budget = self._budget or (free_bytes(self._model.device) + held) // 4
                while self._held and held + size > budget:
                    held -= self._held.popitem(last=False)[1][0]
                active = ActiveFull(load_full(folder, self._model.own_weights)) if full else self._lora(folder)
                self._held[key] = size, active
            self._held.move_to_end(key)
            return self._held[key][1]

    def clear(self) -> None:
        """Forget all."""
        with self._model.lock:
            self._held.clear()

    def _lora(self, folder: Path) -> ActiveLora:
        loaded = load_adapter(folder)
        shapes = shapes_of(self._model, [n for n in loaded.weights if n in self._model.modules])
        for name, (a, b) in loaded.weights.items():
            if shapes.get(name) != (a.shape[1], b.shape[0]):
                layer = "{1} x {0}".format(*shapes[name]) if name in shapes else "missing"
                raise ConfigurationError(
                    f"{folder.name} belongs to another model: its update of {name} is {b.shape[0]} x {a.shape[1]}, the "
                    f"layer of {self._name} is {layer}"
                )
        weights = loaded.weights
        if self._model.model.dtype == torch.bfloat16:  # what updates are computed in there
            weights = {n: (a.bfloat16(), b.bfloat16()) for n, (a, b) in weights.items()}
        return ActiveLora(self._model.placed(weights), loaded.scaling)


class Passes:
    """Scores sequences with one copy of a model, several in a padded pass.

    The same sequences in the same order give the same bits on a CPU; in other company an answer differs by float32
    round-off (some 1e-5 nats), in half precision by what half precision is off by itself.
    """

    def __init__(self, model: AdaptedModel, fine_tunes: FineTunes) -> None:
        self._model, self._fine_tunes = model, fine_tunes
        self._tokens = SCORED_TOKENS if model.device.type == "cpu" else GPU_TOKENS
        self._head = Head(model)

    def logprobs(self, sequences: Sequence[Scored], folder: Path | None, cuts: int = 0) -> list[NDArray[np.float64]]:
        """Log-probabilities (nats) of each sequence's targets, in order, under a fine-tune (None: the base model).
        ``cuts``: how often the padded tokens of a pass are halved from the start.

        A pass that does not fit into memory is repeated without the other fine-tunes in memory, then in halves. Raises
        OutOfMemoryError where not even one sequence fits.
        """
        answers = [np.zeros(0)] * len(sequences)
        lengths = [max(targets, default=0) for _, targets in sequences]
        waiting = passes_of(lengths, max(1, self._tokens >> cuts), self._model.alone_above)
        crowded = True
        while waiting:
            group = waiting.pop(0)
            try:
                active = None if folder is None else self._fine_tunes.get(folder)
                found = self._pass([sequences[i] for i in group], active)
                for i, answer in zip(group, found, strict=True):
                    answers[i] = answer
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                active = None
            release(self._model.device)
            if crowded:
                self._fine_tunes.clear()
                crowded = False
                waiting.insert(0, group)
            elif len(group) > 1:
                self._tokens = max(1, self._tokens // 2)
                half = len(group) // 2
                waiting[:0] = [group[:half], group[half:]]
            else:
                raise OutOfMemoryError(f"one sequence of {lengths[group[0]]:,} tokens could not be scored")
        return answers

    def _pass(self, rows: Sequence[Scored], active: Active | None) -> list[NDArray[np.float64]]:
        with self._model.using(active), torch.inference_mode():
            batch = Batch.of(rows, self._model.device)
            nats = token_nats(self._head, self._model.hidden(batch), batch.target, None)
        return [part.numpy() for part in torch.split((-nats).cpu().double(), batch.counts)]
