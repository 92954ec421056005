"""Each view by its law, over all texts at once and over one alone."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_services.draws import Draws, row_keys, smallest
from data_services.schema import UsageError
from data_services.views.pairs import Context, Neighbours
from data_services.views.pieces import LINE, SENTENCE, WORD, Pieces
from data_services.views.spelling import MaskIdentifiers, Substitute, Typos
from data_services.views.word_vectors import WordVectors
from data_services.views.words import Crop, Delete, DeleteSpans, Reorder, Repeat

LENGTHS = [1, 2, 3, 7, 20, 40, 100]
# Distinct words, so that a word says where it came from; white space of all kinds between them.
TEXTS = ["".join(f"w{i}{' ' if i % 5 else chr(10) + '  '}" for i in range(n)).strip() for n in LENGTHS] * 60


def draws(seed: int, texts=TEXTS) -> Draws:
    return Draws(row_keys(np.arange(len(texts)), 3, seed))


def viewed(view, texts=TEXTS, seed: int = 0) -> list[str]:
    return view(Pieces.of(texts), draws(seed, texts)).texts()


def places(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


# Draws


def test_numbers_are_uniform_and_do_not_depend_on_what_else_is_drawn():
    source = draws(1, range(500))
    numbers = source.each(np.full(500, 100))
    assert np.histogram(numbers, 20, (0, 1))[0].std() < 4 * np.sqrt(2500)
    fewer = source.take(np.array([7, 3])).each(np.array([4, 100]))
    np.testing.assert_array_equal(fewer, [*numbers[700:704], *numbers[300:400]])
    streams = [source.stream(i).one() for i in range(3)]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.2 for a, b in zip(streams, [*streams[1:], source.one()], strict=True))


def test_a_sample_without_replacement_has_its_size_and_every_item_alike():
    lengths, counts = np.full(3000, 5), np.tile([0, 2, 5], 1000)
    chosen = smallest(draws(2, range(3000)).each(lengths), lengths, counts).reshape(3000, 5)
    np.testing.assert_array_equal(chosen.sum(1), counts)
    assert np.abs(chosen[1::3].mean(0) - 0.4).max() < 0.06


# Pieces

some_text = st.text(st.sampled_from(list('ab.!?\n \t(")中文。é')), max_size=60).filter(str.strip)


@given(st.lists(some_text, max_size=4), st.sampled_from([WORD, SENTENCE, LINE]))
def test_pieces_end_to_end_are_the_text(texts, pattern):
    found = Pieces.of(texts, pattern)
    assert (found.lengths > 0).all()
    shown = [re.sub(r"\n\s*(?=\n)", "", text) if pattern is LINE else text for text in texts]  # blank lines go
    assert found.texts() == [text.strip() for text in shown]


def test_text_is_cut_into_words_sentences_and_lines():
    def cut(text, pattern):
        return [piece.strip() for piece in Pieces.of([text], pattern).pieces]

    assert cut("von A nach\n B 中文 x语", WORD) == ["von", "A", "nach", "B", "中", "文", "x", "语"]
    text = 'He said "no." Then\nwhat? 3.5 is it。是的。\n\nEnd'
    assert cut(text, SENTENCE) == ['He said "no."', "Then\nwhat?", "3.5 is it。", "是的。", "End"]
    assert cut("a = 1\n\n  b\n \nc", LINE) == ["a = 1", "b", "c"]


# Every view

WORD_VIEWS = [
    Crop(),
    Delete(rate=0.4),
    DeleteSpans(),
    Reorder(pairs=2),
    Repeat(),
    Substitute(),
    Substitute(synonyms={"w1": ["one", "uno"], "w3": ["three"]}),
    Typos(rate=0.5),
    MaskIdentifiers(rate=0.5),
]


@pytest.mark.parametrize("view", WORD_VIEWS, ids=lambda view: view.kind)
def test_a_text_gets_the_same_view_alone_and_among_others_and_another_by_another_key(view):
    texts = [text.replace("w", "Word") for text in TEXTS] if isinstance(view, Typos) else TEXTS
    among, source = viewed(view, texts), draws(0)
    for i in (0, 6, 200, 419):
        assert view(Pieces.of([texts[i]]), source.take(np.array([i]))).texts() == [among[i]]
    assert viewed(view, texts, seed=1) != among
    assert all(text.strip() for text in among)


def test_views_that_change_nothing_leave_the_text_with_its_white_space():
    still = [
        Crop(min_share=1, max_share=1),
        Delete(rate=0),
        Substitute(rate=0),
        Typos(rate=0),
        MaskIdentifiers(rate=0),
        Substitute(rate=1, synonyms={"other": ["x"]}),
    ]
    for view in still:
        assert viewed(view) == TEXTS


def test_a_crop_is_a_run_of_a_length_between_the_shares_that_begins_anywhere():
    starts, lengths = [], []
    for seed in range(10):
        for text, cropped in zip(TEXTS, viewed(Crop(min_share=0.2, max_share=0.6), seed=seed), strict=True):
            n, kept = len(text.split()), places(cropped)
            assert kept == list(range(kept[0], kept[0] + len(kept)))
            assert max(int(0.2 * n), 1) <= len(kept) <= max(int(0.6 * n), 1)
            if n == 100:
                starts.append(kept[0] / (100 - len(kept)))
                lengths.append(len(kept))
    assert np.mean(starts) == pytest.approx(0.5, abs=0.04)
    assert np.histogram(lengths, 4, (20, 60))[0].min() > 110
    assert np.histogram(starts, 4, (0, 1))[0].min() > 110
    alike = Counter(viewed(Crop(min_share=0.5, max_share=0.5), ["a b c d e"] * 2000))
    assert min(alike[run] for run in ("a b", "b c", "c d", "d e")) > 420


def test_deletion_keeps_the_order_and_drops_at_its_rate_but_never_all():
    kept, words = 0, 0
    for text, shown in zip(TEXTS, viewed(Delete(rate=0.3)), strict=True):
        assert places(shown) == sorted(set(places(shown)))
        if len(text.split()) >= 20:
            kept, words = kept + len(shown.split()), words + len(text.split())
    assert kept / words == pytest.approx(0.7, abs=0.02)
    alone = Counter(len(text.split()) for text in viewed(Delete(rate=0.999), ["a b c"] * 1000))
    assert alone[1] > 980


def test_deleted_spans_have_their_number_and_length_and_do_not_overlap():
    for text, shown in zip(TEXTS, viewed(DeleteSpans(spans=3, share=0.1)), strict=True):
        n, kept = len(text.split()), places(shown)
        size = max(round(0.1 * n), 1)
        assert n - len(kept) == min(3, (n - 1) // size) * size
        gaps = np.diff([-1, *kept, n]) - 1
        assert (gaps % size == 0).all()
    # every place is as likely to be dropped as its mirror image, the middle more than the ends
    dropped = np.full(40, 6000)
    for shown in viewed(DeleteSpans(spans=2, share=0.1), [TEXTS[5]] * 6000):
        dropped[places(shown)] -= 1
    assert np.abs(dropped - dropped[::-1]).max() < 300
    assert dropped[10:30].min() > dropped[[0, -1]].max()


def test_reordering_exchanges_runs_of_one_length():
    for text, shown in zip(TEXTS, viewed(Reorder(pairs=3, share=0.05)), strict=True):
        n, now = len(text.split()), np.array(places(shown))
        size = max(round(0.05 * n), 1)
        np.testing.assert_array_equal(now[now], np.arange(n))  # doing it twice undoes it
        moved = np.flatnonzero(now != np.arange(n))
        assert len(moved) == 2 * min(3, n // (2 * size)) * size
        together = np.diff(moved) == 1  # words of a run move together
        if size > 1 and len(moved):
            assert (np.diff(now[moved])[together] == 1).sum() >= len(moved) * (size - 1) / size
    alike = Counter(viewed(Reorder(pairs=2, share=0.2), ["a b c d"] * 900))
    assert min(alike[pairs] for pairs in ("b a d c", "c d a b", "d c b a")) > 240


def test_repetition_doubles_up_to_the_rate_of_the_words_evenly():
    counts = []
    for seed in range(4):
        for text, shown in zip(TEXTS, viewed(Repeat(rate=0.32), seed=seed), strict=True):
            n, now = len(text.split()), places(shown)
            assert sorted(set(now)) == list(range(n))
            assert now == sorted(now)
            assert max(Counter(now).values()) <= 2
            assert len(now) - n <= min(max(2, int(0.32 * n)), n)
            if n == 100:
                counts.append(len(now) - n)
    assert np.mean(counts) == pytest.approx(16, abs=2)
    assert {0, 1, 31, 32} & set(counts)


def test_substitution_takes_another_word_of_the_text_or_a_synonym():
    changed = words = 0
    for text, shown in zip(TEXTS, viewed(Substitute(rate=0.3)), strict=True):
        n, now = len(text.split()), places(shown)
        assert len(now) == n
        assert set(now) <= set(range(n))
        assert re.findall(r"\s+", shown) == re.findall(r"\s+", text)
        changed, words = changed + sum(place != i for i, place in enumerate(now)), words + n * (n > 1)
    assert changed / words == pytest.approx(0.3, abs=0.02)  # never by itself
    shown = viewed(Substitute(rate=1, synonyms={"good": ["fine", "nice"]}), ["Good  or\nbad"] * 100)
    assert set(shown) == {"fine  or\nbad", "nice  or\nbad"}


VECTORS = "4 2\ngood 1 0\nfine 0.9 0.1\nNice 1 0.2\nbad -1 0.1\nfine 5 5\n"


def test_words_of_similar_vectors_stand_for_a_word_and_what_is_around_it_stays(tmp_path):
    file = tmp_path / "vectors.txt"
    file.write_text(VECTORS)
    table = WordVectors(file, 99)
    assert table.near(["good", "bad", "unknown", "good"], 2) == [
        ["fine", "Nice"],
        ["Nice", "fine"],
        [],
        ["fine", "Nice"],
    ]
    assert table.near(["good"], 3) == [["fine", "Nice", "bad"]]
    view = Substitute(rate=1, vectors=str(file), nearest=2)
    assert set(viewed(view, ['a "Good",\n(bad)'] * 200)) == {
        f'a "{one}",\n({other})' for one in ("fine", "Nice") for other in ("fine", "Nice")
    }
    assert set(viewed(Substitute(rate=1, vectors=str(file), nearest=1, vocabulary=2), ["good bad"])) == {"fine bad"}
    for wrong, told in (("a 1 2\nb 1\n", "vectors.txt:2 isn't a word and 2 numbers"), ("", "holds no word vectors")):
        file.write_text(wrong)
        with pytest.raises(UsageError, match=told):
            WordVectors(file, 99)
    with pytest.raises(UsageError, match="nowhere can't be read"):
        WordVectors(tmp_path / "nowhere", 99)
    for wrong in ({"synonyms": {"a": ["b"]}, "vectors": "f"}, {"nearest": 3}):
        with pytest.raises(ValueError, match=r"give one of them|name their file"):
            Substitute(**wrong)


def one_edit(word: str) -> set[str]:
    """The word and whatever one error makes of it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    edits = {a + b[1:] for a, b in cuts if b} | {a + c + b for a, b in cuts for c in letters}
    edits |= {a + c + b[1:] for a, b in cuts if b for c in letters}
    return edits | {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1} | {word}


