"""``daunce init``: a template that names every key, says what it means, and parses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from daunce_api.cli.template import described, template, write_template
from daunce_api.config import RunConfig, section_of
from daunce_api.core import ESTIMATORS
from daunce_api.errors import ConfigurationError
from daunce_api.providers.registry import BACKENDS

ODD = "#: [x] 'a\"\n\x1b\u2028é😀.jsonl"


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Every key of the config with its description."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.description
        section = section_of(field.annotation)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")


def uncommented(text: str) -> str:
    return re.sub(r"^# (?=( {2})*[a-z_]+:)", "", text, flags=re.MULTILINE)


def keys_of(content: dict[str, object], prefix: str = "") -> set[str]:
    found = set()
    for key, value in content.items():
        found |= {prefix + key} | (keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
    return found


def test_what_a_key_can_be_is_what_there_is() -> None:
    meaning = dict(keys(RunConfig))
    for key, known in (("backend.kind", BACKENDS), ("attribution.estimator", ESTIMATORS)):
        assert set(known) <= set(re.findall(r"\w+", meaning[key] or "")), key


@pytest.mark.parametrize("backend", ["embedded", "openai", "openai_wire", "local", "another"])
def test_every_key_is_there_with_its_meaning(backend: str) -> None:
    text = template(train="a.jsonl", test="b.jsonl", backend=backend)
    everything = keys_of(yaml.safe_load(uncommented(text)))
    expected = dict(keys(RunConfig))
    assert everything == set(expected)
    for key, meaning in expected.items():
        assert meaning, f"{key} has no description"
        name, said = key.rsplit(".", 1)[-1], " ".join(meaning.split())
        assert re.search(rf"^#? *{name}: ?.*  # {re.escape(said)}", text, re.MULTILINE), key


def test_what_is_written_is_what_holds_without_it() -> None:
    """Both the file as it is and the file with every line made active give the defaults."""
    plain = RunConfig.from_mapping({"data": {"train": "a.jsonl", "test": "b.jsonl"}})
    text = template(train="a.jsonl", test="b.jsonl")
    assert RunConfig.from_mapping(yaml.safe_load(text)) == plain
    full = RunConfig.from_mapping(yaml.safe_load(uncommented(text)))
    assert full.ensemble.stop is not None
    assert full.budget.price is not None
    optional = {
        "ensemble": full.ensemble.model_copy(update={"stop": None}),
        "budget": full.budget.model_copy(update={"price": None}),
    }
    assert full.model_copy(update=optional) == plain


@pytest.mark.parametrize(
    ("backend", "model", "key"),
    [
        ("openai", "gpt-4.1-mini-2025-04-14", "OPENAI_API_KEY"),
        ("local", "HuggingFaceTB/SmolLM2-135M", None),
        ("another", "NAME-OF-THE-MODEL", None),
    ],
)
def test_the_backend_that_was_asked_for(tmp_path: Path, backend: str, model: str, key: str | None) -> None:
    read = RunConfig.from_yaml(write_template(tmp_path, backend=backend))
    assert (read.backend.kind, read.backend.model, read.backend.api_key_env) == (backend, model, key)


def test_a_paid_backend_comes_with_a_cap(tmp_path: Path) -> None:
    assert RunConfig.from_yaml(write_template(tmp_path, backend="openai")).budget.max_usd == 10


@pytest.mark.parametrize(
    ("present", "train", "test"),
    [
        ([], "train.jsonl", "test.jsonl"),
        (["train.jsonl", "test.jsonl"], "train.jsonl", "test.jsonl"),
        (["Queries.jsonl", "my_TRAIN_set.jsonl", "notes.txt"], "my_TRAIN_set.jsonl", "Queries.jsonl"),
        (["examples.jsonl", "eval.jsonl"], "examples.jsonl", "eval.jsonl"),
        (["train.jsonl", "other.jsonl"], "train.jsonl", "other.jsonl"),
        (["a.jsonl", "b.jsonl"], "train.jsonl", "test.jsonl"),
        (
            ["fine_tuning_data.jsonl", "fine_tuning_data_val.jsonl", "eval_results.json"],
            "fine_tuning_data.jsonl",
            "fine_tuning_data_val.jsonl",
        ),
        (["finetune.jsonl", "questions.jsonl"], "finetune.jsonl", "questions.jsonl"),
        (["train.csv", "test.csv", "package.json"], "train.csv", "test.csv"),
        (["sft_train.jsonl.gz", "sft_val.jsonl.gz", "sft_test.jsonl"], "sft_train.jsonl.gz", "sft_test.jsonl"),
        (["train.parquet", "retrieval.parquet"], "train.parquet", "retrieval.parquet"),
        (["train.jsonl", "a.jsonl", "b.jsonl"], "train.jsonl", "test.jsonl"),
        (
            ["train: # [x].jsonl", "test 'a\"\n\x1b\u2028é😀.jsonl"],
            "train: # [x].jsonl",
            "test 'a\"\n\x1b\u2028é😀.jsonl",
        ),
    ],
)
def test_data_files_beside_it_are_found(tmp_path: Path, present: list[str], train: str, test: str) -> None:
    for name in present:
        (tmp_path / name).touch()
    read = RunConfig.from_yaml(write_template(tmp_path))
    assert (read.data.train, read.data.test) == (tmp_path / train, tmp_path / test)


def test_a_line_break_in_a_file_name_breaks_no_line() -> None:
    text = template(train="train\nb.jsonl", test="t.jsonl")
    assert len(text.splitlines()) == len(template(train="a", test="b").splitlines())
    assert yaml.safe_load(text)["data"]["train"] == "train\nb.jsonl"


def test_a_file_name_that_is_not_utf_8_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "train\udcff.jsonl").touch()
    assert RunConfig.from_yaml(write_template(tmp_path)).data.train == tmp_path / "train.jsonl"
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        write_template(tmp_path / "..", train=tmp_path / "train\udcff.jsonl")


def test_given_files_are_named_as_the_config_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "data").mkdir(parents=True)
    for name in ("here/data/a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    path = write_template("here", train="here/data/a.jsonl", test="b.jsonl")
    assert yaml.safe_load(path.read_text())["data"]["train"] == "data/a.jsonl"
    read = RunConfig.from_yaml(path)
    assert (read.data.train, read.data.test) == (tmp_path / "here/data/a.jsonl", tmp_path / "b.jsonl")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(ConfigurationError, match="exists and was left as it is"):
        write_template(tmp_path)
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written: No such file"):
        write_template("/proc/none")
    with pytest.raises(ConfigurationError, match="cannot be written: embedded null byte"):
        write_template("a\0b")
    with pytest.raises(ConfigurationError, match=r"typo\.jsonl does not exist"):
        write_template(tmp_path, train=tmp_path / "typo.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_few_examples_get_subsets_that_are_large_enough(tmp_path: Path) -> None:
    for n, ratio in ((9, 0.5), (12, 0.834), (19, 0.527), (20, 0.5)):
        folder = tmp_path / str(n)
        folder.mkdir()
        lines = "".join(f'{{"prompt": "{i}", "completion": "c"}}\n' for i in range(n))
        (folder / "train.jsonl").write_text(lines)
        assert RunConfig.from_yaml(write_template(folder)).ensemble.subset_ratio == ratio


def test_what_a_file_holds_is_said(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    assert described(path) == ("is not there yet", 0)
    path.write_text('{"instruction": "i", "input": "", "output": "o"}\n')
    assert described(path) == ("Alpaca, 1 record", 1)
    path.write_text('{"prompt": "i", "chosen": "", "rejected": "o"}\n')
    assert "this is preference data" in described(path)[0]
