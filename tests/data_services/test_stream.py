"""The feed: without Ray as the plain twin, and Ray Data's against it."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_services.assemble import SOURCE_SHIFT
from data_services.collate import from_arrow, share_batch, to_arrow
from data_services.faults import BadRow, BadRows
from data_services.order import Plan, RowGroups, SourceShape
from data_services.ray_feed import Units, ray_dataset, worker_batches
from data_services.schema import UNKNOWN, Batch, Column, Ragged, RunError, Undecodable, UsageError, text_id
from data_services.sources import SourceConfig
from data_services.store import SCHEMA
from data_services.stream import (
    BatchReader,
    DataConfig,
    LocalStream,
    plan_of,
)

BUDGET = 64


def record(name: str, row: int, columns: frozenset[str]) -> dict[str, object]:
    """What source `name` holds at `row`: one to three positives, none to three negatives, whose texts name all that."""
    query = f"{name} query {row} " + "q" * (row % 7)
    positives = [f"{name} document {row} {i}" + "d" * (row % 11) for i in range(1 + row % 3)]
    negatives = [f"{name} negative {row} {i}" for i in range(row % 4)]
    full = {
        Column.ID: f"{row}",
        Column.QUERY: query,
        Column.POSITIVES: positives,
        Column.NEGATIVES: negatives,
        Column.QUERY_ID: text_id(query),
        Column.POSITIVE_IDS: [text_id(p) for p in positives],
        Column.NEGATIVE_IDS: [text_id(n) for n in negatives],
        Column.POSITIVE_SCORES: [row + i / 8 for i in range(len(positives))],
        Column.NEGATIVE_SCORES: [-row - i / 8 for i in range(len(negatives))],
        Column.WEIGHT: row / 4,
        Column.LABEL: row % 5,
        Column.TASK: row % 2,
        Column.LANGUAGE: UNKNOWN if row % 3 else 7,
        Column.MODALITY: 1,
    }
    return {key: None if key in Column.OPTIONAL and key not in columns else value for key, value in full.items()}


@dataclasses.dataclass(frozen=True)
class FakeSource:
    name: str
    rows: int
    columns: frozenset[str] = frozenset()
    broken: int = -1  # a row that can't be read
    deadly: tuple[int, Path] | None = None  # a row whose first reading kills the process, and where that is noted

    def read(self, rows: np.ndarray) -> pa.Table:
        if self.broken in rows:
            raise RunError(f"source {self.name}, row {self.broken}: the file is gone")
        if self.deadly is not None and self.deadly[0] in rows and not self.deadly[1].exists():
            self.deadly[1].touch()
            os._exit(1)
        return pa.Table.from_pylist([record(self.name, int(row), self.columns) for row in rows], schema=SCHEMA)


class Refuses:
    """Characters, but for texts with certain words in them."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __call__(self, texts, field, tasks=None):
        for text in texts:
            if any(word in text for word in self.words):
                raise Undecodable(f"{text[:20]!r} isn't text")
        return Characters()(texts, field, tasks)

    def prompt_tokens(self, field, task=None):
        return Characters().prompt_tokens(field, task)


class Characters:
    """A text's tokens are its characters after the field's first letter, which is its prompt; two of it in task 1."""

    def __call__(self, texts, field, tasks=None):
        prompts = [field[:1] * self.prompt_tokens(field, task) for task in tasks or [None] * len(texts)]
        return Ragged.of([[ord(c) for c in prompt + text] for prompt, text in zip(prompts, texts, strict=True)])

    def prompt_tokens(self, field, task=None):
        return 2 if task == 1 else 1


A, B = frozenset({Column.POSITIVE_SCORES, Column.LABEL, Column.TASK}), frozenset({Column.LABEL, Column.WEIGHT})


def reader(batch: int = 10, steps: int = 24, broken: int = -1, columns=(A, B), positives: int = 2) -> BatchReader:
    shapes = [SourceShape("a", 60, RowGroups.of([20] * 3), "fa"), SourceShape("b", 45, RowGroups.of([15] * 3), "fb")]
    plan = Plan(5, batch, shapes, steps=steps, homogeneous=False, window_groups=2)
    sources = [FakeSource("a", 60, columns[0], broken), FakeSource("b", 45, columns[1])]
    return BatchReader(plan, sources, Characters(), negatives=2, positives=positives)