def test_typing_errors_are_one_a_word_at_their_rate_and_of_every_kind():
    text = "keyboard errors, happen (to) anyone a 12"
    shown = [t.split() for t in viewed(Typos(rate=0.5), [text] * 2000)]
    for at, word in enumerate(text.split()):
        forms = Counter(words[at] for words in shown)
        assert set(forms) <= one_edit(word)
        if word in ("a", "12"):
            assert set(forms) == {word}
        elif len(word) > 5:
            assert forms[word] / 2000 == pytest.approx(0.51, abs=0.06)  # some errors change nothing
    lengths = Counter(len(words[0]) for words in shown)
    assert lengths[7] == pytest.approx(200, abs=60)
    assert lengths[9] == pytest.approx(200, abs=60)
    assert {"ketboard", "kyeboard"} <= {words[0] for words in shown}


def test_identifiers_are_masked_at_their_rate_and_keywords_stay():
    code = "def read_all(self, naïve2):\n    return open(self.path).read(0x1F) + 12"
    shown = viewed(MaskIdentifiers(rate=0.4), [code] * 3000)
    assert viewed(MaskIdentifiers(rate=1, mask="<id>"), [code]) == [
        "def <id>(self, <id>):\n    return <id>(self.<id>).<id>(0x1F) + 12"
    ]
    names = ["read_all", "naïve2", "open", "path", "read"]
    assert all(text.startswith("def ") and text.endswith("(0x1F) + 12") for text in shown)
    rates = [1 - np.mean([re.search(rf"\b{name}\b", text) is not None for text in shown]) for name in names]
    assert np.abs(np.array(rates) - 0.4).max() < 0.04


