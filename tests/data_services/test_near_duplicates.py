"""Duplicates and contamination: against comparison of every pair, and with planted answers."""

import random

import numpy as np
import pytest

from data_services.near_duplicates import find_duplicates, row_text, shingles, signatures
from tests.data_services.mining.worlds import source

WORDS = [f"word{i}" for i in range(400)]


def text(rng: random.Random, length: int = 60) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def nearly(original: str, rng: random.Random) -> str:
    """One word of sixty changed: about nine tenths of the shingles stay."""
    words = original.split()
    words[rng.randrange(len(words))] = "other"
    return " ".join(words)


def test_shingles_are_three_words_in_a_row_whatever_their_case():
    assert shingles("A b,\n c") == {b"a b ,", b"b , c"}
    assert shingles("one Two") == {b"one two"}


def test_the_estimate_is_near_the_similarity_and_the_same_in_every_process():
    rng = random.Random(0)
    for share in (0.2, 0.5, 0.9):
        kept = text(rng, 400).split()
        a, b = " ".join(kept), " ".join(kept[: int(400 * share)] + text(rng, 400).split()[int(400 * share) :])
        exact = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
        one, other = (signature.hashvalues for signature in signatures([a, b]))
        assert np.mean(one == other) == pytest.approx(exact, abs=0.15)
    (signature,) = signatures(["the same in every process"])
    assert signature.hashvalues[:2].tolist() == [174376388, 98280793]


def told_apart(row: tuple[str, list[str], list[str]], by: str) -> tuple:
    """What a row is by its texts."""
    query, positives, _ = row
    return {"query": (query,), "document": (frozenset(positives),), "pair": (query, frozenset(positives))}[by]


@pytest.mark.parametrize("by", ["query", "document", "pair"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_repeat_others_are_those_that_comparing_every_pair_finds(tmp_path, seed, by):
    rng = random.Random(seed)
    rows: list[tuple[str, list[str], list[str]]] = []
    for i in range(40):
        query, positives, _ = rng.choice(rows) if rows and rng.random() < 0.6 else (text(rng), [text(rng)], [])
        change = rng.choice(["none", "query", "positive", "order", "more"])
        query = nearly(query, rng) if change == "query" else query
        positives = [nearly(p, rng) for p in positives] if change == "positive" else positives
        positives = positives[::-1] if change == "order" else positives
        positives = [*positives, f"{i} {text(rng)}"] if change == "more" else positives
        rows.append((query, positives, []))
    stored = source(tmp_path, rows)
    records = stored.table().to_pylist()
    signed = [signature.hashvalues for signature in signatures([row_text(r, by) for r in records])]
    for threshold in (None, 0.7):
        first, kept, exact = list(range(40)), [], 0
        for i in range(40):
            same = next((j for j in range(i) if told_apart(rows[j], by) == told_apart(rows[i], by)), None)
            near = {j: np.mean(signed[i] == signed[j]) for j in kept}
            nearest = max(kept, key=lambda j: near[j], default=None)  # of equal ones the first
            if same is not None:
                first[i], exact = first[same], exact + 1
            elif threshold is not None and nearest is not None and near[nearest] >= threshold:
                first[i] = nearest
            else:
                kept.append(i)
        found = find_duplicates(stored, by, threshold)
        assert found.first.tolist() == first
        assert np.flatnonzero(found.keep).tolist() == kept
        assert (found.exact, found.near) == (exact, 40 - len(kept) - exact)
        assert threshold is None or found.near > 0


def test_rows_that_an_evaluation_source_holds_are_found_on_either_side(tmp_path):
    rng = random.Random(1)
    query, document = text(rng), text(rng)
    evaluation = source(tmp_path / "e", [(query, [document], []), (text(rng), [text(rng)], [text(rng)])])
    rows = [
        (query, [text(rng)], []),
        (text(rng), [text(rng), document], []),
        (nearly(query, rng), [text(rng)], []),
        (text(rng), [nearly(document, rng)], []),
        (document, [query], []),  # a query is no document
        (text(rng), [text(rng)], []),
    ]
    rows.append((rows[2][0] + " more", [text(rng)], []))  # near a contaminated row: contaminated itself
    stored = source(tmp_path / "s", rows)
    found = find_duplicates(stored, "query", 0.7, evaluation)
    assert found.contaminated == {"exact": 2, "near": 3}
    assert np.flatnonzero(found.keep).tolist() == [4, 5]
    exactly = find_duplicates(stored, "query", None, evaluation)
    assert exactly.contaminated == {"exact": 2, "near": 0}
    assert exactly.keep.sum() + exactly.exact + exactly.near + 2 == len(rows)
