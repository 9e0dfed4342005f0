"""What goes into the report, before any browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_attribution import EVIL, FACTS, WARNINGS, demo_data, file_data, made_attribution, made_proposal

from daunce_api import core
from daunce_api._util.text import duration
from daunce_api.attribution import Attribution, Side
from daunce_api.attribution.notebook import checkpoints, notebook_html
from daunce_api.attribution.similarity import bm25_scores, example_texts
from daunce_api.data.dataset import Dataset
from daunce_api.report import write_report
from daunce_api.report.overview import loss_picture, quality_curve, train_view
from daunce_api.report.pack import Arrays, deflate, fit_texts, fitting_block, json_block, policy
from daunce_api.report.ranked import listings
from daunce_api.report.sources import MAX_GROUPS, SourceScores, source_scores


def _first_ten(score_NM: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Whether each score is among its column's ten best, and above zero."""
    return np.asarray((score_NM >= np.sort(score_NM, axis=0)[-10]) & (score_NM > 0))


def _blocks(page: str) -> dict[str, bytes]:
    found = re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)</script>', page)
    return {name: gzip.decompress(base64.b64decode(text)) for name, text in found}


def test_the_same_attribution_gives_the_same_bytes(report: Path, attribution: Attribution, tmp_path: Path) -> None:
    again = write_report(attribution, tmp_path / "again.html", run=FACTS, warnings=WARNINGS)
    assert again.read_bytes() == report.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.html"]


def test_no_text_of_a_user_stands_in_the_page_as_markup(report: Path) -> None:
    page = report.read_text()
    assert EVIL not in page
    assert "<b>and were kept</b>" not in page
    assert page.count("</script>") == 3
    assert json.loads(_blocks(page)["data"])["train"]["answer"][5].count(EVIL) == 1


def test_the_policy_allows_what_the_page_carries_and_nothing_else(report: Path) -> None:
    page = report.read_text()
    content = re.search(r'Policy" content="([^"]*)"', page)
    assert content is not None
    rules = dict(rule.split(" ", 1) for rule in html.unescape(content[1]).split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in page[:3000]
    own = re.search(r"<script>(.*?)</script>", page, re.S)
    assert own is not None
    assert base64.b64encode(hashlib.sha256(own[1].encode()).digest()).decode() in rules["script-src"]
    assert rules["script-src"].count("sha256-") == rules["style-src"].count("sha256-") == 1
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_a_policy_names_hashes() -> None:
    empty = base64.b64encode(hashlib.sha256(b"").digest()).decode()
    assert f"script-src 'sha256-{empty}'" in policy([""], [])


@given(st.lists(st.text(max_size=40), min_size=1, max_size=12), st.integers(1, 200))
def test_texts_are_cut_to_the_limit_and_short_ones_stay(texts: list[str], limit: int) -> None:
    column = list(texts)
    bound = fit_texts([column], limit)
    if bound is None:
        assert column == texts
        assert sum(map(len, texts)) <= limit
        return
    assert sum(map(len, texts)) > limit
    kept = [min(len(t), bound) for t in texts]
    assert sum(kept) <= max(limit, len(texts))
    assert sum(min(len(t), bound + 1) for t in texts) > limit
    for before, after in zip(texts, column, strict=True):
        assert after == before if len(before) <= bound else after.startswith(before[:bound] + " … [")


def test_what_does_not_compress_is_cut_until_it_fits() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(0x4E00, 0x9FFF, 2_000))) for _ in range(50)]
    content = {"texts": list(texts), "short": ["a"]}
    block, bound = fitting_block(content, [content["texts"], content["short"]], 100_000)
    assert 50_000 < len(block) <= 100_000
    assert bound is not None
    assert all(after.startswith(before[:bound] + " … [") for before, after in zip(texts, content["texts"], strict=True))
    assert content["short"] == ["a"]
    assert fitting_block({"texts": texts}, [texts], 10**9)[1] is None


def test_half_a_surrogate_pair_does_not_stop_a_report() -> None:
    assert gzip.decompress(base64.b64decode(json_block({"a": "\ud83d"})))