SENTENCES = [" ".join(f"s{i} a b." for i in range(n)) for n in (1, 2, 3, 5, 12)] * 300


def units(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"s(\d+) a b\.", text)]


@pytest.mark.parametrize(("size", "window"), [(1, 1), (1, 4), (3, 2)])
def test_neighbours_are_runs_with_fewer_units_than_the_window_between_them(size, window):
    pairs, queries_first, gaps = Neighbours(size=size, window=window)(SENTENCES, draws(0, SENTENCES)), [], Counter()
    for text, query, positive in zip(SENTENCES, *(map(units, side) for side in pairs), strict=True):
        n = len(units(text))
        if n == 1:
            assert query == positive == [0]
            continue
        first, second = sorted([query, positive])
        assert first == list(range(first[0], first[0] + min(size, n // 2)))
        assert second == list(range(second[0], second[0] + len(first)))
        assert 0 <= second[0] - first[-1] - 1 < window
        queries_first.append(query is first)
        gaps[second[0] - first[-1] - 1] += n == 12
    assert np.mean(queries_first) == pytest.approx(0.5, abs=0.06)
    assert min(gaps[i] for i in range(window)) > 40


def test_context_is_what_stands_around_the_query():
    with_it = 0
    pairs = Context(size=2, around=3, keep=0.25)(SENTENCES, draws(0, SENTENCES))
    for text, query, positive in zip(SENTENCES, *(map(units, side) for side in pairs), strict=True):
        n = len(units(text))
        assert query == list(range(query[0], query[0] + min(2, max(n - 1, 1))))
        near = list(range(max(query[0] - 3, 0), min(query[-1] + 4, n)))
        without = [i for i in near if i not in query]
        assert positive in ([near] if n == 1 else [near, without])
        with_it += n > 1 and positive == near
    assert with_it / 1200 == pytest.approx(0.25, abs=0.04)
    code = "def f():\n    a = 1\n\n    return a"
    query, positive = Context(unit="line", keep=0)([code] * 50, draws(0, range(50)))
    assert ("def f():", "a = 1\n    return a") in set(zip(query, positive, strict=True))
