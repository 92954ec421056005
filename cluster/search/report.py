"""report.html of a search: what it found, what mattered, what was stopped when, what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.console import duration
from cluster.search.config import Choice, Integer, LogUniform
from cluster.search.importance import equally_long, importance
from cluster.search.record import TrialRecord
from cluster.search.results import SearchResult
from cluster.search.space import Space, short_names, shown, value_text
from evaluation.charts import Axis, bar_chart, line_chart, number, parallel_coordinates, point_chart
from evaluation.page import command, page, paragraph, section, table, tiles

TEMPERATURE = "objective.temperature"


def search_page(space: Space, found: SearchResult) -> str:
    """The page of a search that ended; HTML."""
    objective = next(iter(found.objectives))
    sections = [_summary(found, objective)]
    if len(found.objectives) > 1:
        sections.append(_front(found))
    if found.best and found.best.parent:
        sections.append(_course(found, found.best))
    sections += [_settings(space, found, objective), _over_time(found, objective)]
    if space.config.algorithm != "pbt":  # there settings change on the way
        sections.append(_mattered(space, found, objective))
    if TEMPERATURE in space.config.space:
        sections.append(_geometry(found))
    if found.final:
        sections.append(_final(found))
    sections += [_trials(found), _recipe(space, found)]
    aim = ", ".join(f"{name} ({mode})" for name, mode in found.objectives.items())
    return page(f"Search {found.search_id}", sections, f"Objectives on the validation split: {aim}")


def _summary(found: SearchResult, objective: str) -> str:
    stopped = [t for t in found.trials if t.outcome.state == "stopped"]
    figures = {
        f"best {objective}": number(found.best.last[objective]) if found.best else "none",
        "trials": str(len(found.trials)),
        "stopped early": str(len(stopped)),
        "failed": str(found.states.get("failed", 0)),
        "worker-seconds": f"{found.worker_seconds:,.0f}",
        "time": duration(found.seconds) if found.seconds else "under way",
    }
    lines = [paragraph(f"It ended before its last trial: {found.ended_by}.")] if found.ended_by else []
    if found.best and found.command:
        lines += [paragraph(f"Trial {found.best.number}: {shown(found.best.settings)}"), command(found.command)]
    return section("What was found", tiles(figures), *lines)


def _front(found: SearchResult) -> str:
    first, second = list(found.objectives)[:2]
    whole = [t for t in found.trials if t.outcome.state == "completed"]
    points = {f"trial {t.number}": (t.last[second], t.last[first]) for t in whole}
    strong = [f"trial {n}" for n in found.front]
    chart = point_chart(
        points, second, first, strong=strong, caption="Completed trials; no other beats the named ones."
    )
    by_number = {t.number: t for t in whole}
    rows = [
        [str(n), *(number(by_number[n].last[o]) for o in found.objectives), shown(by_number[n].settings)]
        for n in found.front
    ]
    return section("Pareto front", chart, table(["trial", *found.objectives, "settings"], rows))


def _course(found: SearchResult, best: TrialRecord) -> str:
    """Whose fork the best trial is, and with which settings each of them went on."""
    by_number, ancestry = {t.number: t for t in found.trials}, [best]
    while parent := ancestry[0].parent:
        ancestry.insert(0, by_number[parent.trial])
    rows = [[str(t.number), str(t.parent.step if t.parent else 0), shown(t.settings)] for t in ancestry]
    told = paragraph("It began as a fork of another trial, with that one's weights, optimizer, average and queue.")
    return section("How the best came about", told, table(["trial", "from step", "settings"], rows))


def _settings(space: Space, found: SearchResult, objective: str) -> str:
    axes, names = [], short_names(space.config.space)
    for key, of in space.config.space.items():
        choices = tuple(value_text(v) for v in of.grid) if isinstance(of, Choice) else ()
        axes.append(Axis(names[key], isinstance(of, LogUniform) or (isinstance(of, Integer) and of.log), choices))
    seen = [t for t in found.trials if t.checks]
    rows: dict[str, Mapping[str, Any]] = {
        f"trial {t.number}": {
            **{
                names[k]: value_text(v) if isinstance(space.config.space[k], Choice) else v
                for k, v in t.settings.items()
            },
            objective: t.last[objective],
        }
        for t in seen
    }
    best = f"trial {found.best.number}" if found.best else ""
    caption = "A line is a trial, at its last check: the bluer the better, the best one in orange."
    return section("Settings", parallel_coordinates(axes, rows, objective, best=best, caption=caption))


def _over_time(found: SearchResult, objective: str) -> str:
    measured = {(t.number, c.step): c.measured[objective] for t in found.trials for c in t.checks}

    def curve(trial: TrialRecord) -> list[tuple[float, float]]:
        """A fork's begins where it left its parent's."""
        parent = trial.parent
        begin = [(parent.step, measured[parent.trial, parent.step])] if parent else []
        return [*begin, *((check.step, measured[trial.number, check.step]) for check in trial.checks)]

    lines = {f"trial {t.number} ({t.outcome.state}): {shown(t.settings)}": curve(t) for t in found.trials if t.checks}
    sign = 1 if found.objectives[objective] == "max" else -1
    chart = line_chart(lines, "step", objective, caption="Each trial at its checks; a short line was stopped there.")
    best: list[tuple[float, float]] = []
    spent = 0.0
    for trial in found.trials:
        spent += trial.worker_seconds
        value = trial.last[objective] if trial.outcome.state == "completed" else None
        if best:
            best.append((spent, best[-1][1]))
        if value is not None and (not best or sign * value > sign * best[-1][1]):
            best.append((spent, value))
    bought = line_chart(
        {"best": best}, "worker-seconds", f"best {objective}", caption="The best completed trial so far."
    )
    return section("Over time", chart, bought)


def _mattered(space: Space, found: SearchResult, objective: str) -> str:
    shares = importance(space, found.trials, objective)
    if not shares:
        return section("What mattered", paragraph("Too few trials were measured equally long to say."))
    caption = (
        f"Share of the variance of {objective} that each key explains, by functional ANOVA over the trials at the "
        "check that most of them reached. Keys that only some trials have are left out."
    )
    return section("What mattered", bar_chart(shares, caption=caption))


def _geometry(found: SearchResult) -> str:
    """What temperature does to the vectors (Wang & Isola 2020), of trials trained equally long."""
    at, by_number = equally_long(found.trials), {t.number: t for t in found.trials}
    step = next((check.step for check in at.values()), 0)

    def chart(metric: str, told: str) -> str:
        points = {
            f"trial {n}": (by_number[n].settings[TEMPERATURE], check.measured[metric])
            for n, check in at.items()
            if TEMPERATURE in by_number[n].settings and metric in check.measured
        }
        return point_chart(points, TEMPERATURE, metric, caption=f"{told} Training's batch at step {step}.", log_x=True)

    return section(
        "Temperature, alignment and uniformity",
        chart("alignment", "Mean squared distance of a query and its positive; smaller is closer."),
        chart("uniformity", "Log mean exp(−2 · squared distance) over pairs of queries; smaller is more spread out."),
    )


def _final(found: SearchResult) -> str:
    names = list(found.final[0]["heldout"] or found.final[0]["validation"])
    split = "heldout" if found.final[0]["heldout"] else "validation"
    rows = [[str(run["seed"]), *(number(run[split][n]) for n in names), run["run_id"]] for run in found.final]
    told = paragraph(f"The recipe found, trained whole with each seed, on the {split} split. No choice looked at it.")
    return section("Final runs", told, table(["seed", *names, "run"], rows))


def _trials(found: SearchResult) -> str:
    names = list(found.objectives)

    def row(trial: TrialRecord) -> list[str]:
        at = f"{trial.checks[-1].step}/{trial.checks[-1].steps}" if trial.checks else ""
        values = [number(trial.last[name]) if trial.checks else "" for name in names]
        cost = f"{trial.worker_seconds:,.0f}"
        return [str(trial.number), *values, at, cost, trial.outcome.state, trial.outcome.reason, shown(trial.settings)]

    header = ["trial", *names, "step", "worker-seconds", "state", "reason", "settings"]
    return section("Trials", table(header, [row(trial) for trial in found.trials]))


def _recipe(space: Space, found: SearchResult) -> str:
    keys = [[key, of.kind, _range_of(of)] for key, of in space.config.space.items()]
    aside = [f"{key}: {value!r}" for key, value in space.config.trial.items()]
    told = [paragraph("In the trials alone: " + ", ".join(aside))] if aside else []
    return section("What was searched", table(["key", "distribution", "values"], keys), *told, paragraph(found.folder))


def _range_of(of: Any) -> str:
    if isinstance(of, Choice):
        return ", ".join(value_text(value) for value in of.grid)
    return f"{value_text(of.low)} … {value_text(of.high)}"