def flat(batch: Batch) -> dict[str, object]:
    """Everything in a batch, for comparison."""

    def plain(value):
        if isinstance(value, Ragged):
            return plain(value.values), plain(value.offsets)
        if isinstance(value, tuple):
            return [plain(chunk) for chunk in value]
        return (str(value.dtype), value.tobytes()) if isinstance(value, np.ndarray) else value

    return {field.name: plain(getattr(batch, field.name)) for field in dataclasses.fields(batch)}


def local(world_size: int, rank: int, start: int = 0, steps: int = 24) -> list[dict[str, object]]:
    return [flat(b) for b in LocalStream(reader(steps=steps), world_size, rank, BUDGET)(start)]


# Without Ray


def test_a_batch_holds_the_texts_of_the_planned_rows_in_order():
    read = reader()
    names = [s.name for s in read.plan.sources]
    for t in range(read.plan.steps):
        batch = read(t)
        texts = ["".join(map(chr, batch.queries[i])) for i in range(len(batch.queries))]
        expected = [f"{names[source]} query {row} " + "q" * (row % 7) for source, row in read.plan.rows(t)]
        assert [text.lstrip("q") for text in texts] == expected
        assert batch.rows.tolist() == [int(s) << SOURCE_SHIFT | int(r) for s, r in read.plan.rows(t)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_workers_together_hold_the_global_batch_whatever_their_number(world_size):
    read = reader(steps=6)
    streams = [LocalStream(read, world_size, rank, BUDGET)(0) for rank in range(world_size)]
    for t, shares in enumerate(zip(*streams, strict=True)):
        whole = read(t)
        assert sorted(np.concatenate([s.rows for s in shares])) == sorted(whole.rows)
        assert sorted(np.concatenate([s.document_ids for s in shares])) == sorted(whole.document_ids)
        assert {s.global_queries for s in shares} == {len(whole.queries)}


columns_of = st.frozensets(st.sampled_from(Column.OPTIONAL))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), columns_of, columns_of, st.integers(1, 3), st.integers(0, 23), st.booleans())
def test_each_text_reaches_its_worker_with_what_its_source_says_of_it(world_size, a, b, positives, t, sent):
    """Every worker's share against the records themselves, one document at a time; through Arrow or not."""
    read = reader(columns=(a, b), positives=positives)
    shares = share_batch(read(t), world_size, BUDGET)
    if sent:
        shares = [from_arrow(to_arrow(share, rank))[0] for rank, share in enumerate(shares)]
    assert sorted(np.concatenate([s.rows for s in shares])) == sorted(read(t).rows)
    for share in shares:
        records = []
        for key in share.rows.tolist():
            source = read.sources[key >> SOURCE_SHIFT]
            records.append(record(source.name, key & (1 << SOURCE_SHIFT) - 1, source.columns))
            if Column.TASK not in source.columns:
                records[-1][Column.TASK] = text_id(source.name)
        for i, its in enumerate(records):
            check_query(share, i, its, a | b)
            check_documents(share, i, its, a | b, positives)


def check_query(share: Batch, i: int, its, columns) -> None:
    prompt = share.prompt_tokens[i]
    assert prompt == (2 if its[Column.TASK] == 1 else 1)
    assert text_of(share.queries[i]) == "q" * prompt + its[Column.QUERY]
    assert share.query_ids[i] == its[Column.QUERY_ID]
    for name, plural in PLURAL.items():
        column = getattr(share, plural)
        if name not in columns | {Column.TASK}:
            assert column is None
        else:
            missing = 1.0 if name == Column.WEIGHT else UNKNOWN
            assert column[i] == (missing if its[name] is None else its[name])


