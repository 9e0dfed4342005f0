"""The config file: what is read, what is refused, and that nothing secret or hostile gets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from daunce_api import config as module
from daunce_api._util.sections import BackendName, BackendSection, Sections
from daunce_api._util.yaml import MAX_BYTES as MAX_CONFIG_BYTES
from daunce_api.config import VERSION, RunConfig
from daunce_api.errors import ConfigurationError
from daunce_api.providers.registry import BACKENDS

DATA = {"train": "train.jsonl", "test": "test.jsonl"}


def config(**sections: Any) -> RunConfig:
    return RunConfig.from_mapping({"data": DATA, **sections}, base=Path("/base"))


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        config(**sections)
    head, *lines = str(caught.value).splitlines()
    assert head == "config has problems:"
    return [line.strip() for line in lines]


def from_text(tmp_path: Path, text: str | bytes) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return RunConfig.from_yaml(path)


def refusal(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigurationError) as caught:
        from_text(tmp_path, text)
    return str(caught.value).removeprefix(str(tmp_path / "run.yaml"))


def test_the_shortest_config(tmp_path: Path) -> None:
    read = from_text(tmp_path, "data: {train: a.jsonl, test: sub/b.jsonl}")
    assert (read.data.train, read.data.test) == (tmp_path / "a.jsonl", tmp_path / "sub" / "b.jsonl")
    assert (read.name, read.run_dir) == ("run", tmp_path / "runs" / "run")
    assert (read.backend.kind, read.ensemble.members, read.ensemble.subset_ratio) == ("embedded", 32, 0.5)


def test_the_run_folder_follows_the_name() -> None:
    assert config(name="gpt-4.1").run_dir == Path("/base/runs/gpt-4.1")
    assert config(name="x", run_dir="elsewhere").run_dir == Path("/base/elsewhere")
    assert config(run_dir="/abs").run_dir == Path("/abs")


def test_a_config_survives_being_stored_as_json() -> None:
    made = config(
        training={"hyperparameters": {"n_epochs": "auto", "learning_rate": "1e-3"}},
        backend={"options": {"a": [1, None, {"b": 2.5}]}},
        ensemble={"stop": {"self_lds": 0.4}},
        budget={"max_usd": 3, "price": {"training": 1}},
    )
    stored = json.loads(json.dumps(made.model_dump(mode="json")))
    assert RunConfig.from_mapping(stored) == made


def test_every_problem_is_listed_with_its_key() -> None:
    assert problems(
        ensmble={},
        ensemble={"members": "many", "stop": {"mn_members": 3}},
        backend={"scorer": {"knd": "echo"}},
        scoring={"noise_probe": -1},
    ) == [
        "backend.scorer.knd: unknown key; did you mean kind?",
        "ensemble.members: Input should be a valid integer, unable to parse string as an integer",
        "ensemble.stop.mn_members: unknown key; did you mean min_members?",
        "scoring.noise_probe: Input should be greater than or equal to 0",
        "ensmble: unknown key; did you mean ensemble?",
    ]


def test_an_unknown_key_like_no_other_gets_the_list() -> None:
    assert problems(budget={"zzz": 1}) == ["budget.zzz: unknown key; known keys: max_usd, price, hosting_hours"]


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"ensemble": {"members": 1}}, "ensemble.members: Input should be greater than or equal to 2"),
        ({"ensemble": {"members": 2.5}}, "ensemble.members: Input should be a valid integer, got a number with"),
        ({"ensemble": {"members": [3]}}, "ensemble.members: Input should be a valid integer"),
        ({"ensemble": {"subset_ratio": 1}}, "ensemble.subset_ratio: Input should be less than 1"),
        ({"ensemble": {"subset_ratio": float("nan")}}, "ensemble.subset_ratio: Input should be"),
        ({"ensemble": {"seed": 2**31}}, "ensemble.seed: Input should be less than 2147483648"),
        ({"ensemble": {"start_from": "bse"}}, "ensemble.start_from: Input should be 'base' or 'target'"),
        ({"ensemble": {"target_model": "ft:x"}}, "ensemble: target_model is only used with start_from: target"),
        ({"ensemble": {"members": 5, "stop": {"min_members": 6}}}, "ensemble: stop.min_members is 6, but there are 5"),
        ({"ensemble": {"stop": {"plateau": 0.1, "surely": True}}}, "ensemble.stop: surely is about self_lds, which is"),
        ({"ensemble": {"members": 2}, "training": {"min_members": 3}}, "(top level): training.min_members is 3, but"),
        ({"scoring": {"target": True}}, "(top level): scoring.target needs ensemble.start_from: target"),
        ({"ensemble": "x"}, "ensemble: Input should be a valid dictionary"),
        ({"data": None}, "data: Field required"),
        ({"data": {"train": "a", "test": ["b"]}}, "data.test: Input is not a valid path"),
        ({"name": "a/../b"}, "name: String should match pattern"),
        ({"name": "a\n"}, "name: String should match pattern"),
        ({"name": "-rf"}, "name: String should match pattern"),
        ({"name": 3}, "name: Input should be a valid string"),
        ({"budget": {"max_usd": float("inf")}}, "budget.max_usd: Input should be a finite number"),
        ({"budget": {"price": {"training": True}}}, "budget.price.training: must be a number, not true or false"),
        ({"ensemble": {"members": "1:1"}}, "ensemble.members: Input should be a valid integer"),
        ({"ensemble": {"checkpoints": True}}, "ensemble.checkpoints: must be a number, not true or false"),
    ],
)
def test_unusable_values(sections: dict[str, Any], problem: str) -> None:
    (found,) = problems(**sections)
    assert found.startswith(problem)


def test_an_empty_section_means_its_defaults() -> None:
    empty = config(backend=None, ensemble=None, training=None, scoring=None, attribution=None, budget=None)
    assert empty == config()


# Hyperparameters


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("3", 3),
        ("2.0", 2.0),
        ("1e-3", 1e-3),
        ("5.e-4", 5e-4),
        ("2E+1", 20.0),
        ("auto", "auto"),
        ("'3'", "3"),
        ("010", 10),
        ("0x1F", 31),
        ("1:1", "1:1"),
        ("2026-01-01", "2026-01-01"),
        ("v1e-3", "v1e-3"),
    ],
)
def test_hyperparameters_keep_their_type_and_numbers_are_those_of_yaml_1_2(
    tmp_path: Path, written: str, meant: Any
) -> None:
    """YAML 1.1 reads 1e-3 as a text, 010 as 8 and 1:1 as 61."""
    text = f"data: {{train: a, test: b}}\ntraining:\n  hyperparameters:\n    x: {written}\n"
    value = from_text(tmp_path, text).training.hyperparameters["x"]
    assert (value, type(value)) == (meant, type(meant))


def test_a_switch_stays_one() -> None:
    """Services of OpenAI's wire take hyperparameters of their own, such as Nebius's lora: true."""
    made = config(training={"hyperparameters": {"lora": True, "packing": False}})
    assert made.training.hyperparameters == {"lora": True, "packing": False}
    assert [type(v) for v in made.training.hyperparameters.values()] == [bool, bool]


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, float("nan"), float("-inf")])
def test_other_hyperparameters_are_refused(value: Any) -> None:
    assert problems(training={"hyperparameters": {"x": value}}) == [
        "training.hyperparameters.x: must be a finite number, true, false or a text"
    ]


# Secrets


SECRET = "sk-proj-4f9a8b7c6d5e"


@pytest.mark.parametrize(
    "sections",
    [
        {"backend": {"api_key_env": SECRET}},
        {"backend": {"api_key_env": "4f9a8b7c6d5e"}},
        {"backend": {"scorer": {"api_key_env": SECRET}}},
        {"backend": {"api_key": SECRET}},
        {"api_key": SECRET},
        {"backend": SECRET},
        {"ensemble": {"members": SECRET}},
        {"data": {"train": [SECRET], "test": "b"}},
        {"training": {"hyperparameters": {"x": [SECRET]}}},
        {"name": SECRET * 9},
        {SECRET: 1},
        {"backend": {SECRET: 1}},
        {"4f9a8b7c6d5e": 1},
        {"backend": {"kind": SECRET}},
        {"backend": {"model": SECRET}},
        {"backend": {"tokenizer": SECRET}},
        {"backend": {"scorer": {"kind": SECRET}}},
        {"backend": {"options": {"headers": {"x": [SECRET]}}}},
        {"backend": {"options": {SECRET: 1}}},
        {"ensemble": {"start_from": "target", "target_model": SECRET}},
        {"training": {"hyperparameters": {SECRET: 1}}},
        {"training": {"hyperparameters": {"x": SECRET}}},
    ],
    ids=lambda s: str(s).replace(SECRET, "KEY")[:40],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_printed(sections: dict[str, Any]) -> None:
    assert not any(SECRET in p or "4f9a8b7c6d5e" in p for p in problems(**sections))


@pytest.mark.parametrize(
    "value",
    ["4f9a8b7c6d5e" * 3, "eyJhbGciOiJIUzI1NiIsInR5cCI6", "aB3" * 12 + "9", "hf_4f9a8b7c6d5e4f9a"],
    ids=["hexadecimal", "JWT", "mixed", "prefix"],
)
def test_keys_of_other_shapes_are_recognized(value: str) -> None:
    assert "looks like an API key" in problems(backend={"model": value})[0]


def test_the_value_of_a_key_variable_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "plainword-secret")
    assert "looks like an API key" in problems(backend={"model": "plainword-secret"})[0]


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4.1-mini-2025-04-14",
        "ft:gpt-4.1-mini-2025-04-14:acme:custom-suffix:BTz2REMH",
        "meta-llama/Meta-Llama-3.1-8B-Instruct-Reference",
        "accounts/fireworks/models/llama-v3p1-8b-instruct",
        "/models/models--x--y/snapshots/0123456789abcdef0123456789abcdef01234567",
        "unsloth/Qwen2.5-Coder-32B-Instruct-bnb-4bit",
    ],
)
def test_names_of_models_are_not_taken_for_keys(model: str) -> None:
    assert config(backend={"model": model}).backend.model == model


@pytest.mark.parametrize(
    "address",
    [
        "http://user:{}@127.0.0.1:9/v1",
        "http://{}@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1?api_key={}",
        "http://127.0.0.1:9/v1#{}",
        "http://127.0.0.1:9/{}/v1",
        "http://127.0.0.1:9/v1;key={}",
        "ftp://{}",
        "http://[{}",
        "http://127.0.0.1:99999/{}",
        "http://127.0.0.1:9/%73k-proj-4f9a8b7c6d5e",
    ],
)
@pytest.mark.parametrize("where", ["backend", "scorer", "options"])
def test_a_secret_in_any_part_of_an_address_is_refused_and_not_printed(address: str, where: str) -> None:
    url = address.replace("{}", SECRET)
    if where == "options" and not url.startswith("http://1") and "@" not in url:
        pytest.skip("not every option is an address")
    sections: dict[str, Any] = {"base_url": url} if where == "backend" else {"scorer": {"base_url": url}}
    if where == "options":
        sections = {"options": {"control_url": url.replace("99999", "9")}}
    (found,) = problems(backend=sections)
    assert SECRET not in found
    assert "4f9a8b7c6d5e" not in found
    assert "address" in found


def test_account_ids_in_addresses_are_no_secrets() -> None:
    url = "https://gateway.example.com/v1/0123456789abcdef0123456789abcdef/mine/openai"
    assert config(backend={"base_url": url}).backend.base_url == url


def test_a_broken_line_with_a_key_is_not_printed(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"data: {{train: a, test: b}}\nbackend:\n  api_key: [{SECRET}\n  x: ]: {SECRET}\n")
    assert "not valid YAML: line " in message
    assert SECRET not in message


def test_the_variable_that_holds_a_key_is_named() -> None:
    assert config(backend={"api_key_env": "OPENAI_API_KEY"}).backend.api_key_env == "OPENAI_API_KEY"
    assert problems(backend={"api_key_env": "lower"}) == [
        "backend.api_key_env: must be the name of an environment variable (A-Z, 0-9, _), never the key itself"
    ]


# Hostile files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x, x]\nb: *a", "line 2: aliases (*name) are not allowed"),
        ("a: &a [x]\nb: {<<: *a}", "aliases (*name) are not allowed"),
        ("name: a\ndata: {train: a}\nname: b", "line 3: a key is given twice"),
        ("data: {train: a, test: b, train: c}", "line 1: a key is given twice"),
        ("[" * 5_000, "nested too deeply"),
        ("a: " + "{b: " * 5_000, "nested too deeply"),
        ("name: !!python/object/apply:os.system [id]", "line 1: could not determine a constructor"),
        ("ensemble: {members: " + "9" * 5_000 + "}", "finite number"),
        ("? [a, b]\n: c", "line 1: found unhashable key"),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("- a", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("just text", "must hold a mapping"),
        (b"name: \xff", "not valid YAML: byte 6"),
        (b"name: a\x00b", "not valid YAML"),
        ("1: 2", "Keys should be strings"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_hostile_yaml_is_refused_in_one_sentence(tmp_path: Path, text: str | bytes, words: str) -> None:
    message = refusal(tmp_path, text)
    assert words in message
    assert len(message) < 300


def test_a_yaml_bomb_costs_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "aliases (*name) are not allowed" in refusal(tmp_path, "\n".join(lines))


def test_a_file_that_is_no_config_is_not_read_whole(tmp_path: Path) -> None:
    assert "more than 200,000 bytes" in refusal(tmp_path, b" " * (MAX_CONFIG_BYTES + 1))
    assert from_text(tmp_path, b"data: {train: a, test: b}".ljust(MAX_CONFIG_BYTES)).name == "run"
    for path in ("/dev/zero", tmp_path, tmp_path / "none.yaml", "a\0b"):
        with pytest.raises(ConfigurationError, match=r"not a config file|cannot be read"):
            RunConfig.from_yaml(path)


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-that-name/x"])
def test_an_impossible_path_is_refused(path: str) -> None:
    for sections in ({"run_dir": path}, {"data": {"train": path, "test": "b"}}):
        with pytest.raises(ConfigurationError, match="a path cannot be used"):
            config(**sections)


def test_options_must_be_data_that_can_be_stored() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    for value in ({1, 2}, yaml.safe_load("2026-01-01"), float("nan"), deep):
        found = problems(backend={"options": {"x": value}})
        assert found == ["backend.options: holds something other than texts, numbers, true/false, lists and mappings"]


KEYS = st.sampled_from(
    [
        "name",
        "run_dir",
        "data",
        "backend",
        "ensemble",
        "training",
        "budget",
        "train",
        "test",
        "stop",
        "members",
        "price",
    ]
)
JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(KEYS, JSONISH, max_size=6))
def test_any_mapping_is_a_config_or_a_configuration_error(content: dict[str, Any]) -> None:
    try:
        made = RunConfig.from_mapping(content)
    except ConfigurationError:
        return
    assert RunConfig.from_mapping(made.model_dump(mode="json")) == made


@given(st.text(alphabet="ab:{}[],&*!|>-?#'\"% \n\t\x00\x85\u2028~0.e", max_size=40))
def test_any_text_is_a_config_or_a_configuration_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("c") / "run.yaml"
    path.write_bytes(text.encode())
    with pytest.raises(ConfigurationError):
        RunConfig.from_yaml(path)


# Configs of other versions


def manifest(**sections: Any) -> dict[str, Any]:
    return {"config": {**config().model_dump(mode="json"), **sections}}


def test_the_config_of_a_run_of_this_version_reads_back() -> None:
    made = config(ensemble={"members": 3})
    assert RunConfig.from_manifest({"config": made.model_dump(mode="json"), "version": VERSION}) == (made, ())


def test_keys_that_are_gone_do_not_make_a_run_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._RETIRED, "scoring.turbo", "scoring is always fast; remove the key")
    kept = manifest()
    kept["config"]["scoring"]["turbo"] = True
    kept["config"]["ensemble"]["from_the_future"] = {"a": 1}
    read, gone = RunConfig.from_manifest(kept)
    assert read == config()
    assert gone == (
        "ensemble.from_the_future: this version does not know it; the run was started with it",
        "scoring.turbo: scoring is always fast; remove the key; the run was started with it",
    )
    assert problems(scoring={"turbo": True}) == [
        "scoring.turbo: unknown key; scoring is always fast; remove the key",
    ]


def test_a_run_with_an_estimator_that_is_gone_opens_with_auto() -> None:
    kept = manifest()
    kept["config"].setdefault("attribution", {})["estimator"] = "matched"
    read, gone = RunConfig.from_manifest(kept)
    assert read.attribution.estimator == "auto"
    assert gone == ("attribution.estimator: matched: this version does not have it; scores are those of auto",)


def test_an_address_that_is_refused_today_does_not_make_an_old_run_unreadable() -> None:
    kept = manifest()
    kept["config"]["backend"]["base_url"] = "http://127.0.0.1:1/v1#x"
    assert RunConfig.from_manifest(kept)[0].backend.base_url == "http://127.0.0.1:1/v1#x"


def test_a_new_default_leaves_the_recipe_of_old_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._EARLIER_DEFAULTS, VERSION, {"data.loss_on": "last", "attribution.loss": "sum"})
    kept = manifest()
    del kept["config"]["attribution"]
    del kept["config"]["data"]["loss_on"]
    old, _ = RunConfig.from_manifest(kept)
    assert (old.data.loss_on, old.attribution.loss) == ("last", "sum")
    assert RunConfig.from_manifest({**kept, "version": VERSION})[0].data.loss_on == "all"
    continued = config(attribution={"loss": "margin"}).as_started(1)
    assert (continued.data.loss_on, continued.attribution.loss) == ("last", "margin")
    assert continued.data.train == Path("/base/train.jsonl")


# Types for checkers


def test_the_dictionaries_for_type_checkers_have_the_keys_of_the_config() -> None:
    def compare(model: type[BaseModel], typed: Any, left_out: set[str]) -> None:
        assert set(typed.__annotations__) == set(model.model_fields) - left_out, typed.__name__
        for name, field in model.model_fields.items():
            inner = module.section_of(field.annotation)
            if inner is not None and name in typed.__annotations__:
                hint = get_type_hints(typed)[name]
                parts = [hint, *getattr(hint, "__args__", ())]
                compare(inner, next(p for p in parts if hasattr(p, "__total__")), LEFT_OUT.get(name, set()))

    compare(RunConfig, Sections, {"run_dir", "backend"})
    compare(RunConfig.model_fields["backend"].annotation, BackendSection, set())  # type: ignore[arg-type]
    assert set(get_args(BackendName)) == set(BACKENDS)


LEFT_OUT = {"data": {"train", "test"}}
"""Keys that ``attribute`` has arguments for."""
