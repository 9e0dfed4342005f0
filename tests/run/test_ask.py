"""Further questions to a finished run: no jobs, only what is missing, and by whoever still exists."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from daunce_api import Dataset, Run, RunConfig
from daunce_api.errors import BudgetError, CapabilityError, DataError, NotEnoughMembersError, ReplayError
from daunce_api.plan.asking import generation_usd
from daunce_api.plan.inputs import with_cap
from daunce_api.plan.prices import Price
from daunce_api.providers.base import Generator
from daunce_api.providers.registry import open_backend
from daunce_api.providers.replay import record, replay
from daunce_api.score.work import Work
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore

MakeConfig = Callable[..., RunConfig]
Cli = Callable[..., tuple[int, str, str]]

PROMPT, ANSWER = "What is cedar?", "A kind of wave near the cedar."


@pytest.fixture
def run(make_config: MakeConfig, finished: Path) -> Run:
    """A finished run of four members, in this test's own folder."""
    return Run.open(shutil.copytree(finished, make_config().run_dir))


def chats(*questions: str, answer: str = ANSWER) -> Dataset:
    return Dataset.from_records(
        [
            {"id": q, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer}]}
            for q in questions
        ]
    )


def state(run: Run) -> tuple[list[str], list[tuple[int, int, int]]]:
    with RunStore.open(run.run_dir, read_only=True) as store:
        return [job.key for job in store.jobs.rows()], store.scores.models()


def lose(run: Run, server: EmbeddedServer, *members: int) -> None:
    """Delete models at the provider, behind the run's back. Only those of a run of the test's own."""
    client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)
    with RunStore.open(run.run_dir, read_only=True) as store:
        models = store.jobs.ready_models()
    for member in members:
        client.models.delete(models[member])


def test_a_question_is_answered_without_a_job_and_becomes_part_of_the_run(run: Run) -> None:
    before = run.attribution()
    jobs, _ = state(run)
    attribution = run.ask(prompt=PROMPT, answer=ANSWER)
    (asked,) = attribution.focus
    assert asked.startswith("ask-")
    assert attribution.test.ids == [*before.test.ids, asked]
    assert attribution.members == before.members
    assert np.array_equal(attribution.test_loss_KM[:, :3], before.test_loss_KM)
    assert len(attribution.top(asked, 3)) == 3
    again = Run.open(run.run_dir)
    assert again.test.ids == attribution.test.ids
    assert again.status().questions == 4
    assert state(run)[0] == jobs
    assert again.attribution(asked).test_loss_KM.shape == (4, 4)


def test_only_what_is_missing_is_scored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"prompt": "What is amber 0?", "answer": "A kind of wave near the amber."}
    run.ask(**known)
    run.ask(chats("a", "b"))
    plan = run.asking(chats("b", "c"))
    assert (plan.questions, len(plan.requests), sum(plan.requests.values())) == (1, 5, 5)  # the base is asked, too

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("everything is scored")

    monkeypatch.setattr("daunce_api.score.work.open_backend", refuse)
    assert run.asking(chats("a", "b")).usd == 0.0
    assert run.ask(chats("b")).focus == ("b",)
    assert run.ask(**known).focus == ("q0",)


def test_the_base_says_whether_fine_tuning_is_the_cause(run: Run) -> None:
    run.ask(chats("What is amber 0?", answer="A kind of wave near the amber."))
    cause = run.cause("What is amber 0?")
    assert (cause.verdict, cause.members, cause.target_loss) == ("fine-tuning", 4, None)
    assert cause.base_loss is not None
    assert cause.base_loss > cause.members_loss
    assert f"{cause.base_loss:.3f} under the base" in cause.text()
    assert run.cause("q1").verdict == "unknown"  # the test file's answers are not scored by the base
    assert "could not be scored" in run.cause("q1").text()


def test_questions_are_removed_and_shown_again(run: Run) -> None:
    run.ask(chats("a"))
    run.remove(["a", "q1"])
    assert Run.open(run.run_dir).test.ids == ["q0", "q2"]
    assert run.attribution().test.ids == ["q0", "q2"]
    assert run.asking(chats("a")).usd == 0.0
    assert run.ask(chats("a")).test.ids == ["q0", "q2", "a"]
    with pytest.raises(DataError, match="other questions of these ids"):
        run.ask(chats("a", answer="No."))
    run.mark(["a"], "unwanted")
    assert Run.open(run.run_dir).questions.verdicts == {"a": "unwanted"}


