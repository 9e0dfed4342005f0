"""Examples as plain text, for servers that take no token ids.

Such a server tokenizes by itself, so its ids must come back and be those of the example; otherwise nothing is used.
Many put the token that begins a text (BOS) in front by themselves. Then the text is sent without it, and what they
read is the example again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ...data.dataset import Example
from ...data.encoded import text_of as whole_text
from ...data.literal import MARK
from ...data.tokenizers import EncodedExample, Tokenizer
from ...errors import ContractError, RejectedError
from ..base import ProbeReport, ScorerCapabilities, TokenScores
from ..contract import check_ids, refuse_long, scores_of
from ..openai_wire.client import WireClient
from ..openai_wire.wire_scorer import OneByOneScorer
from ..probe import GENERATED, compare, not_generating


def text_of(example: Example, tokenizer: Tokenizer) -> str:
    """The whole text that :func:`daunce_api.data.tokenizers.encode_example` turns into ids."""
    # The marks keep a content from spelling a special token for our tokenizer. A server would read one in such a
    # content all the same; then its ids differ and the answer is refused.
    return whole_text(example, tokenizer).replace(MARK, "")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server says of one text: the ids that it read, a log-probability each, and what it generated then:
    (id, log-probability, text), up to the first token that is no text."""

    ids: Sequence[object]
    values: Sequence[object]
    made: Sequence[tuple[object, object, str]] = ()


class TextScorer(OneByOneScorer):
    """A scorer of servers that take one text a request. Closing it closes the client.

    ``leading`` special tokens of the server's own stand in front of every example besides its own; ``limit`` is the
    longest prompt in tokens, ``hint`` what to do where log-probabilities are missing.
    """

    def __init__(
        self,
        client: WireClient,
        capabilities: ScorerCapabilities,
        tokenizer: Tokenizer,
        *,
        leading: int,
        limit: int | None,
        hint: str,
    ) -> None:
        super().__init__(client, capabilities)
        self._tokenizer = tokenizer
        self._leading = leading
        self._limit = limit
        self._hint = hint
        self._front: object = None
        """Id that the server puts in front of every text, once an answer has shown that it doubles the example's."""

    @abstractmethod
    async def _read(self, model: str, text: str, *, doing: str, count: int = 1) -> Reading:
        """What the server reads of a text, and up to ``count`` tokens that it generates greedily."""

    async def _score(self, model: str, example: EncodedExample) -> TokenScores:
        refuse_long(example, 1 + self._leading, self._limit)
        doing = f"scoring example {example.example.id!r} under {model}"
        text = text_of(example.example, self._tokenizer)
        sent = self._without_front(example, text)
        reading = await self._read(model, sent, doing=doing)
        if sent == text and not self._leading and self._doubles(example, reading):
            self._front = example.ids[0]
            sent = self._without_front(example, text)
            reading = await self._read(model, sent, doing=doing)
        return self._scores(example, reading, shortened=sent != text)

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Compare log-probabilities with those of greedy generation.

        The generated text is sent back and must be read as the generated tokens; where it is not, nothing can be
        told. Raises as :meth:`score`, and ContractError where the values differ.
        """
        await self._score(model, example)  # whether the model is there, and what the server puts in front
        room = GENERATED if self._limit is None else self._limit - len(example.ids) - self._leading - 1
        text = text_of(example.example, self._tokenizer)
        offsets = self._tokenizer.encode_with_offsets(text)[1]
        whole = self._without_front(example, text)
        prompt = whole[: len(whole) - len(text) + offsets[example.targets[0]][0]] or whole
        doing = f"testing {model}"
        try:
            first = await self._read(model, prompt, doing=doing, count=max(1, min(GENERATED, room)))
        except RejectedError as error:
            return not_generating(error)
        again = await self._read(model, prompt + "".join(said for _, _, said in first.made), doing=doing)
        pairs = []
        for position, (token, value, _) in enumerate(first.made, start=len(first.ids)):
            if position >= len(again.ids) or again.ids[position] != token:
                break  # its own text is read as other tokens from here on
            pairs.append((position, value, again.values[position]))
        if not pairs or list(again.ids[: len(first.ids)]) != list(first.ids):
            return ProbeReport(False, "the endpoint reads the text that it generates as other tokens than it made")
        return compare(self.client.provider, pairs)

    def _without_front(self, example: EncodedExample, text: str) -> str:
        """The text as it is to be sent: without the token that the server puts in front itself."""
        begins = self._front is not None and example.ids[0] == self._front
        return text[self._tokenizer.encode_with_offsets(text)[1][0][1] :] if begins else text

    def _doubles(self, example: EncodedExample, reading: Reading) -> bool:
        return list(reading.ids) == [example.ids[0], *example.ids]

    def _scores(self, example: EncodedExample, reading: Reading, *, shortened: bool) -> TokenScores:
        provider, name, leading = self.client.provider, f"example {example.example.id!r}", self._leading
        ids, values = list(reading.ids), list(reading.values)
        if not values:
            return scores_of(provider, example, None, hint=self._hint)
        if shortened and ids != list(example.ids):
            raise ContractError(
                f"{provider} read other tokens than those of {name}: it puts the special token {self._front} in front "
                "of every text, and reads the text behind it in another way than where the token is part of the text. "
                "Nothing was used. Use a server that takes token ids (vLLM, SGLang, `daunce serve`)."
            )
        if not leading and ids[1:] == list(example.ids):
            raise ContractError(
                f"{provider} read other tokens than those of {name}: it puts a special token (id {ids[0]}) in front, "
                "and the example has none there. Nothing was used. Point backend.tokenizer to the served model's own "
                "folder: where its tokenizer begins every text with this token, examples do too. Where the members "
                "were trained without it, serve a tokenizer that adds none, or accept it with "
                "backend.scorer.options.leading_tokens: 1."
            )
        check_ids(provider, example, ids[leading:])
        if leading and ids[:leading] == list(example.ids[:leading]):
            raise ContractError(
                f"{provider} puts the token {ids[0]} in front of {name}, which begins with it already, so it would be "
                "scored behind a doubled token. Nothing was used. Take backend.scorer.options.leading_tokens out: the "
                "text is then sent without what the server adds."
            )
        return scores_of(provider, example, values[leading:], hint=self._hint)
