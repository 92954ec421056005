"""`gyre evaluate` with a real pretrained model: the same numbers as Sentence Transformers' evaluators, stored."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.evidence.evaluating import EvaluationJob, evaluate, rows_of
from cluster.evidence.sharded import ShardedVectors
from cluster.models import open_encoder
from data_services import builtin
from data_services.schema import UsageError
from evaluation.stored import find, read
from evaluation.vectors import Vectors
from tests.cluster.test_suites import beir, json_lines, saved

PAIRS = [pair for pair in builtin.stdlib_code()["heldout"] if len(pair.positive) < 300][:32]
DOCSTRINGS, CODES = [pair.query for pair in PAIRS], [pair.positive for pair in PAIRS]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Real texts of the standard library, as a task of every kind that Sentence Transformers has an evaluator of."""
    folder = tmp_path_factory.mktemp("suite")
    pairs = [
        {"sentence1": a, "sentence2": CODES[(i + (i % 3)) % len(CODES)], "score": 2 - i % 3, "label": int(i % 3 == 0)}
        for i, a in enumerate(DOCSTRINGS)
    ]
    ranked = [
        {"query": q, "positive": [CODES[i]], "negatives": [c for c in CODES[i - 8 : i] if c != CODES[i]]}
        for i, q in enumerate(DOCSTRINGS)
        if i >= 8
    ]
    translated = [{"sentence1": a, "sentence2": b} for a, b in zip(DOCSTRINGS, CODES, strict=True)]
    data = {
        name: json_lines(folder / f"{name}.jsonl", rows)
        for name, rows in (("pairs", pairs), ("ranked", ranked), ("translated", translated))
    }
    data["retrieval"] = json_lines(
        folder / "retrieval.jsonl", [{"query": q, "positive": c} for q, c in zip(DOCSTRINGS, CODES, strict=True)]
    )
    metrics = ["ndcg@10", "mrr@10", "map@100", "recall@5", "precision@3"]
    tasks = [
        {"name": "search", "kind": "retrieval", "data": data["retrieval"], "metrics": metrics},
        {"name": "order", "kind": "reranking", "data": data["ranked"], "metrics": ["map@100", "mrr@10", "ndcg@10"]},
        {"name": "similar", "kind": "sts", "data": data["pairs"]},
        {"name": "same", "kind": "pair_classification", "data": data["pairs"]},
        {"name": "translated", "kind": "bitext_mining", "data": data["translated"]},
    ]
    variants = [{"dim": 128}, {"quantise": "int8"}, {"prompts": {"query": "What does this do? "}}]
    return saved(folder, {"name": "python", "tasks": tasks, "variants": variants}), pairs, ranked


