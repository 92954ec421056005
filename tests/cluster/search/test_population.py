"""Population based training: what is decided, what a fork takes over, and what the recipe found says of it."""

import json
import os
from pathlib import Path

import pytest
import yaml

from cluster.config import Recipe
from cluster.search.config import Choice, Integer, LogUniform
from cluster.search.fork import course_of, donate
from cluster.search.population import Population, inside
from cluster.search.record import Check, Parent, StudyPaths
from cluster.search.results import write_best
from cluster.search.space import Space, Stretch
from cluster.search.trial import FAILED, checks_of, ready_trial
from cluster.worker import Task
from data_services.schema import UsageError
from tests.cluster.search.test_space import made
from tests.e2e.commands import differing, results_in
from tests.e2e.conftest import mini_recipe, write_pairs
from trainers.config import OptimizerConfig
from trainers.objectives.sections.numbers import Pieces, ends_of, value_at
from trainers.optimization import learning_rate

TEMPERATURE = {"kind": "loguniform", "low": 0.01, "high": 0.5}
SPACE = {
    "objective.temperature": TEMPERATURE,
    "objective.hardest_share": {"kind": "uniform", "low": 0.1, "high": 1.0},
    "momentum.decay": {"kind": "choice", "values": [0.5, 0.9, 0.99]},
    "data.sources.nli.weight": {"kind": "uniform", "low": 0.1, "high": 1.0},
}
POPULATION = {"algorithm": "pbt", "trials": 8, "population": {"generations": 3}}


def test_a_population_is_compared_after_equal_parts():
    config = made(SPACE, **POPULATION).config
    assert checks_of(90, config) == [(30, 1), (60, 2), (90, 3)]
    assert checks_of(10, config) == [(3, 1), (7, 2), (10, 3)]


def test_pieces_hold_their_value_from_their_share_of_the_run_on():
    pieces = Pieces.model_validate({"pieces": [{"after": 0, "value": 3}, {"after": 2 / 7, "value": 1}]})
    assert [value_at(pieces, step / 7) for step in range(4)] == [3, 3, 1, 1]
    assert ends_of(pieces) == [3, 1]
    config = OptimizerConfig.model_validate({"lr": pieces.model_dump(), "warmup_steps": 2, "min_lr_share": 1})
    assert [learning_rate(config, step, 7) for step in range(4)] == [1.5, 3, 1, 1]
    for wrong in ([], [(0.1, 1)], [(0, 1), (0, 2)], [(0, 1), (0.5, 2), (0.2, 3)]):
        with pytest.raises(ValueError, match="pieces"):
            Pieces.model_validate({"pieces": [{"after": after, "value": value} for after, value in wrong]})


def test_a_changing_course_becomes_schedules_where_something_changes():
    space = made(SPACE, **POPULATION)
    space.check("m.yaml")
    first = {"objective.temperature": 0.1, "momentum.decay": 0.9, "data.sources.nli.weight": 0.2}
    course = [Stretch(first), Stretch(first | {"objective.temperature": 0.12}, 30, 90)]
    course.append(Stretch(course[1].settings | {"data.sources.nli.weight": 0.3}, 60, 90))
    trial = space.trial_course(course)
    assert [value_at(trial.objective.temperature, step / 90) for step in (0, 29, 30, 89)] == [0.1, 0.1, 0.12, 0.12]
    assert trial.momentum.decay == 0.9
    assert [trial.data.sources[0].weight_at(step) for step in (0, 59, 60, 89)] == [0.2, 0.2, 0.3, 0.3]
    whole = space.chosen_recipe(course, steps=900)
    assert whole.objective.temperature == trial.objective.temperature  # by the share of the run
    assert whole.data.sources[0].weight_steps == [0, 600]


