"""The report in a real browser: what a reader sees, clicks and types."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_attribution import demo_data, file_data, made_attribution

from daunce_api.attribution import Attribution
from daunce_api.attribution.tokens import Split
from daunce_api.data.dataset import Dataset
from daunce_api.evaluation.baselines import bm25_scores, example_texts
from daunce_api.report import RunFacts, write_report

PLOTS = "[data-ready=all]"


def test_opens_from_disk_without_network_error_or_refusal(report: Path, open_page: Any) -> None:
    page = open_page(report, wait=PLOTS)
    assert page.problems == []
    assert page.evaluate("window.broken") is None
    assert page.locator("#failed").is_hidden()


def test_a_foreign_script_does_not_run(report: Path, tmp_path: Path, open_page: Any) -> None:
    path = tmp_path / "edited.html"
    path.write_text(report.read_text().replace("</main>", "<script>window.broken = 3</script></main>"))
    page = open_page(path)
    assert page.evaluate("window.broken") is None
    assert any("Content Security Policy" in p for p in page.problems)


def test_an_edited_plot_library_does_not_run(report: Path, tmp_path: Path, open_page: Any) -> None:
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
    text = open_page(report).locator("#glance").inner_text()
    for part in (
        "daunce-tiny on embedded",
        "32 of 40",
        "1 failed",
        "$3.20",
        "812,345 tokens trained",
        "2 min 11 s",
        "half-whitened",
        "95 % interval",
        "not measured",
        "<b>and were kept</b>",
        "Member 7 was given up",
        "Stopped after 32 members",
    ):
        assert part in text


def test_proponents_and_opponents_are_the_rankings(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report)
    page.locator("#test-list .row").nth(2).click()
    for box, opponents in (("#pro", False), ("#opp", True)):
        table = attribution.top(attribution.test[2].id, 3, opponents=opponents)
        for place, row in enumerate(table.to_dict("records")):
            card = page.locator(f"{box} .card").nth(place)
            assert card.get_attribute("data-train") == row["id"]
            assert card.locator(".reply").inner_text() == row["completion"]
            score = card.locator(".number").inner_text().replace("−", "-")
            assert float(score) == pytest.approx(row["score"], rel=0.006)
            half = float(card.locator(".spread").inner_text().replace("±", ""))
            assert half == pytest.approx((row["high"] - row["low"]) / 2, rel=0.006)
            assert ("not told from zero" in card.inner_text()) == (not row["distinguishable"])
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


def test_more_entries_on_demand_with_faint_ones_not_told_from_zero(
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
    pytest.importorskip("plotly")
    made = attribution.with_estimator("correlation")
    page = open_page(write_report(made, tmp_path / "correlation.html"))
    row = made.top(made.test[0].id, 1).to_dict("records")[0]
    low, high = (float(x.replace("−", "-")) for x in page.locator("#pro .spread").first.inner_text().split(" to "))
    assert low == pytest.approx(row["low"], rel=0.006)
    assert high == pytest.approx(row["high"], rel=0.006)


def test_the_heat_map_as_a_table_opens_pairs_by_keys(report: Path, open_page: Any) -> None:
    page = open_page(report, wait=PLOTS)
    page.locator("#sources summary").focus()
    page.keyboard.press("Enter")
    cell = page.locator("#heat-table td button").nth(3)
    assert cell.inner_text().split(" ± ")[0] in page.locator("#heat .annotation").all_text_contents()
    cell.focus()
    page.keyboard.press("Enter")
    assert page.locator("#pair-source").evaluate("s => s.selectedOptions[0].text") == "fish"
    assert page.locator("#test-source").evaluate("s => s.selectedOptions[0].text") == "bird"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plotly")
    made = made_attribution(*file_data(300, 90), members=12)
    return write_report(made, tmp_path_factory.mktemp("files") / "files.html")


def test_the_table_of_the_heat_map_is_made_when_it_is_opened(files: Path, open_page: Any) -> None:
    page = open_page(files, wait=PLOTS)
    cells = page.locator("#heat-table button")
    assert cells.count() == 0
    page.locator("#heat-fold summary").click()
    cells.first.wait_for()
    assert cells.count() == 61 * 61
    first = cells.first.inner_text()
    page.locator("#sources input[value=each]").check()
    page.locator("#sources input[value=total]").check()
    assert cells.first.inner_text() == first
    assert page.problems == []


def test_names_of_columns_are_left_out_where_they_would_overlap(files: Path, open_page: Any) -> None:
    page = open_page(files, wait=PLOTS)
    names = page.locator("#heat .xaxislayer-above text, #heat .xaxislayer-below text")
    assert names.count() == 61
    page.set_viewport_size({"width": 600, "height": 900})
    names.first.wait_for(state="detached")
    assert page.locator("#heat .yaxislayer-above text").count() == 61
    narrow = open_page(files, wait=PLOTS, viewport={"width": 600, "height": 900})
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 600


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("docs/deep/deep/deep/deep/page-{}/index.html", "…deep/deep/deep/deep/page-{}…"),
        ("part-{} of a book with a long title", "part-{}…"),
        ("{} a name that ends in its number {}", "{} a name that … its number {}"),
    ],
)
def test_long_names_of_sources_keep_what_tells_them_apart(
    name: str, shown: str, tmp_path: Path, open_page: Any
) -> None:
    pytest.importorskip("plotly")
    train, test = demo_data()
    long = [{**e.to_record(), "source": name.format(*[i % 3] * 2)} for i, e in enumerate(train)]
    made = made_attribution(Dataset.from_records(long), test, members=12)
    page = open_page(write_report(made, tmp_path / "long.html"), wait=PLOTS)
    names = page.locator("#heat .yaxislayer-above text").all_text_contents()
    assert names == [shown.format(i, i) for i in range(3)]


def test_the_row_of_all_others_opens_what_the_map_does_not_name(files: Path, open_page: Any) -> None:
    page = open_page(files, wait=PLOTS)
    page.locator("#heat-fold summary").click()
    rows = page.locator("#heat-table tbody tr")
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
    pytest.importorskip("plotly")
    made = made_attribution(*file_data(12, 30, sources=False), members=12)
    page = open_page(write_report(made, tmp_path / "numbers.html"), wait=PLOTS)
    page.locator("#heat-fold summary").click()
    cells = page.locator("#heat-table tbody tr").nth(1).locator("button")
    for j in (3, 29, 0):
        cells.nth(j).click()
        assert page.locator("#answer .id").inner_text() == str(j)
        assert page.locator("#test-count").inner_text() == "30 answers"


def test_without_sources_nothing_is_said_of_them(tmp_path: Path, open_page: Any) -> None:
    pytest.importorskip("plotly")
    train, test = demo_data()
    bare = Dataset.from_records([{"prompt": e.prompt, "completion": e.completion} for e in train])
    one = Dataset.from_records([{"id": "only", "prompt": test[0].prompt, "completion": test[0].completion}])
    page = open_page(write_report(made_attribution(bare, one, members=12), tmp_path / "bare.html"), wait=PLOTS)
    assert page.locator("#sources").is_hidden()
    assert page.locator("#sources-link").is_hidden()
    assert page.locator(".tag").count() == 0
    assert "(none)" not in page.locator("body").inner_text()
    assert page.problems == []


def test_many_warnings_are_folded(attribution: Attribution, tmp_path: Path, open_page: Any) -> None:
    pytest.importorskip("plotly")
    facts = RunFacts(warnings=tuple(f"warning {i}" for i in range(40)), failures=("Member 3 was given up.",))
    page = open_page(write_report(attribution, tmp_path / "many.html", run=facts))
    notes = page.locator("#glance > .notes")
    assert notes.inner_text().startswith("Member 3 was given up.")
    assert "33 more" in notes.inner_text()
    assert "warning 39" not in notes.inner_text()


def test_words_are_explained(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.locator("#help-open").click()
    assert page.locator("#help").evaluate("box => box.scrollTop") == 0
    text = page.locator("#help").inner_text()
    for word in ("self-LDS", "self-influence", "BM25", "proponent", "told from zero", "suspicion", "nats"):
        assert word in text


def test_suspicious_training_examples_come_first(report: Path, open_page: Any) -> None:
    page = open_page(report)
    first = page.locator("#train-list .row .id").all_inner_texts()[:8]
    assert all(name.startswith("planted") for name in first)
    page.locator("button[data-order=self_influence]").click()
    shown = [float(t) for t in page.locator("#train-list .row .num:nth-child(5)").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)


def test_a_training_example_leads_to_the_answers_that_it_moves(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.locator("#train-list .row").first.click()
    link = page.locator("#train-detail .links button").first
    text = link.locator(".one").inner_text()
    link.click()
    assert page.locator("#answer .reply").inner_text() == text


def test_heat_map_cells_open_their_pairs(report: Path, open_page: Any, attribution: Attribution) -> None:
    page = open_page(report, wait=PLOTS)
    total = attribution.scores(by="source").loc["fish"].to_numpy()
    mean = total[[s == "bird" for s in attribution.test.sources]].mean()
    texts = [t.replace("−", "-").strip("()") for t in page.locator("#heat .annotation").all_text_contents()]
    assert float(texts[3]) == pytest.approx(mean, rel=0.006)
    page.locator("#sources input[value=each]").check()
    texts = [t.replace("−", "-").strip("()") for t in page.locator("#heat .annotation").all_text_contents()]
    assert float(texts[3]) == pytest.approx(mean / 20, rel=0.006)
    page.locator("#heat").scroll_into_view_if_needed()
    box = page.locator("#heat .annotation").nth(3).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + 12)
    page.wait_for_function("document.getElementById('pair-source').selectedOptions[0].text === 'fish'")
    assert page.locator("#test-source").evaluate("s => s.selectedOptions[0].text") == "bird"


def test_markup_in_the_name_of_a_source_stays_text(tmp_path: Path, open_page: Any) -> None:
    pytest.importorskip("plotly")
    name = '<a href="https://example.org">x</a><b>y</b>'
    sides = [
        [{"id": f"{side}{i}", "source": (name, "z")[i % 2], "prompt": "p", "completion": f"c{i}"} for i in range(8)]
        for side in "ab"
    ]
    made = made_attribution(*(Dataset.from_records(records) for records in sides))
    page = open_page(write_report(made, tmp_path / "names.html"), wait=PLOTS)
    assert page.locator("#heat a, #heat tspan[style*=bold]").count() == 0
    assert "‹a href" in page.locator("#heat .yaxislayer-above").text_content()
    assert name in page.locator("#test-source").text_content()
    assert page.problems == []


def test_quality_curve_and_loss_picture_are_drawn(report: Path, open_page: Any) -> None:
    page = open_page(report, wait=PLOTS)
    text = page.locator("#curve").inner_text()
    assert "stopped at 32 of 40" in text
    assert page.locator("#curve path.js-fill").count() == 2, "the interval so far, and that of what is expected"
    assert page.locator("#picture .heatmaplayer image").count() == 1


def test_members_that_failed_do_not_make_it_a_stop(attribution: Attribution, tmp_path: Path, open_page: Any) -> None:
    pytest.importorskip("plotly")
    facts = RunFacts(members_asked=33, failures=("member 7: 3 jobs failed",))
    page = open_page(write_report(attribution, tmp_path / "failed.html", run=facts), wait=PLOTS)
    text = page.locator("#curve").inner_text()
    assert "32 of 33 scored" in text
    assert "stopped" not in page.locator("body").inner_text().lower()


def test_answers_that_are_not_on_the_page_are_named(
    attribution: Attribution, tmp_path: Path, open_page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
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
    page = open_page(report, wait=PLOTS, color_scheme="dark")
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
    page = open_page(report, wait=PLOTS, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_long_names_and_texts_stay_within_the_window(tmp_path: Path, open_page: Any) -> None:
    pytest.importorskip("plotly")
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
    path = write_report(made_attribution(data, data, members=12), tmp_path / "long.html", run=RunFacts(name="n" * 300))
    for width in (400, 1280):
        page = open_page(path, wait=PLOTS, viewport={"width": width, "height": 800})
        page.locator("#pro .open").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#answer .reply").evaluate("box => box.clientHeight < innerHeight / 2")


def test_without_scripts_the_run_is_still_readable(report: Path, open_page: Any) -> None:
    page = open_page(report, wait="", java_script_enabled=False)
    assert "needs JavaScript" in page.locator("noscript").inner_text()
    assert "half-whitened" in page.locator("#glance").inner_text()
    assert page.locator("#answers").is_hidden()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("plotly")
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i:x}{'aeiou'[i % 5]}{'rstln'[i % 7 % 5]}" for i in range(8000)])

    def texts(count: int) -> list[str]:
        return [" ".join(vocabulary[(rng.pareto(1.1, 60) * 20).astype(int) % 8000]) for _ in range(count)]

    records = [
        [
            {"id": f"{side}{i:05}", "source": f"s{i % 8}", "prompt": text[:80], "completion": text[80:]}
            for i, text in enumerate(texts(count))
        ]
        for side, count in (("a", 10_000), ("q", 200))
    ]
    attribution = made_attribution(*(Dataset.from_records(r) for r in records), members=40, tokens=True)
    return write_report(attribution, tmp_path_factory.mktemp("large") / "large.html")


@pytest.mark.slow
def test_ten_thousand_by_two_hundred_is_small_and_quick(large: Path, open_page: Any) -> None:
    assert large.stat().st_size < 10_000_000
    started = time.perf_counter()
    page = open_page(large)
    assert time.perf_counter() - started < 10
    page.wait_for_selector("html[data-ready=all]", timeout=30_000)
    page.locator("#pro .open").first.click()
    for tokens in (page.locator("#answer .t"), page.locator("#pro .card.chosen .reply .t")):
        assert any("--help" in shade for shade in colours(tokens))
    typed = page.evaluate(
        """() => {
          const input = document.getElementById('train-search');
          const times = ['w', 'w1', 'w1a', 'zzz', ''].map((text) => {
            const start = performance.now();
            input.value = text;
            input.dispatchEvent(new Event('input'));
            return performance.now() - start;
          });
          return Math.max(...times);
        }"""
    )
    assert typed < 200
    assert page.locator("#train-list .row").count() < 60
    page.locator("#train-list").evaluate("box => { box.scrollTop = box.scrollHeight; }")
    page.wait_for_selector("#train-list .row[aria-posinset='10000']")
    assert re.fullmatch(r"a\d{5}", page.locator("#train-list .row .id").last.inner_text())


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
