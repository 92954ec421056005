"""What a search makes of its trials, without running any: checks, choice, front, records, placement, importance."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.search.config import SearchConfig
from cluster.search.placement import bundles, trials_at_once
from cluster.search.record import Check, Outcome, StudyPaths, TrialPaths, TrialRecord, find_search
from cluster.search.results import best_of, pareto_front
from cluster.search.trial import checks_of
from data_services.schema import UsageError
from tests.cluster.search.test_space import made

ONE = {"ndcg@10": "max"}


def config(**settings):
    return SearchConfig(space={"seed": {"kind": "int", "low": 0, "high": 9}}, **settings)


def trial(number, *values, state="completed", steps=9, **settings):
    checks = [Check(step, steps, step * 2.0, {"ndcg@10": v}) for step, v in zip((1, 3, 9), values, strict=False)]
    return TrialRecord(number, settings, checks, Outcome(state))


def test_checks_are_the_last_step_and_shares_of_it():
    assert checks_of(90, config()) == [(10, 1), (30, 3), (90, 9)]
    assert checks_of(90, config(first_check=0.5)) == [(90, 1)]
    assert checks_of(100, config(first_check=0.1, reduction=2)) == [(12, 1), (25, 2), (50, 4), (100, 8)]


@given(st.integers(1, 5000), st.floats(0.01, 1), st.floats(1.1, 10))
def test_checks_ascend_to_the_last_step(steps, first, reduction):
    found = checks_of(steps, config(first_check=first, reduction=reduction))
    at = [step for step, _ in found]
    assert at == sorted(set(at))
    assert at[-1] == steps
    assert at[0] >= 1
    times = [time for _, time in found]
    assert times == sorted(set(times))


def test_the_best_is_among_those_that_came_furthest():
    stopped = trial(0, 0.9, state="stopped")
    assert best_of([stopped, trial(1, 0.1, 0.2, 0.3), trial(2, 0.1, 0.3, 0.4)], ONE).number == 2
    assert best_of([trial(1, 0.1, 0.2, 0.3)], {"ndcg@10": "min"}).number == 1
    assert best_of([trial(0, 0.1, 0.2, 0.4), trial(1, 0.1, 0.2, 0.4)], ONE).number == 0
    assert best_of([stopped], ONE) == stopped
    assert best_of([trial(0, state="failed")], ONE) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    trials = [
        TrialRecord(n, {}, [Check(1, 1, 1.0, {"up": float(a), "down": float(b)})], Outcome("completed"))
        for n, (a, b) in enumerate(points)
    ]
    front = pareto_front(trials, {"up": "max", "down": "min"})
    for n, (a, b) in enumerate(points):
        beaten = any((x >= a and y <= b) and (x, y) != (a, b) for x, y in points)
        assert (n in front) == (not beaten)


def test_a_record_is_read_as_it_was_written_and_a_cut_line_is_none(tmp_path):
    paths = TrialPaths(tmp_path / "0003")
    paths.begin(3, {"seed": 1})
    first, second = (Check(step, 9, 1.5 * step, {"ndcg@10": 0.1 * step}) for step in (1, 3))
    paths.add(first)
    paths.add(second)
    assert paths.read() == TrialRecord(3, {"seed": 1}, [first, second])
    text = paths.checks.read_text()
    paths.checks.write_text(text[:-10])
    assert paths.read().checks == [first]
    paths.add(second)
    paths.add(second)  # of an attempt that lived on for a moment
    assert paths.read().checks == [first, second]
    paths.end(Outcome("failed", "why", 7.0))
    assert paths.read().outcome.reason == "why"
    assert paths.read().worker_seconds == 7.0


def test_two_trials_never_share_a_folder(tmp_path):
    paths = TrialPaths(tmp_path / "0000")
    paths.begin(0, {"seed": 1})
    paths.begin(0, {"seed": 1})  # the same one, taken up again
    with pytest.raises(RuntimeError, match="is the folder of"):
        paths.begin(0, {"seed": 2})


def test_a_search_is_found_by_the_beginning_of_its_id(tmp_path):
    for name in ("one-search-1", "one-search-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "search.json").write_text("{}")
    assert find_search("one-search-2", tmp_path) == StudyPaths(tmp_path / "one-search-2")
    with pytest.raises(UsageError, match="ambiguous: one-search-1, one-search-2"):
        find_search("one-", tmp_path)
    with pytest.raises(UsageError, match="no search 'two'"):
        find_search("two", tmp_path)


def test_as_many_trials_run_at_once_as_the_nodes_hold_whole():
    two = ClusterConfig(workers=2)
    assert bundles(two) == [{"CPU": 0.01}, {"CPU": 1}, {"CPU": 1}, {"CPU": 1}]
    assert trials_at_once(two, [{"CPU": 4}], 9) == 1
    assert trials_at_once(two, [{"CPU": 4}, {"CPU": 3}], 9) == 2
    assert trials_at_once(two, [{"CPU": 40}], 5) == 5
    with pytest.raises(UsageError, match=r"cluster\.workers=2 can never be placed: .* 3 CPUs and 0 GPUs on 1 node;"):
        trials_at_once(two, [{"CPU": 3}], 9)
    halves = ClusterConfig(workers=2, gpus_per_worker=0.5)
    assert trials_at_once(halves, [{"CPU": 16, "GPU": 2}], 9) == 2
    wide = ClusterConfig(workers=1, cpus_per_worker=3)
    with pytest.raises(UsageError):  # enough in all, and no node with three
        trials_at_once(wide, [{"CPU": 2}] * 4, 9)


def test_the_key_that_matters_is_told_from_the_one_that_does_not():
    from cluster.search.importance import importance

    space = made({
        "momentum.decay": {"kind": "uniform", "low": 0.0, "high": 0.9},
        "optimizer.lr": {"kind": "loguniform", "low": 1e-5, "high": 1e-1},
    })  # fmt: skip
    rates = [10 ** (-5 + 4 * ((7 * n) % 24) / 24) for n in range(24)]
    trials = [
        dataclasses.replace(trial(n, n / 24, n / 24, n / 24), settings={"momentum.decay": n / 27, "optimizer.lr": rate})
        for n, rate in enumerate(rates)
    ]
    found = importance(space, trials, "ndcg@10")
    assert list(found) == ["momentum.decay", "optimizer.lr"]
    assert found["momentum.decay"] > 0.9
    assert importance(space, trials[:3], "ndcg@10") == {}