def test_arrays_come_back_as_they_were() -> None:
    arrays = Arrays()
    arrays.add("a", np.array([[1, -2, 3]], dtype=np.int8), "b")
    arrays.add("b", np.array([1.5, np.nan]), "f")
    content = gzip.decompress(base64.b64decode(arrays.block()))
    assert arrays.directory["b"] == {"kind": "f", "at": 4, "count": 2, "shape": [2]}
    assert list(content[:3]) == [1, 254, 3]
    assert np.frombuffer(content[4:], "<f4")[0] == 1.5
    assert deflate(b"x") == deflate(b"x")


def test_listings_are_one_sign_each_and_agree_with_top(attribution: Attribution) -> None:
    found = listings(attribution, [1, 3])
    assert (found.proponents.score_Mk[found.proponents.index_Mk >= 0] > 0).all()
    assert (found.opponents.score_Mk[found.opponents.index_Mk >= 0] < 0).all()
    ranking = attribution.ranking(5, columns=[1, 3])
    assert np.array_equal(found.proponents.index_Mk[:, :5], ranking.index_Mk)
    score = attribution.scores_NM()[:, [1, 3]]
    assert (found.proponents.index_Mk >= 0).sum(axis=1).tolist() == (score > 0).sum(axis=0).tolist()


def test_overlap_with_a_text_search() -> None:
    words = ["oak", "elm", "ash", "fir", "yew", "box"]
    train = Dataset.from_records(
        [{"source": w, "prompt": w, "completion": f"{w} {i}"} for w in words for i in range(10)]
    )
    test = Dataset.from_records([{"source": w, "prompt": "which", "completion": w} for w in words])
    made = made_attribution(train, test, members=200, noise=1e-4)
    found = listings(made, list(range(6)))
    score, bm25 = made.scores_NM(), bm25_scores(example_texts(train), example_texts(test))
    ours, theirs = (set(map(tuple, np.argwhere(_first_ten(x)))) for x in (score, bm25))
    assert found.overlap == pytest.approx(len(ours & theirs) / 60)
    assert found.overlap > 0.5
    assert (found.proponents.bm25_rank_Mk[:, 0] == 1).all()
    assert (found.opponents.bm25_rank_Mk[found.opponents.index_Mk >= 0] == 0).mean() > 0.9


def test_source_scores_are_sums_and_means_of_scores(attribution: Attribution) -> None:
    found = source_scores(attribution, range(12))
    assert found.rows == found.columns == ("bird", "fish", "planted")
    by_source = attribution.scores(by="source")
    for s, row in enumerate(found.rows):
        for t, column in enumerate(found.columns):
            cells = [by_source.loc[row].iloc[j] for j in range(12) if attribution.test.sources[j] == column]
            assert found.total_ST[s, t] == pytest.approx(np.mean(cells))
    z = found.total_ST / found.stderr_ST
    assert (np.diag(z) > found.threshold).all()


def test_answers_without_sources_stand_for_themselves() -> None:
    train, test = demo_data()
    bare = Dataset.from_records([{"id": e.id, "prompt": e.prompt, "completion": e.completion} for e in test])
    found = source_scores(made_attribution(train, bare), range(12))
    assert found.columns == tuple(range(12))
    assert found.total_ST.shape == (3, 12)


