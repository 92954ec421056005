import collections
import math

import numpy as np
import pytest

import evaluation.search as search
from data_services.schema import RunError, UsageError
from evaluation.retrieval import BM25Config, bm25, evaluate_encoder, evaluate_retrieval, terms
from evaluation.search import rank, rank_tokens


def naive_rank(queries, documents, k):
    """Every pair, then a full sort by (falling score, position)."""
    scores = (queries.astype(np.float64) @ documents.T.astype(np.float64)).astype(np.float32)
    order = np.array([sorted(range(len(documents)), key=lambda d: (-row[d], d))[:k] for row in scores])
    return order, np.take_along_axis(scores, order, 1)


def tied_vectors(seed, rows, dimension=3):
    """Small integers: a great many exactly equal scores."""
    return np.random.default_rng(seed).integers(-1, 2, (rows, dimension)).astype(np.float32)


@pytest.mark.parametrize(("query_block", "document_block"), [(256, 8192), (3, 7), (1, 1), (5, 4)])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_blocks_give_the_full_sort_with_ties_by_position(monkeypatch, query_block, document_block, k):
    monkeypatch.setattr(search, "_QUERY_BLOCK", query_block)
    monkeypatch.setattr(search, "_DOCUMENT_BLOCK", document_block)
    queries, documents = tied_vectors(0, 17), tied_vectors(1, 53)
    ids, scores = rank(queries, documents, k)
    expected_ids, expected_scores = naive_rank(queries, documents, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


def test_equal_documents_tie_wherever_they_stand(monkeypatch):
    rng = np.random.default_rng(0)
    once = rng.normal(size=(40, 96)).astype(np.float32)
    documents = np.concatenate([once, rng.normal(size=(7, 96)).astype(np.float32), once])
    for block in (8192, 13):
        monkeypatch.setattr(search, "_DOCUMENT_BLOCK", block)
        ids, scores = rank(once, documents, 2)
        np.testing.assert_array_equal(ids, np.stack([np.arange(40), np.arange(40) + 47], axis=1))
        np.testing.assert_array_equal(scores[:, 0], scores[:, 1])


def test_fewer_documents_than_k_leave_the_rest_empty():
    ids, scores = rank(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 4)
    np.testing.assert_array_equal(ids, [[0, 1, -1, -1], [1, 0, -1, -1]])
    assert np.isneginf(scores[:, 2:]).all()
    assert rank(np.zeros((0, 2)), np.eye(2), 4)[0].shape == (0, 4)


def test_the_metrics_are_the_same_in_any_order_of_equal_scores():
    rng = np.random.default_rng(3)
    ids, scores = rank(tied_vectors(0, 20), tied_vectors(1, 60), 10)
    relevant = [{int(rng.integers(60))} for _ in range(20)]
    expected = evaluate_retrieval(ids, relevant).per_query
    for _ in range(5):
        shuffle = rng.permuted(np.tile(np.arange(10), (20, 1)), axis=1)
        shuffled = [np.take_along_axis(x, shuffle, 1) for x in (ids, scores)]
        again = evaluate_retrieval(shuffled[0], relevant, scores=shuffled[1]).per_query
        for name, values in expected.items():
            np.testing.assert_array_equal(again[name], values)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_vector_fails_the_run_and_names_its_row(bad):
    vectors = np.eye(4, dtype=np.float32)
    vectors[2, 1] = bad
    with pytest.raises(RunError, match=r"1 of 4 document vectors.*row 2"):
        rank(np.eye(4, dtype=np.float32), vectors, 2)
    with pytest.raises(RunError, match=r"query vectors.*row 2"):
        rank(vectors, np.eye(4, dtype=np.float32), 2)


def test_vectors_of_different_dimension_are_refused():
    with pytest.raises(ValueError, match=r"dimension 3 \(axis 1\), documents 4"):
        rank(np.zeros((1, 3)), np.zeros((1, 4)), 1)


def test_a_query_without_relevant_document_is_named():
    with pytest.raises(UsageError, match=r"query 1 \('no answer'\) has no relevant document"):
        evaluate_retrieval(np.zeros((2, 10), int), [{0}, set()], queries=["fine", "no answer"])
    with pytest.raises(UsageError, match="no query to evaluate"):
        evaluate_retrieval(np.zeros((0, 10), int), [])


class TableEncoder:
    """A user's encoder: looks vectors up."""

    def __init__(self, table, scale=1.0):
        self.table, self.scale = table, scale

    def encode(self, texts, field):
        return np.array([self.table[t] for t in texts], np.float32) * self.scale


TABLE = {"north": [0, 1], "east": [1, 0], "up the map": [0.1, 0.995], "to the right": [0.995, 0.1]}


def test_any_encoder_can_be_evaluated():
    queries, documents = ["up the map", "to the right"], ["north", "east"]
    scores = evaluate_encoder(TableEncoder(TABLE), queries, documents, [{0}, {1}])
    assert scores.metrics == {"ndcg@10": 1, "mrr@10": 1, "recall@1": 1, "recall@10": 1}
    swapped = evaluate_encoder(TableEncoder(TABLE), queries, documents, [{1}, {0}], k=2)
    assert swapped.metrics == pytest.approx({"ndcg@2": 1 / math.log2(3), "mrr@2": 0.5, "recall@1": 0, "recall@2": 1})


def test_an_encoder_that_breaks_its_promise_is_named():
    arguments = ["up the map"], ["north", "east"], [{0}]
    with pytest.raises(RunError, match=r"query vector 0 has length 2: normalise"):
        evaluate_encoder(TableEncoder(TABLE, 2.0), *arguments)
    with pytest.raises(RunError, match="hold NaN"):
        evaluate_encoder(TableEncoder(TABLE, np.nan), *arguments)

    class Short(TableEncoder):
        def encode(self, texts, field):
            return super().encode(texts[:1], field)

    with pytest.raises(RunError, match=r"\(1, 2\) for 2 document texts"):
        evaluate_encoder(Short(TABLE), *arguments)
    with pytest.raises(UsageError, match="no document"):
        evaluate_encoder(TableEncoder(TABLE), ["north"], [], [{0}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HTTPServer.readLine_2", "http server read line 2"),
        ("def __init__(self, maxSize=1024):", "def init self max size 1024"),
        ("utf8 sha256Sum", "utf 8 sha 256 sum"),
        ("Größe, ÜBER naïve", "größe über naïve"),
        ("-- ! --", ""),
    ],
)
def test_identifiers_are_split(text, expected):
    assert terms(text) == expected.split()


def naive_bm25(queries, documents, k1, b):
    """Lucene's formula term by term: idf ln(1 + (N − df + ½)/(df + ½)), tf/(tf + k1(1 − b + b·len/mean))."""
    bags = [collections.Counter(terms(d)) for d in documents]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = np.zeros((len(queries), len(documents)))
    for i, query in enumerate(queries):
        for term in terms(query):
            df = sum(term in bag for bag in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            for j, bag in enumerate(bags):
                tf = bag[term]
                scores[i, j] += idf * tf / (tf + k1 * (1 - b + b * bag.total() / mean))
    return scores


DOCUMENTS = [
    "def read_file(path): return open(path).read()",
    "def writeFile(path, text): open(path, 'w').write(text)",
    "class Parser: the parser of the file",
    "def add(a, b): return a + b",
    "def add(a, b): return a + b  # the same",
]
QUERIES = ["Read a file and return its text", "the parser", "add add numbers", "nothing matches this"]


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (0.1, 1.0)])
def test_bm25_is_lucenes_formula(k1, b):
    ids, scores = bm25(QUERIES, DOCUMENTS, 5, BM25Config(k1=k1, b=b))
    dense = naive_bm25(QUERIES, DOCUMENTS, k1, b)
    for i, (row, row_scores) in enumerate(zip(ids, scores, strict=True)):
        found = row[row >= 0]
        assert set(found) == set(np.flatnonzero(dense[i]))
        np.testing.assert_allclose(row_scores[: len(found)], dense[i][found], rtol=1e-6)
        assert list(found) == sorted(found, key=lambda d: (-np.float32(dense[i][d]), d))
        assert np.isneginf(row_scores[len(found) :]).all()


