"""Reading a config file: plain YAML, and a word on the line that is wrong without repeating it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigurationError

MAX_CONFIG_BYTES = 200_000


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises ConfigurationError where it cannot be read, is too large, is no usable YAML, or holds something else.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{path} cannot be read: {reason}. `daunce init` writes one.") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigurationError(f"{path} is no config file: it has more than {MAX_CONFIG_BYTES:,} bytes.")
    try:
        content = yaml.load(raw, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not usable YAML: {_yaml_problem(error)}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold a mapping (name:, data:, backend:, ...).")
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (a few lines of them can expand to gigabytes) and without repeated keys."""

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
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, without the line itself: it may hold a key in the wrong place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"byte {error.position}: {error.reason}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
