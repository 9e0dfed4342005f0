"""What every tokenizer can do, and an example as token ids with the positions that carry its loss."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..errors import DataError
from .dataset import Dataset, Example, LossOn, Message

Span = tuple[int, int]
"""A half-open range of character positions."""


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
        """A chat as the text that :meth:`encode` turns into what the model sees."""
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
    the completion tokens. ``boundary_moved`` says that the tokenizer merged the end of the prompt with the start of
    the completion, so that the merged token counts as completion.
    """

    example: Example
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    boundary_moved: bool = False

    @property
    def key(self) -> str:
        """SHA-256 of ids and targets: equal keys are scored once."""
        return hashlib.sha256(json.dumps([self.ids, self.targets]).encode()).hexdigest()


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

    Raises DataError where the chat template refuses the messages or does not extend its own prefix, or where
    nothing is left to measure.
    """
    if isinstance(tokenizer, ExampleEncoder):
        return tokenizer.encode_example(example)
    if example.is_chat:
        whole, spans = _chat(example, tokenizer, loss_on)
    else:
        begin = "" if example.prompt.startswith(tokenizer.begin) else tokenizer.begin
        whole = begin + example.prompt + example.completion + tokenizer.end
        spans = [(len(begin) + len(example.prompt), len(whole))]
    ids, offsets = tokenizer.encode_with_offsets(whole)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    targets: set[int] = set()
    moved = False
    for start, stop in spans:
        first, after = bisect_right(ends, start), bisect_left(starts, stop)
        targets.update(range(max(first, 1), after))
        moved = moved or (first < len(ids) and starts[first] < start)
    if not targets:
        raise DataError(f"example {example.id!r} has no completion token that a model could predict")
    return EncodedExample(example, tuple(ids), tuple(sorted(targets)), moved)


def encode_dataset(dataset: Dataset, tokenizer: Tokenizer, loss_on: LossOn = "last") -> tuple[EncodedExample, ...]:
    """Every example of a data set as token ids, in order. Raises DataError that lists every line that cannot be
    encoded."""
    encoded, problems = [], []
    for position, example in enumerate(dataset):
        try:
            encoded.append(encode_example(example, tokenizer, loss_on))
        except DataError as error:
            problems.append(f"{dataset.where(position)}: {error}")
    if problems:
        raise DataError(f"{dataset.name} cannot be encoded; nothing was sent. Mend these lines:", problems)
    return tuple(encoded)


Encode = Callable[[Dataset], Sequence[EncodedExample]]
"""A data set as token ids, in order; :func:`encode_dataset` with its tokenizer, or what is known from it already."""


def _chat(example: Example, tokenizer: Tokenizer, loss_on: LossOn) -> tuple[str, list[Span]]:
    """The rendered chat, and the characters of every turn that carries the loss."""
    spans = []
    try:
        whole = tokenizer.render(example.messages)
        for turn in example.trained_turns(loss_on):
            before = tokenizer.render(example.messages[:turn], generation_prompt=True)
            through = tokenizer.render(example.messages[: turn + 1])
            if not (whole.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"the chat template of {tokenizer.name} rewrites earlier turns, so the tokens of messages[{turn}] "
                    "cannot be found in the whole. Use loss_on: last, or prompt/completion records."
                )
            spans.append((len(before), len(through)))
    except DataError as error:
        raise DataError(f"example {example.id!r}: {error}") from error
    return whole, spans
