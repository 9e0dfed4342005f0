"""The run.yaml that ``daunce init`` writes: every key of :class:`RunConfig`, with its meaning and default.

The text is made from the fields themselves, so a key cannot be missing or described as something that it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..config import RunConfig, section_of
from ..errors import ConfigurationError

FILE_NAME = "run.yaml"

_HEAD = f"""\
# One run: which examples of data.train made the model answer as in data.test?
#
#   daunce plan {FILE_NAME}    jobs, tokens, dollars and time; nothing is spent
#   daunce run {FILE_NAME}     trains, scores and attributes; the same command again does only what is missing
#
# Every key is here. Lines that begin with '#' show what holds when the key is left out.
# No API key belongs in this file: backend.api_key_env names the environment variable that holds it.
"""

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "embedded": {},
    "local": {"backend.model": "smollm2-135m"},
    "openai": {
        "backend.model": "gpt-4.1-mini-2025-04-14",
        "backend.api_key_env": "OPENAI_API_KEY",
        "budget.max_usd": 10.0,
    },
    "openai_wire": {"backend.model": "NAME-OF-THE-MODEL", "backend.base_url": "http://127.0.0.1:8000/v1"},
}
_OTHER_PRESET = {"backend.model": "NAME-OF-THE-MODEL", "budget.max_usd": 10.0}

_TRAIN_WORDS = ("train",)
_TEST_WORDS = ("test", "quer", "eval", "valid", "dev")
_COMMENT_COLUMN = 34


def write_template(
    folder: str | Path, *, train: str | Path | None = None, test: str | Path | None = None, backend: str = "embedded"
) -> Path:
    """Write ``run.yaml`` into a folder, which is made where it is missing, and return its path.

    Data files that are not given are looked for in the folder: JSONL files whose names say train or test (query,
    eval, valid, dev), or the one other file beside such a one. Where none is found the names ``train.jsonl`` and
    ``test.jsonl`` are written.

    Raises ConfigurationError where the file is there already (it is left as it is), a given data file is not, or the
    folder cannot be written. ``backend`` is taken as it is: an unknown kind is found when the config is used.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    try:
        found = _find_data(folder)
        text = template(
            train=_seen_from(folder, train) if train else found[0] or "train.jsonl",
            test=_seen_from(folder, test) if test else found[1] or "test.jsonl",
            backend=backend,
        )
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        if isinstance(error, FileExistsError) and path.exists():
            raise ConfigurationError(f"{path} exists and was left as it is. Edit it, or name another folder.") from None
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{path} cannot be written: {reason}. Choose another folder.") from error
    return path


def template(*, train: str, test: str, backend: str = "embedded") -> str:
    """The text of a run.yaml that :meth:`RunConfig.from_yaml` reads; paths are written as they are given."""
    values = {"data.train": train, "data.test": test, "backend.kind": backend, **_PRESETS.get(backend, _OTHER_PRESET)}
    return "\n".join([_HEAD, *_section(RunConfig, values, "", active=True)]) + "\n"


def _section(model: type[BaseModel], values: Mapping[str, Any], prefix: str, *, active: bool) -> Iterator[str]:
    depth = prefix.count(".")
    for name, field in model.model_fields.items():
        key = prefix + name
        section = section_of(field.annotation)
        if section is None:
            value = values[key] if key in values else field.get_default(call_default_factory=True, validated_data={})
            shown = active and (key in values or _is_set(field))
            yield _line(depth, f"{name}: {_scalar(value)}", _meaning(field), shown)
        else:
            shown = active and _any_set(field, section, values, key + ".")
            if depth == 0:
                yield ""
            yield _line(depth, f"{name}:", _meaning(field), shown)
            yield from _section(section, values, key + ".", active=shown)


def _is_set(field: FieldInfo) -> bool:
    """Whether a plain field stands in the file uncommented: it has a fixed default that says something."""
    return field.default_factory is None and field.default is not None


def _any_set(field: FieldInfo, section: type[BaseModel], values: Mapping[str, Any], prefix: str) -> bool:
    """Whether a section is written uncommented. An optional one only where a value is given: its mere presence
    means something. The others wherever a line below is: a header alone would be read as null."""
    if any(key.startswith(prefix) for key in values):
        return True
    optional = field.default is None
    return not optional and any(_is_set(f) for f in section.model_fields.values() if section_of(f.annotation) is None)


def _line(depth: int, text: str, meaning: str, shown: bool) -> str:
    start = ("" if shown else "# ") + "  " * depth + text
    return f"{start:<{_COMMENT_COLUMN}}  # {meaning}"


def _meaning(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return f"{field.description} ({' | '.join(choices)})" if choices else str(field.description)


def _scalar(value: Any) -> str:
    plain = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=100_000)
    text = text.removesuffix("\n").removesuffix("\n...")
    if "\n" in text:  # on one line, with escapes
        text = yaml.safe_dump(plain, default_style='"', width=100_000).removesuffix("\n")
    return text


def _find_data(folder: Path) -> tuple[str | None, str | None]:
    names = [p.name for p in sorted(folder.glob("*.jsonl")) if p.is_file() and _writable(p.name)]
    train = next((n for n in names if _says(n, _TRAIN_WORDS)), None)
    test = next((n for n in names if n != train and _says(n, _TEST_WORDS)), None)
    rest = [n for n in names if n not in (train, test)]
    if len(rest) == 1 and (train is None) != (test is None):
        train, test = train or rest[0], test or rest[0]
    return train, test


def _says(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name.lower() for word in words)


def _writable(name: str) -> bool:
    """Whether a file's name can stand in a UTF-8 file; names on disk are arbitrary bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seen_from(folder: Path, given: str | Path) -> str:
    """A data file as the config names it: relative to its folder if it lies in there, otherwise absolute."""
    path = Path(given).expanduser().resolve()
    if not path.is_file():
        raise ConfigurationError(f"{given} is no file. Check the path; nothing was written.")
    if not _writable(str(path)):
        raise ConfigurationError(f"the name of {str(path)!r} is not UTF-8. Rename it; nothing was written.")
    return str(path.relative_to(folder.resolve())) if path.is_relative_to(folder.resolve()) else str(path)
