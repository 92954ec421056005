import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.schema import UsageError
from evaluation.metrics import metric_names, parse_metric, per_query
from evaluation.retrieval import evaluate_retrieval


def naive(row: list[int], relevant: set[int], k: int) -> dict[str, float]:
    """The definitions, one query at a time."""
    gains = [d in relevant for d in row[:k] if d >= 0]
    ideal = sum(1 / math.log2(i + 2) for i in range(min(k, len(relevant))))
    first = next((1 / (i + 1) for i, hit in enumerate(gains) if hit), 0.0)
    return {
        f"ndcg@{k}": sum(hit / math.log2(i + 2) for i, hit in enumerate(gains)) / ideal,
        f"mrr@{k}": first,
        "recall@1": sum(gains[:1]) / len(relevant),
        f"recall@{k}": sum(gains) / len(relevant),
    }


@st.composite
def rankings(draw):
    k = draw(st.integers(1, 12))
    queries = draw(st.integers(1, 6))
    rows, relevant = [], []
    for _ in range(queries):
        row = draw(st.lists(st.integers(0, 30), max_size=k, unique=True))
        rows.append(row + [-1] * (k - len(row)))
        relevant.append(draw(st.sets(st.integers(0, 30), min_size=1, max_size=15)))
    return np.array(rows), relevant, k


@settings(max_examples=50)
@given(rankings())
def test_every_metric_equals_its_definition(case):
    ranking, relevant, k = case
    values = per_query(ranking, relevant, metric_names(k))
    for i, row in enumerate(ranking.tolist()):
        expected = naive(row, relevant[i], k)
        assert {name: x[i] for name, x in values.items()} == pytest.approx(expected)


def test_the_mean_and_the_order_of_queries_are_kept():
    ranking = np.array([[3, 1] + [-1] * 8, [0, 2] + [-1] * 8, [7, 8] + [-1] * 8])
    scores = evaluate_retrieval(ranking, [{3}, {2}, {9}])
    np.testing.assert_array_equal(scores.per_query["mrr@10"], [1, 0.5, 0])
    assert scores.metrics["mrr@10"] == pytest.approx(0.5)
    assert list(scores.metrics) == ["ndcg@10", "mrr@10", "recall@1", "recall@10"]


def test_more_than_ten_queries_stay_in_their_rows():
    ranking = np.tile(np.arange(10), (23, 1))
    values = per_query(ranking, [{i} for i in range(23)], ["mrr@10"])["mrr@10"]
    np.testing.assert_allclose(values, [1 / (i + 1) if i < 10 else 0 for i in range(23)])


def test_a_ranking_shorter_than_the_cutoff_is_refused():
    with pytest.raises(ValueError, match=r"5 documents \(axis 1\).*needs 10"):
        per_query(np.zeros((1, 5), int), [{0}], ["recall@10"])


def test_a_document_ranked_twice_is_refused():
    with pytest.raises(ValueError, match="twice for query 1"):
        per_query(np.array([[1, 2], [3, 3]]), [{1}, {3}], ["recall@2"])


def test_a_ranking_of_other_queries_is_refused():
    with pytest.raises(ValueError, match=r"3 queries.*relevant has 1"):
        per_query(np.zeros((3, 1), int), [{0}], ["recall@1"])


@pytest.mark.parametrize(
    ("name", "near"),
    [("ndgc@10", "ndcg@10"), ("recall@", "recall@1"), ("MRR@10", "mrr@10"), ("ndcg@0", "ndcg@10")],
)
def test_an_unknown_metric_names_the_nearest(name, near):
    with pytest.raises(UsageError, match=f"did you mean '{near}"):
        parse_metric(name)


def test_a_cutoff_of_one_names_each_metric_once():
    assert metric_names(1) == ("ndcg@1", "mrr@1", "recall@1")
