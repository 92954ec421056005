"""Searches run for real through Ray Tune on a local cluster of logical CPUs; what a trial's workers do is `Surface`."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cluster.config import Recipe
from cluster.fit import Stopped
from cluster.search.record import StudyPaths
from cluster.search.study import search
from data_services.schema import RunError, UsageError
from tests.cluster.search import surface
from tests.e2e.conftest import mini_recipe, write_pairs

WORK = "tests.cluster.search.surface:Surface"
TEMPERATURE = {"kind": "uniform", "low": 0.05, "high": 0.5}


@pytest.fixture(scope="module")
def ray_here():
    """A cluster of four logical CPUs that every search of this file uses: room for one trial of two workers."""
    import ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture
def recipe(pairs, root):
    """A function: a recipe of nine steps with this search section, which is over temperature unless it says more."""

    def make(workers=1, **settings):
        raw = mini_recipe(pairs)
        raw["cluster"]["workers"] = workers
        raw["data"] = raw["data"] | {"steps": 9}
        raw["search"] = {"space": {"objective.temperature": TEMPERATURE}} | settings
        return Recipe.model_validate(raw)

    return make


def begun(found):
    """What rank 0 of each trial's crew wrote when it began: {trial: [{"step", "pid", "at"}]}."""
    lines = {}
    for record in found.trials:
        path = StudyPaths(Path(found.folder)).trial(record.number).run.root
        text = (path / "begun.jsonl").read_text() if (path / "begun.jsonl").exists() else ""
        lines[record.number] = [json.loads(line) for line in text.splitlines()]
    return lines


def test_trials_of_every_fate_and_the_search_goes_on(ray_here, recipe):
    seeds = {"kind": "choice", "values": [0, surface.NAN, surface.DIES_ONCE, surface.FAILS]}
    sound = {"objective.temperature": 0.2, "optimizer.warmup_steps": 2, "data.steps": 9}
    start = [sound | {"seed": seed} for seed in seeds["values"]]
    start.append(start[0] | {"optimizer.warmup_steps": 8, "data.steps": 5})  # either alone would do
    ends = {"optimizer.warmup_steps": (0, 8), "data.steps": (5, 9)}
    space = {"objective.temperature": TEMPERATURE, "seed": seeds}
    space |= {key: {"kind": "int", "low": low, "high": high} for key, (low, high) in ends.items()}
    found = search(recipe(space=space, trials=5, start=start, retries=1, stop_early=False), work=WORK)
    assert found.trials[4].outcome.state == "failed"
    assert "optimizer.warmup_steps (8) leaves nothing of data.steps (5)" in found.trials[4].outcome.reason
    reasons = {t.settings["seed"]: (t.outcome.state, t.outcome.reason) for t in found.trials[:4]}
    assert reasons[0] == ("completed", "")
    assert reasons[surface.NAN] == ("failed", "ndcg@10 is nan at step 1")
    assert reasons[surface.DIES_ONCE] == ("completed", "")
    assert reasons[surface.FAILS] == ("failed", "this one always fails")
    assert found.states == {"completed": 2, "failed": 3}
    assert found.best is not None
    assert found.best.settings["seed"] == 0
    assert all(t.worker_seconds > 0 for t in found.trials)


@pytest.mark.proof
def test_trials_that_hang_or_are_too_large_are_ended_and_a_search_without_any_result_has_failed(ray_here, recipe, root):
    space = {"seed": {"kind": "choice", "values": [surface.HANGS, surface.TOO_LARGE]}}
    start = [{"seed": seed} for seed in space["seed"]["values"]]
    settings = {"space": space, "trials": 2, "start": start, "stalled_s": 4, "retries": 0}
    with pytest.raises(RunError, match=r"no trial of search .* came to a check; the first: no step for 4 s"):
        search(recipe(**settings), work=WORK)
    (study,) = (StudyPaths(path) for path in root.glob("mini-search-*"))
    assert study.trials()[1].outcome.reason == "tried to allocate 9 TiB"


def test_bad_trials_are_stopped_and_their_workers_go_straight_to_the_next(ray_here, recipe):
    values = [0.1, 0.12, 0.3, 0.4, 0.5, 0.11]
    start = [{"objective.temperature": value} for value in values]
    events = []
    found = search(recipe(workers=2, trials=6, start=start), work=WORK, on_progress=events.append)
    assert [t.settings["objective.temperature"] for t in found.trials] == values
    states = [t.outcome.state for t in found.trials]
    assert states[0] == "completed"  # nothing to compare the first with
    assert states[2:5] == ["stopped"] * 3
    assert [t.checks[-1].step for t in found.trials][2:5] == [1, 1, 1]
    assert found.best == found.trials[0]
    processes = {line["pid"] for lines in begun(found).values() for line in lines}
    assert len(processes) == 1, "one crew did all of them"
    deadline = time.monotonic() + 60
    while ray_here.available_resources().get("CPU") != 4:
        assert time.monotonic() < deadline, "its workers and their placement group are still there"
        time.sleep(0.1)
    told = [e for e in events if e["kind"] == "trial"]
    assert [e["record"].number for e in told] == sorted(e["record"].number for e in told)
    assert told[-1]["ended"] == told[-1]["trials"] == 6