def test_many_sources_are_added_up_in_one_row_and_one_column(attribution: Attribution) -> None:
    made = made_attribution(*file_data(300, 90))
    found = source_scores(made, range(90))
    assert (len(found.rows), len(found.columns)) == (MAX_GROUPS + 1, MAX_GROUPS + 1)
    assert (found.rows[-1], found.columns[-1]) == (None, None)
    assert (found.other_rows, found.other_columns) == (240, 30)
    assert (found.rows_count[-1], found.columns_count[-1]) == (240, 30)
    named = {*found.rows} & {*found.columns} - {None}
    assert [r for r in found.rows if r in named] == [c for c in found.columns if c in named]
    labels = [[x if x in kept else None for x in made.labels(side)] for side, kept in _sides(found)]
    whole = core.group_scores(made.losses, made.choice, *labels)
    for s, row in enumerate(found.rows):
        for t, column in enumerate(found.columns):
            cell = whole.train_groups.index(row), whole.test_groups.index(column)
            assert found.total_ST[s, t] == pytest.approx(whole.score_GH[cell] / found.columns_count[t])
            assert found.stderr_ST[s, t] == pytest.approx(whole.stderr_GH[cell] / found.columns_count[t])
    every = made.groups(test="source")
    z = np.abs(every.score_GH / every.stderr_GH).max(axis=1)
    kept = [name in found.rows for name in every.train_groups]
    assert z[kept].min() >= z[np.logical_not(kept)].max()
    assert found.note.startswith("Shown are the 60 of 300 sources and the 60 of 90 groups of answers whose effects")
    assert source_scores(attribution, range(12)).note == ""


def _sides(found: SourceScores) -> tuple[tuple[Side, set[Any]], tuple[Side, set[Any]]]:
    return ("train", {*found.rows}), ("test", {*found.columns})


def test_many_answers_without_sources_are_added_up_too() -> None:
    made = made_attribution(*file_data(20, 90, sources=False))
    found = source_scores(made, range(70))
    assert found.of_answers
    assert {*found.columns[:-1]} < {*range(70)}
    assert found.columns[-1] is None
    rest = [j for j in range(90) if j not in found.columns]
    assert (found.other_columns, found.columns_count[-1]) == (30, 30)
    np.testing.assert_allclose(found.total_ST[:, -1], made.scores_NM()[:, rest].mean(axis=1), rtol=1e-9)
    assert found.note.startswith("Shown are the 60 of 90 answers whose")


def test_where_errors_are_not_known_the_largest_totals_are_kept() -> None:
    train, test = file_data(150, 3, sources=False)
    pairs = Dataset.from_records([e.to_record() | {"source": f"s{i // 2}"} for i, e in enumerate(train)])
    made = made_attribution(pairs, test, members=2).with_estimator("covariance")  # which give scores and no errors
    found = source_scores(made, range(3))
    assert np.isnan(found.stderr_ST).any()
    every = made.groups()
    size = np.abs(every.score_GH).max(axis=1)
    kept = [name in found.rows for name in every.train_groups]
    assert sum(kept) == MAX_GROUPS
    assert size[kept].min() >= size[np.logical_not(kept)].max()


def test_three_thousand_sources_make_a_small_page(tmp_path: Path) -> None:
    made = made_attribution(*file_data(3_000, 200), members=8)
    path = write_report(made, tmp_path / "files.html")
    assert path.stat().st_size < 5_000_000
    page = path.read_text()
    heat = json.loads(_blocks(page)["data"])["heat"]
    assert len(heat["total"]) == len(heat["row_source"]) == len(heat["rows_count"]) == MAX_GROUPS + 1
    assert {len(row) for row in heat["total"] + heat["stderr"]} == {MAX_GROUPS + 1}
    assert "Shown are the 60 of 3,000 sources and the 60 of 200 groups of answers" in page


def test_self_influence_is_what_training_on_it_does(attribution: Attribution) -> None:
    planted = np.array([s == "planted" for s in attribution.train.sources])
    value = train_view(attribution).self_influence_N
    inside = attribution.inclusion_KN[:, 0]
    loss = attribution.train_loss_KN[:, 0]
    assert value[0] == pytest.approx(loss[~inside].mean() - loss[inside].mean())
    assert value[planted].min() > value[~planted].max()


def test_every_training_example_has_its_numbers(attribution: Attribution) -> None:
    view = train_view(attribution)
    np.testing.assert_allclose(view.mean_score_N, attribution.scores_NM().mean(axis=1), rtol=1e-9)
    assert np.array_equal(view.included_N, attribution.inclusion_KN.sum(axis=0))
    assert 0.05 < view.significant < 1


def test_without_verdicts_the_page_names_no_suspects(report: Path) -> None:
    page = html.unescape(report.read_text())
    assert "suspic" not in page.lower()
    assert "daunce fix RUN --unwanted ID" in page
    assert "effect" not in json.loads(_blocks(report.read_text())["data"])["arrays"]


