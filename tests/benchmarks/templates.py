"""What public chat templates do with chats of several shapes: python tests/benchmarks/templates.py FOLDER [--table]

FOLDER holds chat templates (``*.jinja``, in any depth). Every template renders every chat, and the spans of the answers
are found: `exact` by the beginning that two renderings share, `mark` by a mark in place of the answer, `note` where
context is left out and said to be. A span is right when it holds the text of every measured answer and none of a
question. `refused` names the reason; `template` says that the template itself refuses the chat.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daunce_api.data.dataset import Dataset, Example, Message
from daunce_api.data.rendering import rendered_chat
from daunce_api.data.tokenizers.chat_template import ChatTemplate
from daunce_api.errors import ConfigurationError, DataError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": '{"town": "Vaduz"}'}}


def said(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


ASKED, ANSWERED = said("user", "Zermatt question?"), said("assistant", "Mild answer.")
AGAIN, LAST = said("user", "Yverdon question?"), said("assistant", "Final reply.")
CALLED = [said("user", "Zermatt question?"), said("assistant", None, tool_calls=[CALL])]
RESULT = [said("tool", "twenty degrees", tool_call_id="call00001", name="look_up"), said("assistant", "Twenty.")]

CHATS: dict[str, tuple[str, list[dict[str, Any]], list[Any]]] = {
    "plain": ("last", [ASKED, ANSWERED], []),
    "system": ("last", [said("system", "Be short."), ASKED, ANSWERED], []),
    "developer": ("last", [said("developer", "Be short."), ASKED, ANSWERED], []),
    "two turns, last": ("last", [said("system", "Be short."), ASKED, ANSWERED, AGAIN, LAST], []),
    "two turns, all": ("all", [said("system", "Be short."), ASKED, ANSWERED, AGAIN, LAST], []),
    "reasoning": ("last", [ASKED, said("assistant", "Mild answer.", reasoning_content="Since alps.")], []),
    "reasoning in tags": ("last", [ASKED, said("assistant", "<think>\nSince alps.\n</think>\n\nMild answer.")], []),
    "parts": ("last", [said("user", [{"type": "text", "text": "Zermatt question?"}]), ANSWERED], []),
    "call": ("last", CALLED, [TOOL]),
    "call in context": ("last", CALLED + RESULT, [TOOL]),
    "call, all": ("all", CALLED + RESULT, [TOOL]),
}


class Renderer:
    """A template alone, without a tokenizer."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.shapes: dict[Any, Any] = {}
        self._template = ChatTemplate(source, SPECIAL, name=name)

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        return self._template.render(messages, generation_prompt=generation_prompt, tools=tools, options=options)


def outcome(renderer: Renderer, example: Example, loss_on: Any) -> tuple[str, str]:
    turns = example.trained_turns(loss_on)
    try:
        renderer.render(example.messages, **({"tools": example.tools} if example.tools else {}))
    except (DataError, ConfigurationError) as error:
        return "template", str(error)
    try:
        chat = rendered_chat(example, renderer, turns)
    except (DataError, ConfigurationError) as error:
        return "refused", str(error)
    texts = [chat.text[start:stop] for start, stop in chat.spans]
    for turn, text in zip(turns, texts, strict=True):
        message = example.messages[turn]
        wanted = [*(p.strip() for kind, p in message.pieces() if kind == "content" and p.strip())]
        wanted += ["Vaduz"] if message.calls else []
        if not all(w in text for w in wanted) or "question?" in text or "twenty degrees" in text:
            return "WRONG", repr(text)
    if chat.left_out:
        return "note", ", ".join(chat.left_out)
    return ("mark" if chat.marked else "exact"), ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", action="store_true", help="one row a template")
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = {name: Counter() for name in CHATS}
    reasons: Counter[str] = Counter()
    for path in sorted(arguments.folder.rglob("*.jinja")):
        try:
            renderer = Renderer(path.stem, path.read_text(encoding="utf-8"))
        except ConfigurationError as error:
            print(f"{path.stem}: {error}")
            continue
        row = []
        for name, (loss_on, messages, tools) in CHATS.items():
            record: dict[str, Any] = {"messages": messages, **({"tools": tools} if tools else {})}
            kind, why = outcome(renderer, Dataset.from_records([record])[0], loss_on)
            counts[name][kind] += 1
            row.append(kind)
            if kind in ("refused", "WRONG"):
                reasons[f"{path.stem}, {name}: {kind} {why[:230]}"] += 1
        if arguments.table:
            print(f"| {path.stem} | " + " | ".join(row) + " |")
    for name, found in counts.items():
        print(f"{name:18} " + ", ".join(f"{kind} {n}" for kind, n in sorted(found.items())))
    for reason in reasons:
        print(reason)


if __name__ == "__main__":
    main()
