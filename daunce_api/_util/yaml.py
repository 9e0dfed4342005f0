"""Read YAML 1.2 scalars from a small file; errors name the line but never echo it, since it may hold a key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigurationError

MAX_BYTES = 200_000


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Numbers are those of YAML 1.2: ``010`` is 10, ``1:1`` is a text, ``1e-3`` is a number. Raises ConfigurationError
    where the file cannot be read, is too large, is not valid YAML, or holds something other than a mapping.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{path} cannot be read: {reason}. `daunce init` writes one.") from error
    if len(raw) > MAX_BYTES:
        raise ConfigurationError(f"{path} is not a config file: it has more than {MAX_BYTES:,} bytes.")
    try:
        content = yaml.load(raw, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {_problem(error)}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold a mapping (name:, data:, backend:, ...).")
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (a few lines of them can expand to gigabytes), repeated keys, and YAML 1.1's surprises."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as in PyYAML

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.get_mark().line + 1
            raise ValueError(f"line {line}: aliases (*name) are not allowed in a config file")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: a key is given twice")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node)
        try:
            return int(text, 0) if text.startswith(("0x", "0o")) else int(text)
        except ValueError:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in (
    ("bool", r"(?i:true|false|yes|no|on|off)", "tTfFyYnNoO"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
for _tag in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _PlainLoader.construct_number)


def _problem(error: Exception) -> str:
    """What is wrong and where, without the line itself."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"byte {error.position}: {error.reason}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
