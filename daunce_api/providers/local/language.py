"""``LanguageModel``: a causal language model that is fine-tuned (LoRA, or all weights), scores and generates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig

from ...data.tokenizers import EncodedExample, LocalTokenizer
from ...errors import ConfigurationError, DataError
from .adapters import CONFIG, WEIGHTS, load_adapter, save_adapter, shapes_of, target_modules
from .lora import Active, ActiveFull, ActiveLora, AdaptedModel, Batch
from .losses import token_nats
from .memory import GPU_TOKENS, SCORED_TOKENS, Scored, free_bytes, passes_of
from .models import is_full, load_causal_lm, load_full, longest_context, resolve_model, save_full, seeded
from .options import FullSettings, LoraSettings, ModelSpec
from .train import FullTrainee, LoraTrainee, Member, Weights


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities, float64.

    ``logprobs[t - 1]`` is log p(ids[t] | ids[:t]) for t = 1 ... len(ids) - 1. ``top_ids`` and ``top_logprobs``
    (len(ids) - 1, top) are the most likely tokens there, best first.
    """

    logprobs: NDArray[np.float64]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float64]


class Generation(NamedTuple):
    """Sampled continuation ``ids``, and what the model itself (at temperature 1) gives for each of them.

    ``finished`` is True where a stop id ended it; that id is the last of ``ids``.
    """

    ids: tuple[int, ...]
    read: TokenLogprobs
    finished: bool


