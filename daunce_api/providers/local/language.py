"""``LanguageModel``: a causal language model that is fine-tuned (LoRA, or all weights) and scores token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.tokenizers import EncodedExample, LocalTokenizer
from ...errors import ConfigurationError, DataError
from .adapters import load_adapter, save_adapter, target_modules
from .devices import check_device
from .full import check_trainable, is_full, load_full, save_full
from .hot import HotFineTunes
from .logprobs import Generation, TokenLogprobs, most_likely, read_logprobs, sample
from .lora import Active, AdaptedModel
from .models import load_causal_lm, resolve_model
from .passes import Scored, ScoringPasses
from .recipes import FullSettings, LoraSettings
from .trainees import FullWeights, Member, Weights
from .training import TrainOutcome, train_full, train_members, trained_tokens

__all__ = ["FullSettings", "Generation", "LanguageModel", "LoraSettings", "TokenLogprobs", "TrainOutcome"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_TRAIN_TOKENS = 2048


class LanguageModel:
    """One base model in memory. Safe to call from several threads; calls take turns."""

    def __init__(self, name: str, model: AdaptedModel, tokenizer: LocalTokenizer) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.adapted = model
        self._hot = HotFineTunes(name, model)
        self._passes: ScoringPasses | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        device_map: str | Mapping[str, int | str] | None = None,
        quantisation: str | None = None,
        gradient_checkpointing: bool = False,
        tokenizer: str | Path | None = None,
    ) -> LanguageModel:
        """Load ``daunce-tiny`` (embedded), ``smollm2-135m``, a Hugging Face folder or a Hugging Face id.

        ``device_map`` spreads a large model over several GPUs, ``quantisation`` (``8bit``, ``4bit``; bitsandbytes)
        shrinks the frozen weights, ``gradient_checkpointing`` computes activations twice instead of keeping them.
        ``tokenizer`` is the folder of another tokenizer than the model's own.
        Raises ConfigurationError for an unknown model, device or dtype.
        """
        if dtype not in _DTYPES:
            raise ConfigurationError(f"dtype {dtype!r} is not known; use one of {', '.join(_DTYPES)}")
        check_device(device)
        name, folder = resolve_model(path)
        model = load_causal_lm(
            folder, dtype=_DTYPES[dtype], device=device, device_map=device_map, quantisation=quantisation
        )
        return cls(name, AdaptedModel(model, checkpointing=gradient_checkpointing), LocalTokenizer(tokenizer or folder))

    @property
    def max_context(self) -> int:
        """The longest sequence, in tokens, that the model's positions allow."""
        config = self.adapted.model.config
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            if isinstance(getattr(config, key, None), int):
                return int(getattr(config, key))
        return 2048

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model knows."""
        return int(self.adapted.model.config.vocab_size)

    def adapter_shapes(self, targets: tuple[str, ...] | None) -> dict[str, tuple[int, int]]:
        """(in, out) of every module that gets an adapter."""
        shapes = {}
        for name in target_modules(self.adapted.model, targets):
            module = self.adapted.model.get_submodule(name)
            n_in = getattr(module, "in_features", None) or int(getattr(module, "nx", 0))
            n_out = getattr(module, "out_features", None) or int(getattr(module, "nf", 0))
            shapes[name] = (int(n_in), int(n_out))
        return shapes

    def train(
        self,
        examples: Sequence[EncodedExample],
        *,
        settings: LoraSettings | FullSettings,
        seed: int,
        out: Path,
        start_from: Path | None = None,
        checkpoint: Callable[[int, Path], None] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> TrainOutcome:
        """Fine-tune on the completion tokens of ``examples`` and write to ``out``: a PEFT adapter folder, or with
        FullSettings a model folder.

        ``start_from`` continues the weights of an adapter of the same rank, alpha and modules, or of a model folder.
        ``checkpoint(epoch, path)`` is called after every epoch with a folder beside ``out`` that the caller then
        owns. The same examples, seed, settings and thread count give the same bytes on a CPU.

        Raises TrainingCancelledError, DataError (an example is longer than the context, or has no target),
        RejectedError (the loss is not finite), ConfigurationError.
        """
        for example in examples:
            self._check(example.ids, f"example {example.example.id!r}")

        def after_step(step: int, total: int, epoch: int, losses: list[float]) -> None:
            if on_step is not None:
                on_step(step, total, losses[0])

        def keep(epoch: int, save: Callable[[Path], None]) -> None:
            if checkpoint is not None:
                path = out.with_name(f"{out.name}.epoch-{epoch}")
                save(path)
                checkpoint(epoch, path)

        if isinstance(settings, FullSettings):
            whole, losses, epochs = train_full(
                self.adapted,
                Member(examples, seed),
                None if start_from is None else self.full_weights(start_from),
                settings,
                max_tokens=_TRAIN_TOKENS,
                after_step=after_step,
                after_epoch=None
                if checkpoint is None
                else lambda epoch, now: keep(epoch, lambda path: self.save_full(path, now)),
                should_stop=should_stop,
            )
            self.save_full(out, whole)
        else:
            shapes = self.adapter_shapes(settings.targets)
            start = None if start_from is None else self.start_weights(start_from, settings, shapes)
            weights, all_losses, epochs = train_members(
                self.adapted,
                [Member(examples, seed, start)],
                shapes,
                settings,
                max_tokens=_TRAIN_TOKENS,
                after_step=after_step,
                after_epoch=None
                if checkpoint is None
                else lambda epoch, now: keep(epoch, lambda path: save_adapter(path, now[0], settings, self.name)),
                should_stop=should_stop,
            )
            losses = all_losses[0]
            save_adapter(out, weights[0], settings, self.name)
        return TrainOutcome(out, tuple(losses), tuple(epochs), trained_tokens(examples, settings))

    def full_weights(self, folder: Path) -> FullWeights:
        """Weights of a full fine-tune that training can continue. Raises ConfigurationError."""
        check_trainable(self.adapted)
        if not is_full(folder):
            raise ConfigurationError(
                f"{folder.name} is no model folder; a full fine-tune continues a full fine-tune, not a LoRA adapter."
            )
        return load_full(folder, self.adapted)

    def save_full(self, out: Path, weights: FullWeights) -> None:
        """Write a model folder with these weights and this model's tokenizer."""
        save_full(out, self.adapted, weights, self.tokenizer.folder)

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
                if len(sequence) == 1:
                    answers.append(
                        read_logprobs(torch.zeros(0, self.vocabulary), torch.zeros(0, dtype=torch.long), top)
                    )
                    continue
                logits = self._all_logits(sequence[:-1])
                answers.append(read_logprobs(logits, torch.tensor(sequence[1:]), top))
        return answers

    def target_logprobs(self, sequences: Sequence[Scored], *, adapter: Path | None = None) -> list[NDArray[np.float64]]:
        """Log-probabilities (nats) of each sequence's targets: on a CPU several sequences in a pass where that gives
        the same bits as one, on other devices in passes of fixed shapes (see :class:`ScoringPasses`), otherwise as
        :meth:`token_logprobs`.

        On a CPU an answer never depends, to the last bit, on what else is asked; elsewhere that is up to the kernels.
        In float32 it is within rounding (measured: 2e-5 nats) of that of :meth:`token_logprobs`, which does not pad;
        in half precision within what half precision is off by itself. Raises DataError as it does.
        """
        tuned = self._tuned(adapter)
        with self.adapted.lock:
            if self._passes is None:
                self._passes = ScoringPasses(self.adapted)
            if self._passes.supports(tuned):
                for ids, _ in sequences:
                    self._check(ids, "a sequence")
                return self._passes.logprobs(sequences, tuned)
        answers = self.token_logprobs([ids for ids, _ in sequences], adapter=adapter)
        return [a.logprobs[[t - 1 for t in targets]] for a, (_, targets) in zip(answers, sequences, strict=True)]

    def next_token_logprobs(
        self, ids: Sequence[Sequence[int]], *, adapter: Path | None = None, top: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """The ``top`` most likely next tokens after each sequence and their log-probabilities, best first."""
        for sequence in ids:
            self._check(sequence, "a sequence")
        answers = []
        with self.adapted.using(self._tuned(adapter)), torch.inference_mode():
            for sequence in ids:
                top_ids, top_logprobs = most_likely(self._all_logits(sequence)[-1:].cpu().double().log_softmax(-1), top)
                answers.append((top_ids[0], top_logprobs[0]))
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
        random = np.random.default_rng(np.random.SeedSequence(seed))
        stops = frozenset(stop_ids)
        made: list[int] = []
        read: list[TokenLogprobs] = []
        finished = False
        with self.adapted.using(self._tuned(adapter)), torch.inference_mode():
            past = None
            step = torch.tensor([list(ids)], device=self.adapted.device)
            while len(made) < min(max_tokens, self.max_context - len(ids)) and not finished:
                output = self.adapted.model(input_ids=step, past_key_values=past, use_cache=True)
                past = output.past_key_values
                logits = output.logits[0, -1:].float().cpu()
                token = sample(logits[0].double().numpy(), temperature, top_p, random)
                read.append(read_logprobs(logits, torch.tensor([token]), top))
                made.append(token)
                finished = token in stops
                step = torch.tensor([[token]], device=self.adapted.device)
        empty_ids, empty = np.zeros((0, top), np.int64), np.zeros((0, top))
        return Generation(
            tuple(made),
            np.concatenate([np.zeros(0), *(r.logprobs for r in read)]),
            np.concatenate([empty_ids, *(r.top_ids for r in read if r.top_ids is not None)]),
            np.concatenate([empty, *(r.top_logprobs for r in read if r.top_logprobs is not None)]),
            finished,
        )

    def unload(self, adapter: Path) -> None:
        """Forget an adapter that is held in memory; nothing happens where it is not."""
        self._hot.drop(adapter)

    def _all_logits(self, inputs: Sequence[int]) -> Tensor:
        return self.adapted.logits(torch.tensor([list(inputs)], device=self.adapted.device)).float()

    def _check(self, ids: Sequence[int], what: str) -> None:
        if not ids:
            raise DataError(f"{what} has no tokens")
        if len(ids) > self.max_context:
            raise DataError(f"{what} has {len(ids):,} tokens; {self.name} takes at most {self.max_context:,}")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise DataError(f"{what} holds a token id outside 0 ... {self.vocabulary - 1} of {self.name}")

    def start_weights(self, start_from: Path, settings: LoraSettings, shapes: Mapping[str, tuple[int, int]]) -> Weights:
        """Weights of an adapter folder that training can continue.

        Raises ConfigurationError where it was made with another rank, alpha or other modules than the settings.
        """
        adapter = load_adapter(start_from)
        rank = next(iter(adapter.weights.values()))[0].shape[0]
        if set(adapter.weights) != set(shapes) or rank != settings.rank:
            raise ConfigurationError(
                f"{start_from.name} has rank {rank} on other modules or at another rank than the settings "
                f"(rank {settings.rank}); continue an adapter with the settings that it was made with."
            )
        if adapter.scaling != settings.alpha / settings.rank:
            raise ConfigurationError(
                f"{start_from.name} has alpha / rank {adapter.scaling:g}, "
                f"the settings have {settings.alpha / settings.rank:g}"
            )
        return dict(adapter.weights)

    def _tuned(self, folder: Path | None) -> Active | None:
        return None if folder is None else self._hot.get(folder)
