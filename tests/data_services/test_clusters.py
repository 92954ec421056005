"""Batches of near neighbours: runs of one cluster or of neighbouring ones, exact from any step; making clusters."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.clustering import cluster, write_clustered
from data_services.mining.texts import write_texts
from data_services.mining.vectors import Vectors
from data_services.order import Carried, EpochOrder, Plan, Stage
from data_services.order.clusters import Clusters
from data_services.order.duplicates import arranged
from data_services.schema import Column, UsageError
from data_services.sources import SourceConfig, open_source
from data_services.stream import DataConfig
from tests.data_services.test_duplicates import Table, near, table_of, tables, words_of


def clustered(table: Table, kinds: int, seed: int = 0) -> Table:
    of = np.random.default_rng(seed).integers(0, kinds, len(table.queries))
    return dataclasses.replace(table, cluster=tuple(of.tolist()))


def distinct(n: int, group: int) -> Table:
    return table_of(range(n), range(n), group)


def ordered(table: Table, window_groups: int, spacing: int) -> EpochOrder:
    return EpochOrder(table.shape(), 5, window_groups, table, spacing, neighbours=True)


def neighbouring(clusters: np.ndarray, all_of: np.ndarray) -> bool:
    """Whether these are all rows of some neighbours in the circle of clusters, but for the first and the last one."""
    kinds = np.unique(all_of)
    there = np.isin(kinds, clusters)
    begins = np.flatnonzero(there & ~np.roll(there, 1))
    if len(begins) > 1:
        return False
    inner = np.roll(kinds, -begins[0])[: there.sum()][1:-1] if len(begins) else kinds[:0]
    return all((clusters == k).sum() == (all_of == k).sum() for k in inner)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 9), st.integers(0, 500), st.integers(0, 99))
def test_a_windows_runs_hold_neighbours_and_every_row_once(n, kinds, run, position, seed):
    of = np.random.default_rng(seed).integers(0, kinds, n)
    order, walk = Clusters(of, position).gathered(np.random.default_rng(seed + 1).random(n), words_of(n, seed), run)
    assert sorted(order.tolist()) == sorted(walk.tolist()) == list(range(n))
    assert np.count_nonzero(np.diff(of[order[walk]])) <= len(np.unique(of))  # along the walk a cluster comes once
    for places in np.split(np.arange(n), np.flatnonzero((np.arange(1, n) + position) % run == 0) + 1):
        assert neighbouring(of[order[places]], of)


@settings(max_examples=40)
@given(tables(), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.data())
def test_every_row_of_an_epoch_comes_once_and_any_position_is_the_same_from_anywhere(
    table, spacing, window_groups, kinds, data
):
    n, table = len(table.queries), clustered(table, kinds)
    whole = ordered(table, window_groups, spacing).rows(0, 3 * n)
    for epoch in range(3):
        assert sorted(whole[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    fresh = ordered(table, window_groups, spacing)
    for _ in range(3):
        first = data.draw(st.integers(0, 3 * n - 1))
        count = data.draw(st.integers(1, 3 * n - first))
        np.testing.assert_array_equal(fresh.rows(first, count), whole[first : first + count])


def test_batches_of_a_source_are_of_one_cluster_where_clusters_fill_them_and_of_two_at_their_edges():
    n, batch, kinds = 4096, 64, 8
    table = clustered(distinct(n, 64), kinds)
    plan = Plan(1, batch, [table.shape()], epochs=2, window_groups=32, ids={"content of a": table}, neighbours=True)
    of = np.array(table.cluster)
    seen = [of[plan.rows(t)[:, 1]] for t in range(plan.steps)]
    # 8 clusters of about 256 rows in a window of 2,048: 9 edges, the line's ends among them, in 32 batches.
    assert sum(len(np.unique(clusters)) == 1 for clusters in seen) >= plan.steps - 4 * 9
    assert all(len(np.unique(clusters)) <= 2 for clusters in seen)
    assert len({tuple(np.unique(clusters)) for clusters in seen[:8]}) > 3, "the runs are shuffled"
    in_epoch = [{frozenset(plan.rows(t)[:, 1].tolist()) for t in range(e * 64, e * 64 + 64)} for e in range(2)]
    assert not in_epoch[0] & in_epoch[1], "other rows meet in another epoch"
    again = Plan.from_state(json.loads(json.dumps(plan.state())), {"content of a": table})
    for t in (100, 3):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(plan)).rows(t), plan.rows(t))
        np.testing.assert_array_equal(again.rows(t), plan.rows(t))


def test_duplicates_of_a_cluster_stay_out_of_each_others_batch():
    """Each document has four rows, all in one cluster; where that is small some move to the clusters beside it."""
    n, batch = 4096, 64
    documents = np.random.default_rng(0).permutation(n) // 4
    for kinds in (8, 64):  # clusters of 8 batches, and of one
        table = dataclasses.replace(table_of(range(n), documents, 64), cluster=tuple((documents % kinds).tolist()))
        rows = ordered(table, 64, batch).rows(0, 2 * n)
        assert near(table, rows, batch) == 0
        of = np.array(table.cluster)[rows].reshape(-1, batch)
        commonest = [np.bincount(clusters).max() / batch for clusters in of]
        assert np.mean(commonest) > (0.9 if kinds == 8 else 0.2)


def test_mixed_and_homogeneous_stages_draw_neighbours_of_every_source():
    a, b = (clustered(distinct(1024, 32), 4, seed) for seed in (1, 2))
    stages = [Stage(0, (0.5, 0.5), homogeneous=False), Stage(20, (0.5, 0.5))]
    sources, ids = [a.shape("a"), b.shape("b")], {"content of a": a, "content of b": b}
    plan = Plan(0, 32, sources, steps=40, stages=stages, window_groups=32, ids=ids, neighbours=True)
    for t in range(40):
        rows = plan.rows(t)
        for i, table in enumerate((a, b)):
            clusters = np.array(table.cluster)[rows[rows[:, 0] == i, 1]]
            assert len(np.unique(clusters)) <= 4 if t < 20 else 3
    assert "neighbours: True became False" in plan.differences(Plan(0, 32, sources, steps=40, stages=stages, ids=ids))


def test_a_windows_words_alone_decide_where_there_are_no_clusters():
    words, one = words_of(300, 1), np.zeros(300, np.int64)
    order = arranged(words, Carried.none(), 50, (), Clusters(one, 0))
    assert order.tolist() != np.argsort(words).tolist()
    assert sorted(order.tolist()) == list(range(300))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"sources": [{"path": "a"}], "neighbours": True}, "data.sources.0.cluster"),
        ({"sources": [{"path": "a", "cluster": "c"}]}, "read with data.neighbours: true only|is only read with"),
        ({"sources": [{"path": "a", "cluster": "c"}], "neighbours": True, "duplicates": "allow"}, "at avoid"),
    ],
)
def test_clusters_and_neighbours_go_together(data, told):
    with pytest.raises(ValueError, match=told):
        DataConfig(steps=1, **data)


def test_a_stored_sources_clusters_are_read_by_row_group_in_any_order(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"query": f"q{i}", "positive": f"p{i}", "c": None if i == 3 else i % 7} for i in range(200)]
    file.write_text("\n".join(map(json.dumps, rows)))
    stored = open_source(SourceConfig(path=str(file), cluster="c"), tmp_path / "home")
    assert stored.columns == {Column.CLUSTER}
    groups = np.array([2, 0, 1])
    starts = np.cumsum(stored.row_groups) - stored.row_groups
    wanted = [r for g in groups for r in range(starts[g], starts[g] + stored.row_groups[g])]
    expected = [-(2**63) if r == 3 else r % 7 for r in wanted]
    assert stored.clusters(groups).tolist() == expected
    assert stored.ids(groups)[0].tolist() == stored.table().column(Column.QUERY_ID).to_numpy()[wanted].tolist()


def written(path, vectors) -> Vectors:
    vectors.astype(np.float32).tofile(path)
    return Vectors(path, *vectors.shape)


def test_clusters_are_the_groups_of_the_vectors_and_near_ones_have_neighbouring_numbers(tmp_path):
    """Four clouds on a circle, at 0°, 20°, 180° and 200°."""
    draw = np.random.default_rng(0)
    which = draw.integers(0, 4, 400)
    angles = np.deg2rad(np.array([0, 180, 20, 200])[which] + draw.normal(0, 1, 400))
    vectors = written(tmp_path / "v.f32", np.stack([np.cos(angles), np.sin(angles)], axis=1))
    numbers = cluster(vectors, 4)
    number = {k: set(numbers[which == k].tolist()) for k in range(4)}
    assert all(len(found) == 1 for found in number.values())
    of = {k: found.pop() for k, found in number.items()}
    assert sorted(of.values()) == [0, 1, 2, 3]
    assert abs(of[0] - of[2]) == abs(of[1] - of[3]) == 1
    np.testing.assert_array_equal(cluster(vectors, 4), numbers)
    with pytest.raises(UsageError, match="500 clusters can't be made of 400 texts"):
        cluster(vectors, 500)


@pytest.mark.parametrize("side", ["query", "document"])
def test_each_row_gets_the_cluster_of_its_text(tmp_path, side):
    file = tmp_path / "pairs.jsonl"
    pairs = [("a", ["x", "y"]), ("b", ["y"]), ("a", ["z"])]
    file.write_text("\n".join(json.dumps({"query": q, "positive": p}) for q, p in pairs))
    stored = open_source(SourceConfig(path=str(file)), tmp_path / "home")
    column = Column.QUERY if side == "query" else Column.POSITIVES
    texts = write_texts(tmp_path / "texts.arrow", [stored], [column])
    numbers = np.arange(len(texts)) + 10
    write_clustered(stored, texts, side, numbers, tmp_path / "out")
    keys = {"positive": "positives", "cluster": "cluster"}
    back = open_source(SourceConfig(path=str(tmp_path / "out"), **keys), tmp_path / "home").table()
    first = ["a", "b", "a"] if side == "query" else ["x", "y", "z"]
    of = dict(zip(texts.take(np.arange(len(texts))), numbers.tolist(), strict=True))
    assert back.column(Column.CLUSTER).to_pylist() == [of[text] for text in first]
