"""Dealing and cutting a global batch: laws over any lengths, against naive twins."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.collate import (
    CHUNKS_PER_BUDGET,
    GlobalBatch,
    choose_positive,
    cut,
    deal,
    from_arrow,
    share_batch,
    split,
    to_arrow,
    tokenise,
)
from data_services.schema import Column, Ragged

lengths_of = functools.partial(st.lists, st.integers(1, 40), min_size=1)


def batch_of(query_lengths: list[int], negatives: list[int]) -> GlobalBatch:
    """Texts of distinct tokens and ids; `negatives[i]` hard negatives of query i."""
    rng = np.random.default_rng(len(query_lengths))
    b = len(query_lengths)
    owners = np.repeat(np.arange(b), negatives[:b])
    document_lengths = rng.integers(1, 30, b + len(owners))

    def texts(lengths, first):
        return Ragged.of([np.full(n, first + i, np.int32) for i, n in enumerate(lengths)])

    return GlobalBatch(
        step=3,
        queries=texts(query_lengths, 0),
        documents=texts(document_lengths, 1000),
        owners=owners,
        query_ids=np.arange(b),
        document_ids=1000 + np.arange(len(document_lengths)),
        rows=np.arange(b) + 7,
    )


batches = st.builds(
    batch_of, lengths_of(min_size=4, max_size=40), st.lists(st.integers(0, 3), min_size=40, max_size=40)
)


@given(lengths_of(max_size=60), st.integers(1, 8))
def test_a_deal_gives_every_row_once_and_every_worker_one_within_the_longest_row(costs, world_size):
    costs = np.array(costs)
    if len(costs) < world_size:
        with pytest.raises(ValueError, match="can't be dealt"):
            deal(costs, world_size)
        return
    shares = deal(costs, world_size)
    assert sorted(np.concatenate(shares)) == list(range(len(costs)))
    assert all(len(share) for share in shares)
    loads = [costs[share].sum() for share in shares]
    assert max(loads) - min(loads) <= costs.max()


def test_a_deal_of_a_usual_batch_is_balanced_to_a_percent():
    costs = np.random.default_rng(0).gamma(1.5, 60, 256).astype(int) + 10
    for world_size in (2, 3, 8):
        loads = np.array([costs[share].sum() for share in deal(costs, world_size)])
        assert loads.max() / loads.mean() < 1.01


def cheapest(lengths: list[int], budget: int) -> float:
    """Naive twin of `cut`: the least cost over every way to cut the sorted lengths."""
    ordered, price = sorted(lengths), budget / CHUNKS_PER_BUDGET

    @functools.cache
    def best(start: int) -> float:
        if start == len(ordered):
            return 0.0
        ends = range(start + 1, len(ordered) + 1)
        allowed = [e for e in ends if e == start + 1 or (e - start) * ordered[e - 1] <= budget]
        return min((e - start) * ordered[e - 1] + price + best(e) for e in allowed)

    return best(0)


@settings(deadline=None)
@given(lengths_of(max_size=40), st.integers(10, 400))
def test_a_cut_holds_every_text_once_under_the_budget_at_the_least_cost(lengths, budget):
    chunks, array = cut(np.array(lengths), budget), np.array(lengths)
    assert sorted(np.concatenate(chunks)) == list(range(len(lengths)))
    padded = [len(c) * array[c].max() for c in chunks]
    assert all(p <= budget or len(c) == 1 for p, c in zip(padded, chunks, strict=True))
    assert sum(padded) + len(chunks) * budget / CHUNKS_PER_BUDGET == pytest.approx(cheapest(lengths, budget))
    longest = [array[c].max() for c in chunks]
    assert longest == sorted(longest, reverse=True)


@given(lengths_of(max_size=20), st.integers(0, 30))
def test_a_split_makes_the_count_without_losing_a_text_or_padding_more(lengths, extra):
    array = np.array(lengths)
    chunks = cut(array, 100)
    more = split(chunks, array, len(chunks) + extra)
    assert len(more) == len(chunks) + extra
    assert sorted(np.concatenate(more)) == list(range(len(lengths)))

    def padded(cs):
        return sum(len(c) * array[c].max() for c in cs if len(c))

    assert padded(more) <= padded(chunks)
    filled = [len(c) > 0 for c in more]
    assert filled == sorted(filled, reverse=True)


@settings(deadline=None)
@given(batches, st.integers(1, 4), st.integers(20, 200))
def test_shares_hold_the_batch_once_with_positives_first_and_negatives_beside_their_query(batch, world_size, budget):
    shares = share_batch(batch, world_size, budget)
    b = len(batch.queries)
    seen = Counter(int(i) for s in shares for i in s.document_ids)
    assert seen == Counter(batch.document_ids.tolist())
    assert sorted(i for s in shares for i in s.query_ids) == list(range(b))
    owner = dict(zip(batch.document_ids[b:].tolist(), batch.owners.tolist(), strict=True))
    for share in shares:
        n = len(share.queries)
        assert (share.step, share.global_queries) == (3, b)
        assert (share.document_ids[:n] == 1000 + share.query_ids).all()
        assert all(owner[int(i)] in share.query_ids for i in share.document_ids[n:])
        assert [share.queries[i][0] for i in range(n)] == share.query_ids.tolist()
        assert [share.documents[i][0] for i in range(len(share.documents))] == share.document_ids.tolist()
        assert (share.rows == share.query_ids + 7).all()
        assert sorted(np.concatenate(share.chunks)) == list(range(n + len(share.documents)))
        assert share.tokens <= share.padded_tokens
    assert len({len(s.chunks) for s in shares}) == 1


@settings(deadline=None, max_examples=20)
@given(batches, st.integers(1, 3))
def test_a_batch_survives_its_arrow_row(batch, world_size):
    for rank, share in enumerate(share_batch(batch, world_size, 60)):
        table = to_arrow(share, rank)
        assert table.num_rows == 1
        # a row of a larger table, as Ray may hand it over
        joined = pa.concat_tables([to_arrow(share_batch(batch, 1, 60)[0], 9), table]).combine_chunks()
        back, of_rank = from_arrow(joined.slice(1))
        assert of_rank == rank
        assert (back.step, back.global_queries) == (share.step, share.global_queries)
        for name in ("query_ids", "document_ids", "rows"):
            np.testing.assert_array_equal(getattr(back, name), getattr(share, name))
        for name in ("queries", "documents"):
            np.testing.assert_array_equal(getattr(back, name).values, getattr(share, name).values)
            np.testing.assert_array_equal(getattr(back, name).offsets, getattr(share, name).offsets)
            assert getattr(back, name).values.dtype == np.int32
        assert [c.tolist() for c in back.chunks] == [c.tolist() for c in share.chunks]
        assert back.query_ids.flags.writeable


def test_padding_of_a_usual_batch_stays_small():
    rng = np.random.default_rng(1)
    lengths = np.concatenate([rng.geometric(1 / 17, 128).clip(3, 192), rng.gamma(1.5, 60, 128).clip(5, 192)])
    lengths = lengths.astype(int)
    chunks = cut(lengths, 8192)
    padded = sum(len(c) * lengths[c].max() for c in chunks)
    assert 1 - lengths.sum() / padded < 0.07
    assert len(chunks) < 20


def test_a_row_shows_each_of_its_positives_in_turn_and_the_same_one_on_every_try():
    rows, counts = np.arange(4000), np.full(4000, 4)
    chosen = choose_positive(counts, rows, step=5, seed=1)
    assert (np.bincount(chosen, minlength=4) > 900).all()
    np.testing.assert_array_equal(chosen, choose_positive(counts, rows, step=5, seed=1))
    for other in ({"step": 6, "seed": 1}, {"step": 5, "seed": 2}):
        assert np.mean(chosen == choose_positive(counts, rows, **other)) < 0.3
    # alone or among others, a row gets the same
    np.testing.assert_array_equal(chosen[17:19], choose_positive(counts[:2], rows[17:19], step=5, seed=1))


def test_tokenise_takes_the_chosen_positive_and_the_first_negatives_with_their_ids():
    table = pa.table(
        {
            Column.QUERY: ["q0", "q1", "q2"],
            Column.POSITIVES: [["p0"], ["p1", "P1"], ["p2"]],
            Column.NEGATIVES: [["n0", "n1", "n2"], [], ["n3"]],
            Column.QUERY_ID: [10, 11, 12],
            Column.POSITIVE_IDS: [[20], [21, 121], [22]],
            Column.NEGATIVE_IDS: [[30, 31, 32], [], [33]],
        }
    )

    def tokenize(texts, field):
        return Ragged.of([[ord(c) for c in field[0] + t] for t in texts])

    batch = tokenise(table, np.array([5, 6, 7]), tokenize, step=2, seed=0, negatives=2)
    texts = ["".join(map(chr, batch.documents[i])) for i in range(len(batch.documents))]
    assert texts in (
        ["dp0", "dp1", "dp2", "dn0", "dn1", "dn3"],
        ["dp0", "dP1", "dp2", "dn0", "dn1", "dn3"],
    )
    assert batch.document_ids.tolist() == [20, 121 if "dP1" in texts else 21, 22, 30, 31, 33]
    assert batch.owners.tolist() == [0, 0, 2]
    assert batch.query_ids.tolist() == [10, 11, 12]
    none = tokenise(table, np.array([5, 6, 7]), tokenize, step=2, seed=0, negatives=0)
    assert len(none.documents) == 3
    assert none.owners.shape == (0,)