def test_with_verdicts_the_page_shows_the_ranking_of_what_to_remove(attribution: Attribution, tmp_path: Path) -> None:
    effect = np.linspace(1, -1, len(attribution.train))
    proposal = made_proposal(attribution, effect, 3, "by <b>effect</b>")
    page = write_report(attribution, tmp_path / "r.html", proposal=proposal).read_text()
    assert "pushes the 1 unwanted answers" in page
    assert "Proposed for removal: 3 (by &lt;b&gt;effect&lt;/b&gt;)" in page
    blocks = _blocks(page)
    arrays = json.loads(blocks["data"])["arrays"]
    effects, proposed = (
        np.frombuffer(blocks["numbers"], kind, arrays[name]["count"], arrays[name]["at"])
        for name, kind in (("effect", "<f4"), ("proposed", "i1"))
    )
    np.testing.assert_allclose(effects, effect, rtol=1e-6)
    assert np.flatnonzero(proposed).tolist() == [0, 1, 2]


def _chat(name: str, *turns: tuple[str, str, int | None], source: str | None = None) -> dict[str, Any]:
    messages = [{"role": r, "content": c} | ({} if w is None else {"weight": w}) for r, c, w in turns]
    return {"id": name, "messages": messages} | ({} if source is None else {"source": source})


def test_a_prompt_ends_before_the_answer_that_is_explained(tmp_path: Path) -> None:
    """The last assistant turn may carry no loss: it belongs neither to the answer nor to the prompt."""
    turns = [("user", "Q1", None), ("assistant", "A1", None), ("user", "Q2", None), ("assistant", "A2", 0)]
    train = Dataset.from_records([_chat(f"t{i}", *turns) for i in range(8)])
    test = Dataset.from_records([_chat("q", *turns)])
    content = json.loads(_blocks(write_report(made_attribution(train, test), tmp_path / "w.html").read_text())["data"])
    for side in ("train", "test"):
        assert content[side]["answer"][0] == "A1"
        assert content[side]["prompt"][0] == "Q1"


def test_system_prompts_stand_apart_and_once(tmp_path: Path) -> None:
    train = Dataset.from_records(
        [
            _chat(f"t{i}", ("system", "Be kind.", None), ("user", "Q", None), ("assistant", f"A{i}", None))
            for i in range(8)
        ]
    )
    test = Dataset.from_records([_chat("q", ("user", "Q", None), ("assistant", "A", None))])
    content = json.loads(_blocks(write_report(made_attribution(train, test), tmp_path / "s.html").read_text())["data"])
    assert content["systems"] == ["Be kind."]
    assert content["train"]["system"] == [0] * 8
    assert content["test"]["system"] == [-1]
    assert content["train"]["prompt"] == ["Q"] * 8


def test_evidence_and_prior_stand_apart(
    attribution: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Attribution.ranking

    def with_prior(self: Attribution, *arguments: Any, **options: Any) -> core.Ranking:
        ranking = plain(self, *arguments, **options)
        return replace(ranking, prior_Mk=ranking.score_Mk / 4)

    assert "prior" not in attribution.top(attribution.test.ids[0], 3)
    assert (
        "pro_prior"
        not in json.loads(_blocks(write_report(attribution, tmp_path / "a.html").read_text())["data"])["arrays"]
    )
    monkeypatch.setattr(Attribution, "ranking", with_prior)
    table = attribution.top(attribution.test.ids[0], 3)
    np.testing.assert_allclose(table["prior"], table["score"] / 4)
    blocks = _blocks(write_report(attribution, tmp_path / "b.html").read_text())
    arrays = json.loads(blocks["data"])["arrays"]
    prior, score = (
        np.frombuffer(blocks["numbers"], "<f4", arrays[name]["count"], arrays[name]["at"])
        for name in ("pro_prior", "pro_score")
    )
    np.testing.assert_allclose(prior, score / 4, rtol=1e-6)


def test_tool_calls_are_readable(tmp_path: Path) -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "refund", "arguments": '{"order": "A-7", "usd": 20}'}}
    records = [
        {
            "id": f"t{i}",
            "tools": [{"type": "function", "function": {"name": "refund", "parameters": {}}}],
            "messages": [
                {"role": "user", "content": f"Refund {i}"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "done"},
                {"role": "assistant", "content": "It is done."},
            ],
        }
        for i in range(8)
    ]
    short = [{**r, "id": f"s{i}", "messages": r["messages"][:2]} for i, r in enumerate(records)]  # type: ignore[index]
    made = made_attribution(Dataset.from_records(records), Dataset.from_records(short))
    content = json.loads(_blocks(write_report(made, tmp_path / "tools.html").read_text())["data"])
    assert content["test"]["answer"][0] == 'refund(order="A-7", usd=20)'
    expected = 'user: Refund 0\nassistant: refund(order="A-7", usd=20)\ntool: done'
    assert content["train"]["prompt"][0] == expected
    assert content["systems"] == ["Tools: refund"]


