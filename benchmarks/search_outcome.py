"""What a search was worth: the settings found against the recipe's own and against a sweep of temperatures by hand.

    gyre search recipes/search-temperature.yaml --json found.json
    python -m benchmarks.search_outcome found.json --steps 72 --svg docs/search-temperature.svg

All are trained equally long, as trials of one search on warm workers, and scored on the held-out modules, which no
choice looked at, but one: the sweep's best is chosen there, in its favour, and trained with the other seeds then. The
interval of a difference is Student's over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, machine_line, options, write
from benchmarks.search import METRIC, RECIPE, searched

TEMPERATURE = "objective.temperature"
SEEDS = (0, 1, 2)
STUDENT_975 = 4.303  # of two degrees of freedom: three seeds


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("found", type=Path, help="what `gyre search --json` wrote")
    parser.add_argument("--steps", type=int, default=72, help="of every training")
    parser.add_argument("--batch", type=int, default=128, help="pairs of a step")
    parser.add_argument("--sweep", type=int, default=12, help="temperatures tried by hand; 0: none")
    parser.add_argument("--svg", type=Path, help="draw what temperature does")
    args = parser.parse_args()
    if args.svg and not args.sweep:
        parser.error("--svg draws the sweep: leave out --sweep 0")
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-search-") as home:
        figures = outcome(args, Path(home))
    if args.svg:
        draw(figures["sweep"], args.svg)
    write(args.json, figures | {"machine": about})


def outcome(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    from cluster.config import load_recipe

    default, search = load_recipe(RECIPE).search.start[0], json.loads(args.found.read_text())  # type: ignore[union-attr]
    best = search["best"]["settings"]
    points = min(args.sweep, 3) if args.quick else args.sweep
    sweep = [default | {TEMPERATURE: round(0.01 * 30 ** (i / max(points - 1, 1)), 4)} for i in range(points)]
    runs = [{**settings, "seed": seed} for settings in (best, default) for seed in SEEDS]
    trained = train([*runs, *({**settings, "seed": SEEDS[0]} for settings in sweep)], args, home)
    sides, swept = {"found": trained[:3], "default": trained[3:6]}, trained[6:]
    if swept:
        strongest = max(swept, key=lambda run: run[METRIC])
        others = [{**sweep[swept.index(strongest)], "seed": seed} for seed in SEEDS[1:]]
        sides[f"sweep's best ({strongest[TEMPERATURE]:g})"] = [strongest, *train(others, args, home)]
    print(f"{METRIC} on the held-out modules, {args.steps} steps of {args.batch} pairs, seeds {SEEDS}")
    for name, side in sides.items():
        values = [run[METRIC] for run in side]
        print(f"  {name:24}{statistics.mean(values):.4f}  ({', '.join(f'{v:.4f}' for v in values)})")
    figures = {name: difference(sides["found"], sides[name]) for name in list(sides)[1:]}
    for name, (mean, low, high) in figures.items():
        print(f"found - {name}: {mean:+.4f} (95 %: {low:+.4f} to {high:+.4f})")
    print(f"the search took {search['worker_seconds']:,.0f} worker-seconds, {len(search['trials'])} trials")
    return {"sides": sides, "differences": figures, "sweep": swept, "settings": best, "steps": args.steps}


def difference(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> tuple[float, float, float]:
    """(mean, low, high) of the difference of runs with the same seeds, 95 %."""
    each = [a[METRIC] - b[METRIC] for a, b in zip(ours, theirs, strict=True)]
    mean, half = statistics.mean(each), STUDENT_975 * statistics.stdev(each) / math.sqrt(len(each))
    return mean, mean - half, mean + half


def train(runs: Sequence[Mapping[str, Any]], args: argparse.Namespace, home: Path) -> list[dict[str, float]]:
    """Settings and figures of each run, on the held-out split, at its last step."""
    from cluster.config import load_recipe

    raw = load_recipe(RECIPE).model_dump(mode="json", exclude_unset=True)["search"]
    space = raw["space"] | {"seed": {"kind": "choice", "values": list(SEEDS)}}
    trial = raw["trial"] | {"data.steps": args.steps, "data.batch": args.batch}
    said: dict[str, Any] = {"space": space, "trial": trial, "start": list(runs), "trials": len(runs), "queries": None}
    said |= {"algorithm": "random", "stop_early": False, "first_check": 1.0}
    overrides = [f"search.{key}={json.dumps(value)}" for key, value in said.items()]
    result = searched([*overrides, "evaluation.validation=heldout", "evaluation.heldout=null"], home)
    return [{**trial["settings"], **trial["checks"][-1]["values"]} for trial in result["trials"]]


def draw(sweep: Sequence[Mapping[str, float]], path: Path) -> None:
    """Alignment, uniformity and the score over temperature, side by side, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gyre", "font.size": 10})
    from matplotlib import pyplot as plt

    labels = {
        METRIC: "nDCG@10, held-out",
        "alignment": "alignment (smaller: closer)",
        "uniformity": "uniformity (smaller: more spread out)",
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    ordered = sorted(sweep, key=lambda run: run[TEMPERATURE])
    for axis, (metric, label) in zip(axes, labels.items(), strict=True):
        axis.plot([run[TEMPERATURE] for run in ordered], [run[metric] for run in ordered], "o-", color="#2a6fc9")
        axis.set(xscale="log", xlabel="temperature", title=label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.patch.set_facecolor("white")
    figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
