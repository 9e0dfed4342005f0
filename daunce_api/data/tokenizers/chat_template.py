"""Chat templates: Jinja programs that come with a model, run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...errors import ConfigurationError, DataError


class ChatTemplate:
    """One compiled template with the names that Hugging Face's renderer gives it.

    No clock is given to it (``strftime_now``), so the same messages always give the same text.
    """

    def __init__(self, source: str, special: Mapping[str, str], *, name: str) -> None:
        """``special`` holds ``bos_token``, ``eos_token``, ...; raises ConfigurationError for a template with errors."""
        self._name = name
        self._special = dict(special)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise self._broken(error) from error

    def render(self, records: Sequence[Mapping[str, str]], *, generation_prompt: bool) -> str:
        """Raises DataError where the template refuses the messages, ConfigurationError where it fails."""
        try:
            return self._template.render(
                messages=records, add_generation_prompt=generation_prompt, tools=None, documents=None, **self._special
            )
        except DataError:
            raise
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"the chat template of {self._name} does not work: {error}. Mend its chat_template.jinja, "
            "or use prompt/completion records."
        )


def _refuse(message: str) -> None:
    raise DataError(f"the chat template refuses the messages: {message}")


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}``: marks the assistant's tokens for other programs; only its content
    matters here."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
