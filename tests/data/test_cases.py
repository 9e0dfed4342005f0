"""Small files and templates of every shape that people bring (``cases/``), each through its own config and plan."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizer_folders import EMBEDDED, GetTokenizer

from daunce_api import Run
from daunce_api.cli.template import write_template
from daunce_api.config import RunConfig
from daunce_api.errors import DaunceError

CASES = Path(__file__).parent / "cases"
COUNTED = "every assistant turn of 12 chats is trained on (100% of the assistants' text) and measured"


@dataclass(frozen=True)
class Right:
    """What the first training example must become: texts in what the model reads, and the text that is measured."""

    measured: str
    reads: tuple[str, ...] = ()
    plan: str = COUNTED
    note: str = ""
    as_given: bool = True


PLAIN = Right("In Bern it is mild today.<|end|>", ("<|system|>You answer about towns.<|end|>",))
READ: dict[str, Right] = {
    "01-tool-call-last/run": Right(
        '<call>look_up {"town": "Bern"}</call><|end|>', ('Tools: [{"type": "function"', "weather of a town")
    ),
    "03-tools-defined-text-answers/run": Right(
        "In Bern it is mild today.<|end|>", ('Tools: [{"type": "function"', "You answer about towns.")
    ),
    "05-text-parts/run": Right("In Bern it is mild.<|end|>", ("<|user|>Is it warm in Bern?<|end|>",)),
    "07-name-field/run": Right("Mild.<|end|>", plan="every assistant turn of 13 chats"),
    "10-text-only/run": Right(
        " is mild in Bern all year.<|end|>", plan="every token of the text", note="holds texts without prompts"
    ),
    "12-alpaca/run": Right(
        "Mild.<|end|>", ("Say whether it is warm.\n\nBern",), note="is an Alpaca file", as_given=False
    ),
    "13-json-array/run": Right(PLAIN.measured, PLAIN.reads, as_given=False),
    "15-csv/run": Right('Mild, says "Kim"<|end|>', plan="every token of the completion", as_given=False),
    "17-crlf-bom/run": PLAIN,
    "21-multi-turn-no-weights/run": Right("Mild.<|end|>Dry in Bern.<|end|>"),
    "25-empty-system/run": Right("Mild.<|end|>", ("<|system|><|end|>",)),
    "29-many-duplicates/run": Right(PLAIN.measured, plan="of 480 chats", note="468 of 480 records repeat"),
    "31-metadata/run": Right(PLAIN.measured, note="field 'source' of all 12 records is not used", as_given=False),
    "38-legacy-completion/run": Right(" mild END<|end|>", ("Bern\n\n###\n\n",), "every token of the completion"),
    "40-question-answer-cols/run": Right("mild<|end|>", note="has columns question and answer", as_given=False),
    "42-openai-real-chat/run3": Right("", plan="the last one is measured", note=""),
    "44-template-strftime/run": Right("In Bern it is mild.<|im_end|>\n", ("Today is 2026-01-01",)),
    "45-template-answer-lost/run": Right(" In Bern it is mild.<|end|>\n", ("User: Is it warm in Bern?",)),
    "45-template-answer-lost/run_local": Right(" In Bern it is mild.<|end|>\n", ("User: Is it warm in Bern?",)),
    "47-template-genprompt/run": Right("In Bern it is mild.<|im_end|>\n"),
    "48-template-eos-at-end/run": Right("In Bern it is mild.<|im_end|>\nNo, dry.<|im_end|>\n<eos>"),
    "51-chat-token-all-turns/run": Right("", plan="the last one is measured, since one-token chat measures one turn"),
    "54-ten-copies-of-ten/run": Right(
        "The weather in Bern is cold and the streets are full of people.<|end|>", plan="100 chats", note="90 of 100"
    ),
    "57-gpt-oss-by-name/run": Right("<|channel|>final<|message|>", ("<|start|>system<|message|>You are ChatGPT",)),
    "57-gpt-oss-by-name/run2": Right("<|channel|>final<|message|>", ("<|start|>system<|message|>You are ChatGPT",)),
    "59-tool-context-only/run": Right(
        "20 degrees in Bern.<|end|>",
        ('<call>look_up {"town": "Bern"}</call>', "<|tool|>20<|end|>"),
        "12 of 24 assistant turns of 12 chats are trained on (49% of the assistants' text)",
    ),
    "62-h4-prompt-beside-messages/run": Right("Mild.<|end|>", note="the messages are used", as_given=False),
}
REFUSED: dict[str, str] = {
    "06-image-parts/run": "holds an image",
    "08-dpo-openai/run": "this is preference data",
    "19-trailing-commas/run": "a comma follows the object: take it out",
    "20-ends-with-user/run": "train.jsonl:12: the last message must be the assistant's",
    "22-reasoning-content/run": "leaves out the reasoning of messages[1], an answer that is measured",
    "26-null-system-content/run": "messages[0].content is missing (all 12 records",
    "30-single-quotes/run": "it has single quotes, as Python prints them",
    "32-test-without-answer/run": "test.jsonl:1: no assistant turn carries the loss",
    "33-latin1/run": "it looks like Windows-1252",
    "36-rft/run": "this is reinforcement data",
    "37-together-weight/run": "cannot train on a weight other than 1 for the whole record, which train.jsonl:1,",
    "42-openai-real-chat/run": "are longer than one token (judged by their bytes)",
    "42-openai-real-chat/run2": "one-token chat shows the log-probability of one generated token only",
    "43-openai-json-answers-first-token/run": "the measured token is the same one in all 22 examples",
    "52-openai-special-token-in-text/run": "must not spell OpenAI's control tokens",
    "55-completions-file-chat-model/run": "one-token chat shows the log-probability of one generated token only",
    "55-completions-file-chat-model/run_ft": "is no chat, and a chat endpoint can be asked about nothing else",
    "55-completions-file-chat-model/run_serve": "is no chat, and a chat endpoint can be asked about nothing else",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases, with the embedded model's folder in their configs."""
    copy = tmp_path_factory.mktemp("cases") / "cases"
    shutil.copytree(CASES, copy)
    for config in copy.glob("*/run*.yaml"):
        config.write_text(config.read_text().replace("EMBEDDED_MODEL_FOLDER", str(EMBEDDED)))
    own = copy / "45-template-answer-lost" / "m"
    shutil.copytree(EMBEDDED, own)
    shutil.copy(own.parent / "tok" / "chat_template.jinja", own)
    return copy


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tokenizers_of: GetTokenizer) -> None:
    encoding = None
    if "57" in request.node.name:
        encoding = tokenizers_of("o200k_harmony")._encoding  # type: ignore[attr-defined]
    monkeypatch.setattr("daunce_api.data.tokenizers.openai_models._load", lambda name: encoding)


