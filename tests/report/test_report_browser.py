"""The report in a real browser: what a reader sees, clicks and types."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_attribution import demo_data, file_data, made_attribution, made_proposal, status_of

from daunce_api.attribution import Attribution
from daunce_api.attribution.similarity import bm25_scores, example_texts
from daunce_api.attribution.tokens import Split
from daunce_api.data.dataset import Dataset
from daunce_api.report import write_report


def test_opens_from_disk_without_network_error_or_refusal(report: Path, open_page: Any) -> None:
    page = open_page(report)
    assert page.problems == []
    assert page.evaluate("window.broken") is None
    assert page.locator("#failed").is_hidden()


def test_a_foreign_script_does_not_run(report: Path, tmp_path: Path, open_page: Any) -> None:
    path = tmp_path / "edited.html"
    path.write_text(report.read_text().replace("</main>", "<script>window.broken = 3</script></main>"))
    page = open_page(path)
    assert page.evaluate("window.broken") is None
    assert any("Content Security Policy" in p for p in page.problems)


def test_a_script_that_is_added_later_does_not_run(report: Path, tmp_path: Path, open_page: Any) -> None:
    page = open_page(report)
    ran = page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.broken = 4';"
        "document.head.append(s); return window.broken; }"
    )
    assert ran is None


def test_texts_are_shown_as_they_are(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report)
    assert page.locator("#answer .reply").inner_text() == attribution.test[0].completion
    page.locator("#train-search").fill("evil text")
    assert page.locator("#train-count").inner_text() == "1 of 60"
    page.locator("#train-list .row").first.click()
    assert "</script><script>" in page.locator("#train-detail .reply").inner_text()
    assert page.evaluate("window.broken") is None


def test_the_run_at_a_glance(report: Path, open_page: Any) -> None:
    page = open_page(report)
    strip = page.locator("#strip summary")
    assert "16 of 20 members" in strip.inner_text()
    assert strip.bounding_box()["height"] < 120
    assert page.locator("#answer .reply").bounding_box()["y"] < 700, "answers begin on the first screen"
    assert page.title().startswith("planted boat")
    assert page.locator("h1").inner_text() == "planted boat"
    strip.click()
    text = page.locator("#glance").inner_text()
    for part in (
        "daunce-tiny on embedded",
        "16 of 20",
        "1 failed",
        "$3.20",
        "812,345 tokens trained",
        "2 min 11 s",
        "whitened",
        "95 % interval",
        "not measured",
        "<b>and were kept</b>",
        "Member 7 was given up",
        "Stopped after 16 members",
    ):
        assert part in text


def test_proponents_and_opponents_are_the_rankings(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report)
    page.locator("#test-list .row").nth(2).click()
    for box, opponents in (("#pro", False), ("#opp", True)):
        table = attribution.top(attribution.test[2].id, 3, opponents=opponents)
        largest = float(table["score"].abs().max())
        for place, row in enumerate(table.to_dict("records")):
            card = page.locator(f"{box} .card").nth(place)
            assert card.get_attribute("data-train") == row["id"]
            assert card.locator(".reply").inner_text() == row["completion"]
            score = card.locator(".number").inner_text().replace("−", "-")
            assert float(score) == pytest.approx(row["score"], abs=0.006 * largest)
            half = float(card.locator(".spread").inner_text().replace("±", ""))
            assert half == pytest.approx((row["high"] - row["low"]) / 2, abs=0.006 * largest)
            assert ("not significant" in card.inner_text()) == (not row["distinguishable"])
            assert ("faint" in card.get_attribute("class")) == (not row["distinguishable"])


def test_the_rank_of_a_text_search_stands_beside(report: Path, open_page: Any, attribution: Attribution) -> None:
    score = bm25_scores(example_texts(attribution.train), example_texts(attribution.test))[:, 0]
    card = open_page(report).locator("#pro .card").first
    i = attribution.train.position(card.get_attribute("data-train"))
    expected = f"BM25 #{int((score > score[i]).sum()) + 1}" if score[i] > 0 else "BM25 —"
    assert card.locator(".bm25").inner_text() == expected


def test_filters_of_pairs(report: Path, open_page: Any) -> None:
    page = open_page(report)
    everything = int(page.locator("#pro-count").inner_text())
    page.locator("#pair-source").select_option(label="fish")
    assert 0 < int(page.locator("#pro-count").inner_text()) < everything
    assert set(page.locator("#pro .tag").all_inner_texts()) == {"fish"}
    page.locator("#pair-source").select_option("-1")
    page.locator("#pair-marked").check()
    assert page.locator(".card.faint").count() == 0
    page.locator("#pair-search").fill("no such words")
    assert page.locator("#pro .none").inner_text() == "None that fits these filters."


def test_more_entries_on_demand_with_faint_ones_that_are_not_significant(
    report: Path, open_page: Any, attribution: Attribution
) -> None:
    page = open_page(report)
    assert page.locator("#pro .card").count() == 10
    while page.locator("#pro .more").count():
        page.locator("#pro .more").click()
    shown = page.locator("#pro .card").count()
    ranking = attribution.ranking(shown, columns=[0])
    assert ranking.distinguishable_Mk is not None
    faint = shown - int(ranking.distinguishable_Mk.sum())
    assert page.locator("#pro .card.faint").count() == faint > 0


def test_search_among_answers(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.locator("#test-search").fill("answer 3 FOR fish")
    assert page.locator("#test-count").inner_text() == "1 of 12 answers"
    page.locator("#test-list .row").first.click()
    assert "q-fish-3" in page.locator("#answer .meta").inner_text()
    page.locator("#test-search").press("Escape")
    assert page.locator("#test-count").inner_text() == "12 answers"


def test_keyboard_alone(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert "q-bird-2" in page.locator("#answer .meta").inner_text()
    page.keyboard.press("k")
    assert "q-bird-1" in page.locator("#answer .meta").inner_text()
    page.keyboard.press("/")
    page.keyboard.type("planted")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "test-list"
    page.keyboard.press("End")
    assert "q-planted-3" in page.locator("#answer .meta").inner_text()
    row = page.locator("#test-list .row[aria-selected=true]")
    assert page.locator("#test-list").get_attribute("aria-activedescendant") == row.get_attribute("id")
    page.locator("#opp .open").first.focus()
    page.keyboard.press("Enter")
    assert "chosen" in page.locator("#opp .card").first.get_attribute("class")
    assert page.evaluate("document.activeElement.closest('.card').classList.contains('chosen')")
    page.keyboard.press("Space")
    assert page.locator(".card.chosen").count() == 0
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.locator(".card.chosen").count() == 0
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()


def colours(tokens: Any) -> list[str]:
    found: list[str] = tokens.evaluate_all("all => all.map(t => t.style.backgroundColor)")
    return found


def test_tokens_that_carry_the_score_of_a_pair(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report)
    answer = page.locator("#answer .t")
    assert "".join(answer.all_text_contents()) == attribution.test[0].completion
    before = colours(answer)
    card = page.locator("#pro .card").first
    card.locator(".reply").click()
    i = attribution.train.position(card.get_attribute("data-train"))
    split = Split(attribution)
    for tokens, parts in ((answer, split.test_parts(i, 0)), (card.locator(".reply .t"), split.train_parts(i, 0))):
        shades = colours(tokens)
        assert len(shades) == len(parts)
        assert shades != before
        share = parts / np.abs(parts).max()
        for shade, part, title in zip(shades, share, tokens.evaluate_all("all => all.map(t => t.title)"), strict=True):
            if abs(part) > 0.05:
                assert ("--hurt" if part < 0 else "--help") in shade
                assert int(re.findall(r"(\d+)%", shade)[0]) == pytest.approx(55 * abs(part), abs=1)
            value = float(title.removesuffix(" of the score").replace("−", "-"))
            assert value == pytest.approx(part * np.abs(parts).max(), abs=np.abs(parts).max() / 100)
    assert "".join(card.locator(".reply .t").all_text_contents()) == attribution.train[i].completion


def test_the_legend_says_what_token_colours_mean(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report)
    legend = page.locator("#answer .legend")
    assert "higher its loss" in legend.inner_text()
    card = page.locator("#opp .card").first
    card.locator(".open").click()
    text = legend.inner_text()
    assert card.get_attribute("data-train") in text
    total = float(re.findall(r"add up to ([−+]\d[\d.e−]*\d)", text)[0].replace("−", "-"))
    assert total == pytest.approx(float(card.locator(".number").inner_text().replace("−", "-")), rel=0.01)
    assert "raises" in text
    assert "lowers" in text
    i = attribution.train.position(card.get_attribute("data-train"))
    parts = Split(attribution).train_parts(i, 0)
    largest = attribution.tokens["train"].pieces[i][int(np.abs(parts).argmax())].strip()
    assert f"Largest: {largest} " in card.locator(".legend").inner_text()


def test_a_chosen_pair_is_folded_by_a_second_click(report: Path, open_page: Any) -> None:
    page = open_page(report)
    before = colours(page.locator("#answer .t"))
    page.locator("#pro .open").nth(1).click()
    assert page.locator("#pro .open").nth(1).get_attribute("aria-expanded") == "true"
    page.locator("#pro .open").nth(1).click()
    assert page.locator(".card.chosen").count() == 0
    assert colours(page.locator("#answer .t")) == before


def test_pairs_beyond_those_with_tokens_say_so(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.locator("#pro .more").click()
    page.locator("#pro .open").nth(12).click()
    assert "for the first 10 on each side" in page.locator("#pro .card.chosen .legend").inner_text()
    assert page.locator("#pro .card.chosen .t").count() == 0


def test_intervals_of_correlations_are_those_of_top(attribution: Attribution, tmp_path: Path, open_page: Any) -> None:
    made = attribution.with_estimator("correlation")
    page = open_page(write_report(made, tmp_path / "correlation.html"))
    row = made.top(made.test[0].id, 1).to_dict("records")[0]
    low, high = (float(x.replace("−", "-")) for x in page.locator("#pro .spread").first.inner_text().split(" to "))
    assert low == pytest.approx(row["low"], rel=0.006)
    assert high == pytest.approx(row["high"], rel=0.006)


def test_the_heat_map_opens_pairs_by_keys(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.locator("#heat td button").nth(3).focus()
    page.keyboard.press("Enter")
    assert page.locator("#pair-source").evaluate("s => s.selectedOptions[0].text") == "fish"
    assert page.locator("#test-source").evaluate("s => s.selectedOptions[0].text") == "bird"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = made_attribution(*file_data(300, 90), members=12)
    return write_report(made, tmp_path_factory.mktemp("files") / "files.html")


def test_a_large_heat_map_scrolls_in_its_own_box(files: Path, open_page: Any) -> None:
    page = open_page(files, viewport={"width": 600, "height": 900})
    assert page.locator("#heat td button").count() == 61 * 61
    assert page.locator("#heat thead th").count() == 61
    assert page.evaluate("document.documentElement.scrollWidth") <= 600
    assert " on docs/" in page.locator("#heat td button").first.get_attribute("title")
    assert page.problems == []


def test_the_row_of_all_others_opens_what_the_map_does_not_name(files: Path, open_page: Any) -> None:
    page = open_page(files)
    rows = page.locator("#heat tbody tr")
    assert rows.last.locator("th").inner_text() == "all others"
    named = set(rows.locator("th").all_inner_texts())
    rows.last.locator("button").first.click()
    shown = set(page.locator(".card .tag").all_inner_texts())
    assert shown
    assert not shown & named
    rows.nth(2).locator("button").last.click()
    assert page.locator("#test-count").inner_text() == "30 of 90 answers"
    assert (
        page.locator("#pair-source").evaluate("s => s.selectedOptions[0].text")
        == rows.nth(2).locator("th").inner_text()
    )


def test_a_cell_of_an_answer_without_source_opens_that_answer(tmp_path: Path, open_page: Any) -> None:
    made = made_attribution(*file_data(12, 30, sources=False), members=12)
    page = open_page(write_report(made, tmp_path / "numbers.html"))
    cells = page.locator("#heat tbody tr").nth(1).locator("button")
    for j in (3, 29, 0):
        cells.nth(j).click()
        assert page.locator("#answer .id").inner_text() == str(j)
        assert page.locator("#test-count").inner_text() == "30 answers"


def test_without_sources_nothing_is_said_of_them(tmp_path: Path, open_page: Any) -> None:
    train, test = demo_data()
    bare = Dataset.from_records([{"prompt": e.prompt, "completion": e.completion} for e in train])
    one = Dataset.from_records([{"id": "only", "prompt": test[0].prompt, "completion": test[0].completion}])
    page = open_page(write_report(made_attribution(bare, one, members=12), tmp_path / "bare.html"))
    assert page.locator("#sources").is_hidden()
    assert page.locator("#sources-link").is_hidden()
    assert page.locator(".tag").count() == 0
    assert "(none)" not in page.locator("body").inner_text()
    assert page.problems == []


def test_many_warnings_are_folded(attribution: Attribution, tmp_path: Path, open_page: Any) -> None:
    warnings, state = [f"warning {i}" for i in range(40)], status_of(failures=("Member 3 was given up.",))
    page = open_page(write_report(attribution, tmp_path / "many.html", run=state, warnings=warnings))
    assert page.locator("#glance > .notes").first.inner_text() == "Member 3 was given up."
    assert "1 note" in page.locator("#strip summary").inner_text()
    page.locator("#strip summary").click()
    assert "warning 0 (and 39 more like this)" in page.locator("#strip .notes").inner_text()


def test_words_are_explained(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.locator("#help-open").click()
    assert page.locator("#help").evaluate("box => box.scrollTop") == 0
    text = page.locator("#help").inner_text()
    for word in ("self-LDS", "self-influence", "BM25", "proponent", "significant", "nats"):
        assert word in text


def test_training_examples_are_sorted_by_a_column(report: Path, open_page: Any) -> None:
    page = open_page(report)
    shown = [float(t) for t in page.locator("#train-list .row .num:nth-child(4)").all_inner_texts()]
    assert len(shown) > 8
    assert shown == sorted(shown, reverse=True)
    page.locator("button[data-order=mean_score]").click()
    shown = [float(t.replace("−", "-")) for t in page.locator("#train-list .row .num:nth-child(3)").all_inner_texts()]
    assert shown == sorted(shown)


def test_candidates_for_removal_come_first(attribution: Attribution, tmp_path: Path, open_page: Any) -> None:
    made = made_proposal(attribution, np.arange(60.0), 4, "made by a test")
    page = open_page(write_report(attribution, tmp_path / "c.html", proposal=made))
    assert page.locator("#train-list .row .id").first.inner_text() == attribution.train.ids[-1]
    assert "Unwanted (z)" in page.locator("#train-head").inner_text()
    assert "proposed for removal" in page.locator("#train-detail").inner_text()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#print").text_content().count("effect +") == 4


def test_links_lead_to_an_answer_and_an_example(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report)
    assert page.evaluate("location.hash") == ""
    page.keyboard.press("j")
    page.locator("#pro .open").nth(2).click()
    named = page.locator("#pro .card.chosen").get_attribute("data-train")
    address = page.evaluate("location.href")
    assert "#answer=q-bird-1&example=" in address
    again = open_page(report, hash=address.partition("#")[2])
    assert "q-bird-1" in again.locator("#answer .meta").inner_text()
    assert again.locator(".card.chosen").get_attribute("data-train") == named
    odd = attribution.train.ids[5]  # markup in it
    again.evaluate("id => { location.hash = 'example=' + encodeURIComponent(id); }", odd)
    again.wait_for_function("document.querySelector('#train-detail .id').textContent.includes('</script>')")
    assert again.evaluate("window.broken") is None
    again.evaluate("location.hash = 'answer=nobody'")
    again.locator("#missing").wait_for()
    assert "no answer “nobody”" in again.locator("#missing").inner_text()
    assert again.problems == []


def test_a_link_unfolds_an_example_far_down(report: Path, open_page: Any, attribution: Attribution) -> None:
    far = attribution.top("q-bird-0", 30)["id"].iloc[-1]
    page = open_page(report)
    page.evaluate("id => { location.hash = 'answer=q-bird-0&example=' + encodeURIComponent(id); }", far)
    page.locator(".card.chosen").wait_for()
    assert page.locator(".card.chosen").get_attribute("data-train") == far


def test_what_is_listed_can_be_saved_and_copied(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report)
    page.locator("#pair-source").select_option(label="fish")

    def saved(name: str) -> tuple[str, str]:
        with page.expect_download() as download:
            page.locator("#pair-share button", has_text=name).click()
        return download.value.suggested_filename, Path(download.value.path()).read_text(encoding="utf-8")

    name, text = saved("JSONL")
    rows = [json.loads(line) for line in text.splitlines()]
    assert name == "pairs-q-bird-0.jsonl"
    assert {row["source"] for row in rows} == {"fish"}
    assert len(rows) == int(page.locator("#pro-count").inner_text()) + int(page.locator("#opp-count").inner_text())
    scores = attribution.scores()["q-bird-0"]
    assert all(row["score"] == pytest.approx(scores[row["id"]], rel=1e-5) for row in rows)
    name, text = saved("CSV")
    assert name == "pairs-q-bird-0.csv"
    assert [row["id"] for row in csv.DictReader(io.StringIO(text))] == [row["id"] for row in rows]
    page.locator("#train-search").fill("evil text")
    with page.expect_download() as download:
        page.locator("#train-share button", has_text="JSONL").click()
    assert json.loads(Path(download.value.path()).read_text())["completion"] == attribution.train[5].completion
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("window.setTimeout = () => 0")  # the button says so for a second and a half otherwise
    page.locator("#pair-share button", has_text="Copy").click()
    page.locator("#pair-share button", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").count("\n") == len(rows)


def test_saved_tables_are_no_formulas(tmp_path: Path, open_page: Any) -> None:
    records = [{"id": f"=cmd{i}", "prompt": "+1", "completion": f' @sum,"{i}'} for i in range(8)]
    data = Dataset.from_records(records)
    page = open_page(write_report(made_attribution(data, data), tmp_path / "f.html"))
    with page.expect_download() as download:
        page.locator("#train-share button", has_text="CSV").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert not any(
        cell.lstrip(" ")[:1] in "=+@" for row in rows[1:] for cell in row if cell and not cell[1:2].isdigit()
    )


def test_system_prompts_are_folded(tmp_path: Path, open_page: Any) -> None:
    def chats(systems: list[str]) -> Dataset:
        return Dataset.from_records(
            [
                {
                    "id": f"{i}",
                    "messages": [
                        {"role": "system", "content": s},
                        {"role": "user", "content": "Q"},
                        {"role": "assistant", "content": f"A{i}"},
                    ],
                }
                for i, s in enumerate(systems)
            ]
        )

    same = chats(["You are the support assistant."] * 8)
    page = open_page(write_report(made_attribution(same, same), tmp_path / "same.html"))
    assert page.locator("details.system").count() == 1
    assert "support assistant" not in page.locator("#answers").inner_text()
    page.locator("#shared-system summary").click()
    assert "support assistant" in page.locator("#answers").inner_text()
    mixed = chats(["You are the support assistant."] * 4 + ["Be terse."] * 4)
    page = open_page(write_report(made_attribution(mixed, mixed), tmp_path / "mixed.html"))
    assert page.locator("#shared-system details").count() == 0
    page.locator("#pro .open").first.click()
    page.locator("#pro .card.chosen details.system summary").click()
    assert page.locator("#pro .card.chosen details.system .prompt").inner_text() in {
        "You are the support assistant.",
        "Be terse.",
    }


def test_a_training_example_leads_to_the_answers_that_it_moves(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.locator("#train-list .row").first.click()
    link = page.locator("#train-detail .links button").first
    text = link.locator(".one").inner_text()
    link.click()
    assert page.locator("#answer .reply").inner_text() == text


def test_heat_map_cells_open_their_pairs(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report)
    total = attribution.scores(by="source").loc["fish"].to_numpy()
    mean = total[[s == "bird" for s in attribution.test.sources]].mean()

    def cells() -> list[str]:
        return [t.replace("−", "-").strip("()") for t in page.locator("#heat td button").all_text_contents()]

    assert float(cells()[3]) == pytest.approx(mean, rel=0.02)
    page.locator("#sources input[value=each]").check()
    assert float(cells()[3]) == pytest.approx(mean / 20, rel=0.02)
    page.locator("#heat td button").nth(3).click()
    assert page.locator("#pair-source").evaluate("s => s.selectedOptions[0].text") == "fish"
    assert page.locator("#test-source").evaluate("s => s.selectedOptions[0].text") == "bird"


def test_markup_in_the_name_of_a_source_stays_text(tmp_path: Path, open_page: Any) -> None:
    name = '<a href="https://example.org">x</a><b>y</b>'
    sides = [
        [{"id": f"{side}{i}", "source": (name, "z")[i % 2], "prompt": "p", "completion": f"c{i}"} for i in range(8)]
        for side in "ab"
    ]
    made = made_attribution(*(Dataset.from_records(records) for records in sides))
    page = open_page(write_report(made, tmp_path / "names.html"))
    assert page.locator("#heat a, #heat b").count() == 0
    assert name in page.locator("#heat").text_content()
    assert name in page.locator("#test-source").text_content()
    assert page.problems == []


def test_quality_curve_and_loss_picture_are_drawn(report: Path, open_page: Any) -> None:
    page = open_page(report)
    assert "stopped at 16 of 20" in page.locator("#curve").text_content()
    assert page.locator("#curve .band").count() == 2, "the interval so far, and that of what is expected"
    assert "16 members: " in page.locator("#curve .dot title").last.text_content()
    drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert page.locator("#picture canvas").evaluate(drawn) > 20


def test_members_that_failed_do_not_make_it_a_stop(attribution: Attribution, tmp_path: Path, open_page: Any) -> None:
    state = status_of(members_asked=17, failures=("member 7: 3 jobs failed",))
    page = open_page(write_report(attribution, tmp_path / "failed.html", run=state))
    text = page.locator("#curve").text_content()
    assert "16 of 17 scored" in text
    assert "stopped" not in page.locator("body").inner_text().lower()


def test_answers_that_are_not_on_the_page_are_named(
    attribution: Attribution, tmp_path: Path, open_page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daunce_api.report.page.MAX_TESTS", 2)
    page = open_page(write_report(attribution, tmp_path / "two.html"))
    i = attribution.train.position(page.locator("#train-detail .id").first.inner_text())
    score_M = attribution.scores_NM()[i]
    best = [attribution.test.ids[j] for j in np.argsort(-score_M)[:3] if j >= 2]
    assert best
    away = page.locator("#train-detail .links").first.locator(".away")
    assert away.locator(".id").all_inner_texts() == best
    assert away.first.inner_text().endswith("not on this page")


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")])
def test_light_and_dark(report: Path, open_page: Any, scheme: str, paper: str) -> None:
    page = open_page(report, color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == paper
    page.keyboard.press("t")
    assert page.evaluate(background) != paper
    page.reload()
    page.wait_for_selector("html[data-ready=all]")
    assert page.evaluate(background) != paper


def test_text_is_readable_in_both_themes(report: Path, open_page: Any) -> None:
    for scheme in ("light", "dark"):
        page = open_page(report, color_scheme=scheme)
        colors = page.evaluate(
            "() => ['--paper','--ink','--soft','--faint','--help','--hurt'].map("
            "n => getComputedStyle(document.documentElement).getPropertyValue(n).trim())"
        )
        paper, *inks = colors
        assert min(_contrast(paper, ink) for ink in inks) >= 4.5


def test_print_shows_every_answer_on_light_paper(report: Path, open_page: Any, tmp_path: Path) -> None:
    page = open_page(report, color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    text = page.locator("#print").inner_text()
    assert all(f"q-{s}-{i}" in text for s in ("bird", "fish", "planted") for i in range(4))
    assert page.locator(".bar").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 690, "height": 900})
    zero = page.locator(".zero").first
    assert zero.evaluate("z => z.getBoundingClientRect().right <= z.closest('.card').getBoundingClientRect().right")
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"


@pytest.mark.parametrize("width", [400, 1280])
def test_no_window_needs_sideways_scrolling(report: Path, open_page: Any, width: int) -> None:
    page = open_page(report, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_long_names_and_texts_stay_within_the_window(tmp_path: Path, open_page: Any) -> None:
    records = [
        {
            "id": "x" * 120 + str(i),
            "source": "a long name " * 8 + str(i % 9),
            "prompt": "w " * 400,
            "completion": "W" * 900,
        }
        for i in range(27)
    ]
    data = Dataset.from_records(records)
    path = write_report(made_attribution(data, data, members=12), tmp_path / "long.html", run=status_of(name="n" * 300))
    for width in (400, 1280):
        page = open_page(path, viewport={"width": width, "height": 800})
        page.locator("#pro .open").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#answer .reply").evaluate("box => box.clientHeight < innerHeight / 2")


def test_without_scripts_the_run_is_still_readable(report: Path, open_page: Any) -> None:
    page = open_page(report, wait="", java_script_enabled=False)
    assert "needs JavaScript" in page.locator("noscript").inner_text()
    assert "whitened" in page.locator("#glance").inner_text()
    assert page.locator("#answers").is_hidden()


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "questions"), [(2_000, 40), pytest.param(10_000, 200, marks=pytest.mark.long)])
def test_a_large_run_is_a_small_page(examples: int, questions: int, tmp_path: Path, open_page: Any) -> None:
    """Less than a kilobyte a training example, and everything is there: 10,000 examples are a page below 10 MB."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i:x}{'aeiou'[i % 5]}{'rstln'[i % 7 % 5]}" for i in range(8000)])

    def data(side: str, count: int) -> Dataset:
        texts = [" ".join(vocabulary[(rng.pareto(1.1, 60) * 20).astype(int) % 8000]) for _ in range(count)]
        return Dataset.from_records(
            [
                {"id": f"{side}{i:05}", "source": f"s{i % 8}", "prompt": text[:80], "completion": text[80:]}
                for i, text in enumerate(texts)
            ]
        )

    attribution = made_attribution(data("a", examples), data("q", questions), members=7, tokens=True)
    large = write_report(attribution, tmp_path / "large.html")
    assert large.stat().st_size < 400_000 + 950 * examples
    page = open_page(large)
    page.wait_for_selector("html[data-ready=all]")
    page.locator("#pro .open").first.click()
    for tokens in (page.locator("#answer .t"), page.locator("#pro .card.chosen .reply .t")):
        assert any("--help" in shade for shade in colours(tokens))
    typed = page.evaluate(
        """() => {
          const input = document.getElementById('train-search');
          return ['w', 'w1', 'w1a', 'zzz', ''].map((text) => {
            const start = performance.now();
            input.value = text;
            input.dispatchEvent(new Event('input'));
            return performance.now() - start;
          });
        }"""
    )
    print(f"\na letter in the search of {examples:,} examples: at most {max(typed):.0f} ms")
    assert page.locator("#train-count").inner_text() == f"{examples:,} of {examples:,}"
    assert page.locator("#train-list .row").count() < 60
    page.locator("#train-list").evaluate("box => { box.scrollTop = box.scrollHeight; }")
    page.wait_for_selector(f"#train-list .row[aria-posinset='{examples}']")
    assert re.fullmatch(r"a\d{5}", page.locator("#train-list .row .id").last.inner_text())


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
