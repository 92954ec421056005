"""Every kind of task: against scikit-learn, scipy and Sentence Transformers' definitions, and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, f1_score

from data_services.schema import RunError, UsageError
from evaluation.retrieval import BM25Config
from evaluation.tasks.labels import Classification, Clustering, ZeroShot
from evaluation.tasks.pairs import STS, BitextMining, PairClassification
from evaluation.tasks.ranking import Reranking, Retrieval
from evaluation.vectors import Variant, Vectors, variant_vectors
from tests.evaluation.worlds import Table, random_table

LEXICAL = BM25Config()


def texts(prefix, n):
    return [f"{prefix} {i}" for i in range(n)]


def retrieval(queries, documents, grades, metrics=("ndcg@10",)):
    ids = [f"q{i}" for i in range(len(queries))], [f"d{i}" for i in range(len(documents))]
    return Retrieval("code", metrics, ids[0], queries, ids[1], documents, grades, LEXICAL)


def test_retrieval_by_hand_with_grades_and_the_hits_in_order():
    task = retrieval(["q"], ["a", "b", "c"], [{0: 1, 2: 3}], ("ndcg@10", "mrr@10", "r_precision"))
    found = task.score(Vectors(Table({"q": [1, 0], "a": [0.8, 0.6], "b": [1, 0], "c": [0, 1]})))
    gained = 1 / np.log2(3) + 3 / np.log2(4)
    assert found.metrics == pytest.approx({"ndcg@10": gained / (3 + 1 / np.log2(3)), "mrr@10": 0.5, "r_precision": 0.5})
    assert found.per_query.hits == [["d1", "d0", "d2"]]
    assert found.per_query.scores["mrr@10"].tolist() == [0.5]


def test_a_constant_model_is_ordered_by_position_and_by_nothing_that_knows_the_answer():
    names = texts("document", 30)
    constant = Vectors(Table({text: [1, 0] for text in ["q", *names]}))
    first = retrieval(["q"], names, [{0: 1}]).score(constant)
    assert (first.metrics["ndcg@10"], first.per_query.hits[0][:2]) == (1, ["d0", "d1"])
    candidates = [{text: i >= 25 for i, text in enumerate(names)}]
    one = Reranking("r", ("map@30",), ["q"], ["q"], candidates, LEXICAL).score(constant)
    swapped = [dict(reversed(candidates[0].items()))]
    other = Reranking("r", ("map@30",), ["q"], ["q"], swapped, LEXICAL).score(constant)
    assert one.metrics == other.metrics
    assert one.metrics["map@30"] < 0.5


def test_reranking_orders_each_querys_own_candidates():
    vectors = Table({"p": [1, 0], "q": [0, 1], "near": [0.9, 0.1], "far": [0.1, 0.9]})
    candidates = [{"near": True, "far": False}, {"near": True, "far": False}]
    task = Reranking("r", ("mrr@10", "map@10"), ["p", "q"], ["p", "q"], candidates, LEXICAL)
    assert task.score(Vectors(vectors)).per_query.scores["mrr@10"].tolist() == [1, 0.5]
    lexical = [{"red apple": True, "blue sky": False}]
    assert Reranking("r", ("mrr@10",), ["1"], ["apple"], lexical, LEXICAL).baselines()["bm25"].metrics["mrr@10"] == 1


def test_a_query_that_nothing_answers_and_an_empty_corpus_are_refused():
    for queries, documents, grades, told in [
        (["q"], ["a"], [{0: 0}], r"'q0' \('q'\) has no relevant document"),
        (["q"], [], [{}], "task code has no documents"),
        ([], ["a"], [], "task code has no queries"),
        (["q"], ["a"], [{0: 0.5}], "no whole number"),
    ]:
        with pytest.raises(UsageError, match=told):
            retrieval(queries, documents, grades)
    with pytest.raises(UsageError, match="has no irrelevant candidate"):
        Reranking("r", ("mrr@10",), ["1"], ["q"], [{"a": True}], LEXICAL)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=30))
def test_correlations_are_scipys_and_the_mean_of_the_pairs_shares_ties_included(drawn):
    gold = [float(g) for g, _ in drawn]
    vectors = Table({"a": [1, 0]} | {f"b{s}": [np.cos(s / 3), np.sin(s / 3)] for s in range(5)})
    given_scores = np.array([np.float32(vectors.vectors[f"b{s}"][0]) for _, s in drawn], float)
    if len(set(gold)) < 2 or len(set(given_scores)) < 2:
        return
    task = STS("s", ("spearman", "pearson"), ["a"] * len(gold), [f"b{s}" for _, s in drawn], "query", gold)
    found = task.score(Vectors(vectors))
    assert found.metrics["spearman"] == pytest.approx(spearmanr(gold, given_scores)[0], abs=1e-9)
    assert found.metrics["pearson"] == pytest.approx(pearsonr(gold, given_scores)[0], abs=1e-6)
    for metric, value in found.metrics.items():
        assert found.per_query.scores[metric].mean() == pytest.approx(value)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=3, max_size=30))
def test_average_precision_f1_and_accuracy_are_those_of_every_threshold_tried(drawn):
    labels = [label for label, _ in drawn]
    if len(set(labels)) < 2:
        return
    vectors = Table({"a": [1, 0]} | {f"b{s}": [np.cos(s / 5), np.sin(s / 5)] for s in range(7)})
    given_scores = np.array([vectors.vectors[f"b{s}"][0] for _, s in drawn])
    second = [f"b{s}" for _, s in drawn]
    task = PairClassification("p", ("ap", "f1", "accuracy"), ["a"] * len(labels), second, "query", labels)
    found = task.score(Vectors(vectors))
    tried = [given_scores >= t for t in [*given_scores, 2]]
    assert found.metrics["ap"] == pytest.approx(average_precision_score(labels, given_scores))
    assert found.metrics["f1"] == pytest.approx(max(f1_score(labels, t, zero_division=0) for t in tried))
    assert found.metrics["accuracy"] == pytest.approx(max(np.mean(t == labels) for t in tried))
    assert found.per_query.scores["ap"].mean() == pytest.approx(found.metrics["ap"])


def test_bitext_mining_in_both_directions_where_equal_texts_are_one():
    vectors = Table({"one": [1, 0], "two": [0, 1], "eins": [0.9, 0.1], "zwei": [0.8, 0.6]})
    task = BitextMining(
        "b", ("f1", "accuracy", "back_accuracy"), ["one", "two", "one"], ["eins", "zwei", "eins"], "query"
    )
    found = task.score(Vectors(vectors))
    assert found.metrics == pytest.approx({"f1": 1, "accuracy": 1, "back_accuracy": 2 / 3})  # zwei is nearer to one


def labelled(n=60, seed=0):
    """Texts of two labels whose vectors are told apart by one dimension, four in ten of them wrongly."""
    rng = np.random.default_rng(seed)
    names, labels = texts(f"text {seed}", n), ["up" if i % 2 else "down" for i in range(n)]
    vectors = {t: [1 if label == "up" else -1, *rng.normal(size=3)] for t, label in zip(names, labels, strict=True)}
    return names, labels, vectors


def test_a_probe_and_neighbours_learn_what_the_vectors_tell():
    train, train_labels, known = labelled(seed=1)
    names, labels, vectors = labelled(seed=2)
    metrics = ("accuracy", "f1", "knn_accuracy", "knn_f1")
    task = Classification("c", metrics, names, labels, "query", train, train_labels, 5)
    found = task.score(Vectors(Table(vectors | known)))
    assert min(found.metrics.values()) > 0.85
    by_hand = _knn(vectors, names, known, train, train_labels)
    assert found.metrics["knn_accuracy"] == np.mean([a == b for a, b in zip(by_hand, labels, strict=True)])
    assert found.per_query.scores["accuracy"].mean() == found.metrics["accuracy"]
    shuffled = np.random.default_rng(0).permutation(train_labels).tolist()
    blind = Classification("c", metrics, names, labels, "query", train, shuffled, 5).score(
        Vectors(Table(vectors | known))
    )
    assert blind.metrics["accuracy"] < found.metrics["accuracy"]


def _knn(vectors, names, known, train, train_labels):
    table = Table(vectors | known).vectors
    given_labels = []
    for name in names:
        order = sorted(range(len(train)), key=lambda i: (-float(table[name] @ table[train[i]]), i))[:5]
        votes = [train_labels[i] for i in order]
        given_labels.append(max(dict.fromkeys(votes), key=votes.count))
    return given_labels


def test_a_label_that_training_lacks_is_named():
    with pytest.raises(UsageError, match="no training text has the label 'up'"):
        Classification("c", ("accuracy",), ["a", "b"], ["up", "down"], "query", ["c"], ["down"], 5)


def test_zero_shot_takes_the_nearest_name_of_equal_ones_the_first():
    vectors = Table({"x": [1, 0], "y": [0, 1], "z": [1, 1], "up!": [1, 0], "down!": [0, 1]})
    task = ZeroShot("z", ("accuracy",), ["x", "y", "z"], ["up", "down", "up"], "query", {"up": "up!", "down": "down!"})
    assert task.score(Vectors(vectors)).per_query.scores["accuracy"].tolist() == [1, 1, 0]


def test_clusters_that_stand_apart_are_found_and_noise_is_not():
    names, labels, _ = labelled(40)
    apart = {t: [10, 1] if label == "up" else [-1, 10] for t, label in zip(names, labels, strict=True)}
    task = Clustering("k", ("v_measure",), names, labels, "query", 3)
    found = task.score(Vectors(Table(apart)))
    assert found.metrics["v_measure"] == 1
    assert len(found.per_query.query_ids) == 3
    assert task.score(Vectors(random_table(names))).metrics["v_measure"] < 0.3


def test_each_text_is_encoded_once_for_all_tasks_and_variants():
    queries, documents = texts("q", 5), texts("d", 9)
    encoder = random_table([*queries, *documents])
    vectors = Vectors(encoder)
    task = retrieval(queries, documents, [{i: 1} for i in range(5)])
    for variant in (Variant(dim=4), Variant(quantise="int8"), Variant(dim=4, quantise="binary")):
        task.score(variant_vectors(vectors, variant, None))
    task.score(vectors)
    assert sorted(encoder.asked) == sorted([*queries, *documents])


def test_variants_are_the_prefix_the_cells_and_the_signs():
    encoder = random_table(texts("t", 50), dim=16)
    whole = Vectors(encoder).of(texts("t", 50), "document")

    def stored(**keys):
        return variant_vectors(Vectors(encoder), Variant(**keys), None).stored(texts("t", 50), "document")

    prefix = whole[:, :4]
    np.testing.assert_allclose(stored(dim=4), prefix / np.linalg.norm(prefix, axis=1, keepdims=True), rtol=1e-6)
    cell = (whole.max(0) - whole.min(0)) / 255
    assert (np.abs(stored(quantise="int8") - whole) <= cell * 0.51).all()
    np.testing.assert_array_equal(np.sign(stored(quantise="binary")), np.where(whole > 0, 1, -1))


def test_a_binary_search_is_by_hamming_distance_and_rescoring_orders_its_first_again():
    queries, documents = texts("q", 6), texts("d", 40)
    vectors = Vectors(random_table([*queries, *documents], dim=16))
    q, d = vectors.of(queries, "query"), vectors.of(documents, "document")
    hamming = ((q > 0)[:, None] != (d > 0)[None]).sum(-1)
    signs = np.where(d > 0, 1, -1)
    for rescore in (1, 3):
        found, _ = variant_vectors(vectors, Variant(quantise="binary", rescore=rescore), None).nearest(
            queries, documents, 5
        )
        for i in range(6):
            near = sorted(range(40), key=lambda j: (hamming[i, j], j))[: 5 * rescore]
            if rescore > 1:
                near = sorted(near, key=lambda j: (-np.float32(q[i].astype(float) @ signs[j]), j))[:5]
            assert found[i].tolist() == near


def test_a_variant_that_is_none_or_asks_for_too_much_is_refused():
    for keys, told in [({}, "the model as it is"), ({"dim": 4, "rescore": 2}, "rescore belongs to quantise: binary")]:
        with pytest.raises(ValueError, match=told):
            Variant(**keys)
    with pytest.raises(UsageError, match=r"'dim 99': the model has 8 dimensions"):
        variant_vectors(Vectors(random_table(["a"])), Variant(dim=99), None).of(["a"], "query")


def test_vectors_that_are_none_are_told():
    table = Table({"a": [1, 0], "b": [1, 0]})
    table.vectors["b"] = np.array([np.nan, 1], np.float32)
    with pytest.raises(RunError, match="1 of 2 query vectors hold NaN"):
        Vectors(table).of(["a", "b"], "query")


def test_a_fingerprint_changes_with_texts_grades_and_metrics_alone():
    one = retrieval(["q"], ["a", "b"], [{0: 1}])
    assert one.fingerprint() == retrieval(["q"], ["a", "b"], [{0: 1}]).fingerprint()
    others = [
        retrieval(["q"], ["a", "c"], [{0: 1}]),
        retrieval(["q"], ["a", "b"], [{0: 2}]),
        retrieval(["q"], ["a", "b"], [{0: 1}], ("mrr@10",)),
    ]
    assert len({task.fingerprint() for task in [one, *others]}) == 4