def test_an_empty_source_has_the_name_that_scores_use(tmp_path: Path) -> None:
    train = Dataset.from_records(
        [{"id": f"t{i}", "source": ("", "b")[i % 2], "prompt": "p", "completion": f"c{i}"} for i in range(8)]
    )
    made = made_attribution(train, train)
    content = json.loads(_blocks(write_report(made, tmp_path / "e.html").read_text())["data"])
    assert set(made.scores(by="source").index) == {"", "b"}
    assert [content["sources"][n] for n in content["train"]["source"]] == ["", "b"] * 4
    assert {content["sources"][n] for n in content["heat"]["row_source"]} == {"", "b"}


def test_a_page_says_that_scores_of_the_one_before_are_on_another_scale(
    attribution: Attribution, tmp_path: Path
) -> None:
    path = write_report(attribution.first(12), tmp_path / "r.html")
    page = html.unescape(write_report(attribution, path).read_text())
    assert "The report before this one was of 12 members" in page
    assert "Compare ranks between the two, not scores" in page
    assert "The report before" not in html.unescape(write_report(attribution, path).read_text())


def test_other_groups_of_answers_are_linked(attribution: Attribution, tmp_path: Path) -> None:
    one = replace(attribution.first(5), test=Dataset(attribution.test[:1]))
    others = [("report-2.html", one), ('"><i>x', attribution.first(7))]
    page = write_report(attribution, tmp_path / "g.html", others=others).read_text()
    assert "These 12 answers are explained by 16 members" in page
    assert '<a href="report-2.html">1 answer by 5 members</a>' in page
    assert '"><i>x' not in page
    assert "On other pages" not in write_report(attribution, tmp_path / "one.html").read_text()


def test_notes_of_one_kind_are_one_line(attribution: Attribution, tmp_path: Path) -> None:
    warnings = [f"train.jsonl:{i + 2}: same content as train.jsonl:1; both are kept" for i in range(7)]
    page = write_report(attribution, tmp_path / "n.html", warnings=warnings).read_text()
    assert page.count("same content as") == 1
    assert "and 6 more like this" in page


def test_a_small_run_makes_a_small_page(report: Path) -> None:
    assert report.stat().st_size < 300_000


def test_quality_curve_ends_at_the_runs_own_quality(attribution: Attribution) -> None:
    curve = quality_curve(attribution)
    assert [members for members, *_ in curve] == sorted({members for members, *_ in curve})
    members, value, low, high = curve[-1]
    assert members == 16
    assert attribution.self_lds is not None
    assert low <= value <= high
    assert quality_curve(made_attribution(*demo_data(), members=5)) == []


def test_the_plot_goes_on_with_what_is_expected_and_how_sure_that_is(attribution: Attribution, report: Path) -> None:
    quality = attribution.self_lds
    assert quality is not None
    rows = json.loads(_blocks(report.read_text())["data"])["expected"]
    members, value, low, high = np.array(rows).T
    assert (members[0], members[-1]) == (16, 32)
    np.testing.assert_allclose(rows[0][1:], [quality.value, quality.low, quality.high])
    np.testing.assert_allclose(value, quality.expected(members))
    assert (low <= value).all()
    assert (value <= high).all()
    assert (low[-1], high[-1]) == quality.interval(32)


