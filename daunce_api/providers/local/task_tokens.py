"""Examples of a classifier where texts have token ids: one id for the input, one for the class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ...data.dataset import Example, Message
from ...data.tokenizers import EncodedExample
from ...errors import DataError
from .task import TaskSpec

_CHAT = "a classifier's examples are prompt/completion records: which input, and its class."


class TaskTokenizer:
    """Stands in for a tokenizer. The class is the one target, so a loss is that of the class."""

    begin = ""
    end = ""

    def __init__(self, spec: TaskSpec) -> None:
        self.name = spec.task
        self._spec = spec
        self._texts: dict[int, str] = {}

    @property
    def fingerprint(self) -> str:
        """Changes with the task's file, the inputs and the start."""
        return self._spec.digest()

    def encode_example(self, example: Example) -> EncodedExample:
        """Raises DataError for a chat."""
        if example.is_chat:
            raise DataError(f"example {example.id!r} is a chat; {_CHAT}")
        return EncodedExample(example, (self._id(example.prompt), self._id(example.completion)), (1,))

    def encode(self, text: str) -> list[int]:
        return [self._id(text)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [self._id(text)], [(0, len(text))]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._texts.get(i, "?") for i in ids]

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Raises DataError: there are no chats here."""
        raise DataError(_CHAT)

    def _id(self, text: str) -> int:
        number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big")
        self._texts[number] = text
        return number