def test_a_test_file_with_more_lines_is_the_same_path(
    run: Run, make_config: MakeConfig, data: tuple[Path, Path]
) -> None:
    lines = data[1].read_text().splitlines()
    chats("a").to_jsonl(data[1])
    data[1].write_text("\n".join([*lines, data[1].read_text()]))
    jobs, _ = state(run)
    more = Run.create(make_config())
    assert more.plan().jobs == 0
    attribution = more.execute()
    assert attribution.test.ids == ["q0", "q1", "q2", "a"]
    assert attribution.members == (0, 1, 2, 3)
    assert state(run)[0] == jobs
    with RunStore.open(run.run_dir, read_only=True) as store:
        assert not [m for m, _, _ in store.scores.models() if m < 0]
    data[1].write_text("\n".join(lines[1:]))
    less = Run.create(make_config()).execute()
    assert less.test.ids == ["q1", "q2"]
    assert Run.open(run.run_dir).test.ids == ["q1", "q2"]
    data[1].write_text("\n".join(lines))
    assert Run.create(make_config()).execute().test.ids == ["q0", "q1", "q2"]


def test_members_whose_models_are_gone_do_not_answer(make_config: MakeConfig, server: EmbeddedServer, cli: Cli) -> None:
    run = Run.create(make_config())
    first = run.execute()
    lose(run, server, 1)
    attribution = run.ask(chats("a"))
    assert attribution.members == (0, 2, 3)
    assert attribution.test.ids == ["a"]
    groups = run.attributions()
    assert [(g.members, g.test.ids) for g in groups] == [((0, 1, 2, 3), first.test.ids), ((0, 2, 3), ["a"])]
    assert np.array_equal(groups[0].scores_NM(), first.scores_NM())
    status = run.status()
    assert (status.members_scored, status.members_failed, status.questions) == (4, 0, 4)
    assert dict(status.rows())["questions"] == "4: 3 by 4 members, 1 by 3 members"
    code, out, _ = cli("top", run.run_dir, "--test", "a", "--json")
    assert code == 0
    assert json.loads(out)["measured"] == "completion"
    code, _, err = cli("report", run.run_dir)
    assert code == 0
    assert "on a page of their own, since 3 other members answered: a" in " ".join(err.split())
    pages = [(run.run_dir / name).read_text() for name in ("report.html", "report-2.html")]
    assert '<a href="report-2.html">1 answer by 3 members</a>' in pages[0]
    assert '<a href="report.html">3 answers by 4 members</a>' in pages[1]
    assert not (run.run_dir / "report-3.html").exists()
    assert run.asking(chats("b")).gone == (1,)
    assert "The models of member 1 are gone" in run.asking(chats("b")).text()
    jobs, _ = state(run)
    assert Run.create(make_config()).execute().members == (0, 1, 2, 3)  # nothing is trained again
    assert state(run)[0] == jobs
    lose(run, server, 2)
    with pytest.raises(NotEnoughMembersError, match=r"2 of 4 members can answer.*members? 1, member 2"):
        run.ask(chats("b"))
    with pytest.raises(NotEnoughMembersError, match="2 of 4 members can answer"):
        run.asking(chats("c")).check()


def test_asking_goes_on_after_the_provider_takes_no_jobs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    notice = {"no_new_jobs_from": "2020-01-01", "models_end": "2020-01-02", "source": "a notice", "as_of": "2019"}
    monkeypatch.setattr("daunce_api.plan.planning.closing_of", lambda config: notice)
    assert run.ask(chats("a")).focus == ("a",)
    assert Run.open(run.run_dir).execute().test.ids[-1] == "a"
    grown = run.config.model_copy(update={"ensemble": run.config.ensemble.model_copy(update={"members": 5})})
    with pytest.raises(CapabilityError, match="no new fine-tuning jobs"):
        Run(grown, run.train, run.questions).execute()


