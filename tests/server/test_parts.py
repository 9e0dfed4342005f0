"""The pure parts: tokens as bytes, paging, training files, settings."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import Request

from daunce_api.data.tokenizers import LocalTokenizer
from daunce_api.errors import ConfigurationError
from daunce_api.providers.options import parse_options
from daunce_api.server import InjectSettings, ServerSettings
from daunce_api.server.api_errors import ApiError
from daunce_api.server.paging import page
from daunce_api.server.routes_files import _display_name, file_object
from daunce_api.server.routes_jobs import _suffix
from daunce_api.server.state import State
from daunce_api.server.tokentext import TokenText
from daunce_api.server.training_data import JobError, read_training_file

from .conftest import jsonl, records

EMBEDDED = Path(__file__).parents[2] / "daunce_api" / "server" / "model"
TEXT = TokenText(EMBEDDED)
TOKENIZER = LocalTokenizer(EMBEDDED)

plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(plain_text)
def test_ids_give_back_the_text_and_its_offsets(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TEXT.text(ids) == text
    offsets = TEXT.offsets(ids)
    assert offsets == sorted(offsets)
    assert all(0 <= o <= len(text) for o in offsets)
    whole = b"".join(TEXT.token_bytes(i) for i in ids)
    assert whole == text.encode()
    for at, i in zip(offsets, ids, strict=True):
        label = TEXT.label(i)
        if not label.startswith("bytes:") and "\ufffd" not in text:
            assert text[at : at + len(label)] == label


def test_a_token_that_is_half_a_character_is_named_by_its_bytes() -> None:
    ids = TOKENIZER.encode("日")
    assert [TEXT.label(i) for i in ids] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    assert TEXT.offsets(ids) == [0, 0, 0]


def test_spaces_and_bytes_of_a_sentencepiece_vocabulary_are_kept(tmp_path: Path) -> None:
    """Its decoder takes the space off the beginning of a text, and with it off every token that is decoded alone."""
    vocabulary = {"<unk>": 0, "\u2581the": 1, "re": 2, "<0xE6>": 3, "<0x97>": 4, "<0xA5>": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TokenText(tmp_path)
    assert text.text([1, 2, 1, 3, 4, 5]) == " there the日"
    assert [text.label(i) for i in (1, 2, 3)] == [" the", "re", "bytes:\\xe6"]


@pytest.mark.parametrize(
    ("given_suffix", "stands"),
    [("Demo Set", "demo-set"), ("a:b/../c", "a-b-..-c"), ("ñ", "-"), ("run.1_x-2", "run.1_x-2"), (None, None)],
)
def test_suffixes_cannot_break_a_model_name(given_suffix: str | None, stands: str | None) -> None:
    assert _suffix(given_suffix) == stands


@given(st.text(max_size=300))
def test_file_names_are_shown_without_paths_and_control_characters(name: str) -> None:
    shown = _display_name(name)
    assert 1 <= len(shown) <= 255
    assert shown.isprintable()
    assert not set(shown) & set("/\\")
    shown.encode()


@given(st.lists(st.binary(max_size=60), max_size=14))
def test_no_training_file_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("f") / "file"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(JobError) as caught:
        read_training_file(path, TOKENIZER, 512)
    assert caught.value.code in ("invalid_training_file", "invalid_n_examples")
    assert len(caught.value.message) < 5000


def test_long_lists_of_problems_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(jsonl([{"messages": [{"role": f"role-{i}", "content": "x"}]} for i in range(500)]))
    with pytest.raises(JobError, match="and 491 more"):
        read_training_file(path, TOKENIZER, 512)
    path.write_bytes(jsonl(records(10)))
    assert len(read_training_file(path, TOKENIZER, 512)) == 10


def test_pages_cover_everything_once(tmp_path: Path) -> None:
    state = State(tmp_path)
    for i in range(7):
        state.insert("files", id=f"file-{i}", filename=str(i), bytes=1, purpose="fine-tune", created_at=i)
    service: Any = SimpleNamespace(state=state)

    def listed(after: str, ascending: bool) -> dict[str, Any]:
        request = Request({"type": "http", "query_string": f"limit=3&after={after}".encode()})
        answer: dict[str, Any] = json.loads(page(service, request, "files", file_object, ascending=ascending).body)
        return answer

    for ascending in (False, True):
        seen: list[str] = []
        more = True
        while more:
            shown = listed(seen[-1] if seen else "", ascending)
            more = shown["has_more"]
            assert 1 <= len(shown["data"]) <= 3
            seen += [f["id"] for f in shown["data"]]
        assert seen == sorted((f"file-{i}" for i in range(7)), reverse=not ascending)
    with pytest.raises(ApiError, match="no such object"):
        listed("file-9", False)
    state.close()


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    state = State(tmp_path)
    row = {"id": "file-a", "filename": "a", "bytes": 1, "purpose": "fine-tune", "created_at": 1}

    def insert_twice() -> None:
        with state.transaction():
            state.insert("files", **row)
            state.insert("files", **row)

    with pytest.raises(sqlite3.IntegrityError):
        insert_twice()
    assert state.one("files", "file-a") is None
    state.close()


def test_weights_that_two_models_share_go_with_the_last_of_them(tmp_path: Path) -> None:
    state = State(tmp_path)
    weights = state.adapters_dir / "ftjob-1" / "final"
    for identity, job in (("ft:a", "ftjob-1"), ("made", "ftjob-1:ckpt"), ("made too", "ftjob-1:ckpt")):
        values = {"base": "b", "created_at": 1, "adapter": "ftjob-1/final", "fingerprint": "f"}
        state.insert("models", id=identity, job=job, **values)
    weights.mkdir(parents=True)
    (weights.parent / "final.epoch-1").mkdir()
    state.delete_models_of_job("ftjob-1")
    assert [path.name for path in weights.parent.iterdir()] == ["final"]
    for identity in ("made", "made too"):
        assert weights.exists()
        state.delete_models(state.rows("SELECT * FROM models WHERE id=?", [identity]))
    assert not weights.exists()
    state.close()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "files" / "a folder").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        State(tmp_path)
    (tmp_path / "files" / "a folder").rmdir()
    State(tmp_path, lock_timeout=0.1).close()


def test_options_are_checked_and_named() -> None:
    made = parse_options(ServerSettings, {"workers": 2, "inject": "drop=0.1,seed=2", "state_dir": "/x"}, "here")
    assert made.inject == InjectSettings(drop=0.1, seed=2)
    assert ServerSettings.model_validate(json.loads(made.model_dump_json())) == made
    with pytest.raises(ConfigurationError, match=r"here has problems:\n  wrokers: unknown key; did you mean workers"):
        parse_options(ServerSettings, {"wrokers": 2}, "here")
    with pytest.raises(ValidationError):
        ServerSettings(workers=0)
