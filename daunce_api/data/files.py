"""Data files as rows: JSONL, JSON (arrays, pretty-printed), CSV and TSV, Parquet, any of them in gzip, and folders of
Hugging Face data sets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingExtraError
from .records import record_of_row

Rows = list[tuple[int, Any]]
Problems = list[tuple[int, str]]

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
"""Names that data files end with; each may be followed by ``.gz``."""

_MAX_BYTES = 4 * 2**30
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SPLIT = re.compile(r"(train|test|valid\w*|eval\w*|dev)", re.IGNORECASE)
_TRAILING_COMMA = re.compile(r",\s*[}\]]")


def read_rows(path: Path) -> tuple[Rows, Problems]:
    """The rows of a file or folder, each with its line (or its number in a table), and what could not be read.

    Raises DataError where nothing can be read at all, MissingExtraError where a part of the package is missing.
    """
    if path.is_dir():
        return _folder(path), []
    raw = read_bytes(path)
    name = path.name.lower().removesuffix(".gz")
    if raw.startswith(b"\x1f\x8b"):
        raw = _unzipped(path, raw)
    if raw.startswith(b"PAR1"):
        return numbered(_parquet(io.BytesIO(raw), path)), []
    if raw.startswith(_UTF16_BOMS):
        return [], [(1, "the file is UTF-16, not UTF-8; save it as UTF-8")]
    raw = raw.removeprefix(_UTF8_BOM)
    if name.endswith((".csv", ".tsv")):
        return _table(raw, "\t" if name.endswith(".tsv") else None)
    return _json(raw)


def read_bytes(path: Path) -> bytes:
    """Raises DataError where the file cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}. Check the path.") from error


def parse_lines(raw: bytes) -> tuple[Rows, Problems]:
    """Records and problems of a JSONL file in UTF-8, each with its 1-based line; blank lines count and are skipped.

    A key that is given twice in one object is a problem, because JSON readers drop one of the two in silence.
    """
    if raw.startswith(_UTF16_BOMS):
        return [], [(1, "the file is UTF-16, not UTF-8; save it as UTF-8")]
    records: Rows = []
    problems: Problems = []
    for number, line in enumerate(raw.removeprefix(_UTF8_BOM).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append((number, _DECODER.decode(line.decode("utf-8"))))
        except ValueError as error:
            problems.append((number, _why(error, line)))
        except RecursionError:
            problems.append((number, "JSON that is nested too deeply"))
    return records, problems


class _RepeatedKeyError(ValueError):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _RepeatedKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=lambda _: None)


