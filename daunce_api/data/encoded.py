"""What every tokenizer can do, and an example as token ids with the positions that carry its loss."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ..errors import DataError
from .dataset import Dataset
from .example import Example, LossOn, Message
from .rendering import Span, render, rendered_chat

_SHOWN = 20
"""Problems that an error lists before it only counts."""


class Tokenizer(Protocol):
    """Text to token ids, for one model family. A text that UTF-8 cannot carry raises DataError."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could change."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; none are added. Whether special tokens spelled in it are recognised is the family's choice,
        but those inside the contents of rendered messages never are."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """The ids of :meth:`encode`, and for each one the characters of ``text`` that it covers (all of the tokens
        that share one character cover it)."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One printable string a token, for display only."""
        ...

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """A chat as the text that :meth:`encode` turns into what the model sees. For records that have them, ``tools``
        (a list) and ``options`` (further variables of the template) are given as well."""
        ...

    @property
    def begin(self) -> str:
        """The text that opens a plain record ('' where the model family has none)."""
        ...

    @property
    def end(self) -> str:
        """The text that ends a plain completion ('' where the model family has none)."""
        ...


@runtime_checkable
class ExampleEncoder(Protocol):
    """A tokenizer for a model that reads no text (an image classifier): it says itself what ids an example has."""

    def encode_example(self, example: Example) -> EncodedExample: ...


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example as token ids.

    ``targets`` are the positions (>= 1, ascending) whose log-probability given all ids before them is measured:
    the completion tokens. ``turns`` are the messages that are measured, and ``left_out`` says what of the context the
    chat template does not write.
    """

    example: Example
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    turns: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()
    key: str = field(init=False, repr=False, compare=False)
    """SHA-256 of ids and targets: equal keys are scored once."""

    def __post_init__(self) -> None:
        content = json.dumps([self.ids, self.targets])
        object.__setattr__(self, "key", hashlib.sha256(content.encode()).hexdigest())


@runtime_checkable
class SpellingTokenizer(Protocol):
    """A tokenizer that knows the bytes of its tokens, also of those that are parts of a character."""

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token."""
        ...


def encode_example(example: Example, tokenizer: Tokenizer, loss_on: LossOn = "last") -> EncodedExample:
    """Token ids and completion positions of one example.

    The whole text is encoded at once. The targets are the tokens that cover at least one character of the
    completion (of a trained turn with what the template writes to end it), so a token that covers both prompt and
    completion belongs to the completion, and a token of the prompt alone never does. The very first token of the
    whole is never a target: nothing stands before it.

    Raises DataError where the chat template refuses the messages, leaves out a part of the answer or writes it where it
    cannot be found, or where nothing is left to measure.
    """
    if isinstance(tokenizer, ExampleEncoder):
        return tokenizer.encode_example(example)
    turns: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()
    marked = False
    if example.is_chat:
        turns = example.trained_turns(loss_on)
        chat = rendered_chat(example, tokenizer, turns)
        whole, spans, marked, left_out = chat.text, list(chat.spans), chat.marked, chat.left_out
    else:
        whole = text_of(example, tokenizer)
        stop = len(whole) - len(tokenizer.end)
        spans = [(stop - len(example.completion), len(whole))]
    ids, offsets = tokenizer.encode_with_offsets(whole)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    targets: set[int] = set()
    for start, stop in spans:
        targets.update(range(max(bisect_right(ends, start), 1), bisect_left(starts, stop)))
    if not targets:
        raise DataError(f"example {example.id!r} has no completion token that a model could predict")
    if marked:
        _check_answers(example, tokenizer, ids, sorted(targets), turns)
    return EncodedExample(example, tuple(ids), tuple(sorted(targets)), turns, left_out)


def text_of(example: Example, tokenizer: Tokenizer) -> str:
    """The whole text of an example."""
    if example.is_chat:
        return render(tokenizer, example)
    begin = "" if example.prompt.startswith(tokenizer.begin) else tokenizer.begin
    return begin + example.prompt + example.completion + tokenizer.end


