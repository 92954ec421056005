"""Ray Data's feed against the plain one."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

from data_services.collate import to_arrow
from data_services.ray_feed import Units, ray_dataset, worker_batches
from data_services.schema import Batch, RunError, UsageError
from data_services.sources import SourceConfig
from data_services.stream import LocalStream
from tests.data_services.feeds import BUDGET, flat, local, reader


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


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield ray
    ray.shutdown()


def test_the_parts_of_a_source_are_converted_on_the_cluster(cluster, tmp_path, monkeypatch):
    """The rest of conversion is tested without Ray, in test_conversion."""
    from data_services import parallel
    from data_services.readers import formats
    from data_services.sources import open_source

    for i in range(3):
        lines = [json.dumps({"query": f"q{i} {row}", "positive": "p"}) + "\n" for row in range(100)]
        (tmp_path / f"{i}.jsonl").write_text("".join(lines))
    config = SourceConfig(path=str(tmp_path / "*.jsonl"))
    alone = open_source(config, tmp_path / "alone")
    monkeypatch.setattr(formats, "PART_BYTES", 3_000)
    monkeypatch.setattr(parallel, "_in_turn", None)  # nor in this process
    assert open_source(config, tmp_path / "together").table().equals(alone.table())
    (tmp_path / "3.jsonl").write_text("{\n")
    (tmp_path / "4.parquet").write_text("x")
    with pytest.raises(UsageError, match=r"4\.parquet is not a whole Parquet file: [^\n]*$"):
        open_source(SourceConfig(path=[config.path, str(tmp_path / "*.parquet")]), tmp_path / "together")


def consume(shard, rank: int, start: int, stop: int, pause_s: float = 0.0) -> list[dict[str, object]]:
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


def test_a_reader_that_dies_is_replaced_without_loss_or_doubling(cluster, tmp_path):
    read = reader()
    died = tmp_path / "died"
    sources = [dataclasses.replace(read.sources[0], deadly=(7, died)), read.sources[1]]
    dataset = ray_dataset(dataclasses.replace(read, sources=sources), 2, 0, BUDGET)
    assert fed(cluster, dataset, 2, 0, 24) == [local(2, r) for r in range(2)]
    assert died.exists()


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
