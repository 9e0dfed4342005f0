"""The run.yaml that ``daunce init`` writes: every key of :class:`RunConfig`, with its meaning and default.

The text is made from the fields themselves, so a key cannot be missing or described as something that it is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..config import RunConfig, section_of
from ..data.dataset import Dataset
from ..data.files import SUFFIXES
from ..errors import ConfigurationError, DaunceError

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
    "local": {"backend.model": "HuggingFaceTB/SmolLM2-135M"},
    "openai": {
        "backend.model": "gpt-4.1-mini-2025-04-14",
        "backend.api_key_env": "OPENAI_API_KEY",
        "budget.max_usd": 10.0,
    },
    "openai_wire": {"backend.model": "NAME-OF-THE-MODEL", "backend.base_url": "http://127.0.0.1:8000/v1"},
}
_OTHER_PRESET = {"backend.model": "NAME-OF-THE-MODEL", "budget.max_usd": 10.0}

_TRAIN_WORDS = ("train", "fine", "finetun", "tuning", "sft", "instruct")
_TEST_WORDS = ("test", "quer", "question", "eval", "valid", "val", "dev", "holdout", "heldout")
"""What the words of a file's name begin with, the likeliest first."""
_OTHER_WORDS = ("result", "metric", "config", "package", "tokenizer", "prediction", "output", "lock", "report")
_SMALLEST_SUBSET = 10
"""Examples that OpenAI's wire format takes at least."""
_COMMENT_COLUMN = 34


def write_template(
    folder: str | Path, *, train: str | Path | None = None, test: str | Path | None = None, backend: str = "embedded"
) -> Path:
    """Write ``run.yaml`` into a folder, which is made where it is missing, and return its path.

    Data files that are not given are looked for in the folder: files whose names say train (fine-tuning, sft) or test
    (query, question, eval, val, dev), or the one other file beside such a one. Where none is found the names
    ``train.jsonl`` and ``test.jsonl`` are written. With few examples members see a larger share of them, so that
    their subsets are large enough.

    Raises ConfigurationError where run.yaml exists (it is left as it is), a data file that was named does not, or the
    folder cannot be written. ``backend`` is not checked: an unknown kind is found when the config is used.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    try:
        found = _find_data(folder)
        train_name = _seen_from(folder, train) if train else found[0] or "train.jsonl"
        text = template(
            train=train_name,
            test=_seen_from(folder, test) if test else found[1] or "test.jsonl",
            backend=backend,
            subset_ratio=_ratio(described(folder / train_name)[1]),
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


def _ratio(records: int) -> float | None:
    """The share of so few examples that makes a subset large enough; None where the default does."""
    if not _SMALLEST_SUBSET < records < 2 * _SMALLEST_SUBSET:
        return None
    return math.ceil(1000 * _SMALLEST_SUBSET / records) / 1000


def template(*, train: str, test: str, backend: str = "embedded", subset_ratio: float | None = None) -> str:
    """The text of a run.yaml that :meth:`RunConfig.from_yaml` reads; paths are written as they are given."""
    values = {"data.train": train, "data.test": test, "backend.kind": backend, **_PRESETS.get(backend, _OTHER_PRESET)}
    if subset_ratio is not None:
        values["ensemble.subset_ratio"] = subset_ratio
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
    meaning = " ".join(str(field.description).split())
    return f"{meaning} ({' | '.join(choices)})" if choices else meaning


def _scalar(value: Any) -> str:
    plain = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=100_000)
    text = text.removesuffix("\n").removesuffix("\n...")
    if "\n" in text:  # on one line, with escapes
        text = yaml.safe_dump(plain, default_style='"', width=100_000).removesuffix("\n")
    return text


def _find_data(folder: Path) -> tuple[str | None, str | None]:
    """Names of the training file and of the one with questions, by what their names say; JSONL before other formats."""
    files = [p.name for p in sorted(folder.glob("*")) if p.is_file() and _writable(p.name)]
    named = [n for n in files if n.lower().removesuffix(".gz").endswith(SUFFIXES) and not _says(n, _OTHER_WORDS)]
    names = sorted(named, key=lambda n: SUFFIXES.index(Path(n.lower().removesuffix(".gz")).suffix))
    plain = [n for n in names if not n.lower().endswith(".json") or _says(n, _TRAIN_WORDS) or _says(n, _TEST_WORDS)]
    tests = [n for word in _TEST_WORDS for n in plain if _says(n, (word,)) and not _says(n, _TRAIN_WORDS[:1])]
    test = tests[0] if tests else None
    train = next((n for word in _TRAIN_WORDS for n in plain if _says(n, (word,)) and n not in tests), None)
    rest = [n for n in plain if n != train and n not in tests]
    if len(rest) == 1 and (train is None) != (test is None):
        train, test = train or rest[0], test or rest[0]
    return train, test


def _says(name: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words that a file's name is made of begins so; ``val`` stands for itself only."""
    parts = [part for part in re.split(r"[^a-z]+", name.lower()) if part]
    return any(part == word if word == "val" else part.startswith(word) for part in parts for word in words)


def described(path: Path) -> tuple[str, int]:
    """What a data file holds, in words, and how many records; 0 where it cannot be used."""
    if not path.exists():
        return "is not there yet", 0
    try:
        data = Dataset.from_file(path)
    except DaunceError as error:
        return f"cannot be used: {error}", 0
    return f"{data.dialect}, {len(data):,} record{'s' * (len(data) != 1)}", len(data)


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
    if not path.exists():
        raise ConfigurationError(f"{given} does not exist. Check the path; nothing was written.")
    if not _writable(str(path)):
        raise ConfigurationError(f"the name of {str(path)!r} is not UTF-8. Rename it; nothing was written.")
    return str(path.relative_to(folder.resolve())) if path.is_relative_to(folder.resolve()) else str(path)