class LanguageModel:
    """One base model in memory, and the fine-tunes of it that were used last. Safe to call from several threads; calls
    take turns."""

    def __init__(self, name: str, model: AdaptedModel, tokenizer: LocalTokenizer, *, budget: int | None = None) -> None:
        """``budget``: bytes of fine-tunes that are held beside the one in use; default: a quarter of what is free."""
        self.name, self.adapted, self.tokenizer = name, model, tokenizer
        self.max_context = longest_context(model.config) or 2048
        """The longest sequence that the model's positions allow, in tokens; 2,048 where the configuration is silent."""
        self.vocabulary = int(model.config.vocab_size)
        """Number of token ids that the model knows."""
        self._budget = budget
        self._held: OrderedDict[tuple[str, int, int], tuple[int, Active]] = OrderedDict()

    @classmethod
    def load(cls, given: ModelSpec | str | Path, **options: Any) -> LanguageModel:
        """Load ``daunce-tiny`` (embedded), a Hugging Face folder or a Hugging Face id, held as the spec or
        :class:`LocalOptions` say. Raises ConfigurationError for an unknown model, device or dtype."""
        spec = given if isinstance(given, ModelSpec) else ModelSpec.of(given, **options)
        name, folder = resolve_model(spec.path)
        causal = load_causal_lm(folder, spec.options)
        model = AdaptedModel(causal, checkpointing=spec.options.gradient_checkpointing)
        return cls(name, model, LocalTokenizer(spec.tokenizer or folder))

    def adapter_shapes(self, targets: tuple[str, ...] | str | None) -> dict[str, tuple[int, int]]:
        """(in, out) of every module that gets an adapter."""
        return shapes_of(self.adapted, target_modules(self.adapted, targets))

    def trainee(
        self,
        members: Sequence[tuple[Sequence[EncodedExample], int]],
        settings: LoraSettings | FullSettings,
        start_from: Path | None = None,
    ) -> LoraTrainee | FullTrainee:
        """What :func:`fine_tune` trains for (examples, seed) of several members, or of one for a full fine-tune; all
        continue ``start_from``, where it is given.

        Raises ConfigurationError where an adapter was made with another rank, alpha or other modules than the settings,
        and for a full fine-tune where the folder is none.
        """
        if isinstance(settings, LoraSettings):
            shapes = self.adapter_shapes(settings.targets)
            start = None if start_from is None else _start_weights(start_from, settings, shapes)
            return LoraTrainee(self.adapted, [Member(*m) for m in members], shapes, settings, start)
        if start_from is not None and not is_full(start_from):
            raise ConfigurationError(
                f"{start_from.name} is no model folder; a full fine-tune continues a full fine-tune, not an adapter."
            )
        first = None if start_from is None else load_full(start_from, self.adapted.own_weights)
        return FullTrainee(self.adapted, Member(*members[0]), first)

    def save(self, out: Path, trainee: LoraTrainee | FullTrainee, member: int = 0) -> None:
        """Write what a member is now to an adapter folder, or to a model folder with this model's tokenizer."""
        if isinstance(trainee, LoraTrainee):
            save_adapter(out, trainee.weights(member), trainee.settings, self.name)
        else:
            with self.adapted.using(trainee.held):
                save_full(out, self.adapted.model, self.tokenizer.folder)

    def token_logprobs(
        self, ids: Sequence[Sequence[int]], *, adapter: Path | None = None, top: int = 0
    ) -> list[TokenLogprobs]:
        """Log-probabilities of every token after the first, one answer a sequence, in order.

        Sequences are evaluated one at a time, so that an answer never depends, to the last bit, on what else is asked.
        Raises DataError for a sequence that is empty, longer than the context, or holds an unknown id.
        """
        for sequence in ids:
            self._check(sequence, "a sequence")
        answers = []
        with self.adapted.using(self._tuned(adapter)), torch.inference_mode():
            for sequence in ids:
                logits = torch.zeros(0, self.vocabulary)
                if len(sequence) > 1:
                    logits = self.adapted.logits(torch.tensor([list(sequence[:-1])], device=self.adapted.device))
                answers.append(_read_logprobs(logits.float(), sequence[1:], top))
        return answers

    def target_logprobs(
        self, sequences: Sequence[Scored], *, adapter: Path | None = None, cuts: int = 0
    ) -> list[NDArray[np.float64]]:
        """Log-probabilities (nats) of each sequence's targets, several sequences in a padded pass. ``cuts``: how often
        the padded tokens of a pass are halved.

        The same sequences in the same order give the same bits on a CPU; in other company an answer differs by float32
        round-off (some 1e-5 nats), in half precision by what half precision is off by itself. Raises DataError as
        :meth:`token_logprobs` does.
        """
        for ids, _ in sequences:
            self._check(ids, "a sequence")
        answers = [np.zeros(0)] * len(sequences)
        lengths = [max(targets, default=0) for _, targets in sequences]
        most = SCORED_TOKENS if self.adapted.device.type == "cpu" else GPU_TOKENS
        with self.adapted.using(self._tuned(adapter)), torch.inference_mode():
            for group in passes_of(lengths, max(1, most >> cuts), self.adapted.alone_above):
                batch = Batch.of([sequences[i] for i in group], self.adapted.device)
                nats = token_nats(self.adapted, self.adapted.hidden(batch), batch)
                parts = torch.split((-nats).cpu().double(), batch.counts)
                for i, part in zip(group, parts, strict=True):
                    answers[i] = part.numpy()
        return answers

    def generate(
        self,
        ids: Sequence[int],
        *,
        adapter: Path | None = None,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        top: int = 0,
    ) -> Generation:
        """Continue ``ids`` by at most ``max_tokens`` (fewer where the context ends): greedy at temperature 0, otherwise
        sampled from the smallest set of tokens that holds ``top_p`` of the probability. The same seed gives the same
        continuation."""
        self._check(ids, "the prompt")
        room = min(max_tokens, self.max_context - len(ids))
        made, logits = [], torch.zeros(0, self.vocabulary)
        how: dict[str, Any] = {"max_new_tokens": room, "eos_token_id": list(stop_ids), "pad_token_id": 0}
        how |= {"output_logits": True, "return_dict_in_generate": True}
        if temperature:
            how |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        model, prompt = self.adapted.model, torch.tensor([list(ids)], device=self.adapted.device)
        if room > 0:
            with self.adapted.using(self._tuned(adapter)), torch.inference_mode(), seeded(seed, self.adapted.device):
                # What a checkpoint has of its own here (penalties, top_k) would fill in what is not set.
                own, model.generation_config = model.generation_config, GenerationConfig()
                try:
                    found = model.generate(prompt, GenerationConfig(**how), attention_mask=torch.ones_like(prompt))
                finally:
                    model.generation_config = own
            made, logits = found.sequences[0, len(ids) :].tolist(), torch.cat(found.logits)
        return Generation(tuple(made), _read_logprobs(logits, made, top), bool(made) and made[-1] in stop_ids)

    def _check(self, ids: Sequence[int], what: str) -> None:
        if not ids:
            raise DataError(f"{what} has no tokens")
        if len(ids) > self.max_context:
            raise DataError(f"{what} has {len(ids):,} tokens; {self.name} takes at most {self.max_context:,}")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise DataError(f"{what} holds a token id outside 0 ... {self.vocabulary - 1} of {self.name}")

    def forget_fine_tunes(self) -> None:
        """Hold none in memory."""
        with self.adapted.lock:
            self._held.clear()

    def _tuned(self, folder: Path | None) -> Active | None:
        """What a PEFT adapter folder or a model folder holds, read again where its file has changed; None for None.

        Raises ConfigurationError where the folder holds neither, or belongs to another model.
        """
        if folder is None:
            return None
        full = not (folder / CONFIG).exists() and is_full(folder)
        try:
            stats = [p.stat() for p in sorted(folder.glob("*.safetensors"))] if full else [(folder / WEIGHTS).stat()]
        except OSError as error:
            raise ConfigurationError(f"{folder} is no PEFT adapter folder: {error.strerror}") from error
        key, size = (str(folder), stats[0].st_mtime_ns, stats[0].st_ino), sum(s.st_size for s in stats)
        with self.adapted.lock:
            if key not in self._held:
                held = sum(s for s, _ in self._held.values())
                # What is held is part of what could be free.
                budget = self._budget or (free_bytes(self.adapted.device) + held) // 4
                while self._held and held + size > budget:
                    held -= self._held.popitem(last=False)[1][0]
                active = ActiveFull(load_full(folder, self.adapted.own_weights)) if full else self._lora(folder)
                self._held[key] = size, active
            self._held.move_to_end(key)
            return self._held[key][1]

    def _lora(self, folder: Path) -> ActiveLora:
        loaded = load_adapter(folder)
        shapes = shapes_of(self.adapted, [n for n in loaded.weights if n in self.adapted.modules])
        for name, (a, b) in loaded.weights.items():
            if shapes.get(name) != (a.shape[1], b.shape[0]):
                layer = "{1} x {0}".format(*shapes[name]) if name in shapes else "missing"
                raise ConfigurationError(
                    f"{folder.name} belongs to another model: its update of {name} is {b.shape[0]} x {a.shape[1]}, the "
                    f"layer of {self.name} is {layer}"
                )
        weights = loaded.weights
        if self.adapted.model.dtype == torch.bfloat16:  # what updates are computed in there
            weights = {n: (a.bfloat16(), b.bfloat16()) for n, (a, b) in weights.items()}
        return ActiveLora(self.adapted.placed(weights), loaded.scaling)


