"""How much each key of a space mattered: Optuna's functional ANOVA over the trials that were measured."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cluster.search.config import AnyDistribution, Choice, Integer, LogUniform
from cluster.search.record import Check, TrialRecord
from cluster.search.space import Space

LEAST_TRIALS = 6


def importance(space: Space, trials: Sequence[TrialRecord], objective: str) -> dict[str, float]:
    """Share of the objective's variance that each key explains (Hutter et al. 2014), most important first.

    Of trials that reached the check most trials reached, so that they were trained equally long; keys that only some
    of them have are left out. Empty where fewer than LEAST_TRIALS did, or all came out the same.
    """
    found = equally_long(trials)
    values = {n: check.measured[objective] for n, check in found.items() if objective in check.measured}
    if len(values) < LEAST_TRIALS or len(set(values.values())) < 2:
        return {}
    settings = {trial.number: trial.settings for trial in trials}
    keys = [key for key in space.config.space if all(key in settings[n] for n in values)]
    if not keys:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    of = {key: distribution_of(space.config.space[key]) for key in keys}
    for n, value in values.items():
        params = {key: settings[n][key] for key in keys}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=of, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def equally_long(trials: Sequence[TrialRecord]) -> dict[int, Check]:
    """By number, the trials that reached the check most trials reached, as they were found there."""
    steps = [check.step for trial in trials for check in trial.checks]
    at = max(set(steps), key=lambda step: (steps.count(step), step), default=0)
    return {trial.number: check for trial in trials for check in trial.checks if check.step == at}


def distribution_of(of: AnyDistribution) -> BaseDistribution:
    if isinstance(of, Choice):
        return CategoricalDistribution(of.grid)
    if isinstance(of, Integer):
        return IntDistribution(of.low, of.high, log=of.log, step=of.step)
    return FloatDistribution(of.low, of.high, log=isinstance(of, LogUniform))
