"""A teacher's scores and vectors: computed once a content, found by every run, and with each batch the right ones."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.content_cache import ContentCache
from data_services.embed import EmbedConfig, EmbeddedCorpus, SourceTexts, embed
from data_services.mining.vectors import kept
from data_services.schema import Column, RunError, UsageError
from data_services.sources import SourceConfig, open_source
from data_services.stream import DataConfig, plan_of, reader_of
from data_services.teacher import Teacher, TeacherConfig, adopt_vectors, pair_ids, teach_pairs, teach_vectors
from tests.data_services.feeds import Characters
from tests.data_services.test_embed import Hashed

ROWS = 150  # three row groups
PAIRS = [
    {"query": f"q{i}", "positive": [f"p{i}", f"p{i} too"], "negatives": [f"p{(i + 1) % ROWS}", f"n{i}"]}
    for i in range(ROWS)
]
KEYS = {"negatives": "negatives"}


def opened(folder, rows, name="pairs"):
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_source(SourceConfig(path=str(folder / f"{name}.jsonl"), **KEYS), folder / "home")


class Encoded:
    """Vectors by `Hashed`; remembers which texts it was asked for."""

    def __init__(self, side):
        self.side, self.texts = side, []

    def __call__(self, table, path):
        self.texts += table.read(0, len(table))[1]
        config = EmbedConfig(field=self.side, shard_rows=256)
        return kept(path, lambda into: embed(table, Hashed, into, config))


def taught_vectors(source, folder):
    """The texts that were computed: (queries, documents)."""
    encoders = Encoded("query"), Encoded("document")
    counts = [teach_vectors([source], of.side, folder, of) for of in encoders]
    assert counts == [len(of.texts) for of in encoders]
    return tuple(sorted(of.texts) for of in encoders)


def batches_of(source, teacher):
    data = DataConfig(sources=[SourceConfig(path="x", **KEYS)], batch=4, steps=5, negatives=2, positives=2)
    reader = reader_of(data, plan_of(data, [source], 0), [source], Characters(), None, teacher)
    return [pickle.loads(pickle.dumps(reader))(t) for t in range(5)]


def texts_of(source):
    """id -> text of everything in the source."""
    columns = [(Column.QUERY_ID, Column.QUERY)], [(Column.POSITIVE_IDS, Column.POSITIVES)]
    table, found = source.table(), {}
    for ids, texts in (*columns[0], *columns[1], (Column.NEGATIVE_IDS, Column.NEGATIVES)):
        for row_ids, row_texts in zip(table[ids].to_pylist(), table[texts].to_pylist(), strict=True):
            lists = isinstance(row_ids, list)
            found |= dict(zip(row_ids if lists else [row_ids], row_texts if lists else [row_texts], strict=True))
    return found


def test_vectors_are_computed_once_and_a_changed_text_alone_again(tmp_path):
    folder = tmp_path / "teacher"
    queries, documents = taught_vectors(opened(tmp_path, PAIRS), folder)
    assert queries == sorted(row["query"] for row in PAIRS)
    assert documents == sorted({text for row in PAIRS for text in row["positive"] + row["negatives"]})
    assert taught_vectors(opened(tmp_path, PAIRS), folder) == ([], [])
    assert taught_vectors(opened(tmp_path, PAIRS[::-1], "turned round"), folder) == ([], [])
    changed = [PAIRS[0] | {"query": "another", "negatives": ["n5", "new"]}, *PAIRS[1:]]
    assert taught_vectors(opened(tmp_path, changed, "changed"), folder) == (["another"], ["new"])
    assert sorted(path.name for path in folder.iterdir()) == ["document", "query"]


@pytest.mark.parametrize("vectors", [False, True])
def test_a_batch_has_the_vectors_of_its_own_texts_and_their_inner_products(tmp_path, vectors):
    source, folder = opened(tmp_path, PAIRS), tmp_path / "teacher"
    taught_vectors(source, folder)
    text = texts_of(source)
    for batch in batches_of(source, Teacher(folder, pairs=False, vectors=vectors)):
        queries, documents = (
            Hashed().encode([text[i] for i in ids.tolist()], side)
            for ids, side in ((batch.query_ids, "query"), (batch.document_ids, "document"))
        )
        np.testing.assert_allclose(batch.scores, (queries[batch.owners] * documents).sum(1), atol=1e-6)
        assert (batch.teacher_queries is not None) == vectors
        if vectors:
            np.testing.assert_array_equal(batch.teacher_queries, queries)
            np.testing.assert_array_equal(batch.teacher_documents, documents)


class Scored:
    """Scores that are a function of both texts; remembers the pairs; may break after some."""

    def __init__(self, most=None):
        self.pairs, self._most = [], most

    def __call__(self, queries, documents):
        if self._most is not None and len(self.pairs) >= self._most:
            raise KeyboardInterrupt
        self.pairs += zip(queries, documents, strict=True)
        return [score(*pair) for pair in zip(queries, documents, strict=True)]


def score(query, document):
    return len(query) + len(document) / 8 + sum(map(ord, query + document)) / 1024


def of_rows(rows):
    return {(row["query"], text) for row in rows for text in row["positive"] + row["negatives"]}


def nothing(what, done, of):
    pass


def test_pairs_are_scored_once_and_a_killed_scoring_goes_on(tmp_path):
    source, folder = opened(tmp_path, PAIRS + PAIRS[:2]), tmp_path / "teacher"
    broken, rest = Scored(most=300), Scored()
    with pytest.raises(KeyboardInterrupt):
        teach_pairs([source], folder, broken, nothing, part=99)
    assert teach_pairs([source], folder, rest, nothing, part=99) == len(rest.pairs) > 0
    both = broken.pairs + rest.pairs
    assert len(both) == len(set(both))
    assert set(both) == of_rows(PAIRS)
    text = texts_of(source)
    for batch in batches_of(source, Teacher(folder, pairs=True)):
        owners = batch.query_ids[batch.owners].tolist()
        expected = [score(text[q], text[d]) for q, d in zip(owners, batch.document_ids.tolist(), strict=True)]
        np.testing.assert_allclose(batch.scores, expected, rtol=1e-6)
        assert batch.teacher_queries is None
    assert teach_pairs([source], folder, Scored(), nothing) == 0
    more, told = Scored(), []
    changed = opened(tmp_path, [*PAIRS, {"query": "q0", "positive": ["p5"], "negatives": []}], "more")
    assert teach_pairs([changed], folder, more, lambda *about: told.append(about)) == 1
    assert more.pairs == [("q0", "p5")]
    assert told == [("scoring pairs by the teacher", 1, 1)]


@pytest.mark.parametrize("wrong", [lambda q, d: [1.0], lambda q, d: [np.nan] * len(q)])
def test_scores_that_cannot_be_are_told(tmp_path, wrong):
    with pytest.raises(RunError, match="scores for 600 pairs, or one that isn't finite"):
        teach_pairs([opened(tmp_path, PAIRS)], tmp_path / "teacher", wrong, nothing)


def test_stored_embeddings_are_a_teacher_where_they_have_every_text(tmp_path):
    source, folder = opened(tmp_path, PAIRS), tmp_path / "teacher"
    rows = [{"query": text, "positive": text, "negatives": []} for text in texts_of(source).values()]
    corpora = {}
    for side in ("query", "document"):
        config = EmbedConfig(field=side, shard_rows=256)
        everything = SourceTexts(opened(tmp_path, rows, "texts"), side)
        corpora[side] = embed(everything, Hashed, tmp_path / side, config)
        adopt_vectors([source], side, folder, EmbeddedCorpus.open(tmp_path / side))
    batch = batches_of(source, Teacher(folder, pairs=False, vectors=True))[0]
    text = texts_of(source)
    expected = Hashed().encode([text[i] for i in batch.query_ids.tolist()], "query")
    np.testing.assert_array_equal(batch.teacher_queries, expected)
    more = opened(tmp_path, [*PAIRS, {"query": "new", "positive": ["p1"], "negatives": []}], "more")
    with pytest.raises(UsageError, match="lacks 1 of the 151 query texts"):
        adopt_vectors([more], "query", folder, corpora["query"])


@settings(max_examples=30)
@given(st.lists(st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9), min_size=1, max_size=4), st.data())
def test_a_cache_finds_what_any_part_has_and_nothing_else(tmp_path_factory, parts, data):
    folder = tmp_path_factory.mktemp("cache")
    for number, keys in enumerate(parts):
        keys = np.array(data.draw(st.permutations(sorted(keys))), np.int64)
        rows = (keys[:, None] % 1000 + np.arange(2)).astype(np.float32)
        ContentCache(folder).add(str(number), keys, [rows[:2], rows[2:]], 2)
    there = sorted(set().union(*parts))
    asked = np.array(data.draw(st.lists(st.sampled_from(there) | st.integers(-5, 5), max_size=9)), np.int64)
    cache = pickle.loads(pickle.dumps(ContentCache(folder)))
    assert cache.has(asked).tolist() == [int(key) in there for key in asked]
    if cache.has(asked).all():
        np.testing.assert_array_equal(cache.take(asked), (asked[:, None] % 1000 + np.arange(2)).astype(np.float32))
    else:
        with pytest.raises(RunError, match="removed files there"):
            cache.take(asked)


def test_a_pairs_id_tells_who_is_the_query():
    a, b = np.array([1, 2, 2**62]), np.array([2, 1, -3])
    assert len({*pair_ids(a, b).tolist(), *pair_ids(b, a).tolist()}) == 4  # (1, 2) and (2, 1) come twice


@pytest.mark.parametrize(
    ("section", "told"),
    [({}, "name one teacher, not 0"), ({"model": "m", "path": "a:b"}, "name one teacher, not 2")],
)
def test_there_is_one_teacher(section, told):
    with pytest.raises(ValueError, match=told):
        TeacherConfig(**section)