def _start_weights(folder: Path, settings: LoraSettings, shapes: Mapping[str, tuple[int, int]]) -> Weights:
    adapter, scaling = load_adapter(folder), settings.alpha / settings.rank
    made = {n: (a.shape[1], b.shape[0], a.shape[0]) for n, (a, b) in adapter.weights.items()}
    if made != {n: (*shape, settings.rank) for n, shape in shapes.items()} or adapter.scaling != scaling:
        raise ConfigurationError(
            f"{folder.name} has rank {next(iter(made.values()))[2]}, alpha / rank {adapter.scaling:g} and {len(made)} "
            f"modules, the settings have rank {settings.rank}, alpha / rank {scaling:g} and {len(shapes)}; continue an "
            "adapter with the settings that it was made with."
        )
    return dict(adapter.weights)


def _read_logprobs(logits: Tensor, target: Sequence[int], top: int) -> TokenLogprobs:
    """Log-probabilities of ``target`` (n,), and of the ``top`` most likely tokens, from logits (n, vocabulary)."""
    logprobs = logits.cpu().double().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(target, dtype=torch.long)[:, None])[:, 0]
    values, order = logprobs.topk(min(top, logprobs.shape[1]), dim=1)
    return TokenLogprobs(chosen.numpy(), order.numpy(), values.numpy())
