import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from data_services.schema import UsageError
from evaluation.gates import GateConfig
from evaluation.gates import check_scores as check
from evaluation.report import gate_table, gate_text, results_table, results_text

HEAVY = ["torch", "ray", "mlflow", "transformers", "deepspeed", "bm25s", "ir_measures", "rich", "scipy"]
SCORES = {
    "bm25": {"ndcg@10": 0.36, "mrr@10": 0.30, "recall@1": 0.2, "recall@10": 0.55},
    "untrained": {"ndcg@10": 0.1, "mrr@10": 0.08, "recall@1": 0.05, "recall@10": 0.2},
    "trained": {"ndcg@10": 0.40, "mrr@10": 0.34, "recall@1": 0.25, "recall@10": 0.6},
}


def test_a_model_passes_on_the_dot_of_the_requirement():
    assert 0.38 - 0.34 < 0.04  # in binary
    scores = {"bm25": {"ndcg@10": 0.34}, "trained": {"ndcg@10": 0.38}}
    result = check(GateConfig(over_bm25=0.04, minimum=0.38), scores)
    assert result.passed
    assert result.sentence == "every gate passed"


def test_a_failed_gate_says_which_and_by_how_much():
    result = check(GateConfig(over_bm25=0.06, minimum=0.3), SCORES)
    assert not result.passed
    assert [(row.gate, row.passed) for row in result.rows] == [
        ("ndcg@10 over BM25", False),
        ("ndcg@10", True),
    ]
    assert result.sentence == "ndcg@10 over BM25 is 0.0400 where 0.0600 is required (-0.0200)"
    lines = gate_text(result).splitlines()
    assert lines[1].split() == ["ndcg@10", "over", "BM25", "0.0600", "0.0400", "-0.0200", "FAILED"]
    assert lines[2].split() == ["ndcg@10", "0.3000", "0.4000", "+0.1000", "passed"]
    assert gate_table(result).row_count == 2


def test_a_gate_without_requirement_passes_and_needs_no_scores():
    result = check(GateConfig(), {})
    assert result.passed
    assert result.sentence == "no gate is set"


def test_a_missing_number_is_no_pass():
    with pytest.raises(UsageError, match="needs ndcg@20 of 'trained', for which mrr@10, ndcg@10"):
        check(GateConfig(metric="ndcg@20", minimum=0.1), SCORES)
    with pytest.raises(UsageError, match="of 'bm25', for which nothing was measured"):
        check(GateConfig(over_bm25=0.1), {"trained": SCORES["trained"]})


def test_nan_passes_no_gate():
    assert not check(GateConfig(minimum=0.0), {"trained": {"ndcg@10": math.nan}}).passed


def test_a_gate_on_an_unknown_metric_is_refused_when_the_recipe_is_read():
    with pytest.raises(ValidationError, match="did you mean 'ndcg@10'"):
        GateConfig(metric="nDCG@10")
    with pytest.raises(ValidationError, match="over_bm26"):
        GateConfig(over_bm26=0.1)


def test_the_table_has_a_row_for_each_model_and_the_difference_to_bm25():
    lines = results_text(SCORES).splitlines()
    assert lines[0].split("  ")[0] == "model"
    assert lines[0].endswith("nDCG@10  MRR@10  recall@1  recall@10  nDCG@10 − BM25")
    assert lines[1].split() == ["BM25", "0.3600", "0.3000", "0.2000", "0.5500"]
    assert lines[3].split() == ["trained", "0.4000", "0.3400", "0.2500", "0.6000", "+0.0400"]
    table = results_table(SCORES, title="held-out")
    assert table.row_count == 3
    assert [column.header for column in table.columns][-1] == "nDCG@10 − BM25"


def test_without_bm25_there_is_no_difference_column():
    assert results_text({"trained": SCORES["trained"]}).splitlines()[0].endswith("recall@10")


def test_a_hole_in_the_table_is_an_error():
    with pytest.raises(ValueError, match=r"row 'trained'.*no 'mrr@10'"):
        results_text({"bm25": SCORES["bm25"], "trained": {"ndcg@10": 0.4}})


def test_reading_a_recipe_imports_nothing_heavy():
    code = (
        "import sys, evaluation.retrieval, evaluation.gates, evaluation.report, evaluation.significance\n"
        "print([name for name in HEAVY if name in sys.modules])"
    ).replace("HEAVY", repr(HEAVY))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
