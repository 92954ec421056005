import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.schema import UsageError
from evaluation.metrics import depth_needed, metric_names, parse_metric, per_query, ranking_metrics
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
    [
        ("ndgc@10", "ndcg@10"),
        ("recall@", "recall@1"),
        ("MRR@10", "mrr@10"),
        ("ndcg@0", "ndcg@10"),
        ("rprecision", "r_precision"),
    ],
)
def test_an_unknown_metric_names_the_nearest(name, near):
    with pytest.raises(UsageError, match=f"did you mean '{near}"):
        parse_metric(name)


def test_a_cutoff_of_one_names_each_metric_once():
    assert metric_names(1) == ("ndcg@1", "mrr@1", "recall@1")


def naive_graded(row: list[int], grades: dict[int, int], k: int) -> dict[str, float]:
    """The definitions with grades: gain is the grade, what is graded 0 or less is not relevant."""
    right = {d for d, grade in grades.items() if grade > 0}
    gains = [max(grades.get(d, 0), 0) for d in row[:k]]
    best = sorted((grades[d] for d in right), reverse=True)[:k]
    dcg, ideal = (sum(g / math.log2(i + 2) for i, g in enumerate(x)) for x in (gains, best))
    hits = [d in right for d in row]
    precise = [sum(hits[: i + 1]) / (i + 1) for i in range(min(k, len(row))) if hits[i]]
    return {
        f"ndcg@{k}": dcg / ideal,
        f"map@{k}": sum(precise) / len(right),
        f"precision@{k}": sum(hits[:k]) / k,
        "r_precision": sum(hits[: len(right)]) / len(right),
    }


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.permutations(range(12)), st.lists(st.integers(-1, 3), min_size=12, max_size=12)), min_size=1),
    st.integers(1, 12),
)
def test_graded_metrics_equal_their_definitions(cases, k):
    cases = [(list(row), dict(enumerate([*grades[:-1], 1]))) for row, grades in cases]
    names = [f"ndcg@{k}", f"map@{k}", f"precision@{k}", "r_precision"]
    values = per_query(np.array([row for row, _ in cases]), [grades for _, grades in cases], names)
    for i, (row, grades) in enumerate(cases):
        assert {name: x[i] for name, x in values.items()} == pytest.approx(naive_graded(row, grades, k))


def test_r_precision_needs_a_ranking_as_deep_as_the_query_with_most_relevant_documents():
    assert depth_needed(["ndcg@2"], [{1, 2, 3}]) == 2
    assert depth_needed(["ndcg@2", "r_precision"], [{1, 2, 3}, {4: 1, 5: 0}]) == 3
    with pytest.raises(ValueError, match=r"2 documents \(axis 1\).*needs 3"):
        per_query(np.array([[0, 1]]), [{1, 2, 3}], ["r_precision"])


def test_a_grade_that_trec_eval_would_cut_is_refused():
    with pytest.raises(ValueError, match="whole number"):
        per_query(np.array([[0]]), [{0: 0.5}], ["ndcg@1"])


def test_a_suites_metrics_are_all_known():
    assert [parse_metric(name)[0] for name in ranking_metrics(3)] == [
        "ndcg", "map", "mrr", "recall", "recall", "precision", "r_precision"
    ]  # fmt: skip
