"""The order of batches: laws that hold for any sources, sizes, weights and seeds."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.order import CYCLE, EpochOrder, Mixture, Plan, RowGroups, SourceShape, mixing_weights
from data_services.schema import UsageError


def shape(name: str, groups: list[int], weight: float | None = None) -> SourceShape:
    return SourceShape(name, sum(groups), RowGroups.of(groups), f"fingerprint of {name}", weight)


@st.composite
def plans(draw, max_sources: int = 3):
    batch = draw(st.integers(1, 12))
    groups = st.lists(st.integers(1, 9), min_size=1, max_size=8).filter(lambda g: sum(g) >= batch)
    weighted = draw(st.booleans())
    sources = [
        shape(f"s{i}", draw(groups), draw(st.floats(0.1, 1.0)) if weighted else None)
        for i in range(draw(st.integers(1, max_sources)))
    ]
    return Plan(
        draw(st.integers(0, 2**31)),
        batch,
        sources,
        steps=draw(st.integers(1, 60)),
        mixing_temperature=draw(st.sampled_from([1.0, 3.0])),
        homogeneous=draw(st.booleans()),
        window_groups=draw(st.integers(1, 4)),
    )


def sequence(plan: Plan, source: int, steps: range) -> np.ndarray:
    """The rows drawn from a source over steps, in order."""
    rows = np.concatenate([plan.rows(t) for t in steps])
    return rows[rows[:, 0] == source, 1]


@settings(max_examples=60)
@given(plans(), st.data())
def test_batch_t_is_the_same_from_any_step_and_after_any_other(plan, data):
    in_order = [plan.rows(t) for t in range(plan.steps)]
    fresh = pickle.loads(pickle.dumps(plan))
    for t in data.draw(st.lists(st.integers(0, plan.steps - 1), max_size=8)):
        np.testing.assert_array_equal(fresh.rows(t), in_order[t])
        np.testing.assert_array_equal(Plan.from_state(json.loads(json.dumps(plan.state()))).rows(t), in_order[t])


@settings(max_examples=60)
@given(plans())
def test_every_row_of_an_epoch_comes_exactly_once_and_every_batch_is_full(plan):
    assert all(plan.rows(t).shape == (plan.batch, 2) for t in range(plan.steps))
    for source, of in enumerate(plan.sources):
        rows = sequence(plan, source, range(plan.steps))
        for first in range(0, len(rows), of.rows):
            epoch = rows[first : first + of.rows]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(of.rows))


@settings(max_examples=40)
@given(plans())
def test_a_homogeneous_batch_has_one_source(plan):
    sources = [len(set(plan.rows(t)[:, 0])) for t in range(plan.steps)]
    assert not plan.segments[0].homogeneous or set(sources) == {1}


@settings(max_examples=40)
@given(plans(), st.data())
def test_positions_count_the_draws_of_each_source(plan, data):
    t = data.draw(st.integers(0, plan.steps))
    counted = [len(sequence(plan, s, range(t))) if t else 0 for s in range(len(plan.sources))]
    assert plan.positions(t).tolist() == counted


@settings(max_examples=60)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5),
    st.integers(0, 5000),
    st.integers(1, 1500),
)
def test_a_mixture_drawn_in_pieces_equals_the_mixture_drawn_at_once(weights, first, count):
    mixture = Mixture(np.array(weights) / sum(weights), (1,))
    sources, ordinals = mixture.draw(0, first + count)
    piece = mixture.draw(first, count)
    np.testing.assert_array_equal(piece[0], sources[first:])
    np.testing.assert_array_equal(piece[1], ordinals[first:])
    for source in range(len(weights)):
        np.testing.assert_array_equal(ordinals[sources == source], np.arange((sources == source).sum()))


def test_a_mixture_keeps_its_shares_in_every_cycle_and_exactly_in_the_long_run():
    weights = (0.5, 0.3, 0.1995, 0.0005)
    mixture = Mixture(weights, (7,))
    for cycle in range(50):
        counts = np.bincount(mixture.draw(cycle * CYCLE, CYCLE)[0], minlength=4)
        assert np.abs(counts - np.array(weights) * CYCLE).max() <= 1.01
        np.testing.assert_array_equal(mixture.counts(cycle + 1) - mixture.counts(cycle), counts)
    np.testing.assert_allclose(mixture.counts(CYCLE) / CYCLE**2, weights, atol=1e-6)


def test_neighbouring_draws_are_shuffled():
    sources, _ = Mixture((0.5, 0.5), (0,)).draw(0, 400)
    runs = 1 + np.count_nonzero(np.diff(sources))
    assert 150 < runs < 250


def test_temperature_flattens_sizes_and_explicit_weights_win():
    sizes = [shape("a", [8000]), shape("b", [1000])]
    assert mixing_weights(sizes, 1.0) == pytest.approx((8 / 9, 1 / 9))
    assert mixing_weights(sizes, 3.0) == pytest.approx((2 / 3, 1 / 3))
    assert mixing_weights([shape("a", [8000], 1.0), shape("b", [1000], 3.0)], 3.0) == pytest.approx((0.25, 0.75))


def test_rows_are_shuffled_in_windows_of_whole_row_groups():
    groups = [10, 30, 20, 40, 10, 15, 25]
    order = EpochOrder(shape("a", groups), 3, window_groups=2)
    starts = np.concatenate([[0], np.cumsum(groups)])
    epochs = [order.rows(e * 150, 150) for e in range(2)]
    for rows in epochs:
        of_group = np.searchsorted(starts, rows, side="right") - 1
        seen = [set(of_group[: i + 1]) for i in range(len(rows))]
        open_groups = [
            sum(set(of_group[i:]) >= {g} and g in seen[i] for g in range(len(groups))) for i in range(len(rows))
        ]
        assert max(open_groups) <= 2
        assert np.count_nonzero(np.diff(rows) == 1) < 30
    assert (epochs[0] != epochs[1]).any()


def test_seeds_and_epochs_give_other_orders_and_one_seed_the_same():
    def rows(seed):
        return [Plan(seed, 10, [shape("a", [50, 50])], epochs=2).rows(t)[:, 1].tolist() for t in range(20)]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    assert rows(1)[:10] != rows(1)[10:]


def test_the_order_is_the_one_that_earlier_versions_made():
    plan = Plan(11, 6, [shape("a", [5, 7, 9]), shape("b", [8, 8])], steps=9, homogeneous=False, window_groups=2)
    assert plan.rows(7).tolist() == [[0, 11], [1, 14], [1, 11], [1, 1], [1, 0], [1, 13]]


def test_epochs_count_all_rows_and_drop_what_would_not_fill_a_batch():
    sources = [shape("a", [50]), shape("b", [33])]
    assert Plan(0, 10, sources, epochs=1).steps == 8
    assert Plan(0, 10, sources, epochs=2.5).steps == 20
    assert Plan(0, 10, sources, epochs=0.5).steps == 4


def test_a_new_segment_keeps_the_past_and_continues_the_sources_it_keeps():
    old = Plan(2, 5, [shape("a", [20, 10]), shape("b", [25])], steps=40, window_groups=1)
    new = old.extended(13, [shape("c", [40]), shape("b", [25])])
    for t in range(13):
        np.testing.assert_array_equal(old.rows(t), new.rows(t))
    assert [s.name for s in new.sources] == ["a", "b", "c"]
    assert {int(s) for t in range(13, 40) for s in new.rows(t)[:, 0]} == {1, 2}
    rows = sequence(new, 1, range(40))
    for first in range(0, len(rows), 25):
        epoch = rows[first : first + 25]
        assert len(set(epoch)) == len(epoch)
    again = Plan.from_state(json.loads(json.dumps(new.state())))
    assert all((again.rows(t) == new.rows(t)).all() for t in range(40))
    later = new.extended(20, [shape("b", [25])])
    assert later.segments[2].offsets[0] == len(sequence(new, 1, range(20)))
    with pytest.raises(ValueError, match="begins at 20"):
        later.extended(20, [shape("b", [25])])


def test_differences_name_what_changed_and_nothing_else():
    def plan(seed=1, groups=(20, 10), temperature=1.0, **changes):
        settings = {"steps": 4, **changes}
        return Plan(seed, 5, [shape("a", list(groups)), shape("b", [9])], mixing_temperature=temperature, **settings)

    assert plan().differences(plan()) == []
    assert plan().differences(plan(steps=9)) == []
    assert plan().differences(plan(seed=2)) == ["seed: 1 became 2"]
    assert plan().differences(plan(window_groups=3)) == ["window_groups: 64 became 3"]
    assert plan().differences(plan(groups=(10, 20))) == ["source 'a': stored in other row groups"]
    assert "source 'a': 30 rows" in plan().differences(plan(groups=(31,)))[0]
    assert "weights" in plan().differences(plan(temperature=2.0))[0]
    other = Plan(1, 5, [shape("a", [20, 10]), shape("c", [9])], steps=4)
    assert plan().differences(other) == ["source 'b' is gone", "source 'c' is new"]


def test_a_plan_over_a_billion_rows_opens_and_answers_at_once():
    plan = Plan(0, 1024, [SourceShape("x", 10**9, RowGroups(((10**4, 10**5),)), "f")], epochs=3)
    rows = np.concatenate([plan.rows(2_000_000 + i)[:, 1] for i in range(4)])
    assert len(set(rows)) == 4096
    assert len(set(rows // 10**4)) <= 128  # row groups touched: those of a window, or of two


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ([], {"steps": 1}, "data.sources is empty"),
        ([shape("a", [9])], {}, "exactly one of data.epochs and data.steps"),
        ([shape("a", [9])], {"steps": 1, "epochs": 1}, "exactly one of data.epochs and data.steps"),
        ([SourceShape("a", 0, RowGroups(()), "f")], {"steps": 1}, "source 'a' has no rows"),
        ([shape("a", [9]), shape("a", [9])], {"steps": 1}, "names 'a' twice"),
        ([shape("a", [9], 1.0), shape("b", [9])], {"steps": 1}, "'b' has no weight"),
        ([shape("a", [9], 0.0), shape("b", [9], 0.0)], {"steps": 1}, "not all 0"),
        ([shape("a", [9]), shape("b", [3])], {"steps": 1}, "source 'b', which has only 3.*homogeneous=false"),
        ([shape("a", [9])], {"epochs": 0.1}, "do not fill one batch"),
    ],
)
def test_wrong_plans_are_refused_with_a_sentence(sources, settings, message):
    with pytest.raises(UsageError, match=message):
        Plan(0, 4, sources, **settings)


def test_a_step_outside_the_plan_is_an_error():
    plan = Plan(0, 4, [shape("a", [9])], steps=3)
    with pytest.raises(ValueError, match=r"steps 0\.\.2, got 3"):
        plan.rows(3)
