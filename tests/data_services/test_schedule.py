"""Stages, weights that change, limits and contents that are refreshed: all of it known from the segments alone."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_services.order import Plan, RowGroups, SourceShape, Stage
from data_services.order.segments import Draws
from data_services.schema import UsageError
from data_services.sources import SourceConfig
from data_services.stream import DataConfig, plan_of
from tests.data_services.test_order import sequence


def shape(name: str, rows: int, weight: float | None = None, limit: int | None = None) -> SourceShape:
    groups = RowGroups.of([7] * (rows // 7) + [rows % 7] * (rows % 7 > 0))
    return SourceShape(name, rows, groups, f"content of {name}", weight, limit)


def counts(plan: Plan, steps: range) -> Counter[str]:
    """Rows drawn of each source over some steps."""
    return Counter(plan.sources[s].name for t in steps for s in plan.rows(t)[:, 0])


def test_a_stage_changes_weights_mixing_and_negatives_and_sources_go_on_where_they_stood():
    stages = [Stage(0, (1, 0), negatives=0), Stage(10, (1, 3), homogeneous=False, negatives=4), Stage(30)]
    plan = Plan(1, 8, [shape("a", 200), shape("b", 100)], steps=60, stages=stages)
    assert counts(plan, range(10)) == {"a": 80}
    mixed = counts(plan, range(10, 30))
    assert mixed["a"] == pytest.approx(40, abs=20)
    assert any(len(set(plan.rows(t)[:, 0])) == 2 for t in range(10, 30))
    assert all(len(set(plan.rows(t)[:, 0])) == 1 for t in range(30, 60))
    assert [plan.negatives(t, 2) for t in (0, 9, 10, 29, 30)] == [0, 0, 4, 4, 2]
    for source, of in enumerate(plan.sources):
        rows = sequence(plan, source, range(60))
        for first in range(0, len(rows), of.rows):
            assert len(set(rows[first : first + of.rows])) == len(rows[first : first + of.rows])


def source(path: str = "x", **settings):
    return {"path": path, **settings}


def shares(*steps):
    return [{"from_step": step, "share": share} for step, share in steps]


class Stored:
    """As much of a StoredSource as a plan asks for."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows, self.row_groups, self.fingerprint = name, rows, (rows,), name


def planned(sources, rows=(70, 70), **config) -> Plan:
    read = DataConfig(sources=sources, batch=7, duplicates="allow", **config)
    return plan_of(read, [Stored(f"s{i}", n) for i, n in zip(range(len(sources)), rows, strict=False)], seed=3)


def test_a_recipe_schedules_weights_by_step():
    plan = planned([source(weight=shares((0, 1.0), (10, 0.0), (20, 1))), source(weight=1)], steps=40)
    assert [s.start for s in plan.segments] == [0, 10, 20]
    assert [s.weights for s in plan.segments] == [(0.5, 0.5), (0, 1), (0.5, 0.5)]
    assert counts(plan, range(10, 20)) == {"s1": 70}


def test_stages_and_scheduled_weights_go_together():
    stages = [{}, {"from_step": 5, "weights": [3, 1]}, {"from_step": 9, "homogeneous": False}]
    plan = planned([source(weight=shares((0, 1), (7, 2), (12, 8))), source(weight=2)], steps=20, stages=stages)
    assert [s.start for s in plan.segments] == [0, 5, 7, 9, 12]
    assert [s.weights[0] for s in plan.segments] == [pytest.approx(x) for x in (1 / 3, 0.75, 0.75, 0.5, 0.8)]
    assert [s.homogeneous for s in plan.segments] == [True, True, True, False, False]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(12, 40), st.one_of(st.none(), st.integers(8, 60))), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 8),
    st.integers(0, 5),
)
def test_a_limit_is_never_passed_and_the_others_take_over_at_once(sources, homogeneous, batch, seed):
    shapes = [shape(f"s{i}", rows, limit=limit) for i, (rows, limit) in enumerate(sources)]
    plan = Plan(seed, batch, shapes, epochs=2, stages=[Stage(homogeneous=homogeneous)])
    drawn = counts(plan, range(plan.steps))
    assert all(one.limit is None or drawn[one.name] <= one.limit for one in shapes)
    for before, after in pairwise(plan.segments):
        draws = Draws(before, seed, batch)
        so_far, further = (draws.reached(step) for step in (after.start, after.start + 1))  # had it gone on for a step
        for one, was, now, there, reached in zip(shapes, before.weights, after.weights, so_far, further, strict=True):
            if one.limit is not None and reached > one.limit:
                assert now == 0
            if was > 0 and now == 0:  # with the weight of a source that ends at the same step, it might go past
                assert one.limit is not None
                assert one.limit - there < batch
    if any(limit is None for _, limit in sources):
        assert plan.steps == 2 * sum(rows for rows, _ in sources) // batch