WRONG = {
    "a key that can't change": ({"queue.rows": {"kind": "int", "low": 0, "high": 9}}, {}, "queue.rows can't change"),
    "a condition": (
        {
            "momentum.decay": {"kind": "choice", "values": [0.5, 0.9]},
            "objective.temperature": TEMPERATURE | {"when": {"momentum.decay": [0.5]}},
        },
        {},
        "algorithm pbt changes every key by itself",
    ),
    "what ASHA asks": (SPACE, {"reduction": 2.0}, "reduction is given, and algorithm pbt has no use for it"),
    "a population without one": (SPACE, {"algorithm": "tpe"}, "population is given, and algorithm tpe has no use"),
    "one trial": (SPACE, {"trials": 1}, "give 2 or more"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_population_cannot_have_is_one_sentence(what):
    space, search, sentence = WRONG[what]
    with pytest.raises(UsageError, match=sentence):
        made(space, **(POPULATION | search)).check("m.yaml")


def test_a_moved_value_is_one_the_distribution_has():
    assert inside(Integer(low=2, high=11, step=3), 6.6) == 8
    assert inside(Integer(low=2, high=11, step=3), 99) == 11
    assert inside(LogUniform(low=0.1, high=0.2), 0.05) == 0.1


def run_generations(space, study, worth):
    """What `Population` suggests where a trial is worth that, or fails where it is None; nothing is trained."""
    replaced: list[int] = []
    population, seen = Population(space, study, space.config.trials, 1, replaced.append), []
    while isinstance(chosen := population.suggest(str(len(seen))), dict):
        seen.append(chosen)
        paths = study.trial(chosen["number"])
        paths.begin(chosen["number"], chosen["settings"], chosen["parent"])
        step, value = 30 * chosen["generation"], worth(chosen["settings"])
        if value is not None and all(check.step < step for check in paths.read().checks):
            commit(paths.run.checkpoints, step)
            paths.add(Check(step, 90, 1.0, {"ndcg@10": value}))
        same = [other for other in seen if other["generation"] == chosen["generation"]]
        if len(same) < space.config.trials:
            continue
        for other in same:
            value = worth(other["settings"])
            population.on_trial_complete(
                str(seen.index(other)), {FAILED: "why"} if value is None else {"ndcg@10": value}
            )
    assert chosen == "FINISHED"
    return seen, replaced


def commit(checkpoints, step):
    """A checkpoint of no worker."""
    folder = checkpoints / f"step-{step:08d}.000000"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"step": step, "world_size": 0, "files": {}}))


def test_the_worst_are_replaced_by_forks_of_the_best_and_a_second_time_the_same_is_decided(tmp_path):
    space, study = made(SPACE, **POPULATION), StudyPaths(tmp_path)

    def worth(settings):
        return settings["objective.temperature"] if settings["momentum.decay"] < 0.95 else None

    seen, replaced = run_generations(space, study, worth)
    generations = [[c for c in seen if c["generation"] == g] for g in (1, 2, 3)]
    assert [len(generation) for generation in generations] == [8, 8, 8]
    first = {c["number"]: worth(c["settings"]) for c in generations[0]}
    failed = [number for number, value in first.items() if value is None]
    ranked = sorted((n for n in first if n not in failed), key=lambda n: -first[n])
    born = [c for c in generations[1] if c["number"] >= 8]
    assert len(failed) > 0
    assert len(born) == len(failed) + 2
    assert replaced[:2] == ranked[-2:]
    for child in born:
        assert child["parent"] == Parent(child["parent"].trial, 30, 90)
        assert child["parent"].trial in ranked[:2]
        assert (study.trial(child["number"]).donated.checkpoints / "step-00000030.000000" / "manifest.json").exists()
        before = study.trial(child["parent"].trial).read().settings
        for key, value in child["settings"].items():
            of = space.config.space[key]
            assert value in of.grid if isinstance(of, Choice) else of.low <= value <= of.high
        assert child["settings"] != before
    assert {c["number"] for c in generations[1]} >= set(ranked[:-2])
    assert run_generations(space, study, worth) == (seen, replaced)  # a search that is resumed


def recipe_of(tmp_path):
    """A search over what may change, of a training of nine steps with all that has state."""
    raw = mini_recipe(write_pairs(tmp_path / "one"))
    (tmp_path / "two").mkdir()
    lines = (tmp_path / "one" / "train.jsonl").read_text().splitlines()
    (tmp_path / "two" / "train.jsonl").write_text("\n".join(lines[::2]) + "\n")
    raw["data"] |= {"steps": 9, "homogeneous": False}
    raw["data"]["sources"] = [{"path": str(tmp_path / name), "weight": 0.5} for name in ("one", "two")]
    space = {"objective.temperature": TEMPERATURE, "data.sources.two.weight": SPACE["data.sources.nli.weight"]}
    space |= {"objective.hardest_share": SPACE["objective.hardest_share"], "optimizer.lr": TEMPERATURE}
    raw["search"] = {"space": space, "start": [START]} | POPULATION
    return Recipe.model_validate(raw)