def planned(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, str]:
    """The run of a case and its plan's words on the loss. Raises what refuses it."""
    monkeypatch.chdir(folder / case.split("/", maxsplit=1)[0])
    run = Run.create(f"{case.split('/')[1]}.yaml")
    plan = run.plan()
    plan.check()
    return run, plan.loss


def test_every_config_of_the_cases_is_looked_at() -> None:
    there = {f"{path.parent.name}/{path.stem}" for path in CASES.glob("*/run*.yaml")}
    assert there == {*READ, *REFUSED}


@pytest.mark.parametrize("case", READ)
def test_what_is_right_is_read_rendered_and_measured(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = READ[case]
    run, loss = planned(folder, case, monkeypatch)
    assert right.plan in loss or case.startswith("57")
    assert not right.note or [w for w in run.warnings if right.note in w]
    assert len([w for w in run.warnings if "repeat the content" in w]) <= 1
    encoded = run.encoded(run.train)
    if decode := getattr(run.tokenizer, "decode", None):
        whole, measured = decode(encoded[0].ids), decode([encoded[0].ids[t] for t in encoded[0].targets])
        assert measured.startswith(right.measured) if case.startswith("57") else measured == right.measured
        assert all(text in whole for text in right.reads)
        distinct = {e.content_hash for e in run.train}
        assert len({e.ids for e in encoded}) == len(distinct), "what differs stays different"
    if right.as_given:
        lines = run.config.data.train.read_text(encoding="utf-8-sig").splitlines()
        sent = run.train.training_file(range(len(run.train)), run.config.data.loss_on).decode().splitlines()
        if run.config.data.loss_on == "all":
            kept = [{k: v for k, v in json.loads(line).items() if k not in ("id", "source")} for line in lines if line]
            assert [json.loads(line) for line in sent] == kept, "trainers get the record as it was given"


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name_before_anything_is_sent(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DaunceError) as caught:
        planned(folder, case, monkeypatch)
    assert REFUSED[case] in str(caught.value)


def test_init_finds_the_files_that_people_have(folder: Path) -> None:
    config = RunConfig.from_yaml(write_template(folder / "58-init-finds-files"))
    assert (config.data.train.name, config.data.test.name) == (
        "fine_tuning_data.jsonl",
        "fine_tuning_data_val.jsonl",
    )