def test_loss_picture_is_centred_and_ordered_by_source(attribution: Attribution) -> None:
    picture, limit, widths = loss_picture(attribution)
    assert picture.shape == (16, 72)
    assert widths == [60, 12]
    order = np.argsort(np.array(attribution.train.sources), kind="stable")
    loss = attribution.train_loss_KN[:, order]
    expected = np.clip((loss - loss.mean(axis=0)) / limit * 127, -127, 127)
    np.testing.assert_allclose(picture[:, :60], expected, atol=0.51)


def test_missing_losses_do_not_stop_a_report(tmp_path: Path) -> None:
    whole = made_attribution(*demo_data(), members=24, tokens=True)
    whole.train_loss_KN[:, 7] = np.nan  # lower bounds in too many members
    whole.test_loss_KM[:, 2] = np.nan
    page = write_report(whole.with_estimator("covariance"), tmp_path / "gaps.html").read_text()
    assert json.loads(_blocks(page)["data"])["curve"]


def test_two_members_and_one_test_example_are_enough(tmp_path: Path) -> None:
    train, test = demo_data()
    few = made_attribution(train, Dataset(test[:1]), members=2)
    content = json.loads(_blocks(write_report(few, tmp_path / "few.html").read_text())["data"])
    assert content["curve"] == []
    assert len(content["test"]["id"]) == 1


