"""Groups of training examples that say nearly the same, so that all of a group is removed or none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from scipy.cluster.hierarchy import DisjointSet

SIMILAR = 0.7
"""Jaccard similarity of word 3-grams from which two texts count as near-duplicates."""

_GRAM = 3
_COMMON = 500
"""A 3-gram of more texts than this is boilerplate (a shared system prompt): it proposes no pairs."""

_WORDS = re.compile(r"\w+")


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """A group number for each text; texts of one group are linked by pairs of similarity ``SIMILAR`` or more.

    Numbers are the position of the group's first text. Similarity is |A & B| / |A | B| of the sets of word 3-grams,
    without regard to case and punctuation; texts of fewer than three words are grouped when they are equal. Pairs are
    proposed by the rarest 3-grams of each text (prefix filtering, Chaudhuri, Ganti and Kaushik 2006), so no pair at or
    above the limit is missed but where texts share nothing but boilerplate.

        >>> near_duplicates(["The cat sat on the mat.", "the cat sat on the mat", "A dog barked at me"])
        [0, 0, 2]
    """
    grams = [_grams(text) for text in texts]
    counts: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for of_text in grams:
        for gram in of_text:
            counts[gram] += 1
    groups = DisjointSet(range(len(texts)))
    by_gram: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    first_equal: dict[frozenset[tuple[str, ...]], int] = {}
    for i, of_text in enumerate(grams):
        j = first_equal.setdefault(of_text, i)
        if j != i:
            groups.merge(i, j)
            continue
        for j in _candidates(of_text, counts, by_gram, i):
            if not groups.connected(i, j) and len(of_text & grams[j]) >= SIMILAR * len(of_text | grams[j]):
                groups.merge(i, j)
    firsts: dict[int, int] = {}
    return [firsts.setdefault(groups[i], i) for i in range(len(texts))]


def _grams(text: str) -> frozenset[tuple[str, ...]]:
    words = _WORDS.findall(text.lower())
    if len(words) < _GRAM:
        return frozenset({(text.strip().lower(),)})
    return frozenset(zip(*(words[k:] for k in range(_GRAM)), strict=False))


def _candidates(
    of_text: frozenset[tuple[str, ...]],
    counts: dict[tuple[str, ...], int],
    by_gram: dict[tuple[str, ...], list[int]],
    position: int,
) -> Iterator[int]:
    """Earlier texts that share one of the rarest grams; this text is entered under its own."""
    # Two sets of similarity s share a gram among the rarest (1 - s) |A| + 1 of each.
    rarest = sorted(of_text, key=lambda gram: (counts[gram], gram))[: int((1 - SIMILAR) * len(of_text)) + 1]
    proposed: set[int] = set()
    for gram in rarest:
        if counts[gram] > _COMMON:
            continue
        proposed.update(by_gram[gram])
        by_gram[gram].append(position)
    yield from sorted(proposed)