START = {
    "objective.temperature": 0.2,
    "data.sources.two.weight": 0.5,
    "objective.hardest_share": 1.0,
    "optimizer.lr": 0.01,
}
OTHER = {
    "objective.temperature": 0.16,
    "data.sources.two.weight": 0.9,
    "objective.hardest_share": 0.4,
    "optimizer.lr": 0.012,
}


def train_until(task, reader, stop):
    """On a rank: from the newest checkpoint to a step."""
    import torch.distributed as dist

    from cluster.worker import Training
    from data_services.stream import LocalStream

    stream = LocalStream(reader, dist.get_world_size(), dist.get_rank(), task.recipe.engine.budget_tokens)
    Training(task).run(stream, stop)


def computed(run):
    """The results of a run's steps; the temperature is only among them where it isn't a constant."""
    return [{k: v for k, v in step.items() if k != "temperature"} for step in results_in(run.metrics)]


def test_a_fork_goes_on_as_its_parent_would_and_its_recipe_alone_gives_the_same(gloo, tmp_path):
    recipe = recipe_of(tmp_path)
    space, study, home = Space(recipe), StudyPaths(tmp_path / "home" / "study"), tmp_path / "home"
    study.root.mkdir(parents=True)

    def trained(number, stop):
        """The results of a trial's steps, by step, once it is trained so far."""
        course = course_of(study.ancestry(number))
        ready = ready_trial(space.trial_course(course), study, study.trial(number), home)
        gloo(2, train_until, Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage()), ready.reader, stop)
        return computed(ready.run)

    study.trial(0).begin(0, START)
    trained(0, 3)
    check = Check(3, 9, 1.0, {"ndcg@10": 0.5})
    study.trial(0).add(check)
    donate(study, 0, check, 1, START)
    donate(study, 0, check, 2, OTHER)
    parent = trained(0, 9)  # which removes the checkpoint that the forks began with
    assert len(parent) == 9
    assert differing(trained(1, 9), parent) == {}
    changed = trained(2, 9)
    assert {int(step) for step in differing(changed, parent)} >= {3, 4, 5}
    assert not {int(step) for step in differing(changed, parent)} & {0, 1, 2}
    study.trial(2).add(Check(9, 9, 1.0, {"ndcg@10": 0.6}))
    best = write_best(study, space, study.trial(2).read(), 9)
    assert yaml.safe_load(study.best.read_text())["objective"]["temperature"]["pieces"][1]["value"] == 0.16
    study.trial(9).begin(9, START)
    alone = ready_trial(best, study, study.trial(9), home)
    gloo(2, train_until, Task(alone.recipe, alone.run, 9, alone.lineage()), alone.reader, 9)
    assert differing(computed(alone.run), changed) == {}


@pytest.mark.proof
def test_a_population_is_trained_on_one_crew_and_hands_back_a_schedule(tmp_path, root):
    from cluster.config import load_recipe
    from cluster.search.study import search

    recipe = recipe_of(tmp_path)
    made_of = recipe.model_dump(mode="json", exclude_unset=True)
    made_of["search"] |= {"trials": 3, "population": {"generations": 3, "replaced": 0.34}, "queries": 20}
    found = search(Recipe.model_validate(made_of), work="tests.cluster.search.surface:Counted")
    study = StudyPaths(Path(found.folder))
    forks = [t for t in found.trials if t.parent]
    assert len(forks) >= 2
    assert found.states == {"completed": 3, "stopped": len(forks)}
    assert all(fork.checks[0].step > fork.parent.step for fork in forks)
    begun = [json.loads(line)["pid"] for path in sorted(study.root.glob("trials/*/run/begun.jsonl"))
             for line in path.read_text().splitlines()]  # fmt: skip
    assert len(begun) == 9, "three trials of three generations"
    assert len(set(begun)) == 1, "one crew did all of them"
    assert load_recipe(found.recipe).data.steps == 9
    again = search(Recipe.model_validate(made_of), resume=found.search_id, work="tests.cluster.search.surface:Counted")
    assert again.trials == found.trials
    assert os.stat(study.report).st_size > 0
