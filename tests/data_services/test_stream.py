"""The feed: without Ray as the plain twin, and Ray Data's against it."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_services.collate import SOURCE_SHIFT, to_arrow
from data_services.order import Plan, SourceShape
from data_services.schema import Batch, Column, Ragged, RunError, text_id
from data_services.stream import (
    BatchReader,
    DataConfig,
    LocalStream,
    Units,
    plan_of,
    ray_dataset,
    worker_batches,
)

BUDGET = 64


@dataclasses.dataclass(frozen=True)
class FakeSource:
    """`rows` records with two positives and three negatives, whose texts name source and row."""

    name: str
    rows: int
    broken: int = -1  # a row that can't be read

    def read(self, rows: np.ndarray) -> pa.Table:
        if self.broken in rows:
            raise RunError(f"source {self.name}, row {self.broken}: the file is gone")
        records = []
        for row in rows:
            query = f"{self.name} query {row} " + "q" * (row % 7)
            positives = [f"{self.name} document {row} {i}" + "d" * (row % 11) for i in range(2)]
            negatives = [f"{self.name} negative {row} {i}" for i in range(row % 4)]
            records.append(
                {
                    Column.ID: f"{row}",
                    Column.QUERY: query,
                    Column.POSITIVES: positives,
                    Column.NEGATIVES: negatives,
                    Column.QUERY_ID: text_id(query),
                    Column.POSITIVE_IDS: [text_id(p) for p in positives],
                    Column.NEGATIVE_IDS: [text_id(n) for n in negatives],
                }
            )
        return pa.Table.from_pylist(records, schema=SCHEMA)


SCHEMA = pa.schema(
    [
        (Column.ID, pa.string()),
        (Column.QUERY, pa.string()),
        (Column.POSITIVES, pa.list_(pa.string())),
        (Column.NEGATIVES, pa.list_(pa.string())),
        (Column.QUERY_ID, pa.int64()),
        (Column.POSITIVE_IDS, pa.list_(pa.int64())),
        (Column.NEGATIVE_IDS, pa.list_(pa.int64())),
    ]
)


def characters(texts: list[str], field: str) -> Ragged:
    return Ragged.of([[ord(c) for c in field[:1] + text] for text in texts])


def reader(batch: int = 10, steps: int = 24, broken: int = -1) -> BatchReader:
    shapes = [SourceShape("a", 60, (20, 20, 20), "fa"), SourceShape("b", 45, (15, 15, 15), "fb")]
    plan = Plan(5, batch, shapes, steps=steps, homogeneous=False, window_groups=2)
    return BatchReader(plan, [FakeSource("a", 60, broken), FakeSource("b", 45)], characters, negatives=2)


def flat(batch: Batch) -> list[list[int]]:
    """Everything in a batch, for comparison."""
    arrays = [batch.queries.values, batch.queries.offsets, batch.documents.values, batch.documents.offsets]
    arrays += [batch.query_ids, batch.document_ids, batch.rows, *batch.chunks]
    return [[batch.step], [batch.global_queries], *(a.tolist() for a in arrays)]


def local(world_size: int, rank: int, start: int = 0, steps: int = 24) -> list[list[list[int]]]:
    return [flat(b) for b in LocalStream(reader(steps=steps), world_size, rank, BUDGET)(start)]


# Without Ray


def test_a_batch_holds_the_texts_of_the_planned_rows_in_order():
    read = reader()
    names = [s.name for s in read.plan.sources]
    for t in range(read.plan.steps):
        batch = read(t)
        texts = ["".join(map(chr, batch.queries[i])) for i in range(len(batch.queries))]
        expected = [f"q{names[source]} query {row} " + "q" * (row % 7) for source, row in read.plan.rows(t)]
        assert texts == expected
        assert batch.rows.tolist() == [int(s) << SOURCE_SHIFT | int(r) for s, r in read.plan.rows(t)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_together_hold_the_global_batch_whatever_their_number(world_size):
    read = reader()
    streams = [LocalStream(read, world_size, rank, BUDGET)(0) for rank in range(world_size)]
    for t, shares in enumerate(zip(*streams, strict=True)):
        whole = read(t)
        assert sorted(np.concatenate([s.rows for s in shares])) == sorted(whole.rows)
        assert sorted(np.concatenate([s.document_ids for s in shares])) == sorted(whole.document_ids)
        assert {s.global_queries for s in shares} == {len(whole.queries)}


def test_a_stream_from_step_t_is_the_tail_of_the_stream_from_the_start():
    assert local(2, 1)[17:] == local(2, 1, start=17)


def test_units_cover_every_step_once_and_start_small():
    for start, stop, batch in [
        (0, 1, 8),
        (0, 2, 8),
        (3, 9, 8),
        (0, 1000, 256),
        (7, 100_000, 256),
        (0, 500, 9000),
    ]:
        units = Units.of(start, stop, batch)
        steps = [t for u in range(len(units)) for t in units.steps(u)]
        assert steps == list(range(start, stop))
        assert all(units.steps(u) for u in range(len(units)))
        assert len(units.steps(0)) == 1
        assert len(units) < 1100
    assert len(Units.of(5, 5, 8)) == 0


def test_data_config_wants_exactly_one_length():
    source = {"path": "x.jsonl"}
    with pytest.raises(ValidationError, match="exactly one of"):
        DataConfig(sources=[source])
    with pytest.raises(ValidationError, match="exactly one of"):
        DataConfig(sources=[source], epochs=1, steps=2)
    with pytest.raises(ValidationError):
        DataConfig(sources=[], epochs=1)


def test_two_sources_of_one_name_are_told_apart_by_their_content():
    @dataclasses.dataclass
    class Stored:
        name: str
        fingerprint: str
        rows: int = 20
        row_groups: tuple[int, ...] = (20,)

    config = DataConfig(sources=[{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}], epochs=1, batch=4)
    plan = plan_of(config, [Stored("x", "f1"), Stored("x", "f2")], seed=0)
    assert [s.name for s in plan.sources] == ["x", "x#2"]
    assert plan.steps == 10


# With Ray


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield ray
    ray.shutdown()


def consume(shard, rank: int, start: int, stop: int, pause_s: float = 0.0) -> list[list[list[int]]]:
    got = []
    for batch in worker_batches(shard, rank, start, stop):
        got.append(flat(batch))
        time.sleep(pause_s)
    return got


def fed(ray, dataset, world_size: int, start: int, stop: int, pause_s: float = 0.0):
    """What each worker receives; rank 0 is slower by `pause_s` a batch."""
    shards = dataset.streaming_split(world_size, equal=False)
    worker = ray.remote(num_cpus=0)(consume)
    return ray.get([worker.remote(s, r, start, stop, 0.0 if r else pause_s) for r, s in enumerate(shards)])


def test_ray_feeds_one_worker_what_the_local_stream_does_from_any_step(cluster):
    dataset = ray_dataset(reader(), 1, 9, BUDGET)
    assert fed(cluster, dataset, 1, 9, 24) == [local(1, 0, start=9)]


def test_ray_feeds_each_worker_its_own_rows_though_one_is_slow(cluster):
    dataset = ray_dataset(reader(steps=30), 2, 0, BUDGET)
    assert fed(cluster, dataset, 2, 0, 30, pause_s=0.1) == [local(2, r, steps=30) for r in range(2)]


def test_a_row_that_cannot_be_read_ends_the_feed_with_its_sentence(cluster):
    dataset = ray_dataset(reader(broken=7), 1, 0, BUDGET)
    (shard,) = dataset.streaming_split(1, equal=False)
    with pytest.raises(RunError) as error:
        list(worker_batches(shard, 0, 0, 24))
    assert str(error.value) == "the data feed failed: source a, row 7: the file is gone"


class Rows:
    """What a split hands a worker, without Ray."""

    def __init__(self, batches: list[tuple[Batch, int]]) -> None:
        self._batches = batches

    def iter_batches(self, **_):
        return (to_arrow(batch, rank) for batch, rank in self._batches)


def test_a_worker_refuses_rows_of_another_worker_or_step_and_a_feed_that_ends_early():
    mine, other = ([*LocalStream(reader(steps=3), 2, rank, BUDGET)(0)] for rank in range(2))
    assert [b.step for b in worker_batches(Rows([(b, 0) for b in mine]), 0, 0, 3)] == [0, 1, 2]
    with pytest.raises(RunError, match="gave worker 0 the rows of worker 1, step 0"):
        list(worker_batches(Rows([(b, 1) for b in other]), 0, 0, 3))
    with pytest.raises(RunError, match="rows of worker 0, step 2, where step 1 was due"):
        list(worker_batches(Rows([(mine[0], 0), (mine[2], 0)]), 0, 0, 3))
    with pytest.raises(RunError, match="ended before step 2"):
        list(worker_batches(Rows([(b, 0) for b in mine[:2]]), 0, 0, 3))
