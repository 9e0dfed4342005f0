"""What scorer and provider would refuse of the examples themselves, found before anything is paid for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..config import RunConfig
from ..data.dataset import Dataset, Example
from ..data.tokenizers import EncodedExample
from ..errors import CapabilityError, ConfigurationError, DataError, DaunceError
from ..providers.base import ScorerCapabilities, TrainerCapabilities
from .prices import provider_of

_NAMED = 5
"""Examples that a refusal names before it only counts."""

_HOSTED = ("openai", "azure", "together", "fireworks")
_COMPLETION_MODELS = ("babbage-002", "davinci-002")
_CONTEXT = {"gpt-3.5": 16_385, "gpt-4o": 65_536, "gpt-4.1": 65_536}
"""Longest training examples of OpenAI's models, in tokens; what is longer is cut at its end."""

_OPENAI_TOKENS = re.compile(
    r"<\|(?:endoftext|fim_prefix|fim_middle|fim_suffix|endofprompt|im_start|im_end|im_sep|start|end|message|channel|"
    r"return|call|constrain)\|>"
)
_CONTROL_TOKENS = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>")
_SEVERAL_TOKENS = re.compile(r"\S\s+\S|\d{4}|[^\W\d_][^\w\s]+[^\W\d_]")
"""What no token of OpenAI's encodings spans: words apart, four digits, letters with other characters between."""


def record_refusals(
    config: RunConfig, train: Dataset, test: Dataset, trainer: TrainerCapabilities, scorer: ScorerCapabilities
) -> tuple[list[DaunceError], list[DaunceError], list[str]]:
    """What the trainer and what the scorer would refuse of the records, and notes; no token ids are needed."""
    about_jobs = list(_unaccepted(trainer.provider, trainer.accepts, "train on", [train]))
    about_jobs += [*_file_rules(config, train), *_validation(config, trainer)]
    about_scoring = list(_unaccepted(scorer.provider, scorer.accepts, "measure", [train, test]))
    notes: list[str] = []
    if provider_of(config.backend.kind, config.backend.base_url) in ("together", "fireworks"):
        spelled = _places(train, lambda e: any(_CONTROL_TOKENS.search(t) for t in _texts(e)))
        if spelled:
            notes.append(
                f"{listed(spelled)} spell a control token (such as <|im_end|>); {trainer.provider} tokenizes the file "
                "itself and may read it as one"
            )
    return about_jobs, about_scoring, notes


def measured_refusals(
    scorer: ScorerCapabilities, sides: Iterable[tuple[Dataset, Sequence[EncodedExample]]], *, exact: bool
) -> list[DaunceError]:
    """What the scorer would refuse of the examples when it is asked about them: a request is tried for each, and not
    sent. ``exact``: the token ids are real ones."""
    refused: list[tuple[str, CapabilityError]] = []
    for dataset, encoded in sides:
        for position, example in enumerate(encoded):
            try:
                if scorer.look is not None:
                    scorer.look(example)
            except CapabilityError as error:
                refused.append((dataset.where(position), error))
    if refused:
        return [CapabilityError(f"{refused[0][1]} This concerns {listed([place for place, _ in refused])}.")]
    return list(_one_target(scorer, sides)) if exact else []


def bytes_refusals(scorer: ScorerCapabilities, sides: Iterable[tuple[Dataset, Sequence[int]]]) -> Iterator[DaunceError]:
    """Answers that cannot be one token, by their bytes where no tokenizer is available. ``sides``: data sets, with the
    measured turn of each example."""
    if scorer.scope != "one_token":
        return
    long = []
    for dataset, turns in sides:
        for position, (example, turn) in enumerate(zip(dataset, turns, strict=True)):
            answer = example.messages[turn].text if example.is_chat else example.completion
            if len(answer.encode()) > 64 or _SEVERAL_TOKENS.search(answer.strip()):
                long.append(dataset.where(position))
    if long:
        yield CapabilityError(
            f"the answers of {listed(long)} are longer than one token (judged by their bytes), and {scorer.provider} "
            "shows the log-probability of one generated token only. Score on an endpoint with echo (vLLM, Together, "
            "Fireworks, `daunce serve`), use one-token labels, or set backend.scorer.options.first_token: true to "
            "attribute the first token alone, which is another question."
        )


