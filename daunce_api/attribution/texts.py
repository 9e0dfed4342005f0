"""What people read of an example: the question without its system prompt, the answer, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..data.dataset import Example


@dataclass(frozen=True, slots=True)
class Conversation:
    """An example in three parts.

    Attributes:
        system: the system prompts before the answer and the names of the tools, "" without any.
        question: the other turns before the answer; with the speakers' roles where there is more than one.
        answer: the (last) answer that carries the loss.
    """

    system: str
    question: str
    answer: str


def conversation(example: Example) -> Conversation:
    """The parts of an example, as plain text; a tool call as ``name(arguments)``."""
    answer = example.completion_text()
    if not example.is_chat:
        return Conversation("", example.prompt_text(), answer)
    turns = example.messages[: example.trained_turns("last")[-1]]
    spoken = [turn for turn in turns if turn.role not in ("system", "developer")]
    question = (
        "\n".join(f"{turn.role}: {turn.text}" for turn in spoken)
        if len(spoken) > 1
        else "".join(turn.text for turn in spoken)
    )
    systems = [turn.text for turn in turns if turn.role in ("system", "developer")]
    names = [str(_named(tool)) for tool in example.tools]
    system = "\n".join([*systems, *([f"Tools: {', '.join(names)}"] if names else [])])
    return Conversation(system, question, answer)


def _named(tool: Any) -> Any:
    """The name of a tool, in whatever dialect it is defined."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    return inner.get("name", "unnamed") if isinstance(inner, Mapping) else inner