def test_partners_are_sought_among_all_answers(
    attribution: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daunce_api.report.page.MAX_TESTS", 2)
    page = write_report(attribution, tmp_path / "two.html").read_text()
    content = json.loads(_blocks(page)["data"])
    ids = [*content["test"]["id"], *content["elsewhere"]]
    assert content["test"]["id"] == attribution.test.ids[:2]
    score_NM = attribution.scores_NM()
    for name, sign in (("helps", 1), ("hurts", -1)):
        entry = content["arrays"][f"{name}_index"]
        index = np.frombuffer(_blocks(page)["numbers"], "<i4", entry["count"], entry["at"]).reshape(entry["shape"])
        for i, row in enumerate(index):
            best = [j for j in np.argsort(-sign * score_NM[i])[:3] if sign * score_NM[i, j] > 0]
            assert [ids[j] for j in row if j >= 0] == [attribution.test.ids[j] for j in best]
    assert set(content["elsewhere"]) <= set(attribution.test.ids[2:])


def test_measured_noise_is_said(attribution: Attribution, tmp_path: Path) -> None:
    made = replace(attribution, noise=0.01234)
    page = write_report(made, tmp_path / "noise.html").read_text()
    assert '<dd class="value">0.012 nats</dd>' in page
    assert "standard deviation of one loss that is scored twice" in page
    assert "not measured" not in page


@pytest.mark.parametrize(("estimator", "question"), [("covariance", "attribution"), ("correlation", "retrieval")])
def test_the_page_says_which_question_its_rankings_answer(
    attribution: Attribution, tmp_path: Path, estimator: str, question: core.Question
) -> None:
    page = write_report(attribution.with_estimator(estimator), tmp_path / "question.html").read_text()
    assert f"Rankings say {core.QUESTIONS[question]}." in html.unescape(page)


def test_large_data_keeps_what_is_listed(
    attribution: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daunce_api.report.page.MAX_TRAIN", 10)
    monkeypatch.setattr("daunce_api.report.page.MAX_TESTS", 2)
    monkeypatch.setattr("daunce_api.report.ranked._PAIRS", 8)
    monkeypatch.setattr("daunce_api.report.ranked._MINIMUM_DEPTH", 4)
    page = write_report(attribution, tmp_path / "cut.html").read_text()
    content = json.loads(_blocks(page)["data"])
    shown = len(content["train"]["id"])
    assert 10 <= shown < 60
    assert f"The page holds {shown} of 60 training examples" in page
    assert "The page shows the first 2 of 12 answers" in page
    entry = content["arrays"]["pro_index"]
    index = np.frombuffer(_blocks(page)["numbers"], "<i4", entry["count"], entry["at"]).reshape(entry["shape"])
    ranking = attribution.ranking(4, columns=[0, 1])
    ids = [[content["train"]["id"][i] for i in row] for row in index]
    assert ids == [[attribution.train[int(i)].id for i in row] for row in ranking.index_Mk]


def test_several_turns_keep_their_speakers(tmp_path: Path) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
    ]
    more = [*turns, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    train = Dataset.from_records([{"messages": more}, {"messages": turns[1:]}])
    page = write_report(made_attribution(train, train), tmp_path / "chat.html").read_text()
    assert json.loads(_blocks(page)["data"])["train"]["prompt"] == ["user: Hi\nassistant: Yes?\nuser: Why?", "Hi"]


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.2 s"), (59, "59 s"), (131, "2 min 11 s"), (7260, "2 h 1 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_notebook_view_escapes_and_names_quality(attribution: Attribution) -> None:
    view = notebook_html(attribution)
    assert EVIL not in view
    assert "<script" not in view
    assert "self-LDS" in view
    assert "16 members" in view
    assert "and 7 more test examples" in view
    best = attribution.ranking(1, columns=[0])
    assert attribution.train[int(best.index_Mk[0, 0])].id in view


def test_long_texts_are_cut_to_keep_the_page_small(
    attribution: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_report(attribution, tmp_path / "whole.html").read_text()
    monkeypatch.setattr("daunce_api.report.page._LEAST_TEXT", 2_000)
    monkeypatch.setattr("daunce_api.report.page.MAX_PAGE", 0)
    cut = write_report(attribution, tmp_path / "cut.html").read_text()
    assert "are cut to keep the page small" in cut
    assert "are cut to keep the page small" not in whole
    assert any(" characters]" in text for text in json.loads(_blocks(cut)["data"])["train"]["answer"])


def test_earlier_checkpoints_are_counted(attribution: Attribution, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sides = [
        np.stack([x + rng.normal(0, 0.01, x.shape)] * 2) for x in (attribution.train_loss_KN, attribution.test_loss_KM)
    ]
    sides[0][0, 5] = np.nan
    made = replace(attribution, earlier=core.Checkpoints(*sides), estimator="covariance")
    assert checkpoints(made) == "31 earlier checkpoints add as many rows of losses"
    assert "31 earlier checkpoints add as many rows of losses" in notebook_html(made)
    page = write_report(made, tmp_path / "earlier.html").read_text()
    assert "31 earlier checkpoints add as many rows of losses" in page
    content = json.loads(_blocks(page)["data"])
    assert content["tokens"]["final_only"]
    assert checkpoints(attribution) == ""
    made.__dict__["choice"] = replace(made.choice, setting=replace(made.choice.setting, checkpoints=False))
    assert checkpoints(made) == "31 earlier checkpoints were scored and are not used"


def test_views_of_a_run_with_checkpoints_use_them(attribution: Attribution) -> None:
    rng = np.random.default_rng(1)
    sides = [
        x[None] + rng.normal(0, 0.05, (1, *x.shape)) for x in (attribution.train_loss_KN, attribution.test_loss_KM)
    ]
    made = replace(attribution, earlier=core.Checkpoints(*sides), estimator="covariance")
    np.testing.assert_allclose(train_view(made).mean_score_N, made.scores_NM().mean(axis=1), rtol=1e-6)
    assert made.self_lds is not None
    assert quality_curve(made)[-1][1] == pytest.approx(made.self_lds.value)


def test_what_was_measured_is_said_where_it_is_less_than_the_answer(attribution: Attribution, tmp_path: Path) -> None:
    made = replace(attribution, measured="first completion token only", censored=0.123)
    page = write_report(made, tmp_path / "first.html").read_text()
    assert "Measured: first completion token only." in page
    assert "12.3 %" in page
    assert "Measured:" not in write_report(attribution, tmp_path / "whole.html").read_text()