def _one_target(
    scorer: ScorerCapabilities, sides: Iterable[tuple[Dataset, Sequence[EncodedExample]]]
) -> Iterator[DaunceError]:
    if scorer.scope == "any":
        return
    tokens = Counter(tuple(e.ids[t] for t in e.targets[:1]) for _, encoded in sides for e in encoded)
    if len(tokens) == 1 and sum(tokens.values()) > 2:
        yield CapabilityError(
            f"the measured token is the same one in all {sum(tokens.values()):,} examples, so nothing that tells them "
            "apart would be measured"
            + (" (a brace, where answers are JSON?)" if scorer.scope == "first_token" else "")
            + ". Score on an endpoint that measures whole answers (vLLM, Together, Fireworks, `daunce serve`)."
        )


def _unaccepted(
    provider: str, accepts: frozenset[str], does: str, datasets: Sequence[Dataset]
) -> Iterator[DaunceError]:
    kinds: dict[str, tuple[str, Callable[[Example], bool], str]] = {
        "tools": ("tools or tool calls", lambda e: bool(e.tools) or any(m.calls for m in e.messages), ""),
        "images": (
            "images",
            lambda e: any(m.images for m in e.messages),
            " Fine-tune and score them at OpenAI or Azure (one-token answers), or leave them out.",
        ),
        "texts": (
            "texts without prompts",
            lambda e: e.text_only,
            " Name what is asked and what is answered: data.columns: {prompt: COLUMN, completion: COLUMN}.",
        ),
        "weights": (
            "a weight other than 1 for the whole record",
            lambda e: e.fields.get("weight", 1) != 1,
            " Only 0 and 1, on assistant turns, can be attributed everywhere; take the weights out.",
        ),
    }
    for kind, (name, holds, hint) in kinds.items():
        if kind in accepts or (kind == "weights" and does == "measure"):
            continue
        places = [place for dataset in datasets for place in _places(dataset, holds)]
        if places:
            yield CapabilityError(f"{provider} cannot {does} {name}, which {listed(places)} hold.{hint}")


def _file_rules(config: RunConfig, train: Dataset) -> Iterator[DaunceError]:
    """The rules of the provider's training files, where they are published."""
    provider = provider_of(config.backend.kind, config.backend.base_url)
    if provider not in _HOSTED:
        return
    chats = sum(e.is_chat for e in train)
    if 0 < chats < len(train):
        yield DataError(
            f"{train.name} has {chats:,} chats and {len(train) - chats:,} other records, and a training file must be "
            "of one kind. Nothing was sent. Split it, or read all as chats (data.columns: {user: prompt, assistant: "
            "completion})."
        )
    if provider not in ("openai", "azure"):
        return
    model = config.backend.model
    plain = any(name in model for name in _COMPLETION_MODELS)
    if chats and plain:
        yield ConfigurationError(f"{model} is fine-tuned on prompts and completions, and {train.name} holds chats.")
    if not chats and not plain:
        yield ConfigurationError(
            f"{model} is a chat model, which is fine-tuned on chats, and {train.name} holds prompts and completions. "
            "Nothing was sent. Read it as chats: data.columns: {user: prompt, assistant: completion}."
        )
    spelled = _places(train, lambda e: any(_OPENAI_TOKENS.search(t) for t in _texts(e)))
    if spelled:
        yield DataError(
            f"a training file for {model} must not spell OpenAI's control tokens (such as <|endoftext|>): a job whose "
            f"file does fails. Nothing was sent. Take them out of {listed(spelled)}."
        )


