"""Chat templates: Jinja programs that come with a model, run in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...errors import ConfigurationError, DataError
from ..example import REASONING_FIELDS, Message, decoded_arguments, part_text

DEFAULT_DATE = date(2026, 1, 1)
"""What a template writes that wants today's date and has none of its own: the same messages always give the same
text."""

_PROBE = "daunce7probe"
_CALL_ID = "call00001"  # some templates take nine letters and digits only

Protect = Callable[[str], str]


class ChatTemplate:
    """One compiled template with the names that Hugging Face's renderer gives it.

    Templates differ in what they take: contents as texts or as lists of parts, arguments of calls as objects or as
    JSON texts, reasoning under one name or another. Which it is, is found by rendering a small chat or by reading the
    template, and messages are given in that form.
    """

    def __init__(self, source: str, special: Mapping[str, str], *, name: str, day: date | None = None) -> None:
        """``special`` holds ``bos_token``, ``eos_token``, ...; ``day`` is what ``strftime_now`` gives (default: what
        the template writes where there is no clock, or 2026-01-01). Raises ConfigurationError for a template with
        errors."""
        self._name = name
        self._special = dict(special)
        own_date = "strftime_now is defined" in source
        self.day = (None if own_date else DEFAULT_DATE) if day is None else day
        self.writes_date = "strftime_now" in source and self.day is not None
        read = (re.search(rf"[.'\"]{field}\b", source) for field in REASONING_FIELDS)
        self._reasoning = [field for field, found in zip(REASONING_FIELDS, read, strict=True) if found]
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.globals["raise_exception"] = _refuse
        if self.day is not None:
            environment.globals["strftime_now"] = datetime.combine(self.day, time()).strftime
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise self._broken(error) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
        protect: Protect = str,
    ) -> str:
        """The chat as text; ``protect`` is applied to every text in it that is the user's. ``options`` are further
        variables of the template (``documents``, ``reasoning_effort``, ...).

        Raises DataError where the template refuses the messages, ConfigurationError where it fails.
        """
        more = {k: v for k, v in deep(dict(options or {}), protect).items() if k not in self._special}
        more |= {"tools": [deep(t, protect) for t in tools] or None, "add_generation_prompt": generation_prompt}
        records = [self._record(m, protect) for m in messages]
        try:
            return self._render(records, more)
        except ConfigurationError:
            if not any("content" in r and r["content"] is None for r in records):
                raise
            # A call without a text: some templates join contents without looking.
            return self._render([{**r, "content": r.get("content") or ""} for r in records], more)

    def _render(self, records: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render(messages=records, **{"documents": None, **self._special, **variables})
        except DataError:
            raise
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise self._broken(error) from error

    def _record(self, message: Message, protect: Protect) -> dict[str, Any]:
        record: dict[str, Any] = {"role": message.role, "content": self._content(message, protect)}
        for key, value in message.fields.items():
            if key == "content":
                continue
            if key == "tool_calls":
                record[key] = [self._call(call, protect) for call in value]
            elif key == "function_call":
                record[key] = self._function(value, protect)
            else:
                record[key] = deep(value, protect)
        if message.reasoning and self._reasoning and not record.keys() & set(self._reasoning):
            record[self._reasoning[0]] = protect(message.reasoning)
        return record

    def _content(self, message: Message, protect: Protect) -> Any:
        content = message.content
        if content is None:
            return None
        if isinstance(content, str):
            return protect(content) if self._takes_text else [{"type": "text", "text": protect(content)}]
        if self._takes_parts:
            return [deep({"type": "text", "text": p} if isinstance(p, str) else p, protect) for p in content]
        return protect("".join(text for p in content if (text := part_text(p)) is not None))

    def _call(self, call: Mapping[str, Any], protect: Protect) -> dict[str, Any]:
        record: dict[str, Any] = deep({k: v for k, v in call.items() if k != "function"}, protect)
        record["function"] = self._function(call["function"], protect)
        return record

    def _function(self, function: Mapping[str, Any], protect: Protect) -> dict[str, Any]:
        record: dict[str, Any] = deep({k: v for k, v in function.items() if k != "arguments"}, protect)
        arguments = decoded_arguments(function.get("arguments"))
        if self._wants_text_arguments:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
            record["arguments"] = protect(text)
        else:
            record["arguments"] = deep({} if arguments in (None, "") else arguments, protect)
        return record

    # -- what the template takes ------------------------------------------------------------------------------------

    @cached_property
    def _takes_text(self) -> bool:
        return _PROBE in self._probed([{"role": "user", "content": _PROBE}]) or not self._takes_parts

    @cached_property
    def _takes_parts(self) -> bool:
        shown = self._probed([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        return _PROBE in shown and "'type'" not in shown and '"type"' not in shown

    @cached_property
    def _wants_text_arguments(self) -> bool:
        as_object = self._probed_call({"k": _PROBE})
        if _PROBE in as_object and f"'{_PROBE}'" not in as_object:
            return False
        return _PROBE in self._probed_call(json.dumps({"k": _PROBE}))

    def _probed_call(self, arguments: Any) -> str:
        function = {"name": "f", "arguments": arguments}
        calls = [{"id": _CALL_ID, "type": "function", "function": function}]
        tool = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}
        for content in (None, ""):
            answer = {"role": "assistant", "content": content, "tool_calls": calls}
            messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}, answer]
            shown = self._probed(messages, tools=[{"type": "function", "function": tool}])
            if shown:
                return shown
        return ""

    def _probed(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        try:
            return self._render(messages, {"tools": None, "add_generation_prompt": False, **variables})
        except (DataError, ConfigurationError):
            return ""

    def _broken(self, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"the chat template of {self._name} does not work: {error}. Fix its chat_template.jinja, "
            "or use prompt/completion records."
        )


def deep(value: Any, protect: Protect) -> Any:
    """JSON data with ``protect`` applied to every text in it."""
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, Mapping):
        return {protect(str(k)): deep(v, protect) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [deep(v, protect) for v in value]
    return value


def _refuse(message: str) -> None:
    raise DataError(f"the chat template refuses the messages: {message}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes for HTML. The arguments are those of Hugging Face's filter.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}``: marks the assistant's tokens for other programs; only its content
    matters here."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
