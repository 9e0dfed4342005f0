"""Tables as files and as text, safe for spreadsheets and for the programs that read them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .._util.files import replacing
from .._util.text import csv_cell
from ..errors import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    import pandas as pd

TableFormat = Literal["table", "csv", "json", "parquet"]


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
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("parquet", "parquet") from error
        plain = table.copy()
        plain.attrs = {}
        with replacing(output) as part:
            plain.to_parquet(part, index=False)
        return
    text = _csv(table) if form == "csv" else _json(table)
    if output is None:
        sys.stdout.write(text)
    else:
        with replacing(output) as part:
            part.write_text(text, encoding="utf-8")


def _csv(table: pd.DataFrame) -> str:
    safe = table.map(lambda cell: csv_cell(cell) if isinstance(cell, str) else cell)
    # Every text is quoted: by default a carriage return is not, and what follows it would begin a row of its own.
    text: str = safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    return text


def _json(table: pd.DataFrame) -> str:
    # pandas turns NaN into null; json.dumps would write the non-standard NaN.
    rows = json.loads(table.to_json(orient="records", double_precision=15))
    return json.dumps({**table.attrs, "rows": rows}) + "\n"