def _why(error: ValueError, line: bytes) -> str:
    """A line's problem, with its likely cause."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1} of the line){_encoding_hint(line)}"
    if isinstance(error, _RepeatedKeyError):
        return f"key {reprlib.repr(error.key)} is given twice in one object"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno}){_json_hint(error)}"
    return "JSON with a number that is too long"  # int() refuses thousands of digits


def _encoding_hint(line: bytes) -> str:
    try:
        line.decode("cp1252")
    except UnicodeDecodeError:
        return ""
    return "; it looks like Windows-1252 (or Latin-1): save the file as UTF-8"


def _json_hint(error: json.JSONDecodeError) -> str:
    text = error.doc.strip()
    near = error.doc[max(error.pos - 2, 0) :]
    if re.match(r"[{\[]\s*'", text) or re.search(r"'\s*:\s*['{\[]", text[:500]):
        return "; it has single quotes, as Python prints them: write it with json.dumps"
    if error.msg.startswith("Illegal trailing comma") or (_TRAILING_COMMA.match(near.lstrip("}] "))):
        return "; a comma stands before a closing bracket: take it out"
    if _TRAILING_COMMA.search(error.doc[max(error.pos - 20, 0) : error.pos + 1]):
        return "; a comma stands before a closing bracket: take it out"
    if error.msg == "Extra data":
        rest = error.doc[error.pos :].strip()
        return "; a comma follows the object: take it out" if rest == "," else "; one line must hold one object only"
    if error.msg.startswith("Invalid control character"):
        return r"; a tab or line break stands inside a text: write it as \t or \n"
    if text[:1] in "\u201c\u201d\u2018\u2019" or "{\u201c" in text[:20]:
        return "; it has typographic quotes: use plain ones"
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
        return "; the line ends too early (was it cut, or is a record spread over several lines?)"
    return ""


def _json(raw: bytes) -> tuple[Rows, Problems]:
    """JSONL, or one JSON text of many records: an array, an object that holds one, or objects one after another."""
    start = raw.lstrip()[:1]
    first = next((line for line in raw.split(b"\n") if line.strip()), b"")
    if start not in b"{[" or not start:
        return parse_lines(raw)
    try:
        whole_line = _DECODER.decode(first.decode("utf-8"))
    except (ValueError, RecursionError):
        whole_line = None
    only_line = first.strip() == raw.strip()
    if start == b"{" and whole_line is not None and not (only_line and _inner(whole_line)):
        return parse_lines(raw)
    if start == b"[" and isinstance(whole_line, list) and (not only_line or _is_chat(whole_line)):
        return parse_lines(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return parse_lines(raw)
    try:
        rows = list(_records(text))
    except RecursionError:
        return [], [(1, "JSON that is nested too deeply")]
    except ValueError as error:
        lines = parse_lines(raw)
        if lines[0] or re.match(rb"\s*\{\s*[\"'][^\"']+[\"']\s*:", first):  # JSONL with a bad first line
            return lines
        if isinstance(error, json.JSONDecodeError):
            problem = f"not JSON: {error.msg} (line {error.lineno} column {error.colno}){_json_hint(error)}"
            return [], [(error.lineno, problem)]
        return [], [(1, _why(error, b""))]
    if len(rows) == 1 and (inner := _inner(rows[0][1])):
        return numbered(inner), []
    return rows, []


def _inner(record: Any) -> list[Any] | None:
    """The list of records in an object such as ``{"data": [...]}``."""
    if not isinstance(record, Mapping):
        return None
    lists = [v for v in record.values() if isinstance(v, list) and v and all(isinstance(r, Mapping) for r in v)]
    return lists[0] if len(lists) == 1 and not any(_is_chat(v) for v in lists) else None


def _is_chat(rows: list[Any]) -> bool:
    return bool(rows) and all(isinstance(r, Mapping) and ("role" in r or "from" in r) for r in rows)


def _records(text: str) -> Iterator[tuple[int, Any]]:
    """Values of an array, or that follow one another, each with its line. Raises ValueError with the place."""
    space = re.compile(r"\s*")
    position = space.match(text).end()  # type: ignore[union-attr]
    array = text[position] == "["
    position += array
    line, counted = 1, 0
    while True:
        position = space.match(text, position).end()  # type: ignore[union-attr]
        if position == len(text):
            if array:
                raise json.JSONDecodeError("Expecting value", text, position)
            return
        if array and text[position] == "]":
            end = space.match(text, position + 1).end()  # type: ignore[union-attr]
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, end)
            return
        line += text.count("\n", counted, position)
        counted = position
        value, position = _DECODER.raw_decode(text, position)
        yield line, value
        position = space.match(text, position).end()  # type: ignore[union-attr]
        if array and text[position : position + 1] == ",":
            position += 1
        elif array and text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)


def _table(raw: bytes, delimiter: str | None) -> tuple[Rows, Problems]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return [], [(line, f"not UTF-8 (byte {error.start + 1} of the file){_encoding_hint(raw)}")]
    header = text.split("\n", 1)[0]
    delimiter = delimiter or max(",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: Rows = []
    problems: Problems = []
    try:
        columns = [c.strip() for c in next(reader, [])]
        repeated = [c for c, n in Counter(columns).items() if n > 1 and c]
        if repeated:
            return [], [(1, f"the table has more than one column {', '.join(repeated)}; rename all but one")]
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(columns):
                problems.append((start, f"the row has {len(cells)} cells, the header {len(columns)}"))
            elif any(cells):
                named = zip(columns, cells, strict=False)
                rows.append((start, {c: v for c, v in named if v != "" and c}))
            start = reader.line_num + 1
    except csv.Error as error:
        problems.append((reader.line_num, f"not CSV: {error}"))
    return rows, problems


def _unzipped(path: Path, raw: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}. Pack it again, or give the unpacked file.") from error
    if len(content) > _MAX_BYTES:
        raise DataError(f"{path} holds more than {_MAX_BYTES // 2**30} GiB. Give the unpacked file, in parts.")
    return content


def _parquet(file: Any, path: Path) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(f"{path.name} is a Parquet file, and reading one", "parquet") from None
    try:
        rows: list[Any] = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is a damaged Parquet file: {error}. Write it again.") from error
    return rows


def numbered(rows: Iterable[Any]) -> Rows:
    """Rows of a table with their numbers, from 1."""
    plain = [record_of_row(row) if isinstance(row, Mapping) else row for row in rows]
    return list(enumerate(plain, start=1))


def _folder(path: Path) -> Rows:
    """A data set as ``save_to_disk`` writes it, or a folder with the files of one split."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise DataError(f"{path} holds several splits ({splits}); give the folder of one, such as {path.name}/train.")
    arrow = sorted(path.glob("*.arrow"))
    if arrow:
        return numbered(row for part in arrow for row in _arrow(part))
    hidden = {".cache", ".git", ".huggingface"}
    parts = [
        p
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name.lower().removesuffix(".gz").endswith(SUFFIXES) and not hidden & set(p.parts)
        if p.name not in ("dataset_infos.json", "dataset_info.json", "state.json")
    ]
    splits_of = {p: (m[0].lower() if (m := _SPLIT.search(str(p.relative_to(path)))) else "") for p in parts}
    if not parts:
        raise DataError(f"{path} is a folder without data files ({', '.join(SUFFIXES)}). Give a file.")
    if len(set(splits_of.values())) > 1 or (len(parts) > 1 and "" in splits_of.values()):
        names = ", ".join(str(p.relative_to(path)) for p in parts[:10])
        raise DataError(f"{path} holds several files ({names}); give one of them.")
    rows: Rows = []
    for part in parts:
        read, problems = read_rows(part)
        if problems:
            raise DataError(f"{part} has problems:", [f"{part.name}:{line}: {text}" for line, text in problems])
        rows += [row for _, row in read] if len(parts) > 1 else read
    return list(enumerate(rows, start=1)) if len(parts) > 1 else rows


def _arrow(path: Path) -> list[Any]:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(f"{path.parent} is a saved data set, and reading one", "parquet") from None
    try:
        with pyarrow.memory_map(str(path)) as source:
            rows: list[Any] = pyarrow.ipc.open_stream(source).read_all().to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is a damaged Arrow file: {error}. Save the data set again.") from error
    return rows