def _check_answers(
    example: Example, tokenizer: Tokenizer, ids: Sequence[int], targets: Sequence[int], turns: Sequence[int]
) -> None:
    """Where an answer was found by a mark: its tokens, decoded, hold its text. Raises DataError."""
    decode = getattr(tokenizer, "decode", None)
    if decode is None:
        return
    spelled = _plain(decode([ids[t] for t in targets]))
    for turn in turns:
        for kind, piece in example.messages[turn].pieces():
            if kind == "content" and _plain(piece) not in spelled:
                raise DataError(
                    f"example {example.id!r}: the tokens of messages[{turn}] do not spell its text, so what would be "
                    f"measured under the chat template of {tokenizer.name} is not the answer. Use prompt/completion "
                    "records."
                )


def _plain(text: str) -> str:
    """What is left of a text by normalisers of tokenizers: no white space, no case, no variants of characters."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def encode_dataset(dataset: Dataset, tokenizer: Tokenizer, loss_on: LossOn = "last") -> tuple[EncodedExample, ...]:
    """Every example of a data set as token ids, in order. Raises DataError that lists every line that cannot be
    encoded, and lines that differ but become the same tokens."""
    encoded: list[EncodedExample] = []
    problems: list[str] = []
    firsts: dict[tuple[int, ...], int] = {}
    same: list[str] = []
    for position, example in enumerate(dataset):
        try:
            one = encode_example(example, tokenizer, loss_on)
        except DataError as error:
            problems.append(f"{dataset.where(position)}: {error}")
            continue
        encoded.append(one)
        first = firsts.setdefault(one.ids, position)
        if first != position and _said(dataset[first], one.left_out) != _said(example, one.left_out):
            same.append(f"{dataset.where(position)}: becomes the same tokens as {dataset.where(first)}, but differs")
    if problems:
        raise DataError(f"{dataset.name} cannot be encoded; nothing was sent. Fix these lines:", folded(problems))
    if same:
        raise DataError(
            f"the tokenizer or chat template of {tokenizer.name} loses what tells examples of {dataset.name} apart: "
            "they would be trained and measured as one. Nothing was sent. Use the model's own tokenizer and template.",
            folded(same),
        )
    return tuple(encoded)


def encode_training(dataset: Dataset, tokenizer: Tokenizer, max_context: int) -> list[EncodedExample]:
    """A training file as token ids; assistant turns with ``weight: 0`` carry no loss, all others do.

    Raises DataError that lists every problem with its line.
    """
    encoded, problems = [], []
    for position, example in enumerate(dataset):
        try:
            encoded.append(encode_example(example, tokenizer, loss_on="all"))
        except DataError as error:
            problems.append(f"{dataset.where(position)}: {error}")
            continue
        if (size := len(encoded[-1].ids)) > max_context:
            problems.append(
                f"{dataset.where(position)}: has {size} tokens, the model's context length is {max_context}"
            )
    if problems:
        raise DataError("the training file cannot be used; nothing was trained.", problems)
    return encoded


def folded(problems: Sequence[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], f"and {more:,} more lines"] if more > 0 else list(problems)


def _said(example: Example, left_out: Sequence[str]) -> list[str]:
    """What an example says, without white space around it and without what no template writes."""
    if not example.is_chat:
        return [*example.prompt.split(), *example.completion.split()]
    kept = [m for m in example.messages if m.role in ("user", "assistant") or f"the {m.role} message" not in left_out]
    reasons = any("reasoning" in what for what in left_out)
    return [p.strip() for m in kept for kind, p in m.pieces() if p.strip() and not (reasons and kind == "reasoning")]


Encode = Callable[[Dataset], Sequence[EncodedExample]]
"""A data set as token ids, in order; :func:`encode_dataset` with its tokenizer, or what is known from it already."""
