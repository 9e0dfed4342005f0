"""A training file without some of its examples, in the format and order of the original."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .._util.files import write
from ..data.dataset import Dataset
from ..data.files import read_rows
from ..errors import DataError

Rows = list[tuple[int, Any]]


def write_cleaned(original: Path, dataset: Dataset, removed: Collection[int], folder: Path) -> Path:
    """Write ``original`` without the examples at the positions ``removed``; the new file's path.

    ``dataset`` is what was read from ``original``. Lines of JSONL and rows of CSV that stay keep their bytes; JSON
    arrays, Parquet and gzip hold equal records; a folder of a Hugging Face data set becomes one JSONL file. Raises
    DataError where the file does not hold the data set's examples any more, StoreError where the new one cannot be
    written.

        >>> write_cleaned(Path("train.jsonl"), dataset, {3, 17}, Path("run/fix/1"))
        PosixPath('run/fix/1/train.cleaned.jsonl')
    """
    rows, problems = read_rows(original)
    if problems or len(rows) != len(dataset):
        raise DataError(
            f"{original} has changed since the run: it holds {len(rows)} records, the run has {len(dataset)} examples. "
            "Nothing was written. Restore the file, or run again with the new one."
        )
    name = original.name
    if original.is_dir():
        path = folder / f"{name}.cleaned.jsonl"
        write(path, _written_out(_kept([record for _, record in rows], removed)))
        return path
    stem, dot, suffixes = name.partition(".")
    raw = original.read_bytes()
    zipped = raw.startswith(b"\x1f\x8b")
    content = _without(gzip.decompress(raw) if zipped else raw, name.lower().removesuffix(".gz"), rows, removed)
    path = folder / f"{stem}.cleaned{dot}{suffixes}"
    write(path, gzip.compress(content) if zipped else content)
    return path


def _without(raw: bytes, name: str, rows: Rows, removed: Collection[int]) -> bytes:
    if raw.startswith(b"PAR1"):
        return _parquet(raw, removed)
    if name.endswith((".csv", ".tsv")) or _is_jsonl(raw, rows):
        return _lines(raw, [line for line, _ in rows], removed)
    return _json(raw, rows, removed)


def _is_jsonl(raw: bytes, rows: Rows) -> bool:
    """Whether every record is a line of its own."""
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if len({line for line, _ in rows}) < len(rows) or max(line for line, _ in rows) > len(lines):
        return False
    try:
        return all(json.loads(lines[line - 1]) == record for line, record in rows)
    except ValueError:
        return False


def _lines(raw: bytes, starts: list[int], removed: Collection[int]) -> bytes:
    """Drop the lines from each removed record's first to the next record's; all others stay as they are."""
    lines = raw.split(b"\n")
    lines = [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    ends = [*starts[1:], len(lines) + 1]
    gone = {n for p, (a, b) in enumerate(zip(starts, ends, strict=True)) if p in removed for n in range(a, b)}
    bom = b"\xef\xbb\xbf" if raw.startswith(b"\xef\xbb\xbf") and 1 in gone else b""
    kept = b"".join(line for number, line in enumerate(lines, start=1) if number not in gone)
    return bom + (kept if raw.endswith(b"\n") else kept.rstrip(b"\r\n"))


def _json(raw: bytes, rows: Rows, removed: Collection[int]) -> bytes:
    """A JSON array, an object that holds one, or objects one after another, with equal records."""
    indent = 2 if b"\n" in raw.strip() else None
    try:
        whole = json.loads(raw)
    except ValueError:
        return _written_out(_kept([record for _, record in rows], removed), indent)
    if isinstance(whole, dict):
        held = next(key for key, value in whole.items() if isinstance(value, list) and _are_records(value))
        return _written_out([{**whole, held: _kept(whole[held], removed)}], indent)
    return _written_out([_kept(whole, removed)], indent)


def _are_records(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _parquet(raw: bytes, removed: Collection[int]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(raw))
    out = io.BytesIO()
    pyarrow.parquet.write_table(table.take([i for i in range(table.num_rows) if i not in removed]), out)
    return out.getvalue()


def _kept(records: list[Any], removed: Collection[int]) -> list[Any]:
    return [record for position, record in enumerate(records) if position not in removed]


def _written_out(values: list[Any], indent: int | None = None) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False, indent=indent) + "\n" for value in values).encode()
