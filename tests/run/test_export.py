"""Tables as files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from daunce_api.attribution.score_files import write_table


def table(measured: str) -> pd.DataFrame:
    made = pd.DataFrame({"id": ["a", "b"], "score": [1.0, -2.0]})
    made.attrs["measured"] = measured
    return made


def test_files_name_what_was_measured_where_that_is_not_the_completion(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    first = "first completion token only"
    for name in ("csv", "parquet", "json"):
        for measured in (first, "completion"):
            write_table(table(measured), name, tmp_path / f"{measured}.{name}")  # type: ignore[arg-type]
    with (tmp_path / f"{first}.csv").open() as file:
        assert [row["measured"] for row in csv.DictReader(file)] == [first, first]
    assert list(pd.read_parquet(tmp_path / f"{first}.parquet")["measured"]) == [first, first]
    assert json.loads((tmp_path / f"{first}.json").read_text())["measured"] == first
    assert "measured" not in (tmp_path / "completion.csv").read_text()
    assert "measured" not in pd.read_parquet(tmp_path / "completion.parquet")
