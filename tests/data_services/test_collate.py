"""Dealing and cutting a global batch: laws over any lengths, against naive twins."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.assemble import GlobalBatch
from data_services.collate import CHUNKS_PER_BUDGET, cut, deal, from_arrow, share_batch, to_arrow
from data_services.schema import UNKNOWN, Inputs, Pairs, Ragged

lengths_of = functools.partial(st.lists, st.integers(1, 40), min_size=1)


def batch_of(query_lengths: list[int], further: list[int], negatives: list[int], rich: bool) -> GlobalBatch:
    """Texts of distinct tokens and ids; further[i] positives of query i beside its first, negatives[i] hard negatives.

    Token, id, score and prompt of a text, and weight and classes of a query, follow from its place in the batch.
    """
    rng = np.random.default_rng(len(query_lengths))
    b = len(query_lengths)
    owners = np.concatenate(
        [np.arange(b), np.repeat(np.arange(b), further[:b]), np.repeat(np.arange(b), negatives[:b])]
    )
    d = len(owners)

    def texts(lengths, first):
        return Ragged.of([np.full(n, first + i, np.int32) for i, n in enumerate(lengths)])

    columns = {}
    if rich:
        columns = {
            name: (np.arange(b) + k) * 3 for k, name in enumerate(("labels", "tasks", "languages", "modalities"))
        }
        columns |= {
            "teacher_queries": rng.random((b, 3), np.float32),
            "teacher_documents": rng.random((d, 3), np.float32),
        }
        columns["scores"] = np.arange(d).astype(np.float32) / 8
        columns["weights"] = np.arange(b).astype(np.float32) / 4
    return GlobalBatch(
        step=3,
        queries=texts(query_lengths, 0),
        documents=texts(rng.integers(1, 30, d), 1000),
        owners=owners,
        relations=np.repeat([1, -1], [b + sum(further[:b]), sum(negatives[:b])]).astype(np.int8),
        query_ids=np.arange(b),
        document_ids=1000 + np.arange(d),
        rows=np.arange(b) + 7,
        prompt_tokens=np.arange(b + d) % 5,
        **columns,
    )


def counts(most):
    return st.lists(st.integers(0, most), min_size=40, max_size=40)


batches = st.builds(batch_of, lengths_of(min_size=4, max_size=40), counts(2), counts(3), st.booleans())


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


def cheapest(lengths: list[list[int]], budget: int) -> float:
    """Naive twin of `cut`: the least cost over every way to cut the sorted lengths of all workers into classes."""
    ordered = sorted((n, rank) for rank, own in enumerate(lengths) for n in own)
    price = len(lengths) * budget / CHUNKS_PER_BUDGET

    def allowed(start, end) -> bool:
        of_class = Counter(rank for _, rank in ordered[start:end])
        return all(texts == 1 or texts * ordered[end - 1][0] <= budget for texts in of_class.values())

    @functools.cache
    def best(start: int) -> float:
        if start == len(ordered):
            return 0.0
        ends = [end for end in range(start + 1, len(ordered) + 1) if allowed(start, end)]
        return min((end - start) * ordered[end - 1][0] + price + best(end) for end in ends)

    return best(0)


workers_lengths = st.lists(lengths_of(max_size=14), min_size=1, max_size=4)


@given(workers_lengths, st.integers(10, 400))
def test_a_cut_holds_every_text_once_under_the_budget_at_the_least_cost(lengths, budget):
    arrays = [np.array(own) for own in lengths]
    cuts = cut(arrays, budget)
    assert len({len(chunks) for chunks in cuts}) == 1
    cost, before = 0.0, 1 << 30
    for chunks in zip(*cuts, strict=True):
        of_class = [own[chunk] for own, chunk in zip(arrays, chunks, strict=True)]
        assert all(len(chunk) <= 1 or len(chunk) * max(chunk) <= budget for chunk in of_class)
        together = np.concatenate(of_class)
        assert together.max() <= before, "longest first"
        cost, before = cost + len(together) * together.max() + len(arrays) * budget / CHUNKS_PER_BUDGET, together.min()
    assert cost == pytest.approx(cheapest(lengths, budget))
    for own, chunks in zip(arrays, cuts, strict=True):
        assert sorted(np.concatenate(chunks)) == list(range(len(own)))


@given(batches, st.integers(1, 4), st.integers(20, 200))
def test_shares_hold_the_batch_once_and_each_text_keeps_what_is_known_of_it(batch, world_size, budget):
    shares = share_batch(batch, world_size, budget)
    b = len(batch.queries)
    seen = Counter(int(i) for s in shares for i in s.document_ids)
    assert seen == Counter(batch.document_ids.tolist())
    assert sorted(i for s in shares for i in s.query_ids) == list(range(b))
    for share in shares:
        n = len(share.queries)
        query, document = share.query_ids, share.document_ids - 1000  # their places in the global batch
        assert (share.step, share.global_queries) == (3, b)
        assert [share.queries[i][0] for i in range(n)] == query.tolist()
        assert [share.documents[i][0] for i in range(len(share.documents))] == share.document_ids.tolist()
        assert share.owners[:n].tolist() == list(range(n))
        assert (share.relations[:n] == 1).all()
        assert (np.diff(share.relations) <= 0).all()  # positives first
        assert (query[share.owners] == batch.owners[document]).all()
        assert (share.answers == np.where(share.relations > 0, query[share.owners], UNKNOWN)).all()
        for name in Pairs.OF_QUERIES:
            same_column(getattr(share, name), getattr(batch, name), query)
        for name in ("relations", "scores"):
            same_column(getattr(share, name), getattr(batch, name), document)
        assert (share.prompt_tokens == np.concatenate([query, b + document]) % 5).all()
        assert sorted(np.concatenate(share.chunks)) == list(range(n + len(share.documents)))
        assert share.tokens <= share.padded_tokens
    assert len({len(s.chunks) for s in shares}) == 1


def with_towers(batch: GlobalBatch, towers: int) -> GlobalBatch:
    """Each item for one of so many towers, with pixels where it is for the second, by its place in the batch."""
    sides, first = {}, 0
    for name in ("queries", "documents"):
        tokens = getattr(batch, name)
        places = first + np.arange(len(tokens))
        of = (places * 7 % 5 % towers).astype(np.int8)
        rows = places % 3 * (of == 1)
        pixels = [np.full((n, 2, 3), place % 251, np.uint8) for n, place in zip(rows, places, strict=True)]
        offsets = np.cumsum([0, *map(len, pixels)])
        sides[name] = Inputs(tokens.values, tokens.offsets, {"pixels": Ragged(np.concatenate(pixels), offsets)}, of)
        first += len(tokens)
    return replace(batch, **sides)


@given(batches, st.integers(1, 4), st.integers(1, 200), st.integers(0, 3))
def test_workers_have_equally_many_chunks_of_each_tower_within_any_budget(batch, world_size, budget, towers):
    """Also a budget below the shortest text, which then is a chunk by itself."""
    shares = share_batch(with_towers(batch, towers) if towers else batch, world_size, budget)
    assert len({(len(share.chunks), str(share.chunk_towers)) for share in shares}) == 1
    for share in shares:
        lengths = np.concatenate([share.queries.lengths, share.documents.lengths])
        assert sorted(np.concatenate(share.chunks)) == list(range(len(lengths)))
        assert all(len(c) <= 1 or len(c) * lengths[c].max() <= budget for c in share.chunks)
        assert (share.chunk_towers is not None) == bool(towers)
        if towers:
            items = Ragged.concat([share.queries, share.documents])
            assert len(share.chunks) == len(share.chunk_towers)
            for chunk, tower in zip(share.chunks, share.chunk_towers, strict=True):
                assert (items.towers[chunk] == tower).all()
                for item in chunk:
                    assert (items.arrays["pixels"][item] == items_place(share, item) % 251).all()


def items_place(share, item):
    """Where in the global batch of `batch_of` an item of a share stands."""
    b = len(share.queries)
    return share.query_ids[item] if item < b else share.global_queries + share.document_ids[item - b] - 1000


def same_column(mine, whole, places):
    if whole is None:
        assert mine is None
    else:
        np.testing.assert_array_equal(mine, whole[places], strict=True)


def test_a_column_of_the_wrong_length_is_named():
    batch = batch_of([3, 4], [0, 1], [1, 1], rich=True)
    for name, rows, wanted in (("owners", 2, 5), ("labels", 5, 2), ("prompt_tokens", 5, 7)):
        with pytest.raises(
            ValueError, match=rf"{name} has {rows} rows on axis 0, {wanted} are needed \(b = 2, d = 5\)"
        ):
            replace(batch, **{name: np.zeros(rows, np.int64)})


@settings(max_examples=20)
@given(batches, st.integers(1, 4), st.integers(0, 3))
def test_a_batch_survives_its_arrow_row(batch, world_size, towers):
    batch = with_towers(batch, towers) if towers else batch
    for rank, share in enumerate(share_batch(batch, world_size, 60)):
        table = to_arrow(share, rank)
        assert table.num_rows == 1
        # a row of a larger table, as Ray may hand it over
        joined = pa.concat_tables([to_arrow(share_batch(batch, 1, 60)[0], 9), table]).combine_chunks()
        back, of_rank = from_arrow(joined.slice(1))
        assert of_rank == rank
        for field in fields(share):
            sent, received = getattr(share, field.name), getattr(back, field.name)
            if isinstance(sent, Ragged):
                same_ragged(received, sent)
            elif isinstance(sent, np.ndarray):
                np.testing.assert_array_equal(received, sent, strict=True)
            elif field.name == "chunks":
                assert [c.tolist() for c in received] == [c.tolist() for c in sent]
            else:
                assert received == sent
        assert back.query_ids.flags.writeable


def same_ragged(received, sent):
    assert type(received) is type(sent)
    np.testing.assert_array_equal(received.values, sent.values, strict=True)
    np.testing.assert_array_equal(received.offsets, sent.offsets, strict=True)
    if isinstance(sent, Inputs):
        np.testing.assert_array_equal(received.towers, sent.towers, strict=True)
        assert list(received.arrays) == list(sent.arrays)
        for name, array in sent.arrays.items():
            same_ragged(received.arrays[name], array)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_usual_batch_has_little_padding_and_workers_that_cost_the_same_at_every_chunk(world_size):
    """256 pairs as long as those of the built-in corpus, of whose documents a fifth have all of 192 tokens."""
    figures = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        quantiles = [3, 6, 9, 12, 16, 46, 192], [6, 12, 28, 55, 141, 192, 192]
        places = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], [0, 0.05, 0.25, 0.5, 0.75, 0.81, 1]
        queries, documents = (np.interp(rng.random(256), *at).astype(int) for at in zip(places, quantiles, strict=True))
        dealt = deal(queries + documents, world_size)
        lengths = [np.concatenate([queries[rows], documents[rows]]) for rows in dealt]
        cuts = cut(lengths, 8192)
        padded = np.array(
            [[len(c) * own[c].max(initial=0) for c in chunks] for own, chunks in zip(lengths, cuts, strict=True)]
        )
        padding, mean = 1 - sum(own.sum() for own in lengths) / padded.sum(), padded.sum(1).mean()
        figures.append((padding, padded.sum(1).max() / mean, padded.max(0).sum() / mean, len(cuts[0])))
    padding, costliest, waiting, chunks = np.mean(figures, axis=0)
    assert padding < 0.05
    assert costliest < 1.05
    assert waiting < 1.3, "of workers that wait for each other at every chunk"
    assert chunks < 32
