"""Random answers to every reader of the wire, by hypothesis; ``fuzz.py`` does it guided by coverage."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .wire_fuzz import CALLS, STATUSES, TEMPLATES, answered, as_json, changed

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\x1b[2J", "\ud800", "2027-99-99", "-1", "ft:", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
COMMON: dict[str, Any] = {
    "call": st.integers(0, CALLS - 1),
    "status": st.sampled_from(STATUSES),
    "template": st.integers(0, len(TEMPLATES) - 1),
    "path": st.lists(st.integers(0, 11), min_size=1, max_size=6),
    "value": JSON,
}


@settings(max_examples=150)
@given(**COMMON)
def test_a_good_answer_with_one_odd_place(call: int, status: int, template: int, path: list[int], value: Any) -> None:
    answered(call, status, as_json(changed(template, path, value)))


@settings(max_examples=60)
@given(
    call=st.integers(0, CALLS - 1),
    status=st.sampled_from(STATUSES),
    content=st.binary(max_size=200) | JSON.map(as_json),
    wait=st.sampled_from(["", "-1", "nan", "1e400", "inf", "Wed, 21 Oct 2099 07:28:00 GMT", "x" * 300, "9" * 5000]),
)
def test_any_answer_at_all(call: int, status: int, content: bytes, wait: str) -> None:
    answered(call, status, content, {"retry-after": wait, "retry-after-ms": wait})


@pytest.mark.long
@settings(max_examples=5000)
@given(**COMMON)
def test_many_good_answers_with_one_odd_place(
    call: int, status: int, template: int, path: list[int], value: Any
) -> None:
    answered(call, status, as_json(changed(template, path, value)))


@pytest.mark.parametrize("call", range(CALLS))
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"null", b"", b"9" * 10_000])
def test_answers_that_break_readers(call: int, content: bytes) -> None:
    answered(call, 200, content)


@pytest.mark.parametrize("call", range(CALLS))
def test_half_a_surrogate_pair_is_no_answer(call: int) -> None:
    """It could neither be stored nor logged."""
    for template in range(len(TEMPLATES)):
        for place in range(10):
            for inner in range(3):
                answered(call, 200, as_json(changed(template, [place, 0, inner], "\ud800")))
