"""The feed without Ray, against the records themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_services.assemble import SOURCE_SHIFT
from data_services.collate import from_arrow, share_batch, to_arrow
from data_services.faults import BadRow, BadRows
from data_services.order import Plan, RowGroups, SourceShape
from data_services.schema import UNKNOWN, Batch, Column, RunError, text_id
from data_services.stream import BatchReader, DataConfig, LocalStream, plan_of
from tests.data_services.feeds import BUDGET, A, Characters, FakeSource, Refuses, local, reader, record


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


@settings(max_examples=40)
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
            missing = 1.0 if name in (Column.WEIGHT, Column.FREQUENCY) else UNKNOWN
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
    Column.FREQUENCY: "frequencies",
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
