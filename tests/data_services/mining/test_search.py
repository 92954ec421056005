"""The search: exact whatever the shards, ties by position, and bounded by what is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.mining import search as module
from data_services.mining.search import LocalSearch, SearchConfig, Shard, best, shards
from data_services.mining.vectors import dots
from tests.data_services.mining.worlds import vector_file


def brute(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """One score after another, sorted by (falling score, position), filled up with -1 and -inf."""
    positions, scores = [], []
    for q in queries:
        found = sorted((-float(np.dot(q, d)), i) for i, d in enumerate(documents))[:k]
        positions.append([i for _, i in found] + [-1] * (k - len(found)))
        scores.append([-s for s, _ in found] + [-np.inf] * (k - len(found)))
    return positions, scores


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 12), st.integers(1, 30), st.integers(1, 4))
def test_any_shards_give_what_one_by_one_comparison_gives(tmp_path_factory, seed, n, k, shard_rows, workers):
    """Small whole numbers: half of the documents share their scores with others."""
    rng = np.random.default_rng(seed)
    documents, queries = rng.integers(-2, 3, (n, 3)), rng.integers(-2, 3, (5, 3))
    folder = tmp_path_factory.mktemp("v")
    files = vector_file(folder / "q", queries), vector_file(folder / "d", documents)
    parts = shards(*files, SearchConfig(shard_rows=shard_rows), workers)
    assert (parts[0].start, parts[-1].stop) == (0, n)
    assert max(s.stop - s.start for s in parts) <= shard_rows
    positions, scores = LocalSearch(parts)(0, 5, k)
    assert (positions.tolist(), scores.tolist()) == brute(queries, documents, k)


def test_blocks_of_a_shard_and_spare_places_change_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    documents = np.repeat(rng.integers(-1, 2, (20, 4)), 15, axis=0)  # far more equals than spare places
    files = vector_file(tmp_path / "q", rng.integers(-1, 2, (9, 4))), vector_file(tmp_path / "d", documents)
    whole = LocalSearch(shards(*files, SearchConfig()))(0, 9, 20)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 64)
    cut = LocalSearch(shards(*files, SearchConfig()))(2, 7, 20)
    assert np.array_equal(cut[0], whole[0][2:7])
    assert whole[0].tolist() == brute(files[0].block(0, 9), documents, 20)[0]


def test_scores_are_the_same_bits_however_the_corpus_is_cut(tmp_path):
    rng = np.random.default_rng(1)
    queries, documents = rng.normal(size=(40, 24)), rng.normal(size=(500, 24))
    files = vector_file(tmp_path / "q", queries), vector_file(tmp_path / "d", documents)
    one, many = (LocalSearch(shards(*files, SearchConfig(shard_rows=r)))(0, 40, 30) for r in (500, 37))
    assert np.array_equal(one[0], many[0])
    assert np.array_equal(one[1], many[1])
    of = np.repeat(np.arange(40), 30)
    assert np.array_equal(dots(files[0], of, files[1], one[0].ravel()), one[1].ravel())


def test_all_cells_of_an_ivf_index_find_what_flat_finds_and_the_index_is_kept(tmp_path):
    rng = np.random.default_rng(2)
    queries, documents = rng.normal(size=(10, 8)), rng.normal(size=(400, 8))
    files = vector_file(tmp_path / "q", queries), vector_file(tmp_path / "d", documents)
    flat = LocalSearch(shards(*files, SearchConfig()))(0, 10, 5)
    config = SearchConfig(index="ivf", cells=9, probes=9, shard_rows=200)
    found = LocalSearch(shards(*files, config))(0, 10, 5)
    assert np.array_equal(found[0], flat[0])
    kept = sorted(p.name for p in tmp_path.glob("*.faiss"))
    assert kept == ["ivf-9-0-200.faiss", "ivf-9-200-400.faiss"]
    few = LocalSearch(shards(*files, SearchConfig(index="ivf", cells=9, probes=1)))(0, 10, 5)
    assert 0.2 < np.mean([len(set(a) & set(b)) / 5 for a, b in zip(few[0], flat[0], strict=True)]) <= 1


def test_shards_are_one_for_each_worker_at_least(tmp_path):
    files = vector_file(tmp_path / "q", np.ones((1, 2))), vector_file(tmp_path / "d", np.ones((10, 2)))
    for workers, rows, expected in ((1, 100, 1), (3, 100, 3), (2, 3, 4), (99, 100, 10)):
        assert len(shards(*files, SearchConfig(shard_rows=rows), workers)) == expected
    assert isinstance(shards(*files, SearchConfig())[0], Shard)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_best_fills_up_and_breaks_ties_by_position(k):
    positions, scores = best(np.array([[7, 2, 5]]), np.array([[1.0, 1.0, 2.0]]), k)
    assert positions[0].tolist() == ([5, 2, 7] + [-1] * 9)[:k]
    assert scores[0].tolist() == ([2.0, 1.0, 1.0] + [-np.inf] * 9)[:k]
