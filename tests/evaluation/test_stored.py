import json

import numpy as np
import pytest

from data_services.schema import UsageError
from evaluation.stored import Overlap, PerQuery, Result, TaskResult, find, new_id, read, write

NDCG = np.array([0.25, 1.0, 0.5])


def an_evaluation(**changed) -> Result:
    task = TaskResult(
        kind="retrieval",
        main="ndcg@10",
        metrics={"ndcg@10": float(NDCG.mean())},
        counts={"queries": 3, "documents": 9},
        baselines={"bm25": {"ndcg@10": 0.5}},
        contamination={"queries": Overlap(texts=3, exact=1, near=1), "documents": Overlap(texts=9, exact=1, near=0)},
    )
    told = {"id": new_id(), "model": "mine/1", "model_fingerprint": "aa", "dim": 8, "suite": "small", "seconds": 1.5}
    told |= {"suite_fingerprint": "bb", "made": "2026-01-01T00:00:00+00:00", "tasks": {"code": task}}
    return Result(**(told | changed))


SCORES = {"code": PerQuery(["q2", "q1", "q3"], {"ndcg@10": NDCG, "recall@1": NDCG > 0.9}, [["d1", "d2"], [], ["d9"]])}


def test_what_was_written_is_read_with_queries_in_the_order_of_their_ids(tmp_path):
    written = write(tmp_path, an_evaluation(), SCORES)
    stored = read(written.folder)
    assert stored.result == written.result
    found = stored.per_query("code")
    assert found.query_ids == ["q1", "q2", "q3"]
    assert list(found.hits) == [[], ["d1", "d2"], ["d9"]]
    np.testing.assert_array_equal(found.scores["ndcg@10"], [1.0, 0.25, 0.5])
    assert stored.per_query("code", "recall@1").scores["recall@1"].tolist() == [1, 0, 0]
    assert stored.result.tasks["code"].metrics["ndcg@10"] == found.scores["ndcg@10"].mean()
    assert stored.per_query("code", "map@10").query_ids == stored.per_query("sts").query_ids == []


def test_a_task_is_as_contaminated_as_its_worst_side():
    assert an_evaluation().tasks["code"].contaminated_share == pytest.approx(2 / 3)
    assert TaskResult(kind="sts", main="spearman", metrics={}, counts={}).contaminated_share is None


def test_evaluations_are_found_by_model_and_suite_newest_first(tmp_path):
    assert find(tmp_path) == []
    for number, model in enumerate(("aa", "cc", "aa")):
        write(tmp_path, an_evaluation(id=f"2026-{number}", model_fingerprint=model), SCORES)
    assert [s.result.id for s in find(tmp_path)] == ["2026-2", "2026-1", "2026-0"]
    assert [s.result.id for s in find(tmp_path, "aa", "bb")] == ["2026-2", "2026-0"]
    assert find(tmp_path, suite_fingerprint="other") == []


def test_a_missing_or_damaged_evaluation_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="holds no evaluation"):
        read(tmp_path)
    stored = write(tmp_path, an_evaluation(), SCORES)
    (stored.folder / "per_query.parquet").write_bytes(b"not parquet")
    with pytest.raises(UsageError, match=r"damaged, evaluate again: .*per_query\.parquet"):
        stored.per_query("code")
    result = json.loads((stored.folder / "result.json").read_text())
    (stored.folder / "result.json").write_text(json.dumps(result | {"dim": "wide"}))
    with pytest.raises(UsageError, match=r"result\.json is damaged"):
        read(stored.folder)
