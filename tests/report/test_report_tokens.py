"""Tokens of a pair: parts that add up to its score, and pieces that spell its texts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_attribution import demo_data, made_attribution

from daunce_api import core
from daunce_api.attribution import Attribution, TokenTable
from daunce_api.attribution.tokens import Split
from daunce_api.core.losses import Reduction, segment_losses
from daunce_api.report.ranked import listings
from daunce_api.report.tokens import DEPTH, Floats, SideParts, TokenView, spell, token_view


def view_of(attribution: Attribution, columns: list[int] | None = None) -> TokenView | None:
    columns = list(range(len(attribution.test))) if columns is None else columns
    found = listings(attribution, columns)
    return token_view(attribution, columns, found.proponents.index_Mk, found.opponents.index_Mk)


@pytest.mark.parametrize("estimator", ["auto", *core.ESTIMATORS])
@pytest.mark.parametrize("loss", ["mean", "sum", "margin"])
def test_parts_add_up_to_the_score_on_both_sides(attribution: Attribution, estimator: str, loss: Reduction) -> None:
    made = replace(attribution.with_estimator(estimator), loss=loss)
    train, test = (
        np.stack(
            [segment_losses(np.concatenate(m), [len(x) for x in m], loss) for m in zip(*table.logprobs, strict=True)]
        )
        for table in (made.tokens["train"], made.tokens["test"])
    )
    made = replace(made, train_loss_KN=train, test_loss_KM=test)
    split, score = Split(made), made.scores_NM()
    assert split.why == ""
    assert (split.why_not_train == "") == (estimator != "inclusion")
    for i, j in ((0, 0), (41, 3), (12, 11)):
        assert split.test_parts(i, j).sum() == pytest.approx(score[i, j], rel=1e-6)
        if not split.why_not_train:
            assert split.train_parts(i, j).sum() == pytest.approx(score[i, j], rel=1e-6)


def test_parts_are_those_of_the_core_for_covariance(attribution: Attribution) -> None:
    split = Split(attribution.with_estimator("covariance"))
    tables = attribution.tokens
    train_KT, test_KU = tables["train"].logprobs[7], tables["test"].logprobs[2]
    score_TU = (train_KT - train_KT.mean(axis=0)).T @ (test_KU - test_KU.mean(axis=0)) / (len(train_KT) - 1)
    score_TU /= score_TU.size  # losses are means over tokens
    np.testing.assert_allclose(split.train_parts(7, 2), score_TU.sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(split.test_parts(7, 2), score_TU.sum(axis=0), rtol=1e-9)


@pytest.mark.parametrize("shrinkage", [None, 2.0])
def test_the_log_scale_and_weights_are_split_too(attribution: Attribution, shrinkage: float | None) -> None:
    made = attribution.with_estimator("auto")
    setting = core.Setting(ridge=1.0, log_offset=0.05, shrinkage=shrinkage)
    made.__dict__["choice"] = replace(attribution.choice, estimator=core.ESTIMATORS["whitened"], setting=setting)
    members = core.member_losses(made.train_loss_KN, made.test_loss_KM, made.inclusion_KN)
    score = core.fit(members, "whitened", setting).block()
    split = Split(made)
    for i, j in ((3, 5), (50, 9)):
        assert split.test_parts(i, j).sum() == pytest.approx(score[i, j], rel=1e-6)
        assert split.train_parts(i, j).sum() == pytest.approx(score[i, j], rel=1e-6)


def pairs(parts: SideParts, place: int) -> tuple[Floats, Floats]:
    """Both sides of a pair, in units of the score."""
    test, train = (x[place] / 127 * parts.scale[place, s] for s, x in enumerate(parts.parts.values()))
    return test, train


def test_the_view_holds_the_parts_of_the_first_pairs(attribution: Attribution) -> None:
    view = view_of(attribution)
    assert view is not None
    assert view.depth == DEPTH
    assert view.why == ""
    found = listings(attribution, list(range(12)))
    split = Split(attribution)
    for parts, listing in ((view.proponents, found.proponents), (view.opponents, found.opponents)):
        assert parts is not None
        for j, place in ((0, 0), (5, 9), (11, 3)):
            i = int(listing.index_Mk[j, place])
            test, train = pairs(parts, j * DEPTH + place)
            for shown, exact in ((test, split.test_parts(i, j)), (train, split.train_parts(i, j))):
                np.testing.assert_allclose(shown, exact, atol=np.abs(exact).max() / 250)
            assert i in view.spelled["train"]


def test_long_texts_have_parts_for_fewer_pairs(attribution: Attribution, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = view_of(attribution)
    assert whole is not None
    assert whole.proponents is not None
    assert whole.opponents is not None
    size = sum(len(x) for p in (whole.proponents, whole.opponents) for side in p.parts.values() for x in side)
    monkeypatch.setattr("daunce_api.report.tokens.MAX_PARTS", size // 2)
    half = view_of(attribution)
    assert half is not None
    assert half.proponents is not None
    assert half.opponents is not None
    assert 0 < half.depth < DEPTH
    assert (
        sum(len(x) for p in (half.proponents, half.opponents) for side in p.parts.values() for x in side) <= size // 2
    )
    monkeypatch.setattr("daunce_api.report.tokens.MAX_PARTS", 3)
    none = view_of(attribution)
    assert none is not None
    assert none.depth == 0
    assert "too long" in none.why


def test_why_there_are_no_parts(attribution: Attribution) -> None:
    assert view_of(made_attribution(*demo_data())) is None
    inclusion = view_of(attribution.with_estimator("inclusion"))
    assert inclusion is not None
    assert inclusion.proponents is not None
    assert "inclusion does not look at" in inclusion.why
    assert not any(map(len, inclusion.proponents.parts["train"]))
    only_test = view_of(replace(attribution, tokens={"test": attribution.tokens["test"]}))
    assert only_test is not None
    assert "training examples were not kept" in only_test.why


@pytest.mark.parametrize("estimator", ["covariance", "whitened"])
def test_examples_that_nobody_scored_do_not_stop_the_others(estimator: str) -> None:
    made = made_attribution(*demo_data(), members=24, tokens=True)
    made.train_loss_KN[:, 7] = np.nan
    made.test_loss_KM[:, 2] = np.nan
    made = made.with_estimator(estimator)
    split, score = Split(made), made.scores_NM()
    assert split.why == ""
    assert split.train_parts(4, 1).sum() == pytest.approx(score[4, 1], rel=1e-6)
    assert split.test_parts(4, 1).sum() == pytest.approx(score[4, 1], rel=1e-6)


def test_members_without_losses_are_left_out() -> None:
    made = made_attribution(*demo_data(), members=24, tokens=True).with_estimator("covariance")
    made.train_loss_KN[3] = np.nan
    assert Split(made).train_parts(4, 1).sum() == pytest.approx(made.scores_NM()[4, 1], rel=1e-6)


def test_losses_of_units(attribution: Attribution) -> None:
    test = demo_data()[1]
    text = test[0].completion_text()
    logprobs = np.tile(-np.arange(1.0, 5.0), (32, 1))
    table = TokenTable((("\ufffd", "\ufffd", text[1:], "<end>"), *attribution.tokens["test"].pieces[1:]), ())
    logs = (logprobs, *attribution.tokens["test"].logprobs[1:])
    made = replace(attribution, tokens={"test": TokenTable(table.pieces, logs)})
    view = view_of(made)
    assert view is not None
    assert view.spelled["test"][0].after == "<end>"
    assert view.loss[0].tolist() == [3.0, 3.0, 4.0]


def units(pieces: list[str], text: str) -> list[str]:
    """What the page shows: the units of a text, by UTF-16 lengths."""
    found = spell(pieces, text)
    body = found.instead if found.instead is not None else found.before + text + found.after
    raw, at, out = body.encode("utf-16-le", "surrogatepass"), 0, []
    for length in found.lengths:
        out.append(raw[at : at + 2 * length].decode("utf-16-le", "surrogatepass"))
        at += 2 * length
    assert at == len(raw)
    return out


def test_pieces_around_a_text_are_kept_apart() -> None:
    found = spell(["? ", "A", " boat", "<end>\n"], "A boat")
    assert (found.before, found.after, found.instead) == ("? ", "<end>\n", None)
    assert spell(["The"], "The answer").instead == "The"


def test_characters_of_several_tokens_are_one_unit() -> None:
    assert units(["Hi ", "\ufffd", "\ufffd", " there"], "Hi 😀 there") == ["Hi ", "😀", " there"]
    assert units([" \ufffd", "\ufffd\ufffd", "<end>"], " 日本") == [" 日本", "<end>"]
    assert units(["a", "\ufffd\ufffd"], "a😀") == ["a", "😀"]
    assert spell(["\ufffd", "x"], "other").instead == "\ufffdx"
    found = spell(["Hi ", "\ufffd", "\ufffd", " there"], "Hi 😀 there")
    assert found.starts == (0, 1, 3)


@given(st.text(max_size=30), st.lists(st.integers(0, 120), max_size=12))
def test_any_text_cut_into_bytes_is_spelled_again(text: str, cuts: list[int]) -> None:
    raw = text.encode()
    edges = [0, *sorted({c for c in cuts if 0 < c < len(raw)}), len(raw)]
    pieces = [raw[a:b].decode(errors="replace") for a, b in pairwise(edges) if a < b]
    if not pieces:
        return
    found = spell(pieces, text)
    assert len(found.starts) == len(found.lengths) <= len(pieces)
    assert list(found.starts) == sorted(set(found.starts))
    shown = units(pieces, text)
    if found.instead is None:
        assert "".join(shown) == text