def _validation(config: RunConfig, trainer: TrainerCapabilities) -> Iterator[DaunceError]:
    path = config.data.validation
    if path is None:
        return
    if "validation" not in trainer.accepts:
        yield CapabilityError(f"{trainer.provider} takes no validation file. Take data.validation out.")
    elif not path.exists():
        yield DataError(f"data.validation: {path} is not there.")
    else:
        Dataset.from_file(path, config.data.columns)  # raises DataError for what cannot be read


def context_of(config: RunConfig, trainer: TrainerCapabilities) -> int | None:
    """The longest training example in tokens; None where it is not known."""
    if trainer.max_context_tokens is not None:
        return trainer.max_context_tokens
    if provider_of(config.backend.kind, config.backend.base_url) not in ("openai", "azure"):
        return None
    return next((limit for name, limit in _CONTEXT.items() if name in config.backend.model), None)


def left_out_notes(sides: Iterable[tuple[Dataset, Sequence[EncodedExample]]]) -> list[str]:
    """What the chat template does not write of the context, with counts."""
    notes = []
    for dataset, encoded in sides:
        for what, count in Counter(w for e in encoded for w in e.left_out).items():
            notes.append(
                f"the chat template leaves out {what} in {count:,} of {len(encoded):,} examples of {dataset.name}"
            )
    return notes


def loss_line(config: RunConfig, train: Dataset, scorer: ScorerCapabilities) -> tuple[str, str | None]:
    """Which turns of the training chats carry the loss, and a note where that is not what providers do by default."""
    chats = [e for e in train if e.is_chat]
    if not chats:
        return f"every token of {'the text' if train[0].text_only else 'the completion'}", None
    data = config.data
    spoken = [[i for i, m in enumerate(e.messages) if m.role == "assistant"] for e in chats]
    trained = [e.trained_turns(data.loss_on) for e in chats]
    measured = [e.trained_turns(data.measured(one_turn=scorer.one_turn)) for e in chats]
    turns, on = sum(map(len, spoken)), sum(map(len, trained))
    text = _share(chats, trained, spoken)
    which = "every assistant turn" if on == turns else f"{on:,} of {turns:,} assistant turns"
    verb = "is" if on in (1, turns) else "are"
    said = f"{which} of {len(chats):,} chats {verb} trained on ({text:.0%} of the assistants' text)"
    if measured == trained:
        said += " and measured"
    elif scorer.one_turn and data.measure is None:
        said += f"; the last one is measured, since {scorer.provider} measures one turn only"
    else:
        said += f"; {sum(map(len, measured)):,} turns are measured (data.measure)"
    by_default = [e.trained_turns("all") for e in chats]
    if trained == by_default:
        return said, None
    left = sum(map(len, by_default)) - on
    return said, (
        f"data.loss_on: last takes {left:,} of {turns:,} assistant turns out of the loss, which providers train on by "
        "default: scores explain a fine-tune that was made so. data.loss_on: all trains as they do"
    )


def _share(chats: Sequence[Example], trained: Sequence[Sequence[int]], spoken: Sequence[Sequence[int]]) -> float:
    def length(chosen: Sequence[Sequence[int]]) -> int:
        return sum(len(e.messages[i].text) for e, turns in zip(chats, chosen, strict=True) for i in turns)

    return length(trained) / max(length(spoken), 1)


def _texts(example: Example) -> Iterator[str]:
    yield from (example.prompt, example.completion)
    for message in example.messages:
        yield message.text
        yield str(message.fields.get("name") or "")


def _places(dataset: Dataset, holds: Callable[[Example], bool]) -> list[str]:
    return [dataset.where(position) for position, example in enumerate(dataset) if holds(example)]


def listed(places: Sequence[str]) -> str:
    """The first places, and how many more there are."""
    more = f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else ""
    return ", ".join(places[:_NAMED]) + more