def test_what_is_left_behind_is_a_recipe_a_report_and_runs_in_the_store(ray_here, recipe, root):
    from cluster.config import load_recipe
    from cluster.tracking import client

    found = search(recipe(trials=2, trial={"data.steps": 5}, seed=1), work=WORK)
    best = load_recipe(found.recipe)
    assert best.objective.temperature == found.best.settings["objective.temperature"]
    assert best.data.steps == 9
    assert best.search is None
    distances = {t.number: abs(t.settings["objective.temperature"] - surface.BEST) for t in found.trials}
    assert found.best.number == min(distances, key=distances.get)
    assert found.search_id in (root / found.search_id / "report.html").read_text()
    store = client(root)
    runs = store.search_runs([store.get_experiment_by_name("mini").experiment_id])
    parent = json.loads((root / found.search_id / "tracker.json").read_text())["run_id"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    assert len(children) == 2
    (tagged,) = [run for run in children if run.data.tags.get("gyre.best")]
    assert float(tagged.data.params["objective.temperature"]) == found.best.settings["objective.temperature"]
    curve = [m.value for m in store.get_metric_history(tagged.info.run_id, "ndcg_at_10")]
    assert curve[: len(found.best.checks)] == [check.values["ndcg@10"] for check in found.best.checks]
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.proof
def test_a_search_that_is_stopped_or_out_of_budget_goes_on_where_it_was(ray_here, recipe, root):
    space = {"objective.temperature": TEMPERATURE, "seed": {"kind": "choice", "values": [0, surface.STUCK]}}
    start = [{"seed": seed, "objective.temperature": 0.1} for seed in (0, surface.STUCK)]
    settings = {"space": space, "trials": 2, "start": start, "stop_early": False, "concurrent": 1}
    with pytest.raises(RunError, match=r"came to a check; search\.budget\.seconds \(0\.5\) was spent"):
        search(recipe(**settings, budget={"seconds": 0.5}), work=WORK)
    (study,) = (StudyPaths(p) for p in root.glob("mini-search-*"))

    def stop_in_the_second():
        while not (study.trial(1).run.root / "begun.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_in_the_second, daemon=True).start()
    with pytest.raises(Stopped, match="SIGTERM: go on with: gyre search RECIPE --resume mini-search-"):
        search(recipe(**settings), resume=study.search_id, work=WORK)
    (first, *_) = study.trials()
    assert first.outcome.state == "completed"
    found = search(recipe(**settings), resume=study.search_id, work=WORK)
    assert found.search_id == study.search_id
    assert found.states == {"completed": 2}
    assert found.trials[0] == first
    changed = recipe(**settings | {"objectives": {"mrr@10": "max"}})
    with pytest.raises(UsageError, match=r"was made with another recipe: search\.objectives"):
        search(changed, resume=study.search_id, work=WORK)


@pytest.mark.parametrize(("budget", "spent"), [({"worker_seconds": 10}, 10.5), ({"seconds": 0.01}, 0)])
def test_a_spent_budget_ends_the_search_once(budget, spent):
    from cluster.search.algorithms import Ending
    from cluster.search.config import Budget

    told = []
    ending = Ending(Budget(**budget), lambda: spent, lambda: told.append(True))
    assert not ending.stop_all()  # it looks now and then
    while not ending.stop_all():
        time.sleep(0.05)
    assert ending.stop_all()
    assert told == [True]
    assert ending.reason.startswith("search.budget.")


@pytest.mark.proof
def test_trials_of_different_size_and_one_that_waits_for_the_cluster(ray_here, recipe):
    holder = ray_here.remote(num_cpus=3)(Holder).remote()
    ray_here.get(holder.there.remote())
    threading.Timer(2.0, ray_here.kill, [holder]).start()
    space = {"cluster.workers": {"kind": "choice", "values": [1, 2]}}
    found = search(recipe(space=space, algorithm="grid"), work=WORK)
    assert [t.settings["cluster.workers"] for t in found.trials] == [1, 2]
    assert found.states == {"completed": 2}


def test_a_trial_that_fits_nowhere_is_refused_at_once(ray_here, recipe, root):
    with pytest.raises(UsageError, match=r"cluster\.workers=4 of 1 CPU|cluster\.workers=4 can never be placed"):
        search(recipe(space={"cluster.workers": {"kind": "choice", "values": [1, 4]}}), work=WORK)
    assert not list(root.glob("mini-search-*"))


class Holder:
    """Holds CPUs."""

    def there(self):
        return True


@pytest.mark.proof
def test_trials_on_a_warm_crew_are_ordinary_trainings_bit_for_bit(ray_here, recipe, gloo, tmp_path):
    from cluster.prepare import prepare
    from cluster.search.space import Space
    from cluster.worker import Task
    from tests.e2e.commands import differing, results_in
    from tests.e2e.plain import train_without_ray

    start = [{"objective.temperature": value} for value in (0.2, 0.4, 0.2)]
    chosen = recipe(workers=2, trials=3, start=start, stop_early=False, queries=20)
    found = search(chosen)
    assert found.states == {"completed": 3}, found.trials
    runs = [StudyPaths(Path(found.folder)).trial(n).run for n in range(3)]
    assert found.trials[0].last["ndcg@10"] == found.trials[2].last["ndcg@10"] > 0
    ready = prepare(Space(chosen).trial_recipe(start[0]), tmp_path / "home", None)
    task = Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage())
    gloo(2, train_without_ray, task, ready.reader)
    plain = results_in(ready.run.metrics)
    assert len(plain) == 9
    assert differing(results_in(runs[0].metrics), plain) == {}  # the crew's first trial
    assert differing(results_in(runs[2].metrics), plain) == {}  # and one after another
    assert differing(results_in(runs[1].metrics), plain) != {}
    models = {run.model.resolve() for run in runs}
    assert len(models) == 1, "one model folder for all of them"