@pytest.fixture(scope="module")
def evaluated(suite, pretrained, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    job = EvaluationJob(str(pretrained), suite[0], baselines=("none",))
    return evaluate(job, home)


@pytest.fixture(scope="module")
def theirs(suite, pretrained):
    """The same tasks by Sentence Transformers' evaluators."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import evaluation

    _, pairs, ranked = suite
    model = SentenceTransformer(str(pretrained), device="cpu")
    unique = {"queries": dict(enumerate(dict.fromkeys(DOCSTRINGS))), "corpus": dict(enumerate(dict.fromkeys(CODES)))}
    at = {text: i for i, text in unique["corpus"].items()}
    relevant = {
        i: {at[c] for q, c in zip(DOCSTRINGS, CODES, strict=True) if q == text} for i, text in unique["queries"].items()
    }
    a, b = [p["sentence1"] for p in pairs], [p["sentence2"] for p in pairs]

    def samples(row):
        return {"query": row["query"], "positive": row["positive"], "negative": list(row["negatives"])}

    quiet = {"write_csv": False}
    evaluators = {
        "search": evaluation.InformationRetrievalEvaluator(
            unique["queries"], unique["corpus"], relevant, precision_recall_at_k=[3, 5], **quiet
        ),
        "order": evaluation.RerankingEvaluator(list(map(samples, ranked)), **quiet),
        "similar": evaluation.EmbeddingSimilarityEvaluator(a, b, [p["score"] for p in pairs], **quiet),
        "same": evaluation.BinaryClassificationEvaluator(a, b, [p["label"] for p in pairs], **quiet),
        "translated": evaluation.TranslationEvaluator(DOCSTRINGS, CODES, **quiet),
    }
    return {name: evaluator(model) for name, evaluator in evaluators.items()}


@pytest.mark.parametrize(
    ("task", "same"),
    [
        ("search", {f"{m}@{k}": f"cosine_{m}@{k}" for m, k in (("ndcg", 10), ("mrr", 10), ("map", 100))}),
        ("search", {"recall@5": "cosine_recall@5", "precision@3": "cosine_precision@3"}),
        ("order", {"map@100": "map", "mrr@10": "mrr@10", "ndcg@10": "ndcg@10"}),
        ("similar", {"spearman": "spearman_cosine", "pearson": "pearson_cosine"}),
        ("same", {"ap": "cosine_ap", "f1": "cosine_f1", "accuracy": "cosine_accuracy"}),
        ("translated", {"accuracy": "src2trg_accuracy", "back_accuracy": "trg2src_accuracy"}),
    ],
)
def test_a_pretrained_model_has_the_scores_of_sentence_transformers_evaluators(evaluated, theirs, task, same):
    ours = evaluated.result.tasks[task].metrics
    assert {name: ours[name] for name in same} == pytest.approx(
        {name: theirs[task][other] for name, other in same.items()}, abs=1e-4
    )


def test_what_is_stored_holds_every_task_with_its_baselines_and_variants(evaluated, pretrained):
    result = evaluated.result
    assert read(evaluated.folder).result == result
    assert (result.model, result.dim, result.suite) == (pretrained.name, 384, "python")
    search = result.tasks["search"]
    assert set(search.variants) == {"dim 128", "int8", "prompts query='What does this do? '"}
    assert set(rows_of(result, "search")) == {
        "bm25",
        pretrained.name,
        *(f"{pretrained.name} {v}" for v in search.variants),
    }
    assert 0 < search.variants["dim 128"]["ndcg@10"] < search.metrics["ndcg@10"]
    assert search.variants["int8"]["ndcg@10"] == pytest.approx(search.metrics["ndcg@10"], abs=0.03)
    per_query = evaluated.per_query("search", "ndcg@10")
    assert per_query.scores["ndcg@10"].mean() == pytest.approx(search.metrics["ndcg@10"])
    assert all(len(hits) == 10 for hits in per_query.hits)
    assert evaluated.per_query("search").hits == per_query.hits
    assert not evaluated.per_query("similar").hits[0]


def test_the_command_shows_a_source_beside_bm25_and_another_model_and_says_where_it_is(
    pretrained, tmp_path, monkeypatch
):
    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))
    data = beir(tmp_path / "beir", [("q1", "d0", 1), ("q2", "d1", 1)])
    out = tmp_path / "result.json"
    other = tmp_path / "other"
    other.symlink_to(pretrained)
    command = ["evaluate", str(pretrained), "--suite", data, "--k", "2", "--baseline", str(other), "--json", str(out)]
    shown = CliRunner().invoke(app, command, catch_exceptions=False).output
    (stored,) = find(tmp_path / "home")
    told = json.loads(out.read_text())
    assert told["tasks"]["pool"]["baselines"].keys() == {"bm25", "other"}
    assert told["tasks"]["pool"]["baselines"]["other"] == told["tasks"]["pool"]["metrics"]
    assert str(stored.folder) in shown
    assert "nDCG@2 − BM25" in shown
    with pytest.raises(UsageError, match="--baseline none and other baselines exclude each other"):
        evaluate(EvaluationJob(str(pretrained), data, baselines=("none", str(other))), tmp_path / "home")


def test_a_large_corpus_goes_through_files_and_is_ranked_the_same(pretrained, tmp_path):
    with open_encoder(pretrained) as encoder:
        expected, scores = Vectors(encoder).nearest(DOCSTRINGS[:8], CODES, 5)
        told = []
        sharded = ShardedVectors(encoder, pretrained, tmp_path, on_progress=told.append, large=10)
        found, theirs = sharded.nearest(DOCSTRINGS[:8], CODES, 5)
        assert found.tolist() == expected.tolist()
        np.testing.assert_allclose(theirs, scores, atol=1e-5)
        assert told[-1]["step"] == told[-1]["steps"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["vectors"]
        told.clear()
        assert sharded.nearest(DOCSTRINGS[:8], CODES, 5)[0].tolist() == expected.tolist()
        assert not told  # the vectors were there
