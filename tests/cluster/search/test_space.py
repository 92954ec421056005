"""The space against the typed recipe, drawn from by Optuna, and as a grid."""

import copy
import math

import optuna
import pytest

from cluster.config import parse_recipe
from cluster.search.space import Space, Stretch, shown, source_name
from data_services.schema import UsageError

BASE = {
    "name": "m",
    "data": {
        "sources": [{"path": "a/nli.jsonl", "weight": 1}, {"path": "builtin:stdlib-code", "weight": 1}],
        "steps": 90,
    },
    "model": {"config": {"hidden": 32, "heads": 2}},
    "queue": {"rows": 64},
}
SPACE = {
    "objective": {"kind": "choice", "values": {"cone": {"hardest_share": 0.5}, "triplet": {"kind": "triplet"}}},
    "objective.temperature": {
        "kind": "loguniform", "low": 0.01, "high": 0.2, "points": 3, "when": {"objective": ["cone"]}
    },
    "queue.rows": {"kind": "choice", "values": [0, 64, 512]},
    "momentum.decay": {"kind": "uniform", "low": 0.5, "high": 0.99, "points": 2, "when": {"queue.rows": [64, 512]}},
    "data.sources.nli.weight": {"kind": "uniform", "low": 0.1, "high": 1.0, "points": 2},
    "model.config.layers": {"kind": "int", "low": 1, "high": 3},
    "optimizer.betas": {"kind": "choice", "values": {"slow": [0.9, 0.999], "fast": [0.9, 0.98]}},
}  # fmt: skip


def made(space=None, **search):
    raw = copy.deepcopy(BASE) | {"search": {"space": copy.deepcopy(SPACE if space is None else space)} | search}
    return Space(parse_recipe(raw, "m.yaml"))


def drawn(space, trials=60):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    asked = [study.ask() for _ in range(trials)]
    for trial in asked:
        space.draw(trial)
    return [trial.params for trial in asked]


def test_the_space_of_every_kind_is_right_and_every_draw_makes_a_recipe():
    space = made()
    space.check("m.yaml")
    for settings in drawn(space):
        recipe = space.trial_recipe(settings)
        if settings["objective"] == "cone":
            assert recipe.objective.temperature == settings["objective.temperature"]
            assert recipe.objective.hardest_share == 0.5
        else:
            assert recipe.objective.kind == "triplet"
            assert "objective.temperature" not in settings
        assert recipe.queue.rows == settings["queue.rows"]
        assert ("momentum.decay" in settings) == (settings["queue.rows"] > 0)
        assert recipe.data.sources[0].weight == settings["data.sources.nli.weight"]
        assert recipe.data.sources[1].weight == 1
        assert recipe.model.config.layers in (1, 2, 3)
        assert recipe.model.config.hidden == 32
        assert list(recipe.optimizer.betas) == space.config.space["optimizer.betas"].values[settings["optimizer.betas"]]


def test_draws_keep_to_their_distribution():
    temperatures = [s["objective.temperature"] for s in drawn(made(), 400) if "objective.temperature" in s]
    assert min(temperatures) >= 0.01
    assert max(temperatures) <= 0.2
    below = sum(t < math.sqrt(0.01 * 0.2) for t in temperatures) / len(temperatures)
    assert 0.4 < below < 0.6  # half of them below the geometric mean


def test_a_grid_has_every_combination_once_and_nothing_that_is_off():
    grid = made().grid()
    objectives, queues = 3 + 1, 1 + 2 * 2  # cone at three temperatures, or triplet; no queue, or two at two decays
    assert len(grid) == objectives * queues * 2 * 3 * 2
    assert len({tuple(settings.items()) for settings in grid}) == len(grid)
    assert all(("objective.temperature" in s) == (s["objective"] == "cone") for s in grid)
    values = sorted({s["objective.temperature"] for s in grid if "objective.temperature" in s})
    assert values == pytest.approx([0.01, math.sqrt(0.01 * 0.2), 0.2])