def test_a_used_up_source_leaves_its_weight_to_the_others_in_their_proportions():
    plan = planned([source(weight=2, max_rows=35), source(weight=1), source(weight=3)], (70, 70, 70), steps=40)
    assert [s.weights for s in plan.segments] == [(1 / 3, 1 / 6, 0.5), (0, 0.25, 0.75)]
    assert counts(plan, range(40))["s0"] == 35
    assert planned([source(max_epochs=0.5), source()], steps=40).segments[1].weights == (0, 1)


def test_where_every_source_is_used_up_a_run_by_epochs_ends_and_one_by_steps_is_refused():
    assert planned([source(max_epochs=1), source(max_rows=30)], epochs=5).steps == (70 + 28) // 7
    with pytest.raises(UsageError, match=r"data.steps=40, but every source has reached its limit at step 14"):
        planned([source(max_epochs=1), source(max_rows=30)], steps=40)
    stages = [{"weights": [1, 0]}, {"from_step": 8}]
    with pytest.raises(UsageError, match="used up at step 5, and the next begins at 8"):
        planned([source(max_rows=35), source()], steps=40, stages=stages)


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ([source(), source()], {"stages": [{"weights": [1]}]}, "has 1 weights for 2 sources"),
        ([source(), source()], {"stages": [{"weights": [0, 0]}]}, "not all 0"),
        ([source()], {"stages": [{}, {"from_step": 50}]}, "changes at step 50, and the run has only 40 steps"),
        ([source(weight=shares((0, 1), (90, 2)))], {}, "changes at step 90, and the run has only 40 steps"),
        ([source(weight=1), source()], {}, "'s1' has no weight"),
        ([source(max_rows=6)], {}, "may give 6 rows in all, and a batch takes 7 at once"),
    ],
)
def test_schedules_that_cannot_be_are_refused_with_a_sentence(sources, settings, message):
    with pytest.raises(UsageError, match=message):
        planned(sources, steps=40, **settings)


def test_stages_and_weights_ascend_from_step_0():
    with pytest.raises(ValidationError, match=r"stages begin at steps \[3\]"):
        DataConfig(sources=[source()], steps=9, stages=[{"from_step": 3}])
    with pytest.raises(ValidationError, match=r"weight changes at steps \[0, 5, 5\]"):
        SourceConfig(path="x", weight=shares((0, 1), (5, 2), (5, 3)))


def test_the_most_negatives_are_those_of_the_hungriest_stage():
    def most(*stages):
        return DataConfig(sources=[source()], steps=9, negatives=2, stages=list(stages)).most_negatives

    assert most() == 2
    assert most({"negatives": 1}) == 1
    assert most({"negatives": 0}, {"from_step": 3}) == 2
    assert most({"negatives": 5}, {"from_step": 3}) == 5


def test_a_refreshed_source_changes_what_is_read_from_a_step_on_and_no_row_of_any_batch():
    stages = [Stage(0, (1, 1), homogeneous=False), Stage(20, (1, 2)), Stage(40, (2, 1), homogeneous=False)]
    plan = Plan(3, 6, [shape("a", 90), shape("b", 80)], steps=60, stages=stages)
    mined = SourceShape("b", 80, shape("b", 80).row_groups, "b with new negatives")
    new = plan.refreshed(27, mined).refreshed(50, SourceShape("b", 80, mined.row_groups, "b with the newest negatives"))
    for t in range(60):
        before, now = plan.rows(t), new.rows(t)
        np.testing.assert_array_equal(before[:, 1], now[:, 1])
        names = [new.sources[s].fingerprint for s in now[:, 0]]
        of_b = "content of b" if t < 27 else "b with new negatives" if t < 50 else "b with the newest negatives"
        assert names == ["content of a" if s == 0 else of_b for s in before[:, 0]]
    again = Plan.from_state(json.loads(json.dumps(new.state())))
    assert new.differences(again) == []
    np.testing.assert_array_equal(again.rows(55), new.rows(55))
    with pytest.raises(ValueError, match="none of that name with the same row groups"):
        plan.refreshed(27, shape("b", 81))


def test_a_state_is_as_long_as_the_segments_however_many_rows_there_are():
    plan = Plan(0, 8, [SourceShape("a", 10**9, RowGroups(((1000, 10**6),)), "f")], steps=9, stages=[Stage(), Stage(5)])
    assert len(json.dumps(plan.state())) < 1000


def test_a_state_of_another_format_is_refused_with_a_sentence():
    state = Plan(0, 8, [shape("a", 90)], steps=9).state()
    del state["format"]
    with pytest.raises(UsageError, match="format 1 and this version of gyre writes 3"):
        Plan.from_state(state)


@given(st.lists(st.integers(1, 4), max_size=12))
def test_row_groups_keep_every_size(sizes):
    groups = RowGroups.of(sizes)
    assert groups.sizes().tolist() == sizes
    assert groups.rows == sum(sizes)
    assert all(a[0] != b[0] for a, b in pairwise(groups.runs))