def test_the_cap_covers_what_is_asked(run: Run, make_config: MakeConfig) -> None:
    price = {"training": 0.0, "input": 100.0, "output": 0.0}
    config = make_config(budget={"price": price, "max_usd": 1e-4})
    priced = Run(config, run.train, run.questions)
    plan = priced.asking(chats("a"))
    assert plan.costs_money
    with pytest.raises(BudgetError, match=r"\$0\.0001 of budget\.max_usd"):
        priced.ask(chats("a"))
    assert "a" not in Run.open(run.run_dir).test.ids
    priced.ask(chats("a"), max_usd=1.0)
    spent = priced.status()
    assert spent.usd_by_purpose["ask"] == pytest.approx(plan.usd)
    assert spent.usd == pytest.approx(plan.usd)


def test_an_interrupted_question_is_finished_by_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("daunce_api.score.work.open_backend", broken)
        with pytest.raises(KeyboardInterrupt):
            run.ask(chats("a"))
    reopened = Run.open(run.run_dir)
    assert reopened.test.ids[-1] == "a"
    assert reopened.attribution().test.ids == ["q0", "q1", "q2"]
    with pytest.raises(NotEnoughMembersError, match="not answered by enough members yet"):
        reopened.attribution("a")
    assert reopened.execute().test.ids[-1] == "a"


