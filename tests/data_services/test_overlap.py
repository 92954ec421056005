"""Texts found in training data, exactly and nearly: against the comparison of every pair, and planted."""

import random

from hypothesis import given
from hypothesis import strategies as st

from data_services.near_duplicates import shingles
from data_services.overlap import EXACT, NEAR, NOT_HELD, THRESHOLD, TextIndex, look_through
from tests.data_services.mining.worlds import source

WORDS = "abcdef"


def naive(wanted: list[str], shown: list[str]) -> list[int]:
    def held(text: str) -> int:
        if text in shown:
            return EXACT
        mine = shingles(text)
        near = any(len(mine & shingles(s)) >= THRESHOLD * len(mine | shingles(s)) for s in shown)
        return NEAR if near else NOT_HELD

    return [held(text) for text in wanted]


texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join), min_size=1, max_size=12)


@given(texts, texts)
def test_what_is_held_is_what_comparing_every_pair_finds(wanted, shown):
    index = TextIndex(wanted)
    for text in shown:
        index.show(text)
    assert index.held.tolist() == naive(index.texts, shown)


def test_a_source_is_looked_through_and_sides_are_counted_apart(tmp_path):
    rng = random.Random(0)
    long = [" ".join(rng.choices([f"w{i}" for i in range(300)], k=60)) for _ in range(4)]
    changed = long[1].replace(long[1].split()[30], "other")
    stored = source(tmp_path, [("a query", [long[0], changed], []), ("another one here", ["short"], [])])
    queries, documents = ["a query", "a query", "unseen words are here"], [*long, "SHORT"]
    index = TextIndex([*queries, *documents])
    seen = []
    look_through(index, [stored], lambda done, of: seen.append((done, of)))
    assert index.counts(queries) == (2, 1, 0)
    assert index.counts(documents) == (5, 1, 2)  # one as it is, one with a word changed, one in other case
    assert seen[-1] == (2, 2)
