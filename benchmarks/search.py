"""What a search costs until it has found what a whole grid finds: grid, random, and ours (TPE and ASHA).

On a recorded surface: a grid that was really trained, each point with all its checks and what they cost
(`--record`, some minutes on two cores; benchmarks/search_surface.json). The algorithms are those that
`gyre search` runs; settings between the points of the grid are answered by the nearest one. And for real (`--real`):
what a trial takes beyond its training steps and its validation, from a short search.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.common import REPOSITORY, machine, machine_line, options, shown, spread, write

if TYPE_CHECKING:
    from cluster.search.space import Settings, Space

RECIPE = REPOSITORY / "recipes" / "search-temperature.yaml"
SURFACE = Path(__file__).with_name("search_surface.json")
METRIC = "ndcg@10"
# The recorded grid: the recipe with a small tower, trained for seconds.
GRID = {
    "objective.temperature": {"kind": "loguniform", "low": 0.01, "high": 0.3, "points": 5},
    "queue.rows": {"kind": "choice", "values": [0, 256, 1024]},
    "optimizer.embedding_lr": {"kind": "loguniform", "low": 0.0005, "high": 0.02, "points": 3},
}
TRIAL = {
    "data.epochs": None,
    "data.steps": 18,
    "data.batch": 64,
    "model.config.hidden": 128,
    "model.config.intermediate": 128,
    "model.max_tokens": 64,
    "optimizer.warmup_steps": 2,
}
SHORT = [f"search.trial={json.dumps(TRIAL)}", "search.queries=200"]
MOST_TRIALS = 2000  # a random search meets any one of a few dozen points long before


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--orders", type=int, default=20, help="orders of the grid, and seeds of the others")
    parser.add_argument("--record", action="store_true", help="train the grid and store it as the surface")
    parser.add_argument("--real", action="store_true", help="also run a short search for a trial's overhead")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-search-") as home:
        if args.record:
            record(args, Path(home))
        figures = on_surface(args)
        if args.real:
            figures |= overhead(args, Path(home))
    write(args.json, figures | {"machine": about})


@dataclass(frozen=True)
class Recorded:
    """A point of the grid. checks: (step, worker-seconds so far, value) of each, in order."""

    settings: dict[str, Any]
    checks: tuple[tuple[int, float, float], ...]

    @property
    def value(self) -> float:
        return self.checks[-1][2]

    @property
    def cost(self) -> float:
        return self.checks[-1][1]


def on_surface(args: argparse.Namespace) -> dict[str, Any]:
    """Worker-seconds to the best of the grid, by algorithm, over many orders or seeds."""
    if not SURFACE.exists():
        sys.exit(f"{SURFACE} isn't there: run with --record first")
    stored = json.loads(SURFACE.read_text())
    points = [Recorded(p["settings"], tuple(tuple(c) for c in p["checks"])) for p in stored["points"]]
    best, whole = max(p.value for p in points), sum(p.cost for p in points)
    seeds = range(3 if args.quick else args.orders)
    costs = {name: [until_best(name, points, best, seed) for seed in seeds] for name in ("grid", "random", "ours")}
    median = {name: statistics.median(values) for name, values in costs.items()}
    figures = {
        "share_of_grid": median["ours"] / median["grid"],
        "share_of_whole_grid": median["ours"] / whole,
        "share_of_random": median["ours"] / median["random"],
        "worker_seconds": {name: spread(values) for name, values in costs.items()},
        "points": len(points),
        "best": best,
    }
    print(f"{len(points)} points, best {METRIC} {best:.4f}, the whole grid {whole:,.0f} worker-seconds")
    for name, values in costs.items():
        print(f"  {name:7}{shown(spread(values), '{:,.0f}')} worker-seconds until it is found")
    print(f"ours over grid: {figures['share_of_grid']:.2f} (goal: 0.33)")
    return figures


def until_best(algorithm: str, points: Sequence[Recorded], best: float, seed: int) -> float:
    """Worker-seconds spent when a trial that was trained whole has the best value of the grid."""
    if algorithm == "grid":
        order = random.Random(seed).sample(points, len(points))
        upto = next(i for i, point in enumerate(order) if point.value >= best)
        return sum(point.cost for point in order[: upto + 1])
    spent = 0.0
    for cost, value in trials_of(algorithm, points, seed):
        spent += cost
        if value is not None and value >= best:
            return spent
    return spent


def trials_of(algorithm: str, points: Sequence[Recorded], seed: int) -> Iterator[tuple[float, float | None]]:
    """(cost, value if trained whole) of each trial, one after another, as the search would run them."""
    from ray.tune.schedulers import TrialScheduler

    from cluster.search.algorithms import scheduler_of, search_of
    from cluster.search.trial import TIME, checks_of

    space = space_of("tpe" if algorithm == "ours" else "random", seed, algorithm == "ours")
    chooses, ends = search_of(space, []), scheduler_of(space)
    controller: Any = None  # what ASHA is handed and doesn't look at
    for number in range(MOST_TRIALS):
        name = str(number)
        chosen = chooses.suggest(name)
        assert chosen is not None, "neither of the two ends by itself"
        point, trial = nearest(points, chosen["settings"], space), SimpleNamespace(trial_id=name)
        if hasattr(ends, "on_trial_add"):
            ends.on_trial_add(controller, trial)  # type: ignore[arg-type]
        times = dict(checks_of(point.checks[-1][0], space.config))
        for check in point.checks:
            step, _, value = check
            result = {METRIC: value, TIME: times[step], "training_iteration": step}
            chooses.on_trial_result(name, result)
            last = step == point.checks[-1][0]
            if last or ends.on_trial_result(controller, trial, result) == TrialScheduler.STOP:  # type: ignore[arg-type]
                break
        chooses.on_trial_complete(name, result)
        if last:
            ends.on_trial_complete(controller, trial, result)  # type: ignore[arg-type]
        yield check[1], value if last else None


def space_of(algorithm: str, seed: int, stop_early: bool) -> Space:
    from cluster.config import Recipe, load_recipe
    from cluster.search.space import Space

    raw = load_recipe(RECIPE).model_dump(mode="json", exclude_unset=True)
    search = {"space": GRID, "trial": TRIAL, "trials": 40}
    search |= {"algorithm": algorithm, "seed": seed, "stop_early": stop_early}
    return Space(Recipe.model_validate(raw | {"search": search}))


def nearest(points: Sequence[Recorded], settings: Settings, space: Space) -> Recorded:
    """The recorded point next to some settings, each key measured on its own distribution, 0 to 1."""

    def distance(point: Recorded) -> float:
        return sum(abs(place(key, settings[key]) - place(key, point.settings[key])) for key in settings)

    def place(key: str, value: Any) -> float:
        of: Any = space.config.space[key]
        if of.kind == "choice":
            return float(of.grid.index(value))
        if of.kind == "loguniform":
            return math.log(value / of.low) / math.log(of.high / of.low)
        return (value - of.low) / (of.high - of.low)

    return min(points, key=distance)


def record(args: argparse.Namespace, home: Path) -> None:
    """Trains every point of the grid whole, and stores what each check found and cost."""
    overrides = ["search.algorithm=grid", "search.trials=null", "search.stop_early=false", "search.start=[]"]
    result = searched([*SHORT, *overrides, f"search.space={json.dumps(GRID)}"], home)
    points = [
        {
            "settings": trial["settings"],
            "checks": [[c["step"], c["worker_seconds"], c["values"][METRIC]] for c in trial["checks"]],
        }
        for trial in result["trials"]
        if trial["outcome"]["state"] == "completed"
    ]
    SURFACE.write_text(json.dumps({"metric": METRIC, "machine": machine(), "points": points}, indent=1) + "\n")


def overhead(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Seconds of a warm trial beyond its steps and its validation."""
    result = searched([*SHORT, f"search.trials={3 if args.quick else 8}", "search.stop_early=false"], home)
    warm = [trial for trial in result["trials"][1:] if trial["outcome"]["state"] == "completed"]
    beyond = [beyond_training(trial, workers=2) for trial in warm]
    print(f"a warm trial beyond its steps and its validation: {shown(spread(beyond))} s (goal: 5)")
    return {"trial_overhead_s": statistics.median(beyond), "trial_overhead": spread(beyond)}


def beyond_training(trial: Mapping[str, Any], workers: int) -> float:
    steps = trial["checks"][-1]["values"]["seconds"]
    validation = sum(check["values"]["validation_seconds"] for check in trial["checks"])
    return trial["worker_seconds"] / workers - steps - validation


def searched(overrides: Sequence[str], home: Path) -> dict[str, Any]:
    """The result of `gyre search`; exits with the end of what it said where it fails."""
    file = home / "found.json"
    gyre = [sys.executable, "-m", "cluster.cli", "search", str(RECIPE), "search.final_seeds=[]", *overrides]
    done = subprocess.run([*gyre, f"cluster.storage={home}", "--json", str(file)], cwd=REPOSITORY, text=True, stderr=-1)
    if done.returncode:
        sys.exit("\n".join(done.stderr.strip().splitlines()[-5:]))
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