def test_bm25_ties_go_by_position_and_an_unmatched_query_finds_nothing():
    same = ["alpha beta"] * 30 + ["gamma"]
    ids, _ = bm25(["beta", "delta", ""], same, 10)
    np.testing.assert_array_equal(ids[0], np.arange(10))
    assert (ids[1:] == -1).all()
    assert evaluate_retrieval(ids, [{3}, {3}, {0}]).metrics["recall@10"] == pytest.approx(1 / 3)


def test_bm25_leaves_stop_words_out_when_told():
    ids, _ = bm25(["the parser"], ["the cat", "a parser"], 2, BM25Config(stop_words=True))
    np.testing.assert_array_equal(ids, [[1, -1]])
    ids, _ = bm25(["the parser"], ["the cat", "a parser"], 2)
    np.testing.assert_array_equal(ids, [[0, 1]])


def test_bm25_over_documents_without_a_word_is_refused():
    with pytest.raises(UsageError, match="nothing to search"):
        bm25(["a query"], ["...", "--"], 3)


def test_token_vectors_rank_by_the_sum_of_maxima():
    random = np.random.default_rng(0)
    queries = [random.normal(size=(n, 4)).astype(np.float32) for n in (3, 1, 0)]
    documents = [random.normal(size=(n, 4)).astype(np.float32) for n in (2, 0, 5, 1)]
    ids, scores = rank_tokens(queries, documents, 3)
    for i, query in enumerate(queries):
        expected = [sum((d @ t).max() for t in query) if len(d) else 0.0 for d in documents]
        order = sorted(range(4), key=lambda j: (-np.float32(expected[j]), j))[:3]
        assert ids[i].tolist() == order
        np.testing.assert_allclose(scores[i], [expected[j] for j in order], rtol=1e-5)
    with pytest.raises(RunError, match="NaN"):
        rank_tokens([np.full((1, 4), np.nan, np.float32)], documents, 1)
