"""Two evaluations side by side, and the gates that look at them."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from data_services.schema import UsageError
from evaluation.compare import compare
from evaluation.gates import GateConfig, ModelFacts, check_model, check_sign_offs, check_suite, together
from evaluation.report import comparison_text, gate_text
from evaluation.significance import paired_bootstrap
from evaluation.stored import Overlap, PerQuery, Result, TaskResult, write

QUERIES = [f"q{i:03}" for i in range(200)]


@pytest.fixture
def stored(tmp_path):
    """Stores an evaluation: nDCG of 200 queries in task "code", and in "sts" a metric that is no mean over them."""
    numbers = iter(range(99))

    def store(scores, suite="bb", contamination=None, tasks=("code", "sts")):
        i = next(numbers)
        code = TaskResult(
            kind="retrieval",
            main="ndcg@10",
            metrics={"ndcg@10": float(np.mean(scores)), "recall@1": 0.5},
            counts={"queries": len(scores)},
            contamination=contamination,
        )
        sts = TaskResult(kind="sts", main="spearman", metrics={"spearman": 0.8 + i / 100}, counts={"pairs": 9})
        result = Result(
            id=f"e{i}",
            model=f"small/{i}",
            model_fingerprint=str(i),
            dim=8,
            suite="team.yaml",
            suite_fingerprint=suite,
            made="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            tasks={name: task for name, task in {"code": code, "sts": sts}.items() if name in tasks},
        )
        hits = [[f"d{i}", query] for query in QUERIES]
        return write(tmp_path, result, {"code": PerQuery(QUERIES, {"ndcg@10": np.asarray(scores, float)}, hits)})

    return store


@pytest.fixture
def champion():
    return np.random.default_rng(0).beta(2, 2, len(QUERIES))


def test_a_comparison_counts_and_names_the_queries_that_changed(stored, champion):
    better = champion.copy()
    better[:30] += 0.01 * np.arange(30)
    better[40:45] -= 0.5
    a, b = stored(champion), stored(better)
    code, sts = compare(a, b).tasks
    assert (code.wins, code.losses, code.ties) == (29, 5, 166)
    assert code.b - code.a == pytest.approx((better - champion).mean())
    assert code.difference == paired_bootstrap(better, champion)
    assert [c.query_id for c in code.changed] == [*QUERIES[40:45], *(QUERIES[i] for i in (29, 28, 27, 26, 25))]
    assert code.changed[0].hits_a == ("d0", "q040")
    assert code.changed[0].hits_b == ("d1", "q040")
    assert (sts.difference, sts.p, sts.wins, sts.changed) == (None, None, 0, ())
    lines = comparison_text(compare(a, b)).splitlines()
    assert lines[1].split()[-3:] == ["29", "5", "166"]
    assert lines[2].split() == ["sts", "spearman", "0.8000", "0.8100", "+0.0100"]


def test_the_other_way_round_is_the_other_sign(stored, champion):
    a, b = stored(champion), stored(champion**1.1)
    one, other = compare(a, b).tasks[0], compare(b, a).tasks[0]
    assert one.difference.difference == -other.difference.difference
    assert one.p == other.p
    assert (one.wins, one.losses) == (other.losses, other.wins)


def test_an_evaluation_compared_with_itself_shows_no_change(stored, champion):
    a = stored(champion)
    same = compare(a, a).tasks[0]
    assert (same.ties, same.p, same.changed) == (200, 1.0, ())


def test_other_suites_queries_and_metrics_are_one_sentence(stored, champion):
    a = stored(champion)
    for other in (stored(champion, suite="cc"), stored(champion, tasks=("code",))):
        with pytest.raises(UsageError, match=r"small/0 was evaluated on team\.yaml .* evaluate both on the same suite"):
            compare(a, other)
    with pytest.raises(UsageError, match="task code has no metric 'ndcg@5'; it has ndcg@10, recall@1"):
        compare(a, stored(champion), metric="ndcg@5")


def gate(**asked):
    return GateConfig(suite="team.yaml", **asked)


def test_a_planted_regression_is_refused_and_a_planted_improvement_passes(stored, champion):
    noise = np.random.default_rng(1).normal(0, 0.05, len(champion))
    asked = gate(non_inferior={"margin": 0.01, "tasks": ["code"]}, improvement={"task": "code"})
    before = stored(champion)
    improved = check_suite(asked, stored(champion + 0.02 + noise), before)
    assert improved.passed
    regressed = check_suite(asked, stored(champion - 0.03 + noise), before)
    assert [row.passed for row in regressed.rows] == [False, False]
    assert regressed.rows[0].gate == "code not worse (ndcg@10, 95%)"
    assert regressed.rows[0].margin < 0
    assert "code not worse (ndcg@10, 95%) is -0.0" in regressed.sentence
    assert "FAILED" in gate_text(regressed)
    equal = check_suite(asked, stored(champion), before)
    assert [row.passed for row in equal.rows] == [True, False], "an equal model is not worse, and not better"
    uncertain = check_suite(asked, stored(champion - 0.009 + 10 * noise), before)
    assert not uncertain.rows[0].passed, "a loss within the margin that isn't sure to be"


def test_without_a_champion_there_is_nothing_to_be_worse_than(stored, champion):
    asked = gate(non_inferior={}, improvement={"task": "code"}, minimums={"code": {"recall@1": 0.6}})
    found = check_suite(asked, stored(champion, tasks=("code",)), None)
    assert [(row.got, row.passed) for row in found.rows] == [
        (0.5, False),
        ("no champion yet", True),
        ("no champion yet", True),
    ]


def test_contamination_is_bounded_where_it_is_known(stored, champion):
    overlap = {"queries": Overlap(texts=100, exact=2, near=1), "documents": Overlap(texts=100, exact=1, near=0)}
    found = check_suite(gate(contamination=0.02), stored(champion, contamination=overlap, tasks=("code",)), None)
    assert found.sentence == "code contamination is 0.0300 where 0.0200 is required (-0.0100)"
    with pytest.raises(UsageError, match="isn't known what the model was trained on"):
        check_suite(gate(contamination=0.02), stored(champion), None)


def test_what_a_gate_names_must_be_in_the_suite(stored, champion):
    a = stored(champion)
    for asked, told in [
        ({"minimums": {"cod": {"ndcg@10": 0.1}}}, "names task 'cod', which the suite hasn't; it has code, sts"),
        ({"minimums": {"code": {"map": 0.1}}}, "needs map of code, which measures ndcg@10, recall@1"),
        ({"non_inferior": {"tasks": ["x"]}}, "names task 'x'"),
        ({"improvement": {"task": "code", "metric": "map"}}, "needs map of code"),
        ({"non_inferior": {}}, "compares spearman of sts by query, which has no value for each"),
    ]:
        with pytest.raises(UsageError, match=told):
            check_suite(gate(**asked), a, a)


def test_a_gate_that_asks_nothing_of_its_suite_or_has_none_is_refused():
    with pytest.raises(ValidationError, match="non_inferior is measured on a suite"):
        GateConfig(non_inferior={})
    with pytest.raises(ValidationError, match="nothing is asked of it"):
        GateConfig(suite="team.yaml")


def test_files_card_speed_and_signatures():
    facts = ModelFacts(size_mb=90.0, safetensors=1, pickles=(), licence="mit", latency_p95_ms=12.0, export_parity=3e-7)
    strict = GateConfig(
        size_mb=100, latency_p95_ms=20, export_parity=1e-5, safetensors=True, licence=["apache-2.0", "mit"]
    )
    assert check_model(strict, facts).passed
    worse = ModelFacts(200.0, 1, ("pytorch_model.bin",), "", 25.0, math.inf)
    assert not any(row.passed for row in check_model(strict, worse).rows)
    assert (
        "weights is pickle pytorch_model.bin where safetensors only is required" in check_model(strict, worse).sentence
    )
    assert check_model(GateConfig(licence=[]), facts).passed
    assert not check_model(GateConfig(licence=[]), worse).passed
    assert not check_model(GateConfig(safetensors=True), ModelFacts(1.0, 0, (), "")).passed
    assert check_model(GateConfig(), None).rows == ()
    asked = GateConfig(signed_off_by=["ann", "bo"])
    assert check_sign_offs(asked, ["bo"]).sentence == "signed off by is not signed where ann is required"
    assert check_sign_offs(asked, ["bo", "ann"]).passed
    twice = together([check_sign_offs(asked, []), check_sign_offs(asked, [])])
    assert len(twice.rows) == 2
