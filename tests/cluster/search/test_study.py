"""Searches run for real through Ray Tune on a local cluster of logical CPUs; what a trial's workers do is `Surface`."""

import json

import pytest

from cluster.config import Recipe
from cluster.search.study import search
from tests.cluster.search import surface
from tests.e2e.conftest import mini_recipe, write_pairs

WORK = "tests.cluster.search.surface:Surface"
TEMPERATURE = {"kind": "uniform", "low": 0.05, "high": 0.5}


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory):
    """A cluster of four logical CPUs that every search of this file uses."""
    import os

    import ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture
def recipe(pairs, root):
    """A function: the recipe with this search section and other sections on top."""

    def make(search, **other):
        raw = mini_recipe(pairs) | {"search": {"space": {"objective.temperature": TEMPERATURE}} | search} | other
        raw["data"] = raw["data"] | {"steps": 9}
        return Recipe.model_validate(raw)

    return make


def test_trials_of_every_fate_and_the_search_goes_on(ray_here, recipe, root):
    seeds = {"kind": "choice", "values": [0, surface.FAILS, surface.NAN, surface.DIES_ONCE, surface.HANGS]}
    start = [{"seed": seed, "objective.temperature": 0.2} for seed in seeds["values"]]
    space = {"objective.temperature": TEMPERATURE, "seed": seeds}
    settings = {"space": space, "trials": 5, "start": start, "stalled_s": 3, "retries": 1, "stop_early": False}
    events = []
    found = search(recipe(settings), work=WORK, on_progress=events.append)
    reasons = {t.settings["seed"]: (t.outcome.state, t.outcome.reason) for t in found.trials}
    assert reasons[0] == ("completed", "")
    assert reasons[surface.DIES_ONCE] == ("completed", "")
    assert reasons[surface.FAILS] == ("failed", "this one always fails")
    assert reasons[surface.NAN] == ("failed", "ndcg@10 is nan at step 1")
    assert reasons[surface.HANGS][0] == "failed"
    assert "no step for 3 s" in reasons[surface.HANGS][1]
    assert found.best is not None
    assert found.best.settings["seed"] in (0, surface.DIES_ONCE)
    print(json.dumps([{k: str(v) for k, v in e.items()} for e in events], indent=1))