def check_documents(share: Batch, i: int, its, columns, positives: int) -> None:
    mine = np.flatnonzero(share.owners == i)
    prompt = 2 if its[Column.TASK] == 1 else 1
    b = len(share.queries)
    assert mine[0] == i
    seen: dict[int, list[str]] = {1: [], -1: []}
    for j in mine:
        text = text_of(share.documents[j])[prompt:]
        relation = int(share.relations[j])
        seen[relation].append(text)
        answers = relation == 1
        texts, ids, scores = POSITIVE if answers else NEGATIVE
        place = its[texts].index(text)
        assert share.document_ids[j] == its[ids][place]
        assert share.answers[j] == (its[Column.QUERY_ID] if answers else UNKNOWN)
        assert share.prompt_tokens[b + j] == prompt
        if not columns & {Column.POSITIVE_SCORES, Column.NEGATIVE_SCORES}:
            assert share.scores is None
        elif its[scores] is None:
            assert np.isnan(share.scores[j])
        else:
            assert share.scores[j] == its[scores][place]
    assert len(set(seen[1])) == len(seen[1]) == min(positives, len(its[Column.POSITIVES]))
    assert seen[-1] == its[Column.NEGATIVES][:2]


POSITIVE = (Column.POSITIVES, Column.POSITIVE_IDS, Column.POSITIVE_SCORES)
NEGATIVE = (Column.NEGATIVES, Column.NEGATIVE_IDS, Column.NEGATIVE_SCORES)
PLURAL = {
    Column.WEIGHT: "weights",
    Column.LABEL: "labels",
    Column.TASK: "tasks",
    Column.LANGUAGE: "languages",
    Column.MODALITY: "modalities",
}


def text_of(tokens: np.ndarray) -> str:
    return "".join(map(chr, tokens))


def test_a_column_is_there_in_every_batch_or_in_none():
    """Also in a batch from a source that lacks it: what a queue keeps of its rows doesn't change on the way."""
    shapes = [SourceShape(name, 40, RowGroups.of([20, 20]), name) for name in ("a", "b")]
    plan = Plan(5, 10, shapes, steps=8, homogeneous=True, window_groups=2)
    read = BatchReader(plan, [FakeSource("a", 40, A), FakeSource("b", 40)], Characters())
    batches = [read(t) for t in range(8)]
    assert {int(batch.rows[0]) >> SOURCE_SHIFT for batch in batches} == {0, 1}
    for batch in batches:
        of_b = batch.rows[0] >> SOURCE_SHIFT == 1
        assert (batch.labels == UNKNOWN).all() == of_b
        assert np.isnan(batch.scores).all() == of_b
        assert batch.weights is batch.languages is batch.modalities is None
        assert (batch.tasks == text_id("b")).all() == of_b


def test_a_stream_from_step_t_is_the_tail_of_the_stream_from_the_start():
    assert local(2, 1)[17:] == local(2, 1, start=17)


def test_rows_that_cannot_be_decoded_shorten_their_batch_and_leave_every_other_as_it_is(tmp_path):
    whole = reader()
    refused = {("a", 7), ("b", 8), ("b", 9)}
    tokenize = Refuses("a document 7 ", "b query 8 ", "b negative 9 0")
    short = dataclasses.replace(whole, tokenize=tokenize, bad_rows=BadRows(tmp_path / "quarantine"))
    names = [source.name for source in whole.sources]
    missed = set()
    for t in range(24):
        for _ in range(2):  # a task that is done over
            batch = short(t)
        expected = [key for key in whole(t).rows.tolist() if (names[key >> 40], key & (1 << 40) - 1) not in refused]
        assert batch.rows.tolist() == expected
        missed |= set(whole(t).rows.tolist()) - set(expected)
        texts = {text_of(batch.queries[i]) for i in range(len(batch.queries))}
        assert texts <= {text_of(whole(t).queries[i]) for i in range(len(whole(t).queries))}
        shares = share_batch(batch, 2, BUDGET)
        assert {share.global_queries for share in shares} == {len(expected)}
    bad = short.bad_rows.read()
    assert [(x.source, x.row) for x in bad] == sorted(refused)
    assert len(missed) == 3
    assert bad[1] == BadRow("b", 8, "8", bad[1].step, "'b query 8 q' isn't text")
    assert 8 in whole.plan.rows(bad[1].step)[:, 1]


def test_a_batch_without_a_row_that_can_be_decoded_ends_the_run_with_a_sentence(tmp_path):
    read = dataclasses.replace(reader(), tokenize=Refuses("query"), bad_rows=BadRows(tmp_path))
    with pytest.raises(RunError, match=f"none of the 10 rows of step 3 can be decoded; see {tmp_path}"):
        read(3)


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