def test_what_only_the_trials_have_is_not_in_the_recipe_found():
    space = made(trial={"data.steps": 12, "model.config.hidden": 16})
    settings = drawn(space, 1)[0]
    trial, chosen = space.trial_recipe(settings), space.chosen_recipe([Stretch(settings)])
    assert (trial.data.steps, trial.model.config.hidden) == (12, 16)
    assert (chosen.data.steps, chosen.model.config.hidden) == (90, 32)
    assert trial.evaluation.heldout is None
    assert chosen.evaluation.heldout == "heldout"
    assert chosen.search is None


UNIFORM = {"kind": "uniform", "low": 0.1, "high": 0.9}
WRONG = {
    "a key that isn't there": (
        {"objective.temprature": UNIFORM}, {}, "unknown key objective.temprature; did you mean objective.temperature?"
    ),
    "an end out of range": (
        {"momentum.decay": UNIFORM | {"high": 1.5}}, {}, "momentum.decay: 1.5 must lie in [0, 1]"
    ),
    "a value of a choice": ({"queue.rows": {"kind": "choice", "values": [64, -1]}}, {}, "queue.rows is -1"),
    "a source that isn't there": ({"data.sources.nil.weight": UNIFORM}, {}, "the sources are nli, stdlib-code"),
    "a key and a part of it": (
        {"objective": SPACE["objective"], "objective.temperature": UNIFORM}, {}, "say in objective.temperature.when"
    ),
    "a metric nobody measures": ({"momentum.decay": UNIFORM}, {"objectives": {"ndgc@10": "max"}}, "ndgc@10"),
    "a start outside": ({"momentum.decay": UNIFORM}, {"start": [{"momentum.decay": 0.95}]}, "outside 0.1 … 0.9"),
    "a start of another key": (
        {"momentum.decay": UNIFORM}, {"start": [{"momentum.deca": 0.5}]}, "did you mean momentum.decay?"
    ),
    "a trial's key": ({"momentum.decay": UNIFORM}, {"trial": {"data.step": 3}}, "did you mean data.steps?"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_space_is_one_sentence_before_anything_starts(what):
    space, search, sentence = WRONG[what]
    with pytest.raises(UsageError) as error:
        made(space, **search).check("m.yaml")
    assert str(error.value).startswith("m.yaml")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


UNTYPED = {
    "low above high": ({"queue.rows": {"kind": "int", "low": 5, "high": 2}}, "search.space.queue.rows: low (5)"),
    "a misspelt bound": (
        {"queue.rows": {"kind": "int", "lo": 5, "high": 9}}, "did you mean search.space.queue.rows.low?"
    ),
    "an unknown kind": ({"queue.rows": {"kind": "integer"}}, "search.space.queue.rows.kind is 'integer'"),
    "a condition on nothing": (
        {"queue.rows": {"kind": "int", "low": 1, "high": 9, "when": {"seed": [1]}}}, "which is no choice of the space"
    ),
    "a condition that never holds": (
        {
            "seed": {"kind": "choice", "values": [1, 2]},
            "queue.rows": {"kind": "int", "low": 1, "high": 9, "when": {"seed": [3]}},
        },
        "seed is never 3",
    ),
    "a value twice": ({"seed": {"kind": "choice", "values": [1, 1]}}, "has a value twice"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNTYPED)
def test_a_wrong_section_names_its_key(what):
    space, sentence = UNTYPED[what]
    with pytest.raises(UsageError) as error:
        made(space)
    assert sentence in str(error.value)


def test_a_grid_asks_for_its_points():
    with pytest.raises(UsageError, match=r"space\.momentum\.decay\.points is missing"):
        made({"momentum.decay": UNIFORM}, algorithm="grid")


def test_settings_are_shown_short_but_apart():
    assert shown({"objective.temperature": 0.04321, "queue.rows": 64}) == "temperature=0.04321 rows=64"
    assert shown({"data.sources.0.weight": 1.0, "terms.0.weight": 2}) == "data.sources.0.weight=1 terms.0.weight=2"
    assert [source_name(p) for p in ("a/nli.jsonl", "builtin:stdlib-code", "s3://b/x.parquet")] == [
        "nli",
        "stdlib-code",
        "x",
    ]
