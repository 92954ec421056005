"""What a run goes on from: its newest checkpoint, which is read first, or the one it is told to."""

import pytest

from cluster.launch import take_up, train
from cluster.paths import RunPaths
from data_services.schema import RunError, UsageError
from tests.trainers.test_checkpoint import FILES, harm, of_two_workers
from trainers.checkpoint import STATE, committed, reasons_aside


@pytest.fixture
def run(tmp_path):
    """With checkpoints of steps 5, 10 and 15."""
    run = RunPaths(tmp_path / "some-run")
    run.checkpoints.mkdir(parents=True)
    of_two_workers(run.checkpoints, (5, 10, 15))
    return run


def steps(run):
    return [c.step for c in committed(run.checkpoints)]


def test_a_whole_newest_one_is_taken_as_it_is(run):
    told = []
    take_up(run, None, told.append)
    assert steps(run) == [5, 10, 15]
    assert [event["text"] for event in told] == ["verifying the checkpoint of step 15"]


def test_a_damaged_one_is_refused_until_another_is_chosen(run):
    harm(committed(run.checkpoints)[-1].folder / FILES[1], "flipped")
    offered = rf"{FILES[1]} is not what was written .* of step 10: go on from it with --from-step 10"
    for step in (None, 15):
        with pytest.raises(RunError, match=offered):
            take_up(run, step, print)
    told = []
    take_up(run, 10, told.append)
    assert steps(run) == [5, 10]
    (aside,) = reasons_aside(run.checkpoints)
    assert str(aside) in told[-1]["text"]
    take_up(run, None, print)


def test_the_chosen_one_is_read_too(run):
    every = committed(run.checkpoints)
    harm(every[1].folder / STATE, "missing")
    with pytest.raises(RunError, match=r"state.json is missing; .* of step 15: .*--from-step 15"):
        take_up(run, 10, print)
    assert steps(run) == [5, 10, 15]


def test_a_step_without_a_checkpoint_and_a_run_that_is_not_named_are_refused(run, recipe_of_nothing):
    with pytest.raises(UsageError, match=r"run some-run has no checkpoint of step 12; there are 5, 10, 15"):
        take_up(run, 12, print)
    with pytest.raises(UsageError, match=r"name the run with --resume"):
        train(recipe_of_nothing, from_step=5)


def test_a_run_without_checkpoints_begins_anew(tmp_path):
    run = RunPaths(tmp_path / "new-run")
    take_up(run, None, pytest.fail)
    with pytest.raises(UsageError, match=r"no checkpoint of step 5; there are none"):
        take_up(run, 5, print)


@pytest.fixture
def recipe_of_nothing(tmp_path, monkeypatch):
    from cluster.config import load_recipe

    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))
    file = tmp_path / "r.yaml"
    file.write_text("name: r\nmodel: {path: m}\ndata: {sources: [{path: 'builtin:stdlib-code'}], steps: 3}\n")
    return load_recipe(file)
