"""No two rows of a global batch share a query or a positive, where their windows can help it."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.order import Carried, EpochOrder, Plan, RowGroups, SourceShape, Stage, duplicate_rows
from data_services.order.duplicates import _coprime, arranged


@dataclass(frozen=True)
class Table:
    """The id columns of a source in memory."""

    sizes: tuple[int, ...]
    queries: tuple[int, ...]
    positives: tuple[tuple[int, ...], ...]
    cluster: tuple[int, ...] = ()

    def rows_of(self, groups):
        starts = np.cumsum(self.sizes) - self.sizes
        return [r for g in groups for r in range(starts[g], starts[g] + self.sizes[g])]

    def clusters(self, groups):
        return np.array([self.cluster[r] for r in self.rows_of(groups)], np.int64)

    def ids(self, groups):
        rows = self.rows_of(groups)
        lists = [self.positives[r] for r in rows]
        flat = np.array(list(itertools.chain(*lists)), np.int64)
        return np.array([self.queries[r] for r in rows], np.int64), flat, np.array([len(x) for x in lists])

    def shape(self, name: str = "a") -> SourceShape:
        return SourceShape(name, len(self.queries), RowGroups.of(self.sizes), f"content of {name}")

    def shared(self, a: int, b: int) -> bool:
        """Whether two rows may not meet: the twin of everything here."""
        return self.queries[a] == self.queries[b] or bool(set(self.positives[a]) & set(self.positives[b]))

    def repeats(self, rows) -> int:
        """Rows that share something with one before them."""
        return sum(any(self.shared(rows[j], row) for j in range(i)) for i, row in enumerate(rows))


def table_of(queries, documents, group: int) -> Table:
    n = len(queries)
    sizes = (group,) * (n // group) + ((n % group,) if n % group else ())
    return Table(sizes, tuple(queries), tuple((d,) for d in documents))


@st.composite
def tables(draw, groups: int = 4, kinds: int = 40):
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=groups))
    n, some = sum(sizes), st.integers(0, draw(st.integers(1, kinds)))
    positives = st.lists(st.lists(some, min_size=1, max_size=3).map(tuple), min_size=n, max_size=n)
    queries = draw(st.lists(some, min_size=n, max_size=n))
    return Table(tuple(sizes), tuple(queries), tuple(draw(positives)))


def words_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


def near(table: Table, order, spacing: int, before=(), after=()) -> int:
    """Pairs of rows that share something and stand nearer than `spacing`, one of them at least in the window."""
    rows = [*before, *order, *after]
    inside = range(len(before), len(before) + len(order))
    return sum(
        table.shared(rows[i], rows[j])
        for i in range(len(rows))
        for j in range(i + 1, min(i + spacing, len(rows)))
        if i in inside or j in inside
    )


@settings(max_examples=40)
@given(tables(), st.integers(1, 6), st.integers(0, 99))
def test_arranging_is_a_permutation_and_what_is_left_no_exchange_of_two_rows_mends(table, spacing, seed):
    n = len(table.queries)
    order = arranged(words_of(n, seed), Carried.of(*table.ids(range(len(table.sizes)))), spacing)
    assert sorted(order.tolist()) == list(range(n))
    # What a row carries, but for ids with so many rows that they can't all be kept apart.
    all_of = [{("q", table.queries[row]), *(("d", d) for d in table.positives[row])} for row in range(n)]
    times = Counter(itertools.chain(*all_of))
    carries = [{x for x in ids if (times[x] - 1) * spacing < n} for ids in all_of]

    def clashes(rows, at):
        around = range(max(at - spacing + 1, 0), min(at + spacing, n))
        return any(carries[rows[at]] & carries[rows[i]] for i in around if i != at)

    rows = order.tolist()
    for at in (i for i in range(n) if clashes(rows, i)):
        for to in set(range(n)) - {at}:
            tried = rows.copy()
            tried[at], tried[to] = tried[to], tried[at]
            # Of two that clash, the later is the one to move.
            assert clashes(tried, at) or clashes(tried, to) or not _later(rows, at, carries, spacing)


def _later(rows, at, carries, spacing) -> bool:
    """Whether the row at a place shares an id with one less than `spacing` before it."""
    return any(carries[rows[at]] & carries[rows[i]] for i in range(max(at - spacing + 1, 0), at))


@pytest.mark.parametrize(
    ("each", "spacing"),
    [(2, 256), (5, 256), (13, 256), (1, 256)],
)
def test_what_can_be_kept_apart_is_kept_apart(each, spacing):
    """4,096 rows make 16 batches: up to 13 rows of a document, in any order, never meet."""
    n = 4096
    table = table_of(range(n), np.random.default_rng(each).permutation(n) // each, 64)
    order = arranged(words_of(n, 1), Carried.of(*table.ids(range(64))), spacing)
    assert near(table, order, spacing) == 0


def test_rows_with_two_ids_each_are_kept_apart_by_both():
    rng, n = np.random.default_rng(0), 4096
    table = table_of(rng.permutation(n) // 3, rng.permutation(n) // 4, 64)
    order = arranged(words_of(n, 1), Carried.of(*table.ids(range(64))), 256)
    assert near(table, order, 256) == 0


def test_an_id_of_more_rows_than_there_are_batches_is_spread_as_thinly_as_can_be():
    n, batch, labels = 2048, 64, 3
    table = table_of(range(n), np.arange(n) % labels, 64)
    order = arranged(words_of(n, 1), Carried.of(*table.ids(range(32))), batch)
    for first in range(0, n, batch):
        counts = np.bincount(order[first : first + batch] % labels)
        assert counts.max() - counts.min() <= 4


def test_without_duplicates_the_order_is_that_of_the_words():
    words = words_of(500, 3)
    carried = Carried.of(np.arange(500), np.arange(500), np.ones(500, np.int64))
    np.testing.assert_array_equal(arranged(words, carried, 50), np.argsort(words))


def test_a_query_and_a_document_of_the_same_text_are_no_duplicates():
    words = words_of(64, 0)
    carried = Carried.of(np.arange(64), np.roll(np.arange(64), 1), np.ones(64, np.int64))
    np.testing.assert_array_equal(arranged(words, carried, 8), np.argsort(words))
    assert len(duplicate_rows(carried)) == 0


@settings(max_examples=40)
@given(tables())
def test_duplicate_rows_are_those_that_share_something_with_a_row_before(table):
    found = duplicate_rows(Carried.of(*table.ids(range(len(table.sizes)))))
    n = len(table.queries)
    # A row before that shares one id; the twin looks at all pairs.
    assert found.tolist() == [i for i in range(n) if any(table.shared(j, i) for j in range(i))]


def test_windows_next_to_each_other_keep_their_edges_apart():
    """Windows of 4 batches, two epochs: no 32 neighbours anywhere hold a document twice, nor a row of both epochs."""
    rng, n, spacing = np.random.default_rng(5), 512, 32
    table = table_of(range(n), rng.permutation(n) // 3, 16)
    order = EpochOrder(table.shape(), 7, window_groups=8, ids=table, spacing=spacing)
    rows = order.rows(0, 3 * n)
    for first in range(0, 3 * n, n):
        assert sorted(rows[first : first + n].tolist()) == list(range(n))
    assert near(table, rows, spacing) == 0
    alone = EpochOrder(table.shape(), 7, window_groups=8).rows(0, 3 * n)
    assert near(table, alone, spacing) > 0


@settings(max_examples=30)
@given(tables(), st.integers(1, 8), st.integers(1, 4), st.data())
def test_any_position_is_the_same_from_anywhere(table, spacing, window_groups, data):
    n = len(table.queries)
    whole = EpochOrder(table.shape(), 3, window_groups, table, spacing).rows(0, 3 * n)
    for epoch in range(3):
        assert sorted(whole[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    fresh = EpochOrder(table.shape(), 3, window_groups, table, spacing)
    for _ in range(3):
        first = data.draw(st.integers(0, 3 * n - 1))
        count = data.draw(st.integers(1, 3 * n - first))
        np.testing.assert_array_equal(fresh.rows(first, count), whole[first : first + count])


def test_a_plan_avoids_duplicates_in_every_batch_mixed_or_not_through_stages():
    rng, n = np.random.default_rng(2), 2048
    a = table_of(range(n), rng.permutation(n) // 6, 32)
    b = table_of(range(10_000, 10_000 + n), 10_000 + rng.permutation(n) // 6, 32)
    stages = [Stage(0), Stage(30, (0.7, 0.3), homogeneous=False), Stage(60, (0.2, 0.8))]
    ids = {"content of a": a, "content of b": b}

    def plan(**settings):
        return Plan(4, 64, [a.shape("a"), b.shape("b")], steps=90, stages=stages, window_groups=16, **settings)

    def repeats(plan):
        return [
            sum(t.repeats(rows[rows[:, 0] == i, 1].tolist()) for i, t in enumerate((a, b)))
            for rows in map(plan.rows, range(90))
        ]

    assert sum(repeats(plan(ids=ids))) == 0
    assert sum(repeats(plan())) > 90
    again = pickle.loads(pickle.dumps(plan(ids=ids)))
    np.testing.assert_array_equal(again.rows(71), plan(ids=ids).rows(71))


class Endless:
    """The id columns of a source of any size, made up from the row numbers: every document in eight rows."""

    def ids(self, groups):
        rows = (1000 * groups[:, None] + np.arange(1000)).ravel()
        return rows, rows // 8, np.ones(len(rows), np.int64)


def test_a_plan_over_a_billion_rows_avoids_duplicates_at_the_cost_of_three_windows():
    source = SourceShape("a", 10**9, RowGroups(((1000, 10**6),)), "f")
    plan = Plan(0, 1024, [source], epochs=3, ids={"f": Endless()})
    for t in (0, 1_000_003, 2_929_000):
        rows = np.concatenate([plan.rows(t + i) for i in range(4)])[:, 1].reshape(4, 1024)
        assert len(np.unique(rows)) == 4096
        assert all(len(np.unique(batch // 8)) == 1024 for batch in rows)


def test_a_plan_that_avoids_duplicates_is_not_read_without_the_ids():
    table = table_of(range(64), range(64), 16)
    plan = Plan(0, 8, [table.shape()], steps=8, ids={"content of a": table})
    bare = Plan.from_state(plan.state())
    assert plan.differences(bare) == []
    with pytest.raises(ValueError, match="needs the id columns of 'a'"):
        bare.rows(0)
    assert plan.differences(Plan(0, 8, [table.shape()], steps=8)) == ["avoid_duplicates: True became False"]


@given(st.integers(1, 3000), st.integers(1, 4000))
def test_a_stride_visits_every_place(n, near):
    assert len({i * _coprime(n, near) % n for i in range(n)}) == n