def test_what_is_asked_is_recorded_and_replayed(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(ensemble={"members": 3})
    run = Run.create(config)
    run.execute(session=record(tmp_path / "recorded"))
    asked = run.ask(chats("a"), session=record(tmp_path / "asked"))
    monkeypatch.delenv("TEST_SERVER_KEY")
    again = Run(config.model_copy(update={"run_dir": tmp_path / "again"}), run.train, run.questions.batches[0].examples)
    again.execute(session=replay(tmp_path / "recorded"))
    replayed = again.ask(chats("a"), session=replay(tmp_path / "asked"))
    assert np.array_equal(replayed.test_loss_KM, asked.test_loss_KM)
    with RunStore.open(tmp_path / "again", read_only=True) as store:
        assert store.run_key
    other = Run(config.model_copy(update={"run_dir": tmp_path / "other"}), run.train, run.test)
    other.run_dir.mkdir()
    shutil.copytree(run.run_dir, tmp_path / "copy")
    with pytest.raises(ReplayError):
        Run.open(tmp_path / "copy").ask(chats("b"), session=replay(tmp_path / "asked"))


async def test_an_endpoint_generates_what_the_target_says(run: Run) -> None:
    async with open_backend(run.config) as backend:
        assert isinstance(backend.scorer, Generator)
        turns = [{"role": "user", "content": "What is amber?"}]
        text = await backend.scorer.generate("daunce-tiny", turns, max_tokens=8)
        assert text
        assert text == await backend.scorer.generate("daunce-tiny", turns, max_tokens=8)
        assert await backend.scorer.generate("daunce-tiny", "Amber is", max_tokens=8)
    with pytest.raises(CapabilityError, match="no target model"):
        Run.open(run.run_dir).question(turns)


async def test_a_generated_answer_has_a_price_before_it_is_generated(
    run: Run, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daunce_api.plan.asking.prices_of", lambda config: (Price(), Price(input=1.0, output=10.0)))
    turns = [{"role": "user", "content": PROMPT}]
    usd = generation_usd(run.config, turns)
    assert usd == pytest.approx((len(json.dumps(turns)) + 10 * 256) / 1e6)
    answers = await Work(run).generate([turns], members=[0, 1])
    assert [len(of_prompt) for of_prompt in answers] == [2]
    with RunStore.open(run.run_dir, read_only=True) as store:
        assert store.ledger.spent_by_purpose()["ask"] == pytest.approx(2 * usd)
    code, _, err = await asyncio.to_thread(cli, "ask", run.run_dir, "--prompt", PROMPT)
    assert code == 2
    assert "generate its answer first, for at most $0.0026?" in err

    monkeypatch.setattr("daunce_api.plan.asking.prices_of", lambda config: (Price(), Price()))
    capped = Run(with_cap(run.config, 1.0), run.train, run.test)
    with pytest.raises(BudgetError, match="generating an answer is not known"):
        await Work(capped).generate([turns], members=[0])


def test_the_command_prints_the_finding_and_then_the_rankings(run: Run, cli: Cli) -> None:
    code, out, err = cli("ask", run.run_dir, "--prompt", PROMPT, "--answer", ANSWER, "--unwanted", "-k", "2")
    assert code == 0, err
    assert "1 question under 5 models: 5 short requests" in out
    first = out[out.index("for $0.") :].splitlines()
    assert next(line for line in first[1:] if line.strip()).startswith(("No training example", "Fine-tuning"))
    assert out.index("Proponents") < out.index("Opponents")
    assert "4 members answered: below 8" in err
    assert list(Run.open(run.run_dir).questions.verdicts.values()) == ["unwanted"]


def test_questions_come_from_files_and_from_standard_input(
    run: Run, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats("a", "b").to_jsonl(tmp_path / "questions.jsonl")
    code, out, err = cli("ask", run.run_dir, tmp_path / "questions.jsonl", "--json")
    assert code == 0, err
    content = json.loads(out)
    assert [a["id"] for a in content["answers"]] == ["a", "b"]
    assert content["plan"]["requests"] == 10
    assert {"cause", "members", "proponents", "opponents"} <= content["answers"][0].keys()
    scores = Run.open(run.run_dir).attribution("a").top("a", 5)["score"]
    assert [row["score"] for row in content["answers"][0]["proponents"]] == scores.tolist()  # to the last digit
    (tmp_path / "messages.json").write_text(json.dumps([{"role": "user", "content": "x"}]))
    code, out, _ = cli("ask", run.run_dir, "--messages", tmp_path / "messages.json", "--answer", "y", "--json")
    assert code == 0

    class Stdin:
        buffer = (tmp_path / "questions.jsonl").open("rb")

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr("sys.stdin", Stdin())
    code, out, _ = cli("ask", run.run_dir, "-", "--json")
    assert (code, json.loads(out)["plan"]["requests"]) == (0, 0)
    code, out, _ = cli("ask", run.run_dir, "--remove", "a", "--json")
    assert json.loads(out) == {"removed": ["a"], "questions": [*Run.open(run.run_dir).test.ids]}


def test_an_answer_may_be_a_tool_call_and_messages_that_are_wrong_are_not_sent(run: Run) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "tool_calls": [call]}]
    (example,) = run.question(turns)
    assert example.completion_text() == "look()"
    (example,) = run.question([turns[0], {"role": "assistant", "content": ANSWER}])
    assert (example.prompt_text(), example.completion_text()) == (PROMPT, ANSWER)
    for wrong in ({"role": "user"}, {"role": "user", "content": 5}, {"role": "nobody", "content": "x"}):
        with pytest.raises(DataError, match=r"messages\[0\]"):
            run.question([wrong])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Ask one thing"),
        (("--prompt", "x", "--messages", "y"), "Ask one thing"),
        (("--prompt", "x", "--wanted", "--unwanted"), "exclude each other"),
        (("--messages", "/nonexistent"), "cannot be read"),
        (("--prompt", "x", "--remove", "q0"), "goes with nothing else"),
        (("--unwanted", "--remove", "q0"), "goes with nothing else"),
        (("--prompt", "x", "--record", "new"), "not part of a recording: add --answer"),
        (("--remove", "q9"), "has no example"),
        (("--prompt", "x"), "no target model"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: Run, cli: Cli, arguments: tuple[Any, ...], words: str) -> None:
    code, _, err = cli("ask", run.run_dir, *arguments)
    assert code in (2, 3)
    assert words in err


def test_money_is_asked_for_and_the_key_before(
    run: Run, make_config: MakeConfig, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunStore.open(run.run_dir) as store:
        manifest = store.manifest
        manifest["config"]["budget"]["price"] = {"training": 0.0, "input": 100.0, "output": 0.0, "hosting": None}
        with store._db.transaction():
            store._set_meta("manifest", manifest)
    arguments = ("ask", run.run_dir, "--prompt", PROMPT, "--answer", ANSWER)
    code, _, err = cli(*arguments)
    assert code == 2
    assert "Ask for about $0.01" in err
    assert cli(*arguments, "--yes")[0] == 0
    monkeypatch.delenv("TEST_SERVER_KEY")
    code, _, err = cli(*arguments[:3], "another", "--answer", "x")
    assert "TEST_SERVER_KEY holds no API key" in err
