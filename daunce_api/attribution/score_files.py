"""Scores and tables in the forms that other tools read.

The N x M scores are written block by block, so that they need not fit into memory:

* ``npy``: one (N, M) array for ``numpy.load``;
* ``parquet`` and ``csv``: one row a pair (``train_id``, ``test_id``, ``score``), for pandas, polars, DuckDB, ...; in
  CSV, an id that a spreadsheet would take for a formula gets an apostrophe;
* ``bergson``: bergson's score folder (``scores.bin`` and ``info.json``; bergson 2.5, read there with
  ``bergson.data.load_scores``), one record a training example, one field a test example.

The sign is ours everywhere, positive = helpful; bergson calls that ``higher_is_better`` (pass it where its commands
ask). Everything is written to a ``.part`` and then renamed, so that a reader never sees half a file.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from .._util.files import replacing, write
from .._util.text import csv_cell
from ..errors import ConfigurationError, DataError, MissingExtraError

if TYPE_CHECKING:
    import pandas as pd

ScoreFormat = Literal["npy", "csv", "parquet", "bergson"]
TableFormat = Literal["table", "csv", "json", "parquet"]
Blocks: TypeAlias = Iterable[NDArray[Any]]
"""(n, M) scores of consecutive training examples, N rows in all."""
Ids: TypeAlias = Sequence[str]


def write_scores(path: Path, form: str, blocks: Blocks, train_ids: Sequence[str], test_ids: Sequence[str]) -> Path:
    """Write scores, and return where.

    Args:
        path: the file, or with ``bergson`` the folder; folders above it are made.
        form: a `ScoreFormat`.
        blocks: (n, M) scores in the order of ``train_ids``, float32 or float64; positive = helpful.
        train_ids, test_ids: N and M ids; ``csv`` and ``parquet`` keep them.

    Raises:
        ConfigurationError: an unknown form.
        DataError: blocks that do not make up (N, M), or with ``bergson`` scores that are missing.
        MissingExtraError: ``parquet`` without pyarrow.
        StoreError: the file cannot be written.
    """
    writers: dict[str, Callable[..., None]] = {"npy": _npy, "csv": _csv, "parquet": _parquet, "bergson": _bergson}
    if form not in writers:
        raise ConfigurationError(
            f"Scores cannot be written as {form!r}; there are: {', '.join(get_args(ScoreFormat))}."
        )
    checked = _checked(blocks, len(train_ids), len(test_ids))
    first = next(checked)
    writers[form](path, first.dtype, chain([first], checked), train_ids, test_ids)
    return path


def load_bergson(folder: str | Path) -> NDArray[Any]:
    """Read a bergson score folder (one row a document) as (N, M) scores; the sign is the folder's.

    Raises:
        DataError: not such a folder, or scores in it were never written.
    """
    folder = Path(folder)
    try:
        info = json.loads((folder / "info.json").read_text())
        record = np.dtype(info["dtype"])
        rows = np.memmap(folder / "scores.bin", dtype=record, mode="r", shape=(int(info["num_rows"]),))
        count = int(info["num_scores"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is not a score folder of bergson ({error}).") from error
    if info.get("attribute_tokens"):
        raise DataError(f"{folder} holds scores of tokens; only scores of documents can be read.")
    if not all(rows[f"written_{j}"].all() for j in range(count)):
        raise DataError(f"{folder} has scores that were never written; finish the run that makes it.")
    return np.stack([np.asarray(rows[f"score_{j}"]) for j in range(count)], axis=1)


def _checked(blocks: Blocks, rows: int, columns: int) -> Iterator[NDArray[Any]]:
    """Blocks of one type that make up (rows, columns)."""
    seen = 0
    dtype: np.dtype[Any] | None = None
    for given in blocks:
        block = np.asarray(given)
        if dtype is None:
            dtype = np.dtype(np.float32 if block.dtype == np.float32 else np.float64)
        if block.ndim != 2 or block.shape[1] != columns or seen + len(block) > rows:
            raise DataError(f"A block of scores {block.shape} at row {seen} does not fit ({rows}, {columns}) scores.")
        seen += len(block)
        yield np.ascontiguousarray(block, dtype=dtype)
    if seen != rows:
        raise DataError(f"Scores of {seen} training examples were given for {rows} training ids.")


def _npy(path: Path, dtype: np.dtype[Any], blocks: Iterator[NDArray[Any]], train_ids: Ids, test_ids: Ids) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (len(train_ids), len(test_ids))}
    with replacing(path) as part, part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            block.tofile(file)


def _parquet(path: Path, dtype: np.dtype[Any], blocks: Iterator[NDArray[Any]], train_ids: Ids, test_ids: Ids) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("Writing parquet", "parquet") from error
    text = pa.dictionary(pa.int32(), pa.string())
    fields = [("train_id", text), ("test_id", text), ("score", pa.from_numpy_dtype(dtype))]
    schema = pa.schema(fields, metadata={"sign": "positive = helpful"})
    start = 0
    with replacing(path) as part, pq.ParquetWriter(part, schema) as writer:
        for block in blocks:
            ids = (train_ids[start : start + len(block)], test_ids)
            columns = [
                pa.DictionaryArray.from_arrays(places.ravel(), pa.array(list(names), pa.string()))
                for places, names in zip(np.indices(block.shape, dtype=np.int32), ids, strict=True)
            ]
            scores = pa.array(block.reshape(-1), from_pandas=True)  # NaN becomes null
            writer.write_table(pa.table([*columns, scores], schema=schema))
            start += len(block)


def _csv(path: Path, dtype: np.dtype[Any], blocks: Iterator[NDArray[Any]], train_ids: Ids, test_ids: Ids) -> None:
    columns = [csv_cell(name) for name in test_ids]
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["train_id", "test_id", "score"])
        start = 0
        for block in blocks:
            for name, row in zip(train_ids[start : start + len(block)], block.tolist(), strict=True):
                example = csv_cell(name)
                writer.writerows((example, c, "" if math.isnan(v) else v) for c, v in zip(columns, row, strict=True))
            start += len(block)


def _bergson(path: Path, dtype: np.dtype[Any], blocks: Iterator[NDArray[Any]], train_ids: Ids, test_ids: Ids) -> None:
    rows, columns, width = len(train_ids), len(test_ids), dtype.itemsize
    # bergson aligns each (score, written) pair to the next power of two.
    pair = np.dtype(
        {"names": ["score", "written"], "formats": [dtype, bool], "offsets": [0, width], "itemsize": 2 * width}
    )
    with replacing(path / "scores.bin") as part, part.open("wb") as file:
        for block in blocks:
            if not np.isfinite(block).all():
                raise DataError(
                    "bergson's folder holds one finite score for every pair, and some pairs have none; nothing was "
                    "written. Leave out the examples that members have not scored, or take npy or parquet."
                )
            pairs = np.zeros(block.shape, dtype=pair)
            pairs["score"], pairs["written"] = block, True
            pairs.tofile(file)
    info = {
        "attribute_tokens": False,
        "num_items": rows,
        "num_rows": rows,
        "num_scores": columns,
        "dtype": {
            "names": [name for j in range(columns) for name in (f"score_{j}", f"written_{j}")],
            "formats": [dtype.name, "bool"] * columns,
            "offsets": [offset for j in range(columns) for offset in (2 * width * j, 2 * width * j + width)],
            "itemsize": 2 * width * columns,
        },
    }
    write(path / "info.json", json.dumps(info, indent=2))


def write_table(table: pd.DataFrame, form: TableFormat, output: Path | None) -> None:
    """Write a table to a file, or to standard output.

    ``csv`` neutralises text cells that a spreadsheet would take for formulas. ``json`` is one object with ``rows``
    and the table's ``attrs``; in the other forms a column ``measured`` says what was measured where that is not the
    whole completion. Raises ConfigurationError for a form that cannot go to standard output,
    StoreError where a file cannot be written, and MissingExtraError without pyarrow.
    """
    if form != "json":
        measured = table.attrs.get("measured", "completion")
        table = table if measured == "completion" else table.assign(measured=measured)
    if form == "table":
        raise ConfigurationError("--output needs --format csv, json or parquet.")
    if form == "parquet":
        if output is None:
            raise ConfigurationError("--format parquet is binary: add --output FILE.parquet.")
        plain = table.copy()
        plain.attrs = {}
        try:
            with replacing(output) as part:
                plain.to_parquet(part, index=False)
        except ImportError as error:
            raise MissingExtraError("parquet", "parquet") from error
        return
    text = _table_csv(table) if form == "csv" else _table_json(table)
    if output is None:
        sys.stdout.write(text)
    else:
        write(output, text)


def _table_csv(table: pd.DataFrame) -> str:
    safe = table.map(lambda cell: csv_cell(cell) if isinstance(cell, str) else cell)
    # Every text is quoted: by default a carriage return is not, and what follows it would begin a row of its own.
    text: str = safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    return text


def _table_json(table: pd.DataFrame) -> str:
    return json.dumps({**table.attrs, "rows": table_rows(table)}, allow_nan=False) + "\n"


def table_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain data with every digit, None for NaN, which JSON has not."""
    return [
        {str(name): None if isinstance(cell, float) and math.isnan(cell) else cell for name, cell in row.items()}
        for row in table.to_dict("records")
    ]
